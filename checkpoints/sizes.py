"""Bytes of checkpoints and models from numbers alone.

The laws were measured on real DeepSpeed 0.19 checkpoints: a ZeRO-3 one with Adam holds 12.000
bytes per trainable parameter (float32 masters and two moments). ZeRO 1 and 2 add the working
copy that the engine writes beside them; without DeepSpeed the float32 weights are that copy.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_FIXED_BYTES_PER_RANK = 64 * 1024  # zip directories, pickles, rng states: measured 30 to 60 KB


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of something, and the sum that gave them."""

    num_bytes: int
    formula: str


def checkpoint_size(
    *, trainable: int, frozen: int, zero_stage: int, precision: str, world_size: int, adapter: bool
) -> Size:
    """Return the size of one full checkpoint: weights, optimizer states, bookkeeping.

    *trainable* and *frozen* count parameters. An adapter's checkpoint leaves the frozen base out.
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
        frozen_bytes = work * kept_frozen * 2 if zero_stage == 2 else work * kept_frozen
    total = per_param * trainable + frozen_bytes + _FIXED_BYTES_PER_RANK * world_size
    formula = f"({note}) x {trainable:,} trainable"
    if kept_frozen:
        formula += f" + {frozen_bytes:,} B frozen"
    return Size(num_bytes=total, formula=f"{formula} + 64 KiB x {world_size} ranks")


def model_size(*, num_params: int, dtype: str) -> Size:
    """Return the size of a consolidated model's weight files."""
    width = DTYPE_BYTES[dtype]
    return Size(num_bytes=width * num_params + 64 * 1024, formula=f"{width} B x {num_params:,} + 64 KiB")
