"""A stand-in for vLLM 0.33 on a CPU: the names and refusals of what `vllm_engine` uses, and none of its speed.

It takes the arguments that vLLM has, refuses those that vLLM refuses, and answers by transformers' model, row by row.
"""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .v1.engine.exceptions import EngineDeadError

__version__ = "0.33.0+cpu"


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        refused = {
            "temperature must be in [0, 2]": not 0 <= self.temperature <= 2,
            "top_p must be in (0, 1]": not 0 < self.top_p <= 1,
            "top_k must be an integer": type(self.top_k) is not int or self.top_k < -1,
            "max_tokens must be at least 1": self.max_tokens is not None and self.max_tokens < 1,
            "min_tokens must be less than or equal to max_tokens": self.min_tokens > (self.max_tokens or math.inf),
            "stop strings need detokenize": bool(self.stop) and not self.detokenize,
            "stop cannot contain an empty string": "" in (self.stop or []),
            "stop_token_ids must contain only integers": any(type(one) is not int for one in self.stop_token_ids or []),
            "n must be 1 when using greedy sampling": self.temperature == 0 and self.n > 1,
            "seed is sent as 64 bits": self.seed is not None and not -(2**63) <= self.seed < 2**63,
        }
        for problem, is_so in refused.items():
            if is_so:
                raise ValueError(problem)


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass(kw_only=True)
class _EngineArgs:
    """What `LLM` passes on; another name is a TypeError, as it is there."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_logprobs: int = 20
    enable_prefix_caching: bool | None = None
    generation_config: str = "auto"


class LLM:
    """The last one is `LLM.last`. It dies of the request whose number is in the file STAND_IN_VLLM_DIES_AT."""

    last: LLM

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        hf_overrides: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.given = {"tensor_parallel_size": tensor_parallel_size, "seed": seed, **kwargs}
        self._args = _EngineArgs(**kwargs)
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization must be in (0, 1]")
        config = AutoConfig.from_pretrained(model, **(hf_overrides or {}))
        self._model = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=getattr(torch, dtype)).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        most, positions = self._args.max_model_len, self._model.config.max_position_embeddings
        if most is not None and most > positions:
            raise ValueError(f"User-specified max_model_len ({most}) is greater than the derived one ({positions})")
        self._most = positions if most in (None, -1) else most
        self._count = 0
        LLM.last = self

    def generate(
        self,
        prompts: list[dict[str, list[int]]],
        sampling_params: list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        assert sampling_params is not None and len(sampling_params) == len(prompts)
        return [self._answer(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _answer(self, prompt: dict[str, list[int]], params: SamplingParams) -> RequestOutput:
        dies_at = Path(os.environ.get("STAND_IN_VLLM_DIES_AT", "/nowhere"))
        if dies_at.exists() and self._count == int(dies_at.read_text()):
            raise EngineDeadError(f"EngineCore was ended by signal {int(signal.SIGKILL)} of {os.getpid()}")
        self._count += 1
        (ids,) = prompt.values()
        if len(ids) + 1 > self._most:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        with torch.no_grad():
            made, logprobs, reason = self._continue(list(ids), params)
        finish = "length" if reason is None else "stop"
        kept = logprobs if params.logprobs is not None else None
        output = CompletionOutput(0, "", made, None, kept, finish, None if reason == "" else reason)
        return RequestOutput(str(self._count), ids, [output])

    def _continue(self, ids: list[int], params: SamplingParams) -> tuple[list[int], Any, int | str | None]:
        made: list[int] = []
        logprobs = []
        noise = torch.Generator().manual_seed(params.seed or 0)
        eos, stops = self._tokenizer.eos_token_id, params.stop_token_ids or []
        for step in range(min(params.max_tokens or self._most, self._most - len(ids))):
            raw = self._model(torch.tensor([ids + made])).logits[0, -1].float()
            scores = raw.clone()
            seen = torch.tensor(sorted({*ids, *made}))
            values = scores[seen]
            scores[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
            if step < params.min_tokens:
                scores[[eos, *stops]] = -torch.inf
            token = int(scores.argmax()) if params.temperature == 0 else self._draw(scores, params, noise)
            made.append(token)
            top = raw.log_softmax(-1).topk(params.logprobs or 1)
            chosen = {token: Logprob(float(raw.log_softmax(-1)[token]))}
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            logprobs.append(chosen | {one: Logprob(value, rank + 1) for rank, (one, value) in enumerate(pairs)})
            if token == eos:
                return made, logprobs, ""
            if token in stops:
                return made, logprobs, token
            text = self._tokenizer.decode(made, skip_special_tokens=True) if params.detokenize else ""
            for stop in params.stop or []:
                if stop in text:
                    return made, logprobs, stop
        return made, logprobs, None

    def _draw(self, scores: torch.Tensor, params: SamplingParams, noise: torch.Generator) -> int:
        scores = scores / params.temperature
        if params.top_k > 0:
            scores[scores < scores.topk(params.top_k).values[-1]] = -torch.inf
        return int(torch.multinomial(scores.softmax(-1), 1, generator=noise))
