"""Every recipe that we ship composes, compiles and says what it is."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sousbatch.cluster.site import Site
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.data.generators import GENERATORS
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.schema import validate
from sousbatch.recipes.site_file import read_site_file
from sousbatch.recipes.stages import resolve_stages, smoke

NAMES = sorted(path.stem for path in LIBRARY_DIR.glob("*.yaml"))
SITE = Site(
    name="here",
    launcher="local",
    cpus_per_node=2,
    memory_bytes=8 * 10**9,
    gpus_per_node=8,
    gpu_memory_bytes=80 * 10**9,
)


PROFILES = sorted(path.stem for path in (LIBRARY_DIR / "resources").glob("*.yaml"))
# Recipes for a model of the hub and files of one's own: a tiny model in its place, and whose rows the files hold.
OWN = {
    "classification": ("tiny-bert", "labels"),
    "dialogue-summarization": ("tiny-bart", "dialogues"),
    "essay-generation": ("tiny-llama", "essays"),
    "hangul-restoration-llm": ("tiny-hangul-chat", "hangul"),
    "korquad-qa": ("tiny-bert", "questions"),
    "news-summarization-lora": ("tiny-llama", "dialogues"),
}
PACKAGED = "smollm2-korean-qa"  # its model takes 12 s to dequantise


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models with weights, as those of the hub have them; BERT as it was pretrained."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("tiny-bert", "AutoModelForMaskedLM"), ("tiny-bart", "AutoModelForSeq2SeqLM")) + tuple(
        (name, "AutoModelForCausalLM") for name in ("tiny-llama", "tiny-hangul-chat")
    ):
        source = LIBRARY_DIR / "models" / name
        shutil.copytree(source, folder / name)
        getattr(transformers, kind).from_config(transformers.AutoConfig.from_pretrained(source)).save_pretrained(
            folder / name
        )
    for path in (LIBRARY_DIR / "models/tiny-llama").glob("tokenizer*.json"):
        shutil.copy(path, folder / "tiny-bart")
    return folder


@pytest.fixture
def ready(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return what a recipe of the library needs to be planned here: nothing, or its files and a model."""
    monkeypatch.chdir(tmp_path)

    def prepare(name: str) -> list[str]:
        if name not in OWN:
            return []
        model, generator = OWN[name]
        recipe = compose(name)
        rows = GENERATORS[generator](seed=1, num_train=96, num_validation=8, num_test=8)
        columns = {field: value for field, value in validate.to_plain(recipe.data.columns).items() if value}
        for split, file in recipe.data.splits.items():
            _write(Path(str(file)), [{columns.get(key, key): row[key] for key in row} for row in rows[split]])
        changes = [f"model.path={models / model}", "model.revision=null"]
        changes += ["model.freeze=[layers:0-0]"] * bool(recipe.model.freeze)  # of two layers
        return [*changes, "adapter.target_modules=[q_proj,v_proj]"] if recipe.adapter.method != "full" else changes

    return prepare


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        asked = [
            {
                "context": row["context"],
                "qas": [
                    {
                        "id": row["id"],
                        "question": row["question"],
                        "answers": [{"text": row["answers"], "answer_start": row["answer_start"]}],
                    }
                ],
            }
            for row in rows
        ]
        path.write_text(json.dumps({"version": "1.0", "data": [{"title": "t", "paragraphs": asked}]}))
        return
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_has_its_own_name_a_description_and_stages_that_fit(name: str) -> None:
    recipe = compose(name)
    assert recipe.name == name and recipe.description and resolve_stages(recipe)


# The small ones and that of a package run as a whole in the long tests.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-small") and name != PACKAGED])
def test_a_shipped_recipe_compiles_as_it_is_as_a_smoke_run_and_for_every_profile(
    ready, name: str, tmp_path: Path
) -> None:
    own = ready(name)
    recipe = compose(name, own)
    inputs = inspect(recipe, tmp_path)
    assert compile(recipe, SITE, inputs).warnings == ()
    short = smoke(recipe)
    plan = compile(short, SITE, inputs)
    assert {stage.batch.steps for stage in plan.stages if stage.batch} == {2}
    for profile in PROFILES:
        there = compose(name, [*own, f"resources={profile}"])
        site, space = read_site_file(profile)
        plan = compile(there, site, replace(inputs, disk_space=space))
        assert {stage.resources.device for stage in plan.stages} == {"cpu" if profile == "cpu" else "gpu"}


@pytest.mark.parametrize("group", ["model", "schedule", "data"])
def test_each_file_of_a_group_lays_values_over_the_keys_of_its_name(group: str) -> None:
    stages = "stages={train: {}, consolidate: {}}"
    for path in sorted((LIBRARY_DIR / group).glob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        plain = ["data.separator=''", "data.pad_input_to=null"]  # which a template of turns does not have
        recipe = compose("hangul-restoration", [f"{group}={path.stem}", stages, *plain])
        section = recipe.train.schedule if group == "schedule" else getattr(recipe, group)
        assert given and {key: validate.to_plain(section)[key] for key in given if key != "columns"} == {
            key: value for key, value in given.items() if key != "columns"
        }


@pytest.mark.parametrize("method", sorted(path.stem for path in (LIBRARY_DIR / "adapter").glob("*.yaml")))
def test_a_shipped_adapter_is_called_as_its_method(method: str) -> None:
    assert compose("hangul-restoration", [f"adapter={method}"]).adapter.method == method
