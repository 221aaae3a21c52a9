"""Turn conversations into token ids, and find what the assistant says in them.

All of its answers are learned, each with the end of its turn. Where they lie is told by the template's own marks
({% generation %}), else by writing the turns one by one: a turn reaches from the text that asks for it to the text that
has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from typing import Any

from ...errors import UsageError
from ..schema import Data
from .chat import ASSISTANT, RowFault, Turn, learned_answers, question_of, refusal, render, turns_of, with_context
from .encode import Encoded, Span, fit, fit_prompts
from .rows import Row

UNANSWERED = "unanswered"  # the remark on a conversation that ends with no answer
_SHOWN = 20  # signs of a prompt's end
_MARK = re.compile(r"\{%-?\s*generation\b")


def encode_conversations(spec: Data, rows: Sequence[Row], tokenizer: Any) -> list[Encoded]:
    """Return the conversations of *rows* as training sees them.

    Turns behind the last answer are left out. Conversations above `data.max_tokens` are long, and cut where a side is
    named.

    Raises:
        RowFault: a row is no conversation, or the template does not take it.
    """
    found = []
    for number, row in enumerate(rows, 1):
        try:
            turns = turns_of(row[spec.columns.messages])
            answers = learned_answers(row[spec.columns.messages])
            last = max(answers, default=-1)
            is_empty = not any(turns[at]["content"].strip() for at in answers)
            read = turns[: last + 1] or turns
            is_learned = [at in answers for at, turn in enumerate(read) if turn["role"] == ASSISTANT]
            is_learned = [False] * len(spec.examples) + is_learned
            ids, learned = _with_spans(tokenizer, with_context(spec, read), is_learned)
        except ValueError as error:
            raise RowFault(number, str(error)) from error
        if last < 0:
            learned = []
        elif not learned or ids[learned[-1][1] - 1] != tokenizer.eos_token_id:  # the template ends no turn by it
            end = learned[-1][1] if learned else len(ids)  # behind what is masked an answer would not come to it
            ids = [*ids[:end], tokenizer.eos_token_id]
            learned = [*learned, (end, end + 1)]
        spans = ((0, len(ids)),) if spec.loss_on == "all" else tuple(learned)
        found.append(fit(spec, Encoded(ids, spans, len(ids), False), is_empty and last >= 0, tokenizer))
    return found


def _with_spans(tokenizer: Any, turns: Sequence[Turn], is_learned: Sequence[bool]) -> tuple[list[int], list[Span]]:
    """Return the ids of turns, and the spans that are learned.

    They are the assistant's answers of which *is_learned* says so. A token counts where it holds a sign of an answer:
    that of the mask of transformers leaves out the last bytes of a Korean syllable.
    """
    text, said = _said(tokenizer, turns)
    if len(said) != len(is_learned) and not all(is_learned):
        raise ValueError(
            f"has {len(is_learned)} answers, of which not all are learned, and the tokenizer's chat template marks "
            f"{len(said)} by {{% generation %}}; let it mark each answer once"
        )
    ids, places = _tokenised(tokenizer, text, [begin for begin, _ in said])
    spans = []
    for begin, end in compress(said, is_learned) if len(said) == len(is_learned) else said:
        inside = [at for at, (first, last) in enumerate(places) if last > begin and first < end]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return ids, spans


def encode_questions(spec: Data, rows: Sequence[Row], tokenizer: Any, limit: int | None) -> list[Encoded]:
    """Return what precedes the answer that each conversation of *rows* ends with.

    A conversation that ends with none is asked as it stands, with the remark `UNANSWERED`. The ids are those with which
    training begins the answer.

    Raises:
        RowFault: a row is no conversation, or the template does not take it.
    """
    found, remarks = [], []
    for number, row in enumerate(rows, 1):
        try:
            turns = turns_of(row[spec.columns.messages])
            asked = with_context(spec, question_of(turns))
            text, begins = render(tokenizer, asked, asks=True), list[int]()
            with suppress(ValueError):  # then only what precedes a learned answer would be told from it
                before, said = _said(tokenizer, asked)
                begins = [begin for begin, _ in said] if text.startswith(before) else []
            found.append(_tokenised(tokenizer, text, begins)[0])
            remarks.append((UNANSWERED,) if question_of(turns) == turns else ())
        except ValueError as error:
            raise RowFault(number, str(error)) from error
    prompts = fit_prompts(spec, found, tokenizer, limit)
    return [replace(prompt, remarks=remark) for prompt, remark in zip(prompts, remarks, strict=True)]


def _tokenised(tokenizer: Any, text: str, begins: Sequence[int]) -> tuple[list[int], list[Span]]:
    """Return the ids of *text*, and where each lies in it.

    No token reaches over the begin of an answer, since a prompt ends there: a template may end it with a blank.
    """
    if not tokenizer.is_fast:
        raise UsageError("data.prompt=messages needs a tokenizer that tells where its tokens lie (tokenizer.json)")
    ids, places, cuts = list[int](), list[Span](), list[int]()
    for _ in range(2):
        ids, places = [], []
        for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            encoded = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
            ids += encoded["input_ids"]
            places += [(begin + first, begin + last) for first, last in encoded["offset_mapping"]]
        crossed = sorted({at for at in begins for first, last in places if first < at < last})
        if not crossed:
            break
        cuts = crossed
    return ids, places


def _said(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """Return the text of turns, and which signs of it the assistant says."""
    find = _marked_text if _MARK.search(str(tokenizer.chat_template)) else _written_text
    return find(tokenizer, turns)


def _written_text(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
    """Return the text of turns, and which signs of it the assistant says.

    A turn reaches from the text that asks for it to the text that has it, its end included.
    """
    text, spans = render(tokenizer, turns), []
    for at in (at for at, turn in enumerate(turns) if turn["role"] == ASSISTANT):
        before, upto = render(tokenizer, turns[:at], asks=True), render(tokenizer, turns[: at + 1]).rstrip()
        if not text.startswith(upto):  # a Phi-3 ends the whole by its end token
            upto = upto.removesuffix(str(tokenizer.eos_token)).rstrip()
        if not (upto.startswith(before.rstrip()) and text.startswith(upto)):
            name = tokenizer.name_or_path or "the tokenizer"
            raise ValueError(
                f"cannot be learned turn by turn: the chat template of {name} writes turn {at + 1} in another way "
                "when it is asked for, or when more turns follow; mark what the assistant says by {% generation %} in "
                "its chat_template.jinja, or write one answer a row with data.prompt=chat"
            )
        if turns[at]["content"].strip() and not text.startswith(before):
            learned, asked = (one[max(0, len(before) - _SHOWN) : len(before)] for one in (text, before))
            raise ValueError(
                f"would be learned after {learned!r} and asked after {asked!r}: so the chat template of "
                f"{tokenizer.name_or_path or 'the tokenizer'} writes answers, and asks for them; make both alike in "
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
