"""Time merging against `cat`, polars and pandas, on data made here.

    python benchmarks/merge.py --rows 2000000 --repeat 3

Every method runs in a process of its own, in turn, on files that are in the page cache.
Memory is the peak of the resident pages of the process and its children, mapped files
included. Of our two merges the bytes are compared with what they must be.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

NUM_RANKS, UNIT_ROWS, KEY = 8, 1024, "benchmark"
WORDS = (
    *"방은 깨끗하고 직원분들이 친절해요 바다 전망이 최고 조금 시끄러웠지만 괜찮았습니다".split(),
    '"다시"',
    "오고\n싶어요",
)


def make_data(folder: Path, num_rows: int) -> None:
    """Write the same rows as units and as rank-interleaved shards.

    1 % of the rows are replayed.
    """
    from sousbatch.predictions.rows import PredictionRow
    from sousbatch.predictions.units import open_layout, write_unit

    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=23)) for _ in range(10_000)]
    layout = open_layout(folder / "units", KEY, num_rows, UNIT_ROWS)
    shards = [(folder / f"rank={rank}.jsonl").open("wb") for rank in range(NUM_RANKS)]
    digest = hashlib.sha256()
    for number in range(layout.num_units):
        rows = [make_row(index, texts) for index in layout.rows_of(number)]
        predicted = [PredictionRow.from_json(row, position=row["index"]) for row in rows]
        write_unit(folder / "units", layout, number, predicted, KEY, 1, 0)
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        digest.update(b"".join(lines))
        for rank, shard in enumerate(shards):
            shard.writelines(lines[rank::NUM_RANKS])
            if number % 100 == 0:
                shard.writelines(lines[rank::NUM_RANKS])
    for rank, shard in enumerate(shards):
        shard.close()
        deal(folder, rank, num_rows, texts)
    (folder / "sha256").write_text(digest.hexdigest())


def deal(folder: Path, rank: int, num_rows: int, texts: list[str]) -> None:
    """Write the rows of a rank as a `DistributedSampler` deals them out, and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    indices = [*range(rank, num_rows, NUM_RANKS)]
    padding = [0] * (-(-num_rows // NUM_RANKS) - len(indices))
    with (folder / f"dealt-{rank}.jsonl").open("wb") as stream:
        for index in (*indices, *padding):
            stream.write(json.dumps(make_row(index, texts), ensure_ascii=False).encode() + b"\n")
    schema = pa.schema({"index": pa.int64(), "id": pa.string(), "prediction": pa.string(), "score": pa.float64()})
    with pq.ParquetWriter(folder / f"rank={rank}.parquet", schema) as writer:
        for at in range(0, len(indices), 50_000):
            rows = [make_row(index, texts) for index in indices[at : at + 50_000]]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def make_row(index: int, texts: list[str]) -> dict[str, Any]:
    """Return a row of about 370 bytes."""
    return {
        "index": index,
        "id": f"review-{index}",
        "prediction": texts[index % len(texts)],
        "score": index / 7,
    }


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards, in the order of their ranks."""
    return [folder / f"rank={rank}.jsonl" for rank in range(NUM_RANKS)]


def run_units(folder: Path, out: Path) -> None:
    """Merge units with digests, fsync and report."""
    from sousbatch.predictions.merge import merge_units

    merge_units(folder / "units", out)


def run_shards(folder: Path, out: Path) -> None:
    """Merge the interleaved shards."""
    from sousbatch.predictions.shard_merge import merge_shards

    merge_shards(shard_paths(folder), out)


def run_dealt(folder: Path, out: Path) -> None:
    """Merge shards without duplicates whose index nobody reads, by the sampler."""
    from sousbatch.predictions.samplers import Dealing
    from sousbatch.predictions.shard_merge import merge_shards
    from sousbatch.predictions.units import read_layout

    paths = [folder / f"dealt-{rank}.jsonl" for rank in range(NUM_RANKS)]
    num_rows = read_layout(folder / "units")[1].num_rows
    merge_shards(paths, out, num_rows=num_rows, dealing=Dealing(sampler="distributed"))


def run_parquet(folder: Path, out: Path) -> None:
    """Merge interleaved Parquet shards into JSON lines."""
    from sousbatch.predictions.shard_merge import merge_shards

    merge_shards([folder / f"rank={rank}.parquet" for rank in range(NUM_RANKS)], out)


def run_polars(folder: Path, out: Path) -> None:
    """Read, drop duplicates, sort and write all rows."""
    import polars

    frame = polars.concat(polars.read_ndjson(path) for path in shard_paths(folder))
    frame.unique("index").sort("index").write_ndjson(out)


def run_pandas(folder: Path, out: Path) -> None:
    """Do the same with pandas."""
    import pandas

    frame = pandas.concat(pandas.read_json(path, lines=True) for path in shard_paths(folder))
    frame = frame.drop_duplicates("index").sort_values("index")
    frame.to_json(out, orient="records", lines=True, force_ascii=False)


METHODS: dict[str, Callable[[Path, Path], None]] = {
    "units": run_units,
    "shards": run_shards,
    "dealt": run_dealt,
    "parquet": run_parquet,
    "polars": run_polars,
    "pandas": run_pandas,
}
COPIES = {"cat": "cat units/unit-* > predictions.jsonl"}
COPIES["cat, fsync"] = COPIES["cat"] + " && sync predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one run.

    CPU time and memory are of the process and all that it started.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float


def measure(method: str, folder: Path) -> Cost:
    """Run a method in its own process."""
    from sousbatch.files import digest_file

    out = folder / "predictions.jsonl"
    for path in (out, folder / "predictions.report.json"):
        path.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--folder", str(folder), "--method", method]
    cost = peak_of(["sh", "-c", COPIES[method]] if method in COPIES else command, folder)
    if method in ("units", "shards", "dealt") and digest_file(out) != (folder / "sha256").read_text():
        raise SystemExit(f"{method} wrote other bytes than it had to")
    return cost


def peak_of(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Cost:
    """Run a command in *folder* and return what it cost."""
    start, cpu_before_s = time.perf_counter(), children_cpu_s()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    peak_kib = 0
    while process.poll() is None:
        peak_kib = max(peak_kib, sum(map(resident_kib, family(process.pid))))
        time.sleep(0.01)
    wall_s, cpu_s = time.perf_counter() - start, children_cpu_s() - cpu_before_s
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return Cost(wall_s=wall_s, cpu_s=cpu_s, peak_mib=peak_kib / 1024)


def children_cpu_s() -> float:
    """Return the CPU time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def resident_kib(pid: int) -> int:
    """Return the resident pages of a process, 0 when it has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)


def compare(folder: Path, repeat: int) -> None:
    """Run all methods in turn, *repeat* times, and print medians."""
    peers = [name for name in ("polars", "pandas") if importlib.util.find_spec(name)]
    found: dict[str, list[Cost]] = {name: [] for name in (*COPIES, "units", "shards", "dealt", "parquet", *peers)}
    for _ in range(repeat):
        for method, costs in found.items():
            costs.append(measure(method, folder))
    print(f"{'method':<12}{'wall s':>8}{'least':>8}{'most':>8}{'x cat':>8}{'CPU s':>8}{'peak MiB':>10}")
    for method, costs in found.items():
        walls_s = [cost.wall_s for cost in costs]
        times_cat = median(walls_s) / median(cost.wall_s for cost in found["cat"])
        cpu_s, peak_mib = median(cost.cpu_s for cost in costs), median(cost.peak_mib for cost in costs)
        wall = f"{median(walls_s):>8.2f}{min(walls_s):>8.2f}{max(walls_s):>8.2f}"
        print(f"{method:<12}{wall}{times_cat:>8.1f}{cpu_s:>8.2f}{peak_mib:>10.0f}")


def main() -> None:
    """Make the data, or use what the folder holds, and compare; or run one method."""
    parser = argparse.ArgumentParser(description="Time merging against cat, polars and pandas.")
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the data here, and use it again the next time")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.method:
        METHODS[args.method](args.folder, args.folder / "predictions.jsonl")
        return
    with tempfile.TemporaryDirectory(prefix="merge-") as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "sha256").exists():
            make_data(folder, args.rows)
        num_bytes = sum(path.stat().st_size for path in shard_paths(folder))
        num_units = len(list(folder.glob("units/unit-*")))
        print(f"{num_bytes / 1e6:,.0f} MB in {NUM_RANKS} shards and in {num_units:,} units")
        compare(folder, args.repeat)


if __name__ == "__main__":
    main()
