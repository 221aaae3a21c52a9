"""A cast rounds as torch does, and counts exactly what it lost."""

from __future__ import annotations

import pytest
import torch

from sousbatch.checkpoints.zero.cast import Loss, cast_block

INFINITY = float("inf")


def cast(values: torch.Tensor, dtype: torch.dtype = torch.float16, clamp: bool = False) -> tuple[torch.Tensor, Loss]:
    target = torch.empty(values.shape, dtype=dtype)
    return target, cast_block(values, target, clamp=clamp, count_flushed=True)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 65520.0), (torch.bfloat16, (2 - 2**-8) * 2.0**127)])
def test_the_last_value_that_fits_is_kept_and_the_next_counted(dtype: torch.dtype, limit: float) -> None:
    last = torch.nextafter(torch.tensor(limit), torch.tensor(0.0))
    kept, loss = cast(torch.stack([last, -last]), dtype)
    assert kept.isfinite().all() and loss == Loss()
    lost, loss = cast(torch.tensor([limit, -limit, 1.0]), dtype)
    assert lost.isinf().tolist() == [True, True, False] and loss == Loss(num_overflowing=2)


def test_clamping_sets_what_overflows_to_the_limits() -> None:
    clamped, loss = cast(torch.tensor([1e6, -1e6, 2.0]), clamp=True)
    assert clamped.tolist() == [65504.0, -65504.0, 2.0] and loss == Loss(num_overflowing=2)


def test_nan_and_infinity_are_counted_apart_from_overflow() -> None:
    _, loss = cast(torch.tensor([float("nan"), INFINITY, -INFINITY, 1e6]))
    assert loss == Loss(num_nonfinite=3, num_overflowing=1)


def test_values_that_become_zero_are_counted_and_subnormals_kept() -> None:
    target, loss = cast(torch.tensor([2.0**-24, 2.0**-25, -1e-9, 0.0]))
    assert target.tolist() == [2.0**-24, 0.0, 0.0, 0.0] and loss == Loss(num_flushed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_is_rounded_once(dtype: torch.dtype) -> None:
    values = torch.randn(4096, dtype=torch.float64).to(dtype)
    target, _ = cast(values)
    assert torch.equal(target, values.half())
