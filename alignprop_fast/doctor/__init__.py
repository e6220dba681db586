"""Examines the device at hand: what is there, how fast it is, and whether every op and kernel computes what it should.

report.py       what an examination found, as data and as JSON
examine.py      the sections of an examination, each in its own try
facts.py        versions, driver, compilers, memory
ceilings.py     measured rates: matrix product, copy, host link
checking.py     one implementation against its reference: errors, finite, the same bits twice
op_cases.py     the ops, each at a real and a ragged shape
attention.py    every forward with every backward pass of attention's backends
speeds.py       which implementation is fastest, and by how much
remedies.py     what to install or do for a reason
first_time.py   the short examination before the first training step on a GPU, in a process of its own
"""

from alignprop_fast.doctor.examine import examine
from alignprop_fast.doctor.report import Check, Fact, Report

__all__ = ["Check", "Fact", "Report", "examine"]
