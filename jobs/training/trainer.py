"""The training loop: transformers' Trainer, steered at step boundaries that all ranks agree on."""

from __future__ import annotations

import time
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...checkpoints import commit
from ...checkpoints.commit import Checkpoint
from ...errors import DamagedError, RunError
from ...events import Problem, Step
from ...ledger import Ledger
from ...recipes.plan import Batch
from ...recipes.schema import Recipe
from ..context import JobContext, say
from ..watchdog import Watchdog
from . import schedule
from .collectives import Ranks
from .rotation import Keeping
from .saver import Saver, make_deepspeed_safe
from .tracking import Tracker

_CHECK_EVERY_S = 1.0


class RecipeTrainer(Trainer):
    """A Trainer with the recipe's schedule and our way of saving."""

    def __init__(self, job: JobContext, batch: Batch, saver: Saver, **options: Any) -> None:
        super().__init__(**options)
        self._job, self._batch, self._saver = job, batch, saver

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the recipe's schedule over optimizer steps."""
        from torch.optim.lr_scheduler import LambdaLR

        scheduler = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            factor = schedule.factor(
                self._job.recipe.train.schedule,
                steps=self._batch.steps,
                warmup_steps=self._batch.warmup_steps,
                steps_per_epoch=self._batch.steps_per_epoch,
            )
            self.lr_scheduler = scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saver.save(self, is_stop=self.control.should_training_stop)


class Steering(TrainerCallback):
    """Decides at each step boundary what happens next, and writes the ledger and W&B on rank 0."""

    def __init__(
        self,
        job: JobContext,
        batch: Batch,
        ranks: Ranks,
        ledger: Ledger | None,
        tracker: Tracker | None,
        watchdog: Watchdog,
    ) -> None:
        self._job, self._batch, self._ranks, self._watchdog = job, batch, ranks, watchdog
        self.ledger, self._tracker = ledger, tracker
        self._next_check, self._checked_at, self._checked_step = 0, time.monotonic(), 0
        self.is_stopped = False
        self.is_exhausted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._checked_at, self._checked_step, self._next_check = (
            time.monotonic(),
            state.global_step,
            state.global_step + 1,
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._watchdog.step()
        step = state.global_step
        is_due = step % self._batch.save_every_steps == 0 or step >= self._batch.steps
        is_metric = is_due and self._job.recipe.checkpoints.metric == "loss"
        control.should_log = step % args.logging_steps == 0 or step == self._batch.steps or is_metric
        control.should_save = is_due
        control.should_evaluate = is_due and bool(self._job.recipe.train.eval_split)
        control.should_training_stop = step >= self._batch.steps
        if step >= self._next_check and self._is_asked(step) and step < self._batch.steps:
            self.is_stopped = True
            control.should_save, control.should_training_stop = True, True

    def _is_asked(self, step: int) -> bool:
        """Ask rank 0 whether to stop, about once a second, at a step that all ranks know."""
        elapsed, steps = time.monotonic() - self._checked_at, step - self._checked_step
        pause = max(1, int(_CHECK_EVERY_S * steps / max(elapsed, 1e-6)))
        stop, pause = self._ranks.from_first([int(self._job.is_asked_to_stop()), pause])
        self._checked_at, self._checked_step, self._next_check = time.monotonic(), step, step + pause
        return bool(stop)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watchdog.step()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        patience = self._job.recipe.train.patience
        spec = self._job.recipe.checkpoints
        sign = 1 if spec.goal == "lowest" else -1
        found = [sign * entry[spec.metric] for entry in state.log_history if spec.metric in entry]
        if patience is not None and found and len(found) - 1 - found.index(min(found)) >= patience:
            self.is_exhausted = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        values = {
            name: value
            for name, value in (logs or {}).items()
            if isinstance(value, (int, float)) and name != "total_flos"
        }
        if self._ranks.rank == 0 and values.keys() & {"loss", "eval_loss"}:
            shown = ", ".join(
                f"{name} {value:.4g}"
                for name, value in values.items()
                if name in ("loss", "eval_loss", "learning_rate")
            )
            say(f"step {state.global_step} of {self._batch.steps}: {shown}")
        if self.ledger is not None:
            self.ledger.write(Step(step=state.global_step, values=values))
        if self._tracker is not None:
            self._tracker.log(state.global_step, values)


def deepspeed_config(recipe: Recipe) -> dict[str, Any] | None:
    """Return DeepSpeed's config for the recipe, or None where it runs without DeepSpeed."""
    zero, train = recipe.train.zero, recipe.train
    if zero.stage == 0:
        return None
    sharding: dict[str, Any] = {"stage": zero.stage}
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.offload == "both":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": sharding,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "fp16": {"enabled": train.precision == "float16"},
        # torch's AdamW needs no compiler; DeepSpeed's own would be built at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    return _merged(config, zero.config)


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(config)
    for key, value in changes.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return found


def training_arguments(job: JobContext, batch: Batch) -> TrainingArguments:
    """Return the Trainer's arguments."""
    train, is_cpu = job.recipe.train, job.stage.resources.device == "cpu"
    return TrainingArguments(
        output_dir=str(job.paths.checkpoints(job.stage.name)),
        max_steps=batch.steps,
        per_device_train_batch_size=batch.micro_batch,
        per_device_eval_batch_size=batch.micro_batch,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=train.learning_rate,
        optim="adamw_torch" if train.optimizer == "adamw" else "adafactor",
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_epsilon=train.epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bfloat16",
        fp16=train.precision == "float16",
        logging_steps=train.log_every_steps,
        logging_strategy="no",  # the callback decides, so that the last step is logged, saved and measured too
        save_strategy="no",
        eval_strategy="no",
        prediction_loss_only=True,
        seed=job.recipe.seed,
        data_seed=job.recipe.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=is_cpu,
        ddp_backend="gloo" if is_cpu else None,
        accelerator_config={"use_configured_state": is_cpu and train.zero.stage > 0},
        dataloader_pin_memory=not is_cpu,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(job.recipe),
    )


def start_process_group(job: JobContext) -> None:
    """Start the process group where transformers would not: DeepSpeed on a CPU.

    It recognises DeepSpeed by a GPU's backend, so it is handed a state that says so.
    """
    if not job.recipe.train.zero.stage or job.stage.resources.device != "cpu":
        return
    import deepspeed
    import deepspeed.ops
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # its shared-memory extension would be compiled by all ranks at once; gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    state = PartialState(cpu=True, backend="gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    state.distributed_type = DistributedType.DEEPSPEED


def last_checkpoint(job: JobContext, ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint to go on from: the newest full one whose files rank 0 sees as they were committed.

    Raises:
        DamagedError: there are some, and none is as it was committed.
        RunError: a rank does not see it, as on a store that is not shared.
    """
    folder = job.paths.checkpoints(job.stage.name)
    found = [one for one in commit.committed(folder) if one.content == "full"]
    sound = next((one for one in reversed(found) if _is_sound(one, job)), None) if ranks.rank == 0 else None
    attempt, step = ranks.from_first(list(sound.order) if sound else [-1, -len(found)])
    if step < 0:
        raise DamagedError(
            f"no checkpoint in {folder} is as it was committed; `sousbatch checkpoints verify {job.paths.run_id}` says "
            "what is wrong with each, and without them training begins anew"
        )
    if attempt < 0:
        return None
    for one in found:
        if one.order == (attempt, step):
            return one
    raise RunError(f"rank {ranks.rank} does not see the checkpoint of step {step}; all nodes must share the run folder")


def _is_sound(one: Checkpoint, job: JobContext) -> bool:
    """Say whether files are those that were committed, by size and directory; else say what is wrong with one."""
    problems = commit.verify(one, reads_all=False)
    if problems:
        message = f"{one.path}: {problems[0]}; training goes on from an older one, if there is any"
        say(message)
        ledger = job.open_ledger()
        ledger.write(Problem(message=message))
        ledger.close()
    return not problems


def is_finished(job: JobContext, ranks: Ranks) -> bool:
    """Say whether the last step is committed, in full or as weights."""
    last = commit.last_committed(job.paths.checkpoints(job.stage.name))
    is_there = job.batch is not None and last is not None and last.step >= job.batch.steps
    return bool(ranks.from_first([int(is_there)])[0])


def finish(job: JobContext, batch: Batch) -> None:
    """Do what a killed attempt left undone after its last save."""
    ledger = job.open_ledger()
    Keeping(job, batch, ledger).close()
    ledger.close()


def wrap_engine(trainer: Trainer) -> None:
    """Make the DeepSpeed engine safe as soon as it exists."""
    prepare = trainer.accelerator._prepare_deepspeed

    def prepare_and_wrap(*args: Any, **kwargs: Any) -> Any:
        found = prepare(*args, **kwargs)
        if trainer.accelerator.deepspeed_engine_wrapped is not None:  # it also prepares the data loaders
            make_deepspeed_safe(trainer.accelerator.deepspeed_engine_wrapped.engine)
        return found

    trainer.accelerator._prepare_deepspeed = prepare_and_wrap
