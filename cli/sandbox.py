"""What the verbs of `sousbatch sandbox` do."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from . import show


def _folder(arguments: Namespace) -> Path:
    from ..cluster.sandbox.lifecycle import default_folder

    return Path(arguments.dir) if arguments.dir else default_folder()


def start(arguments: Namespace) -> int:
    """Start it, or what of it has died; print what a shell evaluates."""
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
    print(f"sousbatch: {show.sandbox_started(box, before)}", file=sys.stderr)
    print(f"export SLURM_CONF={shlex.quote(str(box.conf))}")
    if default_prefix() != Path(box.prefix):  # this shell would find the commands of another Slurm
        print(f'export PATH={shlex.quote(f"{box.prefix}/bin")}:"$PATH"')
    return 0


def status(arguments: Namespace) -> int:
    """Print its daemons, nodes, partitions and jobs; 1 when a daemon is dead."""
    from ..cluster.sandbox import lifecycle

    found = lifecycle.status(_folder(arguments))
    print(show.sandbox(found))
    return 0 if all(found.alive.values()) else 1


def stop(arguments: Namespace) -> int:
    """End its daemons and jobs and remove its folder."""
    from ..cluster.sandbox import lifecycle

    folder = _folder(arguments)
    count = lifecycle.stop(folder)
    said = f"ended {count} processes of the sandbox in {folder}" if count else f"nothing of a sandbox runs in {folder}"
    print(f"sousbatch: {said}", file=sys.stderr)
    return 0
