"""Bytes of checkpoints and models from numbers alone.

The laws were measured on real checkpoints of DeepSpeed 0.19 and transformers 5.23 (the table is
in the tests): a ZeRO-3 one with Adam holds 12.000 bytes per trainable parameter (float32 masters
and two moments). ZeRO 1 and 2 add the working copy that the engine writes beside them; without
DeepSpeed the float32 weights are that copy.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_FIXED_BYTES = 9_000  # marker, scheduler, trainer's state without its log
_RANK_BYTES = 19_500  # random states (14.5 kB), and the frame of the rank's own files
_TENSOR_BYTES = 450  # name, shape and place of a tensor, in each file of model states


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of something, and the sum that gave them."""

    num_bytes: int
    formula: str


def checkpoint_size(
    *,
    trainable: int,
    frozen: int,
    num_tensors: int,
    zero_stage: int,
    precision: str,
    world_size: int,
    adapter: bool,
    beside_bytes: int = 0,
) -> Size:
    """Return the size of one full checkpoint: weights, optimizer states, bookkeeping.

    *trainable* and *frozen* count parameters, *num_tensors* the tensors that are written, and
    *beside_bytes* are those of config, tokenizer and logs. An adapter's checkpoint leaves the
    frozen base out.
    """
    work = DTYPE_BYTES[precision]
    kept_frozen = 0 if adapter else frozen
    if zero_stage == 0:
        per_param, note = 12, "4 B weights + 8 B moments"
        frozen_bytes = 4 * kept_frozen
    elif zero_stage == 3:
        per_param, note = 12, "4 B master + 8 B moments"
        frozen_bytes = work * kept_frozen
    else:
        per_param, note = 12 + work, f"4 B master + 8 B moments + {work} B working copy"
        frozen_bytes = work * kept_frozen
    num_lists = world_size if zero_stage == 3 else 1  # each ZeRO-3 rank writes all names and shapes
    book = _FIXED_BYTES + beside_bytes + _RANK_BYTES * world_size + _TENSOR_BYTES * num_tensors * num_lists
    formula = f"({note}) x {trainable:,} trainable"
    if kept_frozen:
        formula += f" + {frozen_bytes:,} B frozen"
    return Size(
        num_bytes=per_param * trainable + frozen_bytes + book,
        formula=f"{formula} + {book:,} B of {world_size} ranks' bookkeeping",
    )


def model_size(*, num_params: int, dtype: str, num_tensors: int = 0, beside_bytes: int = 0) -> Size:
    """Return the size of a consolidated model: its weight files, and what lies beside them."""
    width, book = DTYPE_BYTES[dtype], 3_000 + 150 * num_tensors + beside_bytes
    return Size(num_bytes=width * num_params + book, formula=f"{width} B x {num_params:,} + {book:,} B")
