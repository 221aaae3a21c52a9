"""Look at what a recipe's model, data and store really are: the only effect before compiling."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import files
from ..errors import PlanError, UsageError, nearest
from .look import cached, collect
from .plan import Inputs, ModelFacts, Room, TensorFacts
from .schema import Recipe
from .search import LIBRARY_DIR
from .splits import splits_of
from .stages import stage_view, stages_of

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def inspect(recipe: Recipe, store: Path) -> Inputs:
    """Return what *recipe* works on; *store* is the folder that will hold its runs.

    Raises:
        PlanError: every reason why the model or the data cannot be used.
    """
    reasons: list[str] = []
    model = collect(reasons, lambda: _model(recipe))
    splits = collect(reasons, lambda: splits_of(recipe)) or {}
    code = collect(reasons, lambda: code_digest(recipe))
    uses_four_bits = any(stage_view(recipe, name).adapter.method == "qlora" for name in stages_of(recipe))
    if uses_four_bits and recipe.environment.python is None and importlib.util.find_spec("bitsandbytes") is None:
        reasons.append(f"adapter.method qlora needs bitsandbytes; {sys.executable} -m pip install bitsandbytes")
    if reasons or model is None or code is None:
        raise PlanError(reasons)
    return Inputs(model=model, splits=splits, room=room_of(store), code_digest=code)


def room_of(store: Path) -> Room:
    """Return what the file system that will hold *store* can still take."""
    folder = store
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    return Room(folder=str(store), free_bytes=stats.f_bavail * stats.f_frsize, free_inodes=stats.f_favail)


def code_digest(recipe: Recipe) -> str:
    """Return the digest of the recipe's code folders."""
    return code_digest_of([Path(folder).expanduser().absolute() for folder in recipe.environment.code])


def code_digest_of(folders: Sequence[Path]) -> str:
    """Return one digest over names and bytes of every file of *folders*."""
    digest = hashlib.sha256()
    for root in folders:
        if not root.is_dir():
            raise UsageError(f"environment.code: {str(root)!r} is not a folder")
        for path in sorted(code_files(root)):
            digest.update(f"{root.name}/{path.relative_to(root)}\0{files.digest_file(path)}\n".encode())
    return digest.hexdigest()


def code_files(root: Path) -> list[Path]:
    """Return the files of a code folder, less caches, version control and environments."""
    skipped = {"__pycache__", ".git", ".venv", "venv", "node_modules", ".mypy_cache", ".ruff_cache", "runs", "wandb"}
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        found += [Path(folder, name) for name in names if not os.path.islink(os.path.join(folder, name))]
    return found


def local_folder(key: str, name: str, revision: str | None = None) -> Path:
    """Return the local folder of what *key* names; a hub repository is fetched into the hub's cache.

    Raises:
        UsageError: there is no such folder, or no network and no token to fetch it with.
    """
    if name.startswith("library:"):
        folder = LIBRARY_DIR / "models" / name.removeprefix("library:")
        known = sorted(place.name for place in (LIBRARY_DIR / "models").iterdir() if place.is_dir())
        if folder.name not in known or folder.parent != LIBRARY_DIR / "models":
            hint = f" ({nearest(folder.name, known)})" if nearest(folder.name, known) else ""
            raise UsageError(f"{key} {name!r} is unknown; shipped: {', '.join(known)}{hint}")
        return folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UsageError(
            f"{key} {name!r} does not exist; give a local folder, a hub id such as org/name, or library:NAME"
        )
    return _from_hub(key, name, revision)


def _from_hub(key: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{key} {name!r} is neither a folder nor a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{key} {name!r} cannot be fetched: {reason}; check the name, the network, "
            "and for a gated model that HF_TOKEN is set and its licence accepted"
        ) from error


def _model(recipe: Recipe) -> ModelFacts:
    spec = recipe.model
    folder = local_folder("model.path", spec.path, spec.revision)
    if not (folder / "config.json").is_file():
        raise UsageError(f"model.path {spec.path!r} has no config.json; give the folder that save_pretrained wrote")
    tokenizer_folder = local_folder("model.tokenizer", spec.tokenizer) if spec.tokenizer else folder
    weights = sorted(folder.glob("*.safetensors"))
    named = [folder / "config.json", *(tokenizer_folder / name for name in _TOKENIZER_FILES)]
    parts: list[Any] = [(path.name, files.digest_file(path)) for path in named if path.is_file()]
    headers = {path.name: _safetensors_header(path) for path in weights}
    parts += [(path.name, path.stat().st_size, headers[path.name]) for path in weights]
    if not weights and not recipe.model.from_scratch:
        raise UsageError(
            f"model.path {recipe.model.path!r} has no *.safetensors weights; "
            "set model.from_scratch=true to start from random ones"
        )
    if weights and not recipe.model.from_scratch and not recipe.model.config:
        tensors = tuple(
            sorted((tensor for header in headers.values() for tensor in _tensors_of(header)), key=lambda t: t.name)
        )
        config = files.read_json(folder / "config.json")
    else:
        shapes = _shapes(folder, recipe)
        tensors = tuple(
            TensorFacts(name=name, shape=tuple(shape), dtype=dtype) for name, shape, dtype in shapes["tensors"]
        )
        config = shapes["config"]
    return ModelFacts(
        folder=str(folder),
        tokenizer_folder=str(tokenizer_folder),
        digest=files.digest_of([parts, recipe.model.config]),
        has_weights=bool(weights) and not recipe.model.from_scratch,
        num_params=sum(math.prod(tensor.shape) for tensor in tensors),
        tensors=tensors,
        config=config,
    )


def _safetensors_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("its header is longer than the format allows")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error
    return {name: value for name, value in header.items() if name != "__metadata__"}


def _tensors_of(header: dict[str, Any]) -> list[TensorFacts]:
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return [
        TensorFacts(name=name, shape=tuple(entry["shape"]), dtype=names.get(entry["dtype"], entry["dtype"]))
        for name, entry in header.items()
    ]


def _shapes(folder: Path, recipe: Recipe) -> dict[str, Any]:
    changes = files.canonical_json(recipe.model.config)
    key = [(folder / "config.json").read_text(encoding="utf-8"), changes, recipe.task]
    return dict(cached("shapes", key, lambda: _run_shapes(folder, changes, recipe.task)))


def _run_shapes(folder: Path, changes: str, task: str) -> Any:
    command = [sys.executable, "-m", f"{__package__}.shapes", str(folder), changes, task]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"model {str(folder)!r} cannot be built from its config: {reason}")
    return json.loads(done.stdout)
