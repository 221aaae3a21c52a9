"""Set up transformers' Trainer and its arguments as the recipe says.

`callback` decides what happens after each step.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from ...errors import RunError, UsageError
from ...recipes.optimizers import OPTIMIZERS
from ...recipes.plan import Batch
from ...recipes.schema import Train
from ...recipes.tasks import task_of
from ..context import JobContext
from . import schedule
from .callback import StepCallback
from .engines import engine_of
from .guard import Answers
from .losses import chosen_tokens, first_rows, num_labels, uniform_loss
from .measuring import AnswerMetric
from .row_order import LengthSampler
from .saver import Saver


def _as_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# transformers before 5.18 loads the optimizer of a resumed training to "cpu:1", which torch does not know
torch.serialization.register_package(0, lambda storage: None, _as_cpu)


def training_arguments(job: JobContext, batch: Batch) -> TrainingArguments:
    """Return the Trainer's arguments."""
    train, is_cpu = job.settings.train, job.stage.resources.device == "cpu"
    return TrainingArguments(
        output_dir=str(job.paths.checkpoints(job.stage.name)),
        max_steps=batch.steps,
        per_device_train_batch_size=batch.micro_batch,
        per_device_eval_batch_size=batch.micro_batch,
        gradient_accumulation_steps=batch.accumulation,
        learning_rate=train.learning_rate,
        optim="adamw_torch" if ":" in (optimizer := OPTIMIZERS[train.optimizer].argument) else optimizer,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_epsilon=train.epsilon,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        neftune_noise_alpha=train.neftune_alpha,
        tf32=train.tf32 or None,
        dataloader_num_workers=train.num_workers,
        bf16=train.precision == "bfloat16" and train.master_weights,
        fp16=train.precision == "float16" and train.master_weights,
        logging_steps=train.log_every_steps,
        logging_nan_inf_filter=False,  # it would show the last loss in place of one that is no number
        logging_strategy="no",  # the callback decides, so that the last step is logged, saved and measured too
        save_strategy="no",
        eval_strategy="no",
        prediction_loss_only=True,
        seed=job.settings.seed,
        data_seed=job.settings.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=is_cpu,
        ddp_backend="gloo" if is_cpu else None,
        dataloader_pin_memory=not is_cpu,
        **engine_of(job.settings).arguments(job.settings, job.stage.resources.device),
    )


def own_optimizer(train: Train) -> tuple[type, dict[str, Any]] | None:
    """Return class and arguments of an optimizer that transformers does not know.

    Raises:
        RunError: it cannot be compiled here.
    """
    module, _, name = OPTIMIZERS[train.optimizer].argument.partition(":")
    if not name:
        return None
    found = getattr(importlib.import_module(module), name)
    options = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.epsilon, "adamw_mode": True}
    if name == "FusedAdam":
        options["adam_w_mode"] = options.pop("adamw_mode")
    try:
        found([torch.nn.Parameter(torch.zeros(1))], **options)  # compiles it, where it never was
    except Exception as error:
        raise RunError(
            f"train.optimizer {train.optimizer} could not be compiled: {' '.join(str(error).split())[:300]}; it needs "
            "g++ and ninja on the node, else set train.optimizer=adamw",
            advice=UsageError.advice,
        ) from error
    return found, options


class RecipeTrainer(Trainer):
    """A Trainer with the recipe's schedule and our way of saving."""

    def __init__(
        self,
        job: JobContext,
        batch: Batch,
        saver: Saver,
        callback: StepCallback,
        metric: AnswerMetric | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options, callbacks=[callback], optimizer_cls_and_kwargs=own_optimizer(job.settings.train))
        self._job, self._batch, self._saver, self._callback = job, batch, saver, callback
        self._answers = Answers(is_text=task_of(job.settings.task).generates)
        self._metric = metric
        self._measured: list[torch.Tensor] = []  # of each batch the sum of its losses, and its labels
        self._is_causal = task_of(job.settings.task).model_class == "AutoModelForCausalLM"
        # transformers 5.23 goes by the name of the class, and counts the first token of each row of a GPT2LMHeadModel
        self._loss_shifts_labels = self._is_causal

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the recipe's schedule over optimizer steps."""
        scheduler = getattr(self, "lr_scheduler", None)
        if scheduler is None:
            factor = schedule.factor(
                self._job.settings.train.schedule,
                steps=self._batch.steps,
                warmup_steps=self._batch.warmup_steps,
                steps_per_epoch=self._batch.steps_per_epoch,
            )
            self.lr_scheduler = scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the rows: transformers' own, or by length."""
        train = self._job.settings.train
        if not train.group_by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(example["input_ids"]) for example in cast("Iterable[Any]", self.train_dataset)]
        return LengthSampler(lengths, group=train.global_batch, seed=self._job.settings.seed)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss, which is smoothed only while training.

        While evaluating, the first tokens that the model would answer are remembered.
        """
        if model.training:
            self._callback.throughput.add_tokens(inputs)
        epsilon, labels = self._job.settings.train.label_smoothing, inputs.get("labels")  # which a loss function takes
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not model.training and self._answers.is_wanted:
            self._answers.add(*chosen_tokens(outputs["logits"], labels, is_shifted=self._is_causal))
        if not (epsilon and model.training):
            return (loss, outputs) if return_outputs else loss
        sums, count = uniform_loss(outputs["logits"], labels, is_shifted=self._is_causal)
        has_step_loss = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        is_per_step = has_step_loss and num_items_in_batch is not None  # as the loss itself is
        scale = self.accelerator.num_processes / num_items_in_batch if is_per_step else 1 / max(1, count)
        loss = (1 - epsilon) * loss + epsilon * scale * sums
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Return the batches of a step, and count how long they took."""
        with self._callback.throughput.waiting_for_data():
            return super().get_batch_samples(*arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure the evaluation split, and end a training whose answers became filler."""
        self._answers.begin()
        found: dict[str, float] = super().evaluate(*arguments, **options)
        self._callback.check_answers(self.state.global_step, self._answers, found["eval_loss"])
        return found

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Return the mean loss of a batch, and add it to the sum over all labels.

        Ranks get as many rows each, the first ones again behind the last one; these do not count.
        """
        batch, done = self.args.eval_batch_size, len(self._measured)
        before = (done * self.args.world_size + self.args.process_index) * batch
        inputs = first_rows(self._prepare_inputs(inputs), len(cast("Any", self.eval_dataset)) - before)
        if getattr(cast("Any", self.model).config, "output_router_logits", False):
            inputs["output_router_logits"] = False  # what balances experts in training is no loss of a token
        count = num_labels(inputs, is_shifted=self._is_causal)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        self._measured.append(torch.stack((torch.where(count > 0, loss * count, 0), count)).double())
        return loss, None, None

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Return transformers' times, the mean loss, and the metric of answers.

        transformers' own loss is a mean over batches, which depends on micro batch and ranks.
        """
        self._measured = []
        output = super().evaluation_loop(*arguments, **options)
        summed, count = self.accelerator.reduce(torch.stack(self._measured).sum(0))
        output.metrics["eval_loss"] = float(summed / count)
        if self._metric is not None:
            with self.accelerator.autocast():  # peft's `generate` goes past the forward pass that has it
                output.metrics.update(self._metric.measure(self.model))
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saver.save(self, is_stop=self.control.should_training_stop)
