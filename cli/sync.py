"""`sousbatch sync`: send what jobs without a network recorded for a tracker."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence

from .. import ledger
from ..ledger_queries import endings
from ..run_folder import RunPaths, points_in
from ..run_index import find_run, known_runs
from ..tracking.base import Ending, has_left, places, send_left
from ..tracking.identity import part_name
from .parser import RUN_HELP, Parser, define

_POLL_S = 30.0
_LIMIT_S = 1800.0  # of one run; what is left then is sent by the next sync


def define_sync(parser: Parser) -> None:
    """Define `sync`."""
    define(parser, _sync, "sync", "sync 3f2a", "sync 3f2a --watch")
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{RUN_HELP}; all runs when left out")
    parser.add_argument(
        "--watch", action="store_true", help="send each attempt when it has ended, until all jobs of the runs have"
    )


def _sync(arguments: Namespace) -> int:
    """Send what ended attempts left; return 1 when some of it did not arrive."""
    told: set[str] = set()
    while True:
        runs = [find_run(name) for name in arguments.runs] or list(known_runs())
        results = [_sync_run(point, owner, told) for owner in runs for point in points_in(owner) or [owner]]
        if not arguments.watch or not any(waits for _, waits in results):
            break
        time.sleep(_POLL_S)
    if not told:
        print("sousbatch: nothing is left to send", file=sys.stderr)
    return 0 if all(is_sent for is_sent, _ in results) else 1


def _sync_run(paths: RunPaths, owner: RunPaths, told: set[str]) -> tuple[bool, bool]:
    """Send what a run has; return whether it arrived, and whether more may come.

    The jobs of a sweep's point are those of its *owner*.
    """
    ended, is_over = _endings(paths, owner)
    is_sent = True
    if has_left(paths.tracking_dir):
        for outcome in send_left(paths.tracking_dir, ended, limit_s=_LIMIT_S):
            is_sent = is_sent and not outcome.problem
            whose = f"{paths.run_id} {outcome.what}" if outcome.of_run else outcome.what
            _tell(f"{whose}: {outcome.problem or 'sent'}", told)
        for place in places([paths.tracking_dir]):
            if place.link:
                _tell(f"{paths.run_id}: {place.link}", told)
    return is_sent, not is_over


def _endings(paths: RunPaths, owner: RunPaths) -> tuple[Mapping[str, Ending], bool]:
    """Return how attempts ended, by part, and whether all jobs have.

    Without a record of its end an attempt may still run: then the launcher is asked.
    """
    known = endings(ledger.read(paths.ledger_dir, max_steps=1))
    running = _running_stages(owner)
    found = {}
    for (stage, task, number), end in known.items():
        is_running = stage in running or (paths != owner and bool(running))
        if end is not None or not is_running:
            code, error = end or (1, "its job was lost")
            found[part_name(stage, task, number)] = Ending(exit_code=code, error=error)
    return found, not running


def _running_stages(run: RunPaths) -> Sequence[str]:
    """Return the stages of a run whose jobs have not ended, or may not have."""
    from ..launchers.base import FINAL_WORDS
    from ..launchers.overview import watch_states
    from ..launchers.registry import WATCH_S, launcher_named
    from ..recipes.plan_summary import read_summary

    plan = read_summary(run.plan)
    states = watch_states(plan, run, launcher_named(plan.launcher, max_age_s=WATCH_S))
    return [name for name, state in states.items() if state.word not in FINAL_WORDS]


def _tell(text: str, told: set[str]) -> None:
    """Print what was not told before; a watcher would repeat a problem for ever."""
    if text not in told:
        told.add(text)
        print(text, flush=True)
