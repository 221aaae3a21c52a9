"""A cast rounds as torch does, and counts exactly what it lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sousbatch.checkpoints.consolidation import torch_cast
from sousbatch.checkpoints.consolidation.cast import CastReport, cast_block

INFINITY = float("inf")


def cast(
    values: torch.Tensor, dtype: torch.dtype = torch.float16, clamp: bool = False
) -> tuple[torch.Tensor, CastReport]:
    target = torch.empty(values.shape, dtype=dtype)
    source_name, target_name = (str(tensor.dtype).removeprefix("torch.") for tensor in (values, target))
    loss = cast_block(as_bytes(values), source_name, as_bytes(target), target_name, clamp=clamp, count_flushed=True)
    return target, loss


def as_bytes(tensor: torch.Tensor) -> torch_cast.Bytes:
    """Share a tensor's memory."""
    return tensor.view(torch.uint8).numpy()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 65520.0), (torch.bfloat16, (2 - 2**-8) * 2.0**127)])
def test_the_last_value_that_fits_is_kept_and_the_next_counted(dtype: torch.dtype, limit: float) -> None:
    last = torch.nextafter(torch.tensor(limit), torch.tensor(0.0))
    kept, loss = cast(torch.stack([last, -last]), dtype)
    assert kept.isfinite().all() and loss == CastReport()
    lost, loss = cast(torch.tensor([limit, -limit, 1.0]), dtype)
    assert lost.isinf().tolist() == [True, True, False] and loss == CastReport(num_overflowing=2)


def test_clamping_sets_what_overflows_to_the_limits() -> None:
    clamped, loss = cast(torch.tensor([1e6, -1e6, 2.0]), clamp=True)
    assert clamped.tolist() == [65504.0, -65504.0, 2.0] and loss == CastReport(num_overflowing=2)


def test_nan_and_infinity_are_counted_apart_from_overflow() -> None:
    _, loss = cast(torch.tensor([float("nan"), INFINITY, -INFINITY, 1e6]))
    assert loss == CastReport(num_nonfinite=3, num_overflowing=1)


def test_values_that_become_zero_are_counted_and_subnormals_kept() -> None:
    target, loss = cast(torch.tensor([2.0**-24, 2.0**-25, -1e-9, 0.0]))
    assert target.tolist() == [2.0**-24, 0.0, 0.0, 0.0] and loss == CastReport(num_flushed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_is_rounded_once(dtype: torch.dtype) -> None:
    values = torch.randn(4096, dtype=torch.float64).to(dtype)
    target, _ = cast(values)
    assert torch.equal(target, values.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_alone_casts_every_pattern_of_bits_as_torch_does(dtype: torch.dtype) -> None:
    """Each upper half of a float32, with lower halves at and around the ties: subnormals, infinities, NaN."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    values = torch.from_numpy(np.concatenate([high | low for low in lower]).view(np.float32))
    assert torch_cast._library() is not None
    found, expected = torch.empty(values.shape, dtype=dtype), values.to(dtype)
    with torch_cast.one_thread_each():
        cast_block(as_bytes(values), "float32", as_bytes(found), str(dtype)[6:], clamp=False, count_flushed=True)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_without_the_library_torch_is_imported_and_casts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000) * 1e-4
    expected, loss = cast(values)
    monkeypatch.setattr(torch_cast, "_library", lambda: None)
    torch_cast.copier.cache_clear()
    try:
        found, same_loss = cast(values)
    finally:
        torch_cast.copier.cache_clear()
    assert torch.equal(found, expected) and loss == same_loss
    before = torch.get_num_threads()
    with torch_cast.one_thread_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
