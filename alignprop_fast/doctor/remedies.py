"""Remedies for the user: install something, free something, or report it."""

# (text in the reason, in lower case; remedy). The first match counts.
_REMEDIES = (
    ("no module named 'triton'", "pip install triton"),
    ("triton is not installed", "pip install triton"),
    ("python.h", "apt install python3-dev, or the headers of your Python"),
    ("no nvcc", "pip install 'cuda-toolkit[nvcc,crt,nvvm,cccl]', or install the CUDA toolkit"),
    ("no ninja", "pip install ninja"),
    ("no c++ compiler", "apt install g++"),
    ("failed to find c compiler", "apt install gcc"),
    ("no c compiler", "apt install gcc"),
    ("gcc", "apt install gcc python3-dev"),
    ("not built", "python -m alignprop_fast.ops.extension"),
    ("the compiler failed", "read the named log; for an unsupported GNU version set CXX to an older compiler"),
    ("driver version is insufficient", "update the NVIDIA driver, or set CUDA_HOME to an older toolkit"),
    ("no kernel image", "install a torch that is built for this GPU: see pytorch.org"),
    ("ptx", "update the NVIDIA driver, then triton"),
    ("out of memory", "end the other programs that use the GPU"),
    ("shared memory", "nothing: this GPU has too little shared memory for that kernel"),
    ("deterministic", "nothing, or leave --deterministic out"),
)
_TELL = "update torch, triton and the driver; if it stays, report it with the file of --json"


def remedy(reason: str) -> str:
    """The remedy, in one line, for the reason that something is switched off or wrong."""
    said = reason.lower()
    return next((what for part, what in _REMEDIES if part in said), _TELL)
