"""What training loops save beside or around their model never becomes weights, and no model loads with random ones.

`cases/loops` has one Llama that FSDP shards over three ranks, saved as torch's tutorial, as plain loops, torchtitan and
torch's safetensors writers do; `cases/accelerate` a peft model's `save_state`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sousbatch.checkpoints.consolidation import model_names
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.formats.tensors import Source
from sousbatch.cli.main import main
from sousbatch.errors import IncompleteError, UsageError

Weights = Callable[[Path], dict[str, torch.Tensor]]
LOOPS = ("tutorial", "state_dicts", "lightning", "titan", "safetensors", "hf_shards")


@pytest.fixture
def _asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask transformers in this process, which has imported it already."""

    def answer(question: Mapping[str, Any]) -> Any:
        return json.loads(json.dumps(model_names._answer(dict(question["config"]), question["names"])))

    monkeypatch.setattr(model_names, "_asked", answer)


def convert(*arguments: object) -> int:
    return main(["checkpoints", "consolidate", *map(str, arguments)])


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Load a model as a user does; nothing in it may be newly initialised."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return dict(model.state_dict())


@pytest.mark.usefixtures("_asked_here")
@pytest.mark.parametrize("loop", LOOPS)
def test_what_a_training_loop_saved_loads_with_the_bits_that_it_had(loop: str, cases: Path, tmp_path: Path) -> None:
    assert convert(cases / "loops" / loop, tmp_path / "out", "--dtype", "float32", "--verify") == 0
    expected, found = load_file(cases / "loops" / "live.safetensors"), loaded(tmp_path / "out")
    assert found.keys() == expected.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("loop", LOOPS)
def test_without_a_config_only_the_models_part_is_taken(
    loop: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(cases / "loops" / loop, tmp_path / "ck"))
    (path / "config.json").unlink()
    assert convert(path, tmp_path / "out", "--dtype", "float32") == 0
    said = capsys.readouterr().err
    assert "no config.json lies beside" in said and "the names of the weights were not compared" in said
    expected = load_file(cases / "loops" / "live.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.removeprefix("net.") for name in found} == expected.keys()


def test_names_are_compared_by_transformers_in_a_process_of_its_own_and_once(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    path = Path(shutil.copytree(cases / "loops" / "tutorial", tmp_path / "ck"))
    assert convert(path, tmp_path / "out") == 0
    monkeypatch.setattr(model_names.subprocess, "run", None)
    assert convert(path, tmp_path / "again") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_process_that_fails_and_a_cache_that_is_none_stop_nothing(
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "file" / "cache"))
    path = cases / "loops" / "tutorial"
    config = json.loads((path / "config.json").read_text())
    with monkeypatch.context() as patched:
        patched.setattr(model_names.sys, "executable", "/bin/false")
        assert fitted(open_source(path), config)
    assert "were not compared: transformers could not build the model of config.json (no reason given" in caplog.text
    monkeypatch.setattr(model_names, "_asked", lambda question: {"fits": [""]})
    assert fitted(open_source(path), config)


def model_of(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def llama(cases: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    config = json.loads((cases / "loops" / "titan" / "config.json").read_text())
    return load_file(cases / "loops" / "live.safetensors"), config


def fitted(source: Source, config: Mapping[str, Any]) -> set[str]:
    return {tensor.name for tensor in model_names.fitted(source, config).tensors}


@pytest.mark.usefixtures("_asked_here")
@pytest.mark.parametrize(
    ("wrap", "change", "said"),
    [
        (lambda name: f"module.{name}", {}, None),
        (lambda name: f"student.net.{name}", {}, None),
        (lambda name: f"module.{name}", {"architectures": None}, None),
        (lambda name: name, {"auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"}}, "code of its own"),
        (lambda name: name, {"architectures": ["LaterForCausalLM"]}, "does not know 'LaterForCausalLM'"),
        (lambda name: name, {"architectures": None, "model_type": ""}, "config.json names no architecture"),
    ],
)
def test_a_wrapper_around_the_model_is_found_and_what_cannot_be_compared_is_said(
    wrap: Callable[[str], str],
    change: Mapping[str, Any],
    said: str | None,
    llama: tuple[dict[str, torch.Tensor], dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tensors, config = llama
    folder = model_of(tmp_path / "m", {wrap(name): tensor for name, tensor in tensors.items()}, {**config, **change})
    assert fitted(open_source(folder), {**config, **change}) == tensors.keys()
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


@pytest.mark.usefixtures("_asked_here")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: {f"x{name}": tensor for name, tensor in tensors.items()},
            "lacks 21 of the 21 weights of LlamaForCausalLM, which config.json names, so they would be random: "
            "lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ...; it holds instead "
            "21 others: xlm_head.weight",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if "norm.weight" not in name},
            "lacks 5 of the 21 weights",
        ),
        (
            lambda tensors: {**tensors, "model.norm.weight": torch.ones(19)},
            r"model.norm.weight is \[19\], expected \[18\]",
        ),
        (
            lambda tensors: {f"{part}.{name}": tensor.clone() for part in "ab" for name, tensor in tensors.items()},
            "holds several models of LlamaForCausalLM, below 'a.' and 'b.'",
        ),
        (lambda tensors: {"tok_embeddings.weight": torch.ones(2)}, "look like torchtitan's names"),
    ],
)
def test_a_model_that_would_load_with_random_weights_is_refused_with_the_way_out(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    said: str,
    llama: tuple[dict[str, torch.Tensor], dict[str, Any]],
    tmp_path: Path,
) -> None:
    tensors, config = llama
    folder = model_of(tmp_path / "m", change(tensors), config)
    with pytest.raises(UsageError, match=f"{said}.*--adapter raw"):
        model_names.fitted(open_source(folder), config)


@pytest.mark.usefixtures("_asked_here")
def test_tied_weights_may_be_absent_and_a_tensor_too_many_is_named(
    llama: tuple[dict[str, torch.Tensor], dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, config = llama
    tensors.pop("lm_head.weight")
    folder = model_of(tmp_path / "m", {**tensors, "v_head.bias": torch.ones(1)}, config)
    with pytest.raises(UsageError, match="lacks 1 of the 21 weights"):
        model_names.fitted(open_source(folder), config)
    assert fitted(open_source(folder), {**config, "tie_word_embeddings": True}) == {*tensors, "v_head.bias"}
    tensors.pop("model.norm.weight")
    folder = model_of(tmp_path / "m", tensors, config)
    assert fitted(open_source(folder), {**config, "architectures": None}) == tensors.keys(), (
        "not all models have a pooler"
    )
    assert "1 tensors are none that LlamaForCausalLM loads, and are not used: v_head.bias" in caplog.text


@pytest.mark.usefixtures("_asked_here")
def test_a_peft_models_training_state_is_its_adapter_or_the_merged_model(
    cases: Path, tmp_path: Path, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cases / "accelerate"
    path = Path(shutil.copytree(root / "ck", tmp_path / "ck"))
    assert convert(path, tmp_path / "none") == 2
    assert "has no adapter_config.json beside it" in (said := capsys.readouterr().err) and "--adapter raw" in said
    shutil.copy(root / "adapter" / "adapter_config.json", path)
    assert convert(path, tmp_path / "kept", "--dtype", "float32") == 0
    kept, pefts = weights(tmp_path / "kept"), weights(root / "adapter")
    assert kept.keys() == pefts.keys() and all(torch.equal(kept[name], pefts[name]) for name in pefts)
    assert convert(path, tmp_path / "merged", "--dtype", "float32", "--adapter", "merge") == 0
    merged, expected = loaded(tmp_path / "merged"), weights(root / "merged")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-6)


def test_an_adapter_without_its_configuration_is_written_as_it_stands(
    cases: Path, copied: Callable[[str], Path], tmp_path: Path, weights: Weights
) -> None:
    path = copied("z3_lora")
    (path / "adapter_config.json").unlink()
    assert convert(path, tmp_path / "out", "--adapter", "raw", "--dtype", "float32") == 0
    found, expected = weights(tmp_path / "out"), load_file(cases / "z3_lora" / "deepspeed.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "out" / "config.json").exists(), "with it from_pretrained would invent weights"
    assert convert(path, tmp_path / "no", "--adapter", "raw", "--copy-from", path) == 2


def test_raw_names_tied_weights_by_all_their_names(cases: Path, tmp_path: Path, weights: Weights) -> None:
    consolidate(
        open_source(cases / "z3_tied" / "ck", is_raw=True), tmp_path / "out", ConsolidateOptions(dtype="float32")
    )
    expected = load_file(cases / "z3_tied" / "deepspeed.safetensors")
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_missing_rank_of_safetensors_shards_is_named(cases: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(cases / "loops" / "hf_shards", tmp_path / "ck"))
    (path / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(IncompleteError, match="has no shard-00002-"):
        open_source(path)


def test_an_optimizers_moments_are_no_weights_in_safetensors_either(
    llama: tuple[dict[str, torch.Tensor], dict[str, Any]], tmp_path: Path
) -> None:
    tensors, config = llama
    moments = {f"optim.state.{name}.exp_avg": tensor.clone() for name, tensor in tensors.items()}
    folder = model_of(tmp_path / "m", {**tensors, **moments}, config)
    assert {tensor.name for tensor in open_source(folder).tensors} == tensors.keys()


@pytest.mark.parametrize("loop", LOOPS)
def test_they_are_listed_and_verified(
    loop: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(cases / "loops" / loop, tmp_path / "run" / loop))
    for given in (path, path.parent):
        assert main(["checkpoints", "list", str(given), "--json"]) == 0
        (one,) = json.loads(capsys.readouterr().out)
        assert (one["path"], one["status"], one["content"]) == (str(path), "third-party", "full")
    assert main(["checkpoints", "verify", str(path.parent)]) == 0
    assert (
        f"{loop}: intact, judged by the headers of its model alone: no checksum was compared" in capsys.readouterr().out
    )
    file = sorted(path.glob("*.distcp")) or sorted(path.glob("shard*"))
    file[0].write_bytes(file[0].read_bytes()[:1500])
    assert main(["checkpoints", "verify", str(path)]) == 1
    assert "cut off" in capsys.readouterr().out


def test_a_plain_model_is_listed_and_a_folder_without_a_ranks_file_is_incomplete(
    cases: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied("z3_bf16")
    shutil.copytree(cases / "z3_lora" / "base", path.parent / "base")
    (path.parent / "other.safetensors").touch()
    (path / "global_step1" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    next(path.glob("*/*zero_pp_rank_1_*optim_states.pt")).unlink()
    assert main(["checkpoints", "list", str(path.parent), "--json"]) == 0
    found = {Path(one["path"]).name: one["content"] for one in json.loads(capsys.readouterr().out)}
    assert found == {"base": "weights"}
    assert main(["checkpoints", "list", str(path), "--json"]) == 0
    assert [one["content"] for one in json.loads(capsys.readouterr().out)] == ["incomplete"]


def test_rank_files_without_their_prefix_are_still_those_of_their_rank(
    copied: Callable[[str], Path],
) -> None:
    path = copied("z3_bf16")
    expected = open_source(path)
    for file in path.glob("*/bf16_*"):
        file.rename(file.with_name(file.name.removeprefix("bf16_")))
    assert [tensor.name for tensor in open_source(path).tensors] == [tensor.name for tensor in expected.tensors]


def test_a_pointer_to_a_renamed_folder_names_the_folder(copied: Callable[[str], Path]) -> None:
    path = copied("z3_bf16")
    (path / "global_step1").rename(path / "best")
    with pytest.raises(Exception, match="names 'global_step1', which is not there; give one of .*/ck/best"):
        open_source(path)


def test_a_tar_file_names_the_url_of_the_folder_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ck.tar").touch()
    assert convert(tmp_path / "ck.tar", tmp_path / "out") == 2
    assert f"is a file; unpack it, or name the folder in it: tar://FOLDER::{tmp_path}/ck.tar" in capsys.readouterr().err


def test_merging_without_a_base_names_the_option(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(cases / "z3_lora" / "adapter", tmp_path / "adapter"))
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))
    assert convert(path, tmp_path / "out", "--adapter", "merge") == 2
    assert (
        "its configuration names no base model; name the folder of the base with --base DIR" in capsys.readouterr().err
    )
