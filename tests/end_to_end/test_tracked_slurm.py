"""What a private Slurm requeues arrives at a stand-in for W&B as one run, online and by a sync."""

from __future__ import annotations

import subprocess
from collections import Counter
from dataclasses import replace

import pytest

from ..tracking.stand_in import StandIn
from .conftest import SMALL, wait_for

STEPS, ROUNDS = 12, ("train.steps=12", "train.log_every_steps=1", "checkpoints.every_steps=4")
# One process a task: what is looked at is what arrives, and four points share two cores.
POINT = [
    *SMALL[:-1],
    *ROUNDS,
    "train.zero.stage=0",
    "resources.train.nodes=1",
    "resources.predict.tasks=1",
    "data.generator.num_validation=8",
    "data.generator.num_test=6",
    "stages={train: {}, consolidate: {}}",
]


@pytest.fixture
def server():
    found = StandIn()
    yield found
    found.close()


def _shell(place, server, mode):
    return replace(place, shell=server.variables() | {"WANDB_MODE": mode})


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_sweep_with_a_requeued_point_is_four_runs(place, slurm, server, mode):
    shell = _shell(place, server, mode)
    slow = place.hook("is_first and step >= 6 and time.sleep(0.5)")
    axes = ["--sweep", "train.learning_rate=1e-3,3e-3", "seed=1,2"]
    inherit = "environment.inherit=[WANDB_API_KEY]"
    client = shell.start("submit", "hangul-restoration", "--launcher", "slurm", *POINT, inherit, slow, *axes)
    out, err = client.communicate(timeout=400)
    print(out, err)
    print(shell.run("status").stdout)
    for name, run in server.runs.items():
        print(name, run.given, run.config, run.summary, run.endings, len(run.rows))
    assert 0
