"""What the streamed merge does not know, peft merges in memory, from the checkpoint of any sharding engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.lora import UnmergeableError
from sousbatch.errors import RunError
from sousbatch.jobs.merging import merge_with_peft
from sousbatch.jobs.training.model import build_model, load_tokenizer
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.schema import Adapter, StageSettings, Train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),
]
TOKENIZER = LIBRARY_DIR / "models" / "tiny-hangul"
SETTINGS = StageSettings(
    adapter=Adapter(method="lora", rank=2, target_modules=("all-linear",)),
    train=Train(precision="bfloat16", gradient_checkpointing=True),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a base of experts, and two checkpoints of an adapter on it; the adapted model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = load_tokenizer(SETTINGS, TOKENIZER)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=3, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "base")
    settings = StageSettings(adapter=SETTINGS.adapter, train=Train(precision="float32"))
    model = build_model(settings, folder / "base", tokenizer, has_weights=True)
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(folder / "peft")
    (folder / "training").mkdir()
    held = {name: value.detach().contiguous() for name, value in model.named_parameters() if value.requires_grad}
    save_file(held, folder / "training" / "model.safetensors")
    model.peft_config["default"].save_pretrained(folder / "training")
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    return folder, merged


@pytest.mark.parametrize("name", ["peft", "training"])
def test_an_adapter_on_experts_becomes_a_model_in_the_form_of_the_hub(
    name: str, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = trained
    with pytest.raises(UnmergeableError, match="target_parameters"):
        consolidate(open_source(folder / name), tmp_path / "out", ConsolidateOptions(base_dir=folder / "base"))
    source = open_source(folder / name, is_raw=True)
    merged = merge_with_peft(SETTINGS, source, folder / "base", TOKENIZER, tmp_path / "merged")
    consolidate(merged, tmp_path / "out", ConsolidateOptions(dtype="float32", copy_from=tmp_path / "merged"))
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "merged/model.safetensors")
    assert ours.keys() == theirs.keys() and "model.layers.0.block_sparse_moe.experts.2.w3.weight" in ours
    for one, expected in theirs.items():
        torch.testing.assert_close(ours[one], expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        ours["model.layers.0.block_sparse_moe.experts.2.w3.weight"],
        load_file(folder / "base/model.safetensors")["model.layers.0.block_sparse_moe.experts.2.w3.weight"],
    )


def test_a_checkpoint_that_lacks_what_trained_is_refused(trained: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = trained
    held = load_file(folder / "training" / "model.safetensors")
    held.pop(next(name for name in held if "lora_B" in name))
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="has no 'base_model.*lora_B"):
        merge_with_peft(SETTINGS, open_source(tmp_path, is_raw=True), folder / "base", TOKENIZER, tmp_path / "merged")
