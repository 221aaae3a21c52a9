"""Add a LoRA adapter to blocks of its base, in fp32, with torch.

The sums are the same as peft's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..formats.tensors import LowRank, SourceTensor
from .reader import Reader
from .torch_cast import Bytes

if TYPE_CHECKING:
    import torch


class LoraDelta:
    """The change that an adapter makes to one weight; its factors are read once."""

    def __init__(self, reader: Reader, low_rank: LowRank) -> None:
        a, b = (_tensor(reader.read(factor, 0, factor.num_elements), factor) for factor in (low_rank.a, low_rank.b))
        self._left, self._right = (a.T, b.T) if low_rank.is_transposed else (b, a)
        self._scaling = low_rank.scaling

    def to(self, values: Bytes, dtype: str, first_row: int) -> Bytes:
        """Return whole rows of the weight with the change added, as fp32.

        They are those from *first_row* on.
        """
        import torch

        weights = torch.from_numpy(values).view(getattr(torch, dtype))
        num_rows = weights.numel() // self._right.shape[1]
        change = (self._left[first_row : first_row + num_rows] @ self._right).mul_(self._scaling)
        return np.asarray(change.flatten().add_(weights).numpy().view(np.uint8))


def _tensor(values: Bytes, factor: SourceTensor) -> torch.Tensor:
    import torch

    return torch.from_numpy(values).view(getattr(torch, factor.dtype)).float().view(factor.shape)
