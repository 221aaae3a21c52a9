"""A plan made by hand, without a file: run as a script, it prints the plan and its scripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sousbatch.cluster.site import Site
from sousbatch.launchers.local.launcher import LocalLauncher
from sousbatch.recipes.compile import compile
from sousbatch.recipes.facts import DiskSpace, Inputs, ModelFacts, SplitFacts, TensorFacts
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.schema import (
    Checkpoints,
    Data,
    Environment,
    Model,
    Predict,
    Recipe,
    Resources,
    Schedule,
    Train,
    Zero,
)
from sousbatch.run_folder import RunPaths

_SHAPES = {
    "lm_head.weight": (32, 8),
    "model.embed_tokens.weight": (32, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.down_proj.weight": (8, 16),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
}
CONFIG = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
MODEL = ModelFacts(
    folder="/models/tiny",
    tokenizer_folder="/models/tiny",
    digest="m" * 64,
    has_weights=True,
    num_params=904,
    tensors=tuple(TensorFacts(name=name, shape=shape, dtype="float32") for name, shape in _SHAPES.items()),
    config=CONFIG,
)
SITE = Site(
    name="this machine",
    launcher="local",
    cpus_per_node=4,
    memory_bytes=512 * 10**9,
    gpus_per_node=0,
    gpu_memory_bytes=0,
)
GPU_SITE = replace(SITE, gpus_per_node=4, gpu_memory_bytes=40 * 10**9)
RECIPE = Recipe(
    name="small",
    model=Model(path="/models/tiny"),
    data=Data(splits={"train": "train.jsonl"}, max_tokens=32),
    train=Train(
        epochs=2,
        global_batch=8,
        micro_batch=2,
        precision="float32",
        zero=Zero(stage=3),
        schedule=Schedule(warmup_ratio=0.1),
    ),
    checkpoints=Checkpoints(every_steps=10),
    predict=Predict(max_new_tokens=16),
    resources={
        "default": Resources(device="cpu"),
        "train": Resources(device="cpu", nodes=2),
        "predict": Resources(device="cpu", tasks=2),
    },
    environment=Environment(
        python="/opt/python", variables={"NCCL_DEBUG": "it's fine"}, setup=("module load cuda",), code=("~/lab/mine",)
    ),
)


def split(name: str, num_rows: int) -> SplitFacts:
    """Return a split as it is looked at."""
    return SplitFacts(
        path=f"/data/{name}.jsonl", num_rows=num_rows, num_bytes=40 * num_rows, digest=name, columns=("input", "target")
    )


INPUTS = Inputs(
    model=MODEL,
    splits={"train": split("train", 100), "validation": split("validation", 10), "test": split("test", 50)},
    disk_space=DiskSpace(folder="/runs", free_bytes=10**9, free_inodes=10**6),
    code_digest="c" * 64,
)


def plan() -> Plan:
    """Return the plan of the recipe above."""
    return compile(RECIPE, SITE, INPUTS)


def scripts() -> str:
    """Return the text that is sent for all its stages."""
    made = plan()
    paths = RunPaths(root=Path("/runs/small") / made.run_id)
    return "\n".join(request.text for request in LocalLauncher(Path("/state")).prepare(made, paths))


if __name__ == "__main__":
    print(plan().to_json() + scripts(), end="")
