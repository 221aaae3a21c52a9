"""Whether a stage fits its site: each misfit and doubt, and that what fits is not refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sousbatch.cluster.site import NodeKind, Partition, Site
from sousbatch.recipes.plan import Stage
from sousbatch.recipes.refusals import by_stage, doubts, misfits
from sousbatch.recipes.schema import Resources

SMALL = NodeKind(count=6, cpus=16, memory_mb=64_000)
A100 = NodeKind(count=4, cpus=64, memory_mb=512_000, gpus=4, gpu_type="a100")
BIG = NodeKind(count=1, cpus=8, memory_mb=2_000_000, gpus=1)
CLUSTER = Site(
    name="Slurm (big 23.02)",
    launcher="slurm",
    cpus_per_node=16,
    memory_bytes=64_000 << 20,
    gpus_per_node=0,
    gpu_memory_bytes=0,
    partitions=(
        Partition(name="cpu", is_default=True, nodes=(SMALL,), max_minutes=2880, default_minutes=60),
        Partition(name="gpu", is_default=False, nodes=(A100, BIG), max_minutes=1440, max_nodes=3),
    ),
)
HERE = Site(name="this machine", launcher="local", cpus_per_node=8, memory_bytes=1, gpus_per_node=2, gpu_memory_bytes=1)
CPU, GPU = Resources(device="cpu", partition="cpu"), Resources(partition="gpu", devices_per_node=4, cpus_per_device=16)


def stage(resources: Resources, kind: str = "train") -> Stage:
    return Stage(name=kind, kind=kind, of=None, resources=resources, num_tasks=1, after=())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "resources",
    [
        CPU,
        replace(CPU, partition=None),
        replace(CPU, nodes=6, devices_per_node=4, cpus_per_device=4, time_min=2880),
        GPU,
        replace(GPU, nodes=3, time_min=1440, memory_gb=500.0),
        replace(GPU, devices_per_node=1, cpus_per_device=8, memory_gb=2000.0),
    ],
)
def test_what_fits_is_not_refused(resources: Resources) -> None:
    assert list(misfits(stage(resources), CLUSTER)) == []


MISFITS = {
    "no such partition": (
        replace(GPU, partition="gqu"),
        "partition is 'gqu'; Slurm (big 23.02) has cpu, gpu (did you mean 'gpu'?); set <partition=gpu>",
    ),
    "too long": (replace(GPU, time_min=1441), "time_min is 1441 and partition 'gpu' allows 1440; set <time_min=1440>"),
    "too many nodes": (replace(CPU, nodes=7), "it wants 7 nodes and partition 'cpu' gives 6; set <nodes=6>"),
    "above MaxNodes": (replace(GPU, nodes=4), "it wants 4 nodes and partition 'gpu' gives 3; set <nodes=3>"),
    "no GPUs": (Resources(), "it wants 1 GPUs on a node and partition 'cpu' has 0; set <partition=gpu>"),
    "too many GPUs": (
        replace(GPU, devices_per_node=8),
        "it wants 8 GPUs on a node and partition 'gpu' has 4; set <devices_per_node=4>",
    ),
    "too many cores": (
        replace(GPU, cpus_per_device=17),
        "it wants 68 cores on a node and partition 'gpu' has 64; set <cpus_per_device=16>",
    ),
    "too much memory": (
        replace(CPU, memory_gb=68.0),
        "it wants 64849 MiB on a node and partition 'cpu' has 64000; set <memory_gb=67.1>",
    ),
    "GPUs here and memory there": (
        replace(GPU, memory_gb=2000.0),
        "it wants 1907348 MiB on a node and partition 'gpu' has 512000; set <memory_gb=536.87>",
    ),
    "too few of the large nodes": (
        replace(GPU, nodes=2, devices_per_node=1, cpus_per_device=1, memory_gb=2000.0),
        "it wants 2 such nodes and partition 'gpu' has 1; set <nodes=1>",
    ),
}


@pytest.mark.parametrize("resources, reason", MISFITS.values(), ids=MISFITS)
def test_what_the_partition_lacks_is_named(resources: Resources, reason: str) -> None:
    assert list(misfits(stage(resources), CLUSTER)) == [reason]


def test_several_reasons_come_at_once() -> None:
    assert len(list(misfits(stage(replace(GPU, time_min=9999, nodes=9, devices_per_node=8)), CLUSTER))) == 3


def test_a_site_without_a_default_partition_wants_one_named() -> None:
    site = replace(CLUSTER, partitions=(CLUSTER.partitions[1],))
    (reason,) = misfits(stage(replace(GPU, partition=None)), site)
    assert reason.startswith("partition is not given, and there is no default one; Slurm (big 23.02) has gpu")


@pytest.mark.parametrize("site", [CLUSTER, HERE])
def test_a_task_of_predict_has_one_node(site: Site) -> None:
    wanted = replace(GPU, devices_per_node=2, cpus_per_device=1)
    assert list(misfits(stage(wanted, "predict"), site)) == []
    reason, *_ = misfits(stage(replace(wanted, nodes=2), "predict"), site)
    assert "spread its rows with tasks" in reason


def test_a_stage_of_one_process_asks_for_no_devices_and_one_node() -> None:
    """Its resources may say more, since they are laid over the default of all stages."""
    assert list(misfits(stage(replace(CPU, device="gpu", nodes=50, devices_per_node=8), "merge"), CLUSTER)) == []


@pytest.mark.parametrize(
    "resources, gpus, reason",
    [
        (Resources(), 0, "it wants GPUs and this machine has none"),
        (Resources(nodes=2, devices_per_node=2), 2, "it wants 2 x 2 GPUs and this machine has 2 on a node"),
        (Resources(devices_per_node=2), 2, None),
        (Resources(device="cpu", nodes=5), 0, None),
        (Resources(partition="gpu"), 2, None),
    ],
)
def test_this_machine(resources: Resources, gpus: int, reason: str | None) -> None:
    found = list(misfits(stage(resources), replace(HERE, gpus_per_node=gpus)))
    assert (reason is None and not found) or (reason is not None and reason in found[0] and len(found) == 1)


def test_doubts() -> None:
    assert ["time_min is not given" in doubt for doubt in doubts(stage(CPU), CLUSTER)] == [True]
    assert list(doubts(stage(replace(CPU, time_min=10)), CLUSTER)) == []
    assert list(doubts(stage(CPU, "merge"), CLUSTER)) == []
    assert list(doubts(stage(CPU), HERE)) == []
    (doubt,) = doubts(stage(Resources(device="cpu", partition="gpu")), CLUSTER)
    assert doubt == "it computes on the CPU in partition 'gpu', whose nodes have GPUs"


def test_what_is_said_of_several_stages_is_said_once() -> None:
    stages = [stage(replace(CPU, partition="nowhere"), kind) for kind in ("train", "merge")]
    (said,) = by_stage(stages, misfits, CLUSTER)
    assert said.startswith("resources of train, merge: partition is 'nowhere'")
