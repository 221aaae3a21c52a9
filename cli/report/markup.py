"""Write HTML from text that nobody trusts.

Everything is escaped, and nothing steers the reader's browser.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from ..prediction_view import escape_text


@dataclass(frozen=True)
class Html:
    """Text that is HTML already. All other text is escaped."""

    text: str


@dataclass(frozen=True)
class Number:
    """A number in a table: as people read it, and as the table is sorted by it."""

    text: str
    value: float | None
    is_best: bool = False


Cell = str | Html | Number


def html_of(cell: object) -> str:
    """Return a value as HTML."""
    if isinstance(cell, Html):
        return cell.text
    return escape(cell.text if isinstance(cell, Number) else str(cell))


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    kind: str = "",
    keys: Sequence[str] = (),
    is_tall: bool = False,
) -> str:
    """Return a table; columns of numbers are aligned to the right.

    *keys* are the classes of its rows, *kind* is that of the table. One that *is_tall* scrolls under its header. A
    column that no row fills is left out.
    """
    lines = list(rows)
    full = [place for place in range(len(header)) if not place or any(map(_has_text, (row[place] for row in lines)))]
    header, lines = [header[place] for place in full], [[row[place] for place in full] for row in lines]
    numbers = [any(isinstance(row[place], Number) for row in lines) for place in range(len(header))]
    head = "".join(
        f"<th{' class=n' if is_number else ''}>{escape(name)}</th>"
        for name, is_number in zip(header, numbers, strict=True)
    )
    body = []
    for place, row in enumerate(lines):
        key = f' class="{keys[place]}"' if keys else ""
        body.append(f"<tr{key}>{''.join(map(_cell, row, numbers))}</tr>")
    name = f' class="{kind}"' if kind else ""
    return (
        f"<div class='scroll{' tall' * is_tall}' tabindex=0><table{name}><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _has_text(cell: Cell) -> bool:
    return bool(cell if isinstance(cell, str) else cell.text)


def _cell(cell: Cell, is_number: bool) -> str:
    if isinstance(cell, Number):
        value = "" if cell.value is None else f' data-v="{cell.value:.6g}"'
        text = f"<b>{escape(cell.text)}</b>" if cell.is_best else escape(cell.text)
        return f"<td class=n{value}>{text}</td>"
    return f"<td{' class=n' if is_number else ''}>{html_of(cell)}</td>"


def section(title: str, *parts: str, prefix: str = "") -> str:
    """Return a part of the page under its title, or nothing where it has no content.

    *prefix* tells the parts of one run from those of another.
    """
    if not any(parts):
        return ""
    name = title.lower().replace(" ", "-")
    return f'<section id="{prefix}{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def folded(title: str, body: str, *, is_open: bool = False) -> str:
    """Return what a reader opens by a click on its title."""
    return f"<details{' open' if is_open else ''}><summary>{escape(title)}</summary>{body}</details>" if body else ""


def badge(word: str) -> str:
    """Return the word of a state, coloured."""
    return f'<span class="badge {escape(word)}">{escape(word)}</span>'


def link(text: str, target: Path, page: Path) -> Html:
    """Return a link to a file that the page reaches by a relative path."""
    path = quote(os.path.relpath(target, page.parent))
    return Html(f'<a href="./{escape(path)}">{escape(text)}</a>')


def address(text: str, name: str = "") -> Html:
    """Return a web address as a link by its *name*, and any other text as code."""
    shown = escape(clean(text))
    named = escape(name) or shown
    return Html(f'<a href="{shown}" rel=noreferrer>{named}</a>' if is_web(text) else f"<code>{shown}</code>")


def is_web(text: str) -> bool:
    """Say whether a browser may open *text*."""
    return text.startswith(("https://", "http://"))


def with_code(text: str) -> str:
    """Return text as HTML, with what stands between backticks as code."""
    parts = escape(clean(text)).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def long_text(value: object, *, most: int, shown: int = 320, marked: str = "") -> str:
    """Return a value of a row, with a way to show the rest of a long one.

    Control characters and marks of direction are shown as escapes. Beyond *most* characters it is cut. *marked* is the
    same text as HTML, which stands where the text is short.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= shown:
        return f"<div dir=auto class=text>{marked or escape(clean(text))}</div>"
    rest = f"\u2026 ({len(text):,} characters)" if len(text) > most else ""
    return (
        f"<details class=text><summary dir=auto>{escape(clean(text[:shown]))}\u2026 "
        f"<b>show {'more' if rest else 'all'}</b></summary>"
        f"<div dir=auto>{escape(clean(text[:most]))}{rest}</div></details>"
    )


def clean(text: str) -> str:
    """Return *text* with escapes for all that is not to be seen.

    The ends of lines stay.
    """
    return "\n".join(map(escape_text, text.split("\n")))


def format_time(seconds: float) -> str:
    """Return a duration in one or two units."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 or seconds == 0 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        left = round(seconds) % 60
        return f"{int(round(seconds) // 60)} min" + (f" {left} s" if left and seconds < 600 else "")
    hours, left = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h" + (f" {left} min" if left else "")
    return f"{hours // 24} d" + (f" {hours % 24} h" if hours % 24 else "")


def format_date(seconds: float) -> str:
    """Return a moment in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def format_number(value: float) -> str:
    """Return a number with four digits, and thousands with commas."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
