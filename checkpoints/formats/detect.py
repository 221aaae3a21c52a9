"""Open a checkpoint folder of any known trainer.

Known trainers are DeepSpeed, FSDP, Hugging Face and peft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...errors import DamagedError, IncompleteError, NotFoundError, UsageError
from ...files import digest_of
from ...remote import Place, check_inner_name, list_folder, read_stamp
from .companion_files import ADAPTER_CONFIG_NAME, last_config
from .fsdp_dcp import find_distcp_dir, is_hf_sharded, read_distcp, read_hf_shards
from .lora import as_adapter, is_adapter
from .parts import bare
from .pickled_model import pickled_files, read_pickled
from .safetensors_file import INDEX_NAME, read_tensors
from .tensors import Source, SourceTensor
from .zero_files import is_tag_dir
from .zero_layout import read_zero
from .zero_universal import is_universal, read_universal

_PICKLED = (
    "pytorch_model_fsdp.bin",
    "pytorch_model.pt",
)


def open_source(path: Place, *, is_raw: bool = False) -> Source:
    """Find out what *path* holds and where each of its tensors lies.

    No weights are read. *path* is a folder with DeepSpeed's `latest` or one `global_step*`, such a tag folder itself,
    what ds_to_universal.py made of one, a folder of torch's distributed checkpoints (FSDP), a folder with
    `model.safetensors`, `pytorch_model.bin`, or shards of either and their index, or a peft adapter. Where a folder
    holds ZeRO shards and a 16-bit model, the shards are taken: they are fp32. *is_raw* leaves an adapter in training
    what it is, each tensor under its own name, tied ones under all of theirs, as DeepSpeed's zero_to_fp32.py does.

    Raises:
        NotFoundError: no such folder, or no checkpoint in it.
        UsageError: a kind that is not converted here; the way out is named.
        IncompleteError: a rank's or a shard's file is missing.
        DamagedError: files that are cut off or do not fit together.
    """
    if not path.is_dir():
        raise NotFoundError(f"{path}: " + ("no such folder" if not path.is_file() else _of_file(path)))
    adapter_path = path / "adapter_model.safetensors"
    found = _open_trained(path)
    if found is None and adapter_path.is_file():
        return Source(
            path=path,
            content="model" if is_raw else "adapter",
            kind="peft adapter",
            tensors=tuple(read_tensors(adapter_path)),
            step=_step(path),
            digest=digest_of([read_stamp(adapter_path)]),
            adapter_config=last_config([path], ADAPTER_CONFIG_NAME),
        )
    if found is None and any((path / name).is_file() for name in ("model.safetensors", INDEX_NAME)):
        found = _read_model(path)
    if found is None and (pickled := pickled_files(path)):
        found = _read_pickled_model(path, pickled)
    if found is None and is_hf_sharded(path):
        found = read_hf_shards(path)
    if found is not None:
        if is_raw:
            return _with_aliases(found)
        found = bare(found)
        if not is_adapter(found):
            return found
        return as_adapter(found, last_config((found.path.parent, found.path, path), ADAPTER_CONFIG_NAME))
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


def _of_file(path: Place) -> str:
    """Return what to do with a file that was named in the place of a folder."""
    if path.name.endswith((".tar", ".zip")):
        whole = path.absolute() if isinstance(path, Path) else path
        return f"is a file; unpack it, or name the folder in it: {path.name[-3:]}://FOLDER::{whole}"
    return "is a file; name the folder that holds the checkpoint"


def _with_aliases(source: Source) -> Source:
    stored = {tensor.name: tensor for tensor in source.tensors}
    copies = tuple(replace(stored[kept], name=name) for name, kept in source.aliases)
    return replace(source, tensors=source.tensors + copies, aliases=())


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
    tags = [folder for folder in list_folder(path) if folder.name.startswith("global_step") and folder.is_dir()]
    for pointer in ("latest", "latest_universal"):
        if (path / pointer).is_file():
            return _pointed_at(path / pointer)
    if len(tags) > 1:
        raise UsageError(f"{path}: has no `latest`; give one of {', '.join(str(folder) for folder in tags)}")
    return tags[0] if tags else None


def _pointed_at(pointer: Place) -> Place:
    tag = pointer.read_text(encoding="utf-8").strip()
    if tag and (pointer.parent / check_inner_name(pointer, tag)).is_dir():
        return pointer.parent / tag
    folders = [folder for folder in list_folder(pointer.parent) if folder.is_dir()]
    known = ", ".join(str(folder) for folder in folders if folder.name.startswith("global_step") or is_tag_dir(folder))
    advice = f"give one of {known}" if known else "no other folder holds rank files either; copy it again"
    raise DamagedError(f"{pointer}: names {tag!r}, which is not there; {advice}")


def _read_model(path: Place) -> Source:
    files: list[Place] = [path / "model.safetensors"]
    expected: Mapping[str, str] = {}
    if not files[0].is_file():
        try:
            expected = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
            files = [path / check_inner_name(path / INDEX_NAME, name) for name in sorted(set(expected.values()))]
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
        digest=digest_of([f"{file.name} {read_stamp(file)}" for file in files]),
    )


def _read_pickled_model(path: Place, pickled: list[Place]) -> Source:
    tensors = tuple(
        SourceTensor(
            name=name, shape=tensor.shape, dtype=tensor.dtype, segments=(tensor.segment(0, tensor.num_elements),)
        )
        for name, tensor in read_pickled(pickled).items()
    )
    digest = digest_of([f"{file.name} {read_stamp(file)}" for file in pickled])
    return Source(path=path, content="model", tensors=tensors, step=_step(path), digest=digest)


def _step(path: Place) -> int | None:
    """Return the step of a Hugging Face Trainer's folder, None for any other."""
    try:
        return int(json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
