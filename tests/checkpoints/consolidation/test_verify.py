"""Flipped bits are found: those of the source always, those of the result where it is verified."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.consolidation import consolidate as module
from sousbatch.checkpoints.consolidation.checksums import CrcRecorder, all_of
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.consolidation.output import Output
from sousbatch.checkpoints.consolidation.plan import ConsolidationPlan
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.tensors import Source
from sousbatch.errors import DamagedError

VERIFIED = ConsolidateOptions(is_verified=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("case", ["z3_bf16", "z2_frozen_fp16", "z1_fp32_accumulation", "z3_bf16_masters", "z0_tied"])
def test_a_sound_checkpoint_passes(case: str, dtype: str, cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / case / "ck")
    assert consolidate(source, tmp_path / "out", ConsolidateOptions(dtype=dtype, is_verified=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["z3_lora", "conv1d"])
def test_a_merged_adapter_passes(case: str, cases: Path, tmp_path: Path) -> None:
    options = ConsolidateOptions(base_dir=cases / case / "base", is_verified=True)
    assert consolidate(open_source(cases / case / "adapter"), tmp_path / "out", options)


def test_what_was_clamped_passes(copied: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied("z3_bf16")
    file = next((path / "global_step1").glob("*_0_mp_rank_00_optim_states.pt"))
    state = torch.load(file, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].data[3] = -1e6
    torch.save(state, file)  # its checksums are right
    assert consolidate(open_source(path), tmp_path / "out", ConsolidateOptions(overflow="clamp", is_verified=True))


def flip_a_bit(source: Source, byte_of_number: int = 0, mask: int = 1) -> str:
    """Flip a bit in the middle of the largest tensor; return its file's name."""
    tensor = max(source.tensors, key=lambda tensor: tensor.num_elements)
    segment = tensor.segments[-1]
    assert isinstance(segment.path, Path)
    with segment.path.open("r+b") as stream:
        stream.seek(segment.offset_bytes + 4 * (segment.num_elements // 2) + byte_of_number)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ mask]))
    return segment.path.name


@pytest.mark.parametrize("case", ["z3_bf16", "z2_round_robin", "z1_fp32_accumulation", "z0_tied"])
@pytest.mark.parametrize(
    "options",
    [
        ConsolidateOptions(),
        ConsolidateOptions(num_workers=3, max_shard_bytes=2000),
        ConsolidateOptions(has_statistics=False, is_verified=True),
    ],
    ids=["default", "many shards", "verified, no statistics"],
)
def test_a_flipped_bit_of_a_rank_file_is_found_and_the_file_named(
    case: str, options: ConsolidateOptions, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    source = open_source(copied(case))
    name = flip_a_bit(source)
    with pytest.raises(DamagedError, match=rf"{name}: .* do not have the checksum"):
        consolidate(source, tmp_path / "results" / "out", options)
    assert not list((tmp_path / "results").iterdir())


def test_a_flipped_bit_is_not_blamed_on_the_training(copied: Callable[[str], Path], tmp_path: Path) -> None:
    source = open_source(copied("z3_bf16"))
    name = flip_a_bit(source, byte_of_number=3, mask=0x40)  # of the exponent: far beyond float16
    with pytest.raises(DamagedError, match=rf"{name}: .* do not have the checksum"):
        consolidate(source, tmp_path / "out", ConsolidateOptions())


def test_tasks_of_an_array_find_a_flipped_bit_together(copied: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied("z3_bf16")
    name = flip_a_bit(open_source(path))
    options = ConsolidateOptions(max_shard_bytes=2000)
    for part in (2, 0):
        assert consolidate(open_source(path), tmp_path / "out", options, part=part, num_parts=3) is None
    with pytest.raises(DamagedError, match=rf"{name}: .* do not have the checksum"):
        consolidate(open_source(path), tmp_path / "out", options, part=1, num_parts=3)
    assert not (tmp_path / "out").exists()


def test_what_torch_saved_without_checksums_is_consolidated(copied: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied("z3_bf16")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        for file in path.glob("*/*.pt"):
            torch.save(torch.load(file, weights_only=False), file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert consolidate(open_source(path), tmp_path / "out", VERIFIED)


def test_pieces_in_any_order_have_the_checksum_of_the_whole() -> None:
    data = random.Random(7).randbytes(5000)
    cuts = sorted({0, 5000, *random.Random(8).sample(range(5000), 40)})
    pieces = list(zip(cuts, cuts[1:], strict=False))
    random.Random(9).shuffle(pieces)
    sums, place = [CrcRecorder(), CrcRecorder()], Path("file")
    for number, (begin, end) in enumerate(pieces):
        sums[number % 2].add(place, begin, data[begin:end])
    assert all_of(each.take() for each in sums) == {"file": [(0, 5000, zlib.crc32(data))]}


@pytest.mark.parametrize("where", ["header", "weights"])
def test_a_flipped_bit_of_what_was_written_is_found_and_the_tensor_named(
    where: str, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = module._verify

    def damaged(work: ConsolidationPlan, output: Output, shards: list[module.Shard]) -> None:
        path = output.place(shards[0])
        assert isinstance(path, Path)
        data = bytearray(path.read_bytes())
        if where == "weights":
            data[shards[0].tensors[-1].offset_bytes + 5] ^= 1
        else:
            data[:200] = data[:200].replace(b"F16", b"U16", 1)
        path.write_bytes(data)
        whole(work, output, shards)

    monkeypatch.setattr(module, "_verify", damaged)
    match = "is not the checkpoint's, between" if where == "weights" else "its header is not the one"
    with pytest.raises(DamagedError, match=match):
        consolidate(open_source(cases / "z3_bf16" / "ck"), tmp_path / "out", VERIFIED)
    assert not (tmp_path / "out").exists()
