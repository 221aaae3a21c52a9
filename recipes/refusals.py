"""Check a stage's resources against a site: this machine, or a Slurm partition.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..cluster.site import NodeKind, Partition, Site
from ..errors import nearest
from .generation import spans_devices
from .plan import Stage

# Cards older than Ampere, as Slurm's administrators call them.
_WITHOUT_BFLOAT16 = re.compile(
    r"(?i)(?<![a-z0-9])(k80|m60|p4|p40|p100|v100s?|t4|titan\w*|(gtx|rtx)?[ _-]?(10|20)[5678]0\w*)(?![a-z0-9])"
)
_ADVICE = re.compile(r"<(\w+=[^>]+)>")


def misfits(stage: Stage, site: Site) -> Iterator[str]:
    """Yield each reason why *site* cannot run *stage*, by keys of its resources."""
    wanted = stage.resources
    if stage.uses_devices and not stage.record.is_distributed and wanted.nodes * wanted.devices_per_node > 1:
        if not spans_devices(stage.settings):
            advice = "set <nodes=1> <devices_per_node=1>, and spread its rows with tasks"
            larger = "a model that is larger than a device needs predict.engine=transformers, zero3 or vllm"
            yield f"a task of {stage.kind} uses one device with this engine; {advice}; {larger}"
        elif wanted.nodes > 1:
            yield f"a task of {stage.kind} uses the devices of one node; set <nodes=1>, and spread its rows with tasks"
    if site.is_one_machine:
        yield from _misfits_here(stage, site)
        return
    partition = site.partition(wanted.partition)
    if partition is None:
        known = [one.name for one in site.partitions]
        hint = f" ({found})" if (found := nearest(wanted.partition or "", known)) else ""
        which = repr(wanted.partition) if wanted.partition else "not given, and there is no default one"
        names = ", ".join(known)
        first = next((name for name in known if repr(name) in hint), known[0] if known else "NAME")
        yield f"partition is {which}; {site.name} has {names}{hint}; set <partition={first}>"
        return
    yield from _misfits_on(stage, partition, site)


def _misfits_here(stage: Stage, site: Site) -> Iterator[str]:
    wanted = stage.resources
    if not stage.uses_devices or wanted.device != "gpu":
        return
    if site.gpus_per_node == 0:
        yield f"it wants GPUs and {site.name} has none; set <device=cpu> to run on the CPU"
    elif wanted.devices_per_node * wanted.nodes > site.gpus_per_node:
        yield (
            f"it wants {wanted.nodes} x {wanted.devices_per_node} GPUs and {site.name} has {site.gpus_per_node} "
            f"on a node; set <nodes=1> <devices_per_node={site.gpus_per_node}>"
        )


def _misfits_on(stage: Stage, partition: Partition, site: Site) -> Iterator[str]:
    """Compare with each kind of node; where all are too small, name the largest."""
    wanted, where = stage.resources, f"partition {partition.name!r}"
    nodes, ranks = (wanted.nodes, wanted.devices_per_node) if stage.uses_devices else (1, 1)
    if wanted.time_min is not None and partition.max_minutes is not None and wanted.time_min > partition.max_minutes:
        most_min = partition.max_minutes
        yield f"time_min is {wanted.time_min} and {where} allows {most_min}; set <time_min={most_min}>"
    if nodes > (most := min(sum(kind.count for kind in partition.nodes), partition.max_nodes or nodes)):
        yield f"it wants {nodes} nodes and {where} gives {most}; set <nodes={most}>"
    gpus = ranks if stage.uses_devices and wanted.device == "gpu" else 0
    # what is needed, what a node has of it, and the value that fits such a node
    needs: dict[str, tuple[int, Callable[[NodeKind], int], Callable[[int], str]]] = {
        "GPUs": (gpus, lambda kind: kind.gpus, lambda has: _gpus(has, gpus, site)),
        "cores": (ranks * wanted.cpus_per_device, lambda kind: kind.cpus, lambda has: _cores(has, ranks)),
        "MiB": (
            int((wanted.memory_gb or 0) * 1e9 / (1 << 20)),
            lambda kind: kind.memory_mb,
            lambda has: f"memory_gb={int(has * (1 << 20) / 1e7) / 100:g}",
        ),
    }
    fitting = partition.nodes
    for what, (need, has, fit) in needs.items():
        left = tuple(kind for kind in fitting if has(kind) >= need)
        if not left:
            most_of_one = max(map(has, fitting))
            yield f"it wants {need} {what} on a node and {where} has {most_of_one}; set <{fit(most_of_one)}>"
            return
        fitting = left
    count = sum(kind.count for kind in fitting)
    if count < nodes <= most:
        yield f"it wants {nodes} such nodes and {where} has {count}; set <nodes={count}>"


def _gpus(has: int, wanted: int, site: Site) -> str:
    if has:
        return f"devices_per_node={has}"
    others = (one.name for one in site.partitions if any(kind.gpus >= wanted for kind in one.nodes))
    return f"partition={name}" if (name := next(others, None)) else "device=cpu"


def _cores(has: int, ranks: int) -> str:
    return f"cpus_per_device={has // ranks}" if has >= ranks else f"devices_per_node={max(1, has)}"


def doubts(stage: Stage, site: Site) -> Iterator[str]:
    """Yield what will run, but perhaps not as meant."""
    wanted = stage.resources
    partition = site.partition(wanted.partition)
    if partition is None:
        return
    if wanted.time_min is None and partition.default_minutes is not None and stage.uses_devices:
        yield (
            f"time_min is not given: partition {partition.name!r} allows {partition.default_minutes} min, "
            "then it saves and goes back into the queue"
        )
    if wanted.device == "cpu" and stage.uses_devices and any(kind.gpus for kind in partition.nodes):
        yield f"it computes on the CPU in partition {partition.name!r}, whose nodes have GPUs"


def rank_memory(stage: Stage, site: Site) -> int:
    """Return the bytes of memory that one rank of *stage* has.

    They are 0 where they are unknown. On a CPU the ranks of a node share its memory; all simulated nodes of one
    machine are one node.
    """
    wanted = stage.resources
    if wanted.device == "cpu":
        sharers = wanted.devices_per_node * (wanted.nodes if site.is_one_machine else 1)
        return node_memory(stage, site) // sharers
    partition = site.partition(wanted.partition)
    if partition is None:
        return site.gpu_memory_bytes
    return min((kind.gpu_memory_bytes for kind in partition.nodes if kind.gpus >= wanted.devices_per_node), default=0)


def card_refusals(stage: Stage, site: Site) -> Iterator[str]:
    """Refuse bfloat16 where the partition tells that no card of it computes in it."""
    partition = site.partition(stage.resources.partition)
    if partition is None or stage.resources.device != "gpu" or stage.settings.train.precision != "bfloat16":
        return
    types = {kind.gpu_type for kind in partition.nodes if kind.gpus}
    if types and all(_WITHOUT_BFLOAT16.search(one) for one in types):
        yield (
            f"stage {stage.name!r}: train.precision bfloat16, and partition {partition.name!r} has "
            f"{', '.join(sorted(types))}, which cannot compute in it; set train.precision=float16"
        )


def node_memory(stage: Stage, site: Site) -> int:
    """Return the bytes of host memory that *stage* may use on a node."""
    partition = site.partition(stage.resources.partition)
    if partition is None:
        return site.memory_bytes
    if stage.resources.memory_gb is not None:
        return int(stage.resources.memory_gb * 1e9)
    return max(kind.memory_mb << 20 for kind in partition.nodes)


def by_stage(stages: Sequence[Stage], ask: Callable[[Stage, Site], Iterator[str]], site: Site) -> Iterator[str]:
    """Yield what *ask* says of the stages, each text once with its stages.

    An advice in angle brackets, such as <device=cpu>, becomes the overrides that do it for these stages.
    """
    said: dict[str, list[str]] = {}
    for stage in stages:
        for text in ask(stage, site):
            said.setdefault(text, []).append(stage.name)
    for text, names in said.items():
        yield f"resources of {', '.join(names)}: {_ADVICE.sub(partial(_overrides, names), text)}"


def _overrides(names: Sequence[str], advice: re.Match[str]) -> str:
    return " ".join(f"resources.{name}.{advice[1]}" for name in names)
