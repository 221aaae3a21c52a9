"""Decide which rows share an example: blocks of plain text, and packs of rows.

Planning counts examples by the same functions that the jobs make them with.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..schema import StageSettings
from ..stage_kinds import RowUse

# Rows are packed within windows of so many, which a shuffle fills: packs are within a hundredth of full, and a window's
# work stays small.
_WINDOW = 8192
# Model types of transformers that keep the rows of a pack apart: their losses and gradients were found to be those of
# the rows one by one (tests/jobs/tasks/test_packed.py). Recurrent models carry a state from row to row, ALiBi (bloom,
# mpt, falcon) measures distances over the whole pack, and opt and biogpt take their positions from the mask.
PACKABLE = frozenset(
    (
        *("apertus", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm"),
        *("glm4", "gpt2", "gpt_neo", "gpt_neox", "gptj", "granite", "granitemoe", "helium"),
        *("hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmoe"),
        *("persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
    )
)


def for_use(settings: StageSettings, use: RowUse) -> StageSettings:
    """Return *settings* with the packing that rows of this use get.

    Rows to measure the loss on stay apart, so that their loss can be compared with that of other runs; plain text is
    cut into blocks there too, since its rows may be of any length. Prompts always stay apart.
    """
    packing = settings.data.packing
    if packing == "none" or use == "train" or (use == "eval" and packing == "blocks"):
        return settings
    return replace(settings, data=replace(settings.data, packing="none"))


def num_blocks(num_tokens: int, size: int) -> int:
    """Return the number of blocks of at most *size* tokens.

    A last block of one token has nothing to learn and is none.
    """
    return num_tokens // size + (num_tokens % size > 1)


def packs_of(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the rows of each pack, of at most *size* tokens, by their positions.

    The same lengths give the same packs. Within a window of shuffled rows the longest goes first, each into the fullest
    pack that has room for it (best-fit decreasing; at most 11/9 of the fewest packs possible, Johnson 1974).
    """
    order = array("q", range(len(lengths)))
    random.Random(0).shuffle(order)
    for start in range(0, len(order), _WINDOW):
        yield from _packed(sorted(order[start : start + _WINDOW], key=lambda row: (-lengths[row], row)), lengths, size)


def _packed(rows: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # tokens that are free -> packs with so many
    free = 0  # bit n is set where some pack has n tokens free
    for row in rows:
        needed = lengths[row]
        fitting = free >> needed
        room = needed + (fitting & -fitting).bit_length() - 1 if fitting else size
        if fitting:
            pack = with_room[room].pop()
            if not with_room[room]:
                free &= ~(1 << room)
            packs[pack].append(row)
        else:
            pack = len(packs)
            packs.append([row])
        with_room.setdefault(room - needed, []).append(pack)
        free |= 1 << (room - needed)
    return packs


def pack_refusal(settings: StageSettings, config: Mapping[str, Any]) -> str | None:
    """Return why rows cannot be packed for a model of this config, or None."""
    kind = config.get("model_type")
    if settings.data.packing != "rows":
        return None
    if settings.model.trust_remote_code and config.get("auto_map"):
        return (
            "data.packing=rows needs a model that keeps the rows of a pack apart, and nothing is known of a model with "
            "code of its own; set data.packing=none, and train.group_by_length=true to save padding"
        )
    if kind not in PACKABLE:
        return (
            f"data.packing=rows needs a model that keeps the rows of a pack apart, and model type {kind!r} was not "
            f"found to; known: {', '.join(sorted(PACKABLE))}; set data.packing=none, and train.group_by_length=true to "
            "save padding"
        )
    return None
