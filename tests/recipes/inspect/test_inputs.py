"""What a model, a code folder and a store really are."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import PlanError, UsageError
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.cache import code_digest_of
from sousbatch.recipes.inspect.inputs import inspect, measure_disk_space


def _reasons(*overrides: str) -> list[str]:
    with pytest.raises(PlanError) as caught:
        inspect(compose("./small.yaml", overrides), Path("runs"))
    return list(caught.value.reasons)


def test_shapes_are_those_of_the_model_in_memory(project: Path) -> None:
    model = inspect(compose("./small.yaml"), project).model
    num_params = 2 * 32 * 8 + 8 + 2 * (2 * 8 + 4 * 64 + 2 * 16 * 8 + 8 * 16)
    assert (model.has_weights, model.num_params, model.tensors[0].name) == (
        True,
        num_params,
        "model.embed_tokens.weight",
    )


def test_a_model_from_scratch_takes_the_shapes_of_its_config(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def built(question: dict[str, Any]) -> dict[str, Any]:
        numbers = {"trainable": 15, "frozen": 0, "quantisable": 0, "num_tensors": 1}
        trained = dict.fromkeys(question["trainings"], numbers)
        return {"config": {}, "tensors": [["a.weight", [3, 5]]], "untied": [], "trained": trained}

    monkeypatch.setattr("sousbatch.recipes.inspect.model._run_architecture", built)
    model = inspect(compose("./small.yaml", ["model.from_scratch=true", "model.config.vocab_size=7"]), project).model
    assert (model.has_weights, model.num_params) == (False, 15)


MODELS = {
    "not shipped": (
        ["model.path=library:tiny-hangull"],
        "tiny-bart, tiny-bert, tiny-hangul, tiny-hangul-chat, tiny-llama (did you mean 'tiny-hangul'?)",
    ),
    "outside the library": (["model.path=library:../models"], "is unknown; known"),
    "no folder": (
        ["model.path=/none/here"],
        "'/none/here' does not exist: looked for /none/here; give a local folder, a hub id",
    ),
    "no model in it": (["model.path=."], "'.' has no config.json"),
    "no hub id": (["model.path='a b'"], "'a b' is neither a folder nor a hub id"),
}


@pytest.mark.parametrize(("overrides", "reason"), MODELS.values(), ids=MODELS)
def test_a_model_that_is_not_there_is_named(project: Path, overrides: list[str], reason: str) -> None:
    (found,) = _reasons(*overrides)
    assert reason in found


def test_a_hub_model_that_cannot_be_fetched_says_what_to_check(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (reason,) = _reasons("model.path=org/none")
    assert reason.startswith("model.path 'org/none' is no folder here") and "HF_TOKEN" in reason


def test_a_model_without_weights_asks_for_from_scratch(project: Path) -> None:
    (project / "model" / "model.safetensors").unlink()
    (reason,) = _reasons()
    assert "set model.from_scratch=true" in reason


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 2**62), struct.pack("<Q", 3) + b"{x}"], ids=repr)
def test_broken_weights_are_named(project: Path, content: bytes) -> None:
    (project / "model" / "model.safetensors").write_bytes(content)
    (reason,) = _reasons()
    assert "model.safetensors is not a safetensors file" in reason


def test_an_archive_that_takes_no_files_is_refused_and_nothing_is_left_in_another(
    project: Path, tmp_path: Path
) -> None:
    """The administrator may write to /proc, say its permissions; it takes no file of anyone."""
    (found,) = _reasons("checkpoints.archive_url=/proc/archive")
    assert found == "checkpoints.archive_url '/proc/archive': /proc is not a folder that you may write to"
    kept = tmp_path / "kept"
    kept.mkdir()
    inspect(compose("./small.yaml", [f'checkpoints.archive_url="{kept}/new"']), Path("runs"))
    assert not list(kept.iterdir())


def test_model_and_data_faults_come_together(project: Path) -> None:
    assert len(_reasons("model.path=/none", "predict.split=none")) == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_the_digest_changes_with_the_model(project: Path, name: str) -> None:
    recipe = compose("./small.yaml")
    before = inspect(recipe, project).model.digest
    values = json.loads((project / "model" / name).read_text())
    (project / "model" / name).write_text(json.dumps(values, indent=1))
    assert inspect(recipe, project).model.digest != before


def test_the_digest_is_the_same_in_another_folder(project: Path) -> None:
    recipe = compose("./small.yaml")
    shutil.copytree(project / "model", project / "copy")
    copied = compose("./small.yaml", ["model.path=copy"])
    assert inspect(recipe, project).model.digest == inspect(copied, project).model.digest


def test_code_is_its_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "lab" / "__pycache__").mkdir(parents=True)
    (tmp_path / "lab" / "a.py").write_text("x = 1\n")
    before = code_digest_of([tmp_path / "lab"])
    (tmp_path / "lab" / "__pycache__" / "a.pyc").write_text("")
    assert code_digest_of([tmp_path / "lab"]) == before
    (tmp_path / "lab" / "a.py").rename(tmp_path / "lab" / "b.py")
    assert code_digest_of([tmp_path / "lab"]) != before


def test_code_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="environment.code: .*none' is not a folder"):
        code_digest_of([tmp_path / "none"])


def test_the_room_of_a_folder_yet_to_be_made_is_that_of_its_parent(tmp_path: Path) -> None:
    assert measure_disk_space(tmp_path / "a" / "b").free_bytes > 0


def test_one_changed_byte_of_the_weights_is_another_model(project: Path) -> None:
    before = inspect(compose("./small.yaml"), project).model
    weights = project / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    after = inspect(compose("./small.yaml"), project).model
    assert after.tensors == before.tensors and after.digest != before.digest


def test_a_config_that_is_not_json_is_named(project: Path) -> None:
    (project / "model" / "config.json").write_text("{")
    with pytest.raises(PlanError, match="config.json is not a config"):
        inspect(compose("./small.yaml"), project)


def test_a_null_is_no_value(project: Path) -> None:
    """str(None) would train the model on the word None."""
    path = project / "train.jsonl"
    path.write_text(path.read_text() + '{"input": "a", "target": null}\n')
    with pytest.raises(PlanError, match="row 11 of split 'train' has null in column 'target'"):
        inspect(compose("./small.yaml"), project)


def test_a_chat_prompt_needs_a_template(project: Path) -> None:
    with pytest.raises(PlanError, match="has no chat template"):
        inspect(compose("./small.yaml", ["data.prompt=chat"]), project)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("adapter_config.json", '{"base_model_name_or_path": "org/base"}', "is an adapter"),
        (
            "config.json",
            '{"model_type": "llama"}',
            "is an adapter.*consolidate .* --adapter merge",
        ),
        ("adapter_config.json", "[", "is an adapter whose adapter_config.json cannot be read"),
        ("model.gguf", "GGUF", "cannot be dequantised: it is damaged, or no GGUF file"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(project: Path, name: str, content: str, reason: str) -> None:
    (project / "other").mkdir()
    if name == "config.json":  # as beside the adapters of our own checkpoints
        (project / "other" / "adapter_config.json").write_text("{}")
    (project / "other" / name).write_text(content)
    with pytest.raises(PlanError, match=reason):
        inspect(compose("./small.yaml", ["model.path=./other"]), project / "runs")
