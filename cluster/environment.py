"""The environment that a job takes over from the shell that submits it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..job_environment import VARIABLES
from ..redaction import holds_secret, is_secret
from .processes import PARENT_VARIABLE

# What a shell inside a job, or inside another launcher's, would hand on to this one.
_LEAKING = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SALLOC_", "SPANK_"),
    *("PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_"),
)
_LEAKING_NAMES = frozenset(
    VARIABLES
    | {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    | {PARENT_VARIABLE}
)
# How Slurm's commands find their controller and show who asks (configless login nodes, auth/slurm, auth/jwt).
# They belong to the machine that calls, not to the job: slurmd gives a job its own.
SLURM_CLIENT_NAMES = ("SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_JWKS", "SLURM_SACK_KEY", "SLURM_SACK_SOCKET")


def without_leaks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return *environment* without the variables of a surrounding job.

    SLURM_CONF stays.
    """
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not (name.startswith(_LEAKING) or name in _LEAKING_NAMES)
    }


def slurm_client(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what Slurm's commands need to reach their controller.

    SLURM_CONF is not among it.
    """
    return {name: environment[name] for name in SLURM_CLIENT_NAMES if name in environment}


def handed_on(environment: Mapping[str, str], inherit: Collection[str] = ()) -> dict[str, str]:
    """Return what a job gets of the submitting shell's *environment*.

    What is a secret by its name or its value goes only where *inherit* names it: Slurm keeps
    a job's environment on the controller's disk.
    """
    return {
        name: value
        for name, value in without_leaks(environment).items()
        if name in inherit or not is_secret(name, value)
    }


def withheld(environment: Mapping[str, str], inherit: Collection[str] = ()) -> list[str]:
    """Return the variables that are left out for their values alone."""
    names = (name for name, value in without_leaks(environment).items() if holds_secret(value) and name not in inherit)
    return sorted(name for name in names if not is_secret(name, "a word"))
