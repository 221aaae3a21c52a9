"""The kind of a given folder is found, or the refusal says what would be right."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, IncompleteError, NotFoundError, UsageError


def test_a_tag_is_found_from_every_folder_that_leads_to_it(copied: Callable[[str], Path]) -> None:
    path = copied("z3_fp32")
    by_latest = open_source(path)
    by_tag = open_source(path / "global_step1")
    (path / "latest").unlink()
    by_only_tag = open_source(path)
    assert by_latest == by_tag == by_only_tag


def test_several_tags_without_latest_must_be_chosen_from(copied: Callable[[str], Path]) -> None:
    path = copied("z3_fp32")
    (path / "latest").unlink()
    shutil.copytree(path / "global_step1", path / "global_step2")
    with pytest.raises(UsageError, match="has no `latest`; give one of .*global_step1, .*global_step2"):
        open_source(path)


def test_a_latest_that_points_nowhere_is_damaged(copied: Callable[[str], Path]) -> None:
    path = copied("z3_fp32")
    (path / "latest").write_text("global_step9")
    with pytest.raises(DamagedError, match="names 'global_step9', which is not there; give one of .*global_step1"):
        open_source(path)


def test_zero_shards_are_taken_before_a_16_bit_model_beside_them(copied: Callable[[str], Path]) -> None:
    path = copied("z3_fp32")
    save_file({"x": torch.zeros(2)}, path / "model.safetensors")
    assert open_source(path).zero_stage == 3


def test_a_hugging_face_folder_is_a_model(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(4).bfloat16()}, tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 40}))
    source = open_source(tmp_path)
    assert (source.content, source.zero_stage, source.step) == ("model", None, 40)
    assert {(tensor.name, tensor.shape, tensor.dtype) for tensor in source.tensors} == {
        ("b", (2, 3), "float32"),
        ("a", (4,), "bfloat16"),
    }


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for name, file in weight_map.items():
        save_file({name: torch.zeros(2)}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert [tensor.name for tensor in open_source(tmp_path).tensors] == ["a", "b"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "c": weight_map["a"]}}))
    with pytest.raises(DamagedError, match="names 'c', which model-00001-of-00002.safetensors does not hold"):
        open_source(tmp_path)
    (tmp_path / weight_map["b"]).unlink()
    with pytest.raises(IncompleteError, match="model-00002-of-00002.safetensors: missing"):
        open_source(tmp_path)


def test_a_cut_off_safetensors_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)
    with pytest.raises(DamagedError, match="model.safetensors: cut off"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model_fsdp.bin", "save_pretrained"),
    ],
)
def test_a_third_party_checkpoint_is_refused_with_the_way_out(tmp_path: Path, name: str, advice: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=advice):
        open_source(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no checkpoint; known: DeepSpeed"):
        open_source(tmp_path)
    with pytest.raises(NotFoundError, match="no such folder"):
        open_source(tmp_path / "nowhere")


def test_reading_imports_no_framework(cases: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys; from pathlib import Path; from sousbatch.checkpoints.formats import detect\n"
        "from sousbatch.checkpoints.consolidation import consolidate, stream\n"
        f"[detect.open_source(path / 'ck') for path in Path({str(cases)!r}).glob('z*')]\n"
        "print({'torch', 'deepspeed', 'safetensors', 'transformers', 'peft'} & set(sys.modules))"
    )
    assert run_python(code).stdout.strip() == "set()"


def test_a_pickled_model_is_a_model(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "tied": weight}, tmp_path / "pytorch_model.bin")
    (tensor,) = open_source(tmp_path).tensors
    (segment,) = tensor.segments
    assert (tensor.name, tensor.shape, tensor.dtype) == ("a", (2, 3), "float32")
    content = (tmp_path / "pytorch_model.bin").read_bytes()[segment.offset_bytes :]
    assert content.startswith(weight.numpy().tobytes())
