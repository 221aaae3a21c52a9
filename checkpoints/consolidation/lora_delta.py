"""Change blocks of a base as its adapter says, in fp32, with torch.

The sums are the same as peft's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..formats.tensors import LowRank, Rows, SourceTensor
from .reader import Reader
from .torch_cast import Bytes

if TYPE_CHECKING:
    import torch


class LoraDelta:
    """The change that an adapter makes to one weight; its factors are read once."""

    def __init__(self, reader: Reader, low_rank: LowRank) -> None:
        a, b = (_tensor(reader, factor) for factor in (low_rank.a, low_rank.b))
        self._left, self._right = (a.T, b.T) if low_rank.is_transposed else (b, a)
        self._scaling = low_rank.scaling
        self._magnitude = _tensor(reader, low_rank.magnitude) if low_rank.magnitude is not None else None

    def to(self, values: Bytes, dtype: str, first_row: int) -> Bytes:
        """Return whole rows of the weight with the change added, as fp32.

        They are those from *first_row* on.
        """
        import torch

        weights = torch.from_numpy(values).view(getattr(torch, dtype)).view(-1, self._right.shape[1])
        change = (self._left[first_row : first_row + len(weights)] @ self._right).mul_(self._scaling).add_(weights)
        if self._magnitude is not None:  # DoRA, Liu et al. 2024 (eq. 5)
            lengths = torch.linalg.norm(change, dim=1)
            change.mul_((self._magnitude.flatten()[first_row : first_row + len(weights)] / lengths).unsqueeze(1))
        return np.asarray(change.flatten().numpy().view(np.uint8))


class RowChange:
    """Rows that take the place of a weight's own; they are read once."""

    def __init__(self, reader: Reader, rows: Rows) -> None:
        self._numbers = np.asarray(rows.numbers)
        self._values = _tensor(reader, rows.values)

    def to(self, values: Bytes, dtype: str, first_row: int) -> Bytes:
        """Return whole rows of the weight with those of the adapter in place, as fp32."""
        import torch

        weights = torch.from_numpy(values).view(getattr(torch, dtype)).float().view(-1, self._values.shape[1])
        for place in np.flatnonzero((self._numbers >= first_row) & (self._numbers < first_row + len(weights))):
            weights[self._numbers[place] - first_row] = self._values[place]
        return np.asarray(weights.flatten().numpy().view(np.uint8))


def change_of(reader: Reader, tensor: SourceTensor) -> LoraDelta | RowChange | None:
    """Return the change that an adapter makes to *tensor*, if any."""
    if tensor.low_rank is not None:
        return LoraDelta(reader, tensor.low_rank)
    return RowChange(reader, tensor.rows) if tensor.rows is not None else None


def _tensor(reader: Reader, factor: SourceTensor) -> torch.Tensor:
    import torch

    values = reader.read(factor, 0, factor.num_elements)
    return torch.from_numpy(values).view(getattr(torch, factor.dtype)).float().view(factor.shape)
