"""`model.path: run:ID` is the model that an earlier run made, or that of one of its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.tensors import Source
from sousbatch.recipes.inspect import run_models
from sousbatch.recipes.plan import read_plan
from sousbatch.recipes.sweep import plan_sweep
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import remember_run

Run = Callable[..., tuple[int, str, str]]
AGAIN = ["stages={predict: {}, merge: {}, score: {}}"]


@pytest.fixture
def earlier(sousbatch: Run, project: Path, tmp_path: Path) -> RunPaths:
    """A run with a model, and checkpoints of the steps 2 and 4 that kept their weights."""
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    remember_run(paths)
    for step in (2, 4):
        temporary = commit.begin(paths.checkpoints("train"), step, 1, "weights")
        for file in (project / "model").iterdir():
            shutil.copyfile(file, temporary / file.name)
        marks = {"metric": 1 / step, "world_size": 1, "check_fence": lambda: None}
        commit.commit(temporary, step=step, attempt=1, content="weights", **marks)  # type: ignore[arg-type]
    paths.model("consolidate").parent.mkdir()
    options = ConsolidateOptions(copy_from=project / "model")
    consolidate(open_source(project / "model"), paths.model("consolidate"), options)
    return paths


def folder_of(sousbatch: Run, name: str) -> Path:
    code, out, err = sousbatch("plan", "small.yaml", f"model.path={name}", *AGAIN, "--json")
    assert code == 0, err
    return Path(json.loads(out)["inputs"]["model"]["folder"])


def test_the_model_of_a_run_is_used_where_it_lies(sousbatch: Run, earlier: RunPaths) -> None:
    for name in ("run:0123456789ab", "run:0123:consolidate", f"run:{earlier.root}"):
        assert folder_of(sousbatch, name) == earlier.model("consolidate")


def test_a_checkpoint_of_a_run_becomes_a_model_in_the_cache_once(sousbatch: Run, earlier: RunPaths) -> None:
    folder = folder_of(sousbatch, "run:0123456789ab@step-2")
    assert folder.parent.name.startswith("0123456789ab-step-2-")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder_of(sousbatch, "run:0123456789ab@step-2") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert folder_of(sousbatch, "run:0123456789ab:train@best") == folder_of(sousbatch, "run:0123456789ab@step-4")


def test_a_sweep_takes_each_checkpoint_of_a_run(sousbatch: Run, earlier: RunPaths, project: Path) -> None:
    site = read_plan(earlier.plan).site
    plan = plan_sweep("small.yaml", AGAIN, ["model.path=run:0123456789ab@all"], site, earlier.runs_dir)
    assert plan.sweep is not None
    assert [point.label for point in plan.sweep.points] == [
        f"model.path=run:0123456789ab@step-{step}" for step in (2, 4)
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("run:nobody", "run 'nobody' does not exist"),
        ("run:0123456789ab@step-3", "has no committed checkpoint 'step-3'; it has step-2, step-4"),
        ("run:0123456789ab@step", r"write run:ID, run:ID:STAGE, or run:ID@step-200"),
        ("run:0123456789ab:train", "has no model 'train'; name run:0123456789ab:consolidate"),
        ("run:0123456789ab@all", "every checkpoint: write --sweep model.path=run:0123456789ab@all"),
        ("run:0123456789ab:tune@last", "has these stages with checkpoints: train"),
    ],
)
def test_what_a_run_does_not_have_is_refused_with_what_it_has(
    sousbatch: Run, earlier: RunPaths, name: str, says: str
) -> None:
    code, _, err = sousbatch("plan", "small.yaml", f"model.path={name}")
    assert code == 2
    assert f"model.path {name!r}" in err
    assert says in err


def test_a_run_without_a_model_says_how_to_take_its_checkpoint(sousbatch: Run, earlier: RunPaths) -> None:
    shutil.rmtree(earlier.model("consolidate"))
    _, _, err = sousbatch("plan", "small.yaml", "model.path=run:0123456789ab")
    assert "has no finished model yet" in err
    assert "run:0123456789ab@last" in err


def test_a_trained_model_is_not_taken_for_its_shape_alone(sousbatch: Run, project: Path) -> None:
    _, _, err = sousbatch("plan", "small.yaml", "model.path=run:1", "model.from_scratch=true")
    assert "model.from_scratch is true, and model.path 'run:1' is a trained model (set model.from_scratch=false)" in err


def test_a_checkpoint_that_goes_while_it_is_read_is_one_line(
    sousbatch: Run, earlier: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that it belongs to may still train, and rotate."""
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))  # where no other test has made that model
    where = "sousbatch.recipes.inspect.run_models.open_verified"
    true_open = run_models.open_verified

    def removed(path: Path) -> Source:
        source = true_open(path)
        shutil.rmtree(path)
        return source

    monkeypatch.setattr(where, removed)
    code, _, err = sousbatch("plan", "small.yaml", "model.path=run:0123456789ab@step-2", *AGAIN)
    assert code == 2
    assert "run:0123456789ab@step-2" in err.splitlines()[-1]
