"""The training step of trl 0.23.1 on SD1.5, in its own environment; `train_step.py --trl-python` starts it.

Run as a script, it is the process in that environment and does not import this package. Not tried on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


def trl_row(python: str, setting: Any, steps: int, repeats: int, common: dict[str, Any]) -> dict[str, Any]:
    """The row of trl for a setting: write the model to a folder and train from it in another process."""
    row = {**common, "variant": "trl", "batch": setting.batch, "steps": steps, "grad_steps": setting.grad_steps}
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "model", Path(folder) / "record.json"
        write_model(setting.model, model)
        numbers = (setting.batch, steps, setting.grad_steps, repeats)
        command = [python, __file__, str(model), str(output), row["reward"], *map(str, numbers)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1][:150]
            return row | {"status": "out of memory" if "OutOfMemory" in result.stderr else f"failed: {reason}"}
        record = json.loads(output.read_text(encoding="utf-8"))
    times = record["seconds"]
    return row | {
        "status": "ok",
        "torch": record["torch"],
        "seconds": round(statistics.median(times), 4),
        "spread_seconds": round(max(times) - min(times), 4),
        "repeats": len(times),
        "samples_per_second": round(setting.batch / statistics.median(times), 4),
        "peak_bytes": record["peak_bytes"],
        "plan": "trl 0.23.1, every step checkpointed",
    }


def write_model(name: str, folder: Path) -> None:
    """A folder of Stable Diffusion with random weights, its UNet and VAE as published, its text encoder small."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from alignprop_fast.making.random_weights import make_folder
    from alignprop_fast.models.published import UNETS, VAE

    if name == "small":
        make_folder("sd", folder)
        return
    # Do not save the tokenizer again, because trl's environment cannot read what a newer library saves.
    make_folder("sd", folder, text_width=UNETS[name]["cross_attention_dim"])
    UNet2DConditionModel(**UNETS[name]).to(torch.bfloat16).save_pretrained(folder / "unet")
    AutoencoderKL(**VAE, scaling_factor=0.18215).to(torch.bfloat16).save_pretrained(folder / "vae")


def vit_h(device: str) -> Any:
    """An image encoder as large as that of HPS v2, with random weights, as a reward for trl."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
        projection_dim=1024,
    )
    with torch.device(device):
        tower = CLIPVisionModelWithProjection(config).to(torch.bfloat16).requires_grad_(False)

    def reward(images, prompts, metadata):
        pixels = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        return torch.nn.functional.normalize(tower(pixels.bfloat16()).image_embeds.float(), dim=-1).sum(-1), {}

    return reward


def mean_reward(images: Any, prompts: Any, metadata: Any) -> Any:
    return images.mean(dim=(1, 2, 3)), {}


def train(model: str, output: str, reward: str, batch: int, steps: int, grad_steps: int, repeats: int) -> None:
    """Time a few steps of trl's trainer, after two steps to warm up."""
    import torch
    from accelerate import PartialState

    PartialState()  # trl's logger fails before accelerate has been initialised
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

    cuda = torch.cuda.is_available()
    config = AlignPropConfig(
        mixed_precision="bf16" if cuda else "no",
        save_freq=10**9,
        sample_num_steps=steps,
        train_batch_size=batch,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=steps - grad_steps,
        log_with=None,
        logdir=output + ".logs",
    )
    score = mean_reward if reward == "mean" else vit_h("cuda" if cuda else "cpu")
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=True)
    trainer = AlignPropTrainer(config, score, lambda: ("a red cat", {}), pipeline)
    seconds = []
    for step in range(2 + repeats):
        if step == 1 and cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.step(step, step)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else 0
    record = {"seconds": seconds[2:], "peak_bytes": peak_bytes, "torch": torch.__version__}
    Path(output).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("reward")
    for number in ("batch", "steps", "grad_steps", "repeats"):
        parser.add_argument(number, type=int)
    train(**vars(parser.parse_args()))
