"""LoRA adapters are exported as peft saves them and merged as peft merges them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.lora import merge_adapter
from sousbatch.errors import NotFoundError, UsageError

Weights = Callable[[Path], dict[str, torch.Tensor]]
FACTORS = {"A": (2, 64), "B": (64, 2)}


def test_a_zero_checkpoint_of_an_adapter_becomes_pefts_own_file(cases: Path, tmp_path: Path, weights: Weights) -> None:
    manifest = consolidate(
        open_source(cases / "z3_lora" / "ck"), tmp_path / "out", ConsolidateOptions(dtype="float32", max_shard_bytes=1)
    )
    ours, pefts = weights(tmp_path / "out"), weights(cases / "z3_lora" / "adapter")
    assert manifest.content == "adapter"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"}
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name].float()) for name in pefts)


def test_the_adapter_alone_is_taken_where_its_frozen_base_was_saved_too(
    cases: Path, tmp_path: Path, weights: Weights, oracle: Callable[..., dict[str, torch.Tensor]]
) -> None:
    source = open_source(cases / "z2_lora" / "ck")
    config = {"peft_type": "LORA"}
    consolidate(dataclasses.replace(source, adapter_config=config), tmp_path / "out")
    live = {name.replace(".default", ""): tensor for name, tensor in oracle("z2_lora", "live").items()}
    ours = weights(tmp_path / "out")
    assert ours.keys() == weights(cases / "z3_lora" / "adapter").keys()
    head = ours.pop("base_model.model.lm_head.weight")
    assert torch.equal(head, live["base_model.model.lm_head.modules_to_save.weight"])
    assert all(torch.equal(tensor, live[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("case", "folder"), [("z3_lora", "ck"), ("z3_lora", "adapter"), ("conv1d", "adapter")])
def test_merging_equals_peft_up_to_rounding(
    case: str, folder: str, cases: Path, tmp_path: Path, weights: Weights
) -> None:
    root = cases / case
    adapter = open_source(root / folder)
    manifest = consolidate(adapter, tmp_path / "f32", ConsolidateOptions(base_dir=root / "base", dtype="float32"))
    consolidate(adapter, tmp_path / "f16", ConsolidateOptions(base_dir=root / "base"))
    expected, ours, half = weights(root / "merged"), weights(tmp_path / "f32"), weights(tmp_path / "f16")
    assert manifest.content == "model"
    assert expected.keys() == ours.keys() == half.keys()
    base = weights(root / "base")
    assert any(not torch.equal(ours[name], base[name]) for name in base)
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)
        assert torch.equal(half[name], ours[name].half())


def test_a_merged_model_takes_from_its_base_what_the_checkpoint_lacks(cases: Path, tmp_path: Path) -> None:
    root = cases / "z3_lora"
    shutil.copytree(root / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("of the adapter")
    consolidate(
        open_source(tmp_path / "adapter"),
        tmp_path / "out",
        ConsolidateOptions(base_dir=root / "base", copy_from=tmp_path / "adapter"),
    )
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"README.md"}
    assert names == {"config.json", "generation_config.json", "manifest.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_a_layer_of_small_weights_is_merged_and_verified(tmp_path: Path, weights: Weights) -> None:
    """float16 keeps numbers next to 0 in steps that are large beside them."""
    from safetensors.torch import save_file

    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    torch.manual_seed(0)
    base = 0.004 * torch.randn(64, 64)
    save_file({"up.weight": base}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    names = {f"base_model.model.up.lora_{one}.weight": 0.01 * torch.ones(shape) for one, shape in FACTORS.items()}
    save_file(names, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    options = ConsolidateOptions(base_dir=tmp_path / "base", is_verified=True)
    assert consolidate(open_source(tmp_path / "adapter"), tmp_path / "out", options)
    assert torch.allclose(weights(tmp_path / "out")["up.weight"].float(), base + 2e-4, atol=2**-24, rtol=2**-10)


def test_a_large_weight_is_merged_in_blocks_of_whole_rows(tmp_path: Path, weights: Weights) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(3)
    base, a, b = torch.randn(1100, 1999), torch.randn(4, 1999), torch.randn(1100, 4)
    for folder in ("base", "adapter"):
        (tmp_path / folder).mkdir()
    save_file({"up.weight": base.bfloat16()}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    names = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    save_file(names, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 2}))
    consolidate(
        open_source(tmp_path / "adapter"),
        tmp_path / "out",
        ConsolidateOptions(base_dir=tmp_path / "base", dtype="float32"),
    )
    torch.testing.assert_close(weights(tmp_path / "out")["up.weight"], base.bfloat16() + 0.5 * (b @ a))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("init_lora_weights", "pissa"),
        ("some_later_option", {"a": 1}),
    ],
)
def test_an_option_that_a_sum_does_not_cover_is_refused_with_advice(option: str, value: Any, cases: Path) -> None:
    adapter, base = open_source(cases / "z3_lora" / "adapter"), open_source(cases / "z3_lora" / "base")
    assert adapter.adapter_config is not None
    with pytest.raises(UsageError, match=f"{option}=.*merge_and_unload"):
        merge_adapter(adapter, base, {**adapter.adapter_config, option: value})


def test_a_base_that_the_adapter_does_not_fit_is_refused(cases: Path) -> None:
    adapter, base = open_source(cases / "z3_lora" / "adapter"), open_source(cases / "z3_lora" / "base")
    other = dataclasses.replace(base, tensors=base.tensors[1:])
    turned = tuple(dataclasses.replace(tensor, shape=tensor.shape[::-1]) for tensor in base.tensors)
    config = adapter.adapter_config or {}
    with pytest.raises(UsageError, match="has no 'lm_head.weight', which the adapter changes"):
        merge_adapter(adapter, other, config)
    with pytest.raises(UsageError, match="give the base that it was trained on"):
        merge_adapter(adapter, dataclasses.replace(base, tensors=turned), config)


def test_an_adapter_without_its_configuration_is_refused(copied: Callable[[str], Path], cases: Path) -> None:
    path = copied("z3_lora")
    (path / "adapter_config.json").unlink()
    for base in (None, cases / "z3_lora" / "base"):
        with pytest.raises(NotFoundError, match="has no adapter_config.json beside it"):
            consolidate(open_source(path), path.parent / "out", ConsolidateOptions(base_dir=base))


def test_a_whole_model_is_not_merged_into_a_base(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a complete model, not an adapter"):
        consolidate(
            open_source(cases / "z3_bf16" / "ck"),
            tmp_path / "out",
            ConsolidateOptions(base_dir=cases / "z3_lora" / "base"),
        )


def test_weights_trained_beside_the_adapter_are_not_dropped(copied: Callable[[str], Path]) -> None:
    path = copied("z3_lora")
    for file in (path / "global_step1").glob("*_model_states.pt"):
        state = torch.load(file, weights_only=False)
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
        state["param_shapes"] = [
            {key.replace(name, "base_model.model.model.norm.weight"): shape for key, shape in group.items()}
            for group in state["param_shapes"]
        ]
        state["module"].pop(name)
        torch.save(state, file)
    with pytest.raises(UsageError, match="'base_model.model.model.norm.weight' is trained beside"):
        open_source(path)


def test_an_adapter_config_is_found_beside_the_tag(copied: Callable[[str], Path]) -> None:
    path = copied("z3_lora")
    assert (open_source(path / "global_step1").adapter_config or {})["r"] == 3
    shutil.rmtree(path)
