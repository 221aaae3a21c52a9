"""Save the training state once, under a temporary name; commit it, then rotate.

transformers writes a ZeRO-3 state twice and rotates by modification time; here each rank
writes its own files once and rank 0 commits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from ... import files
from ...checkpoints import commit
from ...checkpoints.commit import Checkpoint
from ...checkpoints.retention import Policy
from ...checkpoints.rotate import rotate
from ...errors import NoRoomError
from ...ledger import Ledger
from ...recipes.forecast import checkpoint_of
from ..context import JobContext
from .together import Ranks


class Saver:
    """Writes the checkpoints of one attempt."""

    def __init__(self, job: JobContext, ranks: Ranks, ledger: Ledger | None, tokenizer: Any) -> None:
        self._job, self._ranks, self._ledger, self._tokenizer = job, ranks, ledger, tokenizer
        self._folder = job.paths.checkpoints(job.stage.name)
        policy = job.recipe.checkpoints
        self._policy = Policy(
            keep_last=policy.keep_last,
            keep_best=policy.keep_best,
            keep_every_steps=policy.keep_every_steps,
            goal=policy.goal,
        )

    def save(self, trainer: Any) -> None:
        """Save, commit and rotate; every rank calls it.

        Raises:
            NoRoomError: on all ranks; what was committed before stands.
            FencedError: a newer attempt runs.
        """
        step, started = trainer.state.global_step, time.monotonic()
        temporary = commit.temporary_dir(self._folder, step, self._job.attempt)
        try:
            self._ranks.do(f"making room for the checkpoint of step {step}", lambda: self._begin(step))
            self._ranks.do(f"saving the checkpoint of step {step}", lambda: self._write(trainer, temporary))
            self._ranks.do(
                f"committing the checkpoint of step {step}", lambda: self._commit(trainer, temporary, step, started)
            )
        except Exception:
            if self._ranks.rank == 0:
                files.remove_tree(temporary)
            raise

    def _begin(self, step: int) -> None:
        if self._ranks.rank != 0:
            return
        self._job.check_fence()
        commit.begin(self._folder, step, self._job.attempt)
        need, room = self._expected_bytes(), os.statvfs(self._folder)
        free = room.f_bavail * room.f_frsize
        if need > free:
            raise NoRoomError(
                f"the checkpoint of step {step} needs {need:,} bytes and {self._folder} can take {free:,}"
            )

    def _expected_bytes(self) -> int:
        """Return the size of the next checkpoint: that of the last one, or the forecast of the first."""
        last = commit.last_committed(self._folder)
        world_size = self._job.batch.world_size if self._job.batch else 1
        return (
            last.num_bytes
            if last
            else checkpoint_of(self._job.recipe, self._job.plan.inputs.model, world_size).num_bytes
        )

    def _write(self, trainer: Any, temporary: Path) -> None:
        if trainer.is_deepspeed_enabled:
            _save_deepspeed(trainer, temporary)
        elif self._ranks.rank == 0:
            trainer.save_model(str(temporary), _internal_call=True)
            torch.save(trainer.optimizer.state_dict(), temporary / "optimizer.pt")
        trainer._save_rng_state(str(temporary))
        if self._ranks.rank == 0:
            trainer._save_scaler(str(temporary))
            torch.save(trainer.lr_scheduler.state_dict(), temporary / "scheduler.pt")
            model = trainer.accelerator.unwrap_model(trainer.model)
            model.config.save_pretrained(temporary)
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(temporary)
            if hasattr(model, "peft_config"):
                model.peft_config["default"].save_pretrained(temporary)
            self._tokenizer.save_pretrained(temporary)
            trainer.state.save_to_json(str(temporary / "trainer_state.json"))

    def _commit(self, trainer: Any, temporary: Path, step: int, started: float) -> None:
        if self._ranks.rank != 0:
            return
        saved = commit.commit(
            temporary,
            step=step,
            attempt=self._job.attempt,
            metric=_metric(trainer, step, self._job.recipe.checkpoints.metric),
            world_size=trainer.args.world_size,
            check_fence=self._job.check_fence,
        )
        self._record("saved", saved, seconds=round(time.monotonic() - started, 3))
        for gone in rotate(self._folder, self._policy, self._job.check_fence):
            self._record("removed", gone)

    def _record(self, kind: str, checkpoint: Checkpoint, **data: Any) -> None:
        if self._ledger is not None:
            self._ledger.write(
                kind, step=checkpoint.step, num_bytes=checkpoint.num_bytes, metric=checkpoint.metric, **data
            )


def _metric(trainer: Any, step: int, name: str) -> float | None:
    """Return the metric that was measured at *step*, if any."""
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") == step and name in entry:
            return float(entry[name])
    return None


def _save_deepspeed(trainer: Any, temporary: Path) -> None:
    engine = trainer.model_wrapped
    safe = engine.checkpoint_engine
    safe.error = None
    engine.save_checkpoint(
        str(temporary), save_latest=False, exclude_frozen_parameters=hasattr(trainer.model, "peft_config")
    )
    if safe.error is not None:
        raise safe.error
    if engine.global_rank == 0:
        (temporary / "latest").write_text(f"global_step{engine.global_steps}")


def make_deepspeed_safe(engine: Any) -> None:
    """Make a DeepSpeed engine read and write its files in a way that neither hangs nor runs code.

    A write that fails on one rank is remembered until all have passed the engine's barriers,
    and a file is read by the restricted unpickler with the few classes that DeepSpeed stores.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    class SafeEngine(TorchCheckpointEngine):
        error: Exception | None = None

        def save(self, state_dict: Any, path: str) -> None:
            try:
                with open(path, "wb") as stream:
                    torch.save(state_dict, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
                self.error = self.error or error

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            try:
                os.makedirs(path, exist_ok=exist_ok)
            except OSError as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> Any:
            with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum]):
                return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine = SafeEngine(None)
    # Its copy of zero_to_fp32.py beside every checkpoint is not needed, and would raise on rank 0 alone.
    engine._copy_recovery_script = lambda save_path: None
