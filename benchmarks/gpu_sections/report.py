"""Prints the facts as a table and writes README's figures. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_sections.facts import Fact

BEGIN = "<!-- figures of a GPU: written by benchmarks/gpu.py --report -->"
END = "<!-- end of the figures of a GPU -->"
NONE = """No figure from a GPU yet. `python benchmarks/gpu.py` takes them all in one call: speed beside eager diffusers
and torch.compile, peak against plan, overlap of offloading, what CUDA graphs and `compiled` save, the real
kernels' rounding in bf16."""
GIB = 2**30
ABOUT = ("section", "fact", "gpu", "torch", "triton", "cuda", "cudnn", "commit", "dry", "at")


def table(facts: Sequence[Fact]) -> str:
    """How each section ended, then one line per fact; of the doctor's checks only those that found something."""
    lines = []
    for fact in sorted(facts, key=lambda fact: fact["fact"] != "section"):
        if fact["fact"] == "examines" or (fact["fact"] == "check" and not (fact["fault"] or fact["note"])):
            continue
        values = ", ".join(f"{name} {_short(name, value)}" for name, value in fact.items() if name not in ABOUT)
        lines.append(f"{fact['section']:9} {fact['fact']:16} {values}"[:240])
    return "\n".join(lines)


def _short(name: str, value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if name.endswith("_bytes"):
            return f"{value / GIB:.2f} GiB"
        return f"{value:.4g}"
    return str(value)


def figures(facts: Sequence[Fact]) -> str:
    """README's block, from the latest measurements; facts of dry runs do not count."""
    real = [fact for fact in facts if not fact.get("dry")]
    rows: dict[str, str] = {}
    for fact in real:
        batch = f"batch {fact.get('batch')}"
        if fact["fact"] == "ratio" and "slower" in fact:
            where = "" if fact["section"] != "eager" else f", {_card(fact.get('cap_bytes'))}"
            name = f"{fact['section']}, {batch}{where}: {fact['faster']} beside {fact['slower']}"
            rows[name] = f"{fact['ratio']:.2f} times as fast ({fact['least']:.2f} to {fact['most']:.2f})"
        elif fact["fact"] == "step peak" and "peak_bytes" in fact:
            share = fact["peak_bytes"] / fact["predicted_peak_bytes"]
            rows[f"peak of a training step, {batch}"] = f"{fact['peak_bytes'] / GIB:.2f} GiB, {share:.3f} of the plan's"
        elif fact["fact"] == "step":
            share = fact["seconds"] / fact["predicted_seconds"]
            steps = f"{fact['steps']} steps, {fact['grad_steps']} with gradient"
            rows[f"a training step, {batch}, {steps}"] = f"{fact['seconds']:.2f} s, {share:.2f} of the plan's"
        elif fact["fact"] == "ratio":
            rows[f"CUDA graphs, {fact['model']}, {batch}"] = f"{fact['ratio']:.2f} times as fast"
        elif fact["fact"] == "hidden":
            rows[f"copies hidden, {fact['option']}"] = f"{fact['hidden']}"
    if not rows:
        return NONE
    last = real[-1]
    head = f"SDXL at 1024 x 1024 on one {last['gpu']} (torch {last['torch']}, commit {last['commit']}), by "
    head += "`python benchmarks/gpu.py`:\n\n| what | measured |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _card(cap_bytes: int | None) -> str:
    return "all memory" if cap_bytes is None else f"{cap_bytes / GIB:.0f} GiB"


def write_readme(readme: Path, facts: Sequence[Fact]) -> None:
    """Put the figures between the two marks. Raises ValueError if the marks are missing."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no block between {BEGIN} and {END} in {readme}")
    readme.write_text(f"{before}{BEGIN}\n{figures(facts)}\n{END}{after}", encoding="utf-8")
