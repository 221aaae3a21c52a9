"""Load, extend, freeze and adapt a model, in the one order that works.

Quantisation at load, no device map across ranks, tokens before adapters, gradient
checkpointing, `prepare_model_for_kbit_training`, input gradients, `get_peft_model`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import RunError, UsageError
from ...recipes.engines import engine_of
from ...recipes.forecast.parameters import is_frozen
from ...recipes.inspect.tokenizer import load_full
from ...recipes.schema import StageSettings
from ...recipes.tasks import TaskSpec, task_of
from .new_tokens import add_rows, options_for_tokens, wrapping_rows

_CHECKPOINTING = {"use_reentrant": False}  # what torch recommends; it is to become the only way


def load_tokenizer(settings: StageSettings, folder: Path) -> Any:
    """Return the tokenizer of *folder* with the recipe's tokens added."""
    return load_full(folder, settings.model.add_tokens, trusts_code=settings.model.trust_remote_code)


def build_model(settings: StageSettings, folder: Path, tokenizer: Any, *, has_weights: bool) -> Any:
    """Return the model that trains; call it after the training arguments exist.

    Under ZeRO-3 transformers then builds it in pieces on every rank.
    """
    task = task_of(settings.task)
    model = _load(settings, task, folder, has_weights=has_weights)
    new_rows = add_rows(model, tokenizer)
    for name, parameter in model.named_parameters():
        if is_frozen(name, settings.model.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RunError(f"model.freeze {list(settings.model.freeze)} leaves nothing to train", advice=UsageError.advice)
    model.config.use_cache = False
    checkpointing = settings.train.gradient_checkpointing
    if settings.adapter.method == "qlora":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=_CHECKPOINTING
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_CHECKPOINTING)
    if settings.adapter.method != "full":
        model.enable_input_require_grads()
        model = _with_adapter(settings, task, model, options_for_tokens(settings, model, tokenizer, new_rows))
    return model


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
    transformers.set_seed(settings.seed)
    if not has_weights:
        return model_class.from_config(config, dtype=dtype, **options)
    if settings.adapter.method == "qlora":
        options["quantization_config"] = _four_bits(train.precision)
    if settings.adapter.method != "full":
        dtype = getattr(torch, train.precision)
    return model_class.from_pretrained(folder, config=config, dtype=dtype, **options)


def _four_bits(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, precision),
        bnb_4bit_quant_storage=getattr(torch, precision),
    )


def _with_adapter(settings: StageSettings, task: TaskSpec, model: Any, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    spec = settings.adapter
    targets: Any = "all-linear" if "all-linear" in spec.target_modules else list(spec.target_modules)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type=TaskType[task.peft_type],
        **options,
    )
    with wrapping_rows(model):
        return get_peft_model(model, config)
