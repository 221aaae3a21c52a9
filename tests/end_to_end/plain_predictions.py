"""Answer rows one at a time by plain transformers, and score answers by the formulas of the metrics' own scripts."""

from __future__ import annotations

import collections
import math
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_rows import Reader, Row
from plain_training import token_types

Answer = dict[str, Any]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@torch.no_grad()
def answer(model: Any, reader: Reader, row: Row, predict: Any) -> Answer:
    """Return what is predicted of a row, as far as plain transformers tells it."""
    task = reader.settings.task
    if task == "classification":
        ids = torch.tensor([reader.framed(reader.prompt(row), reader.data.max_tokens)[0]])
        shares = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).tolist()
        return {"prediction": reader.labels[shares.index(max(shares))], "probabilities": shares}
    if task == "question_answering":
        return best_spans(model, reader, row)
    return {"prediction": generated(model, reader, row, predict)}


def best_spans(model: Any, reader: Reader, row: Row) -> Answer:
    """Return the best spans of a passage, as the script of SQuAD finds them among its windows."""
    options, found, nulls = reader.settings.question_answering, dict[tuple[int, int], float](), []
    for window in reader.windows(row):
        ids = torch.tensor([window.ids])
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **token_types(model, window.types))
        starts, ends = (scores[0].tolist() for scores in (output.start_logits, output.end_logits))
        nulls.append(starts[0] + ends[0])
        for first, (begin, _) in enumerate(window.offsets):
            for last in range(first, min(len(window.offsets), first + options.max_answer_tokens)):
                place = begin, window.offsets[last][1]
                score = starts[window.first + first] + ends[window.first + last]
                found[place] = max(score, found.get(place, -math.inf))
    context = row[reader.column("context")]
    best = sorted(((score, context[begin:end].strip()) for (begin, end), score in found.items()), reverse=True)
    return {
        "null_score": min(nulls),
        "n_best": [{"score": score, "text": text} for score, text in best[: options.n_best]],
        "is_close": len(best) > 1 and abs(best[0][0] - best[1][0]) < 1e-3,
    }


def source_ids(model: Any, reader: Reader, row: Row, predict: Any) -> list[int]:
    if reader.settings.task == "seq2seq":
        return reader.framed(reader.prompt(row), reader.data.max_tokens)[0]
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    positions = next((found for name in names if (found := getattr(model.config, name, None))), math.inf)
    is_cut = reader.data.long_rows != "drop"
    return reader.prompt_ids(row, positions - predict.max_new_tokens if is_cut else math.inf)[0]


def limits(reader: Reader, row: Row, predict: Any) -> tuple[int, float]:
    """Return the most tokens and characters of a row's answer."""
    tokens, characters = predict.max_new_tokens, predict.max_characters or math.inf
    if predict.length_ratio is None:
        return tokens, characters
    if reader.data.prompt == "messages":
        text = [turn["content"] for turn in reader.turns(row) if turn["role"] == "user"][-1]
    else:
        names = re.findall(r"\{(\w+)\}", reader.template(row))
        names = ["input"] if "input" in names or not names else names
        text = " ".join(str(row[reader.named(name, row)]) for name in names)
    if predict.length_ratio_of == "characters":
        return tokens, min(characters, max(1, math.ceil(predict.length_ratio * len(nfc(text)))))
    share = math.ceil(predict.length_ratio * len(reader.bare(nfc(text))))
    return max(1, predict.min_new_tokens, min(tokens, share)), characters


def generated(model: Any, reader: Reader, row: Row, predict: Any) -> str:
    ids, (most, characters) = source_ids(model, reader, row, predict), limits(reader, row, predict)
    is_encoder, own = model.config.is_encoder_decoder, model.generation_config.eos_token_id
    ends = {reader.tokenizer.eos_token_id, *predict.stop_ids, *([own] if isinstance(own, int) else own or [])}
    options = {
        "max_new_tokens": most,
        "do_sample": False,
        "num_beams": predict.num_beams or 1,
        "pad_token_id": reader.tokenizer.pad_token_id,
        "eos_token_id": sorted(ends),
        "min_new_tokens": predict.min_new_tokens or None,
        "repetition_penalty": predict.repetition_penalty and float(predict.repetition_penalty),
        "no_repeat_ngram_size": predict.no_repeat_ngram,
    }
    options = {name: value for name, value in options.items() if value is not None}
    source = torch.tensor([ids])
    made = model.generate(input_ids=source, attention_mask=torch.ones_like(source), **options)[0]
    new = made[1 if is_encoder else len(ids) :].tolist()
    new = new[: next((place for place, token in enumerate(new) if token in ends), len(new))]
    text = nfc(reader.tokenizer.decode(new, skip_special_tokens=True))
    for stop in predict.stop:
        text = text.split(nfc(stop))[0]
    return text if characters == math.inf else text[: int(characters)]


@torch.no_grad()
def log_probabilities(model: Any, reader: Reader, row: Row, predict: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens at each place of an answer."""
    ids = source_ids(model, reader, row, predict)
    if reader.settings.task == "seq2seq":
        before = [model.generation_config.decoder_start_token_id, *tokens[:-1]]
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([before])).logits[0]
    else:
        whole = torch.tensor([[*ids, *tokens[:-1]]])
        logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[
            0, len(ids) - 1 :
        ]
    return torch.as_tensor(logits.float().log_softmax(-1))


def posted(text: str, steps: Sequence[str]) -> str:
    """Return an answer after the steps of `predict.post`."""
    for step in steps:
        if step == "strip":
            text = text.strip()
        elif step == "first_line":
            text = text.split("\n")[0]
        else:
            text = text[: int(step.removeprefix("cut_chars:"))]
    return text


# Scores


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    before = [*range(len(second) + 1)]
    for row, one in enumerate(first, 1):
        now = [row]
        for place, other in enumerate(second, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (one != other)))
        before = now
    return before[-1]


def text_scores(made: Sequence[str], targets: Sequence[str], units: str) -> dict[str, float]:
    import sacrebleu
    from rouge_score import rouge_scorer

    class Units:
        def tokenize(self, text: str) -> list[str]:
            kept = (one if unicodedata.category(one)[0] in "LMN" else " " for one in text.lower())
            words = "".join(kept).split()
            return words if units == "words" else [*"".join(words)]

    pairs = [*zip(made, targets, strict=True)]
    rouge = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Units())
    scored = [(rouge.score(target, text), not target and not text) for text, target in pairs]
    cut = [[" ".join(Units().tokenize(text)) for text in texts] for texts in (made, targets)]
    right, longest = (sum(map(how, pairs)) for how in (_same_places, lambda pair: max(map(len, pair))))
    return {
        "exact_match": sum(text == target for text, target in pairs) / len(pairs),
        "cer": sum(edits(*pair) for pair in pairs) / max(1, sum(map(len, targets))),
        "wer": sum(edits(a.split(), b.split()) for a, b in pairs) / max(1, sum(len(one.split()) for one in targets)),
        "character_accuracy": right / max(1, longest),
        "chrf": sacrebleu.corpus_chrf([*made], [[*targets]]).score / 100,
        "bleu": sacrebleu.corpus_bleu(cut[0], [cut[1]], tokenize="none", force=True).score / 100,
        **{
            f"{name}_f1": sum(1.0 if is_empty else one[name].fmeasure for one, is_empty in scored) / len(scored)
            for name in ("rouge1", "rouge2", "rougeL")
        },
    }


def _same_places(pair: tuple[str, str]) -> int:
    return sum(a == b for a, b in zip(*pair, strict=False))


def label_scores(made: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    found = {}
    for label in sorted({*made, *targets}):
        pairs = [(a == label, b == label) for a, b in zip(made, targets, strict=True)]
        found[label] = 2 * pairs.count((True, True)) / sum(map(sum, pairs))
    hits = sum(a == b for a, b in zip(made, targets, strict=True))
    return {"accuracy": hits / len(made), "macro_f1": sum(found.values()) / len(found)}


def span_scores(made: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the shares that the scripts of SQuAD and of KorQuAD 1.0 print as percents."""

    def of_squad(text: str) -> list[str]:
        text = "".join(one for one in text.lower() if one not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def of_korquad(text: str) -> list[str]:
        text = re.sub("['\"《》<>〈〉()‘’]", " ", text)  # noqa: RUF001
        return "".join(one for one in text.lower() if one not in string.punctuation).split()

    def f1(text: Sequence[str], right: Sequence[str], *, is_squad: bool) -> float:
        same = sum((collections.Counter(text) & collections.Counter(right)).values())
        if is_squad and (not text or not right):
            return float(text == right)
        return 2 * same / (len(text) + len(right)) if same else 0.0

    found = collections.defaultdict(float)
    ways: list[tuple[str, Callable[[str], list[str]]]] = [("squad", of_squad), ("korquad", of_korquad)]
    for text, texts in zip(made, answers, strict=True):
        for name, normal in ways:
            words, right = normal(text), [normal(one) for one in (texts or [""])]
            units = [(words, one) if name == "squad" else ([*"".join(words)], [*"".join(one)]) for one in right]
            found[f"{name}_em"] += max(float(" ".join(words) == " ".join(one)) for one in right) / len(made)
            found[f"{name}_f1"] += max(f1(*pair, is_squad=name == "squad") for pair in units) / len(made)
    return dict(found)
