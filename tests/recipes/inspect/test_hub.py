"""Models named by a hub id, fetched from a server here that speaks as much of the hub's protocol as that needs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40


@dataclass
class Hub:
    """The server: what it was asked for, and whether its models are behind a gate."""

    url: str
    sent: list[str] = field(default_factory=list)
    is_gated: bool = False


@pytest.fixture
def hub(project: Path) -> Iterator[Hub]:
    """A hub with one model, `org/tiny`: that of the project's folder."""
    files = {path.name: path.read_bytes() for path in (project / "model").iterdir()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/api/models/org/tiny/revision/main" and not state.is_gated:
                self._send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}))
            elif self.path.startswith(f"/api/models/org/tiny/tree/{COMMIT}") and not state.is_gated:
                listed = [{"type": "file", "path": n, "size": len(f), "oid": "0" * 40} for n, f in files.items()]
                self._send(json.dumps(listed))
            elif self.path.startswith("/org/tiny/resolve/") and not state.is_gated:
                self._send(files[self.path.rpartition("/")[2]])
            else:
                self.send_response(401 if state.is_gated else 404)
                self.send_header("X-Error-Code", "GatedRepo" if state.is_gated else "RepoNotFound")
                self.end_headers()

        do_HEAD = do_GET

        def _send(self, content: str | bytes) -> None:
            body = content.encode() if isinstance(content, str) else content
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                state.sent.append(self.path.rpartition("/")[2])
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Hub(url=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def plan(hub: Hub, home: Path, code: int = 0) -> str:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "sousbatch", "plan", "./small.yaml", "model.path=org/tiny", "--launcher", "local"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_hub_model_is_fetched_once_and_named_in_the_plan(hub: Hub, tmp_path: Path) -> None:
    num_bytes = sum(path.stat().st_size for path in Path("model").iterdir())
    said = plan(hub, tmp_path / "hub")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.sent)
    assert re.search(rf"cache of models +0 B +{num_bytes:,} B of the model are there", said)
    hub.sent.clear()
    assert plan(hub, tmp_path / "hub") == said and "model.safetensors" not in hub.sent


def test_a_model_that_the_hubs_cache_has_no_room_for_is_refused_before_its_first_byte(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", home], capture_output=True).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        said = plan(hub, home, code=2)
        assert "GB in the cache" in said and "set HF_HOME to a folder with more free space" in said
        assert "model.safetensors" not in hub.sent
    finally:
        subprocess.run(["umount", "-l", home], check=True)


def test_what_was_fetched_is_used_where_the_hub_does_not_answer(hub: Hub, tmp_path: Path) -> None:
    said = plan(hub, tmp_path / "hub")
    assert plan(Hub(url="http://127.0.0.1:9"), tmp_path / "hub") == said


def test_a_gated_model_asks_for_a_token(hub: Hub, tmp_path: Path) -> None:
    hub.is_gated = True
    said = plan(hub, tmp_path / "hub", code=2)
    assert "model.path 'org/tiny'" in said and "for a gated model that HF_TOKEN is set" in said
    assert "Traceback" not in said
