"""Build the model that a recipe trains, without memory, and print what it is.

Run as `python -m sousbatch.recipes.inspect.architecture`, in a process of its own, so that planning never imports
torch. It reads a question from stdin. The model is on the meta device, so one of any size takes no memory; from its
class to its adapter it is built as the jobs build it, and what they would refuse is refused here.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoints.formats.lora import UnmergeableError, as_adapter, merge_adapter
from ...checkpoints.formats.tensors import Segment, Source, SourceTensor
from ...errors import UsageError, nearest
from ..building import count_parameters, prepare_model
from ..new_tokens import add_rows
from ..schema import StageSettings
from ..schema.validate import build
from .tokenizer import load_full


def main() -> None:
    """Read a question from stdin and print the answer as the last line."""
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # peft would import it, which takes seconds
    print(json.dumps(answer(json.load(sys.stdin))))


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's config, its parameters, and what trains of it.

    *question* has the folder of the config and that of the tokenizer, the class of transformers, the changes to the
    config, whether code of its own may run, the shapes and dtypes of its files' tensors, and by their keys the
    settings of each training. A training that cannot work has a `problem`; otherwise there is all of `TrainedFacts`.

    Raises:
        UsageError: there is no model of that class and config.
    """
    import torch

    with torch.device("meta"):
        model = _empty_model(question)
    tokenizer = load_full(question["tokenizer_folder"], question["add_tokens"], trusts_code=question["trusts"])
    with torch.device("meta"):
        add_rows(model, tokenizer)
    found = {
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "tensors": [(name, list(value.shape)) for name, value in model.named_parameters()],
    }
    trained = {}
    for number, (key, values) in enumerate(question["trainings"].items()):
        with torch.device("meta"):
            fresh = _empty_model(question) if number else model
            trained[key] = _trained(values, fresh, tokenizer, question["stored"])
    return {**found, "trained": trained}


def _empty_model(question: Mapping[str, Any]) -> Any:
    import transformers

    changes, options = question["changes"], {"trust_remote_code": question["trusts"]}
    config, unused = transformers.AutoConfig.from_pretrained(
        question["folder"], **options, **changes, return_unused_kwargs=True
    )
    unknown = sorted(unused.keys() & changes.keys())
    if unknown:  # transformers passes over it
        known = sorted({*config.to_dict(), *config.attribute_map})
        hint = nearest(unknown[0], known) or f"it has {', '.join(known)}"
        raise UsageError(f"model.config has {unknown[0]!r}, which {type(config).__name__} does not ({hint})")
    kind = getattr(transformers, question["model_class"])
    known_configs = getattr(kind, "_model_mapping", {})
    has_own_code = kind.__name__ in (getattr(config, "auto_map", None) or {})
    if known_configs and not has_own_code and type(config) not in known_configs:
        raise UsageError(f"{config.model_type} has no {kind.__name__.removeprefix('Auto')} in transformers")
    return kind.from_config(config, **options)


def _trained(values: Mapping[str, Any], model: Any, tokenizer: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    settings, faults = build(StageSettings, values)
    if settings is None:
        return {"problem": "; ".join(map(str, faults))}
    name = type(model).__name__
    try:
        ready = prepare_model(settings, model, tokenizer)
        return {**count_parameters(ready), "merges_in_memory": _merges_in_memory(ready, stored)}
    except UsageError as error:
        return {"problem": str(error)}
    except Exception as error:  # whatever a library raises here, it would raise in the job
        return {"problem": f"{name} cannot be made ready to train: {type(error).__name__}: {error}"}


def _merges_in_memory(model: Any, stored: Mapping[str, Any]) -> bool:
    """Say whether only peft can merge the adapter of *model* into the *stored* base.

    The streamed merge itself is asked, with tensors of the right names and shapes.
    """
    if not hasattr(model, "peft_config") or not stored:
        return False
    trained = {name: (value.shape, "float32") for name, value in model.named_parameters() if value.requires_grad}
    config = model.peft_config["default"].to_dict()
    try:
        adapter = as_adapter(_source(trained), config)
        merge_adapter(adapter, _source(stored), config)
    except UnmergeableError:
        return True
    return False


def _source(tensors: Mapping[str, Any]) -> Source:
    def tensor(name: str, shape: tuple[int, ...], dtype: str) -> SourceTensor:
        segment = Segment(path=Path(name), offset_bytes=0, num_elements=math.prod(shape))
        return SourceTensor(name=name, shape=shape, dtype=dtype, segments=(segment,), role="trained")

    found = tuple(tensor(name, tuple(shape), dtype) for name, (shape, dtype) in tensors.items())
    return Source(path=Path("model"), content="model", tensors=found)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(str(error))
