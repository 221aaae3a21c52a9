"""The one place that knows URLs: the same calls on a folder and on a store."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import sousbatch
from sousbatch.errors import RunError, UsageError
from sousbatch.remote import Place, copy_verified, parse_place, read_blocks

ROOT = Path(sousbatch.__file__).parent


def test_nothing_but_this_module_imports_fsspec() -> None:
    own = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "build", ".venv")]
    users = [path.name for path in own if re.search(r"^\s*(import|from) fsspec", path.read_text(), re.MULTILINE)]
    assert len(own) > 100 and users == ["remote.py"]


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "memory":
        MemoryFileSystem.store.clear()
        return parse_place("memory://bucket/there")
    return parse_place(f"file://{tmp_path}/there")


@pytest.mark.parametrize("size", [0, 5, (8 << 20) + 3])
def test_a_copy_is_read_back_in_blocks(place: Place, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * (size // 256) + bytes(size % 256))
    copy_verified(source, place / "a" / "b")
    blocks = list(read_blocks(place / "a" / "b"))
    assert b"".join(blocks) == source.read_bytes() and len(blocks) == -(-size // (8 << 20))


def test_a_copy_that_comes_back_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").write_bytes(b"one")
    target = parse_place("memory://bucket/target")
    monkeypatch.setattr(type(target), "read_blocks", lambda self: iter([b"two"]))
    with pytest.raises(RunError, match="memory:///bucket/target is not what was sent"):
        copy_verified(tmp_path / "source", target)


def test_an_unknown_kind_of_url_is_named() -> None:
    with pytest.raises(UsageError, match="nosuch://bucket"):
        parse_place("nosuch://bucket")
