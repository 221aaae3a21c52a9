"""The generators of rows that this package ships, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from ... import files
from ..schema.inputs import GeneratorName
from . import hangul, reviews, smalltalk

GENERATORS: dict[str, Callable[..., dict[str, list[dict[str, Any]]]]] = {
    "hangul": hangul.generate,
    "labels": reviews.labelled,
    "questions": reviews.questions,
    "dialogues": reviews.dialogues,
    "essays": reviews.essays,
    "smalltalk": smalltalk.smalltalk,
}
assert set(GENERATORS) == set(get_args(GeneratorName)), "the schema names every generator"


def code_digest() -> str:
    """Return the identity of the code that makes the rows."""
    return files.digest_of([files.digest_file(Path(str(module.__file__))) for module in (hangul, reviews, smalltalk)])
