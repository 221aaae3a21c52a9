"""Order the labels of a classification, and put them into the model's config.

Pure. `inspect.labels` collects them from the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .schema import Recipe


def labels_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels that a model's config names, in the order of its outputs."""
    named = config.get("id2label")
    if not isinstance(named, Mapping):
        return ()
    return tuple(str(named[place]) for place in sorted(named, key=int))


def ordered(labels: Collection[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return *labels* in the order of the model's own, where they are the same.

    Such a model keeps its trained head. Others stand in the order of numbers or of text.
    """
    own = labels_in(config)
    if set(own) == set(labels):
        return own
    is_number = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label) if is_number else 0, label)))


def with_labels(recipe: Recipe, labels: Sequence[str]) -> Recipe:
    """Return *recipe* with *labels* in the config of its model, which keeps them."""
    if not labels:
        return recipe
    named = {
        "id2label": {str(place): label for place, label in enumerate(labels)},
        "label2id": {label: place for place, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    return replace(recipe, model=replace(recipe.model, config={**recipe.model.config, **named}))
