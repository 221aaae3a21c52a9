"""Read the Korean questions and answers of the package chatterbot-corpus.

Its licence is BSD. The package's own code is not imported: its text files are read.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

from ...errors import UsageError
from .hangul import pick

_ADVICE = "pip install --no-deps chatterbot-corpus"


def smalltalk(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[dict[str, str]]]:
    """Return questions in `input` and answers in `target`.

    No question is in two splits.

    Raises:
        UsageError: the package is not installed, or has fewer rows.
    """
    answers: dict[str, list[str]] = {}
    for question, answer in _pairs():
        known = answers.setdefault(question, [])
        if answer not in known:
            known.append(answer)
    chance, questions, count = random.Random(8 * seed + 6), list(answers), sum(map(len, answers.values()))
    if num_train + num_validation + num_test > count:
        raise UsageError(f"data.generator smalltalk has {count} rows; ask for no more in all splits together")
    found: dict[str, list[dict[str, str]]] = {}
    for split, wanted in (("test", num_test), ("validation", num_validation), ("train", num_train)):
        rows = found.setdefault(split, [])
        while len(rows) < wanted and questions:
            question = questions.pop(pick(chance, range(len(questions))))
            rows += [
                {"id": f"{split}-{len(rows) + place:06d}", "input": question, "target": answer}
                for place, answer in enumerate(answers[question][: wanted - len(rows)])
            ]
    return found


def _pairs() -> list[tuple[str, str]]:
    import yaml

    spec = find_spec("chatterbot_corpus")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"data.generator smalltalk reads the texts of a package that is not installed; {_ADVICE}")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "korean"
    found = []
    for path in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (" ".join(str(turn).split()) for turn in turns[:2])
            if question and answer:
                found.append((question, answer))
    return found
