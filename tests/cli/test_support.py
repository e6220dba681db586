"""Errors in one line and exit codes: of the system, of the device, of the disk while a run writes."""

import errno
import os

import pytest
import torch
import typer
from accelerate import PartialState

from alignprop_fast.cli.support import existing_as_absolute, fail, known_error, run_errors
from alignprop_fast.training.checkpoint import checkpoints, read_checkpoint

from .runs import PROMPTS

TINY = ("--num-inference-steps", 1, "--batch-size", 1, "--device", "cpu", *PROMPTS)


def test_a_message_is_one_line_whatever_is_in_it(capsys):
    fail("a  b [v2]\n   c\u2028d")
    assert capsys.readouterr().err == "alignprop-fast: a  b [v2] c d\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_the_disk_says(capsys, tmp_path, number):
    with pytest.raises(typer.Exit) as leaving, run_errors(tmp_path, "start again"):
        raise OSError(number, os.strerror(number))
    err = capsys.readouterr().err
    assert leaving.value.exit_code == 1 and len(err.splitlines()) == 1
    assert f"{tmp_path}: {os.strerror(number)}; files written before are complete: fix this, then start again" in err


def test_what_the_device_says(capsys, tmp_path):
    with pytest.raises(typer.Exit) as leaving, run_errors(tmp_path, "start again"):
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")
    err = capsys.readouterr().err
    assert leaving.value.exit_code == 1 and len(err.splitlines()) == 1
    assert "CUDA error: device-side assert triggered" in err and str(tmp_path / "alignprop-fast-error.txt") in err
    assert "Traceback" in (tmp_path / "alignprop-fast-error.txt").read_text()
    with pytest.raises(torch.OutOfMemoryError), run_errors(tmp_path, "start again"):  # it has its own remedy
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    bare = "Method 'cadam_8bit_blockwise_grad_fp32' not available in CPU-only version of bitsandbytes.\nReinstall ..."
    assert "use --base-dtype fp8 and --optimizer adamw" in known_error(RuntimeError(bare))
    with pytest.raises(typer.Exit) as leaving, run_errors(tmp_path, "start again"):
        raise typer.Exit(143)
    assert leaving.value.exit_code == 143


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(command, files_up_to, tiny_sd_folder, tmp_path):
    out = tmp_path / "out"
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness", *TINY)
    options = (*options, "--save-every", 1, "--sample-every", 1000)
    assert command("train", *options, "--steps", 1, "--output-dir", out)[0] == 0
    first = checkpoints(out / "checkpoints")[-1]
    with files_up_to(max(file.stat().st_size for file in first.iterdir()) - 1000):
        code, _, err = command("train", "--resume", "--steps", 2, "--output-dir", out)
    assert code == 1 and len(err.splitlines()) == 1 and "File too large" in err, err
    assert f"train --resume --output-dir {out}" in err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint_1"]
    assert read_checkpoint(first)["steps_done"] == 1
    assert command("train", "--resume", "--steps", 2, "--output-dir", out)[0] == 0
    assert checkpoints(out / "checkpoints")[-1].name == "checkpoint_2"


def test_a_disk_that_fills_up_while_pictures_are_written(command, files_up_to, tiny_sd_folder, tmp_path):
    options = ("--model", tiny_sd_folder, "--prompt", "a cat", "--num-inference-steps", 1, "--device", "cpu")
    with files_up_to(100):
        code, _, err = command("sample", *options, "--output-dir", tmp_path / "out")
    assert code == 1 and len(err.splitlines()) == 1 and "File too large" in err, err
    assert [path.name for path in (tmp_path / "out").iterdir()] in ([], ["alignprop-fast-error.txt"])


def test_a_path_is_made_absolute_and_a_name_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert existing_as_absolute("demo", ("demo",)) == "demo"
    assert existing_as_absolute("./demo", ("demo",)) == existing_as_absolute("demo") == str(tmp_path / "demo")
    assert existing_as_absolute("owner/name", ("demo",)) == "owner/name"


@pytest.mark.parametrize(("name", "arguments"), [("WORLD_SIZE", ()), ("RANK", ()), ("WORLD_SIZE", ("--bogus",))])
def test_a_launchers_variable_without_a_number(command, monkeypatch, tmp_path, name, arguments):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    code, _, err = command("train", "--reward", "colorfulness", "--output-dir", tmp_path / "out", *arguments)
    assert code == 2 and len(err.splitlines()) == 1 and (f"{name}=two" in err or "--bogus" in err)
    assert list(tmp_path.iterdir()) == []


def test_empty_variables_of_launchers_are_unset(command, monkeypatch, tiny_sd_folder, tmp_path):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness", *TINY)
    code, _, err = command("train", *options, "--steps", 1, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")


def test_processes_that_accelerate_does_not_see(command, monkeypatch, tmp_path):
    """As with mpirun on GPUs, where accelerate reads only LOCAL_RANK: each process would be a run in one folder."""
    PartialState(cpu=True)  # one process
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    code, _, err = command("train", "--reward", "colorfulness", "--device", "cpu", "--output-dir", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1 and "accelerate sees 1: use accelerate launch or torchrun" in err
