"""Save the training state once, under a temporary name, and commit it.

transformers writes a ZeRO-3 state twice and rotates by modification time; here each rank
writes its own files once and rank 0 commits.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ... import files
from ...checkpoints import commit
from ...checkpoints.capacity import allocation
from ...checkpoints.commit import Content
from ...checkpoints.retention.save_level import SAVE_LEVELS, SaveLevel
from ...checkpoints.rotation import STATE_NAME
from ...errors import FencedError, NoRoomError
from ...ledger import Ledger
from ...recipes.plan import Batch
from ...recipes.retention import weights_dtype
from ..context import JobContext, say
from .collectives import Ranks, StorageError
from .engines import engine_of
from .engines.base import SavableTrainer
from .rotation import CheckpointRotation, SaveRequest
from .weights_only import largest_weight, safe_dtype, write_weights

Log = Callable[[int, dict[str, Any]], None]
_LAST_WAIT_S = 600.0  # how long the last save waits for a file system that has gone away


class Saver:
    """Writes the checkpoints of one attempt, each at the highest level that fits."""

    def __init__(
        self, job: JobContext, batch: Batch, ranks: Ranks, ledger: Ledger | None, tokenizer: Any, log: Log
    ) -> None:
        self._job, self._batch, self._ranks, self._tokenizer, self._log = job, batch, ranks, tokenizer, log
        self._folder = job.paths.checkpoints(job.stage.name)
        self._rotation = CheckpointRotation(job, batch, ledger) if ranks.rank == 0 else None
        self._engine = engine_of(job.settings)
        self._num_skipped = 0
        self._level: SaveLevel = "full"

    def save(self, trainer: SavableTrainer, *, is_stop: bool = False) -> None:
        """Save in full, else the weights, else nothing; then settle the older ones.

        With *is_stop* the training ends after it, to be resumed later. Every rank calls it. A save that finds no
        space, or a file system that fails, is left out; the next one may succeed.

        Raises:
            NoRoomError: on all ranks, at the last save or when too many in a row were left out;
                the weights are safe wherever there was space for them.
            FencedError: a newer attempt runs.
        """
        request = self._request(trainer, is_stop=is_stop)
        step = request.step
        level, problem = self._save_highest(trainer, "full", request)
        self._num_skipped = 0 if level != "none" else self._num_skipped + 1
        if level != "none":
            if not request.is_last:
                self._report_level(step, level)
            return
        if request.is_last:
            raise NoRoomError(f"the checkpoint of the last step {step} was not saved: {problem}; {self._advice()}")
        limit = None if self._plans_none() else self._job.settings.checkpoints.max_skipped
        if limit is not None and self._num_skipped > limit:
            level, _ = self._save_highest(trainer, "weights", replace(request, is_last=True, is_stop=False))
            what = f"the weights of step {step} are saved" if level == "weights" else "the last checkpoint stands"
            raise NoRoomError(
                f"{self._num_skipped} saves in a row found no space ({problem}); {what}; {self._advice()} "
                "(checkpoints.max_skipped=null continues without them)"
            )
        if self._rotation is not None:
            self._rotation.record_skipped(step, problem)
            say(f"warning: step {step} is not saved: {problem}")

    def _request(self, trainer: SavableTrainer, *, is_stop: bool) -> SaveRequest:
        step = trainer.state.global_step
        size = len(json.dumps(asdict(trainer.state), indent=2)) + 1
        return SaveRequest(step=step, state_bytes=size, is_last=step >= self._batch.steps, is_stop=is_stop)

    def _report_level(self, step: int, level: SaveLevel) -> None:
        """Print when saves begin or cease to hold weights only: a kill costs more then."""
        if level != self._level and self._rotation is not None:
            weights_only = (
                "only weights are saved, because no full state fits; after a kill training resumes from the last one"
            )
            say(f"step {step}: " + (weights_only if level == "weights" else "there is space for full states again"))
        self._level = level

    def _plans_none(self) -> bool:
        """Return whether the plan has space for the final weights alone.

        Then skipped saves are expected.
        """
        kept = self._job.plan.forecast.checkpoints.get(self._job.stage.name)
        return kept is not None and kept.save_level == "none"

    def _advice(self) -> str:
        budget_gb = self._job.settings.checkpoints.budget_gb
        if budget_gb is not None:
            return f"submit again with more than checkpoints.budget_gb={budget_gb:g}, or free some space and resume"
        return "free some space and resume"

    def close(self) -> None:
        """Wait for what runs beside the training; keep only the later stages' space."""
        if self._rotation is not None:
            self._rotation.close()

    def _save_highest(self, trainer: SavableTrainer, highest: SaveLevel, request: SaveRequest) -> tuple[SaveLevel, str]:
        """Save at the highest level that works and return it, or "none" and why."""
        started, level, problem = time.monotonic(), highest, "no space for it"
        while True:
            try:
                level = self._admit(level, request)
                if level != "none":
                    self._save(trainer, level, request, started)
                return level, problem
            except FencedError:
                raise
            except (NoRoomError, StorageError) as error:
                problem = str(error)
                if level == "weights" or isinstance(error, StorageError):
                    return "none", problem
                level = "weights"

    def _admit(self, highest: SaveLevel, request: SaveRequest) -> SaveLevel:
        """Return what fits, as rank 0 finds it; all ranks learn it."""
        found: list[SaveLevel] = ["none"]

        def ask() -> None:
            if self._rotation is not None:
                self._job.check_fence()
                self._wait_for_run_dir(_LAST_WAIT_S if request.is_last else 1)
                found[0] = self._rotation.admit(highest, request)

        self._ranks.do(f"freeing space for the checkpoint of step {request.step}", ask)
        (place,) = self._ranks.from_first([SAVE_LEVELS.index(found[0])])
        return SAVE_LEVELS[place]

    def _wait_for_run_dir(self, timeout_s: float) -> None:
        """Wait for the run's folder: nothing is written in the place of a lost mount."""
        deadline = time.monotonic() + timeout_s
        while not self._job.paths.plan.exists():
            if time.monotonic() > deadline:
                raise FileNotFoundError(errno.ENOENT, "the run's folder is not there", str(self._job.paths.root))
            time.sleep(0.5)

    def _save(self, trainer: SavableTrainer, level: SaveLevel, request: SaveRequest, started: float) -> None:
        step = request.step
        content: Content = "weights" if level == "weights" else "full"
        temporary = commit.temporary_dir(self._folder, step, self._job.attempt, content)
        try:
            self._ranks.do(f"beginning the checkpoint of step {step}", lambda: self._begin(step, content))
            if content == "full":
                self._ranks.do(f"saving the checkpoint of step {step}", lambda: self._write(trainer, temporary))
            else:
                dtype = self._dtype(trainer)
                self._ranks.do(
                    f"saving the weights of step {step}", lambda: self._write_weights(trainer, temporary, dtype)
                )
            self._ranks.do(
                f"committing the checkpoint of step {step}",
                lambda: self._commit(trainer, temporary, content, request, started),
            )
        except Exception:
            if self._ranks.rank == 0:
                files.discard(temporary)
            raise

    def _begin(self, step: int, content: Content) -> None:
        if self._ranks.rank == 0:
            commit.begin(self._folder, step, self._job.attempt, content)

    def _write(self, trainer: SavableTrainer, temporary: Path) -> None:
        self._engine.save_state(trainer, temporary, is_writer=self._ranks.rank == 0)
        trainer._save_rng_state(str(temporary))
        if self._ranks.rank == 0:
            trainer._save_scaler(str(temporary))
            torch.save(trainer.lr_scheduler.state_dict(), temporary / "scheduler.pt")
            self._write_beside(trainer, temporary)
            trainer.state.save_to_json(str(temporary / STATE_NAME))

    def _write_beside(self, trainer: SavableTrainer, temporary: Path) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        is_adapted = hasattr(model, "peft_config")
        model.config.architectures = [type(model.get_base_model() if is_adapted else model).__name__]
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        if is_adapted:
            model.peft_config["default"].save_pretrained(temporary)
        self._tokenizer.save_pretrained(temporary)
        if self._job.settings.model.trust_remote_code:  # the config names these files, and is read with them
            for path in self._job.stage.model.dir_in(self._job.paths).glob("*.py"):
                shutil.copyfile(path, temporary / path.name)

    def _dtype(self, trainer: SavableTrainer) -> str:
        """Return the dtype of a weights-only checkpoint, the same on all ranks."""
        return safe_dtype(weights_dtype(self._job.settings), self._ranks.largest(largest_weight(self._engine, trainer)))

    def _write_weights(self, trainer: SavableTrainer, temporary: Path, dtype: str) -> None:
        is_writer, max_shard_bytes = self._ranks.rank == 0, int(self._job.settings.consolidate.max_shard_gb * 1e9)
        write_weights(self._engine, trainer, temporary, dtype, max_shard_bytes, is_writer=is_writer)
        if is_writer:
            self._write_beside(trainer, temporary)
            files.write_json(temporary / STATE_NAME, {"global_step": trainer.state.global_step})

    def _commit(
        self, trainer: SavableTrainer, temporary: Path, content: Content, request: SaveRequest, started: float
    ) -> None:
        if self._rotation is None:
            return
        step = request.step
        saved = commit.commit(
            temporary,
            step=step,
            attempt=self._job.attempt,
            metric=_metric(trainer, step, self._job.settings.metric_in_logs),
            world_size=trainer.args.world_size,
            check_fence=self._job.check_fence,
            content=content,
        )
        stall_s = round(time.monotonic() - started, 3)
        self._rotation.settle(saved, request, stall_s=stall_s)
        self._log(
            step,
            {
                "storage/held_gb": allocation.measure_usage(self._folder) / 1e9,
                "storage/budget_gb": self._rotation.budget_bytes / 1e9,
                "storage/checkpoint_gb": saved.num_bytes / 1e9,
                "storage/stall_s": stall_s,
                "storage/freed_gb": self._rotation.freed_bytes / 1e9,
                "storage/is_full": int(content == "full"),
            },
        )


def _metric(trainer: SavableTrainer, step: int, name: str) -> float | None:
    """Return the metric that was measured at *step*, if any."""
    for entry in reversed(trainer.state.log_history):
        if entry.get("step") == step and name in entry:
            return float(entry[name])
    return None
