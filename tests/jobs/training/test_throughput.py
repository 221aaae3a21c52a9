"""Throughput is measured from one log to the next, over steps and the wait for their rows."""

from __future__ import annotations

import pytest
import torch

from sousbatch.jobs.training.throughput import Throughput


def test_rates_are_those_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    throughput = Throughput(world_size=2, examples_per_step=8)
    assert throughput.values() == {}
    for _ in range(2):
        with throughput.waiting_for_data():
            now[0] += 1
        throughput.begin_step()
        throughput.add_tokens({"input_ids": torch.ones(2, 8), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
        throughput.add_tokens({"input_ids": torch.ones(1, 5)})
        now[0] += 3
        throughput.end_step()
        now[0] += 100  # an evaluation, a save
    found = throughput.values()
    found.pop("throughput/device_memory_gb", None)
    assert found == {
        "throughput/tokens_per_s": pytest.approx(2 * 2 * 8 / 8),
        "throughput/examples_per_s": 2 * 8 / 8,
        "throughput/step_s": 4.0,
        "throughput/data_wait_s": 1.0,
        "throughput/device_hours": 208 * 2 / 3600,
    }
    assert throughput.values() == {}
