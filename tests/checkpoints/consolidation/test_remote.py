"""Checkpoints behind URLs: read by ranges over real HTTP, and models written to a store."""

from __future__ import annotations

import http.server
import os
import tarfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.manifest import MANIFEST_NAME, read_manifest
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, IncompleteError, RunError, UsageError
from sousbatch.remote import RemotePath, parse_place


@dataclass
class Server:
    """A folder behind HTTP, and what was sent of it."""

    root: Path
    url: str = ""
    num_bytes: int = 0
    num_requests: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    wrong_size: bool = False
    is_gone: bool = False
    has_ranges: bool = True


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(root=tmp_path / "served")
    found.root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Files by ranges, folders as lists of links: what an object store or nginx does."""

        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = found.root / urllib.parse.unquote(self.path).strip("/")
            if not path.exists() or found.is_gone:
                self.send_error(503 if found.is_gone else 404)
                return
            if path.is_dir():
                names = [entry.name + "/" * entry.is_dir() for entry in sorted(path.iterdir())]
                links = "".join(f'<a href="{urllib.parse.quote(name)}">{name}</a>' for name in names)
                self.send(200, f'<a href="../">up</a>{links}'.encode(), {}, with_body)
                return
            data, size = path.read_bytes(), path.stat().st_size
            asked = self.headers.get("Range")
            if asked is None or not found.has_ranges:
                self.send(200, data, {"Accept-Ranges": "bytes"}, with_body)
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or size - 1), size - 1)
            shown = {"Content-Range": f"bytes {begin}-{end}/{size}", "Accept-Ranges": "bytes"}
            self.send(206, data[begin : end + 1 - found.wrong_size], shown, with_body)

        def send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            with found.lock:
                found.num_requests += 1
                found.num_bytes += len(body) if with_body else 0
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        found.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        listening.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", ["z3_bf16", "z3_frozen_3_ranks", "z2_lora", "z0_tied", "z1_fp32_accumulation"])
def test_over_http_it_makes_the_model_that_it_makes_here(
    case: str, cases: Path, server: Server, tmp_path: Path
) -> None:
    (server.root / "ck").symlink_to(cases / case / "ck")
    options = ConsolidateOptions(num_workers=2)
    adapter = cases / "z3_lora" / "ck"  # has the adapter's configuration
    if case == "z2_lora":
        options = ConsolidateOptions(copy_from=adapter)
    here = consolidate(open_source(cases / case / "ck"), tmp_path / "here", options)
    there = consolidate(open_source(parse_place(f"{server.url}/ck")), tmp_path / "there", options)
    assert here is not None and there is not None and here.digest == there.digest
    assert contents(tmp_path / "here").keys() == contents(tmp_path / "there").keys()


def test_a_third_of_the_bytes_is_fetched(server: Server, tmp_path: Path, write_zero3: Callable[..., Path]) -> None:
    """36 % is the limit: of 12 bytes per parameter 4 are the masters, the rest is headers and margin."""
    path = write_zero3(server.root / "ck", shapes={"a": (700, 1000), "b": (1500, 1000), "norm": (1000,)}, world_size=4)
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    options = ConsolidateOptions(num_workers=2, is_verified=False)
    manifest = consolidate(open_source(parse_place(f"{server.url}/ck")), tmp_path / "out", options)
    assert manifest is not None and manifest.num_params == 2_201_000
    assert server.num_bytes < 0.36 * total
    assert manifest.digest == consolidate(open_source(path), tmp_path / "here").digest


def test_the_configuration_and_tokenizer_are_fetched_too(cases: Path, server: Server, tmp_path: Path) -> None:
    (server.root / "ck").symlink_to(cases / "z3_bf16" / "ck")
    place = parse_place(f"{server.url}/ck")
    consolidate(open_source(place), tmp_path / "out", ConsolidateOptions(copy_from=place))
    assert {"config.json", "generation_config.json"} & contents(tmp_path / "out").keys()


def test_a_file_that_is_missing_there_is_named(copied: Callable[[str], Path], server: Server) -> None:
    path = copied("z3_bf16")
    next((path / "global_step1").glob("*_1_*_optim_states.pt")).unlink()
    path.rename(server.root / "ck")
    with pytest.raises(IncompleteError, match="optim_states of rank 1 of 2 missing"):
        open_source(parse_place(f"{server.url}/ck"))


def test_a_server_that_sends_too_little_is_named(cases: Path, server: Server) -> None:
    (server.root / "ck").symlink_to(cases / "z3_bf16" / "ck")
    server.wrong_size = True
    with pytest.raises(DamagedError, match="gave .* bytes where .* were asked for"):
        open_source(parse_place(f"{server.url}/ck"))


def test_a_store_that_is_gone_is_named(cases: Path, server: Server, tmp_path: Path) -> None:
    (server.root / "ck").symlink_to(cases / "z3_bf16" / "ck")
    source = open_source(parse_place(f"{server.url}/ck"))
    server.is_gone = True
    with pytest.raises(RunError, match=r"optim_states.pt: cannot be read: 503"):
        consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=2000))
    server.is_gone = False
    consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=2000))


def test_a_protocol_that_is_not_known_is_named() -> None:
    with pytest.raises(UsageError, match="nosuch"):
        parse_place("nosuch://bucket/ck")


@pytest.fixture
def store() -> Iterator[RemotePath]:
    place = parse_place("memory://bucket/model")
    assert isinstance(place, RemotePath)
    yield place
    place.fs.store.clear()
    place.fs.pseudo_dirs[:] = [""]


def stored(store: RemotePath) -> dict[str, bytes]:
    return {place.name: place.read_bytes() for place in store.iterdir()}


def test_a_server_without_ranges_is_named_with_the_way_out(server: Server) -> None:
    """`python -m http.server` sends the whole file for every request."""
    server.has_ranges = False
    (server.root / "ck").mkdir()
    save_file({"a": torch.ones(100_000)}, server.root / "ck" / "model.safetensors")
    with pytest.raises(UsageError, match="does not serve ranges .*; download the checkpoint first, or use a server"):
        open_source(parse_place(f"{server.url}/ck"))


@pytest.mark.parametrize("num_parts", [1, 3])
def test_a_model_is_written_to_a_url_its_manifest_last(
    num_parts: int, cases: Path, tmp_path: Path, store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source, options = open_source(cases / "z3_bf16" / "ck"), ConsolidateOptions(max_shard_bytes=2000, is_verified=True)
    for part in range(num_parts):
        assert not (store / MANIFEST_NAME).exists()
        consolidate(source, store, options, part=part, num_parts=num_parts)
    consolidate(source, tmp_path / "here", options)
    assert stored(store) == contents(tmp_path / "here")
    assert read_manifest(store).num_params == 5634
    assert [path.name for path in tmp_path.iterdir()] == ["here"]  # nothing is left of what was staged


def test_an_interrupted_upload_goes_on_at_its_shard(cases: Path, tmp_path: Path, store: RemotePath) -> None:
    source, options, seen = open_source(cases / "z3_bf16" / "ck"), ConsolidateOptions(max_shard_bytes=2000), []

    def stop(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(source, store, options, progress=stop)
    with pytest.raises(UsageError, match="unfinished consolidation of another checkpoint or with other options"):
        consolidate(source, store, ConsolidateOptions(max_shard_bytes=2000, dtype="bfloat16"))
    consolidate(source, store, options, progress=lambda done, total: seen.append(done / total))
    assert seen[0] > 0.4
    consolidate(source, tmp_path / "here", options)
    assert stored(store) == contents(tmp_path / "here")


def test_a_store_that_holds_other_things_is_refused(cases: Path, store: RemotePath) -> None:
    store.fs.pipe_file(f"{store.path}/notes.txt", b"mine")
    with pytest.raises(UsageError, match="is not empty"):
        consolidate(open_source(cases / "z3_bf16" / "ck"), store)
    assert stored(store) == {"notes.txt": b"mine"}


def test_a_store_that_cannot_be_written_says_so(cases: Path, server: Server, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="out/.*: cannot be written"):
        consolidate(open_source(cases / "z3_bf16" / "ck"), parse_place(f"{server.url}/out"))


def test_files_behind_a_file_url_are_files_here(cases: Path) -> None:
    assert parse_place(f"file://{cases}") == cases
    assert parse_place("~/x") == Path(os.path.expanduser("~/x"))


def test_more_ranks_than_a_process_may_hold_open_files(
    write_zero3: Callable[..., Path], tmp_path: Path, run_python: Callable[..., object]
) -> None:
    path = write_zero3(tmp_path / "ck", shapes={"a": (300, 10), "b": (7,)}, world_size=600)
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
        "from pathlib import Path; from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate\n"
        f"source = detect.open_source(Path({str(path)!r}))\n"
        f"out = Path({str(tmp_path / 'out')!r})\n"
        "options = consolidate.ConsolidateOptions(dtype='float32', num_workers=3)\n"
        "print(consolidate.consolidate(source, out, options).num_params)"
    )
    done = run_python(code)
    assert done.stdout.strip() == "3007", done.stderr  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    expected = torch.load(path / "expected.pt")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name])


def test_threads_take_turns_at_a_tar_file(cases: Path, tmp_path: Path) -> None:
    """A tar file is one open file: where one thread seeks, another must not read."""
    with tarfile.open(tmp_path / "ck.tar", "w") as archive:
        archive.add(cases / "z3_bf16" / "ck", "ck")
    whole = consolidate(
        open_source(cases / "z3_bf16" / "ck"), tmp_path / "here", ConsolidateOptions(max_shard_bytes=500)
    )
    for attempt in range(3):
        source = open_source(parse_place(f"tar://ck::{tmp_path}/ck.tar"))
        made = consolidate(source, tmp_path / f"out-{attempt}", ConsolidateOptions(max_shard_bytes=500, num_workers=8))
        assert made.weights == whole.weights
