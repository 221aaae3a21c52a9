"""The parser of the command line.

It has one-line errors, types of arguments, and shared options.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from ..errors import nearest

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction["Parser"]
    Handler = Callable[[argparse.Namespace], int]

RUN_HELP = "id or its beginning, recipe name, or folder"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest command, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        message = message.replace(", KEY=VALUE", "")  # argparse lists what is optional, too
        if "invalid choice" in message and self._subparsers is not None:
            word = message.split("'")[1]
            known = [name for action in self._subparsers._group_actions for name in action.choices or ()]
            hint = f" ({nearest(word, known)})" if nearest(word, known) else ""
            message = f"{self.prog} has no command {word!r}; known: {', '.join(known)}{hint}"
        lacking = re.fullmatch(r"argument (\S+): expected one argument", message)
        if lacking:
            option = lacking[1]
            kind = next((each.metavar for each in self._actions if option in each.option_strings), None)
            message = f"{option} needs a value ({kind or 'one word'}) that does not begin with '-'"
        print(f"sousbatch: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def add_command(commands: Verbs, name: str, help: str) -> Parser:
    """Add a command or a verb that `--help` describes by *help*."""
    return commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_verbs(parser: Parser) -> Verbs:
    """Let *parser* take one of several verbs."""
    return parser.add_subparsers(dest="verb", metavar="VERB", required=True)


def define(parser: Parser, handler: Handler | None, *examples: str) -> None:
    """Give *parser* what runs its command, and the examples of its help.

    The former is None where its verbs have it.
    """
    if handler is not None:
        parser.set_defaults(handler=handler)
    parser.epilog = "examples:\n" + "\n".join(f"  sousbatch {example}" for example in examples)


def add_recipe_arguments(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """Add what `plan` and `submit` share: recipe, overrides, and where it runs.

    Return the group of the options that say where.
    """
    parser.add_argument("recipe", metavar="RECIPE", help="name, or path of a YAML file")
    add_overrides(parser)
    add_runs_option(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--launcher",
        metavar="NAME",
        help="where: slurm, local or an installed one (default: Slurm where one is configured, else this machine)",
    )
    return where


def add_overrides(parser: Parser) -> None:
    """Add the recipe's overrides, which may stand on both sides of options."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="values of the recipe in Hydra's form, such as train.learning_rate=1e-4 adapter=lora",
    )


def add_runs_option(parser: Parser) -> None:
    """Add the folder that holds all runs."""
    parser.add_argument(
        "--runs", metavar="DIR", help="folder that holds all runs (default $SOUSBATCH_RUNS, else ./runs)"
    )


def positive_number(text: str) -> float:
    """Return a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def count(text: str) -> int:
    """Return a non-negative integer."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a non-negative integer, not {text!r}")
    return int(text)


def positive_count(text: str) -> int:
    """Return a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def share(text: str) -> tuple[int, int]:
    """Return which part of how many, written as I/N."""
    part, _, num_parts = text.partition("/")
    if not (part.isdecimal() and num_parts.isdecimal() and int(part) < int(num_parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, such as 0/8, not {text!r}")
    return int(part), int(num_parts)


def setting(text: str) -> tuple[str, str]:
    """Return key and value, written as KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, not {text!r}")
    return key, value
