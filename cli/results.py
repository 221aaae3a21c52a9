"""The places of a run's model, predictions and scores, and scores as tables."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import ledger
from ..errors import DamagedError
from ..events import Event, Published, of
from ..predictions.scoring import BASELINE, MODEL, WHO, headlines, label
from ..run_folder import RunPaths, is_point, points_in
from .tables import format_table

if TYPE_CHECKING:
    from ..recipes.plan import Plan


def result_files(plan: Plan, paths: RunPaths) -> list[tuple[str, Path]]:
    """Return what each model, predictions file and submission of a run is, and where."""
    from ..recipes.decodings import decodings_of

    rows: list[tuple[str, Path]] = []
    for stage in plan.stages:
        if paths.model(stage.name).is_dir():
            rows.append((f"model ({stage.name})", paths.model(stage.name)))
        for decoding in decodings_of(stage.settings):
            if (merged := paths.predictions_file(stage.name, decoding)).is_file():
                rows.append((f"predictions ({decoding or stage.name})", merged))
        rows += [(f"submission ({stage.name})", path) for path in paths.submission_files(stage.name)]
    return rows


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Where a run is to be seen beside its folder.

    *link* is an address or a command, *note* says what is missing there.
    """

    what: str
    link: str = ""
    note: str = ""


_DASHBOARD, _PUBLISHED = "dashboard", "published"


def is_tracker(place: Shown) -> bool:
    """Say whether a tracker shows the run there."""
    return place.what not in (_DASHBOARD, _PUBLISHED)


def places_of(paths: RunPaths, events: Iterable[Event], *, is_over: bool) -> list[Shown]:
    """Return where trackers show a run or a sweep, and where it was published.

    While a run is not *is_over*, what it recorded may be on its way.
    """
    from ..tracking.base import places
    from ..tracking.dashboards import known_links

    points, found = points_in(paths), list[Shown]()
    run = shlex.quote(str(paths.root)) if is_point(paths) else paths.run_id
    for place in places([paths.tracking_dir, *(point.tracking_dir for point in points)]):
        said = "not all of it is sent" if place.link else "offline, not yet sent"
        is_told = place.has_left and (is_over or not place.link)
        found.append(Shown(what=place.tracker, link=place.link, note=f"{said}: `sousbatch sync {run}`" * is_told))
    found += [Shown(what=_DASHBOARD, link=link) for link in known_links(paths.tracking_dir)]
    urls = dict.fromkeys(event.url for event in of(events, Published))
    return found + [Shown(what=_PUBLISHED, link=url) for url in urls]


def read_places(paths: RunPaths, *, is_over: bool) -> list[Shown]:
    """Return `places_of` a run, with the events of its ledger."""
    events: list[Event] = []
    with suppress(DamagedError):  # which makes the run unknown, and is told there
        events = ledger.read(paths.ledger_dir, max_steps=1)
    return places_of(paths, events, is_over=is_over)


def describe_places(paths: RunPaths, *, is_over: bool) -> list[tuple[str, object]]:
    """Return the places that show a run as rows of a table."""
    found = read_places(paths, is_over=is_over)
    return [(one.what, f"{one.link} ({one.note})" if one.link and one.note else one.link or one.note) for one in found]


def describe_results(plan: Plan, paths: RunPaths) -> str:
    """Return where a run's model, predictions and scores lie, and the scores."""
    from ..recipes.decodings import decodings_of

    if plan.sweep is not None:
        places = describe_places(paths, is_over=True)
        return describe_points(plan, paths, is_over=True) + (f"\n\n{format_table(places)}" if places else "")
    rows: list[tuple[str, object]] = [*result_files(plan, paths)]
    text = ""
    if paths.metrics.is_file():
        rows.append(("scores", paths.metrics))
        for stage, results in itertools.groupby(read_scores(paths).items(), lambda item: item[0].partition("@")[0]):
            found = {name.partition("@")[2]: result for name, result in results}
            first = next(iter(found.values()))
            order = [name for stage_ in plan.stages for name in decodings_of(stage_.settings) if name in found]
            scores = {name: found[name]["scores"] for name in order}
            table = format_decodings(scores) if "" not in found else format_scores(first["scores"])
            text += f"\n\n{stage}: {first['num_rows']} rows of {first['split']}\n{table}"
    rows += describe_places(paths, is_over=True)
    return format_table(rows) + text


def describe_points(plan: Plan, paths: RunPaths, *, is_over: bool) -> str:
    """Return one line a point of a sweep that has begun.

    A line has the point's first score. Say also how many points have not begun.
    """
    from ..launchers.status import point_states

    found = point_states(plan, paths, is_over=is_over)
    search = plan.sweep.search if plan.sweep is not None else None
    rows: list[list[object]] = []
    for point in found:
        if point.folder is None:
            continue
        score = ""
        if search is not None:
            score = "" if point.value is None else f"{search.metric} {point.value:.4g}"
        else:
            for name, result in list(read_scores(RunPaths(root=point.folder)).items())[:1]:
                metric, value = next(iter(result["scores"][MODEL].items()))
                score = f"{metric} {value:.4g} ({name})"
        rows.append([point.index, point.word, point.label, score, point.folder])
    waiting = sum(point.word == "waiting" for point in found)
    text = format_table(rows, header=("point", "state", "values", "score", "folder")) if rows else ""
    lines = [text] * bool(text) + [f"point {point.index}: {point.problem}" for point in found if point.problem]
    lines += [f"{waiting} of {len(found)} points have not begun"] * bool(waiting)
    sign = -1 if search is not None and search.goal == "highest" else 1
    if ended := [(sign * point.value, point.index) for point in found if point.value is not None]:
        lines += [f"best: trial {min(ended)[1]}; the override best={paths.run_id} lays its values over a recipe"]
    return "\n".join(lines)


def format_scores(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the scores of the model, beside those of copying the input if any."""
    shown = [who for who in WHO if who in found]
    rows = [[label(name), *(format_score(found[who].get(name)) for who in shown)] for name in headlines(found[MODEL])]
    return format_table(rows, header=("", *(WHO[who] for who in shown)))


def format_decodings(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return one line for each decoding, and one for the copied input."""
    first = next(iter(found.values()))
    names = headlines(first[MODEL])
    lines = {name: scores[MODEL] for name, scores in found.items()}
    lines |= {WHO[BASELINE]: first[BASELINE]} if BASELINE in first else {}
    rows = [[who, *(format_score(scores.get(name)) for name in names)] for who, scores in lines.items()]
    return format_table(rows, header=("decoding", *map(label, names)))


def format_score(value: float | None) -> str:
    """Return a score as a table shows it.

    The copied input has none in what only a model gives.
    """
    return "-" if value is None else f"{value:.3f}"


def read_scores(paths: RunPaths) -> dict[str, Any]:
    """Return the scores of a run by stage.

    Values that are no score are left out: the file may be damaged.
    """
    try:
        found = json.loads(paths.metrics.read_text(encoding="utf-8"))
        return {name: result for name, result in found.items() if _is_score(result)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _is_score(result: Any) -> bool:
    try:
        scores = result["scores"]
        values = [value for each in scores.values() for value in each.values()]
        fits = bool(scores[MODEL]) and all(scores[who].keys() <= scores[MODEL].keys() for who in scores.keys() & WHO)
        return fits and {"num_rows", "split"} <= result.keys() and all(type(one) in (int, float) for one in values)
    except (TypeError, KeyError, AttributeError):
        return False
