"""Join the predictions of several models into one file, row by row.

| way           | what is joined                                                                             |
|---------------|--------------------------------------------------------------------------------------------|
| probabilities | the probabilities of the labels, or their logits; labels are matched by name                |
| spans         | the scores of the spans in `n_best`, and of no answer                                      |
| risk          | texts: the one that is most like the others by a metric (minimum Bayes risk)               |
| majority      | texts or labels: the one that most models gave                                             |

Means are weighted, in double precision. Of equals the one of the model that was named first is taken, of its labels the
first one. Logits of probabilities are their logarithms, which are the model's logits less one number for each row.

Sources: Kumar and Byrne 2004 for the risk, where each answer is also a sample of what is right.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Literal

from .. import files
from ..errors import UsageError, no_room_named
from .measure import Case, measure, scores_of_row
from .metrics import METRICS
from .metrics.labels import label_text
from .metrics.tokenizers import Tokenizer
from .rows import NO_ID, PredictionRow
from .scoring import headline

Way = Literal["probabilities", "spans", "risk", "majority"]
Of = Literal["probabilities", "logits"]
_BLOCK_ROWS = 256
_LEAST = 5e-7  # a probability that was rounded to 0 at six digits
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Member:
    """The predictions of one model, which *read* yields from the first one on.

    *labels* are in the order of its probabilities; without them each row names them, as {label: probability}.
    *null_threshold* is that of its recipe.
    """

    name: str
    read: Callable[[], Iterable[PredictionRow]]
    labels: tuple[str, ...] = ()
    null_threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """How rows are joined.

    *weights* are one for each member; *metric* and *tokenizer* are those of the risk.
    """

    way: Way
    weights: tuple[float, ...]
    of: Of = "probabilities"
    metric: str = "rouge"
    tokenizer: Tokenizer = "words"
    null_threshold: float | None = None

    def joined(self, members: Sequence[Member]) -> Iterator[PredictionRow]:
        """Yield the joined rows.

        Raises:
            UsageError: the members do not answer the same rows, or their labels differ.
        """
        weights = [weight / max(self.weights) for weight in self.weights]  # the sum of huge ones is no number
        weights = [weight / math.fsum(weights) for weight in weights]
        rows = _aligned(members)
        while block := list(islice(rows, _BLOCK_ROWS)):
            if self.way == "risk":
                yield from self._least_risk(block, weights)
            for answers in block if self.way != "risk" else ():
                if self.way == "majority":
                    yield _row(answers, prediction=_majority(answers, weights))
                elif self.way == "spans":
                    yield _spans(members, answers, weights, self.of, self.null_threshold)
                else:
                    yield _probabilities(members, answers, weights, self.of)

    def _least_risk(
        self, block: Sequence[Sequence[PredictionRow]], weights: Sequence[float]
    ) -> Iterator[PredictionRow]:
        metric = METRICS.load(self.metric)
        sign, size = 1 if metric.better == "higher" else -1, len(weights)
        pairs = [(one, other) for one in range(size) for other in range(size)]
        cases = (
            Case(row=answers[one], target=answers[other].prediction, input=None)
            for answers in block
            for one, other in pairs
        )
        values = [
            sign * headline(scores_of_row({self.metric: metric}, part.model, place))
            for part in measure(cases, [self.metric], self.tokenizer, baseline=False)
            for place in range(len(part.cases))
        ]
        for number, answers in enumerate(block):
            mine = iter(values[number * len(pairs) : (number + 1) * len(pairs)])
            gains = [_mean(islice(mine, size), weights) for _ in range(size)]
            yield _row(answers, prediction=answers[gains.index(max(gains))].prediction)


def _aligned(members: Sequence[Member]) -> Iterator[tuple[PredictionRow, ...]]:
    """Yield the members' answers to each row."""
    for number, answers in enumerate(zip_longest(*(member.read() for member in members))):
        named: tuple[str, Any] | None = None  # the first member that says an id
        for member, answer in zip(members, answers, strict=True):
            if answer is None:
                longer = next(one for one, other in zip(members, answers, strict=True) if other is not None)
                raise UsageError(f"{member.name} ends after {number:,} rows, and {longer.name} has more")
            if answer.id is NO_ID:
                continue
            named = named or (member.name, answer.id)
            if str(answer.id) != str(named[1]):  # a CSV file has numbers as text
                raise UsageError(
                    f"row {number} has the id {named[1]!r} in {named[0]} and {answer.id!r} in {member.name}: they do "
                    "not answer the same rows"
                )
        yield answers


def _row(answers: Sequence[PredictionRow], *, prediction: Any, **fields: Any) -> PredictionRow:
    identifier = next((answer.id for answer in answers if answer.id is not NO_ID), NO_ID)
    return PredictionRow(index=answers[0].index, id=identifier, prediction=prediction, fields=fields)


def _majority(answers: Sequence[PredictionRow], weights: Sequence[float]) -> Any:
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        text = label_text(answer.prediction)
        votes[text] = votes.get(text, 0.0) + weight
    most = max(votes.values())
    return next(one.prediction for one in answers if math.isclose(votes[label_text(one.prediction)], most))


def _probabilities(
    members: Sequence[Member], answers: Sequence[PredictionRow], weights: Sequence[float], of: Of
) -> PredictionRow:
    found = [_by_label(member, answer, of) for member, answer in zip(members, answers, strict=True)]
    labels = list(found[0])
    for member, values in zip(members, found, strict=True):
        if values.keys() != found[0].keys():
            only = [sorted(one) for one in (found[0].keys() - values.keys(), values.keys() - found[0].keys())]
            raise UsageError(
                f"the labels differ: only {members[0].name} has {', '.join(only[0]) or 'none'}, "
                f"only {member.name} has {', '.join(only[1]) or 'none'}"
            )
    means = [_mean([values[label] for values in found], weights) for label in labels]
    if of == "logits":
        means = _softmax(means)
    best = labels[means.index(max(means))]
    return _row(answers, prediction=best, probabilities=means)


def _by_label(member: Member, answer: PredictionRow, of: Of) -> dict[str, float]:
    """Return a row's probabilities or logits by label."""
    where = f"row {answer.index} of {member.name}"
    is_raw = of == "logits" and "logits" in answer.fields
    values = _of_cell(answer.fields.get("logits" if is_raw else "probabilities"))
    if isinstance(values, Mapping):
        by_label = {str(label): value for label, value in values.items()}
    elif isinstance(values, list):
        if len(values) != len(member.labels):
            raise UsageError(f"{where} has {len(values)} probabilities, and there are {len(member.labels)} labels")
        by_label = dict(zip(member.labels, values, strict=True))
    elif values is not None:
        raise UsageError(
            f"{where} has the probabilities {values!r}, and they are a list, such as [0.3, 0.7], or name their labels, "
            'such as {"no": 0.3, "yes": 0.7}; in a cell of a CSV file, too'
        )
    else:
        has = ", ".join(answer.fields) or "none"
        hint = "; --of logits joins logits" if "logits" in answer.fields else ""
        raise UsageError(f"{where} has no probabilities of labels; its fields: {has}{hint}")
    if any(isinstance(value, (list, dict)) for value in by_label.values()):
        raise UsageError(
            f"{where} holds no number for each label; log-probabilities of tokens cannot be joined, since their ids "
            "mean something with one tokenizer alone: join texts, with --by risk"
        )
    if odd := [label for label, value in by_label.items() if type(value) not in (int, float)]:
        raise UsageError(
            f"{where} has {by_label[odd[0]]!r} for {odd[0]!r}, and a probability is a number, such as 1.0; to count "
            "the labels that the models gave: --by majority"
        )
    if not all(map(math.isfinite, by_label.values())):
        raise UsageError(f"{where} has a probability that is no number: {by_label}")
    if not is_raw and (abs(math.fsum(by_label.values()) - 1) > _TOLERANCE or min(by_label.values()) < 0):
        raise UsageError(f"{where} has probabilities that do not add up to 1: {by_label}")
    best = max(by_label, key=lambda label: by_label[label])
    if by_label.get(str(answer.prediction), -math.inf) < by_label[best] - _TOLERANCE:
        raise UsageError(
            f"{where} predicts {answer.prediction!r}, and the likeliest is {best!r}; check the order of the labels"
        )
    if is_raw or of == "probabilities":
        return by_label
    return {label: math.log(max(value, _LEAST)) for label, value in by_label.items()}


def _of_cell(value: Any) -> Any:
    """Return the list or object that a CSV file has as text, anything else as it is."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _mean(values: Iterable[float], weights: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def _softmax(values: Sequence[float]) -> list[float]:
    most = max(values)
    powers = [math.exp(value - most) for value in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def _spans(
    members: Sequence[Member],
    answers: Sequence[PredictionRow],
    weights: Sequence[float],
    of: Of,
    null_threshold: float | None,
) -> PredictionRow:
    """Join the spans of a row; None stands for no answer.

    A span that a model does not list has the score of its last one as logit, and no probability.
    """
    found = [_by_span(member, answer) for member, answer in zip(members, answers, strict=True)]
    spans = list(dict.fromkeys(span for scores in found for span in scores if span is not None))
    if of == "probabilities":
        shares = [dict(zip(scores, _softmax(list(scores.values())), strict=True)) for scores in found]
        joined = {
            span: math.log(max(_mean([share.get(span, 0.0) for share in shares], weights), 1e-300))
            for span in (None, *spans)
        }
    else:
        # a model's score of no answer may be far below its spans
        lasts = [min((scores[span] for span in scores if span is not None), default=scores[None]) for scores in found]
        joined = {
            span: _mean([scores.get(span, last) for scores, last in zip(found, lasts, strict=True)], weights)
            for span in (None, *spans)
        }
    null_score = joined.pop(None)
    ranked = sorted(joined, key=lambda span: -joined[span])
    n_best: list[dict[str, Any]] = [
        {"text": text, "score": joined[start, text], "start": start} for start, text in filter(None, ranked)
    ]
    is_null = not n_best or (null_threshold is not None and null_score - n_best[0]["score"] > null_threshold)
    best: dict[str, Any] = {"text": "", "score": null_score, "start": None} if is_null else n_best[0]
    more = {"start": best["start"], "score": best["score"], "null_score": null_score, "n_best": n_best}
    return _row(answers, prediction=best["text"], **more)


def _by_span(member: Member, answer: PredictionRow) -> dict[tuple[int, str] | None, float]:
    fields, where = answer.fields, f"row {answer.index} of {member.name}"
    try:
        scores: dict[tuple[int, str] | None, float] = {None: _of_cell(fields["null_score"])}
        for one in _of_cell(fields["n_best"]):
            span = one["start"], one["text"]
            if type(one["start"]) is not int:
                raise UsageError(f"{where} has a span that starts at {one['start']!r}, and a start is a whole number")
            if not isinstance(one["text"], str):
                raise UsageError(f"{where} has a span whose text is {one['text']!r}")
            if span in scores:
                raise UsageError(f"{where} has the span {one['text']!r} at {one['start']} twice")
            scores[span] = one["score"]
    except (KeyError, TypeError) as error:
        raise UsageError(f"{where} has no spans: it needs null_score and n_best, as question answering has") from error
    if not all(type(one) in (int, float) and math.isfinite(one) for one in scores.values()):
        raise UsageError(f"{where} has a span whose score is no number")
    return scores


def way_of(row: PredictionRow) -> Way:
    """Return how predictions like *row* are joined unless it is said."""
    if "n_best" in row.fields and "null_score" in row.fields:
        return "spans"
    return "probabilities" if {"probabilities", "logits"} & row.fields.keys() else "risk"


def labels_told(member: Member) -> tuple[str, ...]:
    """Return the labels in the order of the probabilities.

    The predictions of all rows tell it: each is the likeliest label. There are none where the rows name them.

    Raises:
        UsageError: a label is never predicted, or the rows contradict each other.
    """
    found: dict[int, str] = {}
    size, name = 0, member.name
    for row in member.read():
        values = _of_cell(row.fields.get("probabilities", row.fields.get("logits")))
        if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
            return ()
        size, most = len(values), max(values)
        if values.count(most) == 1:
            label = found.setdefault(values.index(most), str(row.prediction))
            if label != str(row.prediction):
                raise UsageError(
                    f"{name}: probability {values.index(most)} is the largest where {label!r} is predicted, and in row "
                    f"{row.index}, where {row.prediction!r} is: they are not those of the predictions"
                )
    if len(found) < size or len(set(found.values())) < size:
        raise UsageError(
            f"{name} does not tell the labels of all {size} probabilities; name them in their order: --labels A,B,..."
        )
    return tuple(found[place] for place in range(size))


def write_joined(rows: Iterable[PredictionRow], out: Path) -> int:
    """Write joined rows to *out*, which appears when it is complete.

    Return how many they are.
    """
    num_rows = 0
    with no_room_named(str(out), "try again"), files.replacing(out) as stream:
        for row in rows:
            stream.write(row.to_line())
            num_rows += 1
    return num_rows
