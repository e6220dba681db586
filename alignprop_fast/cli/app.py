"""The command line `alignprop-fast`. Each command has its own file and imports slow libraries only when it runs."""

from __future__ import annotations

import atexit
import gc
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

# Bad options and arguments raise ClickException. New versions of typer define it themselves; old ones use click's.
_USAGE_ERRORS: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="alignprop-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a text-to-image diffusion model with the gradient of a reward (AlignProp).\n\n"
    "`alignprop-fast demo` shows it on the bundled model, on any computer and without a download.",
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

    Exit codes. 0: done. 1: a started run failed, or the doctor found a fault. 2: bad input, or a GPU that is too small.
    128 + the signal's number after a signal: 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal.
    """
    # Before anything imports torch. Expandable segments avoid fragmentation, so tensors can use the whole budget.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # At its end Python looks through a million objects for garbage twice; this leaves out the first time.
    atexit.register(gc.disable)
    lenient_output()
    try:
        with stopped_by_signals():
            code = app(arguments, standalone_mode=False)
        sys.stdout.flush()
    except _USAGE_ERRORS as error:
        if message := error.format_message():
            fail(message.removeprefix("Invalid value: "))
        code = BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):  # before RuntimeError, because typer.Abort is one
        code = INTERRUPTED
    except RuntimeError as error:
        known = known_error(error)
        if not known:
            raise
        fail(known)
        code = BAD_INPUT
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader of the help has left
            fail(str(error))
        drop_output(sys.stdout)
        code = FAILED
    sys.exit(code or 0)
