"""Take part in each step of transformers' `generate`.

It asks which token comes next, whether a row ends, and what is kept of the step.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ...recipes.schema import StageSettings
from . import Generation, Prompt, TokenLogprobs
from .drawing import draw, uniforms
from .texts import cut, decode

_NEVER = 2**31 - 1
_LOOK_EVERY = 4  # steps between two looks at the texts, which wait for the device and decode
_DIGITS = 5  # of a log-probability


class Choice(LogitsProcessor):
    """Keeps rows from ending too soon, and draws where the recipe says so.

    The last token of a row is one of *forced*, where there are any: by itself `generate` would force that of the row
    with the most tokens alone. It notes the first step at which a row's scores are no numbers. `first_bad` has that
    step for each prompt, beyond every step where there is none. It is looked at after the last one: the host would wait
    for the device at each.
    """

    def __init__(
        self,
        settings: StageSettings,
        prompts: Sequence[Prompt],
        num_read: int,
        ends: Sequence[int],
        device: Any,
        forced: Sequence[int] = (),
    ) -> None:
        spec = settings.predict
        self._spec, self._num_read, self._uniforms = spec, num_read, None
        least = [max(0, spec.min_new_tokens - prompt.first) for prompt in prompts]
        self._most_least, self._least = max(least), torch.tensor(least, device=device)
        self._ends = torch.tensor(ends, dtype=torch.long, device=device)
        self._forced = torch.tensor(forced, dtype=torch.long, device=device)
        self._most = torch.tensor([prompt.max_new_tokens for prompt in prompts], device=device)
        self.first_bad = torch.full((len(prompts),), _NEVER, device=device)
        if spec.sample:
            streams = [(prompt.row, prompt.sample, prompt.first) for prompt in prompts]
            self._uniforms = uniforms(settings.seed, streams, max(one.max_new_tokens for one in prompts)).to(device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores of shape (rows, vocabulary).

        That of a drawn token is the largest.
        """
        step, beams = input_ids.shape[-1] - self._num_read, len(scores) // len(self.first_bad)
        best = scores.amax(-1).view(len(self.first_bad), -1)  # of each beam; NaN where any score is
        is_bad = ~best.isfinite().all(-1)
        self.first_bad = torch.where(is_bad, self.first_bad.clamp_max(step), self.first_bad)
        if step < self._most_least:
            is_early = (step < self._least).repeat_interleave(beams)[:, None]
            scores[:, self._ends] = scores[:, self._ends].masked_fill(is_early, -torch.inf)
        if len(self._forced):
            is_last = (self._most == step + 1).repeat_interleave(beams)[:, None]
            others = torch.full_like(scores[:1], -torch.inf).index_fill(1, self._forced, 0.0)
            scores = torch.where(is_last, others, scores)  # type: ignore[assignment]
        if self._uniforms is not None:
            spec = self._spec
            tokens = draw(
                scores, self._uniforms[:, step], temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p
            )
            scores.scatter_(-1, tokens[:, None], torch.inf)
        return scores


class Unpadded(LogitsProcessor):
    """Lets a processor of transformers see no padding before a row.

    It would count padding as said, so that an answer would depend on the rows beside it. *filler* stands in its place,
    or, where that is None, the first token of the row.
    """

    def __init__(self, inner: LogitsProcessor, is_padding: torch.Tensor, filler: int | None) -> None:
        self._inner, self._is_padding, self._filler = inner, is_padding, filler

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores of shape (rows, vocabulary)."""
        is_padding = self._is_padding.repeat_interleave(len(input_ids) // len(self._is_padding), dim=0)
        num_read = is_padding.shape[1]
        first = input_ids.gather(1, is_padding.long().sum(1, keepdim=True))
        others = first if self._filler is None else torch.full_like(first, self._filler)
        prompts = torch.where(is_padding, others, input_ids[:, :num_read])
        ids: Any = torch.cat((prompts, input_ids[:, num_read:]), dim=1)
        return self._inner(ids, scores)  # type: ignore[no-any-return]


class Limits(StoppingCriteria):
    """Ends a row, or a beam of it, at its own limits.

    They are its most tokens, a stop text, and its most characters.
    """

    eos_token_id = None  # this name has `generate` fill rows that have ended with padding

    def __init__(
        self, stops: Sequence[str], prompts: Sequence[Prompt], num_read: int, tokenizer: Any, device: Any
    ) -> None:
        self._stops, self._prompts, self._num_read, self._tokenizer = stops, prompts, num_read, tokenizer
        self._most = torch.tensor([prompt.max_new_tokens for prompt in prompts], device=device)
        # Each token has a byte of a stop text, or is the one before or after it; some have no text at all.
        self._window = 8 + _LOOK_EVERY + max((len(stop.encode()) for stop in stops), default=0)
        self._reads = bool(stops) or any(prompt.max_characters is not None for prompt in prompts)
        self._ended: set[int] = set()

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Return which of the rows, of shape (rows x beams), end here."""
        step, beams = input_ids.shape[-1] - self._num_read, len(input_ids) // len(self._prompts)
        is_done = step >= self._most.repeat_interleave(beams)
        if self._reads and step % _LOOK_EVERY == 0:
            answers = input_ids[:, self._num_read :].tolist()
            reached = [self._is_reached(number, ids, beams) for number, ids in enumerate(answers)]
            is_done = is_done | torch.tensor(reached, device=is_done.device)
        return is_done  # type: ignore[return-value]

    def _is_reached(self, number: int, ids: list[int], beams: int) -> bool:
        if number in self._ended:
            return False
        most = self._prompts[number // beams].max_characters
        end = decode(self._tokenizer, ids[-self._window :]) if self._stops else ""
        if most is None and not any(unicodedata.normalize("NFC", stop) in end for stop in self._stops):
            return False
        text = decode(self._tokenizer, ids).rstrip("\ufffd")  # the first bytes of a character
        is_reached = cut(text, self._stops, most) != text
        if is_reached and beams == 1:  # a beam is another one at the next step
            self._ended.add(number)
        return is_reached


class Record(StoppingCriteria):
    """Keeps the log-probabilities of each step.

    They are those of the chosen token and of the *count* likeliest ones, and come from the model's own outputs, which
    nothing has changed yet.
    """

    def __init__(self, model: Any, count: int) -> None:
        self._count, self._logits = count, torch.empty(0)
        self._chosen, self._values, self._ids = list[Any](), list[Any](), list[Any]()
        self._hook = model.register_forward_hook(self._keep)

    def _keep(self, model: Any, inputs: Any, output: Any) -> None:
        self._logits = output.logits[:, -1].float()

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Keep the step's numbers; no row ends by them."""
        total = self._logits.logsumexp(-1, keepdim=True)
        top = self._logits.topk(min(self._count, self._logits.shape[-1]))
        self._chosen.append((self._logits.gather(-1, input_ids[:, -1:]) - total).squeeze(-1))
        self._values.append(top.values - total)
        self._ids.append(top.indices)
        self._logits = torch.empty(0)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def close(self) -> None:
        """Stop listening to the model."""
        self._hook.remove()

    def add_to(self, answers: Sequence[Generation]) -> list[Generation]:
        """Return *answers* with the numbers of their tokens."""
        chosen, values, ids = (torch.stack(kept, 1).tolist() for kept in (self._chosen, self._values, self._ids))
        return [
            replace(answer, logprobs=_logprobs(len(answer.ids), chosen[row], values[row], ids[row]))
            for row, answer in enumerate(answers)
        ]


def _logprobs(count: int, chosen: list[float], values: list[list[float]], ids: list[list[int]]) -> TokenLogprobs:
    top = [
        [(token, round(value, _DIGITS)) for token, value in zip(*pair, strict=True)]
        for pair in zip(ids[:count], values[:count], strict=True)
    ]
    return TokenLogprobs(chosen=[round(value, _DIGITS) for value in chosen[:count]], top=top)
