"""What is switched off in this process, and why: an implementation that failed here must not be tried again.

Names go from the general to the special: "triton", "layer_norm.triton", "attention.cudnn.backward". Who chooses an
implementation asks `reason`; who sees one fail (a launch, a check of `doctor`) calls `switch_off`. Nothing is written
to disk: the next process tries again, perhaps with a compiler or a driver that was missing.
"""

import logging

log = logging.getLogger(__name__)

_reasons: dict[str, str] = {}


def switch_off(name: str, reason: str) -> None:
    """Use the plain path from now on, and say so once, in one line."""
    if name not in _reasons:
        _reasons[name] = " ".join(reason.split())[:200]
        log.warning("%s is switched off: %s", name, _reasons[name])


def reason(name: str) -> str | None:
    """Why this implementation is off, or None if it may be used."""
    return _reasons.get(name)


def everything() -> dict[str, str]:
    """The reason of each name that is off."""
    return dict(_reasons)


def forget() -> None:
    """Switch all on again, for tests."""
    _reasons.clear()
