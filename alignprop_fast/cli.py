"""The command line `alignprop-fast`. Heavy libraries are imported inside the commands, which have a file each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

from alignprop_fast.cli_demo import demo
from alignprop_fast.cli_doctor import doctor
from alignprop_fast.cli_evaluate import evaluate
from alignprop_fast.cli_merge import merge
from alignprop_fast.cli_options import ConfigCommand
from alignprop_fast.cli_plan import plan
from alignprop_fast.cli_sample import sample
from alignprop_fast.cli_support import BAD_INPUT, INTERRUPTED, fail
from alignprop_fast.cli_train import train

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
    """Run the command line and leave the process: exit code 0, 2 after bad input or on too small a GPU, 130 after
    Ctrl-C."""
    # Before anything imports torch: with segments that grow, live tensors can fill the budget instead of its pieces.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        code = app(arguments, standalone_mode=False)
    except _USAGE_ERRORS as error:
        if message := error.format_message():
            fail(message.removeprefix("Invalid value: "))
        code = BAD_INPUT
    except RuntimeError as error:
        from alignprop_fast.ops.errors import is_out_of_memory

        if "does not have a deterministic implementation" in str(error):
            fail(f"{str(error).partition(',')[0]}: leave --deterministic out, or use another reward")
        elif is_out_of_memory(error):
            fail(_out_of_memory(str(error)))
        else:
            raise
        code = BAD_INPUT
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    sys.exit(code or 0)


def _out_of_memory(message: str) -> str:
    """Torch's first sentences say how much of what; what to do is in it where a plan was known."""
    known = "no leaner plan" in message
    first = message.partition("\n")[0].partition(" If reserved")[0].removesuffix(".")
    return first if known else f"{first}: use a smaller --batch-size or --height and --width, or --base-dtype fp8"
