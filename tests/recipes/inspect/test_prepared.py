"""Splits are prepared once, into the cache; the plan's stages point to the prepared files."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch import files
from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect import prepared
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.plan import Plan

SITE = Site(
    name="here", launcher="local", cpus_per_node=4, memory_bytes=16 * 10**9, gpus_per_node=0, gpu_memory_bytes=0
)
TRAIN_ONLY = "stages={train: {set: {train: {eval_split: null}}}}"
OWN = """
import sys
print("imported")

def fix(row):
    print('{"answer": 1}')
    if row["input"].endswith(" 1"):
        return None
    return {**row, "question": row["input"].upper()}

def leave(row):
    sys.exit(3)

def die(row):
    import os
    print("dying", file=sys.stderr, flush=True)
    os._exit(9)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _plan(*overrides: str) -> Plan:
    recipe = compose("./small.yaml", overrides)
    return compile(recipe, SITE, inspect(recipe, Path("runs")))


def _reasons(*overrides: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        _plan(*overrides)
    return list(caught.value.reasons)


def _lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_stages_read_the_prepared_rows_and_count_their_steps_by_them(project: Path) -> None:
    rows = _lines("train.jsonl")
    files.write_text(
        project / "train.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, *rows, {**rows[0], "input": " "}])
    )
    plan = _plan("data.clean=[blanks,drop_empty,drop_duplicates]", "data.augment={name: hangul, copies: 2}")
    train = plan.stage("train").splits["train"]
    assert (train.num_rows, train.num_examples) == (30, 30)
    assert [row["target"] for row in _lines(train.path)[::3]] == [row["target"] for row in rows]
    assert train.digest == files.digest_file(Path(train.path)) and train.path != str(project / "train.jsonl")
    counts = {step.name: step for step in plan.inputs.prepared[0].steps}
    assert counts["clean drop_duplicates"].dropped.first == (11, 12, 13, 14, 15)
    assert counts["augment hangul"].added == 20
    predicted, scored = plan.stage("predict").splits["predict"], plan.stage("score").splits["score"]
    assert (predicted.path, predicted.num_rows) == (scored.path, 5)


def test_a_recipe_without_steps_prepares_nothing(project: Path) -> None:
    plan = _plan()
    assert plan.inputs.prepared == () and plan.stage("train").splits["train"].path == str(project / "train.jsonl")


def test_rows_are_prepared_once_and_again_when_source_or_steps_change(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = prepared.write
    monkeypatch.setattr(prepared, "write", lambda work, report: written.append(work.split) or write(work, report))
    clean, more = "data.clean=[blanks]", "data.clean=[blanks,html]"
    ids = [_plan(clean).run_id, _plan(clean).run_id, _plan(more).run_id]
    assert sorted(written) == sorted(["train", "validation", "test"] * 2) and ids[0] == ids[1] != ids[2]
    with (project / "test.jsonl").open("a") as stream:
        stream.write('{"input": "a  b", "target": "c"}\n')
    ids.append(_plan(clean).run_id)
    assert written[6:] == ["test"] and ids[3] != ids[0]
    Path(_plan(clean).stage("predict").splits["predict"].path).unlink()  # somebody cleaned the cache
    assert Path(_plan(clean).stage("predict").splits["predict"].path).is_file()


def test_own_functions_run_in_a_process_of_their_own_and_may_make_columns(project: Path) -> None:
    (project / "own_prep.py").write_text(OWN)
    plan = _plan("data.clean=[own_prep:fix]", "data.columns.input=question", TRAIN_ONLY)
    found = plan.inputs.prepared[0]
    assert "own_prep" not in sys.modules
    assert (found.rows.num_rows, found.num_source_rows, found.steps[0].dropped.first) == (9, 10, (2,))
    assert found.sources == {str(project / "own_prep.py"): files.digest_file(project / "own_prep.py")}
    (project / "own_prep.py").write_text(OWN + "\n# edited\n")
    again = _plan("data.clean=[own_prep:fix]", "data.columns.input=question", TRAIN_ONLY)
    assert again.run_id != plan.run_id and again.inputs.prepared[0].rows.digest == found.rows.digest


def test_code_folders_come_before_the_working_folder(project: Path) -> None:
    (project / "lab").mkdir()
    (project / "lab" / "own_lab.py").write_text("def f(row):\n    return {**row, 'input': 'lab'}\n")
    (project / "own_lab.py").write_text("def f(row):\n    return {**row, 'input': 'here'}\n")
    plan = _plan("data.clean=[own_lab:f]", "environment.code=[lab]", TRAIN_ONLY)
    assert _lines(plan.stage("train").splits["train"].path)[0]["input"] == "lab"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.clean=[own_prep:leave]"], "own_prep:leave failed at row 1 of split 'train': SystemExit: 3"),
        (["data.clean=[own_prep:die]"], "ended without an answer: dying"),
        (
            ["data.clean=['min_chars:999']"],
            "split 'train' has no row left of 10 for stage 'train': clean min_chars:999",
        ),
        (["data.clean=[own_prep:fix]", "data.columns.input=qestion"], "split 'train' has no column 'qestion'"),
        (["data.clean=[blanks]", "data.columns.input=qestion"], "split 'train' has no column 'qestion'"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_for_each_split(project: Path, overrides: list[str], said: str) -> None:
    (project / "own_prep.py").write_text(OWN)
    reasons = _reasons(*overrides, TRAIN_ONLY)
    assert said in reasons[0] and all("\n" not in reason for reason in reasons)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    project: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(rows: Any) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepared, "as_line", full)
    reasons = _reasons("data.clean=[blanks]")
    assert "no space left in " in reasons[0] and "SOUSBATCH_CACHE" in reasons[0]
    assert not [path for path in (cache / "prepared").rglob("*") if path.is_file()]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = prepared.tightest
    monkeypatch.setattr(prepared, "tightest", lambda limits: replace(tight(limits), num_bytes=100))
    reasons = _reasons("data.clean=[blanks]")
    assert "split 'train' takes about" in reasons[0] and "has 1e-07 GB free" in reasons[0]
