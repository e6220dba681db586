"""The command `plan`: its predictions, without weights and for GPUs that are not here, and its errors."""

import gc
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignprop_fast.cli import counting
from alignprop_fast.cli.plan_summary import predict
from alignprop_fast.demo import clip_path
from alignprop_fast.models.architectures import NAMES
from alignprop_fast.planner import find_gpu, load_table, simulate
from alignprop_fast.rewards.clip import ClipScore
from alignprop_fast.runtime import costs

from .runs import PROMPTS

GIB = 2**30
SHORT = ("--num-inference-steps", "4", "--batch-size", "2")
TINY = ("--num-inference-steps", "2", "--batch-size", "2", *PROMPTS)  # to train with


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A cache of tables for this file only, empty at first."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def plan(command, tmp_path, monkeypatch, home):
    """Runs `plan` in its own folder; returns exit code, stdout and stderr."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command("plan", *arguments)


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_sd_folder):
    """The tiny model without its weights."""
    folder = tmp_path_factory.mktemp("configs") / "model"
    weights = shutil.ignore_patterns("*.safetensors", "*.bin")
    return shutil.copytree(tiny_sd_folder, folder, ignore=weights)


@pytest.fixture
def table(plan, configs, tmp_path):
    """A saved table of the tiny model on an RTX 4090."""
    arguments = ("--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT)
    assert plan(*arguments, "--save-table", "table.json", "--output-dir", "first")[0] == 0
    shutil.rmtree(tmp_path / "first")
    return Path("table.json")


def saved_costs(file):
    """A saved table without the host memory that was free when it was made."""
    return replace(load_table(Path(file)), host_limit_bytes=None)


@pytest.mark.slow("estimates the bundled model")
def test_it_answers_without_weights(plan, configs, tmp_path):
    arguments = (
        "--model",
        configs,
        "--gpu",
        "RTX 4090",
        "--reward",
        "colorfulness,clip:0.1",
        *SHORT,
        "--truncation",
        "uniform",
    )
    code, out, err = plan(*arguments, "--reward-model", clip_path(), "--json", "plan.json", "--output-dir", "out")
    assert (code, err) == (0, "")
    for words in ("fits: predicted peak", "worst case", "on average", "largest batch", "residual blocks", "in all"):
        assert words in out
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["peak_bytes"] == sum(facts["kinds"].values()) == max(facts["phases"].values())
    assert facts["peak_bytes"] <= facts["budget_bytes"] == find_gpu("4090").memory_bytes - GIB // 2
    # Two of four steps carry gradient on average, all four in the worst case.
    assert sorted(facts["resident_steps"] + facts["replayed_steps"]) == [0, 1, 2, 3] and facts["gradient_steps"] == 4
    assert facts["expected"]["gradient_steps"] == 2
    assert facts["expected"]["seconds_per_step"] < facts["seconds_per_step"]
    assert facts["images_per_hour"] == pytest.approx(3600 * 2 / facts["seconds_per_step"])
    assert facts["largest_batch_size"] >= 2 and facts["source"] == "estimated" and facts["gpu"] == "RTX 4090"
    # In bf16, as on a GPU.
    weights = (*(clip := ClipScore(clip_path())).parameters(), *clip.buffers())
    assert facts["kinds"]["reward"] == sum(t.numel() * (2 if t.is_floating_point() else 8) for t in weights)
    assert Image.open(tmp_path / "out" / "plan.png").size[0] > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "out"}


@pytest.mark.slow("estimates the bundled model at several batch sizes")
def test_the_largest_batch_fits_and_more_does_not(plan, configs):
    budget = ("--memory-budget", "165MiB", "--gpu", "4090", "--model", configs, "--reward", "colorfulness")
    short = ("--num-inference-steps", 3, "--truncation", "last:1")
    assert plan(*budget, *short, "--batch-size", 1, "--json", "1.json")[0] == 0
    facts = json.loads(Path("1.json").read_text())
    largest = facts["largest_batch_size"]
    assert 1 < largest < 100 and facts["gradient_steps"] == 1 and facts["expected"]["gradient_steps"] == 1
    assert plan(*budget, *short, "--batch-size", largest)[0] == 0
    code, _, err = plan(*budget, *short, "--batch-size", 2 * largest)
    assert code == 2 and len(err.splitlines()) == 1
    assert "the leanest plan needs" in err and f"batch size {largest} fits" in err


def test_plans_come_from_saved_tables_too(plan, table):
    saved = load_table(table)
    assert saved.origin["source"] == "estimated" and saved.fixed["weights"] > 0
    arguments = ("--table", table, "--num-inference-steps", 4, "--json", "plan.json")
    code, out, err = plan(*arguments)
    assert (code, err) == (0, "") and "RTX 4090" in out and "largest batch" not in out
    facts = json.loads(Path("plan.json").read_text())
    assert facts["batch_size"] == 2 and facts["largest_batch_size"] is None
    code, _, err = plan(*arguments, "--memory-budget", "100MiB")
    assert code == 2
    least = re.search(r"needs ([\d.]+ MiB)", err)[1]
    assert plan(*arguments, "--memory-budget", least)[0] == 0
    lean = json.loads(Path("plan.json").read_text())
    # Saved again, and asked without a number of steps: the table has that of its own question.
    assert plan(*arguments, "--save-table", "again.json")[0] == 0
    assert plan("--table", "again.json", "--json", "again_plan.json")[0] == 0
    assert json.loads(Path("again_plan.json").read_text())["num_inference_steps"] == 4
    assert lean["peak_bytes"] <= facts["peak_bytes"] and lean["seconds_per_step"] > facts["seconds_per_step"]


def test_the_price_of_a_rule_has_its_renoisings_and_its_early_end(plan, table):
    saved, found = load_table(table), {}
    for rule in ("last:1", "lv:2", "srpo", "srpo:3", "refl", "leapalign", "last:2"):
        arguments = ("--table", table, "--num-inference-steps", 8, "--truncation", rule)
        assert plan(*arguments, "--json", "plan.json", "--output-dir", rule.replace(":", "_"))[0] == 0
        facts = json.loads(Path("plan.json").read_text())
        found[rule] = facts["seconds_per_step"], facts["expected"]["seconds_per_step"]
    last = found["last:1"][0]
    plan_of_last = predict(saved, 8, "last:1", 2, 24 * GIB).worst
    scored = sum(moment.seconds for moment in simulate(saved, plan_of_last) if moment.label in ("decoder", "reward"))
    closed = found["srpo"][0] - last - scored  # in a CUDA graph less than by the table
    assert found["leapalign"] == found["last:2"] and found["last:1"][0] == found["last:1"][1]
    assert 0 < closed <= saved.closed[1] and scored > 0
    one = (found["srpo:3"][0] - found["srpo"][0]) / 2
    assert closed < one < last and found["lv:2"][0] == pytest.approx(last + 2 * one)
    assert found["refl"] == pytest.approx((last, last - closed / 2))  # the chain ends at one of the last two steps


def test_another_budget_is_answered_without_the_model(plan, table, configs, monkeypatch):
    """The `table` was estimated with the same options; a file that changes makes the answer outdated."""
    arguments = ("--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT, "--host-memory", "1GiB")
    saved = ("--table", table, "--num-inference-steps", 4, "--host-memory", "1GiB")
    monkeypatch.setattr(counting, "open_sampler", lambda *_: pytest.fail("the model was made again"))
    figures = []
    for which in (arguments, saved):
        assert plan(*which, "--memory-budget", "170MiB", "--json", "plan.json")[0] == 0
        facts = json.loads(Path("plan.json").read_text())
        figures.append([facts[name] for name in ("peak_bytes", "seconds_per_step", "options", "host_bytes")])
    assert figures[0] == figures[1]
    (configs / "model_index.json").touch()
    with pytest.raises(pytest.fail.Exception):
        plan(*arguments)


def test_host_memory_limits_offloading(plan, table):
    lean = ("--table", table, "--num-inference-steps", 4, "--json", "plan.json")
    for size, most in (("1MiB", 2**20), ("0", 0)):
        assert plan(*lean, "--host-memory", size)[0] == 0
        assert json.loads(Path("plan.json").read_text())["host_bytes"] <= most


def test_a_card_of_24_gb_is_asked_for_24_gib(plan, table):
    code, out, err = plan("--table", table, "--memory-budget", "24GiB")
    assert (code, err) == (0, "")
    assert "RTX 4090 has 23.60 GiB" in out and "reduced to 23.10 GiB" in out


def test_it_measures_a_model_with_weights(plan, tiny_sd_folder):
    arguments = ("--model", tiny_sd_folder, "--reward", "colorfulness", "--num-inference-steps", 2, "--batch-size", 1)
    code, out, err = plan(*arguments, "--measure", "--json", "plan.json")
    assert (code, err) == (0, "") and "(measured)" in out
    assert re.search(r"^measured: costs of a training step, in \d+\.\d s$", out, re.MULTILINE)
    answer = json.loads(Path("plan.json").read_text())
    assert answer["source"] == "measured"
    assert f"{answer['seconds_per_step']:.3g}" in re.search("seconds per training step .*", out)[0].split()


def test_training_begins_with_its_plan_and_ends_with_its_peak(command, plan, tiny_sd_folder):
    common = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", "--device", "cpu", *TINY)
    code, out, err = command(*common, "--steps", 1, "--memory-budget", "2GiB", "--output-dir", "with")
    assert (code, err) == (0, "")
    before, after = out.split("step 1/1")
    assert "fits: predicted peak" in before and "worst case" in before and "residual blocks" in before
    assert "peak:     predicted" in after and "the process took" in after
    assert Image.open("with/plan.png").size[0] > 1000
    code, out, _ = command(*common, "--steps", 1, "--output-dir", "without")
    assert code == 0 and "no memory budget" in out and "peak:     predicted" not in out
    assert not Path("without/plan.png").exists()


def test_training_is_held_to_the_device(command, plan, tiny_sd_folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1 if name == "SC_PAGE_SIZE" else 2 * GIB)
    common = ("train", "--model", tiny_sd_folder, "--reward", "colorfulness", "--device", "cpu", *TINY)
    code, out, _ = command(*common, "--steps", 1, "--memory-budget", "2.1GiB", "--output-dir", "out")
    assert code == 0 and "this computer has 2.00 GiB: the budget of 2.10 GiB is reduced to 2.00 GiB" in out
    assert "of 2.00 GiB, in the phase" in out


BAD = {
    "no size": (["--memory-budget", "plenty"], "24GiB"),
    "negative": (["--memory-budget=-3GiB"], "24GiB"),
    "larger than the GPU": (["--memory-budget", "40GiB"], "more than RTX 4090 has (23.60 GiB)"),
    "too small": (["--memory-budget", "1MiB"], "the leanest plan needs"),
    "unknown GPU": (["--gpu", "RTX 4091"], "perhaps RTX 4090"),
    "unknown model": (["--model", "sd16"], f"of {', '.join(NAMES)} the name is enough"),
    "no configuration": (["--model", "{tmp}/broken"], "copy it again"),
    "unknown reward": (["--reward", "hps"], "did you mean 'hpsv2'"),
    "a reward that needs data": (["--reward", "data_reward_of_test:score"], "--measure"),
    "unknown truncation": (["--truncation", "first:1"], "last:K"),
    "two sizes": (["--resolution", "64", "--height", "64"], "--resolution sets"),
    "odd size": (["--resolution", "13"], "multiple of 8"),
    "weights of an architecture": (["--measure", "--model", "sdxl", "--gpu="], "without weights"),
    "measured elsewhere": (["--measure"], "leave out --gpu"),
    "no table": (["--table", "{tmp}/none.json", "--gpu="], "cannot read the cost table"),
    "a damaged table": (["--table", "{tmp}/damaged.json"], "is damaged"),
    "a table of another version": (["--table", "{tmp}/old.json"], "format version 0"),
    "a folder nobody can write": (["--output-dir", "/proc/none"], "cannot write to /proc"),
    "a file nobody can write": (["--json", "/proc/none/plan.json"], "cannot write to /proc"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, configs):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "damaged.json").write_text('{"format_version": 1, "table"')
    (folder / "old.json").write_text('{"format_version": 0, "table": {}}')
    shutil.copytree(configs, folder / "broken")
    (folder / "broken" / "unet" / "config.json").write_text("{")
    (folder / "data_reward_of_test.py").write_text(
        "def score(images, prompts, metadata):\n    return images.mean((1, 2, 3)) * images.mean().item(), {}\n"
    )
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(plan, configs, bad_files, tmp_path, monkeypatch, case):
    monkeypatch.syspath_prepend(bad_files)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    arguments, remedy = BAD[case]
    arguments = [argument.replace("{tmp}", str(bad_files)) for argument in arguments]
    own = [] if "--table" in arguments else ["--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT]
    if "--gpu=" in arguments:
        arguments.remove("--gpu=")
        own = [] if "--table" in arguments else ["--reward", "colorfulness"]
    code, _, err = plan(*own, *arguments)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("alignprop-fast: ") and remedy in err
    assert list(tmp_path.iterdir()) == []


def test_options_that_a_table_settles_are_refused(plan, table):
    code, _, err = plan("--table", table, "--batch-size", 4)
    assert code == 2 and "--batch-size is determined by --table" in err and len(err.splitlines()) == 1


def test_without_a_gpu_one_must_be_named(plan, configs, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = plan("--model", configs)
    assert code == 2 and "name one by --gpu" in err and "A100 80GB" in err


def test_an_estimate_gives_back_what_it_switched_off(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="bad input"), counting._estimating():
        assert not gc.isenabled() and torch.get_num_threads() == 1
        raise ValueError("bad input")
    assert gc.isenabled() and torch.get_num_threads() == threads and "TORCHDYNAMO_DISABLE" not in os.environ


def test_a_model_and_a_reward_are_counted_once(plan, table, configs, monkeypatch):
    """The `table` was estimated with the same options. Another GPU needs no counting, another reward not the model."""
    arguments = ("--model", configs, *SHORT, "--output-dir", "out")
    with monkeypatch.context() as patch:
        for part in ("open_sampler", "open_rewards"):
            patch.setattr(counting, part, lambda *_: pytest.fail("counted again"))
        assert plan(*arguments, "--gpu", "4090", "--reward", "colorfulness", "--save-table", "same.json")[0] == 0
        assert load_table(Path("same.json")).step == load_table(table).step
        assert plan(*arguments, "--gpu", "3060", "--reward", "colorfulness", "--save-table", "slow.json")[0] == 0
    slow, fast = load_table(Path("slow.json")), load_table(table)
    assert slow.sampling_bytes == fast.sampling_bytes and slow.origin["device"] == "RTX 3060"
    with monkeypatch.context() as patch:
        patch.setattr(counting, "open_sampler", lambda *_: pytest.fail("the model was made again"))
        assert plan(*arguments, "--gpu", "4090", "--reward", "compressibility", "--save-table", "other.json")[0] == 0
        other = load_table(Path("other.json"))
        assert other.step == fast.step and other.rewards != fast.rewards
        with pytest.raises(pytest.fail.Exception):
            plan(*arguments, "--gpu", "4090", "--reward", "colorfulness", "--resolution", 24)


@pytest.mark.slow("estimates the bundled model twice")
def test_under_other_options_the_decoder_is_not_counted_again(plan, table, configs, monkeypatch, tmp_path):
    """The `table` was estimated under default options, which decide what decoding one image costs."""
    arguments = ("--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT, "--lora-rank", 2)
    with monkeypatch.context() as patch:
        patch.setattr(costs, "_without_graph", lambda work: pytest.fail("a decoder was counted again"))
        assert plan(*arguments, "--save-table", "found.json", "--output-dir", "found")[0] == 0
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    assert plan(*arguments, "--save-table", "fresh.json", "--output-dir", "fresh")[0] == 0
    assert saved_costs("found.json") == saved_costs("fresh.json") != saved_costs(table)


def test_a_size_that_is_the_models_own_is_no_other_size(plan, table, configs, monkeypatch):
    size = json.loads(table.read_text())["table"]["origin"]
    arguments = ("--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT, "--output-dir", "out")
    monkeypatch.setattr(counting, "open_sampler", lambda *_: pytest.fail("the model was made again"))
    for own in (("--height", size["height"], "--width", size["width"]), ("--resolution", size["height"])):
        assert plan(*arguments, *own, "--save-table", "own.json")[0] == 0
        assert saved_costs("own.json") == saved_costs(table)
    with pytest.raises(pytest.fail.Exception):
        plan(*arguments, "--height", int(size["height"]) + 8)


def test_memory_grows_in_segments_unless_the_user_says_otherwise(plan, monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    plan("--help")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    plan("--help")
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128"


@pytest.mark.slow("estimates the bundled model twice")
def test_a_quantised_base_and_narrow_adapters_are_counted(plan, configs):
    """Packing saves fixed bytes. A product unpacks its whole weight, which adds transient bytes."""

    def fixed(*more):
        arguments = ("--model", configs, "--gpu", "4090", "--reward", "colorfulness", *SHORT)
        code, _, err = plan(*arguments, *more, "--save-table", "t.json", "--output-dir", "out")
        assert (code, err) == (0, "")
        return load_table(Path("t.json")).fixed

    plain, lean = fixed(), fixed("--base-dtype", "int8", "--adapter-dtype", "bf16")
    assert lean["weights"] < plain["weights"]
    # 4 and 2 bytes a number, and 2 more for the copy in 16 bits that the layers read.
    assert 3 * lean["adapters"] == 2 * plain["adapters"] and lean["optimizer"] == plain["optimizer"]
