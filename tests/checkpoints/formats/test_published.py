"""What is published with a model names hub ids, and no place of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.model_card import hub_id
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.formats.detect import open_source

CACHED = "/home/anna/.cache/huggingface/hub/models--org--tiny-1.5/snapshots/0123abc"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/tiny-1.5", "org/tiny-1.5"),
        ("gpt2", "gpt2"),
        (CACHED, "org/tiny-1.5"),
        ("/data/models--gpt2/snapshots/0123abc", "gpt2"),
        ("/home/anna/models/tiny", None),
        ("~/models/tiny", None),
        ("./tiny", None),
        ("a/b/c", None),
        ("s3://bucket/tiny", None),
        ("C:\\\\models\\\\tiny", None),
        ("", None),
    ],
)
def test_a_model_of_the_hub_is_named_by_its_id(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_a_folder_here_is_no_hub_id_though_it_is_written_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/tiny") is None and hub_id("models/other") == "models/other"


def _adapter(folder: Path, base: str) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {f"base_model.model.up.lora_{name}.weight": torch.ones(2, 2) for name in "AB"},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "lora_alpha": 2, "r": 2, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _model(folder: Path, base: str) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    save_file({"up.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    config = {"_name_or_path": base, "text_config": {"_name_or_path": base}, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"_name_or_path": base, "eos_token_id": 2}))
    tokenizer = {"name_or_path": base, "tokenizer_file": "/home/anna/tokenizer.json", "chat_template": "/home/{x}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "special_tokens_map.json").write_text('{"eos_token":  "</s>"}')
    (folder / "source.spm").write_bytes(b"pieces")  # of a Marian's tokenizer
    return folder


@pytest.mark.parametrize(("base", "expected"), [(CACHED, "org/tiny-1.5"), ("/home/anna/models/tiny", None)])
@pytest.mark.parametrize("make", [_adapter, _model])
def test_no_home_folder_stands_in_what_is_published(
    make: object, base: str, expected: str | None, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", base)  # type: ignore[operator]
    consolidate(open_source(source), tmp_path / "out", ConsolidateOptions(copy_from=source))
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".md")}
    assert [name for name, text in texts.items() if "anna" in text.replace("/home/{x}", "")] == []
    assert (f'base_model: "{expected}"' in texts["README.md"]) == (expected is not None)
    assert ("base_model:" in texts["README.md"]) == (expected is not None)
    if make is _adapter:
        assert json.loads(texts["adapter_config.json"])["base_model_name_or_path"] == expected
        assert ("PeftModel.from_pretrained(base" in texts["README.md"]) == (expected is None)
        return
    assert (tmp_path / "out/source.spm").read_bytes() == b"pieces"
    assert json.loads(texts["config.json"]).get("_name_or_path") == expected
    assert json.loads(texts["config.json"])["text_config"].get("_name_or_path") == expected
    assert json.loads(texts["generation_config.json"])["eos_token_id"] == 2
    assert json.loads(texts["tokenizer_config.json"])["chat_template"] == "/home/{x}"
    assert texts["special_tokens_map.json"] == '{"eos_token":  "</s>"}', "what names no place stays as it is"
