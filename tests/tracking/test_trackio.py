"""What trackio's database holds after several attempts and stages."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ATTEMPTS = """
import sys
from pathlib import Path
from sousbatch.tracking.base import Trackers, start
folder, stage, attempt, *steps = sys.argv[1:]
trackers = Trackers()
start(trackers, Path(folder), stage=stage, kind=stage, task=None, attempt=int(attempt))
for step in map(int, steps):
    trackers.log(step, {"loss": step / 10})
trackers.table("samples", ["id", "text"], [["a", "답"]])
trackers.summary({"rows": 3})
trackers.finish(0)
"""


def test_attempts_and_stages_of_a_run_are_one_run(tracked: Callable[..., Path]) -> None:
    folder = tracked(trackers=("trackio",))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    environment["HOME"] = str(folder.parent)
    for arguments in (("train", "1", "10", "20"), ("train", "2", "20", "30"), ("predict", "1", "1")):
        command = [sys.executable, "-c", ATTEMPTS, str(folder), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (database,) = (folder / "trackio").glob("our-project*.db")
    found = sqlite3.connect(database)
    names, steps, texts = zip(*found.execute("select run_name, step, metrics from metrics order by id"), strict=True)
    found.close()
    rows = list(zip(steps, map(json.loads, texts), strict=True))
    assert set(names) == {"toy 012345 0123456789ab"}
    losses = [(step, values["train/loss"]) for step, values in rows if "train/loss" in values]
    assert losses == [(10, 1.0), (20, 2.0), (20, 2.0), (30, 3.0)]
    assert {"predict/loss", "train/final/rows", "train/samples"} <= {name for _, values in rows for name in values}
