"""The forms of a prompt, and the columns that each reads; `encode` fills them in."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence

from ...errors import Fault, nearest
from ..schema import Data

CHAT, MESSAGES = "chat", "messages"
_OF_ONE_TEXT = ("separator", "pad_input_to", "loss_on", "system", "examples")  # of a prompt that its answer follows
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_PAIRED = _ALPACA.format(", paired with an input that provides further context")
# Templates with a name; that of a row with a context comes behind.
TEMPLATES = {
    "alpaca": (
        _ALPACA.format("") + "### Instruction:\n{input}\n\n### Response:\n",
        _PAIRED + "### Instruction:\n{input}\n\n### Input:\n{context}\n\n### Response:\n",
    ),
    "plain": ("{input}", "{input}"),
}


def has_turns(prompt: str) -> bool:
    """Say whether a prompt is written by the tokenizer's own chat template."""
    return prompt in (CHAT, MESSAGES)


def prompt_fields(prompt: str) -> list[str]:
    """Return the names in the braces of a template; `chat` and `messages` have none.

    Raises:
        ValueError: a brace is not closed, or what it holds is no plain name.
    """
    if has_turns(prompt):
        return []
    names = []
    template = TEMPLATES[prompt][0] if prompt in TEMPLATES else prompt
    for _, name, format_spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or name.isdigit() or set(name) & set(".[]") or format_spec or conversion:
            more = (f"!{conversion}" if conversion else "") + (f":{format_spec}" if format_spec else "")
            raise ValueError(f"{{{name}{more}}} is not the name of a column")
        names.append(name)
    return names


def prompt_columns(data: Data) -> list[tuple[str, str]]:
    """Return (key that names it, column) for each column that the prompt reads."""
    ours = {"input": data.columns.input, "context": data.columns.context, "text": data.columns.text}
    if data.prompt == MESSAGES:
        return [("data.columns.messages", data.columns.messages)]
    fields = ["input"] if data.prompt == CHAT else prompt_fields(data.prompt)
    return [(f"data.columns.{name}" if name in ours else "data.prompt", ours.get(name, name)) for name in fields]


def prompt_faults(data: Data) -> Iterator[Fault]:
    """Yield what is wrong with the template itself."""
    try:
        fields = prompt_fields(data.prompt)
    except ValueError as error:
        hint = "columns in braces; double a brace that stands for itself"
        yield Fault(key="data.prompt", problem=f"is {data.prompt!r}: {error}", hint=hint)
        return
    if data.columns.target in fields or "target" in fields:
        problem = "reads the target column, which is what the model should answer"
        yield Fault(key="data.prompt", problem=problem, hint="leave it out of the template")
    named = (*TEMPLATES, CHAT, MESSAGES)
    if re.fullmatch(r"[\w-]+", data.prompt) and data.prompt not in named:
        hint = nearest(data.prompt, named) or "or text with columns in braces, such as '{input} =>'"
        yield Fault(key="data.prompt", problem=f"is {data.prompt!r}; known: {', '.join(named)}", hint=hint)
    yield from _turn_faults(data)


def _turn_faults(data: Data) -> Iterator[Fault]:
    """Yield what is wrong with keys that belong to a chat, or do not."""
    if not has_turns(data.prompt):
        for name in (name for name in ("system", "examples") if getattr(data, name)):
            hint = "write it into the template, or set data.prompt=chat"
            yield Fault(key=f"data.{name}", problem="has no meaning without a chat", hint=hint)
    for number, example in enumerate(data.examples):
        if set(example) != {"input", "target"}:
            problem = f"has {', '.join(example) or 'nothing'}"
            yield Fault(key=f"data.examples.{number}", problem=problem, hint="each has input and target")
    if data.prompt == MESSAGES:
        for name in (name for name in ("separator", "pad_input_to") if getattr(data, name)):
            problem = "has no meaning for messages, whose turns the chat template sets apart"
            yield Fault(key=f"data.{name}", problem=problem, hint="leave it out")


def plain_prompt_faults(data: Data, task: str) -> Iterator[Fault]:
    """Yield what is wrong for a task whose prompt is encoded apart.

    The answer does not follow the prompt there.
    """
    example = "such as '{input}'"
    if data.prompt == "":
        yield Fault(key="data.prompt", problem=f"is empty, so task {task} has nothing to read", hint=example)
    elif has_turns(data.prompt):
        problem = f"is {data.prompt}, and models of task {task} have no turns of a conversation"
        yield Fault(key="data.prompt", problem=problem, hint=f"write a template, {example}")
    else:
        yield from prompt_faults(data)
    yield from unread_faults(data, task, _OF_ONE_TEXT, "reads the prompt apart from the answer")


def unread_faults(data: Data, task: str, names: Sequence[str], why: str) -> Iterator[Fault]:
    """Yield which of the keys *names* are set, which the task does not read."""
    usual = Data()
    for name in names:
        if getattr(data, name) != getattr(usual, name):
            problem = f"has no meaning for task {task}, which {why}"
            yield Fault(key=f"data.{name}", problem=problem, hint="leave it out")
