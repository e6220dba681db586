"""The bench of training steps: the order of its rows, what it writes, and that all variants train the same chain."""

import csv
import sys
from functools import partial

import pytest
import torch

from benchmarks.step import train_step, train_step_rows, train_step_table, train_step_variants

GIB = 2**30


@pytest.fixture
def small():
    torch.manual_seed(0)
    return train_step_variants.Bench("small", torch.device("cpu"), 3, "mean")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, arguments)])
    train_step.main()


def test_every_row_of_the_table_stands_once_and_the_promises_come_first():
    found = train_step_rows.settings(["sdxl", "sd15"])
    ours = [(s.model, s.batch, s.grad_steps, size) for s in found for size in s.budgets_gib]
    assert len(ours) == len(set(ours)) == 2 * 4 * 4 * 5
    rivals = [(s.model, s.batch, s.grad_steps, name) for s in found for name in s.rivals]
    assert len(rivals) == len(set(rivals)) and sum(name == "eager" for *_, name in rivals) == 2 * 4 * 4
    assert sum(s.trl for s in found) == 4 * 4 and all(s.model == "sd15" for s in found if s.trl)
    assert (found[0].model, found[0].batch, found[0].budgets_gib[0]) == ("sdxl", 1, 24)
    assert [s.model for s in found[:4]] == ["sdxl", "sdxl", "sd15", "sd15"]


@pytest.mark.slow("trains under several plans, ours and eager")
def test_a_dry_run_measures_ours_and_eager_and_says_what_does_not_fit(monkeypatch, tmp_path, capsys):
    file = tmp_path / "train_step.csv"
    run(
        monkeypatch,
        "--model",
        "small",
        "--device",
        "cpu",
        "--repeats",
        2,
        "--variants",
        "eager",
        "--output",
        file,
    )
    table = list(csv.DictReader(file.open()))
    fits = [row for row in table if row["status"] == "ok"]
    assert {(row["variant"], row["batch"]) for row in fits} == {("ours", "2"), ("eager", "2")}
    for row in fits:
        assert int(row["repeats"]) == 2 and float(row["samples_per_second"]) > 0 and float(row["gemm_share"]) > 0
    for row in (row for row in fits if row["variant"] == "ours"):
        assert 0.9 < int(row["peak_bytes"]) / int(row["predicted_peak_bytes"]) <= 1 and "resident" in row["plan"]
    lean = [row for row in table if row["status"] == "does not fit"]
    assert len(lean) == 1 and all(int(row["least_bytes"]) > 0.001 * GIB and not row["seconds"] for row in lean)
    printed = capsys.readouterr().out
    assert "| batch | K | 0.001 GiB | 1 GiB | eager |" in printed and "needs 0.0 GiB" in printed
    assert file.with_suffix(".png").stat().st_size > 0


def test_out_of_time_begins_nothing(monkeypatch, tmp_path, capsys):
    file = tmp_path / "train_step.csv"
    file.write_text("")
    with pytest.raises(SystemExit, match="no row"):
        run(monkeypatch, "--model", "small", "--device", "cpu", "--seconds", 0, "--output", file)
    assert "out of time before" in capsys.readouterr().out


def test_all_variants_give_the_same_gradients(small, monkeypatch):
    """The rivals are the chain that ours is: otherwise their times say nothing."""
    grads = []
    monkeypatch.setattr(small.optimizer, "step", lambda: grads.append([p.grad.clone() for p in small.trained]))
    small.conditioning(2)  # drawn at its first use
    # Adapters begin as no change at all, and the gradient of half of them as zero.
    for parameter in small.trained:
        torch.nn.init.normal_(parameter, std=0.1)
    ways = train_step_variants.EAGER_WAYS
    ours, rivals = partial(small.ours, 2, 2, GIB), [partial(small.eager, 2, 2, way) for way in ways]
    for step in (ours, *rivals, ours):
        torch.manual_seed(1)
        step()
    for way, found in zip((*ways, "ours again"), grads[1:], strict=True):
        for mine, other in zip(grads[0], found, strict=True):
            assert mine.abs().max() > 0 and (mine - other).abs().max() <= 1e-3 * mine.abs().max(), way


def test_flop_of_a_step_counts_what_carries_gradient(small):
    flop = small.flop()
    assert 2 * flop["forward"] < flop["both"] < 3.2 * flop["forward"]
    assert train_step_variants.step_flop(flop, 2, 3, 1) == 2 * (
        2 * flop["forward"] + flop["both"] + flop["decoder"] + flop["reward"]
    )


def test_a_reward_with_weights_on_a_device_passes_a_gradient_on():
    from alignprop_fast.demo import clip_path
    from alignprop_fast.rewards.architectures import architecture_reward

    reward = architecture_reward("clip", torch.float32, [clip_path()], device="cpu")
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    scores, _ = reward(images, ["a", "b"], [{}, {}])
    assert scores.shape == (2,) and torch.autograd.grad(scores.sum(), images)[0].abs().max() > 0


def test_cells_of_the_table():
    row = dict.fromkeys(train_step_rows.COLUMNS, "")
    row |= {"model": "sdxl", "batch": "1", "grad_steps": "25", "steps": "50", "reward": "hpsv2", "device": "A GPU"}
    ours = row | {"variant": "ours", "status": "ok", "seconds": "3.5", "peak_bytes": str(20 * GIB), "budget_gib": "24"}
    table = train_step_table.markdown(
        [
            row | {"variant": "eager", "status": "out of memory"},
            ours,
            ours | {"budget_gib": "12", "status": "does not fit", "least_bytes": str(13 * GIB)},
            ours | {"budget_gib": "80", "seconds": "", "predicted_seconds": "3", "status": "more than the GPU has"},
        ]
    )
    assert "| batch | K | 12 GiB | 24 GiB | 80 GiB | eager |" in table
    assert table.endswith("| 1 | 25 | needs 13.0 GiB | 3.5 (20.0) | *3 (20.0)* | out of memory |")
