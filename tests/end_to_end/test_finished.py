"""What plans clean is finished: combinations of methods, data and models that are more than a cell of the matrix.

Each trains on two ranks, resumes to the same losses, becomes a model in the form of the base's files, and predicts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[[dict[str, Any]], dict[str, Any]]

pytestmark = pytest.mark.matrix

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = _IDS | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_NUMBERS = {
    split: [{"input": f"{number} {number + 1} [A]", "target": f"{number + 2} [B]"} for number in range(first, last)]
    for split, first, last in (("train", 0, 16), ("validation", 16, 22))
}
_TEXTS = {split: [{"text": " ".join(row.values())} for row in rows] for split, rows in _NUMBERS.items()}
_LABELS = {
    split: [{"input": row["input"], "target": ("rare", "usual")[place % 4 > 0]} for place, row in enumerate(rows)]
    for split, rows in _NUMBERS.items()
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"config": "LlamaConfig", "class": "LlamaForCausalLM", "sizes": _SIZES},
    "own code": {"config": "LlamaConfig", "class": "LlamaForCausalLM", "sizes": _SIZES, "has_code": True},
    "tied": {"config": "LlamaConfig", "class": "LlamaForCausalLM", "sizes": _SIZES | {"tie_word_embeddings": True}},
    "spare rows": {"config": "LlamaConfig", "class": "LlamaForCausalLM", "sizes": _SIZES | {"vocab_size": 48}},
    "olmoe": {
        "config": "OlmoeConfig",
        "class": "OlmoeForCausalLM",
        "sizes": _SIZES | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    },
    "mixtral": {
        "config": "MixtralConfig",
        "class": "MixtralForCausalLM",
        "sizes": _SIZES | {"num_key_value_heads": 2, "num_local_experts": 3},
    },
    "gpt2": {
        "config": "GPT2Config",
        "class": "GPT2LMHeadModel",
        "sizes": _IDS | {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64},
    },
    "t5": {
        "config": "T5Config",
        "class": "T5ForConditionalGeneration",
        "sizes": {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "num_layers": 2, "num_heads": 2}
        | {"d_model": 64, "d_ff": 64, "d_kv": 32},
    },
    "mt5": {
        "config": "MT5Config",
        "class": "MT5ForConditionalGeneration",
        "sizes": {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "num_layers": 2, "num_heads": 2}
        | {"d_model": 64, "d_ff": 64, "d_kv": 32},
        "has_own_head": True,
    },
    "bert": {
        "config": "BertConfig",
        "base": "BertForMaskedLM",
        "class": "BertForSequenceClassification",
        "sizes": _SIZES | {"max_position_embeddings": 64},
    },
    "llama that classifies": {
        "config": "LlamaConfig",
        "base": "LlamaForCausalLM",
        "class": "LlamaForSequenceClassification",
        "sizes": _SIZES,
    },
}
LORA = ("adapter.method=lora", "adapter.rank=2", "adapter.alpha=4")
QLORA = ("adapter.method=qlora", *LORA[1:])
ADDED = ("model.add_tokens=['[A]','[B]']",)
PURE = ("train.precision=bfloat16", "train.master_weights=false")
SEQ2SEQ, CLASSIFIES = {"task": "seq2seq"}, {"task": "classification", "rows": _LABELS}
WEIGHTED = ("train.class_weights=balanced", "train.label_smoothing=0.1")
PLAIN = ("data.prompt=''", "data.packing=blocks", "data.max_tokens=8", "stages={train: {}, consolidate: {}}")
SHARDED = (0, 2, 3)
# Name of the combination -> stages of ZeRO, model, overrides, and what else the request has.
CASES: dict[str, tuple[tuple[int, ...], str, tuple[str, ...], dict[str, Any]]] = {
    "experts": (SHARDED, "mixtral", (), {"is_killed": True}),
    "experts frozen by the names of their files": (
        SHARDED,
        "mixtral",
        ("model.freeze=['*.block_sparse_moe.experts.*']",),
        {},
    ),
    "adapter on experts": (SHARDED, "mixtral", LORA, {"is_killed": True}),
    "adapter on experts and their router": (SHARDED, "olmoe", LORA, {}),
    "adapter beside experts": (SHARDED, "mixtral", (*LORA, "adapter.target_modules=[q_proj,v_proj]"), {}),
    "quantised experts": ((0, 2), "mixtral", QLORA, {}),
    "rows of new tokens": (SHARDED, "tied", (*LORA, *ADDED), {}),
    "rows of new tokens beside a head of its own": (SHARDED, "llama", (*LORA, *ADDED), {}),
    "new tokens in rows that the model has to spare": ((3,), "spare rows", (*LORA, *ADDED), {}),
    "rows of new tokens, quantised": (SHARDED, "tied", (*QLORA, *ADDED), {}),
    "rows of new tokens beside a head, quantised": (SHARDED, "llama", (*QLORA, *ADDED), {}),
    "new tokens in a layer that trains in full": (
        SHARDED,
        "tied",
        (*LORA, *ADDED, "adapter.modules_to_save=[embed_tokens]"),
        {},
    ),
    "new tokens in layers that train in full, quantised": (
        SHARDED,
        "llama",
        (*QLORA, *ADDED, "adapter.modules_to_save=[embed_tokens,lm_head]"),
        {},
    ),
    "a tied head that trains in full": ((0, 2), "gpt2", (*LORA, *ADDED, "adapter.modules_to_save=[lm_head]"), {}),
    "new tokens, all trained": (SHARDED, "tied", ADDED, {}),
    "DoRA": (SHARDED, "llama", (*LORA, "adapter.dora=true"), {}),
    "DoRA, quantised": ((0, 2), "llama", (*QLORA, "adapter.dora=true"), {}),
    "DoRA of rank-stabilised factors": ((0,), "gpt2", (*LORA, "adapter.dora=true", "adapter.rslora=true"), {}),
    "transposed layers": ((0, 3), "gpt2", LORA, {}),
    "transposed layers, quantised": ((0, 2), "gpt2", QLORA, {}),
    "patterns of targets": ((0,), "llama", (*LORA, "adapter.target_modules=['.*(q_proj|v_proj)']"), {}),
    "dropout": ((0, 3), "llama", (*LORA, "adapter.dropout=0.1"), {}),
    "T5": (SHARDED, "t5", ("train.label_smoothing=0.1",), SEQ2SEQ),
    "T5 with an adapter": ((0, 3), "t5", LORA, SEQ2SEQ),
    "new tokens beside a head that the config ties": ((0, 2), "mt5", ADDED, SEQ2SEQ),
    "rows of new tokens beside a head that the config ties": ((0, 2), "mt5", (*LORA, *ADDED), SEQ2SEQ),
    "smoothed labels beside weights of classes": (SHARDED, "bert", WEIGHTED, CLASSIFIES),
    "a decoder that classifies": ((0, 3), "llama that classifies", WEIGHTED, CLASSIFIES),
    "a decoder that classifies, adapted": ((0, 3), "llama that classifies", LORA, CLASSIFIES),
    "a decoder that classifies, quantised": ((0, 2), "llama that classifies", QLORA, CLASSIFIES),
    "packed rows": (SHARDED, "llama", ("data.packing=rows", "train.label_smoothing=0.1", "train.global_batch=2"), {}),
    "packed rows with an adapter": ((0, 3), "llama", (*LORA, "data.packing=rows", "train.global_batch=2"), {}),
    "blocks of plain text": (SHARDED, "llama", PLAIN, {"rows": _TEXTS}),
    "pure bfloat16": ((0,), "llama", PURE, {}),
    "8-bit optimizer": (SHARDED, "llama", ("train.optimizer=adamw_8bit",), {}),
    "8-bit optimizer, quantised": ((0, 2), "llama", (*QLORA, "train.optimizer=adamw_8bit"), {}),
    "adafactor": ((0,), "llama", ("train.optimizer=adafactor",), {}),
    "recomputed activations": (SHARDED, "llama", ("train.gradient_checkpointing=true",), {}),
    "recomputed activations, quantised": ((0, 3), "llama", (*QLORA, "train.gradient_checkpointing=true"), {}),
    "noise on embeddings": (SHARDED, "llama", ("train.neftune_alpha=5",), {}),
    "noise on embeddings of new tokens": ((0,), "tied", (*LORA, *ADDED, "train.neftune_alpha=5"), {}),
    "rows of like length together": ((0, 2), "llama", ("train.group_by_length=true",), {}),
    "the best by its answers": (SHARDED, "llama", ("checkpoints.metric=exact_match",), {}),
    "the best by its answers, from a head that trains in full": (
        (0,),
        "llama",
        (*LORA, "adapter.modules_to_save=[lm_head]", "checkpoints.metric=exact_match", "train.precision=bfloat16"),
        {},
    ),
    "code of the model's own": (SHARDED, "own code", ("model.trust_remote_code=true",), {}),
    "several files": ((0,), "llama", ("consolidate.max_shard_gb=0.0001", "consolidate.dtype=bfloat16"), {}),
}
CELLS = [(case, stage) for case, (stages, *_) in CASES.items() for stage in stages]


@pytest.mark.parametrize(("case", "stage"), CELLS, ids=[f"{case}-{stage}" for case, stage in CELLS])
def test_what_plans_clean_is_finished(forked: Ask, case: str, stage: int) -> None:
    _, model, overrides, others = CASES[case]
    request = {"do": "stop_and_resume", "task": "causal_lm", "rows": _NUMBERS} | MODELS[model] | others
    words = [*overrides, f"train.zero.stage={stage}"]
    if not any(word.startswith("train.precision") for word in words):
        words.append("train.precision=float32")
    seen = forked(request | {"overrides": words})
    assert "refused" not in seen, seen["refused"]
    assert seen["resumed"] == pytest.approx(seen["losses"], rel=1e-6)
    assert seen["unequal"] == seen["missing"] == seen["other names"] == []
    assert seen["changed"]
    assert seen["rows"] == (0 if overrides == PLAIN else len(request["rows"]["validation"]))  # which asks for no answer


def test_what_balances_experts_is_no_part_of_the_loss_that_is_measured(forked: Ask) -> None:
    words = ["train.precision=float32", "train.steps=1", "train.learning_rate=1e-9", "consolidate.choose=last"]
    words += ["+model.config.output_router_logits=true", "+model.config.router_aux_loss_coef=10.0"]
    seen = forked({"do": "diverge", "task": "causal_lm", "rows": _NUMBERS, "overrides": words} | MODELS["mixtral"])
    assert "refused" not in seen, seen["refused"]
    assert seen["losses"]["loss 1"] > 10 > 5 > seen["losses"]["eval_loss 1"]


def test_a_training_whose_answers_become_filler_ends_and_leaves_its_best(forked: Ask) -> None:
    """All rows that train have one word as their answer, those that are measured have others."""
    rows = {split: [dict(row) for row in of_split] for split, of_split in _NUMBERS.items()}
    for row in rows["train"]:
        row["target"] = "5 5 5 5 5 5"
    overrides = ["train.precision=float32", "train.steps=12", "checkpoints.every_steps=1", "consolidate.choose=best"]
    request = {"do": "diverge", "task": "causal_lm", "rows": rows, "overrides": overrides} | MODELS["llama"]
    seen = forked(request)
    assert "refused" not in seen, seen["refused"]
    assert all(seen["codes"]) and len(seen["losses"]) < 24
    (why,) = seen["why"]
    assert "its answers to train.eval_split have become one token" in why
    measured = {key.removeprefix("eval_loss "): value for key, value in seen["losses"].items() if "eval" in key}
    best = min(measured, key=lambda step: measured[step])
    assert str(seen["step"]) == best and f"the checkpoint of step {best} is kept" in why
