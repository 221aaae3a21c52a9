"""Decodings: several ways to generate from one model in one run, and what a sweep over them becomes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

import sousbatch.jobs.merge as merging
import sousbatch.jobs.predict as predicting
import sousbatch.jobs.score as scoring
from sousbatch import ledger
from sousbatch.errors import EXIT_STOPPED
from sousbatch.jobs.context import run_job
from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]
ONLY_PREDICT = "stages={predict: {}, merge: {}, score: {}}"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{beams: {num_beam: 4}}", "predict.decodings.beams.num_beam is no key of predict that decides an answer"),
        ("{beams: {unit_rows: 4}}", "predict.decodings.beams.unit_rows is no key of predict that decides an answer"),
        ("{beams: {num_beams: 0}}", "predict.decodings.beams.num_beams"),
        ("{long: {max_new_tokens: 999}}", "is 999, above predict.max_new_tokens 128 (set predict.max_new_tokens=999"),
        ("{both: {sample: true, num_beams: 2}}", "predict.decodings.both.num_beams is 2 with predict.sample"),
        ("{a/b: {num_beams: 2}}", "predict.decodings.a/b is no name of a decoding"),
    ],
)
def test_a_decoding_that_cannot_be_is_refused_by_its_key(sousbatch: Run, project: Path, value: str, says: str) -> None:
    code, _, err = sousbatch("plan", "small.yaml", f"predict.decodings={value}")
    assert code == 2
    assert says in err


def test_each_decoding_counts_in_the_forecast(sousbatch: Run, project: Path) -> None:
    def size(*overrides: str) -> int:
        _, out, _ = sousbatch("plan", "small.yaml", ONLY_PREDICT, *overrides, "--json")
        lines = json.loads(out)["forecast"]["storage"]
        return int(next(line["num_bytes"] for line in lines if line["what"] == "predictions of predict"))

    assert size("predict.decodings={a: {}, b: {num_beams: 2}}") == 2 * size()


def test_a_sweep_over_decoding_alone_is_one_run(sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr("sousbatch.launchers.submission.submit", lambda plan, *_, **__: sent.append(plan) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sousbatch(
            *("submit", "small.yaml", ONLY_PREDICT, "--sweep", "predict.num_beams=1,2", "predict.max_new_tokens=8,200")
        )
    (plan,) = sent
    assert plan.sweep is None
    assert plan.recipe.predict.max_new_tokens == 200
    assert plan.recipe.predict.decodings["num_beams=2,max_new_tokens=8"] == {"num_beams": 2, "max_new_tokens": 8}
    assert len(plan.recipe.predict.decodings) == 4


def test_one_loaded_model_answers_every_decoding_and_each_is_merged_and_scored(
    sousbatch: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["predict.decodings={one: {}, two: {num_beams: 2}}", "predict.max_new_tokens=2", "predict.unit_rows=2"]
    _, out, _ = sousbatch("plan", "small.yaml", ONLY_PREDICT, *overrides, "--json")
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    monkeypatch.setattr(predicting, "Watchdog", Mock())  # pytest has no stderr that a stack can be dumped to
    loads, true_load = [], predicting.load_model
    monkeypatch.setattr(predicting, "load_model", lambda *given: loads.append(1) or true_load(*given))
    for name, work in (("predict", predicting.predict), ("merge", merging.merge), ("score", scoring.score)):
        assert run_job(name, work, [str(paths.root), name]) == 0
    assert loads == [1]
    for decoding in ("one", "two"):
        assert len(paths.predictions_file("predict", decoding).read_text().splitlines()) == 5
    assert set(json.loads(paths.metrics.read_text())) == {"score@one", "score@two"}
    units = [event for event in ledger.read(paths.ledger_dir) if event.kind == "unit"]
    assert sorted((event.decoding, event.unit) for event in units) == [
        (decoding, unit) for decoding in ("one", "two") for unit in range(3)
    ]
    table = sousbatch("predictions", "score", str(paths.root), "--metric", "cer")[1].splitlines()
    assert [line.split("  ")[0] for line in table[-3:]] == [
        "copying the input",
        "0123456789ab score one",
        "0123456789ab score two",
    ]
    assert {path.name for path in paths.metrics_dir.glob("*.rows.jsonl")} == {
        "score@one.rows.jsonl",
        "score@two.rows.jsonl",
    }


def test_a_stop_leaves_the_other_decodings_for_the_next_attempt(
    sousbatch: Run, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = sousbatch("plan", "small.yaml", ONLY_PREDICT, "predict.decodings={one: {}, two: {}}", "--json")
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    flag = paths.stop_flag("predict", 0)
    flag.parent.mkdir()
    flag.touch()
    loaded = Mock()
    monkeypatch.setattr(predicting, "Watchdog", Mock())
    monkeypatch.setattr(predicting, "load_model", loaded)
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == EXIT_STOPPED
    assert loaded().answerer.call_count == 1
    assert not list(paths.predictions("predict").glob("*/unit-*"))
