"""The comparison with DDPO: what its curves say, its files, its plot, and that a run that was cut off goes on."""

import json
import sys
from argparse import Namespace

import pytest

from benchmarks.learning import sample_efficiency
from benchmarks.learning import sample_efficiency_worker as worker


def row(method, seed, queries, reward):
    same = {"wall_seconds": 2.0 * queries, "cpu_seconds": queries / 2, "heldout_reward": reward - 0.1}
    settings = {
        "learning_rate": 1e-3,
        "inner_epochs": 1,
        "update_pictures": 4,
        "clip_range": 1e-4,
        "versions": "torch=0",
    }
    return {"method": method, "seed": seed, "queries": queries, "reward": reward, **same, **settings}


ROWS = [
    *(row("ddpo", 0, queries, reward) for queries, reward in ((0, 0.5), (100, 0.58), (200, 0.56))),
    *(row("ddpo", 1, queries, reward) for queries, reward in ((0, 0.5), (100, 0.54), (200, 0.62))),
    *(row("alignprop", 0, queries, reward) for queries, reward in ((0, 0.5), (4, 0.6), (8, 0.7))),
    *(row("alignprop", 1, queries, reward) for queries, reward in ((0, 0.5), (4, 0.55), (8, 0.65))),
    *(row("one step", 0, queries, reward) for queries, reward in ((0, 0.5), (4, 0.52), (8, 0.51))),
]


def test_queries_needed_are_those_of_the_first_crossing():
    curve = [row("m", 0, queries, reward) for queries, reward in ((0, 0.5), (4, 0.7), (8, 0.6), (12, 0.8))]
    assert sample_efficiency.needed(curve, 0.4) == 0
    assert sample_efficiency.needed(curve, 0.6) == pytest.approx(2)
    assert sample_efficiency.needed(curve, 0.75) == pytest.approx(11)
    assert sample_efficiency.needed(curve, 0.75, "cpu_seconds") == pytest.approx(5.5)
    assert sample_efficiency.needed(curve, 0.81) is None


def test_summary_compares_with_the_best_that_ddpo_reached():
    """Its best are 0.58 and 0.62: 0.60 in the mean, which AlignProp crosses at 4 and, half-way from 4 to 8, at 6."""
    lines = sample_efficiency.summary(ROWS)
    assert "ddpo: 0.5000 at the start, 0.5900 (0.5600 to 0.6200) after 200 queries, 100 s" in lines
    assert (
        "DDPO's best, mean over the seeds: 0.6000; alignprop reaches it after 5.0 (4.0 to 6.0) queries of 200: "
        "1/33 in the slowest run" in lines
    )
    assert "DDPO's best, best seed: 0.6200; one step reaches it in 0 of 1 runs" in lines


def test_the_csv_comes_back_as_it_was_written(tmp_path):
    sample_efficiency.write_csv(tmp_path / "deep" / "table.csv", ROWS)
    assert sample_efficiency.read_csv(tmp_path / "deep" / "table.csv") == ROWS


def test_plot_only(tmp_path, monkeypatch, capsys):
    """Methods may have different lengths and numbers of seeds; the shorter seed ends the mean."""
    from PIL import Image

    sample_efficiency.write_csv(tmp_path / "sample_efficiency.csv", ROWS[:-1])
    plot = tmp_path / "docs" / "plot.png"
    arguments = ["--plot-only", "--results", str(tmp_path), "--plot", str(plot), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["sample_efficiency.py", *arguments])
    sample_efficiency.main()
    with Image.open(plot) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert "alignprop reaches it after" in capsys.readouterr().out


def test_collecting_what_runs_have_so_far(tmp_path, monkeypatch, capsys):
    """Rows of the files that are there, with the settings that they belong to; nothing is run for the others."""
    runs = tmp_path / "runs"
    runs.mkdir()
    rows = [{key: value for key, value in row.items() if key != "method"} for row in ROWS[:3]]
    (runs / "alignprop_0.002_1_4_0.0001_seed1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--collect", "--results", str(tmp_path), "--plot", str(tmp_path / "plot.png"), "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", ["sample_efficiency.py", *arguments])
    sample_efficiency.main()
    found = sample_efficiency.read_csv(tmp_path / "sample_efficiency.csv")
    assert [(row["method"], row["seed"], row["queries"]) for row in found] == [
        ("alignprop", 1, queries) for queries in (0, 100, 200)
    ]
    assert all(row["learning_rate"] == 2e-3 for row in found)
    assert "alignprop: 0.5000 at the start, 0.5600" in capsys.readouterr().out


def test_trl_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample_efficiency.py"])
    with pytest.raises(SystemExit, match="2"):
        sample_efficiency.main()
    assert "give --trl-python, or --plot-only" in capsys.readouterr().err


@pytest.mark.slow("trains the bundled model")
def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    """Two evaluations in one go, or the second by a new trainer from the first's file: the same rewards."""
    monkeypatch.setattr(worker, "JUDGED", (("reward", "demo", 1),))
    monkeypatch.setattr(worker, "SAMPLING", {"num_inference_steps": 2, "guidance_scale": 3.0, "eta": 1.0})

    def rows(name, evaluate_at):
        output = tmp_path / f"{name}.jsonl"
        worker.Run(
            Namespace(
                **{"method": "last:1", "seed": 3, "learning_rate": 2e-3, "evaluate_at": evaluate_at, "reward": "clip"},
                **{"output": output, "inner_epochs": 1, "update_pictures": 4, "clip_range": 0.0},
            )
        ).train()
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert all(found[i]["cpu_seconds"] < found[i + 1]["cpu_seconds"] for i in range(len(found) - 1))
        assert [row["queries"] for row in found] == [0, *evaluate_at]
        return [row["reward"] for row in found]

    whole, first = rows("whole", [4, 8]), rows("cut", [4])
    assert rows("cut", [4, 8]) == pytest.approx(whole, rel=1e-6)
    assert first == pytest.approx(whole[:2], rel=1e-6) and abs(whole[2] - whole[1]) > 1e-4 < abs(whole[1] - whole[0])
