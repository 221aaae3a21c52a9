"""The columns that a prompt template reads. `encode` fills templates in."""

from __future__ import annotations

import string
from collections.abc import Iterator

from ...errors import Fault
from ..schema import Data


def prompt_fields(prompt: str) -> list[str]:
    """Return the names in the braces of a template; `chat` has none of its own.

    Raises:
        ValueError: a brace is not closed, or what it holds is no plain name.
    """
    if prompt == "chat":
        return []
    names = []
    for _, name, format_spec, conversion in string.Formatter().parse(prompt):
        if name is None:
            continue
        if not name or name.isdigit() or set(name) & set(".[]") or format_spec or conversion:
            raise ValueError(f"{{{name}}} is not the name of a column")
        names.append(name)
    return names


def prompt_columns(data: Data) -> list[tuple[str, str]]:
    """Return (key that names it, column) for each column that the prompt reads."""
    ours = {"input": data.columns.input, "context": data.columns.context, "text": data.columns.text}
    fields = ["input"] if data.prompt == "chat" else prompt_fields(data.prompt)
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


def plain_prompt_faults(data: Data, task: str) -> Iterator[Fault]:
    """Yield what is wrong for a task whose prompt is encoded apart.

    The answer does not follow the prompt there.
    """
    example = "such as '{input}'"
    if data.prompt == "":
        yield Fault(key="data.prompt", problem=f"is empty, so task {task} has nothing to read", hint=example)
    elif data.prompt == "chat":
        problem = f"is chat, and models of task {task} have no turns of a conversation"
        yield Fault(key="data.prompt", problem=problem, hint=f"write a template, {example}")
    else:
        yield from prompt_faults(data)
    unused = {"separator": "", "pad_input_to": None, "loss_on": "response", "system": None}
    for name, usual in unused.items():
        if getattr(data, name) != usual:
            problem = f"has no meaning for task {task}, which reads the prompt apart from the answer"
            yield Fault(key=f"data.{name}", problem=problem, hint="leave it out")
