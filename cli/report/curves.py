"""Derive the curves of a training from its events, and thin them out. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ...events import Event, Step, of

Points = tuple[tuple[float, float], ...]
LOSS, EVAL_LOSS, PACE = "loss", "eval_loss", "examples_per_s"
# What transformers reports beside what was learned: its own clock, and the same once more at the end.
_UNTOLD = ("epoch", "total_flos", "device_hours", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
_PREFIX = "throughput/"  # before what a training measures of its speed


def curves_of(events: Iterable[Event], *, global_batch: int | None) -> dict[str, Points]:
    """Return the finite values of a training over its steps, by name.

    Of a step that was done twice the later value counts. *events* are those of one stage; "examples_per_s" is derived
    from the times of the steps where the examples of a step, *global_batch*, are known.
    """
    steps = of(events, Step)
    found: dict[str, dict[float, float]] = {}
    for event in steps:
        for key, value in event.values.items():
            name = key.removeprefix(_PREFIX)
            if name not in _UNTOLD and not name.startswith("train_") and math.isfinite(value):
                found.setdefault(name, {})[event.step] = value
    if PACE not in found and global_batch and (pace := _pace(steps, global_batch)):
        found[PACE] = pace
    order = sorted(found, key=lambda name: (name != LOSS, name != EVAL_LOSS, not name.startswith("eval_")))
    return {name: tuple(sorted(found[name].items())) for name in order}


def _pace(steps: Sequence[Step], global_batch: int) -> dict[float, float]:
    """Return the examples a second from one report of the loss to the next.

    Both are of the same attempt: a pause between attempts is no training.
    """
    found = {}
    for before, event in pairwise(event for event in steps if LOSS in event.values):
        seconds, num_steps = event.time - before.time, event.step - before.step
        if event.number == before.number and seconds > 0 and num_steps > 0:
            found[float(event.step)] = num_steps * global_batch / seconds
    return found


def thin_out(points: Points, num_buckets: int) -> Points:
    """Return at most about two points for each of *num_buckets* equal parts of x.

    The lowest and the highest of each part stay, so that no spike is lost, and so do the first and the last point.
    """
    if len(points) <= 2 * num_buckets:
        return points
    first, last = points[0], points[-1]
    width = (last[0] - first[0]) / num_buckets or 1.0
    buckets: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        buckets.setdefault(int((point[0] - first[0]) / width), []).append(point)
    kept = {first, last}
    for bucket in buckets.values():
        kept |= {min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])}
    return tuple(sorted(kept))
