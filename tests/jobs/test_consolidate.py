"""The consolidate job: a model that is there already is looked at, not believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sousbatch.jobs.consolidate as job
from sousbatch import ledger
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.jobs.context import run_job
from sousbatch.run_folder import RunPaths


@pytest.fixture
def run(sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path) -> RunPaths:
    """A run whose model appeared before its maker was killed."""
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    ledger.open_attempt(paths.ledger_dir, "consolidate", 0).close()
    (tmp_path / "trained").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "trained" / "model.safetensors")
    paths.model("consolidate").parent.mkdir()
    consolidate(open_source(tmp_path / "trained"), paths.model("consolidate"))
    return paths


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("damage", [remove, cut, flip])
def test_a_damaged_model_that_is_there_already_fails_the_stage(
    damage: Callable[[Path], None], run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of one that is intact the record is written, once."""
    arguments = [str(run.root), "consolidate"]
    for _ in range(2):
        assert run_job("consolidate", job.consolidate, arguments) == 0
    assert [event.kind for event in ledger.read(run.ledger_dir)].count("model") == 1
    damage(run.model("consolidate") / "model.safetensors")
    assert run_job("consolidate", job.consolidate, arguments) == 1
    assert "is not what manifest.json says (model.safetensors " in ledger.read(run.ledger_dir)[-1].message
