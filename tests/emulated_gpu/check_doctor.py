"""What doctor finds on a GPU: all is right; then with a kernel that is wrong, one that is not deterministic, one that
raises, and a device that is lost. Each is seen, named and switched off, and the exit code says whether training works.
"""

import json

import pytest
import torch

from alignprop_fast.doctor import examine
from alignprop_fast.ops import attention_backends, choice, switched_off

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(emulated, monkeypatch):
    """Nothing is off, and a choice takes one run: the interpreter's speed says nothing."""
    monkeypatch.setattr(choice, "REPETITIONS", 1)
    switched_off.forget()
    yield
    switched_off.forget()


@pytest.fixture
def backend(monkeypatch):
    """Replace a pass of one of attention's implementations."""

    def replace(name, **passes):
        from dataclasses import replace as changed

        backends = attention_backends._cuda_backends()
        monkeypatch.setitem(backends, name, changed(backends[name], **passes))

    return replace


def test_everything():
    import time

    t = time.time()
    seen = []

    def tell(w):
        print(f"{time.time() - t:.1f}", w, flush=True)

    report = examine(CUDA, tell=tell)
    for c in report.checks:
        if c.fault or c.note:
            print(c)
    for f in report.facts:
        print(f)
    print(report.off, report.seconds)
    assert 0
