"""The rank files of one DeepSpeed tag.

It says which there are, whether they belong together, and what each holds. What is refused here is refused by name: an
unknown layout would convert into a model that loads and is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import DamagedError, IncompleteError, UsageError
from ...remote import Place, list_folder, map_in_threads
from .unpickler import StoredTensor
from .zero_state import State

SINGLE_MODEL = "mp_rank_00_model_states.pt"
# DeepSpeed before 0.3.1 left out the underscore behind the last number.
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_?optim_states\.pt")
_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_?model_states\.pt")
_UNIVERSAL = "run DeepSpeed's ds_to_universal.py on it and consolidate the folder that it makes"
_FROM_TRAINING = "save 16-bit weights from the training itself (engine.save_16bit_model, or save_pretrained)"
_FOREIGN = (
    (
        re.compile(r".*expert_\d+_mp_rank_.*_states\.pt|expp_rank_.*_states\.pt"),
        "DeepSpeed's own mixture-of-experts layers",
        _FROM_TRAINING,
    ),
    (
        re.compile(r"layer_\d+-model_.*_states\.pt"),
        "pipeline parallelism",
        "use the converter of the framework that trained it (Megatron-DeepSpeed, gpt-neox), which knows its layers",
    ),
    (re.compile(r".*mp_rank_(?!00_)\d+_.*_states\.pt"), "tensor parallelism", _UNIVERSAL),
)


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One rank's masters.

    They are a flat tensor per parameter group (stages 1, 2) or sub-group (stage 3). *gaps* are the elements left free
    behind each parameter of each group (stages 1, 2 with parameter_alignment); empty where there are none. *step_mark*
    is the optimizer's step count, or the checksum of it.
    """

    path: Place
    digest: str
    zero_stage: int
    world_size: int
    masters: tuple[StoredTensor, ...]
    gaps: tuple[tuple[int, ...], ...]
    step_mark: object


def is_tag_dir(path: Place) -> bool:
    """Say whether *path* holds the rank files of a DeepSpeed checkpoint."""
    return any(path.glob("*_states.pt"))


def is_model_file(name: str) -> bool:
    """Say whether *name* is that of a file with a rank's model states.

    Files of every parallelism count.
    """
    return re.fullmatch(r"(?:zero_pp_rank_\d+_)?mp_rank_\d+_?model_states\.pt", name) is not None


def read_ranks(tag_dir: Place) -> tuple[Rank, ...]:
    """Read every rank's optimizer file, in rank order; none at stage 0.

    Raises:
        UsageError: another kind of parallelism wrote the folder.
        IncompleteError: a rank's file is missing.
        DamagedError: files of two savings are mixed, or one is cut off.
    """
    names = sorted(path.name for path in tag_dir.iterdir())
    for pattern, what, advice in _FOREIGN:
        for name in filter(pattern.fullmatch, names):
            raise UsageError(f"{tag_dir}: {name} was written with {what}, which is not converted here; {advice}")
    files = _by_rank(tag_dir, _OPTIMIZER)
    if not files:
        return ()
    first = _read_rank(next(iter(files.values())))
    _check_ranks(tag_dir, files, first.world_size, "optim_states")
    ranks = tuple(map_in_threads(_read_rank, files.values()))
    for rank in ranks:
        if (rank.world_size, rank.zero_stage) != (first.world_size, first.zero_stage):
            raise DamagedError(
                f"{rank.path}: written by {rank.world_size} ranks at stage {rank.zero_stage}, but "
                f"{first.path.name} by {first.world_size} at stage {first.zero_stage}; "
                "two savings are mixed in this folder"
            )
        if rank.step_mark != first.step_mark:
            raise DamagedError(
                f"{rank.path}: its optimizer has taken another number of steps than that of {first.path.name}; "
                "two savings are mixed in this folder"
            )
    return ranks


def read_models(tag_dir: Place, zero_stage: int, world_size: int) -> list[State]:
    """Read the model file.

    At stage 3 with frozen parameters read every rank's, because each holds a piece of them.
    """
    if zero_stage < 3:
        return [_plain(State.load(tag_dir / SINGLE_MODEL))]
    files = _by_rank(tag_dir, _MODEL)
    _check_ranks(tag_dir, files, world_size, "model_states")
    first = _plain(State.load(files[0]))
    if not first.values.get("frozen_param_fragments"):
        return [first]
    return [first, *map_in_threads(State.load, (files[rank] for rank in range(1, world_size)))]


def _plain(model: State) -> State:
    """Return *model*.

    Raise where its own words say that other ranks hold parts of its parameters.
    """
    if model.values.get("ds_autoep_layers") or model.values.get("autoep_layers"):
        raise UsageError(
            f"{model.path}: its experts were partitioned by AutoEP, which is not converted here; {_FROM_TRAINING}"
        )
    size = model.values.get("mp_world_size")
    if isinstance(size, int) and size > 1:
        raise UsageError(
            f"{model.path}: it was written by {size} tensor-parallel ranks, which is not converted here; {_UNIVERSAL}"
        )
    return model


def _by_rank(tag_dir: Place, pattern: re.Pattern[str]) -> dict[int, Place]:
    found: dict[int, Place] = {}
    for path in list_folder(tag_dir):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        rank = int(match[1])
        if rank in found:
            raise DamagedError(f"{tag_dir}: {found[rank].name} and {path.name} are both of rank {rank}; move one away")
        found[rank] = path
    return dict(sorted(found.items()))


def _check_ranks(tag_dir: Place, files: Mapping[int, Place], world_size: int, what: str) -> None:
    missing = [str(rank) for rank in range(world_size) if rank not in files]
    if missing:
        raise IncompleteError(
            f"{tag_dir}: {what} of rank {', '.join(missing)} of {world_size} missing; copy them from the "
            "node that wrote them, or use an older checkpoint"
        )
    stray = [path.name for rank, path in files.items() if rank >= world_size]
    if stray:
        raise DamagedError(
            f"{tag_dir}: saved by {world_size} ranks, yet {', '.join(stray)} is left from a run of "
            "another size; move it away"
        )


def _read_rank(path: Place) -> Rank:
    loaded = State.load(path)
    state = loaded.below("optimizer_state_dict")
    # BF16_Optimizer (bf16 with gradients accumulated in fp32) does not write its stage: it is 1.
    zero_stage = state.integer("zero_stage") if state.has("zero_stage") else 1
    if zero_stage not in (1, 2, 3):
        raise UsageError(f"{path}: ZeRO stage {zero_stage} is unknown; known: 0, 1, 2, 3")
    key = "fp32_flat_groups" if zero_stage == 3 else "single_partition_of_fp32_groups"
    has_gaps = bool(state.values.get("param_alignment_paddings"))
    return Rank(
        path=path,
        digest=loaded.digest,
        zero_stage=zero_stage,
        world_size=_world_size(state),
        masters=state.tensors_of(key),
        gaps=tuple(map(_integers, state.items_of("param_alignment_paddings"))) if has_gaps else (),
        step_mark=_step_mark(state),
    )


def _step_mark(state: State) -> object:
    """Return what the first parameter's optimizer state says of its step.

    It is equal on all ranks of one saving.
    """
    found: object = state.values.get("optimizer_state_dict", state.values.get("base_optimizer_state"))
    states = found.get("state") if isinstance(found, dict) else None
    for each in states.values() if isinstance(states, dict) else ():
        step = each.get("step") if isinstance(each, dict) else None
        return step.crc32 if isinstance(step, StoredTensor) else step
    return None


def _world_size(state: State) -> int:
    counts = state.values.get("partition_count")
    sizes = set(_integers(counts if isinstance(counts, list) else [counts]))
    if len(sizes) != 1:
        raise UsageError(
            f"{state.path}: its groups are split over {counts} ranks, which is not converted here; {_FROM_TRAINING}"
        )
    return sizes.pop()


def _integers(values: object) -> tuple[int, ...]:
    return tuple(value for value in values if isinstance(value, int)) if isinstance(values, list | tuple) else ()
