"""A measuring callback for any transformers Trainer, through PYTHONPATH alone.

The benchmarks put this folder on the import path of a recipe's ranks and of a script by hand, so
that both are measured by the same means. With $PROBE_OUT set, each rank that trains leaves
RANK.json there: after each step its CPU seconds so far, at the steps of $PROBE_STEPS those of its
children and of the processes above it too; with $PROBE_SAMPLE_S the anonymous resident bytes
before the model was made and their peak since. With $PROBE_TURNS, the FIFOs of this side and the
other, the two sides take turns step by step.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import select
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_HOOKED = "transformers.trainer"


def _processes() -> dict[int, tuple[int, float]]:
    """Return parent and CPU seconds of every process.

    The seconds are without those of ended children.
    """
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            found[int(folder.name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds of this process and its relatives, and the time.

    Its relatives are its children, and those above up to $PROBE_TOP.
    """
    own, every, top = time.process_time(), _processes(), int(os.environ.get("PROBE_TOP", "1"))
    children, family = 0.0, {os.getpid()}
    for pid, (parent, seconds) in sorted(every.items()):  # a child's number is seldom lower than its parent's
        if parent in family:
            family.add(pid)
            children += seconds
    above, pid = 0.0, every[os.getpid()][0]
    while pid not in (0, 1, top):
        pid, seconds = every[pid]
        above += seconds
    return {"own": own, "children": children, "above": above, "wall": time.monotonic()}


def anonymous_bytes() -> int:
    """Return this process's resident memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


class _Peak:
    """The highest `anonymous_bytes` since the first model was made.

    A thread samples them.
    """

    def __init__(self) -> None:
        self.before, self.peak = 0, 0

    def start(self) -> None:
        if not self.before:
            self.before = anonymous_bytes()
            threading.Thread(target=self._sample, args=(float(os.environ["PROBE_SAMPLE_S"]),), daemon=True).start()

    def _sample(self, pause_s: float) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(pause_s)


class _Turns:
    """Lets two sides compute one after the other, a step each.

    Both train at the same time.
    """

    def __init__(self) -> None:
        names = os.environ.get("PROBE_TURNS", "").split(os.pathsep)
        self._fifos = [os.open(name, os.O_RDWR) for name in names if name]

    def after_step(self, *, is_first: bool, is_last: bool) -> None:
        """Hand the turn over and wait until it comes back."""
        if not self._fifos:
            return
        mine, other = self._fifos
        if not is_first:
            os.write(other, b".")
        if not is_last:
            if not select.select([mine], [], [], 300)[0]:
                raise TimeoutError("the other side has ended")
            os.read(mine, 1)


def _install(trainer: ModuleType) -> None:
    """Give every Trainer the measuring callback."""
    from transformers import PreTrainedModel, TrainerCallback

    steps = {int(step) for step in os.environ.get("PROBE_STEPS", "").split(",") if step}
    found: dict[str, Any] = {"cpu_s": {}, "own_cpu_s": []}
    peak, turns = _Peak(), _Turns()

    class Probe(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["own_cpu_s"].append(time.process_time())
            found["before_bytes"], found["peak_bytes"] = peak.before, peak.peak  # a save that follows is not in it
            if state.global_step in steps:
                found["cpu_s"][state.global_step] = cpu_seconds()
            turns.after_step(is_first=state.global_step == 1, is_last=state.global_step == state.max_steps)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found["losses"] = [entry["loss"] for entry in state.log_history if "loss" in entry]
            path = Path(os.environ["PROBE_OUT"]) / f"{os.environ.get('RANK', '0')}.json"
            path.write_text(json.dumps(found))

    trainer.DEFAULT_CALLBACKS.append(Probe)  # type: ignore[attr-defined]
    if "PROBE_SAMPLE_S" in os.environ:
        made = PreTrainedModel.__init__

        def measured(self: Any, *args: Any, **kwargs: Any) -> None:
            peak.start()
            made(self, *args, **kwargs)

        PreTrainedModel.__init__ = measured


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the Trainer's module to be imported.

    To import it here would slow every process.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            _install(module)

        spec.loader.exec_module = execute_and_install  # type: ignore[method-assign]
        return spec


if "PROBE_OUT" in os.environ:
    sys.meta_path.insert(0, _Finder())
