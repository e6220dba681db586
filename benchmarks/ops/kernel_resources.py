"""Registers, spills, shared memory and inner loops of every kernel of Triton and csrc/, compiled without a GPU.

    python -m benchmarks.ops.kernel_resources --arch 89 [--arch 90 ...] [--only geglu csrc ...] [--json FILE]

Each module of `kernels` lists its configurations in `signatures()`. Each is compiled ahead of time, as launched at
sizes divisible by 16, and read with Triton's cuobjdump and nvdisasm. For the inner loops it counts machine
instructions (SASS), in Triton's kernels alone. The exit code is 1 if a kernel spills on sm_86, 89 or 90, needs
more than 99 KiB of shared memory on sm_86, 89 or 120, does not compile, or is launched but in no signature.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import alignprop_fast.kernels

NO_SPILLS_ON = (86, 89, 90)
SMALL_SHARED_ON = (86, 89, 120)
SHARED_LIMIT_BYTES = 99 * 1024


def modules(only: list[str]) -> list[ModuleType]:
    """The modules of alignprop_fast.kernels, or those named."""
    folder = Path(next(iter(alignprop_fast.kernels.__path__)))
    names = sorted(p.stem for p in folder.glob("*.py") if not only or p.stem in only)
    if missing := set(only) - set(names):
        raise SystemExit(f"no such module in {folder.name}: {', '.join(sorted(missing))}")
    return [importlib.import_module(f"alignprop_fast.kernels.{name}") for name in names]


def launched(module: ModuleType) -> set[str]:
    """Jitted functions of this module that can be launched: named `*_kernel`, or passed to `launch` or `Prepared`."""
    from triton.runtime.jit import JITFunction

    jitted = {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__
    }
    nodes = ast.walk(ast.parse(inspect.getsource(module)))
    launches = (n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in ("launch", "Prepared"))
    started = {name.id for call in launches for name in ast.walk(call.args[0]) if isinstance(name, ast.Name)}
    return {name for name in jitted if name.endswith("_kernel") or name in started}


def compiled(entry: dict[str, Any], arch: int) -> Any:
    """The kernel of one entry of `signatures()`, compiled for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from alignprop_fast.kernels.launch import COMPILE_OPTIONS

    kernel, constexprs = entry["kernel"], entry["constexprs"]
    types = {**entry["signature"], **dict.fromkeys(constexprs, "constexpr")}
    # In the order of the parameters, because attributes go by position.
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if signature[parameter.name].startswith(("*", "i")) and not parameter.do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"], **COMPILE_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(entry: dict[str, Any], arch: int) -> dict[str, Any]:
    """Registers per thread, spilled bytes per thread (stack or local memory), shared bytes per block, inner loops."""
    from triton import knobs

    binary = compiled(entry, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = parse_usage(report)
    return {
        "kernel": entry["kernel"].fn.__name__,
        "config": entry["config"],
        "arch": arch,
        "registers": used["REG"],
        "spills": max(used["STACK"], used["LOCAL"]),
        "shared_bytes": binary.metadata.shared + used["SHARED"],
        "loop_instructions": inner_loops(listing),
    }


def inner_loops(listing: str) -> list[int]:
    """Instructions in each loop that contains no other, in the order of a listing of nvdisasm.

    A loop is a branch backwards, with all that lies between its target and itself.
    """
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    count = 0
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            target = re.search(r"\bBRA.*\((\.L_x_\d+)\)", line)
            # Every program ends in a branch to itself, which is no loop.
            if target and labels.get(target[1], count) < count - 1:
                loops.append((labels[target[1]], count))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return [end - start for start, end in sorted(inner)]


def csrc_resources(arch: int) -> list[dict[str, Any]]:
    """A row for every CUDA kernel of csrc/, compiled by nvcc. Without nvcc, prints a line and returns no rows."""
    from triton import knobs

    from alignprop_fast.ops import extension

    nvcc = extension.find_nvcc()
    if nvcc is None:
        print("csrc/: no nvcc, not compiled")
        return []
    rows = []
    for source in sorted(extension.SOURCES.glob("*.cu")):
        with tempfile.NamedTemporaryFile(suffix=".o") as file:
            subprocess.run(extension.nvcc_command(nvcc, [str(arch)], source, file.name), check=True)
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for symbol, usage in re.findall(r"Function (\S+):\n(.*)", report):
            used = parse_usage(usage)
            rows.append(
                {
                    **dict(zip(("kernel", "config"), demangled(symbol), strict=True)),
                    **{"arch": arch, "registers": used["REG"], "spills": max(used["STACK"], used["LOCAL"])},
                    # Dynamic shared memory, set at launch, is not included.
                    "shared_bytes": used["SHARED"],
                    "loop_instructions": [],
                }
            )
    return rows


def demangled(symbol: str) -> tuple[str, str]:
    """(kernel, "dtype x vector width") of a mangled instance: ...12apply_kernelI13__nv_bfloat16Li1EE..."""
    name, arguments = re.findall(r"\d([a-z][a-z_]*_kernel)(.*)", symbol)[-1]
    dtype = next((short for long, short in (("bfloat16", "bf16"), ("half", "fp16")) if long in arguments), "fp32")
    width = re.findall(r"Li(\d+)E", arguments)
    return name, f"csrc {dtype} x{width[0]}" if width else "csrc"


def parse_usage(report: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only function in a report of cuobjdump."""
    return {name: int(re.findall(rf"\b{name}:(\d+)", report)[-1]) for name in ("REG", "STACK", "SHARED", "LOCAL")}


def broken_limits(row: dict[str, Any]) -> str:
    """The limits that this row breaks; empty if none."""
    faults = []
    if row["spills"] and row["arch"] in NO_SPILLS_ON:
        faults.append(f"spills {row['spills']} bytes")
    if row["shared_bytes"] > SHARED_LIMIT_BYTES and row["arch"] in SMALL_SHARED_ON:
        faults.append(f"shared memory above {SHARED_LIMIT_BYTES} bytes")
    return ", ".join(faults)


def print_row(row: dict[str, Any], fault: str) -> None:
    print(
        f"{row['kernel']:32} {row['config']:34} {row['arch']:4} {row['registers']:9} {row['spills']:7} "
        f"{row['shared_bytes']:8} {' '.join(map(str, row['loop_instructions'])):14} {fault}",
        flush=True,
    )


def report(archs: list[int], only: list[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per kernel, configuration and architecture, and every fault; prints as it goes."""
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    seen: set[tuple[str, str, int]] = set()
    listed: set[str] = set()
    to_list: dict[str, str] = {}
    print(
        f"{'kernel':32} {'configuration':34} {'sm':>4} {'registers':>9} {'spills':>7} {'shared':>8} {'inner loops':14}"
    )
    for module in modules(only):
        to_list |= dict.fromkeys(launched(module), module.__name__)
        for entry in module.signatures() if hasattr(module, "signatures") else []:
            name = entry["kernel"].fn.__name__
            listed.add(name)
            for arch in archs:
                key = (name, entry["config"], arch)
                # A module can include the signatures of another.
                if key in seen or (entry["arch"] is not None and arch not in entry["arch"]):
                    continue
                seen.add(key)
                try:
                    row = resources(entry, arch)
                except Exception as error:  # compilers raise many kinds
                    faults.append(f"{name} {entry['config']} sm_{arch}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                rows.append(row)
                fault = broken_limits(row)
                if fault:
                    faults.append(f"{name} {entry['config']} sm_{arch}: {fault}")
                print_row(row, fault)
    faults += [f"{name} of {to_list[name]} is in no signature" for name in sorted(set(to_list) - listed)]
    return rows, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", required=True, help="compute capability, e.g. 89")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="MODULE", help="modules of kernels/, or csrc (default: all)"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it")
    triton_modules = [name for name in options.only if name != "csrc"]
    rows, faults = report(options.arch, triton_modules) if triton_modules or not options.only else ([], [])
    for arch in options.arch if not options.only or "csrc" in options.only else []:
        for row in csrc_resources(arch):
            fault = broken_limits(row)
            faults += [f"{row['kernel']} {row['config']} sm_{arch}: {fault}"] if fault else []
            print_row(row, fault)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(rows)} compiled, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
