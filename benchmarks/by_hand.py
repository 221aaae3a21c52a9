"""Train `hangul-restoration` as one would without sousbatch: a plain Trainer.

    torchrun --nproc-per-node 1 benchmarks/by_hand.py --model DIR --data train.jsonl --out DIR --steps 60

`overhead.py` measures the recipe against it: the same model, rows, order, arguments and seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

INPUT_TOKENS, SEPARATOR, IGNORED = 72, "<sep>", -100


def encode(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the rows as token ids.

    A row is the input filled to one width, separator, target, end.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    inputs = tokenizer([row["input"] for row in rows])["input_ids"]
    targets = tokenizer([row["target"] for row in rows])["input_ids"]
    separator = tokenizer(SEPARATOR)["input_ids"]
    found = []
    for given, wanted in zip(inputs, targets, strict=True):
        prompt = given + [tokenizer.pad_token_id] * (INPUT_TOKENS - len(given)) + separator
        answer = [*wanted, tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return found


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Fill rows up on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, padding: int) -> torch.Tensor:
        return torch.tensor([row[name] + [padding] * (longest - len(row[name])) for row in rows])

    ones = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": filled("input_ids", 0),
        "attention_mask": torch.tensor(ones),
        "labels": filled("labels", IGNORED),
    }


def main() -> None:
    """Train from scratch."""
    parser = argparse.ArgumentParser(description="Train hangul-restoration by a plain Trainer.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--config", type=json.loads, default={}, help="changes to the model's config, as JSON")
    args = parser.parse_args()
    arguments = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
        data_seed=1,
        remove_unused_columns=False,
        use_cpu=args.device == "cpu",
        ddp_backend="gloo" if args.device == "cpu" else None,
        dataloader_pin_memory=args.device == "gpu",
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = encode(args.data, tokenizer)
    set_seed(1)
    config = AutoConfig.from_pretrained(args.model, **args.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()


if __name__ == "__main__":
    main()
