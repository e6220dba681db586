"""The driver of the first minutes on a GPU: a fault in one section leaves the others' figures; README's block."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_sections import report
from benchmarks.gpu_sections.facts import read

ROOT = Path(__file__).parents[2]

# Each section in turn, under its own name and kind, with work of no size and every kind of fault. No torch in it.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import benchmarks.gpu_sections as gpu_sections
from benchmarks.gpu_sections import driver, facts, faults
gpu_sections.fakes = sys.modules["benchmarks.gpu_sections.fakes"] = SimpleNamespace()
gpu_sections.fakes.make = lambda settings: SimpleNamespace(facts=settings.facts, tidy=lambda: None)
for section in gpu_sections.SECTIONS:
    def work(lab, name=section.name):
        lab.facts.write(name, "first")
        lab.facts.write(name, "second")
    setattr(gpu_sections.fakes, section.name, work)
fakes = [replace(s, target=f"fakes:{s.name}") for s in gpu_sections.SECTIONS]
driver.FAULT_SECONDS = 0.3
kinds = [kind for kind in faults.FAULTS if kind != "memory"]
for index, section in enumerate(fakes):
    file = Path(sys.argv[1]) / section.name
    chosen = {section.name: kinds[index % len(kinds)]}
    settings = driver.Settings(facts.Facts(file), grace=0.3, lab="fakes:make", faults=chosen, method="fork")
    driver.Driver(settings, 60).run(fakes)
"""


def started(arguments, folder, **variables):
    environment = {**os.environ, "HOME": str(folder), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def facts_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_fault_in_any_section_costs_no_other_its_facts(tmp_path):
    run = started(["-c", SCRIPT, str(tmp_path)], tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    names = {file.name for file in files}
    assert len(names) >= 13
    for file in files:
        found = facts_of(file)
        assert {f["section"] for f in found if f["fact"] == "second"} == names - {file.name}
        assert file.name in {f["section"] for f in found if f["fact"] == "first"}
        ends = {f["section"]: f["status"] for f in found if f["fact"] == "section"}
        assert set(ends) == names and {name for name, status in ends.items() if status != "ok"} == {file.name}


def test_readme_says_what_the_committed_facts_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition(report.BEGIN)[2].partition(report.END)[0]
    assert block.strip() == report.figures(read(ROOT / "benchmarks" / "results" / "gpu" / "facts.jsonl")).strip()


@pytest.mark.parametrize("start", [["benchmarks/gpu.py"], ["-m", "benchmarks.gpu"]], ids=["file", "module"])
@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--fail", "speed=signal"]])
def test_what_cannot_be_run_is_refused(start, arguments, tmp_path):
    run = started([*start, *arguments], tmp_path)
    assert run.returncode == 2 and "error:" in run.stderr
