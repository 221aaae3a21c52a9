"""Plan and merge three numbers of rows, and extrapolate time and memory to 100 million.

    python benchmarks/many_rows.py --rows 40000 80000 160000

Each plan and merge is a process of its own, the very commands of a user. Lines are fitted by least squares; a plan
reads and tokenizes every row. Caches are empty, files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from merge import Cost, make_row, peak_of

UNIT_ROWS, GOAL = 256, 100_000_000
TEXTS = [f"방은 깨끗하고 직원분들이 친절해요 {number}" for number in range(1000)]
CLI = [sys.executable, "-m", "sousbatch"]


def write_data(path: Path, num_rows: int) -> None:
    """Write the rows to predict."""
    with path.open("w") as stream:
        for number in range(num_rows):
            row = {"id": f"r{number}", "input": TEXTS[number % 1000], "target": TEXTS[number % 1000]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_units(folder: Path, num_rows: int) -> None:
    """Write the units of as many predictions."""
    from sousbatch.predictions.rows import PredictionRow
    from sousbatch.predictions.units import open_layout, write_unit

    layout = open_layout(folder, "benchmark", num_rows, UNIT_ROWS)
    for number in range(layout.num_units):
        rows = [PredictionRow.from_json(make_row(at, TEXTS), position=at) for at in layout.rows_of(number)]
        write_unit(folder, layout, number, rows, "benchmark", 1, number % 8)


def measure(folder: Path, num_rows: int) -> dict[str, Cost]:
    """Return what a plan and a merge of *num_rows* cost."""
    environment = os.environ | {f"SOUSBATCH_{name}": str(folder / name) for name in ("RUNS", "STATE", "CACHE")}
    write_data(folder / "rows.jsonl", num_rows)
    write_units(folder / "units", num_rows)
    data = f"data.splits={{test: {folder / 'rows.jsonl'}, train: {folder / 'few.jsonl'}}}"
    write_data(folder / "few.jsonl", 100)
    plan = [*CLI, "plan", "hangul-restoration", data, "data.generator=null", "train.eval_split=null"]
    plan += [
        "checkpoints.keep_best=0",
        "consolidate.choose=last",
        "stages={train: {}, consolidate: {}, predict: {}, merge: {}}",
    ]
    merge = [*CLI, "predictions", "merge", str(folder / "units"), "--out", str(folder / "out.jsonl")]
    return {name: peak_of(command, folder, environment) for name, command in (("plan", plan), ("merge", merge))}


def main() -> None:
    """Measure all sizes and print the lines through them."""
    parser = argparse.ArgumentParser(description="Extrapolate plan and merge to 100 million rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=[40_000, 80_000, 160_000])
    sizes = parser.parse_args().rows
    found: dict[str, list[Cost]] = {"plan": [], "merge": []}
    for num_rows in sizes:
        with tempfile.TemporaryDirectory(prefix="many-") as folder:
            for name, cost in measure(Path(folder), num_rows).items():
                found[name].append(cost)
                print(f"{name:<6}{num_rows:>12,} rows{cost.wall_s:>9.2f} s{cost.peak_mib:>8.0f} MiB", flush=True)
    for name, costs in found.items():
        seconds, mib = (
            np.polyfit(sizes, values, 1) for values in zip(*((c.wall_s, c.peak_mib) for c in costs), strict=True)
        )
        print(
            f"{name:<6}{GOAL:>12,} rows{np.polyval(seconds, GOAL):>9.0f} s{np.polyval(mib, GOAL):>8.0f} MiB by the "
            f"lines; memory grows by {mib[0] * 1e6:.2f} MiB per million rows"
        )


if __name__ == "__main__":
    main()
