"""`checkpoints consolidate` on the command line: parts, cost, adapters, URLs, and what it says of mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from sousbatch.checkpoints.consolidation import stream
from sousbatch.checkpoints.consolidation.cost import estimate_cost
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.consolidation.plan import plan_output
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.cli.main import main

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
    shards = plan_output(open_source(cases / "z3_bf16_3_ranks" / "ck"), ConsolidateOptions(max_shard_bytes=800))
    cost = estimate_cost(shards, num_tasks=2, num_workers=3, bytes_per_second=1000)
    num_buffers = 8 + 3 + 5 * 4  # an int64, three flags, five floats
    assert cost.read_bytes == 998 * 4 + num_buffers
    assert cost.written_bytes == sum(shard.num_bytes for shard in shards)
    assert (cost.num_files, cost.num_tasks, cost.num_shards) == (4, 2, len(shards))
    assert cost.largest_task_bytes == cost.seconds * 1000
    assert estimate_cost(shards, num_tasks=99, num_workers=1, bytes_per_second=1).num_tasks == len(shards)


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
    assert (
        "'org/model-on-a-hub' is not a folder here; name the folder of the base with --base DIR"
        in capsys.readouterr().err
    )


class Bucket(MemoryFileSystem):
    """A store that outlives the command, as far as the command knows."""

    protocol = "bucket"
    store: ClassVar[dict[str, object]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("bucket://")))


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    yield fsspec.filesystem("bucket")
    Bucket.store.clear()


def test_a_url_is_a_place_to_write_to(cases: Path, tmp_path: Path, bucket: Bucket) -> None:
    assert consolidate(cases / "z3_bf16" / "ck", "bucket://models/one") == 0
    assert consolidate(cases / "z3_bf16" / "ck", tmp_path / "here") == 0
    stored = {path.rpartition("/")[2]: bucket.cat_file(path) for path in bucket.ls("/models/one", detail=False)}
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}


def test_memory_is_no_place_to_write_to(model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert consolidate(model_dir({"a": torch.ones(2)}), "memory://models/one") == 2
    assert "memory://models/one: would be gone when this command ends" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("damage", "options"), [(Path.unlink, []), (cut, []), (cut, ["--verify"]), (flip, ["--verify"])]
)
def test_the_model_that_is_there_already_is_compared_with_its_manifest(
    damage: Callable[[Path], None],
    options: list[str],
    name: str,
    model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = [model_dir({"a": torch.ones(2)}, {"hidden_size": 2}), tmp_path / "out", *options]
    assert (consolidate(*again), consolidate(*again)) == (0, 0)
    assert [": exists already: 2 parameters" in line for line in capsys.readouterr().out.splitlines()] == [
        False,
        True,
    ]
    damage(tmp_path / "out" / name)
    assert consolidate(*again) == 1
    printed = capsys.readouterr()
    assert f"out: is not what manifest.json says ({name} " in printed.err and not printed.out
    assert "/out and consolidate again" in printed.err


def test_a_url_that_has_the_model_already_is_compared_too(
    model_dir: Callable[..., Path], bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [model_dir({"a": torch.ones(2)}), "bucket://models/two", "--verify"]
    assert (consolidate(*again), consolidate(*again)) == (0, 0)
    data = bucket.cat_file("/models/two/model.safetensors")
    bucket.pipe_file("/models/two/model.safetensors", data[:-1] + b"!")
    assert consolidate(*again) == 1
    assert "(model.safetensors has other bytes in 'a')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "config", "options", "said"),
    [
        ([1e6, -7e4, 1.0], {}, ["--overflow", "clamp"], "2 values were clamped"),
        ([1.0], None, [], "warning: no config.json lies beside"),
        ([1.0], None, ["--adapter", "merge"], "is a complete model, not an adapter; there is nothing to merge"),
        ([float("nan")], {}, [], "NaN or infinite values in 'a' (1); the training had diverged, use an older"),
    ],
)
def test_what_a_model_lost_or_lacks_is_said(
    values: list[float],
    config: dict[str, object] | None,
    options: list[str],
    said: str,
    model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    consolidate(model_dir({"a": torch.tensor(values)}, config), tmp_path / "out", *options)
    printed = "".join(capsys.readouterr())
    assert said in printed and "Traceback" not in printed
    assert ("--copy-from" in printed) == (config is None and not options)


def test_a_part_does_not_throw_away_what_others_made_with_other_choices(
    model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_dir({"a": torch.ones(9), "b": torch.ones(9)}, {})
    apart = [model, tmp_path / "out", "--max-shard-gb", 2e-8, "--shard"]
    assert consolidate(*apart, "0/2") == 0
    assert consolidate(*apart, "1/2", "--dtype", "bfloat16") == 2
    assert f"wait in {tmp_path}/.tmp-out.part; use those options, or remove" in capsys.readouterr().err
    assert consolidate(*apart, "1/2") == 0 and (tmp_path / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("out", ["/proc/none", "{}/file/out"])
def test_a_place_that_cannot_be_written_is_named_as_it_was_given(
    out: str, model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert consolidate(model_dir({"a": torch.ones(2)}), out.format(tmp_path)) == 2
    said = capsys.readouterr().err
    assert f"sousbatch: {out.format(tmp_path)}: cannot be made (" in said and ".tmp-" not in said


@pytest.mark.parametrize(("checkpoint", "out"), [("model", "model/export"), ("model", "link/x"), ("link", "model/x")])
def test_a_model_within_its_checkpoint_is_refused_by_whatever_way(
    checkpoint: str, out: str, model_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(model_dir({"a": torch.ones(2)}))
    assert consolidate(tmp_path / checkpoint, tmp_path / out) == 2
    assert f"{out}: lies within the checkpoint" in capsys.readouterr().err


def test_an_interrupted_consolidation_says_how_it_goes_on(
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "cast_block", interrupt)
    assert consolidate(model_dir({"a": torch.ones(2)}), tmp_path / "out") == 130
    assert "interrupted; the same command resumes it" in capsys.readouterr().err
