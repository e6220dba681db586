"""Memory sizes as people write them, and the error for a budget that no plan can keep."""

import re
from collections.abc import Sequence
from typing import Literal

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

AUTO, NONE = "auto", "none"  # budgets in words: all memory that is free on the device; no budget
Budget = int | Literal["auto"] | None  # parsed: bytes, what is free, or none

# Memory that CUDA and libraries' handles take per process, assumed for a GPU that is not here.
CONTEXT_BYTES = 2**29
# Share of a present GPU's memory for this process that stays free, for later needs of libraries and for fragmentation.
HEADROOM = 0.03
# A card of "24 GB" has 22.0 to 23.6 GiB for programs.
_BOX_FRACTION = 1.1


class BudgetInfeasible(ValueError):
    """No plan keeps the budget. The message names the least budget that has a plan, and what would lower it.

    smallest_bytes: that least budget.
    remedies: what would lower it, most effective first.
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
    """A memory budget: bytes, "auto", or None (also written "none").

    Raises:
        ValueError: the text is neither a positive size nor one of the words.
    """
    if budget is None or budget == NONE:
        return None
    return "auto" if budget == AUTO else parse_bytes(budget)


def parse_bytes(size: int | str, what: str = "memory_budget", or_zero: bool = False) -> int:
    """Bytes from 25769803776, "24GiB", "512 MiB" or "24GB" (powers of ten without the i).

    what: the name of the size in the error message. or_zero: whether it may be 0.

    Raises:
        ValueError: the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{what} {size!r} is not a size: write bytes or, for example, 24GiB or 512MiB")
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()])
    if not size_bytes and not or_zero:
        raise ValueError(f"{what} {size!r} must be more than zero, for example 24GiB")
    return size_bytes


def budget_on(
    device: str, memory_bytes: int, wanted_bytes: int | None, context_bytes: int = CONTEXT_BYTES
) -> tuple[int, str]:
    """The memory budget on a device that is not here, and a note if it is smaller than the one asked for.

    If none is asked for, it is all memory except the context's. Sizes on boxes are rounded up; a budget that is too
    large by no more than this rounding is reduced to the real size.

    Raises:
        ValueError: the budget asked for is larger than that.
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
        f"the budget of {format_bytes(wanted_bytes)} is reduced to {format_bytes(usable_bytes)}"
    )


def budget_from_free(
    device: str, total_bytes: int, free_bytes: int, own_bytes: int, wanted_bytes: int | None
) -> tuple[int, str]:
    """The memory budget on a GPU that is here, and one line that explains it.

    It is the memory of this process's tensors plus the free memory, less the headroom; or the budget asked for, if that
    is smaller.

    own_bytes: tensors of this process. free_bytes: memory that the driver still has.
    """
    usable_bytes = int((1 - HEADROOM) * (own_bytes + free_bytes))
    if wanted_bytes is not None and wanted_bytes <= usable_bytes:
        return wanted_bytes, f"memory budget {format_bytes(wanted_bytes)}, as asked for"
    taken_bytes = total_bytes - free_bytes - own_bytes
    why = (
        f"of {format_bytes(total_bytes)} on {device}, CUDA, its libraries and other programs have taken "
        f"{format_bytes(taken_bytes)}, and {HEADROOM:.0%} of the rest stays free"
    )
    if wanted_bytes is None:
        return usable_bytes, f"memory budget {format_bytes(usable_bytes)}: {why}"
    return usable_bytes, (
        f"the memory budget of {format_bytes(wanted_bytes)} is reduced to {format_bytes(usable_bytes)}: {why}"
    )


def format_bytes(size_bytes: float, up: bool = False) -> str:
    """ "1.50 GiB" or "12.3 MiB". up: round up, so that reading the text back never gives less than size_bytes."""
    unit, name, digits = (2**30, "GiB", 2) if size_bytes >= 2**30 else (2**20, "MiB", 1)
    value = size_bytes / unit
    if up and float(f"{value:.{digits}f}") < value:
        value += 10**-digits
    return f"{value:.{digits}f} {name}"
