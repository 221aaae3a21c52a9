"""`sousbatch doctor`: what this machine offers and lacks.

Each lack comes with the command that fixes it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..cluster.ports import free_port
from ..cluster.sandbox.build import install_command, missing_packages
from ..cluster.site import this_machine
from ..cluster.slurm import call
from ..cluster.slurm_site import read_site
from ..errors import NoSlurmError, SlurmError
from ..recipes.inspect.inputs import measure_disk_space
from ..user_folders import cache_dir, runs_dir, state_dir
from .parser import Parser, add_runs_option, define
from .tables import format_size

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "hydra-core", "submitit", "wandb", "fsspec")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was examined. *is_good* is None for what is merely good to know."""

    what: str
    finding: str
    is_good: bool | None = None
    remedy: str = ""


def define_doctor(parser: Parser) -> None:
    """Define `doctor`."""
    define(parser, _doctor, "doctor")
    add_runs_option(parser)


def _doctor(arguments: Namespace) -> int:
    print(_as_text(examine(runs_dir(arguments.runs))))
    return 0


def examine(runs: Path) -> tuple[Finding, ...]:
    """Examine this machine; *runs* is the folder that will hold runs."""
    return (*_python(), *_machine(), *_stores(runs), *_compiler(), *_optional())


def _python() -> Iterator[Finding]:
    yield Finding(
        what="python", finding=f"{platform.python_version()} at {sys.executable}", is_good=sys.version_info >= (3, 10)
    )
    for name in _PACKAGES:
        try:
            yield Finding(what=name, finding=importlib.metadata.version(name), is_good=True)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                what=name, finding="not installed", is_good=False, remedy=f"{sys.executable} -m pip install {name}"
            )


def _machine() -> Iterator[Finding]:
    site = this_machine()
    yield Finding(
        what="cores and memory", finding=f"{site.cpus_per_node} cores, {format_size(site.memory_bytes)}", is_good=True
    )
    if site.gpus_per_node:
        yield Finding(
            what="GPUs", finding=f"{site.gpus_per_node} with {format_size(site.gpu_memory_bytes)} each", is_good=True
        )
    else:
        yield Finding(
            what="GPUs",
            finding="none seen by nvidia-smi",
            remedy="recipes run on the CPU with resources.default.device=cpu",
        )
    try:
        yield Finding(what="ports", finding=f"such as {free_port()} on loopback", is_good=True)
    except OSError as error:
        yield Finding(
            what="ports",
            finding=str(error),
            is_good=False,
            remedy="ranks meet on a port of 127.0.0.1; free one between 10000 and 60000",
        )
    yield _slurm()
    missing = missing_packages(accounting=True)
    yield Finding(
        what="sandbox",
        finding=f"lacks {', '.join(missing)}" if missing else "everything that a private Slurm needs is installed",
        is_good=None if missing else True,
        remedy=install_command(missing) if missing else "",
    )


def _slurm() -> Finding:
    """Say which Slurm sbatch belongs to, and whether its controller answers."""
    where = shutil.which("sbatch")
    if where is None:
        return Finding(what="Slurm", finding="no sbatch: stages run on this machine")
    try:
        return Finding(what="Slurm", finding=f"{where}; {read_site().name} answers", is_good=True)
    except NoSlurmError:
        return Finding(what="Slurm", finding=f"{where}, and no Slurm is configured: stages run on this machine")
    except SlurmError as error:
        return Finding(
            what="Slurm",
            finding=f"{where}, {_version(where)}, but {error}",
            is_good=False,
            remedy="ask the administrator; `sousbatch sandbox start` makes a Slurm to try with, and --launcher local "
            "runs recipes on this machine",
        )


def _version(sbatch: str) -> str:
    try:
        return call([sbatch, "--version"]).strip()
    except SlurmError:  # it reads slurm.conf for that, too
        return "whose version is unknown"


def _stores(runs: Path) -> Iterator[Finding]:
    room = measure_disk_space(runs)
    yield Finding(
        what="space for runs",
        finding=f"{format_size(max(0, room.free_bytes))} ({room.source}) and {room.free_inodes:,} files at {runs}",
        is_good=room.free_bytes > 10**9,
        remedy="" if room.free_bytes > 10**9 else "choose a folder with more free space: --runs DIR or SOUSBATCH_RUNS",
    )
    stores = (
        ("runs folder", runs, "--runs, SOUSBATCH_RUNS"),
        ("state folder", state_dir(), "SOUSBATCH_STATE"),
        ("cache folder", cache_dir(), "SOUSBATCH_CACHE"),
    )
    for what, folder, names in stores:
        try:
            files.make_private_dir(folder)
            with (
                files.locked(folder / ".doctor", wait=False) as first,
                files.locked(folder / ".doctor", wait=False) as second,
            ):
                works = first is not None and second is None
            (folder / ".doctor").unlink()
            yield Finding(
                what=what,
                finding=f"{folder}, locks {'work' if works else 'do NOT work'}",
                is_good=works,
                remedy="" if works else f"put it where flock works: {names}",
            )
        except OSError as error:
            yield Finding(
                what=what,
                finding=str(error),
                is_good=False,
                remedy=f"name a folder you can write to: {names}",
            )


def _compiler() -> Iterator[Finding]:
    """Say what DeepSpeed's just-in-time extensions would add.

    Nothing here needs them.
    """
    found = shutil.which("g++") or shutil.which("c++")
    yield Finding(
        what="C++ compiler",
        finding=found or "none, and none is needed",
        remedy="with one, DeepSpeed could build CPU Adam (faster steps with offload) and shared-memory communication "
        "(faster CPU ranks); sousbatch uses torch's own instead and never builds them",
    )


def _has_wandb_key() -> bool:
    from ..tracking.wandb_server import NoKeyError, find_server

    try:
        find_server(os.environ)
    except NoKeyError:
        return False
    return True


def _optional() -> Iterator[Finding]:
    yield _installed("bitsandbytes", "4-bit weights for adapter=qlora, and predict.load_in")
    yield _installed("pyarrow", "Parquet files in and out")
    has_key = _has_wandb_key()
    yield Finding(
        what="W&B key",
        finding="there" if has_key else "none: runs are tracked offline",
        remedy="" if has_key else "wandb login, then sousbatch sync",
    )
    has_token = "HF_TOKEN" in os.environ or (Path.home() / ".cache/huggingface/token").is_file()
    yield Finding(
        what="hub token",
        finding="there" if has_token else "none: gated models cannot be fetched",
        remedy="" if has_token else "hf auth login",
    )


def _installed(name: str, what_for: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(
            what=name, finding=f"not installed; it gives {what_for}", remedy=f"{sys.executable} -m pip install {name}"
        )
    return Finding(what=name, finding=f"{importlib.metadata.version(name)}, for {what_for}", is_good=True)


def _as_text(found: Sequence[Finding]) -> str:
    """Return the doctor's findings, each with the command that fixes it."""
    marks = {True: "ok", False: "LACKS", None: "-"}
    lines = []
    for one in found:
        lines.append(
            f"{marks[one.is_good]:6}{one.what}: {one.finding}" + (f"\n      {one.remedy}" if one.remedy else "")
        )
    return "\n".join(lines)
