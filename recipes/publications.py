"""The faults of publish stages that can be known before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from ..errors import Fault
from ..publishing.store import refusal_of
from .plan import Plan, Stage
from .schema import Recipe
from .stages import resolve_stages


def publish_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield why something cannot be published.

    There is no place, one that takes nothing, or nothing to send.
    """
    url = recipe.publish.url
    if url is not None and (refusal := refusal_of(url)):
        yield Fault(key="publish.url", problem=f"is {url!r}: {refusal}")
    stages = resolve_stages(recipe)
    for number, stage in enumerate(stages.values()):
        if stage.kind.leaves != "publication":
            continue
        spec, key = stage.settings.publish, f"stages.{stage.name}"
        if spec.url is None:
            hint = "set publish.url to an absolute folder, a URL such as s3://BUCKET/NAME, or hf://OWNER/NAME"
            yield Fault(key="publish.url", problem=f"is missing, and stage {stage.name!r} publishes", hint=hint)
        elif spec.url != url and (refusal := refusal_of(spec.url)):
            yield Fault(key=f"{key}.set.publish.url", problem=f"is {spec.url!r}: {refusal}")
        leaves = {one.kind.leaves for one in list(stages.values())[:number]}
        there = {"model"} if stage.of is not None else set[str]()
        if stage.of is not None and stages[stage.of].settings.adapter.method != "full":
            there.add("adapter")
        there |= {"predictions"} if "merged predictions" in leaves else set()
        if not there & set(spec.what) and (not there or spec.what != ("report",)):
            problem = f"has nothing to publish: publish.what is {', '.join(spec.what) or 'empty'}"
            hint = f"above it there is {', '.join(sorted(there)) or 'no consolidate and no merge stage'}"
            yield Fault(key=key, problem=problem, hint=hint)


def shared_places(plans: Sequence[Plan]) -> Iterator[str]:
    """Yield each place that several points of a sweep would publish to.

    A place takes one run.
    """
    urls = [
        stage.settings.publish.url for plan in plans for stage in plan.stages if stage.record.leaves == "publication"
    ]
    for url, count in Counter(urls).items():
        if count > 1:
            yield (
                f"publish.url {url!r} is that of {count} points, and a place takes one run; name what is swept in it, "
                "such as /data/small-${seed}, or publish the best point by `sousbatch publish RUN`"
            )


def unpublished(recipe: Recipe, stages: Sequence[Stage]) -> Iterator[str]:
    """Warn of a place that nothing is sent to by itself."""
    if recipe.publish.url is not None and all(stage.record.leaves != "publication" for stage in stages):
        yield (
            f"publish.url is {recipe.publish.url!r} and no stage publishes: add stages.publish={{}}, or run "
            "`sousbatch publish RUN` when all is done"
        )
