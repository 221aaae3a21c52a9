"""Eight runs that train and save with the real Saver in one store, two of them killed and started again.

`sharing.py STORE [PEAKS]`, where STORE has room for PEAKS of their forecasts (8), starts those that it has room for. It
prints one JSON line: the most bytes that all runs held at once, how many looks there were, how often
something was killed, and of each run how it ended, what is committed and what is wrong with it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from saving import STEPS, Beside, Trainer, context, prepare

from sousbatch import events, ledger
from sousbatch.checkpoints import commit
from sousbatch.checkpoints.capacity import allocation
from sousbatch.errors import EXIT_NO_ROOM, NoRoomError
from sousbatch.jobs.training.collectives import Ranks
from sousbatch.jobs.training.saver import Saver
from sousbatch.launchers.reservations import hold_by_jobs, reserve
from sousbatch.run_folder import RunPaths

NUM_RUNS, PEAK_BYTES = 8, 900_000  # a full state, and weights beside it
STORE_BYTES = int(float(sys.argv[2] if len(sys.argv) > 2 else NUM_RUNS) * PEAK_BYTES)


def work(paths: RunPaths, attempt: int) -> None:
    """One attempt of one run: resume from its last full state, and save at every step."""
    job = context(paths, attempt, peak_bytes=PEAK_BYTES, store_budget_gb=STORE_BYTES / 1e9, keep_last=3)
    trainer, written = Trainer(0), job.open_ledger()
    for one in commit.committed(paths.checkpoints("train")):
        trainer.state.global_step = one.step if one.content == "full" else trainer.state.global_step
    saver = Saver(job, job.batch, Ranks(), written, Beside(), lambda step, values: None)
    while trainer.state.global_step < STEPS:
        trainer.step()
        saver.save(trainer)
    saver.close()


def start(paths: RunPaths, attempt: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work(paths, attempt)
        code = 0
    except NoRoomError:
        code = EXIT_NO_ROOM
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def submit(store: Path, number: int) -> RunPaths | None:
    """Do what a submission does to the store: a plan, a job in the ledger, and a promise for both, or nothing."""
    paths = RunPaths(root=store / "r" / f"run{number}")
    paths.root.mkdir(parents=True)
    paths.plan.write_text("{}")
    client = ledger.open_client(paths.ledger_dir)
    client.write(events.Sent(stage="train", key="k", launcher="local", job_id="k"))
    client.close()
    try:
        reserve(context(paths, 1, peak_bytes=PEAK_BYTES, store_budget_gb=STORE_BYTES / 1e9).plan, paths)
    except NoRoomError:
        return None
    hold_by_jobs(paths)
    return paths


def main(store: Path) -> None:
    prepare()
    runs = [paths for number in range(NUM_RUNS) if (paths := submit(store, number))]
    alive = {start(paths, 1): (paths, 1) for paths in runs}
    kills = {
        runs[0]: 2,
        runs[len(runs) * 5 // 8]: 2,
    }  # each is killed in the middle of a save, and so is its next attempt
    killed, ends = set[int](), dict[str, int]()
    most = num_looks = 0
    while alive:
        most, num_looks = max(most, sum(allocation.measure_usage(paths.root) for paths in runs)), num_looks + 1
        for pid, (paths, _) in alive.items():
            is_saving = any(paths.checkpoints("train").glob(".tmp-step-*"))
            if is_saving and kills.get(paths) and pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                kills[paths] -= 1
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            paths, attempt = alive.pop(pid)
            if os.WIFSIGNALED(status):
                alive[start(paths, attempt + 1)] = (paths, attempt + 1)
            else:
                ends[paths.run_id] = os.WEXITSTATUS(status)
        time.sleep(0.002)
    found = {paths.run_id: commit.committed(paths.checkpoints("train")) for paths in runs}
    committed = {name: [(one.step, one.content) for one in those] for name, those in found.items()}
    wrong = [text for those in found.values() for one in those for text in commit.verify(one)]
    facts = {"store_bytes": STORE_BYTES, "most": most, "looks": num_looks, "killed": len(killed), "ends": ends}
    print(json.dumps(facts | {"committed": committed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
