"""W&B as a mirror of the ledger: it never fails or delays a job.

The stage process sets the identity in the environment, the same for every attempt.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ... import files
from ..context import JobContext

logger = logging.getLogger(__name__)


class Tracker:
    """One stage's W&B run, or nothing where tracking is off or W&B does not work."""

    def __init__(self, job: JobContext) -> None:
        self._run: Any = None
        if os.environ.get("WANDB_MODE", "disabled") == "disabled":
            return
        try:
            import wandb

            files.make_private_dir(job.paths.tracking_dir)
            config = {
                "run": job.paths.run_id,
                "recipe": job.paths.recipe_name,
                "stage": job.stage.name,
                "attempt": job.attempt,
            }
            self._run = wandb.init(config=config)
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # tracking is a mirror: whatever W&B raises, the job goes on
            logger.warning("tracking is off: %s", error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Add a row. W&B's own step is never given: it would drop the rows of a replayed step."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step, **values})
        except Exception as error:  # as above
            logger.warning("tracking stops: %s", error)
            self._run = None

    def summary(self, values: dict[str, Any]) -> None:
        """Set final values."""
        if self._run is None:
            return
        try:
            self._run.summary.update(values)
        except Exception as error:  # as above
            logger.warning("tracking stops: %s", error)
            self._run = None

    def finish(self, exit_code: int) -> None:
        """End the run, with the job's exit code."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # as above
            logger.warning("tracking did not finish: %s", error)
        self._run = None
