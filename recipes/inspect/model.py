"""Read what a recipe's model is: its folder, its config, its tensors.

torch is never imported for it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import files
from ...checkpoints.capacity.limits import read_limits, tightest
from ...checkpoints.formats.safetensors_file import read_header
from ...checkpoints.formats.tensors import DTYPES_BY_TAG
from ...errors import DamagedError, PlanError, UsageError, nearest
from ...files import digest_of
from ...user_folders import cached
from ..catalog import LIBRARY_DIR
from ..facts import ModelFacts, TensorFacts, TrainedFacts
from ..forecast.parameters import deciding_settings
from ..schema import Recipe, StageSettings
from ..stages import resolve_stages
from ..tasks import misfit, task_of
from .cache import file_digest
from .tokenizer import tokenizer_digest

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")


def _folder_here(key: str, name: str) -> Path | None:
    """Return the local folder that *key* names.

    Return None where the hub has it.
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
    if folder.is_file():
        raise UsageError(f"{key} {name!r} is {_file_kind(folder)}; give the folder that save_pretrained wrote")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UsageError(
            f"{key} {name!r} does not exist: looked for {folder.absolute()}; give a local folder, "
            "a hub id such as org/name, or library:NAME"
        )
    return None


def _file_kind(path: Path) -> str:
    if path.suffix.lower() == ".gguf":
        return "a GGUF file, whose weights are quantised for inference and cannot train"
    return "a file and no folder"


def _from_hub(key: str, name: str, revision: str | None = None, *, has_code: bool = False) -> Path:
    """Return the folder of a hub repository in the hub's cache.

    The repository is fetched into the cache if it fits.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * has_code
    logger.warning("%s %s is fetched from the hub where it is not in its cache", key, name)
    try:
        with suppress(DryRunError):  # the hub does not answer: what the cache has must do
            found = snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True)
            wanted = sum(file.file_size or 0 for file in found if file.will_download)
            _check_cache(key, name, wanted, Path(constants.HF_HUB_CACHE))
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise UsageError(f"{key} {name!r} is neither a folder nor a hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{key} {name!r} is no folder here (looked in {Path.cwd()}) and cannot be fetched from the hub; check the "
            f"name, the network, and for a gated model that HF_TOKEN is set and its licence accepted: {reason}"
        ) from error


def _check_cache(key: str, name: str, wanted_bytes: int, cache: Path) -> None:
    limit = tightest(read_limits(cache))
    if wanted_bytes > (limit.num_bytes or 0):
        raise UsageError(
            f"{key} {name!r} is {wanted_bytes / 1e9:,.3g} GB to fetch, and the hub's cache {cache} can take "
            f"{(limit.num_bytes or 0) / 1e9:,.3g} GB ({limit.source}); set HF_HOME to a folder with more free space"
        )


def read_model(recipe: Recipe, variants: Sequence[Recipe] = ()) -> ModelFacts:
    """Return what the recipe's model is: folder, identity, tensors, what trains.

    The *variants* of the recipe train the same model otherwise.

    Raises:
        UsageError: it does not exist, is incomplete, or is not of a kind that can be trained here.
    """
    spec, task = recipe.model, task_of(recipe.task)
    here = _folder_here("model.path", spec.path)
    folder = here or _from_hub("model.path", spec.path, spec.revision, has_code=spec.trust_remote_code)
    config = _read_config(spec.path, folder)
    if problem := misfit(task, config):
        raise UsageError(f"model.path {spec.path!r} {problem}")
    tokenizer_folder = folder
    if spec.tokenizer:
        key = "model.tokenizer"
        tokenizer_folder = _folder_here(key, spec.tokenizer) or _from_hub(key, spec.tokenizer)
    _check_tokenizer(recipe, tokenizer_folder)
    weights = sorted(folder.glob("*.safetensors"))
    stored = [tensor for path in weights for tensor in _tensors_in(path)]
    if not weights and not spec.from_scratch:
        raise UsageError(
            f"model.path {spec.path!r} has no *.safetensors weights; "
            "set model.from_scratch=true to start from random ones"
        )
    trainings = _trainings((recipe, *variants))
    is_plain = all(one == deciding_settings(StageSettings(task=recipe.task)) for one in trainings)
    found, trained = sorted(stored, key=lambda tensor: tensor.name), dict[str, TrainedFacts]()
    if not weights or spec.from_scratch or spec.config or task.has_new_head or not is_plain:
        built = _build(recipe, trainings, folder, tokenizer_folder)
        dtypes, usual = {tensor.name: tensor.dtype for tensor in stored}, stored[0].dtype if stored else "float32"
        found = [
            TensorFacts(name=name, shape=tuple(shape), dtype=dtypes.get(name, usual))
            for name, shape in built["tensors"]
        ]
        config, trained = built["config"], _trained_facts(built["trained"])
    return ModelFacts(
        folder=str(folder),
        tokenizer_folder=str(tokenizer_folder),
        digest=model_digest(folder, tokenizer_folder, spec.config),
        has_weights=bool(weights) and not spec.from_scratch,
        num_params=sum(math.prod(tensor.shape) for tensor in found),
        tensors=tuple(found),
        config=config,
        trained=trained,
        beside_bytes=sum(path.stat().st_size for path in _beside(folder, tokenizer_folder)),
        cached_bytes=0 if here else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def read_config(recipe: Recipe) -> dict[str, Any]:
    """Return the config of the recipe's model as its file has it."""
    spec = recipe.model
    here = _folder_here("model.path", spec.path)
    folder = here or _from_hub("model.path", spec.path, spec.revision, has_code=spec.trust_remote_code)
    return _read_config(spec.path, folder)


def _beside(folder: Path, tokenizer_folder: Path) -> list[Path]:
    """Return the small files of a model: what it is, and how its text becomes tokens."""
    named = (folder / "config.json", *(tokenizer_folder / name for name in _TOKENIZER_FILES))
    return [path for path in named if path.is_file()]


def model_digest(folder: Path, tokenizer_folder: Path, changes: Mapping[str, Any]) -> str:
    """Return the identity of a model.

    It covers config, tokenizer and every weight, with the *changes* to its config.
    """
    named = [*_beside(folder, tokenizer_folder), *sorted(folder.glob("*.safetensors"))]
    return files.digest_of([[(path.name, file_digest(path)) for path in named], dict(changes)])


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    try:
        return dict(files.read_json(folder / "config.json"))
    except FileNotFoundError as error:
        if (folder / "adapter_config.json").is_file():
            raise UsageError(_adapter_advice(name, folder)) from error
        if found := sorted(folder.glob("*.gguf")):
            raise UsageError(f"model.path {name!r} holds {found[0].name}, {_file_kind(found[0])}") from error
        raise UsageError(
            f"model.path {name!r} has no config.json; give the folder that save_pretrained wrote"
        ) from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder / 'config.json'} is not a config: {error}") from error


def _adapter_advice(name: str, folder: Path) -> str:
    """Say what to do with a folder that peft wrote: it is beside a model, not one."""
    with suppress(OSError, ValueError, AttributeError):
        base = files.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        which = f" for {base!r}" if base else ""
        return (
            f"model.path {name!r} is an adapter{which} and no model; give the base model to train a new adapter, or "
            'merge this one first: python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\"; copy the "
            "tokenizer into it"
        )
    return f"model.path {name!r} is an adapter whose adapter_config.json cannot be read; give the base model"


def _check_tokenizer(recipe: Recipe, folder: Path) -> None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); name one with model.tokenizer")
    uses_chat = any(stage.settings.data.prompt == "chat" for stage in resolve_stages(recipe).values())
    config = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and "chat_template" in config.read_text(encoding="utf-8")
    )
    if uses_chat and not has_template:
        raise UsageError(f"data.prompt is chat, but the tokenizer in {folder} has no chat template; write a template")


def _tensors_in(path: Path) -> list[TensorFacts]:
    """Return what a safetensors file holds.

    A dtype that is not known here keeps the file's tag.
    """
    try:
        header, _ = read_header(path)
        return [
            TensorFacts(name=name, shape=tuple(entry["shape"]), dtype=_dtype_name(entry["dtype"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, DamagedError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error


def _dtype_name(tag: str) -> str:
    return DTYPES_BY_TAG[tag].name if tag in DTYPES_BY_TAG else tag


def _trainings(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Return what decides what each training of the recipes trains."""
    return [
        deciding_settings(stage.settings)
        for recipe in recipes
        for stage in resolve_stages(recipe).values()
        if stage.kind.leaves == "checkpoints"
    ]


def _build(recipe: Recipe, trainings: Sequence[dict[str, Any]], folder: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """Return what `architecture` finds when it builds the model for *trainings*.

    The answer is remembered.
    """
    spec = recipe.model
    question = {
        "model_class": task_of(recipe.task).model_class,
        "changes": spec.config,
        "trusts": spec.trust_remote_code,
        "add_tokens": spec.add_tokens,
        "trainings": {digest_of(one): one for one in trainings},
    }
    code = [(path.name, file_digest(path)) for path in sorted(folder.glob("*.py"))] if spec.trust_remote_code else []
    key = [
        *((folder / "config.json").read_text(encoding="utf-8"), tokenizer_digest(tokenizer_folder), code, question),
        *(metadata.version(name) for name in ("transformers", "peft")),
    ]
    places = {"folder": str(folder), "tokenizer_folder": str(tokenizer_folder)}
    return dict(cached("built", key, lambda: _run_architecture({**places, **question})))


def _run_architecture(question: Mapping[str, Any]) -> Any:
    command = [sys.executable, "-m", f"{__package__}.architecture"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    text = files.canonical_json(question)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"model {question['folder']!r} cannot be built from its config: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _trained_facts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, TrainedFacts]:
    problems = [one["problem"] for one in found.values() if "problem" in one]
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return {key: TrainedFacts(**numbers) for key, numbers in found.items()}
