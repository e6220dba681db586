"""The commit under test."""

from __future__ import annotations

import subprocess

from benchmarks import ROOT


def commit() -> str:
    """The commit of this checkout, with "+" if it has changes; "unknown" without git or a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
