"""Metrics of the user's own code are tried at plan, as the jobs will import them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
METRIC = """
from sousbatch.predictions.metrics import Metric

LENGTH = Metric(score=lambda answers: {"length": [len(text) for text, _ in answers.texts]}, better="lower")
MARGIN = Metric(score=lambda answers: {"margin": [0] * len(answers.rows)}, better="lower", fields=("margin",))
"""


@pytest.fixture
def plan(sousbatch: Run, project: Path) -> Callable[..., tuple[int, str, str]]:
    (project / "mine").mkdir()
    (project / "mine" / "my_metrics.py").write_text(METRIC)
    return lambda *overrides: sousbatch("plan", "small.yaml", "--json", *overrides)


def test_an_own_metric_is_planned_and_frozen_with_the_code(plan: Run, project: Path) -> None:
    code, out, err = plan("score.metrics=['my_metrics:LENGTH']", "environment.code=[mine]")
    assert (code, err) == (0, "")
    digest = json.loads(out)["inputs"]["code_digest"]
    (project / "mine" / "my_metrics.py").write_text(METRIC + "# edited\n")
    _, out, _ = plan("score.metrics=['my_metrics:LENGTH']", "environment.code=[mine]")
    assert json.loads(out)["inputs"]["code_digest"] != digest


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("score.metrics=['my_metrics:LENGTH']",), "No module named 'my_metrics'.*environment.code=\\[FOLDER\\]"),
        (("score.metrics=['my_metrics:LENGHT']", "environment.code=[mine]"), "has no 'LENGHT'; it has LENGTH, MARGIN"),
        (("score.metrics=['my_metrics:METRIC']", "environment.code=[mine]"), "has no 'METRIC'"),
        (("score.metrics=['my_metrics:MARGIN']", "environment.code=[mine]"), "needs margin in each prediction"),
    ],
)
def test_what_the_jobs_could_not_measure_is_refused(plan: Run, overrides: tuple[str, ...], words: str) -> None:
    code, out, err = plan(*overrides)
    assert (code, out) == (2, "") and re.search(words, err), err


def test_an_own_metric_chooses_checkpoints(plan: Run) -> None:
    given = ("checkpoints.goal=lowest", "environment.code=[mine]", "train.eval_split=test")
    code, _, err = plan("checkpoints.metric='my_metrics:LENGTH'", *given)
    assert code == 0, err
    code, _, err = plan("checkpoints.metric='my_metrics:LENGHT'", *given)
    assert code == 2 and re.search("checkpoints.metric has 'my_metrics:LENGHT': .* it has LENGTH, MARGIN", err), err
