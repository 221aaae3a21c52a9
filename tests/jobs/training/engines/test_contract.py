"""What every sharding engine does on two real ranks: save, load, gather, and hold the bytes that are planned."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sousbatch.checkpoints.sizes import checkpoint_size
from sousbatch.jobs.training import engines as running
from sousbatch.recipes import engines as planning
from sousbatch.recipes.facts import ModelFacts, TensorFacts
from sousbatch.recipes.forecast.parameters import params_of
from sousbatch.recipes.optimizers import moment_bytes
from sousbatch.recipes.schema import Model, Recipe, Train, Zero

pytestmark = pytest.mark.xdist_group("engines")  # one run for all tests
# ZeRO stage and optimizer: the states of each resume to the same weights
CASES: dict[str, tuple[Any, Any]] = {
    "ddp": (0, "adamw_8bit"),
    "deepspeed, stage 1": (1, "adamw_fused"),
    "deepspeed, stage 2": (2, "adamw_8bit"),
    "deepspeed, stage 3": (3, "adamw"),
}
ROOT = Path(__file__).parents[4]
ELSEWHERE = re.compile(r"deepspeed|\bds_(tensor|shape|id)\b|zero\.stage", re.IGNORECASE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two_ranks.py saw of each case."""
    folder = tmp_path_factory.mktemp("engines")
    own = {f"SOUSBATCH_{name}": str(folder / name.lower()) for name in ("STATE", "RUNS", "CACHE")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", Path(__file__).with_name("two_ranks.py"), folder, json.dumps(CASES)],
        env=os.environ | own | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_both_halves_know_the_same_engines_and_each_is_tried_here() -> None:
    assert running.ENGINES.keys() == planning.ENGINES.keys() == {name.partition(",")[0] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_ends_with_the_same_weights(trained: dict[str, Any], case: str) -> None:
    saw = trained[case]["saw"]
    assert saw["1-1-0"]["digest"] != saw["1-2-0"]["digest"] == saw["2-2-0"]["digest"]
    assert "2-1-0" not in saw, "the second attempt began at the first step"


@pytest.mark.parametrize("case", CASES)
def test_every_rank_gathers_the_float32_weights_that_the_saved_state_holds(trained: dict[str, Any], case: str) -> None:
    found = trained[case]
    assert len(found["shapes"]) == 21 and found["unequal"] == []
    for attempt_and_step in ("1-1", "1-2", "2-2"):
        first, second = (found["saw"][f"{attempt_and_step}-{rank}"] for rank in (0, 1))
        assert first["digest"] == second["digest"] and first["shapes"] and second["shapes"]


@pytest.mark.parametrize("case", CASES)
def test_the_largest_weight_is_in_the_part_of_one_rank(trained: dict[str, Any], case: str) -> None:
    first, second = (trained[case]["saw"][f"1-2-{rank}"] for rank in (0, 1))
    assert max(first["largest_part"], second["largest_part"]) == pytest.approx(first["largest"], rel=2**-8)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_measures_the_same_answers_at_each_step(trained: dict[str, Any], case: str) -> None:
    saw = trained[case]["saw"]
    for attempt_and_step, num_steps in (("1-1", 1), ("1-2", 2), ("2-2", 2)):
        first, second = (saw[f"{attempt_and_step}-{rank}"]["metrics"] for rank in (0, 1))
        assert first == second and len(first) == num_steps
    assert saw["2-2-0"]["metrics"] == saw["1-2-0"]["metrics"]


@pytest.mark.parametrize("case", CASES)
def test_the_eval_loss_counts_each_token_once(trained: dict[str, Any], case: str) -> None:
    """Its three rows have targets of unlike length, and two ranks with a row each repeat one."""
    found = trained[case]
    assert found["saw"]["1-2-0"]["losses"][-1] == pytest.approx(found["loss"], rel=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_the_planned_size(trained: dict[str, Any], case: str) -> None:
    """Within the 2 % of the forecast."""
    found, (zero_stage, optimizer) = trained[case], CASES[case]
    train = Train(precision="bfloat16", zero=Zero(stage=zero_stage), optimizer=optimizer)
    recipe = Recipe(name="r", model=Model(path="m"), train=train)
    tensors = tuple(TensorFacts(name=name, shape=tuple(one), dtype="float32") for name, one in found["shapes"].items())
    num_params = sum(math.prod(one.shape) for one in tensors)
    model = ModelFacts(
        folder="",
        tokenizer_folder="",
        digest="",
        has_weights=True,
        num_params=num_params,
        tensors=tensors,
        config={},
    )
    moments = moment_bytes(recipe, model, params_of(recipe, model))
    planned = checkpoint_size(
        states=planning.engine_of(recipe).state_bytes(recipe, 2, moments),
        trainable=num_params,
        frozen=0,
        num_tensors=len(tensors),
        world_size=2,
        adapter=False,
        beside_bytes=6_100,
    )
    assert found["num_bytes"] == pytest.approx(planned.num_bytes, rel=0.02)


def test_nothing_else_of_the_jobs_asks_for_an_engine_by_its_ways() -> None:
    """Code, not words: docstrings and comments may say why."""
    wrong = []
    for path in sorted((ROOT / "jobs").rglob("*.py")):
        if path.parent.name == "engines" or path.name.startswith("zero3_"):  # those of training, and one that generates
            continue
        text = re.sub(r'"""(?s:.*?)"""|#.*', "", path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)}: {found[0]}" for found in ELSEWHERE.finditer(text)]
    assert wrong == []
