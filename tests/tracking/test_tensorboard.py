"""What TensorBoard reads from the event files of several attempts and stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.tracking.base import Trackers, start


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_attempt_takes_the_place_of_the_steps_it_repeats(tracked: Callable[..., Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tracked(trackers=("tensorboard",))
    for attempt, steps in ((1, (10, 20, 30)), (2, (20, 30, 40))):
        trackers = Trackers()
        start(trackers, folder, stage="train", kind="train", task=None, attempt=attempt)
        for step in steps:
            trackers.log(step, {"loss": attempt, "note": "no number"})
        trackers.summary({"rows": 3})
        trackers.table("samples", ["id", "text"], [["a", "one | two\nthree"]])
        trackers.finish(0)
    trackers = Trackers()
    start(trackers, folder, stage="predict", kind="predict", task=None, attempt=1)
    trackers.log(1, {"rows": 7})
    trackers.finish(0)
    found = EventAccumulator(str(folder / "tensorboard" / "train")).Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(10, 1), (20, 2), (30, 2), (40, 2)]
    assert found.Scalars("final/rows")[-1].step == 40 and "note" not in found.Tags()["scalars"]
    (text,) = found.Tensors("samples/text_summary")[-1].tensor_proto.string_val
    assert text.decode().splitlines()[2] == "| a | one \\| two three |"
    assert EventAccumulator(str(folder / "tensorboard" / "predict")).Reload().Scalars("rows")[0].value == 7
