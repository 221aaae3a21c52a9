"""The private Slurm: it starts, repairs itself, runs jobs as a cluster does, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sousbatch.cluster.sandbox import build, lifecycle
from sousbatch.cluster.sandbox.processes import processes
from sousbatch.errors import UsageError

is_missing = pytest.mark.skipif(bool(build.missing_packages()), reason="Slurm is not installed")


def needs_slurm(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slurm(is_missing(test))


def until(condition: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def submit(*options: str, script: str = "sleep 300") -> str:
    return run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={script}")


def state(job: str) -> str:
    return run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a sandbox of the test's own, which SLURM_CONF names."""
    parent = Path(tempfile.mkdtemp(prefix="sb-"))
    monkeypatch.setenv("SLURM_CONF", str(parent / "own" / "slurm.conf"))
    yield parent / "own"
    lifecycle.stop(parent / "own")
    parent.rmdir()


@needs_slurm
def test_start_prints_what_a_shell_evaluates_and_stop_leaves_nothing(folder: Path, sousbatch: Callable[..., Any]):
    command = ("sandbox", "start", "--dir", str(folder), "--nodes", "3", "--gpus", "0", "--set", "maxarraysize=11")
    code, out, err = sousbatch(*command)
    assert (code, out) == (0, f"export SLURM_CONF={folder}/slurm.conf\n")
    assert (
        f"a private Slurm {build.version_of(build.default_prefix())} runs in" in err
        and f"sousbatch sandbox stop --dir {folder}" in err
    )
    assert "MaxArraySize            = 11\n" in run("scontrol", "show", "config")

    again = sousbatch("sandbox", "start", "--dir", str(folder))
    assert again[:2] == (0, out) and "runs already" in again[2] and "3 nodes" in again[2]

    # what ignores SIGTERM, and what no daemon knows any more
    submit("--nodes=3", script="trap '' TERM; (setsid sleep 301 &); srun sleep 302; sleep 303")
    until(lambda: sum("sleep 302" in " ".join(one.cmdline()) for one in processes(folder)) >= 3)
    code, out, _ = sousbatch("sandbox", "status", "--dir", str(folder))
    assert code == 0 and "is dead" not in out and "n3    allocated" not in out and "urgent" in out and "RUNNING" in out

    living = processes(folder)
    assert sousbatch("sandbox", "stop", "--dir", str(folder))[0] == 0
    assert [one for one in living if one.is_running() and one.status() != psutil.STATUS_ZOMBIE] == []
    assert list(folder.parent.iterdir()) == []
    assert sousbatch("sandbox", "stop", "--dir", str(folder))[2].startswith("sousbatch: no sandbox runs")
    assert sousbatch("sandbox", "status", "--dir", str(folder))[0] == 2


@needs_slurm
def test_daemons_and_commands_are_those_of_one_prefix(folder: Path, tmp_path: Path, sousbatch: Callable[..., Any]):
    """Another prefix is made of links to what is here."""
    real = build.default_prefix()
    for name in ("bin/sbatch", "bin/sinfo", "bin/squeue", "sbin/slurmctld", "sbin/slurmd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(real / name)
    code, out, _ = sousbatch("sandbox", "start", "--dir", str(folder), "--slurm", str(tmp_path), "--nodes", "1")
    assert (code, out) == (0, f'export SLURM_CONF={folder}/slurm.conf\nexport PATH={tmp_path}/bin:"$PATH"\n')
    assert sousbatch("sandbox", "start", "--dir", str(folder))[1] == out, "it keeps the Slurm it was started with"
    paths = [one.environ()["PATH"] for one in processes(folder) if one.name() in ("slurmctld", "slurmd")]
    assert len(paths) == 2 and all(path.startswith(f"{tmp_path}/sbin:{tmp_path}/bin:") for path in paths)
    said = sousbatch("sandbox", "status", "--dir", str(folder))[1]
    assert said.startswith(f"Slurm {build.version_of(real)} of {tmp_path}\n") and "n1    idle" in said


@needs_slurm
@pytest.mark.skipif(os.getuid() != 0, reason="only root can start daemons that become other users")
def test_slurmctld_may_be_another_users_and_jobs_a_third_ones(folder: Path):
    folder.parent.chmod(0o755)
    lifecycle.start(folder, nodes=1, settings={"SlurmUser": "daemon", "SlurmdUser": "root"})
    owners = {one.name(): one.username() for one in processes(folder)}
    assert (owners["slurmctld"], owners["slurmd"]) == ("daemon", "root")
    assert subprocess.run(["srun", "id", "-un"], user="games", cwd="/", capture_output=True).stdout == b"games\n"


@needs_slurm
def test_what_died_is_told_and_started_again_and_jobs_run_on(slurm: lifecycle.Sandbox, sousbatch: Callable[..., Any]):
    where = ("--dir", str(slurm.folder))
    saved = slurm.folder / "state" / "job_state"
    job = submit("--nodelist=n1")
    until(lambda: state(job) == "RUNNING")
    running_at = time.time()
    run("scontrol", "update", f"jobid={job}", "comment=is saved again")  # slurmctld forgets what it has not saved
    until(lambda: saved.exists() and saved.stat().st_mtime > running_at)
    daemons = [one for one in processes(slurm.folder) if one.name().startswith(("munged", "slurmctld", "slurmd"))]
    for process in daemons:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(daemons, timeout=30)
    code, out, _ = until(lambda: sousbatch("sandbox", "status", *where))
    assert code == 1 and out.count("  is dead\n") == 4 and "`sousbatch sandbox start` restarts what is dead" in out
    code, out, err = sousbatch("sandbox", "start", *where)
    assert (code, out) == (0, f"export SLURM_CONF={slurm.conf}\n") and "munged, slurmctld, slurmd n1, slurmd n2" in err
    until(lambda: state(job) == "RUNNING")


@needs_slurm
def test_a_sandbox_whose_folder_was_removed_is_still_ended(folder: Path):
    lifecycle.start(folder)
    for path in (folder / "sandbox.json", folder / "slurm.conf"):
        path.unlink()
    assert lifecycle.stop(folder) >= 4
    assert processes(folder) == []
    subprocess.run(["rm", "-r", folder], check=True)


@needs_slurm
def test_daemons_listen_where_the_machines_name_leads(slurm: lifecycle.Sandbox):
    places = {
        connection.laddr.ip
        for process in processes(slurm.folder)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert places == ({slurm.address} if slurm.is_confined else {"0.0.0.0"})


@needs_slurm
def test_jobs_see_their_gpus_and_nothing_of_the_shell_that_started_slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("OF_THE_STARTING_SHELL", "1")
    lifecycle.start(folder)
    monkeypatch.delenv("OF_THE_STARTING_SHELL")
    run("sbatch", "--wait", "--nodes=2", "--gpus-per-node=2", f"--output={tmp_path}/out", "--wrap=env; srun hostname")
    seen = dict(line.split("=", 1) for line in (tmp_path / "out").read_text().splitlines() if "=" in line)
    assert seen["CUDA_VISIBLE_DEVICES"] == "0,1" and seen["SLURM_NNODES"] == "2"
    assert "OF_THE_STARTING_SHELL" not in seen


@needs_slurm
def test_an_urgent_job_preempts_and_the_other_is_soon_back(slurm: lifecycle.Sandbox):
    first = submit("--nodes=2", "--exclusive")
    until(lambda: state(first) == "RUNNING")
    urgent = submit("--nodes=2", "--exclusive", "--partition=urgent", script="true")
    until(lambda: state(first) == "PENDING")
    started = time.monotonic()
    until(lambda: state(urgent) == "COMPLETED")
    until(lambda: state(first) == "RUNNING")
    assert time.monotonic() - started < 15  # 6 s on an idle machine; 121 s with Slurm's default cred_expire


@needs_slurm
def test_a_killed_nodes_steps_live_on(slurm: lifecycle.Sandbox, tmp_path: Path):
    submit("--nodelist=n2", script=f"while sleep 0.1; do date >> {tmp_path}/beats; done")
    until((tmp_path / "beats").exists)
    lifecycle.kill_node(slurm.folder, "n2")
    assert lifecycle.daemons_alive(slurm.folder)["slurmd n2"] is False
    size = (tmp_path / "beats").stat().st_size
    until(lambda: (tmp_path / "beats").stat().st_size > size)
    lifecycle.start_node(slurm.folder, "n2")
    assert all(lifecycle.daemons_alive(slurm.folder).values())


@needs_slurm
def test_the_controller_can_be_away(slurm: lifecycle.Sandbox):
    job = submit()
    lifecycle.stop_controller(slurm.folder)
    assert lifecycle.daemons_alive(slurm.folder)["slurmctld"] is False
    lifecycle.start_controller(slurm.folder)
    until(lambda: state(job) == "RUNNING")


def test_accounting_answers(slurm_accounting: lifecycle.Sandbox):
    job = submit(script="exit 3")
    until(
        lambda: (
            run("sacct", "--noheader", "--parsable2", "-X", f"--jobs={job}", "--format=state,exitcode") == "FAILED|3:0"
        )
    )


def test_a_limit_that_is_not_set_is_empty(slurm_accounting: lifecycle.Sandbox):
    said = run("sacctmgr", "-nP", "show", "assoc", "format=user,maxsubmitjobs,grpsubmitjobs")
    assert said.split("\n") == ["||", "root||"]
    assert run("sacctmgr", "-nP", "show", "qos", "format=name,maxsubmitjobsperuser") == "normal|"


def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sousbatch: Callable[..., Any]
):
    monkeypatch.setattr(build, "PATH", str(tmp_path))
    monkeypatch.setattr(build, "_DEBIAN", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    code, out, err = sousbatch("sandbox", "start", "--accounting", "--dir", str(tmp_path / "own"))
    packages = "slurmctld slurmd slurm-client slurmdbd munge mariadb-server-core"
    assert (code, out) == (2, "")
    assert f"`sudo apt-get install --no-install-recommends {packages}`" in err
    assert not (tmp_path / "own").exists()


def test_a_sandbox_of_another_version_is_told(tmp_path: Path, sousbatch: Callable[..., Any]):
    (tmp_path / "sandbox.json").write_text('{"nodes": 2}')
    code, _, err = sousbatch("sandbox", "status", "--dir", str(tmp_path))
    assert code == 1 and "another version's" in err and f"sandbox stop --dir {tmp_path}" in err


@needs_slurm
def test_a_start_that_fails_says_why_and_leaves_nothing(folder: Path, sousbatch: Callable[..., Any]):
    code, out, err = sousbatch("sandbox", "start", "--dir", str(folder), "--set", "NoSuchKey=1")
    assert (code, out) == (1, "") and "unrecognized key: NoSuchKey" in err
    assert processes(folder) == [] and not folder.exists()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("own", {"nodes": 0}, "1 to 99 nodes, not 0"),
        ("own", {"prefix": Path("/nowhere")}, "the Slurm in /nowhere lacks slurmctld, slurmd, sbatch; name a prefix"),
        ("own", {"settings": {"NodeName": "n9"}}, "no value of slurm.conf that can be set"),
        ("own", {"settings": {"KillWait": "2\nSlurmUser=x"}}, "no value of slurm.conf that can be set"),
        ("a b", {}, "characters that slurm.conf cannot hold"),
        ("x" * 81, {}, "name a shorter one with --dir"),
        (".", {}, "holds something that is no sandbox"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(name: str, options: dict[str, Any], words: str):
    with tempfile.TemporaryDirectory(prefix="sb-") as parent:
        (Path(parent) / "file").touch()
        with pytest.raises(UsageError, match=words):
            lifecycle.start(Path(parent, name), **options)
