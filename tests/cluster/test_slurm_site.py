"""What Slurm's commands say about a site; strings as sinfo and scontrol of 20.11 to 24.05 print them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sousbatch.cluster import slurm_site
from sousbatch.errors import SlurmError

CONFIG = """\
Configuration data as of 2026-11-22T11:07:41
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = big
DefMemPerNode           = UNLIMITED
MaxArraySize            = 501
SLURM_VERSION           = 23.02.7
"""
NODES = """\
gpu|up|8|64|512000|gpu:a100:4(S:0-1)
gpu|up|2|128+|1024000+|gpu:h100:8
cpu|up|40|48|192000|(null)
old|down|3|16|64000|(null)
empty|up|0|0|0|(null)
"""
PARTITIONS = """\
PartitionName=cpu Default=YES DefaultTime=01:00:00 MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP DefMemPerCPU=4000
PartitionName=gpu Default=NO DefaultTime=NONE MaxNodes=4 MaxTime=UNLIMITED State=UP DefMemPerNode=UNLIMITED
PartitionName=old Default=NO DefaultTime=NONE MaxNodes=1 MaxTime=30:00 State=DOWN
"""
ANSWERS = {
    "scontrol show config": CONFIG,
    "scontrol --oneliner show partition": PARTITIONS,
    "sinfo": NODES,
    "sacctmgr": "200\n\n50\n",
}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("(null)", (0, "")),
        ("", (0, "")),
        ("gpu:4", (4, "")),
        ("gpu:4(S:0-1)", (4, "")),
        ("gpu:a100:4", (4, "a100")),
        ("gpu:a100:4(S:0-1),nvme:1", (4, "a100")),
        ("gpu:a100_3g.20gb:2(S:0),gpu:a100:1(S:1)", (3, "a100_3g.20gb")),
        ("nvme:1,gpu:NVIDIA-H100-80GB-HBM3:8(S:0-7)", (8, "NVIDIA-H100-80GB-HBM3")),
        ("craynetwork:4", (0, "")),
    ],
)
def test_gpus_are_read_from_sinfo(text: str, expected: tuple[int, str]) -> None:
    assert slurm_site.parse_gpus(text) == expected


@pytest.mark.parametrize(
    "text, minutes",
    [
        ("infinite", None),
        ("UNLIMITED", None),
        ("NONE", None),
        ("n/a", None),
        ("", None),
        ("30:00", 30),
        ("04:00:00", 240),
        ("1-00:00:00", 1440),
        ("7-12:30:00", 7 * 1440 + 750),
        ("2-06", 2 * 1440 + 360),
        ("2-06:30", 2 * 1440 + 390),
        ("00:00:30", 1),
    ],
)
def test_times_are_read_in_minutes(text: str, minutes: int | None) -> None:
    assert slurm_site.parse_minutes(text) == minutes


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Slurm's answers by the beginning of a command line; those that are taken out are refused."""
    answers = dict(ANSWERS)

    def call(command: Sequence[str], *, patience_s: float = 0, answer: str | None = None) -> str:
        line = " ".join(command)
        for beginning, text in answers.items():
            if line.startswith(beginning):
                return text
        raise SlurmError(f"{command[0]}: refused")

    monkeypatch.setattr(slurm_site, "call", call)
    return answers


def test_a_site_has_the_partitions_that_take_jobs(asked: dict[str, str]) -> None:
    site = slurm_site.read_site()
    assert (site.name, site.launcher, site.max_array_size) == ("Slurm (big 23.02.7)", "slurm", 501)
    assert [one.name for one in site.partitions] == ["cpu", "gpu", "old"]
    cpu, gpu, _ = site.partitions
    assert (cpu.is_default, cpu.max_minutes, cpu.default_minutes, cpu.max_nodes) == (True, 2880, 60, None)
    assert (gpu.is_default, gpu.max_minutes, gpu.default_minutes, gpu.max_nodes) == (False, None, None, 4)
    assert [(kind.count, kind.cpus, kind.gpus, kind.gpu_type) for kind in gpu.nodes] == [
        (8, 64, 4, "a100"),
        (2, 128, 8, "h100"),
    ]
    assert (cpu.has_memory_default, gpu.has_memory_default) == (True, False)
    assert (site.cpus_per_node, site.gpus_per_node) == (48, 0), "the largest node of the default partition"


def test_the_smallest_submit_limit_counts(asked: dict[str, str]) -> None:
    assert slurm_site.read_site().max_jobs == 50


@pytest.mark.parametrize("storage", ["accounting_storage/none", "(null)"])  # up to 23.02, and since 23.11
def test_without_accounting_nobody_is_asked_for_limits(asked: dict[str, str], storage: str) -> None:
    asked["scontrol show config"] = CONFIG.replace("accounting_storage/slurmdbd", storage)
    del asked["sacctmgr"]
    site = slurm_site.read_site()
    assert (site.has_accounting, site.max_jobs) == (False, None)


def test_an_accounting_that_is_down_keeps_nobody_from_submitting(asked: dict[str, str]) -> None:
    del asked["sacctmgr"]
    site = slurm_site.read_site()
    assert (site.has_accounting, site.max_jobs) == (True, None)


def test_a_slurm_without_a_partition_is_no_site(asked: dict[str, str]) -> None:
    asked["sinfo"] = NODES.replace("|up|", "|inact|").replace("|down|", "|drain|")
    with pytest.raises(SlurmError, match="no partition that takes jobs"):
        slurm_site.read_site()


def test_a_partition_that_is_down_for_a_maintenance_queues_jobs(asked: dict[str, str]) -> None:
    asked["sinfo"] = NODES.replace("|up|", "|down|")
    assert [one.name for one in slurm_site.read_site().partitions] == ["cpu", "gpu", "old"]


def test_a_limit_of_zero_is_one_and_an_empty_field_is_none(asked: dict[str, str]) -> None:
    asked["sacctmgr"] = "0\n\n"
    assert slurm_site.read_site().max_jobs == 0


@pytest.mark.parametrize(
    "text, said",
    [
        ("up|3|allocated\nup|5|idle~\nup|1|mixed-\n", ""),
        ("up|4|idle\nup|3|draining\nup|1|down*\n", "4 of 8 nodes of partition gpu are down, drained or reserved"),
        ("down|8|idle\n", "8 of 8 nodes of partition gpu are down, drained or reserved"),
    ],
)
def test_nodes_that_take_no_job_now_are_counted(asked: dict[str, str], text: str, said: str) -> None:
    asked["sinfo"] = text
    assert slurm_site.nodes_away("gpu") == said
