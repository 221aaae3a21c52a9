"""A dashboard has the panels that the stages of its recipe fill, whatever they are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sousbatch.predictions.measure import Case
from sousbatch.predictions.metrics import METRICS
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import MODEL, score_cases
from sousbatch.recipes.compose import compose
from sousbatch.recipes.dashboards import recipe_dashboard, score_names, sweep_dashboard
from sousbatch.recipes.plan import Search
from sousbatch.tracking.dashboards import Dashboard, Panel, Section, compare, outline

GOLDEN = Path(__file__).parent / "golden/dashboard.txt"
TWICE = (
    "stages={warm: {kind: train}, half: {kind: consolidate}, more: {kind: train, of: half}, done: {kind: consolidate}}"
)


def panels(dashboard: Dashboard, section: str) -> Sequence[Panel]:
    return next((one.panels for one in dashboard.sections if one.name == section), ())


def test_the_dashboard_of_the_demo_is_the_golden_one() -> None:
    """`UPDATE_GOLDEN=1 pytest` writes it again, to be read in the diff."""
    text = "\n".join(outline(recipe_dashboard(compose("hangul-restoration")))) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_each_of_two_trainings_has_panels_of_its_own_name() -> None:
    found = recipe_dashboard(compose("hangul-restoration", [TWICE]))
    assert [panel.title for panel in panels(found, "Training")][::3] == ["warm: loss", "more: loss"]
    assert panels(found, "Storage")[0].values == ("warm/storage/held_gb", "warm/storage/budget_gb")
    assert panels(found, "Storage")[-1].values == ("more/checkpoints",)
    assert panels(found, "Predictions and scores") == ()
    assert panels(found, "Sweep")[1].values == ("more/eval_loss",), "without scores the last training tells the best"


def test_a_tracked_run_for_each_stage_has_names_without_the_stage() -> None:
    found = recipe_dashboard(compose("hangul-restoration", [TWICE, "tracking.per=stage"]))
    assert [str(panel) for panel in panels(found, "Training")] == [
        'lines "loss" loss, eval_loss over step',
        'lines "learning rate" learning_rate over step',
        'lines "norm of the gradient" grad_norm over step',
    ]


def test_what_is_not_measured_has_no_panel() -> None:
    changes = ["train.eval_split=null", "checkpoints.metric=loss", TWICE]
    found = recipe_dashboard(compose("hangul-restoration", changes))
    assert panels(found, "Training")[0].values == ("warm/loss",)
    assert panels(found, "Sweep")[1].values == ("more/loss",)


def test_a_metric_of_answers_and_decodings_and_gpus_have_panels() -> None:
    changes = ["checkpoints.metric=exact_match", "score.metrics=[cer]", "predict.decodings={a: {}, b: {num_beams: 2}}"]
    recipe = compose("hangul-restoration", changes)
    resources = {"default": replace(recipe.resources["default"], device="gpu", devices_per_node=2)}
    found = recipe_dashboard(replace(recipe, resources=resources))
    assert panels(found, "Training")[1].values == ("train/eval_exact_match",)
    names = [panel.values for panel in panels(found, "Predictions and scores")]
    assert ("score/a/model/cer",) in names and ("score/b/samples",) in names and ("merge/b/num_rows",) in names
    system = [panel.values for panel in panels(found, "Throughput and system")]
    assert ("train/throughput/device_memory_gb",) in system and ("system/gpu.0.gpu", "system/gpu.1.gpu") in system


def test_a_sweep_has_the_keys_of_its_axes_and_its_own_runs_alone() -> None:
    labels = ["seed=1 adapter=lora train.learning_rate=0.1 data=chat", "seed=2 adapter=full train.learning_rate=0.1"]
    found = sweep_dashboard(compose("hangul-restoration"), labels, "0123456789ab")
    assert (found.filter, found.wanted, found.group) == ("run:group", "hangul-restoration-0123456789ab", "")
    keys = ("config:seed", "config:adapter.method", "config:train.learning_rate")
    best = "score/model/character_accuracy"
    assert panels(found, "Sweep")[0].values == (*keys, best)
    assert [panel.over for panel in panels(found, "Sweep") if panel.kind == "scatter"] == list(keys)
    assert found.view != recipe_dashboard(compose("hangul-restoration")).view
    for metric, is_measured, value in (("cer", False, "score/model/cer"), ("eval_loss", True, "train/eval_loss")):
        search = Search(axes=(), seed=1, goal="lowest", metric=metric, is_measured=is_measured)
        found = sweep_dashboard(compose("hangul-restoration"), ["seed"], "0123456789ab", search)
        assert panels(found, "Sweep")[0].values[-1] == value, "what the search makes better"


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_called_as_they_are_measured(metric: str) -> None:
    named, case = score_names([metric]), Case(row=PredictionRow(index=0, prediction="a b"), target="a b", input="a")
    scores = score_cases([case], metrics=[metric])[MODEL]
    assert set(named) <= scores.keys() and (named or metric == "label_f1")


def test_two_dashboards_are_compared_line_by_line() -> None:
    one = Dashboard(name="toy", project="p", entity=None, filter="config:recipe", wanted="toy")
    other = replace(one, sections=(Section(name="Training", panels=(Panel(kind="lines", title="loss"),)),))
    assert compare(one, one) == []
    assert compare(one, other)[-2:] == ["+Training:", '+  lines "loss"']
