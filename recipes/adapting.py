"""Put an adapter on a model that is to train.

What peft would train wrongly or could not merge is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import UsageError, nearest
from .engines import engine_of
from .forecast.parameters import is_pattern, is_target
from .new_tokens import wrapping_rows
from .schema import StageSettings
from .tasks import TaskSpec, task_of


def with_adapter(settings: StageSettings, task: TaskSpec, model: Any, options: dict[str, Any]) -> Any:
    """Return *model* with the adapter of *settings*.

    *options* are more of peft's `LoraConfig`.

    Raises:
        UsageError: a key of `adapter` asks for what this model or peft cannot do.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    spec = settings.adapter
    if task.has_new_head:
        options = options | _head_options(model, options)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        target_modules=_targets(spec.target_modules),
        task_type=_peft_type(task),
        **options,
    )
    _check_saved(spec.modules_to_save, model)
    config.modules_to_save = _outermost(options["modules_to_save"] or (), model) or None
    if _saves_tied(spec.modules_to_save, model):  # else peft would train two copies of one tensor apart
        config.ensure_weight_tying = True
    _check_shared(spec.target_modules, model)
    _check_groups(spec.target_modules, model)
    routers = _routers(model)
    _check_routers(spec.target_modules, routers, model)
    if routers:
        excluded = [*filter(None, [config.exclude_modules]), *map(re.escape, routers)]
        config.exclude_modules = "|".join(f"(?:{one})" for one in excluded)
    layers = _linear_layers(model)  # before peft wraps them
    if task.has_new_head:
        _check_head(spec.target_modules, _new_heads(model), layers)
    try:
        with wrapping_rows(model):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(_refusal(settings, type(model).__name__, layers, str(error))) from error
    except TypeError as error:
        if "ParamWrapper" not in str(error):
            raise
        raise UsageError(
            f"adapter.modules_to_save {list(spec.modules_to_save)} has the experts of {type(model).__name__}, which "
            "peft adapts and cannot train in full; leave them out"
        ) from error
    adapted.peft_config["default"].task_type = task.peft_type  # by which a merge knows a head that the base lacks
    _check_targets(spec.target_modules, layers, adapted)
    _check_merged_once(adapted)
    _check_copies(adapted)
    _check_ties(adapted)
    _check_embeddings(adapted)
    # peft copies layers that train in full in the dtype of the frozen ones; ZeRO wants one dtype
    dtype = getattr(torch, engine_of(settings).working_dtype(settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _peft_type(task: TaskSpec) -> Any:
    """Return peft's type of the task, or None where peft's own class does harm.

    That of questions hands no token types on to the model (peft 0.21), so that question and passage look alike, and
    trains `qa_outputs` in full by itself, which a BigBird has within a head that trains in full.
    """
    from peft import TaskType

    return None if task.peft_type == "QUESTION_ANS" else TaskType[task.peft_type]


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
                f"adapter.modules_to_save: {type(model).__name__} has no module {wanted!r}"
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


def _check_merged_once(adapted: Any) -> None:
    """Refuse adapters of several layers that have one weight.

    Each would be merged into it, and so into the others' layers, as in the shared blocks of a Zamba2.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: one.get_base_layer() for name, one in adapted.named_modules() if isinstance(one, LoraLayer)}
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))  # one that computes its weight needs all of ZeRO-3's shards
        if "weight" in own:
            groups.setdefault(id(own["weight"]), []).append(name.removeprefix("base_model.model."))
    shared = [group for group in groups.values() if len(group) > 1]
    if shared:
        last = {name: name.rstrip(".0123456789").rpartition(".")[2] for group in groups.values() for name in group}
        wrong = {last[name] for group in shared for name in group}
        others = sorted({*last.values()} - wrong)
        raise UsageError(
            f"adapter.target_modules: {' and '.join(shared[0][:2])} have one weight, into which the adapters of both "
            f"would be merged; leave out {', '.join(sorted(wrong))}"
            + (f", as in adapter.target_modules=[{','.join(others)}]" if others else "")
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


def _routers(model: Any) -> list[str]:
    """Return the names of linear layers that compute something else than a product.

    The routers of Llama 4 and PhiMoE return several tensors, and peft's adapter adds to one.
    """
    from torch import empty
    from torch.func import functional_call
    from torch.nn import Linear

    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or type(layer).forward is Linear.forward:
            continue
        if type(layer).__module__.startswith("bitsandbytes."):
            continue
        sizes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
        values = {one: empty(sizes[one], device="meta") for one, _ in layer.named_parameters() if one in sizes}
        try:
            product = functional_call(layer, values, (empty(2, layer.in_features, device="meta"),))
            is_product = product.shape == (2, layer.out_features)
        except Exception:  # whatever it needs beside its input, or returns
            is_product = False
        found += [] if is_product else [name]
    return found


def _check_routers(targets: Sequence[str], routers: Sequence[str], model: Any) -> None:
    """Refuse adapters on *routers* by their names; all-linear leaves them out."""
    for name in (one for one in routers if any(is_target(one, target) for target in targets)):
        kind = type(model.get_submodule(name)).__name__
        raise UsageError(
            f"adapter.target_modules: {name} is a {kind}, which computes more than a product, so that peft cannot "
            f"adapt it; leave it out, or train it in full: adapter.modules_to_save=[{name.rpartition('.')[2]}]"
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
    from peft.utils.other import TrainableTokensWrapper

    groups: dict[int, dict[str, Any]] = {}  # by the weight of the base: the layers that hold it, and what each trains
    for name, module in adapted.named_modules():
        if isinstance(module, TrainableTokensWrapper):  # it computes its weight, which ZeRO-3 has in shards
            continue
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
    attention = ",".join(sorted({name.rsplit(".", 1)[-1] for name in layers if "attn" in name or "attention" in name}))
    if "does not work with lora_dropout" in reason:
        return (
            f"adapter.dropout {settings.adapter.dropout:g} cannot be used on the experts of {kind}, which are held in "
            "one tensor a layer; set adapter.dropout=0, or name the layers of the attention: "
            f"adapter.target_modules=[{attention}]"
        )
    if "does not work with use_dora" in reason:
        return (
            f"adapter.dora cannot be used on the experts of {kind}, which are held in one tensor a layer; set "
            f"adapter.dora=false, or name the layers of the attention: adapter.target_modules=[{attention}]"
        )
    if "incompatible with Mamba" in reason:
        # Mamba reads dt_proj, and its kernels for a GPU x_proj, in the same way; peft does not know it
        others = {name.rsplit(".", 1)[-1] for name in layers} - {"out_proj", "x_proj", "dt_proj", "lm_head"}
        return (
            f"adapter.target_modules: {kind} reads the weights of out_proj and conv1d past their layers, and so past "
            f"an adapter; name others: adapter.target_modules=[{','.join(sorted(others))}]"
        )
    if "No modules were targeted" in reason and "all-linear" in targets:
        return (
            f"adapter.target_modules: all-linear finds no linear layer in {kind} beside a new head; name layers of "
            "another kind, or train it in full: adapter=full"
        )
    if "not found in the base model" in reason:
        return _no_layer(targets[0], layers)
    return f"adapter.target_modules {list(targets)}: peft cannot adapt {kind}: {' '.join(reason.split())[:300]}"
