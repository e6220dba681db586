"""Memory sizes as people write them, and the error for a budget that no plan can keep."""

import re
from collections.abc import Sequence
from typing import Literal

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

AUTO, NONE = "auto", "none"  # budgets in words: what is free on the device; the leanest way
Budget = int | Literal["auto"] | None  # parsed: bytes, what is free, or none

# What CUDA itself takes of a GPU for a process, and libraries' handles, on a GPU that is not here.
CONTEXT_BYTES = 2**29
# Of what a GPU that is here has for this process: left free, for what libraries take later and for memory in pieces.
HEADROOM = 0.03
# A card of "24 GB" has 22.0 to 23.6 GiB for programs.
_BOX_FRACTION = 1.1


class BudgetInfeasible(ValueError):
    """No plan keeps the budget; `smallest_bytes` is the least that would do. The message names it and what lowers it.

    remedies: what would lower the least budget, most effective first.
    """

    def __init__(self, budget_bytes: int, smallest_bytes: int, remedies: Sequence[str] = ()):
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.remedies = tuple(remedies) or ("a smaller batch or resolution",)
        super().__init__(
            f"a memory budget of {format_bytes(budget_bytes)} is too small: the leanest plan needs "
            f"{format_bytes(smallest_bytes, up=True)}; raise the budget, or lower the need with "
            + ", ".join(self.remedies)
        )


def parse_budget(budget: int | str | None) -> Budget:
    """A memory budget as a user writes it: a size, "auto", or None, which "none" stands for, too.

    Raises:
        ValueError: neither a positive size nor one of the words.
    """
    if budget is None or budget == NONE:
        return None
    return "auto" if budget == AUTO else parse_bytes(budget)


def parse_bytes(size: int | str, what: str = "memory budget") -> int:
    """Bytes from 25769803776, "24GiB", "512 MiB" or "24GB" (powers of ten without the i).

    what: whose size it is, for the message.

    Raises:
        ValueError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{what} {size!r} is no size: write bytes or, for example, 24GiB or 512MiB")
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if size_bytes <= 0:
        raise ValueError(f"{what} {size!r} must be more than zero, for example 24GiB")
    return size_bytes


def budget_on(
    device: str, memory_bytes: int, wanted_bytes: int | None, context_bytes: int = CONTEXT_BYTES
) -> tuple[int, str]:
    """The memory budget on a device that is not here, and a note where it is less than was wanted.

    Without a wish it is all of the memory but what the context takes. Sizes on boxes are rounded up: a wish that is
    over by no more than that is held to what there is.

    Raises:
        ValueError: more was wanted than the device has.
    """
    usable_bytes = memory_bytes - context_bytes
    if wanted_bytes is None or wanted_bytes <= usable_bytes:
        return (usable_bytes if wanted_bytes is None else wanted_bytes), ""
    if wanted_bytes > _BOX_FRACTION * memory_bytes:
        raise ValueError(
            f"a memory budget of {format_bytes(wanted_bytes)} is more than {device} has "
            f"({format_bytes(memory_bytes)}): use at most {format_bytes(usable_bytes)}, or another device"
        )
    context = f", of which CUDA itself takes about {format_bytes(context_bytes)}" if context_bytes else ""
    return usable_bytes, (
        f"{device} has {format_bytes(memory_bytes)}{context}: "
        f"the budget of {format_bytes(wanted_bytes)} is held to {format_bytes(usable_bytes)}"
    )


def budget_from_free(
    device: str, total_bytes: int, free_bytes: int, own_bytes: int, wanted_bytes: int | None
) -> tuple[int, str]:
    """The memory budget on a GPU that is here, and where it comes from, in one line.

    It is what the tensors of this process take now and what is free, less the headroom, or what is wanted, if less.

    own_bytes: tensors of this process. free_bytes: what the driver would still hand out.
    """
    usable_bytes = int((1 - HEADROOM) * (own_bytes + free_bytes))
    if wanted_bytes is not None and wanted_bytes <= usable_bytes:
        return wanted_bytes, f"memory budget {format_bytes(wanted_bytes)}, as asked for"
    taken_bytes = total_bytes - free_bytes - own_bytes
    why = (
        f"of {format_bytes(total_bytes)} on {device}, CUDA, its libraries and other programs have taken "
        f"{format_bytes(taken_bytes)}, and {HEADROOM:.0%} of the rest stay free"
    )
    if wanted_bytes is None:
        return usable_bytes, f"memory budget {format_bytes(usable_bytes)}: {why}"
    return usable_bytes, (
        f"the memory budget of {format_bytes(wanted_bytes)} is held to {format_bytes(usable_bytes)}: {why}"
    )


def format_bytes(size_bytes: float, up: bool = False) -> str:
    """ "1.50 GiB" or "12.3 MiB"; up rounds away from zero, so that the text read back is never less than size_bytes."""
    unit, name, digits = (2**30, "GiB", 2) if size_bytes >= 2**30 else (2**20, "MiB", 1)
    value = size_bytes / unit
    if up and float(f"{value:.{digits}f}") < value:
        value += 10**-digits
    return f"{value:.{digits}f} {name}"
