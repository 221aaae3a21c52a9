"""Models behind URLs are fetched once, also where a server lists no folders."""

from __future__ import annotations

import functools
import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.recipes.inspect.conversion import converted
from sousbatch.recipes.inspect.model import model_digest
from sousbatch.recipes.inspect.model_folder import find_folder


@dataclass
class Server:
    """A web server: what it was asked for, and whether it lists its folders."""

    url: str = ""
    sent: list[str] = field(default_factory=list)
    lists: bool = True


@pytest.fixture
def server(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the project's folder."""
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    state = Server()

    class Handler(SimpleHTTPRequestHandler):
        def list_directory(self, path: Any) -> io.BytesIO | None:
            if state.lists:
                return super().list_directory(path)
            self.send_error(403)
            return None

        def do_GET(self) -> None:
            state.sent.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(project)))
    state.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield state
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize("lists", [True, False])
def test_a_model_behind_a_url_is_fetched_once(server: Server, project: Path, lists: bool) -> None:
    server.lists = lists
    folder, is_cached = find_folder("model.path", f"{server.url}/model")
    assert is_cached and {path.name for path in folder.iterdir()} == {path.name for path in Path("model").iterdir()}
    assert model_digest(folder, folder, {}) == model_digest(project / "model", project / "model", {})
    server.sent.clear()
    assert find_folder("model.path", f"{server.url}/model") == (folder, True)
    assert "model.safetensors" not in server.sent
    (project / "model" / "tokenizer_config.json").write_text("{}")
    assert find_folder("model.path", f"{server.url}/model")[0] != folder, "the model behind the URL has changed"


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "target.spm", "bpe.codes", "generation_config.json"])
def test_each_file_that_decides_what_a_model_says_decides_its_identity(project: Path, name: str) -> None:
    folder = project / "model"
    (folder / name).write_text("one")
    before = model_digest(folder, folder, {})
    (folder / name).write_text("two")
    assert model_digest(folder, folder, {}) != before


def test_a_url_that_has_no_model_says_what_to_give(server: Server, project: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/nowhere' is no folder of a model: its server shows no config\.json"):
        find_folder("model.path", f"{server.url}/nowhere")
    with pytest.raises(UsageError, match=r"is an archive; name the folder in it: tar://FOLDER::http://.*/m\.tar\.gz"):
        find_folder("model.path", f"{server.url}/m.tar.gz")
    with pytest.raises(UsageError, match="model.path 'http://127.0.0.1:9/m'"):
        find_folder("model.path", "http://127.0.0.1:9/m")
    with pytest.raises(UsageError, match="model.path 'what://x/m': .*what"):
        find_folder("model.path", "what://x/m")


def test_folders_in_archives_and_on_this_machine_are_urls_too(project: Path, tmp_path: Path) -> None:
    assert find_folder("model.path", f"file://{project / 'model'}") == (project / "model", False)
    with pytest.raises(UsageError, match="does not exist"):
        find_folder("model.path", f"file://{project / 'nowhere'}")
    shutil.copytree(project / "model", tmp_path / "packed" / "llama")
    with tarfile.open(tmp_path / "m.tar", "w") as archive:
        archive.add(tmp_path / "packed" / "llama", "llama")
    folder, is_cached = find_folder("model.path", f"tar://llama::{tmp_path / 'm.tar'}")
    assert is_cached and model_digest(folder, folder, {}) == model_digest(project / "model", project / "model", {})


def test_a_gguf_file_behind_a_url_is_fetched_as_the_file(server: Server, project: Path) -> None:
    (project / "tiny.gguf").write_bytes(b"GGUF")
    path, is_cached = find_folder("model.path", f"{server.url}/tiny.gguf")
    assert is_cached and path.name == "tiny.gguf" and path.read_bytes() == b"GGUF"
    with pytest.raises(UsageError, match="damaged, or no GGUF file"):
        converted("model.path", "x", path)
