"""`sousbatch predictions`: files of any trainer are scored by any metric, merged and exported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import open_layout, write_unit
from sousbatch.run_folder import RunPaths

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, str, str]]
DOCUMENTED = re.search(r"```python\n(.*?)```", (ROOT / "docs/predictions.md").read_text(), re.DOTALL)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Predictions as JSONL and CSV, and the data that they answer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("input,target\nax,ab\ncd,cd\n")
    (tmp_path / "made.jsonl").write_text('{"index": 0, "prediction": "ab"}\n{"index": 1, "prediction": "cxx"}\n')
    (tmp_path / "made.csv").write_text("index,prediction\n0,ab\n1,cxx\n")
    return tmp_path


@pytest.mark.usefixtures("files")
def test_a_csv_file_is_scored_like_the_same_jsonl(sousbatch: Run) -> None:
    arguments = ("--data", "data.csv", "--json")
    (code, out, _), other = (sousbatch("predictions", "score", f"made.{kind}", *arguments) for kind in ("csv", "jsonl"))
    assert (code, out, "") == other
    assert json.loads(out)["model"]["exact_match"] == 0.5 == json.loads(out)["copy_input"]["exact_match"]


@pytest.mark.usefixtures("files")
def test_metrics_are_chosen_by_name_those_of_other_packages_too(
    sousbatch: Run, third_party: Callable[..., None]
) -> None:
    assert DOCUMENTED is not None
    third_party("sousbatch.metrics", "length_error = toy_module:LENGTH_ERROR", DOCUMENTED[1])
    metrics = [word for name in ("cer", "length_error") for word in ("--metric", name)]
    code, out, _ = sousbatch("predictions", "score", "made.jsonl", "--data", "data.csv", *metrics)
    assert (code, out) == (
        0,
        "                                model  copying the input\n"
        "cer (lower is better)           0.500  0.250\n"
        "length_error (lower is better)  0.500  0.000\n",
    )


@pytest.mark.usefixtures("files")
def test_an_unknown_metric_is_answered_with_the_known_ones(sousbatch: Run) -> None:
    code, out, err = sousbatch("predictions", "score", "made.jsonl", "--data", "data.csv", "--metric", "crr")
    assert (code, out) == (2, "")
    assert "metric 'crr' is unknown; known: character_accuracy, cer" in err and "did you mean 'cer'?" in err


@pytest.mark.usefixtures("files")
def test_a_metric_that_fails_is_named(sousbatch: Run, third_party: Callable[..., None]) -> None:
    source = "from sousbatch.predictions.metrics import Metric\nBOOM = Metric(score=lambda _: 1 / 0, better='lower')\n"
    third_party("sousbatch.metrics", "boom = toy_module:BOOM", source)
    code, out, err = sousbatch("predictions", "score", "made.jsonl", "--data", "data.csv", "--metric", "boom")
    assert (code, out, err) == (2, "", "sousbatch: metric 'boom' failed: ZeroDivisionError: division by zero\n")


@pytest.mark.usefixtures("files")
def test_the_baseline_needs_an_input_column(sousbatch: Run) -> None:
    Path("data.csv").write_text("word,target\nax,ab\ncd,cd\n")
    arguments = ("predictions", "score", "made.jsonl", "--data", "data.csv", "--metric", "cer")
    assert sousbatch(*arguments)[1].splitlines()[0].split() == ["model"]
    code, _, err = sousbatch(*arguments, "--input", "wort")
    assert code == 2 and "no row of data.csv has 'wort', which --input names; they have: word, target" in err
    assert "0.250" in sousbatch(*arguments, "--input", "word")[1]


def test_merged_predictions_are_exported_as_a_table(sousbatch: Run, tmp_path: Path) -> None:
    shard, out = tmp_path / "rank0.jsonl", tmp_path / "merged.jsonl"
    shard.write_text('{"index": 1, "prediction": "b"}\n{"index": 0, "prediction": "a"}\n')
    code, _, _ = sousbatch("predictions", "merge", str(shard), "--out", str(out), "--export", str(tmp_path / "t.csv"))
    assert code == 0 and (tmp_path / "t.csv").read_text().splitlines() == ["index,prediction", "0,a", "1,b"]


def test_an_export_of_unknown_format_is_refused_before_merging(sousbatch: Run, tmp_path: Path) -> None:
    shard, out = tmp_path / "rank0.jsonl", tmp_path / "merged.jsonl"
    shard.write_text('{"index": 0, "prediction": "a"}\n')
    code, _, err = sousbatch("predictions", "merge", str(shard), "--out", str(out), "--export", "t.xlsx")
    assert code == 2 and "known: .csv, .tsv, .jsonl, .json, .parquet" in err and not out.exists()


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("who,answer\n1,x\n", "column 'who' of template t.csv is given by nothing called 'who'"),
        ("index,answer\n0,x\n", "--column says twice what 'answer' holds: answer=prediction, answer=index"),
        ("index\n", "template t.csv has no row"),
        ("index,answer\n7,x\n", "does not have the id '0'"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_before_merging(
    sousbatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rank0.jsonl").write_text('{"index": 0, "prediction": "a"}\n')
    Path("t.csv").write_text(template)
    Path("data.csv").write_text("text\nx\n")
    arguments = ("--export", "o.csv", "--template", "t.csv", "--column", "answer=prediction", "--data", "data.csv")
    given = arguments if "answer" in template else arguments[:4]
    given += ("--column", "answer=index") if "twice" in says else ()
    code, _, err = sousbatch("predictions", "merge", "rank0.jsonl", "--out", "m.jsonl", *given)
    assert code == 2 and says in err
    assert not Path("m.jsonl").exists() and not Path("o.csv").exists()


def test_the_own_functions_that_a_run_has_frozen_repair_its_texts(
    sousbatch: Run, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "lab").mkdir()
    (project / "lab/frozen_of_a_test.py").write_text("def louder(text):\n    return text.upper()\n")
    code, out, err = sousbatch("plan", "small.yaml", "environment.code=[lab]", "--json")
    assert code == 0, err
    run = project / "runs/small/x"
    (run / "code").mkdir(parents=True)
    (run / "plan.json").write_text(out)
    (project / "lab").rename(run / "code/lab")
    units = RunPaths(root=run).predictions("predict") / "key"
    layout = open_layout(units, "key", 1, 1)
    write_unit(units, layout, 0, [PredictionRow(index=0, prediction="ab")], "key", 0, 0)
    merged = project / "repaired.jsonl"
    given = ("predictions", "merge", str(units), "--out", str(merged), "--post", "frozen_of_a_test:louder")
    code, _, err = sousbatch(*given)
    assert code == 0, err
    assert json.loads(merged.read_text())["prediction"] == "AB"


@pytest.mark.parametrize(
    "export", ["rank0.jsonl", "merged.jsonl", "merged.report.json", "data.csv", "sample.csv", "shards/rank1.jsonl"]
)
def test_an_export_is_not_written_over_what_is_read(
    export: str, sousbatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rank0.jsonl").write_text('{"index": 0, "prediction": "a"}\n')
    for name in ("data.csv", "sample.csv"):
        Path(name).write_text("ID,prediction\nx,?\n")
    Path("shards/notes").mkdir(parents=True)
    Path("shards/rank1.jsonl").write_text('{"index": 1, "prediction": "b"}\n')
    merge = ("predictions", "merge", "--out", "merged.jsonl", "rank0.jsonl")
    folder = ("shards",) if "shards" in export else ()
    export_it = ("--template", "sample.csv", "--data", "data.csv", "--export")
    code, _, err = sousbatch(*merge, *folder, *export_it, export)
    assert code == 2 and f"{export} is read and would be written over" in err, err
    assert not Path("merged.jsonl").exists() and sousbatch(*merge, *export_it, "out.csv")[0] == 0
    assert Path("out.csv").read_text().splitlines() == ["ID,prediction", "x,a"]
