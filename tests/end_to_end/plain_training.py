"""Train a recipe again by plain torch, transformers and peft in one process, one row at a time.

Taken from the run that it is compared with: the plan's settings, which rows each step took (each is looked for among
those that `plain_rows` makes, and every epoch must have each once), the first values of new weights, and the names of
the heads that train in full beside an adapter.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from plain_rows import Example

CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "question_answering": "AutoModelForQuestionAnswering",
    "classification": "AutoModelForSequenceClassification",
}


def load(settings: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model of a folder in float32, and what transformers tells of its weights."""
    options |= {name: value for name, value in settings.model.config.items() if "label" not in name}
    if settings.model.attention:
        options["attn_implementation"] = settings.model.attention
    loader = getattr(transformers, CLASSES[settings.task])
    model, told = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    return model, dict(told)


def base_model(settings: Any, labels: Sequence[str]) -> tuple[Any, set[str]]:
    """Return the model to start from, and the names of its weights that are new."""
    options: dict[str, Any] = {}
    if settings.task == "classification":
        names = dict(enumerate(labels))
        options = {"id2label": names, "label2id": {label: place for place, label in names.items()}}
        options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    model, told = load(settings, Path("model"), **options)
    return model, {*told["missing_keys"], *(one[0] for one in told["mismatched_keys"])}


def is_frozen(name: str, patterns: Sequence[str]) -> bool:
    layer = re.search(r"(?:^|\.)(?:layers|h|layer|block|blocks)\.(\d+)\.", name)
    for pattern in patterns:
        if match := re.fullmatch(r"layers:(\d+)(?:-(\d+))?", pattern):
            if layer and int(match[1]) <= int(layer[1]) <= int(match[2] or match[1]):
                return True
        elif fnmatch.fnmatchcase(name, pattern):
            return True
    return False


def prepared(settings: Any, model: Any, tokenizer: Any, trained: Sequence[str]) -> Any:
    """Return *model* as it trains: with new tokens, frozen weights and adapters."""
    with torch.device("meta"):  # from_pretrained forgets what the class itself freezes, such as Pegasus its positions
        by_class = type(model)(model.config)
    frozen = {name for name, weight in by_class.named_parameters() if not weight.requires_grad}
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for name, weight in model.named_parameters():
        if name in frozen or is_frozen(name, settings.model.freeze):
            weight.requires_grad_(False)
    adapter = settings.adapter
    if adapter.method == "full":
        return model
    targets: Any = adapter.target_modules
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        is_pattern = [bool({*one} & {*"*(|"}) for one in targets]
        both = zip(targets, is_pattern, strict=True)
        targets = "|".join(f"(?:{one})" if whole else rf"(?:.*\.)?{re.escape(one)}" for one, whole in both)
    in_full = {match[1] for name in trained if (match := re.search(r"base_model\.model\.(.+)\.modules_to_save", name))}
    named = {
        name for name, _ in model.named_modules() for one in adapter.modules_to_save if f".{name}".endswith(f".{one}")
    }
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    ends = {name for name, module in model.named_modules() if any(module is one for one in outer)}
    # else peft would train two copies of what the model holds once
    is_tied = model.config.tie_word_embeddings and bool(named & ends)
    ids = sorted({tokenizer.convert_tokens_to_ids(one) for one in settings.model.add_tokens})
    deltas = {name for name in trained if "trainable_tokens" in name}
    rows = {re.sub(r"^base_model\.model\.|\.token_adapter.*$", "", name): ids for name in deltas}
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=targets,
        modules_to_save=sorted(in_full | named) or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=is_tied,
    )
    return peft.get_peft_model(model, config)


def take_values(model: Any, values: dict[str, torch.Tensor]) -> list[str]:
    """Give *model* the *values* of its parameters; return the names of those that had others."""
    other = []
    for name, weight in model.named_parameters():
        if name in values:
            other += [] if torch.equal(weight.data, values[name]) else [name]
            weight.data = values[name].clone()
    return other


# The loss


def loss_of(model: Any, task: str, example: Example, *, smoothing: float = 0.0, weights: Any = None) -> tuple[Any, int]:
    """Return the sum of the losses of an example, and how many outputs it has."""

    def entropy(logits: Any, labels: Any) -> tuple[Any, int]:
        kept = labels != -100
        scores, labels = logits.float().log_softmax(-1)[kept], labels[kept]
        right = -scores.gather(-1, labels[:, None])[:, 0] * (1 if weights is None else weights[labels])
        return ((1 - smoothing) * right - smoothing * scores.mean(-1)).sum(), int(kept.sum())

    ids = torch.tensor([example[0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "causal_lm":
        return entropy(model(**inputs, use_cache=False).logits[0, :-1], torch.tensor(example[1][1:]))
    if task == "classification":
        return entropy(model(**inputs).logits, torch.tensor([example[1]]))
    if task == "seq2seq":
        inner, labels = getattr(model, "get_base_model", lambda: model)(), torch.tensor([example[1]])
        if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
            target = inner.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        else:
            target = torch.tensor([[inner.config.decoder_start_token_id, *example[1][:-1]]])
        return entropy(model(**inputs, decoder_input_ids=target, use_cache=False).logits[0], labels[0])
    output = model(**inputs, **token_types(model, example[1]))
    start, end = (
        entropy(scores, torch.tensor([place]))[0]
        for scores, place in ((output.start_logits, example[2]), (output.end_logits, example[3]))
    )
    return (start + end) / 2, 1


def token_types(model: Any, types: Sequence[int]) -> dict[str, torch.Tensor]:
    has_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    return {"token_type_ids": torch.tensor([types])} if has_types else {}


def class_weights(settings: Any, labels: Sequence[str], examples: Sequence[Example]) -> torch.Tensor | None:
    wanted = settings.train.class_weights
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = Counter(label for _, label in examples)
        return torch.tensor([len(examples) / (len(labels) * counts[place]) for place in range(len(labels))])
    return torch.tensor([float(wanted.get(label, 1)) for label in labels])


# The optimizer


def optimizer_of(settings: Any, model: Any) -> torch.optim.Optimizer:
    train = settings.train
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    groups = [
        {
            "params": [
                weight
                for name, weight in model.named_parameters()
                if weight.requires_grad and (name in decayed) == is_decayed
            ],
            "weight_decay": train.weight_decay if is_decayed else 0.0,
        }
        for is_decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if train.optimizer == "adafactor":
        return transformers.Adafactor(groups, lr=1.0, scale_parameter=False, relative_step=False)
    return torch.optim.AdamW(groups, betas=(train.beta1, train.beta2), eps=float(train.epsilon))


def rate_at(settings: Any, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the rate of a step, the first being 0."""
    plan, peak = settings.train.schedule, settings.train.learning_rate
    warm = math.ceil(plan.warmup_ratio * steps) if plan.warmup_steps is None else plan.warmup_steps
    if step < warm:
        return float(peak * (step + 1) / warm)
    at, length = step - warm, max(1, steps - warm)
    period = plan.period_steps or (plan.period_epochs and max(1, round(plan.period_epochs * steps_per_epoch)))
    if plan.name == "step":
        share = plan.decay ** (at // period)
    elif plan.name in ("constant", "linear"):
        share = 1 if plan.name == "constant" else 1 - min(1, at / length)
    elif plan.name == "cosine" and period:
        share = 0.5 * (1 + math.cos(math.pi * at / period))
    else:
        period = period or length
        while plan.name == "cosine_restarts" and at >= period:
            at, period = at - period, period * plan.period_factor
        share = 0.5 * (1 + math.cos(math.pi * min(1, at / period)))
    return float(peak * (plan.min_ratio + (1 - plan.min_ratio) * share))


# The rows of each step


def recorded_steps(task: str) -> dict[int, list[tuple[Example, float]]]:
    """Return the examples that each step of the run took, without padding, and its rate."""
    found = defaultdict(list)
    for path in sorted(Path().glob("train-rank*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            examples = list(_unpadded(task, line["inputs"]))
            found[line["step"]] += [(example, line["rate"]) for example in examples]
    return dict(sorted(found.items()))


def _unpadded(task: str, inputs: dict[str, Any]) -> Iterator[Example]:
    for row, ids in enumerate(inputs["input_ids"]):
        labels = inputs["labels"][row]
        if "position_ids" in inputs:  # several rows side by side
            starts = [place for place, position in enumerate(inputs["position_ids"][row]) if position == 0]
            for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
                if any(label != -100 for label in labels[start:stop]):
                    yield ids[start:stop], labels[start:stop]
            continue
        places = [place for place, is_seen in enumerate(inputs["attention_mask"][row]) if is_seen]
        seen = [ids[place] for place in places]
        if task == "causal_lm":
            yield seen, [labels[place] for place in places]
        elif task == "seq2seq":
            yield seen, [label for label in labels if label != -100]
        elif task == "classification":
            yield seen, labels
        else:
            types = inputs.get("token_type_ids", {row: [0] * len(ids)})[row]
            yield seen, [types[place] for place in places], *labels[:2]


def key_of(example: Example) -> str:
    """Return what an example is known by; not every model is given the token types."""
    return json.dumps([example[0], *example[2 if len(example) > 2 else 1 :]])
