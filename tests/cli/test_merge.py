"""`merge` as a user sees it: the files it writes, and one line for all bad input."""

import json
import shutil

import pytest
import torch

from alignprop_fast.cli.merge import _split, _write
from alignprop_fast.models.lora.file import WEIGHTS_NAME, read_lora
from alignprop_fast.models.lora.kohya_file import KOHYA_NAME

from .runs import QUICK, assert_refused, table

TINY = (*QUICK, "--batch-size", "3")


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
    # A single adapter, and a lower rank with its error.
    assert command("merge", f"{out}:0.7", "--output-dir", tmp_path / "scaled")[0] == 0
    module = next(iter(both))
    torch.testing.assert_close(read_lora(tmp_path / "scaled")[module].delta(), 0.7 * both[module].delta())
    code, printed, _ = command("merge", out, "--rank", 2, "--output-dir", tmp_path / "low")
    record = json.loads((tmp_path / "low" / "merge.json").read_text())
    error = (read_lora(tmp_path / "low")[module].delta() - both[module].delta()).norm() / both[module].delta().norm()
    assert record["modules"][module] == {"rank": 2, "relative_error": pytest.approx(float(error), rel=1e-4)}
    assert f"{record['relative_error']:.2%} overall" in printed and 0.1 < record["relative_error"] < 1


def test_merge_reads_and_writes_kohya_files(command, tiny_sd_folder, loras, tmp_path):
    """Inputs under either naming, the same mixture in both outputs, and pictures of each."""
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
    (tmp_path / ".second.tmp").mkdir()  # acts like a full disk
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
    "nothing to merge": ([], "ADAPTER:WEIGHT"),
    "merge of no adapter": (["{loras}/none:0.5"], "give a LoRA file"),
    "merge of a damaged one": (["{loras}/first:0.5", "{loras}/cut:0.5"], "damaged"),
    "nothing in common": (["{loras}/first", "{loras}/foreign.safetensors"], "no module in common"),
    "names of no layer": (
        ["{loras}/guessed.safetensors"],
        "lora_unet_added_embedding_linear_1, lora_unet_added_embedding_linear_2, no name of kohya's",
    ),
    "names that kohya's files lack": (["{loras}/nameless.safetensors"], "has no name in kohya's files"),
    "names that kohya's files would lose": (["{loras}/foreign.safetensors"], "has no name in kohya's files"),
    "two meanings": (["{loras}/first:2"], "first:2:1 for the first"),
    "no weight": (["{loras}/first:"], "'' in '"),
    "another word than a weight": (["{loras}/first:half"], "is not a weight"),
    "other shapes": (["{loras}/first", "{loras}/wide.safetensors"], "merge adapters of the same model"),
    "weight zero": (["{loras}/first:0"], "every weight is 0"),
    "weight of no size": (["{loras}/first:inf"], "not all finite"),
    "rank zero": (["{loras}/first", "--rank", "0"], "--rank"),
    "path of one": (["{loras}/first", "--path-steps", "3"], "give two"),
    "path of one step": (["{loras}/first", "{loras}/second", "--path-steps", "1"], "--path-steps"),
    "reward of no path": (["{loras}/first", "--reward", "clip"], "add --path-steps"),
    "path on no prompts": (
        ["{loras}/first", "{loras}/second", "--path-steps", "2", "--prompts", "none"],
        "no prompts file",
    ),
    "merge into a used folder": (["{loras}/first", "--output-dir", "{loras}"], "not empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(command, loras, tiny_sd_folder, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, remedy = BAD[case]
    given = [argument.replace("{loras}", str(loras)) for argument in arguments]
    common = ("--model", tiny_sd_folder, *TINY, "--prompts", loras / "prompts.txt", "--output-dir", tmp_path / "out")
    assert_refused(command, loras, tmp_path, ("merge", *common, *given), remedy)
