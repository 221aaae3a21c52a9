"""Say which rows each rank had, by the order of a named sampler.

Ranks get the same number of rows by repeating some, as padding. Padding stands at the end of a rank's rows, and is
dropped by its place: a repeated row may be answered in other words.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .shard_reader import Shard

Sampler = Literal["contiguous", "interleaved", "distributed", "batches"]
SAMPLERS: dict[Sampler, str] = {
    "contiguous": "one part after the other, as accelerate's split_between_processes",
    "interleaved": "in turn, without padding",
    "distributed": "in turn with padding, as PyTorch's DistributedSampler (shuffle=False)",
    "batches": "batches in turn, as accelerate's BatchSamplerShard prepares a data loader",
}
PADDING = -1
_MOST_LOST = 64  # ranks that are looked for


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How rows were dealt out to the shards, one a rank, in the order of the ranks.

    Where *num_ranks* is not given it is the number of shards, and what looks as if one was lost is refused.
    """

    sampler: Sampler
    batch_rows: int = 1
    num_ranks: int | None = None

    def __str__(self) -> str:
        batches = f" of {self.batch_rows} rows" if self.sampler == "batches" else ""
        return f"{self.sampler}{batches}"


def by_number(text: str) -> list[str | int]:
    """Return a sorting key that puts rank2 before rank10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def check_ranks(paths: Sequence[Path], counts: Sequence[int], num_rows: int, dealing: Dealing) -> None:
    """Refuse shards that look as if there were more.

    Every row would get a wrong position. *counts* are the rows of each.

    Raises:
        UsageError: there are not as many shards as ranks, a number is left out in their names, or each has as many rows
            as one of more ranks. Of n ranks that shows where there are n (n - 1) rows or more.
    """
    if dealing.num_ranks is not None:
        if dealing.num_ranks != len(paths):
            raise UsageError(f"--ranks is {dealing.num_ranks}, and here are {len(paths)} shards; name one of each rank")
        return
    advice = "name the shards of all ranks, an empty one for a lost rank; or say how many there were with --ranks N"
    names = [by_number(path.name) for path in paths]
    for place in range(1, min(map(len, names)), 2):
        numbers = [int(name[place]) for name in names]
        steps = [after - before for before, after in pairwise(numbers)]
        if any(step != 1 for step in steps) and all(step > 0 for step in steps):
            at = next(number for number, step in enumerate(steps) if step != 1)
            raise UsageError(f"there is no shard between {paths[at]} and {paths[at + 1]}; {advice}")
    if list(counts) == _counts(dealing, num_rows, len(paths)):
        return
    for num_ranks in range(len(paths) + 1, len(paths) + _MOST_LOST):
        if _is_part(counts, _counts(dealing, num_rows, num_ranks)):
            raise UsageError(
                f"here are {len(paths)} shards, and each has as many rows as one of {num_ranks} ranks has of "
                f"{num_rows:,} by --sampler {dealing.sampler}; {advice}"
            )


def _counts(dealing: Dealing, num_rows: int, num_ranks: int) -> list[int]:
    """Return how many rows each rank has, padding included."""
    if dealing.sampler == "interleaved":
        return [-(-max(0, num_rows - rank) // num_ranks) for rank in range(num_ranks)]
    batch_rows = dealing.batch_rows
    return [-(-num_rows // (num_ranks * batch_rows)) * batch_rows] * num_ranks


def _is_part(counts: Sequence[int], of_all: Sequence[int]) -> bool:
    """Say whether *counts* are some of *of_all*, in their order."""
    left = iter(of_all)
    return all(count in left for count in counts)


def deal_out(shards: Sequence[Shard], num_rows: int, dealing: Dealing) -> list[tuple[int, bytes]]:
    """Give the rows of each rank their positions, and return the padding.

    Of padding it is the row that it repeats, and its line.
    A shard that ends early lacks its last rows, which get reported as missing.
    """
    padding: list[tuple[int, bytes]] = []
    for rank, shard in enumerate(shards):
        if shard.num_corrupt:
            raise UsageError(f"positions after a broken line are unknown: {shard.faults[0]}; fix or remove the line")
        place = dealing.sampler, num_rows, rank, len(shards), dealing.batch_rows
        rows = rows_of_rank(*place)
        if len(shard.index) > len(rows):
            raise UsageError(
                f"{shard.path} has {len(shard.index):,} rows, and rank {rank} of {len(shards)} has {len(rows):,} of "
                f"{num_rows:,} by --sampler {dealing.sampler}; name every shard once, in the order of the ranks, with "
                "the right --rows and --batch-rows"
            )
        rows = rows[: len(shard.index)]
        num_real = int((rows != PADDING).sum())  # padding stands at the end
        with (shard.data or shard.path).open("rb") as stream:
            there = zip(shard.offset[num_real:], shard.length[num_real:], strict=True)
            for row, (offset, length) in zip(repeated_rows(*place).tolist(), there, strict=False):  # it may end early
                stream.seek(offset)
                padding.append((row, stream.read(length - 1)))
        shard.index = array("q", rows[:num_real].tobytes())
        del shard.offset[num_real:], shard.length[num_real:]
    return padding


def rows_of_rank(sampler: Sampler, num_rows: int, rank: int, num_ranks: int, batch_rows: int = 1) -> NDArray[np.int64]:
    """Return the rows of a rank in its order, with -1 for padding.

    Only the sampler "batches" has *batch_rows* above 1.
    """
    import numpy as np  # slow, and the command line only asks for the names

    if sampler == "contiguous":
        share, extra = divmod(num_rows, num_ranks)
        first = rank * share + min(rank, extra)
        rows = np.arange(first, first + share + (rank < extra), dtype=np.int64)
        return np.append(rows, np.full(share + (extra > 0) - len(rows), PADDING, dtype=np.int64))
    width = num_ranks * batch_rows
    num_rounds = -(-num_rows // width)
    slots = np.arange(num_rounds * width, dtype=np.int64).reshape(num_rounds, num_ranks, batch_rows)[:, rank].ravel()
    if sampler == "interleaved":
        return slots[slots < num_rows]
    return np.where(slots < num_rows, slots, PADDING)


def repeated_rows(sampler: Sampler, num_rows: int, rank: int, num_ranks: int, batch_rows: int = 1) -> NDArray[np.int64]:
    """Return which rows the padding of a rank repeats, in its order."""
    import numpy as np

    rows = rows_of_rank(sampler, num_rows, rank, num_ranks, batch_rows)
    places = np.flatnonzero(rows == PADDING)
    if sampler == "contiguous":
        return np.full(len(places), num_rows - 1)
    slots = (places // batch_rows * num_ranks + rank) * batch_rows + places % batch_rows
    return (slots - num_rows) % num_rows
