"""Ensembles: rows, shapes and labels are matched by name, means are weighted, equals have a rule."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def join(
    sousbatch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    monkeypatch.chdir(tmp_path)

    def joined(*models: Sequence[dict[str, Any]], options: Sequence[str] = ()) -> tuple[int, list[dict[str, Any]], str]:
        names = [f"{'abc'[number]}.jsonl" for number in range(len(models))]
        for name, rows in zip(names, models, strict=True):
            Path(name).write_text("".join(json.dumps({"index": i, **row}) + "\n" for i, row in enumerate(rows)))
        code, _, err = sousbatch("predictions", "ensemble", *names, "--out", "out.jsonl", *options)
        out = Path("out.jsonl")
        rows = [json.loads(line) for line in out.read_bytes().split(b"\n") if line] if out.exists() else []
        return code, rows, err

    return joined


def probable(prediction: str, *values: float) -> dict[str, Any]:
    return {"prediction": prediction, "probabilities": list(values)}


def spans(null_score: float, **scores: float) -> dict[str, Any]:
    n_best = [{"text": text, "score": score, "start": ord(text)} for text, score in scores.items()]
    return {"prediction": next(iter(scores), ""), "start": 0, "score": 0.0, "null_score": null_score, "n_best": n_best}


def test_probabilities_are_averaged_with_weights(join: Any) -> None:
    options = ("--labels", "no,yes", "--weights", "3,1")
    code, rows, err = join([probable("no", 0.6, 0.4)], [probable("yes", 0.1, 0.9)], options=options)
    assert (code, err) == (0, "")
    assert rows == [{"index": 0, "prediction": "yes", "probabilities": pytest.approx([0.475, 0.525])}]


def test_a_mean_of_logits_is_not_one_of_probabilities(join: Any) -> None:
    models = ([probable("no", 0.6, 0.4)], [probable("yes", 0.001, 0.999)], [probable("no", 0.9, 0.1)])
    logits = [math.fsum(math.log(row["probabilities"][place]) for (row,) in models) / 3 for place in (0, 1)]
    _, rows, _ = join(*models, options=("--labels", "no,yes", "--of", "logits"))
    expected = math.exp(logits[0]) / (math.exp(logits[0]) + math.exp(logits[1]))
    assert rows[0]["probabilities"][0] == pytest.approx(expected, abs=1e-12)
    _, rows, _ = join(*models, options=("--labels", "no,yes"))
    assert rows[0]["probabilities"][0] == pytest.approx(1.501 / 3, abs=1e-12)


def test_labels_in_another_order_are_matched_by_name(join: Any) -> None:
    options = ("--labels", "no,yes", "--labels", "yes,no")
    _, rows, _ = join([probable("no", 0.8, 0.2)], [probable("no", 0.1, 0.9)], options=options)
    assert rows[0]["probabilities"] == pytest.approx([0.85, 0.15])
    named = {"prediction": "no", "probabilities": {"yes": 0.1, "no": 0.9}}
    _, rows, _ = join([{**named, "probabilities": {"no": 0.8, "yes": 0.2}}], [named])
    assert rows[0]["probabilities"] == pytest.approx([0.85, 0.15])


def test_predictions_tell_the_order_of_labels(join: Any) -> None:
    one = [probable("no", 0.8, 0.2), probable("yes", 0.3, 0.7)]
    other = [probable("no", 0.4, 0.6), probable("yes", 0.9, 0.1)]
    _, rows, _ = join(one, other)
    assert [row["prediction"] for row in rows] == ["no", "yes"]
    assert rows[1]["probabilities"] == pytest.approx([0.2, 0.8])


def test_of_equal_labels_the_first_is_taken(join: Any) -> None:
    models = ([probable("no", 0.7, 0.3)], [probable("yes", 0.3, 0.7)])
    assert join(*models, options=("--labels", "no,yes"))[1][0]["prediction"] == "no"


LABELS = ("--labels", "no,yes")
REFUSED: dict[str, tuple[list[list[dict[str, Any]]], tuple[str, ...], str]] = {
    "rows are missing": (
        [[probable("no", 1, 0)] * 2, [probable("no", 1, 0)]],
        LABELS,
        "b.jsonl ends after 1 rows, and a",
    ),
    "other ids": (
        [[{"id": "x", **probable("no", 1, 0)}], [{"id": "y", **probable("no", 1, 0)}]],
        LABELS,
        "row 0 has the id 'x' in a.jsonl and 'y' in b.jsonl",
    ),
    "other labels": (
        [[probable("no", 1, 0)], [probable("no", 1, 0)]],
        (*LABELS, "--labels", "no,maybe"),
        "the labels differ: only a.jsonl has yes, only b.jsonl has maybe",
    ),
    "another number of labels": (
        [[probable("no", 1, 0)], [probable("no", 1, 0, 0)]],
        LABELS,
        "row 0 of b.jsonl has 3 probabilities, and there are 2 labels",
    ),
    "a wrong order": (
        [[probable("no", 1, 0)], [probable("no", 0, 1)]],
        LABELS,
        "b.jsonl predicts 'no', and the likeliest",
    ),
    "other ids of the later ones": (
        [[probable("no", 1, 0)], [{"id": 1, **probable("no", 1, 0)}], [{"id": 2, **probable("no", 1, 0)}]],
        LABELS,
        "row 0 has the id 1 in b.jsonl and 2 in c.jsonl",
    ),
    "a wrong order of logits": (
        [[{"prediction": "no", "logits": [3.0, -1.0]}], [{"prediction": "no", "logits": [-1.0, 3.0]}]],
        (*LABELS, "--of", "logits"),
        "b.jsonl predicts 'no', and the likeliest",
    ),
    "labels never predicted": ([[probable("no", 1, 0)]] * 2, (), "a.jsonl does not tell the labels"),
    "a label named twice": ([[probable("no", 1, 0)]] * 2, ("--labels", "no,no"), "must be labels with commas between"),
    "NaN": (
        [[probable("no", 1, 0)], [probable("no", math.nan, 0)]],
        LABELS,
        "b.jsonl has a probability that is no number",
    ),
    "no probabilities": ([[probable("no", 3, 1)], [probable("no", 1, 0)]], LABELS, "do not add up to 1"),
    "a text": (
        [[{"prediction": "no", "probabilities": "[0.6 0.4]"}], [probable("no", 1, 0)]],
        LABELS,
        r"row 0 of a.jsonl has the probabilities '\[0.6 0.4\]', and they are a list",
    ),
    "log-probabilities of tokens, whose ids differ": (
        [[{"prediction": "가", "probabilities": [[[5, -0.1]], [[7, -0.2]]]}]] * 2,
        LABELS,
        "their ids mean something with one tokenizer alone",
    ),
    "a number as text": ([[probable("no", 1, "0")]] * 2, LABELS, "row 0 of a.jsonl has '0' for 'yes', and a prob"),  # type: ignore[arg-type]
    "texts beside probabilities": (
        [[{"prediction": "no"}], [probable("no", 1, 0)]],
        LABELS,
        "b.jsonl has what --by probabilities joins, and a.jsonl what --by risk joins; say which",
    ),
    "booleans": (
        [[probable("no", True, False)]] * 2,
        LABELS,
        "row 0 of a.jsonl has True for 'no', and a probability is a",
    ),
    "a span that starts at a text": (
        [[spans(0.0, a=1.0)], [{**spans(0.0), "n_best": [{"text": "a", "start": "97", "score": 1.0}]}]],
        (),
        "row 0 of b.jsonl has a span that starts at '97', and a start is a whole number",
    ),
    "a span without text": (
        [[spans(0.0, a=1.0)], [{**spans(0.0), "n_best": [{"text": None, "start": 0, "score": 1.0}]}]],
        (),
        "row 0 of b.jsonl has a span whose text is None",
    ),
    "a threshold that is no number": ([[spans(0.0, a=1.0)]] * 2, ("--null-threshold", "nan"), "must be a number"),
    "a span named twice": (
        [[spans(0.0, a=1.0)], [{**spans(0.0), "n_best": spans(0.0, a=1.0)["n_best"] * 2}]],
        (),
        "row 0 of b.jsonl has the span 'a' at 97 twice",
    ),
    "as many weights": ([[probable("no", 1, 0)]] * 2, ("--weights", "1,2,3"), "3 numbers for 2 models"),
    "texts as spans": ([[{"prediction": "가"}]] * 2, ("--by", "spans"), "has no spans"),
    "a file of another format": ([[{"prediction": "a"}]] * 2, ("--out", "out.csv"), "out.csv would hold lines of JSON"),
    "a folder": ([[{"prediction": "a"}]] * 2, ("--out", "."), "is a folder; name the joined file"),
    "an index that is no whole number": ([[{"prediction": "a", "index": 0.0}]] * 2, (), "not in row order"),
    "a row in the middle that is missing": (
        [[{"prediction": "a", "index": index} for index in (0, 2)]] * 2,
        (),
        "not in row order, or lacks rows: it has 2 in the place of 1; .* names what is missing",
    ),
    "one model": ([[{"prediction": "가"}]], (), "needs two models or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_leaves_no_file(join: Any, case: str) -> None:
    models, options, words = REFUSED[case]
    code, rows, err = join(*models, options=options)
    assert (code, rows) == (1 if "row order" in err else 2, []) and re.search(words, err), err


def test_a_model_that_is_named_twice_is_refused(sousbatch: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prediction": "a"}\n')
    twice = [str(tmp_path / name) for name in ("a.jsonl", "./a.jsonl")]
    code, _, err = sousbatch("predictions", "ensemble", *twice, "--out", str(tmp_path / "o.jsonl"))
    assert code == 2 and "a.jsonl is named twice; --weights gives a model more weight than" in err


def test_weights_of_any_size_are_shares(join: Any) -> None:
    models = ([probable("no", 0.6, 0.4)], [probable("no", 0.8, 0.2)])
    _, rows, _ = join(*models, options=(*LABELS, "--weights", "1e308,1e308"))
    assert rows[0]["probabilities"] == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize("texts", [["é", "x", "e\u0301"], [1, 2, "1"], [2.0, "3", 2]])
def test_one_text_written_in_two_ways_has_both_votes(join: Any, texts: list[Any]) -> None:
    _, rows, _ = join(*[[{"prediction": one}] for one in reversed(texts)], options=("--by", "majority"))
    assert rows[0]["prediction"] == texts[-1]


def test_texts_are_chosen_by_least_risk(join: Any) -> None:
    texts = ["아주 좋은 방", "전혀 다른 글", "아주 좋은 곳"]
    _, rows, _ = join(*[[{"id": "a-1", "prediction": text}] for text in texts])
    assert rows == [{"index": 0, "id": "a-1", "prediction": "아주 좋은 방"}]
    _, rows, _ = join(*[[{"prediction": text}] for text in texts], options=("--weights", "1,9,1", "--metric", "cer"))
    assert rows[0]["prediction"] == "전혀 다른 글"


def test_the_majority_wins_and_the_first_of_equals(join: Any) -> None:
    models = [[{"prediction": one}, {"prediction": other}] for one, other in (("a", "c\u2028"), ("b", ""), ("b", "d"))]
    _, rows, _ = join(*models, options=("--by", "majority"))
    assert [row["prediction"] for row in rows] == ["b", "c\u2028"]


def test_span_scores_are_averaged_over_the_spans_of_all_models(join: Any) -> None:
    models = ([spans(0.0, a=5.0, b=4.0)], [spans(2.0, b=6.0, c=1.0)])
    _, rows, _ = join(*models, options=("--of", "logits"))
    assert (rows[0]["prediction"], rows[0]["null_score"]) == ("b", 1.0)
    assert [(one["text"], one["score"]) for one in rows[0]["n_best"]] == [("b", 5.0), ("a", 3.0), ("c", 2.5)]
    _, rows, _ = join(*models)
    total = [math.fsum(math.exp(value) for value in values) for values in ((0, 5, 4), (2, 6, 1))]
    share = (math.exp(4) / total[0] + math.exp(6) / total[1]) / 2
    assert rows[0]["score"] == pytest.approx(math.log(share))
    _, rows, _ = join(*models, options=("--of", "logits", "--null-threshold", "-5"))
    assert (rows[0]["prediction"], rows[0]["start"]) == ("", None)


def test_runs_leave_questions_without_answer_by_the_threshold_of_their_recipe(
    sousbatch: Run, frozen: Callable[..., RunPaths], tmp_path: Path
) -> None:
    def run(seed: int, threshold: float) -> str:
        paths = frozen(f"seed={seed}")
        plan = paths.plan.read_text()
        assert '"null_threshold": null' in plan
        paths.plan.write_text(plan.replace('"null_threshold": null', f'"null_threshold": {threshold}'))
        paths.predictions("predict").mkdir(parents=True)
        paths.predictions_file("predict").write_text(json.dumps({"index": 0, **spans(2.0, a=1.0)}) + "\n")
        return str(paths.root)

    def join(*runs: str) -> tuple[int, str, str]:
        return sousbatch("predictions", "ensemble", *runs, "--out", str(tmp_path / "out.jsonl"))

    first, *others = run(1, 0.5), run(2, 0.5), run(3, 1.5)
    assert join(first, others[0])[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == ""
    code, _, err = join(first, others[1])
    assert code == 2 and "different thresholds of no answer" in err and "give --null-threshold" in err
    assert join(first, others[1], "--null-threshold=1.2")[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["prediction"] == "a"
    files = [str(next(Path(root).rglob("predictions.jsonl"))) for root in (first, others[0])]
    assert "every question gets an answer" in join(*files)[1]


def test_probabilities_and_spans_in_the_cells_of_a_csv_file_are_read(sousbatch: Run, tmp_path: Path) -> None:
    for name in "ab":
        rows = '1,yes,"[0.3, 0.7]"\n2,no,"{""yes"": 0.4, ""no"": 0.6}"\n'
        (tmp_path / f"{name}.csv").write_text("id,prediction,probabilities\n" + rows)
    spans_of = {name: json.dumps(value) for name, value in spans(0.5, a=2.0).items()}
    for name in "cd":
        with (tmp_path / f"{name}.csv").open("w") as stream:
            writer = csv.DictWriter(stream, list(spans_of))
            writer.writeheader()
            writer.writerow(spans_of)
    out = tmp_path / "out.jsonl"
    names = [str(tmp_path / f"{name}.csv") for name in "cd"]
    assert sousbatch("predictions", "ensemble", *names, "--out", str(out), "--of", "logits")[0] == 0
    assert (json.loads(out.read_text())["prediction"], json.loads(out.read_text())["null_score"]) == ("a", 0.5)
    names = [str(tmp_path / f"{name}.csv") for name in "ab"]
    assert sousbatch("predictions", "ensemble", *names, "--out", str(out), "--labels", "no,yes")[0] == 0
    (tmp_path / "b.csv").write_text("prediction\nyes\nno\n")
    code, said, _ = sousbatch("predictions", "ensemble", *names, "--out", f"{out}l.jsonl", "--by", "majority")
    assert code == 0 and said.count("says neither index nor id") == 1 and "b.csv says neither" in said
    joined = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prediction"] for row in joined] == ["yes", "no"]
    assert joined[0]["probabilities"] == pytest.approx([0.3, 0.7])
