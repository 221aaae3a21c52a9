"""Turn conversations into token ids, and find what the assistant says in them.

All of its answers are learned, each with the end of its turn. Where they lie is told by the template's own marks
({% generation %}), else by writing the turns one by one: a turn reaches from the text that asks for it to the text that
has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...errors import UsageError
from ..schema import Data
from .chat import ASSISTANT, RowFault, Turn, refusal, render, turns_of, with_context
from .encode import Encoded, Span, fit
from .rows import Row

_MARK = re.compile(r"\{%-?\s*generation\b")


def encode_conversations(spec: Data, rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    """Return the conversations of *rows* as training sees them.

    Turns behind the last answer are left out. Conversations above `data.max_tokens` are long, and cut where a side is
    named.

    Raises:
        RowFault: a row is no conversation, or the template does not take it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError("data.prompt=messages needs a tokenizer that tells where its tokens lie (tokenizer.json)")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            turns = turns_of(row[spec.columns.messages])
            last = max((at for at, turn in enumerate(turns) if turn["role"] == ASSISTANT), default=-1)
            is_empty = not any(turn["content"].strip() for turn in turns if turn["role"] == ASSISTANT)
            ids, learned = _with_spans(tokenizer, with_context(spec, turns[: last + 1] or turns), len(spec.examples))
        except ValueError as error:
            raise RowFault(number, str(error)) from error
        if last < 0:
            learned = []
        elif not learned or ids[learned[-1][1] - 1] != tokenizer.eos_token_id:  # the template ends no turn by it
            ids = [*ids, tokenizer.eos_token_id]
            learned = [*learned, (len(ids) - 1, len(ids))]
        spans = ((0, len(ids)),) if spec.loss_on == "all" else tuple(learned)
        found.append(fit(spec, Encoded(ids, spans, len(ids), False), is_empty and last >= 0, tokenizer))
    return found


def _with_spans(tokenizer: Any, turns: Sequence[Turn], num_shown: int) -> tuple[list[int], list[Span]]:
    """Return the ids of turns, and the spans that the assistant says.

    Its first *num_shown* answers are examples, and not learned. A token counts where it holds a sign of an answer: that
    of the mask of transformers leaves out the last bytes of a Korean syllable.
    """
    find = _marked_text if _MARK.search(str(tokenizer.chat_template)) else _written_text
    text, said = find(tokenizer, turns)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for begin, end in said[num_shown:]:
        inside = [at for at, (first, last) in enumerate(encoded["offset_mapping"]) if last > begin and first < end]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return list(encoded["input_ids"]), spans


def _written_text(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """Return the text of turns, and which signs of it the assistant says.

    A turn reaches from the text that asks for it to the text that has it, its end included.
    """
    text, spans = render(tokenizer, turns), []
    for at in (at for at, turn in enumerate(turns) if turn["role"] == ASSISTANT):
        before, upto = render(tokenizer, turns[:at], asks=True), render(tokenizer, turns[: at + 1]).rstrip()
        if not (upto.startswith(before.rstrip()) and text.startswith(upto)):
            name = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(
                f"cannot be learned turn by turn: the chat template of {name} writes turn {at + 1} in another way "
                "when it is asked for, or when more turns follow; mark what the assistant says by {% generation %} in "
                "its chat_template.jinja, or write one answer a row with data.prompt=chat"
            )
        spans.append((len(before), len(upto)))
    return text, spans


def _marked_text(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """Return the text of turns, and which signs of it the template marks.

    An end token behind a mark is said too.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), (marks,) = render_jinja_template(
            conversations=[list(turns)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise refusal(turns, error) from error
    end = str(tokenizer.eos_token or "")
    return text, [(begin, stop + len(end) * text.startswith(end, stop)) for begin, stop in marks]
