"""Make a row of each question in the JSON of SQuAD 1.1, SQuAD 2.0 or KorQuAD 1.0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import UsageError

_FORM = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'


def is_nested(articles: Sequence[Any]) -> bool:
    """Say whether the `data` of a file has questions below paragraphs."""
    return any(isinstance(article, Mapping) and "paragraphs" in article for article in articles)


def nested_rows(articles: Sequence[Any], name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of the `data` of the file called *name*.

    A row has id, question, context, title, and the answers as `datasets` writes them: {"text": [...],
    "answer_start": [...]}, empty lists where the question has none. A question whose answers are not given has no
    such column.

    Raises:
        UsageError: something is missing or of another form, or two questions have one id; the message says where.
    """
    seen: dict[str, str] = {}
    for number, article in enumerate(articles):
        for inner, paragraph in _items(name, article, "paragraphs", f"data[{number}]"):
            context = _text(name, paragraph, "context", inner)
            for place, question in _items(name, paragraph, "qas", inner):
                row = _row(name, question, context, place)
                if row["id"] in seen:
                    raise UsageError(
                        f"{name}: {seen[row['id']]} and {place} have one id, {row['id']!r}; give each question its own"
                    )
                seen[row["id"]] = place
                yield row if article.get("title") is None else {**row, "title": article["title"]}


def _row(name: str, question: Any, context: str, place: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": _text(name, question, "id", place),
        "question": _text(name, question, "question", place),
        "context": context,
    }
    if question.get("is_impossible"):
        row["answers"] = {"text": [], "answer_start": []}
    elif "answers" in question:
        found = [one for _, one in _items(name, question, "answers", place)]
        texts = [_text(name, one, "text", f"{place}.answers[{number}]") for number, one in enumerate(found)]
        row["answers"] = {"text": texts, "answer_start": [one.get("answer_start") for one in found]}
    return row


def _items(name: str, value: Any, key: str, place: str) -> Iterator[tuple[str, Any]]:
    found = _of(name, value, key, place)
    if not isinstance(found, list):
        raise UsageError(f"{name}: {place}.{key} is no list but {str(found)[:40]!r}; the form is {_FORM}")
    yield from ((f"{place}.{key}[{number}]", one) for number, one in enumerate(found))


def _text(name: str, value: Any, key: str, place: str) -> str:
    found = _of(name, value, key, place)
    if isinstance(found, (list, dict)) or found is None:
        raise UsageError(f"{name}: {place}.{key} is no text but {str(found)[:40]!r}; the form is {_FORM}")
    return str(found)


def _of(name: str, value: Any, key: str, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}: {place} is no object but {str(value)[:40]!r}; the form is {_FORM}")
    if key not in value:
        raise UsageError(f"{name}: {place} has no {key!r}, only {', '.join(value) or 'nothing'}; the form is {_FORM}")
    return value[key]
