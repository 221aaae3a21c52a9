"""The stage process: real processes and signals, with small stand-ins for the jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sousbatch import events, files, ledger
from sousbatch.checkpoints.capacity import reservations
from sousbatch.errors import EXIT_NO_ROOM, EXIT_STOPPED, RunError
from sousbatch.events import Event
from sousbatch.job_environment import JobEnvironment
from sousbatch.launchers.attempts import read_attempts
from sousbatch.launchers.base import FINAL_WORDS, JobState, Request
from sousbatch.launchers.freeze import accept_environment, freeze, verify
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.launchers.local.placement import LocalPlacement
from sousbatch.launchers.states import stage_states
from sousbatch.recipes.inspect.versions import versions_of
from sousbatch.recipes.plan import Batch, CheckpointForecast, Plan, Stage, StageSplit, read_plan
from sousbatch.recipes.schema import Checkpoints, Environment, Resources
from sousbatch.run_folder import RunPaths

CPU = Resources(device="cpu")
BATCH = Batch(
    world_size=1, micro_batch=4, accumulation=1, steps=10, steps_per_epoch=10, warmup_steps=0, save_every_steps=5
)

# Runs the stage process with one stand-in job a node in place of the real ones.
DRIVER = """
import json, os, sys
from sousbatch.launchers import stage_process
from sousbatch.launchers.base import RankCommand
from sousbatch.launchers.local.placement import LocalPlacement
stage_process._STRAGGLER_S = 0.2
texts = json.loads(os.environ["STAND_IN"])
def commands(self, plan, paths, stage):
    words = [(sys.executable, "-c", text, *sys.argv[1:3]) for text in texts]
    return [RankCommand(words=each, variables=self.devices(stage, node)) for node, each in enumerate(words)]
LocalPlacement.commands = commands
sys.exit(stage_process.main(*sys.argv[1:3]))
"""
# What stand-ins share: their place in the run, a word with the test, and progress.
PRELUDE = """
import os, pathlib, signal, subprocess, sys, time
from sousbatch import events, ledger
from sousbatch.cluster import processes
processes.die_with_parent(signal.SIGKILL)
root, name = pathlib.Path(sys.argv[1]), sys.argv[2]
attempt, task = int(os.environ["SOUSBATCH_ATTEMPT"]), int(os.environ["SOUSBATCH_TASK"])
flag = root / "stop" / f"{name}-{task:05d}"
def progress():
    writer = ledger.open_job(root / "ledger", name, task, attempt)
    writer.write(events.Saved(step=attempt))
    writer.close()
def ready():
    (root / "ready").touch()
"""


class Bench:
    """One run folder, and the stage process started on it."""

    def __init__(self, plan: Plan, root: Path, until: Callable[..., Any]) -> None:
        self.plan, self.until = plan, until
        self.paths = RunPaths(root=root / "toy" / plan.run_id)
        files.make_private_dir(self.paths.root)
        freeze(plan, LocalLauncher(), self.paths)

    def start(self, *texts: str, stage: str = "train", **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"STAND_IN": json.dumps([PRELUDE + text for text in texts])}
        command = [sys.executable, "-c", DRIVER, str(self.paths.root), stage]
        piped = {"stdout": subprocess.PIPE, "text": True} | options
        process: subprocess.Popen[str] = subprocess.Popen(command, env=environment, **piped)
        return process

    def run(self, *texts: str, stage: str = "train") -> tuple[int, str]:
        process = self.start(*texts, stage=stage)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def wait_until_ready(self) -> None:
        self.until((self.paths.root / "ready").exists)

    def events(self, kind: str) -> list[Event]:
        return [event for event in ledger.read(self.paths.ledger_dir) if event.kind == kind]

    def codes(self, stage: str = "train") -> list[int | None]:
        attempts = read_attempts(ledger.read(self.paths.ledger_dir), stage, 0, None)
        return [attempt.exit_code for attempt in attempts]


@pytest.fixture
def bench(tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]) -> Bench:
    train = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
    merge = Stage(name="merge", kind="merge", of=None, resources=CPU, num_tasks=1, after=())
    return Bench(make_plan([train, merge]), tmp_path, until)


# what is next


def test_a_job_that_is_done_is_one_attempt(bench: Bench) -> None:
    code, output = bench.run("print('worked', flush=True)")
    assert code == 0 and "worked" in output and "attempt 1 ended: done" in output
    (begun,) = bench.events("attempt")
    assert begun.micro_batch == 4 and begun.pid and begun.host
    assert bench.codes() == [0]


def test_a_training_that_starts_releases_what_a_dead_run_was_promised(bench: Bench) -> None:
    dead = RunPaths(root=bench.paths.root.parent / "dead")
    files.make_private_dir(dead.root)
    holder = reservations.Holder(jobs=("local:no such job",))
    reservations.publish(dead, reservations.Reservation(run="dead", promised_bytes=10**12, held_bytes=0, holder=holder))
    assert bench.run("")[0] == 0
    left = reservations.read_reservation(dead)
    assert left is not None and left.promised_bytes == left.held_bytes < 10**6


def test_no_training_starts_whose_final_weights_are_not_held(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    train = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
    plan = make_plan([train], checkpoints=Checkpoints(store_budget_gb=0.001))
    kept = CheckpointForecast(
        save_level="full", keeps_all=True, free_bytes=0, full_bytes=0, least_bytes=2_000_000, fits=True, change=""
    )
    plan = dataclasses.replace(plan, forecast=dataclasses.replace(plan.forecast, checkpoints={"train": kept}))
    bench = Bench(plan, tmp_path, until)
    code, output = bench.run("print('worked', flush=True)")
    assert code == EXIT_NO_ROOM and "worked" not in output and bench.codes() == [EXIT_NO_ROOM]
    assert "final weights" in reason(bench) and "raise checkpoints.store_budget_gb" in reason(bench)


def test_a_crash_after_progress_is_tried_again_and_one_without_ends_it(bench: Bench) -> None:
    code, _ = bench.run("if attempt < 3: progress()\nsys.exit(5)")
    assert code == 5
    assert bench.codes() == [5, 5, 5]
    assert [event.progress for event in bench.events("ended")] == [1, 1, 0]


def test_out_of_device_memory_halves_the_micro_batch_until_it_fits_also_after_a_resume(bench: Bench) -> None:
    text = "sys.exit(0 if os.environ['SOUSBATCH_MICRO_BATCH'] == '1' else 76)"
    assert bench.run("sys.exit(76 if attempt == 1 else 1)")[0] == 1
    assert bench.run(text)[0] == 0
    sizes = [(event.micro_batch, event.accumulation) for event in bench.events("attempt")]
    assert sizes == [(4, 1), (2, 2), (2, 2), (1, 4)]


def test_a_killed_job_leaves_its_attempt_on_record(bench: Bench) -> None:
    code, _ = bench.run("os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 137 and bench.codes() == [137]


def test_the_node_that_failed_explains_the_attempt_not_the_ones_that_waited_for_it(bench: Bench) -> None:
    code, _ = bench.run("time.sleep(60)", "sys.exit(77)", "time.sleep(60)")
    assert code == EXIT_NO_ROOM and bench.codes() == [77]


def test_an_attempt_that_was_replaced_does_not_start_another(bench: Bench) -> None:
    text = "progress()\nledger.open_attempt(root / 'ledger', name, task)\nsys.exit(1)"
    code, output = bench.run(text)
    assert code == 1 and "attempt 1 of train was replaced by a newer one" in output
    assert len(bench.events("attempt")) == 1


# stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_save(bench: Bench, number: signal.Signals) -> None:
    process = bench.start("ready()\nwhile not flag.exists(): time.sleep(0.02)\nprogress()\nsys.exit(75)")
    bench.wait_until_ready()
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and "saved and stopped" in output
    assert not bench.paths.stop_flag("train", 0).exists(), "the next job by hand would stop at once"


def test_a_crash_while_stopping_is_not_tried_again(bench: Bench) -> None:
    process = bench.start("progress()\nready()\nwhile not flag.exists(): time.sleep(0.02)\nsys.exit(1)")
    bench.wait_until_ready()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and bench.codes() == [1]


def test_a_short_job_is_ended_and_counts_as_stopped(bench: Bench) -> None:
    process = bench.start("ready()\ntime.sleep(60)", stage="merge")
    bench.wait_until_ready()
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED and bench.codes("merge") == [EXIT_STOPPED]


def test_a_flag_left_by_a_killed_attempt_stops_nobody(bench: Bench) -> None:
    files.make_private_dir(bench.paths.stop_flag("train", 0).parent)
    bench.paths.stop_flag("train", 0).touch()
    assert bench.run("sys.exit(75 if flag.exists() else 0)")[0] == 0


def test_signals_at_any_moment_of_the_start_leave_a_stop_or_nothing(bench: Bench) -> None:
    text = "for _ in range(1000):\n    if flag.exists(): sys.exit(75)\n    time.sleep(0.02)"
    for delay_ms in (0, 60, 120, 180, 260):
        process = bench.start(text)
        time.sleep(delay_ms / 1000)
        process.terminate()
        process.communicate(timeout=120)
        assert process.returncode in (EXIT_STOPPED, -signal.SIGTERM)


# kills


@pytest.mark.parametrize("victim", ["localjob", "stage", "job"])
def test_whoever_is_killed_no_process_is_left(
    bench: Bench, tmp_path: Path, victim: str, living: Callable[[str], list[psutil.Process]]
) -> None:
    marker = f"sleep 8{os.getpid()}"
    grandchildren = (
        f"subprocess.Popen(['setsid', *{marker.split()!r}])\nsubprocess.Popen(['sh', '-c', '({marker} &)'])\n"
    )
    text = f"{grandchildren}(root / 'job').write_text(str(os.getpid()))\nready()\ntime.sleep(60)"
    driver = tmp_path / "driver.py"
    driver.write_text(f"import os\nos.environ['STAND_IN'] = {json.dumps([PRELUDE + text])!r}\n{DRIVER}")
    request = Request(
        stage="train",
        text=f"exec {sys.executable} {driver} {bench.paths.root} train\n",
        num_tasks=1,
        after=(),
        resources=CPU,
        uses_devices=False,
        log_dir=str(tmp_path / "logs"),
    )
    launcher = LocalLauncher(tmp_path / "jobs")
    ref = launcher.send(request, "key", {})
    bench.wait_until_ready()
    bench.until(lambda: len(living(marker)) >= 2)
    numbers = {
        "localjob": int((tmp_path / "jobs" / "key" / "pid").read_text()),
        "stage": bench.events("attempt")[0].pid,
        "job": int(bench.until((bench.paths.root / "job").read_text)),
    }
    os.kill(numbers[victim], signal.SIGKILL)
    bench.until(lambda: launcher.states([ref])[ref].word in FINAL_WORDS)
    bench.until(lambda: not living(marker))
    bench.until(lambda: not living(str(tmp_path)))
    state = launcher.states([ref])[ref]
    assert (state.word, bench.codes()) == {
        "localjob": ("lost", [137]),
        "stage": ("failed", [None]),
        "job": ("failed", [137]),
    }[victim]


# what was frozen


def reason(bench: Bench) -> str:
    (error,) = bench.events("error")
    message: str = error.message
    return message


@pytest.mark.parametrize("old, new", [('"micro_batch": 4', '"micro_batch": 5'), ('"seed": 0', '"seed": 1')])
def test_an_edited_plan_is_refused(bench: Bench, old: str, new: str) -> None:
    text = bench.paths.plan.read_text()
    assert old in text
    bench.paths.plan.write_text(text.replace(old, new, 1))
    code, output = bench.run("print('worked')")
    assert code == 1 and "worked" not in output
    assert reason(bench) == f"{bench.paths.plan} was changed after submission"
    assert bench.codes() == [1]


def test_a_plan_that_another_sousbatch_reads_otherwise_is_not_called_edited(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = read_plan(bench.paths.plan)
    monkeypatch.setattr(Plan, "run_id", "0123456789ab")  # as a new key of the recipe would make it
    with pytest.raises(RunError, match="sousbatch itself was changed after submission"):
        verify(bench.paths, plan, plan.stages[0])


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_edited_code_is_refused_and_the_users_own_may_be_edited(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any], change: str
) -> None:
    source = tmp_path / "mine"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a.py").write_text("a = 1\n")
    stage = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
    bench = Bench(make_plan([stage], Environment(code=(str(source),))), tmp_path, until)
    (source / "sub" / "a.py").write_text("a = 2\n")
    assert bench.run("")[0] == 0
    copy = bench.paths.code(str(source)) / "sub" / "a.py"
    assert copy.read_text() == "a = 1\n"
    if change == "removed":
        copy.unlink()
    else:
        (copy if change == "edited" else copy.with_name("b.py")).write_text("a = 3\n")
    assert bench.run("")[0] == 1
    assert "was changed after submission" in reason(bench)


@pytest.mark.parametrize("change, expected", [("edited", "was changed since"), ("removed", "is gone since submission")])
def test_changed_data_is_refused(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any], change: str, expected: str
) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"input": "a"}\n')
    split = StageSplit(name="train", path=str(data), digest=files.digest_file(data), num_rows=1, num_examples=1)
    stage = Stage(
        name="train",
        kind="train",
        of=None,
        resources=CPU,
        splits={"train": split},
        num_tasks=1,
        after=(),
        batch=BATCH,
    )
    bench = Bench(make_plan([stage]), tmp_path, until)
    assert bench.run("")[0] == 0
    if change == "edited":
        data.write_text('{"input": "b"}\n')
    else:
        data.unlink()
    assert bench.run("")[0] == 1
    assert expected.split()[1] in reason(bench) and str(data) in reason(bench)


def test_why_it_was_refused_is_the_state_of_the_stage(bench: Bench) -> None:
    bench.paths.plan.write_text(bench.paths.plan.read_text() + " ")
    bench.run("")
    states = stage_states(bench.plan, ledger.read(bench.paths.ledger_dir), {"train": JobState(word="failed")})
    assert "was changed after submission" in states["train"].reason


def test_a_changed_environment_is_refused_until_a_person_accepts_it(
    tmp_path: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    stage = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
    plan = make_plan([stage])
    old = {"python": "2.7", "gone": "1.0"}
    bench = Bench(dataclasses.replace(plan, inputs=dataclasses.replace(plan.inputs, versions=old)), tmp_path, until)
    assert bench.run("")[0] == 1
    assert "python was 2.7 and is 3" in reason(bench) and "gone was 1.0 and is gone" in reason(bench)
    states = stage_states(bench.plan, ledger.read(bench.paths.ledger_dir), {"train": JobState(word="failed")})
    assert f"`sousbatch resume {bench.paths.run_id} --accept-environment`" in states["train"].advice
    accept_environment(bench.plan, LocalLauncher(), bench.paths)
    (accepted,) = bench.events("accepted")
    assert accepted.was == old and accepted.versions == versions_of(Environment())
    assert bench.run("")[0] == 0
    client = ledger.open_client(bench.paths.ledger_dir)  # as if it had been accepted in yet another environment
    client.write(events.Accepted(versions={"python": "2.8"}, was=old))
    client.close()
    assert bench.run("")[0] == 1 and "python was 2.8 and is 3" in bench.events("error")[-1].message


# a full disk


def test_a_full_disk_ends_the_stage_with_its_own_code_though_nothing_can_be_logged(
    small_disk: Path, make_plan: Callable[..., Plan], until: Callable[..., Any]
) -> None:
    stage = Stage(name="train", kind="train", of=None, resources=CPU, num_tasks=1, after=(), batch=BATCH)
    bench = Bench(make_plan([stage]), small_disk, until)
    fill = (
        "progress()\n"
        "with open(root / 'ballast', 'wb', buffering=0) as stream:\n"
        "    try:\n"
        "        while stream.write(b'x' * 4096): pass\n"
        "    except OSError: sys.exit(77)"
    )
    with (small_disk / "log").open("w") as log:
        process = bench.start(fill, stdout=log, stderr=subprocess.STDOUT)
        assert process.wait(timeout=120) == EXIT_NO_ROOM
        assert bench.start("", stdout=log, stderr=subprocess.STDOUT).wait(timeout=120) in (0, EXIT_NO_ROOM)
    (bench.paths.root / "ballast").unlink()
    assert bench.run("sys.exit(0 if attempt > 1 else 9)")[0] == 0


# what the job is given


def test_the_job_gets_its_attempt_and_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUSBATCH_TASK", "0")
    code, output = bench.run("import json\nprint('{' + json.dumps(dict(os.environ))[1:], flush=True)")
    assert code == 0
    said = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert (said["SOUSBATCH_ATTEMPT"], said["SOUSBATCH_MICRO_BATCH"], said["SOUSBATCH_ACCUMULATION"]) == ("1", "4", "1")
    assert said["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "granted, node, visible, expected",
    [
        ("3,1", 0, None, "3,1"),
        ("3,1,GPU-5c4f,0", 1, "0,1,GPU-5c4f,3", "GPU-5c4f,0"),
        ("", 0, "0,1", ""),
        (None, 1, None, "2,3"),
        (None, 1, "4,5,6,7", "6,7"),
    ],
)
def test_simulated_nodes_see_devices_of_their_own_among_those_granted(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    granted: str | None,
    node: int,
    visible: str | None,
    expected: str,
) -> None:
    for name, value in (("SOUSBATCH_DEVICES", granted), ("CUDA_VISIBLE_DEVICES", visible)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    resources = Resources(device="gpu", nodes=2, devices_per_node=2)
    stage = dataclasses.replace(bench.plan.stages[0], resources=resources)
    placement = LocalPlacement(JobEnvironment.from_env(os.environ))
    assert placement.devices(stage, node)["CUDA_VISIBLE_DEVICES"] == expected
