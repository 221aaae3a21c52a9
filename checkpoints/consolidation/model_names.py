"""Compare the names of a model's tensors with those that are expected.

The latter are those that `from_pretrained` would look for. A tensor under another name is not loaded: transformers
fills its place with random numbers and continues. So transformers itself is asked, in a process of its own,
`python -m sousbatch.checkpoints.consolidation.model_names`, because its import takes seconds: the class in config.json
loads tensors without memory, on the meta device. Code that came with a model is never run. The answer is remembered for
each configuration and set of names.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...user_folders import cached
from ..formats.tensors import DTYPES, Segment, Source, SourceTensor, cut

logger = logging.getLogger(__name__)

_TIMEOUT_S = 600
_MAX_PREFIXES = 8
_Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The answer of transformers on a model's names.

    *unknown* says why they were not compared. *fits* are the prefixes under which a whole model lies: "" for the names
    as they stand. The rest describes the first of them, or the names as they stand where nothing fits.
    """

    unknown: str = ""
    architecture: str = ""
    num_expected: int = 0
    fits: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    forms: Mapping[str, Any] = field(default_factory=dict)


def in_stored_form(source: Source, config: Mapping[str, Any]) -> Source:
    """Return *source* in the form in which models of its class are stored.

    It is what training writes, so its names are not doubted. transformers is asked only for a class that it may hold in
    another form.
    """
    if not _may_be_stored_otherwise(config):
        return source
    return as_stored(source, _compared(source, config).forms)


def _may_be_stored_otherwise(config: Mapping[str, Any]) -> bool:
    """Say whether transformers' table of other forms names what is in *config*.

    The table is read as text: importing it takes seconds.
    """
    names = {f'"{name}"' for name in _names_in(config)}
    package = importlib.util.find_spec("transformers")
    for place in (package.submodule_search_locations or ()) if package is not None else ():
        with suppress(OSError):
            text = (Path(place) / "conversion_mapping.py").read_text(encoding="utf-8")
            return any(name in text for name in names)
    return False


def _names_in(config: Mapping[str, Any]) -> Iterator[str]:
    yield from (str(config["model_type"]),) if "model_type" in config else ()
    yield from (_named_class(config),) if _named_class(config) else ()
    for section in config.values():
        if isinstance(section, dict):
            yield from _names_in(section)


def fitted(source: Source, config: Mapping[str, Any]) -> Source:
    """Return the part of *source* that the class in *config* loads.

    Its tensors get the names that the class looks for.

    Raises:
        UsageError: nothing in it is that model; what was expected and found is named, and the way out.
    """
    comparison = _compared(source, config)
    if comparison.unknown:
        logger.warning("sousbatch: warning: the names of the weights were not compared: %s", comparison.unknown)
        return source
    if not comparison.fits:
        raise UsageError(f"{source.path}: {_misfit(comparison)}")
    if len(comparison.fits) > 1:
        found = " and ".join(repr(prefix) for prefix in comparison.fits)
        raise UsageError(
            f"{source.path}: holds several models of {comparison.architecture}, below {found}; save the one that is "
            "wanted alone, or write all names as they stand, without config.json, with --adapter raw"
        )
    if comparison.unexpected:
        logger.warning(
            "sousbatch: warning: %s tensors are none that %s loads, and are not used: %s",
            f"{len(comparison.unexpected):,}",
            comparison.architecture,
            _some(comparison.unexpected),
        )
    return as_stored(below(source, comparison.fits[0]), comparison.forms)


def as_stored(source: Source, forms: Mapping[str, Any]) -> Source:
    """Return the tensors of *source* as *forms* make them of those in memory.

    A form has a shape and runs: (name in memory, first element, number of elements). What is stored already, or is made
    of a tensor that an adapter changes, stays as it is.
    """
    held = {tensor.name: tensor for tensor in source.tensors}
    made: dict[str, list[SourceTensor]] = {}
    for name, (shape, runs) in forms.items():
        parts = [held.get(run[0]) for run in runs]
        if any(part is None or part.changes for part in parts) or len({part.dtype for part in parts if part}) != 1:
            return source
        first = held[runs[0][0]]
        copies = [held[run[0]].working_copy for run in runs]
        copy = None
        if all(copies):
            copy = replace(first.working_copy, name=name, shape=tuple(shape), segments=_joined(copies, runs))  # type: ignore[type-var]
        stored = replace(
            first,
            name=name,
            shape=tuple(shape),
            segments=_joined([held[run[0]] for run in runs], runs),
            working_copy=copy,
        )
        made.setdefault(runs[0][0], []).append(stored)
    taken = {run[0] for _, runs in forms.values() for run in runs}
    tensors = [
        one for tensor in source.tensors for one in (made.get(tensor.name, []) if tensor.name in taken else [tensor])
    ]
    return replace(source, tensors=tuple(tensors))


def _joined(parts: Sequence[SourceTensor | None], runs: Sequence[Sequence[Any]]) -> tuple[Segment, ...]:
    return tuple(
        segment
        for part, (_, first, num) in zip(parts, runs, strict=True)
        if part is not None
        for segment in cut(part.segments, DTYPES[part.dtype].num_bytes, first, num)
    )


def below(source: Source, prefix: str) -> Source:
    """Return the tensors of *source* whose names begin with *prefix*.

    The prefix is left out of their names.
    """
    if not prefix:
        return source
    return replace(
        source,
        tensors=tuple(
            replace(tensor, name=tensor.name.removeprefix(prefix))
            for tensor in source.tensors
            if tensor.name.startswith(prefix)
        ),
        aliases=tuple(
            (name.removeprefix(prefix), kept.removeprefix(prefix))
            for name, kept in source.aliases
            if name.startswith(prefix) and kept.startswith(prefix)
        ),
    )


def _misfit(comparison: Comparison) -> str:
    said = []
    if comparison.missing:
        said.append(
            f"lacks {len(comparison.missing):,} of the {comparison.num_expected:,} weights of "
            f"{comparison.architecture}, which config.json names, so they would be random: {_some(comparison.missing)}"
        )
    if comparison.misshapen:
        said.append(f"has weights of other shapes than config.json says: {_some(comparison.misshapen)}")
    if comparison.unexpected:
        said.append(f"it holds instead {len(comparison.unexpected):,} others: {_some(comparison.unexpected)}")
    if {"tok_embeddings.weight", "output.weight"} & set(comparison.unexpected):
        said.append("these look like torchtitan's names: convert them with its scripts/checkpoint_conversion first")
    return (
        "; ".join(said) + "; name the folder of the right config.json with --copy-from DIR, or write all names as they "
        "stand, without config.json, with --adapter raw"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _compared(source: Source, config: Mapping[str, Any]) -> Comparison:
    names = {tensor.name: tensor.shape for tensor in source.tensors}
    reason = _incomparable(source, config)
    if reason:
        return Comparison(unknown=reason)
    plain = _plain(config)
    answers: list[Any] = []

    def ask() -> Any:
        answers.append(_asked({"config": plain, "names": names}))
        return answers[0]

    try:
        key = [metadata.version("transformers"), plain, sorted(names.items())]
        with suppress(OSError):  # the cache cannot be written
            answers = [cached("names", key, ask)]
    except metadata.PackageNotFoundError:
        return Comparison(unknown="transformers is not installed here")
    except _UnansweredError as error:
        return Comparison(unknown=str(error))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in answers[0].items()
    }
    return Comparison(**values)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the names.

    The path does not, nor the (possibly fetched) code by which they are computed.
    """
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("_name_or_path", "quantization_config") and "_implementation" not in key
    }


def _named_class(config: Mapping[str, Any]) -> str:
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""


def _incomparable(source: Source, config: Mapping[str, Any]) -> str:
    """Return why transformers need not be asked, empty where it is to be."""
    if any(tensor.dtype in ("int8", "uint8") for tensor in source.tensors):
        return "the weights are quantised"
    named = _named_class(config)
    if not named and not config.get("model_type"):
        return "config.json names no architecture"
    auto_map = config.get("auto_map")
    custom = [str(value) for value in (auto_map.values() if isinstance(auto_map, dict) else ())]
    if custom and (not named or any(value.endswith(f".{named}") for value in custom)):
        return f"the model {named or config['model_type']} is code of its own, which is not run here"
    return ""


class _UnansweredError(Exception):
    """The process that was to compare did not; the argument says why."""


def _asked(question: Mapping[str, Any]) -> Any:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
        reason = str(error)
    raise _UnansweredError(f"transformers could not build the model of config.json ({reason})")


def _answer(config: dict[str, Any], names: _Shapes) -> dict[str, Any]:
    """Load *names*, without their values, as from_pretrained does.

    It runs in the process that imports transformers.
    """
    import torch
    import transformers

    found = _model_class(config)
    if isinstance(found, str):
        return {"unknown": found}
    settings = found.config_class.from_dict(json.loads(json.dumps(config), object_hook=_number))
    with torch.device("meta"):
        model = found(settings)
    buffers = {name for name, _ in model.named_buffers()}
    expected = set(model.state_dict()) - buffers
    transformers.logging.set_verbosity_error()

    def loaded(prefix: str) -> dict[str, list[str]]:
        tensors = {
            name.removeprefix(prefix): torch.empty(shape, dtype=torch.float16, device="meta")
            for name, shape in names.items()
            if name.startswith(prefix)
        }
        _, info = found.from_pretrained(
            None,
            config=settings,
            state_dict=tensors,
            output_loading_info=True,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
        )
        missing = sorted(set(info["missing_keys"]) - buffers)
        # Without an architecture only the base is known: a model may add a head and leave out, say, the pooler.
        is_exact = bool(_named_class(config))
        return {
            "missing": missing if is_exact or 2 * len(missing) > len(expected) else [],
            "unexpected": sorted(info["unexpected_keys"]) if is_exact else [],
            "misshapen": [
                f"{name} is {list(has)}, expected {list(needs)}" for name, has, needs in info["mismatched_keys"]
            ],
        }

    return {
        "architecture": found.__name__,
        "num_expected": len(expected),
        "forms": _forms(model),
        **_best(names, expected, getattr(found, "base_model_prefix", ""), loaded),
    }


def _forms(model: Any) -> dict[str, Any]:
    """Return the form of each tensor that is stored otherwise than in memory."""
    from .layout import stored_forms

    forms = stored_forms(model) or {}
    return {name: form for name, form in forms.items() if [(name, 0)] != [run[:2] for run in form.runs]}


def _best(
    names: _Shapes, expected: set[str], base_prefix: str, loaded: Callable[[str], dict[str, list[str]]]
) -> dict[str, Any]:
    as_they_stand = loaded("")
    if _is_whole(as_they_stand):
        return as_they_stand | {"fits": [""]}
    reports = {prefix: loaded(prefix) for prefix in _prefixes(names, expected, base_prefix)}
    fits = [prefix for prefix, report in reports.items() if _is_whole(report)]
    # A prefix within another is the same model, less what lies outside of its base.
    apart = [prefix for prefix in fits if not any(prefix != other and prefix.startswith(other) for other in fits)]
    return (reports[apart[0]] if apart else as_they_stand) | {"fits": apart}


def _is_whole(report: Mapping[str, Any]) -> bool:
    return not report["missing"] and not report["misshapen"]


def _prefixes(names: _Shapes, expected: set[str], base_prefix: str) -> list[str]:
    """Return what stands before expected names, the most frequent first."""
    known = expected | {f"{base_prefix}.{name}" for name in expected}
    counts = Counter(
        name[: at + 1] for name in names for at, sign in enumerate(name) if sign == "." and name[at + 1 :] in known
    )
    ranked = sorted(counts, key=lambda prefix: (-counts[prefix], len(prefix), prefix))
    return ranked[:_MAX_PREFIXES]


def _number(value: dict[str, Any]) -> Any:
    """Return a number that transformers writes as an object, such as infinity.

    Other objects stay.
    """
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _model_class(config: Mapping[str, Any]) -> Any:
    """Return transformers' own class for *config*, or why there is none."""
    import transformers

    named = _named_class(config)
    found = getattr(transformers, named, None) if named else _base_class(str(config["model_type"]))
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return f"transformers {transformers.__version__} does not know {named or config['model_type']!r}"


def _base_class(model_type: str) -> Any:
    """Return the class of the model without a head.

    Any model of this type has all that it loads.
    """
    import transformers

    try:
        settings = transformers.AutoConfig.for_model(model_type)
        return transformers.AutoModel._model_mapping[type(settings)]
    except (ValueError, KeyError):
        return None


def main() -> None:
    """Read a question from stdin and print the answer as the last line."""
    question = json.load(sys.stdin)
    names = {name: tuple(shape) for name, shape in question["names"].items()}
    print(json.dumps(_answer(question["config"], names)))


if __name__ == "__main__":
    main()
