"""Read the nested JSON of SQuAD 1.1, SQuAD 2.0 and KorQuAD 1.0 as flat rows, one for each question."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import parse_json

# An object whose `data` is a list of objects, after keys with plain values.
_START = re.compile(rb'\s*\{(?:[^{}\[\]]*,)?\s*"data"\s*:\s*\[\s*\{')
_FORM = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'


def read_nested(path: Path, start: bytes) -> Iterator[dict[str, Any]] | None:
    """Return the rows of a file that begins with *start*, None where its form is another.

    A row has id, question, context, title, and the answers as `datasets` writes them: {"text": [...],
    "answer_start": [...]}, empty lists where the question has none. A question whose answers are not given has no
    such column. The whole file is in memory while it is read.

    Raises:
        UsageError: it is of this form and broken, or two questions have one id; the message says where.
    """
    if not _START.match(start):
        return None
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        document = parse_json(content)
    except ValueError as error:
        with suppress(ValueError):
            parse_json(content.split(b"\n", 1)[0])
            return None  # one object a line, whose first columns look alike
        raise UsageError(f"{path} is not JSON: {error}; fetch or write it again") from error
    return _rows(path, document)


def _rows(path: Path, document: Any) -> Iterator[dict[str, Any]]:
    seen: dict[str, str] = {}
    for number, article in enumerate(document["data"]):
        place = f"data[{number}]"
        title = article.get("title") if isinstance(article, Mapping) else None
        for inner, paragraph in _items(path, article, "paragraphs", place):
            context = _text(path, paragraph, "context", inner)
            for at, question in _items(path, paragraph, "qas", inner):
                row = _row(path, question, context, at)
                if row["id"] in seen:
                    raise UsageError(
                        f"{path}: {seen[row['id']]} and {at} have one id, {row['id']!r}; give each question its own"
                    )
                seen[row["id"]] = at
                yield row if title is None else {**row, "title": title}


def _row(path: Path, question: Any, context: str, place: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": _text(path, question, "id", place),
        "question": _text(path, question, "question", place),
        "context": context,
    }
    if question.get("is_impossible"):
        row["answers"] = {"text": [], "answer_start": []}
    elif "answers" in question:
        found = [one for _, one in _items(path, question, "answers", place)]
        texts = [_text(path, one, "text", f"{place}.answers[{number}]") for number, one in enumerate(found)]
        row["answers"] = {"text": texts, "answer_start": [one.get("answer_start") for one in found]}
    return row


def _items(path: Path, value: Any, key: str, place: str) -> Iterator[tuple[str, Any]]:
    found = _of(path, value, key, place)
    if not isinstance(found, list):
        raise UsageError(f"{path}: {place}.{key} is no list but {str(found)[:40]!r}; the form is {_FORM}")
    yield from ((f"{place}.{key}[{number}]", one) for number, one in enumerate(found))


def _text(path: Path, value: Any, key: str, place: str) -> str:
    found = _of(path, value, key, place)
    if isinstance(found, (list, dict)) or found is None:
        raise UsageError(f"{path}: {place}.{key} is no text but {str(found)[:40]!r}; the form is {_FORM}")
    return str(found)


def _of(path: Path, value: Any, key: str, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise UsageError(f"{path}: {place} is no object but {str(value)[:40]!r}; the form is {_FORM}")
    if key not in value:
        raise UsageError(f"{path}: {place} has no {key!r}, only {', '.join(value) or 'nothing'}; the form is {_FORM}")
    return value[key]
