"""Open a checkpoint folder, whatever trainer left it: DeepSpeed, FSDP, Hugging Face or peft."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...errors import DamagedError, IncompleteError, NotFoundError, UsageError
from ...files import digest_of
from .adapter import as_adapter, is_adapter
from .beside import ADAPTER_CONFIG_NAME, last_config
from .distcp import find_distcp_dir, read_distcp
from .layout import read_zero
from .places import Place, inner_name, listing, stamp_of
from .ranks import is_tag_dir
from .source import Source
from .tensorfile import INDEX_NAME, read_tensors
from .universal import is_universal, read_universal

_PICKLED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model_fsdp.bin",
    "pytorch_model.pt",
)


def open_source(path: Place) -> Source:
    """Find out what the folder *path* holds and where each of its tensors lies; reads no weights.

    *path* is a folder with DeepSpeed's `latest` or one `global_step*`, such a tag folder itself, what
    ds_to_universal.py made of one, a folder of torch's distributed checkpoints (FSDP), a folder with
    `model.safetensors` or shards and their index, or a peft adapter. Where a folder holds ZeRO shards and a 16-bit
    model, the shards are taken: they are fp32.

    Raises:
        NotFoundError: no such folder, or no checkpoint in it.
        UsageError: a kind that is not converted here; the way out is named.
        IncompleteError: a rank's or a shard's file is missing.
        DamagedError: files that are cut off or do not fit together.
    """
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such folder")
    trained = _open_trained(path)
    if trained is not None:
        if not is_adapter(trained):
            return trained
        return as_adapter(trained, last_config((trained.path.parent, trained.path, path), ADAPTER_CONFIG_NAME))
    adapter_path = path / "adapter_model.safetensors"
    if adapter_path.is_file():
        return Source(
            path=path,
            content="adapter",
            kind="peft adapter",
            tensors=tuple(read_tensors(adapter_path)),
            step=_step(path),
            digest=digest_of([stamp_of(adapter_path)]),
            adapter_config=last_config([path], ADAPTER_CONFIG_NAME),
        )
    if (path / "model.safetensors").is_file() or (path / INDEX_NAME).is_file():
        return _read_model(path)
    for name in _PICKLED:
        if (path / name).exists():
            raise UsageError(
                f"{path}: holds a pickled model ({name}), which is not converted here; load it with torch and "
                "save_pretrained() it again"
            )
    raise NotFoundError(
        f"{path}: holds no checkpoint; known: DeepSpeed (latest, global_step*, latest_universal), FSDP (.metadata), "
        "model.safetensors, adapter_model.safetensors"
    )


def _open_trained(path: Place) -> Source | None:
    """Return the training checkpoint in *path*, None where there is no known one."""
    if is_universal(path):
        return read_universal(path)
    tag_dir = _find_tag_dir(path)
    if tag_dir is not None:
        return read_universal(tag_dir) if is_universal(tag_dir) else read_zero(tag_dir)
    distcp_dir = find_distcp_dir(path)
    return read_distcp(distcp_dir) if distcp_dir is not None else None


def _find_tag_dir(path: Place) -> Place | None:
    if is_tag_dir(path):
        return path
    tags = [folder for folder in listing(path) if folder.name.startswith("global_step") and folder.is_dir()]
    for pointer in ("latest", "latest_universal"):
        if (path / pointer).is_file():
            return _pointed_at(path / pointer, tags)
    if len(tags) > 1:
        raise UsageError(f"{path}: has no `latest`; give one of {', '.join(str(folder) for folder in tags)}")
    return tags[0] if tags else None


def _pointed_at(pointer: Place, tags: list[Place]) -> Place:
    tag = pointer.read_text(encoding="utf-8").strip()
    if tag and (pointer.parent / inner_name(pointer, tag)).is_dir():
        return pointer.parent / tag
    known = ", ".join(folder.name for folder in tags) or "none"
    raise DamagedError(f"{pointer}: names {tag!r}, which is not there; there are: {known}; give one of them")


def _read_model(path: Place) -> Source:
    files: list[Place] = [path / "model.safetensors"]
    expected: Mapping[str, str] = {}
    if not files[0].is_file():
        try:
            expected = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            files = [path / inner_name(path / INDEX_NAME, name) for name in sorted(set(expected.values()))]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path / INDEX_NAME}: not an index of safetensors files ({error})") from error
    for file in files:
        if not file.is_file():
            raise IncompleteError(f"{file}: missing, though {INDEX_NAME} names it")
    tensors = tuple(tensor for file in files for tensor in read_tensors(file))
    lost = sorted(set(expected) - {tensor.name for tensor in tensors})
    if lost:
        raise DamagedError(f"{path / INDEX_NAME}: names {lost[0]!r}, which {expected[lost[0]]} does not hold")
    return Source(
        path=path,
        content="model",
        tensors=tensors,
        step=_step(path),
        digest=digest_of([f"{file.name} {stamp_of(file)}" for file in files]),
    )


def _step(path: Place) -> int | None:
    """Return the step of a Hugging Face Trainer's folder, None for any other."""
    try:
        return int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
