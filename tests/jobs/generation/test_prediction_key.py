"""Each key of a stage's settings decides a prediction, or is listed here as one that does not."""

from __future__ import annotations

import dataclasses
import typing
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cluster.site import Site
from sousbatch.jobs.generation.prediction_key import deciding_keys, prediction_key
from sousbatch.recipes import generation, tasks
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import DiskSpace, Inputs, ModelFacts, SplitFacts, TensorFacts
from sousbatch.recipes.plan import Plan, Stage
from sousbatch.recipes.schema import (
    Augment,
    Bm25,
    Data,
    Generator,
    Model,
    Output,
    Predict,
    Recipe,
    Resources,
    Select,
    StageSpec,
    validate,
)
from sousbatch.recipes.stages import settings_of
from sousbatch.run_folder import RunPaths

# No key of these sections decides a prediction. What decides the weights shows in the weights.
SECTIONS = (
    "adapter",
    "train",
    "checkpoints",
    "consolidate",
    "score",
    "publish",
    "resources",
    "environment",
    "tracking",
    "stages",
)
NOT_DECIDING = {
    *("name", "description"),
    # in the digests of model, tokenizer and weights
    *("model.path", "model.revision", "model.from_scratch", "model.config", "model.tokenizer", "model.freeze"),
    "model.add_tokens_from",
    # in the digest of the rows
    *("data.splits", "data.clean", "data.generator.name", "data.generator.seed"),
    *("data.generator.num_train", "data.generator.num_validation", "data.generator.num_test"),
    # of training
    *("data.columns.target", "data.loss_on", "data.max_tokens", "data.packing", "data.max_target_tokens"),
    *("data.augment.name", "data.augment.copies", "data.augment.seed"),
    *("data.select.function", "data.select.sample", "data.select.seed"),
    *("data.select.bm25.queries", "data.select.bm25.k", "data.select.bm25.column"),
    # how the work is shared
    *("predict.unit_rows", "predict.batch_rows", "predict.batch_tokens", "predict.offload"),
    *("predict.vllm.memory_share", "predict.vllm.max_tokens", "predict.vllm.prefix_caching"),  # of another engine
    # what becomes of the answers as they are merged
    *("predict.post", "predict.output.template", "predict.output.columns", "predict.output.format"),
    "predict.decodings",  # each has settings and a key of its own
    # of another task
    *("question_answering.stride_tokens", "question_answering.max_question_tokens"),
    *("question_answering.max_answer_tokens", "question_answering.n_best", "question_answering.null_threshold"),
    *("data.columns.question", "data.columns.answers", "data.columns.answer_start"),
}
DECIDING = deciding_keys(tasks.task_of("causal_lm"), generation.TRANSFORMERS)
KEYS = [option.key for option in validate.options(Recipe) if not option.takes.startswith("section")]
SEEN = [key for key in KEYS if key.split(".")[0] not in SECTIONS]


def test_every_key_that_predict_can_see_is_said_to_decide_or_not() -> None:
    assert sorted([*DECIDING, *NOT_DECIDING]) == sorted(SEEN)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    tensor = TensorFacts(name="lm_head.weight", shape=(8, 8), dtype="float32")
    model = ModelFacts(
        folder=str(tmp_path),
        tokenizer_folder=str(tmp_path),
        digest="model",
        has_weights=True,
        num_params=64,
        tensors=(tensor,),
        config={},
    )
    splits = {
        name: SplitFacts(path=name, num_rows=9, num_bytes=9, digest="rows", columns=("input",))
        for name in ("test", "testx")
    }
    space = DiskSpace(folder="/runs", free_bytes=10**9, free_inodes=10**6)
    recipe = Recipe(
        name="small",
        model=Model(path=str(tmp_path)),
        data=Data(generator=Generator(), augment=Augment(), select=Select(bm25=Bm25())),
        predict=Predict(output=Output()),
        stages={"predict": StageSpec()},
        resources={"default": Resources(device="cpu")},
    )
    site = Site(name="here", launcher="local", cpus_per_node=2, memory_bytes=10**9, gpus_per_node=0, gpu_memory_bytes=0)
    return compile(recipe, site, Inputs(model=model, splits=splits, disk_space=space, code_digest="code"))


def _changed(plan: Plan, key: str, value: Any) -> Plan:
    recipe = _with(plan.recipe, key.split("."), value)
    return dataclasses.replace(plan, recipe=recipe, stages=(_stage(plan, settings=settings_of(recipe)),))


def _stage(plan: Plan, **changes: Any) -> Stage:
    return dataclasses.replace(plan.stages[0], **changes)


def _with(section: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _with(getattr(section, path[0]), path[1:], value)
    return dataclasses.replace(section, **{path[0]: inner})


def _other(settings: Any, key: str) -> Any:
    """Return another value of *key*, of its type."""
    section = attrgetter(key.rpartition(".")[0])(settings) if "." in key else settings
    value, hint = attrgetter(key)(settings), typing.get_type_hints(type(section))[key.rpartition(".")[2]]
    choices = next((typing.get_args(one) for one in (hint, *typing.get_args(hint)) if _is_literal(one)), ())
    if choices:
        return next((choice for choice in choices if choice != value), f"{value}x")
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)) or {int, float} & set(typing.get_args(hint)):
        return (value or 0) + 1
    empty = next(kind for kind in (str, tuple, dict) if isinstance(value, kind) or kind in typing.get_args(hint))
    return {str: f"{value or ''}x", tuple: ("x",), dict: {"x": "y"}}[empty]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _key(plan: Plan) -> str:
    return prediction_key(RunPaths(root=Path("/runs/small/1")), plan.stages[0])


@pytest.mark.parametrize("key", SEEN)
def test_a_deciding_key_changes_the_prediction_key_and_no_other_does(
    plan: Plan, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what _other chooses is the same task and engine by another name
    other_task = dataclasses.replace(tasks.task_of("causal_lm"), name="causal_lmx")
    known = {"causal_lm": tasks.task_of("causal_lm"), "causal_lmx": other_task}
    monkeypatch.setattr(tasks.TASKS, "load", known.__getitem__)
    monkeypatch.setattr(generation.ENGINES, "load", lambda name: generation.TRANSFORMERS)
    changed = _changed(plan, key, _other(plan.recipe, key))
    assert (_key(changed) != _key(plan)) == (key in DECIDING)


def test_other_weights_rows_tokenizers_and_versions_change_the_prediction_key(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, stage = [_key(plan)], plan.stages[0]
    splits = {"predict": dataclasses.replace(stage.splits["predict"], digest="other rows")}
    model = dataclasses.replace(stage.model, digest="another tokenizer")
    for changed in (_stage(plan, splits=splits), _stage(plan, model=model)):
        before.append(_key(dataclasses.replace(plan, stages=(changed,))))
    (Path(stage.model.folder) / "model.safetensors").write_bytes(b"other weights")
    before.append(_key(plan))
    engine = dataclasses.replace(generation.TRANSFORMERS, version=generation.TRANSFORMERS.version + 1)
    monkeypatch.setattr(generation.ENGINES, "load", lambda name: engine)
    before.append(_key(plan))
    assert len(set(before)) == len(before)
