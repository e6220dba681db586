"""CSV files of benchmarks: whole, in a folder that is made, and no value is lost without a word."""

import csv

import pytest

from benchmarks.rows import KeptRows, write_rows


def test_rows_are_read_back(tmp_path):
    file = tmp_path / "deep" / "rows.csv"
    write_rows(file, [{"a": 1, "b": "x, y"}, {"a": 2}])
    assert list(csv.DictReader(file.open(newline=""))) == [{"a": "1", "b": "x, y"}, {"a": "2", "b": ""}]
    assert [path.name for path in file.parent.iterdir()] == ["rows.csv"]


def test_a_value_without_a_column_is_refused_and_the_old_file_stays(tmp_path):
    file = tmp_path / "rows.csv"
    write_rows(file, [{"a": 1}])
    with pytest.raises(ValueError, match="'b'"):
        write_rows(file, [{"a": 1}, {"a": 2, "b": 3}])
    assert file.read_text().split() == ["a", "1"]


def test_a_run_is_kept_under_its_keys(tmp_path):
    kept = KeptRows(tmp_path / "rows.csv", ("rule", "seed"))
    assert not kept.has("full", 0)
    kept.add([{"rule": "full", "seed": 0, "score": 0.5}, {"rule": "full", "seed": 0, "score": 0.75}])
    KeptRows(tmp_path / "rows.csv", ("rule", "seed")).add([{"rule": "full", "seed": 1, "score": 0.25}])
    assert kept.has("full", 0) and kept.has("full", 1) and not kept.has("last:1", 0)
    assert [row["score"] for row in kept.read()] == ["0.5", "0.75", "0.25"]


def test_runs_of_another_reward_are_not_mixed_in(tmp_path):
    kept = KeptRows(tmp_path / "rows.csv", ("rule",))
    kept.check(reward="clip")
    kept.add([{"rule": "full", "reward": "clip"}])
    kept.check(reward="clip")
    with pytest.raises(SystemExit, match="reward clip"):
        kept.check(reward="colorfulness")
