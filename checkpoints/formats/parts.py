"""Find the model among all that a training loop saved, by names alone.

An optimizer's moments are never taken as weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from ...errors import UsageError
from .tensors import Source

Keys = tuple[str, ...]

# Under these, training loops put the model beside the rest, the surest first.
_MODEL_KEYS = ("model", "module", "model_state_dict", "model_state", "state_dict")
# And under these what is no model.
_OTHERS = re.compile(
    r"optim\w*|opt|.*optimizer\w*|lr_sched\w*|sched\w*|.*scheduler\w*|train_state|trainer_state|dataloader\w*|rng\w*|"
    r"scaler|grad_scaler|extra_state"
)
_MOMENTS = re.compile(
    r"(?:^|\.)(?:exp_avg|exp_avg_sq|max_exp_avg_sq|exp_inf|momentum_buffer|square_avg|grad_avg|acc_delta)$|"
    r"(?:^|\.)\w*optim\w*\.(?:.+\.)?(?:state|param_groups)\."
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_LORA = re.compile(r"(?P<wrapper>.*?)base_model\.model\..+\.lora_(?:embedding_)?[AB](?:\.|$)")


def model_paths(paths: Iterable[Keys]) -> dict[Keys, str]:
    """Return the *paths* that lead to the model's tensors, and their names.

    The paths go through nested mappings. Without a key that says which part is the model, what lies at the top is it;
    else all that is not known to be something else.

    Raises:
        UsageError: several parts are models, and nothing says which one is meant.
    """
    left: dict[Keys, Keys] = {path: path for path in paths if not _MOMENTS.search(".".join(path))}
    heads: Keys = _model_head(left.values())
    if not heads:
        left = {path: rest for path, rest in left.items() if not _OTHERS.fullmatch(rest[0])}
        if any(len(rest) == 1 for rest in left.values()):
            left = {path: rest for path, rest in left.items() if len(rest) == 1}
    while heads:
        left = {path: rest[len(heads) :] for path, rest in left.items() if rest[: len(heads)] == heads}
        heads = _model_head(left.values())
    return {path: ".".join(rest) for path, rest in left.items()}


def _model_head(paths: Iterable[Keys]) -> Keys:
    """Return the way to the shallowest mapping that is the model.

    Its key says so. The way is empty where there is none.
    """
    ways = {
        path[: depth + 1]
        for path in paths
        for depth, part in enumerate(path[:-1])
        if part in _MODEL_KEYS and not any(map(_OTHERS.fullmatch, path[:depth]))
    }
    ranks = {way: (len(way), _MODEL_KEYS.index(way[-1])) for way in ways}
    best = sorted(way for way in ways if ranks[way] == min(ranks.values()))
    if len(best) > 1:
        raise UsageError(
            f"several parts are models: {', '.join('.'.join(way) for way in best)}; save one of them alone"
        )
    return best[0] if best else ()


def bare(source: Source) -> Source:
    """Return *source* without an optimizer's moments.

    Its names lose what wrapped the model while it trained.
    """
    outer = {match["wrapper"] for tensor in source.tensors if (match := _LORA.match(tensor.name))}
    wrapper = outer.pop() if len(outer) == 1 else ""

    def unwrapped(name: str) -> str:
        return _WRAPPERS.sub("", name.removeprefix(wrapper))

    kept = tuple(tensor for tensor in source.tensors if not _MOMENTS.search(tensor.name))
    return _renamed(replace(source, tensors=kept), unwrapped)


def _renamed(source: Source, rename: Callable[[str], str]) -> Source:
    if all(rename(tensor.name) == tensor.name for tensor in source.tensors):
        return source
    return replace(
        source,
        tensors=tuple(replace(tensor, name=rename(tensor.name)) for tensor in source.tensors),
        aliases=tuple((rename(name), rename(kept)) for name, kept in source.aliases),
    )
