"""Write rows for the small recipes of each task, from the grammar of `hangul`.

They are labelled reviews, questions on reviews, dialogues with a summary, and essays. Like that module's rows they are
the same for the same seed everywhere, and no text is in two splits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ...errors import UsageError
from .hangul import MAX_SENTENCES, TOPICS, has_final, pick, write_end

Row = dict[str, Any]
_Write = Callable[[random.Random], Row]

_ASIDES = ("그랬구나.", "정말요?", "아, 그래요.", "더 말해 줘요.", "몰랐네요.")
LABELS = ("만족", "불만", "보통")


def labelled(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[Row]]:
    """Return reviews in `input` and one of three labels in `target`."""
    return _splits(_labelled, seed, num_train, num_validation, num_test)


def questions(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[Row]]:
    """Return questions in `question` on the passage in `context`.

    `answers` is the answer, which begins at the character `answer_start` of the passage.
    """
    return _splits(_question, seed, num_train, num_validation, num_test)


def dialogues(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[Row]]:
    """Return dialogues of two speakers in `input` and their summary in `target`."""
    return _splits(_dialogue, seed, num_train, num_validation, num_test)


def essays(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[Row]]:
    """Return longer reviews in `text`.

    `input` is their first sentence, and `target` the rest.
    """
    return _splits(_essay, seed, num_train, num_validation, num_test)


def _splits(write: _Write, seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[Row]]:
    if num_train + num_validation + num_test > MAX_SENTENCES:
        raise UsageError(f"data.generator makes at most {MAX_SENTENCES} rows in all; ask for fewer")
    chance, seen = random.Random(8 * seed + 5), set[str]()
    found: dict[str, list[Row]] = {}
    for split, count in (("test", num_test), ("validation", num_validation), ("train", num_train)):
        rows = found.setdefault(split, [])
        while len(rows) < count:
            row = write(chance)
            if (text := str(row.get("input", row.get("context")))) not in seen:
                seen.add(text)
                rows.append({"id": f"{split}-{len(rows):06d}", **row})
    return found


def _labelled(chance: random.Random) -> Row:
    nouns, label = _nouns(chance, 3), pick(chance, LABELS)
    praises = {"만족": [True] * 3, "불만": [False] * 3, "보통": [True, False, pick(chance, (True, False))]}[label]
    if label == "보통" and pick(chance, (True, False)):
        praises.reverse()
    sentences = [_sentence(chance, noun, praise)[0] for noun, praise in zip(nouns, praises, strict=True)]
    return {"input": " ".join(sentences), "target": label}


def _question(chance: random.Random) -> Row:
    nouns, context, answers = _nouns(chance, 4), "", []
    for noun in nouns:
        sentence, answer = _sentence(chance, noun, pick(chance, (True, False)))
        answers.append((answer, len(context) + sentence.index(answer)))
        context += sentence + " "
    place = pick(chance, range(len(nouns)))
    answer, start = answers[place]
    asked = f"{nouns[place]}{'은' if has_final(nouns[place]) else '는'} 어땠나요?"
    return {"question": asked, "context": context.strip(), "answers": answer, "answer_start": start}


def _dialogue(chance: random.Random) -> Row:
    lines, said = [], {True: list[str](), False: list[str]()}
    for noun in _nouns(chance, 3):
        is_praise = pick(chance, (True, False))
        said[is_praise].append(noun)
        lines += [f"#손님#: {_sentence(chance, noun, is_praise)[0]}", f"#친구#: {pick(chance, _ASIDES)}"]
    words = {True: "마음에 들어 했다", False: "아쉬워했다"}
    parts = [
        f"{', '.join(nouns)}{'을' if has_final(nouns[-1]) else '를'} {words[good]}."
        for good, nouns in said.items()
        if nouns
    ]
    return {"input": "\n".join(lines), "target": "손님은 " + " ".join(parts)}


def _essay(chance: random.Random) -> Row:
    sentences = [_sentence(chance, noun, pick(chance, (True, False)))[0] for noun in _nouns(chance, 8)]
    return {"input": sentences[0], "target": " ".join(sentences[1:]), "text": " ".join(sentences)}


def _nouns(chance: random.Random, count: int) -> list[str]:
    """Return different nouns of different topics first, as one would name them."""
    topics, found = list(TOPICS), list[str]()
    while len(found) < count:
        topic = topics.pop(pick(chance, range(len(topics)))) if topics else pick(chance, TOPICS)
        noun = pick(chance, topic.nouns)
        if noun not in found:
            found.append(noun)
    return found


def _sentence(chance: random.Random, noun: str, is_praise: bool) -> tuple[str, str]:
    """Return a sentence about *noun*, and the part of it that says how it was."""
    topic = next(topic for topic in TOPICS if noun in topic.nouns)
    stem = pick(chance, topic.praise if is_praise else topic.blame)
    ending = write_end(chance)
    answer = stem + ending.rstrip(".!~")
    closing = ending[len(ending.rstrip(".!~")) :] or "."
    return f"{noun}{'은' if has_final(noun) else '는'} {answer}{closing}", answer
