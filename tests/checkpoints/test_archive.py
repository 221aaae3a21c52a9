"""Archiving: what the archive does not give back whole is not removed here."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.commit import MARKER, Checkpoint
from sousbatch.checkpoints.retention.decisions import RetentionDecision
from sousbatch.checkpoints.rotation import RemovalOptions, carry_out

URL = "memory://archive/run/train"


def no_fence() -> None:
    pass


@pytest.fixture
def store() -> MemoryFileSystem:
    found = fsspec.filesystem("memory")
    found.store.clear()
    found.pseudo_dirs[:] = [""]
    return found


@pytest.fixture
def made(tmp_path: Path) -> Checkpoint:
    temporary = commit.begin(tmp_path, 7, 1)
    (temporary / "global_step7").mkdir()
    (temporary / "global_step7" / "weights").write_bytes(bytes(range(256)) * 100)
    (temporary / "latest").write_text("global_step7")
    return commit.commit(temporary, step=7, attempt=1, metric=0.5, world_size=1, check_fence=no_fence)


def archive(checkpoint: Checkpoint, url: str = URL) -> tuple[str, str]:
    decision = RetentionDecision(checkpoint=checkpoint, action="archive", reason="")
    (done,) = carry_out([decision], RemovalOptions(check_fence=no_fence, archive_url=url))
    return done.outcome, done.problem


def test_what_is_archived_is_there_whole_and_gone_here(
    store: MemoryFileSystem, made: Checkpoint, tmp_path: Path
) -> None:
    assert archive(made) == ("archived", "")
    assert not made.path.exists()
    store.get(f"{URL}/step-00000007", str(tmp_path / "back" / "step-00000007"), recursive=True)
    back = commit.read_checkpoint(tmp_path / "back" / "step-00000007")
    assert (back.step, back.metric, commit.verify(back)) == (7, 0.5, ())


def test_a_folder_can_be_the_archive(made: Checkpoint, tmp_path: Path) -> None:
    assert archive(made, str(tmp_path / "old disk")) == ("archived", "")
    assert commit.verify(commit.read_checkpoint(tmp_path / "old disk" / "step-00000007")) == ()


@pytest.mark.parametrize("num_files", [0, 1, 2])
def test_an_archive_that_fails_half_way_holds_no_checkpoint_and_is_taken_up_again(
    store: MemoryFileSystem, made: Checkpoint, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    opened = 0
    true_open = MemoryFileSystem.open

    def fails_later(self: MemoryFileSystem, path: str, mode: str = "rb", **options: object) -> object:
        nonlocal opened
        opened += mode == "wb"
        if opened > num_files:
            raise ConnectionResetError("connection reset by peer")
        return true_open(self, path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "open", fails_later)
        outcome, problem = archive(made)
    assert (outcome, "connection reset" in problem) == ("kept", True)
    assert commit.verify(made) == ()
    assert not store.exists(f"{URL}/step-00000007/{MARKER}")
    assert archive(made) == ("archived", "")


def test_what_comes_back_changed_stays_here(
    store: MemoryFileSystem, made: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_open = MemoryFileSystem.open

    def flips(self: MemoryFileSystem, path: str, mode: str = "rb", **options: object) -> object:
        stream = true_open(self, path, mode, **options)
        if mode == "rb" and path.endswith("weights"):
            stream.getbuffer()[1000] ^= 1
        return stream

    monkeypatch.setattr(MemoryFileSystem, "open", flips)
    outcome, problem = archive(made)
    assert (outcome, "is not what was sent" in problem) == ("kept", True)
    assert commit.verify(made) == ()


def test_what_is_archived_already_is_only_removed_here(
    store: MemoryFileSystem, made: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the last byte there and the removal here."""
    with monkeypatch.context() as patch:
        patch.setattr("sousbatch.files.remove_tree", lambda path: None)
        archive(made)
    assert made.path.exists()
    written = store.modified(f"{URL}/step-00000007/latest")
    assert archive(made) == ("archived", "")
    assert store.modified(f"{URL}/step-00000007/latest") == written


def test_an_unknown_kind_of_archive_is_a_problem_not_a_crash(made: Checkpoint) -> None:
    outcome, problem = archive(made, "nosuch://bucket")
    assert (outcome, "nosuch" in problem) == ("kept", True)
