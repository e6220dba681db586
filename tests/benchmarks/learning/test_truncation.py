"""The table and the plots of learning curves, from made-up runs."""

import csv
from pathlib import Path

import pytest

from benchmarks.learning.truncation import AXES, at, plot, summary

ROOT = Path(__file__).parents[3]


def made_up(rule, seed, speed):
    """Score 10 + speed * seconds, three marks; a query takes 1 / speed seconds."""
    for seconds in (0.0, 5.0, 10.0):
        row = {"chain": "twin-4", "rule": rule, "seed": seed, "seconds": seconds, "reward_queries": speed * seconds}
        scores = {"score": 10 + speed * seconds, "watched_score": 0.9, "diversity": 0.1, "optimizer_steps": seconds}
        yield {name: str(value) for name, value in (row | scores | {"reward": "r", "watched": "w"}).items()}


ROWS = [row for rule, speed in (("full", 1), ("last:1", 2)) for seed in (0, 1) for row in made_up(rule, seed, speed)]


def test_the_table_compares_at_equal_seconds_and_at_equal_queries():
    _, _, full, last = ([cell.strip() for cell in line.split("|")[1:-1]] for line in summary(ROWS))
    assert full[:4] == ["`full`", "2", "10", "20 (0)"] and last[3] == "30 (0)"
    assert full[6] == last[6] == "20 (0)"  # a score per query
    assert at(ROWS[:3], "seconds", 7.5, "score") == pytest.approx(17.5)


def test_plots_are_drawn(tmp_path):
    plot(ROWS, AXES[:2], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("file", "chain"), [("truncation", "demo-12"), ("truncation", "twin-4"), ("truncation_clip", "unguided-12")]
)
def test_the_page_has_the_table_of_the_results(file, chain):
    """Its lines, in any order."""
    with open(ROOT / "benchmarks" / "results" / "cpu" / f"{file}.csv", newline="", encoding="utf-8") as opened:
        table = summary([row for row in csv.DictReader(opened) if row["chain"] == chain])
    assert set(table) <= set((ROOT / "docs" / "which-rule.md").read_text(encoding="utf-8").splitlines())
