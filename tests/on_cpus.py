"""`make test-cpus`: the suite with the instructions of other CPUs, by one thread and by two. Arguments go to pytest.

What follows from one machine's rounding fails here. Ends with a table; the exit code is 1 if one run failed.
"""

import os
import subprocess
import sys
import time

import torch

SETTINGS = [{}, {"ATEN_CPU_CAPABILITY": "default"}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}]
if torch.backends.cpu.get_cpu_capability() == "AVX512":  # where it is AVX2, that is the machine's own
    SETTINGS.append({"ATEN_CPU_CAPABILITY": "avx2"})


def main(arguments: list[str]) -> int:
    rows, failed = [], False
    for setting in SETTINGS:
        for threads in ("1", "2"):
            start = time.monotonic()
            environment = {**os.environ, **setting, "OMP_NUM_THREADS": threads}
            code = subprocess.run([sys.executable, "-P", "-m", "pytest", *arguments], env=environment).returncode
            name = " ".join(f"{key}={value}" for key, value in setting.items()) or "the machine's own"
            result = "passed" if code == 0 else f"exit code {code}"
            rows.append(f"{name:30} {threads:>7} {result:>14} {(time.monotonic() - start) / 60:8.1f}")
            failed |= code != 0
    print("", f"{'instructions':30} {'threads':>7} {'result':>14} {'minutes':>8}", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
