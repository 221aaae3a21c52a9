"""Order the training rows by length, so that little of a step is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_GROUPS = 50  # steps whose rows are sorted together: enough to find neighbours, few enough to stay random


class LengthSampler(Sampler[int]):
    """Gives rows of like length one after another, in another order in each epoch.

    All rows are shuffled and cut into parts of 50 steps; a part is sorted by length and cut into steps, and the steps
    of all parts are shuffled. The order follows from seed and epoch alone: all ranks have the same, a resumed training
    too, and another micro batch changes none of it. The step with the longest row comes first, so that what does not
    fit into the memory shows at once.
    """

    def __init__(self, lengths: Sequence[int], *, group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = lengths, group, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; accelerate calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self._seed + self._epoch) % 2**63)
        rows = torch.randperm(len(self._lengths), generator=generator).tolist()
        part = self._group * _GROUPS
        steps = []
        for begin in range(0, len(rows), part):
            found = sorted(rows[begin : begin + part], key=self._lengths.__getitem__, reverse=True)
            steps += [found[first : first + self._group] for first in range(0, len(found), self._group)]
        rest = [steps.pop()] if steps and len(steps[-1]) < self._group else []  # a short step stays the last one
        order = torch.randperm(len(steps), generator=generator).tolist()
        longest = max(order, key=lambda place: self._lengths[steps[place][0]], default=None)
        if longest is not None:
            order.remove(longest)
            order.insert(0, longest)
        yield from (row for step in [*(steps[place] for place in order), *rest] for row in step)
