"""`sousbatch sandbox`: a private Slurm on this machine."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .parser import Parser, add_command, add_verbs, count, define, setting
from .tables import format_table

if TYPE_CHECKING:
    from ..cluster.sandbox.config import Sandbox
    from ..cluster.sandbox.lifecycle import Status


def define_sandbox(parser: Parser) -> None:
    """Define `sandbox` and its verbs."""
    define(parser, None, "sandbox start", "sandbox status", "sandbox stop")
    verbs = add_verbs(parser)
    start = add_command(
        verbs,
        "start",
        'start it, or restart its dead daemons; eval "$(sousbatch sandbox start)" makes it this shell\'s Slurm',
    )
    define(
        start,
        _start,
        "sandbox start",
        "sandbox start --nodes 3 --gpus 4 --accounting --set MaxArraySize=11 --set JobRequeue=0",
    )
    _add_start_options(start)
    status = add_command(verbs, "status", "show its daemons, nodes, partitions and jobs")
    define(status, _status, "sandbox status")
    stop = add_command(verbs, "stop", "end its daemons and jobs and remove its folder")
    define(stop, _stop, "sandbox stop")
    for one in (start, status, stop):
        one.add_argument("--dir", metavar="DIR", help="its folder (default: sandbox in the user's state folder)")


def _add_start_options(start: Parser) -> None:
    start.add_argument("--nodes", type=count, default=2, help="simulated nodes (default 2)")
    start.add_argument("--cpus", type=count, default=4, help="simulated CPUs of each node (default 4)")
    start.add_argument("--gpus", type=count, default=2, help="simulated GPUs of each node (default 2)")
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
        type=setting,
        dest="settings",
        metavar="KEY=VALUE",
        help="value of slurm.conf; may be repeated",
    )


def _folder(arguments: Namespace) -> Path:
    from ..cluster.sandbox.lifecycle import default_folder

    return Path(arguments.dir) if arguments.dir else default_folder()


def _start(arguments: Namespace) -> int:
    """Start it, or restart its dead daemons; print what a shell evaluates."""
    from ..cluster.sandbox import lifecycle
    from ..cluster.sandbox.build import default_prefix

    folder = _folder(arguments)
    before = lifecycle.daemons_alive(folder)
    box = lifecycle.start(
        folder,
        nodes=arguments.nodes,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
        accounting=arguments.accounting,
        prefix=Path(arguments.slurm) if arguments.slurm else None,
        settings=dict(arguments.settings),
    )
    print(f"sousbatch: {_started(box, before)}", file=sys.stderr)
    print(f"export SLURM_CONF={shlex.quote(str(box.conf))}")
    if default_prefix() != Path(box.prefix):  # this shell would find the commands of another Slurm
        print(f'export PATH={shlex.quote(f"{box.prefix}/bin")}:"$PATH"')
    return 0


def _status(arguments: Namespace) -> int:
    """Print its daemons, nodes, partitions and jobs; 1 when a daemon is dead."""
    from ..cluster.sandbox import lifecycle

    found = lifecycle.status(_folder(arguments))
    print(_as_text(found))
    return 0 if all(found.alive.values()) else 1


def _stop(arguments: Namespace) -> int:
    """End its daemons and jobs and remove its folder."""
    from ..cluster.sandbox import lifecycle

    folder = _folder(arguments)
    count = lifecycle.stop(folder)
    outcome = f"ended {count} processes of the sandbox in {folder}" if count else f"no sandbox runs in {folder}"
    print(f"sousbatch: {outcome}", file=sys.stderr)
    return 0


def _started(box: Sandbox, before: Mapping[str, bool]) -> str:
    """Say what a start found and made.

    *before* says which daemons lived; it is empty for a new sandbox.
    """
    dead = [name for name, lives in before.items() if not lives]
    word = f"runs again ({', '.join(dead)} had died)" if dead else "runs already" if before else "runs"
    counts = f"{box.nodes} nodes, each with {box.cpus} simulated CPUs and {box.gpus} simulated GPUs"
    where = box.address if box.is_confined else "every address"
    if not where.startswith("127."):
        where += f" (a line '127.0.0.1 {box.hostname}' in /etc/hosts would keep it to loopback)"
    ends = f"sousbatch sandbox stop --dir {box.folder}"
    return f"a private Slurm {box.version} {word} in {box.folder}: {counts}; it listens at {where}; `{ends}` ends it"


def _as_text(found: Status) -> str:
    """Return the state of a private Slurm: daemons, nodes, partitions, jobs."""
    tables: list[tuple[Sequence[Sequence[str]], Sequence[str]]] = [
        ([[name, "runs" if lives else "is dead"] for name, lives in found.alive.items()], ("daemon", "")),
        (found.nodes, ("node", "state", "CPUs", "GPUs")),
        (found.partitions, ("partition", "state", "longest job", "nodes")),
        (found.jobs, ("job", "partition", "state", "time", "where, or why not", "name")),
    ]
    parts = [f"Slurm {found.box.version} of {found.box.prefix}"]
    parts += [format_table(rows, header=header) for rows, header in tables if rows]
    if not all(found.alive.values()):
        parts.append("`sousbatch sandbox start` restarts what is dead")
    return "\n\n".join(parts)
