"""`checkpoints consolidate` on the command line: parts, cost, adapters, URLs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.zero.cost import cost_of
from sousbatch.checkpoints.zero.read import open_source
from sousbatch.checkpoints.zero.work import Choices, shards_of
from sousbatch.cli import main

Weights = Callable[[Path], dict[str, torch.Tensor]]


def consolidate(*arguments: object) -> int:
    return main(["checkpoints", "consolidate", *map(str, arguments)])


def test_an_array_of_tasks_makes_the_model(cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("0/2", "1/2"):
        assert not (tmp_path / "out").exists()
        assert consolidate(cases / "z3_bf16" / "ck", tmp_path / "out", "--max-shard-gb", 3e-6, "--shard", part) == 0
    said = capsys.readouterr().out.splitlines()
    assert "part 0 of 2 is written, others are missing" in said[0]
    assert "5,634 parameters, float16" in said[1] and "values became zero" in said[1]
    assert (tmp_path / "out" / "config.json").is_file()
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_a_dry_run_says_what_it_costs_and_writes_nothing(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert consolidate(cases / "z3_bf16" / "ck", tmp_path / "out", "--dry-run", "--disk-gbs", 0.001) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == ["read", "write", "tasks", "memory", "time"]
    assert dict(lines)["read"] == "22.5 kB of 2 files"
    assert list(tmp_path.iterdir()) == []


def test_the_cost_is_what_is_read_and_written(cases: Path) -> None:
    shards = shards_of(open_source(cases / "z3_bf16_3_ranks" / "ck"), Choices(max_shard_bytes=800))
    cost = cost_of(shards, num_tasks=2, num_workers=3, bytes_per_second=1000)
    num_buffers = 8 + 3 + 5 * 4  # an int64, three flags, five floats
    assert cost.read_bytes == 998 * 4 + num_buffers
    assert cost.written_bytes == sum(shard.num_bytes for shard in shards)
    assert (cost.num_files, cost.num_tasks, cost.num_shards) == (4, 2, len(shards))
    assert cost.largest_task_bytes == cost.seconds * 1000
    assert cost_of(shards, num_tasks=99, num_workers=1, bytes_per_second=1).num_tasks == len(shards)


def test_an_adapter_is_kept_or_merged_into_the_base_that_the_checkpoint_holds(
    cases: Path, tmp_path: Path, weights: Weights
) -> None:
    """z3_lora_whole has its frozen base; z3_lora only the adapter, and peft's model of the same start beside it."""
    path = Path(shutil.copytree(cases / "z3_lora_whole" / "ck", tmp_path / "ck"))
    shutil.copy(cases / "z3_lora" / "ck" / "adapter_config.json", path)
    assert consolidate(path, tmp_path / "kept", "--adapter", "keep") == 0
    assert set(weights(tmp_path / "kept")) == set(weights(cases / "z3_lora" / "adapter"))
    assert consolidate(path, tmp_path / "merged", "--adapter", "merge", "--dtype", "float32", "--verify") == 0
    merged, base = weights(tmp_path / "merged"), weights(cases / "z3_lora" / "base")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.allclose(merged[name], base[name], atol=1e-2)}
    assert changed and all("q_proj" in name or "down_proj" in name or "lm_head" in name for name in changed)


def test_the_base_is_found_by_the_name_in_the_adapters_configuration(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(shutil.copytree(cases / "z3_lora" / "adapter", tmp_path / "adapter"))
    config = (adapter / "adapter_config.json").read_text()
    base = cases / "z3_lora" / "base"
    named = config.replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
    (adapter / "adapter_config.json").write_text(named)
    if named == config:
        pytest.skip("this peft names no base")
    assert consolidate(adapter, tmp_path / "out", "--adapter", "merge") == 0
    (adapter / "adapter_config.json").write_text(named.replace(str(base), "org/model-on-a-hub"))
    assert consolidate(adapter, tmp_path / "other", "--adapter", "merge") == 2
    assert "'org/model-on-a-hub' is not a folder here; name the base's folder" in capsys.readouterr().err


def test_a_url_is_a_place_to_write_to(cases: Path, tmp_path: Path) -> None:
    import fsspec

    assert consolidate(cases / "z3_bf16" / "ck", "memory://models/one") == 0
    assert consolidate(cases / "z3_bf16" / "ck", tmp_path / "here") == 0
    fs = fsspec.filesystem("memory")
    stored = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.ls("/models/one", detail=False)}
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
