"""What plans clean is finished: trained, consolidated in the form of the hub's files, loaded and predicted with."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.matrix, pytest.mark.xdist_group("finished")]
EXPERTS = ["model.path=./mixtral", "model.from_scratch=false"]
TIED = ["model.path=./tied", "model.from_scratch=false"]
ADAPTED = ["adapter=lora", "adapter.rank=4"]
ADDED = ["model.add_tokens=['[A]','[B]']"]
CASES = {
    "experts": EXPERTS,
    "experts frozen by the names of their files": [*EXPERTS, "model.freeze=['*.block_sparse_moe.experts.*']"],
    "an adapter on experts": [*EXPERTS, *ADAPTED, "adapter.dropout=0"],
    "an adapter beside experts": [*EXPERTS, *ADAPTED, "adapter.target_modules=[q_proj,v_proj]"],
    "rows of new tokens": [*TIED, *ADAPTED, *ADDED],
    "new tokens in a layer that trains in full": [*TIED, *ADAPTED, *ADDED, "adapter.modules_to_save=[embed_tokens]"],
}


def made(folder: Path) -> None:
    """Write two models with the tokenizer that is shipped: of experts, and with tied embeddings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

    from sousbatch.recipes.catalog import LIBRARY_DIR

    tokenizer = AutoTokenizer.from_pretrained(LIBRARY_DIR / "models" / "tiny-hangul")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes |= {"vocab_size": len(tokenizer), "num_key_value_heads": 4, **ids}
    for name, config in (
        ("mixtral", MixtralConfig(num_local_experts=3, **sizes)),
        ("tied", LlamaConfig(tie_word_embeddings=True, **sizes)),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_what_plans_clean_is_finished(shared_place, small, case, zero_stage):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    place = shared_place()
    made(place.root)
    stages = "stages={train: {}, consolidate: {}, predict: {}, merge: {}}"
    method = [f"train.zero.stage={zero_stage}", "train.steps=2", "checkpoints.every_steps=1"]
    place.run("submit", "hangul-restoration", *small, stages, *method, *CASES[case])
    folder = place.run_dir() / "model" / "consolidate"
    names = load_file(folder / "model.safetensors").keys()
    assert any(".block_sparse_moe.experts.2.w3." in name for name in names) is ("experts" in case)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert place.events("merged") or list(place.run_dir().rglob("predictions.jsonl"))
