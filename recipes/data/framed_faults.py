"""Refusals and warnings on rows whose prompt is encoded apart from the answer.

They are those of `framed`: a prompt has `data.max_tokens`, a target that is encoded has `data.max_target_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from ..facts import Inputs, Lengths
from ..model_kinds import max_positions
from ..plan import Stage
from ..schema import StageSettings
from .row_faults import Some, name_rows, where_of


class _Limit(NamedTuple):
    """A key that limits texts, and the longest of them.

    The *positions* are the most that the model can take.
    """

    key: str
    value: int
    longest: int
    positions: int | None

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def _limits(settings: StageSettings, lengths: Lengths, inputs: Inputs) -> list[_Limit]:
    data, config = settings.data, inputs.model.config
    limits = [_Limit("data.max_tokens", data.max_tokens, lengths.longest, max_positions(config, "encoder"))]
    if lengths.longest_target:
        positions = max_positions(config, "decoder")
        limits.append(_Limit("data.max_target_tokens", data.max_target_tokens, lengths.longest_target, positions))
    return limits


def framed_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield why a stage cannot work on its rows."""
    settings = stage.settings
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        limits = _limits(settings, lengths, inputs)
        if too_many := [one for one in limits if one.positions and min(one.value, one.longest) > one.positions]:
            yield from (_beyond_positions(lengths, one) for one in too_many)
        elif lengths.long.num and _is_refused(settings, lengths):
            yield _too_long(settings, lengths, limits, partial(name_rows, inputs.splits[lengths.split], lengths))
        elif lengths.empty.num == lengths.num_rows:
            yield f"{where_of(lengths)}: all {lengths.num_rows:,} rows are empty; check data.prompt and data.columns"
        elif not lengths.num_examples:
            yield (
                f"{where_of(lengths)}: no row is left: {lengths.long.num:,} of {lengths.num_rows:,} are longer than "
                f"{' or '.join(map(str, limits))}; raise it, or check data.columns"
            )


def _is_refused(settings: StageSettings, lengths: Lengths) -> bool:
    """Say whether longer rows are refused: predictions are never dropped."""
    return settings.data.long_rows in (("refuse", "drop") if lengths.use == "predict" else ("refuse",))


def _beyond_positions(lengths: Lengths, limit: _Limit) -> str:
    return (
        f"{where_of(lengths)}: a row has {limit.longest:,} tokens, and the model takes {limit.positions:,}; set "
        f"{limit.key}={limit.positions} and data.long_rows=cut_left or data.long_rows=cut_right, or take a model with "
        "a longer context"
    )


def _too_long(settings: StageSettings, lengths: Lengths, limits: list[_Limit], some: Some) -> str:
    above = [one for one in limits if one.longest > one.value]
    raised = " ".join(f"{one.key}={one.longest}" for one in above if not one.positions or one.longest <= one.positions)
    drops = lengths.use != "predict" and lengths.long.num < lengths.num_rows  # or nothing would be left
    ways = [raised] * bool(raised) + ["data.long_rows=drop"] * drops
    kept = " (predictions are never dropped)" if settings.data.long_rows == "drop" else ""
    return (
        f"{where_of(lengths)}: {some(lengths.long, 'longer than', 'rows')} "
        f"{' or '.join(map(str, above))}, the longest has {' and '.join(f'{one.longest:,}' for one in above)} tokens; "
        f"set {', '.join([*ways, 'data.long_rows=cut_left'])} or data.long_rows=cut_right{kept}"
    )


def framed_warnings(stage: Stage, inputs: Inputs, *, empty: str) -> Iterator[str]:
    """Yield what happens to rows that are not used as they stand.

    The word *empty* says what is empty in rows that are.
    """
    settings, policy = stage.settings, stage.settings.data.long_rows
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        where, some = where_of(lengths), partial(name_rows, inputs.splits[lengths.split], lengths)
        if lengths.long.num:
            done = "left out" if policy == "drop" else f"cut ({policy})"
            above = [str(one) for one in _limits(settings, lengths, inputs) if one.longest > one.value]
            long = some(lengths.long, "longer than", "rows")
            yield f"{where}: {long} {' or '.join(above)}, and are {done}"
        if lengths.empty.num:
            yield f"{where}: {some(lengths.empty, f'with an empty {empty}', 'rows')}, and are left out"
