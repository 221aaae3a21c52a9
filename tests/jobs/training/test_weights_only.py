"""A save of the weights alone: what is written, in which dtype, and in how many files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from sousbatch.jobs.training.engines import ddp
from sousbatch.jobs.training.weights_only import largest_weight, safe_dtype, write_weights


class Model(torch.nn.Module):
    """Two layers, a buffer that belongs to the model, and one that a loaded model computes itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(rows))


def trainer_of(model: torch.nn.Module) -> Any:
    return SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda given: given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_that_a_loaded_model_needs_is_written_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    model = Model()
    write_weights(ddp, trainer_of(model), tmp_path, dtype, 10**9, is_writer=True)
    found, wanted = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys() and "cache" not in found
    assert all(torch.equal(value, wanted[name].to(getattr(torch, dtype))) for name, value in found.items())


def test_large_weights_are_spread_over_files_with_an_index(tmp_path: Path) -> None:
    model = Model()
    write_weights(ddp, trainer_of(model), tmp_path, "float32", 300, is_writer=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == model.state_dict().keys() and len(set(index.values())) > 1
    for name, value in model.state_dict().items():
        assert torch.equal(load_file(tmp_path / index[name])[name], value)


def test_of_an_adapters_model_only_the_adapter_is_written(tmp_path: Path) -> None:
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["first"]))
    write_weights(ddp, trainer_of(model), tmp_path, "float32", 10**9, is_writer=True)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == {f"base_model.model.first.lora_{side}.weight" for side in "AB"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_rank_that_does_not_write_gathers_all_the_same_and_leaves_nothing(tmp_path: Path) -> None:
    gathered = []

    def noted(trainer: Any, named: Any) -> Any:
        for name, value in ddp.gathered(trainer, named):
            gathered.append(name)
            yield name, value

    engine: Any = SimpleNamespace(**vars(ddp) | {"gathered": noted})
    write_weights(engine, trainer_of(Model()), tmp_path, "float32", 10**9, is_writer=False)
    assert len(gathered) == 4 and list(tmp_path.iterdir()) == []
    gathered.clear()
    with pytest.raises(OSError):  # a writer that fails takes part to the end too: the others wait in the next gathering
        write_weights(engine, trainer_of(Model()), tmp_path / "missing", "float32", 10**9, is_writer=True)
    assert len(gathered) == 4


@pytest.mark.parametrize(
    ("dtype", "largest", "expected"),
    [
        ("float16", 64_999.0, "float16"),
        ("float16", 65_001.0, "bfloat16"),
        ("bfloat16", 1e30, "bfloat16"),
        ("float32", 1e30, "float32"),
    ],
)
def test_weights_beyond_float16_are_kept_in_bfloat16(dtype: str, largest: float, expected: str) -> None:
    assert safe_dtype(dtype, largest) == expected


def test_the_largest_weight_is_that_of_what_trains() -> None:
    model = Model()
    with torch.no_grad():
        model.first.weight[0, 0], model.second.bias[0] = -7.0, 5.0
    assert largest_weight(ddp, trainer_of(model)) == 7.0
    model.first.weight.requires_grad_(False)
    assert largest_weight(ddp, trainer_of(model)) == 5.0
