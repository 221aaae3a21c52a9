"""The command line: find the command's module, parse, call.

Results go to stdout, everything else to stderr. A command is one row of `COMMANDS` and one function
`define_NAME(parser)`, which says what the command takes and what handles it. Another package adds a command by an entry
point of the group `sousbatch.commands`: its name is the command, its object such a function.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import SousbatchError
from ..files import final_name
from ..plugins import Registry
from ..redaction import redacted
from .parser import Parser, add_command

_DESCRIPTION = """\
Turn a fine-tuning recipe into jobs on Slurm or on this machine, and get back a
half-precision model and one complete predictions file.

  sousbatch recipes list                                 what is in the library
  sousbatch plan hangul-restoration                      what would run, and what it takes
  sousbatch submit hangul-restoration train.steps=200    run it, with a value of your own
  sousbatch status                                       where all runs stand, from any folder
  sousbatch resume RUN                                   resume an interrupted run
"""

# command: the module of this package that defines it, and its line in the help, which imports no module
COMMANDS = {
    "recipes": ("recipes", "list and show recipes"),
    "plan": ("plan", "show what would run: stages, resources, memory and storage; check every row of the data"),
    "submit": ("submit", "plan a recipe, then run it"),
    "status": ("status", "show the state of runs"),
    "runs": ("run_table", "list what ran: what differs, scores, cost; the best run by a score, seeds together"),
    "logs": ("logs", "print the logs of a stage"),
    "cancel": ("runs", "end the jobs of a run"),
    "resume": ("submit", "resume an interrupted run"),
    "clean": ("runs", "free the space of finished runs: remove checkpoints and units, keep model and predictions"),
    "sync": ("sync", "send what jobs without a network recorded for a tracker, such as W&B"),
    "report": (
        "report.command",
        "write one HTML page about a run, a sweep or several runs: curves, storage, samples, scores",
    ),
    "publish": ("publish", "send model, predictions and report of a run to a folder, a URL or the hub"),
    "dashboards": ("dashboards", "show, compare and save the W&B dashboard of a recipe or a sweep"),
    "doctor": ("doctor", "check what this machine offers and lacks"),
    "checkpoints": ("checkpoints", "list, verify, prune and consolidate checkpoints, also those of other trainers"),
    "predictions": ("predictions", "merge and score prediction files, also those of other trainers"),
    "sandbox": ("sandbox", "run a private Slurm of simulated nodes on this machine, to try recipes and to test"),
}


def build_parser(*words: str) -> Parser:
    """Return the parser of the commands among *words*, or of all.

    The other commands are named and not defined.
    """
    parser = Parser(prog="sousbatch", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"sousbatch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    registry: Registry[Callable[[Parser], None]] = Registry(
        "command", "sousbatch.commands", {name: f"cli.{module}:define_{name}" for name, (module, _) in COMMANDS.items()}
    )
    for name in COMMANDS if set(words) & set(COMMANDS) else registry:
        _, help = COMMANDS.get(name, ("", "a third-party command"))
        command = add_command(commands, name, help)
        if name in words or not words:
            registry.load(name)(command)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Overrides may stand on both sides of options, which argparse alone does not take.
    """
    parser = build_parser(arguments[0] if arguments else "")
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"{' '.join(unknown)!r} is not an option or argument of {parsed.command}")
    if rest:
        parsed.overrides += rest
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for done, 1 for failed, 2 for cannot work, 141 for unread.
    """
    words = sys.argv[1:] if arguments is None else arguments
    _open_standard_files()
    try:
        return _run(words)
    except SousbatchError as error:
        return _refuse(str(error), error.exit_code if error.exit_code in (1, 2) else 1)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _write_no_more()
        return 128 + signal.SIGPIPE if {"submit", "resume"} & set(words[:1]) else 0  # not done: the run continues
    except OSError as error:  # a folder that cannot be written, a disk that is full
        return _refuse(redacted(f"{final_name(str(error.filename or 'a file'))}: {error.strerror or error}"), 2)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
    try:
        parsed = _parse(arguments)
        code: int = parsed.handler(parsed)
        return code
    finally:  # while a failure to print can still be reported
        sys.stdout.flush()


def _open_standard_files() -> None:
    """Give stdin, stdout and stderr a file where the shell closed them.

    The next file that is opened would take their numbers. A child that is started with streams of its own loses what
    has such a number, a lock it should inherit, say.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def _refuse(message: str, code: int) -> int:
    """Say why in one line, where there is anybody to say it to."""
    try:
        print(f"sousbatch: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    except OSError:
        _write_no_more()
    return code


def _write_no_more() -> None:
    """Let what Python still holds for stdout and stderr go nowhere.

    Python would complain about it at its end.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
