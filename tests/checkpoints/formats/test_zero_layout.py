"""Every layout of ZeRO converts to the bits that DeepSpeed's own converter, or the live engine, has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.zero_layout import read_zero
from sousbatch.errors import DamagedError, IncompleteError

Tensors = dict[str, torch.Tensor]

WITH_DEEPSPEED = (
    "z3_bf16 z3_fp32 z3_fp16 z3_subgroups z3_tied z3_bf16_masters z3_bf16_3_ranks z3_frozen_3_ranks "
    "z2_round_robin z2_frozen_fp16 z1_3_ranks "
    "z3_one_group z3_offload z3_hpz z3_tied_frozen_3_ranks z2_bf16 z2_fp32 z2_offload z2_tied z2_round_robin_3_ranks "
    "z1_bf16"
).split()
# DeepSpeed drops frozen tensors at stage 1, and knows neither BF16_Optimizer nor stage 0.
# Its live masters are wrong under round robin, and the doctored bf16 masters never lived.
WITH_LIVE = (
    "z3_bf16 z3_fp32 z3_fp16 z3_subgroups z3_tied z3_bf16_3_ranks z3_frozen_3_ranks "
    "z2_frozen_fp16 z1_frozen z1_fp32_accumulation z1_3_ranks z0_tied "
    "z3_one_group z3_offload z3_hpz z3_tied_frozen_3_ranks z2_bf16 z2_fp32 z2_offload z2_tied z1_bf16 z1_frozen_tied"
).split()


def assert_same(converted: Tensors, expected: Tensors) -> None:
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert converted[name].dtype == tensor.dtype
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("case", WITH_DEEPSPEED)
def test_a_checkpoint_converts_to_the_bits_of_deepspeeds_converter(
    case: str, cases: Path, tmp_path: Path, weights: Callable[..., Tensors], oracle: Callable[..., Tensors]
) -> None:
    source = open_source(cases / case / "ck")
    consolidate(source, tmp_path / "out")
    expected = oracle(case, "deepspeed")
    for name, _ in source.aliases:
        del expected[name]
    assert_same(weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("case", WITH_LIVE)
def test_a_checkpoint_converts_to_the_masters_of_the_live_engine(
    case: str, cases: Path, tmp_path: Path, weights: Callable[..., Tensors], oracle: Callable[..., Tensors]
) -> None:
    consolidate(open_source(cases / case / "ck"), tmp_path / "out")
    assert_same(weights(tmp_path / "out"), oracle(case, "live"))


@pytest.mark.parametrize("case", WITH_DEEPSPEED)
def test_tensors_come_in_deepspeeds_order(case: str, cases: Path) -> None:
    source = open_source(cases / case / "ck")
    order = json.loads((cases / case / "order.json").read_text())
    aliases = {name for name, _ in source.aliases}
    assert [tensor.name for tensor in source.tensors] == [name for name in order if name not in aliases]


def test_small_sub_groups_were_really_several(cases: Path) -> None:
    state = torch.load(next((cases / "z3_subgroups").glob("ck/*/zero_pp_rank_0_*_model_states.pt")), weights_only=False)
    assert len(state["param_shapes"]) > 2


@pytest.mark.parametrize("case", ["z3_tied", "z0_tied"])
def test_tied_weights_are_stored_once_and_named_as_alias(case: str, cases: Path) -> None:
    source = open_source(cases / case / "ck")
    assert source.aliases == (("head.weight", "embed.weight"),)
    assert "head.weight" not in {tensor.name for tensor in source.tensors}


def test_a_source_says_what_wrote_it(cases: Path) -> None:
    source = open_source(cases / "z3_frozen_3_ranks" / "ck")
    assert (source.tag, source.step, source.zero_stage, source.world_size) == ("global_step1", 1, 3, 3)
    assert {tensor.role for tensor in source.tensors} == {"buffer", "frozen", "trained"}
    assert source.ds_version


@pytest.mark.parametrize("case", ["z3_fp32", "z2_round_robin"])
def test_masters_that_do_not_fit_their_parameters_are_refused(case: str, copied: Callable[[str], Path]) -> None:
    tag_dir = copied(case) / "global_step1"
    path = next(tag_dir.glob("*_rank_1_*optim_states.pt"))
    state = torch.load(path, weights_only=False)
    inner = state["optimizer_state_dict"]
    key = "fp32_flat_groups" if "fp32_flat_groups" in inner else "single_partition_of_fp32_groups"
    inner[key][0] = torch.cat([inner[key][0].detach(), torch.zeros(64)])
    torch.save(state, path)
    with pytest.raises(DamagedError, match=r"optim_states.pt: group 0 .*holds \d+ elements.* take \d+"):
        read_zero(tag_dir)


def test_a_tensor_that_is_stored_nowhere_is_refused(copied: Callable[[str], Path]) -> None:
    tag_dir = copied("z3_frozen_3_ranks") / "global_step1"
    for path in tag_dir.glob("*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        state["frozen_param_shapes"] = state["frozen_param_fragments"] = None
        torch.save(state, path)
    with pytest.raises(DamagedError, match=r"1 of its tensors are stored nowhere: embed\.weight"):
        read_zero(tag_dir)


def test_a_zero_checkpoint_without_its_optimizer_files_is_not_taken_for_stage_0(
    copied: Callable[[str], Path],
) -> None:
    tag_dir = copied("z2_round_robin") / "global_step1"
    for path in tag_dir.glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(IncompleteError, match="optim_states, which hold the fp32 master weights, are missing"):
        read_zero(tag_dir)
