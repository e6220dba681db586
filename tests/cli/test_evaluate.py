"""`evaluate` and `merge` as a user meets them: what they write, and one line for everything they refuse."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignprop_fast.cli.merge import _split, _write
from alignprop_fast.models.lora.adapters import add_lora
from alignprop_fast.models.lora.file import WEIGHTS_NAME, read_lora
from alignprop_fast.models.lora.kohya_file import KOHYA_NAME
from alignprop_fast.models.lora.load_save import save_lora

TINY = ("--num-inference-steps", "2", "--batch-size", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def loras(tmp_path_factory, tiny_sd_folder):
    """Two adapters as train writes them, beside files that are wrong in one way each."""
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("loras")
    for name, rank in (("first", 2), ("second", 3)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in add_lora(pipe, rank, alpha=2 * rank):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        save_lora(pipe, folder / name)
    shutil.copytree(folder / "first", folder / "cut")
    content = (folder / "first" / WEIGHTS_NAME).read_bytes()
    (folder / "cut" / WEIGHTS_NAME).write_bytes(content[:-7])
    factors = {
        "unet.mid_block.to_q.lora_A.weight": torch.ones(2, 8),
        "unet.mid_block.to_q.lora_B.weight": torch.ones(8, 2),
    }
    save_file(factors, folder / "foreign.safetensors")
    save_file({key.replace("unet", "transformer"): f for key, f in factors.items()}, folder / "nameless.safetensors")
    pairs = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    guessed = {f"lora_unet_added_embedding_linear_{i}.{end}": pairs[end].clone() for i in (1, 2) for end in pairs}
    save_file(guessed, folder / "guessed.safetensors")
    shutil.copytree(folder / "first", folder / "first:2")
    wide = {
        key: torch.cat([tensor] * 2, -1 if ".lora.down." in key else 0)
        for key, tensor in load_file(folder / "first" / WEIGHTS_NAME).items()
    }
    save_file(wide, folder / "wide.safetensors")
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "heldout.txt").write_text("a fish\n")
    (folder / "empty.txt").write_text("")
    return folder


def table(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_evaluate_compares_adapters_at_several_scales(command, tiny_sd_folder, loras, tmp_path):
    common = (
        "evaluate",
        "--model",
        tiny_sd_folder,
        *TINY,
        "--prompts",
        loras / "prompts.txt",
        "--images-per-prompt",
        2,
    )
    reward = ("--reward", "colorfulness:2,compressibility")
    code, out, err = command(
        *(*common, *reward, "--heldout-prompts", loras / "heldout.txt", "--output-dir", tmp_path / "out", "--seed", 7),
        *(
            "--lora",
            loras / "first",
            "--lora",
            loras / "second" / WEIGHTS_NAME,
            "--scale",
            0,
            "--scale",
            0.5,
            "--scale",
            1,
        ),
    )
    assert (code, err) == (0, "")
    assert "gained" in out and "diversity, heldout (1)" in out and "30/30 pictures" in out
    names = {"evaluation.csv", "summary.csv", "grid.png", "grid_heldout.png", "reward_by_scale.png", "settings.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["seed"], settings["scale"], settings["reward"]) == (
        7,
        [0, 0.5, 1],
        "colorfulness:2,compressibility",
    )
    assert settings["versions"]["torch"] == torch.__version__
    rows = table(tmp_path / "out" / "evaluation.csv")
    variants = [("base", "0.0")] + [
        (name, scale) for name in ("first", "pytorch_lora_weights") for scale in ("0.5", "1.0")
    ]
    assert list(dict.fromkeys((row["adapter"], row["scale"]) for row in rows)) == variants
    assert len(rows) == 5 * (4 + 2) * 3
    # Each picture of a prompt has a seed of its own, and both sets count from --seed.
    base = [row for row in rows if row["adapter"] == "base" and row["part"] == "reward"]
    assert [(row["prompt"], row["seed"]) for row in base] == [
        *(("a cat", "7"), ("a cat", "8"), ("a dog", "9"), ("a dog", "10"), ("a fish", "7"), ("a fish", "8"))
    ]
    values = {(r["adapter"], r["scale"], r["prompt"], r["seed"], r["part"]): float(r["value"]) for r in rows}
    for (*where, part), value in values.items():
        if part == "reward":
            parts = [values[*where, name] for name in ("colorfulness", "compressibility")]
            assert value == pytest.approx(2 * parts[0] + parts[1], rel=1e-5)
    # Scales are told apart, and a second run with other batches says the same.
    by_variant = [[values[*variant, "a cat", "7", part] for part in ("reward",)] for variant in variants]
    assert len({f"{value:.4f}" for (value,) in by_variant}) == 5
    code, _, err = command(*(*common, *reward, "--output-dir", tmp_path / "again", "--seed", 7, "--batch-size", 1))
    assert (code, err) == (0, "")
    again = [row for row in table(tmp_path / "again" / "evaluation.csv") if row["part"] == "reward"]
    assert [float(row["value"]) for row in again] == pytest.approx([float(row["value"]) for row in base[:4]], rel=1e-3)
    assert not (tmp_path / "again" / "reward_by_scale.png").exists()


def test_evaluate_on_the_bundled_model(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--num-inference-steps", 4, "--device", "cpu")
    code, out, err = command("evaluate", *arguments, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "") and "no diversity" in out
    (row,) = table(tmp_path / "out" / "summary.csv")
    assert (row["part"], row["count"], row["adapter"]) == ("reward", "2", "base")
    assert 0.2 < float(row["mean"]) <= 1, "the bundled CLIP knows what the bundled model draws"
    # `sample` draws the very pictures that were scored.
    code, _, _ = command("sample", *arguments, "--output-dir", tmp_path / "samples")
    assert code == 0 and (tmp_path / "samples" / "001_a-cat_seed1.png").is_file()


def test_merge_writes_a_file_that_diffusers_loads(command, tiny_sd, loras, tmp_path):
    out = tmp_path / "out"
    code, printed, err = command("merge", f"{loras / 'first'}:0.5", f"{loras / 'second'}:-0.25", "--output-dir", out)
    assert (code, err) == (0, "") and "of rank 5" in printed
    first, second, both = (read_lora(path) for path in (loras / "first", loras / "second", out))
    for module, factors in both.items():
        expected = 0.5 * first[module].delta() - 0.25 * second[module].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=1e-5, atol=1e-5)
    tiny_sd.load_lora_weights(out)
    record = json.loads((out / "merge.json").read_text())
    assert [adapter["weight"] for adapter in record["adapters"]] == [0.5, -0.25]
    assert record["relative_error"] == 0 and set(record["modules"]) == set(both)
    # One alone, and to a lower rank with its error.
    assert command("merge", f"{out}:0.7", "--output-dir", tmp_path / "scaled")[0] == 0
    module = next(iter(both))
    torch.testing.assert_close(read_lora(tmp_path / "scaled")[module].delta(), 0.7 * both[module].delta())
    code, printed, _ = command("merge", out, "--rank", 2, "--output-dir", tmp_path / "low")
    record = json.loads((tmp_path / "low" / "merge.json").read_text())
    error = (read_lora(tmp_path / "low")[module].delta() - both[module].delta()).norm() / both[module].delta().norm()
    assert record["modules"][module] == {"rank": 2, "relative_error": pytest.approx(float(error), rel=1e-4)}
    assert f"{record['relative_error']:.2%} overall" in printed and 0.1 < record["relative_error"] < 1


def test_merge_reads_and_writes_kohya_files(command, tiny_sd_folder, loras, tmp_path):
    """Inputs in either naming, the same mixture in both outputs, and pictures of each."""
    assert command("merge", loras / "first", "--output-dir", tmp_path / "one")[0] == 0
    kohya = tmp_path / "one" / KOHYA_NAME
    code, printed, err = command("merge", f"{kohya}:0.5", f"{loras / 'second'}:0.5", "--output-dir", tmp_path / "k")
    assert (code, err) == (0, "") and KOHYA_NAME in printed
    assert command("merge", f"{loras / 'first'}:0.5", f"{loras / 'second'}:0.5", "--output-dir", tmp_path / "d")[0] == 0
    mixed = [read_lora(tmp_path / out / name) for out in "kd" for name in (KOHYA_NAME, WEIGHTS_NAME)]
    for other in mixed[1:]:
        assert other.keys() == mixed[0].keys()
        for module, factors in mixed[0].items():
            torch.testing.assert_close(other[module].delta(), factors.delta(), rtol=1e-6, atol=1e-6)
    arguments = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--reward", "colorfulness")
    values = []
    for name in (KOHYA_NAME, WEIGHTS_NAME):
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        assert command("evaluate", *arguments, "--lora", tmp_path / "k" / name, "--output-dir", tmp_path / "e")[0] == 0
        values.append([float(row["value"]) for row in table(tmp_path / "e" / "evaluation.csv")])
    assert values[0] == pytest.approx(values[1], abs=1e-4) and len(set(values[0])) == len(values[0])
    code, _, err = command(
        *("sample", "--model", tiny_sd_folder, "--lora", kohya, "--prompt", "a cat", "--num-inference-steps", 2),
        *("--output-dir", tmp_path / "s"),
    )
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("made", "given", "expected"),
    [
        (("run_12:30",), "run_12:30", ("run_12:30", 1)),
        (("run_12:30",), "run_12:30:0.5", ("run_12:30", 0.5)),
        (("run_12",), "run_12:30", ("run_12", 30)),
        (("run_12",), "run_12:-1e-1", ("run_12", -0.1)),
        (("run_12", "run_12:30"), "run_12:30:1", ("run_12:30", 1)),
        (("run_12", "run_12:30"), "run_12:30.000000", ("run_12", 30)),
        (("run:",), "run:", ("run:", 1)),
        (("run", "run:final"), "run:final", ("run:final", 1)),
        ((), r"C:\runs\one", (r"C:\runs\one", 1)),
        ((), r"C:\runs\one:0.5", (r"C:\runs\one", 0.5)),
    ],
)
def test_the_path_that_is_there_wins_over_a_weight(tmp_path, monkeypatch, made, given, expected):
    monkeypatch.chdir(tmp_path)
    for name in made:
        (tmp_path / name).mkdir()
    assert _split(given) == expected


def test_merge_writes_all_files_or_none(tmp_path):
    (tmp_path / ".second.tmp").mkdir()  # stands for a disk that is full by then
    with pytest.raises(OSError):
        _write(tmp_path, {"first": b"1", "second": b"2"})
    assert [path.name for path in tmp_path.iterdir()] == [".second.tmp"]


@pytest.mark.parametrize("taken", ["first", "second"])
def test_merge_leaves_no_temporary_files_where_a_name_is_taken(tmp_path, taken):
    (tmp_path / taken).mkdir()
    with pytest.raises(OSError):
        _write(tmp_path, {"first": b"1", "second": b"2"})
    assert not list(tmp_path.glob(".*"))


def test_the_path_begins_at_one_adapter_and_ends_at_the_other(command, tiny_sd_folder, loras, tmp_path):
    common = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--reward", "colorfulness")
    code, out, err = command(
        *(
            "merge",
            f"{loras / 'first'}:0.3",
            loras / "second",
            "--path-steps",
            3,
            *common,
            "--output-dir",
            tmp_path / "p",
        )
    )
    assert (code, err) == (0, "") and "6/6 pictures" in out
    assert {path.name for path in (tmp_path / "p").iterdir()} == {
        *(WEIGHTS_NAME, KOHYA_NAME, "merge.json", "path.png", "path.csv")
    }
    rows = table(tmp_path / "p" / "path.csv")
    assert [(row["t"], row["prompt"], row["seed"]) for row in rows][::2] == [
        (t, "a cat", "0") for t in ("0.0", "0.5", "1.0")
    ]
    assert command("merge", f"{loras / 'first'}:0.5", f"{loras / 'second'}:0.5", "--output-dir", tmp_path / "m")[0] == 0
    for rewards, adapter in ((rows[:2], loras / "first"), (rows[2:4], tmp_path / "m"), (rows[4:], loras / "second")):
        shutil.rmtree(tmp_path / "e", ignore_errors=True)
        assert command("evaluate", *common, "--lora", adapter, "--output-dir", tmp_path / "e")[0] == 0
        values = [float(row["value"]) for row in table(tmp_path / "e" / "evaluation.csv") if row["adapter"] != "base"]
        assert [float(row["reward"]) for row in rewards] == pytest.approx(values, rel=1e-3)


BAD = {
    "no adapter": (["evaluate", "--lora", "{loras}/none"], "give a LoRA file"),
    "damaged adapter": (["evaluate", "--lora", "{loras}/cut"], "damaged"),
    "foreign adapter": (["evaluate", "--lora", "{loras}/foreign.safetensors"], "do not fit this model"),
    "adapter twice": (["evaluate", "--lora", "{loras}/first", "--lora", "{loras}/first/"], "same adapters twice"),
    "scale of nothing": (["evaluate", "--scale", "0.5"], "give some with --lora"),
    "scale of no size": (["evaluate", "--lora", "{loras}/first", "--scale", "nan"], "--scale must be a number"),
    "no pictures": (["evaluate", "--images-per-prompt", "0"], "--images-per-prompt"),
    "empty prompts": (["evaluate", "--heldout-prompts", "{loras}/empty.txt"], "holds no prompts"),
    "unknown reward": (["evaluate", "--reward", "colourfulness"], "did you mean"),
    "diversity of one": (["evaluate", "--diversity-model", "{loras}"], "add --images-per-prompt"),
    "no diversity model": (["evaluate", "--diversity-model", "{loras}", "--images-per-prompt", "2"], "no CLIP model"),
    "odd size": (["evaluate", "--height", "13"], "multiple of 8"),
    "no model": (["evaluate", "--model", "{loras}/none"], "no model folder"),
    "used folder": (["evaluate", "--output-dir", "{loras}"], "not empty"),
    "nothing to merge": (["merge"], "ADAPTER:WEIGHT"),
    "merge of no adapter": (["merge", "{loras}/none:0.5"], "give a LoRA file"),
    "merge of a damaged one": (["merge", "{loras}/first:0.5", "{loras}/cut:0.5"], "damaged"),
    "nothing in common": (["merge", "{loras}/first", "{loras}/foreign.safetensors"], "no module in common"),
    "names of no layer": (
        ["merge", "{loras}/guessed.safetensors"],
        "lora_unet_added_embedding_linear_1, lora_unet_added_embedding_linear_2, no name of kohya's",
    ),
    "names that kohya's files lack": (["merge", "{loras}/nameless.safetensors"], "has no name in kohya's files"),
    "names that kohya's files would lose": (["merge", "{loras}/foreign.safetensors"], "has no name in kohya's files"),
    "two meanings": (["merge", "{loras}/first:2"], "first:2:1 for the first"),
    "no weight": (["merge", "{loras}/first:"], "'' in '"),
    "another word than a weight": (["merge", "{loras}/first:half"], "is not a weight"),
    "other shapes": (["merge", "{loras}/first", "{loras}/wide.safetensors"], "merge adapters of the same model"),
    "weight zero": (["merge", "{loras}/first:0"], "every weight is 0"),
    "weight of no size": (["merge", "{loras}/first:inf"], "not all finite"),
    "rank zero": (["merge", "{loras}/first", "--rank", "0"], "--rank"),
    "path of one": (["merge", "{loras}/first", "--path-steps", "3"], "give two"),
    "path of one step": (["merge", "{loras}/first", "{loras}/second", "--path-steps", "1"], "--path-steps"),
    "reward of no path": (["merge", "{loras}/first", "--reward", "clip"], "add --path-steps"),
    "path on no prompts": (
        ["merge", "{loras}/first", "{loras}/second", "--path-steps", "2", "--prompts", "none"],
        "no prompts file",
    ),
    "merge into a used folder": (["merge", "{loras}/first", "--output-dir", "{loras}"], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, loras, tiny_sd_folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, remedy = BAD[case]
    command_name, *rest = (argument.replace("{loras}", str(loras)) for argument in arguments)
    before = {path: path.read_bytes() for path in loras.rglob("*") if path.is_file()}
    common = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--output-dir", tmp_path / "out")
    reward = ("--reward", "colorfulness") if command_name == "evaluate" else ()
    code, _, err = command(command_name, *common, *reward, *rest)
    assert code == 2 and len(err.splitlines()) == 1, err
    assert err.startswith("alignprop-fast: ") and remedy in err
    assert {path: path.read_bytes() for path in loras.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []
