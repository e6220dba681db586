"""The command line `alignprop-fast`. Heavy libraries are imported inside the commands, which have a file each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from alignprop_fast.cli.demo import demo
from alignprop_fast.cli.doctor import doctor
from alignprop_fast.cli.evaluate import evaluate
from alignprop_fast.cli.merge import merge
from alignprop_fast.cli.options import ConfigCommand
from alignprop_fast.cli.plan import plan
from alignprop_fast.cli.sample import sample
from alignprop_fast.cli.screen import drop_output, lenient_output
from alignprop_fast.cli.signals import stopped_by_signals
from alignprop_fast.cli.support import BAD_INPUT, FAILED, INTERRUPTED, fail, known_error
from alignprop_fast.cli.train import train

# What bad options and arguments raise: ClickException, which new typer carries itself and old typer takes from click.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="alignprop-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a text-to-image diffusion model with the gradient of a reward (AlignProp).\n\n"
    "`alignprop-fast demo` shows it at work on the bundled model: any computer, no download.",
)
app.command()(demo)
app.command(cls=ConfigCommand)(train)
app.command()(plan)
app.command()(sample)
app.command()(evaluate)
app.command()(merge)
app.command()(doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process.

    Exit code 0: done; 1: a run that had begun failed, or the doctor found something wrong; 2: bad input, or too small a
    GPU; 128 and the signal's number after a signal: 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal.
    """
    # Before anything imports torch: with segments that grow, live tensors can fill the budget instead of its pieces.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    lenient_output()
    try:
        with stopped_by_signals():
            code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except _USAGE_ERRORS as error:
        if message := error.format_message():
            fail(message.removeprefix("Invalid value: "))
        code = BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):  # the former is a RuntimeError
        code = INTERRUPTED
    except RuntimeError as error:
        known = known_error(error)
        if not known:
            raise
        fail(known)
        code = BAD_INPUT
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # nobody reads the help to its end
            fail(str(error))
        drop_output(sys.stdout)
        code = FAILED
    sys.exit(code or 0)
