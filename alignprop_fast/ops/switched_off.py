"""Implementations that are switched off in this process after a failure, with the reason.

Names go from general to special: "triton", "layer_norm.triton", "attention.cudnn.backward". Code that chooses an
implementation calls `reason`. Code that sees one fail (a launch, a check of `doctor`) calls `switch_off`. Nothing is
written to disk, so the next process tries again, perhaps with the compiler or driver that was missing.
"""

import logging

log = logging.getLogger(__name__)

reasons: dict[str, str] = {}  # for each name that is off


def switch_off(name: str, reason: str) -> None:
    """Use the plain path from now on, and log one line, once."""
    if name not in reasons:
        reasons[name] = " ".join(reason.split())[:200]
        log.warning("%s is switched off: %s", name, reasons[name])


def reason(name: str) -> str | None:
    """Why this implementation is off, or None if it may be used."""
    return reasons.get(name)


def everything() -> dict[str, str]:
    """The reason for each name that is off."""
    return dict(reasons)


def forget() -> None:
    """Switch everything on again, for tests."""
    reasons.clear()
