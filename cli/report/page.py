"""Put the page of one or more runs together, small enough to be sent around.

The page is one file. Its policy lets it load nothing, and run and style nothing but the script and the style that stand
in its head, known by their digests: text of a run that looks like either stays text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from ... import __version__
from .compare import best_first, draw_comparison, palette
from .facts import Asked, RunFacts
from .markup import badge, format_date, section, table
from .single import draw_banner, draw_run, draw_tiles, list_places, run_subtitle, web_links

MAX_BYTES = 1_900_000
_MAX_WHOLE = 6  # runs of which a page shows all; of more it shows the best one


@dataclass(frozen=True, kw_only=True)
class Detail:
    """How much a page shows.

    These are the points of all curves together, the characters of a text, and runs.
    """

    num_points: int
    num_characters: int
    num_runs: int


_LEVELS = (
    Detail(num_points=60_000, num_characters=8000, num_runs=1000),
    Detail(num_points=30_000, num_characters=2000, num_runs=1000),
    Detail(num_points=15_000, num_characters=500, num_runs=500),
    Detail(num_points=5_000, num_characters=200, num_runs=100),
)


def render_page(runs: Sequence[RunFacts], *, out: Path, written_at: float | None, asked: Asked | None = None) -> str:
    """Return the whole page, which is to lie at *out*, with as much detail as fits.

    Without *written_at* it does not say when it was written.
    """
    ordered, asked = best_first(runs), asked or Asked(names=tuple(run.paths.run_id for run in runs))
    text = ""
    for detail in _LEVELS:
        text = _render(ordered, detail, out, written_at, asked)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def _render(runs: Sequence[RunFacts], detail: Detail, out: Path, written_at: float | None, asked: Asked) -> str:
    shown, left_out = runs[: detail.num_runs], len(runs) - detail.num_runs
    if len(runs) == 1 and not asked.num_waiting:
        (run,) = runs
        title = f"{run.paths.recipe_name} {run.paths.run_id}"
        parts = [
            _head(run.paths.recipe_name, badge(run.state), run_subtitle(run)),
            draw_banner(run),
            draw_tiles(run),
            draw_run(run, out=out, num_points=min(1000, detail.num_points), num_characters=detail.num_characters),
        ]
    else:
        recipes = list(dict.fromkeys(run.paths.recipe_name for run in runs))
        title = f"{', '.join(recipes)} {' '.join(asked.names)}"[:120]
        parts = [_head(", ".join(recipes) or "No point has begun", "", _several(runs, asked, left_out))]
        parts += list(filter(None, map(draw_banner, runs)))[:_MAX_WHOLE]
        if shown:
            parts.append(draw_comparison(shown, detail.num_points, detail.num_characters))
        if asked.places:
            parts.append(section("Links", table(("what", "where"), list_places(asked.places))))
        parts += _each(shown, detail, out)
    when = "" if written_at is None else f" {format_date(written_at)}"
    foot = f"Written{when} by sousbatch {__version__}."
    return _document(title, "".join(parts) + f"<footer>{foot}</footer>", palette(len(runs)))


def _head(name: str, state: str, subtitle: str) -> str:
    return f"<header class=top><h1>{escape(name)} {state}</h1><p class=said>{subtitle}</p></header>"


def _several(runs: Sequence[RunFacts], asked: Asked, left_out: int) -> str:
    """Return which runs these are and where they stand, as HTML."""
    states: dict[str, int] = {}
    for run in runs:
        states[run.state] = states.get(run.state, 0) + 1
    if asked.num_waiting:
        states["waiting"] = states.get("waiting", 0) + asked.num_waiting
    parts = [f"{badge(word)} {count}" for word, count in states.items()]
    parts.append(escape(", ".join(asked.names[:_MAX_WHOLE])) + (" …" if len(asked.names) > _MAX_WHOLE else ""))
    parts += map(escape, asked.notes[:_MAX_WHOLE])
    parts += [f"the first {len(runs) - left_out} are shown"] if left_out > 0 else []
    parts += web_links(asked.places)
    return " · ".join(parts)


def _each(runs: Sequence[RunFacts], detail: Detail, out: Path) -> list[str]:
    """Return all of a few runs, or of the best of many, each folded."""
    chosen = runs if len(runs) <= _MAX_WHOLE else runs[:1]
    found = []
    for place, run in enumerate(chosen):
        what = "Best run: " if len(runs) > _MAX_WHOLE else ""
        body = draw_run(run, out=out, num_points=300, num_characters=detail.num_characters, prefix=f"{place}-")
        found.append(
            f"<details class=run><summary><h2>{what}{escape(run.label)} {badge(run.state)}</h2></summary>"
            f"<p class=said>{run_subtitle(run)}</p>{draw_tiles(run)}{body}</details>"
        )
    return found


def _document(title: str, body: str, colours: str) -> str:
    style, script = _own("page.css") + colours, _own("page.js")
    allowed = f"style-src {_digest(style)}; script-src {_digest(script)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name=viewport content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body><main>{body}</main><div id=tip hidden></div><script>{script}</script></body></html>\n"
    )


@cache
def _own(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
