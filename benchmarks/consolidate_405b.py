"""Measure what consolidating a 405B model of 512 ranks costs.

    python benchmarks/consolidate_405b.py FOLDER

It makes a dry run on synthetic headers, and one real task of it. It writes the files that ZeRO-3 on 512 ranks would
leave for Llama 3.1 405B, with holes in the place of the weights: 4.9 TB that take a few MB. Every header is real, so
the plan is; the task reads zeros out of the holes and writes real files.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

WORLD_SIZE = 512
VOCAB, HIDDEN, LAYERS, KEYS, INNER = 128_256, 16_384, 126, 1024, 53_248


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every parameter of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for part, size in (("q", HIDDEN), ("k", KEYS), ("v", KEYS), ("o", HIDDEN)):
            found[f"{name}.self_attn.{part}_proj.weight"] = (size, HIDDEN)
        found |= {f"{name}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{name}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{name}.{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write(path: Path) -> None:
    """Write all ranks' files, their storages left out."""
    tag = path / "global_step1"
    tag.mkdir(parents=True)
    (path / "latest").write_text("global_step1")
    sizes = {name: torch.Size(shape) for name, shape in shapes().items()}
    num_elements = sum(-(-size.numel() // WORLD_SIZE) for size in sizes.values())
    model = {
        "module": {name: torch.empty(0) for name in sizes},
        "buffer_names": [],
        "param_shapes": [sizes],
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    flat = [torch.empty(num_elements) for _ in range(3)]  # never touched, so it takes no memory
    inner = {
        "zero_stage": 3,
        "partition_count": WORLD_SIZE,
        "optimizer_state_dict": {"state": {0: {"step": 1, "exp_avg": flat[1], "exp_avg_sq": flat[2]}}},
        "fp32_flat_groups": [flat[0]],
    }
    for rank in range(WORLD_SIZE):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(model, tag / f"{name}_model_states.pt")
        with torch.serialization.skip_data():
            torch.save({"optimizer_state_dict": inner}, tag / f"bf16_{name}_optim_states.pt")


def measured(*arguments: str) -> None:
    """Run a command and print what it said and took."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", "-m", "sousbatch", "checkpoints", "consolidate", *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    took_s, peak_mb = time.monotonic() - started, after.ru_maxrss / 1000
    print(f"-> {took_s:.1f} s, {cpu_s:.1f} CPU s, peak {peak_mb:.0f} MB\n", flush=True)


def main(folder: Path) -> None:
    """Write, plan for three numbers of tasks, and do one task."""
    checkpoint, out = folder / "405b", folder / "out"
    if not checkpoint.exists():
        write(checkpoint)
    files = list(checkpoint.rglob("*"))
    num_bytes = sum(file.stat().st_size for file in files)
    print(f"{num_bytes / 1e12:.2f} TB in {len(files)} files, load {os.getloadavg()[0]:.1f}", flush=True)
    for options in ("--shard 0/1 --dry-run", "--shard 0/16 --dry-run", "--shard 0/191 --dry-run", "--shard 7/191"):
        choices = f"--dtype bfloat16 --workers 2 {options}"
        print(f"$ sousbatch checkpoints consolidate CKPT OUT {choices}", flush=True)
        measured(str(checkpoint), str(out), *choices.split())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
