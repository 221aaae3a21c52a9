"""The merge job: it takes split and rows from its predict stage, and names what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.events import Error
from sousbatch.jobs.context import run_job
from sousbatch.jobs.generation.prediction_key import prediction_key
from sousbatch.jobs.merge import merge
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import open_layout, write_unit
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.run_folder import RunPaths

OWN_ROWS = "stages={predict: {set: {predict: {split: train, rows: 7, unit_rows: 3}}}, merge: {}}"


@pytest.fixture
def run(sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path) -> tuple[RunPaths, Plan]:
    """A run that predicts 7 rows of `train`, which only its predict stage names."""
    code, out, err = sousbatch("plan", "small.yaml", OWN_ROWS, "--json")
    assert code == 0, err
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    ledger.open_attempt(paths.ledger_dir, "merge", 0).close()
    return paths, read_plan(paths.plan)


def _merge(paths: RunPaths) -> str:
    """Run the job and return why it failed, or nothing."""
    code = run_job("merge", merge, [str(paths.root), "merge"])
    last = ledger.read(paths.ledger_dir)[-1]
    assert (code == 0) == (not isinstance(last, Error))
    return last.message if isinstance(last, Error) else ""


def test_a_merge_without_any_unit_names_the_rows_of_its_predict_stage(run: tuple[RunPaths, Plan]) -> None:
    assert "all 7 rows are missing: stage 'predict' committed none" in _merge(run[0])


def test_a_merge_names_the_rows_that_its_predict_stage_did_not_commit(run: tuple[RunPaths, Plan]) -> None:
    paths, plan = run
    key = prediction_key(paths, plan.stage("predict"))
    folder = paths.predictions("predict") / key
    layout = open_layout(folder, key, plan.stage("predict").splits["predict"].num_rows, 3)

    def answer(*units: int) -> None:
        for unit in units:
            rows = [PredictionRow(index=index, prediction="답") for index in layout.rows_of(unit)]
            write_unit(folder, layout, unit, rows, key, 1, 0)

    answer(0, 1)
    assert "missing rows: 6" in _merge(paths)
    assert not paths.predictions_file("predict").exists()
    answer(2)
    assert _merge(paths) == ""
    assert len(paths.predictions_file("predict").read_text().splitlines()) == 7
