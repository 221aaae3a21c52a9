"""Quantise the linear layers of a model as it is loaded, by bitsandbytes.

QLoRA trains over them, and `predict.load_in` answers with them.
"""

from __future__ import annotations

import ast
import inspect
import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

_REPACKS = "support_avx512bf16_for_cpu"
_ASKED = ("dtype", "device", "shape")  # what a model may ask of any weight


def empty_model(build: Callable[[], Any]) -> Any:
    """Return a model without values, which ZeRO-3 would cut or fill."""
    from transformers.modeling_utils import set_quantized_state

    with torch.device("meta"), set_quantized_state():
        return build()


def quantised_in(width: Literal["4bit", "8bit"], dtype: str, empty: Any, also_whole: Sequence[str] = ()) -> Any:
    """Return how the linear layers of a model like *empty* are quantised at load.

    They compute in *dtype*. Those that transformers leaves, such as the head, those whose weight the model reads past
    the layer, and those of *also_whole* are left as they are.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    kept_whole = [*get_keys_to_not_convert(empty), *_read_past(empty), *also_whole]
    if width == "8bit":
        # it says at each product that it computes in float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept_whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=kept_whole,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        bnb_4bit_quant_storage=getattr(torch, dtype),
    )


def mend_quantised(model: Any) -> None:
    """Let the quantised layers of *model* take any rows, and keep their values.

    bitsandbytes (0.50) repacks 4-bit weights, rounded, when they are evaluated on a CPU; and its 8-bit layers fail with
    rows of more than three dimensions, as those that DeepSeek-V2 and its kin make for each head.
    """
    for layer in model.modules():
        if hasattr(layer, _REPACKS):
            setattr(layer, _REPACKS, False)
        if type(layer).__name__ == "Linear8bitLt":
            layer.forward = _flattening(layer.forward)


def _flattening(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def answer(rows: torch.Tensor) -> torch.Tensor:
        return forward(rows.flatten(0, -2)).reshape(*rows.shape[:-1], -1) if rows.dim() > 3 else forward(rows)

    return answer


def _read_past(model: Any) -> Iterator[str]:
    """Yield the names of linear layers whose weight the model's code reads itself.

    It would find packed numbers there: in Mamba's `dt_proj`, in the router of LongCat-Flash.
    """
    read = {kind: _weights_read(kind) for kind in {type(module) for module in model.modules()}}
    for name, module in model.named_modules():
        for child in read[type(module)]:
            if isinstance(getattr(module, child, None), torch.nn.Linear):
                yield f"{name}.{child}" if name else child


def _weights_read(kind: type) -> set[str]:
    """Return each X of which a class uses `self.X.weight`.

    To ask for its dtype or place is no use of it.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return set()
    found = set[str]()
    for node in ast.walk(tree):
        for part in ast.iter_child_nodes(node):
            if not (isinstance(part, ast.Attribute) and isinstance(part.value, ast.Attribute)):
                continue
            is_asked = isinstance(node, ast.Attribute) and node.attr in _ASKED
            is_checked = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
            is_cut = isinstance(node, ast.Subscript)  # BLOOM's way with `pretraining_tp`, which is 1
            if ast.unparse(part) == f"self.{part.value.attr}.weight" and not (is_asked or is_checked or is_cut):
                found.add(part.value.attr)
    return found
