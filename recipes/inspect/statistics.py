"""Look at the rows of a recipe as a whole: lengths, padding, shared rows.

Lengths were counted, and remembered, when the recipe was planned; rows that two splits share are looked for here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...user_folders import cached
from ..data.packing import pack_refusal
from ..data.preparing import texts_of
from ..data.rows import read_rows
from ..data.statistics import Leaks, RowStatistics, correlation_of, histogram_of, padding_of, spread_of
from ..facts import ModelFacts, Prepared, Rows, SplitFacts
from ..schema import Recipe, StageSettings
from ..stage_kinds import RowUse
from ..tasks import task_of
from .lengths import Progress, RowsToCount, count_rows

_NUM_NAMED = 5


def read_statistics(
    recipe: Recipe,
    model: ModelFacts,
    splits: dict[str, SplitFacts],
    prepared: Sequence[Prepared],
    progress: Progress | None = None,
) -> list[RowStatistics]:
    """Return the statistics of the rows that each stage reads as tokens."""
    counted = count_rows(recipe, model, splits, prepared, progress)
    trained = [one for one, _ in counted if one.use == "train"]
    return [
        _statistics(one, values, trained, can_pack=_can_pack(one.settings, model))
        for one, values in counted
        if values["statistics"]["tokens"]
    ]


def _can_pack(settings: StageSettings, model: ModelFacts) -> bool:
    packed = replace(settings, data=replace(settings.data, packing="rows"))
    return task_of(settings.task).can_pack and pack_refusal(packed, model.config) is None


def _statistics(
    rows: RowsToCount, values: dict[str, Any], trained: Sequence[RowsToCount], *, can_pack: bool
) -> RowStatistics:
    found = values["statistics"]
    counts = {name: {length: num for length, num in found[name]} for name in ("tokens", "prompt", "response", "kept")}
    correlation, ratio = correlation_of(found["sums"])
    is_trained, data = rows.use != "predict", rows.settings.data
    size = data.max_tokens if can_pack else None
    batch = rows.settings.train.micro_batch if is_trained else rows.settings.predict.batch_rows
    return RowStatistics(
        stage=rows.stage,
        use=rows.use,
        split=rows.split,
        limit=rows.limit,
        spreads={name: spread_of(counts[name]) for name in ("tokens", "prompt", "response") if counts[name]},
        histogram=histogram_of(counts["tokens"]),
        cut_rows=0 if data.long_rows in ("refuse", "drop") else values["long"]["num"],
        cut_tokens=found["cut_tokens"],
        left_out_rows=found["left_out_rows"],
        left_out_tokens=found["left_out_tokens"],
        correlation=correlation,
        ratio=ratio,
        padding=padding_of(counts["kept"], batch or 1, size) if counts["kept"] and is_trained else None,
        leaks=tuple(_leaks(one, rows) for one in trained if rows.use != "train"),
    )


def _leaks(trained: RowsToCount, rows: RowsToCount) -> Leaks:
    """Count the rows whose texts are those of a row that is trained on."""
    names = [_columns(one) for one in (trained, rows)]
    key = [trained.digest, trained.num_rows, rows.digest, rows.num_rows, names]
    found = cached("leaks", key, lambda: _shared(trained, rows, *names))
    inputs, targets = (Rows(num=num, first=tuple(first)) for num, first in found)
    return Leaks(split=trained.split, num_rows=rows.num_rows, same_input=inputs, same_target=targets)


def _columns(rows: RowsToCount) -> tuple[list[str], list[str]]:
    """Return the columns with the input, and those with the target."""
    settings = rows.settings
    task = task_of(settings.task)

    def names(use: RowUse) -> set[str]:
        return {one.name for one in task.columns(settings, use)}

    inputs = names("predict") if settings.data.prompt else names("train")
    return sorted(inputs), sorted(names("train") - inputs)


def _shared(
    trained: RowsToCount,
    rows: RowsToCount,
    of_trained: tuple[list[str], list[str]],
    of_rows: tuple[list[str], list[str]],
) -> list[tuple[int, list[int]]]:
    seen = {digest: whole for digest, whole in _digests(trained, *of_trained)}
    found: list[tuple[int, list[int]]] = [(0, []), (0, [])]
    for number, (digest, whole) in enumerate(_digests(rows, *of_rows), 1):
        for at, is_shared in enumerate((digest in seen, seen.get(digest) == whole)):
            if is_shared:
                num, first = found[at]
                found[at] = (num + 1, [*first, number] if len(first) < _NUM_NAMED else first)
    return found


def _digests(rows: RowsToCount, inputs: Sequence[str], targets: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the digest of each row's input, and of input and target: 8 bytes each."""
    for number, row in enumerate(read_rows(Path(rows.path))):
        if number == rows.num_rows:
            return
        text = "\0".join(one.strip() for one in texts_of(row, inputs))
        yield _digest(text), _digest("\1".join([text, *(one.strip() for one in texts_of(row, targets))]))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")
