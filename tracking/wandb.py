"""Show a task as a run of Weights & Biases.

No other module knows the variables and settings of W&B. Offline runs leave their files in the run's tracking
folder; `wandb sync` sends them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..errors import EXIT_STOPPED
from .identity import Identity

_QUIET = {
    "WANDB_CONSOLE": "off",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "1",
}


class WandbTracker:
    """A W&B run, or what one stage shows in it."""

    _run: Any
    _prefix: str

    def start(self, identity: Identity) -> None:
        """Open the run; attempts after the first one resume it."""
        os.environ.update(_variables(identity))  # some are read when wandb is imported

        import wandb

        self._prefix = identity.prefix
        self._run = wandb.init()
        # an attempt adds itself to what earlier ones wrote, and may have other values of what is not the recipe's
        self._run.config.update(identity.config, allow_val_change=True)
        self._run.define_metric(f"{self._prefix}*", step_metric=f"{self._prefix}step")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a row, without W&B's own step: W&B drops the rows of a repeated step."""
        self._run.log({f"{self._prefix}{name}": value for name, value in {"step": step, **values}.items()})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the run's summary."""
        self._run.summary.update({f"{self._prefix}{name}": value for name, value in values.items()})

    def finish(self, exit_code: int) -> None:
        """Write what is left, and end the run.

        One that saved and left for another attempt is preempted, and not failed.
        """
        if exit_code == EXIT_STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)


def _variables(identity: Identity) -> dict[str, str]:
    variables = _QUIET | {
        "WANDB_MODE": identity.mode,
        "WANDB_PROJECT": identity.project,
        "WANDB_RUN_ID": identity.id,
        "WANDB_NAME": identity.name,
        "WANDB_RUN_GROUP": identity.group,
        "WANDB_JOB_TYPE": identity.job_type,
        "WANDB_NOTES": identity.notes,
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(identity.folder),
        "WANDB_DATA_DIR": str(identity.folder / "data"),
        "WANDB_CACHE_DIR": str(identity.folder / "cache"),
    }
    if identity.tags:
        variables["WANDB_TAGS"] = ",".join(tag.replace(",", ";") for tag in identity.tags)
    if identity.entity:
        variables["WANDB_ENTITY"] = identity.entity
    return variables
