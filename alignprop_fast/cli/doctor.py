"""The command `doctor`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from alignprop_fast.cli.options import command_line
from alignprop_fast.cli.screen import make_console
from alignprop_fast.cli.support import check_writable, quiet_libraries, setup_errors
from alignprop_fast.training.declaration import Command, like, option
from alignprop_fast.training.options import TrainOptions
from alignprop_fast.training.trainer_options import TrainerOptions

if TYPE_CHECKING:
    import torch

    from alignprop_fast.doctor import Check, Fact, Report

DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


@dataclass
class DoctorOptions(TrainOptions):
    """Options of `doctor`."""

    json: str | None = option(
        None, "Write everything to this file, for a bug report.", commands=Command.DOCTOR, shown="none"
    )
    deterministic: bool = like(
        TrainerOptions,
        "deterministic",
        help="Use deterministic algorithms, as in train. Other bits in a second run then count as an error.",
    )


@command_line(Command.DOCTOR, DoctorOptions())
def doctor(ctx: typer.Context, options: DoctorOptions) -> None:
    """Report what is installed, how fast it is, and whether every op and kernel is correct. Run it first.

    Compares outputs and gradients of each op with the formula in float64, at a real and at an odd shape. Up to twice
    the error of plain PyTorch is accepted. What fails is listed with a remedy; training switches it off and works
    without. Takes under a minute, or longer if kernels are compiled for the first time.

    Exit code 1 if something is wrong that cannot be switched off, otherwise 0.

    **Examples**

    - `alignprop-fast doctor`
    - `alignprop-fast doctor --device cuda:1 --json doctor.json`, a file for a bug report
    - `alignprop-fast doctor --deterministic`
    """
    console = make_console()
    file = None if options.json is None else Path(options.json).expanduser()
    with setup_errors():
        if file is not None:
            check_writable(file.parent)
        quiet_libraries(console)
        from alignprop_fast.doctor import examine
        from alignprop_fast.files import write_whole

        where = _device(options.device, options.deterministic)
    with console.status("") as status:
        report = examine(where, tell=lambda what: status.update(Text(what)))
    for part in _tables(report):
        console.print(part, soft_wrap=not isinstance(part, Table))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, report.to_json().encode())
        console.print(f"full report: {file}", soft_wrap=True)
    raise typer.Exit(report.exit_code)


def _device(name: str, deterministic: bool) -> torch.device:
    """The device to examine. Unlike other commands this accepts an unusable one, because the doctor must find out why.

    Raises:
        ValueError: the text is not the name of a device.
    """
    import os

    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    import torch

    from alignprop_fast.cli.support import pick_device

    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return torch.device(name)
    return torch.device(pick_device(name))


def _tables(report: Report) -> Iterable[Table | Text | str]:
    for section in dict.fromkeys(fact.section for fact in report.facts):
        yield _facts(section, [fact for fact in report.facts if fact.section == section])
    if report.checks:
        yield _checks(report.checks)
    if report.off or report.absent:
        yield _off(report)
    for fact in report.facts:
        if fact.remedy is not None:
            yield f"{fact.name}: {fact.remedy}"
    yield _verdict(report)


def _facts(section: str, facts: Sequence[Fact]) -> Table:
    table = Table(section, "", box=SIMPLE_HEAD)
    for fact in facts:
        table.add_row(fact.name, fact.value, style="red" if fact.wrong else None)
    return table


def _checks(checks: Sequence[Check]) -> Table:
    """A table with a row for each implementation: its worst case in each dtype."""
    rows: dict[tuple[str, str], list[Check]] = defaultdict(list)
    for check in checks:
        rows[check.op, check.implementation].append(check)
    dtypes = list(dict.fromkeys(check.dtype for check in checks))
    table = Table(
        box=SIMPLE_HEAD, caption="bf16 ...: largest error / accepted error, wrong above 1; bits: the same in two runs"
    )
    for name in ("op", "by"):
        table.add_column(name, no_wrap=True)
    for name in ("cases", *(DTYPES.get(dtype, dtype) for dtype in dtypes)):
        table.add_column(name, justify="right")
    table.add_column("bits")
    table.add_column("what is wrong")
    for (op, implementation), cases in rows.items():
        errors = [_worst([case for case in cases if case.dtype == dtype]) for dtype in dtypes]
        faults = [f"{case.case}, {case.dtype}: {case.fault}" for case in cases if case.fault]
        twice = {case.deterministic for case in cases} - {None}
        table.add_row(
            *(op, implementation, str(len(cases)), *errors),
            "differ" if False in twice else "same" if twice else "",
            faults[0] if faults else "",
            style=_style(cases),
        )
    return table


def _worst(cases: Sequence[Check]) -> str:
    if any(case.fault for case in cases):
        return "wrong"
    errors = [case.error_over_bound for case in cases if case.error_over_bound is not None]
    return f"{max(errors):.2f}" if errors else "none" if cases else ""


def _style(cases: Sequence[Check]) -> str | None:
    faulty = [case for case in cases if case.fault]
    if not faulty:
        return None
    return "yellow" if all(case.off for case in faulty) else "red"


def _off(report: Report) -> Table:
    table = Table("switched off or absent", "why", "remedy", box=SIMPLE_HEAD)
    for name, reason in (report.off | report.absent).items():
        table.add_row(name, reason, report.remedies[name])
    return table


def _verdict(report: Report) -> str | Text:
    wrong = report.wrong()
    if wrong:
        return Text("\n".join(f"wrong: {line}" for line in wrong), style="red")
    off = f"; {len(report.off)} switched off, and training works without" if report.off else ""
    return f"{len(report.checks)} checks on {report.device} in {report.seconds:.0f} s: nothing that stops training{off}"
