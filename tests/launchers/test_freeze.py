"""What is written at submission, and read by every job."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from sousbatch import files
from sousbatch.errors import RunError, UsageError
from sousbatch.launchers.freeze import freeze, verify
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.facts import Prepared, SplitFacts, UsedFile
from sousbatch.recipes.inspect.model import model_digest
from sousbatch.recipes.plan import Plan, Stage, StageModel
from sousbatch.recipes.schema import Adapter, Resources, StageSettings, Tracking
from sousbatch.run_folder import RunPaths
from sousbatch.tracking.identity import read_identity

MERGE = Stage(name="merge", kind="merge", of=None, resources=Resources(device="cpu"), num_tasks=1, after=())


def test_the_identity_of_tracked_runs_is_fixed(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan([MERGE], tracking=Tracking(project="ours", tags=("a",), entity="team"))
    paths = RunPaths(root=tmp_path / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), paths)
    found = read_identity(paths.tracking_dir)
    assert (found.recipe, found.run, found.group, found.mode) == ("toy", plan.run_id, plan.run_id, "auto")
    assert (found.trackers, found.project, found.entity, found.tags) == (("wandb",), "ours", "team", ("a",))
    assert found.folder == str(paths.root)
    assert found.config["train"]["learning_rate"] == plan.recipe.train.learning_rate
    assert found.config["made_of"]["data"] == {name: one.digest for name, one in plan.inputs.splits.items()}


def test_the_functions_that_prepared_the_data_are_kept_as_a_record(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    source = tmp_path / "own.py"
    source.write_text("def fix(row): ...")
    rows = SplitFacts(path="train.jsonl", num_rows=1, num_bytes=1, digest="rows", columns=())
    made = Prepared(
        stage="merge",
        use="train",
        split="train",
        num_source_rows=1,
        rows=rows,
        steps=(),
        sources={str(source): files.digest_file(source)},
    )
    plan = make_plan([MERGE])
    plan = replace(plan, inputs=replace(plan.inputs, prepared=(made,)))
    paths = RunPaths(root=tmp_path / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), paths)
    assert [path.read_text() for path in paths.steps_dir.glob("*/own.py")] == ["def fix(row): ..."]
    source.write_text("edited")
    with pytest.raises(UsageError, match="own.py, which prepared the data, was edited"):
        freeze(plan, LocalLauncher(), RunPaths(root=tmp_path / "toy" / "other"))


def test_files_that_jobs_read_are_copied_once_for_a_sweep_and_checked(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    source = tmp_path / "rules.tsv"
    source.write_text("a\tb\n")
    used = UsedFile(path=str(source), digest=files.digest_file(source))
    plan = make_plan([MERGE])
    plan = replace(plan, inputs=replace(plan.inputs, used_files={"rules.tsv": used}))
    whole = RunPaths(root=tmp_path / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), whole)
    source.write_text("edited")
    point = RunPaths(root=whole.root / "toy" / plan.run_id)
    files.make_private_dir(point.root)
    freeze(plan, LocalLauncher(), point, within=whole, point=0)
    copy = point.used_file(used.path, used.digest)
    assert copy.read_text() == "a\tb\n"
    verify(point, plan, MERGE)
    copy.write_text("tampered")
    with pytest.raises(RunError, match="a copy of .*rules.tsv, was changed after submission"):
        verify(whole, plan, MERGE)
    with pytest.raises(UsageError, match="rules.tsv was edited while it was being submitted"):
        freeze(plan, LocalLauncher(), RunPaths(root=tmp_path / "toy" / "other"))


def test_the_points_of_a_sweep_are_one_group(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    plan = make_plan([MERGE])
    sweep = RunPaths(root=tmp_path / "toy" / "sweep-0123456789ab")
    point = RunPaths(root=sweep.root / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), point, within=sweep, point=0, label="seed=2 train.steps=5")
    found = read_identity(point.tracking_dir)
    assert found.told == ("seed=2", "train.steps=5")
    assert (found.run, found.group) == (plan.run_id, "sweep-0123456789ab")


@pytest.mark.parametrize(
    ("kind", "method", "reads_it"),
    [
        ("train", "full", True),
        ("predict", "full", True),
        ("consolidate", "lora", True),  # it adds the adapter to it
        ("consolidate", "full", False),
        ("merge", "full", False),
    ],
)
def test_a_changed_model_is_refused_by_a_stage_that_reads_it(
    make_plan: Callable[..., Plan], tmp_path: Path, kind: str, method: Literal["full", "lora"], reads_it: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model = StageModel(folder=str(folder), tokenizer_folder=str(folder), digest=model_digest(folder, folder, {}))
    settings = StageSettings(adapter=Adapter(method=method))
    stage = replace(MERGE, name="it", kind=kind, model=model, settings=settings)
    plan = replace(make_plan([stage]), stages=(stage,))
    paths = RunPaths(root=tmp_path / "toy" / plan.run_id)
    freeze(plan, LocalLauncher(), paths)
    verify(paths, plan, stage, is_point=False)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(RunError, match="was changed or removed") if reads_it else nullcontext():
        verify(paths, plan, stage, is_point=False)
