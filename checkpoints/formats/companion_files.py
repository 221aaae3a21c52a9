"""The small files of a model folder.

They are configuration, tokenizer, adapter's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ...errors import DamagedError
from ...remote import Place, list_folder
from ..consolidation.model_card import published
from .tensors import Source

CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
# Files of a tokenizer; SentencePiece's are called .model, Marian's .spm, PhoBERT's bpe.codes.
TOKENIZER_FILES = tuple(
    "tokenizer*.json vocab* *vocab.json merges.txt *.model *.spm *.codes *.tokenizer *.tiktoken added_tokens.json "
    "special_tokens_map.json chat_template*".split()
)
# What transformers and peft read beside the weights; all else of a training folder stays there.
_COPIED = (
    *TOKENIZER_FILES,
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py"),
)
_RECOVERY_SCRIPT = "zero_to_fp32.py"  # DeepSpeed's, beside its checkpoints


def config_dir(checkpoint: Place) -> Place | None:
    """Return the folder with the config and tokenizer of *checkpoint*.

    It is the checkpoint itself or the folder above, if any.
    """
    return next((place for place in (checkpoint, checkpoint.parent) if (place / CONFIG_NAME).is_file()), None)


def last_config(folders: Sequence[Place], name: str) -> dict[str, Any] | None:
    """Return the JSON configuration of the last folder that has one, else None.

    Raises:
        DamagedError: it is not a JSON mapping.
    """
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        return None
    try:
        config = json.loads(found[-1].read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{found[-1]}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise DamagedError(f"{found[-1]}: holds {type(config).__name__}, not a mapping")
    return config


def beside(source: Source, copied_from: Sequence[Place], dtype: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of what belongs beside the weights of *source*.

    config.json names their *dtype*. A later folder of *copied_from* goes before an earlier one, file by file.
    """
    if source.content == "adapter" and source.adapter_config is not None:
        yield ADAPTER_CONFIG_NAME, _json(published(source.adapter_config))
    config = last_config(copied_from, CONFIG_NAME)
    if config is not None and source.content == "model":
        if not any(tensor.dtype in ("int8", "uint8") for tensor in source.tensors):
            config.pop("quantization_config", None)  # an adapter was trained on a quantised base; this is plain
        yield CONFIG_NAME, _json(with_dtype(published(config), dtype))
    patterns = (*_COPIED, "*.py") if config is not None and config.get("auto_map") else _COPIED
    copied = {
        path.name: path
        for origin in copied_from
        for path in list_folder(origin)
        if any(fnmatchcase(path.name, pattern) for pattern in patterns) and path.name != _RECOVERY_SCRIPT
    }
    for name, path in copied.items():
        if path.is_file():
            yield name, _published(name, path.read_bytes())


def _published(name: str, content: bytes) -> bytes:
    """Return a small file without places of this machine.

    Return the same bytes where it names none.
    """
    if not name.endswith("_config.json"):
        return content
    try:
        config = json.loads(content)
    except ValueError:
        return content  # the library that loads it says so
    cleared = published(config) if isinstance(config, dict) else config
    return content if cleared == config else _json(cleared)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a transformers configuration whose weights are of *dtype*.

    Its parts (text_config) are, too. transformers 5 reads `dtype`, 4 `torch_dtype`: the old key is kept where it is,
    never added.
    """
    changed = {
        key: with_dtype(value, dtype)
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict) and _names_dtype(value)
        else value
        for key, value in config.items()
    }
    old = {"torch_dtype": dtype} if "torch_dtype" in config else {}
    return {**changed, **old, "dtype": dtype}


def _names_dtype(config: Mapping[str, Any]) -> bool:
    return "dtype" in config or "torch_dtype" in config
