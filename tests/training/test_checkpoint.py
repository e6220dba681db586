"""Checkpoints are complete or absent, even if writing them fails."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from alignprop_fast.training.checkpoint import (
    checkpoints,
    find_checkpoint,
    new_checkpoint,
    read_checkpoint,
    rng_state,
    save_tensors,
    set_rng_state,
)


def _write(root, number, keep=5, size=1000):
    with new_checkpoint(root, number, {"step": number}, keep) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(random.Random(number).randbytes(size))
        (folder / "optimizer").write_bytes(b"x" * number)

    return root / f"checkpoint_{number}"


def test_round_trip_and_limit(tmp_path):
    for number in (1, 2, 9, 10):
        _write(tmp_path, number, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_2", "checkpoint_9", "checkpoint_10"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_10", "checkpoint_2", "checkpoint_9"]
    assert read_checkpoint(find_checkpoint(tmp_path)) == {"step": 10}


def test_resuming_before_a_checkpoint_gives_up_what_came_after(tmp_path):
    for number in (1, 2, 3, 4, 2):
        _write(tmp_path, number)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint_1", "checkpoint_2"]


def test_find_takes_a_checkpoint_its_parent_or_the_output_folder(tmp_path):
    first, second = _write(tmp_path / "checkpoints", 1), _write(tmp_path / "checkpoints", 2)
    assert find_checkpoint(first) == first
    assert find_checkpoint(tmp_path / "checkpoints") == second
    assert find_checkpoint(str(tmp_path)) == second
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        find_checkpoint(tmp_path / "elsewhere")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["sub/weights", "optimizer", "checkpoint.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, lambda file: file.unlink()])
def test_damage_is_found_and_the_good_one_named(tmp_path, name, damage):
    good, bad, worse = (_write(tmp_path, number) for number in (3, 4, 5))
    damage(bad / "optimizer")
    damage(worse / name)
    with pytest.raises(ValueError) as error:
        read_checkpoint(worse)
    message = str(error.value)
    assert "\n" not in message and "checkpoint_5 is damaged" in message and f"resume from {good}" in message


def test_no_good_one_before(tmp_path):
    only = _write(tmp_path, 3)
    _cut(only / "optimizer")
    with pytest.raises(ValueError, match="start anew"):
        read_checkpoint(only)


def test_a_failed_write_leaves_the_old_ones(tmp_path):
    _write(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"), new_checkpoint(tmp_path, 2, {}, 5) as folder:
        (folder / "weights").write_bytes(b"half")
        raise OSError("disk full")
    assert find_checkpoint(tmp_path).name == "checkpoint_1"
    _write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1", "checkpoint_2"]


def test_a_full_disk_is_said_by_the_system_and_leaves_no_half(files_up_to, tmp_path):
    """A limit on the size of files, about which torch's own message would only name positions in the file."""
    _write(tmp_path, 1)
    with files_up_to(10_000), pytest.raises(OSError, match="File too large"):  # noqa: SIM117
        with new_checkpoint(tmp_path, 2, {}, 5) as folder:
            save_tensors({"moments": torch.zeros(10_000)}, folder / "optimizer.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


WRITERS = """
import itertools, os, pathlib, random, sys
from alignprop_fast.training.checkpoint import new_checkpoint

def write(root):
    for number in itertools.count(1):
        with new_checkpoint(root, number, {"step": number}, 2) as folder:
            for name in "abcd":
                (folder / name).write_bytes(random.randbytes(200_000))

for root in sys.argv[1:]:
    child = os.fork()
    if not child:
        write(root)
    print(child, flush=True)
for root in sys.argv[1:]:
    os.wait()
"""


def test_kill_while_writing_leaves_whole_checkpoints(tmp_path):
    """SIGKILL at random moments of processes that only write and prune: every folder with the name is good."""
    roots = [tmp_path / str(kill) for kill in range(3)]
    parent = subprocess.Popen([sys.executable, "-c", WRITERS, *map(str, roots)], stdout=subprocess.PIPE, text=True)
    writers = [int(parent.stdout.readline()) for root in roots]
    try:
        for root, writer in zip(roots, writers, strict=True):
            while len(checkpoints(root)) < 2:
                os.kill(writer, 0)  # raises ProcessLookupError if the writer has failed
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
            os.kill(writer, signal.SIGKILL)
    finally:
        for writer in writers:
            with suppress(ProcessLookupError):
                os.kill(writer, signal.SIGKILL)
        parent.communicate()
    for root in roots:
        assert checkpoints(root)
        for folder in checkpoints(root):
            assert read_checkpoint(folder)["step"] == int(folder.name.split("_")[1])


def test_random_states_continue_exactly(tmp_path):
    random.gauss(0, 1)  # Python and NumPy both keep the second of a pair of normal numbers
    np.random.randn()
    torch.randn(3)
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = random.random(), random.gauss(0, 1), np.random.randn(4).tolist(), torch.randn(4).tolist()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (random.random(), random.gauss(0, 1), np.random.randn(4).tolist(), torch.randn(4).tolist()) == expected


def test_state_is_plain_json(tmp_path):
    manifest = json.loads((_write(tmp_path, 1) / "checkpoint.json").read_text())
    assert manifest["step"] == 1
    assert manifest["files"]["optimizer"]["bytes"] == 1
