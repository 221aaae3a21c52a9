"""The identity of a tracked run is fixed at submission, and the same for every attempt."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from sousbatch.tracking.identity import read_identity, write_identity

from .conftest import make_identity


def test_the_stages_of_a_run_share_one_tracked_run_and_keep_their_values_apart(tmp_path: Path) -> None:
    run = make_identity(told=("seed=2", "adapter.rank=4"))
    train, score = (run.of_task(stage, stage, None, tmp_path, 1) for stage in ("train", "score"))
    assert (train.id, train.name, train.job_type) == ("0123456789ab", "toy seed=2 adapter.rank=4", "run")
    assert (score.id, score.name, score.group) == (train.id, train.name, train.group)
    assert (train.prefix, score.prefix) == ("train/", "score/")
    assert train.tags == ("seed=2", "adapter.rank=4")
    assert "`sousbatch resume 0123456789ab`" in train.notes and "/runs/toy/0123456789ab" in train.notes


def test_each_task_of_each_stage_has_its_own_run_in_one_group_where_asked_for(tmp_path: Path) -> None:
    run = make_identity(per="task")
    train = run.of_task("train", "train", None, tmp_path, 1)
    shards = [run.of_task("ask", "predict", task, tmp_path, 1) for task in (0, 1)]
    assert (train.id, train.name, train.job_type) == ("0123456789ab-train", "toy 012345 train", "train")
    assert [one.id for one in shards] == ["0123456789ab-ask-0", "0123456789ab-ask-1"]
    assert {one.group for one in (train, *shards)} == {"toy-0123456789ab"}
    assert {one.prefix for one in (train, *shards)} == {""}


def test_attempts_share_all_but_their_number(tmp_path: Path) -> None:
    first, second = (asdict(make_identity().of_task("train", "train", None, tmp_path, number)) for number in (1, 2))
    assert (first.pop("part"), second.pop("part")) == ("train-0-1", "train-0-2")
    assert (first.pop("config"), second.pop("config")) == (
        {"seed": 2, "recipe": "toy", "run": "0123456789ab", "attempt/train-0": 1},
        {"seed": 2, "recipe": "toy", "run": "0123456789ab", "attempt/train-0": 2},
    )
    assert first == second


def test_what_was_written_at_submission_is_read_back(tmp_path: Path) -> None:
    identity = make_identity(tags=("a", "b"), entity="our-team")
    write_identity(identity, tmp_path / "tracking")
    assert read_identity(tmp_path / "tracking") == identity


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": "toy"}'])
def test_a_damaged_identity_is_an_error_of_the_kinds_that_start_catches(tmp_path: Path, text: str) -> None:
    (tmp_path / "identity.json").write_text(text)
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_identity(tmp_path)
