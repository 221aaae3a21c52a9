"""Read the best trial of a search.

The override `best=SEARCH` lays its values over a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import ledger
from ..errors import NotFoundError, UsageError
from ..events import Frozen, Trial, TrialEnded, of
from ..run_folder import RunPaths
from ..run_index import find_run
from .plan import plan_values

_BEST = "best="


def best_trial(paths: RunPaths) -> tuple[tuple[str, ...], Path]:
    """Return the overrides and the run folder of a search's best trial so far.

    Of equal ones it is the first.

    Raises:
        UsageError: the run is no search.
        NotFoundError: no trial has ended well yet.
    """
    values = plan_values(paths.plan)
    search = (values.get("sweep") or {}).get("search")
    if search is None:
        raise UsageError(f"run {paths.run_id} is no search; `sousbatch submit --search` makes one")
    sign = 1 if search["goal"] == "lowest" else -1
    found = []
    for folder in paths.root.glob("*/*/ledger"):
        events = ledger.read(folder, max_steps=1)
        ends = [one.value for one in of(events, TrialEnded) if one.value is not None]
        places = [one.point for one in of(events, Frozen)]
        if ends and places and (begun := of(events, Trial)):
            found.append((sign * ends[-1], places[0] or 0, folder.parent, tuple(begun[-1].values.items())))
    if not found:
        raise NotFoundError(f"search {paths.run_id}: no trial has ended well yet; `sousbatch status {paths.run_id}`")
    *_, run, chosen = min(found)
    return tuple(f"{key}={value}" for key, value in chosen), run


def with_best(texts: Sequence[str]) -> list[str]:
    """Return *texts* with the overrides of its best trial for each `best=SEARCH`."""
    return [
        one
        for text in texts
        for one in (best_trial(find_run(text.removeprefix(_BEST)))[0] if text.startswith(_BEST) else (text,))
    ]
