"""The columns that a prompt template reads. `encode` fills templates in."""

from __future__ import annotations

import string

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
