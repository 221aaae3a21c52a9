"""Small models of every architecture that transformers knows for a task, and what they answer row by row.

Rows are encoded one at a time, without padding, and answered without a cache: what a batch must not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

# The names that configs have for their sizes; those that a config knows are taken.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "global_attn_every_n_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "d_kv", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "attention_window", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 128),
    **dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), 128),
    **{"q_lora_rank": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "sliding_window": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_HALF = {"num_attention_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
# What is tried in turn: some of these sizes do not go together in some architectures. None leaves one out.
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": None},
    {"head_dim": None, "d_kv": None},
    {"head_dim": None, "num_key_value_heads": None},
    dict.fromkeys(("qk_rope_head_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")),
    _LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    dict.fromkeys(name for name, value in _SIZES.items() if value not in (0, 1, 2)),
)
_OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "bamba": _HALF | {"attn_layer_indices": [1]},
    "granitemoehybrid": _HALF | {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
_MOST_PARAMETERS = 150_000_000


def small_model(kind: str, auto: Any, num_words: int) -> Any:
    """Return a random model of *kind*, whose every weight matters, or as text why there is none."""
    faults = list[str]()
    for changes in _CHANGES:
        wanted = _SIZES | {"vocab_size": num_words} | changes
        try:
            sizes = _sizes_of(transformers.AutoConfig.for_model(kind), wanted) | _OWN.get(kind, {})
            model = _attempt(transformers.AutoConfig.for_model(kind, **sizes), auto)
        except Exception as error:  # each architecture has its own rules
            faults.append(f"{type(error).__name__}: {error}"[:100])
        else:
            for weight in model.parameters():
                if weight.dim() > 1:
                    torch.nn.init.normal_(weight, std=0.2)
            return model
    return "; ".join(dict.fromkeys(faults))


def _sizes_of(config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the *wanted* sizes that *config* knows, and those of each config in it."""
    known = {*config.to_dict(), *config.attribute_map}
    sizes = {name: value for name, value in wanted.items() if name in known and value is not None}
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            sizes[name] = {"model_type": inner.model_type, **_sizes_of(inner, wanted)}
    return sizes


def _attempt(config: Any, auto: Any) -> Any:
    config.pad_token_id = 0
    if config.is_encoder_decoder:
        for name in ("eos_token_id", "decoder_start_token_id"):
            setattr(config, name, 2)
    with torch.device("meta"):
        num_params = sum(weight.numel() for weight in auto.from_config(config).parameters())
    if num_params > _MOST_PARAMETERS:
        raise ValueError(f"{num_params / 1e6:.0f}M parameters")
    model = auto.from_config(config).eval()
    ids = torch.tensor([[5, 2, 2, 6, 7, 2]])
    with torch.no_grad():
        model(input_ids=ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {}))
    return model


@torch.no_grad()
def plain_labels(model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]]) -> tuple[list[list[float]], float]:
    """Return the probabilities of each row's labels, and the mean loss."""
    found = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["input"])["input_ids"]])
        found.append(model(input_ids=ids).logits[0].float().softmax(-1).tolist())
    labels = model.config.label2id
    losses = [-math.log(one[labels[row["target"]]]) for one, row in zip(found, rows, strict=True)]
    return found, sum(losses) / len(losses)


@torch.no_grad()
def plain_spans(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, str]], longest: int, stride: int
) -> list[float]:
    """Return the score of the best span of each row, over windows of *longest* tokens."""
    has_types, found = (getattr(model.config, "type_vocab_size", None) or 0) > 1, []
    for row in rows:
        options = {"truncation": "only_second", "return_overflowing_tokens": True, "return_token_type_ids": True}
        windows = tokenizer(row["question"], row["context"], max_length=longest, stride=stride, **options)
        best = -math.inf
        for number, ids in enumerate(windows["input_ids"]):
            types = {"token_type_ids": torch.tensor([windows["token_type_ids"][number]])} if has_types else {}
            output = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **types)
            places = [place for place, part in enumerate(windows.sequence_ids(number)) if part == 1]
            start, end = output.start_logits[0], output.end_logits[0]
            best = max([best, *(float(start[i] + end[j]) for i in places for j in places if i <= j)])
        found.append(best)
    return found


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the scores of a decoder; without a mask some read later tokens, too."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long()).logits[0]
    return logits


@torch.no_grad()
def plain_answers(
    model: Any, prompts: Sequence[list[int]], targets: Sequence[list[int]], num_new: int
) -> tuple[list[list[int]], float]:
    """Return the ids of each answer, and the mean loss over the tokens of *targets*, end tokens among them."""
    answers, total = [], 0.0
    for prompt, target in zip(prompts, targets, strict=True):
        source = torch.tensor([prompt])
        if model.config.is_encoder_decoder:
            made = model.generate(source, max_new_tokens=num_new, do_sample=False, num_beams=1, use_cache=False)
            ids, start = made[0, 1:].tolist(), model.config.decoder_start_token_id
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits[0]
        else:
            ids = []
            while len(ids) < num_new and 2 not in ids:
                ids.append(int(_logits(model, [*prompt, *ids])[-1].argmax()))
            logits = _logits(model, [*prompt, *target])[len(prompt) - 1 : -1]
        answers.append(ids[: ids.index(2)] if 2 in ids else ids)
        total += float(cross_entropy(logits.float(), torch.tensor(target), reduction="sum"))
    return answers, total / sum(map(len, targets))
