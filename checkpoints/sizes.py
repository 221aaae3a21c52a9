"""Bytes of checkpoints and models from numbers alone.

The constants were measured on real checkpoints of DeepSpeed 0.19 and transformers 5.23 (the table
is in the tests). What each sharding engine holds for a parameter is a `StateBytes`; the engines of
`recipes.engines` say theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formats.tensors import DTYPES

_FIXED_BYTES = 9_000  # marker, scheduler, trainer's state without its log
_RANK_BYTES = 19_500  # random states (14.5 kB), and the frame of the rank's own files
_TENSOR_BYTES = 450  # name, shape and place of a tensor, in each file of model states


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of something, and the sum that gave them."""

    num_bytes: int
    formula: str


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a full checkpoint of one sharding engine holds for each parameter.

    *num_lists* counts the files that hold the names and shapes of all tensors.
    """

    trainable: float
    note: str
    frozen: int
    num_lists: int = 1


def checkpoint_size(
    *,
    states: StateBytes,
    trainable: int,
    frozen: int,
    num_tensors: int,
    world_size: int,
    adapter: bool,
    beside_bytes: int = 0,
) -> Size:
    """Return the size of one full checkpoint: weights, optimizer states, bookkeeping.

    *trainable* and *frozen* count parameters, *num_tensors* the tensors that are written, and
    *beside_bytes* are those of config, tokenizer and logs. An adapter's checkpoint leaves the
    frozen base out.
    """
    frozen_bytes = 0 if adapter else states.frozen * frozen
    book = _FIXED_BYTES + beside_bytes + _RANK_BYTES * world_size + _TENSOR_BYTES * num_tensors * states.num_lists
    formula = f"({states.note}) x {trainable:,} trainable"
    if frozen_bytes:
        formula += f" + {frozen_bytes:,} B frozen"
    return Size(
        num_bytes=int(states.trainable * trainable) + frozen_bytes + book,
        formula=f"{formula} + {book:,} B of {world_size} ranks' bookkeeping",
    )


def model_size(*, num_params: int, dtype: str, num_tensors: int = 0, beside_bytes: int = 0) -> Size:
    """Return the size of a consolidated model: weight files and what is beside."""
    width, book = DTYPES[dtype].num_bytes, 3_000 + 150 * num_tensors + beside_bytes
    return Size(num_bytes=width * num_params + book, formula=f"{width} B x {num_params:,} + {book:,} B")
