"""What several tests of the command line share."""

import pytest
import typer

from alignprop_fast.cli.options import ConfigCommand, command_line
from alignprop_fast.cli.train import TrainCall
from alignprop_fast.training.declaration import Command


@pytest.fixture
def train():
    """train(*arguments): the options that the command line of `train` parses. Raises typer.BadParameter."""
    got = []

    @command_line(Command.TRAIN, TrainCall())
    def train(ctx, options):
        got.append(options.run())

    app = typer.Typer()
    app.command(cls=ConfigCommand)(train)
    app.callback()(lambda: None)
    own = typer.main.get_command(app).commands["train"]

    def read(*arguments):
        own.invoke(own.make_context("train", [str(argument) for argument in arguments]))
        return got.pop()

    return read
