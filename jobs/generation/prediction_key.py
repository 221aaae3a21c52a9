"""The prediction key: what decides the predictions, and nothing that does not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoints.consolidation.manifest import read_manifest
from ...errors import NotFoundError
from ...files import digest_of, read_json
from ...recipes.inspect.cache import file_digest
from ...recipes.plan import Stage
from ...run_folder import RunPaths

_RESOURCES = ("unit_rows", "batch_rows")  # of predict: how, not what
_PROMPT = ("prompt", "system", "pad_input_to", "separator", "long_rows")
_ENGINE = "transformers-generate-1"


def prediction_key(paths: RunPaths, stage: Stage) -> str:
    """Return the key of a predict stage: 16 hex digits over weights, rows, prompt, decoding, dtype, engine.

    Raises:
        NotFoundError: the model is not there yet.
    """
    settings = stage.settings
    model_dir = stage.model.dir_in(paths)
    decoding = {name: value for name, value in vars(settings.predict).items() if name not in _RESOURCES}
    prompt = {name: getattr(settings.data, name) for name in _PROMPT}
    parts: list[Any] = [
        _ENGINE,
        _weights_digest(model_dir),
        stage.splits["predict"].digest,
        vars(settings.data.columns),
        prompt,
        decoding,
        dtype_of(stage, model_dir),
        settings.seed if settings.predict.sample else None,
        stage.model.digest,  # with it the tokenizer, where that is not in the model's folder
    ]
    return digest_of(parts)[:16]


def dtype_of(stage: Stage, model_dir: Path) -> str:
    """Return the arithmetic of a predict stage; a CPU computes 16-bit weights in float32."""
    if stage.settings.predict.dtype is not None:
        return stage.settings.predict.dtype
    if stage.resources.device == "cpu":
        return "float32"
    config = read_json(model_dir / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _weights_digest(model_dir: Path) -> str:
    """Return the identity of a model's files: its manifest's, else that of every file, remembered by file."""
    with suppress(NotFoundError):
        digest = read_manifest(model_dir).digest
        if digest is not None:
            return digest
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise NotFoundError(f"there is no model in {model_dir}: the stage that makes it has not finished")
    names = [*weights, *sorted(model_dir.glob("*.json"))]
    return digest_of([(path.name, file_digest(path)) for path in names])
