"""The programs of a private Slurm: where they are, and which version.

Slurm's own daemons and commands all come from one prefix, since two versions do not understand each other everywhere.
munged and MariaDB serve any Slurm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...errors import RunError, UsageError
from ..slurm import call
from .config import Sandbox, daemons

PATH = os.pathsep.join(("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"))
_SQL_FOLDERS = ("/usr/share/mysql", "/usr/share/mariadb")

# What is run, and the Debian package that has it: Slurm's own, all from one prefix, and what any Slurm works with.
_SLURM = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
_SLURM_ACCOUNTING = {"slurmdbd": "slurmdbd"}
_OTHER = {"munged": "munge"}
_OTHER_ACCOUNTING = {"mariadbd": "mariadb-server-core"}
_DEBIAN = Path("/usr")


def default_prefix() -> Path:
    """Return the prefix of the Slurm whose sbatch this shell finds.

    Where that Slurm has no daemons, return Debian's prefix.
    """
    sbatch = shutil.which("sbatch")
    prefix = Path(sbatch).resolve().parent.parent if sbatch else _DEBIAN
    return _DEBIAN if _lacking(prefix, _SLURM) else prefix


def missing_packages(*, accounting: bool = False, prefix: Path | None = None) -> tuple[str, ...]:
    """Return the Debian packages that a sandbox needs and this machine lacks.

    *prefix* is that of a Slurm.
    """
    slurm = _SLURM | (_SLURM_ACCOUNTING if accounting else {})
    other = _OTHER | (_OTHER_ACCOUNTING if accounting else {})
    packages = [slurm[binary] for binary in _lacking(prefix or default_prefix(), slurm)]
    return (*packages, *(package for binary, package in other.items() if shutil.which(binary, path=PATH) is None))


def _lacking(prefix: Path, binaries: Iterable[str]) -> list[str]:
    """Return those of Slurm's *binaries* that *prefix* does not have."""
    return [binary for binary in binaries if shutil.which(binary, path=f"{prefix}/sbin:{prefix}/bin") is None]


def version_of(prefix: Path) -> str:
    """Return the version of the Slurm in *prefix*, such as 24.11.5."""
    return call([f"{prefix}/sbin/slurmctld", "-V"], environment={"LANG": "C.UTF-8"}).split()[-1]


def install_command(packages: tuple[str, ...]) -> str:
    """Return the command line that installs Debian packages."""
    sudo = "" if os.getuid() == 0 else "sudo "
    return f"{sudo}apt-get install --no-install-recommends {' '.join(packages)}"


def check_programs(prefix: Path, *, accounting: bool) -> None:
    """Refuse a Slurm, or a machine, that lacks what a sandbox runs.

    Raises:
        UsageError: what is missing, and where it is to be had.
    """
    missing = missing_packages(accounting=accounting, prefix=prefix)
    lacking = _lacking(prefix, _SLURM | (_SLURM_ACCOUNTING if accounting else {}))
    if lacking and prefix != _DEBIAN:
        raise UsageError(
            f"the Slurm in {prefix} lacks {', '.join(lacking)}; name a prefix that has bin/sbatch, sbin/slurmctld and "
            "sbin/slurmd, with accounting sbin/slurmdbd, too"
        )
    if missing:
        raise UsageError(
            f"a sandbox needs {', '.join(missing)}, which this machine lacks; `{install_command(missing)}` installs "
            f"{'it' if len(missing) == 1 else 'them'}"
        )


def make_system_tables(box: Sandbox, environment: Mapping[str, str]) -> None:
    """Give MariaDB its own tables where it has none.

    Without `proc` it has no stored procedures, with which slurmdbd reads what a limit inherits:
    every limit that is not set would read 0. mariadb-install-db is not in Debian's smallest package.
    """
    if (box.database_dir / "mysql").is_dir():
        return
    found = [path for folder in _SQL_FOLDERS for path in sorted(Path(folder).glob("*_system_tables*.sql"))]
    if not found:
        raise RunError(f"sandbox: MariaDB's *_system_tables.sql are in none of {', '.join(_SQL_FOLDERS)}")
    statements = ["create database mysql;\nuse mysql;\n", *(path.read_text() for path in found)]
    database = next(daemon for daemon in daemons(box) if daemon.name == "mariadbd")
    done = subprocess.run(
        (*database.command, "--bootstrap"),
        input="".join(statements),
        capture_output=True,
        text=True,
        env=dict(environment),
    )
    if done.returncode:
        raise RunError(f"sandbox: MariaDB made no system tables: {done.stderr[-400:].strip()}")
