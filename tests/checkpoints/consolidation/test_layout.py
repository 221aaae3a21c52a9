"""The form in which transformers stores weights, against what `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sousbatch.checkpoints.consolidation.layout import stored_forms, stored_names

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SIZES | HEADS),
    "GPT-2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32}),
    "BERT": ("BertForQuestionAnswering", SIZES | {"num_attention_heads": 2}),
    "T5": ("T5ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "num_layers": 2, "d_kv": 8, "vocab_size": 32}),
    "BART": (
        "BartForConditionalGeneration",
        {"d_model": 16, "vocab_size": 32, "encoder_layers": 1, "decoder_layers": 1},
    ),
    "Mixtral": ("MixtralForCausalLM", SIZES | HEADS | {"num_local_experts": 3}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", SIZES | HEADS | {"num_experts": 4, "moe_intermediate_size": 8}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", SIZES | HEADS | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
}
FUSED = {"Mixtral", "Qwen2-MoE", "Qwen3-MoE"}


def made(name: str) -> Any:
    kind = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    return kind(kind.config_class(**MODELS[name][1], **IDS))


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_that_is_saved_is_made_of_the_runs_that_are_named(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    forms = stored_forms(model)
    assert forms is not None
    for stored, tensor in saved.items():
        runs = [state[run.name].flatten()[run.first : run.first + run.num] for run in forms[stored].runs]
        assert torch.equal(torch.cat(runs).view(forms[stored].shape), tensor), stored
    assert (stored_names(model) != {}) is (name in FUSED)


def test_the_names_in_files_of_a_tensor_in_memory_are_known() -> None:
    names = stored_names(made("Mixtral"))["model.layers.1.mlp.experts.down_proj"]
    assert names == tuple(f"model.layers.1.block_sparse_moe.experts.{number}.w2.weight" for number in range(3))


def test_an_operation_that_changes_values_has_no_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def revert(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor * 2 for name, tensor in state.items()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    assert stored_forms(made("Llama")) is None


def test_tensors_that_are_joined_or_transposed_have_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Llama")
    query, key = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")

    def revert(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        both = [state[query], state[key]]
        return {"rows": torch.cat(both), "columns": torch.cat(both, dim=1), "turned": both[0].T.contiguous()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", revert)
    forms, state = stored_forms(model), model.state_dict()
    assert forms is not None
    expected = revert(model, state)
    for name, form in forms.items():
        runs = [state[run.name].flatten()[run.first : run.first + run.num] for run in form.runs]
        assert torch.equal(torch.cat(runs).view(form.shape), expected[name])
