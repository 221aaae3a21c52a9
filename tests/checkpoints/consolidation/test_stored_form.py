"""A model that transformers holds in another form in memory is written in the form of the hub's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from sousbatch.checkpoints.consolidation import model_names
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source

Weights = Callable[[Path], dict[str, torch.Tensor]]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
MODELS = {
    "Mixtral": MixtralConfig(intermediate_size=24, num_local_experts=3, **SIZES),
    "Qwen3-MoE": Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, head_dim=8, **SIZES),
    # its config.json has an infinity, as an object
    "GraniteMoeHybrid": GraniteMoeHybridConfig(
        **SIZES,
        intermediate_size=24,
        num_local_experts=3,
        shared_intermediate_size=8,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        layer_types=["mamba", "attention"],
    ),
}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_names, "_asked", lambda question: model_names._answer(question["config"], question["names"])
    )


def as_in_memory(config: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Write a model as training does, and return what `save_pretrained` writes of it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "theirs")
    (folder / "ours").mkdir()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "ours/model.safetensors"
    )
    (folder / "ours" / "config.json").write_text((folder / "theirs" / "config.json").read_text())
    return model.state_dict()


@pytest.mark.parametrize("is_compared", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_experts_are_written_one_by_one(name: str, is_compared: bool, tmp_path: Path, weights: Weights) -> None:
    as_in_memory(MODELS[name], tmp_path)
    options = ConsolidateOptions(
        dtype="float32", copy_from=tmp_path / "ours", is_compared=is_compared, is_verified=True, max_shard_bytes=4000
    )
    consolidate(open_source(tmp_path / "ours"), tmp_path / "out", options)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[one], theirs[one]) for one in theirs)


def test_what_is_stored_so_already_stays(tmp_path: Path, weights: Weights) -> None:
    as_in_memory(MODELS["Mixtral"], tmp_path)
    options = ConsolidateOptions(dtype="float32", copy_from=tmp_path / "theirs")
    consolidate(open_source(tmp_path / "theirs"), tmp_path / "out", options)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "theirs").keys()


def test_transformers_is_not_asked_for_a_class_that_it_holds_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_in_memory(LlamaConfig(intermediate_size=24, **SIZES), tmp_path)
    monkeypatch.setattr(model_names, "_asked", lambda question: pytest.fail("it was asked"))
    consolidate(open_source(tmp_path / "ours"), tmp_path / "out", ConsolidateOptions(copy_from=tmp_path / "ours"))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["content"] == "model"
