"""Searches: what they draw from, what they refuse, what is best, and laying the best over a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.cluster.site import Site
from sousbatch.errors import NotFoundError, PlanError, RecipeError, UsageError
from sousbatch.events import Frozen, Trial, TrialEnded
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.launchers.submission import resume
from sousbatch.recipes import overrides
from sousbatch.recipes.compose import compose
from sousbatch.recipes.plan import Axis, Plan, read_plan
from sousbatch.recipes.search import plan_search, with_values
from sousbatch.recipes.sweep import point_recipe
from sousbatch.run_folder import RunPaths

HERE = Site(
    name="here", launcher="local", cpus_per_node=4, memory_bytes=16 * 10**9, gpus_per_node=0, gpu_memory_bytes=0
)
RATE = "train.learning_rate=tag(log, interval(1e-5,1e-2))"


def made(project: Path, *spaces: str, texts: Sequence[str] = (), num_trials: int = 20, **options: Any) -> Plan:
    return plan_search("./small.yaml", texts, spaces, HERE, project / "runs", num_trials=num_trials, **options)


SPACES = {
    "seed=1,2": Axis(key="seed", choices=("1", "2")),
    "train.schedule.name=choice(linear,cosine)": Axis(key="train.schedule.name", choices=("linear", "cosine")),
    "data.separator='a, b',c": Axis(key="data.separator", choices=("'a, b'", "c")),
    "adapter.rank=range(4,65,4)": Axis(key="adapter.rank", low=4, high=64, step=4),
    "train.weight_decay=range(0,0.3,0.1)": Axis(key="train.weight_decay", choices=("0.0", "0.1", "0.2")),
    "train.weight_decay=interval(0,0.1)": Axis(key="train.weight_decay", low=0, high=0.1),
    "train.steps=int(interval(50,200))": Axis(key="train.steps", low=50, high=200, step=1),
    "adapter.rank=int(tag(log, interval(1,64)))": Axis(key="adapter.rank", low=1, high=64, step=1, is_log=True),
    RATE: Axis(key="train.learning_rate", low=1e-5, high=1e-2, is_log=True),
}


@pytest.mark.parametrize(("text", "axis"), SPACES.items(), ids=SPACES)
def test_a_space_is_written_as_for_hydras_optuna_sweeper(text: str, axis: Axis) -> None:
    faults: list[Any] = []
    assert overrides.spaces([text], faults) == [axis] and not faults


REFUSED = {
    "seed=1": "is nothing to search",
    "seed": r"write key=a,b, key=range\(low,high,step\) or key=interval",
    "train.steps=int(interval(50,200)": r"write key=a,b, key=range\(low,high,step\) or key=interval",
    "train.weight_decay=interval(0,1,2)": r"write key=a,b, key=range\(low,high,step\) or key=interval",
    "train.steps=glob(*)": "name the values",
    "train.steps=interval(2,4)": r"is a whole number \(write train.steps=int\(interval\(2,4\)\)\)",
    "schedule=linear,cosine": "changes what is read",
    "nope.rate=interval(0,1)": "nope is not a key",
    "seed=choice(1)": "has one value",
    "train.weight_decay=interval(1,0)": "has nothing between its ends",
    "train.learning_rate=tag(log, interval(0,1))": "has nothing between its ends",
    "train.learning_rate=tag(logarithm, interval(1e-5,1))": "has the tag logarithm",
    "resources.train.nodes=1,2": "cannot be searched",
    "data.max_tokens=16,32": "it changes what is read",
    "adapter=full,lora": "it changes what is read",
    "train.learning_rate=interval(-1,1)": "learning_rate",
    "train.learn_rate=interval(0,1)": "learning_rate",
}


@pytest.mark.parametrize(("space", "words"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused_with_its_reason(project: Path, space: str, words: str) -> None:
    with pytest.raises((RecipeError, PlanError), match=words):
        made(project, space)


def test_a_search_is_neither_sent_nor_resumed_without_optuna(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, launcher = RunPaths(root=project / "runs/small/sweep-1"), LocalLauncher()
    paths.root.mkdir(parents=True)
    paths.plan.write_text(made(project, RATE).to_json())
    monkeypatch.setattr("sousbatch.recipes.search.find_spec", lambda _: None)
    for act in (lambda: made(project, RATE), lambda: resume(paths, launcher)):
        with pytest.raises(UsageError, match=r"needs optuna: pip install 'sousbatch\[search\]'"):
            act()


def test_a_key_has_one_space(project: Path) -> None:
    with pytest.raises(RecipeError, match="seed=3,4 is the second space of its key"):
        made(project, "seed=1,2", "seed=3,4", num_trials=2)


def test_a_space_with_fewer_values_than_trials_is_refused(project: Path) -> None:
    with pytest.raises(RecipeError, match="is more than the 6 there are .*--trials 6, or run them all with --sweep"):
        made(project, "seed=1,2", "train.weight_decay=0,0.1,0.2", num_trials=7)
    assert made(project, "seed=1,2", "train.weight_decay=0,0.1,0.2", num_trials=6).stages[0].num_tasks == 6


def test_what_is_best_is_the_first_score_or_what_is_named(project: Path) -> None:
    def of(*texts: str, **options: Any) -> tuple[str, str, bool]:
        plan = made(project, RATE, texts=texts, **options)
        assert plan.sweep is not None and plan.sweep.search is not None
        return plan.sweep.search.metric, plan.sweep.search.goal, plan.sweep.search.is_measured

    assert of("score.metrics=[cer,rouge]") == ("cer", "lowest", False)
    assert of("score.metrics=[cer,rouge]", metric="rougeL_f1") == ("rougeL_f1", "highest", False)
    assert of(metric="eval_loss") == ("eval_loss", "lowest", True)
    assert of("stages={train: {}}") == ("eval_loss", "lowest", True)
    with pytest.raises(RecipeError, match="is no score of it .*rougeL_f1"):
        of("score.metrics=[rouge]", metric="rougel_f1")
    with pytest.raises(PlanError, match="nothing tells which trial is best: add a score stage, or train.eval_split"):
        of("stages={train: {}}", "train.eval_split=null")
    with pytest.raises(PlanError, match="nothing tells which trial is best"):
        of("stages={train: {}}", "train.eval_split=null", metric="cer")


def test_the_frozen_plan_says_all_that_its_trials_need(project: Path) -> None:
    plan = made(project, RATE, "train.weight_decay=0,0.1", texts=["train.epochs=3"])
    (project / "plan.json").write_text(plan.to_json())
    assert read_plan(project / "plan.json") == plan
    assert plan.stages[0].num_tasks == 20 and plan.stages[0].resources.tasks_at_once == 2
    assert made(project, RATE, texts=["resources.default.tasks_at_once=5"]).stages[0].resources.tasks_at_once == 5
    assert plan.run_id != made(project, RATE, texts=["train.epochs=3"]).run_id
    texts = ["train.learning_rate=0.0003", "train.weight_decay=0.1"]
    filled = with_values(plan, 7, texts)
    assert filled.sweep is not None
    assert point_recipe(filled.sweep, 7) == compose("./small.yaml", ["train.epochs=3", *texts])


def test_trials_that_are_not_the_best_need_no_space_for_checkpoints(project: Path) -> None:
    (line,) = made(project, RATE, num_trials=20).forecast.storage  # two run at a time, and one is the best
    peak, rest = (int(text.replace(",", "")) for text in re.findall(r"(?:3|17) x ([\d,]+) B", line.formula))
    assert line.num_bytes == 3 * peak + 17 * rest and 0 < rest < peak


def a_search(project: Path, *trials: tuple[str, float | None], goal: str = "lowest") -> RunPaths:
    paths = RunPaths(root=project / "runs/small/sweep-1")
    paths.root.mkdir(parents=True)
    search = {"axes": [], "goal": goal, "metric": "cer", "is_measured": False}
    paths.plan.write_text(json.dumps({"format": 7, "sweep": {"search": search}}))
    for number, (values, value) in enumerate(trials):
        (paths.root / f"small/{number}").mkdir(parents=True)
        client = ledger.open_client(paths.root / f"small/{number}" / "ledger")
        client.write(Frozen(plan="", point=number))
        client.write(Trial(values=dict(text.split("=") for text in values.split())))
        if value is not None:
            client.write(TrialEnded(word="complete", value=value))
        client.close()
    return paths


@pytest.mark.parametrize(("goal", "rate"), [("lowest", 0.002), ("highest", 0.001)])
def test_best_lays_the_values_of_the_best_trial_over_a_recipe(project: Path, goal: str, rate: float) -> None:
    search = a_search(
        project,
        ("train.learning_rate=0.001 seed=5", 0.9),
        ("train.learning_rate=0.002 seed=6", 0.2),
        ("train.learning_rate=0.004 seed=7", 0.2),
        ("train.learning_rate=0.008 seed=8", None),
        goal=goal,
    )
    recipe = compose("./small.yaml", [f"best={search.root}", "seed=9"])
    assert (recipe.train.learning_rate, recipe.seed) == (rate, 9), "what is given after it wins"


def test_best_of_what_is_no_search_or_has_no_end_is_refused(project: Path) -> None:
    with pytest.raises(NotFoundError, match="no trial has ended well yet"):
        compose("./small.yaml", [f"best={a_search(project, ('seed=1', None)).root}"])
    (project / "runs/small/sweep-1/plan.json").write_text(json.dumps({"format": 7, "sweep": None}))
    with pytest.raises(UsageError, match=r"is no search; `sousbatch submit --search` makes one"):
        compose("./small.yaml", [f"best={project / 'runs/small/sweep-1'}"])
