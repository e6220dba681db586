"""The tools of the sections: the device, one model at a time, the memory limit of a smaller card, the facts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from alignprop_fast.ops.garbage import collect_garbage
from benchmarks.gpu_sections.driver import Settings
from benchmarks.gpu_sections.facts import read
from benchmarks.step.train_step import gemm_rate, limit_memory
from benchmarks.step.train_step_variants import Bench

GIB = 2**30


def make(settings: Settings) -> Lab:
    """The lab of a worker."""
    if settings.dry:
        from benchmarks.gpu_sections.dry import make_small

        make_small()
    return Lab(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def versions(device: torch.device) -> dict[str, Any]:
    """Fields of every fact."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return {"gpu": name, "torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda, "cudnn": cudnn}


class Lab:
    """The lab of one worker."""

    def __init__(self, settings: Settings, device: torch.device):
        if device.type == "cuda":
            torch.zeros(1, device=device)  # if the device fails, it should fail here
        self.device, self.dry, self.steps = device, settings.dry, settings.steps
        self.facts = settings.facts
        self.facts.common = {**versions(device), **self.facts.common}
        self._bench: Bench | None = None

    @property
    def grad_steps(self) -> int:
        return self.steps // 2

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def cap_bytes(self) -> int:
        """Memory of a 24 GB card; in a dry run, a limit for the toy model."""
        return 10 * 2**20 if self.dry else 24 * GIB

    def bench(self, model: str, compiled: str = "blocks") -> Bench:
        """The model on the device, built there in bf16, with adapters and a reward as large as HPS v2.

        Only the last model is kept. In a dry run every model is the same small one.
        """
        model = "small" if self.dry else model
        if self._bench is None or self._bench.model != model or self._bench.compiled != compiled:
            self._bench = None
            self.tidy()
            began = time.perf_counter()
            bench = Bench(model, self.device, self.steps, "mean" if self.dry else "hpsv2", compiled)
            self.synchronize()
            taken = round(time.perf_counter() - began, 2)
            self.facts.write("model", "built", model=model, seconds=taken, **self.memory())
            self._bench = bench
        return self._bench

    def rate(self) -> float:
        """FLOP/s of a large matrix product, measured on this GPU before or now."""
        known = [fact for fact in read(self.facts.file) if fact["fact"] == "matrix product"]
        for fact in reversed(known):
            if fact.get("gpu") == self.facts.common["gpu"]:
                return fact["flops"]
        # An emulated GPU would take minutes for this size.
        flops = gemm_rate(torch.device("cpu") if self.dry else self.device, self.dtype)
        self.facts.write("machine", "matrix product", flops=flops, dtype=str(self.dtype))
        return flops

    def memory(self) -> dict[str, int]:
        """Bytes on the device now."""
        if self.device.type != "cuda":
            return {}
        return {
            "allocated_bytes": torch.cuda.memory_allocated(self.device),
            "reserved_bytes": torch.cuda.memory_reserved(self.device),
        }

    @contextmanager
    def capped(self, limit_bytes: int | None) -> Iterator[None]:
        """Limit the allocator to the memory of a card of this size."""
        limit_memory(self.device, limit_bytes)
        try:
            yield
        finally:
            limit_memory(self.device, None)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Free what a section left behind. Raises if the CUDA context is lost."""
        if self._bench is not None:
            self._bench.optimizer.zero_grad(set_to_none=True)
        collect_garbage()
        self.synchronize()
        limit_memory(self.device, None)


def host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
