"""A manifest names what is in a folder, and a folder that differs from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.manifest import read_manifest, verify_manifest
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, NotFoundError, UsageError
from sousbatch.files import digest_of


@pytest.fixture
def consolidated(model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    model = model_dir({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, {"model_type": "llama"})
    consolidate(open_source(model), tmp_path / "out", ConsolidateOptions(copy_from=model))
    return tmp_path / "out"


def test_a_manifest_reads_back_as_it_was_written(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    manifest = consolidate(open_source(model_dir({"a": torch.arange(6.0)})), tmp_path / "out")
    assert read_manifest(tmp_path / "out") == verify_manifest(tmp_path / "out") == manifest
    assert (manifest.num_params, manifest.dtype, manifest.num_flushed) == (6, "float16", 0)


def test_the_digest_depends_on_the_weights_alone_and_not_on_where_they_lie(cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / "z3_fp32" / "ck")
    first, second = (consolidate(source, tmp_path / name) for name in ("one", "two"))
    other = consolidate(open_source(cases / "z3_fp16" / "ck"), tmp_path / "three")
    assert first.digest == second.digest != other.digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["change", "cut", "remove"])
def test_a_damaged_file_is_named(consolidated: Path, name: str, damage: str) -> None:
    path = consolidated / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if damage == "change" else data[:-1])
    with pytest.raises(DamagedError, match=name):
        verify_manifest(consolidated)


def test_a_changed_tensor_is_named(consolidated: Path) -> None:
    path = consolidated / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="in 'b'"):
        verify_manifest(consolidated)


def test_the_digest_of_a_tensor_is_that_of_its_bytes(consolidated: Path) -> None:
    tensors = read_manifest(consolidated).weights[0].tensors
    assert tensors is not None
    assert tensors["a"] == xxhash.xxh3_128(torch.arange(6.0).half().numpy().tobytes()).hexdigest()


def test_a_manifest_of_format_2_is_still_verified_by_its_sha256(consolidated: Path) -> None:
    path, weights = consolidated / "manifest.json", consolidated / "model.safetensors"
    values = json.loads(path.read_text()) | {"format": 2}
    (file,) = values["weights"]
    del file["algorithm"]
    arrays = {"a": torch.arange(6.0).half(), "b": torch.ones(2, 2).half()}
    file["tensors"] = {name: hashlib.sha256(arrays[name].numpy().tobytes()).hexdigest() for name in file["tensors"]}
    large = [file["name"], file["header_sha256"], *file["tensors"].values()]
    values["digest"] = digest_of(sorted([large, *([one["name"], one["sha256"]] for one in values["files"])]))
    path.write_text(json.dumps(values))
    assert verify_manifest(consolidated).digest == values["digest"]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedError, match="in 'b'"):
        verify_manifest(consolidated)


def test_a_manifest_of_a_later_version_is_refused(consolidated: Path) -> None:
    path = consolidated / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 4}))
    with pytest.raises(UsageError, match="format 4, known up to 3"):
        read_manifest(consolidated)


def test_what_is_no_manifest_is_damaged_and_none_is_named(consolidated: Path, tmp_path: Path) -> None:
    (consolidated / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match="not a manifest"):
        read_manifest(consolidated)
    with pytest.raises(NotFoundError, match="manifest.json: no such file"):
        read_manifest(tmp_path)
