"""Read rows and make examples of them as docs/data.md and docs/tasks.md say, by no code of sousbatch."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Row = dict[str, Any]
# ids and what is learned: the labels of each token, those of the target, a label, or the ends of a span.
Example = tuple[Any, ...]
_ALPACA = """Below is an instruction that describes a task{paired}. \
Write a response that appropriately completes the request.

### Instruction:
{{input}}

{context}### Response:
"""
_PAIRED = ", paired with an input that provides further context"
_IS_SYMBOL = re.compile(r"[\U0001F000-\U0001FAFF\u2190-\u21FF\u2460-\u27BF\u2B00-\u2BFF\u200d\ufe0f]")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a passage behind its question."""

    ids: list[int]
    types: list[int]
    span: tuple[int, int]  # of the answer, as places among the ids
    offsets: list[tuple[int, int]]  # of the passage's tokens in its text
    first: int  # place of the first of these


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What makes examples of rows: the settings of a stage, its tokenizer, its labels."""

    settings: Any
    tokenizer: Any
    labels: Sequence[str] = ()

    @property
    def data(self) -> Any:
        return self.settings.data

    def column(self, name: str) -> str:
        return str(getattr(self.data.columns, name))

    # Rows

    def rows(self, split: str, *, is_filtered: bool = True) -> list[Row]:
        """Return the rows of a split, cleaned; those to predict are not filtered."""
        lines = Path(self.data.splits[split]).read_text().splitlines()
        rows, seen = [self.cleaned(json.loads(line)) for line in lines], set()
        if not is_filtered:
            return rows
        for step in self.data.clean:
            name, _, number = step.partition(":")
            texts = [[str(row[column]) for column in self.read_columns(row)] for row in rows]
            if name == "drop_empty":
                kept = [all(text.strip() for text in some) for some in texts]
            elif name == "drop_duplicates":
                keys = [tuple(some) for some in texts]
                kept = [key not in seen and not seen.add(key) for key in keys]  # type: ignore[func-returns-value]
            elif name == "min_chars":
                kept = [sum(map(len, some)) >= int(number) for some in texts]
            else:
                continue
            rows = [row for row, is_kept in zip(rows, kept, strict=True) if is_kept]
        return rows

    def read_columns(self, row: Row) -> list[str]:
        """Return the columns of texts that the task reads."""
        if self.settings.task == "causal_lm" and self.data.prompt in ("", "messages"):
            names = ["text" if self.data.prompt == "" else "messages"]
        elif self.settings.task == "question_answering":
            names = ["question", "context", "answers"]
        else:
            names = [*re.findall(r"\{(\w+)\}", self.template(row)), "target"]
        return [self.named(name, row) for name in dict.fromkeys(names)]

    def cleaned(self, row: Row) -> Row:
        def clean(value: Any) -> Any:
            if isinstance(value, list):
                return [{**turn, "content": clean(turn["content"])} for turn in value]
            for step in self.data.clean if isinstance(value, str) else ():
                if step == "unicode":
                    value = unicodedata.normalize("NFC", value)
                elif step == "symbols":
                    value = _IS_SYMBOL.sub("", value)
                elif step == "repeats":
                    value = re.sub(r"(\D)\1{3,}", r"\1\1\1", value)
                elif step == "blanks":
                    value = re.sub(r"[^\S\n]+", " ", value)
                    value = re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", value)).strip()
            return value

        return row | {name: clean(row[name]) for name in self.read_columns(row)}

    # Prompts

    def template(self, row: Row) -> str:
        if self.data.prompt == "alpaca":
            has_context = bool(str(row.get(self.column("context")) or "").strip())
            return _ALPACA.format(
                paired=_PAIRED if has_context else "",
                context="### Input:\n{context}\n\n" if has_context else "",
            )
        return "{input}" if self.data.prompt in ("plain", "chat") else str(self.data.prompt)

    def named(self, name: str, row: Row) -> str:
        """Return the column that *name* is of: one of the recipe's, or one of the row's own."""
        column = getattr(self.data.columns, name, None) or name
        return column if column in row else name

    def prompt(self, row: Row) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: str(row[self.named(match[1], row)]), self.template(row))

    def turns(self, row: Row) -> list[dict[str, str]]:
        """Return the turns of a chat; those of an answer at the end are left to the caller."""
        system = [{"role": "system", "content": self.data.system}] if self.data.system else []
        if self.data.prompt == "messages":
            return [*system, *row[self.column("messages")]]
        return [*system, {"role": "user", "content": str(row[self.named("input", row)])}]

    def target(self, row: Row) -> str:
        if self.data.prompt == "messages":
            return str(row[self.column("messages")][-1]["content"])
        return str(row[self.column("target")])

    def prompt_ids(self, row: Row, longest: float = math.inf) -> tuple[list[int], bool]:
        """Return the ids of a prompt with padding and separator, and whether it was too long."""
        if self.data.prompt in ("chat", "messages"):
            turns = self.turns(row)
            turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
            ids = self.bare(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        else:
            ids = self.begun(self.prompt(row))
        separator = self.bare(self.data.separator) if self.data.separator else []
        longest = min(self.data.pad_input_to or math.inf, longest - len(separator))
        is_long = len(ids) > longest
        ids = self.cut(ids, int(longest)) if is_long else ids
        padding = [self.tokenizer.pad_token_id] * ((self.data.pad_input_to or 0) - len(ids))
        return ids + padding + separator, is_long

    def bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def begun(self, text: str) -> list[int]:
        """Return the ids of a text with the begin token, where the tokenizer writes one, but without an end."""
        ids = list(self.tokenizer(text)["input_ids"])
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def cut(self, ids: list[int], longest: int) -> list[int]:
        if len(ids) <= longest or self.data.long_rows == "cut_right":
            return ids[:longest]
        begin = ids[:1] if ids[:1] == [self.tokenizer.bos_token_id] else []
        return begin[:longest] + ids[len(ids) - longest + len(begin[:longest]) :]

    def framed(self, text: str, longest: int, *, is_target: bool = False) -> tuple[list[int], bool]:
        """Return the ids of a text between the tokenizer's own tokens, which a cut keeps, and whether it was cut."""
        ids, frame = (list(self.tokenizer(one)["input_ids"]) for one in (text, ""))
        end = self.tokenizer.eos_token_id
        if is_target and end not in frame:
            ids, frame = [*ids, end], [*frame, end]
        ids = ids or [end]
        if len(ids) <= longest or self.data.long_rows == "drop":
            return ids, len(ids) > longest
        before = 1 if len(frame) > 1 and ids[0] == frame[0] else 0
        after, room = len(frame) - before, longest - len(frame)
        inner = ids[before : len(ids) - after]
        inner = inner[:room] if self.data.long_rows == "cut_right" else inner[len(inner) - room :]
        return ids[:before] + inner + ids[len(ids) - after :], True

    # Examples

    def examples(self, rows: Sequence[Row], *, is_packed: bool = False) -> list[Example]:
        """Return what is learned of *rows*; of rows in a pack the first token is not asked for."""
        if self.settings.task == "question_answering":
            return [(one.ids, one.types, *one.span) for row in rows for one in self.windows(row)]
        make = {"causal_lm": self.causal, "seq2seq": self.pair, "classification": self.labelled}[self.settings.task]
        found = [example for example in map(make, rows) if example is not None]
        if self.data.packing == "blocks":
            flat, size = [token for ids, _ in found for token in ids], self.data.max_tokens
            parts = [flat[start : start + size] for start in range(0, len(flat), size)]
            return [(part, part) for part in parts]
        return [(ids, [-100, *labels[1:]]) for ids, labels in found] if is_packed else found

    def causal(self, row: Row) -> Example | None:
        end, is_long = self.tokenizer.eos_token_id, False
        if self.data.prompt == "":
            if not str(row[self.column("text")]).strip():
                return None
            ids = [*self.begun(str(row[self.column("text")])), end]
            is_learned = [True] * len(ids)
        elif self.data.prompt == "messages":
            ids, is_learned = self.conversation(row)
        else:
            if not self.target(row).strip():
                return None
            ids, is_long = self.prompt_ids(row)
            target = [*self.bare(self.target(row)), end]
            ids, is_learned = ids + target, [False] * len(ids) + [True] * len(target)
        if self.data.packing == "blocks":
            return ids, ids
        longest = self.data.max_tokens
        if self.data.long_rows == "drop" and (is_long or len(ids) > longest):
            return None
        is_learned = [True] * len(ids) if self.data.loss_on == "all" else is_learned
        labels = [token if learned else -100 for token, learned in zip(ids, is_learned, strict=True)]
        if len(ids) > longest:
            keep = 1 if ids[0] == self.tokenizer.bos_token_id else 0
            is_right = self.data.long_rows == "cut_right"
            labels = labels[:longest] if is_right else labels[:keep] + labels[len(ids) - longest + keep :]
            ids = self.cut(ids, longest)
        return (ids, labels) if any(label != -100 for label in labels[1:]) else None

    def conversation(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the ids of a chat, and which are the assistant's, ends of turns among them."""
        turns, end = self.turns(row), self.tokenizer.eos_token

        def written(count: int) -> str:
            return str(self.tokenizer.apply_chat_template(turns[:count], tokenize=False)) if count else ""

        whole = self.tokenizer(written(len(turns)), add_special_tokens=False, return_offsets_mapping=True)
        spans = [
            (len(written(place)), written(place + 1).rindex(end) + len(end))
            for place, turn in enumerate(turns)
            if turn["role"] == "assistant"
        ]
        is_learned = [any(a < stop and b > start for start, stop in spans) for a, b in whole["offset_mapping"]]
        return list(whole["input_ids"]), is_learned

    def pair(self, row: Row) -> Example | None:
        if not self.target(row).strip():
            return None
        source, is_long = self.framed(self.prompt(row), self.data.max_tokens)
        target, is_target_long = self.framed(self.target(row), self.data.max_target_tokens, is_target=True)
        return None if self.data.long_rows == "drop" and (is_long or is_target_long) else (source, target)

    def labelled(self, row: Row) -> Example | None:
        ids, is_long = self.framed(self.prompt(row), self.data.max_tokens)
        is_dropped = self.data.long_rows == "drop" and is_long
        return None if is_dropped else (ids, self.labels.index(self.target(row).strip()))

    def windows(self, row: Row) -> list[Window]:
        options, tokenizer = self.settings.question_answering, self.tokenizer
        begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
        question = self.bare(row[self.column("question")])[: options.max_question_tokens]
        passage = tokenizer(row[self.column("context")], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = passage["input_ids"], passage["offset_mapping"]
        answers, answer = row[self.column("answers")], list[int]()
        if answers["text"]:
            start = answers["answer_start"][0]
            stop = start + len(answers["text"][0])
            answer = [place for place, (a, b) in enumerate(offsets) if a < stop and b > start]
        room, start, found = self.data.max_tokens - len(question) - 3, 0, list[Window]()
        while True:
            part, first = ids[start : start + room], len(question) + 2
            is_inside = bool(answer) and start <= answer[0] and answer[-1] < start + room
            shift = first - start
            window = Window(
                ids=[begin, *question, end, *part, end],
                types=[0] * first + [1] * (len(part) + 1),
                span=(answer[0] + shift, answer[-1] + shift) if is_inside else (0, 0),
                offsets=offsets[start : start + room],
                first=first,
            )
            found.append(window)
            if start + room >= len(ids):
                return found
            start += room - options.stride_tokens


def namespace(value: Any, name: str = "") -> Any:
    """Return JSON as values with attributes, but for what has names of its own."""
    if isinstance(value, dict):
        inner = {key: namespace(one, key) for key, one in value.items()}
        return inner if name in ("config", "decodings", "class_weights", "splits") else SimpleNamespace(**inner)
    return [namespace(one) for one in value] if isinstance(value, list) else value
