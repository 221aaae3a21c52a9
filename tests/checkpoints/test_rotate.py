"""Carrying verdicts out: what goes is gone, what is not ours stays, a fenced attempt removes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.retention import Policy
from sousbatch.checkpoints.rotate import rotate
from sousbatch.errors import FencedError

LAST = Policy(keep_last=1, keep_best=0)


def no_fence() -> None:
    pass


def make(folder: Path, steps: Sequence[int]) -> None:
    for step in steps:
        temporary = commit.begin(folder, step, 1)
        (temporary / "weights").write_bytes(b"x" * 100)
        commit.commit(temporary, step=step, attempt=1, metric=None, world_size=1, check_fence=no_fence)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_the_policy_lets_go_is_removed_and_returned(tmp_path: Path) -> None:
    make(tmp_path, [1, 2, 3])
    assert [one.step for one in rotate(tmp_path, LAST, no_fence)] == [1, 2]
    assert names(tmp_path) == ["step-00000003"]
    assert rotate(tmp_path, LAST, no_fence) == []


def test_foreign_folders_stay(tmp_path: Path) -> None:
    make(tmp_path, [10, 20])
    for name in ("checkpoint-5", "global_step7", "notes", "step-00000001"):
        (tmp_path / name).mkdir()
    rotate(tmp_path, LAST, no_fence)
    assert names(tmp_path) == ["checkpoint-5", "global_step7", "notes", "step-00000001", "step-00000020"]


def test_a_fenced_attempt_removes_nothing_more(tmp_path: Path) -> None:
    make(tmp_path, [1, 2, 3])
    answers = iter([None, FencedError("replaced")])

    def fence() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    with pytest.raises(FencedError):
        rotate(tmp_path, LAST, fence)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_removal_that_was_killed_half_way_is_no_checkpoint_and_goes_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, [1, 2])

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        rotate(tmp_path, LAST, no_fence)
    assert [one.step for one in commit.committed(tmp_path)] == [2]
    make(tmp_path, [3])
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
