"""The curves of a training, and what is left of them where a page has less room."""

from __future__ import annotations

import math

import pytest

from sousbatch.cli.report.curves import curves_of, thin_out
from sousbatch.events import Step


def step(step: int, *, number: int = 1, time: float = 0.0, **values: float) -> Step:
    return Step(number=number, time=time, step=step, values=values)


def test_of_a_step_that_was_done_twice_the_later_value_counts() -> None:
    events = [step(10, loss=3.0), step(20, loss=2.0), step(20, number=2, loss=1.5), step(20, number=2, eval_loss=1.0)]
    curves = curves_of(events, global_batch=4)
    assert curves == {"loss": ((10, 3.0), (20, 1.5)), "eval_loss": ((20, 1.0),)}


def test_what_is_no_number_and_what_says_nothing_of_learning_is_left_out() -> None:
    events = [step(10, loss=math.nan, epoch=0.5), step(20, loss=math.inf, train_runtime=3.0, grad_norm=2.0)]
    assert curves_of(events, global_batch=4) == {"grad_norm": ((20, 2.0),)}


def test_pace_is_counted_within_an_attempt_and_not_over_a_pause() -> None:
    events = [step(10, time=100, loss=1), step(20, time=105, loss=1), step(30, time=110, eval_loss=1)]
    events += [step(20, number=2, time=900, loss=1), step(40, number=2, time=920, loss=1)]
    assert curves_of(events, global_batch=8)["examples_per_s"] == ((20, 16.0), (40, 8.0))


def test_without_the_size_of_a_step_there_is_no_pace() -> None:
    events = [step(10, time=100, loss=1), step(20, time=105, loss=1)]
    assert list(curves_of(events, global_batch=None)) == ["loss"]


def test_a_pace_that_training_reports_itself_is_not_derived_again() -> None:
    events = [
        step(number, time=number, loss=1, **{"throughput/examples_per_s": pace})
        for number, pace in ((10, 7.0), (20, 8.0))
    ]
    assert curves_of(events, global_batch=8)["examples_per_s"] == ((10, 7.0), (20, 8.0))


@pytest.mark.parametrize("num_buckets", [1, 7, 100])
def test_a_thinned_curve_keeps_its_spikes_and_its_ends(num_buckets: int) -> None:
    points = tuple((float(x), math.sin(x / 50)) for x in range(10_000))
    spiky = (*points[:5000], (5000.0, 40.0), *points[5001:7000], (7000.0, -40.0), *points[7001:])
    found = thin_out(spiky, num_buckets)
    assert {spiky[0], (5000.0, 40.0), (7000.0, -40.0), spiky[-1]} <= set(found) <= set(spiky)
    assert list(found) == sorted(found) and len(found) <= 2 * num_buckets + 4


def test_a_short_curve_stays_as_it_is() -> None:
    points = ((1.0, 2.0), (5.0, 1.0), (9.0, 3.0))
    assert thin_out(points, 2) == points
    assert thin_out((), 2) == ()
