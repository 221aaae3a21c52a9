"""Extractive question answering.

The model reads a question and a window of a passage, and says which tokens of the window are the answer. A long passage
gives several windows that overlap. A window that does not hold the answer, or a question that has none, points to the
first token (CLS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import Fault, UsageError
from ...predictions.metrics import METRICS, Answers
from ...predictions.metrics.question_answering import answer_texts
from ...predictions.rows import PredictionRow
from ..data.encode import Encoded
from ..data.prompts import unread_faults
from ..data.rows import Row
from ..facts import Inputs, Lengths
from ..model_kinds import max_positions
from ..plan import Stage
from ..schema import StageSettings
from ..stage_kinds import RowUse
from . import Column, TaskSpec

_UNREAD = ("prompt", "system", "examples", "separator", "pad_input_to", "loss_on", "max_target_tokens", "long_rows")
_NUM_SPECIAL_TOKENS = 4  # around question and passage, at most: those of RoBERTa

# What there is to say of a row, as its remarks.
NO_PASSAGE, NO_QUESTION = "no passage", "no question"
ABSENT, MISPLACED, REPAIRED, SEVERAL = "answer absent", "answer misplaced", "answer repaired", "answer several times"
NO_ANSWER, LONG_ANSWER, UNSEEN, CUT = "no answer", "long answer", "answer in no window", "question cut"


@dataclass(frozen=True, slots=True)
class Window(Encoded):
    """A question with a window of its passage.

    *offsets* are the places in the passage, in characters, of each token; a token of the question, and one that the
    tokenizer adds, has none. The answer is from token *start* to token *end*.
    """

    offsets: tuple[tuple[int, int] | None, ...] = ()
    type_ids: tuple[int, ...] = ()
    start: int = 0
    end: int = 0

    @property
    def num_learned(self) -> int:
        """Return how many tokens the answer has; CLS is one."""
        return self.end - self.start + 1


def _columns(settings: StageSettings, use: RowUse) -> list[Column]:
    columns = settings.data.columns
    answers = Column(named_by="data.columns.answers", name=columns.answers, may_nest=True)
    read = [
        Column(named_by="data.columns.question", name=columns.question),
        Column(named_by="data.columns.context", name=columns.context),
    ]
    return [answers] if use == "score" else read if use == "predict" else [*read, answers]


def _faults(settings: StageSettings, uses: Sequence[RowUse]) -> Iterator[Fault]:
    why = "reads a question and windows of its passage"
    yield from unread_faults(settings.data, "question_answering", _UNREAD, why)
    spec, longest = settings.question_answering, settings.data.max_tokens
    room = longest - spec.max_question_tokens - _NUM_SPECIAL_TOKENS
    if uses and room <= spec.stride_tokens:
        hint = "raise it, or lower question_answering.max_question_tokens or question_answering.stride_tokens"
        problem = (
            f"is {longest}, and a window of so many tokens has {max(0, room)} for its passage beside a question of "
            f"{spec.max_question_tokens}: not more than the {spec.stride_tokens} that windows share"
        )
        yield Fault(key="data.max_tokens", problem=problem, hint=hint)


def _longest(settings: StageSettings, use: RowUse, config: Mapping[str, Any]) -> int | None:
    return settings.data.max_tokens


def _encode(
    settings: StageSettings, use: RowUse, rows: Sequence[Row], tokenizer: Any, longest: int | None
) -> list[Encoded]:
    """Return the windows of *rows*, in order; a row's first has its remarks.

    Raises:
        UsageError: the tokenizer does not know the places of its tokens.
    """
    spec, columns = settings.question_answering, settings.data.columns
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        raise UsageError(
            "question answering needs a fast tokenizer, one with a tokenizer.json; name one with model.tokenizer"
        )
    inner.no_truncation()  # a tokenizer.json may keep those of the script that wrote it
    inner.no_padding()
    texts = list(dict.fromkeys(str(row[columns.context]) for row in rows))
    passages = dict(zip(texts, _encode_texts(inner, texts), strict=True))
    questions = _encode_texts(inner, [str(row[columns.question]) for row in rows])
    found: list[Encoded] = []
    inner.enable_truncation(longest or settings.data.max_tokens, stride=spec.stride_tokens, strategy="only_second")
    try:
        for row, question in zip(rows, questions, strict=True):
            remarks = [CUT] if len(question) > spec.max_question_tokens else []
            question.truncate(spec.max_question_tokens)
            context = str(row[columns.context])
            remarks += [NO_PASSAGE] * (not context.strip()) + [NO_QUESTION] * (not len(question))
            answer = None
            if use != "predict":
                answer, said = _answer(settings, row, context)
                remarks += said
            whole = inner.post_process(question, passages[context], add_special_tokens=True)
            # what was cut off a question comes back as a question of windows of its own
            windows = [whole, *(one for one in whole.overflowing if _asked(one) == _asked(whole))]
            found += _windows(settings, windows, answer, remarks, tokenizer.cls_token_id)
    finally:
        inner.no_truncation()
    return found


def _asked(encoding: Any) -> list[tuple[int, tuple[int, int]]]:
    """Return the tokens of a window's question, each with its place there."""
    parts = zip(encoding.sequence_ids, encoding.ids, encoding.offsets, strict=True)
    return [(token, place) for part, token, place in parts if part == 0]


def _encode_texts(inner: Any, texts: Sequence[str]) -> list[Any]:
    """Return texts as encodings that are post-processed later, as pairs.

    RoBERTa's post-processor takes the blank off a token's place, and done twice the first letter too.
    """
    processor = inner.post_processor
    inner.post_processor = None
    try:
        return list(inner.encode_batch(texts, add_special_tokens=False))
    finally:
        inner.post_processor = processor


def _answer(settings: StageSettings, row: Row, context: str) -> tuple[tuple[int, int] | None, list[str]]:
    """Return where the first right answer is in *context*, and the remarks on it.

    An answer that is not where the row says is taken from where it is, if that is one place. Without a place given the
    first one is taken.
    """
    columns = settings.data.columns
    texts = answer_texts(row[columns.answers])
    if not texts:
        return None, [NO_ANSWER]
    text, given = texts[0], _given_start(row, columns.answers, columns.answer_start)
    if given is not None and context[given : given + len(text)] == text:
        return (given, given + len(text)), []
    start, count = context.find(text), context.count(text)
    if not count or (given is not None and count > 1):
        return None, [MISPLACED if count else ABSENT]
    remark = [REPAIRED] if given is not None else [SEVERAL] if count > 1 else []
    return (start, start + len(text)), remark


def _given_start(row: Row, answers: str, answer_start: str) -> int | None:
    """Return where the row says that its first answer starts, None where it does not."""
    value = row[answers]
    found: Any = row.get(answer_start)
    if isinstance(value, Mapping):
        found = value.get("answer_start")
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        found = value[0].get("answer_start")
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    try:
        start = int(found)
    except (TypeError, ValueError):
        return None
    return start if start >= 0 else None


def _windows(
    settings: StageSettings,
    encodings: Sequence[Any],
    answer: tuple[int, int] | None,
    remarks: list[str],
    cls: int | None,
) -> Iterator[Window]:
    made = []
    whole = encodings[0]
    of_passage = next((kind for part, kind in zip(whole.sequence_ids, whole.type_ids, strict=True) if part == 1), 0)
    for encoding in encodings:
        ids = encoding.ids
        offsets = tuple(
            place if part == 1 and place[0] < place[1] else None
            for part, place in zip(encoding.sequence_ids, encoding.offsets, strict=True)
        )
        # a template gives the passage its type in the first window alone, where that was not encoded in a pair
        parts = zip(encoding.sequence_ids, encoding.type_ids, strict=True)
        type_ids = tuple(of_passage if part == 1 else kind for part, kind in parts)
        first = ids.index(cls) if cls in ids else 0
        start, end = _span(offsets, answer) or (first, first)
        made.append((ids, offsets, type_ids, start, end, (start, end) != (first, first)))
    if answer is not None:
        if not any(is_there for *_, is_there in made):
            remarks = [*remarks, UNSEEN]
        elif (
            min(end - start for _, _, _, start, end, is_there in made if is_there)
            >= settings.question_answering.max_answer_tokens
        ):
            remarks = [*remarks, LONG_ANSWER]
    for number, (ids, offsets, type_ids, start, end, _) in enumerate(made):
        yield Window(
            ids=ids,
            learned=((start, end + 1),),
            num_tokens=len(ids),
            is_long=False,
            is_first=number == 0,
            remarks=tuple(remarks) if number == 0 else (),
            offsets=offsets,
            type_ids=type_ids,
            start=start,
            end=end,
        )


def _span(offsets: Sequence[tuple[int, int] | None], answer: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the first and the last token of *answer*.

    Return None where the window does not hold all of it.
    """
    places = [(number, place) for number, place in enumerate(offsets) if place is not None]
    if answer is None or not places or answer[0] < places[0][1][0] or answer[1] > places[-1][1][1]:
        return None
    start = next((number for number, (_, end) in places if end > answer[0]), None)
    end = next((number for number, (begin, _) in reversed(places) if begin < answer[1]), None)
    return (start, end) if start is not None and end is not None and start <= end else None


# Why rows with a remark cannot be used, and what happens to others; the settings are filled in.
_REFUSED = {
    NO_PASSAGE: "have no passage ({columns.context!r}); give them one, or drop them",
    NO_QUESTION: "have no question ({columns.question!r}); give them one, or drop them",
    ABSENT: "have an answer ({columns.answers!r}) that is not in their passage; fix or drop them",
    MISPLACED: "have an answer that is several times in their passage, and not where they say; give the place of its "
    "first character, from 0 ({columns.answer_start!r})",
}
_TOLD = {
    CUT: "have a question of more than question_answering.max_question_tokens={spec.max_question_tokens}, which is cut",
    REPAIRED: "have an answer that is not where they say, but once in their passage: it is taken from there",
    SEVERAL: "have an answer that is several times in their passage, and no place for it: the first is taken",
    UNSEEN: "have an answer that no window holds as a whole, and train as if they had none; raise data.max_tokens",
    LONG_ANSWER: "have an answer of more than question_answering.max_answer_tokens={spec.max_answer_tokens}: such "
    "answers are never predicted",
    NO_ANSWER: "have no answer, and predictions always will; set question_answering.null_threshold=0 to let the model "
    "leave questions unanswered",
}


def _refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    yield from _metric_refusals(stage, inputs)
    positions = max_positions(inputs.model.config)
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        yield from _said(stage.settings, lengths, _REFUSED)
        no_answer = lengths.remarks.get(NO_ANSWER)
        if no_answer is not None and no_answer.num == lengths.num_rows:
            yield f"{_where(lengths)}: no row has an answer; name the column of the answers with data.columns.answers"
        if positions is not None and lengths.longest_kept > positions:
            yield (
                f"{_where(lengths)}: a window has {lengths.longest_kept:,} tokens and the model {positions:,} "
                f"positions; set data.max_tokens={positions}"
            )


def _metric_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Refuse a metric of texts where rows have several right answers each."""
    settings, column = stage.settings, stage.settings.data.columns.answers
    asked: list[tuple[RowUse, str, str]] = [("score", "score.metrics", name) for name in settings.score.metrics]
    if settings.measures_answers:
        asked.append(("eval", "checkpoints.metric", settings.checkpoints.metric))
    for use, key, name in asked:
        split = stage.splits.get(use)
        if split is None or column not in inputs.splits[split.name].nested or METRICS.is_path(name):
            continue
        one = PredictionRow(index=0, prediction="a")
        try:
            METRICS.load(name).score(Answers(rows=[one], targets=[["a"]], inputs=[""], tokenizer="words"))
        except UsageError:
            yield (
                f"{key} has {name}, which compares texts, and column {column!r} of split {split.name!r} has several "
                "answers in a row; take squad_em or squad_f1"
            )
        except Exception:  # whatever a metric of another package needs besides
            continue


def _warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    settings = stage.settings
    always_answers = settings.question_answering.null_threshold is None
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        expects_none = not always_answers or lengths.use != "train"
        yield from _said(settings, lengths, {**_TOLD, NO_ANSWER: ""} if expects_none else _TOLD)
        if lengths.use == "predict" and not settings.data.columns.id and "id" in inputs.splits[lengths.split].columns:
            yield f"{_where(lengths)}: rows have a column 'id' that predictions will not have; set data.columns.id=id"


def _said(settings: StageSettings, lengths: Lengths, texts: Mapping[str, str]) -> Iterator[str]:
    """Yield such as "stage 'train', split 'train': 3 of 400 rows (row 1) have ..."."""
    for remark, text in texts.items():
        if (rows := lengths.remarks.get(remark)) is None or not text:
            continue
        more = f" and {rows.num - len(rows.first):,} more" if rows.num > len(rows.first) else ""
        which = f"{rows.num:,} of {lengths.num_rows:,} rows (row {', '.join(map(str, rows.first))}{more})"
        filled = text.format(columns=settings.data.columns, spec=settings.question_answering)
        yield f"{_where(lengths)}: {which} {filled}"


def _where(lengths: Lengths) -> str:
    return f"stage {lengths.stage!r}, split {lengths.split!r}"


def _row_bytes(settings: StageSettings) -> tuple[int, str]:
    spans = settings.question_answering.n_best
    return 150 + 120 * spans, f"(150 B + 120 B x {spans} spans)"


TASK = TaskSpec(
    name="question_answering",
    version=4,
    runtime="sousbatch.jobs.tasks.question_answering",
    model_class="AutoModelForQuestionAnswering",
    kinds=("encoder", "decoder"),
    peft_type="QUESTION_ANS",
    head_modules=("qa_outputs",),
    has_new_head=True,
    generates=False,
    decides=(
        *("data.columns.question", "data.columns.context", "data.max_tokens", "model.attention"),
        *("question_answering.stride_tokens", "question_answering.max_question_tokens"),
        *("question_answering.max_answer_tokens", "question_answering.n_best", "question_answering.null_threshold"),
        *("model.add_tokens", "model.trust_remote_code"),
    ),
    reads=("data", "question_answering"),
    fields=("start", "score", "null_score", "n_best"),
    metrics=("squad_em", "squad_f1", "korquad_em", "korquad_f1"),
    faults=_faults,
    columns=_columns,
    longest=_longest,
    encode=_encode,
    refusals=_refusals,
    warnings=_warnings,
    outputs=lambda config: (2, "logits"),
    row_bytes=_row_bytes,
)
