"""Watch over progress: without a step for too long, log all stacks and end."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable

# Rank 0 ends last: its end makes the launcher kill the others, whose stacks should be logged by then.
_OTHERS_FIRST_S = 5.0
_TELL_BEFORE_S = 20.0  # of the end, which is sudden; a tracker takes at most 10 s to tell a person


class Watchdog:
    """Ends this rank when `step` is not called for *minutes*.

    It is a thread in C, so that it also works while one of Python's waits inside a library. Rank 0 calls *tell* a
    little before, if Python's threads still run.
    """

    def __init__(self, minutes: float, *, rank: int = 0, tell: Callable[[], None] | None = None) -> None:
        self._wait_s = 60 * minutes + (0 if rank else _OTHERS_FIRST_S)
        self._ends = rank == 0
        self._armed_at = float("-inf")
        self._is_closed = threading.Event()
        self.step()
        if tell is not None and rank == 0:
            threading.Thread(target=self._tell_in_time, args=(tell,), daemon=True).start()

    def step(self) -> None:
        """Restart the wait; cheap enough for every step."""
        now = time.monotonic()
        if now - self._armed_at > min(1.0, self._wait_s / 100):
            faulthandler.dump_traceback_later(self._wait_s, exit=self._ends)
            self._armed_at = now

    def close(self) -> None:
        """Stop watching."""
        self._is_closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _tell_in_time(self, tell: Callable[[], None]) -> None:
        wait_s = self._wait_s - min(_TELL_BEFORE_S, self._wait_s / 2)
        while not self._is_closed.wait(max(0.0, self._armed_at + wait_s - time.monotonic())):
            if time.monotonic() - self._armed_at >= wait_s:
                return tell()
