"""Rank files that are missing, left over, cut off or of another kind are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.formats.zero_layout import read_zero
from sousbatch.errors import DamagedError, IncompleteError, UsageError

Copied = Callable[[str], Path]


def optimizer_of(tag_dir: Path, rank: int) -> Path:
    return next(tag_dir.glob(f"*zero_pp_rank_{rank}_*_optim_states.pt"))


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_missing_rank_file_is_named(kind: str, copied: Copied) -> None:
    tag_dir = copied("z3_frozen_3_ranks") / "global_step1"
    next(tag_dir.glob(f"*zero_pp_rank_1_*_{kind}_states.pt")).unlink()
    with pytest.raises(IncompleteError, match=f"{kind}_states of rank 1 of 3 missing"):
        read_zero(tag_dir)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_cut_off_rank_file_is_named(keep: float, copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    path = optimizer_of(tag_dir, 1)
    with path.open("r+b") as stream:
        stream.truncate(int(path.stat().st_size * keep))
    with pytest.raises(DamagedError, match=f"{path.name}: cut off or damaged"):
        read_zero(tag_dir)


def test_a_rank_file_of_a_larger_run_is_named(copied: Copied, cases: Path) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    stray = optimizer_of(cases / "z3_bf16_3_ranks" / "ck" / "global_step1", 2)
    shutil.copy(stray, tag_dir)
    with pytest.raises(DamagedError, match=f"saved by 2 ranks, yet {stray.name} is left"):
        read_zero(tag_dir)


def test_a_rank_file_of_another_saving_is_named(copied: Copied, cases: Path) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    other = optimizer_of(cases / "z3_bf16_3_ranks" / "ck" / "global_step1", 1)
    shutil.copy(other, tag_dir)
    with pytest.raises(DamagedError, match=f"{other.name}: written by 3 ranks.*two savings are mixed"):
        read_zero(tag_dir)


def test_two_files_of_one_rank_are_named(copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    path = optimizer_of(tag_dir, 1)
    shutil.copy(path, tag_dir / path.name.removeprefix("bf16_"))
    with pytest.raises(DamagedError, match=f"{path.name} and .* are both of rank 1"):
        read_zero(tag_dir)


def test_ranks_are_ordered_by_number(copied: Copied) -> None:
    """Rank 10 comes after rank 9, not after rank 1."""
    tag_dir = copied("z3_fp32") / "global_step1"
    for path in list(tag_dir.glob("*_optim_states.pt")):
        rank = int(path.name.split("_")[3])
        state = torch.load(path, weights_only=False)
        inner = state["optimizer_state_dict"]
        inner["partition_count"] = 12
        inner["fp32_flat_groups"] = [torch.zeros(sum(-(-n // 12) for n in (407, 77, 77, 407, 1, 7, 11, 11)))] * 2
        for copy in range(rank, 12, 2):
            torch.save(state, tag_dir / f"zero_pp_rank_{copy}_mp_rank_00_optim_states.pt")
    model = tag_dir / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    for copy in range(1, 12):
        shutil.copyfile(model, tag_dir / f"zero_pp_rank_{copy}_mp_rank_00_model_states.pt")
    from sousbatch.checkpoints.formats.zero_files import read_ranks

    assert [int(rank.path.name.split("_")[3]) for rank in read_ranks(tag_dir)] == list(range(12))


@pytest.mark.parametrize(
    ("name", "what", "way_out"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism", "ds_to_universal"),
        ("zero_pp_rank_0_mp_rank_10_optim_states.pt", "tensor parallelism", "ds_to_universal"),
        ("layer_03-model_00-model_states.pt", "pipeline parallelism", "gpt-neox"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "mixture-of-experts layers", "save_16bit_model"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "mixture-of-experts layers", "save_16bit_model"),
    ],
)
def test_another_parallelism_is_refused_with_the_way_out(name: str, what: str, way_out: str, copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    (tag_dir / name).touch()
    with pytest.raises(UsageError, match=f"{name} was written with .*{what}.*{way_out}"):
        read_zero(tag_dir)


def test_a_tensor_parallel_file_whose_fellows_are_not_there_is_known_by_what_it_says(copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    path = tag_dir / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({**torch.load(path, weights_only=False), "mp_world_size": 2}, path)
    with pytest.raises(UsageError, match="2 tensor-parallel ranks.*ds_to_universal"):
        read_zero(tag_dir)


@pytest.mark.parametrize("case", ["z3_bf16", "z2_round_robin"])
def test_files_of_ranks_that_were_swapped_are_named(case: str, copied: Copied) -> None:
    tag_dir = copied(case) / "global_step1"
    first, second = sorted(tag_dir.glob("*_optim_states.pt"))[:2]
    first.rename(tag_dir / "aside")
    second.rename(first)
    (tag_dir / "aside").rename(second)
    with pytest.raises(DamagedError, match=r"rank_0.*was saved as .*zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        read_zero(tag_dir)


@pytest.mark.parametrize("case", ["z3_bf16", "z2_round_robin"])
def test_a_rank_file_of_another_step_is_named(case: str, copied: Copied) -> None:
    tag_dir = copied(case) / "global_step1"
    path = sorted(tag_dir.glob("*_optim_states.pt"))[1]
    state = torch.load(path, weights_only=False)
    inner = state["optimizer_state_dict"]
    states = inner.get("optimizer_state_dict", inner.get("base_optimizer_state"))["state"]
    for each in states.values():
        each["step"] = each["step"] + 1
    torch.save(state, path)
    with pytest.raises(DamagedError, match="rank_1.*another number of steps.*two savings are mixed"):
        read_zero(tag_dir)


def test_names_and_keys_of_old_versions_are_known(copied: Copied, cases: Path) -> None:
    """No underscore before `optim_states`, one mapping of shapes, no buffer names, no versions."""
    path = copied("z1_3_ranks")
    for file in (path / "global_step1").glob("*optim_states.pt"):
        state = torch.load(file, weights_only=False)
        file.unlink()
        del state["ds_version"], state["optimizer_state_dict"]["ds_version"]
        old = file.name.replace("_optim_states", "optim_states")
        torch.save(state, file.with_name(old))
    model = path / "global_step1" / "mp_rank_00_model_states.pt"
    state = torch.load(model, weights_only=False)
    for key in ("ds_version", "shared_params", "frozen_param_shapes", "frozen_param_fragments"):
        del state[key]
    torch.save(state, model)
    old_one, new_one = read_zero(path / "global_step1"), read_zero(cases / "z1_3_ranks" / "ck" / "global_step1")
    assert [(tensor.name, tensor.shape) for tensor in old_one.tensors] == [
        (tensor.name, tensor.shape) for tensor in new_one.tensors
    ]


def test_experts_partitioned_by_autoep_are_refused(copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    path = tag_dir / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "ds_autoep_layers": [{"checkpoint_format": "zero3_partitioned"}]}, path)
    with pytest.raises(UsageError, match="AutoEP"):
        read_zero(tag_dir)


def test_masters_swapped_to_nvme_are_refused(copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    for path in tag_dir.glob("*_optim_states.pt"):
        state = torch.load(path, weights_only=False)
        inner = state["optimizer_state_dict"]
        inner["fp32_flat_groups"] = [torch.empty(0) for _ in inner["fp32_flat_groups"]]
        torch.save(state, path)
    with pytest.raises(UsageError, match="swapped to NVMe"):
        read_zero(tag_dir)


def test_a_file_without_zip_is_refused_with_the_way_out(copied: Copied) -> None:
    tag_dir = copied("z3_bf16") / "global_step1"
    path = optimizer_of(tag_dir, 0)
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match="saved without zip .*checkpoint_serialization"):
        read_zero(tag_dir)
