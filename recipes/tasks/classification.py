"""Classification: the model says which of a few labels a text has.

The labels are those of the target column in the rows that train. Planning collects them into the model's config, so
that the model that comes out names them itself. `data.prompt` is the template of the text; for pairs of sentences it
has both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...errors import Fault
from ...predictions.metrics.labels import label_text
from ..data.encode import Encoded
from ..data.framed import encode_sources, longest_source
from ..data.framed_faults import framed_refusals, framed_warnings
from ..data.prompts import plain_prompt_faults, prompt_columns, unread_faults
from ..data.rows import Row
from ..facts import Inputs
from ..labels import labels_in
from ..plan import Stage
from ..schema import StageSettings
from ..stage_kinds import RowUse
from . import Column, TaskSpec

PROBABILITIES = "probabilities"
_MANY = 50  # labels; more are likelier to be texts


def _columns(settings: StageSettings, use: RowUse) -> list[Column]:
    target = Column(named_by="data.columns.target", name=settings.data.columns.target)
    read = [Column(named_by=key, name=name) for key, name in prompt_columns(settings.data)]
    return {"score": [target], "predict": read}.get(use, [*read, target])


def _faults(settings: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    yield from plain_prompt_faults(settings.data, "classification")
    yield from unread_faults(settings.data, "classification", ["max_target_tokens"], "answers with labels")
    weights = settings.train.class_weights
    if isinstance(weights, dict) and not all(value > 0 for value in weights.values()):
        hint = "balanced, or a positive number for each label, such as {good: 1, bad: 3}"
        yield Fault(key="train.class_weights", problem=f"is {weights!r}", hint=hint)
    if "num_labels" in settings.model.config:
        hint = "leave it out: the labels are those of the rows that train"
        yield Fault(key="model.config", problem="names num_labels", hint=hint)


def _encode(
    settings: StageSettings, use: RowUse, rows: Sequence[Row], tokenizer: Any, longest: int | None
) -> list[Encoded]:
    data = settings.data
    found = encode_sources(data, rows, tokenizer, longest or data.max_tokens)
    if use == "predict":
        return found
    labels = [label_text(row[data.columns.target]) for row in rows]
    return [replace(one, label=label) for one, label in zip(found, labels, strict=True)]


def _refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from framed_refusals(stage, inputs)
    weights = stage.settings.train.class_weights
    if stage.batch is not None and isinstance(weights, Mapping) and (unknown := weights.keys() - set(inputs.labels)):
        quotes = "; YAML reads yes, no, on and off as true or false: write them in quotes"
        yield (
            f"train.class_weights names {', '.join(map(repr, sorted(unknown)))}, which is no label of the rows that "
            f"train; known: {', '.join(map(repr, inputs.labels))}{quotes if unknown <= {'true', 'false'} else ''}"
        )


def _warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from framed_warnings(stage, inputs, empty="text")
    if stage.batch is None:
        return
    if len(inputs.labels) > _MANY:
        yield (
            f"stage {stage.name!r}: column {stage.settings.data.columns.target!r} has {len(inputs.labels):,} labels; "
            "check data.columns.target if it should have few"
        )
    alike: dict[str, list[str]] = {}
    for label in inputs.labels:
        alike.setdefault("".join(label.casefold().split()), []).append(label)
    for same in (labels for labels in alike.values() if len(labels) > 1):
        yield f"stage {stage.name!r}: labels {', '.join(map(repr, same))} differ by blanks or capitals alone"


def _outputs(config: Mapping[str, Any]) -> tuple[int, str]:
    return len(labels_in(config)) or 2, "labels"


def _row_bytes(settings: StageSettings) -> tuple[int, str]:
    num_labels = len(labels_in(settings.model.config)) or 2
    return 80 + 10 * num_labels, f"(80 B + 10 B x {num_labels} labels)"


TASK = TaskSpec(
    name="classification",
    version=1,
    runtime="sousbatch.jobs.tasks.classification",
    model_class="AutoModelForSequenceClassification",
    kinds=("encoder", "decoder"),
    peft_type="SEQ_CLS",
    head_modules=("classifier", "score"),
    has_new_head=True,
    has_labels=True,
    generates=False,
    decides=(
        *("data.columns.input", "data.columns.context", "data.columns.text", "data.prompt"),
        *("data.max_tokens", "data.long_rows"),
        *("model.add_tokens", "model.trust_remote_code", "model.attention"),
    ),
    reads=("data",),
    fields=(PROBABILITIES,),
    metrics=("accuracy", "macro_f1"),
    faults=_faults,
    columns=_columns,
    longest=longest_source,
    encode=_encode,
    refusals=_refusals,
    warnings=_warnings,
    outputs=_outputs,
    row_bytes=_row_bytes,
)
