"""Whole files or none, folders that go in one rename, and locks that a kill frees."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sousbatch import files


def test_canonical_json_has_one_text_for_one_value() -> None:
    assert files.canonical_json({"b": [1, 2.5], "a": "한"}) == '{"a":"한","b":[1,2.5]}'
    assert files.digest_of({"a": 1, "b": 2}) == files.digest_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.canonical_json(float("nan"))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"], "a temporary file was left"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_private_folders_are_private_and_others_keep_their_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    made = files.make_private_dir(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_syncing_a_tree_passes_over_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    files.sync_tree(tmp_path)


def test_a_removed_tree_is_out_of_sight_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    seen: list[list[str]] = []
    monkeypatch.setattr("shutil.rmtree", lambda path: seen.append(os.listdir(tmp_path)))
    files.remove_tree(tmp_path / "tree")
    assert [name.startswith(files.TEMPORARY_PREFIX) for name in seen[0]] == [True]


def test_a_file_that_is_made_while_a_tree_goes_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that found the folder before it was renamed ends its call in the renamed one."""
    (tmp_path / "tree").mkdir()
    really, late = os.rmdir, ["late"]

    def rmdir(path: str, *, dir_fd: int | None = None) -> None:
        if late:
            Path(path, late.pop()).touch()
        really(path, dir_fd=dir_fd)

    monkeypatch.setattr("os.rmdir", rmdir)
    files.remove_tree(tmp_path / "tree")
    assert late == [] and os.listdir(tmp_path) == []


def test_removing_what_is_gone_does_nothing(tmp_path: Path) -> None:
    files.remove_tree(tmp_path / "tree")


def test_bytes_below_a_folder_are_counted_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "link").symlink_to("../a/file")
    assert files.num_bytes_below(tmp_path / "a") == 5
    assert files.num_bytes_below(tmp_path / "b") == len("../a/file")
    assert files.num_bytes_below(tmp_path / "none") == 0


def test_a_held_lock_is_seen_and_freed(tmp_path: Path) -> None:
    with files.locked(tmp_path / "lock") as first:
        assert first
        with files.locked(tmp_path / "lock", wait=False) as second:
            assert not second
    with files.locked(tmp_path / "lock", wait=False) as third:
        assert third


def test_a_lock_is_freed_while_a_child_lives_that_was_forked_meanwhile(tmp_path: Path) -> None:
    """As those are that load rows of a training, while a thread of it holds the lock."""
    with files.locked(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with files.locked(tmp_path / "lock", wait=False) as mine:
            assert mine
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_kill_frees_the_lock(tmp_path: Path) -> None:
    text = (
        "import pathlib, sys, time\nfrom sousbatch import files\n"
        "with files.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", text, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with files.locked(tmp_path / "lock", wait=False) as mine:
        assert not mine
    holder.kill()
    holder.communicate()
    with files.locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def _opened(path: Path) -> list[Path]:
    """Return the descriptors of this process that *path* is open by."""
    return [one for one in Path("/proc/self/fd").iterdir() if os.path.realpath(one) == str(path)]


def test_whoever_waited_for_a_lock_in_a_removed_folder_gets_the_new_one(tmp_path: Path) -> None:
    folder, is_held = tmp_path / "run", threading.Event()
    folder.mkdir()
    with files.locked(folder / "lock"):

        def wait_for_it() -> None:
            with files.locked(folder / "lock"):
                is_held.set()
                done.wait(10)

        done = threading.Event()
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        while len(_opened(folder / "lock")) < 2:  # the thread's, too
            time.sleep(0.01)
        files.remove_tree(folder)
        folder.mkdir()
    assert is_held.wait(10)
    with files.locked(folder / "lock", wait=False) as mine:
        assert not mine, "two clients hold the same run"
    done.set()
    thread.join()
