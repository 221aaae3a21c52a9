"""Template, rules and own functions are read at plan: what the merge cannot use is refused there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.errors import PlanError
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect import used_files
from sousbatch.recipes.inspect.data import read_splits
from sousbatch.recipes.inspect.used_files import read_used_files

pytestmark = pytest.mark.usefixtures("project")


def _read(*overrides: str) -> dict[str, str]:
    recipe = compose("./small.yaml", overrides)
    found = read_used_files(recipe, read_splits(recipe), ())
    return {name: Path(one.path).name for name, one in found.items()}


def _reason(*overrides: str) -> str:
    with pytest.raises(PlanError) as caught:
        _read(*overrides)
    assert len(caught.value.reasons) == 1
    return caught.value.reasons[0]


def test_without_any_nothing_is_read_and_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(used_files.subprocess, "run", None)
    assert _read("predict.post=[strip,blanks]") == {}


def test_rules_templates_and_functions_of_the_working_folder_are_found() -> None:
    Path("rules.tsv").write_text("a\tb\n")
    Path("fix.py").write_text("print('hello')\ndef tidy(text):\n    return text\n")
    Path("sample.csv").write_text("input,target\n" + "".join(f"test {number},\n" for number in range(5)))
    given = ["predict.post=[replace:rules.tsv, fix:tidy]", "predict.output.template=sample.csv"]
    found = {"rules.tsv": "rules.tsv", "fix:tidy": "fix.py", "sample.csv": "sample.csv"}
    assert _read(*given) == found


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("predict.post=['replace:gone.tsv']", "predict.post names 'gone.tsv', and there is no file"),
        ("predict.post=['replace:train.jsonl']", "replace:train.jsonl, line 1 is no rule"),
        ("predict.post=['gone:tidy']", "there is no module 'gone': it is looked for in environment.code"),
        ("predict.post=['json:dumpz']", "no function 'dumpz' (did you mean 'dump'?)"),
        ("predict.output.template=gone.csv", "predict.output.template names 'gone.csv', and there is no file"),
        ("predict.output.template=train.jsonl", "does not have the id 'test 0', 'test 1', 'test 2' and 2 more"),
        ("predict.output.columns={label: labels}", "column 'label' is given by nothing called 'labels'"),
    ],
)
def test_what_the_merge_cannot_use_is_one_line_at_plan(override: str, reason: str) -> None:
    assert reason in _reason(override)


def test_a_function_that_needs_a_second_file_of_the_working_folder_says_where_it_belongs() -> None:
    Path("fix.py").write_text("import fix_words\ndef tidy(text):\n    return text\n")
    Path("fix_words.py").write_text("")
    reason = _reason("predict.post=['fix:tidy']")
    assert "No module named 'fix_words'" in reason and f"set environment.code=[{Path.cwd()}]" in reason
    Path("tools").mkdir()
    for name in ("fix.py", "fix_words.py"):
        Path(name).rename(Path("tools") / name)
    assert _read("predict.post=['fix:tidy']", "environment.code=[tools]") == {}, "it is frozen with that folder"


def test_rows_of_a_part_need_not_be_all_of_the_template() -> None:
    Path("sample.csv").write_text("input,target\n" + "".join(f"test {number},\n" for number in range(5)))
    assert _read("predict.rows=2", "predict.output.template=sample.csv") == {"sample.csv": "sample.csv"}


def test_a_file_without_all_rows_of_its_template_is_warned_of(sousbatch: Callable[..., tuple[int, str, str]]) -> None:
    Path("sample.csv").write_text("input,target\n" + "".join(f"test {number},\n" for number in range(5)))
    given, says = ("plan", "small.yaml", "predict.output={template: sample.csv}"), "predicts 2 of 5 rows"
    assert says not in sousbatch(*given)[1]
    code, out, err = sousbatch(*given, "predict.rows=2")
    assert code == 0 and f"{says}, and predict.output will have those of template sample.csv alone" in out, err


def test_the_run_id_changes_with_what_is_in_the_files(project: Path) -> None:
    from sousbatch import api

    Path("rules.tsv").write_text("a\tb\n")
    recipe = api.compose("./small.yaml", ["predict.post=['replace:rules.tsv']"])
    before = api.compile(recipe, api.inspect(recipe), launcher="local")
    Path("rules.tsv").write_text("a\tc\n")
    after = api.compile(recipe, api.inspect(recipe), launcher="local")
    assert before.run_id != after.run_id
    assert json.loads(after.to_json())["inputs"]["used_files"]["rules.tsv"]["digest"]
