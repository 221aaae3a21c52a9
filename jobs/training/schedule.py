"""Compute the learning rate over optimizer steps.

The rate is given as a factor of its highest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ...recipes.schema import Schedule


def factor(spec: Schedule, *, steps: int, warmup_steps: int, steps_per_epoch: int = 1) -> Callable[[int], float]:
    """Return the function from finished steps to the rate's factor, 0 to 1.

    Cosine: 0.5 (1 + cos(pi t)) between 1 and `min_ratio`, where t is the share of the period that has passed: beyond 1
    the rate climbs back, as in torch's CosineAnnealingLR, whose T_max is our period. With restarts after Loshchilov
    and Hutter 2017 (SGDR), periods growing by `period_factor`. Periods begin after the warm-up.
    """
    length = max(1, steps - warmup_steps)
    has_period = spec.period_steps is not None or spec.period_epochs is not None
    period = spec.period_steps or max(1, round((spec.period_epochs or 0) * steps_per_epoch))
    shapes: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "linear": lambda step: 1 - min(step, length) / length,
        "cosine": lambda step: _cosine(step / period if has_period else min(step, length) / length),
        "cosine_restarts": lambda step: _cosine(_place_in_period(step, period, spec.period_factor)),
        "step": lambda step: spec.decay ** (step // period),
    }
    shape = shapes[spec.name]

    def at(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return spec.min_ratio + (1 - spec.min_ratio) * shape(step - warmup_steps)

    return at


def _cosine(place: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * place))


def _place_in_period(step: int, period: int, growth: float) -> float:
    """Return how far into its period *step* is, 0 to 1; periods grow by *growth*."""
    length = float(period)
    position = float(step)
    while position >= length:
        position -= length
        length *= growth
    return position / length
