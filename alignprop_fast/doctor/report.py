"""The result of an examination: facts, checks, what is switched off. Standard library only."""

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Fact:
    """One fact about this machine.

    section: "software", "device", "ceilings", "speeds", or the section of the examination that failed.
    value: text with its unit, for people. number: the same in the base unit (bytes, bytes/s, FLOP/s), or None.
    wrong: training on this device would be wrong or cannot start, and switching something off does not help.
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
    case: shape and other settings; dtype: "bfloat16", ...
    error_over_bound: error over accepted error, the largest over outputs and gradients. Accepted is twice the error of
        the plain expression in that dtype plus 1e-6. error: the absolute error of that result. Both are None if a
        result is missing or not finite.
    deterministic: whether two runs gave the same bits; None without two runs.
    fault: what is wrong; None: nothing. off: the name that switched it off; None: it is on.
    note: why there is no result although nothing is wrong: it does not serve this case, or memory is full.
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

    lost: the device stopped responding; later parts were not examined.
    off: by name, why an implementation is switched off in this process (`ops.switched_off`).
    absent: by name, why an implementation is missing: not installed or not built.
    remedies: by the names of both, what to install or do.
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
        """One line for each fault that cannot be switched off."""
        facts = [f"{fact.name}: {fact.value}" for fact in self.facts if fact.wrong]
        faulty = [check for check in self.checks if check.fault is not None and check.off is None]
        return facts + [f"{c.op} ({c.implementation}, {c.case}, {c.dtype}): {c.fault}" for c in faulty]

    @property
    def exit_code(self) -> int:
        """1 if something is wrong that cannot be switched off, else 0."""
        return 1 if self.wrong() else 0

    def to_json(self) -> str:
        """All data as JSON."""
        content = {**asdict(self), "wrong": self.wrong(), "exit_code": self.exit_code}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
