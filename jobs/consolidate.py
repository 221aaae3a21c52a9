"""Make a model of a checkpoint: `python -m sousbatch.jobs.consolidate RUN STAGE`."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace

from .. import ledger
from ..checkpoints.choice import choose_checkpoint
from ..checkpoints.consolidation.consolidate import consolidate as write_model
from ..checkpoints.consolidation.manifest import MANIFEST_NAME, Manifest, verify_manifest
from ..checkpoints.consolidation.options import ConsolidateOptions
from ..checkpoints.formats.lora import UnmergeableError
from ..checkpoints.formats.tensors import Source
from ..checkpoints.integrity import open_verified
from ..cluster import processes
from ..errors import NotFoundError, RunError
from ..events import ModelWritten
from ..files import TEMPORARY_PREFIX, discard, make_private_dir
from ..ledger_queries import has_model
from ..recipes.retention import consolidate_options
from .context import JobContext, run_job
from .merging import merge_with_peft
from .showing import show_model


def consolidate(job: JobContext) -> int:
    """Write the model of the best or last checkpoint; leave a finished one as it is.

    Each task of an array writes its share of the weight files, and the last to end makes the model appear.
    """
    target = job.paths.model(job.stage.name)
    manifest = verify_manifest(target) if (target / MANIFEST_NAME).is_file() else _write(job)
    if manifest is None:
        print(f"sousbatch: task {job.task} of {job.stage.num_tasks} is done, others are not", flush=True)
    elif _is_reported(job, manifest):
        print(f"sousbatch: {target} is there already: {str(manifest.digest)[:12]}", flush=True)
    else:
        _report(job, manifest)
    return 0


def _is_reported(job: JobContext, manifest: Manifest) -> bool:
    """Say whether the ledger knows the model: a kill may have come before the record."""
    events = ledger.read(job.paths.ledger_dir)
    return has_model(events, job.stage.name, manifest.digest)


def _write(job: JobContext) -> Manifest | None:
    assert job.stage.train_stage is not None, "a consolidate stage works on a train stage"
    folder, spec, model = job.paths.checkpoints(job.stage.train_stage), job.settings.consolidate, job.stage.model
    try:
        chosen = choose_checkpoint(folder, spec.choose, job.settings.goal)
    except NotFoundError as error:
        raise RunError(f"{error}; `sousbatch resume {job.paths.run_id}` trains on") from error
    measured = f"metric {chosen.metric:.6g}" if chosen.metric is not None else "not measured"
    print(f"sousbatch: the chosen checkpoint ({spec.choose}) is step {chosen.step}, {measured}", flush=True)
    is_adapter = job.settings.adapter.method != "full"
    make_private_dir(job.paths.model(job.stage.name).parent)
    base = model.dir_in(job.paths) if is_adapter else None
    options = consolidate_options(job.stage, chosen, base)

    def write(source: Source, options: ConsolidateOptions) -> Manifest | None:
        return write_model(
            source,
            job.paths.model(job.stage.name),
            options,
            part=job.task,
            num_parts=job.stage.num_tasks,
            before_commit=job.check_fence,
        )

    try:
        return write(open_verified(chosen.path), options)
    except UnmergeableError as error:
        if base is None:
            raise
        print(f"sousbatch: peft merges the adapter in memory: {error}", flush=True)
    folder = job.paths.model(job.stage.name).parent / f"{TEMPORARY_PREFIX}{job.stage.name}.peft-{job.task}"
    tokenizer = model.tokenizer_dir_in(job.paths)
    adapter = open_verified(chosen.path, is_raw=True)
    try:
        merged = merge_with_peft(job.settings, adapter, base, tokenizer, folder)
        return write(merged, replace(options, base_dir=None))
    finally:
        discard(folder)


def _report(job: JobContext, manifest: Manifest) -> None:
    written = ModelWritten(
        digest=manifest.digest,
        num_params=manifest.num_params,
        num_bytes=manifest.num_bytes,
        dtype=manifest.dtype,
        step=manifest.step,
        num_overflowing=sum(manifest.num_overflowing.values()),
    )
    writer = job.open_ledger()
    writer.write(written)
    writer.close()
    tracker = job.open_trackers()
    tracker.summary(written.data())
    show_model(job, tracker, written)


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("consolidate", consolidate, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
