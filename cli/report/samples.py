"""Draw rows of predictions, with what sets them apart from their targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape
from typing import Any

from ...predictions.rows import ID, INDEX, PREDICTION, RAW_PREDICTION
from ...predictions.scoring import BASELINE, MODEL, WHO, headlines, label
from ..results import format_score
from .facts import RunFacts, Samples
from .markup import Cell, Number, clean, folded, long_text, table

_TEXTS = {
    "input": "input",
    "target": "target",
    RAW_PREDICTION: "before post",
    PREDICTION: "prediction",
}
_WHY = {"worst": "Worst rows", "best": "Best rows", "random": "Rows at random"}
_MOST_MARKED = 600  # characters of two texts that are compared


def draw_scores(samples: Sequence[Samples]) -> str:
    """Return the scores of each score stage; decodings of one stage share a table."""
    parts = []
    for stage in dict.fromkeys(one.name.partition("@")[0] for one in samples):
        mine = [one for one in samples if one.name.partition("@")[0] == stage]
        names = list(dict.fromkeys(name for one in mine for name in one.scores[MODEL]))
        head = headlines(dict.fromkeys(names, 0.0))
        lines = [(one.name.partition("@")[2] or WHO[who], one.scores[who]) for one in mine for who in _who(one)]
        if len(mine) > 1 and BASELINE in mine[0].scores:
            lines.append((WHO[BASELINE], mine[0].scores[BASELINE]))
        what = f"{stage}: {mine[0].num_rows:,} rows of {mine[0].split}"
        rest = [name for name in names if name not in head]
        parts.append(f"<h3>{escape(what)}</h3>{_score_table(head, lines)}")
        parts.append(folded(f"Details of {stage}", _score_table(rest, lines)) if rest else "")
    return "".join(parts)


def _who(one: Samples) -> list[str]:
    """Return whose scores a table has; of decodings only the model's."""
    return [MODEL] if "@" in one.name else [who for who in WHO if who in one.scores]


def _score_table(names: Sequence[str], lines: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    rows = []
    for name in names:
        cells: list[Cell] = [label(name)]
        for _, scores in lines:
            value = scores.get(name)
            cells.append(Number(format_score(value), value))
        rows.append(cells)
    return table(("score", *(who for who, _ in lines)), rows, kind="scores")


def draw_samples(one: Samples, *, most: int) -> str:
    """Return the worst, the best and some random rows."""
    parts = [
        folded(f"{_WHY.get(why, why)} ({len(rows)})", draw_rows(rows, most=most), is_open=place == 0)
        for place, (why, rows) in enumerate(one.rows.items())
    ]
    return f"<h3>{escape(one.name.replace('@', ', '))}</h3>{''.join(parts)}" if parts else ""


def draw_rows(rows: Sequence[Mapping[str, Any]], *, most: int) -> str:
    """Return one card a row."""
    return "".join(_card(row, most) for row in rows)


def _card(row: Mapping[str, Any], most: int) -> str:
    scores = "".join(
        f"<span>{escape(name)} <b>{format_score(row['scores'].get(name))}</b></span>"
        for name in headlines(row.get("scores") or {})
    )
    identifier = f" <small>id {escape(clean(str(row[ID]))[:80])}</small>" if ID in row else ""
    texts = []
    for name, shown in _TEXTS.items():
        if row.get(name) is None:
            continue
        marked = ""
        if name in (PREDICTION, RAW_PREDICTION):
            marked = mark_differences(row.get("target"), row[name])
        texts.append(f"<dt>{shown}</dt><dd>{long_text(row[name], most=most, marked=marked)}</dd>")
    return (
        f"<article><header>row {escape(str(row[INDEX]))}{identifier}<span class=had>{scores}</span></header>"
        f"<dl>{''.join(texts)}</dl></article>"
    )


def mark_differences(target: object, prediction: object) -> str:
    """Return a short *prediction* as HTML, with its differences marked.

    Words are compared where texts have several, else characters. Nothing is returned where there is nothing to mark.
    """
    if not isinstance(target, str) or not isinstance(prediction, str) or target == prediction:
        return ""
    if not target or max(len(target), len(prediction)) > _MOST_MARKED:
        return ""
    wanted, found = _pieces(target), _pieces(prediction)
    if len(wanted) < 6:
        wanted, found = list(target), list(prediction)
    blocks = SequenceMatcher(None, wanted, found, autojunk=False).get_opcodes()
    if sum(stop - start for what, _, _, start, stop in blocks if what == "equal") < len(found) / 3:
        return ""  # another text altogether
    return "".join(_marked(what, "".join(found[start:stop])) for what, _, _, start, stop in blocks)


def _marked(what: str, text: str) -> str:
    shown = escape(clean(text))
    if what == "delete":
        return "<del></del>"
    return shown if what == "equal" else f"<mark>{shown}</mark>"


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def same_rows(runs: Sequence[RunFacts], keys: Sequence[str], *, most: int) -> str:
    """Return what several runs answered to the same random rows."""
    answers: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = {}
    for place, run in enumerate(runs):
        for one in run.samples[:1]:
            for row in one.rows.get("random", ()):
                question = (str(row[INDEX]), str(row.get("input")), str(row.get("target")))
                answers.setdefault(question, {})[place] = row
    shared = [rows for rows in answers.values() if len(rows) > 1]
    cards = []
    for rows in shared:
        first = next(iter(rows.values()))
        texts = [
            f"<dt>{name}</dt><dd>{long_text(first[name], most=most)}</dd>"
            for name in ("input", "target")
            if first.get(name) is not None
        ]
        for place, row in rows.items():
            names = headlines(row["scores"])
            score = f" {format_score(row['scores'].get(names[0]))}" if names else ""
            marked = mark_differences(row.get("target"), row.get(PREDICTION))
            texts.append(
                f'<dt class="{keys[place]}"><span class="mark {keys[place]}">{escape(runs[place].label)}</span>'
                f"<small>{score}</small></dt><dd>{long_text(row.get(PREDICTION), most=most, marked=marked)}</dd>"
            )
        cards.append(
            f"<article><header>row {escape(str(first[INDEX]))}</header><dl class=wide>{''.join(texts)}</dl></article>"
        )
    return "".join(cards)
