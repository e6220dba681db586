"""Measures on a GPU everything that only a GPU can tell, the most important first. Each fact goes to disk at once.

    python benchmarks/gpu.py                                   # seven minutes; facts into benchmarks/results/gpu
    python benchmarks/gpu.py --only ops,tests,compile          # the rest, in a second call: facts are added
    python benchmarks/gpu.py --report                          # README's figures from the facts
    python benchmarks/gpu.py --dry-run --fail speed=signal     # no GPU: toy sizes, with a fault injected

`python -m benchmarks.gpu` does the same. It runs from a checkout, installed or not, on any NVIDIA GPU with at least
24 GB. If the machine lacks libraries, put their wheels into a folder and name it with `--wheels`: they are unpacked
into a folder of their own. When a section fails, hangs or dies, the others keep their facts. The exit code is 0 if
every section said "ok".
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "benchmarks" / "results" / "gpu" / "facts.jsonl"


def parse() -> argparse.Namespace:
    from benchmarks.gpu_sections import SECTIONS
    from benchmarks.gpu_sections.faults import FAULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--total", type=float, default=420, help="seconds in all")
    add("--patience", type=float, default=1, help="times the seconds of each section, for a slower GPU")
    add("--only", help="names of sections, separated by commas")
    add("--list", action="store_true", help="list the sections and their seconds")
    add("--steps", type=int, default=20, help="denoising steps of a training step; the last half carries gradient")
    add("--wheels", type=Path, help="folder of wheels to unpack")
    add("--commit", help="the commit under test, if git cannot tell")
    add("--output", type=Path, help=f"file of facts, added to [{FACTS.relative_to(ROOT)}]")
    add("--report", type=Path, nargs="?", const=FACTS, metavar="FACTS", help="write README's figures, measure nothing")
    add("--dry-run", action="store_true", help="toy sizes, on the CPU or an emulated GPU; facts go only into --output")
    add("--fail", action="append", default=[], metavar="SECTION=FAULT", help=f"inject one of {', '.join(FAULTS)}")
    args = parser.parse_args()
    names = [section.name for section in SECTIONS]
    args.only = args.only.split(",") if args.only else names
    args.faults = dict(item.partition("=")[::2] for item in args.fail)
    if unknown := (set(args.only) | set(args.faults)) - set(names):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if (args.faults and not args.dry_run) or not set(args.faults.values()) <= set(FAULTS):
        parser.error(f"--fail needs --dry-run and SECTION=FAULT with a fault of {', '.join(FAULTS)}")
    return args


def make_site(folder: Path, wheels: Path | None) -> None:
    """Fill the folder that workers import from: the wheels' content, the package and these benchmarks.

    They do not import from the root, whose folder `kernels` looks like the package of that name.
    """
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    for name in ("alignprop_fast", "benchmarks"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Set the environment of all workers and of the processes that they start."""
    from benchmarks.gpu_sections.preload import DRY_RUN

    make_site(folder, args.wheels)
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *before])
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    # Must be set before CUDA starts. Without it fragmentation breaks the budgets.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Lets torch check for a GPU without starting CUDA, which would not survive a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if args.dry_run:
        os.environ[DRY_RUN] = "1"
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        os.environ["OMP_NUM_THREADS"] = "1"  # two threads on a busy core would wait for each other


def main() -> int:
    from benchmarks.gpu_sections import SECTIONS, report
    from benchmarks.gpu_sections.driver import Driver, Settings
    from benchmarks.gpu_sections.facts import Facts, read
    from benchmarks.provenance import commit

    args = parse()
    if args.list:
        print("\n".join(f"{s.name:10} {s.seconds:4.0f} s  {s.says}" for s in SECTIONS))
        return 0
    if args.report:
        report.write_readme(ROOT / "README.md", read(args.report))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="alignprop_fast_gpu_"))
    prepare(folder, args)
    output = args.output or (folder / "facts.jsonl" if args.dry_run else FACTS)
    known = len(read(output))
    facts = Facts(output, {"commit": args.commit or commit(), "dry": args.dry_run})
    settings = Settings(facts, faults=args.faults, steps=args.steps)
    if args.dry_run:
        settings = replace(settings, dry=True, steps=4, grace=2.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # at an outer time limit, still print the facts
    try:
        chosen = [section for section in SECTIONS if section.name in args.only]
        Driver(settings, args.total, args.patience).run(chosen)
    finally:
        found = read(output)[known:]
        print(report.table(found), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(fact["status"] == "ok" for fact in found if fact["fact"] == "section") else 1


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # finds the modules of `benchmarks` when started by file name
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    sys.stdout.flush()
    os._exit(code)  # do not wait for a worker that is stuck in the driver
