"""Sequence to sequence.

An encoder reads the prompt, and a decoder learns, or writes, the target. It is for BART, T5 and their kin.
`data.prompt` is the template of what the encoder reads; a T5 that was trained with prefixes gets them there, such as
"summarize: {input}".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import Fault
from ..data.encode import Encoded
from ..data.framed import encode_pairs, encode_sources, longest_source
from ..data.framed_faults import framed_refusals, framed_warnings
from ..data.prompts import plain_prompt_faults, prompt_columns
from ..data.rows import Row
from ..facts import Inputs
from ..model_kinds import max_positions
from ..plan import Stage
from ..schema import StageSettings
from ..stage_kinds import RowUse
from . import Column, TaskSpec
from .causal_lm import GENERATED, drawing_warnings, row_bytes, stop_refusals, word_outputs


def _columns(settings: StageSettings, use: RowUse) -> list[Column]:
    target = Column(named_by="data.columns.target", name=settings.data.columns.target)
    read = [Column(named_by=key, name=name) for key, name in prompt_columns(settings.data)]
    return {"score": [target], "predict": read}.get(use, [*read, target])


def _faults(settings: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    yield from plain_prompt_faults(settings.data, "seq2seq")
    if settings.predict.chunk_tokens and "predict" in uses:
        problem = "continues a prompt, and a decoder of an encoder-decoder has none"
        yield Fault(key="predict.chunk_tokens", problem=problem, hint="leave it out, and set predict.max_new_tokens")


def _encode(
    settings: StageSettings, use: RowUse, rows: Sequence[Row], tokenizer: Any, longest: int | None
) -> list[Encoded]:
    if use == "predict":
        return encode_sources(settings.data, rows, tokenizer, longest or settings.data.max_tokens)
    return encode_pairs(settings.data, rows, tokenizer)


def _refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from framed_refusals(stage, inputs)
    yield from stop_refusals(stage, inputs)
    positions, answer = max_positions(inputs.model.config, "decoder"), stage.settings.predict.max_new_tokens
    if "predict" in stage.splits and positions is not None and answer >= positions:  # the start token takes one
        yield (
            f"stage {stage.name!r}: predict.max_new_tokens={answer} is more than the {positions - 1:,} tokens that the "
            f"model's decoder can write; set predict.max_new_tokens={positions - 1}"
        )


def _warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from framed_warnings(stage, inputs, empty="target")
    yield from drawing_warnings(stage)


TASK = TaskSpec(
    name="seq2seq",
    version=2,
    runtime="sousbatch.jobs.tasks.seq2seq",
    model_class="AutoModelForSeq2SeqLM",
    kinds=("encoder-decoder",),
    peft_type="SEQ_2_SEQ_LM",
    head_modules=("lm_head",),
    generates=True,
    decides=(
        *("data.columns.input", "data.columns.context", "data.columns.text", "data.prompt"),
        *("data.max_tokens", "data.long_rows"),
        *GENERATED,
        *("model.add_tokens", "model.trust_remote_code"),
    ),
    reads=("data",),
    metrics=("rouge",),
    faults=_faults,
    columns=_columns,
    longest=longest_source,
    encode=_encode,
    refusals=_refusals,
    warnings=_warnings,
    outputs=word_outputs,
    row_bytes=row_bytes,
)
