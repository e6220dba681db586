"""What an examination found: facts, checks, what is switched off. Standard library only."""

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Fact:
    """One thing that is so on this machine.

    section: "software", "device", "ceilings", "speeds", or that of the examination that failed.
    value: in words with its unit, for people; number: the same in the base unit (bytes, bytes/s, FLOP/s), if it is one.
    wrong: training on this device cannot be right or cannot start, and nothing can be switched off against it.
    remedy: what to install or do; None: nothing.
    """

    section: str
    name: str
    value: str
    number: float | None = None
    wrong: bool = False
    remedy: str | None = None


@dataclass(frozen=True)
class Check:
    """One implementation of one op in one case, against its reference.

    op: "layer_norm", "attention", ...; implementation: "triton", "csrc", "reference", or "cudnn > flash", the forward
        and the backward pass of attention.
    case: shape and what else tells it from others; dtype: "bfloat16", ...
    error_over_bound: the largest, over outputs and gradients, of error over what is accepted: twice the error of the
        plain expression in that dtype plus 1e-6; error: that absolute error. None where a result is missing or not
        finite.
    deterministic: whether two runs gave the same bits; None where there are no two.
    fault: what is wrong, None if nothing is. off: the name that it was switched off by, None where it is not.
    note: why there is no result, where that is no fault: not made for this case, or no memory left.
    """

    op: str
    implementation: str
    case: str
    dtype: str
    error: float | None = None
    error_over_bound: float | None = None
    deterministic: bool | None = None
    fault: str | None = None
    off: str | None = None
    note: str | None = None


@dataclass
class Report:
    """An examination of one device ("cuda:0", "cpu").

    lost: whether the device answered no more at some point: what comes after it was not examined.
    off: why each implementation is switched off in this process (`ops.switched_off`), by name.
    absent: why each is not there at all: not installed, not built.
    remedies: what to install or do to get it back, by the names of both.
    """

    device: str
    quick: bool
    facts: list[Fact] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    lost: bool = False
    off: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    remedies: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def wrong(self) -> list[str]:
        """What is wrong and cannot be switched off, a line each."""
        facts = [f"{fact.name}: {fact.value}" for fact in self.facts if fact.wrong]
        faulty = [check for check in self.checks if check.fault is not None and check.off is None]
        return facts + [f"{c.op} ({c.implementation}, {c.case}, {c.dtype}): {c.fault}" for c in faulty]

    @property
    def exit_code(self) -> int:
        """1 where something is wrong that cannot be switched off, else 0."""
        return 1 if self.wrong() else 0

    def to_json(self) -> str:
        """Everything, for machines."""
        content = {**asdict(self), "wrong": self.wrong(), "exit_code": self.exit_code}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
