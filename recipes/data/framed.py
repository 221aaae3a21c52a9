"""Encode texts between a tokenizer's own special tokens.

Models that read a text as a whole expect it so: an encoder's text, and the target of an encoder-decoder. A text that is
cut keeps these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import UsageError
from ..model_kinds import max_positions
from ..schema import Data as DataSpec
from ..schema import StageSettings
from ..stage_kinds import RowUse
from .encode import Encoded, render_prompt
from .rows import Row


class FramedText(NamedTuple):
    """The token ids of one text.

    It also says how many it has without a cut, and whether these are too many.
    """

    ids: list[int]
    num_tokens: int
    is_long: bool


def encode_texts(
    spec: DataSpec, texts: Sequence[str], tokenizer: Any, longest: int, *, is_target: bool = False
) -> list[FramedText]:
    """Return *texts* as token ids.

    Those above *longest* are cut where `data.long_rows` names a side. A target ends with the end token, and a text
    without any token becomes the end token, since a model has to read something.
    """
    if not texts:
        return []
    key = "text_target" if is_target else "text"
    try:
        found = tokenizer(**{key: ["", *texts]})["input_ids"]
    except KeyError as error:
        if getattr(tokenizer, "tgt_lang", error) is not None:
            raise
        raise UsageError(  # an M2M100's; others take a language of their own
            "it does not know the language of the targets; write src_lang and tgt_lang into the tokenizer_config.json "
            "of a copy, and name that in model.tokenizer"
        ) from error
    frame, end = found[0], tokenizer.eos_token_id
    if is_target and end is not None and end not in frame:  # KoBART's tokenizer adds none
        frame, found = [*frame, end], [[*ids, end] for ids in found]
    if end is not None:
        found = [ids or [end] for ids in found]
    return [FramedText(_cut(spec, ids, longest, frame), len(ids), len(ids) > longest) for ids in found[1:]]


def _cut(spec: DataSpec, ids: list[int], longest: int, frame: Sequence[int]) -> list[int]:
    """Cut what stands within *frame*, the tokens of an empty text."""
    if len(ids) <= longest or spec.long_rows not in ("cut_left", "cut_right"):
        return ids
    before = next((at for at, pair in enumerate(zip(frame, ids, strict=False)) if pair[0] != pair[1]), len(frame))
    after = len(frame) - before
    inner, room = ids[before : len(ids) - after], max(0, longest - len(frame))
    inner = inner[:room] if spec.long_rows == "cut_right" else inner[len(inner) - room :]
    return [*ids[:before], *inner, *ids[len(ids) - after :]][:longest]


def longest_source(settings: StageSettings, use: RowUse, config: Mapping[str, Any]) -> int:
    """Return the most tokens that a prompt may have.

    The model's positions limit those that are answered.
    """
    positions = max_positions(config, "encoder") if use == "predict" else None
    return min(settings.data.max_tokens, positions or settings.data.max_tokens)


def encode_sources(spec: DataSpec, rows: Sequence[Row], tokenizer: Any, longest: int) -> list[Encoded]:
    """Return the filled templates of *rows*, as an encoder reads them."""
    texts = [render_prompt(spec, row, tokenizer) for row in rows]
    return [Encoded(one.ids, (), one.num_tokens, one.is_long) for one in encode_texts(spec, texts, tokenizer, longest)]


def encode_pairs(spec: DataSpec, rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    """Return *rows* as sources with their targets, each cut by its own key.

    The ids are those of the source, then those of the target, which are learned.
    """
    texts = [str(row[spec.columns.target]) for row in rows]
    sources = encode_sources(spec, rows, tokenizer, spec.max_tokens)
    targets = encode_texts(spec, texts, tokenizer, spec.max_target_tokens, is_target=True)
    return [
        Encoded(
            [*source.ids, *target.ids],
            ((len(source.ids), len(source.ids) + len(target.ids)),),
            source.num_tokens,
            source.is_long or target.is_long,
            not text.strip(),
            num_target_tokens=target.num_tokens,
        )
        for source, target, text in zip(sources, targets, texts, strict=True)
    ]
