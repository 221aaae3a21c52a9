"""Generate with transformers' `generate`.

A text depends on its own row alone: batches only share the time. Drawn tokens come from
a noise that is seeded by row, so another batch or world size draws the same.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ...recipes.data.encode import pad_id
from ...recipes.schema import Predict, StageSettings
from . import Generation, Prompt


def load(
    settings: StageSettings, model_dir: Path, tokenizer: Any, *, model_class: str, device: str, dtype: str, **_: Any
) -> TransformersEngine:
    """Return the engine with the model of *model_dir*.

    The model is loaded as *model_class* of transformers.
    """
    return TransformersEngine(settings, load_model(settings, model_dir, model_class, device, dtype), tokenizer)


def load_model(settings: StageSettings, model_dir: Path, model_class: str, device: str, dtype: str) -> Any:
    """Return the model of *model_dir* on *device*, ready to answer."""
    spec = settings.model
    options: dict[str, Any] = {"attn_implementation": spec.attention} if spec.attention else {}
    model = getattr(transformers, model_class).from_pretrained(
        model_dir, dtype=getattr(torch, dtype), trust_remote_code=spec.trust_remote_code, **options
    )
    return model.to(device).eval()


class TransformersEngine:
    """A model of transformers that continues prompts, or answers them."""

    def __init__(self, settings: StageSettings, model: Any, tokenizer: Any) -> None:
        self._settings, self._model, self._tokenizer = settings, model, tokenizer
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._pad = pad_id(tokenizer)
        self._generation = _generation_config(settings.predict, model, tokenizer, self._pad)
        ends = self._generation.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""
        return dict(self._model.config.to_dict())

    def with_settings(self, settings: StageSettings) -> TransformersEngine:
        """Return the same model with other settings of `predict`."""
        return TransformersEngine(settings, self._model, self._tokenizer)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return what follows each prompt; those of like length share a batch."""
        by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids))
        found: dict[int, Generation] = {}
        size = self._settings.predict.batch_rows
        for first in range(0, len(prompts), size):
            places = by_length[first : first + size]
            made = self._generate([prompts[place] for place in places])
            found.update(zip(places, made, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _generate(self, prompts: list[Prompt]) -> list[Generation]:
        """Continue one batch.

        A batch that is too large for the device is continued in halves.
        """
        try:
            return self._generate_batch(prompts)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._generate(prompts[:half]) + self._generate(prompts[half:])

    @torch.no_grad()  # not inference_mode: what a model keeps from it could not be used by a training that goes on
    def _generate_batch(self, prompts: list[Prompt]) -> list[Generation]:
        # padding inside a prompt is attended to, that beside it is not; an encoder counts positions from the left
        side = "right" if self._is_encoder_decoder else "left"
        ids = _padded([prompt.ids for prompt in prompts], self._pad, side)
        mask = _padded([[1] * len(prompt.ids) for prompt in prompts], 0, side)
        device, predict = self._model.device, self._settings.predict
        positions = [prompt.row for prompt in prompts]
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self._generation,
            logits_processor=_sampling(predict, self._settings.seed, positions) if predict.sample else None,
        )
        num_read = 1 if self._is_encoder_decoder else ids.shape[1]  # a decoder reads its start token
        found = zip(prompts, output[:, num_read:].tolist(), strict=True)
        return [self._ended(row[: prompt.max_new_tokens]) for prompt, row in found]

    def _ended(self, ids: list[int]) -> Generation:
        """Return the answer in *ids*: what comes before the first end token."""
        for place, token in enumerate(ids):
            if token in self._ends:
                return Generation(ids=ids[:place], ended="stop")
        return Generation(ids=ids, ended="length")


def _padded(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _generation_config(spec: Predict, model: Any, tokenizer: Any, pad: int) -> GenerationConfig:
    """Return how tokens are chosen.

    An encoder-decoder's own settings stay where the recipe is silent: the tokens that it must begin and end with, its
    beams, its n-grams. Lengths and drawing are the recipe's alone.
    """
    own = model.generation_config if model.generation_config is not None else GenerationConfig()
    base = own if model.config.is_encoder_decoder else GenerationConfig()
    found = copy.deepcopy(base)
    found.update(
        max_length=None,
        min_length=None,
        max_new_tokens=spec.max_new_tokens,
        min_new_tokens=spec.min_new_tokens or None,
        do_sample=False,  # drawing is done by noise on the logits, see _sampling
        **dict.fromkeys(("temperature", "top_k", "top_p")),
        num_beams=spec.num_beams or (not spec.sample and base.num_beams) or 1,
        repetition_penalty=spec.repetition_penalty or base.repetition_penalty or 1.0,
        no_repeat_ngram_size=base.no_repeat_ngram_size or 0 if spec.no_repeat_ngram is None else spec.no_repeat_ngram,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=pad,
    )
    return found


def _sampling(spec: Predict, seed: int, positions: Sequence[int]) -> LogitsProcessorList:
    """Return processors that turn the likeliest token into a random draw.

    The draw is from the distribution. Adding Gumbel noise to log-probabilities and taking the maximum samples from them
    (Gumbel 1954; the "Gumbel-max trick").
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
    """Noise from one generator per row: the same in every batch."""

    def __init__(self, seed: int, positions: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed * 1_000_003 + position) for position in positions]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores of shape (rows, vocabulary) with noise added."""
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=generator) for generator in self._generators])
        noise = -torch.log(-torch.log(uniform.clamp_min(1e-20)))
        return scores + noise.to(scores)  # type: ignore[return-value]
