"""Tracking is a mirror: whatever W&B does, the job goes on."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from sousbatch.jobs.training.tracking import Tracker
from sousbatch.run_folder import RunPaths


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    return SimpleNamespace(
        paths=RunPaths(root=tmp_path / "toy" / "0123456789ab"), stage=SimpleNamespace(name="train"), attempt=1
    )


class Failing:
    """A W&B that fails at one call; *calls* says which calls came."""

    def __init__(self, at: str) -> None:
        self.at, self.calls, self.summary = at, [], self

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name == self.at:
                raise OSError("W&B is broken")
            return self

        return call


@pytest.mark.parametrize("at", ["init", "define_metric", "log", "update", "finish"])
def test_a_failing_wandb_is_left_alone_and_said(job, monkeypatch, caplog, at):
    wandb = Failing(at)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tracker = Tracker(job)
    tracker.log(1, {"loss": 1.0})
    tracker.summary({"loss": 1.0})
    tracker.finish(0)
    assert wandb.calls[-1] == at
    assert "tracking is off" in caplog.text


def test_without_wandb_nothing_is_tracked(job, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Tracker(job).finish(0)
    assert "tracking is off" in caplog.text


def test_a_disabled_tracker_does_not_import_wandb(job, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", None)
    Tracker(job).log(1, {})
