"""Emulates a GPU in this process: tensors on "cuda" are in host memory and compute on the CPU (`device.cpp`).

`pytest -p emulate` starts it; so does `start()`, before torch is imported. What it shows: that everything meets on one
device, that the code behind `is_cuda` runs and gives the same numbers, what the allocator would have counted, running
out of memory, how often the host waits, and what the streams have been told to wait for. What it cannot show: time,
real kernels (Triton's run in its interpreter).
"""

import ctypes
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from emulated_attention import allow_fused_attention, fused_attention
from emulated_streams import Event, Stream, current, on_stream
from interpreter_bf16 import bf16_of_the_interpreter

SOURCE = Path(__file__).with_name("device.cpp")
TOTAL_BYTES = 24 * 2**30


def build() -> Path:
    """The emulated device as a library, built once per source and torch. Raises FileNotFoundError without compiler."""
    digest = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"emulated_gpu_{os.getuid()}_{digest}.so"
    if not library.exists():
        compiler = shutil.which("g++") or shutil.which("c++")
        if compiler is None:
            raise FileNotFoundError("no C++ compiler")
        root = Path(str(find_spec("torch").origin)).parent
        made = library.with_suffix(f".{os.getpid()}")
        includes = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
        flags = ["-O1", "-std=c++20", "-fPIC", "-shared"]
        link = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
        subprocess.run([compiler, *flags, *includes, str(SOURCE), "-o", str(made), *link], check=True)
        os.replace(made, library)
    return library


class Emulated:
    """The state of the device and the questions that tests ask."""

    def __init__(self, library: ctypes.PyDLL):
        self.library = library
        self.faults = {}  # of `fused_attention`
        library.emulated_capture_begin.restype = ctypes.c_void_p
        library.emulated_is_capturing.restype = ctypes.c_bool
        for name in ("allocated", "peak", "reserved", "peak_reserved", "waits", "limit"):
            getattr(library, f"emulated_{name}").restype = ctypes.c_int64
        self.registered: dict[int, int] = {}  # host memory that the driver has locked: its size by its address
        self.lockable_bytes = 2**63  # how much of it the driver locks

    def allocated(self, device=None) -> int:
        return self.library.emulated_allocated()

    def peak(self, device=None) -> int:
        return self.library.emulated_peak()

    def reserved(self, device=None) -> int:
        """What is allocated, and what graphs hold for their replays."""
        return self.library.emulated_reserved()

    def peak_reserved(self, device=None) -> int:
        return self.library.emulated_peak_reserved()

    def waits(self) -> int:
        """How often the host has waited for the device: `.item()`, copies to the host."""
        return self.library.emulated_waits()

    def on_wait(self, callback) -> None:
        """Call this at every wait."""
        self._callback = ctypes.CFUNCTYPE(None)(callback)  # kept, since the library keeps no reference
        self.library.emulated_on_wait(self._callback)

    def reset_peak(self, device=None) -> None:
        self.library.emulated_reset_peak()

    def set_limit(self, size_bytes: int) -> None:
        """Limit the memory of this process; other programs have the rest."""
        self.library.emulated_set_limit(ctypes.c_int64(size_bytes))

    def set_fraction(self, fraction: float, device=None) -> None:
        self.set_limit(int(fraction * TOTAL_BYTES))

    def memory(self, device=None) -> tuple[int, int]:
        """(free bytes, total bytes)."""
        return max(min(self.library.emulated_limit(), TOTAL_BYTES) - self.reserved(), 0), TOTAL_BYTES

    def register(self, address: int, size_bytes: int, flags: int) -> int:
        current.check()
        if sum(self.registered.values()) + size_bytes > self.lockable_bytes:
            self.library.emulated_fail()
            return 2
        self.registered[address] = size_bytes
        return 0

    def unregister(self, address: int) -> int:
        del self.registered[address]
        return 0


_pools = itertools.count(1)


def next_pool() -> tuple[int, int]:
    return 0, next(_pools)


class CUDAGraph:
    """Operators recorded with their memory, and run again without Python."""

    def __init__(self, keep_graph=False):
        self._library, self._graph = started().library, None

    def capture_begin(self, pool=None, **options) -> None:
        _, number = pool or next_pool()
        self._graph = self._library.emulated_capture_begin(ctypes.c_int64(number))

    def capture_end(self) -> None:
        self._library.emulated_capture_end()

    def replay(self) -> None:
        self._library.emulated_replay(ctypes.c_void_p(self._graph))

    def __del__(self):
        if self._graph is not None:
            self._library.emulated_forget(ctypes.c_void_p(self._graph))


def _checked_launches() -> None:
    """A kernel launched on another device than its tensors' would read invalid memory."""
    from triton.runtime import interpreter

    execute = interpreter.GridExecutor.__call__

    def checked(self, *arguments, **keywords):
        if any(getattr(argument, "is_cuda", False) for argument in arguments):
            current.check()
        return execute(self, *arguments, **keywords)

    interpreter.GridExecutor.__call__ = checked


_started: list[Emulated] = []


def started() -> Emulated:
    """The device of this process."""
    return _started[0]


def pytest_load_initial_conftests() -> None:
    start()


def start(name: str = "NVIDIA GeForce RTX 4090", capability: tuple[int, int] = (8, 9)) -> Emulated:
    """Make this process see one GPU of `TOTAL_BYTES`."""
    os.environ["TRITON_INTERPRET"] = "1"
    assert "torch" not in sys.modules, "torch has looked for devices already"
    device = Emulated(ctypes.PyDLL(str(build())))
    import torch

    device.set_limit(TOTAL_BYTES)
    device.operators = fused_attention(device.faults)
    allow_fused_attention()
    bf16_of_the_interpreter()
    _checked_launches()
    replaced = {**_one_device(name, capability), **_streams(device), **_memory(device), **_random_numbers()}
    for attribute, value in replaced.items():
        assert hasattr(torch.cuda, attribute), attribute
        setattr(torch.cuda, attribute, value)
    for internal in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
        setattr(torch._C, internal, lambda: None)
    torch._C._cuda_getDriverVersion = lambda: 13000
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # bitsandbytes looks for it when it is imported
    _started.append(device)
    return device


# What replaces functions of torch.cuda, by their names.
Replaced = dict[str, Callable[..., Any]]


def _one_device(name: str, capability: tuple[int, int]) -> Replaced:
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=TOTAL_BYTES,
        multi_processor_count=128,
        warp_size=32,
        max_threads_per_multi_processor=1536,
        shared_memory_per_block_optin=99 * 1024,
        L2_cache_size=72 * 2**20,
    )
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: current.index,
        "set_device": current.set,
        "_exchange_device": current.exchange,
        "_maybe_exchange_device": lambda index: current.exchange(index),  # torch.compile tells the two apart
        "get_device_name": lambda device=None: name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
    }


def _streams(device: Emulated) -> Replaced:
    main = Stream.current = Stream()
    return {
        "synchronize": current.check,
        "current_stream": lambda device=None: Stream.current,
        "default_stream": lambda device=None: main,
        "stream": on_stream,
        "Stream": Stream,
        "Event": Event,
        "is_current_stream_capturing": lambda: device.library.emulated_is_capturing(),
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": next_pool,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }


def _memory(emulated: Emulated) -> Replaced:
    runtime = SimpleNamespace(cudaHostRegister=emulated.register, cudaHostUnregister=emulated.unregister)
    return {
        "cudart": lambda: runtime,
        "memory_allocated": emulated.allocated,
        "max_memory_allocated": emulated.peak,
        "memory_reserved": emulated.reserved,
        "max_memory_reserved": emulated.peak_reserved,
        "reset_peak_memory_stats": emulated.reset_peak,
        "empty_cache": lambda: None,
        "mem_get_info": emulated.memory,
        "get_per_process_memory_fraction": lambda device=None: 1.0,  # the limit shows in mem_get_info
        "set_per_process_memory_fraction": emulated.set_fraction,
    }


def _random_numbers() -> Replaced:
    """The emulated device draws from the CPU's generator."""
    import torch

    return {
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
