"""The sections on training, on checkpoints, and on the model made of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...checkpoints.consolidation.options import (
    DTYPE_HELP,
    MAX_SHARD_GB,
    MAX_SHARD_HELP,
    OVERFLOW_HELP,
    Overflow,
)
from ...checkpoints.formats.tensors import FloatDtype
from ...checkpoints.retention.policies import Goal
from .fields import key


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time, in optimizer steps."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "step"] = key(
        "cosine", "shape after the warm-up", also=("lr_scheduler_type", "lr_scheduler")
    )
    warmup_ratio: float = key(
        0.0, "share of all steps that the rate rises linearly; warmup_steps wins", at_least=0, at_most=1
    )
    warmup_steps: int | None = key(None, "the same in steps", also=("num_warmup_steps",), at_least=0)
    min_ratio: float = key(
        0.0,
        "the lowest rate, as a share of learning_rate",
        also=("eta_min_ratio", "min_lr_ratio"),
        at_least=0,
        at_most=1,
    )
    period_epochs: float | None = key(None, "the same period in passes over the rows; period_steps wins", above=0)
    period_steps: int | None = key(
        None,
        "steps from the highest rate to the lowest, all of them when not given; then cosine climbs back in as many, "
        "as torch's CosineAnnealingLR does, and cosine_restarts begins again at the top; step: steps between decays",
        also=("T_max", "T_0", "step_size"),
        at_least=1,
    )
    period_factor: float = key(
        1.0, "cosine_restarts: each period is this many times as long as the last", also=("T_mult",), at_least=1
    )
    decay: float = key(0.5, "step: what the rate is multiplied by", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class Zero:
    """DeepSpeed's sharding of optimizer states (1), gradients (2) and parameters (3)."""

    stage: Literal[0, 1, 2, 3] = key(0, "0 shards nothing and runs without DeepSpeed", also=("zero_stage",))
    offload: Literal["none", "optimizer", "both"] = key(
        "none", "what lives in host memory: optimizer states, or parameters too"
    )
    config: dict[str, Any] = key(dict, "more keys of DeepSpeed's own config, merged over ours", also=("deepspeed",))


@dataclass(frozen=True, kw_only=True)
class Train:
    """The settings of training. A step is an optimizer step."""

    split: str = key("train", "split to train on")
    steps: int | None = key(None, "steps in all; wins over epochs", also=("max_steps",), at_least=1)
    epochs: float = key(
        1.0, "passes over the training rows", also=("num_train_epochs", "num_epochs", "max_epochs"), above=0
    )
    global_batch: int = key(
        32,
        "rows of one step, over all ranks; with data.packing, packs or blocks",
        also=("total_batch_size", "global_batch_size", "gradient_accumulation_steps", "accumulate_grad_batches"),
        at_least=1,
    )
    micro_batch: int = key(
        1,
        "rows of one forward pass on one rank; gradient accumulation follows from the global batch",
        also=("per_device_train_batch_size", "train_batch_size", "batch_size", "micro_batch_size"),
        at_least=1,
    )
    learning_rate: float = key(2e-5, "highest rate", also=("lr",), above=0)
    schedule: Schedule = key(Schedule, "the rate over time")
    optimizer: Literal[
        "adamw",
        "adamw_fused",
        "adamw_8bit",
        "paged_adamw",
        "paged_adamw_8bit",
        "fused_adam",
        "cpu_adam",
        "adafactor",
    ] = key(
        "adamw",
        "adamw and adamw_fused are torch's, 8bit and paged ones bitsandbytes', fused_adam and cpu_adam DeepSpeed's, "
        "compiled at their first start",
        also=("optim",),
    )
    beta1: float = key(0.9, "decay of the first moment", also=("adam_beta1",), at_least=0, at_most=0.99999)
    beta2: float = key(0.999, "decay of the second moment", also=("adam_beta2",), at_least=0, at_most=0.99999)
    epsilon: float = key(1e-8, "added to the denominator", also=("adam_epsilon",), above=0)
    weight_decay: float = key(0.0, "decoupled weight decay", also=("wd",), at_least=0)
    max_grad_norm: float = key(
        1.0, "gradients are scaled down to this norm; 0 leaves them", also=("gradient_clip_val",), at_least=0
    )
    precision: FloatDtype = key("bfloat16", "arithmetic of forward and backward", also=("bf16", "fp16", "dtype"))
    master_weights: bool = key(
        True,
        "keep float32 weights and moments; false holds weights, gradients and moments in precision alone: half the "
        "memory, and small updates are lost",
        also=("pure_bf16", "master_dtype"),
    )
    zero: Zero = key(Zero, "sharding by DeepSpeed")
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")
    on_out_of_memory: tuple[Literal["micro_batch", "gradient_checkpointing", "offload", "max_tokens"], ...] = key(
        ("micro_batch", "gradient_checkpointing"),
        "what an attempt gives up after one that ran out of device memory, the first that is left: it halves the micro "
        "batch, recomputes activations, moves optimizer states to the host, or halves data.max_tokens, which changes "
        "what is learned",
        also=("auto_find_batch_size",),
    )
    max_loss_rise: float | None = key(
        2.0,
        "the training stops as diverged when the mean loss of 20 steps is this many times its best, and 1 above it, "
        "or when its answers have become one token; null stops only where the loss is no number",
        above=1,
    )
    eval_split: str | None = key("validation", "split that is measured at every checkpoint; null for none")
    eval_every_steps: int | None = key(
        None, "it is measured every so many steps too, between checkpoints", also=("eval_steps",), at_least=1
    )
    eval_rows: int | None = key(None, "at most so many rows of it", at_least=1)
    metric_rows: int | None = key(
        None, "at most so many rows of it are answered for checkpoints.metric; eval_rows when not given", at_least=1
    )
    patience: int | None = key(
        None, "stop after so many measurements without a better metric", also=("early_stopping_patience",), at_least=1
    )
    log_every_steps: int = key(10, "steps between logged losses", also=("logging_steps",), at_least=1)
    label_smoothing: float = key(
        0.0,
        "share of each label that is spread over all outputs; eval_loss stays without it",
        also=("label_smoothing_factor",),
        at_least=0,
        at_most=0.99,
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = key(
        None,
        "weights of the labels in the loss of a classification: balanced, or {label: weight}, 1 where one is left out",
        also=("class_weight", "label_weights"),
    )
    neftune_alpha: float | None = key(
        None,
        "noise on the embeddings while training, uniform within alpha / sqrt(tokens x width); 5 is usual",
        also=("neftune_noise_alpha",),
        above=0,
    )
    group_by_length: bool = key(
        False, "put rows of like length into one step: less padding, a less random order", also=("length_column_name",)
    )
    num_workers: int = key(
        0, "processes of each rank that prepare batches beside it", also=("dataloader_num_workers",), at_least=0
    )
    tf32: bool = key(False, "float32 products on a GPU's tensor cores with 10 bits of mantissa")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The settings of when the training state is saved, and which saves stay."""

    every_steps: int | None = key(
        None,
        "steps between checkpoints; a tenth of the training when not given",
        also=("save_steps", "save_every", "every_n_train_steps"),
        at_least=1,
    )
    every_epochs: float | None = key(
        None, "the same in passes over the training rows; every_steps wins", also=("every_n_epochs",), above=0
    )
    keep_last: int = key(1, "newest ones that stay", also=("save_total_limit", "total_limit"), at_least=1)
    keep_best: int = key(1, "best ones by the metric that stay", also=("save_top_k",), at_least=0)
    keep_every_steps: int | None = key(None, "those at multiples of this stay for good", at_least=1)
    keep_steps: tuple[int, ...] = key(
        (), "a checkpoint is made after each of these steps, and its weights stay whatever happens", at_least=1
    )
    metric: str = key(
        "eval_loss",
        "what best means: loss while training, eval_loss on train.eval_split, or a metric such as exact_match or "
        "rougeL of the answers to its rows, or module:NAME of own code, with checkpoints.goal; several values, such as "
        "those of rouge, count by their mean",
        also=("metric_for_best_model", "monitor"),
    )
    goal: Goal | None = key(
        None, "which end of the metric is best; its own when not given", also=("greater_is_better",)
    )
    thin: bool = key(
        False,
        "best ones and those of every so many steps keep their weights only; else only where space is needed",
        also=("save_only_model",),
    )
    archive_url: str | None = key(None, "absolute folder or fsspec URL where checkpoints go that do not stay here")
    budget_gb: float | None = key(
        None,
        "most that the checkpoints of one train stage may hold, the one being written too (1 GB = 10^9 B)",
        above=0,
    )
    store_budget_gb: float | None = key(
        None, "most that all runs in the folder of this one may hold together (1 GB = 10^9 B)", above=0
    )
    max_skipped: int | None = key(
        3, "saves in a row that may fail for want of space before the run stops; null trains on to its end", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class Consolidate:
    """The settings of how the checkpoint becomes a model.

    An adapter is merged into its base; its checkpoints keep it apart.
    """

    choose: str = key("best", "which checkpoint: best, last, or such as step-200, which then stays")
    dtype: FloatDtype | None = key(
        None,
        f"{DTYPE_HELP}; when not given bfloat16 for a model whose own weights are bfloat16, else float16",
        also=("torch_dtype",),
    )
    max_shard_gb: float = key(MAX_SHARD_GB, MAX_SHARD_HELP, also=("max_shard_size",), above=0)
    overflow: Overflow = key("refuse", OVERFLOW_HELP)
