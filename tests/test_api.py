"""The functions for Python code: instant to import, with the errors of the one tree."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sousbatch
from sousbatch.errors import IncompleteError, NotFoundError, RunError, UsageError
from sousbatch.launchers.states import StageState
from sousbatch.run_folder import RunPaths


def test_the_import_imports_nothing_and_every_name_is_found() -> None:
    code = (
        "import sys, sousbatch\n"
        "print([name for name in sys.modules if name.startswith('sousbatch.')])\n"
        "print(set(sousbatch.__all__) <= set(dir(sousbatch)), all(getattr(sousbatch, n) for n in sousbatch.__all__))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue True\n"
    with pytest.raises(AttributeError, match="no attribute 'submitt'"):
        getattr(sousbatch, "submitt")  # noqa: B009


def test_a_type_checker_and_python_find_the_same_names() -> None:
    tree = ast.parse(Path(sousbatch.__file__).read_text(encoding="utf-8"))
    typed = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert set(sousbatch.__all__) == set(typed) - {"annotations", "TYPE_CHECKING", "import_module"}


@pytest.mark.parametrize("name", sousbatch.__all__)
def test_every_name_says_what_it_does(name: str) -> None:
    found = getattr(sousbatch, name)
    assert found.__doc__ and len(found.__doc__.splitlines()[0]) < 120
    assert all(one.__doc__ for key, one in inspect.getmembers(found) if not key.startswith("_") and callable(one))


def test_a_plan_has_the_stages_of_the_recipe(project: Path) -> None:
    recipe = sousbatch.compose("./small.yaml", ["train.steps=7"])
    plan = sousbatch.compile(recipe, sousbatch.inspect(recipe), launcher="local")
    assert [stage.name for stage in plan.stages] == ["train", "consolidate", "predict", "merge", "score"]
    assert sousbatch.compose("./small.yaml", smoke=True).train.steps == 2
    with pytest.raises(sousbatch.SousbatchError, match="trian is not a key"):
        sousbatch.compose("./small.yaml", ["trian=1"])


def test_the_inputs_of_another_recipe_are_refused(project: Path) -> None:
    inputs = sousbatch.inspect(sousbatch.compose(project / "small.yaml"))
    same = sousbatch.compose("./small.yaml", ["train.learning_rate=1e-4"])
    assert sousbatch.compile(same, inputs, launcher="local").stages, "what is read is the same"
    for override in ("data.splits.train=validation.jsonl", "data.max_tokens=9", "predict.rows=2"):
        with pytest.raises(sousbatch.SousbatchError, match=r"call inspect\(recipe\) again"):
            sousbatch.compile(sousbatch.compose("./small.yaml", [override]), inputs, launcher="local")


def test_one_text_in_place_of_several_is_refused(project: Path) -> None:
    with pytest.raises(UsageError, match=r"overrides is 'train.steps=3'; expected a list, such as \['train.steps=3'\]"):
        sousbatch.compose("./small.yaml", "train.steps=3")
    with pytest.raises(UsageError, match="metrics is 'cer'; expected a list"):
        sousbatch.score(["a"], ["b"], metrics="cer")
    with pytest.raises(UsageError, match="paths is 'rank0.jsonl'; expected a list"):
        sousbatch.merge_predictions("rank0.jsonl", project / "out.jsonl")
    with pytest.raises(UsageError, match="dtype is 'fp16'; known: float16, bfloat16, float32"):
        sousbatch.consolidate(project / "model", project / "out", dtype="fp16")  # type: ignore[arg-type]


STATES = {
    "done": ({"train": "done", "merge": "done"}, True),
    "under way": ({"train": "done", "merge": "running"}, False),
    "failed": ({"train": "lost", "merge": "failed"}, "stage merge is failed"),
    "cancelled": ({"train": "cancelled", "merge": "lost"}, "stage train is cancelled"),
}


@pytest.mark.parametrize(("words", "expected"), STATES.values(), ids=STATES)
def test_waiting_ends_with_the_run(
    words: dict[str, str], expected: bool | str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = sousbatch.Run(paths=RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab"))
    states = {name: StageState(word=word) for name, word in words.items()}  # type: ignore[arg-type]
    monkeypatch.setattr("sousbatch.launchers.overview.many_states", lambda runs, named: [(None, runs[0], states)])
    if isinstance(expected, str):
        with pytest.raises(RunError, match=expected):
            run.wait()
    else:
        assert run.wait(timeout_s=0) is expected


def test_what_is_not_there_yet_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="run '3f2a' does not exist"):
        sousbatch.open_run("3f2a")
    run = sousbatch.Run(paths=RunPaths(root=tmp_path / "small" / "0123456789ab"))
    assert (run.scores, run.logs("train")) == ({}, "")
    with pytest.raises(NotFoundError, match="has no merged predictions yet"):
        _ = run.predictions_path


def test_shards_are_merged_and_scored(tmp_path: Path) -> None:
    for rank in (0, 1):
        lines = [json.dumps({"index": number, "prediction": f"p {number}"}) for number in range(rank, 10, 2)]
        (tmp_path / f"rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out" / "merged.jsonl"
    out.parent.mkdir()
    assert sousbatch.merge_predictions([tmp_path], out, num_rows=10).is_complete
    with pytest.raises(IncompleteError):
        sousbatch.merge_predictions([tmp_path], out.with_name("more.jsonl"), num_rows=11)
    predictions = [json.loads(line)["prediction"] for line in out.read_text().splitlines()]
    assert sousbatch.score(predictions, [f"p {number}" for number in range(10)])["exact_match"] == 1
