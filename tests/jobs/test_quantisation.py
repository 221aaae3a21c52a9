"""Quantised models compute what their weights say, however a model uses its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers

from sousbatch.jobs.quantisation import empty_model, mend_quantised, quantised_in

_SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("AutoModelForCausalLM", {"state_size": 8}),
    "longcat_flash": (
        "AutoModelForCausalLM",
        {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "moe_topk": 2}
        | {"zero_expert_num": 2, "head_dim": 8}
        | _LATENT,
    ),
    "layoutlmv3": (
        "AutoModelForSequenceClassification",
        {"intermediate_size": 64, "coordinate_size": 11, "shape_size": 10, "has_relative_attention_bias": True},
    ),
    "deepseek_v2": ("AutoModelForCausalLM", {"intermediate_size": 64, "first_k_dense_replace": 2} | _LATENT),
}


@pytest.mark.parametrize("width", ["4bit", "8bit"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_quantised_model_says_what_its_weights_say(kind: str, width: Literal["4bit", "8bit"], tmp_path: Path) -> None:
    """Mamba and LongCat-Flash read weights past their layers; DeepSeek-V2 has rows of four dimensions for them."""
    name, sizes = MODELS[kind]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model_class.from_config(transformers.AutoConfig.for_model(kind, **_SIZES | sizes)).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    how = quantised_in(width, "float32", empty_model(lambda: model_class.from_config(config)))
    options = {"quantization_config": how, "device_map": "cpu", "dtype": torch.float32}
    model = model_class.from_pretrained(tmp_path, config=config, **options).eval()
    mend_quantised(model)
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[width] in {type(layer).__name__ for layer in model.modules()}
    ids = torch.arange(5, 21).reshape(2, 8)
    with torch.no_grad():
        made = model(input_ids=ids).logits
        wanted = model.dequantize()(input_ids=ids).logits
    assert torch.nn.functional.cosine_similarity(made, wanted, dim=-1).min() > (0.999 if width == "4bit" else 0.98)
