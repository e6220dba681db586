"""Two processes on the CPU: one gradient, one set of files, and neither waits for a lost one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from alignprop_fast.training.checkpoint import checkpoints, read_checkpoint

NAME = "pytorch_lora_weights.safetensors"
PROMPTS = ("red", "a dog")


def make_trainer(folder, output_dir, **options):
    from alignprop_fast.models.ddpo_pipeline import DefaultDDPOStableDiffusionPipeline
    from alignprop_fast.training.config import AlignPropConfig
    from alignprop_fast.training.trainer import AlignPropTrainer

    defaults = {"sample_num_steps": 2, "truncated_rand_backprop_minmax": (1, 2), "train_batch_size": 1}
    config = AlignPropConfig(
        **{"mixed_precision": "no", "accelerator_kwargs": {"cpu": True}, **defaults, **options},
        output_dir=str(output_dir),
    )
    return AlignPropTrainer(config, score, draw, DefaultDDPOStableDiffusionPipeline(str(folder)))


def score(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3)), {"red": float("red" in prompts[0])}


def draw():
    return random.choice(PROMPTS), {}


def one_step_on(trainer, indices):
    """An optimizer step on the prompts and noises of these indices; returns the optimizer's gradient."""
    seen = []

    def generate(batch_size):
        generators = [torch.Generator().manual_seed(index) for index in indices]
        prompts = tuple(PROMPTS[index] for index in indices)
        images = trainer.sampler(list(prompts), generator=generators, grad_steps=[0, 1])
        return {"images": images, "prompts": prompts, "prompt_metadata": ({},) * len(indices)}

    trainer._generate_samples = generate
    trainer.optimizer.step = lambda: seen.append([tensor.grad.clone() for tensor in trainer.update.weights.tensors])
    with torch.no_grad():  # with B at zero no gradient would reach A
        torch.manual_seed(5)
        trainer.update.weights.tensors[0].normal_(std=0.1)
    trainer.step(0, 0)
    return torch.cat(seen[0])


WORKER = """
import os, random, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_trainer_processes import make_trainer, one_step_on
from alignprop_fast.cli.support import setup_errors
from alignprop_fast.training.processes import of_all_processes
folder, root = sys.argv[2:]

def train(name, epochs, **options):
    trainer = make_trainer(folder, f"{root}/{name}", sample_num_steps=4, **{**rule, **options})
    drawn = []
    for metrics in trainer.steps(epochs):
        drawn.append(trainer.sampler.truncation)
    mine = torch.cat([parameter.detach().flatten() for parameter in trainer.trainable_layers])
    both = trainer.accelerator.gather(mine[None])
    assert torch.equal(both[0], both[1]), "the processes have drifted apart"
    if trainer.update.average is not None:
        [average] = trainer.update.average.state_dict()["weights"]
        assert not torch.equal(average, mine)
        both = trainer.accelerator.gather(average[None])
        assert torch.equal(both[0], both[1]), "the averages have drifted apart"
    noises = trainer.accelerator.gather(torch.tensor([random.random(), torch.rand(()).item()]))
    assert noises.unique().numel() == 4, "prompts and noise must differ from process to process"
    gates = of_all_processes(drawn)
    assert gates[0] == gates[1], "gates must be alike"
    assert len(drawn) < 2 or len(set(drawn)) > 1, "gates must change with the step"
    assert trainer.metrics.images_per_second * trainer.metrics.seconds > 1.99
    return trainer

rule = {"truncated_rand_backprop_minmax": (0, 4), "seed": 3}
scheduled = {"lr_scheduler": "linear", "num_epochs": 3, "ema_decay": 0.5}
assert train("whole", 3, **scheduled).accelerator.num_processes == 2
train("parts", 2, **scheduled)
train("parts", 3, resume_from=f"{root}/parts", **scheduled)
train("narrow", 6, optimizer="adafactor", adapter_dtype="bf16", truncation="gaussian")  # separate tensors
trainer = make_trainer(folder, f"{root}/gradient")
rank = trainer.accelerator.process_index
gradient = one_step_on(trainer, [rank])
assert trainer.metrics.reward_parts == {"red": 0.5}, "a mean over the processes"
torch.save({"gradient": gradient, "metrics": trainer.metrics.to_dict()}, f"{root}/rank{rank}.pt")
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
with setup_errors():
    trainer.step(1, 1)
"""


def start_both(*arguments):
    """This interpreter on the arguments, as two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command, pipes = [sys.executable, *map(str, arguments)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environments = [{**os.environ, **shared, "RANK": r, "LOCAL_RANK": r} for r in ("0", "1")]
    return [subprocess.Popen(command, env=environment, text=True, **pipes) for environment in environments]


def wait_for_both(processes, timeout=400):
    """(exit codes, outputs, errors)."""
    try:
        found = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [out for out, _ in found], [err for _, err in found]


@pytest.mark.slow("starts pairs of processes, each of which imports everything")
def test_training_saving_resuming_the_gradient_and_a_kill(tiny_sd_folder, tmp_path, request):
    codes, _, errors = wait_for_both(start_both("-c", WORKER, request.path.parent, tiny_sd_folder, tmp_path))
    # Finally one of them is killed, and the other ends at once with a message.
    assert codes == [1, -signal.SIGKILL], errors
    assert "alignprop-fast: waited in vain for another process, which has ended or hangs: see its message" in errors[0]
    whole, parts = (checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts"))
    assert read_checkpoint(whole)["steps_done"] == read_checkpoint(parts)["steps_done"] == 3
    assert (whole / NAME).read_bytes() == (parts / NAME).read_bytes()
    [[whole_average], [parts_average]] = [
        torch.load(folder / "optimizer.pt")["average"]["weights"] for folder in (whole, parts)
    ]
    assert torch.equal(whole_average, parts_average)
    before = load_file(whole.with_name("checkpoint_1") / NAME)
    assert any((tensor != before[key]).any() for key, tensor in load_file(whole / NAME).items())
    # Two processes with one picture each have the gradient of one process with both pictures.
    one = make_trainer(tiny_sd_folder, tmp_path / "one", train_batch_size=2)
    expected = one_step_on(one, [0, 1])
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(found["gradient"], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        for name in ("reward_mean", "reward_std", "loss", "grad_norm"):
            assert found["metrics"][name] == pytest.approx(getattr(one.metrics, name), rel=1e-4), name


def command_of(folder, out, *more):
    options = ("--reward", "colorfulness", "--num-inference-steps", "2", "--batch-size", "1", "--device", "cpu")
    return ("-m", "alignprop_fast", "train", "--model", folder, *options, "--output-dir", out, *more)


def wait_until(condition, processes, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow("starts pairs of processes, each of which imports everything")
def test_the_command_writes_once_stops_together_and_goes_on_alone(tiny_sd_folder, tmp_path, command):
    """Ctrl-C reaches one process, and both stop after the same step. Then one process resumes the run of two."""
    out = tmp_path / "out"
    processes = start_both(*command_of(tiny_sd_folder, out, "--steps", "5000", "--sample-every", "5000"))
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, processes)
    processes[1].send_signal(signal.SIGINT)
    codes, (said, silent), errors = wait_for_both(processes)
    assert codes == [130, 130], errors
    assert "to continue: alignprop-fast train --resume" in said and silent == "" and errors[1] == ""
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    last = checkpoints(out / "checkpoints")[-1]
    assert read_checkpoint(last)["steps_done"] == steps[-1]
    assert len(torch.load(last / "rng.pt")) == 2
    code, printed, err = command("train", "--resume", "--output-dir", out, "--steps", steps[-1] + 1)
    assert (code, err) == (0, "")
    assert "made by 2 processes and 1 go on: with new random numbers" in " ".join(printed.split())
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == steps[-1] + 1
