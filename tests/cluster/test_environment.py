"""What a job takes over from the shell that submits it: no secrets, nothing of another job."""

from __future__ import annotations

import pytest

from sousbatch.cluster.environment import SLURM_CLIENT_NAMES, handed_on, slurm_client, withheld, without_leaks

SHELL = {
    "GH_PAT": "ghp_0123456789abcdefghij",
    "HTTPS_PROXY": "http://me:hunter2@proxy:3128",
    "HTTP_PROXY": "http://proxy:3128",
    "HOME": "/home/a",
}


def test_a_job_gets_no_secret_of_the_shell_unless_it_is_named() -> None:
    assert handed_on(SHELL) == {"HTTP_PROXY": "http://proxy:3128", "HOME": "/home/a"}
    assert handed_on(SHELL, ["HTTPS_PROXY", "GH_PAT"]) == SHELL


def test_what_a_job_lacks_for_its_value_is_named() -> None:
    assert withheld(SHELL) == ["HTTPS_PROXY"] and withheld(SHELL, ["HTTPS_PROXY"]) == []


@pytest.mark.parametrize(
    "name",
    ["SLURM_JOB_ID", "SBATCH_PARTITION", "RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SOUSBATCH_TASK", "PMIX_RANK"],
)
def test_nothing_of_a_job_that_the_shell_is_part_of_reaches_another(name: str) -> None:
    assert without_leaks({name: "7", "SLURM_CONF": "/etc/slurm.conf"}) == {"SLURM_CONF": "/etc/slurm.conf"}
    assert name not in handed_on({name: "7"}, [name])


def test_how_slurms_commands_reach_their_controller_belongs_to_them_alone() -> None:
    shell = dict.fromkeys(SLURM_CLIENT_NAMES, "x") | {"HOME": "/home/a"}
    assert slurm_client(shell) == dict.fromkeys(SLURM_CLIENT_NAMES, "x")
    assert handed_on(shell) == {"HOME": "/home/a"}
