"""Extend, freeze and adapt a model for its training, in the one order that works.

Tokens before adapters, gradient checkpointing, `prepare_model_for_kbit_training`, input gradients, `get_peft_model`.
The jobs do it with a model that they have loaded. Planning does it with the same model without memory, on torch's meta
device, in a process of its own (`inspect.architecture`): what cannot work is refused before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UsageError, nearest
from .engines import engine_of
from .forecast.parameters import is_frozen, is_pattern, is_target, missing_layers
from .new_tokens import add_rows, options_for_tokens, wrapping_rows
from .schema import StageSettings
from .tasks import TaskSpec, task_of

_CHECKPOINTING = {"use_reentrant": False}  # what torch recommends; it is to become the only way


def prepare_model(settings: StageSettings, model: Any, tokenizer: Any) -> Any:
    """Return *model* as it trains.

    The *tokenizer* is the full one, with the recipe's tokens.

    Raises:
        UsageError: a key of the recipe asks for what this model does not have.
    """
    task = task_of(settings.task)
    new_rows = add_rows(model, tokenizer)
    if task.has_new_head:  # the config still names the class that the weights were saved from
        model.config.architectures = [type(model).__name__]
    if task.has_labels and model.config.pad_token_id is None:  # a decoder finds the end of a text by it
        model.config.pad_token_id = tokenizer.pad_token_id
    _freeze(settings.model.freeze, model)
    model.config.use_cache = False
    checkpointing = settings.train.gradient_checkpointing
    if checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
        raise UsageError(f"train.gradient_checkpointing: {_kind(model)} cannot do it; set it to false")
    if settings.adapter.method == "qlora":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=_CHECKPOINTING
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_CHECKPOINTING)
    if settings.adapter.method != "full":
        model.enable_input_require_grads()
        options = options_for_tokens(settings, model, tokenizer, new_rows)
        model = _with_adapter(
            settings, task, model, options | (_head_options(model, options) if task.has_new_head else {})
        )
    return model


def _kind(model: Any) -> str:
    return type(model).__name__


def _freeze(patterns: Sequence[str], model: Any) -> None:
    """Freeze what the patterns name, as it is called in memory or in files."""
    if not patterns:
        return
    from ..checkpoints.consolidation.layout import stored_names

    stored = stored_names(model)
    names = {name: (name, *stored.get(name, ())) for name, _ in model.named_parameters()}
    for pattern in patterns:
        if reason := missing_layers(pattern, names):
            raise UsageError(f"model.freeze: {reason}")
        if not any(is_frozen(name, [pattern]) for name in _all(names.values())):
            known = next(iter(names))
            raise UsageError(f"model.freeze: no parameter matches {pattern!r}; they are called like {known}")
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)
            continue
        frozen = [one for one in stored.get(name, ()) if is_frozen(one, patterns)]
        if frozen and len(frozen) < len(stored[name]):
            left = next(one for one in stored[name] if one not in frozen)
            raise UsageError(
                f"model.freeze: {frozen[0]!r} is frozen and {left!r} is not, but {_kind(model)} holds them in one "
                f"tensor, {name!r}; freeze all of it or nothing"
            )
        parameter.requires_grad_(not frozen and parameter.requires_grad)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"model.freeze {list(patterns)} leaves nothing to train; set model.freeze=[]")


def _all(groups: Iterable[Iterable[str]]) -> Iterator[str]:
    return (one for group in groups for one in group)


def _with_adapter(settings: StageSettings, task: TaskSpec, model: Any, options: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    spec = settings.adapter
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=_targets(spec.target_modules),
        task_type=TaskType[task.peft_type],
        **options,
    )
    _check_saved(spec.modules_to_save, model)
    config.modules_to_save = _outermost(options["modules_to_save"] or (), model) or None
    if _saves_tied(spec.modules_to_save, model):  # else peft would train two copies of one tensor apart
        config.ensure_weight_tying = True
    _check_shared(spec.target_modules, model)
    _check_groups(spec.target_modules, model)
    layers = _linear_layers(model)  # before peft wraps them
    if task.has_new_head:
        _check_head(spec.target_modules, _new_heads(model), layers)
    try:
        with wrapping_rows(model):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(_refusal(settings, _kind(model), layers, str(error))) from error
    _check_targets(spec.target_modules, layers, adapted)
    _check_copies(adapted)
    _check_ties(adapted)
    _check_embeddings(adapted)
    # peft copies layers that train in full in the dtype of the frozen ones; ZeRO wants one dtype
    dtype = getattr(torch, engine_of(settings).working_dtype(settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _head_options(model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of peft's `LoraConfig` that train a new head in full.

    peft knows two names of heads only, and would give their inner layers an adapter that it cannot merge.
    """
    heads = _new_heads(model)
    saved = dict.fromkeys([*heads, *(options["modules_to_save"] or ())])
    inner = "|".join(map(re.escape, heads))
    return {"modules_to_save": list(saved), "exclude_modules": rf"({inner})(\..+)?"}


def _new_heads(model: Any) -> list[str]:
    """Return the names of a model's new layers.

    These are all beside its base, and the base's pooler, which models that were not trained to classify lack.
    """
    base = getattr(model, model.base_model_prefix)
    parts = {name: module for name, module in model.named_children() if module is not base}
    parts[f"{model.base_model_prefix}.pooler"] = getattr(base, "pooler", None)
    return [name for name, module in parts.items() if module is not None and [*module.parameters()]]


def full_layers(settings: StageSettings, model: Any) -> list[str]:
    """Return the names of the layers that train in full beside an adapter."""
    heads = _new_heads(model) if task_of(settings.task).has_new_head else []
    wanted = settings.adapter.modules_to_save
    return [
        *heads,
        *(name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{one}") for one in wanted)),
    ]


def _targets(names: Sequence[str]) -> Any:
    """Return names and patterns as peft takes them: all names, or one pattern."""
    if "all-linear" in names:
        return "all-linear"
    if not any(map(is_pattern, names)):
        return list(names)
    return "|".join(f"(?:{one})" if is_pattern(one) else rf"(?:.*\.)?{re.escape(one)}" for one in names)


def _check_saved(names: Sequence[str], model: Any) -> None:
    known = {name: module for name, module in model.named_modules() if name}
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in known):
            last = sorted({name.rsplit(".", 1)[-1] for name in known if not name.rsplit(".", 1)[-1].isdigit()})
            hint = nearest(wanted, last)
            raise UsageError(
                f"adapter.modules_to_save: {_kind(model)} has no module {wanted!r}"
                + (f" ({hint})" if hint else f"; it has {', '.join(last)}")
            )


def _outermost(names: Sequence[str], model: Any) -> list[str]:
    """Return names of the modules that *names* mean, each once and no others.

    peft copies what only ends with a name, as `input_layernorm` does with `norm`, and copies a part of a copy again.
    """
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    meant = [name for name in known if any(f".{name}".endswith(f".{one}") for one in names)]
    outer = [name for name in meant if not any(name.startswith(f"{other}.") for other in meant)]
    return list(names) if outer == [name for name in known if name.endswith(tuple(names))] else outer


def _saves_tied(names: Sequence[str], model: Any) -> bool:
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not words.weight:
        return False
    tied = [name for name, module in model.named_modules() if module is words or module is head]
    return any(f".{name}".endswith(f".{wanted}") for name in tied for wanted in names)


def _linear_layers(model: Any) -> list[str]:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, Linear | Conv1D)]


def _check_shared(targets: Sequence[str], model: Any) -> None:
    """Refuse adapters on layers that have one weight.

    An encoder and a decoder may have one, or the embeddings and the head.
    """
    from torch.nn import Embedding

    head = model.get_output_embeddings()
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Embedding) or module is head:
            groups.setdefault(id(module.weight), []).append(name)
    for group in (one for one in groups.values() if len(one) > 1):
        for name in (one for one in group if any(is_target(one, target) for target in targets)):
            others = ", ".join(one for one in group if one != name)
            advice = [f"train it in full: adapter.modules_to_save=[{one}]" for one in _name_of_both(group)]
            raise UsageError(
                f"adapter.target_modules: {name} has one weight with {others}, which its adapter would be merged into, "
                f"too; {' or '.join(['leave it out', *advice])}"
            )


def _name_of_both(group: Iterable[str]) -> list[str]:
    """Return the name by which peft trains embeddings and a head in full, as one.

    There may be none. It knows some names; those of encoder-decoders have more layers than it copies.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    names = [one.rpartition(".")[2] for one in group]
    return [one for one in names if one in EMBEDDING_LAYER_NAMES][-1:] if len(names) == 2 else []


def _check_groups(targets: Sequence[str], model: Any) -> None:
    """Refuse adapters on convolutions in groups, which peft trains but cannot merge."""
    for name, module in model.named_modules():
        if getattr(module, "groups", 1) > 1 and any(is_target(name, target) for target in targets):
            raise UsageError(
                f"adapter.target_modules: {name} is a convolution in {module.groups} groups, whose adapter peft cannot "
                "merge; leave it out, or train it in full: adapter=full"
            )


def _check_head(targets: Sequence[str], heads: Sequence[str], layers: Sequence[str]) -> None:
    """Refuse targets within a new head, which trains in full."""
    for target in targets:
        found = [name for name in layers if is_target(name, target)]
        if found and all(f"{name}.".startswith(tuple(f"{head}." for head in heads)) for name in found):
            raise UsageError(
                f"adapter.target_modules: {target!r} is of the new head ({', '.join(heads)}), which trains in full "
                "beside the adapter; leave it out"
            )


def _check_copies(adapted: Any) -> None:
    """Refuse layers that train in full, where peft put a copy of another kind."""
    from peft.utils import ModulesToSaveWrapper

    for name, module in adapted.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        kinds = {type(one).__name__: None for one in (module.original_module, *module.modules_to_save.values())}
        if len(kinds) > 1:
            raise UsageError(
                f"adapter.modules_to_save: {name.removeprefix('base_model.model.')} has one weight with a layer of "
                f"another kind ({' and '.join(kinds)}), and peft cannot train both; leave it out"
            )


def _check_ties(adapted: Any) -> None:
    """Refuse to train a layer apart from others that have one weight with it."""
    from peft.utils import ModulesToSaveWrapper

    groups: dict[int, dict[str, Any]] = {}  # by the weight of the base: the layers that hold it, and what each trains
    for name, module in adapted.named_modules():
        inner = getattr(module, "original_module", None) if isinstance(module, ModulesToSaveWrapper) else None
        weight = getattr(inner or module, "weight", None)
        if weight is None or name.endswith(".original_module") or ".modules_to_save." in name:
            continue
        copy = module.modules_to_save["default"].weight if inner else None
        groups.setdefault(id(weight), {})[name.removeprefix("base_model.model.")] = copy
    for group in groups.values():
        if len({id(copy) for copy in group.values()}) > 1:
            name = next(name for name, copy in group.items() if copy is not None)
            others = ", ".join(one for one in group if one != name)
            both = [one for one in _name_of_both(group) if one != name]
            advice = f"name {both[0]} instead, which stands for both" if both else "leave it out"
            raise UsageError(
                f"adapter.modules_to_save: {name} has one weight with {others}, and peft "
                f"would train it apart from them; {advice}"
            )


def _check_embeddings(adapted: Any) -> None:
    """Refuse an adapter on embeddings that do more than look up rows.

    peft looks up the rows of the adapter by what such a layer is given. BART's positions are given the tokens.
    """
    from peft.tuners.lora import Embedding
    from torch import nn

    for name, module in adapted.named_modules():
        if not isinstance(module, Embedding):
            continue
        kind = type(module.get_base_layer())
        if kind.forward is not nn.Embedding.forward and module._get_embed_scale() is None:
            short = name.removeprefix("base_model.model.")
            raise UsageError(
                f"adapter.target_modules: {short} is a {kind.__name__}, which does not look up its rows by what it is "
                f"given, and peft's adapter would; leave it out, or train it in full by "
                f"adapter.modules_to_save=[{short.rpartition('.')[2]}]"
            )


def _check_targets(targets: Sequence[str], layers: Sequence[str], adapted: Any) -> None:
    """Refuse targets that match nothing; peft minds only if none does."""
    tuner, left = adapted.base_model, adapted.peft_config["default"].target_modules
    if "all-linear" in targets:
        return
    for target in targets:
        # peft takes a name of the files, such as w1 of an expert, for the tensor in memory that holds it
        is_replaced = isinstance(left, set | list) and target not in left
        if not is_replaced and not any(is_target(name, target) for name in tuner.targeted_module_names):
            raise UsageError(_no_layer(target, layers))


def _no_layer(target: str, layers: Iterable[str]) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return f"adapter.target_modules: no layer is called {target!r}; known: {', '.join(known)}"


def _refusal(settings: StageSettings, kind: str, layers: Sequence[str], reason: str) -> str:
    """Say in the recipe's words why peft cannot adapt a model."""
    targets = settings.adapter.target_modules
    if "does not work with lora_dropout" in reason:
        attention = sorted({name.rsplit(".", 1)[-1] for name in layers if "attn" in name or "attention" in name})
        return (
            f"adapter.dropout {settings.adapter.dropout:g} cannot be used on the experts of {kind}, which are held in "
            "one tensor a layer; set adapter.dropout=0, or name the layers of the attention: "
            f"adapter.target_modules=[{','.join(attention)}]"
        )
    if "No modules were targeted" in reason and "all-linear" in targets:
        return (
            f"adapter.target_modules: all-linear finds no linear layer in {kind} beside a new head; name layers of "
            "another kind, or train it in full: adapter=full"
        )
    if "not found in the base model" in reason and len(targets) == 1:
        return _no_layer(targets[0], layers)
    return f"adapter.target_modules {list(targets)}: peft cannot adapt {kind}: {' '.join(reason.split())[:300]}"


def count_parameters(model: Any) -> Mapping[str, int]:
    """Return how many parameters of *model* train, and how many do not.

    Of the latter, *quantisable* are those that four-bit quantisation makes smaller. A checkpoint holds *num_tensors*.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    parameters = dict(model.named_parameters())
    trained = [value for value in parameters.values() if value.requires_grad]
    is_adapted = hasattr(model, "peft_config")
    head = model.get_output_embeddings()
    within_head = set(map(id, head.modules() if head is not None else ()))
    layers = [one for one in model.modules() if isinstance(one, Linear | Conv1D) and id(one) not in within_head]
    return {
        "trainable": sum(value.numel() for value in trained),
        "frozen": sum(value.numel() for value in parameters.values() if not value.requires_grad),
        "quantisable": sum(one.weight.numel() for one in layers if not one.weight.requires_grad),
        "num_tensors": len(trained) if is_adapted else len(parameters),
    }
