"""Truncation rules by their names, as they are written in options: "uniform", "last:1", "flowbp-sparse:4:1"."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from alignprop_fast.sampling.gates import Draws, Truncation
from alignprop_fast.sampling.rules import (
    DRTune,
    Full,
    Gaussian,
    Last,
    ReFL,
    Renoised,
    Rule,
    StepRule,
    Uniform,
    UniformOnce,
)
from alignprop_fast.sampling.step_table import StepTable
from alignprop_fast.sampling.surrogates import SRPO, Bridge, Discount, Lagrange, LeapAlign, Sparse

FEW_STEPS = 8


class Auto(Rule):
    """auto: `full` for chains of up to FEW_STEPS steps, `uniform` for longer ones. docs/which-rule.md says why."""

    def draw(self, table: StepTable, draws: Draws) -> Truncation:
        return self._rule(len(table)).draw(table, draws)

    def count(self, num_steps: int) -> tuple[int, float]:
        return self._rule(num_steps).count(num_steps)

    def _rule(self, num_steps: int) -> Rule:
        return Full() if num_steps <= FEW_STEPS else Uniform()


@dataclass(frozen=True)
class Form:
    """How a rule is written: its name, then numbers after colons. int stands for digits, float for any number."""

    make: Callable[..., Rule]
    needed: tuple[type, ...] = ()
    optional: tuple[type, ...] = ()
    numbers: str = ""

    def parse(self, texts: list[str]) -> Rule | None:
        """The rule; None if the texts are not its numbers."""
        kinds = (*self.needed, *self.optional)
        if not len(self.needed) <= len(texts) <= len(kinds):
            return None
        try:
            numbers = [kind(text) for kind, text in zip(kinds, texts, strict=False)]
        except ValueError:
            return None
        return self.make(*numbers)


RULES: dict[str, Form] = {
    "auto": Form(Auto),
    "full": Form(Full),
    "uniform": Form(Uniform),
    "uniform-once": Form(UniformOnce),
    "gaussian": Form(Gaussian),
    "last": Form(Last, (int,), numbers=":K"),
    "lv": Form(Renoised, (int,), numbers=":N"),
    "drtune": Form(DRTune, (), (int,), numbers="[:K]"),
    "refl": Form(ReFL),
    "srpo": Form(SRPO, (), (int,), numbers="[:N]"),
    "discount": Form(Discount, (float,), numbers=":GAMMA"),
    "leapalign": Form(LeapAlign, (), (float,), numbers="[:ALPHA]"),
    "flowbp-sparse": Form(Sparse, (int,), (float,), numbers=":K[:RESCALE]"),
    "flowbp-bridge": Form(Bridge, (int,), (float,), numbers=":K[:ALPHA]"),
    "flowbp-lagrange": Form(Lagrange, (), (float,), numbers="[:ALPHA]"),
}


def parse_rule(text: str, num_steps: int) -> Rule:
    """The rule of that name, checked against the length of the chain.

    Raises:
        ValueError: the rule is unknown, or one of its numbers does not fit.
    """
    name, *numbers = text.split(":")
    rule = RULES[name].parse(numbers) if name in RULES else None
    if rule is None:
        known = ", ".join(name + form.numbers for name, form in RULES.items())
        raise ValueError(f"unknown truncation {text!r}: use {known}, for example last:1")
    rule.check(num_steps)
    return rule


def draw_truncation(rule: str, table: StepTable, draws: Draws = random) -> Truncation:
    """The truncation of one chain with this table by a rule, drawn from `draws` if the rule is random.

    The classes in `rules` and `surrogates` say what each rule does.

    Raises:
        ValueError: as `parse_rule`, or the rule leaps and the table is not that of a sampler with one time.
    """
    return parse_rule(rule, len(table)).draw(table, draws)


def draw_gates(rule: str, num_steps: int, draws: Draws = random) -> tuple[int, ...]:
    """Indices (0 = noisiest) of the open steps of one chain, for rules that only choose steps.

    Raises:
        ValueError: as `parse_rule`, or the rule does more than that.
    """
    parsed = parse_rule(rule, num_steps)
    if not isinstance(parsed, StepRule):
        raise ValueError(f"truncation {rule!r} does more than choose steps: use draw_truncation")
    return parsed.steps(num_steps, draws)


def gate_count(rule: str, num_steps: int) -> tuple[int, float]:
    """The largest and the mean number of open steps of a chain under the rule, without drawing.

    Raises:
        ValueError: as `parse_rule`.
    """
    return parse_rule(rule, num_steps).count(num_steps)
