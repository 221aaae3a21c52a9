"""Questions about the events of a run, each asked of a short ledger."""

from __future__ import annotations

from typing import Any

import pytest

from sousbatch.events import (
    Adopted,
    Archived,
    CancelAsked,
    Ended,
    Error,
    Event,
    Finished,
    Intent,
    Kept,
    ModelWritten,
    Removed,
    Saved,
    Sent,
    Started,
    Step,
    Stripped,
)
from sousbatch.ledger_queries import (
    checkpoint_lifetimes,
    done_stages,
    done_tasks,
    has_model,
    is_cancelled,
    is_finished,
    jobs_started,
    last_sent,
    last_step,
    newest_attempt,
    rank_codes,
    timed,
    unsettled,
)


def intent(number: int, key: str, stage: str = "train") -> Intent:
    return Intent(role="client", number=number, stage=stage, key=key)


def sent(number: int, key: str, *, of: int | None = None) -> Sent:
    job: dict[str, Any] = {"launcher": "local", "job_id": f"job-{key}"}
    place: dict[str, Any] = {"role": "client", "number": number, "stage": "train", "key": key}
    return Sent(**place, **job) if of is None else Adopted(**place, **job, of=of)


def saved(step: int, time: float, number: int = 1) -> Saved:
    return Saved(role="job", stage="train", number=number, time=time, step=step, num_bytes=100)


def at(time: float, **place: Any) -> dict[str, Any]:
    return {"role": "job", "stage": "train", "number": 1, "time": time} | place


# jobs


def test_an_intent_is_unsettled_until_it_or_a_later_one_was_sent() -> None:
    first, second, other = intent(1, "a"), intent(2, "b"), intent(1, "c", "merge")
    assert unsettled([first]) == {"a": first}
    assert unsettled([first, sent(1, "a")]) == {}
    assert unsettled([first, sent(1, "a"), second]) == {"b": second}
    assert unsettled([first, second, sent(3, "b", of=2)]) == {}
    assert unsettled([first, sent(1, "a"), other]) == {"c": other}


def test_the_last_job_counts_by_its_submission_not_by_when_it_was_adopted() -> None:
    events = [sent(1, "a"), sent(4, "b", of=2), sent(3, "c")]
    assert last_sent(events)["train"].key == "c" and last_sent(events[:2])["train"].key == "b"


@pytest.mark.parametrize(
    "asked, number, expected", [([], 1, False), ([2], 1, True), ([1], 2, False), ([1, 3], 2, True)]
)
def test_a_job_is_cancelled_by_a_wish_after_it_was_sent(asked: list[int], number: int, expected: bool) -> None:
    events: list[Event] = [CancelAsked(role="client", number=one, stage="train") for one in asked]
    assert is_cancelled([*events, sent(number, "a")], "train") is expected


def test_the_jobs_of_array_elements_are_those_of_the_array() -> None:
    events = [Started(stage="predict", job="7_1"), Started(stage="predict", job="7_2"), Started(stage="train", job="6")]
    assert jobs_started(events, "predict") == ["7", "7"]


# attempts


def test_a_task_is_done_when_one_of_its_attempts_ended_well() -> None:
    events = [
        Ended(stage="predict", task=0, number=1, exit_code=1),
        Ended(stage="predict", task=0, number=2, exit_code=0),
        Ended(stage="predict", task=1, exit_code=75),
        Ended(stage="train", exit_code=0),
    ]
    assert done_tasks(events, "predict") == {0} and done_stages(events) == {"predict", "train"}


def test_what_the_ranks_of_an_attempt_recorded_is_told_apart_from_other_attempts() -> None:
    events = [
        Started(role="stage", stage="train", number=1),
        Error(stage="train", number=1, message="old", exit_code=1),
        Started(role="stage", stage="train", number=2),
        Error(stage="train", number=2, message="rank 3", exit_code=76),
        Error(stage="train", number=2, message="without a code"),
        Finished(stage="train", number=2),
    ]
    assert newest_attempt(events, "train", 0) == 2 and newest_attempt(events, "train", 1) == 0
    assert rank_codes(events, "train", 0, 2) == [76]
    assert is_finished(events, "train", 0, 2) and not is_finished(events, "train", 0, 1)


def test_the_last_step_is_that_of_the_last_save_or_report() -> None:
    assert last_step([Step(step=50), Saved(step=40), Step(step=43)]) == 43 and last_step([]) == 0


def test_a_model_is_known_by_its_stage_and_digest() -> None:
    events = [ModelWritten(stage="consolidate", digest="a")]
    assert has_model(events, "consolidate", "a")
    assert not has_model(events, "consolidate", "b") and not has_model(events, "other", "a")


# checkpoints


def test_a_checkpoint_lives_from_its_save_to_what_became_of_it() -> None:
    events = [
        saved(1, 10.0),
        saved(2, 20.0),
        Removed(**at(21.0), step=1, reason="older than the last"),
        saved(3, 30.0),
        Stripped(**at(31.0), step=2, left_bytes=20),
        Kept(**at(32.0), step=3, message="the archive is away"),
        Archived(**at(33.0), step=3),
    ]
    found = checkpoint_lifetimes(timed(events))
    assert [(one.step, one.fate, one.born_s, one.stripped_s, one.end_s) for one in found] == [
        (1, "removed", 0.0, None, 11.0),
        (2, "thinned", 10.0, 21.0, None),
        (3, "archived", 20.0, None, 23.0),
    ]
    assert (found[0].why, found[1].num_bytes, found[1].left_bytes) == ("older than the last", 100, 20)


def test_a_checkpoint_that_was_stripped_and_then_goes_is_removed() -> None:
    events = [saved(1, 0.0), Stripped(**at(1.0), step=1, left_bytes=20), Removed(**at(2.0), step=1)]
    (one,) = checkpoint_lifetimes(timed(events))
    assert (one.fate, one.stripped_s, one.end_s) == ("removed", 1.0, 2.0)


def test_a_step_that_a_later_attempt_saved_again_is_another_checkpoint() -> None:
    events = [saved(1, 0.0), Removed(**at(1.0), step=1), saved(1, 5.0, number=2)]
    (one,) = checkpoint_lifetimes(timed(events))
    assert (one.attempt, one.born_s, one.fate) == (2, 5.0, "kept")
    events = [saved(1, 0.0), saved(1, 5.0, number=2), Removed(**at(6.0, number=2), step=1, attempt=1)]
    (one,) = checkpoint_lifetimes(timed(events))
    assert (one.attempt, one.fate) == (2, "kept"), "it was the first one that went"


def test_what_a_person_pruned_comes_after_all_attempts() -> None:
    pruned = Removed(role="client", stage="train", number=1, time=9.0, step=1, attempt=2)
    (one,) = checkpoint_lifetimes(timed([pruned, saved(1, 0.0), saved(1, 5.0, number=2)]))
    assert (one.attempt, one.fate, one.end_s) == (2, "removed", 9.0)


def test_a_clock_that_jumps_back_does_not_fold_the_picture() -> None:
    times = [time for time, _ in timed([saved(1, 1000.0), saved(2, 1010.0), saved(3, 50.0), saved(4, 1020.0)])]
    assert times == [0.0, 10.0, 10.0, 20.0]
