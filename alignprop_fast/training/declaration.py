"""An option is declared once, as a field of a dataclass with name, type and default; `option(...)` holds the rest.

The declaration gives the command line and its help, the keys of YAML files, the checks of `AlignPropConfig`, and the
table in the docs. Nothing slow is imported here, so that the help appears at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Flag, StrEnum, auto
from math import inf, isfinite
from typing import Any


class Command(Flag):
    """The commands that take options."""

    NONE = 0
    TRAIN = auto()
    DEMO = auto()
    PLAN = auto()
    SAMPLE = auto()
    EVALUATE = auto()
    MERGE = auto()
    DOCTOR = auto()
    PICTURES = SAMPLE | EVALUATE | MERGE


class Panel(StrEnum):
    """The groups of options in the help, in its order."""

    MODEL = "Model"
    REWARD = "Reward and prompts"
    PROMPTS = "Prompts"
    SAMPLING = "Sampling"
    PATH = "Pictures along the path"
    TRAINING = "Training"
    CONTROL = "Control of over-optimisation"
    DEVICE = "Device and memory"
    ESTIMATE = "Estimate"
    OUTPUT = "Output"


@dataclass(frozen=True)
class Declaration:
    """The parts of a declaration other than name, type and default.

    commands: the commands that take it; `plan` takes every option that changes a plan.
    field: its name in `AlignPropConfig`, if trl has another one.
    choices: the allowed texts.
    at_least, at_most, above, below: bounds. A number without bounds must still be finite, unless `may_be_infinite`.
    unit: of the value, in messages.
    remedy: the message's advice, instead of one made from choices and bounds.
    shown: the default in words.
    changes_plan: whether it changes the bytes or seconds of a training step.
    argument: its name in the help, if it is a positional argument.
    """

    help: str = ""
    panel: Panel | None = None
    commands: Command = Command.TRAIN
    field: str = ""
    choices: tuple[str, ...] = ()
    at_least: float = -inf
    at_most: float = inf
    above: float = -inf
    below: float = inf
    may_be_infinite: bool = False
    unit: str = ""
    remedy: str = ""
    shown: str = ""
    changes_plan: bool = False
    argument: str = ""

    def taken_by(self, command: Command) -> bool:
        return command in (self.commands | Command.PLAN if self.changes_plan else self.commands)

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError with one line that names it `name` if the value is outside the choices or bounds."""
        if value is not None and not self._allows(value):
            shown = repr(value) if isinstance(value, str) else str(value)
            unit = f" {self.unit}" if self.unit else ""
            raise ValueError(f"{name} is {shown}{unit}: use {self.remedy or self._words()}")

    def _allows(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        if not isinstance(value, int | float):  # a text, or several values
            return True
        if self.may_be_infinite and value == inf:
            return True
        return self.at_least <= value <= self.at_most and self.above < value < self.below

    def _words(self) -> str:
        if self.choices:
            return " or ".join(filter(None, (", ".join(self.choices[:-1]), self.choices[-1])))
        if isfinite(self.at_least) and isfinite(self.at_most):
            return f"{self.at_least} to {self.at_most}"
        words = {"of at least": self.at_least, "above": self.above, "of at most": self.at_most, "below": self.below}
        bounds = [f"{word} {bound}" for word, bound in words.items() if isfinite(bound)]
        return f"a number {' and '.join(bounds)}" if bounds else "a finite number"


# Not in the fields' metadata, because transformers' HfArgumentParser passes that on to argparse.
_OPTIONS: dict[Field[Any], Declaration] = {}


def option(default: Any, help: str = "", panel: Panel | None = None, **more: Any) -> Any:
    """A field of a dataclass that is an option; `more`: the other fields of `Declaration`."""
    return _field(default, Declaration(help, panel, **more))


def like(owner: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """A copy of the option `name` of `owner`, with another default or with `changes`."""
    base = owner.__dataclass_fields__[name]  # type: ignore[attr-defined]
    return _field(base.default if default is MISSING else default, replace(_OPTIONS[base], **changes))


def _field(default: Any, option: Declaration) -> Any:
    made: Any = field(default=default, metadata={"help": option.help})
    _OPTIONS[made] = option
    return made


def declared(owner: Any) -> Iterator[tuple[Field[Any], Declaration]]:
    """The options of a dataclass, or of an instance of it, in the order of its fields."""
    return ((each, _OPTIONS[each]) for each in fields(owner) if each in _OPTIONS)


def taken(owner: Any, command: Command) -> list[tuple[Field[Any], Declaration]]:
    """The options that a command takes, in the order of its help."""
    panels = [None, *Panel]
    pairs = [(each, option) for each, option in declared(owner) if option.taken_by(command)]
    return sorted(pairs, key=lambda pair: panels.index(pair[1].panel))


def values(options: Any, command: Command) -> dict[str, Any]:
    """The values by name of the options that a command takes."""
    return {each.name: getattr(options, each.name) for each, _ in taken(options, command)}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")
