"""Build the model that a recipe trains, without memory, and print what it is.

Run as `python -m sousbatch.recipes.inspect.architecture`, in a process of its own, so that planning never imports
torch. It reads a question from stdin. The model is on the meta device, so one of any size takes no memory; from its
class to its adapter it is built as the jobs build it, and what they would refuse is refused here.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.formats.lora import UnmergeableError, as_adapter, merge_adapter
from ...checkpoints.formats.tensors import Segment, Source, SourceTensor
from ...errors import UsageError, nearest
from ..building import count_parameters, prepare_model
from ..model_kinds import most_in_full_attention
from ..new_tokens import add_rows, num_token_rows
from ..schema import StageSettings
from ..schema.validate import build
from ..tasks import TaskSpec, advise_task, misfit, task_of
from .tokenizer import load_full

_NUM_TOKENS = 8
_OF_SENSES = "it is a decoder for the text of images or speech, which counts padding among its positions"
# Classes that read text, and yet cannot be trained on it, or not as they would answer.
_UNFIT = {
    "prophetnet": "it is a ProphetNet, whose scores of a token depend on how many follow it, so that it would not "
    "answer as it was trained",
    "funnel": "it is a Funnel, which fails with texts of fewer than five tokens",
    "git": "it is a GIT, whose loss leaves out places of an image before each text",
    "trocr": _OF_SENSES,
    "whisper": _OF_SENSES,
}


def main() -> None:
    """Read a question from stdin and print the answer as the last line."""
    gc.disable()  # takes a fifth off what is imported here, and the process ends soon
    question = json.load(sys.stdin)
    for name in () if question["trusts"] else ("bitsandbytes", "datasets"):  # which transformers and peft would import
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # for seconds, and need only to load values
    print(json.dumps(answer(question)))


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's config, its parameters, and what trains of it.

    *question* has the folder of the config and that of the tokenizer, the task, the changes to the config, whether code
    of its own may run, the kernels of attention that stages ask for, the shapes and dtypes of its files' tensors (none
    where it starts from random ones), and by their keys the settings of each training. A training that cannot work has
    a `problem`; otherwise there is all of `TrainedFacts`.

    Raises:
        UsageError: there is no model of that class and config that reads text, or its files lack weights.
    """
    import torch

    with torch.device("meta"):
        model = _empty_model(question)
    untied = _untie(model, question["tables"])
    _check_attention(model, question["attentions"])
    if question["stored"]:
        _check_stored(model, question["stored"], has_new_head=task_of(question["task"]).has_new_head)
    tokenizer = load_full(question["tokenizer_folder"], question["add_tokens"], trusts_code=question["trusts"])
    with torch.device("meta"):
        add_rows(model, tokenizer)
    _check_ids(model, tokenizer)
    _check_separators(model, tokenizer)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # the same model may lie elsewhere
    found = {
        "config": config,
        "tensors": [(name, list(value.shape)) for name, value in model.named_parameters()],
        "untied": untied,
    }
    trained = {}
    for number, (key, values) in enumerate(question["trainings"].items()):
        with torch.device("meta"):
            fresh = _empty_model(question) if number else model
            _untie(fresh, question["tables"])
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
    task = task_of(question["task"])
    kind, plain = getattr(transformers, task.model_class), config.to_dict()
    wrong = misfit(task, plain)
    if not _has_class(task, config):
        wrong = f"is a {config.model_type}, which has no {task.model_class.removeprefix('Auto')} in transformers"
    if wrong:
        raise UsageError(f"it {wrong}; {advise_task(plain, lambda other: _has_class(other, config))}")
    if "default_language" in plain and plain["default_language"] not in plain["languages"]:  # an XMOD
        languages = ", ".join(plain["languages"])
        raise UsageError(f"it does not know its language; set model.config.default_language to one of {languages}")
    if plain.get("num_landmarks", width := plain.get("segment_means_seq_len")) != width:  # a Nystromformer
        raise UsageError(
            f"it takes texts of {width} tokens alone, to sum them up in {plain['num_landmarks']}; set "
            f"model.config.num_landmarks={width}, so that it attends to all tokens of any text"
        )
    if plain.get("is_decoder") and most_in_full_attention(plain) is not None:  # a BigBird, which would see the end
        raise UsageError(
            "it is a decoder whose blocks attend to later tokens; set model.config.attention_type=original_full"
        )
    if config.model_type in _UNFIT:
        raise UsageError(f"{_UNFIT[config.model_type]} (transformers 5.23); take another model")
    if plain.get("axial_pos_embds"):  # a Reformer
        raise UsageError(
            f"it is a {config.model_type} that trains on rows of {math.prod(plain['axial_pos_shape']):,} tokens alone, "
            "to which no row is padded here; take another model"
        )
    model = kind.from_config(config, **options)
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"it is a {config.model_type}, which reads {model.main_input_name} and no text; take another model"
        )
    return model


def _untie(model: Any, tables: Mapping[str, str]) -> list[str]:
    """Untie layers of whose one weight the files hold several; return their names.

    transformers does so when it loads the values (`tie_weights`, 5.23), as those of mT5, whose config says otherwise.
    *tables* has for each tensor its dtype and a digest.
    """
    import torch

    groups: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in tables:
            groups.setdefault(id(value), []).append(name)
    found = []
    for source, *others in groups.values():
        dtype, digest = tables[source].split()
        for name in others:
            if tables[name].split()[0] == dtype and tables[name].split()[1] != digest:
                place, _, last = name.rpartition(".")
                value = getattr(model.get_submodule(place), last)
                setattr(model.get_submodule(place), last, torch.nn.Parameter(torch.empty_like(value)))
                getattr(model, "all_tied_weights_keys", {}).pop(name, None)
                found.append(name)
    return found


def _check_ids(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with gaps, some of whose ids are beyond the model's rows."""
    rows, highest = num_token_rows(model), max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise UsageError(
            f"its tokenizer gives ids up to {highest:,} for {len(tokenizer):,} tokens, and the model has rows for "
            f"{rows:,} ids; take the tokenizer that it was trained with, or number the tokens without gaps; a model "
            f"from scratch takes model.config.vocab_size={highest + 1}"
        )


def _check_separators(model: Any, tokenizer: Any) -> None:
    """Refuse a Longformer that would not find where a question ends.

    It looks for the three separators of a RoBERTa's pair.
    """
    if type(model).__name__ != "LongformerForQuestionAnswering":
        return
    found = tokenizer("a", "b")["input_ids"].count(model.config.sep_token_id)
    if found != 3:
        raise UsageError(
            f"its tokenizer puts {found} separators (id {model.config.sep_token_id}) into a question with its passage, "
            "and a Longformer finds the end of the question by three; take the tokenizer that it was trained with"
        )


def _check_attention(model: Any, wanted: Sequence[str]) -> None:
    """Refuse a kernel that the class of the model cannot use."""
    usable = {"eager": True, "sdpa": model._supports_sdpa, "flash_attention_2": model._supports_flash_attn}
    for name in (one for one in wanted if not usable[one]):
        others = " or ".join(f"model.attention={one}" for one, can in usable.items() if can)
        raise UsageError(f"model.attention is {name}, which {type(model).__name__} cannot use; set {others}")


def _has_class(task: TaskSpec, config: Any) -> bool:
    """Say whether transformers, or code beside the *config*, has the class of *task*."""
    import transformers

    kind = getattr(transformers, task.model_class)
    known_configs = getattr(kind, "_model_mapping", None)  # whose truth would import every model's config
    has_own_code = kind.__name__ in (getattr(config, "auto_map", None) or {})
    return known_configs is None or has_own_code or type(config) in known_configs


def _check_stored(model: Any, stored: Mapping[str, Any], *, has_new_head: bool) -> None:
    """Refuse a model whose files lack weights, which would be random.

    Those of a new head may be missing. transformers itself tells them, as when the job loads the model.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    _, report = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict={
            name: torch.empty(shape, dtype=torch.float16, device="meta") for name, (shape, _) in stored.items()
        },
        output_loading_info=True,
        device_map={"": "meta"},
        ignore_mismatched_sizes=True,
    )
    base, buffers = f"{model.base_model_prefix}.", {name for name, _ in model.named_buffers()}
    others = {name: f"{name} is {list(has)} and not {list(needs)}" for name, has, needs in report["mismatched_keys"]}
    for found, what in ((others, "has other shapes than its config says"), (report["missing_keys"], "lacks")):
        lost = sorted(name for name in found if name not in buffers and not (has_new_head and _is_head(name, base)))
        if lost:
            shown = ", ".join(others.get(name, name) for name in lost[:3]) + (", ..." if len(lost) > 3 else "")
            number = f"{len(lost):,} of {len(model.state_dict()):,} weights of {type(model).__name__}"
            raise UsageError(
                f"the model {what} {number}, which would be random: {shown}; the files are incomplete, or of another "
                "model than config.json says"
            )


def _is_head(name: str, base: str) -> bool:
    """Say whether a weight is of a new head, or of a pooler that serves it."""
    return not name.startswith(base) or name.startswith(f"{base}pooler.")


def _trained(values: Mapping[str, Any], model: Any, tokenizer: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    settings, faults = build(StageSettings, values)
    if settings is None:
        return {"problem": "; ".join(map(str, faults))}
    name = type(model).__name__
    try:
        _check_start(model)
        ready = prepare_model(settings, model, tokenizer)
        if hasattr(ready, "peft_config"):
            _check_called(ready, takes_all_linear="all-linear" in settings.adapter.target_modules)
        recomputes = bool(getattr(model, "supports_gradient_checkpointing", True))
        merges_in_memory = _merges_in_memory(ready, stored)
        return {**count_parameters(ready), "merges_in_memory": merges_in_memory, "recomputes": recomputes}
    except UsageError as error:
        return {"problem": str(error)}
    except Exception as error:  # whatever a library raises here, it would raise in the job
        return {"problem": f"{name} cannot be made ready to train: {type(error).__name__}: {error}"}


def _check_start(model: Any) -> None:
    """Refuse an encoder-decoder whose decoder has no token to begin with."""
    import torch

    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or not model.config.is_encoder_decoder:
        return
    try:
        shift(labels=torch.zeros((1, _NUM_TOKENS), dtype=torch.long))
    except Exception as error:  # each class has its own way to say that a token has no id
        raise UsageError(
            f"{type(model).__name__} does not know what its decoder begins with ({error}); give its config.json a "
            "decoder_start_token_id and a pad_token_id, such as 0 and 0 of a T5"
        ) from error


def _check_called(model: Any, *, takes_all_linear: bool) -> None:
    """Refuse an adapter on a layer that the *model* does not call.

    DeBERTa does not call its `rel_embeddings`, nor Mamba its `dt_proj`: they read the weight past the layer, and so
    past the adapter. A model is called without values to see it; one that cannot run so is let through. Linear layers
    of one name are called alike, or not at all; those of `all-linear` may be in a part that reads no text.
    """
    import torch
    from peft.tuners.lora.layer import Embedding, Linear, _ConvNd
    from torch.utils._python_dispatch import TorchDispatchMode

    class AnyValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Answers what a model asks of values, such as whether a mask is all ones."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asks = func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta
            return True if asks else func(*args, **(kwargs or {}))

    class AllCalledError(Exception):
        pass

    kinds = (Embedding, _ConvNd) if takes_all_linear else (Embedding, _ConvNd, Linear)
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    groups = {module: name.rpartition(".")[2] if isinstance(module, Linear) else name for module, name in names.items()}
    left = {groups[module]: name for module, name in names.items()}
    if not left:
        return

    def strike(module: Any, _: Any) -> None:
        left.pop(groups[module], None)
        if not left:  # the rest would take seconds for a deep model
            raise AllCalledError

    any_values: Any = AnyValues()  # type: ignore[no-untyped-call]
    hooks = [module.register_forward_pre_hook(strike) for module in names]
    ids = torch.zeros((1, _NUM_TOKENS), dtype=torch.long, device="meta")
    also = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.eval()  # in training some models skip layers at random
    try:
        with torch.no_grad(), torch.device("cpu"), any_values:  # what it makes by the way has values
            model.get_base_model()(input_ids=ids, attention_mask=torch.ones_like(ids), **also)
    except Exception:  # whatever a model needs values for
        return
    finally:
        model.train()
        [hook.remove() for hook in hooks]
    short = next(iter(left.values())).removeprefix("base_model.model.")
    raise UsageError(
        f"adapter.target_modules: {type(model.get_base_model()).__name__} does not call {short}, but reads its weight "
        "or nothing of it, so that an adapter of it would not train; leave it out, or train it in full by "
        f"adapter.modules_to_save=[{short.rpartition('.')[2]}]"
    )


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
