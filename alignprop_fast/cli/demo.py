"""The command `demo`."""

from __future__ import annotations

import time

import typer

from alignprop_fast.cli.folder import OutputFolder
from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import go_on_by, quiet_libraries, run_errors, setup_errors
from alignprop_fast.cli.train import print_results
from alignprop_fast.training.declaration import Command
from alignprop_fast.training.options import TrainOptions

# With these settings the bundled few-step model learns visibly within half a minute on one CPU core: most things on a
# background of their own colour come to stand out.
SETTINGS = TrainOptions(
    model="demo-twin",
    output_dir="alignprop-demo",
    reward="clip:1.0,colorfulness:0.002",
    prompts="same-colour",
    steps=24,
    batch_size=4,
    learning_rate=2e-3,
    truncation="full",
    lora_rank=8,
    save_every=10,
    sample_every=10,
    device="cpu",
)
PICTURES = 16  # each row of the table is the mean of so many
HELDOUT_PROMPTS = "same-colour-heldout"
HELDOUT_SEED = 1000  # no other picture of the run has these seeds


@command_line(Command.DEMO, SETTINGS)
def demo(ctx: typer.Context, options: TrainOptions) -> None:
    """Fine-tune the bundled few-step model on a reward: half a minute on one CPU core, nothing to download.

    Shows the mean reward before and after, on training prompts and on prompts the model never saw. Writes the same
    files as train; open before_after.png first. Ctrl-C and SIGTERM save a checkpoint.

    **Examples**

    - `alignprop-fast demo --output-dir demo`
    - `alignprop-fast demo --reward colorfulness --steps 20 --output-dir colourful`
    """
    import os

    import torch

    begin, console = time.perf_counter(), make_console()
    folder = ctx.with_resource(OutputFolder(options.output_dir))
    with setup_errors():
        folder.check()
        quiet_libraries(console)
        from alignprop_fast.cli.set_up import set_up
        from alignprop_fast.prompts.rows import load_rows, spread

        # If a core is busy with other work, all threads wait for its thread: 400 s instead of 80 on two busy cores, 60
        # on two idle ones.
        torch.set_num_threads(2 if (os.cpu_count() or 1) >= 4 else 1)
        session = set_up(options, console, folder)
    console.print(f"the bundled model learns {options.reward}: {options.steps} steps of {options.batch_size} pictures")
    sets = {"training prompts": session.rows, "prompts never seen": load_rows(HELDOUT_PROMPTS)}
    chosen = {name: spread(rows, PICTURES) for name, rows in sets.items()}
    with run_errors(session.folder, go_on_by(session.folder)):
        before = {name: session.draw(rows, HELDOUT_SEED) for name, rows in chosen.items()}
        session.run()
        after = {name: session.draw(rows, HELDOUT_SEED) for name, rows in chosen.items()}
    print_results(console, session.folder, {name: (before[name], after[name]) for name in chosen})
    console.print(f"{time.perf_counter() - begin:.0f} seconds in total")
