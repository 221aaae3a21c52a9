"""How a job ends: its exit code says it, also where there is no space to write anything down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch import ledger
from sousbatch.errors import EXIT_DEVICE_MEMORY, EXIT_NO_ROOM, EXIT_STOPPED
from sousbatch.jobs.context import JobContext, run_job
from sousbatch.jobs.score import score
from sousbatch.ledger_queries import is_cancelled
from sousbatch.recipes.plan_summary import read_summary
from sousbatch.run_folder import RunPaths


@pytest.fixture
def few_inodes(mount_tmpfs: Callable[[str], Path]) -> Path:
    """A real file system of 100 inodes."""
    return mount_tmpfs("nr_inodes=100")


def test_a_score_without_an_inode_left_says_that_there_is_no_room(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path, few_inodes: Path
) -> None:
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=few_inodes / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    names = {stage.kind: stage.name for stage in read_summary(paths.plan).stages}
    ledger.open_attempt(paths.ledger_dir, names["score"], 0).close()
    paths.predictions(names["predict"]).mkdir(parents=True)
    rows = "".join(json.dumps({"index": number, "prediction": "답"}) + "\n" for number in range(5))
    (paths.predictions(names["predict"]) / "predictions.jsonl").write_text(rows)
    with pytest.raises(OSError, match="No space"):
        for number in range(100):
            (few_inodes / str(number)).touch()
    assert run_job("score", score, [str(paths.root), names["score"]]) == EXIT_NO_ROOM


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("HIP error: out of memory"), MemoryError()]
)
def test_a_device_without_memory_has_an_exit_code_of_its_own(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path, error: Exception
) -> None:
    """By it the stage process halves the micro batch."""

    def work(job: JobContext) -> int:
        raise error

    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=tmp_path / "runs/small/0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    ledger.open_attempt(paths.ledger_dir, "train", 0).close()
    expected = 1 if isinstance(error, MemoryError) else EXIT_DEVICE_MEMORY
    assert run_job("train", work, [str(paths.root), "train"]) == expected
    assert [event.exit_code for event in ledger.read(paths.ledger_dir) if event.kind == "error"] == [expected]


TOY = """
class Toy:
    def start(self, identity): self.folder = identity.folder
    def log(self, step, values): pass
    def summary(self, values): (self.folder / "summary").write_text(str(values))
    def wants_stop(self): return True
    def finish(self, exit_code): (self.folder / "ended").write_text(str(exit_code))
"""


@pytest.fixture
def tracked(
    frozen: Callable[..., RunPaths], third_party: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> RunPaths:
    """A run that a toy shows, in its first attempt at training."""
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    paths = frozen("tracking.trackers=[toy]")
    ledger.open_attempt(paths.ledger_dir, "train", 0).close()
    monkeypatch.setenv("SOUSBATCH_ATTEMPT", "1")
    return paths


def test_a_job_that_fails_is_shown_as_failed_with_its_reason(tracked: RunPaths) -> None:
    def work(job: JobContext) -> int:
        job.open_trackers()
        raise RuntimeError("the data is gone")

    assert run_job("train", work, [str(tracked.root), "train"]) == 1
    assert (tracked.tracking_dir / "summary").read_text() == "{'error': 'RuntimeError: the data is gone'}"
    assert (tracked.tracking_dir / "ended").read_text() == "1"


def test_a_person_who_stops_the_run_in_a_tracker_stops_it_for_good(tracked: RunPaths) -> None:
    def work(job: JobContext) -> int:
        assert not job.is_asked_to_stop()
        job.open_trackers()
        assert job.is_asked_to_stop() and job.is_asked_to_stop()
        return EXIT_STOPPED

    tracked.stop_dir.mkdir()
    assert run_job("train", work, [str(tracked.root), "train"]) == EXIT_STOPPED
    assert is_cancelled(ledger.read(tracked.ledger_dir), "train")
    assert (tracked.tracking_dir / "ended").read_text() == str(EXIT_STOPPED)
