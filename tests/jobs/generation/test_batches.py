"""Batches hold so many rows and tokens, and no more than device memory has held."""

from __future__ import annotations

import pytest
import torch

from sousbatch.errors import DeviceMemoryError
from sousbatch.jobs.generation.batches import Batches


class Device:
    """Holds *most* tokens, and notes what was tried."""

    def __init__(self, sizes: list[tuple[int, int]], most: int = 10**9, error: Exception | None = None) -> None:
        self.sizes, self.most, self.tried = sizes, most, list[list[int]]()
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def work(self, places: list[int]) -> list[str]:
        self.tried.append(places)
        new = max(self.sizes[place][0] for place in places)
        if len(places) * (new + max(self.sizes[place][1] for place in places)) > self.most:
            raise self.error
        return [f"answer {place}" for place in places]


def test_batches_are_cut_by_rows_and_padded_tokens_the_longest_first() -> None:
    device = Device([(10, 10), (10, 90), (10, 20), (10, 10), (10, 500)])
    made = Batches(3, 200).run(device.sizes, device.work, range(len(device.sizes)))
    assert device.tried == [[4], [1, 2], [0, 3]]  # one that is too long for the budget is alone
    assert made == [f"answer {place}" for place in range(5)]
    assert Batches(2, 10**6).run([(1, 1)] * 5, lambda places: places, range(5)) == list(range(5))


@pytest.mark.parametrize(
    "error",
    [None, MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")],
)
def test_a_size_that_did_not_fit_is_not_tried_again(error: Exception | None) -> None:
    device = Device([(10, 10)] * 16, most=80, error=error)
    batches = Batches(16, 10**6)
    assert batches.run(device.sizes, device.work, range(len(device.sizes))) == [
        f"answer {place}" for place in range(16)
    ]
    assert [len(places) for places in device.tried] == [16, 8, 4, 4, 4, 4]
    device.tried.clear()
    batches.run(device.sizes, device.work, range(len(device.sizes)))  # the next unit
    assert [len(places) for places in device.tried] == [4, 4, 4, 4]


def test_one_row_that_does_not_fit_is_named_and_any_other_error_is_raised() -> None:
    with pytest.raises(
        DeviceMemoryError, match="^row 417 alone is too large .*: 30 tokens, and 10 of an answer; lower"
    ):
        device = Device([(10, 10), (10, 30)], most=25)
        Batches(4, 100).run(device.sizes, device.work, [400, 417])
    with pytest.raises(RuntimeError, match="shape"):
        device = Device([(1, 1)] * 4, most=1, error=RuntimeError("shape mismatch"))
        Batches(4, 100).run(device.sizes, device.work, range(len(device.sizes)))
