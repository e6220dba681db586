"""Signals: a run stops after its current step with a checkpoint; other commands stop at once and clean up."""

import os
import signal
import subprocess
import sys
import time

import pytest

from alignprop_fast.cli.folder import LOCK
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.signals import Interrupt, stopped_by_signals
from alignprop_fast.training.checkpoint import checkpoints, read_checkpoint


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def number(request):
    """Makes this process receive the signal, even if it was started by nohup."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_asks_once(capsys, number):
    with Interrupt(make_console()) as interrupt:
        for _ in range(2):  # launchers repeat a signal that all processes have received
            os.kill(os.getpid(), number)
        assert interrupt.number == number
        interrupt._since -= 2
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        else:
            os.kill(os.getpid(), number)
    assert capsys.readouterr().out.count("stopping after this step") == 1


def test_what_a_process_was_started_to_ignore_stays_ignored():
    """As nohup does with SIGHUP, and a shell with SIGINT for background processes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals(), Interrupt(make_console()) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.number == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def start(folder, out, *more):
    options = ("--model", folder, "--reward", "colorfulness", "--num-inference-steps", 1, "--batch-size", 1, *more)
    command = [sys.executable, "-m", "alignprop_fast", "train", *options, "--device", "cpu", "--output-dir", out]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in command], preexec_fn=hear_all, **pipes)


def hear_all():
    """Even if this process was started to ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_set_up_nothing_is_left(tiny_sd_folder, tmp_path, number):
    process = start(tiny_sd_folder, tmp_path / "a" / "out")
    lock = tmp_path / "a" / "out" / LOCK
    wait_for(lambda: lock.exists() and lock.read_text(), process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err and list(tmp_path.iterdir()) == []


@pytest.mark.slow("starts a process that trains")
def test_sigterm_saves_a_checkpoint(tiny_sd_folder, tmp_path):
    process = start(tiny_sd_folder, tmp_path / "out", "--steps", 5000, "--sample-every", 5000, "--save-every", 5000)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, process)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (143, ""), err
    assert "to continue: alignprop-fast train --resume" in printed
    (last,) = checkpoints(tmp_path / "out" / "checkpoints")
    assert read_checkpoint(last)["steps_done"] == metrics.read_text().count("\n")
