"""Compiling is pure: golden plans and scripts as text, the same bytes anywhere, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sousbatch
from sousbatch.cluster.site import NodeKind, Partition
from sousbatch.errors import PlanError
from sousbatch.recipes import generation
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import Inputs, Prepared, StepCount, TrainedFacts
from sousbatch.recipes.forecast.parameters import training_key
from sousbatch.recipes.plan import Plan, read_plan
from sousbatch.recipes.schema import Recipe, Resources, StageSpec
from sousbatch.recipes.stages import stages_of

GOLDEN = Path(__file__).parent / "golden"


def _changed(value: Any, changes: dict[str, Any]) -> Any:
    """Return a dataclass with dotted keys replaced."""
    for key, change in changes.items():
        first, _, rest = key.partition(".")
        inner = _changed(getattr(value, first), {rest: change}) if rest else change
        value = replace(value, **{first: inner})
    return value


def _on_gpus(recipe: Recipe, **train: int) -> Recipe:
    default = replace(recipe.resources["default"], device="gpu")
    return replace(recipe, resources={"default": default, "train": replace(default, **train)})


def _assert_golden(name: str, text: str) -> None:
    """Compare with the stored text; `UPDATE_GOLDEN=1 pytest` writes it again, to be read in the diff."""
    if os.environ.get("UPDATE_GOLDEN"):
        (GOLDEN / name).write_text(text.replace(sousbatch.__version__, "@VERSION@"))
    assert text == (GOLDEN / name).read_text().replace("@VERSION@", sousbatch.__version__)


def test_the_plan_is_the_golden_one(small: ModuleType) -> None:
    _assert_golden("small.plan.json", small.plan().to_json())


def test_the_scripts_are_the_golden_ones(small: ModuleType) -> None:
    _assert_golden("small.scripts.sh", small.scripts())


def test_another_process_makes_the_same_bytes(small: ModuleType) -> None:
    script = Path(__file__).with_name("small_plan.py")
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == small.plan().to_json() + small.scripts()


def test_a_plan_that_was_written_reads_back_as_it_was(small: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(small.plan().to_json())
    assert read_plan(tmp_path / "plan.json") == small.plan()


def test_a_plan_is_read_without_the_packages_that_its_names_come_from(small: ModuleType, tmp_path: Path) -> None:
    text = small.plan().to_json().replace('"exact_match"', '"of_a_package"').replace('"wandb"', '"of_a_package"')
    (tmp_path / "plan.json").write_text(text)
    plan = read_plan(tmp_path / "plan.json")
    assert "of_a_package" in plan.recipe.score.metrics and plan.recipe.tracking.trackers == ("of_a_package",)


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"resources": {}}, True),
        ({"tracking.project": "other"}, True),
        ({"description": "in other words"}, True),
        ({"seed": 1}, False),
        ({"train.learning_rate": 1.0}, False),
        ({"predict.max_new_tokens": 17}, False),
    ],
    ids=str,
)
def test_the_run_id_changes_only_with_what_decides_results(
    small: ModuleType, changes: dict[str, Any], is_same: bool
) -> None:
    plan = small.plan()
    assert (replace(plan, recipe=_changed(plan.recipe, changes)).run_id == plan.run_id) is is_same


def test_the_run_id_changes_with_the_data(small: ModuleType) -> None:
    plan = small.plan()
    splits = plan.inputs.splits | {"train": replace(plan.inputs.splits["train"], digest="other")}
    assert replace(plan, inputs=replace(plan.inputs, splits=splits)).run_id != plan.run_id


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, {"steps": 26, "accumulation": 2, "warmup_steps": 3, "save_every_steps": 10}),
        ({"train.epochs": 0.5}, {"steps": 7, "warmup_steps": 1, "save_every_steps": 7}),
        ({"train.steps": 5}, {"steps": 5, "save_every_steps": 5}),
        ({"train.global_batch": 100, "train.micro_batch": 50}, {"steps": 2, "accumulation": 1}),
        ({"train.steps": 1000, "checkpoints.every_steps": None}, {"save_every_steps": 100}),
        ({"checkpoints.every_steps": None, "checkpoints.every_epochs": 1}, {"steps": 26, "save_every_steps": 13}),
        ({"checkpoints.every_steps": 7, "checkpoints.every_epochs": 1}, {"save_every_steps": 7}),
        ({"train.schedule.warmup_steps": 5}, {"warmup_steps": 5}),
        ({"train.schedule.warmup_steps": 0}, {"warmup_steps": 0}),
        ({"train.steps": 3, "checkpoints.every_steps": None}, {"save_every_steps": 1}),
    ],
    ids=str,
)
def test_steps_follow_from_rows_and_batch(small: ModuleType, changes: dict[str, Any], batch: dict[str, int]) -> None:
    found = compile(_changed(small.RECIPE, changes), small.SITE, small.INPUTS).stage("train").batch
    assert {name: getattr(found, name) for name in batch} == batch


@pytest.mark.parametrize(
    ("launcher", "changes", "num_tasks"),
    [
        ("slurm", {}, 1),
        ("slurm", {"consolidate.max_shard_gb": 1e-7}, 1),  # many files, but small ones
        ("slurm 70B", {}, 4),
        ("slurm 70B", {"resources": {"default": Resources(device="cpu", tasks=9)}}, 9),
        ("slurm 70B", {"resources": {"default": Resources(device="cpu", tasks=99)}}, 29),  # 141 GB in files of 5
        ("slurm 70B", {"consolidate.overflow": "bfloat16"}, 1),
        ("local 70B", {}, 1),
        ("local 70B", {"resources": {"default": Resources(device="cpu", tasks=2)}}, 2),
    ],
    ids=str,
)
def test_a_large_model_is_consolidated_by_several_tasks_on_slurm(
    small: ModuleType, launcher: str, changes: dict[str, Any], num_tasks: int
) -> None:
    where, _, size = launcher.partition(" ")
    nodes = (NodeKind(count=2, cpus=8, memory_mb=500_000),)
    cluster = replace(
        small.SITE,
        launcher="slurm",
        partitions=(Partition(name="all", is_default=True, nodes=nodes, max_minutes=None),),
    )
    model = small.MODEL
    if size:
        layer = replace(model.tensors[0], name="model.layers.0.mlp.up_proj.weight", shape=(70_553_706, 1000))
        model = replace(model, num_params=70_553_706_000, tensors=(*model.tensors, layer))
    inputs = replace(small.INPUTS, model=model, disk_space=replace(small.INPUTS.disk_space, free_bytes=10**14))
    plan = compile(_changed(small.RECIPE, changes), cluster if where == "slurm" else small.SITE, inputs)
    assert plan.stage("consolidate").num_tasks == num_tasks
    assert all(plan.stage(name).num_tasks == 1 for name in ("train", "merge", "score"))


def test_accumulation_makes_up_the_global_batch(small: ModuleType) -> None:
    for micro_batch in (1, 2, 4):
        recipe = _changed(small.RECIPE, {"train.micro_batch": micro_batch})
        batch = compile(recipe, small.SITE, small.INPUTS).stage("train").batch
        assert batch is not None and batch.global_batch == 8


def _stages(small: ModuleType, inputs: Inputs | None = None, **stages: StageSpec) -> Plan:
    return compile(replace(small.RECIPE, stages=stages), small.SITE, inputs or small.INPUTS)


def test_stages_are_chained_and_merge_runs_however_predict_ends(small: ModuleType) -> None:
    after = {stage.name: [(item.stage, item.condition) for item in stage.after] for stage in small.plan().stages}
    assert after == {
        "train": [],
        "consolidate": [("train", "ok")],
        "predict": [("consolidate", "ok")],
        "merge": [("predict", "any")],
        "score": [("merge", "ok")],
    }


def test_a_recipe_may_stop_at_the_model(small: ModuleType) -> None:
    plan = _stages(small, train=StageSpec(), consolidate=StageSpec())
    assert [stage.name for stage in plan.stages] == ["train", "consolidate"]


def test_a_model_with_weights_predicts_untrained(small: ModuleType) -> None:
    plan = _stages(small, predict=StageSpec(), merge=StageSpec(), score=StageSpec())
    assert [(stage.name, stage.of) for stage in plan.stages] == [
        ("predict", None),
        ("merge", "predict"),
        ("score", "merge"),
    ]


def test_a_train_stage_starts_from_another_when_it_says_so(small: ModuleType) -> None:
    more = StageSpec(kind="train", of="consolidate", set={"train": {"steps": 7}})
    plan = _stages(small, train=StageSpec(), consolidate=StageSpec(), more=more)
    assert plan.stage("more").of == "consolidate"
    assert plan.stage("more").batch.steps == 7  # type: ignore[union-attr]
    assert plan.stage("train").batch.steps == 26  # type: ignore[union-attr]


def test_each_stage_knows_whose_checkpoints_and_rows_it_works_on(small: ModuleType) -> None:
    found = {stage.name: (stage.train_stage, stage.predict_stage) for stage in small.plan().stages}
    assert found == {
        "train": ("train", None),
        "consolidate": ("train", None),
        "predict": ("train", "predict"),
        "merge": ("train", "predict"),
        "score": ("train", "predict"),
    }


REFUSALS = {
    "global batch": (
        {"train.global_batch": 9},
        "not divided by 2 ranks x train.micro_batch 2; set train.global_batch=8 or train.global_batch=12",
    ),
    "global batch below one step": ({"train.global_batch": 2}, "set train.global_batch=4"),
    "fp16 on a CPU": (
        {"train.precision": "float16"},
        "float16 does not train on a CPU; set train.precision=bfloat16 or",
    ),
    "flash attention on a CPU": ({"model.attention": "flash_attention_2"}, "needs a GPU; set model.attention=sdpa"),
    "offload on a CPU": ({"train.zero.offload": "optimizer"}, "offload has no meaning on a CPU"),
    "offload without ZeRO": (
        {"train.zero.stage": 0, "train.zero.offload": "optimizer"},
        "set train.zero.stage=1 (to 3) or",
    ),
    "parameter offload below 3": (
        {"train.zero.stage": 2, "train.zero.offload": "both"},
        "only train.zero.stage=3 shards",
    ),
    "adafactor under ZeRO": ({"train.optimizer": "adafactor"}, "set train.optimizer=adamw or train.zero.stage=0"),
    "adapter and freeze": (
        {"adapter.method": "lora", "model.freeze": ("lm_head.*",)},
        "set model.freeze=[] or adapter=full",
    ),
    "budget": ({"checkpoints.budget_gb": 1e-6}, "not even the weights of stage 'train'"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_work_is_refused(small: ModuleType, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=".*") as caught:
        compile(_changed(small.RECIPE, changes), small.SITE, small.INPUTS)
    assert reason in str(caught.value)


def test_a_quantised_mixture_of_experts_is_refused_under_zero_3(small: ModuleType) -> None:
    recipe = _changed(_on_gpus(small.RECIPE), {"adapter.method": "qlora"})
    inputs = _changed(small.INPUTS, {"model.config": small.CONFIG | {"num_local_experts": 8}})
    with pytest.raises(PlanError, match="mixture of 8 experts.*set train.zero.stage=2, or adapter=lora"):
        compile(recipe, small.GPU_SITE, inputs)


def test_lengths_of_four_bit_layers_under_zero3_are_refused_with_what_to_set(small: ModuleType) -> None:
    changes = {"adapter.method": "qlora", "adapter.dora": True, "train.zero.stage": 3}
    with pytest.raises(PlanError, match="adapter.dora over 4-bit weights fails.*set train.zero.stage=2"):
        compile(_changed(_on_gpus(small.RECIPE), changes), small.SITE, small.INPUTS)


def test_gpus_are_refused_where_there_are_none(small: ModuleType) -> None:
    with pytest.raises(PlanError) as caught:
        compile(_on_gpus(small.RECIPE), small.SITE, small.INPUTS)
    assert caught.value.reasons == (
        "resources of train, predict: it wants GPUs and this machine has none; set resources.train.device=cpu "
        "resources.predict.device=cpu to run on the CPU",
    )


def test_more_gpus_than_there_are_is_refused(small: ModuleType) -> None:
    with pytest.raises(PlanError, match="wants 2 x 4 GPUs and this machine has 4 on a node"):
        compile(_on_gpus(small.RECIPE, nodes=2, devices_per_node=4), small.GPU_SITE, small.INPUTS)


def test_a_predict_task_has_one_device_unless_its_engine_spreads_a_model(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = small.RECIPE.resources | {"predict": replace(small.RECIPE.resources["default"], devices_per_node=2)}
    recipe = replace(small.RECIPE, resources=resources)
    predict = compile(recipe, small.SITE, small.INPUTS).stage("predict")
    assert (predict.ranks_per_node, predict.cpus_per_rank) == (1, 2)
    monkeypatch.setattr(generation.ENGINES, "load", lambda name: replace(generation.TRANSFORMERS, spans_devices=False))
    with pytest.raises(PlanError, match="resources of predict: .* spread its rows with tasks"):
        compile(recipe, small.SITE, small.INPUTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"predict.num_beams": 3},
        {"predict.decodings": {"greedy": {}, "beams": {"num_beams": 3}}},
        {"predict.num_beams": 3, "checkpoints.metric": "exact_match", "stages": {"train": StageSpec()}},
    ],
)
def test_beams_are_refused_where_a_model_mixes_their_states(small: ModuleType, changes: dict[str, Any]) -> None:
    recipe = _changed(small.RECIPE, changes)
    assert compile(recipe, small.SITE, small.INPUTS)
    inputs = _changed(small.INPUTS, {"model.config": {**small.CONFIG, "model_type": "recurrent_gemma"}})
    with pytest.raises(PlanError, match="predict.num_beams is 3, and .* a recurrent_gemma remembers; set predict.num"):
        compile(recipe, small.SITE, inputs)


HALF = {"train.precision": "bfloat16", "train.zero.stage": 0}
FAILING = {
    "float16 masks": ({"model_type": "deberta"}, HALF, "train.precision bfloat16 fails on a deberta .*=float32"),
    "no FFT": (
        {"model_type": "fnet"},
        HALF | {"train.master_weights": False},
        "bfloat16 fails on a fnet, with train.master_weights=false .*=float32",
    ),
    "loaded masks": (
        {"model_type": "deberta"},
        HALF | {"train.master_weights": False},
        "bfloat16 fails on a deberta, with train.master_weights=false .*=float32",
    ),
    "its adapters": ({"model_type": "xmod"}, HALF, "train.precision bfloat16 fails on a xmod .*=float32"),
    "its router": (
        {"model_type": "inkling2_text"},
        {"train.precision": "bfloat16", "train.zero.stage": 2},
        "train.precision bfloat16 fails on a inkling2_text, with train.zero .*=float32",
    ),
    "its dtype": ({"model_type": "xlnet"}, {"predict.dtype": "bfloat16"}, "predict.dtype bfloat16 fails on a xlnet"),
    "its weights": (
        {"model_type": "deberta"},
        {"predict.dtype": "float16"},
        "predict.dtype float16 fails on a deberta",
    ),
    "cut positions": ({"model_type": "pegasus"}, {"train.zero.stage": 3}, "stage 3 fails on a pegasus .*stage=2"),
    "engine": ({"model_type": "rwkv"}, {"predict.engine": "zero3"}, "zero3 fails on a rwkv .*engine=transformers"),
    "LayerDrop": (
        {"encoder_layerdrop": 0.05, "decoder_layerdrop": 0.1},
        {"train.zero.stage": 1},
        "leaves out others; set model.config.encoder_layerdrop=0 model.config.decoder_layerdrop=0, or",
    ),
    "experts": (
        {"tensor": "model.layers.0.mlp.experts.expert_1.wi.weight"},
        {"train.zero.stage": 2},
        "experts are modules of their own, .*; set train.zero.stage=3, or train.zero.stage=0",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_what_an_architecture_fails_at_is_refused(small: ModuleType, name: str) -> None:
    config, changes, words = FAILING[name]
    recipe = replace(small.RECIPE, stages={"train": StageSpec(), "consolidate": StageSpec(), "predict": StageSpec()})
    inputs = _changed(small.INPUTS, {"model.config": {**small.CONFIG, **config}})
    if "tensor" in config:
        first, *others = small.MODEL.tensors
        inputs = _changed(inputs, {"model.tensors": (replace(first, name=config["tensor"]), *others)})
    assert compile(_changed(recipe, changes), small.SITE, small.INPUTS)
    with pytest.raises(PlanError, match=words):
        compile(_changed(recipe, changes), small.SITE, inputs)


def test_predicting_needs_a_model(small: ModuleType) -> None:
    with pytest.raises(PlanError, match="stage 'predict' has no model"):
        _stages(small, _changed(small.INPUTS, {"model.has_weights": False}), predict=StageSpec())


def test_an_adapter_needs_trained_weights(small: ModuleType) -> None:
    with pytest.raises(PlanError, match="starts from random ones"):
        compile(
            _changed(small.RECIPE, {"adapter.method": "lora"}),
            small.SITE,
            _changed(small.INPUTS, {"model.has_weights": False}),
        )


def test_a_full_disk_is_refused_with_the_largest_part_named(small: ModuleType) -> None:
    inputs = _changed(small.INPUTS, {"disk_space.free_bytes": 1000})
    with pytest.raises(PlanError, match="not enough space: .* the largest part is logs, ledger, tracking"):
        compile(small.RECIPE, small.SITE, inputs)
    predict = replace(small.RECIPE, stages={"predict": StageSpec()})
    with pytest.raises(
        PlanError, match="not enough space: the run will hold .* the largest part is logs, ledger, tracking"
    ):
        compile(predict, small.SITE, inputs)


def test_new_tokens_that_no_table_learns_and_augmenting_to_nothing_are_said(small: ModuleType) -> None:
    step, rows = StepCount(name="augment mine:vary"), small.INPUTS.splits["train"]
    made = Prepared(stage="train", use="train", split="train", num_source_rows=100, rows=rows, steps=(step,))
    inputs = replace(small.INPUTS, prepared=(made,))
    tokens = {"model.add_tokens": ("<x>",), "model.freeze": ("*embed*",)}
    said = compile(_changed(small.RECIPE, tokens), small.SITE, inputs).warnings
    assert said == ("stage 'train': augment by mine:vary made no row of split 'train'",)
    both = tokens | {"model.freeze": ("*embed*", "lm_head.*")}
    assert (
        "so that the rows of the 1 new tokens stay"
        in compile(_changed(small.RECIPE, both), small.SITE, small.INPUTS).warnings[0]
    )


def test_all_reasons_come_at_once_and_each_once(small: ModuleType) -> None:
    changes = {"train.global_batch": 9, "train.precision": "float16", "model.attention": "flash_attention_2"}
    with pytest.raises(PlanError) as caught:
        compile(_changed(small.RECIPE, changes), small.SITE, small.INPUTS)
    assert len(caught.value.reasons) == 3


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"predict.temperature": 0.2}, "predict.temperature does nothing without predict.sample=true"),
        (
            {"task": "classification", "predict.num_beams": 2, "model.config": {}, "score.metrics": ("accuracy",)},
            "generates no text, so predict.max_new_tokens and predict.num_beams do nothing",
        ),
        ({"data.prompt": "input =>"}, "data.prompt 'input =>' reads no column, so that every row has the same prompt"),
        ({"data.prompt": r"{input}\nshort:"}, "data.prompt has a backslash and an n, and no new line"),
        ({"predict.stop": [r"\n"]}, "predict.stop has a backslash and an n"),
        ({"train.micro_batch": 4, "data.max_tokens": 10**9}, "`sousbatch plan --fit` finds settings"),
    ],
    ids=str,
)
def test_what_may_be_meant_is_only_warned_of(small: ModuleType, changes: dict[str, Any], warning: str) -> None:
    inputs = _changed(small.INPUTS, {"model.config": small.CONFIG | {"max_position_embeddings": 64}})
    plan = compile(_changed(small.RECIPE, changes), small.SITE, inputs)
    assert any(warning in text for text in plan.warnings)


@pytest.mark.parametrize("kind", ["t5", "mobilebert"])
def test_float16_is_warned_of_where_a_model_exceeds_it(small: ModuleType, kind: str) -> None:
    inputs = _changed(small.INPUTS, {"model.config": {**small.CONFIG, "model_type": kind}})
    recipe = _changed(small.RECIPE, {"consolidate.dtype": None})
    assert compile(recipe, small.SITE, inputs).stage("consolidate").settings.consolidate.dtype == "bfloat16"
    plan = compile(_changed(recipe, {"consolidate.dtype": "float16"}), small.SITE, inputs)
    assert any(f"consolidate.dtype=float16 for a {kind} model" in text for text in plan.warnings)


def test_ranks_that_share_cores_are_warned_of(small: ModuleType) -> None:
    plan = compile(small.RECIPE, replace(small.SITE, cpus_per_node=1), small.INPUTS)
    assert any("asks for 2 cores and this machine has 1" in text for text in plan.warnings)


def test_what_only_slurm_keeps_is_warned_of_and_memory_is_not(small: ModuleType) -> None:
    """Runs of one machine share its memory by `memory_gb`."""
    asked = {name: replace(one, memory_gb=400.0, qos="high") for name, one in small.RECIPE.resources.items()}
    (warning,) = compile(replace(small.RECIPE, resources=asked), small.SITE, small.INPUTS).warnings
    assert warning == "resources qos: only Slurm keeps these; they do nothing on this machine"


@pytest.mark.parametrize(("of", "is_warned"), [(None, True), ("base", False)])
def test_a_training_below_a_model_that_no_stage_takes_is_warned_of(
    small: ModuleType, of: str | None, is_warned: bool
) -> None:
    first = {"pretrain": StageSpec(kind="train"), "base": StageSpec(kind="consolidate")}
    stages = {**first, **stages_of(small.RECIPE), "train": StageSpec(of=of)}
    warnings = compile(replace(small.RECIPE, stages=stages), small.SITE, small.INPUTS).warnings
    assert any("set stages.train.of=base" in text for text in warnings) is is_warned


def test_the_plan_of_the_small_recipe_has_no_warning(small: ModuleType) -> None:
    assert small.plan().warnings == ()


def test_an_adapter_that_peft_must_merge_needs_the_models_memory_and_space(small: ModuleType) -> None:
    recipe = _changed(small.RECIPE, {"adapter.method": "lora"})
    facts = TrainedFacts(trainable=90, frozen=904, quantisable=0, num_tensors=4, merges_in_memory=True)
    inputs = _changed(small.INPUTS, {"model.trained": {training_key(recipe): facts}})
    line = next(line for line in compile(recipe, small.SITE, inputs).forecast.storage if "merging" in line.what)
    assert (line.what, line.num_bytes) == ("merging of consolidate", 4 * 904)
    site = replace(small.SITE, memory_bytes=4 * 904 - 1)
    with pytest.raises(PlanError, match="stage 'consolidate': this adapter can be merged in memory only"):
        compile(recipe, site, inputs)


@pytest.mark.parametrize(
    ("recomputes", "left"), [(True, ("micro_batch", "gradient_checkpointing")), (False, ("micro_batch",))]
)
def test_what_the_model_cannot_give_up_is_no_fallback(small: ModuleType, recomputes: bool, left: Any) -> None:
    facts = TrainedFacts(trainable=904, frozen=0, quantisable=0, num_tensors=7, recomputes=recomputes)
    inputs = _changed(small.INPUTS, {"model.trained": {training_key(small.RECIPE): facts}})
    assert compile(small.RECIPE, small.SITE, inputs).stage("train").settings.train.on_out_of_memory == left


@pytest.mark.parametrize(
    ("card", "is_refused"), [("v100", True), ("nvidia_t4", True), ("rtx2080ti", True), ("a100", False), ("", False)]
)
def test_bfloat16_is_refused_where_the_partition_tells_of_older_cards(
    small: ModuleType, card: str, is_refused: bool
) -> None:
    node = NodeKind(count=4, cpus=32, memory_mb=100_000, gpus=4, gpu_type=card)
    partition = Partition(name="gpu", is_default=True, nodes=(node,))
    site = replace(small.GPU_SITE, launcher="slurm", partitions=(partition,))
    recipe = _changed(_on_gpus(small.RECIPE), {"train.precision": "bfloat16"})
    if not is_refused:
        compile(recipe, site, small.INPUTS)
        return
    with pytest.raises(PlanError, match=f"partition 'gpu' has {card}, .*set train.precision=float16"):
        compile(recipe, site, small.INPUTS)
