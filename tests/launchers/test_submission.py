"""Submission under kills, races and repeats: each stage has exactly one live job, and none is lost."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.errors import NoRoomError, NotFoundError, UsageError
from sousbatch.launchers import submission
from sousbatch.launchers.base import FINAL_WORDS, JobRef, Request
from sousbatch.launchers.freeze import verify
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.launchers.overview import many_states
from sousbatch.launchers.status import job_refs, run_states
from sousbatch.recipes.plan import After, Plan, Stage, read_plan
from sousbatch.recipes.schema import Environment, Resources
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import find_run, known_runs

CPU = Resources(device="cpu")
FIRST = Stage(name="first", kind="merge", of=None, resources=CPU, num_tasks=1, after=())
SECOND = Stage(name="second", kind="merge", of=None, resources=CPU, num_tasks=1, after=(After(stage="first"),))
THIRD = Stage(
    name="third", kind="merge", of=None, resources=CPU, num_tasks=1, after=(After(stage="second", condition="any"),)
)

# Both the tests and the clients that they kill use it. A stage's text leaves a line in the file
# ran-STAGE, does what the file do-STAGE says, and records its end as a stage process would.
TEXT_LAUNCHER = """
import shlex
from dataclasses import replace
from sousbatch.launchers.local.launcher import LocalLauncher

class TextLauncher(LocalLauncher):
    def prepare(self, plan, paths):
        return tuple(replace(one, text=text_of(one.stage, paths)) for one in super().prepare(plan, paths))

def text_of(stage, paths):
    place, ended = shlex.quote(str(paths.root)), '{"sequence": 0, "time": 0, "kind": "ended", "exit_code": 0}'
    return (
        f"cd {place}; echo ran >> ran-{stage}; [ -f do-{stage} ] && . ./do-{stage}\\n"
        f"n=$(ls ledger/stage.{stage}-* 2>/dev/null | wc -l)\\n"
        f"echo {shlex.quote(ended)} > $(printf ledger/stage.{stage}-00000.%04d.jsonl $((n + 1)))\\n"
    )
"""
_names: dict[str, Any] = {}
exec(TEXT_LAUNCHER, _names)
TextLauncher: Callable[[], LocalLauncher] = _names["TextLauncher"]

CLIENT = (
    TEXT_LAUNCHER
    + """
import os, signal, sys
from pathlib import Path
from sousbatch.launchers.submission import submit
from sousbatch.recipes.plan import read_plan

calls = int(sys.argv[3])
def deadly(function):
    def counted(*args, **kwargs):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return counted
if calls:
    import subprocess
    os.fsync, os.replace, Path.rename = deadly(os.fsync), deadly(os.replace), deadly(Path.rename)
    subprocess.Popen = deadly(subprocess.Popen)
done = submit(read_plan(Path(sys.argv[1])), TextLauncher(), Path(sys.argv[2]))
print(*done.sent, done.is_new)
"""
)


class Desk:
    """A plan, a folder for runs, and clients that submit."""

    def __init__(self, plan: Plan, root: Path, until: Callable[..., Any]) -> None:
        self.plan, self.runs, self.until = plan, root / "runs", until
        self.launcher = TextLauncher()
        self.paths = RunPaths(root=self.runs / "toy" / plan.run_id)
        (root / "plan.json").write_text(plan.to_json())
        self._client = [sys.executable, "-c", CLIENT, str(root / "plan.json"), str(self.runs)]

    def submit(self, **options: Any) -> submission.Submitted:
        return submission.submit(self.plan, self.launcher, self.runs, **options)

    def resume(self) -> submission.Submitted:
        return submission.resume(self.paths, self.launcher)

    def client(self, calls: int = 0) -> subprocess.Popen[str]:
        """Start a client that kills itself before its so-manieth call that lasts: fsync, rename or start."""
        command = [*self._client, str(calls)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def do(self, stage: str, text: str) -> None:
        (self.paths.root / f"do-{stage}").write_text(text + "\n")

    def words(self) -> dict[str, str]:
        return {name: state.word for name, state in run_states(self.plan, self.paths, self.launcher).items()}

    def end(self) -> dict[str, str]:
        self.until(lambda: all(word in FINAL_WORDS for word in self.words().values()))
        return self.words()

    def times(self) -> list[int]:
        files = [self.paths.root / f"ran-{stage.name}" for stage in self.plan.stages]
        return [file.read_text().count("ran") if file.exists() else 0 for file in files]

    def jobs(self) -> set[str]:
        """The jobs that were ever started."""
        keys = [event.key for event in ledger.read(self.paths.ledger_dir) if event.kind == "intent"]
        return set(self.launcher.find(keys))


@pytest.fixture
def desk(tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]) -> Desk:
    return Desk(make_plan([FIRST, SECOND]), tmp_path, until)


def hold(desk: Desk, stage: str) -> Path:
    """Make *stage* wait until the returned file is there; the run folder must not exist yet."""
    gate = desk.runs / "gate"
    desk.paths.root.mkdir(parents=True, exist_ok=True)
    desk.do(stage, f"while [ ! -e {shlex.quote(str(gate))} ]; do sleep 0.02; done")
    return gate


# freeze


def test_a_submission_leaves_all_that_the_jobs_will_read(desk: Desk) -> None:
    done = desk.submit()
    assert done.is_new and done.sent == ("first", "second")
    assert desk.end() == {"first": "done", "second": "done"} and desk.times() == [1, 1]
    assert read_plan(desk.paths.plan) == desk.plan
    assert desk.paths.root.stat().st_mode & 0o777 == 0o700
    requests = {request.stage: request.text for request in desk.launcher.prepare(desk.plan, desk.paths)}
    assert {stage: desk.paths.request(stage).read_text() for stage in requests} == requests
    assert find_run(desk.plan.run_id) == desk.paths and known_runs() == (desk.paths,)


class Recording(LocalLauncher):
    """Keeps what is sent to it, and starts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Request] = []

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        self.sent.append(request)
        return JobRef(launcher=self.name, job_id=key)


@pytest.fixture
def frozen(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> tuple[Desk, Recording, tuple[Request, ...]]:
    """A run that was submitted, but whose jobs are lost, in an environment that has changed since."""
    desk.launcher = launcher = Recording()
    expected = launcher.prepare(desk.plan, desk.paths)
    desk.submit()
    assert tuple(launcher.sent) == expected
    launcher.sent.clear()
    monkeypatch.setattr(sys, "executable", "/another/venv/bin/python")
    return desk, launcher, expected


def test_a_resume_from_another_environment_sends_the_frozen_requests(
    frozen: tuple[Desk, Recording, tuple[Request, ...]],
) -> None:
    desk, launcher, expected = frozen
    assert desk.resume().sent == ("first", "second")
    assert tuple(launcher.sent) == expected
    assert [request.text for request in launcher.sent] == [
        desk.paths.request(stage.name).read_text() for stage in desk.plan.stages
    ]


@pytest.mark.parametrize("damage", ["text", "values", "no text", "no values"])
def test_a_request_that_was_changed_is_not_sent_but_written_again_at_a_persons_word(
    frozen: tuple[Desk, Recording, tuple[Request, ...]], damage: str
) -> None:
    desk, launcher, _ = frozen
    path = desk.paths.request("second") if "text" in damage else desk.paths.request_values("second")
    if "no" in damage:
        path.unlink()
    else:
        path.write_text(path.read_text().replace("second", "third"))
    with pytest.raises(UsageError, match="requests were changed after submission.*--accept-environment"):
        desk.resume()
    assert launcher.sent == []
    submission.resume(desk.paths, launcher, accepts_environment=True)
    assert "/another/venv/bin/python" in launcher.sent[-1].text
    launcher.sent.clear()
    desk.resume()
    assert tuple(launcher.sent) == launcher.prepare(desk.plan, desk.paths), "those are the frozen ones from here on"


def test_submitting_an_interrupted_run_with_another_time_limit_takes_the_limit_alone(
    frozen: tuple[Desk, Recording, tuple[Request, ...]],
) -> None:
    desk, launcher, _ = frozen
    more = Resources(device="cpu", time_min=90, cpus_per_device=2)
    desk.plan = replace(desk.plan, stages=tuple(replace(stage, resources=more) for stage in desk.plan.stages))
    assert desk.submit().plan.stages[0].resources == replace(CPU, time_min=90)
    desk.resume()
    submission.resume(desk.paths, launcher, accepts_environment=True)
    assert [request.resources for request in launcher.sent] == [replace(CPU, time_min=90)] * 6
    verify(desk.paths, read_plan(desk.paths.plan), desk.plan.stages[0])


def test_requests_that_name_another_folder_are_not_sent(
    frozen: tuple[Desk, Recording, tuple[Request, ...]], tmp_path: Path
) -> None:
    desk, launcher, _ = frozen
    here = RunPaths(root=tmp_path / "elsewhere" / "toy" / desk.paths.run_id)
    here.root.parent.mkdir(parents=True)
    desk.paths.root.rename(here.root)
    with pytest.raises(UsageError, match=f"{desk.paths.root}.*--accept-environment"):
        submission.resume(here, launcher)
    submission.resume(here, launcher, accepts_environment=True)
    assert str(here.root) in launcher.sent[0].text


def test_code_that_was_edited_since_the_plan_is_not_submitted(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    (source / "a.py").write_text("a = 1\n")
    desk = Desk(make_plan([FIRST], Environment(code=(str(source),))), tmp_path, until)
    (source / "a.py").write_text("a = 2\n")
    with pytest.raises(UsageError, match="was edited while it was being submitted"):
        desk.submit()
    (source / "a.py").write_text("a = 1\n")
    assert desk.submit().is_new
    assert desk.end() == {"first": "done"}


# once


def test_the_same_plan_finds_its_run_while_it_runs_and_when_it_is_done(desk: Desk) -> None:
    gate = hold(desk, "first")
    desk.submit()
    again = desk.submit()
    assert not again.is_new and again.sent == () and again.found["second"].word == "waiting"
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done"}
    assert desk.submit().sent == () and desk.times() == [1, 1]


def test_again_makes_another_run(desk: Desk) -> None:
    desk.submit()
    other = desk.submit(again=True)
    assert other.is_new and other.paths.run_id == f"{desk.plan.run_id}-2"
    assert desk.submit(again=True).paths.run_id == f"{desk.plan.run_id}-3"
    desk.until(lambda: all(set(words_of(desk, paths)) == {"done"} for paths in known_runs()))
    assert len(known_runs()) == 3


def words_of(desk: Desk, paths: RunPaths) -> list[str]:
    return [state.word for state in run_states(desk.plan, paths, desk.launcher).values()]


def test_many_submits_at_once_make_one_run(desk: Desk) -> None:
    clients = [desk.client() for _ in range(4)]
    outputs = sorted(client.communicate(timeout=120)[0] for client in clients)
    assert outputs == ["False\n"] * 3 + ["first second True\n"]
    assert desk.end() == {"first": "done", "second": "done"} and desk.times() == [1, 1]
    assert len(desk.jobs()) == 2


# Of about 44 calls the last 20 are two times: intent, 7 calls that write the job, start, record.
@pytest.mark.parametrize("calls", [5, 16, 24, 25, 26, 32, 33, 34, 35, 36, 43, 44])
def test_a_client_killed_anywhere_leaves_no_job_twice_and_none_lost(desk: Desk, calls: int) -> None:
    client = desk.client(calls)
    output, _ = client.communicate(timeout=120)
    assert client.returncode == -signal.SIGKILL, output
    try:
        desk.submit()
    except UsageError as error:
        assert "resume" in str(error)
        desk.resume()
    assert desk.end() == {"first": "done", "second": "done"}
    assert desk.times() == [1, 1] and len(desk.jobs()) == 2


def test_clients_killed_at_random_moments_leave_no_job_twice_and_none_lost(desk: Desk) -> None:
    chance = random.Random(3)
    gate = hold(desk, "first")
    for _ in range(5):
        client = desk.client()
        time.sleep(chance.uniform(0.1, 0.45))
        client.kill()
        client.communicate()
    desk.submit()
    assert desk.words() == {"first": "running", "second": "waiting"} or desk.until(
        lambda: desk.words() == {"first": "running", "second": "waiting"}
    )
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done"}
    assert desk.times() == [1, 1] and len(desk.jobs()) == 2


class Forgetful:
    """Sends, and then dies before anyone hears of it."""

    def __init__(self, launcher: LocalLauncher) -> None:
        self.name, self._launcher = launcher.name, launcher
        self.prepare, self.find, self.states = launcher.prepare, launcher.find, launcher.states
        self.cancel = launcher.cancel

    def send(self, request: Request, key: str, after: Mapping[str, JobRef]) -> JobRef:
        self._launcher.send(request, key, after)
        raise TimeoutError("Socket timed out on send/recv operation")


def test_a_job_that_was_sent_but_not_recorded_is_seen_adopted_and_can_be_cancelled(desk: Desk) -> None:
    gate = hold(desk, "first")
    with pytest.raises(TimeoutError):
        submission.submit(desk.plan, Forgetful(desk.launcher), desk.runs)
    assert desk.until(lambda: desk.words()["first"] == "running")
    ((_, _, states),) = many_states([desk.paths], lambda _: desk.launcher)
    assert states["first"].word == "running" and not states["second"].was_sent
    assert desk.submit().sent == ("second",)
    adopted = [event for event in ledger.read(desk.paths.ledger_dir) if event.kind == "adopted"]
    assert [event.stage for event in adopted] == ["first"]
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done"} and desk.times() == [1, 1]


def test_a_job_that_nobody_recorded_is_cancelled_too(desk: Desk) -> None:
    hold(desk, "first")
    with pytest.raises(TimeoutError):
        submission.submit(desk.plan, Forgetful(desk.launcher), desk.runs)
    assert submission.cancel(desk.paths, desk.launcher, save=False) == ("first",)
    assert desk.end()["first"] == "cancelled"


def test_nothing_is_sent_that_could_not_be_written_down(
    small_disk: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    desk = Desk(make_plan([FIRST]), small_disk, until)
    hold(desk, "first")
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as stream:
        while stream.write(b"x" * 4096) == 4096:
            pass
        stream.write(b"x")
    with pytest.raises(NoRoomError, match="no (room|space) left"):
        desk.submit()
    assert not desk.paths.plan.exists() and desk.jobs() == set()
    ballast.unlink()
    (desk.paths.root / "do-first").unlink()
    desk.submit()
    assert desk.end() == {"first": "done"}


# resume


def test_a_failed_run_goes_on_by_submit_and_by_resume_with_what_is_not_done(desk: Desk) -> None:
    hold(desk, "second").touch()
    desk.do("second", "exit 3")
    desk.submit()
    assert desk.end() == {"first": "done", "second": "failed"}
    again = desk.submit()
    assert (again.sent, again.ended, again.is_new) == (("second",), {"second": "failed"}, False)
    assert desk.end() == {"first": "done", "second": "failed"}
    desk.do("second", "true")
    assert desk.resume().sent == ("second",)
    assert desk.end() == {"first": "done", "second": "done"} and desk.times() == [1, 3]
    assert desk.resume().sent == ()


def test_a_resumed_stage_takes_its_dependants_with_it(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    desk = Desk(make_plan([FIRST, SECOND, THIRD]), tmp_path, until)
    gate = hold(desk, "third")
    desk.do("second", "exit 3")
    desk.submit()
    desk.until(lambda: desk.words()["third"] == "running")
    assert desk.words() == {"first": "done", "second": "failed", "third": "running"}
    desk.do("second", "true")
    outdated = job_refs(ledger.read(desk.paths.ledger_dir))["third"]
    assert desk.resume().sent == ("second", "third"), "third works on what second left"
    desk.until(lambda: desk.launcher.states([outdated])[outdated].word == "cancelled")
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done", "third": "done"}
    assert desk.times() == [1, 2, 2]


def test_resume_of_a_run_under_way_does_nothing(desk: Desk) -> None:
    gate = hold(desk, "first")
    desk.submit()
    assert desk.resume().sent == ()
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done"} and desk.times() == [1, 1]


def test_a_run_whose_job_was_killed_goes_on(desk: Desk, tmp_path: Path) -> None:
    gate = hold(desk, "first")
    desk.submit()
    desk.until(lambda: desk.words()["first"] == "running")
    (pid,) = (tmp_path / "state" / "jobs").glob("*first*/pid")
    os.kill(int(pid.read_text()), signal.SIGKILL)
    desk.until(lambda: desk.words() == {"first": "lost", "second": "cancelled"})
    desk.paths.root.joinpath("do-first").unlink()
    gate.touch()  # ends what the kill left, as the stage process does by itself
    desk.until(lambda: desk.words()["first"] == "done")
    assert desk.resume().sent == ("second",)
    assert desk.end() == {"first": "done", "second": "done"}


def test_a_stop_flag_that_a_killed_stage_left_says_nothing_of_the_next_job(desk: Desk) -> None:
    gate = hold(desk, "first")
    desk.submit()
    desk.until(lambda: desk.words()["first"] == "running")
    submission.cancel(desk.paths, desk.launcher, save=False)
    assert desk.end()["first"] == "cancelled"
    flag = desk.paths.stop_flag("first", 0)
    flag.parent.mkdir(exist_ok=True)
    flag.touch()
    desk.resume()
    assert desk.words()["first"] in ("waiting", "running") and not flag.exists()
    gate.touch()
    assert desk.end() == {"first": "done", "second": "done"}


# cancel and clean


def test_a_cancelled_run_is_ended_and_can_be_resumed(desk: Desk) -> None:
    gate = hold(desk, "first")
    desk.submit()
    desk.until(lambda: desk.words()["first"] == "running")
    assert submission.cancel(desk.paths, desk.launcher, save=False) == ("first", "second")
    assert desk.end() == {"first": "cancelled", "second": "cancelled"}
    assert submission.cancel(desk.paths, desk.launcher, save=False) == ()
    gate.touch()
    assert desk.resume().sent == ("first", "second")
    assert desk.end() == {"first": "done", "second": "done"}


def test_a_run_under_way_is_not_cleaned_and_a_done_one_keeps_its_results(desk: Desk) -> None:
    gate = hold(desk, "first")
    desk.submit()
    with pytest.raises(UsageError, match="is not finished: cancel it first"):
        submission.clean(desk.paths, lambda _: desk.launcher, whole=True, is_named=True)
    assert submission.clean(desk.paths, lambda _: desk.launcher, whole=True, is_named=False) == 0
    gate.touch()
    desk.end()
    checkpoints, units = desk.paths.checkpoints("train"), desk.paths.predictions("predict") / "key"
    for folder, name in ((checkpoints, "weights"), (units, "layout.json"), (units.parent, "predictions.jsonl")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    assert submission.clean(desk.paths, lambda _: desk.launcher, whole=False, is_named=True) == 200
    assert (units.parent / "predictions.jsonl").exists() and not checkpoints.exists() and not units.exists()
    assert submission.clean(desk.paths, lambda _: desk.launcher, whole=True, is_named=True) > 100
    assert not desk.paths.root.exists() and known_runs() == ()
    with pytest.raises(NotFoundError):
        submission.resume(desk.paths, desk.launcher)
    assert not desk.paths.root.exists()


def test_a_sweep_is_cleaned_with_its_points_whose_jobs_are_its_own(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "run_id", "sweep-0123456789ab")
    sweep = desk.paths = RunPaths(root=desk.runs / "toy/sweep-0123456789ab")
    gate = hold(desk, "first")
    desk.submit()
    point = RunPaths(root=sweep.root / "toy/0123456789ab")
    checkpoints = point.checkpoints("train")
    checkpoints.mkdir(parents=True)
    for path in (point.plan, checkpoints / "weights"):
        path.write_text("x" * 100)
    for act in (submission.resume, partial(submission.cancel, save=False)):
        with pytest.raises(UsageError, match="0123456789ab is a point of sweep-0123456789ab, which has its job"):
            act(point, desk.launcher)
    with pytest.raises(UsageError, match="run sweep-0123456789ab is not finished: cancel it first"):
        submission.clean(point, lambda _: desk.launcher, whole=True, is_named=True)
    gate.touch()
    desk.end()
    assert submission.clean(sweep, lambda _: desk.launcher, whole=False, is_named=True) == 100
    assert not checkpoints.exists() and point.plan.exists()


def test_an_unfinished_run_keeps_what_resume_needs(desk: Desk) -> None:
    hold(desk, "first").touch()
    desk.do("first", "exit 1")
    desk.submit()
    desk.end()
    with pytest.raises(UsageError, match="resume needs its checkpoints"):
        submission.clean(desk.paths, lambda _: desk.launcher, whole=False, is_named=True)
    assert submission.clean(desk.paths, lambda _: desk.launcher, whole=False, is_named=False) == 0


# one call


def test_many_runs_are_looked_at_with_one_call(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    desks = [Desk(make_plan([FIRST], seed=seed), tmp_path, until) for seed in range(3)]
    for desk in desks:
        desk.submit()
        desk.end()
    calls: list[int] = []
    states = LocalLauncher.states

    def counted(self: LocalLauncher, refs: Collection[JobRef]) -> Any:
        calls.append(len(refs))
        return states(self, refs)

    monkeypatch.setattr(LocalLauncher, "states", counted)
    broken = replace(known_runs()[0], root=tmp_path / "nowhere")
    for desk in desks[:2]:
        next(desk.paths.ledger_dir.glob("stage.*")).unlink()
    found = many_states([*known_runs(), broken], lambda _: desks[0].launcher)
    assert [states["first"].word for _, _, states in found[:3]] == ["failed", "failed", "done"]
    assert found[3][0].problem.startswith("its folder is gone") and found[3][2] == {}
    assert calls == [2], "one call, and none for what the ledger knows to be done"
