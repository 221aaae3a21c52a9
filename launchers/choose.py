"""Which launcher a submission gets, and which one a run has."""

from __future__ import annotations

import shutil

from ..cluster.site import Site, this_machine
from ..cluster.slurmsite import read_site
from ..errors import NoSlurmError, SlurmError, UnreachableError
from ..recipes.plan import Plan
from .base import Launcher
from .local import LocalLauncher
from .slurm import PATIENCE_S, SlurmLauncher

WATCH_S = 30.0  # sites ask for no more than a call or two a minute


def choose_site(name: str | None) -> Site:
    """Return the site that *name* means: `slurm`, `local`, or None for Slurm if one is configured, else this machine.

    Raises:
        UnreachableError: there is a Slurm, but it does not answer: nothing runs on its login node instead.
        SlurmError: Slurm refuses, or was asked for by name and is not there.
    """
    if name == "local" or (name is None and shutil.which("sbatch") is None):
        return this_machine()
    try:
        return read_site(patience_s=PATIENCE_S)
    except NoSlurmError as error:
        if name == "slurm":
            advice = "`sousbatch sandbox start` makes one to try with"
            raise NoSlurmError(f"--launcher slurm: no Slurm is configured here ({error}); {advice}") from error
        return this_machine()
    except UnreachableError as error:
        raise UnreachableError(f"{error}; try again later, or run it here with --launcher local") from error
    except SlurmError as error:
        raise SlurmError(f"{error}; ask the site's administrators, or run it here with --launcher local") from error


def watchers() -> dict[str, Launcher]:
    """Return the launchers by name, for one who only looks at jobs."""
    return {"local": LocalLauncher(), "slurm": SlurmLauncher(max_age_s=WATCH_S)}


def launcher_of(plan: Plan, *, watches: bool = False) -> Launcher:
    """Return the launcher of a plan; one that only *watches* takes answers that are up to half a minute old."""
    return launcher_named(plan.site.launcher, watches=watches)


def launcher_named(name: str, *, watches: bool = False) -> Launcher:
    """Return the launcher called *name*; *watches* is that of `launcher_of`."""
    if name == "slurm":
        return SlurmLauncher(max_age_s=WATCH_S if watches else 0)
    return LocalLauncher()
