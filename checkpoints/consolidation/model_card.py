"""README.md of a consolidated folder.

It says where its weights came from, and what was done to them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ..formats.tensors import Source
from .manifest import MANIFEST_NAME

CARD_NAME = "README.md"
_HUB_ID = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)
_IN_HUB_CACHE = re.compile(r"(?:^|[/\\])models--(\w[\w.-]*?)(?:--(\w[\w.-]*?))?(?=[/\\]|$)", re.ASCII)
_NAMES_PLACE = re.compile(r"(?:name_or_path|_(?:path|file|dir|folder))$")
_LOCAL = re.compile(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")


def hub_id(name: str) -> str | None:
    """Return the hub id of a model; None where there is none.

    The model is named by id, or by its folder in the hub's cache.
    """
    if found := _IN_HUB_CACHE.search(name):
        return "/".join(part for part in found.groups() if part)
    return name if _HUB_ID.fullmatch(name) and not os.path.isdir(name) else None


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without places of this machine.

    A model that came from the hub is named by its id. peft reads a missing base as none, and takes one that is loaded
    by hand.
    """
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = published(value)
        elif isinstance(value, str) and _NAMES_PLACE.search(key):
            is_here = _LOCAL.match(value) or (key.endswith("name_or_path") and os.path.isdir(value))
            if is_here and (value := hub_id(value)) is None and key != "base_model_name_or_path":
                continue
        changed[key] = value
    return changed


def origin(source: Source) -> str:
    """Return the last two folders of the checkpoint's path.

    They distinguish it from others, and do not say whose machine it was on.
    """
    return "/".join(PurePosixPath(str(source.path)).parts[-2:])


def card(source: Source, *, dtype: str, base_model: str | None, num_overflowing: Mapping[str, int]) -> str:
    """Return the card's text; the same for the same checkpoint and options."""
    front = ["library_name: " + ("peft" if source.content == "adapter" else "transformers")]
    if base_model:
        front.append(f"base_model: {json.dumps(base_model)}")
    rows = [
        ("checkpoint", f"{source.kind} `{origin(source)}`"),
        ("step", source.step),
        ("ranks", source.world_size if source.zero_stage is not None or source.world_size > 1 else None),
        ("ZeRO stage", source.zero_stage),
        ("DeepSpeed", source.ds_version),
        ("weights", f"{dtype}, {sum(tensor.num_elements for tensor in source.tensors):,} numbers"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows if value not in (None, ""))
    return (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# {'Adapter' if source.content == 'adapter' else 'Model'} consolidated from a training checkpoint\n\n"
        f"| | |\n|---|---|\n{table}\n\n{_rounding(source, dtype, num_overflowing)}{_without_base(source, base_model)}"
        f"`{MANIFEST_NAME}` has the digest of every tensor. Made by sousbatch.\n"
    )


def _rounding(source: Source, dtype: str, num_overflowing: Mapping[str, int]) -> str:
    masters = {tensor.dtype for tensor in source.tensors if tensor.role == "trained"}
    text = ""
    if masters == {"float32"} and dtype != "float32":
        text = (
            f"Rounded to {dtype} from the fp32 master weights, once. Metrics of the training were measured on its own "
            "16-bit copy, which may differ in the last digit.\n\n"
        )
    if num_overflowing:
        what = "were clamped to its limits" if dtype == "float16" else f"are why the model is in {dtype}"
        text += f"{sum(num_overflowing.values())} values beyond the range of float16 {what}.\n\n"
    return text


def _without_base(source: Source, base_model: str | None) -> str:
    if source.content != "adapter" or base_model:
        return ""
    return (
        "The base model has no hub id, so nothing here names it: load it, and give it to "
        "`PeftModel.from_pretrained(base, folder)`.\n\n"
    )
