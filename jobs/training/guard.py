"""Tell when a training has diverged, from what has been measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_TIMES = 2  # measurements in a row
_STEPS = 20  # the losses of so many steps are averaged: single steps of small batches vary by more than a factor
_LEAST_LOGS = 3
_LEAST_RISE = 1.0  # nat a token: far above the best of a training whose loss is near 0


@dataclass(kw_only=True)
class Answers:
    """The tokens that a model chooses for the evaluation split.

    Each is chosen after the right ones. A model that has only begun to learn may well choose one token everywhere, and
    its loss falls all the same, or wavers. So answers are filler only where they are one token in two measurements in a
    row, and the loss is well above that of the last varied ones.
    """

    is_text: bool
    chosen: set[int] = field(default_factory=set)
    wanted: set[int] = field(default_factory=set)
    _num_filler: int = 0
    _varied_loss: float | None = None

    def begin(self) -> None:
        """Forget the tokens of the measurement before."""
        self.chosen, self.wanted = set(), set()

    @property
    def is_wanted(self) -> bool:
        """Whether more tokens would tell anything: two different ones are enough."""
        return self.is_text and len(self.chosen) < 2

    def add(self, chosen: set[int], wanted: set[int]) -> None:
        """Note what a batch has chosen, and what it should have."""
        self.chosen |= chosen
        self.wanted |= wanted

    def became_filler(self, loss: float, *, is_varied: bool) -> bool:
        """Return whether the answers have become filler, by what all ranks say."""
        if is_varied:
            self._num_filler, self._varied_loss = 0, loss
            return False
        self._num_filler += 1
        is_worse = self._varied_loss is not None and not loss <= self._varied_loss + _LEAST_RISE
        return self._num_filler >= _TIMES and is_worse


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
