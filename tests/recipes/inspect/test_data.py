"""Which splits and columns the stages need, and what is wrong with those that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sousbatch import user_folders
from sousbatch.errors import PlanError
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.data import read_splits


def _reasons(*overrides: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        read_splits(compose("./small.yaml", overrides))
    return list(caught.value.reasons)


def test_rows_and_columns_are_counted(project: Path) -> None:
    found = read_splits(compose("./small.yaml"))
    assert {name: (split.num_rows, split.columns) for name, split in found.items()} == {
        "train": (10, ("input", "target")),
        "validation": (3, ("input", "target")),
        "test": (5, ("input", "target")),
    }


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ([], ["test", "train", "validation"]),
        (["train.eval_split=null"], ["test", "train"]),
        (["stages={train: {}, consolidate: {}}"], ["train", "validation"]),
        (["stages={predict: {}}", "predict.split=train"], ["train"]),
        (["stages={train: {set: {train: {split: test, eval_split: null}}}}"], ["test"]),
    ],
    ids=str,
)
def test_only_what_a_stage_needs_is_looked_at(project: Path, overrides: list[str], needed: list[str]) -> None:
    assert sorted(read_splits(compose("./small.yaml", ["+data.splits.unused=none.jsonl", *overrides]))) == needed


ONLY_PREDICT = "stages={predict: {}}"
ONLY_TRAIN = "stages={train: {set: {train: {eval_split: null}}}}"
MISSING = {
    "predicted": (["predict.split=tets"], "split 'tets' (predict.split) is not in data.splits; known: train,"),
    "trained on": (["train.split=all"], "split 'all' (train.split) is not in data.splits"),
    "evaluated": (["train.eval_split=dev"], "split 'dev' (train.eval_split) is not in data.splits"),
    "no file": (["data.splits.test=none.jsonl"], "data.splits.test: file 'none.jsonl' does not exist: looked for /"),
    "input": (["data.columns.input=inptu", ONLY_PREDICT], "split 'test' has no column 'inptu' (data.columns.input);"),
    "id": (["data.columns.id=key"], "split 'test' has no column 'key' (data.columns.id);"),
    "in the prompt": (["data.prompt='{genre}'", ONLY_PREDICT], "split 'test' has no column 'genre' (data.prompt);"),
    "plain text": (["data.prompt=''", ONLY_TRAIN], "split 'train' has no column 'text' (data.columns.text);"),
}


@pytest.mark.parametrize(("overrides", "reason"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named_with_the_key_that_asks_for_it(
    project: Path, overrides: list[str], reason: str
) -> None:
    (found,) = _reasons(*overrides)
    assert found.startswith(reason)


def test_the_nearest_split_is_named(project: Path) -> None:
    assert "(did you mean 'test'?)" in _reasons("predict.split=tets")[0]


def test_rows_may_have_no_names(project: Path) -> None:
    assert _reasons("data.columns.id=key")[0].endswith("; set data.columns.id=null where rows have no names")


def test_a_split_without_targets_is_told_how_to_do_without_scores(project: Path) -> None:
    (project / "bare.jsonl").write_text('{"input": "a"}\n')
    stages = "stages={train: {}, consolidate: {}, predict: {}, merge: {}}"
    (reason,) = _reasons("data.splits.test=bare.jsonl")
    assert reason.endswith(f"; to predict without scores, set '{stages}'")
    own = ("stages={train: {}, consolidate: {}, predict: {}, merge: {}, marks: {kind: score}}",)
    assert _reasons("data.splits.test=bare.jsonl", *own)[0].endswith("; to predict without scores, set ~stages.marks")
    for way in ((stages,), (*own, "~stages.marks")):
        read_splits(compose("./small.yaml", ("data.splits.test=bare.jsonl", *way)))


def test_a_column_of_lists_is_refused_and_not_read_as_text(project: Path) -> None:
    """str() of a list of messages would train on Python's brackets and quotes."""
    path = project / "train.jsonl"
    path.write_text(path.read_text() + '{"input": [{"role": "user", "content": "a"}], "target": "b"}\n')
    (reason,) = _reasons(ONLY_TRAIN)
    assert reason.startswith("row 11 of split 'train' has a list in column 'input' (data.columns.input) of ")


def test_without_files_to_evaluate_and_predict_the_ways_out_are_named(project: Path) -> None:
    reasons = _reasons("data.splits={train: train.jsonl}")
    assert any("set train.eval_split=null to do without" in reason for reason in reasons)
    assert any("to train only, set 'stages={train: {}, consolidate: {}}'" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "'.' is a folder; name its files, such as '*.jsonl'; it holds small.yaml, test.jsonl"),
        ("x*.jsonl", "the pattern 'x*.jsonl' matches no file: looked in /"),
        ("no.jsonl", "no.jsonl; relative paths start at the working folder, not at the recipe"),
    ],
)
def test_what_is_no_file_is_said_to_be_what_it_is(project: Path, name: str, reason: str) -> None:
    assert reason in _reasons(f"data.splits.train={name!r}", ONLY_TRAIN)[0]


@pytest.mark.parametrize(("override", "is_advised"), [("train.eval_split=dev", True), ("predict.split=dev", False)])
def test_only_a_lack_of_the_eval_split_can_be_done_without(project: Path, override: str, is_advised: bool) -> None:
    assert ("set train.eval_split=null to do without" in _reasons(override)[0]) is is_advised


def test_everything_missing_comes_at_once(project: Path) -> None:
    assert len(_reasons("predict.split=a", "train.eval_split=b", "data.splits.train=c.jsonl")) == 3


def test_predicting_alone_needs_no_target(project: Path) -> None:
    (project / "test.jsonl").write_text('{"input": "a"}\n')
    assert read_splits(compose("./small.yaml", ["stages={predict: {}}"]))["test"].columns == ("input",)


def test_scoring_needs_the_target_of_what_its_predictions_answer(project: Path) -> None:
    (project / "bare.jsonl").write_text('{"input": "a"}\n')
    predict = "a: {kind: predict}, b: {kind: predict, set: {predict: {split: bare}}}"
    stages = f"stages={{{predict}, m: {{kind: merge, of: a}}, s: {{kind: score}}}}"
    overrides = ["data.splits.bare=bare.jsonl", stages]
    assert sorted(read_splits(compose("./small.yaml", overrides))) == ["bare", "test"]
    (reason,) = _reasons(*overrides[:1], stages.replace("of: a", "of: b"))
    assert reason.startswith("split 'bare' has no column 'target' (data.columns.target)")


def test_a_row_that_lacks_a_column_is_named(project: Path) -> None:
    (project / "test.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": "a"}\n')
    (reason,) = _reasons()
    assert reason.startswith("row 2 of split 'test' has no column 'target'")


def test_an_empty_file_is_named(project: Path) -> None:
    (project / "test.jsonl").write_text("\n")
    (reason,) = _reasons()
    assert "test.jsonl of split 'test' is empty" in reason


def test_a_split_may_not_be_given_and_made(project: Path) -> None:
    (reason,) = _reasons(
        "+data.generator={num_train: 4, num_validation: 2, num_test: 2}", "~data.splits.train", "~data.splits.test"
    )
    assert reason.startswith("data.splits.validation is also made by data.generator")


def test_a_made_split_stands_beside_given_ones(project: Path) -> None:
    found = read_splits(
        compose(
            "./small.yaml",
            [
                "data.generator={num_train: 4, num_validation: 2, num_test: 2}",
                "data.splits={mine: test.jsonl}",
                "predict.split=mine",
            ],
        )
    )
    assert {name: split.num_rows for name, split in found.items()} == {"train": 4, "validation": 2, "mine": 5}


def test_a_file_by_url_is_fetched_once(project: Path) -> None:
    recipe = compose(
        "./small.yaml", [f"data.splits.test='file://{project}/test.jsonl'".replace("my 'project'", "my \\'project\\'")]
    )
    first = read_splits(recipe)["test"]
    (project / "test.jsonl").unlink()
    assert read_splits(recipe)["test"] == first


def test_a_row_of_several_files_is_named_with_the_file_that_it_came_from(project: Path) -> None:
    (project / "part-1.csv").write_text("input,target\na,b\nc,d\n")
    (project / "part-2.csv").write_text("input,answer\ne,f\n")
    (reason,) = _reasons("data.splits.train=part-*.csv", ONLY_TRAIN)
    assert reason.startswith("row 3 (row 1 of part-2.csv) of split 'train' has no column 'target'")
    assert "part-1.csv, part-2.csv has there: input, answer" in reason
    (project / "part-2.csv").write_text('{"input": "e", "target": NaN}\n')
    (project / "part-2.csv").rename("part-2.jsonl")
    (reason,) = _reasons("data.splits.train=[part-1.csv, part-2.jsonl]", ONLY_TRAIN)
    assert reason.startswith("row 3 (row 1 of part-2.jsonl) of split 'train' has null in column 'target'")


def test_nan_is_no_value(project: Path) -> None:
    (project / "test.jsonl").write_text('{"input": "a", "target": "b"}\n{"input": "e", "target": NaN}\n')
    (reason,) = _reasons()
    assert reason.startswith("row 2 of split 'test' has NaN in column 'target' (data.columns.target) of ")


def test_a_file_is_read_again_only_when_it_changed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = user_folders.cached

    def counting(kind: str, key: object, make: object) -> object:
        return real(kind, key, lambda: (made.append(kind), make())[1])  # type: ignore[operator,func-returns-value]

    monkeypatch.setattr("sousbatch.recipes.inspect.data.cached", counting)
    recipe = compose("./small.yaml")
    read_splits(recipe)
    read_splits(recipe)
    assert len(made) == 3
    (project / "test.jsonl").write_text('{"input": "new", "target": "new"}\n')
    assert read_splits(recipe)["test"].num_rows == 1


def test_a_used_column_of_bytes_is_refused_and_another_is_left_alone(project: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = {"input": ["a", "b"], "target": ["c", "d"], "image": [b"x", b"y"]}
    parquet.write_table(pyarrow.table(table), "train.parquet")
    assert read_splits(compose("./small.yaml", ["data.splits.train=train.parquet"]))["train"].num_rows == 2
    parquet.write_table(pyarrow.table({**table, "input": [b"a", b"b"]}), "train.parquet")
    (reason,) = _reasons("data.splits.train=train.parquet")
    assert reason.startswith("row 1 of split 'train' has bytes in column 'input' (data.columns.input) of ")
