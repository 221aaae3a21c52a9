"""Open a checkpoint folder, whatever trainer left it: DeepSpeed, Hugging Face or peft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import DamagedError, IncompleteError, NotFoundError, UsageError
from ...files import read_json
from .adapter import as_adapter, is_adapter
from .beside import ADAPTER_CONFIG_NAME, last_config
from .layout import read_zero
from .ranks import is_tag_dir
from .source import Source
from .tensorfile import INDEX_NAME, read_tensors

_FOREIGN = (
    ("latest_universal", "a DeepSpeed universal checkpoint", "consolidate the one that it was made from"),
    (".metadata", "a torch distributed checkpoint", "use `accelerate merge-weights`"),
    ("pytorch_model_fsdp_0", "an FSDP checkpoint", "use `accelerate merge-weights`"),
    ("pytorch_model.bin", "a pickled model", "load it and save_pretrained() it again"),
    ("pytorch_model.bin.index.json", "a pickled model", "load it and save_pretrained() it again"),
)


def open_source(path: Path) -> Source:
    """Find out what the folder *path* holds and where each of its tensors lies; reads no weights.

    *path* is a folder with DeepSpeed's `latest` or one `global_step*`, such a tag folder
    itself, a folder with `model.safetensors` or shards and their index, or a peft adapter.
    Where a folder holds ZeRO shards and a 16-bit model, the shards are taken: they are fp32.

    Raises:
        NotFoundError: no such folder.
        UsageError: nothing in it, or a kind that is not converted here; the way out is named.
        IncompleteError: a rank's or a shard's file is missing.
        DamagedError: files that are cut off or do not fit together.
    """
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such folder")
    tag_dir = _find_tag_dir(path)
    if tag_dir is not None:
        source = read_zero(tag_dir)
        if not is_adapter(source):
            return source
        return as_adapter(source, last_config((tag_dir.parent, path), ADAPTER_CONFIG_NAME))
    adapter_path = path / "adapter_model.safetensors"
    if adapter_path.is_file():
        tensors = tuple(read_tensors(adapter_path))
        return Source(
            path=path,
            content="adapter",
            tensors=tensors,
            step=_step(path),
            adapter_config=last_config([path], ADAPTER_CONFIG_NAME),
        )
    if (path / "model.safetensors").is_file() or (path / INDEX_NAME).is_file():
        return _read_model(path)
    for name, what, advice in _FOREIGN:
        if (path / name).exists():
            raise UsageError(f"{path}: holds {what}, which is not converted here; {advice}")
    raise UsageError(
        f"{path}: holds no checkpoint; known: DeepSpeed (latest, global_step*), model.safetensors, "
        "adapter_model.safetensors"
    )


def _find_tag_dir(path: Path) -> Path | None:
    if is_tag_dir(path):
        return path
    tags = sorted(folder for folder in path.glob("global_step*") if folder.is_dir())
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8").strip()
        if not tag or not (path / tag).is_dir():
            known = ", ".join(folder.name for folder in tags) or "none"
            raise DamagedError(
                f"{path / 'latest'}: names {tag!r}, which is not there; there are: {known}; give one of them"
            )
        return path / tag
    if len(tags) > 1:
        raise UsageError(f"{path}: has no `latest`; give one of {', '.join(str(folder) for folder in tags)}")
    return tags[0] if tags else None


def _read_model(path: Path) -> Source:
    files = [path / "model.safetensors"]
    expected: Mapping[str, str] = {}
    if not files[0].is_file():
        try:
            expected = read_json(path / INDEX_NAME)["weight_map"]
            files = [path / name for name in sorted(set(expected.values()))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path / INDEX_NAME}: not an index of safetensors files ({error})") from error
    for file in files:
        if not file.is_file():
            raise IncompleteError(f"{file}: missing, though {INDEX_NAME} names it")
    tensors = tuple(tensor for file in files for tensor in read_tensors(file))
    lost = sorted(set(expected) - {tensor.name for tensor in tensors})
    if lost:
        raise DamagedError(f"{path / INDEX_NAME}: names {lost[0]!r}, which {expected[lost[0]]} does not hold")
    return Source(path=path, content="model", tensors=tensors, step=_step(path))


def _step(path: Path) -> int | None:
    """Return the step of a Hugging Face Trainer's folder, None for any other."""
    try:
        return int(read_json(path / "trainer_state.json")["global_step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
