"""Generate with vLLM, which gives each row memory as it grows.

vLLM starts processes of its own below this one: a scheduler, and a worker for each device of the task.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import RunError
from ...files import digest_of
from ...recipes.schema import StageSettings
from . import Generation, LoadRequest, Prompt, TokenLogprobs, not_finite
from .texts import end_ids

_DIGITS = 5  # of a log-probability
_AS_LONG_AS_FITS = -1  # vLLM's word for it, since 0.14
# Workers that are forked would share the job's CUDA; and nothing is reported to vLLM's makers.
_ENVIRONMENT = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}


def load(request: LoadRequest) -> VllmEngine:
    """Return the engine with the model of the request.

    Each layer is cut into a part for each device.

    Raises:
        RunError: vLLM cannot load the model, or has no memory for it.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    settings, predict = request.settings, request.settings.predict
    try:
        model = vllm.LLM(
            model=str(request.model_dir),
            tokenizer=str(request.tokenizer.name_or_path),  # it finds the texts at which an answer ends
            trust_remote_code=settings.model.trust_remote_code,
            hf_overrides=dict(settings.model.config),
            dtype=request.dtype,
            seed=settings.seed,
            tensor_parallel_size=request.num_devices,
            gpu_memory_utilization=predict.vllm.memory_share,
            max_model_len=predict.vllm.max_tokens or _AS_LONG_AS_FITS,
            max_num_seqs=predict.batch_rows,
            max_num_batched_tokens=max(predict.batch_tokens, predict.batch_rows),
            max_logprobs=-1,  # as many as a decoding asks for
            enable_prefix_caching=predict.vllm.prefix_caching,
            generation_config="vllm",  # the recipe alone says how tokens are chosen
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"vLLM cannot load the model: {_first_line(error)}; the log above has the cause. With too little memory "
            "lower predict.vllm.max_tokens, or give predict more devices"
        ) from error
    return VllmEngine(settings, model, request.model_dir, request.tokenizer)


class VllmEngine:
    """A model of vLLM that continues prompts."""

    def __init__(self, settings: StageSettings, model: Any, model_dir: Path, tokenizer: Any) -> None:
        self._settings, self._model, self._model_dir, self._tokenizer = settings, model, model_dir, tokenizer
        self._ends = (*_end_ids(model_dir, tokenizer), *settings.predict.stop_ids)

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""
        found: dict[str, Any] = json.loads((self._model_dir / "config.json").read_text())
        return found

    def with_settings(self, settings: StageSettings) -> VllmEngine:
        """Return the same model with other settings of `predict`."""
        return VllmEngine(settings, self._model, self._model_dir, self._tokenizer)

    def generate(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return what follows each prompt; vLLM chooses which rows share a step.

        Raises:
            RunError: one of vLLM's processes has ended, or a prompt is too long for it.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if not prompts:
            return []
        try:
            made = self._model.generate(
                [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts],
                sampling_params=[self._sampling(prompt) for prompt in prompts],
                use_tqdm=False,
            )
        except EngineDeadError as error:
            raise RunError(f"a process of vLLM has ended while it generated: {_first_line(error)}") from error
        except ValueError as error:  # of a prompt that is longer than what fits into the memory
            raise RunError(f"vLLM refuses a prompt: {_first_line(error)}; see predict.vllm.max_tokens") from error
        return [self._generation(prompt, one.outputs[0]) for prompt, one in zip(prompts, made, strict=True)]

    def _sampling(self, prompt: Prompt) -> Any:
        from vllm import SamplingParams

        spec = self._settings.predict
        drawing = {"temperature": 0.0}
        if spec.sample:
            stream = [self._settings.seed, prompt.row, prompt.sample, prompt.first]
            seed = int(digest_of(stream)[:15], 16)
            drawing = {"temperature": spec.temperature, "top_k": spec.top_k, "top_p": spec.top_p, "seed": seed}
        return SamplingParams(
            max_tokens=prompt.max_new_tokens,
            min_tokens=min(max(0, spec.min_new_tokens - prompt.first), prompt.max_new_tokens),
            repetition_penalty=spec.repetition_penalty or 1.0,
            stop=list(spec.stop),
            stop_token_ids=list(self._ends),
            detokenize=bool(spec.stop),
            logprobs=spec.keep_logprobs or None,
            **drawing,
        )

    def _generation(self, prompt: Prompt, made: Any) -> Generation:
        ids = list(made.token_ids)
        if ids and ids[-1] in self._ends:
            del ids[-1]
        kept = _logprobs(prompt, ids, made.logprobs, self._settings.predict.keep_logprobs) if made.logprobs else None
        return Generation(ids=ids, ended="stop" if made.finish_reason == "stop" else "length", logprobs=kept)


def _logprobs(prompt: Prompt, ids: Sequence[int], steps: Sequence[Mapping[int, Any]], count: int) -> TokenLogprobs:
    """Return the numbers of an answer's tokens; vLLM has the chosen one among them."""
    values = [{token: one.logprob for token, one in step.items()} for step in steps[: len(ids)]]
    bad = next((number for number, token in enumerate(ids) if not math.isfinite(values[number][token])), None)
    if bad is not None:
        raise not_finite(prompt.row, f"for token {prompt.first + bad} of the answer")
    ranked = [sorted(step.items(), key=lambda pair: -pair[1])[:count] for step in values]
    return TokenLogprobs(
        chosen=[round(step[token], _DIGITS) for step, token in zip(values, ids, strict=True)],
        top=[[(token, round(value, _DIGITS)) for token, value in step] for step in ranked],
    )


def _end_ids(model_dir: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that end an answer: the model's and its tokenizer's."""
    path = model_dir / "generation_config.json"
    return end_ids(json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None, tokenizer)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
