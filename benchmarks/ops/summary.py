"""A short table of the op benches' results: ours beside its best peer.

    python -m benchmarks.ops.summary FOLDER

Only the largest batch of each shape; the CSVs have the rest.
"""

from __future__ import annotations

import argparse
import csv
from itertools import groupby
from pathlib import Path

Row = dict[str, str]
# Rows that are not peers: another function, or ours in another form.
NO_PEERS = ("ours", "triton", "bare", "liger (tanh)")


def lines(rows: list[Row]) -> list[str]:
    """One line per op, shape and direction: ours in milliseconds, fraction of the bound, best peer, ratio."""
    largest: dict[tuple[str, ...], int] = {}
    for row in rows:
        key = (row["op"], row["model"], row["sizes"])
        largest[key] = max(largest.get(key, 0), int(row["batch"]))
    kept = [row for row in rows if int(row["batch"]) == largest[row["op"], row["model"], row["sizes"]]]
    table = []
    for (op, model, sizes, batch, direction), group in groupby(
        kept, key=lambda row: (row["op"], row["model"], row["sizes"], row["batch"], row["direction"])
    ):
        table.append(f"{op:16} {model:18} b{batch} {sizes:18} {direction:8} {_verdict(list(group))}")
    return table


def _verdict(group: list[Row]) -> str:
    ours = next(row for row in group if row["implementation"] == "ours")
    if ours["status"] != "ok":
        return ours["status"]
    text = f"{float(ours['p50_ms']):8.3f} ms {float(ours['fraction']):4.0%}"
    peers = [row for row in group if row["status"] == "ok" and not row["implementation"].startswith(NO_PEERS)]
    if not peers:
        return text
    best = min(peers, key=lambda row: float(row["p50_ms"]))
    ratio = float(best["p50_ms"]) / float(ours["p50_ms"])
    return f"{text}  {best['implementation']} {float(best['p50_ms']):.3f} ms, {ratio:.2f} times"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for path in sorted(parser.parse_args().folder.glob("op_*.csv")):
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows:
            print(f"{path.stem}: {rows[0]['gpu']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}")
        print("\n".join(lines(rows)))


if __name__ == "__main__":
    main()
