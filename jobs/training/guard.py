"""Stop a training that has diverged, before another checkpoint is written of it.

What has been measured comes in, a reason comes out. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_STEPS = 20  # the losses of so many steps are averaged: single steps of small batches vary by more than a factor
_LEAST_LOGS = 3
_LEAST_RISE = 1.0  # nat a token: far above the best of a training whose loss is near 0


def not_finite(values: Mapping[str, float], *, is_scaled: bool) -> str | None:
    """Return which of a step's values is no number, if any.

    With float16's scaled gradients (*is_scaled*) an infinite gradient is nothing unusual: its step is left out.
    """
    for name in ("loss",) if is_scaled else ("loss", "grad_norm"):
        if name in values and not math.isfinite(values[name]):
            return f"its {'gradients are' if name == 'grad_norm' else 'loss is'} {values[name]}"
    return None


def rising(history: Sequence[Mapping[str, Any]], factor: float, log_every_steps: int) -> str | None:
    """Return how far the loss rose, if it is *factor* times as high as its best.

    *history* is the trainer's log. Compared are means over 20 steps, of three logs at least.
    """
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    width = max(_LEAST_LOGS, math.ceil(_STEPS / log_every_steps))
    if len(losses) < 2 * width:
        return None
    means = [sum(losses[first : first + width]) / width for first in range(len(losses) - width + 1)]
    best, last = min(means), means[-1]
    if last <= max(factor * best, best + _LEAST_RISE):
        return None
    return f"its loss rose from {best:.4g} to {last:.4g} (train.max_loss_rise={factor:g})"
