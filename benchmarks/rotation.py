"""Measure planning what goes and what stays over many checkpoints.

The plan is pure, so CPU seconds say it all. Run as `python benchmarks/rotation.py`.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.decisions import make_room
from sousbatch.checkpoints.retention.policies import standard_rules

COUNT, REPEATS = 10_000, 21


def main() -> None:
    """Print the median and the least of the CPU milliseconds that one plan takes."""
    many = [
        Checkpoint(
            path=Path(f"/checkpoints/step-{step:08d}"),
            status="committed",
            step=step,
            attempt=1,
            metric=float(step % 97),
            num_bytes=1_000_000,
        )
        for step in range(COUNT)
    ]
    rules, took = standard_rules(keep_last=3, keep_best=5, keep_every_steps=10), []
    for _ in range(REPEATS):
        started = time.process_time()
        make_room(many, rules, need_bytes=10**7, free_bytes=0, weights_bytes=200_000)
        took.append(1000 * (time.process_time() - started))
    print(f"{COUNT} checkpoints: median {statistics.median(took):.1f} ms, least {min(took):.1f} ms")


if __name__ == "__main__":
    main()
