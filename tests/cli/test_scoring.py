"""`sousbatch predictions score` and `show`: one table over files, intervals, rows and what terminals need."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.cli.prediction_view import escape_text, text_width, wrap
from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]
SCORE = ("predictions", "score", "a.jsonl")
DATA = ("--data", "data.jsonl", "--metric", "exact_match")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    targets = ["서울", "부산", "대구 \x1b[31m", "광주"]
    for name, texts in (("a", ["서울", "부산", "?", ""]), ("b", ["서울", "부산", "대구 \x1b[31m", "광주"])):
        rows = [{"index": place, "id": f"r-{place}", "prediction": text} for place, text in enumerate(texts)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("empty.jsonl").touch()
    Path("nan.jsonl").write_text('{"target": "a"}\n' * 3 + '{"target": NaN}\n')
    rows = [{"input": "שלום\u202e" if place == 2 else target, "target": target} for place, target in enumerate(targets)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_share_one_table_with_copying_the_input(sousbatch: Run) -> None:
    assert sousbatch(*SCORE, "b.jsonl", *DATA)[1].splitlines() == [
        "                   rows  exact_match",
        "copying the input     4  0.750",
        "a.jsonl               4  0.500",
        "b.jsonl               4  1.000",
    ]


def test_a_table_as_csv_has_a_line_for_each_score(sousbatch: Run) -> None:
    _, out, _ = sousbatch(*SCORE, *DATA, "--metric", "cer", "--intervals", "--draws", "50", "--csv")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert [(line["who"], line["score"], line["better"]) for line in lines] == [
        ("model", "exact_match", "higher"),
        ("model", "cer", "lower"),
        ("copy_input", "exact_match", "higher"),
        ("copy_input", "cer", "lower"),
    ]
    assert float(lines[0]["low"]) <= 0.5 <= float(lines[0]["high"]) and lines[2]["low"] == ""


def test_two_files_are_compared(sousbatch: Run) -> None:
    _, out, _ = sousbatch(*SCORE, "b.jsonl", *DATA, "--compare", "--draws", "100", "--json")
    found = json.loads(out)["less a.jsonl"]["b.jsonl"]["exact_match"]
    assert found["difference"] == 0.5 and found["interval"][0] >= 0 and 0 < found["p"] <= 1
    assert "+0.5000" in sousbatch(*SCORE, "b.jsonl", *DATA, "--compare", "--draws", "100")[1]


def test_scores_of_rows_are_written(sousbatch: Run) -> None:
    assert sousbatch(*SCORE, *DATA, "--metric", "cer", "--rows", "rows.jsonl")[0] == 0
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert rows[3] == {"index": 3, "id": "r-3", "exact_match": 0.0, "cer": 1.0} and len(rows) == 4


def test_the_worst_rows_are_shown_below_the_scores(sousbatch: Run) -> None:
    _, out, _ = sousbatch(*SCORE, *DATA, "--worst", "1")
    assert out.partition("worst rows of a.jsonl")[2].splitlines()[2:] == [
        "row 2 (id r-2)  exact_match 0.000",
        "input       שלום\\u202e",
        "target      대구 \\x1b[31m",
        "prediction  ?",
    ]
    _, out, _ = sousbatch("predictions", "show", "a.jsonl", *DATA, "--worst", "1")
    assert out.startswith("worst rows") and "best rows" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("score", "a.jsonl"), "name the rows that it answers with --data FILE"),
        (("score", "a.jsonl", *DATA, "--compare"), "--compare needs two files or runs"),
        (("score", "a.jsonl", "b.jsonl", *DATA, "--rows", "r.jsonl"), "--rows writes the rows of one file"),
        (("score", "a.jsonl", *DATA, "--rows", "r.csv"), "name a .jsonl file"),
        (("score", "c.jsonl", *DATA), "'c.jsonl' does not exist"),
        (("score", "nothing", *DATA), "run 'nothing' does not exist"),
        (("score", "a.jsonl", *DATA, "--metric", "mine:LENGTH"), "metric 'mine:LENGTH' cannot be imported"),
        (("show", "a.jsonl", "--worst", "3"), "name the rows that it answers with --data FILE"),
        (("show", "a.jsonl", "--row", "4"), "there is no row 4: the last of 4 rows is 3"),
        (("score", "a.jsonl", "--data", "nan.jsonl"), "row 4 of nan.jsonl has NaN as 'target'"),
        (("show", "empty.jsonl"), "empty.jsonl has no rows"),
        (("show", "a.jsonl", "b.jsonl"), "shows one file or run; name one of: a.jsonl, b.jsonl\n"),
        (("score", "a.jsonl", *DATA, "--rows", "a.jsonl"), "a.jsonl is read and would be written over"),
        (("score", "a.jsonl", *DATA, "--rows", "data.jsonl"), "data.jsonl is read and would be written over"),
        (("score", "a.jsonl", *DATA, "--rows", "no/r.jsonl"), "sousbatch: no/r.jsonl: No such file or directory"),
        (("ensemble", "a.jsonl", "b.jsonl", "--out", "b.jsonl"), "b.jsonl is read and would be written over"),
    ],
)
def test_what_cannot_be_done_is_refused(sousbatch: Run, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = sousbatch("predictions", *arguments)
    assert (code, out) == (2, "") and words in err, err
    assert not list(Path().glob("r.*"))


def test_predictions_of_other_rows_are_not_scored(sousbatch: Run) -> None:
    rows = [
        json.loads(line) | {"id": f"r-{place}"}
        for place, line in enumerate(Path("data.jsonl").read_text().splitlines())
    ]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sousbatch(*SCORE, *DATA)[0] == 0
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rows[:0:-1]]))
    code, _, err = sousbatch(*SCORE, *DATA)
    assert code == 2 and "row 2 of a.jsonl answers the id 'r-1', and row 2 of data.jsonl has 'r-3'" in err
    named = [row | {"id": place, "key": row["id"]} for place, row in enumerate(rows)]  # the recipe's column was "key"
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    assert sousbatch(*SCORE, *DATA)[0] == 0


def test_runs_over_other_rows_are_not_compared(sousbatch: Run, project: Path, tmp_path: Path) -> None:
    """They have as many rows, and a difference of their scores says nothing of the same rows."""
    Path("other.jsonl").write_text(Path("test.jsonl").read_text().replace("답 3", "답 4"))
    runs = []
    for number, test in enumerate(("test", "test", "other")):
        overrides = ("stages={predict: {}, merge: {}, score: {}}", f"data.splits.test={test}.jsonl")
        paths = RunPaths(root=tmp_path / "runs" / f"{number}" / "0123456789ab")
        paths.predictions("predict").mkdir(parents=True)
        paths.plan.write_text(sousbatch("plan", "small.yaml", *overrides, "--json")[1])
        rows = [{"index": place, "prediction": f"답 {place}"} for place in range(5)]
        paths.predictions_file("predict").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(str(paths.root))
    compare = ("predictions", "score", "--metric", "cer", "--compare", "--draws", "10")
    assert sousbatch(*compare, *runs[:2])[0] == 0
    code, out, err = sousbatch(*compare, runs[0], runs[2])
    assert (code, out) == (2, "") and "answer other rows: their targets differ" in err, err


def test_own_metrics_are_found_in_the_working_folder(sousbatch: Run) -> None:
    Path("mine_here.py").write_text(
        "from sousbatch.predictions.metrics import Metric\n"
        "LENGTH = Metric(score=lambda answers: {'length': [len(text) for text, _ in answers.texts]}, better='lower')\n"
    )
    code, out, err = sousbatch(*SCORE, "--data", "data.jsonl", "--metric", "mine_here:LENGTH", "--json")
    assert (code, err) == (0, "") and json.loads(out)["model"] == {"length": 1.25}


def test_rows_are_searched_and_shown_without_targets(sousbatch: Run) -> None:
    _, out, _ = sousbatch("predictions", "show", "b.jsonl", "--search", "구")
    assert out.splitlines() == ["rows with the text", "", "row 2 (id r-2)", "prediction  대구 \\x1b[31m"]
    _, out, _ = sousbatch("predictions", "show", "b.jsonl", *DATA, "--search", "שלום", "--best", "1", "--json")
    found = json.loads(out)
    assert [row["index"] for row in found["found"]] == [2] and found["best"][0]["scores"] == {"exact_match": 1.0}


def test_lines_fit_the_terminal_whatever_the_script() -> None:
    text = "깨끗한 방이 좋아요 " * 20 + "e\u0301" * 50 + "שלום"
    lines = wrap(text, 30)
    assert all(sum(map(text_width, line)) <= 30 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_nothing_that_steers_a_terminal_is_left() -> None:
    odd = "".join(map(chr, [*range(0x20), 0x7F, 0x9B, 0x2028, 0x202E, 0x2066, 0xFEFF, 0xD800]))
    shown = escape_text(odd + "가 나\u200d다")
    assert shown.endswith("가 나\u200d다")
    assert all(unicodedata.category(one)[0] != "C" or one == "\u200d" for one in shown)
