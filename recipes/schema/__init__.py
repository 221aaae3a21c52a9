"""What a recipe can say: every key once, with its default, its range and its help.

The dataclasses are the schema. `--help` texts, error messages and `recipes show` read the
metadata beside each default; the check itself is in `check.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...tracking.base import TRACKERS
from ..stage_kinds import RECIPE_KINDS
from .fields import key

Task = str
Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to start from, and its tokenizer."""

    path: str = key(
        "",
        "hub id, local folder, or library:NAME for one that this package ships",
        also=("model_name_or_path", "pretrained_model_name_or_path", "base_model"),
    )
    add_tokens_from: str | None = key(None, "file of tokens to add, one a line, or spm:N to train them", later=True)
    revision: str | None = key(None, "branch, tag or commit of a hub model")
    from_scratch: bool = key(False, "take only the architecture; weights are drawn from the seed")
    config: dict[str, Any] = key(dict, "values that replace those of the model's own config")
    tokenizer: str | None = key(
        None, "where the tokenizer is; the model's own when not given", also=("tokenizer_name",)
    )
    add_tokens: tuple[str, ...] = key((), "tokens to add; embeddings are resized before any adapter")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = key(
        None, "attention kernel; transformers chooses when not given", also=("attn_implementation",)
    )
    freeze: tuple[str, ...] = key((), "parameters that do not train: shell patterns of their names, or layers:0-11")
    trust_remote_code: bool = key(False, "run Python code that comes with the model")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What trains: all weights, or low-rank adapters beside frozen ones."""

    method: Literal["full", "lora", "qlora"] = key(
        "full", "full, lora, or qlora (lora over 4-bit weights)", also=("peft_type", "use_lora", "load_in_4bit")
    )
    rank: int = key(16, "rank of the two factors", also=("r", "lora_r"), at_least=1)
    alpha: float = key(32.0, "scale: the product is multiplied by alpha / rank", also=("lora_alpha",), above=0)
    dropout: float = key(0.0, "dropout before the factors", also=("lora_dropout",), at_least=0, at_most=0.99)
    target_modules: tuple[str, ...] = key(("all-linear",), "names of the layers that get an adapter")
    modules_to_save: tuple[str, ...] = key((), "layers that train in full beside the adapters")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How the data's columns are called."""

    id: str | None = key(None, "a row's own id, carried into the predictions")
    input: str = key("input", "what the model reads", also=("input_column", "prompt_column"))
    target: str = key("target", "what it should answer", also=("target_column", "output", "response_column"))
    text: str = key("text", "plain text, for continued pretraining: data.prompt is empty")
    context: str = key("context", "the passage, for question answering", also=("context_column",))


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Rows made by a rule that this package ships."""

    name: Literal["hangul"] = key(
        "hangul", "hangul: Korean reviews, obfuscated; splits train, validation, test, test_other_mix"
    )
    seed: int = key(0, "seed of the rows", at_least=0)
    num_train: int = key(12800, "rows to train on", at_least=1)
    num_validation: int = key(200, "rows to validate on", at_least=1)
    num_test: int = key(400, "rows to test on", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows: where they are and how they become tokens."""

    splits: dict[str, str] = key(
        dict,
        "split name -> file (.jsonl, .json, .csv, .txt, .parquet): a path, from the working folder on, or a URL",
        also=("train_file", "dataset"),
    )
    generator: Generator | None = key(None, "make splits by rule; those of data.splits stand beside them")
    columns: Columns = key(Columns, "how the columns are called")
    prompt: str = key(
        "{input}",
        "template over the columns; `chat` uses the tokenizer's own; empty trains on plain text",
        also=("template", "prompt_template"),
    )
    system: str | None = key(None, "system message of a chat prompt")
    loss_on: Literal["response", "all"] = key("response", "which tokens count in the loss", also=("train_on_inputs",))
    max_tokens: int = key(
        512,
        "longest row in tokens, prompt and response together",
        also=("max_seq_length", "cutoff_len", "max_length"),
        at_least=8,
    )
    pad_input_to: int | None = key(
        None,
        "pad every prompt to this many tokens, so that a small model finds input and output at one distance",
        at_least=1,
    )
    separator: str = key("", "text between the prompt and the response, after any padding")
    clean: tuple[str, ...] = key((), "steps over every text before it is used", later=True)
    augment: dict[str, Any] = key(dict, "rows made of rows: {name, copies, seed}", later=True)
    select: dict[str, Any] = key(dict, "which training rows: {bm25: {query, k}}", later=True)
    long_rows: Literal["refuse", "drop", "cut_left", "cut_right"] = key(
        "refuse",
        "what happens to rows longer than max_tokens or pad_input_to: drop leaves them out of training, cut_left and "
        "cut_right shorten them on that side, and prompts beyond the model's context too, which are never dropped",
        was=("keep_long",),
    )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time, in optimizer steps."""

    name: Literal["constant", "linear", "cosine", "cosine_restarts", "step"] = key(
        "cosine", "shape after the warm-up", also=("lr_scheduler_type", "lr_scheduler")
    )
    warmup_ratio: float = key(
        0.0, "share of all steps that the rate rises linearly", also=("warmup_steps",), at_least=0, at_most=1
    )
    min_ratio: float = key(
        0.0,
        "the lowest rate, as a share of learning_rate",
        also=("eta_min_ratio", "min_lr_ratio"),
        at_least=0,
        at_most=1,
    )
    period_epochs: float | None = key(None, "the same period in passes over the rows; period_steps wins", above=0)
    period_steps: int | None = key(
        None, "cosine_restarts: steps of the first period; step: steps between decays", at_least=1
    )
    period_factor: float = key(1.0, "cosine_restarts: each period is this many times as long as the last", at_least=1)
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
    """How it trains. A step is an optimizer step."""

    split: str = key("train", "split to train on")
    steps: int | None = key(None, "steps in all; wins over epochs", also=("max_steps",), at_least=1)
    epochs: float = key(
        1.0, "passes over the training rows", also=("num_train_epochs", "num_epochs", "max_epochs"), above=0
    )
    global_batch: int = key(
        32,
        "rows of one step, over all ranks",
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
    optimizer: Literal["adamw", "adafactor"] = key("adamw", "optimizer", also=("optim",))
    beta1: float = key(0.9, "decay of the first moment", also=("adam_beta1",), at_least=0, at_most=1)
    beta2: float = key(0.999, "decay of the second moment", also=("adam_beta2",), at_least=0, at_most=1)
    epsilon: float = key(1e-8, "added to the denominator", also=("adam_epsilon",), above=0)
    weight_decay: float = key(0.0, "decoupled weight decay", also=("wd",), at_least=0)
    max_grad_norm: float = key(
        1.0, "gradients are scaled down to this norm; 0 leaves them", also=("gradient_clip_val",), at_least=0
    )
    precision: Literal["float32", "bfloat16", "float16"] = key(
        "bfloat16", "arithmetic of forward and backward; masters are float32", also=("bf16", "fp16", "dtype")
    )
    zero: Zero = key(Zero, "sharding by DeepSpeed")
    gradient_checkpointing: bool = key(False, "recompute activations to save memory")
    eval_split: str | None = key("validation", "split whose loss is measured at every checkpoint; null for none")
    eval_rows: int | None = key(None, "at most so many rows of it", at_least=1)
    patience: int | None = key(
        None, "stop after so many checkpoints without a better metric", also=("early_stopping_patience",), at_least=1
    )
    log_every_steps: int = key(10, "steps between logged losses", also=("logging_steps",), at_least=1)


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When the training state is saved and which of them stay."""

    every_steps: int | None = key(
        None,
        "steps between checkpoints; a tenth of the training when not given",
        also=("save_steps", "save_every", "eval_steps", "every_n_train_steps"),
        at_least=1,
    )
    keep_last: int = key(1, "newest ones that stay", also=("save_total_limit", "total_limit"), at_least=1)
    keep_best: int = key(1, "best ones by the metric that stay", also=("save_top_k",), at_least=0)
    keep_every_steps: int | None = key(None, "those at multiples of this stay for good", at_least=1)
    metric: Literal["eval_loss", "loss"] = key(
        "eval_loss",
        "what best means: on train.eval_split, or while training",
        also=("metric_for_best_model", "monitor"),
    )
    goal: Literal["lowest", "highest"] = key("lowest", "which end of the metric is best", also=("greater_is_better",))
    thin: bool = key(
        False,
        "best ones and those of every so many steps keep their weights only; else only where room is needed",
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
        3, "saves in a row that no room may cost before the run stops; null trains on to its end", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class Consolidate:
    """How the checkpoint becomes a model. An adapter is merged into its base; its checkpoints keep it apart."""

    choose: Literal["best", "last"] = key("best", "which checkpoint")
    dtype: Dtype | None = key(
        None,
        "type of the weights; when not given bfloat16 for a model whose own weights are bfloat16, else float16",
        also=("torch_dtype",),
    )
    max_shard_gb: float = key(5.0, "largest weight file (1 GB = 10^9 bytes)", also=("max_shard_size",), above=0)
    overflow: Literal["refuse", "clamp", "bfloat16"] = key("refuse", "what to do with weights beyond float16's range")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """What is predicted, and how tokens are chosen."""

    split: str = key("test", "split to predict")
    rows: int | None = key(None, "only the first rows of it", at_least=1)
    engine: Literal["transformers", "vllm"] = key("transformers", "what generates", later=True)
    length_ratio: float | None = key(None, "longest answer as a share of its prompt's tokens", above=0, later=True)
    chunk_tokens: int | None = key(None, "generate so many at a time and go on from the last sentences", later=True)
    stop: tuple[str, ...] = key((), "texts at which an answer ends", later=True)
    post: tuple[str, ...] = key((), "steps over every answer", later=True)
    dtype: Dtype | None = key(None, "arithmetic; the model's own type on a GPU, float32 on a CPU when not given")
    unit_rows: int = key(256, "rows that are committed at once: what a kill can lose", at_least=1)
    batch_rows: int = key(
        32, "rows that are generated together", also=("per_device_eval_batch_size", "eval_batch_size"), at_least=1
    )
    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    min_new_tokens: int = key(0, "shortest answer in tokens", at_least=0)
    sample: bool = key(False, "draw tokens, seeded by row, instead of taking the likeliest", also=("do_sample",))
    temperature: float = key(1.0, "above 1 flattens the distribution", above=0)
    top_k: int = key(0, "draw among the k likeliest; 0 for all", at_least=0)
    top_p: float = key(1.0, "draw among the likeliest that hold this probability", above=0, at_most=1)
    num_beams: int = key(1, "beams; 1 is greedy", at_least=1)
    repetition_penalty: float = key(1.0, "above 1 makes used tokens less likely", above=0)
    no_repeat_ngram: int = key(0, "n-grams of this length appear once", also=("no_repeat_ngram_size",), at_least=0)


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """How long passages are cut into windows, and how the answer's span is chosen among them."""

    stride_tokens: int = key(128, "tokens that neighbouring windows share", also=("doc_stride",), at_least=0)
    max_question_tokens: int = key(64, "longest question", also=("max_query_length",), at_least=1)
    max_answer_tokens: int = key(30, "longest answer", also=("max_answer_length",), at_least=1)
    n_best: int = key(20, "spans that are compared for an answer", also=("n_best_size",), at_least=1)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How predictions are measured against the target column."""

    metrics: tuple[Literal["character_accuracy", "cer", "exact_match", "rouge"], ...] = key(
        ("character_accuracy", "cer", "exact_match", "rouge"), "what is measured"
    )
    tokenizer: Literal["words", "characters"] = key(
        "words", "units of ROUGE; both keep Hangul, unlike the usual tokenizer"
    )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage gets. A task is one job of an array; only predict and consolidate have several."""

    nodes: int = key(
        1,
        "nodes of a task; without Slurm they are pretend nodes of this machine, one torchrun agent each",
        also=("num_nodes", "nnodes"),
        at_least=1,
    )
    devices_per_node: int = key(
        1,
        "ranks on each node: GPUs, or CPU processes",
        also=("gpus_per_node", "nproc_per_node", "num_processes"),
        at_least=1,
    )
    device: Literal["gpu", "cpu"] = key("gpu", "what a rank computes on")
    tasks: int | None = key(
        None,
        "tasks that share the rows of a predict stage, 1 when not given, or the weight files of a consolidate stage, "
        "where on Slurm a large model gets one for every 40 GB",
        also=("num_shards",),
        at_least=1,
    )
    tasks_at_once: int | None = key(None, "at most so many of them run together", at_least=1)
    cpus_per_device: int = key(1, "cores of a rank, and its OpenMP threads", also=("cpus_per_task",), at_least=1)
    memory_gb: float | None = key(
        None, "host memory of a node; the site's default when not given", also=("mem",), above=0
    )
    time_min: int | None = key(
        None, "time limit in minutes; the partition's default when not given", also=("time", "timeout_min"), at_least=1
    )
    partition: str | None = key(None, "Slurm partition")
    account: str | None = key(None, "Slurm account")
    qos: str | None = key(None, "Slurm quality of service")
    constraint: str | None = key(None, "Slurm node features")
    exclude: str | None = key(None, "Slurm nodes to avoid")
    reservation: str | None = key(None, "Slurm reservation")
    sbatch: tuple[str, ...] = key((), "more #SBATCH lines, as --name=value; they win over those written for you")
    stall_min: float = key(
        30.0, "minutes without a step after which an attempt ends, the stacks of its ranks in the log", above=0
    )


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What runs the jobs, and what they are told."""

    python: str | None = key(None, "interpreter; the one that submits when not given")
    setup: tuple[str, ...] = key((), "shell lines before it, such as module loads")
    container: str | None = key(None, "image that the ranks of a Slurm job run in; python is then the one inside")
    container_runtime: Literal["pyxis", "apptainer"] = key("pyxis", "what starts it")
    mounts: tuple[str, ...] = key((), "more folders that it sees, as FROM:TO; run, model and data are there")
    variables: dict[str, str] = key(dict, "environment variables; a secret is refused, for they are written into files")
    inherit: tuple[str, ...] = key(
        (), "names of secrets that the submitting shell hands on, such as HF_TOKEN, HTTPS_PROXY; Slurm gets no others"
    )
    code: tuple[str, ...] = key(
        (),
        "folders of Python code, copied at submission and put on the import path of the jobs: for modules that a "
        "tokenizer or model with model.trust_remote_code imports; no key calls a function of yours, and a training "
        "script of your own is not run",
    )


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where the numbers of a run are shown, written beside the run without a network."""

    trackers: tuple[str, ...] = key(("wandb",), "what shows them", also=("report_to",), names=TRACKERS)
    mode: Literal["offline", "disabled"] = key("offline", "offline leaves files, for W&B those of `wandb sync`")
    project: str = key("sousbatch", "W&B project", also=("wandb_project",))
    entity: str | None = key(None, "W&B team or user")
    tags: tuple[str, ...] = key((), "W&B tags")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One step of the run, when the five usual ones are not enough."""

    kind: str | None = key(None, f"what it does: {', '.join(RECIPE_KINDS)}; its own name when that is a kind")
    of: str | None = key(None, "the stage whose output it takes; the nearest fitting one above when not given")
    set: dict[str, Any] = key(dict, "sections of the recipe as this stage sees them")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What a recipe says that a stage can see in its own way, by its `set`."""

    task: Task = key(
        "causal_lm",
        "what the model learns: causal_lm, or a task of another package; seq2seq, question_answering and "
        "classification come later",
    )
    seed: int = key(0, "seed of weights, order of rows and sampling", at_least=0, at_most=2**32 - 1)
    model: Model = key(Model, "the model to start from")
    adapter: Adapter = key(Adapter, "what trains")
    data: Data = key(Data, "the rows")
    train: Train = key(Train, "how it trains", also=("training", "trainer"))
    checkpoints: Checkpoints = key(Checkpoints, "which training states stay")
    consolidate: Consolidate = key(Consolidate, "how a checkpoint becomes a model")
    predict: Predict = key(Predict, "what is predicted", also=("generation", "decode"))
    question_answering: QuestionAnswering | None = key(None, "windows and spans, for that task alone", later=True)
    score: Score = key(Score, "how it is measured")

    @property
    def is_measured(self) -> bool:
        """Whether training measures what `checkpoints.metric` names at each save."""
        return self.checkpoints.metric == "loss" or self.train.eval_split is not None


@dataclass(frozen=True, kw_only=True)
class Recipe(StageSettings):
    """What to do, from model and data to scores."""

    name: str = key("", "name of the recipe; its file's name when not given")
    description: str = key("", "one line for `recipes list`")
    resources: dict[str, Resources] = key(
        dict, "per stage name, kind, or `default`; a stage's entry is laid over its kind's, that over the default"
    )
    environment: Environment = key(Environment, "what runs the jobs")
    tracking: Tracking = key(Tracking, "where its numbers are shown")
    stages: dict[str, StageSpec] = key(
        dict, "the steps in order; train, consolidate, predict, merge, score when not given"
    )
