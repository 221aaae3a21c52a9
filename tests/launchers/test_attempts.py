"""What a task does next, as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sousbatch.errors import EXIT_DEVICE_MEMORY, EXIT_DIVERGED, EXIT_NO_ROOM, EXIT_STOPPED
from sousbatch.events import KINDS, Event
from sousbatch.launchers.attempts import Attempt, Stop, first_batch, next_batch, read_attempts
from sousbatch.recipes.fallbacks import with_fallbacks
from sousbatch.recipes.plan import Batch, Stage
from sousbatch.recipes.schema import Data, Resources, StageSettings, Train, Zero

ONLY_HALVED = StageSettings(train=Train(on_out_of_memory=("micro_batch",)))


def batch(micro: int, accumulation: int = 1, world_size: int = 2) -> Batch:
    return Batch(
        world_size=world_size,
        micro_batch=micro,
        accumulation=accumulation,
        steps=10,
        steps_per_epoch=10,
        warmup_steps=0,
        save_every_steps=5,
    )


def attempt(code: int | None, progress: int = 0, of: Batch | None = None) -> Attempt:
    return Attempt(number=1, batch=of, exit_code=code, progress=progress)


def event(kind: str, number: int = 1, role: str = "stage", stage: str = "train", task: int = 0, **data: Any) -> Event:
    return KINDS[kind](role=role, number=number, stage=stage, task=task, **data)


@pytest.mark.parametrize(
    "code, progress, expected",
    [
        (0, 0, Stop(exit_code=0, reason="done")),
        (EXIT_STOPPED, 3, Stop(exit_code=75, reason="saved and stopped")),
        (EXIT_DEVICE_MEMORY, 3, Stop(exit_code=76, reason="out of device memory")),
        (1, 0, Stop(exit_code=1, reason="exit code 1 without progress")),
        (137, 0, Stop(exit_code=137, reason="exit code 137 without progress")),
        (None, 0, Stop(exit_code=1, reason="exit code None without progress")),
        (1, 1, None),
        (137, 2, None),
        (None, 1, None),
    ],
)
def test_an_end_leads_to_a_stop_or_to_another_try(code: int | None, progress: int, expected: Stop | None) -> None:
    assert next_batch(attempt(code, progress), ONLY_HALVED) == expected


def test_no_room_stops_however_much_was_done() -> None:
    stop = next_batch(attempt(EXIT_NO_ROOM, 5, batch(4)), ONLY_HALVED)
    assert isinstance(stop, Stop) and stop.exit_code == EXIT_NO_ROOM and "free some and resume" in stop.reason


def test_a_crash_after_progress_keeps_the_batch() -> None:
    assert next_batch(attempt(1, 1, batch(6, 2)), ONLY_HALVED) == batch(6, 2)


def test_a_training_that_diverged_is_not_tried_again_whatever_it_saved() -> None:
    stop = next_batch(attempt(EXIT_DIVERGED, 5, batch(4)), ONLY_HALVED)
    assert stop == Stop(exit_code=EXIT_DIVERGED, reason="the training diverged")


@pytest.mark.parametrize("micro", [2, 3, 4, 5, 6, 7, 9, 12, 16, 25])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
def test_out_of_device_memory_shrinks_the_micro_batch_down_to_1_and_keeps_the_global_batch(
    micro: int, accumulation: int
) -> None:
    first = current = batch(micro, accumulation)
    sizes = [micro]
    while not isinstance(following := next_batch(attempt(EXIT_DEVICE_MEMORY, 0, current), ONLY_HALVED), Stop):
        assert following is not None and following.global_batch == first.global_batch
        assert following.micro_batch <= current.micro_batch / 2
        current = following
        sizes.append(current.micro_batch)
    assert sizes[-1] == 1 and following.reason == "out of device memory with a micro batch of 1"


def stage(of: Batch | None) -> Stage:
    return Stage(
        name="train",
        kind="train",
        of=None,
        resources=Resources(),
        num_tasks=1,
        after=(),
        settings=ONLY_HALVED,
        batch=of,
    )


def test_a_new_job_goes_on_with_the_last_batch_and_halves_it_if_that_ran_out_of_memory() -> None:
    assert first_batch([], stage(batch(8))) == batch(8)
    assert first_batch([attempt(1, 0, batch(4, 2))], stage(batch(8))) == batch(4, 2)
    assert first_batch([attempt(EXIT_DEVICE_MEMORY, 0, batch(4, 2))], stage(batch(8))) == batch(2, 4)
    assert first_batch([attempt(EXIT_DEVICE_MEMORY, 0, batch(1, 8))], stage(batch(8))) == batch(1, 8)
    assert first_batch([attempt(EXIT_DEVICE_MEMORY)], stage(None)) is None


def test_memory_is_given_up_in_the_order_of_the_recipe_until_nothing_is_left() -> None:
    ladder = ("micro_batch", "gradient_checkpointing", "offload", "max_tokens")
    train, data = Train(on_out_of_memory=ladder, zero=Zero(stage=2)), Data(max_tokens=300, long_rows="cut_right")
    settings, current, found = StageSettings(train=train, data=data), batch(2), []
    while not isinstance(following := next_batch(attempt(EXIT_DEVICE_MEMORY, 0, current), settings), Stop):
        assert following is not None and following.global_batch == batch(2).global_batch
        seen = with_fallbacks(settings, following.fallbacks)
        found.append(
            (
                following.micro_batch,
                seen.train.gradient_checkpointing,
                seen.train.zero.offload,
                seen.data.max_tokens,
            )
        )
        current = following
    assert found == [
        (1, False, "none", 300),
        (1, True, "none", 300),
        (1, True, "optimizer", 300),
        (1, True, "optimizer", 150),
        (1, True, "optimizer", 75),
    ]
    assert following.reason.endswith(
        "a micro batch of 1 and gradient_checkpointing, offload, max_tokens=150, max_tokens=75"
    )


def test_what_a_recipe_does_already_or_cannot_do_is_passed_over() -> None:
    train = Train(on_out_of_memory=("offload", "gradient_checkpointing", "micro_batch"), gradient_checkpointing=True)
    assert next_batch(attempt(EXIT_DEVICE_MEMORY, 0, batch(2)), StageSettings(train=train)) == batch(1, 2)


@pytest.mark.parametrize(
    "settings",
    [
        StageSettings(data=Data(max_tokens=160, pad_input_to=80, long_rows="cut_right")),
        StageSettings(task="question_answering", data=Data(max_tokens=384, long_rows="cut_right")),
    ],
)
def test_rows_are_not_shortened_until_nothing_can_be_learned(settings: StageSettings) -> None:
    settings = replace(settings, train=Train(on_out_of_memory=("max_tokens",)))
    assert isinstance(next_batch(attempt(EXIT_DEVICE_MEMORY, 0, batch(1)), settings), Stop)


def test_attempts_are_read_from_the_events_of_their_own_task() -> None:
    events = [
        event("sent", role="client", number=9, key="k", launcher="local", job_id="k"),
        event("attempt", micro_batch=4, accumulation=2),
        event("saved", role="job", step=1),
        event("saved", role="job", step=1, content="full"),
        event("saved", role="job", step=1, content="weights"),  # no training resumes from these
        event("ended", exit_code=76),
        event("attempt", number=2, micro_batch=2, accumulation=4, fallbacks="offload,max_tokens=64"),
        event("unit", number=2, role="job", unit=0, num_rows=1),
        event("ended", task=1, exit_code=0),
        event("saved", stage="train-more", role="job", step=1),
    ]
    assert read_attempts(events, "train", 0, batch(8)) == [
        Attempt(number=1, batch=batch(4, 2), exit_code=76, progress=2),
        Attempt(
            number=2,
            batch=replace(batch(2, 4), fallbacks=("offload", "max_tokens=64")),
            exit_code=None,
            progress=1,
        ),
    ]
    assert read_attempts(events, "train", 1, None) == [Attempt(number=1, exit_code=0)]
    assert read_attempts(events, "merge", 0, None) == []


def test_an_attempt_whose_units_were_lost_since_is_not_done() -> None:
    """Else a job that a resume sends for them on Slurm ends at once, and the merge fails again and again."""
    events = [
        event("units_lost", role="job"),
        event("unit", role="job", unit=0, num_rows=1),
        event("ended", exit_code=0),
    ]
    assert read_attempts(events, "train", 0, None) == [Attempt(number=1, exit_code=None, progress=1)]
