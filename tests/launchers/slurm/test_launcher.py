"""The Slurm launcher without a Slurm: #SBATCH lines, states in our words, and how often the queue is asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster import slurm
from sousbatch.cluster.site import NodeKind, Partition, Site
from sousbatch.cluster.slurm import JobRow
from sousbatch.errors import SlurmError, UnreachableError
from sousbatch.job_environment import JobEnvironment
from sousbatch.launchers.base import FINAL_WORDS, JobRef
from sousbatch.launchers.slurm import launcher as module
from sousbatch.launchers.slurm.launcher import STATES, SlurmLauncher, job_state
from sousbatch.launchers.slurm.script import array_size, header
from sousbatch.recipes.plan import Plan, Stage
from sousbatch.recipes.schema import Resources
from sousbatch.run_folder import RunPaths

A100 = NodeKind(count=4, cpus=64, memory_mb=512_000, gpus=4)
GPU = Partition(name="gpu", is_default=True, nodes=(A100,), max_minutes=1440, default_minutes=60)
SITE = Site(
    name="Slurm",
    launcher="slurm",
    cpus_per_node=64,
    memory_bytes=512_000 << 20,
    gpus_per_node=4,
    gpu_memory_bytes=0,
    partitions=(GPU, replace(GPU, name="free", is_default=False, default_minutes=None, has_memory_default=True)),
)
TRAIN = Resources(nodes=2, devices_per_node=4, cpus_per_device=8, time_min=600)


def lines_of(resources: Resources, *, site: Site = SITE, uses_devices: bool = True, size: int | None = None) -> str:
    return "\n".join(header("r.train", "logs/x.log", resources, site, uses_devices=uses_devices, array_size=size))


def test_the_lines_of_a_training_on_gpus() -> None:
    assert lines_of(TRAIN) == (
        "#SBATCH --job-name=r.train\n"
        "#SBATCH --output=logs/x.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=4\n"
        "#SBATCH --cpus-per-task=8\n"
        "#SBATCH --mem=512000M\n"
        "#SBATCH --gres=gpu:4\n"
        "#SBATCH --time=600\n"
        "#SBATCH --signal=B:USR1@600\n"
        "#SBATCH --requeue\n"
        "#SBATCH --kill-on-invalid-dep=yes"
    )


def test_every_word_of_the_recipe_becomes_a_line_and_its_own_lines_come_last() -> None:
    resources = replace(
        TRAIN,
        partition="free",
        account="lab",
        qos="long",
        constraint="a100&ib",
        exclude="n[3-4]",
        reservation="ours",
        tasks_at_once=2,
        sbatch=("--mail-type=END", "--time=5"),
    )
    assert lines_of(resources, size=8).splitlines()[-9:] == [
        "#SBATCH --partition=free",
        "#SBATCH --account=lab",
        "#SBATCH --qos=long",
        "#SBATCH --constraint=a100&ib",
        "#SBATCH --exclude=n[3-4]",
        "#SBATCH --reservation=ours",
        "#SBATCH --array=0-7%2",
        "#SBATCH --mail-type=END",
        "#SBATCH --time=5",
    ]


@pytest.mark.parametrize(
    "resources, uses_devices, present, absent",
    [
        (replace(TRAIN, device="cpu"), True, ["--nodes=2", "--ntasks-per-node=4"], ["--gres"]),
        (TRAIN, False, ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=8"], ["--gres"]),
        (replace(TRAIN, sbatch=("--hold",)), True, ["--hold"], ["--array"]),
        (replace(TRAIN, sbatch=("--gpus-per-node=a100:4",)), True, ["--gpus-per-node=a100:4"], ["--gres"]),
    ],
)
def test_only_ranks_on_gpus_ask_for_them(
    resources: Resources, uses_devices: bool, present: list[str], absent: list[str]
) -> None:
    text = lines_of(resources, uses_devices=uses_devices)
    assert all(f"#SBATCH {word}\n" in text + "\n" for word in present)
    assert not any(word in text for word in absent)


def test_one_process_of_several_devices_has_the_cores_of_all() -> None:
    lines = header("r.predict", "x.log", TRAIN, SITE, uses_devices=True, ranks_per_node=1)
    wanted = ["--ntasks-per-node=1", "--cpus-per-task=32", "--gres=gpu:4", "--mem=512000M"]
    assert set(wanted) <= {line.removeprefix("#SBATCH ") for line in lines}


@pytest.mark.parametrize(
    "resources, uses_devices, memory",
    [
        (replace(TRAIN, memory_gb=100.0), True, "95368M"),
        (replace(TRAIN, devices_per_node=1, cpus_per_device=8), True, "128000M"),  # a quarter of the GPUs
        (replace(TRAIN, devices_per_node=1, cpus_per_device=48), True, "384000M"),  # three quarters of the cores
        (replace(TRAIN, device="cpu", devices_per_node=1), True, "64000M"),
        (replace(TRAIN, cpus_per_device=1), False, "8000M"),
        (replace(TRAIN, partition="free"), True, None),  # the site has a default of its own
    ],
)
def test_memory_is_what_is_asked_else_the_sites_default_else_a_fair_share(
    resources: Resources, uses_devices: bool, memory: str | None
) -> None:
    found = [line for line in lines_of(resources, uses_devices=uses_devices).splitlines() if "--mem=" in line]
    assert found == ([] if memory is None else [f"#SBATCH --mem={memory}"])


@pytest.mark.parametrize(
    "minutes, partition, expected",
    [
        (600, None, ["--time=600", "--signal=B:USR1@600"]),  # never more than ten minutes
        (60, None, ["--time=60", "--signal=B:USR1@360"]),  # a tenth
        (5, None, ["--time=5", "--signal=B:USR1@60"]),  # at least a minute
        (1, None, ["--time=1", "--signal=B:USR1@30"]),  # at most half
        (None, None, ["--signal=B:USR1@360"]),  # of the partition's default
        (None, "free", ["--signal=B:USR1@600"]),  # of its limit
    ],
)
def test_notice_before_the_time_limit(minutes: int | None, partition: str | None, expected: list[str]) -> None:
    text = lines_of(replace(TRAIN, time_min=minutes, partition=partition))
    found = [line for line in text.splitlines() if "--time" in line or "--signal" in line]
    assert found == [f"#SBATCH {line}" for line in expected]


@pytest.mark.parametrize(
    "tasks, largest, jobs, expected",
    [(8, 1001, None, 8), (2500, 1001, None, 1001), (2500, 1001, 300, 296), (8, 1001, 3, 1), (1, 1, None, 1)],
)
def test_an_array_fits_both_limits(tasks: int, largest: int, jobs: int | None, expected: int) -> None:
    assert array_size(tasks, 5, replace(SITE, max_array_size=largest, max_jobs=jobs)) == expected


def test_the_requests_of_a_plan(make_plan: Callable[..., Plan], tmp_path: Path) -> None:
    cpu = Resources(device="cpu")
    stages = [
        Stage(name="train", kind="train", of=None, resources=TRAIN, num_tasks=1, after=()),
        Stage(name="predict", kind="predict", of=None, resources=cpu, num_tasks=3, after=()),
    ]
    paths = RunPaths(root=tmp_path / "it's $(mine)" / "3f2a")
    train, predict = SlurmLauncher().prepare(make_plan(stages, site=SITE), paths)
    assert "--output=logs/train-00000.log" in train.text and "--array" not in train.text
    assert "--output=logs/predict-%5a.log" in predict.text and "--array=0-2" in predict.text
    for request in (train, predict):
        header_lines = [line for line in request.text.splitlines() if line.startswith("#SBATCH")]
        assert not any("mine" in line for line in header_lines), "no character of the folder is read by Slurm"
        assert """'"'"'s $(mine)/3f2a'""" in request.text.splitlines()[-1]


def row(state: str, code: int = 0, signal: int = 0, reason: str = "None", task: str = "", start: str = "") -> JobRow:
    return JobRow(job_id="7", task=task, state=state, exit_status=code << 8 | signal, reason=reason, start=start)


def said(*rows: JobRow) -> tuple[str, str]:
    state = job_state(rows, 12.0)
    assert state.seen_at == 12.0
    return state.word, state.reason


@pytest.mark.parametrize("name", STATES)
def test_every_state_has_a_word_and_words_that_end_a_job_say_why(name: str) -> None:
    word, reason = said(row(name, code=1, reason="None"))
    assert word == STATES[name]
    assert bool(reason) or word in ("waiting", "running", "done")


def test_a_state_of_a_later_slurm_is_never_final() -> None:
    word, reason = said(row("DREAMING"))
    assert word not in FINAL_WORDS and reason == "Slurm says DREAMING"


def test_a_job_that_nobody_knows_is_lost() -> None:
    assert said() == ("lost", "Slurm does not know the job any more")


@pytest.mark.parametrize(
    "found, expected",
    [
        (row("FAILED", code=1, reason="NonZeroExitCode"), ("failed", "task 0 ended with exit code 1")),
        (row("FAILED", code=77), ("failed", "task 0 found no space left on the disk")),
        (row("FAILED", code=76), ("failed", "task 0 ran out of device memory")),
        (row("FAILED", code=75), ("stopped", "stopped after saving")),
        (row("FAILED", signal=10), ("stopped", "stopped after saving")),  # SIGUSR1 met a batch shell not yet listening
        (row("FAILED", code=128 + 15), ("stopped", "stopped after saving")),
        (row("FAILED", signal=9, task="3"), ("failed", "task 3 was killed by signal 9 (often: no host memory left)")),
        (row("FAILED", code=137), ("failed", "task 0 was killed by signal 9 (often: no host memory left)")),
        (row("FAILED", code=128 + 11), ("failed", "task 0 was killed by signal 11")),
        (
            row("FAILED", signal=53, reason="RaisedSignal:53"),
            ("failed", "task 0 was not started by Slurm (RaisedSignal:53); ask `scontrol show job 7`"),
        ),
        (
            row("TIMEOUT", signal=15),
            ("failed", "the time limit ended it before it could save: raise resources.time_min"),
        ),
        (
            row("OUT_OF_MEMORY", signal=125),
            ("failed", "it took more host memory than it asked for: raise resources.memory_gb"),
        ),
        (row("NODE_FAIL"), ("failed", "its node failed")),
        (row("PREEMPTED"), ("stopped", "a job of higher priority took its place")),
        (row("CANCELLED"), ("cancelled", "cancelled")),
        (row("CANCELLED", reason="Dependency"), ("cancelled", "cancelled")),
        (row("CANCELLED", reason="DependencyNeverSatisfied"), ("cancelled", "an earlier stage did not end well")),
        (row("PENDING", reason="Resources"), ("waiting", "waits for free nodes")),
        (
            row("PENDING", reason="Resources", start="2026-11-22T12:00:00"),
            ("waiting", "waits for free nodes, expected to start 2026-11-22 12:00:00"),
        ),
        (row("PENDING", reason="QOSMaxGRESPerUser"), ("waiting", "Slurm says QOSMaxGRESPerUser")),
        (row("PENDING", reason="None"), ("waiting", "")),
        (row("COMPLETING"), ("running", "")),
        (row("COMPLETED"), ("done", "")),
    ],
)
def test_how_a_job_stands_in_words(found: JobRow, expected: tuple[str, str]) -> None:
    assert said(found) == expected


@pytest.mark.parametrize(
    "states, word",
    [
        (["COMPLETED", "RUNNING", "PENDING", "FAILED"], "running"),
        (["COMPLETED", "PENDING", "FAILED"], "waiting"),
        (["COMPLETED", "FAILED", "CANCELLED"], "failed"),
        (["COMPLETED", "PREEMPTED", "CANCELLED"], "stopped"),
        (["COMPLETED", "CANCELLED"], "cancelled"),
        (["COMPLETED", "COMPLETED"], "done"),
        (["DREAMING", "COMPLETED"], "waiting"),
    ],
)
def test_an_array_is_what_its_liveliest_task_is(states: list[str], word: str) -> None:
    assert said(*(row(state, code=state == "FAILED", task=str(n)) for n, state in enumerate(states)))[0] == word


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which the queue was asked; it always has one job that runs."""
    asked: list[float] = []

    def answer(*, patience_s: float = 0) -> list[JobRow]:
        asked.append(module.time.time())
        return [JobRow(job_id="7", state="RUNNING", comment="a key")]

    monkeypatch.setattr(slurm, "queue", answer)
    return asked


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let time pass for the launcher, and for the file that its watchers share."""
    now = [1000.0]
    write_text = Path.write_text

    def write_now(path: Path, text: str, **options: Any) -> int:
        count = write_text(path, text, **options)
        os.utime(path, (now[0], now[0]))
        return count

    monkeypatch.setattr(module.time, "time", lambda: now[0])
    monkeypatch.setattr(Path, "write_text", write_now)

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


REF = JobRef(launcher="slurm", job_id="7")


def test_all_who_watch_share_one_call_in_half_a_minute(queue: list[float], clock: Callable[[float], None]) -> None:
    watchers = [SlurmLauncher(max_age_s=30) for _ in range(5)]
    for _ in range(60):  # two looks a second, as `submit` and `status --watch` take them
        for watcher in watchers:
            assert watcher.states([REF])[REF].word == "running"
        clock(0.5)
    assert len(queue) == 1
    clock(0.5)
    watchers[0].states([REF])
    assert [later - earlier for earlier, later in zip(queue, queue[1:], strict=False)] == [30.5]


def test_a_state_says_when_it_was_asked_for(queue: list[float], clock: Callable[[float], None]) -> None:
    SlurmLauncher(max_age_s=30).states([REF])
    clock(29)
    assert SlurmLauncher(max_age_s=30).states([REF])[REF].seen_at == queue[0]


def test_nothing_is_decided_on_an_old_answer(queue: list[float], clock: Callable[[float], None]) -> None:
    SlurmLauncher(max_age_s=30).states([REF])
    SlurmLauncher().states([REF])
    assert len(queue) == 2


def test_what_was_cancelled_is_asked_for_again(
    queue: list[float], clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "cancel", lambda *_: None)
    watcher = SlurmLauncher(max_age_s=30)
    watcher.states([REF])
    watcher.cancel([REF], save=False)
    watcher.states([REF])
    assert len(queue) == 2


def test_an_incomplete_cache_is_asked_for_again(queue: list[float], clock: Callable[[float], None]) -> None:
    watcher = SlurmLauncher(max_age_s=30)
    watcher.states([REF])
    module._queue_file().write_text('[{"job_id": ')
    assert watcher.states([REF])[REF].word == "running" and len(queue) == 2


def test_many_jobs_that_the_queue_forgot_are_one_call_to_the_accounting(
    queue: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[str]] = []

    def ended(job_ids: set[str]) -> list[JobRow]:
        asked.append(set(job_ids))
        return [JobRow(job_id="8", state="COMPLETED")]

    monkeypatch.setattr(slurm, "ended", ended)
    refs = [JobRef(launcher="slurm", job_id=number) for number in ("7", "8", "9")]
    words = [state.word for state in SlurmLauncher().states(refs).values()]
    assert words == ["running", "done", "lost"] and asked == [{"8", "9"}]


def stand_in(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_an_answer_that_may_come_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
echo x >> {tmp_path}/calls
if [ $(wc -l < {tmp_path}/calls) -lt 3 ]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
fi
echo fine"""
    stand_in(tmp_path / "bin", "squeue", text, monkeypatch)
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)
    assert slurm.call(["squeue"], patience_s=60) == "fine\n"
    (tmp_path / "calls").unlink()
    with pytest.raises(UnreachableError, match="squeue: .*Unable to contact"):
        slurm.call(["squeue"])


def test_a_refusal_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'echo x >> {tmp_path}/calls; echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1'
    stand_in(tmp_path / "bin", "sbatch", text, monkeypatch)
    with pytest.raises(SlurmError, match=r"^sbatch: Batch job submission failed: Invalid account$"):
        slurm.call(["sbatch"], patience_s=60)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_the_shells_own_job_does_not_leak_into_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "bin", "squeue", "env", monkeypatch)
    conf = tmp_path / "slurm.conf"
    conf.touch()
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_ACCOUNT", "SQUEUE_FORMAT", "SLURM_CONF"):
        monkeypatch.setenv(name, str(conf))
    found = [line for line in slurm.call(["squeue"]).splitlines() if line.endswith(f"={conf}")]
    assert found == [f"SLURM_CONF={conf}"]


@pytest.mark.parametrize("name", ["slurmstepd", "slurmstepd-n1"])
def test_what_the_time_limit_ended_says_so_though_srun_ends_well(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    stage = Stage(name="predict", kind="predict", of=None, resources=TRAIN, num_tasks=1, after=())
    log = f"unit 0\n{name}: error: *** STEP 4.0 ON n1 CANCELLED AT 2026-11-30T11:14:10 DUE TO TIME LIMIT ***\nsrun: x\n"
    where = SlurmLauncher().placement(JobEnvironment())
    code, reason = where.explain(stage, 0, log, is_finished=False)
    assert code == 1 and "raise resources.predict.time_min" in reason
    assert "took the nodes away" in where.explain(stage, 0, "unit 0\n", is_finished=False)[1]
