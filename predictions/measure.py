"""Measure predictions in blocks of rows, and sum what is measured.

One process does it, or several. No more than a few blocks are in memory. Sums are exact: neither the blocks nor the
processes change a score.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from math import fsum, isfinite
from typing import TYPE_CHECKING, Any, Union, cast

from ..errors import RunError, UsageError
from .metrics import METRICS, Answers, Metric
from .metrics.tokenizers import Tokenizer
from .rows import RAW_PREDICTION, PredictionRow

if TYPE_CHECKING:
    from concurrent.futures import Future

Column = Union["array[float]", Sequence[str | None]]  # noqa: UP007 - an array takes no index when it runs
Columns = dict[str, dict[str, Column]]  # of each metric, by the names of metrics
Scores = dict[str, float]
_Found = tuple[Columns, Columns, Columns]
_Call = Callable[[Sequence["Case"]], _Found]
_BLOCK_ROWS, _BLOCK_CHARACTERS = 512, 1 << 22
_ALONE_BLOCKS = 8  # starting the processes takes longer than to measure fewer


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prediction, and what it is measured against.

    *input* is None where the row has none.
    """

    row: PredictionRow
    target: Any
    input: Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A block of cases with the columns of their metrics.

    *before* has those of the texts before `predict.post`, *baseline* those of the copied inputs.
    """

    cases: Sequence[Case]
    model: Columns
    before: Columns
    baseline: Columns


@dataclass(kw_only=True)
class Tally:
    """The sums of the columns over all blocks so far.

    They are exact parts, or counts of texts.
    """

    num_rows: int = 0
    sums: dict[str, dict[str, list[float] | Counter[str]]] = field(default_factory=dict)

    def add(self, columns: Columns, num_rows: int) -> None:
        """Add a block."""
        self.num_rows += num_rows
        for metric, by_name in columns.items():
            sums = self.sums.setdefault(metric, {})
            for name, column in by_name.items():
                before = sums.get(name)
                if before is not None and isinstance(before, list) != isinstance(column, array):
                    raise UsageError(f"metric {metric!r} returned both numbers and texts as {name!r}")
                if isinstance(column, array):
                    sums[name] = exact_parts([*(before or ()), *column])
                else:
                    counts: Counter[str] = Counter() if before is None else cast("Counter[str]", before)
                    counts.update(text for text in column if text is not None)
                    sums[name] = counts

    def scores(self, metrics: Mapping[str, Metric]) -> Scores:
        """Return the scores by name."""
        found: Scores = {}
        for name, metric in metrics.items():
            if name in self.sums:
                sums = {column: fsum(one) if isinstance(one, list) else one for column, one in self.sums[name].items()}
                found |= scores_of(name, metric, sums, self.num_rows)
        return found


def scores_of(name: str, metric: Metric, sums: Mapping[str, Any], num_rows: float) -> Scores:
    """Return the scores of a metric from the sums of its columns.

    The sums are over *num_rows* rows.
    """
    total = metric.total
    if total is None:
        return {column: value / num_rows for column, value in sums.items()}
    return cast("Scores", _guarded(name, lambda: dict(total(sums))))


def scores_of_row(metrics: Mapping[str, Metric], columns: Columns, place: int) -> Scores:
    """Return the scores of the row at *place* of a block.

    They are those of a file with this row alone.
    """
    found: Scores = {}
    for name, by_name in columns.items():
        values = {column: values[place] for column, values in by_name.items()}
        sums = {
            column: one if isinstance(one, float) else Counter([one] * (one is not None))
            for column, one in values.items()
        }
        found |= scores_of(name, metrics[name], sums, 1)
    return found


def exact_parts(values: Sequence[float]) -> list[float]:
    """Return a few numbers whose sum is exactly that of finite *values*.

    Each is the rounded rest that those before it leave (`math.fsum` rounds once).
    """
    parts: list[float] = []
    while rest := fsum([*values, *(-part for part in parts)]):
        parts.append(rest)
    return parts


def measure(
    cases: Iterable[Case], metrics: Sequence[str], tokenizer: Tokenizer, *, workers: int = 1, baseline: bool = True
) -> Iterator[Measured]:
    """Yield blocks of measured cases in order.

    With *workers* above 1 many rows are shared by so many processes. Without *baseline* the copied inputs are not
    measured.

    Raises:
        UsageError: a metric failed, or a row lacks what it needs.
        RunError: a process was killed.
    """
    call = partial(_columns, metrics=tuple(metrics), tokenizer=tokenizer, baseline=baseline)
    blocks = _blocks(cases)
    first = list(islice(blocks, _ALONE_BLOCKS)) if workers > 1 else []
    if workers > 1 and len(first) == _ALONE_BLOCKS:
        yield from _in_processes(chain(first, blocks), call, workers)
    else:
        yield from (_block(block, call(block)) for block in chain(first, blocks))


def _in_processes(blocks: Iterable[Sequence[Case]], call: _Call, workers: int) -> Iterator[Measured]:
    import multiprocessing  # 20 ms, which commands that only show scores do not spend
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # A fork would copy locks that threads of numpy or a tracker hold.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Sequence[Case], Future[_Found]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        try:
            for block in blocks:
                waiting.append((block, pool.submit(call, block)))
                if len(waiting) > 2 * workers:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        except BrokenProcessPool as error:
            # Before Python 3.11.5 the thread that sends blocks waits for ever for a reader that was killed
            # (python/cpython#94777); with the last reader closed it ends. Later ones close it themselves, and
            # two threads that close one descriptor at once could close one that somebody else has just opened.
            if sys.version_info < (3, 11, 5):
                with suppress(AttributeError, OSError):
                    pool._call_queue._reader.close()  # type: ignore[attr-defined]
            advice = "start it again with fewer --workers"
            raise RunError("a process that scores was killed, by lack of memory perhaps", advice=advice) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(pair: tuple[Sequence[Case], Future[_Found]]) -> Measured:
    block, future = pair
    return _block(block, future.result())


def _block(cases: Sequence[Case], columns: _Found) -> Measured:
    model, before, baseline = columns
    return Measured(cases=cases, model=model, before=before, baseline=baseline)


def _end_with_parent() -> None:
    """End this process when its parent dies.

    It waits for work on a pipe that it holds open itself, and would wait for ever.
    """
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _blocks(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Yield blocks of 512 rows, or of fewer long ones."""
    block, size = list[Case](), 0
    for case in cases:
        block.append(case)
        size += sum(len(text) for text in (case.row.prediction, case.target, case.input) if isinstance(text, str))
        if len(block) == _BLOCK_ROWS or size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _columns(cases: Sequence[Case], *, metrics: Sequence[str], tokenizer: Tokenizer, baseline: bool) -> _Found:
    """Return the columns of a block.

    They are those of the model, of its texts before `predict.post`, and of the copied inputs. Without *baseline* the
    last are empty.
    """
    answers = Answers(
        rows=[case.row for case in cases],
        targets=[case.target for case in cases],
        inputs=[case.input for case in cases],
        tokenizer=tokenizer,
    )
    model: Columns = {}
    others: dict[str, Columns] = {"before": {}, "baseline": {}}
    texts = {"before": [case.row.fields.get(RAW_PREDICTION, case.row.prediction) for case in cases]}
    if baseline:
        texts["baseline"] = ["" if case.input is None else case.input for case in cases]
    is_same = not any(RAW_PREDICTION in case.row.fields for case in cases)
    replaced = {
        who: replace(
            answers,
            rows=[PredictionRow(index=case.row.index, prediction=text) for case, text in zip(cases, all_, strict=True)],
        )
        for who, all_ in texts.items()
    }
    for name in metrics:
        metric = METRICS.load(name)
        _check_needs(name, metric, answers)
        model[name] = _of_metric(name, metric, answers)
        for who, other in replaced.items() if not metric.fields else ():
            if who == "before" and is_same:
                others[who][name] = model[name]
            elif who == "before" or metric.has_baseline:
                others[who][name] = _of_metric(name, metric, other)
    return model, others["before"], others["baseline"]


def _of_metric(name: str, metric: Metric, answers: Answers) -> dict[str, Column]:
    found = _guarded(name, lambda: dict(metric.score(answers)))
    return {column: _checked(name, column, values, answers) for column, values in found.items()}


def _checked(name: str, column: str, values: Any, answers: Answers) -> Column:
    """Return a column as an array, or as the list of its texts."""
    num_rows = len(answers.rows)
    values = values.tolist() if hasattr(values, "tolist") else values  # an array of numpy or torch
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != num_rows:
        has = f"{len(values)} values" if isinstance(values, Sequence) and not isinstance(values, str) else repr(values)
        raise UsageError(
            f"metric {name!r} returned {has} as {column!r} for {num_rows} rows; it returns a list with a value for "
            "each row, and a score that is not their mean is made by the metric's `total` (docs/extending.md)"
        )
    if all(one is None or isinstance(one, str) for one in values):
        if values and METRICS.load(name).total is None:
            raise UsageError(
                f"metric {name!r} returned texts as {column!r}, such as {values[0]!r}, and has no `total` that makes a "
                "number of them (docs/extending.md)"
            )
        return values
    try:
        numbers = array("d", values)
    except (TypeError, OverflowError) as error:
        wrong = next(one for one in values if not isinstance(one, (int, float)))
        raise UsageError(f"metric {name!r} returned {wrong!r} as {column!r}, which is no number") from error
    if not all(map(isfinite, numbers)):
        place = next(place for place, one in enumerate(numbers) if not isfinite(one))
        index = answers.rows[place].index
        raise UsageError(f"metric {name!r} returned {numbers[place]} as {column!r} for the row with index {index}")
    return numbers


def _check_needs(name: str, metric: Metric, answers: Answers) -> None:
    if "input" in metric.needs and None in answers.inputs:
        index = answers.rows[answers.inputs.index(None)].index
        raise UsageError(f"metric {name!r} needs the input of each row; row {index} has none")
    for row in answers.rows if metric.fields else ():
        if missing := [field for field in metric.fields if field not in row.fields]:
            has = ", ".join(row.fields) or "none"
            raise UsageError(
                f"metric {name!r} needs the field {missing[0]!r} of a prediction; row {row.index} has {has}"
            )


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # whatever a third-party metric raises, its name is what a user can act on
        what = str(error) if isinstance(error, UsageError) else f"failed: {type(error).__name__}: {error}"
        raise UsageError(f"metric {name!r} {what}") from error
