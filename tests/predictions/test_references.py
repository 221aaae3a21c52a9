"""Scores are those of the implementations that papers use, wherever both count the same."""

from __future__ import annotations

import random
from types import SimpleNamespace

import jiwer
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from sousbatch.predictions.metrics.tokenizers import TOKENIZERS, Tokenizer
from sousbatch.predictions.scoring import score_texts

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
WORDS = "방이 깨끗하고 좋아요 바다 전망 최고 조식 the quick fox, over. 2 lazy-dogs हिन्दी".split()


def _pairs() -> tuple[list[str], list[str]]:
    draw = random.Random(3)
    targets = ["\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(3)) for _ in range(60)]
    texts = ["".join(one if draw.random() > 0.15 else draw.choice(" 가나\n") for one in target) for target in targets]
    return [text or "가" for text in texts], targets


TEXTS, TARGETS = _pairs()


@pytest.mark.parametrize(
    "tokenizer",
    ["words", "characters", pytest.param("morphemes", marks=pytest.mark.matrix)],  # Kiwi starts in 5 s
)
def test_rouge_is_that_of_rouge_score_on_the_same_tokens(tokenizer: Tokenizer) -> None:
    num_rows = 60 if tokenizer == "words" else 12
    texts, targets = TEXTS[:num_rows], TARGETS[:num_rows]
    found = score_texts(texts, targets, metrics=KINDS, tokenizer=tokenizer)
    peer = RougeScorer(list(KINDS), tokenizer=SimpleNamespace(tokenize=TOKENIZERS[tokenizer]))
    rows = [peer.score(target, text) for text, target in zip(texts, targets, strict=True)]
    for kind in KINDS:
        for part, field in (("precision", "precision"), ("recall", "recall"), ("f1", "fmeasure")):
            mean = sum(getattr(row[kind], field) for row in rows) / num_rows
            assert found[f"{kind}_{part}"] == pytest.approx(mean, abs=1e-9), (kind, part)


def test_error_rates_are_those_of_jiwer() -> None:
    texts = [" ".join(text.split()) for text in TEXTS]
    targets = [" ".join(target.split()) for target in TARGETS]
    found = score_texts(texts, targets, metrics=["wer", "cer"])
    assert found["wer"] == pytest.approx(jiwer.wer(targets, texts), abs=1e-9)
    assert found["cer"] == pytest.approx(jiwer.cer(targets, texts), abs=1e-9)


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    found = score_texts(TEXTS, TARGETS, metrics=["bleu", "chrf"])
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(TEXTS, [TARGETS]).score / 100, abs=1e-9)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(TEXTS, [TARGETS]).score / 100, abs=1e-9)
    by_character = BLEU(tokenize="char").corpus_score(TEXTS, [TARGETS]).score / 100
    characters = score_texts(TEXTS, TARGETS, metrics=["bleu"], tokenizer="characters")
    assert characters["bleu"] == pytest.approx(by_character, abs=1e-9)
    texts, targets = ["one two three five", "six"], ["one two three four", "six seven"]  # no four words are right
    (found,) = score_texts(texts, targets, metrics=["bleu"]).values()
    assert found == pytest.approx(BLEU().corpus_score(texts, [targets]).score / 100, abs=1e-9) != 0
