"""Define what a consolidation can be asked for.

Recipes, the command line and jobs share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..formats.tensors import FloatDtype

if TYPE_CHECKING:
    from ...remote import Place

Overflow = Literal["refuse", "clamp", "bfloat16"]

# The recipe's keys and the command's options show these; a gigabyte is 10^9 bytes.
DTYPE_HELP = "type of the weights"
MAX_SHARD_GB = 5.0
MAX_SHARD_HELP = "largest weight file (1 GB = 10^9 bytes)"
OVERFLOW_HELP = "what to do with weights beyond float16's range"


@dataclass(frozen=True, kw_only=True)
class ConsolidateOptions:
    """Options of a consolidation.

    Attributes:
        num_workers: threads that read, cast, write and hash, each with 8 MB.
        overflow: finite values beyond *dtype*: refuse them, clamp them to its limits, or write
            the whole model in bfloat16.
        is_merged: write an adapter's model, not the adapter; implied by *base_dir*.
        base_dir: the model that the adapter was trained on. Without it the frozen base within the
            checkpoint is taken, else the folder that the adapter's configuration names.
        base_model: what the training started from, by id or folder; the card names it if it has a hub id.
        copy_from: the folder whose config.json and tokenizer go along, the dtype set; what it
            lacks of a merged model comes from the base.
        has_statistics: take the digest of every tensor, count the values that become zero, and compare all that
            was read with the checksums in the checkpoint's files.
        is_compared: compare the names with those that the class in config.json loads, and take the part
            that fits.
        is_verified: read back what was written, too (see verify.py).
    """

    dtype: FloatDtype = "float16"
    max_shard_bytes: int = int(MAX_SHARD_GB * 1e9)
    num_workers: int = 1
    overflow: Overflow = "refuse"
    is_merged: bool = False
    base_dir: Place | None = None
    base_model: str = ""
    copy_from: Place | None = None
    has_statistics: bool = True
    is_compared: bool = False
    is_verified: bool = False

    @property
    def checks_source(self) -> bool:
        return self.has_statistics or self.is_verified
