"""The compiled kernels, for every test that needs them."""

import pytest

from alignprop_fast.ops import autotune, extension


@pytest.fixture(scope="session")
def compiled_kernels():
    """Builds csrc/ for this machine, once in torch's extension cache, if there is a compiler."""
    arches = extension.present_arches()
    if extension.installed(arches) is None:
        try:
            extension.build(extension.library_path(arches), arches)
        except extension.BuildError as error:
            pytest.skip(f"csrc/ not built: {error}")
    # A test before this one may have found nothing.
    extension.missing.cache_clear()
    autotune.forget()
