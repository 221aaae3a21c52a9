"""Planned files are, byte for byte, those that safetensors and huggingface_hub write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.safetensors_file import plan_shards, read_tensors
from sousbatch.checkpoints.formats.tensors import DTYPES, SourceTensor


def test_a_file_of_every_dtype_is_safetensors_own(tmp_path: Path) -> None:
    torch.manual_seed(1)
    (tmp_path / "model").mkdir()
    tensors = {f"z{n}": (torch.rand(3, n) * 90).to(getattr(torch, d)) for n, d in enumerate(DTYPES)}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "größe": torch.rand(2),
        "a": torch.ones(5),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    consolidate(open_source(tmp_path / "model"), tmp_path / "out")
    cast = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(cast, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


@pytest.mark.parametrize("sizes", [[1], [3, 3, 3], [4, 9, 2, 2, 9, 4], [9, 9], [5, 5, 1], [2, 9, 2, 3, 1]])
def test_shards_are_cut_as_huggingface_hub_cuts_them(sizes: list[int]) -> None:
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.float16) for n, size in enumerate(sizes)}
    expected = split_torch_state_dict_into_shards(
        tensors, max_shard_size=10, filename_pattern="model{suffix}.safetensors"
    )
    planned = plan_shards(
        [SourceTensor(name=n, shape=tuple(t.shape), dtype="float32", segments=()) for n, t in tensors.items()],
        dtype="float16",
        max_shard_bytes=10,
    )
    found = {shard.file_name: sorted(tensor.source.name for tensor in shard.tensors) for shard in planned}
    assert found == {name: sorted(names) for name, names in expected.filename_to_tensors.items()}


def test_tensors_are_read_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2).half(), "b": torch.ones(3, 2), "c": torch.zeros(())}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    tensors = read_tensors(tmp_path / "x")
    assert [tensor.name for tensor in tensors] == ["b", "c", "a"]
    assert data[tensors[0].segments[0].offset_bytes :][:24] == torch.ones(6).numpy().tobytes()
