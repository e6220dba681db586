"""For the checks of this folder, which `tests/test_emulated_gpu.py` runs in a process that sees the emulated GPU."""

import pytest


@pytest.fixture(scope="session")
def emulated():
    import emulate

    return emulate.started()


@pytest.fixture(scope="session")
def plain_kernels():
    """Triton's interpreter takes seconds for what these checks run hundreds of times; its kernels have tests of their
    own. Attention goes by the first of the GPU's fused kernels instead of by a measured choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alignprop_fast.ops.backend._HAS_TRITON", False)
        patch.setattr(
            "alignprop_fast.ops.attention_backends.fastest",
            lambda problem, candidates, device: next(iter(candidates())),
        )
        yield
