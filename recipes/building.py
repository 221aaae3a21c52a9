"""Extend, freeze and adapt a model for its training, in the one order that works.

Tokens before adapters, gradient checkpointing, `prepare_model_for_kbit_training`, input gradients, `get_peft_model`.
The jobs do it with a model that they have loaded. Planning does it with the same model without memory, on torch's meta
device, in a process of its own (`inspect.architecture`): what cannot work is refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from .adapting import with_adapter
from .data.framed import encode_texts
from .forecast.parameters import is_frozen, missing_layers
from .new_tokens import add_rows, options_for_tokens
from .schema import StageSettings
from .tasks import task_of

_CHECKPOINTING = {"use_reentrant": False}  # what torch recommends; it is to become the only way
_ANY_LENGTH = 1 << 40


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
    _set_start(settings, model, tokenizer)
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
        if checkpointing:  # without it gradients reach the adapters anyway, and CTRL changes these inputs in place
            model.enable_input_require_grads()
        options = options_for_tokens(settings, model, tokenizer, new_rows)
        model = with_adapter(settings, task, model, options)
    return model


def _set_start(settings: StageSettings, model: Any, tokenizer: Any) -> None:
    """Let the answers of an encoder-decoder begin as its targets do in training.

    The decoder of an mBART reads the language of the target first, whatever its config says.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or not model.config.is_encoder_decoder:
        return
    import torch

    (target,) = encode_texts(settings.data, ["1"], tokenizer, _ANY_LENGTH, is_target=True)
    start = int(shift(labels=torch.tensor([target.ids], device="cpu"))[0, 0])
    for config in (model.config, model.generation_config):
        if config is not None and config.decoder_start_token_id != start:
            config.decoder_start_token_id = start


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
