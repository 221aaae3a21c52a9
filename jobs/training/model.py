"""Load a model and its tokenizer for training.

It is quantised at load, as one that answers may be, and no device map spreads it over ranks.
`recipes.building` extends, freezes and adapts it then, as it did when the plan was made.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.formats.safetensors_file import read_header
from ...recipes.adapting import full_layers
from ...recipes.building import prepare_model
from ...recipes.engines import engine_of
from ...recipes.inspect.tokenizer import load_full
from ...recipes.model_kinds import most_in_full_attention
from ...recipes.schema import StageSettings
from ...recipes.tasks import TaskSpec, task_of
from ..quantisation import empty_model, mend_quantised, quantised_in


def load_tokenizer(settings: StageSettings, folder: Path) -> Any:
    """Return the tokenizer of *folder* with the recipe's tokens added."""
    return load_full(folder, settings.model.add_tokens, trusts_code=settings.model.trust_remote_code)


def build_model(settings: StageSettings, folder: Path, tokenizer: Any, *, has_weights: bool) -> Any:
    """Return the model that trains; call it after the training arguments exist.

    Under ZeRO-3 transformers then builds it in pieces on every rank.
    """
    model = _load(settings, task_of(settings.task), folder, has_weights=has_weights)
    if not getattr(model, "supports_gradient_checkpointing", True):  # only an attempt that gives up memory asks for it
        settings = replace(settings, train=replace(settings.train, gradient_checkpointing=False))
    attend_by_length(model)
    return prepare_model(settings, model, tokenizer)


def _load(settings: StageSettings, task: TaskSpec, folder: Path, *, has_weights: bool) -> Any:
    import transformers

    spec, train = settings.model, settings.train
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    model_class = getattr(transformers, task.model_class)
    config = transformers.AutoConfig.from_pretrained(folder, **options, **spec.config)
    if spec.attention:
        options["attn_implementation"] = spec.attention
    dtype = (
        getattr(torch, engine_of(settings).working_dtype(settings))
        if settings.adapter.method == "full"
        else torch.float32
    )
    empty = empty_model(lambda: model_class.from_config(config, **options))
    misfits = _misfits(folder, empty) if task.has_new_head else {}
    transformers.set_seed(settings.seed)
    if not has_weights:
        return model_class.from_config(config, dtype=dtype, **options)
    if settings.adapter.method == "qlora":
        options["quantization_config"] = quantised_in("4bit", train.precision, empty, full_layers(settings, empty))
    if settings.adapter.method != "full":
        dtype = getattr(torch, train.precision)
    if misfits:
        options |= {"ignore_mismatched_sizes": True, "key_mapping": misfits}
    model = model_class.from_pretrained(folder, config=config, dtype=dtype, **options)
    if settings.adapter.method == "lora" and engine_of(settings).working_dtype(settings) == "float32":
        _norms_in_float32(model)
    _keep_frozen(model)
    mend_quantised(model)
    return model


def _norms_in_float32(model: Any) -> None:
    """Let layer norms take float32 from embeddings that train in full.

    Autocast does so on a GPU, and on a CPU not.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.float()


def attend_by_length(model: Any) -> None:
    """Let a BigBird choose its attention by the length of each batch.

    By itself it attends in full for good after the first short one (transformers 5.23).
    """
    from transformers import PreTrainedModel

    most_in_full = most_in_full_attention(model.config.to_dict())

    def choose(part: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        given = [*args[:1], inputs.get("input_ids"), inputs.get("inputs_embeds")]
        num_tokens = next(one.shape[1] for one in given if one is not None)
        with torch.device("meta"):  # where layers are made, which take over the weights of the others
            part.set_attention_type("original_full" if num_tokens <= most_in_full else "block_sparse")

    for part in model.modules() if most_in_full is not None else ():
        if isinstance(part, PreTrainedModel) and hasattr(part, "set_attention_type"):
            part.register_forward_pre_hook(choose, with_kwargs=True)


def _misfits(folder: Path, model: Any) -> dict[str, str]:
    """Give stored tensors of another shape than the model's names that nothing has.

    A model that was trained on other labels has a head of another size. Under ZeRO-3 transformers (5.23) refuses it,
    whatever `ignore_mismatched_sizes` says; without, it takes no such names.
    """
    shapes = {name: list(value.shape) for name, value in model.named_parameters()}
    stored = chain.from_iterable(read_header(path)[0].items() for path in folder.glob("*.safetensors"))
    return {
        f"^{re.escape(name)}$": f"misfit.{name}"
        for name, entry in stored
        if name in shapes and shapes[name] != entry["shape"]
    }


def _keep_frozen(model: Any) -> None:
    """Freeze what the class itself does not train, such as computed positions.

    transformers makes every parameter that it loads trainable (5.23).
    """
    own = dict(empty_model(lambda: type(model)(model.config)).named_parameters())
    for name, parameter in model.named_parameters():
        if name in own and not own[name].requires_grad:
            parameter.requires_grad_(False)
