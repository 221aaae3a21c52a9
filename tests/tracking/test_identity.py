"""The identity of a tracked run is fixed at submission, and the same for every attempt."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from sousbatch.tracking.identity import read_identity, write_identity

from .conftest import make_identity


def test_each_task_of_each_stage_has_its_own_run_in_one_group(tmp_path: Path) -> None:
    run = make_identity()
    train = run.of_task("train", "train", None, tmp_path, 1)
    shards = [run.of_task("ask", "predict", task, tmp_path, 1) for task in (0, 1)]
    assert (train.id, train.name, train.job_type) == ("0123456789ab-train", "toy train", "train")
    assert [one.id for one in shards] == ["0123456789ab-ask-0", "0123456789ab-ask-1"]
    assert {one.group for one in (train, *shards)} == {"toy-0123456789ab"}


def test_attempts_share_all_but_their_number(tmp_path: Path) -> None:
    first, second = (asdict(make_identity().of_task("train", "train", None, tmp_path, number)) for number in (1, 2))
    assert (first.pop("config"), second.pop("config")) == (
        {"run": "0123456789ab", "recipe": "toy", "stage": "train", "attempt": 1},
        {"run": "0123456789ab", "recipe": "toy", "stage": "train", "attempt": 2},
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
