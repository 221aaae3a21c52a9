"""Progress of long work on stderr: bars on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from .tables import format_size

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback of (bytes done, bytes in all) that shows progress on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        with Progress(TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console) as bar:
            task = bar.add_task(what)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    shown_at = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at > 10:
            shown_at = time.monotonic()
            print(f"sousbatch: {what}: {format_size(done)} of {format_size(total)}", file=sys.stderr, flush=True)

    yield show


@contextmanager
def row_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that shows long work on rows on stderr.

    It takes (what, rows done, rows in all). Time is counted from the first rows on.
    """
    began = shown_at = float("inf")
    bars: dict[str, Any] = {}
    with ExitStack() as stack:

        def show(what: str, done: int, total: int) -> None:
            nonlocal began, shown_at
            now = time.monotonic()
            began, shown_at = min(began, now), min(shown_at, now)
            if now - shown_at < (0.1 if sys.stderr.isatty() and now - began > 1 else 10):
                return
            shown_at = now
            if not sys.stderr.isatty():
                print(f"sousbatch: {what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
                return
            if "bar" not in bars:
                bars["bar"] = stack.enter_context(_row_bar())
            if what not in bars:
                bars[what] = bars["bar"].add_task(what, total=total)
            bars["bar"].update(bars[what], completed=done)

        yield show


def _row_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*parts, console=Console(stderr=True))
