"""What a message advises works when it is typed as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sousbatch.cluster.site import NodeKind, Partition, Site
from sousbatch.errors import PlanError, RecipeError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect

HERE = Site(
    name="this machine",
    launcher="local",
    cpus_per_node=4,
    memory_bytes=16 * 10**9,
    gpus_per_node=0,
    gpu_memory_bytes=0,
)
CLUSTER = Site(
    name="cluster",
    launcher="slurm",
    cpus_per_node=4,
    memory_bytes=16 * 10**9,
    gpus_per_node=2,
    gpu_memory_bytes=10**10,
    partitions=(
        Partition(
            name="main",
            is_default=True,
            nodes=(NodeKind(count=2, cpus=4, memory_mb=16000, gpus=2),),
            max_minutes=60,
        ),
    ),
)
GPU = "resources.default.device=gpu"
CASES: dict[str, tuple[Site, list[str]]] = {
    "no GPU": (HERE, [GPU]),
    "no GPU for one stage": (HERE, ["+resources.train={device: gpu}"]),
    "nodes": (CLUSTER, [GPU, "+resources.train={nodes: 3}", "train.global_batch=12"]),
    "GPUs": (CLUSTER, [GPU, "+resources.train={devices_per_node: 4}"]),
    "cores": (CLUSTER, ["resources.default={device: cpu, cpus_per_device: 9}"]),
    "memory": (CLUSTER, ["resources.default={device: cpu, memory_gb: 100}"]),
    "minutes": (CLUSTER, ["resources.default={device: cpu, time_min: 90}"]),
    "partition": (CLUSTER, ["resources.default={device: cpu, partition: mian}"]),
    "global batch": (HERE, ["+resources.train={devices_per_node: 2, device: cpu}", "train.global_batch=5"]),
    "flash attention": (HERE, ["model.attention=flash_attention_2"]),
    "float16": (HERE, ["train.precision=float16"]),
    "offload": (HERE, ["train.zero.offload=optimizer"]),
    "adafactor": (HERE, ["train.optimizer=adafactor", "train.zero.stage=1"]),
    "freeze and adapter": (HERE, ["adapter=lora", "model.freeze=['model.embed*']"]),
    "all frozen": (HERE, ["model.freeze=['*']"]),
    "no evaluation": (HERE, ["data.splits={train: train.jsonl, test: test.jsonl}"]),
    "nothing to predict": (HERE, ["data.splits={train: train.jsonl, validation: validation.jsonl}"]),
    "nothing to train": (HERE, ["data.splits={test: test.jsonl}", "train.eval_split=null"]),
    "long rows": (HERE, ["data.prompt='{input} a a a a'", "data.max_tokens=8"]),
    "long prompts": (HERE, ["predict.max_new_tokens=510", "data.prompt='{input} a a a'"]),
    "no tokens for a prompt": (HERE, ["predict.max_new_tokens=512"]),
    "best of none": (HERE, ["checkpoints.keep_best=0"]),
    "the old name": (HERE, ["+data.keep_long=true"]),
}
_OVERRIDE = re.compile(r"'[\w.]+=\{[^']*\}'|[+]?[a-z][\w.]*=[\w./\[\]-]+")


def _faults(site: Site, overrides: list[str]) -> list[str]:
    try:
        recipe = compose("./small.yaml", overrides)
        compile(recipe, site, inspect(recipe, Path("runs")))
    except PlanError as error:
        return list(error.reasons)
    except RecipeError as error:
        return [str(fault) for fault in error.faults]
    return []


def _advised(fault: str) -> list[list[str]]:
    """Return the choices of overrides that a message names after `set`: split at "or", joined otherwise."""
    advice = re.split(r"\bset ", fault, maxsplit=1)[1]
    choices = re.split(r",? or |, (?=[a-z]+[.])|; ", advice)
    return [found for choice in choices if (found := _OVERRIDE.findall(choice))]


@pytest.mark.parametrize(("site", "overrides"), [case for name, case in CASES.items() if name != "the old name"])
def test_advice_typed_as_it_stands_removes_the_fault(project: Path, site: Site, overrides: list[str]) -> None:
    faults = _faults(site, overrides)
    assert faults, "nothing was wrong"
    heads = {fault[:40] for fault in faults}
    for choice in _advised(faults[0]):
        if any("FILE" in text for text in choice):
            continue
        typed = shlex.split(" ".join(choice))
        changed = {text.split("=")[0] for text in typed}
        after = _faults(site, [*(text for text in overrides if text.split("=")[0] not in changed), *typed])
        assert faults[0] not in after and not any(fault.endswith("is not a key") for fault in after), (typed, after)
        assert {fault[:40] for fault in after} <= heads, (typed, after)


def test_a_key_of_an_earlier_version_names_the_new_one(project: Path) -> None:
    (fault,) = _faults(*CASES["the old name"])
    assert fault == "data.keep_long is now data.long_rows (refuse | drop | cut_left | cut_right)"
