"""Give added tokens their rows of the embeddings.

Beside an adapter these rows train too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ..errors import UsageError
from .schema import StageSettings


def add_rows(model: Any, tokenizer: Any) -> list[int]:
    """Resize the embeddings for *tokenizer* and return the new rows.

    Each begins as the mean of the old ones. transformers draws new rows around the mean from their covariance, which
    takes minutes for a large vocabulary. The mean alone starts as well, and is the same on every rank and after a
    resume. Spare rows of the model that tokens fall into count as new, too.
    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).

    Raises:
        UsageError: the model's class has no way to get more rows.
    """
    import torch

    num_rows = num_token_rows(model)
    _keep_own_head(model)
    if len(tokenizer) > num_rows:
        if getattr(model.config, "tgt_vocab_size", None) is not None:  # output layer and config would not grow
            raise UsageError(
                f"model.add_tokens: {type(model).__name__} has a vocabulary for each of its languages, and "
                "transformers adds rows to neither as a whole; leave model.add_tokens out, or take another model"
            )
        try:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        except (RuntimeError, TypeError) as error:  # I-BERT's cannot, and Marian's fails before there are weights
            raise UsageError(
                f"model.add_tokens: {type(model).__name__} of transformers cannot be given rows for tokens beyond its "
                f"{num_rows:,}, and its tokenizer has {len(tokenizer):,} ({error}); leave model.add_tokens out, or "
                "take another model or tokenizer"
            ) from error
    num_old = min(num_rows, getattr(tokenizer, "num_known", num_rows))
    new = list(range(num_old, len(tokenizer)))
    for _, layer in embedding_layers(model) if new else ():
        with _gathered([layer.weight], is_changed=True), torch.no_grad():
            layer.weight[num_old : len(tokenizer)] = layer.weight[:num_old].float().mean(dim=0).to(layer.weight.dtype)
    return new


def num_token_rows(model: Any) -> int:
    """Return how many tokens a model has embeddings for.

    Raises:
        UsageError: it computes them in another way, as CANINE does of characters.
    """
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError as error:
        raise UsageError(
            f"{type(model).__name__} has no embeddings with a row for each token, which a training here needs; take "
            "another model"
        ) from error
    shape = getattr(layer.weight, "ds_shape", layer.weight.shape)  # the whole one under ZeRO-3
    return int(getattr(layer, "num_embeddings", None) or shape[0])  # I-BERT's has no number


def _keep_own_head(model: Any) -> None:
    """Let nothing tie a head anew that has values of its own.

    The config of mT5 says that its head is tied. transformers would when it resizes, and peft when it wraps rows.
    """
    layers, ties = embedding_layers(model), getattr(model, "_tied_weights_keys", None)
    name, head = layers[-1]
    # T5Gemma's is tied to the embeddings of its decoder, not to those of its input
    is_tied = sum(value is head.weight for _, value in model.named_parameters(remove_duplicate=False)) > 1
    if len(layers) > 1 and not is_tied and isinstance(ties, dict):
        own = f"{name}.weight"
        model._tied_weights_keys = {one: other for one, other in ties.items() if not re.fullmatch(one, own)}


def embedding_layers(model: Any) -> list[tuple[str, Any]]:
    """Return the names and layers that have a row for each token.

    These are the input, and the output where it is not tied.
    """
    layers = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not layers[0].weight:
        layers.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return [(names[id(layer)], layer) for layer in layers]


def options_for_tokens(settings: StageSettings, model: Any, tokenizer: Any, new: Sequence[int]) -> dict[str, Any]:
    """Return options of peft's `LoraConfig` that let tokens train.

    These are the *new* rows, and those of the recipe's tokens. A token that the model knew already trains too: it was
    named because it matters. Layers that train in full, or get an adapter of their own, are left as they are. An output
    layer with a bias trains in full: peft 0.21 forgets the bias of a layer whose rows train.

    Raises:
        UsageError: that layer is tied to the embeddings, so that it cannot.
    """
    head = model.get_output_embeddings()
    if new and getattr(head, "bias", None) is not None and len(embedding_layers(model)) == 1:
        raise UsageError(
            f"model.add_tokens: the output layer of {type(model).__name__} has one weight with the embeddings and a "
            "bias of its own, which an adapter leaves without values for new tokens; set adapter=full, or leave "
            "model.add_tokens out"
        )
    spec, saved = settings.adapter, list(settings.adapter.modules_to_save)
    ids = sorted({*new, *(int(tokenizer.convert_tokens_to_ids(token)) for token in settings.model.add_tokens)})
    rows: dict[str, list[int]] = {}
    for name, layer in embedding_layers(model):
        tied = [one for one, module in model.named_modules() if getattr(module, "weight", None) is layer.weight]
        others = (*spec.modules_to_save, *spec.target_modules)
        if not ids or any(f".{one}".endswith(f".{other}") for one in tied for other in others):
            continue
        if getattr(layer, "bias", None) is None:
            rows[name] = ids
        else:
            saved.append(name)
    return {"modules_to_save": saved or None, "trainable_token_indices": rows or None}


@contextmanager
def wrapping_rows(model: Any) -> Iterator[None]:
    """Let peft wrap embeddings under ZeRO-3.

    peft 0.21 collects their rows through a GPU's backend only, and reads the weight past DeepSpeed's hooks: DeepSpeed
    is told to gather it for the layer that reads it.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer, layer

    is_sharded = layer.check_deepspeed_zero3_enabled
    if not is_sharded():
        yield
        return
    weights = [found.weight for _, found in embedding_layers(model)]
    layer.check_deepspeed_zero3_enabled = lambda: False
    try:
        with _gathered(weights):
            yield
    finally:
        layer.check_deepspeed_zero3_enabled = is_sharded
    from deepspeed.runtime.zero import register_external_parameter

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            register_external_parameter(module, module.base_layer.weight)


def _gathered(weights: Sequence[Any], *, is_changed: bool = False) -> AbstractContextManager[Any]:
    """Return a context in which weights are whole that ZeRO-3 has cut.

    Where *is_changed*, what rank 0 writes is kept.
    """
    cut = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not cut:  # a resized one is whole until the engine starts
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
        cut, modifier_rank=0 if is_changed else None
    )
    return gathered
