"""Imports once what every section needs; workers are forked from the process that imported this.

Nothing here may start CUDA, which does not survive a fork. A dry run without a GPU starts the emulated one.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT

EMULATED = ROOT / "tests" / "emulated_gpu"
DRY_RUN = "ALIGNPROP_FAST_GPU_DRY_RUN"  # set in the environment of a dry run


def emulate() -> None:
    """If torch was built without CUDA, start a GPU emulated in host memory; building it needs a compiler."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    if runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] is not None:
        return
    sys.path.insert(0, str(EMULATED))
    try:
        import emulate
    finally:
        sys.path.remove(str(EMULATED))
    try:
        emulate.start()
    except FileNotFoundError as error:
        print(f"on the CPU: {error}", file=sys.stderr)


def load() -> None:
    if DRY_RUN in os.environ:
        emulate()
    import diffusers
    import peft
    import torch
    import transformers

    import alignprop_fast.generate.sampler

    # Naming them loads their lazy modules.
    _ = (diffusers.StableDiffusionXLPipeline, diffusers.DDIMScheduler, transformers.CLIPTextModelWithProjection)
    _ = (peft.LoraConfig, alignprop_fast.generate.sampler.DifferentiableSampler, torch.cuda)


try:
    load()
except Exception as error:  # this process must live, and each section reports the error itself
    print(f"not all could be imported: {type(error).__name__}: {error}", file=sys.stderr)
