"""W&B as a mirror of the ledger: it never fails or delays a job.

The stage process sets the identity in the environment, the same for every attempt.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from ... import files
from ..context import JobContext

logger = logging.getLogger(__name__)


class Tracker:
    """One stage's W&B run, or nothing where tracking is off or W&B does not work."""

    def __init__(self, job: JobContext) -> None:
        self._run: Any = None
        if os.environ.get("WANDB_MODE", "disabled") != "disabled":
            self._safely(lambda: self._start(job))

    def _start(self, job: JobContext) -> None:
        import wandb

        files.make_private_dir(job.paths.tracking_dir)
        facts = {"run": job.paths.run_id, "recipe": job.paths.recipe_name, "stage": job.stage.name}
        self._run = wandb.init(config=facts | {"attempt": job.attempt})
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Add a row. W&B's own step is never given: it would drop the rows of a replayed step."""
        if self._run is not None:
            self._safely(lambda: self._run.log({"step": step, **values}))

    def summary(self, values: dict[str, Any]) -> None:
        """Set final values."""
        if self._run is not None:
            self._safely(lambda: self._run.summary.update(values))

    def finish(self, exit_code: int) -> None:
        """End the run, with the job's exit code."""
        if self._run is not None:
            self._safely(lambda: self._run.finish(exit_code=exit_code))

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # tracking is a mirror: whatever W&B raises, the job goes on
            logger.warning("tracking is off: %s", error)
            self._run = None
