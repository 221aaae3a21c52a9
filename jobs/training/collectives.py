"""Let ranks agree: on stopping, and on whether something worked on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...errors import FencedError, NoRoomError, RunError, is_no_room

T = TypeVar("T")
_OK, _STORAGE, _FAILED, _FENCED, _NO_ROOM = range(5)


class StorageError(RunError):
    """The file system failed; the next save may work again."""


class Ranks:
    """All ranks of this job, which agree over gloo so that no device waits."""

    def __init__(self) -> None:
        self.is_many = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.is_many else 0
        self.size = dist.get_world_size() if self.is_many else 1
        self._group = dist.new_group(backend="gloo") if self.is_many else None

    def from_first(self, numbers: list[int]) -> list[int]:
        """Return rank 0's *numbers* on every rank; all give as many."""
        if not self.is_many:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.broadcast(tensor, src=0, group=self._group)
        return [int(number) for number in tensor]

    def do(self, what: str, work: Callable[[], None]) -> None:
        """Do *work* on every rank, and fail on every rank when it failed on one.

        A rank that left alone would leave the others waiting in their next collective.
        """
        code, cause = _OK, None
        try:
            work()
        except Exception as error:  # the other ranks must learn of every error
            cause = error
            code = _code_of(error)
        worst = self._worst(code)
        if worst == _OK:
            return
        if worst == _NO_ROOM:
            raise NoRoomError(
                f"no space left while {what}; the last committed checkpoint stands, free some space and resume"
            ) from cause
        if isinstance(cause, (FencedError, RunError)):
            raise cause
        if worst == _FENCED:
            raise FencedError(f"a newer attempt took over while {what}") from cause
        failure = StorageError if worst == _STORAGE else RunError
        raise failure(f"{what} failed" + (f": {cause}" if cause else " on another rank; its log says why")) from cause

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank."""
        if not self.is_many:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        if not self.is_many:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return float(tensor)

    def _worst(self, code: int) -> int:
        if not self.is_many:
            return code
        tensor = torch.tensor([code])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return int(tensor)


def _code_of(error: BaseException) -> int:
    """Return what kind of failure *error* is.

    torch hides an OSError as the context of its RuntimeError.
    """
    if is_no_room(error):
        return _NO_ROOM
    if isinstance(error, FencedError):
        return _FENCED
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return _FAILED if seen is None else _STORAGE
