"""Find launchers by name, and choose where a submission runs.

A third-party distribution adds a launcher by an entry point of the group `sousbatch.launchers`: a class that keeps the
contract of `base.Launcher`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

from ..cluster.site import Site
from ..errors import NoSlurmError, SlurmError, UnreachableError
from ..plugins import Registry
from ..recipes.plan import Plan
from ..recipes.site_file import with_gpu_memory
from .base import Launcher

WATCH_S = 30.0  # sites ask for no more than a call or two a minute
LOOK_S = 1.0  # one look is the truth of now; in one command it is one call, however many runs there are

OWN = {"local": "launchers.local.launcher:LocalLauncher", "slurm": "launchers.slurm.launcher:SlurmLauncher"}
LAUNCHERS: Registry[Callable[..., Launcher]] = Registry("launcher", "sousbatch.launchers", OWN)


def choose_site(name: str | None) -> Site:
    """Return the site of a launcher; without a *name* the default one.

    The default is Slurm where one is configured, else this machine.

    Raises:
        UsageError: there is no such launcher.
        UnreachableError: there is a Slurm, but it does not answer: nothing runs on its login node instead.
        SlurmError: Slurm refuses, or was asked for by name and is not there.
    """
    if name is None:
        name = "local" if shutil.which("sbatch") is None else None
    try:
        return with_gpu_memory(launcher_named(name or "slurm").read_site())
    except NoSlurmError as error:
        if name is not None:
            advice = "`sousbatch sandbox start` makes one to try with"
            raise NoSlurmError(f"--launcher {name}: no Slurm is configured here ({error}); {advice}") from error
        return launcher_named("local").read_site()
    except UnreachableError as error:
        raise UnreachableError(f"{error}; try again later, or run it here with --launcher local") from error
    except SlurmError as error:
        raise SlurmError(f"{error}; ask the site's administrators, or run it here with --launcher local") from error


def launcher_of(plan: Plan, *, max_age_s: float | None = None) -> Launcher:
    """Return the launcher of a plan; *max_age_s* is that of `launcher_named`."""
    return launcher_named(plan.site.launcher, max_age_s=max_age_s)


def launcher_named(name: str, *, max_age_s: float | None = None) -> Launcher:
    """Return the launcher called *name*.

    For a caller that only looks its answers may be *max_age_s* old.

    Raises:
        UsageError: there is no such launcher here.
    """
    return LAUNCHERS.load(name)(max_age_s=max_age_s)


def watcher(name: str) -> Launcher:
    """Return the launcher called *name* for a caller that looks again and again."""
    return launcher_named(name, max_age_s=WATCH_S)
