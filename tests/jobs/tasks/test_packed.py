"""Packs of rows: their losses and gradients are those of the rows one by one. Blocks: no token is lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sousbatch.recipes
from sousbatch.jobs.tasks import IGNORED_LABEL
from sousbatch.jobs.tasks.causal_lm import RUNTIME, Collator, load_examples
from sousbatch.recipes.data.packing import PACKABLE
from sousbatch.recipes.schema import Data, Model, StageSettings

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
# Words of the configs of many model types; each takes those that it knows.
SMALL = {
    **{"vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "num_layers": 2, "num_heads": 4, "rotary_dim": 4},
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
    **{"attention_types": [[["global", "local"], 1]], "window_size": 8, "sliding_window": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def _model(kind: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    known = AutoConfig.for_model(kind)
    names = {*known.to_dict(), *known.attribute_map}
    config = AutoConfig.for_model(kind, **{name: value for name, value in SMALL.items() if name in names})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False  # as for training
    return model.train()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = random.Random(0)
    texts = ["".join(chance.choices("가나다라마바사아자차", k=chance.randrange(1, 6))) for _ in range(40)]
    rows = [{"input": one, "target": other, "text": one} for one, other in zip(texts[::2], texts[1::2], strict=True)]
    path = tmp_path_factory.mktemp("packs") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _settings(**data: Any) -> StageSettings:
    return StageSettings(data=Data(**{"max_tokens": 48, "separator": "<sep>", **data}))


def _loss(model: Any, batches: list[Any]) -> tuple[float, torch.Tensor]:
    """Return loss and gradient over batches, normalised as the Trainer does over accumulated ones."""
    model.zero_grad()
    num_items = sum(int((batch["labels"][..., 1:] != IGNORED_LABEL).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=torch.tensor(num_items)).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def _compare(kind: str, attention: str, dtype: torch.dtype, path: Path, tokenizer: Any, **data: Any) -> Any:
    alone, packed = (load_examples(_settings(packing=packing, **data), path, tokenizer) for packing in ("none", "rows"))
    assert len(packed) < len(alone) / 2
    collate, model = Collator(tokenizer.pad_token_id), _model(kind, attention, dtype)
    one_by_one = _loss(model, [collate([alone[row]]) for row in range(len(alone))])
    half = (len(packed) + 1) // 2
    together = _loss(model, [collate([packed[at] for at in part]) for part in (range(half), range(half, len(packed)))])
    flat = _loss(model, [Collator(tokenizer.pad_token_id, is_flat=True)([packed[at] for at in range(len(packed))])])
    return one_by_one, together, flat


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gpt2", "sdpa"), ("qwen2", "eager")])
def test_losses_and_gradients_are_those_of_the_rows_one_by_one(
    kind: str, attention: str, loss_on: str, path: Path, tokenizer: Any
) -> None:
    (loss, gradient), *others = _compare(kind, attention, torch.float32, path, tokenizer, loss_on=loss_on)
    for packed, packed_gradient in others:
        assert packed == pytest.approx(loss, abs=1e-5)
        assert (packed_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_the_same_in_bfloat16_within_its_precision(path: Path, tokenizer: Any) -> None:
    (loss, _), *others = _compare("llama", "sdpa", torch.bfloat16, path, tokenizer)
    assert [packed for packed, _ in others] == [pytest.approx(loss, rel=5e-3)] * 2


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_each_model_type_that_may_pack_keeps_rows_apart(kind: str, path: Path, tokenizer: Any) -> None:
    (loss, gradient), *others = _compare(kind, "eager", torch.float32, path, tokenizer)
    for packed, packed_gradient in others:
        assert packed == pytest.approx(loss, abs=1e-5)
        assert (packed_gradient - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_a_pack_holds_rows_as_they_are_and_no_row_foretells_the_next(path: Path, tokenizer: Any) -> None:
    settings = _settings(packing="rows", loss_on="all")
    alone, packed = load_examples(_settings(loss_on="all"), path, tokenizer), load_examples(settings, path, tokenizer)
    found = []
    for at in range(len(packed)):
        pack = packed[at]
        starts = [place for place, position in enumerate(pack["position_ids"]) if position == 0]
        for begin, end in zip(starts, [*starts[1:], None], strict=True):
            found.append(pack["input_ids"][begin:end])
            assert pack["labels"][begin] == IGNORED_LABEL and pack["labels"][begin + 1 : end] == found[-1][1:]
    assert sorted(found) == sorted(alone[row]["input_ids"] for row in range(len(alone)))


def test_flash_attention_gets_packs_in_one_row_without_padding(path: Path, tokenizer: Any) -> None:
    settings = _settings(packing="rows")
    packed = load_examples(settings, path, tokenizer)
    spec = StageSettings(data=settings.data, model=Model(attention="flash_attention_2"))
    batch = RUNTIME.collator(spec, tokenizer, None)([packed[0], packed[1]])
    total = len(packed[0]["input_ids"]) + len(packed[1]["input_ids"])
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (1, total)
    )


def test_plain_text_is_joined_with_end_tokens_and_cut_into_blocks(path: Path, tokenizer: Any) -> None:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    expected = [id for text in texts for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = load_examples(_settings(packing="blocks", prompt="", max_tokens=16), path, tokenizer)
    found = [blocks[at] for at in range(len(blocks))]
    assert [id for block in found for id in block["input_ids"]] == expected
    assert {len(block["input_ids"]) for block in found[:-1]} == {16}
    assert all(block["labels"] == block["input_ids"] for block in found)


def test_a_text_longer_than_a_block_is_neither_refused_nor_cut(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "가" * 100}) + "\n" + json.dumps({"text": ""}) + "\n")
    blocks = load_examples(_settings(packing="blocks", prompt="", max_tokens=16), tmp_path / "rows.jsonl", tokenizer)
    assert sum(len(blocks[at]["input_ids"]) for at in range(len(blocks))) == 301  # a syllable is three tokens
