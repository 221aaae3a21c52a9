"""Train: `python -m sousbatch.jobs.train RUN STAGE` on every rank.

torchrun or srun starts it.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cluster import processes
from ..errors import EXIT_STOPPED, RunError
from ..events import Resumed
from ..recipes.data.packing import for_use
from ..recipes.optimizers import OPTIMIZERS
from ..recipes.plan import Batch
from ..recipes.schema import StageSettings
from ..recipes.tasks import task_of
from .context import JobContext, importing, run_job
from .showing import show_checkpoints, show_inputs
from .tasks import runtime_of
from .watchdog import Watchdog

if TYPE_CHECKING:  # torch is imported where a rank needs it
    from transformers import Trainer

    from .training.callback import StepCallback
    from .training.collectives import Ranks
    from .training.saver import Log, Saver


def train(job: JobContext) -> int:
    """Train the stage from its last full checkpoint; return 0, or 75 when stopped."""
    if job.batch is None:
        raise RunError(f"stage {job.stage.name!r} has no batch in its plan")
    # torch warns at each collective of DeepSpeed's, on each rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of each model that uses all its parameters
    with importing(), _hidden(*_unused_packages(job.settings)):
        from .training import resume
        from .training.callback import StepCallback
        from .training.collectives import Ranks
        from .training.engines import engine_of
        from .training.trainer import training_arguments

    rank = int(os.environ.get("RANK", "0"))
    watchdog = Watchdog(job.stage.resources.stall_min, rank=rank, tell=job.tell_stalled)
    engine_of(job.settings).start_process_group(job.stage.resources.device)
    arguments = training_arguments(job, job.batch)
    _ = arguments.device  # transformers starts its process group when the device is first asked for
    ranks = Ranks()
    if arguments.world_size != job.batch.world_size:
        raise RunError(f"the plan has {job.batch.world_size} ranks and {arguments.world_size} work together")
    if resume.is_finished(job, ranks):
        if ranks.rank == 0:
            resume.finish(job, job.batch)
        return 0
    last = resume.last_checkpoint(job, ranks)
    ledger = job.open_ledger() if ranks.rank == 0 else None
    node, local_rank = divmod(ranks.rank, job.stage.ranks_per_node)
    tracker = job.open_trackers() if ranks.rank == 0 else None
    if node and local_rank == 0:
        job.open_trackers(node=node)  # which shows what the node measures
    if tracker is not None:
        show_inputs(job, tracker)
    callback = StepCallback(job, job.batch, ranks, ledger, tracker, watchdog)
    log = tracker.log if tracker is not None else lambda step, values: None
    saver, trainer = _trainer(job, job.batch, ranks, arguments, callback, log, watchdog)
    if ledger is not None and last is not None:
        ledger.write(Resumed(step=last.step))
    try:
        trainer.train(resume_from_checkpoint=str(last.path) if last else None)
    finally:
        watchdog.close()
        saver.close()
        if tracker is not None:
            show_checkpoints(job, tracker)
    # rank 0 speaks for all: under srun the first code that is not 0 ends the others, who may still be leaving
    return EXIT_STOPPED if callback.is_stopped and ranks.rank == 0 else 0


def _unused_packages(settings: StageSettings) -> tuple[str, ...]:
    """Return packages that would be imported, and that this training does not use.

    transformers and peft import them wherever they are installed.
    """
    uses_bits = settings.adapter.method == "qlora" or OPTIMIZERS[settings.train.optimizer].package == "bitsandbytes"
    return ("datasets",) if uses_bits else ("datasets", "bitsandbytes")


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Let no module import *packages* meanwhile: each takes every rank a second."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _trainer(
    job: JobContext,
    batch: Batch,
    ranks: Ranks,
    arguments: Any,
    callback: StepCallback,
    log: Log,
    watchdog: Watchdog,
) -> tuple[Saver, Trainer]:
    from transformers import PrinterCallback

    from .training.engines import engine_of
    from .training.measuring import AnswerMetric
    from .training.model import build_model, load_tokenizer
    from .training.saver import Saver
    from .training.trainer import RecipeTrainer

    stage, settings = job.stage, job.settings
    tokenizer = load_tokenizer(settings, stage.model.tokenizer_dir_in(job.paths))
    runtime = runtime_of(task_of(settings.task))
    examples = runtime.examples(settings, Path(stage.splits["train"].path), tokenizer, None)
    eval_examples = None
    if evaluated := stage.splits.get("eval"):
        eval_settings = for_use(settings, "eval")
        eval_examples = runtime.examples(eval_settings, Path(evaluated.path), tokenizer, evaluated.num_rows)
    model = build_model(settings, stage.model.dir_in(job.paths), tokenizer, has_weights=not stage.model.is_random)
    saver = Saver(job, batch, ranks, callback.ledger, tokenizer, log)
    trainer = RecipeTrainer(
        job,
        batch,
        saver,
        callback,
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=eval_examples,
        data_collator=runtime.collator(settings, tokenizer, model),
        compute_loss_func=runtime.loss(settings, examples) if runtime.loss else None,
        metric=AnswerMetric(job, ranks, tokenizer, watchdog.step) if "predict" in stage.splits else None,
    )
    trainer.remove_callback(PrinterCallback)  # it prints on every rank
    engine_of(settings).wrap(trainer)
    return saver, trainer


def main() -> int:
    """Run this rank and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("train", train, sys.argv[1:])


if __name__ == "__main__":
    processes.leave(main())
