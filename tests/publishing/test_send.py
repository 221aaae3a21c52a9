"""Publishing: verified, resumed wherever it was cut, and never over what belongs to others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sousbatch.errors import RunError, UsageError
from sousbatch.publishing.send import PART_NAME, PUBLICATION_NAME, Publication, send
from sousbatch.publishing.store import FileStore, open_store, refusal_of
from sousbatch.remote import RemotePath

ABOUT = {"run": "0123456789ab", "recipe": "small"}


class Cut(MemoryFileSystem):
    """A store that fails at one call, counted from 1, half-way through where it writes; 0: at none."""

    protocol = "cut"
    cachable = False
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    fails_at = 0
    calls = 0

    def _call(self, method: str, *values: Any, **options: Any) -> Any:
        Cut.calls += 1
        if Cut.calls == Cut.fails_at:
            if method == "pipe_file" or (method == "open" and values[1:2] == ("wb",)):
                MemoryFileSystem.pipe_file(self, values[0], b'{"half')
            raise ConnectionResetError("connection reset by peer")
        return getattr(MemoryFileSystem, method)(self, *values, **options)

    def ls(self, *values: Any, **options: Any) -> Any:
        return self._call("ls", *values, **options)

    def info(self, *values: Any, **options: Any) -> Any:
        return self._call("info", *values, **options)

    def open(self, *values: Any, **options: Any) -> Any:
        return self._call("open", *values, **options)

    def makedirs(self, *values: Any, **options: Any) -> Any:
        return self._call("makedirs", *values, **options)

    def rm(self, *values: Any, **options: Any) -> Any:
        return self._call("rm", *values, **options)


@pytest.fixture
def cut() -> Iterator[FileStore]:
    Cut.store.clear()
    Cut.pseudo_dirs[:] = [""]
    Cut.fails_at = Cut.calls = 0
    yield FileStore(RemotePath(Cut(), "/models/small"))


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., Publication]:
    """Send three files; where they lie is the same at each call."""
    (tmp_path / "made").mkdir()
    (tmp_path / "work").mkdir()
    contents = {"model.safetensors": bytes(range(256)) * 20, "README.md": b"# small", "predictions/p.jsonl": b"{}\n"}
    places = {}
    for name, content in contents.items():
        places[name] = tmp_path / "made" / name.replace("/", "-")
        places[name].write_bytes(content)

    def call(store: Any, run: str = ABOUT["run"], **options: Any) -> Publication:
        return send({**ABOUT, "run": run}, places, store, work=tmp_path / "work", **options)

    return call


def held(store: FileStore) -> dict[str, bytes]:
    return {name: file.getvalue() for name, file in Cut.store.items()}


def test_a_folder_holds_all_files_and_a_list_with_their_digests(
    publish: Callable[..., Publication], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "folder"
    done = publish(open_store(f"file://{target}"))
    assert (done.num_files, done.num_sent) == (3, 3)
    listed = json.loads((target / PUBLICATION_NAME).read_text())
    assert listed["run"] == ABOUT["run"] and [file["name"] for file in listed["files"]] == [
        "README.md",
        "model.safetensors",
        "predictions/p.jsonl",
    ]
    there = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert there == {file["name"] for file in listed["files"]} | {PUBLICATION_NAME}
    assert publish(open_store(str(target))).num_sent == 0


def test_what_differs_or_is_gone_is_sent_again_and_nothing_else(
    publish: Callable[..., Publication], cut: FileStore
) -> None:
    publish(cut)
    whole = held(cut)
    Cut.store["/models/small/model.safetensors"].getbuffer()[7] ^= 1
    Cut.store.pop("/models/small/README.md")
    said: list[str] = []
    assert publish(cut, say=said.append).num_sent == 2
    assert said == ["1 of 2 files: README.md", "2 of 2 files: model.safetensors"]
    assert held(cut) == whole


def test_a_publication_that_is_cut_at_any_call_is_seen_as_unfinished_and_is_resumed(
    publish: Callable[..., Publication], cut: FileStore
) -> None:
    publish(cut)
    whole, num_calls = held(cut), Cut.calls
    assert num_calls > 20
    for number in range(1, num_calls + 1):
        Cut.store.clear()
        Cut.pseudo_dirs[:] = [""]
        Cut.calls, Cut.fails_at = 0, number
        try:
            publish(cut)
            is_told = False
        except RunError as error:
            is_told = " failed: " in str(error)
        Cut.fails_at = 0
        found = held(cut)
        assert is_told or found == whole, "fsspec hides a lost connection that did no harm"
        listed = found.get(f"/models/small/{PUBLICATION_NAME}", b"")
        if listed == whole[f"/models/small/{PUBLICATION_NAME}"]:  # the list says that all is there
            assert whole.items() <= found.items()
        publish(cut)
        assert held(cut) == whole, f"cut at call {number}"


def test_a_second_publication_of_a_changed_run_that_is_cut_at_any_call_is_no_complete_one(
    publish: Callable[..., Publication], cut: FileStore, tmp_path: Path
) -> None:
    publish(cut)
    first = held(cut)
    (tmp_path / "made" / "README.md").write_bytes(b"# better")
    Cut.calls = 0
    publish(cut)
    second, num_calls = held(cut), Cut.calls
    for number in range(1, num_calls + 1):
        for name, content in first.items():
            MemoryFileSystem.pipe_file(Cut(), name, content)
        Cut.calls, Cut.fails_at = 0, number
        try:
            publish(cut)
            is_told = False
        except RunError as error:
            is_told = " failed: " in str(error)
        Cut.fails_at = 0
        found = held(cut)
        assert is_told or found == second, "fsspec hides a lost connection that did no harm"
        assert PART_NAME in {name.rpartition("/")[2] for name in found} or found in (first, second)
        publish(cut)
        assert held(cut) == second, f"cut at call {number}"


@pytest.mark.parametrize("is_cut", [False, True])
def test_the_place_of_another_run_is_left_alone(
    publish: Callable[..., Publication], cut: FileStore, is_cut: bool
) -> None:
    if is_cut:

        def stop() -> None:
            raise RunError("stopped")

        with pytest.raises(RunError, match="stopped"):
            publish(cut, before_each=stop)
    else:
        publish(cut)
    before = held(cut)
    with pytest.raises(UsageError, match="cut:.*models/small: holds the publication of run 0123456789ab; name another"):
        publish(cut, run="fedcba987654")
    assert held(cut) == before


def test_a_folder_with_other_files_is_left_alone(publish: Callable[..., Publication], tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="home: holds files and no publication"):
        publish(open_store(str(tmp_path / "home")))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["README.md"]


def test_what_does_not_arrive_whole_is_no_publication(
    publish: Callable[..., Publication], cut: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_open = Cut.open

    def flips(self: Cut, path: str, mode: str = "rb", **options: Any) -> Any:
        stream = true_open(self, path, mode, **options)
        if mode == "rb" and path.endswith("safetensors"):
            stream.getbuffer()[1000] ^= 1
        return stream

    monkeypatch.setattr(Cut, "open", flips)
    with pytest.raises(RunError, match="model.safetensors is not what was sent"):
        publish(cut)
    assert f"/models/small/{PUBLICATION_NAME}" not in held(cut)


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("nosuch://bucket/x", "nosuch"),
        ("models/small", "is no absolute folder, such as /data/models/small"),
        ("https://host/x", "a web server takes no files"),
        ("memory://x", "would be gone when the job ends"),
        ("hf://a/b/c", "write hf://OWNER/NAME"),
        ("hf://small", "write hf://OWNER/NAME"),
        ("/data/models", ""),
        ("file:///data/models", ""),
        ("hf://my-team/small", ""),
    ],
)
def test_a_place_that_takes_nothing_is_told_by_its_name(url: str, part: str) -> None:
    found = refusal_of(url)
    assert part in found and bool(part) == bool(found)


def test_the_memory_of_fsspec_is_a_place_for_tests(publish: Callable[..., Publication]) -> None:
    fsspec.filesystem("memory").store.clear()
    publish(open_store("memory://models/small"))
    assert fsspec.filesystem("memory").exists(f"/models/small/{PUBLICATION_NAME}")
