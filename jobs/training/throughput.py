"""Measure how fast a training is, without making it wait for its device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Throughput:
    """Sums since the last look; other ranks count as this one does."""

    def __init__(self, world_size: int, examples_per_step: int) -> None:
        self._world_size, self._examples = world_size, examples_per_step
        self._began = self._step_began = time.monotonic()
        self._num_steps, self._step_s, self._data_s = 0, 0.0, 0.0
        self._num_tokens: Any = 0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the block as waiting for the rows of a step."""
        began = time.monotonic()
        yield
        self._data_s += time.monotonic() - began

    def add_tokens(self, inputs: Any) -> None:
        """Count the tokens of a batch without padding; the device sums them."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            self._num_tokens = self._num_tokens + mask.detach().sum()
        elif (tokens := inputs.get("input_ids")) is not None:
            self._num_tokens = self._num_tokens + tokens.numel()

    def begin_step(self) -> None:
        """Start the clock of a step, whose rows are there."""
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        """Stop the clock of a step."""
        self._num_steps += 1
        self._step_s += time.monotonic() - self._step_began

    def values(self) -> dict[str, float]:
        """Return the means since the last call; without a step there are none."""
        elapsed, steps = self._step_s + self._data_s, self._num_steps
        if not steps or elapsed <= 0:
            return {}
        found = {
            "throughput/tokens_per_s": float(self._num_tokens) * self._world_size / elapsed,
            "throughput/examples_per_s": steps * self._examples / elapsed,
            "throughput/step_s": elapsed / steps,
            "throughput/data_wait_s": self._data_s / steps,
            "throughput/device_hours": (time.monotonic() - self._began) * self._world_size / 3600,
        }
        if torch.cuda.is_available():
            found["throughput/device_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self._num_steps, self._step_s, self._data_s, self._num_tokens = 0, 0.0, 0.0, 0
        return found
