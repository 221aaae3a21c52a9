"""A disk that is never filled: budgets, full disks and stores that go away, with real trainings."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.capacity.allocation import measure_usage
from sousbatch.checkpoints.consolidation.manifest import verify_manifest

ONE_BYTES = 4_330_000  # a full checkpoint of the demo's model, as blocks on disk
WEIGHTS_BYTES = 730_000


class Sampler(threading.Thread):
    """Looks every 10 ms how much the checkpoints of a place hold."""

    def __init__(self, runs: Path) -> None:
        super().__init__(daemon=True)
        self.runs, self.most_bytes, self.num_looks, self._is_over = runs, 0, 0, threading.Event()

    def run(self) -> None:
        while not self._is_over.wait(0.01):
            held = sum(measure_usage(path) for path in self.runs.glob("*/*/checkpoints/*"))
            self.most_bytes, self.num_looks = max(self.most_bytes, held), self.num_looks + 1

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()


def kept(place):
    return [(one.step, one.content) for one in commit.committed(place.run_dir() / "checkpoints/train")]


def test_under_10_mb_a_training_ends_never_above_it_with_best_and_last_intact(place, only_train, tmp_path):
    worsen(tmp_path)
    with Sampler(tmp_path / "runs") as sampler:
        place.run(
            "submit",
            "hangul-restoration",
            *only_train,
            "train.steps=12",
            "checkpoints.budget_gb=0.01",
            f"environment.code=[{tmp_path / 'code'}]",
        )
    assert sampler.num_looks > 100
    assert 2 * ONE_BYTES * 0.98 < sampler.most_bytes <= 10_000_000
    assert kept(place) == [(4, "weights"), (12, "full")]
    assert "intact" in place.run("checkpoints", "verify", "hangul-restoration").stdout
    assert [event["step"] for event in place.events("thinned")] == [4]
    (model,) = place.events("model")
    assert model["step"] == 4
    page = Path(place.run("report", "hangul-restoration").stdout.strip()).read_text()
    assert "stripped to its weights" in page and "a budget of 10 MB" in page
    assert "http" not in page.replace("http-equiv", "")


# Measured losses but the one of step 4 are made worse, so that the best is not the last.
WORSE = """
import os
if "RANK" in os.environ:
    import transformers
    true_evaluate = transformers.Trainer.evaluate
    def evaluate(self, *args, **kwargs):
        found = true_evaluate(self, *args, **kwargs)
        if self.state.global_step != 4:
            self.state.log_history[-1]["eval_loss"] += 100
        return found
    transformers.Trainer.evaluate = evaluate
"""


def worsen(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code/sitecustomize.py").write_text(WORSE)


@pytest.mark.faults
def test_where_no_full_state_fits_a_training_ends_with_its_weights(place, only_train, tmp_path):
    """The 10.7B model on the 100 GB disk, smaller: 3 MB and a full state of 4.3 MB."""
    plan = place.run("plan", "hangul-restoration", *only_train, "checkpoints.budget_gb=0.003").stdout
    assert "weights only" in plan and "smallest change: " in plan
    with Sampler(tmp_path / "runs") as sampler:
        place.run("submit", "hangul-restoration", *only_train, "checkpoints.budget_gb=0.003")
    assert 2 * WEIGHTS_BYTES * 0.9 < sampler.most_bytes <= 3_000_000
    assert kept(place) == [(6, "weights")]
    place.run("submit", "hangul-restoration", *only_train)
    found = [verify_manifest(path) for path in place.root.glob("runs/*/*/model/consolidate")]
    assert len(found) == 2 and found[0].weights == found[1].weights


# Rank 0 does it in a step after the one that was saved: whoever watched from outside might come too late.
FILL = (
    "if is_first and rank == 0 and step == 3: others = os.open({ballast!r}, os.O_WRONLY | os.O_CREAT); "
    "room = os.fstatvfs(others); os.posix_fallocate(others, 0, room.f_bavail * room.f_frsize - {but_bytes})"
)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 24 MB where the runs go."""
    runs = tmp_path / "runs"
    runs.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(runs)]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield runs
    subprocess.run(["umount", "-l", str(runs)], check=True)


@pytest.mark.faults  # what the ranks do is tried faster in test_matrix.py; here are launcher and client too
def test_on_a_full_disk_a_training_goes_on_and_resume_ends_the_run(small_disk, place, only_train):
    fills = place.hook(FILL.format(ballast=str(small_disk / "ballast"), but_bytes=0))
    overrides = [*only_train, "train.steps=12", "checkpoints.max_skipped=null", fills]
    done = place.run("submit", "hangul-restoration", *overrides, code=1)
    assert "no space" in done.stderr  # consolidate has none
    assert place.states()["train"]["state"] == "done"
    assert kept(place) == [(2, "full"), (12, "weights")]
    assert "intact" in place.run("checkpoints", "verify", "hangul-restoration").stdout
    assert not [path for path in place.run_dir().glob("checkpoints/train/.tmp-*")]
    (small_disk / "ballast").unlink()
    place.run("resume", "hangul-restoration")
    assert place.events("model")[0]["step"] == 12


@pytest.mark.faults
def test_a_training_stops_with_its_weights_when_too_many_saves_found_no_room(small_disk, place, only_train):
    fills = place.hook(FILL.format(ballast=str(small_disk / "ballast"), but_bytes=100_000))
    overrides = [*only_train, "train.steps=40", "checkpoints.max_skipped=1", fills]
    done = place.run("submit", "hangul-restoration", *overrides, code=1)
    assert "no space" in done.stderr
    assert kept(place) == [(2, "full"), (6, "weights")]
    (small_disk / "ballast").unlink()
    place.run("resume", "hangul-restoration")
    assert place.events("resumed")[-1]["step"] == 2
    assert kept(place)[-1] == (40, "full")


@pytest.mark.faults
def test_a_store_that_goes_away_and_comes_back_costs_saves_and_no_training(place, only_train, until):
    client = place.start(
        "submit", "hangul-restoration", *only_train, "train.steps=60", "checkpoints.max_skipped=null", "--detach"
    )
    client.communicate(timeout=180)
    until(lambda: place.events("saved"), "a first checkpoint")
    folder = place.run_dir()
    away = folder.with_name("away")
    folder.rename(away)
    logs = away / "logs/train-00000.log"
    until(lambda: "is not saved" in logs.read_text(), "a save that was left out", timeout_s=60)
    away.rename(folder)
    until(lambda: place.states()["train"]["state"] == "done", "the end of the training")
    assert kept(place)[-1] == (60, "full")
    assert len(place.events("attempt")) >= 1 and place.events("skipped")
