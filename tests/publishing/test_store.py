"""The hub as a store, against a stand-in for huggingface_hub's API; no test asks the network."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from sousbatch.errors import RunError
from sousbatch.publishing.send import PUBLICATION_NAME, send
from sousbatch.publishing.store import HubStore


class Hub:
    """A repository in memory, which fails at one call, counted from 1; weights are kept as LFS does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.calls = self.fails_at = 0
        self.status = 0

    def _call(self) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            error = ConnectionError("connection reset by peer")
            error.response = SimpleNamespace(status_code=self.status)  # type: ignore[attr-defined]
            raise error

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> None:
        self._call()
        assert (repo_id, exist_ok) == ("team/small", True)
        self.private = private

    def list_repo_files(self, repo_id: str) -> list[str]:
        self._call()
        return [*self.files]

    def get_paths_info(self, repo_id: str, paths: list[str]) -> list[Any]:
        self._call()
        return [self._info(name, self.files[name]) for name in paths if name in self.files]

    def _info(self, name: str, content: bytes) -> Any:
        is_large = name.endswith(".safetensors")
        lfs = SimpleNamespace(size=len(content), sha256=hashlib.sha256(content).hexdigest()) if is_large else None
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return SimpleNamespace(path=name, size=len(content), blob_id=git, lfs=lfs)

    def hf_hub_download(self, repo_id: str, filename: str, *, local_dir: str) -> str:
        self._call()
        path = Path(local_dir) / filename
        path.write_bytes(self.files[filename])
        return str(path)

    def upload_file(self, *, path_or_fileobj: str, path_in_repo: str, repo_id: str, commit_message: str) -> None:
        self._call()
        self.files[path_in_repo] = Path(path_or_fileobj).read_bytes()

    def delete_file(self, path_in_repo: str, repo_id: str, *, commit_message: str) -> None:
        self._call()
        del self.files[path_in_repo]


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "README.md").write_text("# small")
    return {name: tmp_path / name for name in ("model.safetensors", "README.md")}


def publish(hub: Hub, contents: dict[str, Path], tmp_path: Path, *, is_private: bool = True) -> int:
    store = HubStore(hub, "team/small", is_private=is_private)
    return send({"run": "0123"}, contents, store, work=tmp_path).num_sent


def test_the_stand_in_takes_what_the_package_takes() -> None:
    for name, own in inspect.getmembers(Hub, inspect.isfunction):
        if not name.startswith("_"):
            assert set(inspect.signature(own).parameters) <= set(inspect.signature(getattr(HfApi, name)).parameters)


@pytest.mark.parametrize("is_private", [True, False])
def test_a_repository_is_made_as_private_as_asked_and_holds_all(
    contents: dict[str, Path], tmp_path: Path, is_private: bool
) -> None:
    hub = Hub()
    hub.files[".gitattributes"] = b"made by the hub"
    assert publish(hub, contents, tmp_path, is_private=is_private) == 2
    assert hub.private is is_private
    assert set(hub.files) == {".gitattributes", *contents, PUBLICATION_NAME}
    assert publish(hub, contents, tmp_path, is_private=is_private) == 0


def test_what_is_cut_at_any_call_is_resumed_and_nothing_is_sent_twice(
    contents: dict[str, Path], tmp_path: Path
) -> None:
    whole = Hub()
    publish(whole, contents, tmp_path)
    for number in range(1, whole.calls + 1):
        hub = Hub()
        hub.fails_at = number
        with pytest.raises(RunError, match="hf://team/small: .* failed: connection reset"):
            publish(hub, contents, tmp_path)
        assert PUBLICATION_NAME not in hub.files or contents.keys() < hub.files.keys()
        there = len(contents.keys() & hub.files.keys())
        assert publish(hub, contents, tmp_path) == len(contents) - there
        assert hub.files == whole.files


def test_a_refused_login_says_how_to_log_in(contents: dict[str, Path], tmp_path: Path) -> None:
    hub = Hub()
    hub.fails_at, hub.status = 1, 401
    with pytest.raises(RunError, match=r"hf auth login.*environment.inherit=\[HF_TOKEN\]"):
        publish(hub, contents, tmp_path)


def test_what_the_hub_does_not_hold_afterwards_is_told(
    contents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    true_upload = hub.upload_file

    def cuts(**options: Any) -> None:
        true_upload(**options)
        if options["path_in_repo"] == "README.md":
            hub.files["README.md"] = b"# smaLL"

    monkeypatch.setattr(hub, "upload_file", cuts)
    with pytest.raises(RunError, match="README.md is not what was sent"):
        publish(hub, contents, tmp_path)
    assert PUBLICATION_NAME not in hub.files
