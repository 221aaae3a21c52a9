"""Gather what a run publishes, and write the card that says what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from .. import __version__, files
from ..checkpoints.choice import choose_checkpoint
from ..checkpoints.consolidation.consolidate import consolidate
from ..checkpoints.consolidation.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    digest_of_files,
    to_json,
    verify_manifest,
)
from ..checkpoints.consolidation.model_card import CARD_NAME
from ..checkpoints.integrity import open_verified
from ..errors import NotFoundError, RunError
from ..predictions.scoring import MODEL, WHO
from ..recipes.decodings import decodings_of
from ..recipes.plan import Plan, Stage
from ..recipes.reference import differences
from ..recipes.retention import consolidate_options, weights_dtype
from ..recipes.schema import Recipe
from ..redaction import without_places
from ..run_folder import RunPaths

_UNTOLD = ("resources", "environment", "tracking", "publish", "stages", "name", "description")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The files of a publication by their names there, and what they are."""

    about: dict[str, Any]
    files: dict[str, Path]


def gather(
    paths: RunPaths,
    plan: Plan,
    what: Collection[str],
    *,
    model_stage: str | None,
    stages: Collection[Stage],
    work: Path,
) -> Contents:
    """Return what the run of *paths* publishes.

    That is the model of *model_stage* and what the given *stages* left. Files that are made for it go into *work*.

    Raises:
        RunError: something of *what* is not there yet.
        DamagedError: the model is not what was written.
    """
    found: dict[str, Path] = {}
    model: Manifest | None = None
    if "model" in what and model_stage is not None:
        folder = paths.model(model_stage)
        if not (folder / MANIFEST_NAME).is_file():
            raise _lacking(paths, f"the model of stage {model_stage!r}")
        model = verify_manifest(folder)
        names = [*(file.name for file in model.files), *(file.name for file in model.weights)]
        found = {name: folder / name for name in names}
    if "adapter" in what and model_stage is not None:
        found |= _adapter(paths, plan.stage(model_stage), work / "adapter")
    if "predictions" in what:
        found |= _predictions(paths, stages)
    scores = _scores(paths, stages)
    if scores:
        found[paths.metrics.name] = work / paths.metrics.name
        files.write_json(work / paths.metrics.name, scores)
    if "report" in what:
        found[paths.report.name] = _report(paths, work)
    about = {
        "format": 1,
        "recipe": plan.recipe.name,
        "run": paths.run_id,
        "version": __version__,
        "model": model and model.digest,
        "code": plan.inputs.code_digest,
        "data": plan.data_digests,
    }
    text = found[CARD_NAME].read_text(encoding="utf-8") if CARD_NAME in found else f"# {plan.recipe.name}\n"
    found[CARD_NAME] = work / CARD_NAME
    found[CARD_NAME].write_text("\n".join([text, *_card(plan, about, scores)]), encoding="utf-8")
    if model is not None:
        found[MANIFEST_NAME] = work / MANIFEST_NAME
        files.write_json(work / MANIFEST_NAME, to_json(_with_card(model, found[CARD_NAME])))
    return Contents(about=about, files=found)


def _lacking(paths: RunPaths, what: str) -> RunError:
    why = "is not there yet, or was removed"  # by `clean`, or as that of a trial that is not the best
    return RunError(f"{what} {why}; `sousbatch status {paths.run_id}` shows where the run stands")


def _with_card(model: Manifest, card: Path) -> Manifest:
    """Return the manifest of the model beside another card.

    So it can be verified where it lies.
    """
    content = card.read_bytes()
    own = FileRecord(name=CARD_NAME, num_bytes=len(content), sha256=files.digest_file(card))
    small = tuple(own if file.name == CARD_NAME else file for file in model.files)
    num_bytes = sum([file.num_bytes for file in small] + [file.num_bytes for file in model.weights])
    return replace(model, files=small, num_bytes=num_bytes, digest=digest_of_files(model.weights, small))


def _adapter(paths: RunPaths, stage: Stage, folder: Path) -> dict[str, Path]:
    """Return the adapter that the model of *stage* was made with, if any.

    It is written to *folder*.

    Raises:
        RunError: its checkpoint is gone.
    """
    settings = stage.settings
    if settings.adapter.method == "full" or stage.train_stage is None:
        return {}
    try:
        chosen = choose_checkpoint(paths.checkpoints(stage.train_stage), settings.consolidate.choose, settings.goal)
    except NotFoundError as error:
        raise RunError(f"no adapter: {error}; leave adapter out of what is published") from error
    options = replace(consolidate_options(stage, chosen, None), dtype=weights_dtype(settings))
    consolidate(open_verified(chosen.path), folder, options)
    return {f"adapter/{path.name}": path for path in folder.iterdir() if path.is_file()}


def _predictions(paths: RunPaths, stages: Collection[Stage]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for stage in stages:
        if stage.record.leaves != "merged predictions" or stage.predict_stage is None:
            continue
        for decoding in decodings_of(stage.settings):
            path = paths.predictions_file(stage.predict_stage, decoding)
            if not path.is_file():
                raise _lacking(paths, f"the predictions file of stage {stage.name!r}")
            found[_name(paths, path)] = path
        found |= {_name(paths, path): path for path in paths.submission_files(stage.predict_stage)}
    return found


def _name(paths: RunPaths, path: Path) -> str:
    return path.relative_to(paths.root).as_posix()


def _scores(paths: RunPaths, stages: Collection[Stage]) -> dict[str, Any]:
    """Return the scores of the stages, as metrics.json has them."""
    found = {}
    for stage in stages:
        for decoding in decodings_of(stage.settings) if stage.record.leaves == "scores" else ():
            path = paths.stage_metrics(stage.name, decoding)
            if path.is_file():
                found[path.stem] = files.read_json(path)
    return found


def _report(paths: RunPaths, work: Path) -> Path:
    """Write the page that shows the run, by the command that does so for people.

    It is the same wherever it is written, as long as the run is the same.
    """
    page = work / paths.report.name
    command = [sys.executable, "-P", "-m", "sousbatch", "report", str(paths.root), "--portable", "--out", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TZ": "UTC"})
    if done.returncode:
        raise RunError(f"no report: {done.stderr.strip()}; leave report out of publish.what")
    return page


def _card(plan: Plan, about: Mapping[str, Any], scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that a card has beside those of the model."""
    if scores:
        measured = {who: name for who, name in WHO.items() if any(who in found["scores"] for found in scores.values())}
        yield f"## Scores\n\n| stage | rows | metric | {' | '.join(measured.values())} |"
        yield f"|---|---|---{'|---' * len(measured)}|"
        for stage, found in scores.items():
            for metric in found["scores"][MODEL]:
                values = (found["scores"].get(who, {}).get(metric) for who in measured)
                cells = ["" if value is None else f"{value:.6g}" for value in values]
                yield f"| {stage} | {found['num_rows']} of {found['split']} | {metric} | {' | '.join(cells)} |"
        yield ""
    yield f"## Recipe\n\n`{plan.recipe.name}`; what is not given has its default.\n\n```yaml"
    for key, _, value in differences(Recipe(), plan.recipe):
        if key.split(".")[0] not in _UNTOLD and value is not None:
            yield f"{key}: {_plain(without_places(value, key))}"
    yield "```\n\n## Digests\n\n| | |\n|---|---|"
    digests = {"run": about["run"], "model": about["model"]}
    digests |= {"code": about["code"]} if plan.recipe.environment.code else {}
    digests |= {f"data, {split}": digest for split, digest in about["data"].items()}
    yield from (f"| {name} | `{digest}` |" for name, digest in digests.items() if digest)
    yield ""


def _plain(value: Any) -> str:
    """Return a value as YAML writes it in one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)).split("\n")[0]
