"""Watch over progress: without a step for too long, log all stacks and end."""

from __future__ import annotations

import faulthandler
import time

# Rank 0 ends last: its end makes the launcher kill the others, whose stacks should be logged by then.
_OTHERS_FIRST_S = 5.0


class Watchdog:
    """Ends this rank when `step` is not called for *minutes*.

    It is a thread in C, so that it also works while one of Python's waits inside a library.
    """

    def __init__(self, minutes: float, *, rank: int = 0) -> None:
        self._wait_s = 60 * minutes + (0 if rank else _OTHERS_FIRST_S)
        self._ends = rank == 0
        self._armed_at = float("-inf")
        self.step()

    def step(self) -> None:
        """Restart the wait; cheap enough for every step."""
        now = time.monotonic()
        if now - self._armed_at > min(1.0, self._wait_s / 100):
            faulthandler.dump_traceback_later(self._wait_s, exit=self._ends)
            self._armed_at = now

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
