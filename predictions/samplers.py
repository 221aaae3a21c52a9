"""Say which rows each rank had, by the order of a named sampler.

Ranks get the same number of rows by repeating some, as padding. Padding stands at the end of a rank's rows, and is
dropped by its place: a repeated row may be answered in other words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Sampler = Literal["contiguous", "interleaved", "distributed", "batches"]
SAMPLERS: dict[Sampler, str] = {
    "contiguous": "one part after the other, as accelerate's split_between_processes",
    "interleaved": "in turn, without padding",
    "distributed": "in turn with padding, as PyTorch's DistributedSampler (shuffle=False)",
    "batches": "batches in turn, as accelerate's BatchSamplerShard prepares a data loader",
}
PADDING = -1


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
