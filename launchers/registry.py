"""Which launcher a submission gets, and which one a run has."""

from __future__ import annotations

import shutil

from ..cluster.site import Site, this_machine
from ..cluster.slurm_site import read_site
from ..errors import NoSlurmError, SlurmError, UnreachableError
from ..recipes.plan import Plan
from .base import Launcher
from .local.launcher import LocalLauncher
from .slurm.launcher import PATIENCE_S, SlurmLauncher

WATCH_S = 30.0  # sites ask for no more than a call or two a minute
LOOK_S = 1.0  # one look is the truth of now; in one command it is one call, however many runs there are


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


def launcher_of(plan: Plan, *, max_age_s: float | None = None) -> Launcher:
    """Return the launcher of a plan; *max_age_s* is that of `launcher_named`."""
    return launcher_named(plan.site.launcher, max_age_s=max_age_s)


def launcher_named(name: str, *, max_age_s: float | None = None) -> Launcher:
    """Return the launcher called *name*; for one who only looks its answers may be *max_age_s* old."""
    if name == "slurm":
        return SlurmLauncher(max_age_s=max_age_s)
    return LocalLauncher()
