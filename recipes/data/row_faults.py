"""Refusals and warnings that follow from the rows' lengths.

Tasks with prompts share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..facts import Inputs, Lengths, Rows, SplitFacts
from ..model_kinds import max_positions
from ..plan import Stage
from ..schema import StageSettings

_MUCH_UNKNOWN = 0.05  # of the tokens: a rare sign here and there is usual

Some = Callable[[Rows, str, str], str]  # says which rows of a split


def row_refusals(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield why a stage cannot work on its rows."""
    settings = stage.settings
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        positions = max_positions(inputs.model.config)
        some = partial(name_rows, inputs.splits[lengths.split], lengths)
        if lengths.use == "predict":
            yield from _prompt_refusals(settings, some, lengths, settings.predict.vllm.limit(positions))
        else:
            yield from _training_refusals(settings, some, lengths, positions)


def _training_refusals(settings: StageSettings, some: Some, lengths: Lengths, positions: int | None) -> Iterator[str]:
    data, where = settings.data, where_of(lengths)
    if lengths.long.num and data.long_rows == "refuse":
        raised = f"data.max_tokens={lengths.longest}, " if lengths.longest > data.max_tokens else ""
        if positions and lengths.longest > positions:
            raised = ""
        drop = "data.long_rows=drop, " if lengths.long.num < lengths.num_rows else ""  # or nothing would be left
        blocks = "" if data.prompt else "data.packing=blocks, "
        if data.pad_input_to and lengths.longest <= data.max_tokens:
            raised = f"a larger data.pad_input_to, {raised}"
        yield (
            f"{where}: {some(lengths.long, 'longer than', 'rows')} {_limits(settings)}, the longest has "
            f"{lengths.longest:,} tokens; set {raised}{drop}{blocks}data.long_rows=cut_left or data.long_rows=cut_right"
        )
        return
    if lengths.empty.num == lengths.num_rows:
        column = "data.columns.target" if data.prompt else "data.columns.text"
        named = data.columns.target if data.prompt else data.columns.text
        yield f"{where}: all {lengths.num_rows:,} rows are empty in column {named!r}; name another with {column}"
    elif not lengths.num_examples:
        yield (
            f"{where}: no row has anything left to learn: {lengths.long.num:,} of {lengths.num_rows:,} are longer than "
            f"{_limits(settings)}, the longest has {lengths.longest:,} tokens; raise it, or check data.columns"
        )
    elif positions and lengths.longest_kept > positions:
        is_packed = lengths.use == "train" and data.packing != "none"
        what, drop = ("an example", "") if is_packed else ("a row", " and data.long_rows=drop")
        yield (
            f"{where}: {what} has {lengths.longest_kept:,} tokens and the model has {positions:,} positions; set "
            f"data.max_tokens={positions}{drop}, or take a model with a longer context"
        )


def _prompt_refusals(settings: StageSettings, some: Some, lengths: Lengths, positions: int | None) -> Iterator[str]:
    where, answer, is_chunked = where_of(lengths), settings.predict.held_tokens, settings.predict.is_chunked
    key = "predict.chunk_tokens" if is_chunked else "predict.max_new_tokens"
    asked = f"{key}={settings.predict.chunk_tokens} (twice)" if is_chunked else f"{key}={answer}"
    if positions is not None and answer >= positions:
        yield (
            f"{where}: {asked} leaves no tokens for a prompt in the model's {positions:,} "
            f"positions; set {key}={max(1, positions // (8 if is_chunked else 4))}"
        )
        return
    if lengths.unlearnable.num:
        yield (
            f"{where}: {some(lengths.unlearnable, 'without any token', 'prompts')}; give every row an input, "
            "or data.prompt a fixed text"
        )
    if lengths.long.num and settings.data.long_rows in ("refuse", "drop"):
        kept = " (predictions are never dropped)" if settings.data.long_rows == "drop" else ""
        is_context = positions is not None and lengths.longest + answer > positions
        lower = f", or a {key} below {settings.predict.chunk_tokens if is_chunked else answer}" if is_context else ""
        yield (
            f"{where}: {some(lengths.long, 'longer than', 'prompts')} {_prompt_limits(settings, positions)}, "
            f"the longest has {lengths.longest:,} tokens; set data.long_rows=cut_left or data.long_rows=cut_right"
            f"{lower}{kept}"
        )
    elif positions is not None and lengths.longest_kept + answer > positions:
        yield (
            f"{where}: a prompt has {lengths.longest_kept:,} tokens with its padding, and with "
            f"{asked} that is above the model's {positions:,} positions; lower "
            "data.pad_input_to"
        )


def row_warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield what happens to rows that are not used as they stand."""
    settings = stage.settings
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        where, policy = where_of(lengths), settings.data.long_rows
        some = partial(name_rows, inputs.splits[lengths.split], lengths)
        if lengths.long.num and lengths.use == "predict":
            limit = _prompt_limits(settings, settings.predict.vllm.limit(max_positions(inputs.model.config)))
            yield f"{where}: {some(lengths.long, 'longer than', 'prompts')} {limit}, and are cut ({policy})"
        elif lengths.long.num:
            done = "left out" if policy == "drop" else f"cut ({policy})"
            yield f"{where}: {some(lengths.long, 'longer than', 'rows')} {_limits(settings)}, and are {done}"
        if lengths.use == "predict":
            continue
        if lengths.empty.num:
            what = "target" if settings.data.prompt else "text"
            yield f"{where}: {some(lengths.empty, f'with an empty {what}', 'rows')}, and are left out"
        if lengths.unlearnable.num:
            yield (f"{where}: {some(lengths.unlearnable, 'without a token to learn', 'rows')}, and are left out")


def unknown_warnings(stage: Stage, inputs: Inputs) -> Iterator[str]:
    """Yield which rows hold much that the tokenizer does not know."""
    for lengths in (one for one in inputs.lengths if one.stage == stage.name):
        if lengths.num_unknown > _MUCH_UNKNOWN * lengths.num_tokens:
            share = max(1, round(100 * lengths.num_unknown / lengths.num_tokens))
            yield (
                f"{where_of(lengths)}: the tokenizer does not know {share} % of the tokens, and the model sees all of "
                "these as one; plan --rows 1 shows them. Take a tokenizer made for such text (model.tokenizer), or "
                "add what it lacks (model.add_tokens_from)"
            )


def where_of(lengths: Lengths) -> str:
    """Return how messages name the rows of a stage."""
    return f"stage {lengths.stage!r}, split {lengths.split!r}"


def name_rows(split: SplitFacts, lengths: Lengths, rows: Rows, what: str, noun: str) -> str:
    """Return such as "3 of 400 rows (row 1, 7, 9) are longer than"."""
    verb = "are" if what.startswith("longer") else "come"
    return f"{rows.num:,} of {lengths.num_rows:,} {noun} ({places_of(split, rows)}) {verb} {what}"


def places_of(split: SplitFacts, rows: Rows) -> str:
    """Return such as "row 1, 7, 9 and 4 more"."""
    more = f" and {rows.num - len(rows.first):,} more" if rows.num > len(rows.first) else ""
    return f"{split.places(rows.first)}{more}"


def _limits(settings: StageSettings) -> str:
    pad = f" or data.pad_input_to={settings.data.pad_input_to}" if settings.data.pad_input_to else ""
    return f"data.max_tokens={settings.data.max_tokens}{pad}"


def _prompt_limits(settings: StageSettings, positions: int | None) -> str:
    answer, pad = settings.predict.held_tokens, settings.data.pad_input_to
    names = [f"data.pad_input_to={pad}"] if pad else []
    if positions:
        names.append(f"{positions - answer:,} tokens (the model's {positions:,} positions less {answer} to answer in)")
    return " or ".join(names)
