"""Examines a device: what it has, how fast it is, and whether every op and kernel computes correct results.

report.py       the result of an examination, as data and as JSON
examine.py      the sections of an examination; a section that fails does not end the others
facts.py        versions, driver, compilers, memory
ceilings.py     measured rates: matrix product, copy, host link
checking.py     one implementation against its reference: error, finite numbers, the same bits twice
op_cases.py     the ops with kernels, each at a real and a ragged shape
plain_cases.py  the ops of PyTorch's operators, and those operators
attention.py    every forward pass with every backward pass of attention's backends
speeds.py       the fastest implementations, and their lead
remedies.py     what to install or do when something is switched off
first_time.py   the short examination before the first training step on a GPU, in its own process
"""

from alignprop_fast.doctor.examine import examine
from alignprop_fast.doctor.report import Check, Fact, Report

__all__ = ["Check", "Fact", "Report", "examine"]
