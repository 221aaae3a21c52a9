"""The states of stages, from events and what a launcher says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sousbatch.events import KINDS, Event
from sousbatch.launchers.base import JobRef, JobState
from sousbatch.launchers.states import RULES, Facts, is_final, rule_for, stage_states
from sousbatch.launchers.status import job_refs
from sousbatch.recipes.plan import Batch, Plan, Stage
from sousbatch.recipes.schema import Resources

CPU = Resources(device="cpu")
BATCH = Batch(
    world_size=2, micro_batch=1, accumulation=1, steps=100, steps_per_epoch=10, warmup_steps=0, save_every_steps=10
)
TRAIN = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
PREDICT = Stage(name="predict", kind="predict", of=None, resources=CPU, num_tasks=2, after=())
_WORDS = ("waiting", "running", "stopping", "done", "stopped", "failed", "cancelled", "lost")


def event(kind: str, number: int = 1, role: str = "stage", stage: str = "train", task: int = 0, **data: Any) -> Event:
    return KINDS[kind](role=role, number=number, stage=stage, task=task, **data)


ENDED = event("ended", exit_code=0)


RUNNING, LOST = JobState(word="running"), JobState(word="lost", reason="Slurm does not know the job any more")
STARTED, STOPPED, CRASHED = (event("attempt"), event("ended", exit_code=75), event("ended", exit_code=1))
CANCEL, BOOM = event("cancel", role="client"), event("error", role="job", message="boom", advice="try less")
# Rule, events, what the launcher says, whether the ranks are asked to stop, and the word and reason that people see.
ROWS: list[tuple[str, list[Event], JobState | None, bool, tuple[str, str]]] = [
    ("every task ended well", [ENDED], None, False, ("done", "")),
    ("every task ended well", [ENDED], RUNNING, True, ("done", "")),
    ("every task ended well", [ENDED], LOST, False, ("done", "")),
    ("every task ended well", [ENDED], JobState(word="unknown", reason="?"), False, ("done", "")),
    (
        "what it had committed is gone",
        [ENDED, event("units_lost", role="job")],
        JobState(word="done"),
        False,
        ("failed", "units are gone or damaged; `resume` answers their rows again"),
    ),
    (
        "the launcher knows",
        [ENDED, event("units_lost", role="job"), event("attempt", number=2)],
        RUNNING,
        False,
        ("running", ""),
    ),
    (
        "every task ended well",
        [ENDED, event("units_lost", role="job"), event("ended", 2, exit_code=0)],
        LOST,
        False,
        ("done", ""),
    ),
    ("the launcher does not answer", [], JobState(word="unknown", reason="no answer"), False, ("unknown", "no answer")),
    ("no job was sent", [], None, False, ("lost", "not sent; `resume` sends it")),
    (
        "the launcher saw an exit code 0 that no attempt recorded",
        [],
        JobState(word="done"),
        False,
        ("failed", "ended without a record"),
    ),
    (
        "it began after the launcher was asked",
        [STARTED],
        JobState(word="waiting", seen_at=-1.0),
        False,
        ("running", ""),
    ),
    (
        "it began after the launcher was asked, and is asked to stop",
        [STARTED],
        JobState(word="waiting", seen_at=-1.0),
        True,
        ("stopping", ""),
    ),
    (
        "it saved and stopped, and the launcher has forgotten the job",
        [STARTED, STOPPED],
        LOST,
        False,
        ("stopped", ""),
    ),
    (
        "it saved and stopped, and the launcher has forgotten the job",
        [CANCEL, STARTED, STOPPED],
        LOST,
        False,
        ("stopped", ""),
    ),
    (
        "a person cancelled it, and the launcher has forgotten the job",
        [CANCEL, CRASHED],
        LOST,
        False,
        ("cancelled", ""),
    ),
    ("a person cancelled it, and the launcher has forgotten the job", [CANCEL], LOST, False, ("cancelled", "")),
    (
        "it failed, and the launcher has forgotten the job",
        [CRASHED],
        LOST,
        False,
        ("failed", "ended with exit code 1"),
    ),
    ("it failed, and the launcher has forgotten the job", [BOOM, CRASHED], LOST, False, ("failed", "boom")),
    ("its ranks are asked to stop", [STARTED], RUNNING, True, ("stopping", "")),
    ("the launcher saw it fail", [BOOM], JobState(word="failed", reason="code 1"), False, ("failed", "boom")),
    ("the launcher saw it fail", [BOOM], JobState(word="failed", reason="code 1"), True, ("failed", "boom")),
    (
        "the launcher saw it fail",
        [event("error", role="job", message="old"), event("attempt", number=2)],
        JobState(word="failed", reason="task 0 was killed by signal 9"),
        False,
        ("failed", "task 0 was killed by signal 9"),
    ),
    (
        "the launcher saw it fail",
        [event("error", role="job", message="rank 0"), event("error", role="rank1", message="rank 1")],
        JobState(word="failed", reason="task 0 ended with exit code 1"),
        False,
        ("failed", "rank 0"),
    ),
    ("the launcher knows", [], JobState(word="waiting", reason="another run"), False, ("waiting", "another run")),
    ("the launcher knows", [STARTED], JobState(word="waiting", reason="held"), True, ("waiting", "held")),
    ("the launcher knows", [BOOM], RUNNING, False, ("running", "")),
    ("the launcher knows", [STARTED], LOST, False, ("lost", LOST.reason)),
    ("the launcher knows", [], JobState(word="cancelled", reason="cancelled"), False, ("cancelled", "cancelled")),
    ("the launcher knows", [STOPPED], JobState(word="stopped", reason="saved"), False, ("stopped", "saved")),
]


@pytest.mark.parametrize("rule, events, job, is_stopping, expected", ROWS)
def test_the_ledger_comes_first_and_the_launcher_fills_in(
    make_plan: Callable[..., Plan],
    rule: str,
    events: list[Event],
    job: JobState | None,
    is_stopping: bool,
    expected: tuple[str, str],
) -> None:
    assert rule_for(Facts(stage=TRAIN, events=events, job=job, is_stopping=is_stopping)).name == rule
    stopping = frozenset({"train"} if is_stopping else ())
    state = stage_states(make_plan([TRAIN]), events, {"train": job} if job else {}, stopping=stopping)["train"]
    assert (state.word, state.reason) == expected
    assert state.was_sent is (rule != "no job was sent")
    assert (state.advice == "try less") is (state.reason == "boom")


def test_every_rule_has_a_row() -> None:
    assert {rule.name for rule in RULES} == {name for name, *_ in ROWS}


def test_an_error_of_a_task_that_was_tried_less_often_is_told(make_plan: Callable[..., Plan]) -> None:
    events = [
        event("error", stage="predict", task=1, message="broken"),
        event("attempt", stage="predict", number=2),
    ]
    state = stage_states(make_plan([PREDICT]), events, {"predict": JobState(word="failed")})["predict"]
    assert state.reason == "broken"


def test_an_array_is_done_when_every_task_is(make_plan: Callable[..., Plan]) -> None:
    running = {"predict": JobState(word="running")}
    plan, first = make_plan([PREDICT]), event("ended", stage="predict", exit_code=0)
    assert stage_states(plan, [first], running)["predict"].word == "running"
    second = event("ended", stage="predict", task=1, number=3, exit_code=0)
    assert stage_states(plan, [first, second], running)["predict"].word == "done"


def test_a_running_stage_that_was_asked_to_stop_is_stopping(make_plan: Callable[..., Plan]) -> None:
    for word, expected in (("running", "stopping"), ("failed", "failed"), ("waiting", "waiting")):
        jobs = {"train": JobState(word=word)}  # type: ignore[arg-type]
        assert stage_states(make_plan([TRAIN]), [], jobs, stopping=frozenset({"train"}))["train"].word == expected


def test_progress_is_the_newest_step_and_the_rows_of_units_once(make_plan: Callable[..., Plan]) -> None:
    events = [
        event("step", role="job", step=50),
        event("saved", role="job", step=40, number=2),
        event("step", role="job", step=43, number=2),
        event("layout", role="job", stage="predict", num_rows=10),
        event("unit", role="job", stage="predict", unit=0, num_rows=4),
        event("unit", role="job", stage="predict", unit=0, num_rows=4, number=2),
        event("unit", role="job", stage="predict", unit=1, num_rows=4, task=1),
    ]
    running = {name: JobState(word="running") for name in ("train", "predict")}
    states = stage_states(make_plan([TRAIN, PREDICT]), events, running)  # type: ignore[arg-type]
    assert (states["train"].step, states["train"].total) == (43, 100)
    assert (states["predict"].step, states["predict"].total) == (8, 10)


def sent(kind: str, number: int, key: str, **data: Any) -> Event:
    return event(kind, number=number, role="client", key=key, launcher="local", job_id=f"job-{key}", **data)


def test_the_last_job_of_a_stage_counts_by_number_not_by_when_it_was_adopted() -> None:
    events = [sent("sent", 1, "a"), sent("adopted", 4, "b", of=2), sent("sent", 3, "c")]
    assert job_refs(events)["train"] == JobRef(launcher="local", job_id="job-c")
    assert job_refs(events[:2])["train"] == JobRef(launcher="local", job_id="job-b")


def test_final_means_that_nothing_waits_or_runs(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan([TRAIN])
    for word in _WORDS:
        states = stage_states(plan, [], {"train": JobState(word=word)})  # type: ignore[arg-type]
        assert is_final(states) is (word not in ("waiting", "running", "stopping"))
