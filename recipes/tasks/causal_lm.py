"""Causal language modelling.

The model reads a prompt and learns, or answers, what follows it. With an empty `data.prompt` it learns plain text
instead, and has nothing to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import Fault
from ...predictions.metrics import DEFAULT_METRICS
from ..data.conversations import UNANSWERED, encode_conversations, encode_questions
from ..data.encode import Encoded, encode_prompts, encode_rows
from ..data.packing import pack_refusal
from ..data.prompts import MESSAGES, prompt_columns, prompt_faults, unread_faults
from ..data.row_faults import name_rows, row_refusals, row_warnings
from ..data.rows import Row
from ..facts import Inputs
from ..model_kinds import max_positions
from ..plan import Stage
from ..schema import Predict, StageSettings
from ..stage_kinds import RowUse
from . import Column, TaskSpec

# Keys that decide what is asked of an engine, and what is made of its answer.
GENERATED = (
    *("predict.max_characters", "predict.length_ratio", "predict.length_ratio_of", "predict.samples"),
    *("predict.chunk_tokens", "predict.chunk_sentences"),
)
_DRAWING = ("temperature", "top_k", "top_p")
_TOKEN_BYTES, _TOP_BYTES = 24, 24  # of a token's id and log-probability in JSON, and of one of the likeliest


def _columns(settings: StageSettings, use: RowUse) -> list[Column]:
    columns = settings.data.columns
    if settings.data.prompt == MESSAGES:
        return [Column(named_by="data.columns.messages", name=columns.messages, may_nest=True)]
    target = Column(named_by="data.columns.target", name=columns.target)
    read = [Column(named_by=key, name=name) for key, name in prompt_columns(settings.data)]
    if use == "score":
        return [target]
    if use == "predict":
        return read
    return [*read, target] if settings.data.prompt else [Column(named_by="data.columns.text", name=columns.text)]


def _faults(settings: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    data = settings.data
    if "predict" in uses and not data.prompt:
        problem, hint = "is empty, so a predict stage has nothing to answer", "leave the predict stage out"
        if "train" in uses:
            problem = f"is empty, so there are no answers to measure {settings.checkpoints.metric} of"
            hint = "set checkpoints.metric=eval_loss"
        yield Fault(key="data.prompt", problem=problem, hint=f"write a template, or {hint}")
    yield from prompt_faults(data)
    yield from unread_faults(data, "causal_lm", ["max_target_tokens"], "counts prompt and answer in data.max_tokens")


def _longest(settings: StageSettings, use: RowUse, config: Mapping[str, Any]) -> int | None:
    if use != "predict":
        return settings.data.max_tokens
    positions = settings.predict.vllm.limit(max_positions(config))
    return None if positions is None else max(1, positions - settings.predict.held_tokens)


def _encode(
    settings: StageSettings, use: RowUse, rows: Sequence[Row], tokenizer: Any, longest: int | None
) -> list[Encoded]:
    is_said = settings.data.prompt == MESSAGES
    if use == "predict":
        ask = encode_questions if is_said else encode_prompts
        return ask(settings.data, rows, tokenizer, longest)
    encode = encode_conversations if is_said else encode_rows
    return encode(settings.data, rows, tokenizer)


def _refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from row_refusals(stage, inputs)
    yield from stop_refusals(stage, inputs)
    if "train" in stage.splits and (reason := pack_refusal(stage.settings, inputs.model.config)):
        yield reason
    is_training = "train" in stage.splits
    scored = stage.splits.get("predict" if is_training else "score")  # a training measures what it predicts
    asked = [one for one in inputs.lengths if scored and one.use == "predict" and one.split == scored.name]
    for lengths in asked[:1]:
        if rows := lengths.remarks.get(UNANSWERED):
            split = inputs.splits[lengths.split]
            yield (
                f"{name_rows(split, lengths, rows, 'without an answer at their end', 'conversations')}, and nothing to "
                "compare a prediction with; end them with what the assistant says, or "
                + ("set checkpoints.metric=eval_loss" if is_training else f"leave stage {stage.name!r} out")
            )


def _warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from row_warnings(stage, inputs)
    yield from drawing_warnings(stage)
    data, train = stage.settings.data, stage.settings.train
    if stage.splits and data.prompt and not prompt_columns(data):
        yield (
            f"data.prompt {data.prompt[:60]!r} reads no column, so that every row has the same prompt; put names of "
            "columns in braces, such as '{input} =>'"
        )
    if "train" in stage.splits and data.packing != "none" and train.neftune_alpha:
        yield (
            f"stage {stage.name!r}: train.neftune_alpha is noise within alpha / sqrt(tokens x width) of an example; "
            f"with data.packing={data.packing} that has up to {data.max_tokens} tokens: rows get less noise"
        )


def stop_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield which token of `predict.stop_ids` the model does not have."""
    size, _ = word_outputs(inputs.model.config)
    for token in stage.settings.predict.stop_ids if "predict" in stage.splits else ():
        if size and not 0 <= token < size:
            yield f"stage {stage.name!r}: predict.stop_ids has {token}, and the model's tokens are 0 to {size - 1:,}"


def drawing_warnings(stage: Stage) -> Iterator[str]:
    """Yield which keys of drawing do nothing, since the likeliest tokens are taken."""
    predict = stage.settings.predict
    if "predict" in stage.splits and not predict.sample:
        drawn = [name for name in _DRAWING if getattr(predict, name) != getattr(Predict(), name)]
        if drawn:
            yield f"stage {stage.name!r}: predict.{drawn[0]} does nothing without predict.sample=true"


def word_outputs(config: Mapping[str, Any]) -> tuple[int, str]:
    """Return the outputs of a model that says words: its vocabulary."""
    vocabulary = config.get("vocab_size")
    return (vocabulary if isinstance(vocabulary, int) else 0), "words"


def row_bytes(settings: StageSettings) -> tuple[int, str]:
    """Return the bytes of one row of generated text.

    Its other samples and its log-probabilities count.
    """
    spec = settings.predict
    tokens, samples = spec.max_new_tokens, 1 + (spec.samples if spec.samples > 1 else 0)
    each = 4 * samples + (_TOKEN_BYTES + _TOP_BYTES * spec.keep_logprobs if spec.keep_logprobs else 0)
    return 100 + each * tokens, f"(100 B + {each} B x {tokens} tokens)"


TASK = TaskSpec(
    name="causal_lm",
    version=3,
    runtime="sousbatch.jobs.tasks.causal_lm",
    model_class="AutoModelForCausalLM",
    kinds=("decoder",),
    peft_type="CAUSAL_LM",
    head_modules=("lm_head",),
    can_pack=True,
    generates=True,
    decides=(
        *("data.columns.input", "data.columns.context", "data.columns.text", "data.prompt", "data.system"),
        *("data.columns.messages", "data.examples"),
        *("data.pad_input_to", "data.separator", "data.long_rows"),
        *GENERATED,
        *("model.add_tokens", "model.trust_remote_code"),
    ),
    reads=("data",),
    metrics=DEFAULT_METRICS,
    faults=_faults,
    columns=_columns,
    longest=_longest,
    encode=_encode,
    refusals=_refusals,
    warnings=_warnings,
    outputs=word_outputs,
    row_bytes=row_bytes,
)
