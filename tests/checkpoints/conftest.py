"""Checkpoints written by hand, for tests that damage them, and a place where thousands of syncs are cheap."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest


@pytest.fixture
def memory_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs cost nothing there."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=shm if os.access(shm, os.W_OK) else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def write_zero3() -> Callable[..., Path]:
    """Write a ZeRO-3 checkpoint as DeepSpeed does, of any number of ranks, and what it must convert to."""

    def write(path: Path, *, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> Path:
        import torch

        tag = path / "global_step1"
        tag.mkdir(parents=True)
        (path / "latest").write_text("global_step1")
        torch.manual_seed(0)
        weights = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
        parts: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
        for tensor in weights.values():
            size = -(-tensor.numel() // world_size)
            padded = torch.nn.functional.pad(tensor.flatten(), (0, size * world_size - tensor.numel()))
            for rank in range(world_size):
                parts[rank].append(padded[rank * size : (rank + 1) * size])
        model = {
            "module": {name: torch.empty(0) for name in shapes},
            "buffer_names": [],
            "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
            "frozen_param_fragments": {},
            "shared_params": {},
            "global_steps": 1,
            "ds_version": "0.19.8",
        }
        for rank, pieces in enumerate(parts):
            flat = torch.cat(pieces)
            moments = {"step": torch.tensor(1.0), "exp_avg": flat * 0.1, "exp_avg_sq": flat**2}
            inner = {
                "zero_stage": 3,
                "partition_count": world_size,
                "optimizer_state_dict": {"state": {0: moments}, "param_groups": []},
                "fp32_flat_groups": [flat],
            }
            name = f"zero_pp_rank_{rank}_mp_rank_00"
            torch.save({"optimizer_state_dict": inner, "ds_config": {}}, tag / f"{name}_optim_states.pt")
            torch.save(model, tag / f"{name}_model_states.pt")
        torch.save(weights, path / "expected.pt")
        return path

    return write
