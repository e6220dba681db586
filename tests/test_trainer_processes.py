"""Two processes on the CPU: the same adapters in both, and a checkpoint that neither waits for in vain."""

import os
import socket
import subprocess
import sys

from safetensors.torch import load_file

from alignprop_fast.checkpoint import checkpoints, read_checkpoint

WORKER = """
import random, sys
import torch
torch.set_num_threads(1)
from alignprop_fast.config import AlignPropConfig
from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
from alignprop_fast.trainer import AlignPropTrainer

folder, root = sys.argv[1:]
reward = lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)), {})
draw = lambda: (random.choice(["red", "a dog"]), {})

def train(name, epochs, resume=""):
    config = AlignPropConfig(
        mixed_precision="no", sample_num_steps=2, truncated_rand_backprop_minmax=(1, 2), train_batch_size=1,
        output_dir=f"{root}/{name}", resume_from=resume and f"{root}/{name}", accelerator_kwargs={"cpu": True},
    )
    trainer = AlignPropTrainer(config, reward, draw, DefaultDDPOStableDiffusionPipeline(folder))
    assert trainer.accelerator.num_processes == 2
    trainer.train(epochs)
    mine = torch.cat([parameter.detach().flatten() for parameter in trainer.trainable_layers])
    both = trainer.accelerator.gather(mine[None])
    assert torch.equal(both[0], both[1]), "the processes have drifted apart"
    assert trainer.metrics.images_per_second * trainer.metrics.seconds > 1.99

train("whole", 3)
train("parts", 2)
train("parts", 3, resume="yes")
"""


def _run_both(*arguments: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", WORKER, *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def test_two_processes_train_save_and_resume(tiny_sd_folder, tmp_path):
    _run_both(str(tiny_sd_folder), str(tmp_path))
    whole, parts = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts"))
    assert read_checkpoint(whole)["steps_done"] == read_checkpoint(parts)["steps_done"] == 3
    name = "pytorch_lora_weights.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    before = load_file(whole.with_name("checkpoint_1") / name)
    assert any((tensor != before[key]).any() for key, tensor in load_file(whole / name).items())
