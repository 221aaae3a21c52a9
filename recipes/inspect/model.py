"""Read what a recipe's model is: its folder, its config, its tensors.

torch is never imported for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ... import files
from ...checkpoints.formats.companion_files import TOKENIZER_FILES
from ...checkpoints.formats.safetensors_file import read_header
from ...checkpoints.formats.tensors import DTYPES_BY_TAG
from ...errors import DamagedError, PlanError, UsageError
from ...files import digest_of
from ...user_folders import recall, remember
from ..data.prompts import has_turns
from ..facts import ModelFacts, TensorFacts, TrainedFacts
from ..forecast.parameters import deciding_settings
from ..model_kinds import is_known
from ..schema import Recipe
from ..stages import resolve_stages
from ..tasks import advise_task, misfit, task_of
from .cache import file_digest
from .conversion import converted, weights_identity
from .model_folder import find_folder
from .tokenizer import tokenizer_digest

_SAMPLE_BYTES = 65_536
_RECIPES = Path(__file__).parents[1]
# What refuses a training when it looks at its model: another version may answer otherwise.
_LOOK = tuple(_RECIPES / name for name in ("adapting.py", "building.py", "new_tokens.py", "inspect/architecture.py"))


@dataclass(frozen=True, kw_only=True)
class ModelPlaces:
    """The folders of a model and its tokenizer.

    *is_cached* says that a cache holds the model.
    """

    folder: Path
    tokenizer_folder: Path
    is_cached: bool


def find_model(recipe: Recipe) -> ModelPlaces:
    """Return where the recipe's model is, fetched and converted where it must be.

    Raises:
        UsageError: the model or its tokenizer does not exist, or cannot be used.
    """
    spec = recipe.model
    folder, is_cached = find_folder("model.path", spec.path, spec.revision, has_code=spec.trust_remote_code)
    if not spec.from_scratch or not (folder / "config.json").is_file():
        found = folder
        folder = converted("model.path", spec.path, found)
        is_cached = is_cached or folder != found
    tokenizer_folder = folder
    if spec.tokenizer:
        named, _ = find_folder("model.tokenizer", spec.tokenizer)
        tokenizer_folder = converted("model.tokenizer", spec.tokenizer, named) if named.is_file() else named
    return ModelPlaces(folder=folder, tokenizer_folder=tokenizer_folder, is_cached=is_cached)


def read_model(
    recipe: Recipe, places: ModelPlaces, variants: Sequence[Recipe] = (), ahead: Sequence[Recipe] = ()
) -> ModelFacts:
    """Return what the recipe's model is: folder, identity, tensors, what trains.

    The *variants* of the recipe train the same model otherwise. So do those *ahead*, which are only remembered.

    Raises:
        UsageError: it is incomplete, or is not of a kind that can be trained here.
    """
    spec, task = recipe.model, task_of(recipe.task)
    folder, tokenizer_folder = places.folder, places.tokenizer_folder
    config = _read_config(spec.path, folder)
    if is_known(config) and (problem := misfit(task, config)):  # of others transformers tells below
        raise UsageError(f"model.path {spec.path!r} {problem}; {advise_task(config)}")
    _check_tokenizer(recipe, tokenizer_folder)
    weights = sorted(folder.glob("*.safetensors"))
    stored = [tensor for path in weights for tensor in _tensors_in(path)]
    if not weights and not spec.from_scratch:
        raise UsageError(
            f"model.path {spec.path!r} has no weights (*.safetensors, pytorch_model.bin, *.gguf); "
            "set model.from_scratch=true to start from random ones"
        )
    trainings, how = _trainings((recipe, *variants)), config.get("quantization_config")
    if trainings and how and not spec.from_scratch:
        raise UsageError(
            f"model.path {spec.path!r} is quantised already ({how.get('quant_method', 'in its config')}), and such "
            "weights do not train; give the model that it was made from, which adapter=qlora loads in 4 bits"
        )
    tables = {} if spec.from_scratch else _tables(weights, config.get("vocab_size"))
    built = _build(
        recipe, trainings, _trainings(ahead), [] if spec.from_scratch else stored, tables, folder, tokenizer_folder
    )
    if built["untied"]:
        _check_untied(recipe, built["untied"])
    dtypes, usual = {tensor.name: tensor.dtype for tensor in stored}, stored[0].dtype if stored else "float32"
    found = [
        TensorFacts(name=name, shape=tuple(shape), dtype=dtypes.get(name, usual)) for name, shape in built["tensors"]
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
        cached_bytes=0
        if not places.is_cached
        else sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    )


def read_config(recipe: Recipe, places: ModelPlaces) -> dict[str, Any]:
    """Return the config of the recipe's model, with the recipe's changes."""
    return {**_read_config(recipe.model.path, places.folder), **recipe.model.config}


def _beside(folder: Path, tokenizer_folder: Path) -> list[Path]:
    """Return the small files of a model and its tokenizer."""
    named = (folder / "config.json", folder / "generation_config.json", *_tokenizer_files(tokenizer_folder))
    return [path for path in named if path.is_file()]


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})


def model_digest(folder: Path, tokenizer_folder: Path, changes: Mapping[str, Any]) -> str:
    """Return the identity of a model.

    It covers config, tokenizer and every weight, with the *changes* to its config.
    """
    beside = [(path.name, file_digest(path)) for path in _beside(folder, tokenizer_folder)]
    return files.digest_of([[*beside, *weights_identity(folder)], dict(changes)])


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
        raise UsageError(_adapter_advice(name, folder))
    try:
        return dict(files.read_json(folder / "config.json"))
    except FileNotFoundError as error:
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
            f"merge this one first: sousbatch checkpoints consolidate {shlex.quote(str(folder))} "
            f"{shlex.quote(f'{folder}-merged')} --adapter merge --base FOLDER, the folder of its base"
        )
    return f"model.path {name!r} is an adapter whose adapter_config.json cannot be read; give the base model"


def _check_tokenizer(recipe: Recipe, folder: Path) -> None:
    if not _tokenizer_files(folder):
        raise UsageError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer_config.json, vocab.txt, vocab.json, a SentencePiece "
            "model); name one with model.tokenizer"
        )
    prompts = {stage.settings.data.prompt for stage in resolve_stages(recipe).values()}
    config = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (
        config.is_file() and "chat_template" in config.read_text(encoding="utf-8")
    )
    for prompt in sorted(filter(has_turns, prompts)) if not has_template else ():
        raise UsageError(
            f"data.prompt is {prompt}, but the tokenizer in {folder} has no chat template; take the model's -instruct "
            "form, put a chat_template.jinja there, or set data.prompt=alpaca or a template of your own"
        )


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


def _tables(weights: Sequence[Path], num_rows: int | None) -> dict[str, str]:
    """Return what tells apart tensors that have a row for each token.

    It is a digest of their beginning, middle and end. A model without a second one has none.
    """
    found = {}
    for path in weights:
        header, start = read_header(path)
        for name, entry in header.items():
            if name == "__metadata__" or len(entry["shape"]) != 2 or entry["shape"][0] != num_rows:
                continue
            begin, end = entry["data_offsets"]
            with path.open("rb") as stream:
                parts = [
                    stream.read(min(_SAMPLE_BYTES, end - at))
                    for at in (begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES))
                    if stream.seek(start + at) >= 0
                ]
            found[name] = f"{entry['dtype']} {hashlib.sha256(b''.join(parts)).hexdigest()}"
    return found if len(found) > 1 else {}


def _check_untied(recipe: Recipe, names: Sequence[str]) -> None:
    """Refuse ZeRO-3 for a model that transformers would tie under it alone."""
    for name, stage in resolve_stages(recipe).items():
        if stage.kind.leaves == "checkpoints" and stage.settings.train.zero.stage == 3:
            asked, instead = "train.zero.stage=3", "train.zero.stage=2"
        elif stage.kind.leaves == "predictions" and stage.settings.predict.engine == "zero3":
            asked, instead = "predict.engine=zero3", "predict.engine=transformers"
        else:
            continue
        raise UsageError(
            f"{asked} (stage {name}): {', '.join(names)} in the files of model.path {recipe.model.path!r} differs from "
            f"the weight that its class ties it to, and transformers would drop it under ZeRO-3; set {instead}"
        )


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


def _build(
    recipe: Recipe,
    trainings: Sequence[dict[str, Any]],
    ahead: Sequence[dict[str, Any]],
    stored: Sequence[TensorFacts],
    tables: Mapping[str, str],
    folder: Path,
    tokenizer_folder: Path,
) -> dict[str, Any]:
    """Return what `architecture` finds when it builds the model for *trainings*.

    Its answers are remembered, the model's and each training's. Its process takes seconds to start, so one that is
    needed also looks at the trainings *ahead*.
    """
    spec = recipe.model
    question = {
        "task": recipe.task,
        "changes": spec.config,
        "trusts": spec.trust_remote_code,
        "attentions": sorted({one.settings.model.attention or "eager" for one in resolve_stages(recipe).values()}),
        "add_tokens": spec.add_tokens,
        "stored": {tensor.name: (tensor.shape, tensor.dtype) for tensor in stored},
        "tables": tables,
    }
    code = [(path.name, file_digest(path)) for path in sorted(folder.glob("*.py"))] if spec.trust_remote_code else []
    base = files.digest_of(
        [
            *((folder / "config.json").read_text(encoding="utf-8"), tokenizer_digest(tokenizer_folder), code, question),
            *(metadata.version(name) for name in ("transformers", "peft")),
            *map(file_digest, _LOOK),
        ]
    )
    wanted, others = ({digest_of(one): one for one in part} for part in (trainings, ahead))
    built, trained = recall("built", base), {key: recall("trained", [base, key]) for key in wanted | others}
    if built is None or any(trained[key] is None for key in wanted):
        places = {"folder": str(folder), "tokenizer_folder": str(tokenizer_folder)}
        missing = {key: one for key, one in (wanted | others).items() if trained[key] is None}
        answer = _run_architecture({**places, **question, "trainings": missing})
        built = {name: value for name, value in answer.items() if name != "trained"}
        remember("built", base, built)
        for key in missing:
            trained[key] = answer["trained"][key]
            remember("trained", [base, key], trained[key])
    return {**built, "trained": {key: trained[key] for key in wanted}}


def _run_architecture(question: Mapping[str, Any]) -> Any:
    command = [sys.executable, "-m", f"{__package__}.architecture"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    text = files.canonical_json(question)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"model.path {question['folder']!r} cannot be trained here: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def _trained_facts(found: Mapping[str, Mapping[str, Any]]) -> dict[str, TrainedFacts]:
    problems = [one["problem"] for one in found.values() if "problem" in one]
    if problems:
        raise PlanError(list(dict.fromkeys(problems)))
    return {key: TrainedFacts(**numbers) for key, numbers in found.items()}
