"""Real workers, really killed with signal 9 at the worst moments, in ever other numbers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sousbatch.predictions.merge import merge_units
from sousbatch.predictions.units import committed_units, open_layout, unit_path

NUM_ROWS, UNIT_ROWS = 2_000, 32
NUM_KILLS = 15

WORKER = """
import os, signal, sys
from pathlib import Path
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import committed_units, open_layout, units_of_task, write_unit

folder, key, num_rows, unit_rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
task, num_tasks, attempt = map(int, sys.argv[5:8])
deadly_call, num_calls_left, is_before = sys.argv[8], int(sys.argv[9]), sys.argv[10] == "before"
layout = open_layout(folder, key, num_rows, unit_rows)

def deadly(call: str) -> None:
    def counted(*args: object) -> None:
        global num_calls_left
        num_calls_left -= 1
        if num_calls_left == 0 and is_before:
            os.kill(os.getpid(), signal.SIGKILL)
        call(*args)
        if num_calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return counted

if deadly_call != "none":
    setattr(os, deadly_call, deadly(getattr(os, deadly_call)))
done = committed_units(folder, layout, key)
for number in units_of_task(layout, task, num_tasks):
    if number not in done:
        rows = [PredictionRow(index=i, prediction=f"줄\\u2028 {i}\\n") for i in layout.rows_of(number)]
        write_unit(folder, layout, number, rows, key, attempt, task)
"""


def run_round(
    folder: Path, key: str, attempt: int, deaths: list[tuple[str, int, str]], unit_rows: int = UNIT_ROWS
) -> list[int]:
    """Run one task for each of *deaths* at the same time; return their exit codes."""
    workers = []
    for task, death in enumerate(deaths):
        numbers = [NUM_ROWS, unit_rows, task, len(deaths), attempt]
        args = [sys.executable, "-c", WORKER, folder, key, *numbers, *death]
        workers.append(subprocess.Popen([str(arg) for arg in args]))
    return [worker.wait() for worker in workers]


def assert_every_row_once(path: Path) -> None:
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert rows == [{"index": i, "prediction": f"줄\u2028 {i}\n"} for i in range(NUM_ROWS)]


def test_killed_workers_in_changing_numbers_leave_every_row_exactly_once(tmp_path: Path, key: str) -> None:
    folder, chance = tmp_path / key, random.Random(7)
    seen: dict[int, int] = {}
    for attempt in range(1, 6):
        deaths = [
            (chance.choice(["fsync", "replace"]), chance.randint(2, 9), chance.choice(["before", "after"]))
            for _ in range(chance.randint(1, 4))
        ]
        assert run_round(folder, key, attempt, deaths, unit_rows=UNIT_ROWS * attempt) == [-9] * len(deaths)
        layout = open_layout(folder, key, NUM_ROWS, 1)
        times = {n: unit_path(folder, n).stat().st_mtime_ns for n in committed_units(folder, layout, key)}
        assert times.items() >= seen.items(), "a committed unit was rewritten"
        seen = times
    assert 0 < len(seen) < layout.num_units
    assert run_round(folder, key, 6, [("none", 0, "")] * 3) == [0, 0, 0]
    report = merge_units(folder, tmp_path / "predictions.jsonl")
    assert (report.num_written, report.missing) == (NUM_ROWS, ())
    assert len({source["attempt"] for source in report.sources}) > 2
    assert_every_row_once(tmp_path / "predictions.jsonl")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_worker_killed_at_a_commit_leaves_a_complete_unit_or_none(
    tmp_path: Path, key: str, call: str, moment: str
) -> None:
    folder = tmp_path / key
    open_layout(folder, key, NUM_ROWS, 1_000)
    assert run_round(folder, key, 1, [(call, 1, moment)]) == [-9]
    is_committed = (call, moment) == ("replace", "after")
    layout = open_layout(folder, key, NUM_ROWS, 1_000)
    assert list(committed_units(folder, layout, key)) == [0] * is_committed
    assert run_round(folder, key, 2, [("none", 0, "")]) == [0]
    merge_units(folder, tmp_path / "predictions.jsonl")
    assert_every_row_once(tmp_path / "predictions.jsonl")


SLOW = WORKER.replace("rows = [", "import time; time.sleep(0.03); rows = [")


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_ranks_killed_at_15_random_moments_in_changing_numbers_write_every_row_once(
    tmp_path: Path, key: str, seed: int
) -> None:
    """As the campaign above, but at moments of the clock instead of at system calls; answers take time."""
    folder, chance, killed, attempt = tmp_path / key, random.Random(seed), 0, 0
    layout = open_layout(folder, key, NUM_ROWS, 4)
    while killed < NUM_KILLS:
        attempt += 1
        num_tasks = chance.randint(1, 8)
        numbers = [[NUM_ROWS, 4, task, num_tasks, attempt] for task in range(num_tasks)]
        workers = [
            subprocess.Popen([sys.executable, "-c", SLOW, *map(str, [folder, key, *given, "none", 0, ""])])
            for given in numbers
        ]
        begun, wanted = len(committed_units(folder, layout, key)), chance.randint(2, 25)
        while len(committed_units(folder, layout, key)) < begun + wanted and any(one.poll() is None for one in workers):
            time.sleep(chance.random() / 50)
        for worker in workers[: NUM_KILLS - killed]:
            worker.kill()
        killed += sum(worker.wait() == -9 for worker in workers[: NUM_KILLS - killed])
        for worker in workers:
            worker.kill()
            worker.wait()
    assert 0 < len(committed_units(folder, layout, key)) < layout.num_units, "the kills came while it worked"
    assert run_round(folder, key, attempt + 1, [("none", 0, "")] * 5, unit_rows=4) == [0] * 5
    report = merge_units(folder, tmp_path / "predictions.jsonl")
    assert (report.num_written, report.missing) == (NUM_ROWS, ())
    assert_every_row_once(tmp_path / "predictions.jsonl")
