"""LoRA adapters: their names in peft, and merging them into their base.

No weights are read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from ...errors import UsageError
from .tensors import LowRank, Rows, Source, SourceTensor, cut, dtype_of

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")
# While training, peft names each tensor after the adapter that it belongs to; its files do not.
_TRAINING_NAMES = (
    (re.compile(r"\.(lora_[AB])\.([^.]+)\.weight$"), r".\1.weight"),
    (re.compile(r"\.(lora_embedding_[AB])\.([^.]+)$"), r".\1"),
    (re.compile(r"\.(lora_magnitude_vector)\.([^.]+)(?:\.weight)?$"), r".\1"),
    (re.compile(r"\.(token_adapter\.trainable_tokens_delta)\.([^.]+)$"), r".\1"),
    (re.compile(r"\.modules_to_save\.([^.]+)\."), r"."),
)
_NEW_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_ROWS = ".token_adapter.trainable_tokens_delta"
_MAGNITUDE = ".lora_magnitude_vector"
_TOKEN_BIAS = "final_logits_bias"  # a buffer of BART and its kin, which grows with the embeddings
# Where peft saves resized embeddings it writes them also as they were before the training.
_BEFORE = (".original_module.", ".token_adapter.base_layer.")
# Options that change nothing of `W + scaling * B @ A`, and those that are computed below.
_UNDERSTOOD = frozenset(
    """peft_type r lora_alpha use_rslora use_dora rank_pattern alpha_pattern fan_in_fan_out modules_to_save
    trainable_token_indices ensure_weight_tying
    init_lora_weights bias auto_mapping base_model_name_or_path corda_config eva_config exclude_modules
    inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config
    megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type""".split()
)
# Ways to start that leave the base as it was; the others move a part of it into the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_ADVICE = "merge it with peft's merge_and_unload() and consolidate the result"


class UnmergeableError(UsageError):
    """The adapter is one that only peft can merge, or its base is another one."""


def is_adapter(source: Source) -> bool:
    """Say whether a training checkpoint is that of a peft model."""
    return any(tensor.name.startswith(_PREFIX) for tensor in source.tensors)


def as_adapter(source: Source, config: Mapping[str, object] | None) -> Source:
    """Return only the adapter of a peft model's training checkpoint.

    It is named as in `adapter_model.safetensors`. *config* is its `adapter_config.json`, None where the folder has
    none.

    Raises:
        UnmergeableError: another kind of adapter, more than one, or trained weights beside it.
    """
    if config is not None and config.get("bias", "none") != "none":
        raise UnmergeableError(f"{source.path}: trains biases beside the LoRA adapter; {_ADVICE}")
    tensors: dict[str, SourceTensor] = {}
    for tensor in source.tensors:
        name = saved_name(tensor.name)
        if name is None and tensor.role == "trained":
            raise UnmergeableError(f"{source.path}: {tensor.name!r} is trained beside the LoRA adapter; {_ADVICE}")
        if name in tensors:
            raise UnmergeableError(
                f"{source.path}: holds several adapters ({tensor.name!r} is a second one); {_ADVICE}"
            )
        if name is not None:
            tensors[name] = replace(tensor, name=name)
    if not any(_FACTOR.fullmatch(name) for name in tensors):
        raise UnmergeableError(f"{source.path}: a peft model without LoRA weights; {_ADVICE}")
    return replace(
        source,
        content="adapter",
        tensors=tuple(tensors.values()),
        aliases=(),
        adapter_config=config,
        base=base_within(source),
    )


def base_within(source: Source) -> Source | None:
    """Return the frozen base that a peft checkpoint holds beside its adapter.

    Return None where it was left out.
    """
    names = {tensor.name: _base_name(tensor.name) for tensor in source.tensors}
    tensors = tuple(replace(tensor, name=names[tensor.name] or "") for tensor in source.tensors if names[tensor.name])
    aliases = ((_base_name(name), _base_name(kept)) for name, kept in source.aliases)
    known = tuple((name, kept) for name, kept in aliases if name and kept)
    # Only DeepSpeed's files say what was frozen; others hold all of the model or nothing of it.
    is_there = any(tensor.role in ("frozen", "unknown") for tensor in tensors)
    return replace(source, content="model", tensors=tensors, aliases=known) if is_there else None


def _base_name(name: str) -> str | None:
    """Return what a weight of the base was called before peft wrapped it.

    Return None for a weight of the adapter.
    """
    if not name.startswith(_PREFIX) or saved_name(name) is not None:
        return None
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def merge_adapter(adapter: Source, base: Source, config: Mapping[str, object]) -> Source:
    """Return the base with the adapter added: W + scaling * B @ A.

    Layers that trained in full are taken whole, and rows that trained for tokens row by row. The base keeps its
    tensors' order. Nothing is computed here: see `LowRank` and `Rows`.

    Raises:
        UnmergeableError: an option of the adapter that this sum does not cover, or a base that it
            does not fit; the message advises peft.
    """
    _check_options(config)
    base = _named_alike(adapter, base, config)
    merged = {tensor.name: tensor for tensor in base.tensors}
    factors: dict[str, dict[str, SourceTensor]] = {}
    whole: dict[str, SourceTensor] = {}
    for tensor in adapter.tensors:
        match = _FACTOR.fullmatch(tensor.name)
        name = tensor.name.removeprefix(_PREFIX)
        if match is not None:
            factors.setdefault(match["module"], {})[match["side"]] = tensor
        elif name.endswith(_MAGNITUDE):
            factors.setdefault(tensor.name.removesuffix(_MAGNITUDE), {})["magnitude"] = tensor
        elif name.endswith(_ROWS):
            _replace_rows(name.removesuffix(_ROWS), tensor, merged, base, config)
        elif not any(part in name for part in _BEFORE):
            saved = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if saved not in whole or ".modules_to_save." in name:
                whole[saved] = replace(tensor, name=saved)
    for name, tensor in whole.items():
        if config.get("ensure_weight_tying") and name not in merged:
            continue  # it is one with another layer, under whose name it is stored
        if not _is_new_head(name, config):
            _require(name, merged, base)
        merged[name] = tensor
    for module, sides in factors.items():
        name = module.removeprefix(_PREFIX)
        _require(f"{name}.weight", merged, base)
        if not {"A", "B"} <= set(sides):
            raise UnmergeableError(f"{adapter.path}: {module!r} has only one of lora_A and lora_B; {_ADVICE}")
        low_rank = _low_rank(name, sides["A"], sides["B"], config)
        if "magnitude" in sides:
            low_rank = replace(low_rank, magnitude=sides["magnitude"])
        if bool(config.get("use_dora")) != ("magnitude" in sides) or (low_rank.magnitude and low_rank.is_transposed):
            raise UnmergeableError(f"{adapter.path}: {module!r} has magnitudes that are not merged here; {_ADVICE}")
        merged[f"{name}.weight"] = replace(_fitting(merged[f"{name}.weight"], low_rank), low_rank=low_rank)
    return replace(adapter, content="model", tensors=tuple(merged.values()), aliases=base.aliases)


def _named_alike(adapter: Source, base: Source, config: Mapping[str, object]) -> Source:
    """Return *base* as the model names it that the adapter was trained in.

    Files of a model that was saved without a head lack the first part of the names, such as `bert.`. Where the adapter
    brings the whole head, that of the base is left out.
    """
    matches = (_FACTOR.fullmatch(tensor.name) for tensor in adapter.tensors)
    modules = {match["module"].removeprefix(_PREFIX) for match in matches if match is not None}
    stems = {f"{module.partition('.')[0]}." for module in modules}
    names = {tensor.name for tensor in base.tensors}
    if len(stems) == 1 and not any(name.startswith(stem) for stem in stems for name in names):
        (stem,) = stems
        if all(f"{module.removeprefix(stem)}.weight" in names for module in modules):
            tensors = tuple(replace(tensor, name=stem + tensor.name) for tensor in base.tensors)
            aliases = tuple((stem + name, stem + kept) for name, kept in base.aliases)
            base = replace(base, tensors=tensors, aliases=aliases)
    if config.get("task_type") not in _NEW_HEADS:
        return base
    kept = tuple(tensor for tensor in base.tensors if tensor.name.startswith(tuple(stems)))
    return replace(
        base, tensors=kept, aliases=tuple(p for p in base.aliases if all(n.startswith(tuple(stems)) for n in p))
    )


def _is_new_head(name: str, config: Mapping[str, object]) -> bool:
    """Say whether a tensor is of a head that the task brought: the base lacks it."""
    saved = config.get("modules_to_save")
    names = saved if isinstance(saved, list | tuple) else ()
    return config.get("task_type") in _NEW_HEADS and any(f".{one}." in f".{name}" for one in names)


def _replace_rows(
    module: str, values: SourceTensor, merged: dict[str, SourceTensor], base: Source, config: Mapping[str, object]
) -> None:
    """Put the rows that trained in the place of a weight's own.

    New ones come after them.
    """
    named = config.get("trainable_token_indices")
    numbers = named if isinstance(named, list) else None
    if isinstance(named, dict):
        numbers = next((rows for name, rows in named.items() if f".{module}".endswith(f".{name}")), None)
    name = f"{module}.weight"
    if numbers is None and name not in merged:
        return  # a tied layer, which is stored once
    _require(name, merged, base)
    weight = merged[name]
    new = sorted(number for number in numbers or () if number >= weight.shape[0])
    if numbers is None or values.shape != (len(numbers), *weight.shape[1:]) or len(weight.shape) != 2:
        raise UnmergeableError(f"{name!r} has {values.shape} trained rows for {numbers}; {_ADVICE}")
    if new != list(range(weight.shape[0], weight.shape[0] + len(new))):
        raise UnmergeableError(f"{name!r} has {weight.shape[0]} rows, and not all that follow were trained; {_ADVICE}")
    width = weight.shape[1]
    segments = weight.segments
    if new and _TOKEN_BIAS in merged:
        raise UnmergeableError(f"{_TOKEN_BIAS!r} of the base has no numbers for {len(new)} new tokens; {_ADVICE}")
    if new:  # read, and replaced
        segments = (*segments, *cut(weight.segments, dtype_of(weight).num_bytes, 0, len(new) * width))
    merged[name] = replace(
        weight,
        shape=(weight.shape[0] + len(new), width),
        segments=segments,
        rows=Rows(numbers=tuple(numbers), values=values),
    )


def saved_name(name: str) -> str | None:
    """Return what peft's files call a parameter that it names *name* in training.

    Return None for one that is no adapter's.
    """
    for pattern, saved in _TRAINING_NAMES:
        if pattern.search(name):
            return pattern.sub(saved, name)
    return None


def _check_options(config: Mapping[str, object]) -> None:
    wrong = [key for key, value in config.items() if value and key not in _UNDERSTOOD]
    if config.get("peft_type") != "LORA":
        wrong.append("peft_type")
    if config.get("bias", "none") != "none":
        wrong.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        wrong.append("init_lora_weights")
    if wrong:
        named = ", ".join(f"{key}={config.get(key)!r}" for key in sorted(set(wrong)))
        raise UnmergeableError(f"the adapter has {named}, which is not merged here; {_ADVICE}")


def _require(name: str, names: Iterable[str], base: Source) -> None:
    if name not in names:
        raise UnmergeableError(
            f"{base.path}: has no {name!r}, which the adapter changes; give the base that it was trained on "
            f"(a weight that is tied is stored once, and cannot be changed alone: {_ADVICE})"
        )


def _low_rank(module: str, a: SourceTensor, b: SourceTensor, config: Mapping[str, object]) -> LowRank:
    rank = a.shape[0] if a.shape else 0
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != rank or not rank:
        raise UnmergeableError(f"{module!r} has LoRA factors of shape {a.shape} and {b.shape}; {_ADVICE}")
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise UnmergeableError(f"the adapter's lora_alpha is {alpha!r}, not a number")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    is_transposed = bool(config.get("fan_in_fan_out")) or ".lora_embedding_" in a.name
    return LowRank(a=a, b=b, scaling=scaling, is_transposed=is_transposed)


def _of_pattern(patterns: object, module: str, otherwise: object) -> object:
    """Return the value of the first pattern that *module* ends with.

    peft's get_pattern_key does the same.
    """
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _fitting(weight: SourceTensor, low_rank: LowRank) -> SourceTensor:
    shape = (low_rank.b.shape[0], low_rank.a.shape[1])
    if weight.shape != (shape[::-1] if low_rank.is_transposed else shape) or not dtype_of(weight).is_float:
        raise UnmergeableError(
            f"{weight.name!r} is {weight.dtype} of shape {weight.shape} in the base, the adapter adds "
            f"{shape}; give the base that it was trained on, not quantised"
        )
    return weight
