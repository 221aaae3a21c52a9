"""Adapters of models with a new head are merged into a base that was saved without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.recipes.building import prepare_model
from sousbatch.recipes.schema import Adapter, StageSettings

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, tuple[Any, Any]] = {
    "an encoder without a head": (transformers.BertModel, transformers.BertConfig(**SIZES, intermediate_size=32)),
    "an encoder without a pooler": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**SIZES, **IDS, intermediate_size=32),
    ),
    "a layer before the head": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=32, pad_token_id=0),
    ),
    "a decoder with another head": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**SIZES, **IDS, intermediate_size=32),
    ),
    "a decoder without a head": (
        transformers.GPT2Model,
        transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, **IDS),
    ),
}
SETTINGS = StageSettings(task="classification", adapter=Adapter(method="lora", rank=2))


class Tokens:
    """What `prepare_model` asks of a tokenizer."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 40


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("kind", BASES)
def test_what_was_trained_and_the_merged_model_answer_alike(kind: str, tmp_path: Path) -> None:
    base_class, config = BASES[kind]
    torch.manual_seed(0)
    base_class(config).save_pretrained(tmp_path / "base")
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **labels)
    model = prepare_model(SETTINGS, found, Tokens()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "config")
    options = ConsolidateOptions(dtype="float32", base_dir=tmp_path / "base", copy_from=tmp_path / "config")
    consolidate(open_source(tmp_path / "adapter"), tmp_path / "out", replace(options, is_compared=True))
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    assert torch.allclose(loaded.eval()(**batch).logits, model(**batch).logits, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
