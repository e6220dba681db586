"""Runs of `train` and `demo`: the files they write, resuming to the same bytes, and what ends them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from .runs import PROMPTS, TINY, WEIGHTS, records, snapshot

KOHYA = "kohya_lora_weights.safetensors"


def without_times(folder):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "images_per_second", "peak_bytes")} for r in records(folder)
    ]


def test_a_run_leaves_what_it_promises(command, tiny_sd, tiny_sd_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ("--model", tiny_sd_folder, "--reward", "colorfulness:2,compressibility", "--learning-rate", "1e-2")
    code, printed, err = command(
        "train", *arguments, *TINY, "--steps", 3, "--sample-every", 2, "--save-every", 2, "--output-dir", out
    )
    assert (code, err) == (0, "")
    assert "sample prompts" in printed and "step 3/3" in printed
    assert {path.name for path in out.iterdir()} == {
        *(WEIGHTS, "metrics.jsonl", "samples", "reward.png", "before_after.png", "checkpoints"),
        *("config.yaml", "versions.json", "README.md", KOHYA),
    }
    assert {path.name for path in (out / "samples").glob("*.png")} == {f"step_000{i}.png" for i in (0, 2, 3)}
    assert [record["step"] for record in records(out)] == [1, 2, 3]
    first = records(out)[0]
    parts = first["reward_parts"]
    assert first["reward_mean"] == pytest.approx(2 * parts["colorfulness"] + parts["compressibility"], rel=1e-5)
    assert json.loads((out / "versions.json").read_text())["torch"] == torch.__version__
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["steps"] == 3 and config["mixed_precision"] == "no" and config["model"] == str(tiny_sd_folder)
    # Some picture has changed, and the adapters load in diffusers.
    folders = [out / "samples" / name for name in ("step_0000", "step_0003")]
    assert {file.read_bytes() for file in folders[0].iterdir()} != {file.read_bytes() for file in folders[1].iterdir()}
    tiny_sd.load_lora_weights(out)
    assert any(p.abs().max() > 0 for name, p in tiny_sd.unet.named_parameters() if "lora_B" in name)
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "before_after.png" in card and "`colorfulness:2,compressibility`" in card
    assert KOHYA in card and "load_lora_weights" in card and str(tmp_path) not in card
    assert str(tiny_sd_folder.parent) not in card and f"| model | {tiny_sd_folder.name} |" in card
    with safe_open(out / KOHYA, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4" and metadata["ss_steps"] == metadata["alignprop_steps"] == "3"
    assert metadata["alignprop_base_model"] == tiny_sd_folder.name and str(tmp_path) not in str(metadata)
    # `sample` with those adapters draws exactly the pictures of the last step.
    code, _, err = command(
        *("sample", "--model", tiny_sd_folder, "--lora", out, *PROMPTS, "--output-dir", tmp_path / "s"),
        *("--batch-size", 3, "--num-inference-steps", 2, "--device", "cpu"),
    )
    assert (code, err) == (0, "")
    drawn = sorted((tmp_path / "s").glob("000_*_seed0.png"))[0]
    assert drawn.read_bytes() == (out / "samples" / "step_0003" / "00.png").read_bytes()
    assert (tmp_path / "s" / "grid.png").is_file()


def test_resuming_gives_the_same_files_and_a_used_folder_is_refused(command, tiny_sd_folder, tmp_path):
    common = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, "--sample-every", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*common, "--steps", 4, "--output-dir", whole)[0] == 0
    assert command(*common, "--steps", 2, "--output-dir", parts)[0] == 0
    before = snapshot(parts)
    code, _, err = command(*common, "--steps", 4, "--output-dir", parts)
    assert code == 2 and "train --resume" in err and len(err.splitlines()) == 1
    assert snapshot(parts) == before
    # As after a kill in the middle of a step that was already logged: an extra line, and an incomplete one.
    with open(parts / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({**records(parts)[-1], "step": 3}) + '\n{"step": 4, "rew')
    code, _, err = command("train", "--resume", "--steps", 4, "--output-dir", parts)
    assert (code, err) == (0, "")
    for name in (WEIGHTS, KOHYA, "samples/samples.jsonl", "samples/step_0004.png", "before_after.png"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert without_times(parts) == without_times(whole)
    assert (parts / WEIGHTS).read_bytes() != before[parts / WEIGHTS]


def test_a_run_killed_at_its_very_start_begins_anew(command, tiny_sd_folder, tmp_path):
    common = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, "--steps", 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*common, "--output-dir", whole)[0] == 0
    (killed / ".metrics.jsonl.tmp").mkdir(parents=True)  # stops it when it starts to write records
    code, _, err = command(*common, "--output-dir", killed)
    assert code == 1 and len(err.splitlines()) == 1 and "Is a directory" in err
    (killed / ".metrics.jsonl.tmp").rmdir()
    assert command(*common, "--output-dir", killed)[0] == 2
    assert command("train", "--resume", "--output-dir", killed)[0] == 0
    assert (killed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_taken(command, tiny_sd_folder, tmp_path):
    common = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, "--save-every", 1)
    out = tmp_path / "out"
    assert command(*common, "--steps", 2, "--output-dir", out)[0] == 0
    weights = (out / WEIGHTS).read_bytes()
    damaged = out / "checkpoints" / "checkpoint_2" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    before = snapshot(out)
    code, _, err = command("train", "--resume", "--output-dir", out)
    assert code == 2 and len(err.splitlines()) == 1 and "checkpoint_1" in err
    assert snapshot(out) == before
    code, _, err = command(
        "train", "--resume-from", out / "checkpoints" / "checkpoint_1", "--output-dir", out, "--steps", 2
    )
    assert (code, err) == (0, "")
    assert (out / WEIGHTS).read_bytes() == weights
    assert [record["step"] for record in records(out)] == [1, 2]


def test_yaml_and_command_line_combine(command, tiny_sd_folder, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {tiny_sd_folder}\nreward: colorfulness\nsteps: 9\nnum_inference_steps: 2\nlearning_rate: 1e-4\n"
        f"batch_size: 2\noutput_dir: {tmp_path / 'out'}\ntruncation: last:1\nmemory_budget: none\nseed:\n"
    )
    code, _, err = command("train", "--config", file, "--steps", 1)
    assert (code, err) == (0, "")
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    expected = {"steps": 1, "learning_rate": 1e-4, "truncation": "last:1", "memory_budget": "none", "seed": 0}
    assert {name: config[name] for name in expected} == expected
    assert records(tmp_path / "out")[0]["gradient_steps"] == 1


@pytest.mark.slow("trains with several rewards")
def test_several_reward_models_and_what_a_reward_tells(command, tiny_sd_folder, tmp_path):
    """From the command line and from YAML, as a list or a single value, and through --resume from another folder."""
    from alignprop_fast.demo import clip_path, counter_path

    common = ("train", "--model", tiny_sd_folder, "--reward", "count:apple=2,clip:0.5", *TINY, "--steps", 1)
    counter, clip = f"count={counter_path()}", f"clip={clip_path()}"
    code, _, err = command(*common, "--reward-model", counter, "--reward-model", clip, "--output-dir", tmp_path / "a")
    assert (code, err) == (0, "")
    assert yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())["reward_model"] == [counter, clip]
    assert list(records(tmp_path / "a")[0]["reward_parts"]) == ["count:apple=2", "clip", "soft_count"]
    code, _, err = command("train", "--resume", "--output-dir", tmp_path / "a", "--steps", 2)
    assert (code, err) == (0, "") and len(records(tmp_path / "a")) == 2
    file = tmp_path / "run.yaml"
    file.write_text(f"reward_model: {counter}\nallow_pickle: true\n")
    code, _, err = command(*common, "--config", file, "--output-dir", tmp_path / "b")
    assert (code, err) == (0, "")
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert config["reward_model"] == [counter] and config["allow_pickle"] is True


NAN_REWARD = """
def score(images, prompts, metadata):
    # One call checks the reward, one is for the pictures before training; NaN from the second step on.
    score.calls += 1
    scores = images.mean(dim=(1, 2, 3))
    return scores * (float("nan") if score.calls > 3 else 1.0), {}
score.calls = 0
"""


def test_steps_that_are_not_finite_are_reported_and_stop_the_run(command, tmp_path, tiny_sd_folder, monkeypatch):
    (tmp_path / "nan_reward_of_test.py").write_text(NAN_REWARD)
    monkeypatch.chdir(tmp_path)
    code, out, err = command(
        *("train", "--model", tiny_sd_folder, "--reward", "nan_reward_of_test:score", *TINY, "--steps", 30),
        *("--sample-every", 100, "--output-dir", "out"),
    )
    assert code == 1 and len(err.splitlines()) == 1 and "10 steps in a row" in err
    assert "step 2: loss or gradient is not finite" in " ".join(out.split())
    found = records(tmp_path / "out")
    assert [record["status"] for record in found] == ["ok", *["not_finite"] * 10]
    assert found[1]["reward_mean"] is None


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.slow("starts a process, and trains for as many steps as it did")
def test_ctrl_c_saves_and_leaves(command, tiny_sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("alignprop_fast.cli.session.SAMPLE_PICTURES", 8)  # as many as the other process draws
    out = tmp_path / "out"
    options = ("--model", str(tiny_sd_folder), "--reward", "colorfulness", *TINY, "--sample-every", "1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "alignprop_fast", "train", *options, "--steps", "500", "--output-dir", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, process)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    done = records(out)[-1]["step"]
    assert 2 <= done < 500 and f"stopped after step {done}; to continue: alignprop-fast train --resume" in printed
    assert sorted((out / "checkpoints").iterdir())[-1].name and (out / "checkpoints" / f"checkpoint_{done}").is_dir()
    assert command("train", "--resume", "--output-dir", out, "--steps", done + 1)[0] == 0
    whole = ("train", *options, "--steps", done + 1, "--output-dir", tmp_path / "whole")
    assert command(*whole)[0] == 0
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert Path(out / "before_after.png").read_bytes() == (tmp_path / "whole" / "before_after.png").read_bytes()


@pytest.mark.slow("draws all of the demo's pictures, before and after")
def test_the_demo_runs_on_the_bundled_model(command, tmp_path):
    """Other tests measure whether it learns; this one checks that it runs, compares and writes."""
    code, out, err = command("demo", "--steps", 1, "--output-dir", tmp_path / "demo")
    assert (code, err) == (0, "")
    table = " ".join(out.split())
    assert "training prompts" in table and "prompts never seen" in table
    assert (tmp_path / "demo" / "before_after.png").is_file() and (tmp_path / "demo" / WEIGHTS).is_file()
    assert "the bundled model learns" in out and "seconds in total" in out
    assert command("demo", "--steps", 1, "--output-dir", tmp_path / "demo")[0] == 2


WATCHED = """
def falls(images, prompts, metadata):
    # What is watched: the darker the worse, so that training for brightness pleases it, and for darkness not.
    return images.mean(dim=(1, 2, 3)), {}
def darkness(images, prompts, metadata):
    return -images.mean(dim=(1, 2, 3)), {}
"""


@pytest.mark.slow("trains five times, for up to 20 steps")
def test_a_run_stops_when_what_is_watched_falls_and_resumes_to_the_same_end(
    command, tiny_sd, tiny_sd_folder, tmp_path, monkeypatch
):
    (tmp_path / "watched_of_test.py").write_text(WATCHED)
    monkeypatch.chdir(tmp_path)
    options = ("--model", tiny_sd_folder, "--reward", "watched_of_test:darkness", *TINY, "--learning-rate", "1e-2")
    options = (*options, "--watch-reward", "watched_of_test:falls", "--watch-prompts", "demo", "--watch-pictures", 4)
    options = (*options, "--sample-every", 2, "--save-every", 3, "--patience", 2)
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    code, printed, err = command("train", *options, "--max-drop", 0.01, "--steps", 20, "--output-dir", whole)
    assert (code, err) == (0, "")
    samples = [json.loads(line) for line in (whole / "samples" / "samples.jsonl").read_text().splitlines()]
    scores = [sample["watch"]["reward"] for sample in samples]
    ended = samples[-1]["step"]
    assert records(whole)[-1]["step"] == ended
    good = [score >= max(scores[: i + 1]) - 0.01 for i, score in enumerate(scores)]
    assert good[-3:] == [True, False, False]
    kept = samples[-3]["step"]
    assert f"stopped after step {ended}: the adapters of step {kept} are kept" in printed
    assert 0 < kept < ended < 20
    # The written LoRA equals that of an unwatched run of this many steps.
    unwatched = options[: options.index("--watch-reward")]
    assert command("train", *unwatched, "--steps", kept, "--output-dir", plain)[0] == 0
    written, expected = load_file(whole / WEIGHTS), load_file(plain / WEIGHTS)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    # Interrupted in between and resumed, and resumed again after it has stopped.
    assert command("train", *options, "--max-drop", 0.01, "--steps", 3, "--output-dir", parts)[0] == 0
    for _ in range(2):
        assert command("train", "--resume", "--steps", 20, "--output-dir", parts)[0] == 0
        assert (parts / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        assert (parts / "before_after.png").read_bytes() == (whole / "before_after.png").read_bytes()
        assert records(parts)[-1]["step"] == ended


@pytest.mark.slow("trains, and resumes the training")
def test_a_normalised_mixture_resumes_exactly(command, tiny_sd_folder, tmp_path):
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness,compressibility:2", "--learning-rate", "1e-2")
    options = (*options, *TINY, "--sample-every", 10, "--save-every", 2)
    whole, parts, plain = tmp_path / "whole", tmp_path / "parts", tmp_path / "plain"
    assert command("train", *options, "--normalise-rewards", "--steps", 4, "--output-dir", whole)[0] == 0
    assert command("train", *options, "--steps", 4, "--output-dir", plain)[0] == 0
    assert command("train", *options, "--normalise-rewards", "--steps", 2, "--output-dir", parts)[0] == 0
    assert command("train", "--resume", "--steps", 4, "--output-dir", parts)[0] == 0
    assert (parts / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes() != (plain / WEIGHTS).read_bytes()
    first = records(whole)[0]
    parts_mean = first["reward_parts"]
    assert first["reward_mean"] == pytest.approx(
        parts_mean["colorfulness"] + 2 * parts_mean["compressibility"], rel=1e-5
    )
    assert first["grad_norm"] != pytest.approx(records(plain)[0]["grad_norm"], rel=1e-2)


def test_a_schedule_an_average_and_clipping_resume_exactly(command, tiny_sd_folder, tmp_path):
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness", *TINY, "--learning-rate", "1e-2", "--steps", 4)
    options = (*options, "--lr-scheduler", "linear", "--warmup-steps", 1, "--ema-decay", 0.5, "--max-grad-norm", 1e-3)
    out = tmp_path / "out"
    code, printed, err = command("train", *options, "--save-every", 2, "--sample-every", 10, "--output-dir", out)
    assert (code, err) == (0, "") and "ema; the pictures were drawn with it" in printed
    names = (WEIGHTS, KOHYA, f"ema/{WEIGHTS}", f"ema/{KOHYA}", "samples/step_0004.png", "before_after.png")
    first, rates = {name: (out / name).read_bytes() for name in names}, [0, 1e-2, 2e-2 / 3, 1e-2 / 3]
    assert first[WEIGHTS] != first[f"ema/{WEIGHTS}"]
    assert [record["learning_rate"] for record in records(out)] == pytest.approx(rates)
    before = without_times(out)
    middle = ("--resume-from", out / "checkpoints" / "checkpoint_2")
    assert command("train", *middle, "--output-dir", out)[0] == 0
    assert {name: (out / name).read_bytes() for name in names} == first and without_times(out) == before
    # The pictures were drawn with the average.
    draw = ("sample", "--model", tiny_sd_folder, *TINY)
    assert command(*draw, "--lora", out / "ema", "--output-dir", tmp_path / "s")[0] == 0
    drawn = next((tmp_path / "s").glob("000_*_seed0.png"))
    assert drawn.read_bytes() == (out / "samples" / "step_0004" / "00.png").read_bytes()
