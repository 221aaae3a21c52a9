"""Measure how long training stands still at a save.

It is measured beside the plain transformers Trainer's save. One training of 14.8 M parameters under ZeRO-3 on two
ranks, `--saves` times each: every other save is the Trainer's own `_save_checkpoint`, in the same processes. Ours makes
its files durable, commits them and decides what stays; the Trainer's does not wait for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZE = "model.config={hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 8}"


def main() -> None:
    """Run the training and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=6, help="saves of each kind (default 6)")
    saves = parser.parse_args().saves
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "saves.jsonl"
        own = {name: str(Path(folder) / name.lower()) for name in ("STATE", "RUNS")}
        probe = Path(__file__).parent / "saving_probe"
        values = [
            *[SIZE, "data.generator.num_train=512", "data.generator.num_validation=8", "data.generator.num_test=8"],
            *[f"train.steps={2 * saves}", "train.global_batch=4", "train.micro_batch=2", "train.precision=bfloat16"],
            *["checkpoints.every_steps=1", "train.eval_split=null", "tracking.mode=disabled", "stages={train: {}}"],
            f"environment.code=[{json.dumps(str(probe))}]",
        ]
        environment = os.environ | {f"SOUSBATCH_{name}": path for name, path in own.items()} | {"SAVING_OUT": str(out)}
        command = [sys.executable, "-P", "-m", "sousbatch", "submit", "hangul-restoration", *values]
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    print(f"{'save of 177 MB':16}{'median s':>10}{'least s':>10}{'MB written by rank 0':>24}")
    for who in ("ours", "plain"):
        mine = [row for row in rows if row["who"] == who]
        seconds = [row["seconds"] for row in mine]
        written = statistics.median(row["written"] for row in mine) / 1e6
        print(f"{who:16}{statistics.median(seconds):10.2f}{min(seconds):10.2f}{written:24.0f}")


if __name__ == "__main__":
    main()
