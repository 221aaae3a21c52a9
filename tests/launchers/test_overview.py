"""The view of runs that cannot be asked about, are damaged, or are gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from sousbatch import events, ledger
from sousbatch.cli.status import log_tail
from sousbatch.errors import SlurmError, UnreachableError, UsageError
from sousbatch.files import make_private_dir
from sousbatch.launchers import submission
from sousbatch.launchers.base import JobRef, JobState, Launcher
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.launchers.overview import many_states, watch_states
from sousbatch.recipes.plan import After, Plan, Stage, read_plan
from sousbatch.recipes.schema import Resources
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import known_runs

CPU = Resources(device="cpu")
FIRST = Stage(name="first", kind="merge", of=None, resources=CPU, num_tasks=1, after=())
SECOND = Stage(name="second", kind="merge", of=None, resources=CPU, num_tasks=1, after=(After(stage="first"),))


class Silent(LocalLauncher):
    """A launcher of jobs of this machine that then does not answer any more."""

    answers = True

    def find(self, keys: Collection[str]) -> dict[str, JobRef]:
        if not self.answers:
            raise SlurmError("squeue: Could not resolve the controller")
        return super().find(keys)

    def states(self, refs: Collection[JobRef]) -> dict[JobRef, JobState]:
        if not self.answers:
            raise SlurmError("squeue: Could not resolve the controller")
        return super().states(refs)


@pytest.fixture
def run(tmp_path: Path, make_plan: Callable[..., Plan]) -> Iterator[RunPaths]:
    """A run under way: its stages wait for a folder of code that is not there, as long as nobody cancels them."""
    plan = make_plan([FIRST, SECOND])
    paths = submission.submit(plan, Waiting(), tmp_path / "runs").paths
    yield paths
    submission.cancel_left(paths, lambda _: LocalLauncher())


class Waiting(Silent):
    def prepare(self, plan: Plan, paths: RunPaths) -> Any:
        from dataclasses import replace

        return tuple(replace(one, text="exec sleep 60\n") for one in super().prepare(plan, paths))


def look(paths: RunPaths, launcher: LocalLauncher | None = None) -> tuple[str, dict[str, tuple[str, str]]]:
    ((plan, _, states),) = many_states([paths], lambda _: launcher or LocalLauncher())
    return plan.problem, {name: (state.word, state.reason) for name, state in states.items()}


def silent() -> Silent:
    launcher = Silent()
    launcher.answers = False
    return launcher


def test_a_launcher_that_does_not_answer_makes_its_runs_unknown_and_the_ledger_is_told(run: RunPaths) -> None:
    writer = ledger.open_attempt(run.ledger_dir, "first", 0)
    writer.write(events.Started())
    _, states = look(run, silent())
    assert {word for word, _ in states.values()} == {"unknown"}
    assert (
        "Could not resolve the controller; last seen at 2" in states["first"][1] and ": running" in states["first"][1]
    )
    writer.write(events.Ended(exit_code=0))
    writer.close()
    assert look(run, silent())[1]["first"] == ("done", "")


def test_a_run_of_a_launcher_that_is_not_installed_here_is_unknown_with_the_reason(run: RunPaths) -> None:
    def missing(name: str) -> Launcher:
        raise UsageError(f"launcher {name!r} is unknown")

    ((_, _, states),) = many_states([run], missing)
    assert {state.word for state in states.values()} == {"unknown"}
    assert "launcher 'local' is unknown" in states["first"].reason


@pytest.mark.parametrize("deed", ["cancel", "resume", "submit"])
def test_nothing_is_decided_without_an_answer(run: RunPaths, deed: str) -> None:
    jobs = len(list((run.root.parents[2] / "state" / "jobs").iterdir()))
    deeds: dict[str, Callable[[], Any]] = {
        "cancel": lambda: submission.cancel(run, silent(), save=False),
        "resume": lambda: submission.resume(run, silent()),
        "submit": lambda: submission.submit(read_plan(run.plan), silent(), run.root.parents[1]),
    }
    with pytest.raises(UnreachableError, match=f"run {run.run_id}: it is unknown now .* try again where and when"):
        deeds[deed]()
    assert len(list((run.root.parents[2] / "state" / "jobs").iterdir())) == jobs


def test_what_may_run_is_cleaned_at_a_persons_word_only(run: RunPaths) -> None:
    with pytest.raises(UsageError, match="may be under way: .* --although-jobs-may-run removes"):
        submission.clean(run, lambda _: silent(), whole=True, is_named=True)
    assert submission.clean(run, lambda _: silent(), whole=True, is_named=False) == 0
    assert submission.clean(run, lambda _: silent(), whole=True, is_named=True, despite_jobs=True) > 0
    assert not run.root.exists()


def test_a_run_of_which_the_ledger_says_that_all_is_done_is_cleaned_whoever_answers(run: RunPaths) -> None:
    for stage in ("first", "second"):
        writer = ledger.open_attempt(run.ledger_dir, stage, 0)
        writer.write(events.Ended(exit_code=0))
        writer.close()
    assert submission.clean(run, lambda _: silent(), whole=True, is_named=True) > 0


def test_the_log_of_a_failed_stage_is_that_of_a_task_that_is_not_done(run: RunPaths) -> None:
    make_private_dir(run.log_dir)
    for task, code in ((0, 1), (1, 0)):  # the one that is done wrote last
        run.log("first", task).write_text(f"task {task} ends with {code}\n")
        writer = ledger.open_attempt(run.ledger_dir, "first", task)
        writer.write(events.Ended(exit_code=code))
        writer.close()
    assert log_tail(run, "first").endswith("  task 0 ends with 1")


@pytest.mark.parametrize("what", ["plan.json", "ledger", "line"])
def test_a_damaged_run_is_unknown_and_its_jobs_can_be_ended(run: RunPaths, what: str) -> None:
    if what == "plan.json":
        run.plan.write_text("{")
    elif what == "ledger":
        shutil.rmtree(run.ledger_dir)
    else:
        with next(run.ledger_dir.glob("client.*")).open("a") as stream:
            stream.write('{"sequence": "x"}\n')
    problem, states = look(run)
    assert problem and run.root in [one.root for one in known_runs()]
    assert {word for word, _ in states.values()} == ({"unknown"} if states else set())
    with pytest.raises(UsageError, match="damaged|is empty"):
        submission.resume(run, LocalLauncher())
    with pytest.raises(UsageError, match="cancel it first"):
        submission.clean(run, lambda _: LocalLauncher(), whole=True, is_named=True)
    assert set(submission.cancel_left(run, lambda _: LocalLauncher())) == {"first", "second"}
    until_ended(run)
    assert submission.clean(run, lambda _: LocalLauncher(), whole=True, is_named=True) > 0


def until_ended(paths: RunPaths) -> None:
    import time

    deadline = time.monotonic() + 60
    while submission.cancel_left(paths, lambda _: LocalLauncher()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_whose_folder_was_moved_away_is_not_lost_and_is_found_again(run: RunPaths) -> None:
    plan, away = read_plan(run.plan), run.root.parent / "away"
    run.root.rename(away)
    try:
        states = watch_states(plan, run, LocalLauncher())
        assert {state.word for state in states.values()} == {"unknown"}
        assert "its folder is gone" in states["first"].reason and "sousbatch cancel" in states["first"].reason
        assert known_runs() == () and known_runs(gone=True) == (run,)
    finally:
        away.rename(run.root)
    assert look(run)[1]["second"][0] == "waiting"


def test_the_jobs_of_a_deleted_run_are_ended_and_then_nothing_is_told_of_it(run: RunPaths) -> None:
    shutil.rmtree(run.root)
    assert set(submission.cancel_left(run, lambda _: LocalLauncher())) == {"first", "second"}
    until_ended(run)
    assert look(run)[1] == {} and not (run.root / "reservation.json").exists()
    assert submission.clean(run, lambda _: LocalLauncher(), whole=True, is_named=True) == 0
    assert known_runs(gone=True) == ()
