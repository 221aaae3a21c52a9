"""What one rank writes for all: the names that resuming reads, and of an adapter only what trains."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from sousbatch.jobs.training.engines import ddp

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def saved(model: Any, folder: Path, name: str) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer: Any = SimpleNamespace(model=model, accelerator=accelerator, optimizer=optimizer)
    ddp.save_state(trainer, folder, is_writer=True)
    return load_file(folder / name)


def test_experts_are_saved_as_they_are_in_memory_so_that_a_resume_finds_them(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MixtralConfig(num_key_value_heads=2, num_local_experts=3, **SIZES))
    found = saved(model, tmp_path, "model.safetensors")
    assert found.keys() == model.state_dict().keys() and any("gate_up_proj" in name for name in found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_embeddings_of_which_rows_train_are_not_saved_whole(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(34, mean_resizing=False)
    rows = {"model.embed_tokens": [32, 33], "lm_head": [32, 33]}
    options = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows)
    found = saved(get_peft_model(model, options), tmp_path / "saved", "adapter_model.safetensors")
    assert sum(value.numel() for value in found.values()) == 2 * (16 + 16) + 2 * 2 * 16
