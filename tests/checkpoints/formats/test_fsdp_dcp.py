"""FSDP's folders convert to the bits that torch's own reader has, and nothing that they say is run."""

from __future__ import annotations

import enum
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorProperties

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, IncompleteError, UsageError

Weights = Callable[[Path], dict[str, torch.Tensor]]


@pytest.mark.parametrize("folder", ["ck", "ck/pytorch_model_fsdp_0", "together"])
def test_it_converts_to_what_torchs_own_reader_and_the_running_model_have(
    folder: str, cases: Path, tmp_path: Path, weights: Weights
) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    path = cases / "fsdp" / folder
    source = open_source(path)
    assert (source.kind, source.world_size) == ("torch distributed checkpoint", 3)
    consolidate(source, tmp_path / "out", ConsolidateOptions(dtype="float32", is_verified=True))
    found = weights(tmp_path / "out")
    inner = path / "pytorch_model_fsdp_0" if folder == "ck" else path
    dcp_to_torch_save(inner, tmp_path / "whole.pt")
    for expected in (torch.load(tmp_path / "whole.pt")["model"], load_file(cases / "fsdp" / "live.safetensors")):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_is_cut_by_columns_is_put_together(cases: Path, tmp_path: Path, weights: Weights) -> None:
    consolidate(open_source(cases / "fsdp" / "columns"), tmp_path / "out", ConsolidateOptions(dtype="float32"))
    assert torch.equal(weights(tmp_path / "out")["x.weight"], torch.arange(35.0).view(5, 7))


@pytest.fixture
def fsdp(cases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases / "fsdp" / "together", tmp_path / "fsdp"))


def test_a_missing_file_is_named(fsdp: Path) -> None:
    (fsdp / "__1_0.distcp").unlink()
    with pytest.raises(IncompleteError, match="__1_0.distcp: missing"):
        open_source(fsdp)


def test_a_cut_off_file_is_named(fsdp: Path) -> None:
    os.truncate(fsdp / "__2_0.distcp", 3000)
    with pytest.raises(DamagedError, match="__2_0.distcp: cut off"):
        open_source(fsdp)


def test_swapped_files_are_named(fsdp: Path) -> None:
    (fsdp / "__1_0.distcp").rename(fsdp / "aside")
    (fsdp / "__2_0.distcp").rename(fsdp / "__1_0.distcp")
    (fsdp / "aside").rename(fsdp / "__2_0.distcp")
    with pytest.raises(DamagedError, match=r"__[12]_0.distcp"):
        open_source(fsdp)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_call_in_the_metadata_is_refused_by_name_and_not_made(fsdp: Path, tmp_path: Path) -> None:
    (fsdp / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "called")))
    with pytest.raises(DamagedError, match=r"\.metadata: loading it would call posix\.system; it was not called"):
        open_source(fsdp)
    assert not (tmp_path / "called").exists()


class OlderPython(pickle.Pickler):
    """Writes the members of an enum as Python before 3.11.4 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_of_an_older_python_is_read(fsdp: Path) -> None:
    before = open_source(fsdp)
    with (fsdp / ".metadata").open("rb") as stream:
        found = pickle.load(stream)  # our own file
    with (fsdp / ".metadata").open("wb") as stream:
        OlderPython(stream, protocol=4).dump(found)
    assert b"getattr" in (fsdp / ".metadata").read_bytes()
    assert open_source(fsdp).tensors == before.tensors


class AnyAttribute:
    def __reduce__(self) -> Any:
        return getattr, (TensorProperties, "create_from_tensor")


def test_an_attribute_of_anything_else_is_refused(fsdp: Path) -> None:
    (fsdp / ".metadata").write_bytes(pickle.dumps(AnyAttribute()))
    with pytest.raises(DamagedError, match=r"loading it would call builtins\.getattr; it was not called"):
        open_source(fsdp)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"no pickle"])
def test_what_is_no_metadata_is_damaged(content: bytes, fsdp: Path) -> None:
    (fsdp / ".metadata").write_bytes(content)
    with pytest.raises(DamagedError, match="not the metadata of a distributed checkpoint"):
        open_source(fsdp)


def test_a_name_that_leads_elsewhere_is_refused(fsdp: Path) -> None:
    content = (fsdp / ".metadata").read_bytes()
    (fsdp / ".metadata").write_bytes(content.replace(b"__1_0.distcp", b"../1_0.distc"))
    with pytest.raises(DamagedError, match="'../1_0.distc', which does not lie in it"):
        open_source(fsdp)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_optimizers_folder_is_not_taken_for_a_model(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    checkpoint.save({"optimizer": {"exp_avg": torch.ones(3)}}, checkpoint_id=tmp_path / "optimizer_0", no_dist=True)
    with pytest.raises(UsageError, match="the model's folder, not the optimizer's"):
        open_source(tmp_path / "optimizer_0")
