"""Train: `python -m sousbatch.jobs.train RUN STAGE` on every rank, started by torchrun."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

from ..cluster import processes
from ..errors import EXIT_STOPPED, RunError
from .context import JobContext, run_job


def train(job: JobContext) -> int:
    """Train the stage from its last committed checkpoint; return 0, or 75 when asked to stop."""
    # torch warns at each collective of DeepSpeed's, on each rank
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    if job.batch is None:
        raise RunError(f"stage {job.stage.name!r} has no batch in its plan")
    from transformers import PrinterCallback

    from .training import loop
    from .training.data import Collator, load_rows, pad_id
    from .training.model import build_model, load_tokenizer
    from .training.saving import Saver
    from .training.together import Ranks
    from .training.tracking import Tracker

    last = loop.last_checkpoint(job)
    if last is not None and last.step >= job.batch.steps:
        return 0
    loop.start_process_group(job)
    arguments = loop.training_arguments(job, job.batch)
    _ = arguments.device  # transformers starts its process group when the device is first asked for
    ranks = Ranks()
    if int(os.environ.get("WORLD_SIZE", "1")) != job.batch.world_size:
        raise RunError(f"the plan has {job.batch.world_size} ranks and {os.environ.get('WORLD_SIZE')} were started")
    folder, inputs = job.base_model_dir(), job.plan.inputs
    tokenizer = load_tokenizer(job.recipe, folder)
    splits = inputs.splits
    rows = load_rows(job.recipe.data, Path(splits["train"].path), tokenizer)
    held_out = job.recipe.train.eval_split
    eval_rows = (
        load_rows(job.recipe.data, Path(splits[held_out].path), tokenizer, limit=job.recipe.train.eval_rows)
        if held_out
        else None
    )
    model = build_model(job.recipe, folder, tokenizer, has_weights=inputs.model.has_weights or job.stage.of is not None)
    is_first = ranks.rank == 0
    ledger = job.open_ledger() if is_first else None
    tracker = Tracker(job) if is_first else None
    steering = loop.Steering(job, job.batch, ranks, ledger, tracker)
    trainer = loop.RecipeTrainer(
        job,
        job.batch,
        Saver(job, ranks, ledger, tokenizer),
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=Collator(pad_id(tokenizer)),
        callbacks=[steering],
    )
    trainer.remove_callback(PrinterCallback)  # it prints on every rank
    if trainer.is_deepspeed_enabled:
        loop.wrap_engine(trainer)
    if ledger is not None and last is not None:
        ledger.write("resumed", step=last.step)
    trainer.train(resume_from_checkpoint=str(last.path) if last else None)
    code = EXIT_STOPPED if steering.is_stopped else 0
    if tracker is not None:
        tracker.finish(code)
    return code


def main() -> int:
    """Run this rank and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("train", train, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
