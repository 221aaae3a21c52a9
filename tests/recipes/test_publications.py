"""A publish stage: when it starts, and what is refused before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError
from sousbatch.recipes.compile import compile
from sousbatch.recipes.schema import Publish, StageSpec
from sousbatch.recipes.stages import smoke, stages_of
from sousbatch.recipes.sweep import plan_sweep, point_plan
from sousbatch.run_folder import PLAN_FORMAT

Run = Callable[..., tuple[int, str, str]]
HERE = Site(
    name="here", launcher="local", cpus_per_node=4, memory_bytes=16 * 10**9, gpus_per_node=0, gpu_memory_bytes=0
)
PUBLISHED = ("publish.url=/data/small", "stages.publish={}")


def test_it_waits_for_all_ends_and_decides_no_result(small: ModuleType) -> None:
    usual = small.RECIPE
    recipe = replace(usual, stages={**stages_of(usual), "publish": StageSpec()}, publish=Publish(url="/data/small"))
    plan = compile(recipe, small.SITE, small.INPUTS)
    assert [(item.stage, item.condition) for item in plan.stage("publish").after] == [
        ("consolidate", "ok"),
        ("score", "ok"),
    ]
    elsewhere = compile(replace(recipe, publish=Publish(url="/data/other")), small.SITE, small.INPUTS)
    assert elsewhere.run_id == plan.run_id and plan.format == PLAN_FORMAT


def test_a_place_without_a_stage_is_warned_of(small: ModuleType) -> None:
    recipe = replace(small.RECIPE, publish=Publish(url="/data/small"))
    assert any(
        "no stage publishes: add stages.publish={}" in one for one in compile(recipe, small.SITE, small.INPUTS).warnings
    )
    assert not any("publish" in one for one in small.plan().warnings)


def test_a_smoke_run_publishes_nothing(small: ModuleType) -> None:
    stages = {**stages_of(small.RECIPE), "away": StageSpec(kind="publish")}
    recipe = replace(small.RECIPE, stages=stages, publish=Publish(url="/data/small"))
    assert "away" not in smoke(recipe).stages and "score" in smoke(recipe).stages
    assert smoke(recipe).publish.url is None, "else a plan would warn that no stage publishes"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["stages.publish={}"], "publish.url is missing, and stage 'publish' publishes (set publish.url to"),
        (["publish.url=nosuch://bucket/x"], "publish.url is 'nosuch://bucket/x': Protocol not known: nosuch"),
        (["publish.url=models/small"], "publish.url is 'models/small': is no absolute folder, such as /data/"),
        (
            ["publish.url=/data/small", "stages.publish={set: {publish: {url: 'nosuch://b'}}}"],
            "stages.publish.set.publish.url is 'nosuch://b'",
        ),
        (
            ["publish.url=/data/small", "stages={predict: {}, publish: {}}"],
            "stages.publish has nothing to publish: publish.what is model, adapter, predictions, report",
        ),
        (
            [
                "publish.url=/data/small",
                "publish.what=[predictions]",
                "stages={train: {}, consolidate: {}, publish: {}}",
            ],
            "publish.what is predictions (above it there is model",
        ),
        (["publish.url='s3://bucket/x?token=hf_abcdefghijklmnopqrstuvwxyz012345'"], "publish.url holds a secret"),
    ],
)
def test_what_cannot_be_published_is_refused_at_plan(
    project: Path, sousbatch: Run, given: list[str], said: str
) -> None:
    code, _, err = sousbatch("plan", "small.yaml", *given)
    assert code == 2 and said in err.replace("\n", " ")


def test_the_points_of_a_sweep_do_not_publish_to_one_place(project: Path) -> None:
    asked = partial(plan_sweep, "./small.yaml", sweep=["seed=1,2"], site=HERE, store=project / "runs")
    with pytest.raises(PlanError, match="publish.url '/data/small' is that of 2 points, and a place takes one run"):
        asked(texts=PUBLISHED)
    plan = asked(texts=["publish.url='/data/small-${seed}'", "seed=0", PUBLISHED[1]])
    assert [point_plan(plan, index).stage("publish").settings.publish.url for index in (0, 1)] == [
        "/data/small-1",
        "/data/small-2",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [("publication.json", "holds the publication of run aaa; name another place"), ("other", "holds files and no")],
)
def test_a_folder_that_holds_something_else_is_refused_before_anything_runs(
    project: Path, sousbatch: Run, tmp_path: Path, name: str, said: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / name).write_text('{"run": "aaa"}')
    code, _, err = sousbatch("submit", "small.yaml", "--detach", f"publish.url={place}", "stages.publish={}")
    assert code == 2 and said in err and not list(project.rglob("plan.json"))
