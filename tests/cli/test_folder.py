"""A run locks its folder at once, until its process ends; a failed set-up leaves the folder unchanged."""

import os
import signal
import subprocess
import sys
import time

import pytest
from accelerate.tracking import TensorBoardTracker

from alignprop_fast.cli.folder import LOCK, OutputFolder
from alignprop_fast.cli.options import make_config
from alignprop_fast.cli.parts import resolved
from alignprop_fast.training.options import TrainOptions

HOLDER = """
import sys
from alignprop_fast.cli.folder import OutputFolder
with OutputFolder(sys.argv[1]) as folder:
    try:
        folder.check_new()
    except ValueError as error:
        sys.exit(str(error))
    folder.begin()
    print("taken", flush=True)
    sys.stdin.read()
"""


def start(code, *arguments):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes)


def test_of_processes_that_race_for_a_folder_one_gets_it(tmp_path):
    processes = [start(HOLDER, tmp_path / "a" / "b") for _ in range(4)]
    # The owner holds it until its input ends; the others exit at once.
    deadline = time.monotonic() + 60
    while len(there := [process for process in processes if process.poll() is None]) > 1:
        assert time.monotonic() < deadline, "several have it"
        time.sleep(0.02)
    (winner,) = there
    assert winner.communicate("")[0] == "taken\n" and winner.returncode == 0
    for process in processes:
        if process is not winner:
            assert process.returncode == 1
            assert f"another run writes to {tmp_path / 'a' / 'b'}" in process.stderr.read()
    assert list(tmp_path.rglob(LOCK)) == []


def test_the_folder_of_a_killed_process_is_free(tmp_path):
    process = start(HOLDER, tmp_path / "a")
    assert process.stdout.readline() == "taken\n"
    with OutputFolder(tmp_path / "a") as folder, pytest.raises(ValueError) as error:
        folder.check()
    assert f"process {process.pid} on" in str(error.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "a" / LOCK).exists()
    with OutputFolder(tmp_path / "a") as folder:
        folder.check_new()
    assert list((tmp_path / "a").iterdir()) == []


def test_a_set_up_that_fails_leaves_things_as_they_were(tmp_path):
    with OutputFolder(tmp_path / "a" / "b") as folder:
        tracker = TensorBoardTracker(
            make_config(resolved(TrainOptions(), "no"), "cpu", "").tracker_project_name, folder.path
        )
        tracker.start()
        tracker.finish()
        assert len(list(folder.path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("mine")
    with OutputFolder(tmp_path / "mine") as folder, pytest.raises(ValueError, match="not empty"):
        folder.check_new()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["text"]


def test_a_set_up_that_fails_leaves_what_others_wrote(tmp_path):
    with OutputFolder(tmp_path / "a" / "b") as folder:
        (folder.path / "log.txt").write_text("theirs")
    assert [path.name for path in folder.path.iterdir()] == ["log.txt"]


def test_what_a_run_writes_stays(tmp_path):
    with OutputFolder(tmp_path / "a" / "b") as folder:
        folder.begin()
        (folder.path / "text").write_text("results")
    assert [path.name for path in folder.path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("count", "index"),
    [
        ("WORLD_SIZE", "RANK"),
        ("PMI_SIZE", "PMI_RANK"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ],
)
def test_several_processes_of_one_run_count_as_one(tmp_path, monkeypatch, count, index):
    monkeypatch.setenv(count, "2")
    monkeypatch.setenv(index, "0")
    with OutputFolder(tmp_path / "a", several=True) as main:
        monkeypatch.setenv(index, "1")
        with OutputFolder(tmp_path / "a", several=True) as other:
            main.check(), other.check()
            with OutputFolder(tmp_path / "a") as alone, pytest.raises(ValueError, match="without a launcher"):
                alone.check()
        assert (tmp_path / "a" / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--reward", "colorfulness"),
        ("train", "--resume"),
        ("demo",),
        ("sample", "--prompt", "a cat"),
        ("evaluate",),
        ("merge", "nothing:1"),
        ("plan",),
    ],
    ids=" ".join,
)
def test_every_command_refuses_a_folder_in_use(command, tmp_path, arguments):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("steps: 3\n")
    with OutputFolder(tmp_path / "out"):
        code, _, err = command(*arguments, "--output-dir", tmp_path / "out")
    assert code == 2 and len(err.splitlines()) == 1, err
    assert f"another run writes to {tmp_path / 'out'} (process {os.getpid()} on " in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yaml"]


@pytest.mark.slow("starts two processes, each of which imports everything")
def test_two_runs_started_at_once(tmp_path, tiny_sd_folder):
    """The whole command, twice, into a folder whose name looks like markup."""
    out = tmp_path / "r [v2] x [/b] :cat:"
    options = ("--model", tiny_sd_folder, "--reward", "colorfulness", "--num-inference-steps", 1, "--batch-size", 1)
    arguments = ["-m", "alignprop_fast", "train", *options, "--steps", 1, "--device", "cpu", "--output-dir", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, *map(str, arguments)], **pipes) for _ in range(2)]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in both]
    (printed, errors, code), (nothing, refusal, refused) = sorted(ends, key=lambda end: end[2])
    assert (code, errors) == (0, "") and f"{out / 'before_after.png'}\n" in printed
    assert (refused, nothing) == (2, "") and len(refusal.splitlines()) == 1
    assert f"another run writes to {out}" in refusal
    assert LOCK not in [path.name for path in out.iterdir()]


@pytest.mark.parametrize(("name", "said"), [("r\udcff", "not UTF-8"), ("x" * 300, "File name too long")])
def test_names_that_cannot_be(command, tmp_path, name, said):
    code, _, err = command("sample", "--prompt", "a cat", "--output-dir", tmp_path / name)
    assert code == 2 and len(err.splitlines()) == 1 and said in err and list(tmp_path.iterdir()) == []
