"""Find where the weights that are stored lie among those of a model in memory.

transformers 5 holds some weights in another form than the hub's files, such as all experts of a layer in one tensor.
It turns them back when it saves, by operations that only move elements. Here these run on tensors without memory, and
what they move is noted, so that a checkpoint of any size can be written in the hub's form a block at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MAX_RUNS = 1 << 16  # of one tensor; one that is transposed has a run for each element


class Run(NamedTuple):
    """Elements that lie side by side in the tensor called *name*."""

    name: str
    first: int
    num: int


class StoredForm(NamedTuple):
    """A tensor as it is stored: its shape, and the runs of its elements in order."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]


def stored_forms(model: Any) -> dict[str, StoredForm] | None:
    """Return every tensor that transformers stores for *model*, by its name there.

    Its runs name tensors of the model's state dict. Return None where an operation is not one that only moves runs of
    elements: such a model can be written by transformers alone.
    """
    from transformers.core_model_loading import revert_weight_conversion

    state = {
        name: torch.empty(tuple(getattr(value, "ds_shape", value.shape)), dtype=value.dtype, device="meta")
        for name, value in model.state_dict(keep_vars=True).items()
    }
    with _Tracer(state) as tracer:
        stored = revert_weight_conversion(model, dict(state))
    try:
        return {name: StoredForm(tuple(value.shape), tuple(tracer.runs_of(value))) for name, value in stored.items()}
    except _UntraceableError:
        return None


def stored_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Return the names under which parameters of *model* are stored.

    Only those are named that have others than their own.
    """
    found: dict[str, list[str]] = {}
    for stored, form in (stored_forms(model) or {}).items():
        for name in dict.fromkeys(run.name for run in form.runs):
            found.setdefault(name, []).append(stored)
    return {name: tuple(stored) for name, stored in found.items() if stored != [name]}


class _UntraceableError(Exception):
    """Elements were changed, or moved one by one."""


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class
    """A watcher of operations on tensors without memory.

    It knows the runs of each storage.
    """

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[torch.Tensor] = list(named.values())  # so that no storage's place is used again
        self._runs = {_storage(value): [Run(name, 0, value.numel())] for name, value in named.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and _storage(result) not in self._runs:
            self._kept.append(result)
            aten, operation = torch.ops.aten, func.overloadpacket
            if operation in (aten.cat, aten.stack):
                dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)
                self._note(result, lambda: self._joined(args[0], dim % result.ndim))
            elif operation in (aten.clone, aten._to_copy):
                self._note(result, lambda: list(self.runs_of(args[0])))
        return result

    def _note(self, result: torch.Tensor, look: Any) -> None:
        try:
            self._runs[_storage(result)] = look()
        except _UntraceableError:
            pass  # then nothing that is made of it has runs either

    def runs_of(self, value: torch.Tensor) -> Iterator[Run]:
        """Yield the runs of a tensor, which may be a view."""
        if _storage(value) not in self._runs:
            raise _UntraceableError
        held = self._runs[_storage(value)]
        inner, num_outer = 1, value.ndim
        while num_outer and (value.stride(num_outer - 1) == inner or value.shape[num_outer - 1] == 1):
            inner *= value.shape[num_outer - 1]
            num_outer -= 1
        outer = value.shape[:num_outer]
        if math.prod(outer) > _MAX_RUNS:
            raise _UntraceableError
        steps, offset = value.stride(), int(value.storage_offset())
        begins = (
            offset + sum(at * step for at, step in zip(place, steps, strict=False))
            for place in itertools.product(*map(range, outer))
        )
        yield from _merged(run for begin in begins for run in _cut(held, begin, inner))

    def _joined(self, parts: Sequence[torch.Tensor], dim: int) -> list[Run]:
        held = [list(self.runs_of(part)) for part in parts]
        num_outer = math.prod(parts[0].shape[:dim])
        if num_outer * len(parts) > _MAX_RUNS:
            raise _UntraceableError
        sizes = [part.numel() // max(1, num_outer) for part in parts]
        return list(
            _merged(
                run
                for place in range(num_outer)
                for runs, size in zip(held, sizes, strict=True)
                for run in _cut(runs, place * size, size)
            )
        )


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _cut(runs: Sequence[Run], first: int, count: int) -> Iterator[Run]:
    """Yield the elements first .. first + count of *runs*."""
    for run in runs:
        if count == 0:
            return
        if first >= run.num:
            first -= run.num
            continue
        taken = min(count, run.num - first)
        yield Run(run.name, run.first + first, taken)
        first, count = 0, count - taken


def _merged(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield *runs*, those that meet made one."""
    last: Run | None = None
    for run in runs:
        if last is not None and (last.name, last.first + last.num) == (run.name, run.first):
            last = Run(last.name, last.first, last.num + run.num)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
