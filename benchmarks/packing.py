"""Compare training on packs of rows with training on padded rows, in tokens of the data a second.

    python benchmarks/packing.py

One Llama, rows of mixed lengths (lognormal, at most `data.max_tokens`), the examples and batches that jobs make. The
sides take turns, a step each; a step is forward, backward and AdamW. All sides train on every row about as often, and
tokens count once, padding never.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sousbatch.recipes
from sousbatch.jobs.tasks.causal_lm import RUNTIME
from sousbatch.recipes.schema import Data, StageSettings

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
MAX_TOKENS, MICRO_BATCH, NUM_ROWS = 512, 8, 2000
GROUPED = 50  # micro batches whose rows are sorted by length at once, as transformers does


def write_rows(path: Path) -> None:
    """Write rows whose lengths are lognormal: median 100 tokens, a tail up to the limit."""
    chance = random.Random(0)
    lengths = [min(MAX_TOKENS - 8, max(8, int(chance.lognormvariate(4.6, 0.8)))) for _ in range(NUM_ROWS)]
    rows = [{"input": "a" * (length // 2), "target": "b" * (length // 2)} for length in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def batches(examples: Any, collate: Any, micro_batch: int, *, grouped: bool = False) -> Iterator[dict[str, Any]]:
    """Yield batches of the examples in a shuffled order, without end."""
    chance = random.Random(1)
    while True:
        order = list(range(len(examples)))
        chance.shuffle(order)
        if grouped:
            chunk = micro_batch * GROUPED
            order = [
                row
                for at in range(0, len(order), chunk)
                for row in sorted(order[at : at + chunk], key=lambda row: -len(examples[row]["input_ids"]))
            ]
            found = [order[at : at + micro_batch] for at in range(0, len(order), micro_batch)]
            chance.shuffle(found)
            order = [row for part in found for row in part]
        for at in range(0, len(order) - micro_batch + 1, micro_batch):
            yield collate([examples[row] for row in order[at : at + micro_batch]])


def main() -> None:
    """Measure, and print tokens a second of each side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.model_max_length = MAX_TOKENS
    settings = StageSettings(data=Data(max_tokens=MAX_TOKENS, long_rows="cut_right"))
    packing = replace(settings, data=replace(settings.data, packing="rows"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=MAX_TOKENS,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        write_rows(path)
        rows, packs = (RUNTIME.examples(one, path, tokenizer, None) for one in (settings, packing))
    collate = RUNTIME.collator(settings, tokenizer, None)
    rows_a_pack = len(rows) / len(packs)
    micro_packs = max(1, round(MICRO_BATCH / rows_a_pack))
    print(f"{len(rows)} rows, packs of {rows_a_pack:.1f}; {MICRO_BATCH} rows or {micro_packs} packs in a micro batch")
    sides = {
        "padded": batches(rows, collate, MICRO_BATCH),
        "by length": batches(rows, collate, MICRO_BATCH, grouped=True),
        "packed": batches(packs, collate, micro_packs),
    }
    measure(sides, config, arguments.steps, tokenizer.pad_token_id)


def measure(sides: dict[str, Iterator[dict[str, Any]]], config: LlamaConfig, steps: int, pad: int) -> None:
    """Let the sides take turns, and print what each did."""
    speeds, shares = {name: list[float]() for name in sides}, {name: [0, 0] for name in sides}
    torch.manual_seed(0)
    models = {name: LlamaForCausalLM(config).train() for name in sides}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    spent = dict.fromkeys(sides, 0.0)
    for step in range(steps + 2):
        for name, batch in ((name, next(side)) for name, side in sides.items()):
            begun = time.perf_counter()
            models[name](**batch, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            elapsed = time.perf_counter() - begun
            num_tokens = int((batch["input_ids"] != pad).sum())
            if step >= 2:
                speeds[name].append(num_tokens / elapsed)
                spent[name] += elapsed
                shares[name] = [shares[name][0] + num_tokens, shares[name][1] + batch["input_ids"].numel()]
    print("side        tokens/s  median  padding  to padded")
    base = shares["padded"][0] / spent["padded"]
    for name in sides:
        tokens, places = shares[name]
        speed = tokens / spent[name]
        print(
            f"{name:10} {speed:9,.0f} {statistics.median(speeds[name]):7,.0f} {1 - tokens / places:8.0%} "
            f"{speed / base:9.2f} x"
        )


if __name__ == "__main__":
    main()
