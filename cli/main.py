"""The command line: parse, call, print. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import SousbatchError, nearest
from ..redaction import redacted

_DESCRIPTION = """\
Turn a fine-tuning recipe into jobs on this machine, and get back a half-precision
model and one complete predictions file.

  sousbatch recipes list                                 what is in the library
  sousbatch plan hangul-restoration                      what would run, and what it takes
  sousbatch submit hangul-restoration train.steps=200    run it, with a value of your own
  sousbatch status                                       where all runs stand, from any folder
  sousbatch resume RUN                                   go on where a run stood
"""
_RUN = "id or its beginning, recipe name, or folder"
_OVERRIDES = "values of the recipe in Hydra's form, such as train.learning_rate=1e-4 adapter=lora"


class _Parser(argparse.ArgumentParser):
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


def _size_gb(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    part, _, num_parts = text.partition("/")
    if not (part.isdecimal() and num_parts.isdecimal() and int(part) < int(num_parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/8")
    return int(part), int(num_parts)


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as JobRequeue=0")
    return key, value


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="sousbatch", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"sousbatch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_recipe_commands(commands)
    _add_planning_commands(commands)
    _add_run_commands(commands)
    _add_checkpoint_commands(commands)
    _add_prediction_commands(commands)
    _add_sandbox_commands(commands)
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, help: str, *examples: str) -> _Parser:
    epilog = "examples:\n" + "\n".join(f"  sousbatch {example}" for example in examples) if examples else None
    description = help[0].upper() + help[1:] + "."
    return commands.add_parser(
        name, help=help, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _add_recipe_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    recipes = _add(commands, "recipes", "list and show recipes", "recipes list", "recipes show hangul-restoration")
    verbs = recipes.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = _add(
        verbs,
        "list",
        "list the recipes of the library and of $SOUSBATCH_RECIPES",
        "recipes list",
        "recipes list --json",
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    show = _add(
        verbs,
        "show",
        "show one composed recipe, or every key that recipes have",
        "recipes show hangul-restoration adapter=full",
        "recipes show --keys",
    )
    show.add_argument("recipe", nargs="?", metavar="RECIPE", help="name, or path of a YAML file")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)
    show.add_argument("--keys", action="store_true", help="list every key with its values, default and meaning")


def _add_planning_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    plan = _add(
        commands,
        "plan",
        "show what would run: stages, resources, memory, storage; every row of the data is checked",
        "plan hangul-restoration",
        "plan hangul-restoration train.global_batch=64 --json",
        "plan hangul-restoration --script",
        "plan hangul-restoration --rows 3",
    )
    _add_recipe_arguments(plan)
    shape = plan.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="the whole plan as JSON")
    shape.add_argument("--script", action="store_true", help="the exact text that would be sent for each stage")
    shape.add_argument(
        "--rows",
        type=_count,
        dest="num_rows",
        metavar="N",
        help="the first N rows of each split as the model sees them",
    )

    submit = _add(
        commands,
        "submit",
        "plan, then run",
        "submit hangul-restoration",
        "submit hangul-restoration train.learning_rate=1e-3 seed=2",
        "submit hangul-restoration --smoke",
        "submit hangul-restoration --detach",
        "submit hangul-restoration --smoke --sweep train.learning_rate=1e-3,1e-4 seed=1,2",
    )
    _add_recipe_arguments(submit)
    submit.add_argument("--detach", action="store_true", help="return when the jobs are sent")
    submit.add_argument("--smoke", action="store_true", help="try the whole chain: 2 steps, 8 rows")
    submit.add_argument(
        "--sweep",
        nargs="+",
        metavar="KEY=VALUES",
        help="one run for each choice of values, all in one job array: seed=1,2 train.learning_rate=1e-3,1e-4",
    )
    submit.add_argument("--again", action="store_true", help="make another run of what has run already")


def _add_recipe_arguments(parser: _Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="name, or path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)
    parser.add_argument(
        "--runs", metavar="DIR", help="folder that holds all runs (default $SOUSBATCH_RUNS, else ./runs)"
    )
    parser.add_argument(
        "--launcher",
        choices=["slurm", "local"],
        help="where (default: Slurm where one is configured, else this machine)",
    )


def _add_run_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    status = _add(commands, "status", "show where runs stand", "status", "status 3f2a --watch")
    status.add_argument("run", nargs="?", metavar="RUN", help=f"{_RUN}; all runs when left out")
    status.add_argument("--watch", action="store_true", help="until nothing runs any more")
    status.add_argument("--json", action="store_true", help="as JSON")
    logs = _add(commands, "logs", "print what a stage printed", "logs 3f2a", "logs 3f2a train -f")
    logs.add_argument("run", metavar="RUN", help=_RUN)
    logs.add_argument("stage", nargs="?", metavar="STAGE", help="the one that failed, else the newest, when left out")
    logs.add_argument("-f", "--follow", action="store_true", help="go on until the stage ends")
    cancel = _add(commands, "cancel", "end a run's jobs", "cancel 3f2a", "cancel 3f2a --save")
    cancel.add_argument("run", metavar="RUN", help=_RUN)
    cancel.add_argument("--save", action="store_true", help="let training save first, at a step boundary")
    resume = _add(commands, "resume", "go on where a run stood", "resume 3f2a", "resume 3f2a --detach")
    resume.add_argument("run", metavar="RUN", help=_RUN)
    resume.add_argument("--detach", action="store_true", help="return when the jobs are sent")
    resume.add_argument(
        "--accept-environment",
        action="store_true",
        help="go on with the Python and packages of now, though others were there at submission; this is recorded",
    )
    clean = _add(
        commands,
        "clean",
        "free the space of finished runs: checkpoints and units go, model and predictions stay",
        "clean 3f2a",
        "clean --older 30d",
        "clean 3f2a --all",
    )
    clean.add_argument("run", nargs="?", metavar="RUN", help=_RUN)
    clean.add_argument("--older", metavar="AGE", help="every finished run that was submitted longer ago: 30d, 12h")
    clean.add_argument("--all", action="store_true", help="the whole run folder, results too")
    clean.add_argument(
        "--although-jobs-may-run",
        action="store_true",
        help="with --all: also where nobody can say whether the run's jobs have ended, such as without its Slurm",
    )
    report = _add(
        commands, "report", "write one HTML page: storage over time, checkpoints, stages, loss, scores", "report 3f2a"
    )
    report.add_argument("run", metavar="RUN", help=_RUN)
    report.add_argument("--out", metavar="FILE", help="the page (default RUN/report.html)")
    doctor = _add(commands, "doctor", "say what this machine offers and lacks", "doctor")
    doctor.add_argument("--runs", metavar="DIR", help="folder that holds all runs")


def _add_checkpoint_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    checkpoints = _add(
        commands,
        "checkpoints",
        "look at, check and convert checkpoints, also those of other trainers",
        "checkpoints list runs/hangul-restoration/3f2a",
        "checkpoints prune 3f2a --dry-run",
        "checkpoints consolidate checkpoint-500 model",
    )
    verbs = checkpoints.add_subparsers(dest="verb", metavar="VERB", required=True)
    listing = _add(verbs, "list", "list the checkpoints of a run or a folder", "checkpoints list 3f2a")
    listing.add_argument("path", metavar="PATH", help="folder, or a run")
    listing.add_argument("--json", action="store_true", help="as JSON")
    verify = _add(verbs, "verify", "read every checkpoint and say what is damaged", "checkpoints verify 3f2a")
    verify.add_argument("path", metavar="PATH", help="folder, or a run")
    prune = _add(
        verbs,
        "prune",
        "remove what the recipe's policy lets go of; a file called pinned in a checkpoint keeps it",
        "checkpoints prune 3f2a --dry-run",
        "checkpoints prune 3f2a --keep-best 3",
    )
    prune.add_argument("path", metavar="PATH", help="folder, or a run")
    prune.add_argument("--dry-run", action="store_true", help="only say what would happen to each, and what it frees")
    prune.add_argument(
        "--keep-last", type=_positive, metavar="N", help="newest ones that stay (default: the recipe's, else 1)"
    )
    prune.add_argument(
        "--keep-best", type=_count, metavar="N", help="best ones that stay (default: the recipe's, else 1)"
    )
    prune.add_argument(
        "--thin", action="store_true", help="what stays for another reason than being new keeps its weights"
    )
    _add_consolidate(verbs)


def _add_consolidate(verbs: argparse._SubParsersAction[_Parser]) -> None:
    convert = _add(
        verbs,
        "consolidate",
        "make a half-precision model of a DeepSpeed or FSDP checkpoint",
        "checkpoints consolidate checkpoint-500 model",
        "checkpoints consolidate checkpoint-500 model --dtype bfloat16 --verify",
        "checkpoints consolidate checkpoint-500 model --shard 0/80",
    )
    convert.add_argument("path", metavar="CKPT", help="checkpoint folder or URL")
    convert.add_argument("out", metavar="OUT", help="folder or URL to make")
    convert.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        default="float16",
        help="type of the weights (default float16)",
    )
    convert.add_argument(
        "--max-shard-gb", type=_size_gb, default=5.0, help="largest weight file, 1 GB = 10^9 bytes (default 5)"
    )
    convert.add_argument(
        "--overflow",
        choices=["refuse", "clamp", "bfloat16"],
        default="refuse",
        help="what to do with weights beyond float16's range",
    )
    convert.add_argument(
        "--adapter",
        choices=["merge", "keep", "raw"],
        help="an adapter: write the model that it makes of its base, or the adapter alone (default: keep); raw: all "
        "weights under their own names, as zero_to_fp32.py does, and no config.json",
    )
    convert.add_argument("--base", metavar="DIR", help="the model that an adapter was trained on; merges it")
    convert.add_argument(
        "--copy-from", metavar="DIR", help="take config and tokenizer from here (default: the checkpoint)"
    )
    convert.add_argument("--workers", type=_count, default=0, help="threads (default: one per core)")
    convert.add_argument(
        "--verify",
        action="store_true",
        help="read back what was written, and compare it by another path",
    )
    convert.add_argument(
        "--shard",
        type=_share,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th weight file from the I-th on, counted from 0: a task of an array; "
        "the last to end makes OUT appear",
    )
    convert.add_argument(
        "--no-statistics",
        action="store_true",
        help="check no checksums, take no digests, count no zeros",
    )
    convert.add_argument("--dry-run", action="store_true", help="say what it costs, from headers alone; write nothing")
    convert.add_argument(
        "--disk-gbs", type=_size_gb, default=1.0, metavar="GB/S", help="for --dry-run: what one task moves (default 1)"
    )


def _add_prediction_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    predictions = _add(
        commands,
        "predictions",
        "merge and score prediction files, also those of other trainers",
        "predictions merge shards/rank*.jsonl --out predictions.jsonl",
    )
    verbs = predictions.add_subparsers(dest="verb", metavar="VERB", required=True)
    merge = _add(
        verbs,
        "merge",
        "join shards into one file in row order, or name what is missing",
        "predictions merge shards/rank*.jsonl --out predictions.jsonl --rows 5000",
        "predictions merge shards/rank*.jsonl --out joined.jsonl --in-file-order",
    )
    merge.add_argument(
        "paths", nargs="+", metavar="PATH", help="shards (.jsonl or .csv), a folder of them, or a folder of units"
    )
    merge.add_argument("--out", required=True, metavar="FILE", help="the merged file")
    merge.add_argument("--rows", type=_count, help="how many rows there must be")
    order = merge.add_mutually_exclusive_group()
    order.add_argument(
        "--index", default="index", metavar="FIELD", help="field that holds a row's position (default index)"
    )
    order.add_argument(
        "--in-file-order", action="store_true", help="rows have no index: one shard after the other, as named here"
    )
    merge.add_argument("--export", metavar="FILE", help="also write the merged rows as .csv or .parquet")
    _add_score(verbs)


def _add_score(verbs: argparse._SubParsersAction[_Parser]) -> None:
    score = _add(
        verbs,
        "score",
        "measure predictions against a data file",
        "predictions score predictions.jsonl --data test.jsonl --target summary",
    )
    score.add_argument("path", metavar="FILE", help="merged predictions (.jsonl)")
    score.add_argument("--data", required=True, metavar="FILE", help="the rows that were predicted")
    score.add_argument(
        "--target", default="target", metavar="COLUMN", help="column of the right answers (default target)"
    )
    score.add_argument(
        "--input",
        default="input",
        metavar="COLUMN",
        help="column of the inputs, for the copying baseline (default input)",
    )
    score.add_argument(
        "--field", default="prediction", metavar="FIELD", help="field of the prediction (default prediction)"
    )
    score.add_argument(
        "--tokenizer", choices=["words", "characters"], default="words", help="units of ROUGE (default words)"
    )
    score.add_argument("--json", action="store_true", help="as JSON")


def _add_sandbox_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    sandbox = _add(
        commands,
        "sandbox",
        "a private real Slurm of pretend nodes on this machine, to try recipes and to test",
        "sandbox start",
        "sandbox status",
        "sandbox stop",
    )
    verbs = sandbox.add_subparsers(dest="verb", metavar="VERB", required=True)
    start = _add(
        verbs,
        "start",
        'start it, or what of it has died; eval "$(sousbatch sandbox start)" makes it this shell\'s Slurm',
        "sandbox start",
        "sandbox start --nodes 3 --gpus 4 --accounting --set MaxArraySize=11 --set JobRequeue=0",
    )
    start.add_argument("--nodes", type=_count, default=2, help="pretend nodes (default 2)")
    start.add_argument("--cpus", type=_count, default=4, help="pretend CPUs of each node (default 4)")
    start.add_argument("--gpus", type=_count, default=2, help="pretend GPUs of each node (default 2)")
    start.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB, so that sacct answers")
    start.add_argument(
        "--slurm",
        metavar="PREFIX",
        help="daemons and commands of the Slurm installed there (default: the one whose sbatch is on PATH)",
    )
    start.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        dest="settings",
        metavar="KEY=VALUE",
        help="value of slurm.conf; may be repeated",
    )
    status = _add(verbs, "status", "show its daemons, nodes, partitions and jobs", "sandbox status")
    stop = _add(verbs, "stop", "end its daemons and jobs and remove its folder", "sandbox stop")
    for parser in (start, status, stop):
        parser.add_argument("--dir", metavar="DIR", help="its folder (default: sandbox in the user's state folder)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand on both sides of options, which argparse alone does not take."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if text.startswith("-") or not hasattr(parsed, "overrides")]
    if unknown:
        parser.error(f"{' '.join(unknown)!r} is no option or argument of {parsed.command}")
    if rest:
        parsed.overrides += rest
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 cannot work, 141 goes on unread."""
    _open_standard_files()
    try:
        return _run(arguments)
    except SousbatchError as error:
        return _refuse(str(error), error.exit_code if error.exit_code in (1, 2) else 1)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _write_no_more()
        words = sys.argv[1:] if arguments is None else arguments
        return 128 + signal.SIGPIPE if {"submit", "resume"} & set(words[:1]) else 0  # not done: the run goes on
    except OSError as error:  # a folder that cannot be written, a disk that is full
        return _refuse(redacted(f"{error.filename or 'a file'}: {error.strerror or error}"), 2)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    try:
        parsed = _parse(arguments)
        from . import commands

        return commands.run(parsed)
    finally:  # while a failure to print can still be told
        sys.stdout.flush()


def _open_standard_files() -> None:
    """Give stdin, stdout and stderr a file where the shell closed them, which the next file opened would take.

    A child that is started with streams of its own loses what has such a number, a lock it should inherit, say.
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
    """Let what Python still holds for stdout and stderr go nowhere, or it would complain at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
