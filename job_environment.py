"""Define the environment variables between launcher, stage process and job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

_PREFIX = "SOUSBATCH_"


@dataclass(frozen=True, kw_only=True)
class JobEnvironment:
    """The variables of one process.

    Each field is a variable: SOUSBATCH_ and the field's name in capitals.

    The launcher gives the stage process *task*, and on this machine *job* (its id) and *devices* (a list as
    CUDA_VISIBLE_DEVICES has it). A point of a sweep gives its stage processes *sweep*, the sweep's run id. The stage
    process gives the job the rest: the number of the *attempt*, without which a job was started by hand, its batch
    sizes, the *fallbacks* that it takes for device memory, and on Slurm the path of the *stop_flag*.
    """

    task: int = 0
    job: str | None = None
    devices: str | None = None
    sweep: str | None = None
    attempt: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    fallbacks: str | None = None
    stop_flag: str | None = None

    def to_env(self) -> dict[str, str]:
        """Return the variables; what is None has none."""
        return {variable(name): str(value) for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> JobEnvironment:
        """Read the variables out of *environment*."""
        found: dict[str, int | str] = {}
        for one in fields(cls):
            if (text := environment.get(variable(one.name))) is not None:
                found[one.name] = int(text) if str(one.type).startswith("int") else text
        return cls(**found)  # type: ignore[arg-type]  # each value was converted by its field's type


def variable(name: str) -> str:
    """Return the variable of a field of `JobEnvironment`."""
    return _PREFIX + name.upper()


VARIABLES = frozenset(variable(one.name) for one in fields(JobEnvironment))
