"""Where a training resumes: at the newest full state whose files are those that were committed."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sousbatch import ledger
from sousbatch.checkpoints import commit
from sousbatch.errors import DamagedError
from sousbatch.jobs.training.collectives import Ranks
from sousbatch.jobs.training.resume import last_checkpoint
from sousbatch.run_folder import RunPaths

NAMES = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]


class Job(SimpleNamespace):
    def open_ledger(self):
        return ledger.open_job(self.paths.ledger_dir, "train", 0, 1)


@pytest.fixture
def job(tmp_path):
    """Two full states of two ranks, at the steps 2 and 4, and newer weights."""
    paths = RunPaths(root=tmp_path / "toy" / "0123456789ab")
    for step in (2, 4):
        temporary = commit.begin(paths.checkpoints("train"), step, 1)
        for rank, name in enumerate(NAMES):
            torch.save({"rank": rank, "weights": torch.full((50,), step + 0.1 * rank)}, temporary / name)
        commit.commit(temporary, step=step, attempt=1, metric=None, world_size=2, check_fence=lambda: None)
    temporary = commit.begin(paths.checkpoints("train"), 6, 1)
    (temporary / "model.safetensors").write_bytes(b"weights")
    commit.commit(temporary, step=6, attempt=1, metric=None, world_size=2, check_fence=lambda: None, content="weights")
    ledger.open_attempt(paths.ledger_dir, "train", 0).close()
    return Job(paths=paths, stage=SimpleNamespace(name="train"))


def folder_of(job, step: int) -> Path:
    return job.paths.checkpoints("train") / f"step-{step:08d}"


def problems(job) -> list[str]:
    return [event.message for event in ledger.read(job.paths.ledger_dir) if event.kind == "problem"]


def test_the_newest_full_state_is_taken(job) -> None:
    assert last_checkpoint(job, Ranks()).step == 4
    assert problems(job) == []


def swap(folder: Path) -> None:
    first, second = (folder / name for name in NAMES)
    os.rename(first, folder / "aside")
    os.rename(second, first)
    os.rename(folder / "aside", second)


def take_another_steps(folder: Path) -> None:
    (folder / NAMES[1]).write_bytes((folder.parent / "step-00000002" / NAMES[1]).read_bytes())


def cut_off(folder: Path) -> None:
    os.truncate(folder / NAMES[0], 500)


def remove(folder: Path) -> None:
    (folder / NAMES[0]).unlink()


@pytest.mark.parametrize("damage", [swap, take_another_steps, cut_off, remove])
def test_a_state_with_other_files_than_were_committed_is_passed_over_and_named(job, damage) -> None:
    damage(folder_of(job, 4))
    assert last_checkpoint(job, Ranks()).step == 2
    (said,) = problems(job)
    assert str(folder_of(job, 4)) in said and "zero_pp_rank_" in said and "from an older one" in said


def test_where_none_is_intact_training_does_not_restart_by_itself(job) -> None:
    for step in (2, 4):
        swap(folder_of(job, step))
    with pytest.raises(
        DamagedError, match=r"no checkpoint in .* is as it was committed; `sousbatch checkpoints verify"
    ):
        last_checkpoint(job, Ranks())


def test_where_there_is_none_training_begins(job) -> None:
    for step in (2, 4):
        for path in folder_of(job, step).iterdir():
            path.unlink()
        folder_of(job, step).rmdir()
    assert last_checkpoint(job, Ranks()) is None
