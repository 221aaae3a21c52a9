"""The model that trains: tokens, freezing, quantisation and adapters in the one order that works, really trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

from sousbatch.errors import UsageError
from sousbatch.jobs.training.model import build_model
from sousbatch.recipes.facts import TensorFacts
from sousbatch.recipes.forecast.parameters import takes_adapter
from sousbatch.recipes.new_tokens import add_rows
from sousbatch.recipes.schema import Adapter, Model, Recipe, Train, Zero

# peft calls transformers by names that are deprecated there, and ours serve the older ones too
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
WORDS, ADDED = 64, 2
LORA = {"rank": 4, "target_modules": ("q_proj", "v_proj")}


class Words:
    """A tokenizer as far as building a model asks: two of its tokens are the recipe's own, called by their ids."""

    def __init__(self, num_known: int = WORDS) -> None:
        self.num_known, self.eos_token_id = num_known, 2

    def __call__(self, *, text_target: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(text or 0), self.eos_token_id] for text in text_target]}

    def __len__(self) -> int:
        return WORDS + ADDED

    def convert_tokens_to_ids(self, token: str) -> int:
        return int(token)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with weights."""
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).save_pretrained(found)
    return found


def build(
    folder: Path,
    *,
    adapter: Adapter | None = None,
    freeze: tuple[str, ...] = (),
    config: dict[str, Any] | None = None,
    num_known: int = WORDS,
    **train: Any,
) -> Any:
    train = {"precision": "float32"} | train
    spec = Model(path="m", freeze=freeze, config=config or {}, add_tokens=(str(WORDS), str(WORDS + 1)))
    recipe = Recipe(name="r", model=spec, adapter=adapter or Adapter(), train=Train(**train))
    return build_model(recipe, folder, Words(num_known), has_weights=True)


def trained(model: Any, num_steps: int = 8) -> list[float]:
    """Return the losses of some steps on one batch that holds an added token."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    batch = torch.tensor([[1, 5, 9, WORDS, 13], [1, 6, 10, WORDS + 1, 14]])
    losses = []
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def trainable(model: Any) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def frozen_bytes(model: Any) -> dict[str, bytes]:
    """Return the base as bytes: four bits a parameter look like NaN where they are packed as floats."""
    named = ((name, value.detach()) for name, value in model.named_parameters() if name not in trainable(model))
    return {name: value.contiguous().view(torch.uint8).numpy().tobytes() for name, value in named}


def test_added_tokens_get_rows_of_their_own_which_train(folder: Path) -> None:
    model = build(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    assert before.shape[0] == model.lm_head.weight.shape[0] == WORDS + ADDED
    for layer in (model.get_input_embeddings(), model.lm_head):
        torch.testing.assert_close(layer.weight[WORDS:], layer.weight[:WORDS].mean(dim=0).expand(ADDED, -1))
    losses = trained(model)
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(before[WORDS:], model.get_input_embeddings().weight[WORDS:])


def test_frozen_parameters_keep_their_values_and_the_others_learn(folder: Path) -> None:
    model = build(folder, freeze=("layers:0-0", "*embed*"))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = trained(model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}
    assert losses[-1] < losses[0] and changed == trainable(model)
    assert not any("layers.0." in name or "embed" in name for name in changed)


def test_a_model_of_which_nothing_trains_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="leaves nothing to train"):
        build(folder, freeze=("*",))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_is_added_after_tokens_and_quantisation_and_it_alone_learns(
    folder: Path, method: Any, gradient_checkpointing: bool
) -> None:
    adapter = Adapter(method=method, **LORA)
    model = build(folder, adapter=adapter, gradient_checkpointing=gradient_checkpointing)
    assert model.get_input_embeddings().weight.shape[0] == WORDS + ADDED
    assert sum("lora_" in name for name in trainable(model)) == 2 * 2 * 2
    rows = {name for name in trainable(model) if "lora_" not in name}
    assert {name.split(".token_adapter.")[0].rpartition("model.")[2] for name in rows} == {"embed_tokens", "lm_head"}
    assert all(model.get_parameter(name).shape[0] == ADDED for name in rows)
    before = frozen_bytes(model)
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert before == frozen_bytes(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert (type(layer).__name__ == "Linear4bit") is (method == "qlora")
    assert any(getattr(one, "gradient_checkpointing", False) for one in model.modules()) is gradient_checkpointing
    assert not model.config.use_cache


def test_tokens_in_spare_rows_of_the_model_begin_at_the_mean_too_and_known_ones_stay(folder: Path) -> None:
    weight = LlamaForCausalLM.from_pretrained(folder).lm_head.weight
    model = build(folder, num_known=WORDS - 4)
    mean = weight[: WORDS - 4].mean(dim=0)
    torch.testing.assert_close(model.lm_head.weight[WORDS - 4 :], mean.expand(4 + ADDED, -1))
    known = build(folder, num_known=WORDS + ADDED)
    assert torch.equal(known.lm_head.weight[:WORDS], weight)


@pytest.mark.parametrize(
    ("config", "adapter", "expected"),
    [
        ({"tie_word_embeddings": True}, {}, {"embed_tokens": "rows"}),
        ({}, {"modules_to_save": ("embed_tokens", "lm_head")}, {"embed_tokens": "whole", "lm_head": "whole"}),
        ({}, {"modules_to_save": ("lm_head",)}, {"embed_tokens": "rows", "lm_head": "whole"}),
    ],
)
def test_new_tokens_train_beside_an_adapter_as_rows_unless_their_layer_trains_in_full(
    folder: Path, tmp_path: Path, config: Any, adapter: Any, expected: dict[str, str]
) -> None:
    if config:  # files without a head of their own: one that differs from the embeddings would stay
        base = LlamaForCausalLM.from_pretrained(folder)
        base.lm_head.weight = base.model.embed_tokens.weight
        base.config.tie_word_embeddings = True
        base.save_pretrained(folder := tmp_path)
    model = build(folder, adapter=Adapter(method="lora", **{**LORA, **adapter}), config=config)
    found = {}
    for name in (name for name in trainable(model) if "lora_" not in name):
        layer, _, kind = name.removeprefix("base_model.model.").removeprefix("model.").partition(".")
        found[layer] = "rows" if kind.startswith("token_adapter") else "whole"
    assert found == expected
    losses = trained(model)
    assert losses[-1] < losses[0]
    batch = torch.tensor([[1, 5, 9, WORDS, 13]])
    model.eval()
    tuned = model(input_ids=batch).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=batch).logits, tuned, rtol=1e-4, atol=1e-4)


def test_an_output_layer_with_a_bias_trains_in_full_for_new_tokens(tmp_path: Path) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0}
    GPTJForCausalLM(GPTJConfig(vocab_size=WORDS, **sizes)).save_pretrained(tmp_path)
    model = build(tmp_path, adapter=Adapter(method="lora", **LORA))
    names = {name.removeprefix("base_model.model.") for name in trainable(model) if "lora_" not in name}
    assert names == {
        "transformer.wte.token_adapter.trainable_tokens_delta.default",
        "lm_head.modules_to_save.default.weight",
        "lm_head.modules_to_save.default.bias",
    }


def test_embeddings_that_train_in_full_beside_an_adapter_go_into_layer_norms_in_half_precision(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=WORDS + ADDED, **sizes)).save_pretrained(tmp_path)
    adapter = Adapter(method="lora", rank=4, target_modules=("query_key_value",), modules_to_save=("embed_in",))
    model = build(tmp_path, adapter=adapter, precision="bfloat16", num_known=WORDS + ADDED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = trained(model)
    assert losses[-1] < losses[0]


def test_a_head_that_is_tied_to_the_decoders_embeddings_is_saved_with_them(tmp_path: Path) -> None:
    part = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    part |= {"num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["full_attention"]}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part, vocab_size=WORDS))
    assert add_rows(model, Words()) == [WORDS, WORDS + 1]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_layers_that_train_in_full_beside_an_adapter_are_not_quantised(folder: Path) -> None:
    saved = ("lm_head", "layers.1.self_attn")
    model = build(folder, adapter=Adapter(method="qlora", modules_to_save=saved, rank=4, target_modules=("up_proj",)))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    layers = "base_model.model.model.layers"
    assert kinds[f"{layers}.0.self_attn.q_proj"] == kinds[f"{layers}.1.mlp.up_proj.base_layer"] == "Linear4bit"
    assert kinds[f"{layers}.1.self_attn.modules_to_save.default.q_proj"] == "Linear"
    losses = trained(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("zero_stage", "method", "precision", "dtype"),
    [
        (0, "full", "bfloat16", torch.float32),  # the weights are the masters
        (2, "full", "bfloat16", torch.bfloat16),  # DeepSpeed keeps the masters
        (2, "full", "float32", torch.float32),
        (0, "lora", "bfloat16", torch.bfloat16),  # the base only forwards
        (2, "lora", "bfloat16", torch.bfloat16),
    ],
)
def test_weights_have_the_dtype_in_which_their_engine_keeps_them(
    folder: Path, zero_stage: Any, method: Any, precision: Any, dtype: torch.dtype
) -> None:
    adapter = Adapter(method=method, modules_to_save=("lm_head",) if method == "lora" else (), **LORA)
    model = build(folder, adapter=adapter, precision=precision, zero=Zero(stage=zero_stage))
    added = {name for name in trainable(model) if method == "lora"}
    base = {value.dtype for name, value in model.named_parameters() if name not in added}
    assert base == {dtype}
    # layers that train in full beside an adapter, too
    assert {model.get_parameter(name).dtype for name in added} == (
        {torch.bfloat16 if zero_stage else torch.float32} if added else set()
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ((".*(q_proj|v_proj)",), {"q_proj", "v_proj"}),
        ((r"model\.layers\.1\..*_proj", "o_proj"), {"o_proj", "gate_proj", "down_proj", "up_proj", "q_proj"}),
        (("layers.0.self_attn.q_proj",), {"q_proj"}),
    ],
)
def test_targets_are_names_and_patterns(folder: Path, targets: tuple[str, ...], expected: set[str]) -> None:
    model = build(folder, adapter=Adapter(method="lora", rank=4, target_modules=targets))
    layers = {name.partition(".lora_")[0] for name in trainable(model) if ".lora_" in name}
    assert {name.rpartition(".")[2] for name in layers} >= expected
    assert not any("layers.0.mlp" in name for name in layers)
    estimated = [
        name
        for name, value in LlamaForCausalLM.from_pretrained(folder).named_parameters()
        if any(
            takes_adapter(TensorFacts(name=name, shape=tuple(value.shape), dtype="float32"), target, ())
            for target in targets
        )
    ]
    assert {f"base_model.model.{name}".removesuffix(".weight") for name in estimated} == layers


def test_a_pattern_that_matches_no_layer_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no layer is called '\.\*qproj'; known: down_proj"):
        build(folder, adapter=Adapter(method="lora", target_modules=("q_proj", ".*qproj")))


def test_an_adapter_can_be_scaled_by_the_root_of_its_rank_and_train_lengths(folder: Path) -> None:
    model = build(folder, adapter=Adapter(method="lora", rank=16, alpha=8, rslora=True, dora=True))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 16**0.5
    lengths = [name for name in trainable(model) if "lora_magnitude_vector" in name]
    assert len(lengths) == 2 * 7
    losses = trained(model)
    assert losses[-1] < losses[0]


def test_computed_positions_do_not_train(tmp_path: Path) -> None:
    """transformers makes them trainable when it loads them, and no gradient would reach them."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
    MarianMTModel(MarianConfig(vocab_size=WORDS + ADDED, encoder_ffn_dim=16, **sizes, **heads)).save_pretrained(
        tmp_path
    )
    recipe = Recipe(name="r", task="seq2seq", model=Model(path="m"), train=Train(precision="float32"))
    model = build_model(recipe, tmp_path, Words(WORDS + ADDED), has_weights=True)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}


def test_an_attempt_that_gives_up_memory_starts_also_where_nothing_can_be_computed_again(tmp_path: Path) -> None:
    sizes = {"embedding_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = AlbertConfig(vocab_size=WORDS, num_attention_heads=2, **sizes)
    AlbertForSequenceClassification(config).save_pretrained(tmp_path)
    train = Train(precision="float32", gradient_checkpointing=True)
    recipe = Recipe(name="r", task="classification", model=Model(path="m"), train=train)
    assert not build_model(recipe, tmp_path, Words(WORDS), has_weights=True).is_gradient_checkpointing
