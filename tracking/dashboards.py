"""What a dashboard of a recipe or a sweep holds, as data: sections of panels.

A panel names the values that it shows as trackers get them: `train/loss` is one that a run logs or sums up,
`config:train.learning_rate` a key of its recipe, `run:group` what it is listed by. What saves dashboards makes
a form of its own of it and reads that back, so that both can be compared as lines of text.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..user_folders import recall, remember
from .identity import read_identity

CONFIG, RUN = "config:", "run:"
PanelKind = Literal["lines", "bars", "table", "parallel", "importance", "scatter", "differences", "other"]
_VIEW_LETTERS = 11  # as many as a service gives the views that people make


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    *lines* show values at each step of *over*, *bars* and a *table* the last ones. *parallel* coordinates show how the
    last value depends on those before it, a *scatter* how one depends on *over*, *importance* which keys of the recipe
    decide it, and *differences* the keys that differ between runs. A table, importance and differences have no title.
    An *other* one was made by hand.
    """

    kind: PanelKind
    title: str = ""
    values: tuple[str, ...] = ()
    over: str = ""

    def __str__(self) -> str:
        words = [self.kind, f'"{self.title}"' * bool(self.title), ", ".join(self.values)]
        return " ".join(filter(None, [*words, f"over {self.over}" * bool(self.over)]))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels under a heading."""

    name: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A dashboard over some runs of a project.

    They are those whose value of *filter* is *wanted*, grouped by *group* where it is given.
    *entity* is the team or user that owns it; without one it is that of the key. *view* is its name in links: the same
    for each dashboard of that name, so that it is saved in one place however often and by whom.
    """

    name: str
    project: str
    entity: str | None
    filter: str
    wanted: str
    group: str = ""
    sections: tuple[Section, ...] = ()

    @property
    def view(self) -> str:
        """The name of the saved view, in links too."""
        return hashlib.sha256(f"sousbatch {self.name}".encode()).hexdigest()[:_VIEW_LETTERS]


def outline(dashboard: Dashboard) -> list[str]:
    """Return a dashboard as lines of text, for people and to compare."""
    return list(_outline(dashboard))


def _outline(dashboard: Dashboard) -> Iterator[str]:
    yield dashboard.name
    grouped = f", grouped by {dashboard.group}" if dashboard.group else ""
    yield f"runs with {dashboard.filter}={dashboard.wanted}{grouped}"
    for section in dashboard.sections:
        yield f"{section.name}:"
        yield from (f"  {panel}" for panel in section.panels)


def compare(saved: Dashboard, own: Dashboard) -> list[str]:
    """Return the lines in which a saved dashboard differs from our own."""
    names = ("saved", "own")
    return list(difflib.unified_diff(outline(saved), outline(own), *names, lineterm="", n=1))


def sweep_name(recipe: str, run: str) -> str:
    """Return the name of the dashboard of a sweep."""
    return f"{recipe} sweep {run}"


def remember_link(dashboard: Dashboard, link: str) -> None:
    """Remember where a dashboard was saved."""
    remember("dashboard", [dashboard.project, dashboard.name], link)


def known_links(folder: Path) -> list[str]:
    """Return where this user saved the dashboards of a run, by its tracking folder.

    Those are the one of its sweep and the one of its recipe.
    """
    try:
        run = read_identity(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found = [recall("dashboard", [run.project, name]) for name in (sweep_name(run.recipe, run.group), run.recipe)]
    return [str(link) for link in found if link]
