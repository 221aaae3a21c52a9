"""Every error that a user can meet, in one small tree.

    SousbatchError                exit code
    |-- UsageError                2   asked for something that cannot work
    |   |-- RecipeError           2   faults of a recipe, all at once
    |   |-- PlanError             2   a recipe that this site, model or data cannot run
    |   |-- NotFoundError         2   a run, stage, checkpoint or file that does not exist
    |   `-- SlurmError            2   Slurm refused a request
    |       |-- NoSlurmError      2   no Slurm is configured here
    |       `-- UnreachableError  2   Slurm does not answer; what it did is unknown
    `-- RunError                  1   the work failed
        |-- DamagedError          1   a file is not what its marker or format says
        |-- IncompleteError       1   rows or shards are missing
        |-- FencedError           1   a newer attempt owns the stage
        |-- DeviceMemoryError     76  one row is too large for a device
        |-- NoRoomError           77  the disk is full; what was committed is safe
        `-- DivergedError         78  the training no longer learns

A job's exit code is all that the stage process learns of it: 0 done, 75 saved and
stopped, 76 device out of memory, 77 no space left, 78 diverged, anything else failed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .redaction import redacted

EXIT_STOPPED = 75
EXIT_DEVICE_MEMORY = 76
EXIT_NO_ROOM = 77
EXIT_DIVERGED = 78
_FAILED_WRITES = ("iostream error", "PytorchStreamWriter failed", "(os error 28)", "(os error 122)")


class SousbatchError(Exception):
    """The base of all errors.

    It is shown as one line, without a traceback, and without the secrets of what it quotes. *advice* is what helps a
    run that ended with it; where there is none, `resume` does.
    """

    exit_code = 1
    advice = ""

    def __init__(self, *message: object, advice: str | None = None) -> None:
        super().__init__(*message)
        if advice is not None:
            self.advice = advice

    def __str__(self) -> str:
        return redacted(super().__str__())


class UsageError(SousbatchError):
    """The request cannot work as it was made."""

    exit_code = 2
    advice = "`resume` would end in the same way: correct the recipe or its data and submit it again"


class PlanError(UsageError):
    """The recipe is right, but this site, model or data cannot run it."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(_listed(f"this cannot run, for {len(self.reasons)} reasons", self.reasons))


class NotFoundError(UsageError):
    """A thing that was named does not exist."""

    advice = ""


class SlurmError(UsageError):
    """Slurm refused a request, in its own words."""

    advice = ""


class NoSlurmError(SlurmError):
    """No Slurm is configured on this machine."""


class UnreachableError(SlurmError):
    """Slurm did not answer, so that whether it acted is unknown."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a recipe."""

    key: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.key} {self.problem}" + (f" ({self.hint})" if self.hint else "")


class RecipeError(UsageError):
    """All faults of one recipe, so that they can be fixed at once."""

    def __init__(self, recipe: str, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        what = f"recipe {recipe!r}"
        if len(self.faults) == 1:
            super().__init__(f"{what}: {self.faults[0]}")
        else:
            super().__init__(_listed(f"{what} has {len(self.faults)} faults", [str(fault) for fault in self.faults]))


def _listed(head: str, items: Sequence[str]) -> str:
    """Return one item as it is, and several below a head."""
    return items[0] if len(items) == 1 else "\n".join([f"{head}:", *(f"  {item}" for item in items)])


class RunError(SousbatchError):
    """The work failed; what was committed before stands."""


class DamagedError(RunError):
    """A file's bytes are not what its marker or its format says."""


class IncompleteError(RunError):
    """Rows or shards are missing; the message names them."""


class FencedError(RunError):
    """A newer attempt of the stage exists, so this one may commit nothing more."""


class DeviceMemoryError(RunError):
    """A device has too little memory for a single row."""

    exit_code = EXIT_DEVICE_MEMORY
    advice = "`resume` would end in the same way, unless the stage gets devices with more memory"


class NoRoomError(RunError):
    """The disk is full or over quota; what was committed before is safe."""

    exit_code = EXIT_NO_ROOM


class DivergedError(RunError):
    """The training no longer learns: its loss is no number, or far above its best."""

    exit_code = EXIT_DIVERGED
    advice = (
        "`resume` would diverge in the same way: lower train.learning_rate, or lengthen the warm-up, and submit again"
    )


@contextmanager
def no_room_named(what: str, then: str = "resume") -> Iterator[None]:
    """Turn 'disk full' and 'over quota' into a `NoRoomError`.

    The error says what was being written, and what to do once there is space.
    """
    try:
        yield
    except OSError as error:
        if not is_no_room(error):
            raise
        raise NoRoomError(
            f"no space left while writing {what}: {error.strerror}; free some space and {then}"
        ) from error


def is_no_room(error: BaseException) -> bool:
    """Say whether *error*, or what it came from, is a full disk or a spent quota.

    torch reports a failed write as a RuntimeError of its zip writer that hides the
    errno; the OSError, where there is one, is its cause or context. Where there is none, and with
    safetensors, only the message says it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NoRoomError):
            return True
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if not isinstance(seen, SousbatchError) and any(words in str(seen) for words in _FAILED_WRITES):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as "did you mean 'tiny'?", or the empty string."""
    import difflib  # 4 ms, which only a mistake needs

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
