"""Runs the sections of an examination one after the other; a section that fails does not end the others."""

import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec

import torch

from alignprop_fast.doctor import attention, facts, op_cases, plain_cases, speeds
from alignprop_fast.doctor.ceilings import ceilings, product_rate
from alignprop_fast.doctor.checking import Case, DeviceLost, Draw, check
from alignprop_fast.doctor.remedies import remedy
from alignprop_fast.doctor.report import Check, Fact, Report
from alignprop_fast.ops import extension, switched_off

# With at least this many FLOP/s in bf16, SDXL's shapes take moments. Every GPU reaches it, a CPU that emulates one does
# not.
FAST = 1e12


def examine(
    device: torch.device,
    quick: bool = False,
    dtypes: Sequence[torch.dtype] | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> Report:
    """Examine the device. Implementations that fail are switched off in this process (`ops.switched_off`).

    Raises nothing.

    Args:
        device: a CUDA device or the CPU.
        quick: only the kernels, under ten seconds without compiling; else everything.
        dtypes: to check in. None: bf16 when quick, else bf16, fp32 and, on a GPU, fp16.
        tell: called with the name of each part before it starts.
    """
    if dtypes is None:
        more = [] if quick else [torch.float32, *([torch.float16] if device.type == "cuda" else [])]
        dtypes = [torch.bfloat16, *more]
    return _Examination(device, quick, dtypes, tell).run()


class _Examination:
    def __init__(self, device: torch.device, quick: bool, dtypes: Sequence[torch.dtype], tell: Callable[[str], None]):
        self.device, self.dtypes, self.tell = device, dtypes, tell
        self.report = Report(str(device), quick)
        self.large = False

    def run(self) -> Report:
        begin = time.perf_counter()
        sections = [self._software, self._device, self._ceilings, self._pytorch, self._kernels, self._attention]
        if self.report.quick:
            sections = [self._device, self._kernels, self._attention]
        else:
            sections += [self._plain, self._speeds]
        threads = torch.get_num_threads()
        for section in sections:
            # On such small tensors a second thread costs time, and much time on a busy machine.
            torch.set_num_threads(threads if section in (self._device, self._ceilings) else 1)
            self._guarded(section)
        torch.set_num_threads(threads)
        self._guarded(self._what_is_off)
        self.report.seconds = time.perf_counter() - begin
        return self.report

    def _guarded(self, section: Callable[[], None]) -> None:
        """Run a section; an exception becomes a row."""
        name = section.__name__.strip("_").replace("_", " ")
        if self.report.lost and section != self._what_is_off:
            return
        self.tell(name)
        try:
            section()
        except DeviceLost as error:
            self.report.lost = True
            self.report.facts.append(Fact(name, "GPU", str(error), wrong=True, remedy=remedy(str(error))))
        except Exception as error:
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            self.report.facts.append(Fact(name, "not examined", said, remedy=remedy(said)))

    def _software(self) -> None:
        self._add(facts.software(self.device))
        unusable = facts.unusable_gpu()
        if unusable is not None:
            self.report.facts.append(unusable)

    def _device(self) -> None:
        """Check first whether the device computes at all; if not, other checks are pointless."""
        if self.device.type == "cuda":
            try:
                right = torch.ones(64, device=self.device).add_(1).sum().item() == 128
                said = "it computes that one and one are not two"
            except Exception as error:
                right, said = False, str(error).partition("\n")[0][:160]
            if not right:
                raise DeviceLost(f"cannot be used: {said}")
        self._add(facts.memory_of(self.device))
        self.large = self.device.type == "cuda" and product_rate(self.device, torch.bfloat16) > FAST

    def _ceilings(self) -> None:
        self._add(ceilings(self.device, self.dtypes))

    def _pytorch(self) -> None:
        for draw in self._draws():
            self._check(plain_cases.pytorch_cases(draw))

    def _kernels(self) -> None:
        for draw in self._draws():
            self._check(op_cases.kernel_cases(draw, self.large, self.report.quick))

    def _plain(self) -> None:
        for draw in self._draws():
            self._check(plain_cases.plain_cases(draw, self.large))

    def _attention(self) -> None:
        sizes = attention.LARGE if self.large else attention.SMALL
        rows: list[Check] = []
        try:
            for draw in self._draws():
                for row in attention.check_attention(draw, sizes):
                    self.tell(f"attention {row.implementation} {row.case}")
                    rows.append(row)
        finally:
            self.report.checks += attention.without_those_that_never_run(rows)

    def _speeds(self) -> None:
        draw = Draw(self.dtypes[0], self.device)
        for case in op_cases.kernel_cases(draw, self.large, quick=True):
            self._add(speeds.against_plain([case], self.device))
        self._add(speeds.of_attention(draw, (attention.LARGE if self.large else attention.SMALL)[:2]))

    def _what_is_off(self) -> None:
        report = self.report
        report.off = switched_off.everything()
        if self.device.type == "cuda" and find_spec("triton") is None:
            report.absent["triton"] = "triton is not installed"
        missing = None if report.lost else extension.missing(self.device.type)
        if missing is not None:
            report.absent["group_norm_silu.csrc"] = missing
        report.remedies = {name: remedy(reason) for name, reason in (report.off | report.absent).items()}

    def _draws(self) -> Iterable[Draw]:
        return (Draw(dtype, self.device) for dtype in self.dtypes)

    def _add(self, found: Iterable[Fact]) -> None:
        for fact in found:
            self.report.facts.append(fact)

    def _check(self, cases: Iterable[Case]) -> None:
        for case in cases:
            self.tell(f"{case.op} {case.implementation} {case.name}")
            self.report.checks.append(check(case))
