"""Read conversations, and write them as the tokenizer's chat template does.

A conversation is a list of turns: {role, content}, or {from, value} as ShareGPT has them. The answer that it ends with
is the target where a row is predicted and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ...errors import UsageError
from ...files import parse_json
from ..schema import Data
from .prompts import MESSAGES
from .rows import Row

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOOLS = ("tool", "tools", "function", "function_call", "observation")
ASSISTANT = "assistant"

Turn = dict[str, str]


class RowFault(UsageError):
    """A row that cannot be encoded. *number* counts from 1 where the rows began."""

    def __init__(self, number: int, problem: str) -> None:
        self.number, self.problem = number, problem
        super().__init__(f"row {number} {problem}")


def out_of_json(value: Any) -> Any:
    """Return a conversation that is text in JSON as a list.

    Any other value comes back as it stands.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            return parse_json(value.encode())
    return value


def turns_of(value: Any) -> list[Turn]:
    """Return the turns of a conversation, also of one that is text in JSON.

    Raises:
        ValueError: it is none, or holds more than text; the message follows the row's number.
    """
    value = out_of_json(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"has no conversation but {str(value)[:60]!r}; a list of turns {{role, content}} is expected")
    return [_turn(number, one) for number, one in enumerate(value, 1)]


def _turn(number: int, one: Any) -> Turn:
    if not isinstance(one, dict):
        raise ValueError(f"has a turn {number} that is no {{role, content}} but {str(one)[:60]!r}")
    role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
    if role in _TOOLS or any(one.get(name) for name in ("tool_calls", "function_call")):
        raise ValueError(f"has a tool call in turn {number}; tools are not trained or asked: leave such rows out")
    if role not in _ROLES:
        raise ValueError(f"has role {role!r} in turn {number}; known: {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        what = "an image or other data" if isinstance(content, list) else f"{content!r} and no text"
        raise ValueError(f"has {what} in turn {number}; only text is read")
    if (weight := one.get("weight")) not in (None, 0, 1):
        raise ValueError(f"has weight {weight!r} in turn {number}; what a turn says is learned (1) or not (0)")
    return {"role": _ROLES[role], "content": content}


def learned_answers(value: Any) -> list[int]:
    """Return the places of the turns whose answers are learned.

    They are what the assistant says, but for turns of `weight` 0, as OpenAI's format has them.
    """
    asked = zip(turns_of(value), out_of_json(value), strict=True)
    return [at for at, (turn, one) in enumerate(asked) if turn["role"] == ASSISTANT and one.get("weight") in (None, 1)]


def target_of(spec: Data, row: Row, column: str) -> Any:
    """Return what a row's prediction is compared with.

    It is the *column*, or the answer that the conversation ends with.
    """
    if spec.prompt != MESSAGES:
        return row[column]
    return turns_of(row[spec.columns.messages])[-1]["content"]


def input_of(spec: Data, row: Row) -> Any:
    """Return what a row asks: its input column, or what the user said last."""
    if spec.prompt != MESSAGES:
        return row.get(spec.columns.input)
    said = [turn["content"] for turn in turns_of(row[spec.columns.messages]) if turn["role"] == "user"]
    return said[-1] if said else None


def question_of(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Return the turns before the answer at the end, or all where there is none."""
    return turns[:-1] if turns[-1]["role"] == ASSISTANT else turns


def with_context(spec: Data, turns: Sequence[Turn]) -> list[Turn]:
    """Return *turns* behind the recipe's system message and examples.

    A system message of the row's own stays, and the recipe's is left out.
    """
    own = 1 if turns and turns[0]["role"] == "system" else 0
    head = list(turns[:own]) or ([{"role": "system", "content": spec.system}] if spec.system else [])
    shots = [
        {"role": role, "content": example[name]}
        for example in spec.examples
        for role, name in (("user", "input"), (ASSISTANT, "target"))
    ]
    return [*head, *shots, *turns[own:]]


def render(tokenizer: Any, turns: Sequence[Turn], *, asks: bool = False) -> str:
    """Return turns as the tokenizer's template writes them.

    One that *asks* ends where the answer begins.

    Raises:
        ValueError: the template refuses the turns, or there are none.
    """
    if not turns:
        raise ValueError(
            "begins with what the assistant says, and nothing that it answers; put a turn before it, set data.system, "
            "or leave the row out"
        )
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks))
    except Exception as error:  # of jinja2, which the light tokenizer does without; a template may raise any
        raise refusal(turns, error) from error


def refusal(turns: Sequence[Turn], error: Exception) -> ValueError:
    """Return why a chat template does not take *turns*."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    roles = ", ".join(turn["role"] for turn in turns[:8])
    return ValueError(f"is refused by the chat template of the tokenizer ({reason}); its turns: {roles}")
