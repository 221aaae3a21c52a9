"""Answer rows with a causal language model, through transformers' `generate`.

A row's answer depends on the row alone: batches only share the time. Drawn tokens come from
a noise that is seeded by row, so another batch or world size draws the same.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ...recipes.data.encode import encode_prompts, pad_id, positions_of
from ...recipes.data.rows import Row
from ...recipes.schema import Predict, StageSettings
from ..training.model import load_tokenizer

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Decoder:
    """A loaded model that answers rows."""

    def __init__(
        self, settings: StageSettings, model_dir: Path, tokenizer_dir: Path, *, device: str, dtype: str
    ) -> None:
        self._settings = settings
        self._tokenizer = load_tokenizer(settings, tokenizer_dir)
        options: dict[str, Any] = {"attn_implementation": settings.model.attention} if settings.model.attention else {}
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=_DTYPES[dtype], trust_remote_code=settings.model.trust_remote_code, **options
        )
        self._model = model.to(device).eval()
        self._pad = pad_id(self._tokenizer)
        positions = positions_of(model.config.to_dict())
        self._limit = None if positions is None else max(1, positions - settings.predict.max_new_tokens)
        self._config = _generation_config(settings.predict, model, self._tokenizer, self._pad)

    def answer(self, rows: Sequence[tuple[int, Row]]) -> list[str]:
        """Return the answers of (input position, row) pairs, in their order, in Unicode NFC."""
        found = encode_prompts(self._settings.data, [row for _, row in rows], self._tokenizer, self._limit)
        prompts = [prompt.ids for prompt in found]
        by_length = sorted(range(len(rows)), key=lambda place: len(prompts[place]))
        answers = [""] * len(rows)
        size = self._settings.predict.batch_rows
        for first in range(0, len(rows), size):
            places = by_length[first : first + size]
            texts = self._generate([prompts[place] for place in places], [rows[place][0] for place in places])
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _generate(self, prompts: list[list[int]], positions: list[int]) -> list[str]:
        """Answer one batch; one that is too large for the device is answered in halves."""
        try:
            return self._generate_batch(prompts, positions)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._generate(prompts[:half], positions[:half]) + self._generate(prompts[half:], positions[half:])

    @torch.inference_mode()
    def _generate_batch(self, prompts: list[list[int]], positions: list[int]) -> list[str]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        # filler inside a prompt is attended to, that on its left is not
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self._model.device
        processors = (
            _sampling(self._settings.predict, self._settings.seed, positions) if self._settings.predict.sample else None
        )
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._config,
            logits_processor=processors,
        )
        texts = self._tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return [unicodedata.normalize("NFC", text) for text in texts]


def _generation_config(spec: Predict, model: Any, tokenizer: Any, pad: int) -> GenerationConfig:
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    return GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        min_new_tokens=spec.min_new_tokens or None,
        do_sample=False,  # drawing is done by noise on the logits, see _sampling
        num_beams=spec.num_beams,
        repetition_penalty=spec.repetition_penalty,
        no_repeat_ngram_size=spec.no_repeat_ngram,
        eos_token_id=end if end is not None else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad,
    )


def _sampling(spec: Predict, seed: int, positions: Sequence[int]) -> LogitsProcessorList:
    """Return processors after which the likeliest token is a draw from the distribution.

    Adding Gumbel noise to log-probabilities and taking the maximum samples from them (Gumbel
    1954; the "Gumbel-max trick").
    """
    processors = LogitsProcessorList()
    if spec.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(spec.temperature))
    if spec.top_k:
        processors.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1.0:
        processors.append(TopPLogitsWarper(spec.top_p))
    processors.append(_GumbelNoise(seed, positions))
    return processors


class _GumbelNoise(LogitsProcessor):
    """Noise from one generator per row: the same whatever rows share the batch."""

    def __init__(self, seed: int, positions: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + position) for position in positions]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores of shape (rows, vocabulary) with noise added."""
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=generator) for generator in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(1e-20)))
        return scores + noise.to(scores)  # type: ignore[return-value]
