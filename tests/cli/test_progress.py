"""Progress as it is seen: bars on a terminal, else now and then a line."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sousbatch.cli import follow, progress
from sousbatch.events import Step
from sousbatch.launchers.states import StageState

BYTES = """
from sousbatch.cli.progress import byte_progress
with byte_progress('model') as show:
    for done in range(0, 1001, 100):
        show(done, 1000)
"""


def test_bytes_have_a_bar_on_a_terminal_only() -> None:
    shown, terminal = pty.openpty()
    command = [sys.executable, "-P", "-c", BYTES]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    assert subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, env=environment).stdout == b""
    os.close(terminal)
    text = b""
    try:
        while more := os.read(shown, 65536):
            text += more
    except OSError:  # Linux ends a terminal that nobody writes to any more so
        pass
    os.close(shown)
    assert b"model" in text and b"1.0/1.0 kB" in text
    assert subprocess.run(command, capture_output=True).stderr == b"", "ten seconds have not passed"


def test_a_followed_run_has_a_bar_a_stage_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    plan: Any = SimpleNamespace(stages=[SimpleNamespace(name="train"), SimpleNamespace(name="merge")])
    with follow._Bars(plan) as bars:
        step = Step(stage="train", step=4, values={"loss": 0.5})
        bars.update({"train": StageState(word="running", step=4, total=10)}, [step])
        bars.update({"train": StageState(word="done", step=10, total=10), "merge": StageState(word="waiting")}, [])
        bars.say("stopping after saving")
    said = capsys.readouterr()
    assert said.out == "" and "stopping after saving" in said.err
    last = said.err.rpartition("train")[2]
    assert "done 10/10, loss 0.500" in last and "waiting" in last


def test_rows_are_timed_from_the_first_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What went before, such as to build the model, is not about rows."""
    now = iter((100.0, 109.0, 111.0))
    with progress.row_progress() as show:
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
        for done in (1, 2, 3):
            show("rows of train", done, 3)
    assert capsys.readouterr().err == "sousbatch: rows of train: 3 of 3\n"
