"""What a job may take over from the shell that submits it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from .processes import PARENT_VARIABLE

# What a shell inside a job, or inside another launcher's, would hand on to this one.
_LEAKING = (
    *("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SALLOC_", "SPANK_"),
    *("PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_"),
)
_LEAKING_NAMES = frozenset(
    {
        f"SOUSBATCH_{name}"
        for name in ("TASK", "DEVICES", "JOB", "ATTEMPT", "MICRO_BATCH", "ACCUMULATION", "STOP_FLAG", "POINT")
    }
    | {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    | {PARENT_VARIABLE}
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)


def without_leaks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return *environment* less what belongs to a job that the shell is part of; SLURM_CONF stays."""
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not (name.startswith(_LEAKING) or name in _LEAKING_NAMES)
    }


def handed_on(environment: Mapping[str, str], inherit: Collection[str] = ()) -> dict[str, str]:
    """Return what a job gets of the submitting shell's *environment*: all but leaks, and secrets only by name.

    A variable whose name looks like a secret's goes only where *inherit* names it: Slurm keeps
    a job's environment on the controller's disk.
    """
    return {
        name: value for name, value in without_leaks(environment).items() if name in inherit or not _SECRET.search(name)
    }
