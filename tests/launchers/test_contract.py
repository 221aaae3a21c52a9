"""What every launcher must do, driven by requests made by hand. A launcher's tests inherit `LauncherContract`."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from sousbatch.cluster.slurm_site import read_site
from sousbatch.job_environment import JobEnvironment
from sousbatch.launchers.base import FINAL_WORDS, JobRef, JobState, Launcher, Request
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.launchers.slurm.launcher import CLIENT_LINE, TASK_LINE, SlurmLauncher
from sousbatch.launchers.slurm.script import header
from sousbatch.recipes.plan import After, Plan, Stage
from sousbatch.recipes.schema import Environment, Resources
from sousbatch.run_folder import RunPaths

CPU = Resources(device="cpu")
HOSTILE = [
    "with a space",
    "with'quote",
    'with"quotes"',
    "with\nnewline",
    "; touch x",
    "$(touch x)",
    "`touch x`",
    "한글 100 # *",
    "-rf",
]


class LauncherContract:
    """The tests; a subclass gives the fixture `launcher`."""

    @pytest.fixture(autouse=True)
    def _surroundings(
        self, launcher: Launcher, tmp_path: Path, until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.launcher, self.place, self.until = launcher, tmp_path, until
        self.token = secrets.token_hex(4)  # a scheduler remembers the keys of other tests
        monkeypatch.chdir(tmp_path)  # where `touch x` would show

    def request(
        self,
        text: str,
        stage: str = "work",
        *,
        num_tasks: int = 1,
        after: Mapping[str, Literal["ok", "any"]] | None = None,
        log_dir: Path | None = None,
    ) -> Request:
        return Request(
            stage=stage,
            text="\n".join(["#!/bin/bash", *self.header(stage, num_tasks), text, ""]),
            num_tasks=num_tasks,
            after=tuple(After(stage=name, condition=condition) for name, condition in (after or {}).items()),
            resources=CPU,
            uses_devices=False,
            log_dir=str(log_dir or self.place / "logs"),
        )

    def header(self, stage: str, num_tasks: int) -> Sequence[str]:
        """Return the lines that the launcher's `prepare` puts above the text."""
        return ()

    def send(self, request: Request, key: str = "key", **after: JobRef) -> JobRef:
        return self.launcher.send(request, f"{key}.{self.token}", after)

    def end(self, ref: JobRef) -> JobState:
        def look() -> JobState | None:
            state = self.launcher.states([ref])[ref]
            return state if state.word in FINAL_WORDS else None

        state: JobState = self.until(look)
        return state

    def log(self, stage: str = "work", task: int = 0) -> str:
        return (self.place / "logs" / f"{stage}-{task:05d}.log").read_text()

    def wait_until_ready(self) -> None:
        path = self.place / "logs" / "work-00000.log"
        self.until(lambda: path.exists() and "ready" in path.read_text())

    def quoted(self, name: str) -> str:
        return shlex.quote(str(self.place / name))

    # prepare

    def test_preparing_is_pure_and_deterministic(
        self, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=())
        merge = Stage(name="merge", kind="merge", of=None, resources=CPU, num_tasks=3, after=(After(stage="train"),))
        plan, paths = make_plan([train, merge]), RunPaths(root=self.place / "runs" / "toy" / "0123456789ab")
        first = self.launcher.prepare(plan, paths)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("HOME", "/elsewhere")
        monkeypatch.chdir("/")
        assert self.launcher.prepare(plan, paths) == first
        assert [(one.stage, one.num_tasks, one.after) for one in first] == [
            ("train", 1, ()),
            ("merge", 3, (After(stage="train"),)),
        ]
        assert not paths.root.exists()

    def test_no_character_of_a_run_folder_or_value_is_taken_for_shell(self, make_plan: Callable[..., Plan]) -> None:
        stand_in = self.place / "python"
        stand_in.write_text('#!/bin/sh\nprintf "%s\\0" "$@" "$NOTE" "$lower_case" >&2\n')
        stand_in.chmod(0o755)
        stage = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=())
        sent = {}
        for name in HOSTILE:  # all at once: a job takes a second to come and go
            variables = {"NOTE": name, "lower_case": f"two words {name}"}
            plan = make_plan([stage], Environment(python=str(stand_in), variables=variables))
            paths = RunPaths(root=self.place / name / name)
            (request,) = self.launcher.prepare(plan, paths)
            sent[name] = paths, self.send(request, f"key{len(sent)}")
        for name, (paths, ref) in sent.items():
            assert self.end(ref).word == "done", name
            expected = [
                "-m",
                "sousbatch.launchers.stage_process",
                str(paths.root),
                "train",
                name,
                f"two words {name}",
                "",
            ]
            assert paths.log("train", 0).read_text().split("\0") == expected
        assert not list(self.place.rglob("x"))

    # what it says of itself

    def test_a_stage_process_that_a_person_starts_has_a_placement(self, make_plan: Callable[..., Plan]) -> None:
        stage = Stage(name="merge", kind="merge", of=None, resources=CPU, num_tasks=3, after=())
        plan, paths = make_plan([stage]), RunPaths(root=self.place / "runs" / "toy" / "0123456789ab")
        where = self.launcher.placement(JobEnvironment(task=1))
        assert list(where.tasks(plan, stage)) == [1]
        assert where.refusal(stage, [], []) is None and where.why_lost() == ""
        assert where.explain(stage, 7, "", is_finished=False) == (7, "")
        (command,) = where.commands(plan, paths, stage)
        assert command.words[-3:] == (stage.record.module, str(paths.root), "merge")

    def test_it_can_be_asked_from_here_and_refuses_no_request_of_its_own(self, make_plan: Callable[..., Plan]) -> None:
        assert self.launcher.is_here()
        site = self.launcher.read_site()
        assert site.launcher == self.launcher.name
        stage = Stage(name="merge", kind="merge", of=None, resources=CPU, num_tasks=1, after=())
        plan, runs = make_plan([stage], site=site), self.place / "runs"
        requests = self.launcher.prepare(plan, RunPaths(root=runs / "toy" / "0123456789ab"))
        refusals, _ = self.launcher.objections(requests, plan, runs)
        assert refusals == []

    # send and find

    def test_the_text_that_runs_is_the_requests_text(self) -> None:
        request = self.request('# 한글 \u2028 $HOME `x` \\\ncat "$0"')
        assert self.end(self.send(request)).word == "done"
        assert self.log() == request.text

    def test_a_key_is_accepted_once(self) -> None:
        request = self.request(f"echo ran >> {self.quoted('ran')}")
        with ThreadPoolExecutor(4) as clients:
            refs = set(clients.map(lambda _: self.send(request), range(4)))
        assert len(refs) == 1
        assert self.end(*refs).word == "done"
        assert self.send(request) in refs
        assert self.end(*refs).word == "done"
        assert (self.place / "ran").read_text() == "ran\n"

    def test_a_job_is_found_by_its_key_though_its_ref_was_lost(self) -> None:
        self.send(self.request("true"))
        key = f"key.{self.token}"
        found = self.launcher.find([key, "never-sent"])
        assert set(found) == {key}
        assert self.end(found[key]).word == "done"
        assert self.launcher.find([key]) == found, "an ended job is found too"

    def test_a_job_that_nobody_knows_is_lost(self) -> None:
        ref = JobRef(launcher=self.launcher.name, job_id="12345678")
        assert self.launcher.states([ref])[ref].word == "lost"
        self.launcher.cancel([ref], save=False)

    # ends

    @pytest.mark.parametrize(("code", "said"), [(3, "exit code 3"), (137, "killed by signal 9 (often: no host memory")])
    def test_an_exit_code_other_than_0_is_a_failure_and_is_reported(self, code: int, said: str) -> None:
        state = self.end(self.send(self.request(f"echo before; exit {code}")))
        assert state.word == "failed" and said in state.reason
        assert self.log() == "before\n"

    def test_a_text_killed_by_a_signal_has_failed(self) -> None:
        state = self.end(self.send(self.request("kill -9 $$")))
        assert state.word == "failed" and "9" in state.reason

    def test_tasks_of_an_array_get_their_numbers_and_logs(self) -> None:
        ref = self.send(self.request('echo "task $SOUSBATCH_TASK"', num_tasks=3))
        assert self.end(ref).word == "done"
        assert [self.log(task=task) for task in range(3)] == ["task 0\n", "task 1\n", "task 2\n"]

    def test_one_failed_task_fails_the_job_and_the_others_run(self) -> None:
        ref = self.send(self.request('[ "$SOUSBATCH_TASK" != 1 ] && echo fine', num_tasks=3))
        state = self.end(ref)
        assert state.word == "failed" and "1" in state.reason
        assert self.log(task=2) == "fine\n"

    def test_a_log_survives_the_next_job_of_the_stage(self) -> None:
        for attempt in ("first", "second"):
            self.end(self.send(self.request(f"echo {attempt}"), key=attempt))
        assert self.log() == "first\nsecond\n"

    # dependencies

    def test_a_dependant_waits_for_the_end(self) -> None:
        first = self.send(self.request(f"sleep 0.3; echo 1 >> {self.quoted('order')}", "first"), "a")
        second = self.request(f"echo 2 >> {self.quoted('order')}", "second", after={"first": "ok"})
        assert self.end(self.send(second, "b", first=first)).word == "done"
        assert (self.place / "order").read_text() == "1\n2\n"

    def test_a_failed_dependency_cancels_all_that_needs_it_and_starts_what_does_not(self) -> None:
        first = self.send(self.request("exit 1", "first"), "a")
        needs = self.send(self.request("echo ran", "needs", after={"first": "ok"}), "b", first=first)
        also = self.send(self.request("echo ran", "also", after={"needs": "ok"}), "c", needs=needs)
        anyhow = self.send(self.request("echo ran", "anyhow", after={"first": "any"}), "d", first=first)
        assert self.end(needs).word == self.end(also).word == "cancelled"
        assert self.end(anyhow).word == "done"
        assert sorted(path.name for path in (self.place / "logs").iterdir()) == [
            "anyhow-00000.log",
            "first-00000.log",
        ]

    def test_a_stage_that_is_done_already_is_not_waited_for(self) -> None:
        assert self.end(self.send(self.request("true", after={"done-before": "ok"}))).word == "done"

    # cancel

    def test_saving_is_asked_for_and_waited_for(self) -> None:
        text = "trap 'sleep 0.2; echo saved; exit 75' TERM USR1; echo ready; while :; do sleep 0.05; done"
        ref = self.send(self.request(text))
        self.wait_until_ready()
        assert self.launcher.states([ref])[ref].word == "running"
        self.launcher.cancel([ref], save=True)
        assert self.end(ref).word == "stopped"
        assert self.log() == "ready\nsaved\n"

    def test_a_job_that_finishes_while_it_is_asked_to_save_is_done(self) -> None:
        ref = self.send(self.request("trap 'exit 0' TERM USR1; echo ready; while :; do sleep 0.05; done"))
        self.wait_until_ready()
        self.launcher.cancel([ref], save=True)
        assert self.end(ref).word == "done"

    def test_a_job_that_cannot_listen_yet_is_stopped_not_failed(self) -> None:
        ref = self.send(self.request("echo ready; sleep 60"))
        self.wait_until_ready()
        self.launcher.cancel([ref], save=True)
        assert self.end(ref).word == "stopped"

    @pytest.mark.parametrize("first_save", [False, True])
    def test_cancelling_at_once_ends_a_deaf_job_and_all_it_started(
        self, living: Callable[[str], list[Any]], first_save: bool
    ) -> None:
        marker = f"sleep 7{os.getpid()}"
        ref = self.send(self.request(f"trap '' TERM USR1; setsid {marker} & {marker} & echo ready; wait; wait"))
        self.wait_until_ready()
        if first_save:
            self.launcher.cancel([ref], save=True)
        self.launcher.cancel([ref], save=False)
        assert self.end(ref).word == "cancelled"
        assert not living(marker)

    @pytest.mark.parametrize("save", [False, True])
    def test_what_waits_is_cancelled_without_a_start(self, save: bool) -> None:
        first = self.send(self.request("exec sleep 60", "first"), "a")
        second = self.send(self.request("echo ran", "second", after={"first": "any"}), "b", first=first)
        self.until(lambda: self.launcher.states([first])[first].word == "running")
        assert self.launcher.states([second])[second].word == "waiting"
        self.launcher.cancel([first, second], save=save)
        assert self.end(second).word == "cancelled"
        assert self.end(first).word == ("stopped" if save else "cancelled")
        assert not (self.place / "logs" / "second-00000.log").exists()

    # surroundings

    def test_what_the_submitting_shell_got_from_another_job_does_not_leak(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leaks = ["SLURM_CPU_BIND", "SBATCH_PARTITION", "PMIX_RANK", "SOUSBATCH_ATTEMPT", "SOUSBATCH_MICRO_BATCH"]
        leaks += ["SOUSBATCH_PARENT", "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
        for name in leaks:
            monkeypatch.setenv(name, "leaked-value")
        monkeypatch.setenv("HARMLESS", "two  words")
        assert self.end(self.send(self.request("env"))).word == "done"
        assert "leaked-value" not in self.log()
        assert "HARMLESS=two  words\n" in self.log()


class TestSlurm(LauncherContract):
    """The contract, on a private Slurm."""

    @pytest.fixture
    def launcher(self, slurm: object) -> Launcher:
        return SlurmLauncher()

    def header(self, stage: str, num_tasks: int) -> Sequence[str]:
        size = num_tasks if num_tasks > 1 else None
        log = f"logs/{stage}-{'%5a' if size else '00000'}.log"
        lines = header(f"toy.{stage}", log, CPU, read_site(), uses_devices=False, array_size=size)
        return (*lines, CLIENT_LINE, TASK_LINE)

    def test_slurm_does_not_see_secrets_unless_the_recipe_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTHER_API_KEY", "sesame-1")
        monkeypatch.setenv("HF_TOKEN", "sesame 2; touch x")
        request = replace(self.request("env | grep -i sesame; squeue --Format=Command,Comment,SubmitLine:0"))
        assert self.end(self.send(request)).word == "done"
        assert "sesame" not in self.log()
        request = replace(request, inherit=("HF_TOKEN",))
        assert self.end(self.send(request, "another")).word == "done"
        assert self.log().count("sesame") == 1 and "HF_TOKEN=sesame 2; touch x\n" in self.log()


class TestLocal(LauncherContract):
    """The contract, on this machine."""

    @pytest.fixture
    def launcher(self) -> Launcher:
        return LocalLauncher()
