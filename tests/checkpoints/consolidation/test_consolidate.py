"""A model folder appears whole, is DeepSpeed's byte for byte, and never holds a value that was not meant."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.consolidation import stream
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.manifest import Manifest, verify_manifest
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.tensors import Source
from sousbatch.errors import DamagedError, NotFoundError, RunError, UsageError
from sousbatch.files import TEMPORARY_PREFIX

Copied = Callable[[str], Path]
Poke = Callable[[Source, str, int, bytes], None]
Weights = Callable[[Path], dict[str, torch.Tensor]]
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("case", "limit", "max_shard_bytes"),
    [("z3_bf16", "5GB", 5_000_000_000), ("z3_bf16", "3KB", 3000), ("z3_bf16_3_ranks", "1KB", 1000)],
)
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_files_are_those_of_zero_to_torch_byte_for_byte(
    case: str, limit: str, max_shard_bytes: int, num_workers: int, cases: Path, tmp_path: Path
) -> None:
    source = open_source(cases / case / "ck")
    consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=max_shard_bytes, num_workers=num_workers))
    expected = {path.name: path.read_bytes() for path in (cases / case / f"zero_to_torch-{limit}").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del found["manifest.json"], found["README.md"]
    assert found == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_are_cast_from_the_masters(dtype: str, cases: Path, tmp_path: Path, weights: Weights) -> None:
    consolidate(open_source(cases / "z3_bf16" / "ck"), tmp_path / "out", ConsolidateOptions(dtype=dtype))  # type: ignore[arg-type]
    expected = weights(cases / "z3_bf16")  # deepspeed.safetensors, live.safetensors: the same tensors
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype)))


def test_from_pretrained_loads_the_folder(cases: Path, tmp_path: Path, weights: Weights) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = cases / "z3_bf16" / "ck"
    consolidate(open_source(checkpoint), tmp_path / "out", ConsolidateOptions(copy_from=checkpoint))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.float16
    assert not any(report.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    expected = weights(tmp_path / "out")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("is_tied", "names"), [(True, {"embed.weight"}), (False, {"embed.weight", "head.weight"})])
def test_shared_weights_are_stored_twice_only_where_loading_would_not_tie_them(
    is_tied: bool, names: set[str], cases: Path, tmp_path: Path, weights: Weights
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": is_tied}))
    consolidate(open_source(cases / "z3_tied" / "ck"), tmp_path / "out", ConsolidateOptions(copy_from=tmp_path))
    tensors = weights(tmp_path / "out")
    assert names == tensors.keys() & {"embed.weight", "head.weight"}
    assert all(torch.equal(tensors[name], tensors["embed.weight"]) for name in names)


def test_what_belongs_beside_the_weights_goes_along_and_nothing_else(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    config = {
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32"},
        "vision_config": {},
        "quantization_config": {"load_in_4bit": True},
    }
    model = model_dir({"a": torch.ones(2)}, config)
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "spiece.model",
        "optimizer.pt",
        "training_args.bin",
    ):
        (model / name).write_text(name)
    manifest = consolidate(open_source(model), tmp_path / "out", ConsolidateOptions(copy_from=model, dtype="bfloat16"))
    assert [file.name for file in manifest.weights] == ["model.safetensors"]
    assert [file.name for file in manifest.files] == [
        "README.md",
        "config.json",
        "generation_config.json",
        "spiece.model",
        "tokenizer.json",
    ]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {},
    }


def test_code_that_the_configuration_names_goes_along_with_what_it_imports(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = model_dir({"a": torch.ones(2)}, {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    for name in ("modeling_own.py", "helpers.py", "zero_to_fp32.py"):
        (model / name).write_text("")
    manifest = consolidate(open_source(model), tmp_path / "out", ConsolidateOptions(copy_from=model))
    assert [file.name for file in manifest.files if file.name.endswith(".py")] == ["helpers.py", "modeling_own.py"]


def test_a_folder_to_copy_from_without_a_configuration_is_refused(cases: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no config.json"):
        consolidate(open_source(cases / "z3_fp32" / "ck"), tmp_path / "out", ConsolidateOptions(copy_from=tmp_path))


@pytest.fixture
def overflowing(copied: Copied, poke: Poke) -> Source:
    source = open_source(copied("z3_fp32"))
    poke(source, "up.weight", 3, struct.pack("<f", 1e6))
    poke(source, "up.weight", 4, struct.pack("<f", -7e4))
    poke(source, "head.weight", 0, struct.pack("<f", 65520.0))
    return source


def test_values_beyond_fp16_are_refused_by_name_and_nothing_appears(overflowing: Source, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"beyond float16 in 'up.weight' \(2\), 'head.weight' \(1\); .*bfloat16"):
        consolidate(overflowing, tmp_path / "results" / "out")
    assert not list((tmp_path / "results").iterdir())


def test_values_beyond_fp16_are_clamped_when_asked(overflowing: Source, tmp_path: Path, weights: Weights) -> None:
    manifest = consolidate(overflowing, tmp_path / "out", ConsolidateOptions(overflow="clamp"))
    assert weights(tmp_path / "out")["up.weight"].flatten()[3:5].tolist() == [65504.0, -65504.0]
    assert manifest.num_overflowing == {"head.weight": 1, "up.weight": 2}


def test_a_model_beyond_fp16_falls_back_to_bfloat16_when_asked(
    overflowing: Source, tmp_path: Path, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = consolidate(overflowing, tmp_path / "out", ConsolidateOptions(overflow="bfloat16"))
    assert "writing bfloat16" in caplog.text
    assert manifest.dtype == "bfloat16" and manifest.num_overflowing == {"head.weight": 1, "up.weight": 2}
    assert weights(tmp_path / "out")["up.weight"].flatten()[3] == torch.tensor(1e6).bfloat16()
    assert verify_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("overflow", ["refuse", "clamp", "bfloat16"])
def test_nan_and_infinity_are_refused_by_name_and_step(
    value: float, overflow: str, copied: Copied, poke: Poke, tmp_path: Path
) -> None:
    source = open_source(copied("z3_fp32"))
    poke(source, "down.weight", 2, struct.pack("<f", value))
    with pytest.raises(RunError, match=r"NaN or infinite values in 'down.weight' \(1\).*diverged by step 1"):
        consolidate(source, tmp_path / "out", ConsolidateOptions(overflow=overflow))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["z1_3_ranks", "z2_round_robin"])
def test_masters_that_are_not_what_the_model_trained_with_are_refused(
    case: str, copied: Copied, poke: Poke, tmp_path: Path
) -> None:
    source = open_source(copied(case))
    poke(source, "up.weight", 0, struct.pack("<f", 1.5))
    with pytest.raises(DamagedError, match="master weights of 'up.weight' are not those that the model trained with"):
        consolidate(source, tmp_path / "out")


def test_files_follow_the_umask(cases: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        consolidate(
            open_source(cases / "z3_bf16" / "ck"),
            tmp_path / "out",
            ConsolidateOptions(copy_from=cases / "z3_bf16" / "ck"),
        )
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_was_interrupted_before_its_first_shard_leaves_nothing(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(cases / "z3_fp32" / "ck")
    monkeypatch.setattr(stream, "cast_block", interrupt)
    with pytest.raises(KeyboardInterrupt):
        consolidate(source, tmp_path / "results" / "out")
    assert not list((tmp_path / "results").iterdir())


def test_what_was_interrupted_goes_on_at_the_shard_where_it_stood(cases: Path, tmp_path: Path) -> None:
    source, seen = open_source(cases / "z3_bf16" / "ck"), []

    def stop_at_half(done: int, total: int) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=1000), progress=stop_at_half)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-out.part"]
    written = {path.name: path.stat() for path in (tmp_path / ".tmp-out.part" / "model").glob("model-*.safetensors")}
    assert written
    consolidate(
        source,
        tmp_path / "out",
        ConsolidateOptions(max_shard_bytes=1000),
        progress=lambda done, total: seen.append(done),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert seen[0] > sum(stat.st_size for stat in written.values()) // 2
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == stat.st_mtime_ns for name, stat in written.items())
    consolidate(source, tmp_path / "in one go", ConsolidateOptions(max_shard_bytes=1000))
    assert contents(tmp_path / "out") == contents(tmp_path / "in one go")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_choices_do_not_go_on_with_what_is_there(cases: Path, tmp_path: Path, weights: Weights) -> None:
    source = open_source(cases / "z3_bf16" / "ck")
    with pytest.raises(KeyboardInterrupt):
        consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=3000), before_commit=interrupt)
    consolidate(source, tmp_path / "out", ConsolidateOptions(max_shard_bytes=3000, dtype="bfloat16"))
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_changed_checkpoint_is_not_mixed_with_what_is_there(copied: Copied, poke: Poke, tmp_path: Path) -> None:
    path = copied("z3_bf16")
    with pytest.raises(KeyboardInterrupt):
        consolidate(
            open_source(path), tmp_path / "out", ConsolidateOptions(max_shard_bytes=3000), before_commit=interrupt
        )
    for file in (path / "global_step1").glob("*_optim_states.pt"):
        state = torch.load(file, weights_only=False)
        for group in state["optimizer_state_dict"]["fp32_flat_groups"]:
            group.data.mul_(0.5)
        torch.save(state, file)
    consolidate(open_source(path), tmp_path / "out", ConsolidateOptions(max_shard_bytes=3000))
    consolidate(open_source(path), tmp_path / "again", ConsolidateOptions(max_shard_bytes=3000))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_parts_written_apart_in_any_order_are_the_model_of_one_go(cases: Path, tmp_path: Path) -> None:
    source, options = open_source(cases / "z3_bf16" / "ck"), ConsolidateOptions(max_shard_bytes=1000)
    for part in (2, 0, 0):
        assert consolidate(source, tmp_path / "out", options, part=part, num_parts=3) is None
        assert (tmp_path / ".tmp-out.part" / "model" / "model.safetensors.index.json").is_file()
        assert not (tmp_path / "out").exists()
    manifest = consolidate(source, tmp_path / "out", options, part=1, num_parts=3)
    assert manifest == consolidate(source, tmp_path / "out", options, part=2, num_parts=3)  # a requeued task
    assert manifest == consolidate(source, tmp_path / "whole", ConsolidateOptions(max_shard_bytes=1000))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_twins_at_the_same_part_do_no_harm(cases: Path, tmp_path: Path) -> None:
    source, options = open_source(cases / "z3_bf16" / "ck"), ConsolidateOptions(max_shard_bytes=2000)

    def run(part: int) -> Manifest | None:
        return consolidate(source, tmp_path / "out", options, part=part, num_parts=2)

    with ThreadPoolExecutor(8) as pool:
        assert any(pool.map(run, [0, 1] * 4))
    assert verify_manifest(tmp_path / "out") == consolidate(
        source, tmp_path / "whole", ConsolidateOptions(max_shard_bytes=2000)
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_cannot_turn_to_bfloat16_alone(cases: Path, tmp_path: Path) -> None:
    source, options = open_source(cases / "z3_bf16" / "ck"), ConsolidateOptions(overflow="bfloat16")
    with pytest.raises(UsageError, match="cannot turn to bfloat16 alone; choose dtype bfloat16"):
        consolidate(source, tmp_path / "out", options, part=0, num_parts=2)


def test_a_part_that_overflows_is_refused_by_itself(overflowing: Source, tmp_path: Path) -> None:
    options = ConsolidateOptions(max_shard_bytes=300)
    refused = 0
    for part in range(3):
        try:
            consolidate(overflowing, tmp_path / "out", options, part=part, num_parts=3)
        except RunError as error:
            assert "beyond float16" in str(error)
            refused += 1
    assert refused and not (tmp_path / "out").exists()


def test_a_killed_consolidation_leaves_only_temporary_names(cases: Path, tmp_path: Path, run_python: Python) -> None:
    code = (
        "import os; from pathlib import Path; from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate\n"
        f"source = detect.open_source(Path({str(cases / 'z3_fp32' / 'ck')!r}))\n"
        f"out = Path({str(tmp_path / 'results' / 'out')!r})\n"
        "consolidate.consolidate(source, out, before_commit=lambda: os._exit(9))"
    )
    assert run_python(code).returncode == 9
    left = [path.name for path in (tmp_path / "results").iterdir()]
    assert left and all(name.startswith(TEMPORARY_PREFIX) for name in left)


def test_progress_counts_up_to_all_bytes(cases: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    consolidate(
        open_source(cases / "z3_bf16" / "ck"),
        tmp_path / "out",
        ConsolidateOptions(max_shard_bytes=3000),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1] == (5634 * 2, 5634 * 2)


def test_a_taken_folder_is_refused_and_the_same_model_left_as_it_is(cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / "z3_fp32" / "ck")
    (tmp_path / "empty").mkdir()
    manifest = consolidate(source, tmp_path / "empty")
    before = (tmp_path / "empty" / "model.safetensors").stat()
    assert consolidate(source, tmp_path / "empty") == manifest
    assert (tmp_path / "empty" / "model.safetensors").stat() == before
    with pytest.raises(UsageError, match="holds another consolidated model already"):
        consolidate(source, tmp_path / "empty", ConsolidateOptions(dtype="bfloat16"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        consolidate(source, tmp_path / "mine")


def test_a_folder_that_appears_meanwhile_is_left_alone(cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / "z3_fp32" / "ck")

    def other() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes").touch()

    with pytest.raises(UsageError, match="appeared meanwhile"):
        consolidate(source, tmp_path / "out", before_commit=other)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]


def test_a_twin_that_ends_first_has_made_the_model(cases: Path, tmp_path: Path) -> None:
    source = open_source(cases / "z3_fp32" / "ck")
    manifest = consolidate(
        source, tmp_path / "out", before_commit=lambda: consolidate(source, tmp_path / "out") and None
    )
    assert verify_manifest(tmp_path / "out") == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_export_into_the_checkpoint_is_refused(cases: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").symlink_to(cases / "z3_fp32" / "ck")
    source = open_source(tmp_path / "checkpoint-7")
    with pytest.raises(UsageError, match="lies within the checkpoint .*checkpoint-7"):
        consolidate(source, tmp_path / "checkpoint-7" / "export")


def test_a_full_disk_is_known_before_a_byte_is_read(cases: Path, tmp_path: Path, run_python: Python) -> None:
    mount = f"mount -t tmpfs -o size=8k none '{tmp_path}' &&"
    if subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    code = (
        "import sys; from pathlib import Path; from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate\n"
        f"source = detect.open_source(Path({str(cases / 'z3_bf16' / 'ck')!r}))\n"
        "try:\n"
        f"    consolidate.consolidate(source, Path({str(tmp_path / 'out')!r}))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error.exit_code, 'torch' in sys.modules)\n"
        f"    print(list(Path({str(tmp_path)!r}).iterdir()))"
    )
    done = run_python(code, prefix=f"{mount}", wrap=("unshare", "-m"))
    assert done.stdout.split("\n")[:2] == ["NoRoomError 77 False", "[]"], done.stderr


def test_memory_does_not_grow_with_the_model(tmp_path: Path, run_python: Python) -> None:
    """A sparse 256 MB tensor of zeros; the limit is that of DESIGN.md: 25 MB, and 8 MB a worker."""
    header = b'{"x":{"dtype":"F32","shape":[64,1048576],"data_offsets":[0,268435456]}}'
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 268435456)
    code = (
        "import re; from pathlib import Path; import torch\n"
        "from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate\n"
        "status = Path('/proc/self/status')\n"
        "def anonymous(): return int(re.search(r'RssAnon:\\s+(\\d+)', status.read_text())[1])\n"
        "before, peak = anonymous(), []\n"
        f"source = detect.open_source(Path({str(tmp_path / 'model')!r}))\n"
        f"consolidate.consolidate(source, Path({str(tmp_path / 'out')!r}),\n"
        "    consolidate.ConsolidateOptions(num_workers=2), progress=lambda done, total: peak.append(anonymous()))\n"
        "print((max(peak) - before) // 1024)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 25 + 2 * 8, done.stderr
