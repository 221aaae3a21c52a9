"""The prediction key: what decides the predictions, and nothing that does not."""

from __future__ import annotations

from contextlib import suppress
from operator import attrgetter
from pathlib import Path

from ...checkpoints.consolidation.manifest import read_manifest
from ...errors import NotFoundError
from ...files import digest_of, read_json
from ...recipes.generation import ENGINES, EngineSpec
from ...recipes.inspect.cache import file_digest, weights_digest
from ...recipes.model_kinds import fails_loaded_in_half
from ...recipes.plan import Stage
from ...recipes.schema.validate import to_plain
from ...recipes.tasks import TaskSpec, task_of
from ...run_folder import RunPaths

# Which rows are answered, by what, and what goes into a line besides the answer.
_ALWAYS = (
    *("task", "data.columns.id", "predict.split", "predict.rows", "predict.engine", "predict.dtype"),
    "predict.load_in",
)


def deciding_keys(task: TaskSpec, engine: EngineSpec | None) -> tuple[str, ...]:
    """Return the keys of a stage's settings that decide its predictions.

    Model and data decide, too.
    """
    return tuple(sorted({*_ALWAYS, *task.decides, *(engine.decides if engine else ())}))


def prediction_key(paths: RunPaths, stage: Stage) -> str:
    """Return the key of a predict stage, of 16 hex digits.

    It is a digest of model, rows, and the settings that decide.

    Raises:
        NotFoundError: the model is not there yet.
    """
    settings, model_dir = stage.settings, stage.model.dir_in(paths)
    task = task_of(settings.task)
    engine = ENGINES.load(settings.predict.engine) if task.generates else None
    parts = [
        [task.version, engine and engine.version],
        {key: to_plain(attrgetter(key)(settings)) for key in deciding_keys(task, engine)},
        _weights_digest(model_dir),
        stage.splits["predict"].digest,
        dtype_of(stage, model_dir),
        stage.model.digest,  # with it the tokenizer, where that is not in the model's folder
    ]
    return digest_of(parts)[:16]


def dtype_of(stage: Stage, model_dir: Path) -> str:
    """Return the arithmetic of a predict stage.

    A CPU computes 16-bit weights in float32, as does a model that fails with them.
    """
    if stage.settings.predict.dtype is not None:
        return stage.settings.predict.dtype
    if stage.resources.device == "cpu":
        return "float32"
    config = read_json(model_dir / "config.json")
    if fails_loaded_in_half(config):
        return "float32"
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _weights_digest(model_dir: Path) -> str:
    """Return the identity of a model's files.

    It is that of its manifest, else that of every file, remembered by file.
    """
    with suppress(NotFoundError):
        digest = read_manifest(model_dir).digest
        if digest is not None:
            return digest
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise NotFoundError(f"there is no model in {model_dir}: the stage that makes it has not finished")
    found = [(path.name, weights_digest(path)) for path in weights]
    return digest_of(found + [(path.name, file_digest(path)) for path in sorted(model_dir.glob("*.json"))])
