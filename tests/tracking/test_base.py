"""Tracking is a mirror: an error of a tracker does not stop the job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.tracking.base import Artifact, Trackers
from sousbatch.tracking.base import start as start_in

TASK: dict[str, Any] = {"stage": "train", "kind": "train", "task": None, "attempt": 1}


def start(folder: Path, **task: Any) -> Trackers:
    trackers = Trackers()
    start_in(trackers, folder, **task)
    return trackers


class Failing:
    """A W&B that fails at one call; *calls* says which calls came."""

    def __init__(self, at: str) -> None:
        self.at, self.calls, self.summary = at, list[str](), self
        self.config = self

    def __getattr__(self, name: str) -> Any:
        def call(*args: object, **kwargs: object) -> Failing:
            self.calls.append(name)
            if name == self.at:
                raise OSError("W&B is broken")
            return self

        return call


@pytest.mark.parametrize("at", ["init", "define_metric", "log", "update", "finish"])
def test_a_tracker_that_fails_is_dropped_and_named(
    tracked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: str
) -> None:
    wandb = Failing(at)
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = start(tracked(), **TASK)
    trackers.log(1, {"loss": 1.0})
    trackers.summary({"loss": 1.0})
    trackers.finish(0)
    assert wandb.calls[-1] == at
    assert "tracking with wandb is off: W&B is broken" in caplog.text


def test_the_other_trackers_carry_on(
    tracked: Callable[..., Path],
    third_party: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    folder = tracked(trackers=("wandb", "toy"))
    trackers = start(folder, **TASK)
    trackers.log(1, {"loss": 1.0})
    trackers.finish(0)
    assert "tracking with wandb is off" in caplog.text
    assert (folder / "toy").read_text() == "start 0123456789ab\nlog 1 {'loss': 1.0}\nfinish 0\n"


TOY = """
class Toy:
    def start(self, identity):
        self.path = identity.folder / "toy"
        self._add("start", identity.id)
    def log(self, step, values): self._add("log", step, values)
    def summary(self, values): self._add("summary", values)
    def finish(self, exit_code): self._add("finish", exit_code)
    def _add(self, *words):
        with self.path.open("a") as stream: print(*words, file=stream)
"""


BOTH = f"""{TOY}
class Full(Toy):
    def start(self, identity): self.path = identity.folder / "full"
    def table(self, name, columns, rows): self._add("table", name, columns, rows)
    def artifact(self, artifact): self._add("artifact", artifact.name)
    def alert(self, title, text): self._add("alert", title, text)
    def wants_stop(self): return self.path.with_name("stop").exists()
"""


def test_a_tracker_may_lack_what_it_cannot_show(
    tracked: Callable[..., Path], third_party: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    third_party("sousbatch.trackers", "toy = toy_module:Toy\nfull = toy_module:Full", BOTH)
    folder = tracked(trackers=("toy", "full"))
    trackers = start(folder, **TASK)
    trackers.table("samples", ("input",), [("a",)])
    trackers.artifact(Artifact(name="model", kind="model", path=folder, digest="d", is_made=True))
    trackers.alerts = ("done",)
    trackers.alert("done", "done", "it is")
    trackers.alert("failed", "failed", "it is not asked for")
    assert not trackers.wants_stop()
    (folder / "stop").touch()
    assert trackers.wants_stop()
    trackers.finish(1, "out of luck")
    trackers.finish(0)
    ended = "summary {'error': 'out of luck'}\nfinish 1\n"
    assert (folder / "toy").read_text() == f"start 0123456789ab\n{ended}"
    shown = "table samples ('input',) [('a',)]\nartifact model\nalert done it is\n"
    assert (folder / "full").read_text() == shown + ended
    assert caplog.text == ""


WAITING = TOY.replace(
    "def start(self, identity):",
    """def start(self, identity):
        import time
        while not (identity.folder / "go").exists():
            time.sleep(0.01)""",
)


def test_a_job_does_not_wait_for_a_tracker_and_is_shown_once_that_has_begun(
    tracked: Callable[..., Path],
    third_party: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    third_party("sousbatch.trackers", "toy = toy_module:Toy", WAITING)
    monkeypatch.setattr("sousbatch.tracking.base._START_S", 0.1)
    folder = tracked(trackers=("toy",))
    trackers = start(folder, **TASK)
    trackers.log(1, {"loss": 1.0})
    assert "toy has not begun after 0.1 s; the job goes on, and is shown from when it has" in caplog.text
    assert not (folder / "toy").exists()
    (folder / "go").touch()
    while not trackers:
        time.sleep(0.01)
    trackers.log(2, {"loss": 0.5})
    assert (folder / "toy").read_text() == "start 0123456789ab\nlog 2 {'loss': 0.5}\n"


@pytest.mark.parametrize("changes", [{"mode": "disabled"}, {"trackers": ()}])
def test_what_is_not_tracked_imports_nothing(
    tracked: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    start(tracked(**changes), **TASK).log(1, {})
    assert caplog.text == ""


def test_tasks_beside_each_other_are_shown_only_where_each_has_a_run_of_its_own(
    tracked: Callable[..., Path], third_party: Callable[..., None]
) -> None:
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    shard = TASK | {"task": 1, "beside_others": True}
    folder = tracked(trackers=("toy",))
    start(folder, **shard).log(1, {})
    assert not (folder / "toy").exists()
    folder = tracked(trackers=("toy",), per="task")
    start(folder, **shard).log(1, {})
    assert (folder / "toy").read_text().startswith("start 0123456789ab-train-1\n")


def test_a_run_without_its_identity_is_not_tracked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, **TASK).finish(0)
    assert "tracking is off, since the identity of the run cannot be read" in caplog.text
