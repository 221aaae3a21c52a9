"""Every key of a recipe's `train` reaches transformers' arguments, or somebody else who is named here."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from sousbatch.jobs.training import engines, trainer
from sousbatch.recipes.plan import Batch
from sousbatch.recipes.schema import Model, Recipe, Resources, Train
from sousbatch.run_folder import RunPaths

BATCH = Batch(
    world_size=2, micro_batch=3, accumulation=5, steps=70, steps_per_epoch=10, warmup_steps=7, save_every_steps=10
)
# key: a value that is not the default, and the arguments that follow from it
REACH: dict[str, tuple[Any, dict[str, Any]]] = {
    "learning_rate": (3e-3, {"learning_rate": 3e-3}),
    "optimizer": ("adafactor", {"optim": "adafactor"}),
    "beta1": (0.8, {"adam_beta1": 0.8}),
    "beta2": (0.95, {"adam_beta2": 0.95}),
    "epsilon": (1e-6, {"adam_epsilon": 1e-6}),
    "weight_decay": (0.1, {"weight_decay": 0.1}),
    "max_grad_norm": (0.5, {"max_grad_norm": 0.5}),
    "master_weights": (False, {"bf16": False}),
    "precision": ("float32", {"bf16": False, "fp16": False}),
    "log_every_steps": (7, {"logging_steps": 7}),
    "neftune_alpha": (5.0, {"neftune_noise_alpha": 5.0}),
    "num_workers": (2, {"dataloader_num_workers": 2}),
}
ELSEWHERE = {
    "split": "jobs.train gives the trainer its rows",
    "eval_split": "jobs.train gives the trainer its rows, StepCallback says when",
    "eval_rows": "jobs.train gives the trainer its rows",
    "class_weights": "the task's own loss",
    "metric_rows": "recipes.stages, for AnswerMetric",
    "steps": "recipes.compile counts them: Batch.steps",
    "epochs": "recipes.compile counts them: Batch.steps",
    "global_batch": "recipes.compile divides it: Batch.accumulation",
    "micro_batch": "Batch.micro_batch, which an attempt may halve",
    "schedule": "RecipeTrainer.create_scheduler",
    "zero": "the engine's own arguments",
    "gradient_checkpointing": "build_model, before the adapter",
    "patience": "StepCallback.on_evaluate",
    "eval_every_steps": "StepCallback.on_step_end",
    "label_smoothing": "RecipeTrainer.compute_loss",
    "group_by_length": "RecipeTrainer._get_train_sampler",
    "on_out_of_memory": "launchers.attempts, by recipes.fallbacks",
    "max_loss_rise": "StepCallback.on_log",
    "tf32": "an argument that transformers takes only beside a GPU",
}


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is left out, since it would be started at once."""
    monkeypatch.setattr(
        trainer, "TrainingArguments", lambda **given: TrainingArguments(**given | {"ddp_backend": None})
    )


def arguments(**train: Any) -> Any:
    recipe = Recipe(name="r", model=Model(path="m"), seed=11, train=Train(**train))
    stage = SimpleNamespace(name="train", resources=Resources(device="cpu"))
    job: Any = SimpleNamespace(recipe=recipe, settings=recipe, stage=stage, paths=RunPaths(root=Path("/runs/r/1")))
    return trainer.training_arguments(job, BATCH)


def test_every_key_of_train_is_looked_after_by_exactly_one() -> None:
    assert sorted([*REACH, *ELSEWHERE]) == sorted(field.name for field in fields(Train))


@pytest.mark.parametrize("key", REACH)
def test_a_key_reaches_the_arguments(key: str) -> None:
    value, expected = REACH[key]
    default, found = arguments(), arguments(**{key: value})
    assert {name: getattr(found, name) for name in expected} == expected
    assert any(getattr(default, name) != given for name, given in expected.items())


def test_batch_and_seed_come_from_the_plan() -> None:
    found = arguments()
    sizes = (found.max_steps, found.per_device_train_batch_size, found.gradient_accumulation_steps)
    assert sizes == (70, 3, 5) and found.per_device_eval_batch_size == 3
    assert (found.seed, found.data_seed) == (11, 11)


def test_the_callback_alone_decides_when_to_log_measure_and_save() -> None:
    found = arguments()
    assert {found.logging_strategy, found.save_strategy, found.eval_strategy} == {"no"}
    assert found.report_to == [] and found.disable_tqdm


def test_a_row_in_the_table_is_enough_to_train_with_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = SimpleNamespace(arguments=lambda settings, device: {"ddp_timeout": 77})
    monkeypatch.setitem(engines.ENGINES, "toy", toy)
    monkeypatch.setattr(engines, "engine_name", lambda settings: "toy")
    assert arguments().ddp_timeout == 77


def test_an_optimizer_is_loaded_to_the_cpu_of_a_rank(tmp_path: Path) -> None:
    """Transformers before 5.18 asks for it so, where several ranks resume on CPUs."""
    torch.save({"step": torch.ones(3)}, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 1), weights_only=True)
    assert loaded["step"].tolist() == [1, 1, 1]
