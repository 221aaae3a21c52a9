"""The sections on how stages run: resources, environment and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...tracking.base import TRACKERS
from ...tracking.identity import Alert, Mode, Per, Upload
from .fields import key

PublishedPart = Literal["model", "adapter", "predictions", "report"]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The resources of one stage.

    A task is one job of an array; only predict and consolidate have several.
    """

    nodes: int = key(
        1,
        "nodes of a task; without Slurm they are simulated nodes of this machine, one torchrun agent each",
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
    """The Python that runs the jobs, and the environment that they get."""

    python: str | None = key(None, "interpreter; the one that submits when not given")
    setup: tuple[str, ...] = key((), "shell lines before it, such as module loads")
    container: str | None = key(None, "image that the ranks of a Slurm job run in; python is then the one inside")
    container_runtime: Literal["pyxis", "apptainer"] = key("pyxis", "what starts it")
    mounts: tuple[str, ...] = key((), "more folders that it sees, as FROM:TO; run, model and data are there")
    variables: dict[str, str] = key(
        dict, "environment variables; a secret is refused, because they are written into files"
    )
    inherit: tuple[str, ...] = key(
        (), "names of secrets that the submitting shell hands on, such as HF_TOKEN, HTTPS_PROXY; Slurm gets no others"
    )
    code: tuple[str, ...] = key(
        (),
        "folders of Python code, copied at submission and put on the import path of the jobs: for modules that a "
        "tokenizer or model with model.trust_remote_code imports, and own functions and metrics that other keys "
        "name as module:NAME; a training script of your own is not run",
    )


@dataclass(frozen=True, kw_only=True)
class Publish:
    """The place where a publish stage, or `sousbatch publish`, sends what a run made."""

    url: str | None = key(
        None,
        "absolute folder, fsspec URL such as s3://BUCKET/NAME, or hf://OWNER/NAME for the hub",
        also=("hub_model_id", "push_to_hub"),
    )
    what: tuple[PublishedPart, ...] = key(
        ("model", "adapter", "predictions", "report"), "what is sent of that which the run has; the card always is"
    )
    private: bool = key(True, "a repository that it makes on the hub is private", also=("hub_private_repo",))


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """The trackers of a run, which write beside the run and never make it wait."""

    trackers: tuple[str, ...] = key(
        ("wandb",),
        "what shows them: wandb, tensorboard or trackio (with their packages), or one of another package",
        also=("report_to",),
        names=TRACKERS,
    )
    mode: Mode = key(
        "auto",
        "auto is online where a job finds a route and a key within 3 s, else offline: its files stay in the run, and "
        "`sousbatch sync` sends them; shared also shows the metrics of every node",
    )
    per: Per = key("run", "what has a tracked run of its own: the run with all its stages, each stage, or each task")
    project: str = key("sousbatch", "W&B project", also=("wandb_project",))
    entity: str | None = key(None, "W&B team or user")
    tags: tuple[str, ...] = key((), "W&B tags")
    uploads: tuple[Upload, ...] = key((), "what W&B gets a copy of; all else it knows by path and digest")
    alerts: tuple[Alert, ...] = key((), "what W&B tells you of by mail or Slack, as your account says")
