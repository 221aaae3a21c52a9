"""What Slurm's commands print, version by version, as 22.05.8, 24.11.5 and 26.05.3 printed it; stand-ins repeat it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.cluster import slurm
from sousbatch.errors import NoSlurmError, SlurmError, UnreachableError
from sousbatch.launchers.registry import choose_site
from sousbatch.launchers.slurm.launcher import job_state

Stand = Callable[[str, str], None]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Put a command of the given name and shell text first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(slurm.time, "sleep", lambda _: None)

    def make(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    "state, old, new, word, reason",
    [
        ("FAILED", "768", "3:0", "failed", "task 0 ended with exit code 3"),
        ("FAILED", "19200", "75:0", "stopped", "stopped after saving"),
        ("FAILED", "19712", "77:0", "failed", "task 0 found no space left on the disk"),
        ("FAILED", "9", "0:9", "failed", "task 0 was killed by signal 9 (often: no host memory left)"),
        ("COMPLETED", "0", "0:0", "done", ""),
        ("RUNNING", "0", "0:0", "running", ""),
    ],
)
def test_a_job_ends_alike_on_every_slurm(
    stand_in: Stand, state: str, old: str, new: str, word: str, reason: str
) -> None:
    for status in (old, new):
        stand_in("squeue", f"echo '7|N/A|{state}|{status}|2026-11-28T11:18:33|NonZeroExitCode|a key|'")
        shown = job_state(slurm.queue(), 1.0)
        assert (shown.word, shown.reason) == (word, reason), status


def test_an_exit_status_of_no_known_form_is_told_and_never_taken_for_none(stand_in: Stand) -> None:
    stand_in("squeue", "echo '7|N/A|FAILED|code=3|2026-11-28T11:18:33|NonZeroExitCode|a key|'")
    shown = job_state(slurm.queue(), 1.0)
    assert shown.word == "failed" and "'code=3'" in shown.reason


@pytest.mark.parametrize(
    "said, shown",
    [
        (
            "sbatch: Job 6 to start at 2026-11-28T11:18:40 using 1 processors on nodes n1 in partition main",
            "would start at 2026-11-28T11:18:40 using 1 processors on nodes n1 in partition main",
        ),
        (
            "sbatch: Job 10 to start at 2026-11-28T11:20:46 a using 8 processors on nodes n[1-2] in partition urgent\n"
            "sbatch:   Preempts: 19",
            "would start at 2026-11-28T11:20:46 using 8 processors on nodes n[1-2] in partition urgent",
        ),
    ],
)
def test_what_would_start_when_is_told_without_what_it_preempts(
    stand_in: Stand, tmp_path: Path, said: str, shown: str
) -> None:
    stand_in("sbatch", f"echo '{said}' >&2")
    assert slurm.test("", folder=tmp_path, environment=dict(os.environ)) == shown


# Which Slurm is meant

CONFIG = "ClusterName             = big\nMaxArraySize            = 501\nSLURM_VERSION           = 24.11.5"
SINFO = "echo 'cpu|up|2|48|192000|(null)'"
SCONTROL = f"""
if [ "$2" = config ]; then echo '{CONFIG}'; {{CONFIG}}; else echo 'PartitionName=cpu Default=YES'; fi"""


@pytest.mark.parametrize("ending", ["exit 0", "echo 'Slurmctld(primary) at vm is DOWN'; exit 1"])
def test_a_slurm_that_tells_its_configuration_is_the_site_also_where_the_ping_fails(
    stand_in: Stand, ending: str
) -> None:
    stand_in("sbatch", "")
    stand_in("sinfo", SINFO)
    stand_in("scontrol", SCONTROL.replace("{CONFIG}", ending))
    assert choose_site(None).name == "Slurm (big 24.11.5)"


@pytest.mark.parametrize(
    "complaint, error",
    [
        ("slurm_load_ctl_conf error: Protocol authentication error", UnreachableError),  # munged is down
        ("slurm_load_ctl_conf error: Incompatible versions of client and server code", SlurmError),
        ("scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Host name lookup failure", UnreachableError),
        ("slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)", UnreachableError),
        ("scontrol: fatal: Unable to process configuration file", SlurmError),
    ],
)
def test_a_slurm_that_cannot_be_asked_is_never_replaced_by_this_machine(
    stand_in: Stand, monkeypatch: pytest.MonkeyPatch, complaint: str, error: type[SlurmError]
) -> None:
    monkeypatch.setattr("sousbatch.launchers.slurm.launcher.PATIENCE_S", 0)
    stand_in("sbatch", "")
    stand_in("scontrol", f"echo '{complaint}' >&2; exit 1")
    with pytest.raises(error, match="run it here with --launcher local"):
        choose_site(None)


def test_partitions_that_all_refuse_jobs_send_nothing_to_the_login_node(stand_in: Stand) -> None:
    stand_in("sbatch", "")
    stand_in("scontrol", SCONTROL.replace("{CONFIG}", "exit 0"))
    stand_in("sinfo", SINFO.replace("|up|", "|inact|"))
    with pytest.raises(SlurmError, match="no partition that takes jobs"):
        choose_site(None)


@pytest.mark.parametrize(
    "complaint",
    [
        "scontrol: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
        "scontrol: error: fetch_config: DNS SRV lookup failed\n"
        "scontrol: fatal: Could not establish a configuration source",
        'scontrol: s_p_parse_file: file "/etc/slurm/slurm.conf" is empty\n'
        "scontrol: fatal: Unable to process configuration file",
    ],
)
def test_commands_without_any_configuration_mean_this_machine(stand_in: Stand, complaint: str) -> None:
    stand_in("sbatch", "")
    stand_in("scontrol", f"echo '{complaint}' >&2; exit 1")
    assert choose_site(None).launcher == "local"
    with pytest.raises(NoSlurmError, match="no Slurm is configured here"):
        choose_site("slurm")


# What reaches Slurm's commands, and what they say


def test_a_configless_login_node_and_its_tokens_reach_the_commands_and_not_the_job(
    stand_in: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sousbatch.cluster.environment import SLURM_CLIENT_NAMES, handed_on

    for name in SLURM_CLIENT_NAMES:
        monkeypatch.setenv(name, "mine")
    stand_in("squeue", "env")
    assert {line for line in slurm.call(["squeue"]).splitlines() if line.endswith("=mine")} == {
        f"{name}=mine" for name in SLURM_CLIENT_NAMES
    }
    assert not set(handed_on(os.environ)) & set(SLURM_CLIENT_NAMES)


def test_the_librarys_notes_are_no_errors(stand_in: Stand) -> None:
    note = "sbatch: _add_delay: adding delay in RPC send"
    stand_in("sbatch", f"echo '{note}' >&2; echo 'sbatch: error: Invalid account' >&2; exit 1")
    with pytest.raises(SlurmError, match="^sbatch: Invalid account$"):
        slurm.call(["sbatch"])


def test_what_sbatch_said_while_it_waited_is_told(stand_in: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.5)
    stand_in("sbatch", "echo 'sbatch: error: Slurm job queue full, sleeping and retrying' >&2; exec sleep 5")
    with pytest.raises(UnreachableError, match="job queue full"):
        slurm.call(["sbatch"])


# What becomes of a job


@pytest.mark.parametrize(
    "line, fate",
    [
        ("R|0|N/A|2026-11-28T11:00:00|", "running"),
        ("R|0|2026-11-28T11:05:00|2026-11-28T11:00:00|", "preempted"),  # its GraceTime runs
        ("PR|0|2026-11-28T11:05:00|2026-11-28T11:00:00|", "preempted"),
        ("R|0|2026-11-28T10:05:00|2026-11-28T11:00:00|", "running"),  # at an earlier start
        ("R|1|N/A|2026-11-28T11:00:00|", "gone"),
        ("CG|0|N/A|2026-11-28T11:00:00|", "gone"),
    ],
)
def test_a_job_that_runs_through_its_grace_time_is_preempted(
    stand_in: Stand, monkeypatch: pytest.MonkeyPatch, line: str, fate: str
) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    stand_in("squeue", f"echo '{line}'")
    assert slurm.fate_of("7") == fate


@pytest.mark.parametrize(
    "text, shown",
    [
        ("step 1\nsrun: error: n1: task 0: Out Of Memory\nsrun: error: n1: task 1: Terminated\n", (0, 137)),
        ("srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated\n", (1, 137)),
        ("srun: error: n2: tasks 2-3: Exited with exit code 3\nsrun: error: n1: task 0: Terminated\n", (2, 3)),
        ("srun: error: n1: task 0: Aborted (core dumped)\n", (0, None)),
        ("0: srun: error: n1: task 0: Killed\n", (None, None)),  # a rank's own line
    ],
)
def test_the_first_task_that_failed_tells_why(text: str, shown: tuple[int | None, int | None]) -> None:
    line, code = slurm.first_failure(text)
    assert code == shown[1]
    assert (f"task {shown[0]}:" in line or f"tasks {shown[0]}-" in line) if shown[0] is not None else not line
