"""What every tracker does: the names in `base.TRACKERS` and one of a third-party package are tested alike."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.tracking.base import TRACKERS, places

from .test_base import TOY

HEAVY = ("wandb", "torch", "tensorboard", "mlflow")
# Two attempts of one task, each a process of its own; the second repeats a step. A tracker that fails is dropped
# with a warning on standard error, which no tracker may write to otherwise.
ATTEMPT = f"""
import sys
from pathlib import Path
from sousbatch.tracking.base import TRACKERS, Trackers, start
name, folder, attempt = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
TRACKERS.load(name)
assert not sys.modules.keys() & set({HEAVY}), "a heavy package is imported before start"
trackers = Trackers()
start(trackers, folder, stage="train", kind="train", task=None, attempt=attempt)
for step in (attempt, attempt + 1):
    trackers.log(step, {{"loss": 1 / step, "eval_loss": 2}})
trackers.summary({{"rows": 3}})
trackers.finish(75 if attempt == 1 else 0)
"""


@pytest.mark.parametrize("name", [*TRACKERS, "toy"])
def test_attempts_of_a_task_are_shown_as_one_run_in_the_tracking_folder(
    name: str, tracked: Callable[..., Path], third_party: Callable[..., None], tmp_path: Path
) -> None:
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    folder = tracked(trackers=(name,), tags=("a",))
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(tmp_path / "site-packages"), "HOME": str(tmp_path / "elsewhere")}
    for attempt in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPT, name, str(folder), str(attempt)],
            env=environment,
            cwd=tmp_path / "elsewhere",
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [place.tracker for place in places([folder])] == [name] * (name != "toy")
    left = [path for path in folder.rglob("*") if path.is_file() and path.name != "identity.json"]
    assert left and any(b"0123456789ab" in path.read_bytes() for path in left)
    assert [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == []
