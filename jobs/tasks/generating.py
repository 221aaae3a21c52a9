"""Answer rows with what an engine generates.

How much is asked for and what is made of it is decided here, for every engine.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...predictions.rows import PREDICTION
from ...recipes.data.chat import question_of, turns_of
from ...recipes.data.prompts import MESSAGES, prompt_columns
from ...recipes.data.rows import Row
from ...recipes.schema import StageSettings
from ...recipes.tasks import task_of
from ..generation import Engine, Generation, Prompt, TokenLogprobs
from ..generation.texts import cut, decode, last_sentences, num_tokens_within

SAMPLES, LOGPROBS = "samples", "logprobs"


class GeneratingAnswerer:
    """Makes prompts of rows, and predictions of what the engine generates."""

    def __init__(self, settings: StageSettings, engine: Engine, tokenizer: Any) -> None:
        self._settings, self._engine, self._tokenizer = settings, engine, tokenizer
        self._task, self._spec = task_of(settings.task), settings.predict
        self._longest = self._task.longest(settings, "predict", engine.config)

    def answer(self, rows: Sequence[tuple[int, Row]]) -> list[dict[str, Any]]:
        """Return the predictions of rows, in their order, in Unicode NFC.

        The rows come as (position in the file, row) pairs.
        """
        asked = [row for _, row in rows]
        found = self._task.encode(self._settings, "predict", asked, self._tokenizer, self._longest)
        limits = self._limits(asked, [len(one.ids) for one in found])
        prompts = [
            Prompt(ids=one.ids, row=position, max_new_tokens=tokens, max_characters=characters, sample=sample)
            for one, (position, _), (tokens, characters) in zip(found, rows, limits, strict=True)
            for sample in range(self._spec.samples)
        ]
        made = self._in_chunks(prompts) if self._spec.is_chunked else self._engine.generate(prompts)
        count = self._spec.samples
        return [
            self._fields(prompts[first : first + count], made[first : first + count])
            for first in range(0, len(prompts), count)
        ]

    def _fields(self, prompts: Sequence[Prompt], made: Sequence[Generation]) -> dict[str, Any]:
        texts = [self._text(prompt, one) for prompt, one in zip(prompts, made, strict=True)]
        fields: dict[str, Any] = {PREDICTION: texts[0]}
        if len(texts) > 1:
            fields[SAMPLES] = texts
        if (kept := made[0].logprobs) is not None:
            ids = made[0].ids
            count = num_tokens_within(self._tokenizer, ids, len(texts[0])) if self._is_cut(prompts[0]) else len(ids)
            fields[LOGPROBS] = {
                "tokens": ids[:count],
                "chosen": list(kept.chosen[:count]),
                "top": [[list(pair) for pair in top] for top in kept.top[:count]],
            }
        return fields

    def _is_cut(self, prompt: Prompt) -> bool:
        return bool(self._spec.stop) or prompt.max_characters is not None

    def _text(self, prompt: Prompt, made: Generation) -> str:
        return cut(decode(self._tokenizer, made.ids), self._spec.stop, prompt.max_characters)

    def _limits(self, rows: Sequence[Row], prompts: Sequence[int]) -> list[tuple[int, int | None]]:
        """Return the most tokens and characters of each row's answer.

        None stands for any number of characters.
        """
        spec = self._spec
        if spec.length_ratio is None:
            return [(spec.max_new_tokens, spec.max_characters)] * len(rows)
        texts = [self._input(row) for row in rows]
        if spec.length_ratio_of == "characters":
            found = [math.ceil(spec.length_ratio * len(text)) for text in texts]
            return [(spec.max_new_tokens, max(1, min(most, spec.max_characters or most))) for most in found]
        counts = [len(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
        least = max(1, spec.min_new_tokens)
        return [
            (max(least, min(spec.max_new_tokens, math.ceil(spec.length_ratio * count))), spec.max_characters)
            for count in counts
        ]

    def _input(self, row: Row) -> str:
        """Return what the length of an answer is a share of, in Unicode NFC."""
        data = self._settings.data
        if data.prompt == MESSAGES:
            said = [question_of(turns_of(row[data.columns.messages]))[-1]["content"]]
        else:
            read = [column for _, column in prompt_columns(data)]
            said = [str(row[column]) for column in ([data.columns.input] if data.columns.input in read else read)]
        return unicodedata.normalize("NFC", " ".join(said))

    def _in_chunks(self, prompts: Sequence[Prompt]) -> list[Generation]:
        """Return long answers, each generated a chunk after another.

        A chunk continues the prompt and the last sentences, which are the tokens as they were generated: joining the
        chunks doubles nothing.
        """
        size, found = self._spec.chunk_tokens or 0, [Generation(ids=[], ended="length")] * len(prompts)
        waiting = list(range(len(prompts)))
        while waiting:
            chunks = [self._chunk(prompts[place], found[place].ids, size) for place in waiting]
            for place, one in zip(waiting, self._engine.generate(chunks), strict=True):
                found[place] = _joined(found[place], one)
            waiting = [place for place in waiting if self._goes_on(prompts[place], found[place])]
        return found

    def _chunk(self, prompt: Prompt, ids: list[int], size: int) -> Prompt:
        text = decode(self._tokenizer, ids)
        start = last_sentences(text, self._spec.chunk_sentences)
        begin = num_tokens_within(self._tokenizer, ids, start) if start else 0
        carried = ids[max(begin, len(ids) - size) :]
        most = min(size, prompt.max_new_tokens - len(ids))
        return replace(prompt, ids=[*prompt.ids, *carried], first=len(ids), max_new_tokens=most, max_characters=None)

    def _goes_on(self, prompt: Prompt, made: Generation) -> bool:
        if made.ended == "stop" or len(made.ids) >= prompt.max_new_tokens:
            return False
        text = decode(self._tokenizer, made.ids)  # a stop text may lie across two chunks
        return cut(text, self._spec.stop, prompt.max_characters) == text


def _joined(before: Generation, after: Generation) -> Generation:
    logprobs = after.logprobs
    if before.logprobs is not None and logprobs is not None:
        logprobs = TokenLogprobs(
            chosen=[*before.logprobs.chosen, *logprobs.chosen], top=[*before.logprobs.top, *logprobs.top]
        )
    return Generation(ids=[*before.ids, *after.ids], ended=after.ended, logprobs=logprobs)
