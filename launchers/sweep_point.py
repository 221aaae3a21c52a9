"""Run a point of a sweep: `python -m sousbatch.launchers.sweep_point SWEEP`.

SOUSBATCH_TASK holds the point's position.

It makes the point's run folder inside the sweep's, then walks through the stages one after
another, each by the very stage process that a job of its own would run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from .. import files, ledger
from ..cluster import processes
from ..errors import EXIT_NO_ROOM, EXIT_STOPPED, SousbatchError, is_no_room
from ..events import Frozen, of
from ..job_environment import JobEnvironment
from ..ledger_queries import done_tasks
from ..recipes.plan import Plan, Stage, read_plan
from ..recipes.sweep import point_plan
from ..run_folder import RunPaths, run_paths
from .freeze import freeze
from .registry import launcher_of
from .trial import SearchTrial

_LOOK_S = 2.0  # between looks at what a trial has measured


def open_point(sweep: Plan, paths: RunPaths, index: int) -> tuple[Plan, RunPaths, bool]:
    """Return a point's plan and folder, and whether the folder is its own.

    The folder is made if need be.

    Two points whose values are the same share a run, which belongs to the first that came.
    """
    plan = point_plan(sweep, index)
    own = run_paths(paths.root, plan.recipe.name, plan.run_id)
    files.make_private_dir(own.root)
    with files.locked(own.lock):
        if not own.plan.is_file():
            label = sweep.sweep.points[index].label if sweep.sweep else ""
            freeze(plan, launcher_of(plan), own, within=paths, point=index, label=label)
    frozen = [event.point for event in of(ledger.read(own.ledger_dir), Frozen)]
    return plan, own, index in frozen


class _Walk:
    """The stages of one point, run one at a time."""

    def __init__(self, plan: Plan, paths: RunPaths, sweep: str, trial: SearchTrial | None) -> None:
        self._plan, self._paths, self._sweep, self._trial = plan, paths, sweep, trial
        self.lagged = False
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> int:
        """Run what is not done yet; return the exit code.

        It is 0, 75 when stopped, else that of the first stage that failed.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_stop)
        failed: dict[str, int] = {}
        for stage in self._plan.stages:
            if any(item.condition == "ok" and item.stage in failed for item in stage.after):
                failed[stage.name] = failed[next(item.stage for item in stage.after if item.stage in failed)]
                continue
            for task in self._missing(stage):
                code = self._run(stage, task)
                if self._is_stopping or code == EXIT_STOPPED:
                    return EXIT_STOPPED
                if code:
                    failed[stage.name] = code
        return next(iter(failed.values()), 0)

    def _missing(self, stage: Stage) -> list[int]:
        events = ledger.read(self._paths.ledger_dir, max_steps=1)
        done = done_tasks(events, stage.name)
        return [task for task in range(stage.num_tasks) if task not in done]

    def _run(self, stage: Stage, task: int) -> int:
        log = self._paths.log(stage.name, task)
        files.make_private_dir(log.parent)
        given = JobEnvironment(task=task, sweep=self._sweep)
        with log.open("a") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "sousbatch.launchers.stage_process", str(self._paths.root), stage.name],
                env=processes.child_environment(os.environ | given.to_env()),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if self._is_stopping:  # before there was a child to signal
            self._child.send_signal(signal.SIGTERM)
        code = self._wait(self._child, stage)
        print(f"sousbatch: {stage.name} {task} of {self._paths.root} ended with exit code {code}", flush=True)
        return code if code >= 0 else 128 - code

    def _wait(self, child: subprocess.Popen[bytes], stage: Stage) -> int:
        """Wait for a stage to end; one of a trial that lags behind the others is stopped."""
        if self._trial is None:
            return child.wait()
        while not self.lagged and not self._is_stopping:
            with suppress(subprocess.TimeoutExpired):
                child.wait(_LOOK_S)
            is_behind = self._trial.lags(self._paths, stage)  # others are compared with what it measured last, too
            if child.poll() is not None:
                break
            if is_behind:
                self.lagged = True
                self._trial.prune(self._paths, stage)
                child.send_signal(signal.SIGTERM)
        return child.wait()

    def _on_stop(self, number: int, _: FrameType | None) -> None:
        self._is_stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)


def _run_point(sweep: Plan, paths: RunPaths, index: int, trial: SearchTrial | None) -> int:
    """Open the point and walk through its stages; return the exit code."""
    try:
        plan, own, is_own = open_point(sweep, paths, index)
    except SousbatchError:
        if trial is not None:
            trial.give_up()
        raise
    print(f"sousbatch: point {index} {'runs' if is_own else 'is the same as another one,'} in {own.root}", flush=True)
    if trial is None:
        return _Walk(plan, own, paths.run_id, None).run() if is_own else 0
    if not is_own:
        trial.give_up()
        return 0
    trial.begin(own)
    walk = _Walk(plan, own, paths.run_id, trial)
    code = walk.run()
    return trial.end(own, code, lagged=walk.lagged)


def main(run: str) -> int:
    """Run the point that SOUSBATCH_TASK names; return its exit code."""
    processes.die_with_parent(signal.SIGTERM)
    processes.adopt_orphans()
    paths, index = RunPaths(root=Path(run)), JobEnvironment.from_env(os.environ).task
    try:
        sweep = read_plan(paths.plan)
        if sweep.sweep is None or sweep.sweep.search is None:
            return _run_point(sweep, paths, index, None)
        trial = SearchTrial(sweep, sweep.sweep.search, paths, index)
        if trial.plan is not None:
            return _run_point(trial.plan, paths, index, trial)
        trial.tidy()
        print(f"sousbatch: trial {index} has ended already", flush=True)
        return 0
    except (SousbatchError, OSError) as error:
        print(f"sousbatch: point {index}: {error}", flush=True)
        return EXIT_NO_ROOM if is_no_room(error) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
