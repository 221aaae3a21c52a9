"""Models saved as pytorch_model.bin are found tensor by tensor, and nothing that their pickles say is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from sousbatch.checkpoints.formats.pickled_model import pickled_files, read_pickled
from sousbatch.errors import DamagedError, IncompleteError, SousbatchError

WEIGHT = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def saved(path: Path, state: Any, *, is_old: bool = False) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=not is_old)
    return path


def values(path: Path, **options: Any) -> dict[str, list[int]]:
    """Return the shapes that are read from one file."""
    return {name: list(tensor.shape) for name, tensor in read_pickled([path], **options).items()}


@pytest.mark.parametrize("is_old", [False, True])
def test_each_tensor_is_found_where_its_bytes_are(tmp_path: Path, is_old: bool) -> None:
    state = {"a": WEIGHT, "half": WEIGHT.half(), "row": WEIGHT[1], "b": torch.zeros(2, 0), "n": torch.tensor(7)}
    path = saved(tmp_path / "pytorch_model.bin", state, is_old=is_old)
    found, content = read_pickled([path]), path.read_bytes()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in state.items()
    }
    for name in ("a", "half", "row", "n"):
        begin = found[name].segment(0, found[name].num_elements).offset_bytes
        expected = state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[begin : begin + len(expected)] == expected


@pytest.mark.parametrize("is_old", [False, True])
def test_tied_weights_are_read_once_unless_the_model_says_that_they_are_not_tied(tmp_path: Path, is_old: bool) -> None:
    path = saved(tmp_path / "x.bin", {"wte.weight": WEIGHT, "lm_head.weight": WEIGHT}, is_old=is_old)
    assert list(values(path)) == ["wte.weight"]
    assert list(values(path, is_tied=False)) == ["wte.weight", "lm_head.weight"]


def test_constants_that_models_make_themselves_are_left_out(tmp_path: Path) -> None:
    constants = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        "bert.embeddings.position_ids": torch.arange(8)[None],
    }
    weights = {"h.0.attn.c_attn.bias": torch.ones(4), "encoder.layer.0.attn.bias": torch.ones(4)}
    path = saved(tmp_path / "x.bin", {**constants, **weights})
    assert list(values(path)) == list(weights)
    assert list(values(path, has_code=True)) == [*constants, *weights], "its own code may want them"


def test_no_model_of_transformers_keeps_these_constants() -> None:
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    configs = [
        transformers.GPT2Config(**small),
        transformers.GPTJConfig(**small, rotary_dim=2),
        transformers.GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
        transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
        transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
    ]
    with torch.device("meta"):
        names = {name for config in configs for name in transformers.AutoModel.from_config(config).state_dict()}
    ends = (".attn.bias", ".attention.bias", "masked_bias", "inv_freq", "position_ids")
    assert names and not [name for name in names if name.endswith(ends)]


def test_several_files_are_those_of_their_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{number}-of-00002.bin" for number in (1, 2)]
    for number, name in enumerate(names):
        saved(tmp_path / name, {f"w{number}": WEIGHT})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    assert list(read_pickled(pickled_files(tmp_path))) == ["w0", "w1"]
    (tmp_path / names[1]).unlink()
    with pytest.raises(IncompleteError, match=rf"{names[1]}: missing"):
        pickled_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w0": "../../etc/passwd"}}))
    with pytest.raises(DamagedError, match="does not lie in it"):
        pickled_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(DamagedError, match="not an index"):
        pickled_files(tmp_path)


class Hostile:
    """Pickles into a call of os.system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def shrunk(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])
    return path


def overlapping() -> dict[str, torch.Tensor]:
    """Return tensors of one small storage, together many times as large."""
    storage = torch.zeros(1 << 12)
    return {f"w{number}": storage[number:].clone() if number == 0 else storage[number:] for number in range(64)}


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("call", r"would call posix\.system, which no checkpoint needs; it was not called"),
        ("cut", "cut off or damaged"),
        ("overlap", "more than it has: they overlap"),
        ("list", "holds list"),
        ("words", "'w' is a str, not a tensor of weights"),
        ("module", "would call|is a|holds"),
    ],
)
def test_a_hostile_file_is_one_clear_line_and_runs_nothing(
    tmp_path: Path, case: str, expected: str, is_old: bool
) -> None:
    path, mark = tmp_path / "x.bin", tmp_path / "called"
    content = {
        "call": {"w": Hostile(mark)},
        "cut": {"w": torch.zeros(4096)},
        "overlap": overlapping(),
        "list": [WEIGHT],
        "words": {"w": "words"},
        "module": {"w": torch.nn.Linear(2, 2)},
    }[case]
    saved(path, content, is_old=is_old)
    if case == "cut":
        shrunk(path)
    with pytest.raises(SousbatchError, match=expected) as caught:
        read_pickled([path])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not mark.exists()


def test_an_old_file_whose_sizes_do_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.zeros(16)}, is_old=True)
    content = path.read_bytes()
    begin = content.rindex((16).to_bytes(8, "little"))
    path.write_bytes(content[:begin] + (7).to_bytes(8, "little") + content[begin + 8 :])
    with pytest.raises(DamagedError, match="7 elements in 64 bytes"):
        read_pickled([path])
    path.write_bytes(pickle.dumps(1) + content)
    with pytest.raises(DamagedError, match="does not begin as torch's files do"):
        read_pickled([path])
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match="cut off"):
        read_pickled([path])


def test_two_files_that_hold_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="'w', which another file of the model holds too"):
        read_pickled([saved(tmp_path / "a.bin", {"w": WEIGHT}), saved(tmp_path / "b.bin", {"w": WEIGHT})])
