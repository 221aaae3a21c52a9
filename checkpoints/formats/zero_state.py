"""One checkpoint file's mapping.

Each look-up is checked, so that a wrong file is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from ...errors import DamagedError
from ...remote import Place
from .torch_zip import load_state
from .unpickler import StoredTensor

_T = TypeVar("_T")
_RANK_FILE = re.compile(r"mp_rank_\d+_?(model|optim)_states$")


@dataclass(frozen=True, kw_only=True)
class State:
    """A mapping out of *path*.

    Every method raises `DamagedError` when what it names is not there as such.
    """

    path: Place
    values: Mapping[str, object]
    digest: str = ""

    @classmethod
    def load(cls, path: Place) -> State:
        """Read a file.

        *digest* is that of its zip directory, which has the CRC of all that it holds. torch writes a file's name into
        it, so one that was swapped with another rank's is known.
        """
        values, archive = load_state(path)
        if _RANK_FILE.search(archive.saved_as) and not path.name.removeprefix("bf16_").startswith(
            archive.saved_as.removeprefix("bf16_")
        ):
            raise DamagedError(
                f"{path}: was saved as {archive.saved_as}.pt; files of ranks are swapped, give them back their names"
            )
        return cls(path=path, values=values, digest=archive.digest())

    def has(self, key: str) -> bool:
        return key in self.values

    def below(self, key: str) -> State:
        """Return the mapping at *key*."""
        return State(path=self.path, values=self._get(key, dict))

    def integer(self, key: str) -> int:
        return self._get(key, int)

    def items_of(self, key: str) -> list[object]:
        return self._get(key, list)

    def names(self, key: str) -> dict[str, str]:
        """Return the mapping of names to names at *key*.

        The mapping is empty where the key is absent or None.
        """
        return {str(name): str(kept) for name, kept in self._get(key, dict).items()} if self.values.get(key) else {}

    def tensor(self, key: str) -> StoredTensor:
        return self._get(key, StoredTensor)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return what is a tensor here, in the order of the file."""
        return {name: value for name, value in self.values.items() if isinstance(value, StoredTensor)}

    def tensors_of(self, key: str) -> tuple[StoredTensor, ...]:
        found = self.items_of(key)
        return tuple(self._checked(f"{key}[{index}]", value, StoredTensor) for index, value in enumerate(found))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return what is here as shapes by name, in the order of the file."""
        return {name: self._checked(name, shape, tuple) for name, shape in self.values.items()}

    def shape_groups(self, key: str) -> list[dict[str, tuple[int, ...]]]:
        """Return the list of mappings of shapes at *key*.

        DeepSpeed before 0.4.1 wrote the mapping of one group.
        """
        found = self.values.get(key)
        groups = [found] if isinstance(found, dict) else [self._checked(key, one, dict) for one in self.items_of(key)]
        return [State(path=self.path, values=group).shapes() for group in groups]

    def _get(self, key: str, kind: type[_T]) -> _T:
        if key not in self.values:
            raise DamagedError(f"{self.path}: has no {key!r}; it is not the file of a DeepSpeed checkpoint")
        return self._checked(key, self.values[key], kind)

    def _checked(self, key: str, value: object, kind: type[_T]) -> _T:
        if not isinstance(value, kind):
            raise DamagedError(f"{self.path}: {key!r} is {type(value).__name__}, not {kind.__name__}")
        return value
