"""The merge job: it takes split and rows from its predict stage, and names what is missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sousbatch import api, files, ledger
from sousbatch.cli.results import describe_results
from sousbatch.events import Ended, Error, of
from sousbatch.jobs.context import run_job
from sousbatch.jobs.generation.prediction_key import prediction_key
from sousbatch.jobs.merge import merge
from sousbatch.jobs.score import score
from sousbatch.launchers.freeze import freeze
from sousbatch.launchers.registry import launcher_of
from sousbatch.ledger_queries import done_tasks
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import open_layout, unit_path, write_unit
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.run_folder import RunPaths

OWN_ROWS = "stages={predict: {set: {predict: {split: train, rows: 7, unit_rows: 3}}}, merge: {}}"


POST = (
    "predict.post=['replace:rules.tsv', 'fix:tidy']",
    "predict.output={template: sample.csv, columns: {ID: input, answer: prediction}}",
)


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
    errors = of(ledger.read(paths.ledger_dir), Error)
    return errors[-1].message if code else ""


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


def test_a_merge_that_lacks_units_has_a_resume_send_their_stage_again(run: tuple[RunPaths, Plan]) -> None:
    """Its tasks had ended well, so that a resume sent the merge alone, which failed again and again."""
    paths, plan = run
    key = prediction_key(paths, plan.stage("predict"))
    folder = paths.predictions("predict") / key
    layout = open_layout(folder, key, 7, 3)

    def predict() -> None:
        with closing(ledger.open_attempt(paths.ledger_dir, "predict", 0)) as attempt:
            for unit in range(3):
                rows = [PredictionRow(index=index, prediction="답") for index in layout.rows_of(unit)]
                write_unit(folder, layout, unit, rows, key, attempt.number, 0)
            attempt.write(Ended(exit_code=0))

    predict()
    damaged = unit_path(folder, 1)
    damaged.write_bytes(damaged.read_bytes().replace("답".encode(), "단".encode()))
    assert "missing rows: 3-5; the rest is computed by `sousbatch resume 0123456789ab`" in _merge(paths)
    assert done_tasks(ledger.read(paths.ledger_dir), "predict") == set()
    predict()
    assert done_tasks(ledger.read(paths.ledger_dir), "predict") == {0}
    assert _merge(paths) == ""


def test_a_merge_that_lacks_the_units_of_one_task_leaves_the_others_done(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path
) -> None:
    """Such as that of a task that was cancelled; the others have lost nothing."""
    code, out, err = sousbatch("plan", "small.yaml", OWN_ROWS, "+resources.predict.tasks=3", "--json")
    assert code == 0, err
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    ledger.open_attempt(paths.ledger_dir, "merge", 0).close()
    key = prediction_key(paths, read_plan(paths.plan).stage("predict"))
    folder = paths.predictions("predict") / key
    layout = open_layout(folder, key, 7, 3)
    for task in (0, 1, 2):  # the second one commits nothing
        with closing(ledger.open_attempt(paths.ledger_dir, "predict", task)) as attempt:
            rows = [PredictionRow(index=index, prediction="답") for index in layout.rows_of(task)]
            if task != 1:
                write_unit(folder, layout, task, rows, key, attempt.number, task)
            attempt.write(Ended(exit_code=1 if task == 1 else 0))
    assert "missing rows: 3-5" in _merge(paths)
    assert done_tasks(ledger.read(paths.ledger_dir), "predict") == {0, 2}
    unit_path(folder, 2).unlink()
    assert "missing rows: 3-6" in _merge(paths)
    assert done_tasks(ledger.read(paths.ledger_dir), "predict") == {0}


@pytest.fixture
def repaired(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunPaths, Callable[[], None]]:
    """A submitted run whose merge repairs texts and writes a contest's file, and what commits its units."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "fix", raising=False)
    (project / "rules.tsv").write_text("되요\t돼요\n")
    (project / "fix.py").write_text("def tidy(text, row):\n    return f'{1 / len(text) and text} ({row[\"input\"]})'\n")
    (project / "sample.csv").write_text("ID,answer\n" + "".join(f"test {number},?\n" for number in (3, 0, 4, 1, 2)))
    recipe = api.compose("small.yaml", [*POST, "score.metrics=[cer]", "stages={predict: {}, merge: {}, score: {}}"])
    plan = api.compile(recipe, api.inspect(recipe), launcher="local")
    paths = RunPaths(root=tmp_path / "runs" / "small" / plan.run_id)
    files.make_private_dir(paths.root)
    freeze(plan, launcher_of(plan), paths)
    ledger.open_attempt(paths.ledger_dir, "merge", 0).close()

    def commit(text: str = "되요") -> None:
        key = prediction_key(paths, plan.stage("predict"))
        layout = open_layout(paths.predictions("predict") / key, key, 5, 2)
        for unit in range(3):
            rows = [PredictionRow(index=index, prediction=text) for index in layout.rows_of(unit)]
            write_unit(paths.predictions("predict") / key, layout, unit, rows, key, 1, 0)

    return paths, commit


def test_a_merge_repairs_texts_and_writes_the_contest_s_file_by_what_was_submitted(
    repaired: tuple[RunPaths, Callable[[], None]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths, commit = repaired
    for name in ("rules.tsv", "fix.py", "sample.csv"):
        (project / name).write_text("edited after submission")
    commit()
    assert _merge(paths) == ""
    rows = [json.loads(line) for line in paths.predictions_file("predict").read_text().splitlines()]
    assert [(row["prediction"], row["raw_prediction"]) for row in rows] == [
        (f"돼요 (test {number})", "되요") for number in range(5)
    ]
    (submission,) = paths.submission_files("predict")
    assert submission.read_text().splitlines() == [
        "ID,answer",
        *(f"test {number},돼요 (test {number})" for number in (3, 0, 4, 1, 2)),
    ]
    assert str(submission) in capsys.readouterr().out
    assert run_job("score", score, [str(paths.root), "score"]) == 0
    scores = files.read_json(paths.metrics)["score"]["scores"]
    assert scores["before_post"] == {"cer": 1.0} and scores["model"]["cer"] > 2
    shown = describe_results(read_plan(paths.plan), paths)
    assert str(submission) in shown and "before predict.post  copying the input" in shown


def test_a_repair_that_raises_names_the_row_and_loses_nothing(
    repaired: tuple[RunPaths, Callable[..., None]], project: Path, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    paths, commit = repaired
    commit("")
    assert "predict.post: fix:tidy failed at row 1 of split 'test': ZeroDivisionError" in _merge(paths)
    assert not paths.predictions_file("predict").exists() and paths.submission_files("predict") == []
    (units,) = paths.unit_dirs()
    (project / "better.py").write_text("def tidy(text, row):\n    return row['input']\n")
    code, out, err = sousbatch("predictions", "merge", str(units), "--out", "p.jsonl", "--post", "better:tidy")
    assert (code, err) == (0, "") and "5 of 5 rows" in out
    assert json.loads(Path("p.jsonl").read_text().splitlines()[4])["prediction"] == "test 4"
    code, _, err = sousbatch("predictions", "merge", str(units), "--out", "q.jsonl", "--rows", "6")
    assert code == 2 and "--rows is 6, and the units of" in err and not Path("q.jsonl").exists()
