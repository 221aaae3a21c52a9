"""Adapters that train more than two factors a layer, made by peft itself, become the models that peft makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.lora import UnmergeableError

# peft calls transformers by names that are deprecated there
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
Weights = Callable[[Path], dict[str, torch.Tensor]]
WORDS, NEW = 32, [32, 33]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = LlamaConfig(vocab_size=WORDS, **SIZES)
TIED = LlamaConfig(vocab_size=WORDS, tie_word_embeddings=True, **SIZES)
GPT2 = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
CASES: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "layers that train in full, resized": (LLAMA, True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows": (LLAMA, True, {"trainable_token_indices": {"model.embed_tokens": [5, *NEW], "lm_head": [5, *NEW]}}),
    "rows of tied layers": (TIED, True, {"trainable_token_indices": {"model.embed_tokens": NEW}}),
    "rows of a model as it was": (LLAMA, False, {"trainable_token_indices": {"model.embed_tokens": [3, 7]}}),
    "rank-stabilised, by pattern": (
        LLAMA,
        False,
        {"use_rslora": True, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    ),
    "magnitudes": (LLAMA, False, {"use_dora": True}),
}


def made(case: str, folder: Path) -> Any:
    """Make base, adapter and peft's merged model of a case, with random values everywhere; return the adapted model."""
    config, is_resized, options = CASES[case]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    base.save_pretrained(folder / "base")
    if is_resized:
        base.resize_token_embeddings(WORDS + len(NEW), mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.1) if value.dim() > 1 else torch.nn.init.uniform_(value, 0.5, 1.5)
    model.save_pretrained(folder / "adapter")
    return model


def saved(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    model.peft_config["default"].save_pretrained(folder)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    save_file({name: value.contiguous() for name, value in trained.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("is_training", [False, True], ids=["as peft saves it", "as it trains"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_becomes_the_model_that_peft_makes_of_it(
    case: str, is_training: bool, tmp_path: Path, weights: Weights
) -> None:
    model = made(case, tmp_path)
    if is_training:
        (tmp_path / "training").mkdir()
        saved(model, tmp_path / "training")
    source = open_source(tmp_path / ("training" if is_training else "adapter"))
    options = ConsolidateOptions(dtype="float32", base_dir=tmp_path / "base", is_verified=True)
    manifest = consolidate(source, tmp_path / "out", options)
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, pefts = weights(tmp_path / "out"), weights(tmp_path / "peft")
    assert manifest is not None and ours.keys() == pefts.keys()
    for name, expected in pefts.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_half_precision_rows_and_magnitudes_pass_the_check_by_another_path(tmp_path: Path) -> None:
    for case in ("rows", "magnitudes"):
        made(case, tmp_path / case)
        options = ConsolidateOptions(base_dir=tmp_path / case / "base", is_verified=True)
        consolidate(open_source(tmp_path / case / "adapter"), tmp_path / case / "out", options)


def test_what_only_peft_can_merge_is_an_error_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(copy.deepcopy(LLAMA))
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias="all")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnmergeableError, match="bias='all'"):
        consolidate(open_source(tmp_path / "adapter"), tmp_path / "out", ConsolidateOptions(base_dir=tmp_path / "base"))


def test_a_file_of_peft_without_its_configuration_is_written_as_it_stands(tmp_path: Path, weights: Weights) -> None:
    made("rows of a model as it was", tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    consolidate(open_source(tmp_path / "adapter", is_raw=True), tmp_path / "out", ConsolidateOptions(dtype="float32"))
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "adapter")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
