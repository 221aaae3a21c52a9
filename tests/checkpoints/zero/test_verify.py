"""Verifying finds what reading by ranges cannot see: flipped bits in the source, and in the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.zero import write
from sousbatch.checkpoints.zero.output import Output
from sousbatch.checkpoints.zero.read import open_source
from sousbatch.checkpoints.zero.work import Choices, Work
from sousbatch.checkpoints.zero.write import consolidate_part
from sousbatch.errors import DamagedError

VERIFIED = Choices(is_verified=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", ["z3_bf16", "z2_frozen_fp16", "z1_fp32_accumulation", "z3_bf16_masters", "z0_tied"])
def test_a_sound_checkpoint_passes(case: str, dtype: str, cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / case / "ck")
    assert consolidate_part(source, tmp_path / "out", Choices(dtype=dtype, is_verified=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["z3_lora", "conv1d"])
def test_a_merged_adapter_passes(case: str, cases: Path, tmp_path: Path) -> None:
    choices = Choices(base_dir=cases / case / "base", is_verified=True)
    assert consolidate_part(open_source(cases / case / "adapter"), tmp_path / "out", choices)


def test_what_was_clamped_passes(copied: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied("z3_bf16")
    file = next((path / "global_step1").glob("*_0_mp_rank_00_optim_states.pt"))
    state = torch.load(file, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].data[3] = -1e6
    torch.save(state, file)  # its checksums are right
    assert consolidate_part(open_source(path), tmp_path / "out", Choices(overflow="clamp", is_verified=True))


@pytest.mark.parametrize("case", ["z3_bf16", "z2_round_robin"])
def test_a_flipped_bit_of_a_rank_file_is_found_and_the_file_named(
    case: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(copied(case))
    tensor = max(source.tensors, key=lambda tensor: tensor.num_elements)
    segment = tensor.segments[-1]
    assert isinstance(segment.path, Path)
    with segment.path.open("r+b") as stream:
        stream.seek(segment.offset_bytes + 4 * (segment.num_elements // 2))
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedError, match=rf"{segment.path.name}: .* have not the checksum"):
        consolidate_part(source, tmp_path / "results" / "out", VERIFIED)
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("where", ["header", "weights"])
def test_a_flipped_bit_of_what_was_written_is_found_and_the_tensor_named(
    where: str, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write._verify

    def damaged(work: Work, output: Output, shards: list[write.Shard]) -> None:
        path = output.place(shards[0])
        assert isinstance(path, Path)
        data = bytearray(path.read_bytes())
        if where == "weights":
            data[shards[0].tensors[-1].offset_bytes + 5] ^= 1
        else:
            data[:200] = data[:200].replace(b"F16", b"U16", 1)
        path.write_bytes(data)
        whole(work, output, shards)

    monkeypatch.setattr(write, "_verify", damaged)
    match = "is not the checkpoint's, between" if where == "weights" else "its header is not the one"
    with pytest.raises(DamagedError, match=match):
        consolidate_part(open_source(cases / "z3_bf16" / "ck"), tmp_path / "out", VERIFIED)
    assert not (tmp_path / "out").exists()
