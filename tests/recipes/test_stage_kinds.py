"""The contract of a stage kind: its record is complete, its job exists, and a plan with it can be read back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest

import sousbatch
from sousbatch.launchers.base import JobState
from sousbatch.launchers.states import stage_states
from sousbatch.recipes.compile import compile
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.recipes.plan_summary import read_summary
from sousbatch.recipes.schema import StageSettings, StageSpec
from sousbatch.recipes.stage_kinds import RECIPE_KINDS, STAGE_KINDS, USUAL_KINDS, StageKind

ROOT = Path(sousbatch.__file__).parent
SECTIONS = {field.name for field in fields(StageSettings)}
SOURCES = sorted(
    path
    for folder in ROOT.iterdir()
    if (folder / "__init__.py").is_file() and folder.name != "tests" and not folder.name.startswith(".")
    for path in folder.rglob("*.py")
)


def _chain(kind: str) -> list[str]:
    """Return the kinds of stages that a stage of *kind* needs above it, and itself."""
    record = STAGE_KINDS[kind]
    return [*(_chain(record.source) if record.source and record.takes_source == "required" else []), kind]


@pytest.fixture(params=RECIPE_KINDS)
def plan(request: pytest.FixtureRequest, small: ModuleType) -> Plan:
    """A plan that ends with a stage of the kind."""
    stages = {name: StageSpec() for name in _chain(request.param)}
    return compile(replace(small.RECIPE, stages=stages), small.SITE, small.INPUTS)


@pytest.mark.parametrize("name", STAGE_KINDS)
def test_its_record_is_complete(name: str) -> None:
    kind = STAGE_KINDS[name]
    assert kind.does and kind.name == name
    assert kind.source is None or kind.source in STAGE_KINDS
    assert (
        {*kind.inherits, *kind.reads} <= SECTIONS
        and set(kind.foresees) <= set(kind.reads)
        and (kind.source or not kind.inherits)
    )
    assert (kind.progress in ("parts", "points", "rows")) == (kind.shares is not None)
    assert kind.is_usual <= (not kind.looks_after_itself)
    assert kind.uses_devices or not kind.is_distributed


@pytest.mark.parametrize("name", STAGE_KINDS)
def test_its_job_is_a_module_found_by_its_name(name: str) -> None:
    source = ROOT.joinpath(*STAGE_KINDS[name].module.split(".")[1:]).with_suffix(".py")
    tree = ast.parse(source.read_text())
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    asked = re.findall(r"\bsettings\.(\w+)", source.read_text())
    assert SECTIONS & {*asked} - {"task", "seed"} <= {*STAGE_KINDS[name].reads}


def test_a_new_kind_is_one_record_and_one_job(small: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    export = StageKind(name="export", does="writes a model anew", source="consolidate", is_usual=False)
    monkeypatch.setitem(STAGE_KINDS, "export", export)
    stages = {name: StageSpec() for name in ("train", "consolidate", "export")}
    plan = compile(replace(small.RECIPE, stages=stages), small.SITE, small.INPUTS)
    stage = plan.stage("export")
    assert (stage.of, stage.record.module, stage.train_stage) == ("consolidate", "sousbatch.jobs.export", "train")
    assert stage_states(plan, [], {"export": JobState(word="waiting")})["export"].total == 0


def test_a_plan_with_it_is_read_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert read_plan(path) == plan
    summary = read_summary(path)
    assert not summary.problem and [stage.kind for stage in summary.stages] == [stage.kind for stage in plan.stages]


def test_its_progress_can_be_told_before_it_begins(plan: Plan) -> None:
    stage = plan.stages[-1]
    state = stage_states(plan, [], {stage.name: JobState(word="waiting")})[stage.name]
    assert state.step == 0 and (state.total > 0) == bool(stage.steps)


def test_a_stage_has_what_its_kind_needs(plan: Plan) -> None:
    stage = plan.stages[-1]
    assert set(stage.splits) == set(stage.record.rows)
    assert (stage.batch is not None) == (stage.record.leaves == "checkpoints")
    assert stage.num_tasks == 1 or stage.record.shares


def test_the_usual_stages_are_kinds_that_a_recipe_can_have() -> None:
    assert set(USUAL_KINDS) <= set(RECIPE_KINDS) < set(STAGE_KINDS)


def _texts(node: ast.expr) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


def test_nothing_compares_the_name_of_a_kind() -> None:
    wrong = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            names = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            texts = {text for side in sides for text in _texts(side)}
            if any(name.endswith("kind") for name in names) and texts & set(STAGE_KINDS):
                wrong.append(f"{source.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_a_job_reads_what_is_in_its_stage_and_derives_nothing() -> None:
    """Jobs and launchers read no section of the recipe, resolve no stages, and ask nothing that planning found out."""
    of_the_run = "checkpoints.store_budget_gb"  # the one key of a section that is about all runs
    derived = re.compile(
        rf"\brecipe\.(?!{of_the_run})({'|'.join(SECTIONS)})\b|\binputs\.(splits|lengths)\b|recipes\.stages import"
    )
    wrong = [
        f"{source.relative_to(ROOT)}:{number}"
        for source in SOURCES
        if source.relative_to(ROOT).parts[0] in ("jobs", "launchers")
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if derived.search(line)
    ]
    assert wrong == []
