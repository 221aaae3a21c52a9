"""Send what a run made away: `python -m sousbatch.jobs.publish RUN STAGE`."""

from __future__ import annotations

import signal
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

from ..cluster import processes
from ..events import Published
from ..publishing.send import send
from ..publishing.store import open_store
from .context import JobContext, run_job, say
from .publication import gather


def publish(job: JobContext) -> int:
    """Publish the model that the stage works on, and what the stages above it left."""
    spec, plan = job.settings.publish, job.plan
    assert spec.url is not None, "checked when it was planned"
    above = list(takewhile(lambda stage: stage.name != job.stage.name, plan.stages))
    with tempfile.TemporaryDirectory(prefix="sousbatch-") as folder:
        work = Path(folder)
        contents = gather(job.paths, plan, spec.what, model_stage=job.stage.of, stages=above, work=work)
        store = open_store(spec.url, is_private=spec.private)
        done = send(contents.about, contents.files, store, work=work, before_each=job.check_fence, say=say)
    event = Published(url=spec.url, num_files=done.num_files, num_bytes=done.num_bytes, digest=contents.about["model"])
    ledger = job.open_ledger()
    ledger.write(event)
    ledger.close()
    job.open_trackers().summary({"published": spec.url})
    say(f"{done.num_files} files are at {spec.url}, {done.num_sent} of them sent now")
    return 0


def main() -> int:
    """Run this job and return its exit code."""
    processes.die_with_parent(signal.SIGKILL)
    return run_job("publish", publish, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
