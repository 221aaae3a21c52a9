"""Work in batches that fit.

They hold so many rows, so many tokens, and no more than device memory has held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ...errors import DeviceMemoryError

T = TypeVar("T")


class Batches:
    """Sorts items by length and cuts them into batches.

    A batch that device memory cannot hold is cut anew, and no later one is tried that is as large.
    """

    def __init__(self, most_rows: int, most_tokens: int) -> None:
        self._rows, self._tokens = most_rows, most_tokens

    def run(
        self, sizes: Sequence[tuple[int, int]], work: Callable[[list[int]], Sequence[T]], rows: Sequence[int]
    ) -> list[T]:
        """Return what *work* returns for each item, in their order.

        An item of size (new tokens, tokens read) fills a batch as the largest of its batch does. *work* gets the
        places of a batch. The longest come first, so that too little memory shows at once.

        Raises:
            DeviceMemoryError: an item alone is too large; it names the one of *rows* that it is of.
        """
        waiting = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
        found: dict[int, T] = {}
        while waiting:
            places, num_tokens = self._take(waiting, sizes)
            is_full = False
            try:
                found.update(zip(places, work(places), strict=True))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _is_memory(error):
                    raise
                if len(places) == 1:
                    new, read = sizes[places[0]]
                    raise DeviceMemoryError(
                        f"row {rows[places[0]]} alone is too large for the memory of the device: {read:,} tokens, and "
                        f"{new:,} of an answer; lower predict.max_new_tokens or predict.num_beams, cut long rows "
                        "(data.long_rows), or set predict.load_in=4bit"
                    ) from error
                is_full = True
            if is_full:  # out of the handler, whose traceback holds on to the batch
                self._tokens = num_tokens // 2
                torch.cuda.empty_cache()
            else:
                del waiting[: len(places)]
        return [found[place] for place in range(len(sizes))]

    def _take(self, waiting: Sequence[int], sizes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
        """Return the first places that share a batch, and the tokens of that batch."""
        new = read = num_tokens = 0
        places: list[int] = []
        for place in waiting[: self._rows]:
            new, read = max(new, sizes[place][0]), max(read, sizes[place][1])
            if places and (new + read) * (len(places) + 1) > self._tokens:
                break
            places.append(place)
            num_tokens = (new + read) * len(places)
        return places, num_tokens


def _is_memory(error: BaseException) -> bool:
    is_named = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_named
