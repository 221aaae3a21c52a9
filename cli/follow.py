"""Follow a run.

Progress goes to stderr while it runs, results to stdout when it is over.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from ..events import Event, Step, of
from ..launchers.base import FINAL_WORDS, Launcher
from ..launchers.overview import watch_states
from ..launchers.states import StageState, is_final
from ..launchers.submission import cancel
from ..ledger import LedgerReader
from ..recipes.plan import Plan
from ..recipes.plan_summary import read_summary
from ..run_folder import RunPaths
from .results import describe_results
from .status import advise, describe_run

_POLL_S = 0.5
_LINE_EVERY_S = 10.0


def follow(plan: Plan, paths: RunPaths, launcher: Launcher) -> int:
    """Show progress until nothing of the run is under way.

    Return 0 when the run is done, else 1. Ctrl-C, or a SIGTERM, lets training on this machine save and stop; a second
    one ends it at once. Jobs of Slurm continue, as they do after a closed terminal: they are not its children.
    """
    view = _Bars(plan) if sys.stderr.isatty() else _Lines(plan)
    interrupts = 0

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    handled, reader, last_look = 0, LedgerReader(paths.ledger_dir), {}
    try:
        with view:
            while True:
                if interrupts and not launcher.is_host_bound:
                    view.say(f"the jobs continue; `sousbatch resume {paths.run_id}` follows them")
                    return 130
                if interrupts > handled:
                    handled = interrupts
                    view.say(
                        "stopping after a save; interrupt again to stop at once" if handled == 1 else "stopping at once"
                    )
                    cancel(paths, launcher, save=handled == 1)
                events = reader.poll()
                last_look = watch_states(plan, paths, launcher)
                view.update(last_look, events)
                if is_final(last_look):
                    break
                time.sleep(_POLL_S)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _print_outcome(plan, paths, last_look)


def _print_outcome(plan: Plan, paths: RunPaths, states: Mapping[str, StageState]) -> int:
    if all(state.word == "done" for state in states.values()):
        print(describe_results(plan, paths))
        return 0
    _print_status(describe_run(read_summary(paths.plan), paths, states))
    _print_status(f"sousbatch: run {paths.run_id} is not finished; {advise(paths, states)}")
    return 1


def _print_status(text: str) -> None:
    """Print to stderr.

    A full disk behind it is ignored; a reader that went away is not.
    """
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        return


class _Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, plan: Plan) -> None:
        self._words: dict[str, str] = {}
        self._shown_at: dict[str, float] = {}
        self._started = time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def say(self, text: str) -> None:
        _print_status(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    def update(self, states: Mapping[str, StageState], events: Sequence[Event]) -> None:
        for name, state in states.items():
            now = state.word + (state.reason if state.word == "waiting" else "")  # the reason may change
            if self._words.get(name) != now:
                self._words[name] = now
                if state.word != "waiting" or state.reason:
                    self.say(f"{name} is {state.word}" + (f": {state.reason}" if state.reason else ""))
            elif (
                state.word == "running"
                and state.total
                and time.monotonic() - self._shown_at.get(name, 0) > _LINE_EVERY_S
            ):
                self._shown_at[name] = time.monotonic()
                self.say(f"{name} {state.step} of {state.total}{_latest_loss(name, events)}")


def _latest_loss(stage: str, events: Sequence[Event]) -> str:
    steps = [event.values for event in of(events, Step) if event.stage == stage and "loss" in event.values]
    return f", loss {steps[-1]['loss']:.3f}" if steps else ""


class _Bars:
    """One bar a stage, on a terminal."""

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:16}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._bars = {
            stage.name: self._progress.add_task(stage.name, total=1, start=False, note="waiting")
            for stage in plan.stages
        }
        self._losses: dict[str, str] = {}

    def __enter__(self) -> _Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def say(self, text: str) -> None:
        self._progress.console.print(text)

    def update(self, states: Mapping[str, StageState], events: Sequence[Event]) -> None:
        for name, state in states.items():
            bar = self._bars[name]
            if state.word in ("running", "stopping") and not self._progress.tasks[bar].started:
                self._progress.start_task(bar)
            self._losses[name] = _latest_loss(name, events) or self._losses.get(name, "")
            note = f"{state.step}/{state.total}{self._losses[name]}" if state.total else ""
            total = state.total or 1
            done = total if state.word == "done" else state.step
            self._progress.update(bar, total=total, completed=done, note=f"{state.word} {note} {state.reason}")
            if state.word in FINAL_WORDS:
                self._progress.stop_task(bar)
