"""`plan --fit` and site files: what is proposed fits, compiles and is what its overrides give."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from sousbatch.cluster.site import NodeKind, Partition, Site
from sousbatch.errors import PlanError, UsageError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import DiskSpace, Inputs, TensorFacts
from sousbatch.recipes.fit import Proposal, propose
from sousbatch.recipes.inspect import model
from sousbatch.recipes.schema import Adapter, Recipe, Resources, Train
from sousbatch.recipes.site_file import read_site_file, with_gpu_memory

# The shapes of SOLAR-10.7B: 48 layers of 4,096.
_LAYER = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096)} | {
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
_SHAPES = {f"model.layers.{n}.{name}.weight": shape for n in range(48) for name, shape in _LAYER.items()} | {
    "model.embed_tokens.weight": (32000, 4096),
    "lm_head.weight": (32000, 4096),
}
_CONFIG = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 48, "num_attention_heads": 32}


def _solar(small: ModuleType, method: str = "full") -> tuple[Recipe, Inputs]:
    recipe = replace(
        small.RECIPE,
        adapter=Adapter(method=method),
        train=Train(global_batch=32),
        data=replace(small.RECIPE.data, max_tokens=1024),
        resources={"default": Resources()},
    )
    tensors = tuple(TensorFacts(name=name, shape=shape, dtype="bfloat16") for name, shape in _SHAPES.items())
    model = replace(
        small.MODEL,
        tensors=tensors,
        num_params=sum(math.prod(shape) for shape in _SHAPES.values()),
        config=_CONFIG | {"vocab_size": 32000, "dtype": "bfloat16", "max_position_embeddings": 4096},
    )
    return recipe, replace(small.INPUTS, model=model)


@functools.cache
def _fitting(small: ModuleType, site: str) -> list[Proposal]:
    found, space = read_site_file(site)
    variants = {}
    for method in ("full", "lora", "qlora"):
        recipe, inputs = _solar(small, method)
        variants[method] = (recipe, replace(inputs, disk_space=space))
    return propose(variants, found)


@pytest.mark.parametrize("site", ["rtx3090-100gb", "a100x4-40gb"])
def test_what_is_proposed_fits_and_is_not_warned_of(small: ModuleType, site: str) -> None:
    found = _fitting(small, site)
    assert found and [one.cost for one in found] == sorted(one.cost for one in found)
    for one in found:
        assert 0 < one.memory_bytes <= one.memory_there and one.host_bytes <= one.host_there
        again = compile(one.plan.recipe, one.plan.site, one.plan.inputs)
        assert again == one.plan and not any(
            "will want" in warning or "offload" in warning for warning in again.warnings
        )


def test_full_training_is_proposed_where_its_states_fit_and_adapters_elsewhere(small: ModuleType) -> None:
    methods = {
        site: {one.plan.recipe.adapter.method for one in _fitting(small, site)}
        for site in ("rtx3090-100gb", "a100x4-40gb")
    }
    assert methods == {"rtx3090-100gb": {"lora", "qlora"}, "a100x4-40gb": {"full", "lora", "qlora"}}
    full = next(one for one in _fitting(small, "a100x4-40gb") if one.plan.recipe.adapter.method == "full")
    assert full.plan.recipe.train.zero.stage >= 2 and full.plan.recipe.train.zero.offload != "none"


def test_all_gpus_of_a_node_are_used_where_the_recipe_asks_for_one(small: ModuleType) -> None:
    for one in _fitting(small, "a100x4-40gb"):
        assert "resources.train.devices_per_node=4" in one.overrides
        assert one.plan.stage("train").batch.world_size == 4


def test_as_many_gpus_are_used_as_share_the_global_batch(small: ModuleType) -> None:
    site, space = read_site_file("a100x4-40gb")
    recipe, inputs = _solar(small, "lora")
    three = replace(site, gpus_per_node=3)
    for one in propose({"lora": (recipe, replace(inputs, disk_space=space))}, three):
        assert one.plan.stage("train").batch.world_size == 2  # 32 rows are not for 3
    odd = replace(recipe, resources={"default": Resources(devices_per_node=2)}, train=Train(global_batch=7))
    with pytest.raises(PlanError, match="global_batch 7 is not divided by 2 ranks"):
        propose({"lora": (odd, replace(inputs, disk_space=space))}, three)


def test_where_nothing_fits_the_nearest_is_named(small: ModuleType) -> None:
    site, space = read_site_file("rtx3090-100gb")
    recipe, inputs = _solar(small)
    recipe = replace(recipe, predict=replace(recipe.predict, load_in="4bit"))  # so that predictions fit
    with pytest.raises(PlanError, match=r"nothing fits: the least needs .* GB a rank where there are 8 GB"):
        propose({"full": (recipe, replace(inputs, disk_space=space))}, replace(site, gpu_memory_bytes=8 * 10**9))


def test_the_memory_of_a_cluster_s_gpus_comes_from_the_user_s_own_file(small: ModuleType, tmp_path: Path) -> None:
    node = NodeKind(count=2, cpus=64, memory_mb=500_000, gpus=4, gpu_type="a100")
    partitions = (Partition(name="gpu", is_default=True, nodes=(node,)),)
    cluster = Site(
        name="cluster",
        launcher="slurm",
        cpus_per_node=64,
        memory_bytes=500 * 10**9,
        gpus_per_node=4,
        gpu_memory_bytes=0,
        partitions=partitions,
    )
    recipe, inputs = _solar(small, "qlora")
    inputs = replace(inputs, disk_space=DiskSpace(folder="/runs", free_bytes=10**12, free_inodes=10**9))
    with pytest.raises(PlanError, match="the memory of a GPU of cluster is unknown; write it"):
        propose({"qlora": (recipe, inputs)}, cluster)
    (tmp_path / "config.yaml").write_text("gpu_memory_gb: {a100: 80}\n")
    assert propose({"qlora": (recipe, inputs)}, with_gpu_memory(cluster))[0].memory_there == 80 * 10**9
    (tmp_path / "config.yaml").write_text("gpu_memory_gb: {a100: many}\n")
    with pytest.raises(UsageError, match="write GB by type of GPU or by partition"):
        with_gpu_memory(cluster)


@pytest.mark.parametrize(
    ("text", "said"),
    {
        "unknown key": ("gpu_memory: 40\n", "gpu_memory_gb"),
        "wrong type": ("gpus_per_node: four\n", "a whole number is expected"),
        "no mapping": ("- 1\n", "a section of keys is expected"),
        "no YAML": ("a: [\n", "cannot be read"),
    }.values(),
)
def test_a_wrong_site_file_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        read_site_file(str(tmp_path / "mine.yaml"))


def test_an_unknown_site_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"known: a100x4-40gb, cpu, h100, rtx3090-100gb, slurm-8gpu .*'h100'"):
        read_site_file("h10")


def test_a_submission_takes_the_run_that_the_settings_of_a_proposal_give(
    sousbatch, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))  # where nobody knows the model yet
    looks: list[int] = []
    look = model._run_architecture
    monkeypatch.setattr(
        model, "_run_architecture", lambda question: looks.append(len(question["trainings"])) or look(question)
    )
    code, out, _ = sousbatch("plan", "small.yaml", "--fit", "--launcher", "local")
    assert code == 0 and "relative" not in out
    assert looks == [3], "one process, which takes seconds to start, looks at all methods"
    first = next(line for line in out.splitlines() if line.startswith("1  "))
    settings = [word for word in first.split() if "=" in word]
    assert settings
    by_hand = sousbatch("plan", "small.yaml", *settings, "--launcher", "local")[1].split("run ")[1][:12]
    code, _, err = sousbatch("submit", "small.yaml", "--fit", "9", "--launcher", "local")
    assert code == 2 and "proposals" in err
    from argparse import Namespace

    from sousbatch.cli.plan import make_plan

    arguments = Namespace(recipe="small.yaml", overrides=[], launcher="local", runs=None, fit=1)
    assert make_plan(arguments).run_id == by_hand


def test_a_site_that_is_elsewhere_is_planned_for_by_name(sousbatch, project: Path) -> None:
    code, out, _ = sousbatch("plan", "small.yaml", "resources.default.device=gpu", "--site", "h100")
    assert code == 0 and "small on h100" in out and "disk_gb" in out
    code, _, err = sousbatch("plan", "small.yaml", "--site", "cpu", "resources.default.device=gpu")
    assert code == 2 and "cpu has none" in err


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "nothing trains": (["plan", "--fit", "stages={predict: {}, merge: {}}"], "no stage of the recipe trains"),
        "a script for elsewhere": (["plan", "--site", "cpu", "--script"], "give one of them"),
        "many runs": (["submit", "--fit", "1", "--sweep", "seed=1,2"], "write the settings as overrides"),
    }.values(),
)
def test_what_cannot_be_fitted_is_one_clear_line(sousbatch, project: Path, words: list[str], said: str) -> None:
    code, _, err = sousbatch(words[0], "small.yaml", *words[1:])
    assert code == 2 and said in err and err.count("\n") == 1


def test_the_plan_for_a_site_elsewhere_is_json_where_asked_for(sousbatch, project: Path) -> None:
    code, out, _ = sousbatch("plan", "small.yaml", "--site", "cpu", "--json")
    assert code == 0 and json.loads(out)["site"]["name"] == "cpu"
