"""`sousbatch plan --data`: the rows of a recipe as a whole."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING

from .progress import row_progress
from .tables import format_table

if TYPE_CHECKING:
    from ..recipes.data.statistics import RowStatistics
    from ..recipes.facts import ModelFacts, Prepared, Rows, SplitFacts
    from ..recipes.inspect.lengths import Progress
    from ..recipes.schema import Recipe

USES = {"train": "trains", "eval": "evaluates", "predict": "predicts", "score": "scores"}
_BAR_CHARS = 40


def show_data(arguments: Namespace) -> int:
    """Print the statistics of the rows; no site is asked, and no disk is measured."""
    from ..recipes.inspect.statistics import read_statistics
    from ..recipes.schema.validate import to_plain

    with row_progress() as progress:
        found = read_statistics(*read_inputs(arguments, progress), progress)
    if arguments.json:
        print(json.dumps(to_plain(found), indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(_as_text, found)))
    return 0


def read_inputs(
    arguments: Namespace, progress: Progress | None = None
) -> tuple[Recipe, ModelFacts, dict[str, SplitFacts], tuple[Prepared, ...]]:
    """Return the recipe, its model, its splits and those that were prepared."""
    from ..recipes.compose import compose
    from ..recipes.inspect.cache import code_digest
    from ..recipes.inspect.data import read_splits
    from ..recipes.inspect.model import find_model, read_model
    from ..recipes.inspect.prepared import prepare_splits
    from ..recipes.inspect.tokens import find_tokens
    from ..recipes.stages import with_tokens

    recipe = compose(arguments.recipe, arguments.overrides)
    splits = read_splits(recipe)
    prepared = prepare_splits(recipe, splits, code_digest(recipe), progress)
    places = find_model(recipe)
    recipe = with_tokens(recipe, find_tokens(recipe, places.tokenizer_folder, splits, prepared))
    return recipe, read_model(recipe, places), splits, prepared


def _as_text(one: RowStatistics) -> str:
    header = (f"{one.stage} {USES[one.use]} {one.split}", "rows", "least", "median", "mean", "p95", "most", "total")
    spreads = [
        [
            f"{name} of a row" if name == "tokens" else f"its {name}",
            *(f"{number:,}" for number in (spread.num_rows, spread.least)),
            *(f"{number:,.4g}" for number in (spread.median, spread.mean)),
            *(f"{number:,}" for number in (spread.p95, spread.most, spread.total)),
        ]
        for name, spread in one.spreads.items()
    ]
    most = max(num for _, _, num in one.histogram)
    bars = [
        [f"{low:,} to {high:,}", f"{num:,}", "#" * round(_BAR_CHARS * num / most) + "." * bool(num and num * 80 < most)]
        for low, high, num in one.histogram
    ]
    tables = [format_table(spreads, header=header), format_table(bars, header=("tokens", "rows", ""))]
    return "\n".join([*tables, *_remarks(one)])


def _remarks(one: RowStatistics) -> list[str]:
    """Return what follows from the lengths, a line each."""
    total, found = one.spreads["tokens"].total, []
    if one.cut_rows:
        share = 100 * one.cut_tokens / total
        found.append(
            f"{one.cut_rows:,} are cut to {one.limit:,} tokens: {one.cut_tokens:,} tokens lost ({share:.2g} %)"
        )
    if one.left_out_rows:
        share = 100 * one.left_out_tokens / total
        found.append(f"{one.left_out_rows:,} are left out, with {one.left_out_tokens:,} tokens ({share:.2g} %)")
    if one.ratio is not None:
        together = "" if one.correlation is None else f"; their lengths correlate by {one.correlation:.2f}"
        found.append(f"all responses have {one.ratio:.2g} x the tokens of their prompts{together}")
    if one.padding is not None:
        plain, grouped, packed = one.padding.plain, one.padding.grouped, one.padding.packed
        found.append(
            f"padding is {100 * plain:.0f} % of a micro batch of {one.padding.micro_batch}; with train.group_by_length "
            f"{100 * grouped:.0f} %" + ("" if packed is None else f", with data.packing {100 * packed:.0f} %")
        )
    for leak in one.leaks:
        if leak.same_input.num:
            which = f"{leak.same_input.num:,} of {leak.num_rows:,} rows ({_numbers(leak.same_input)})"
            both = f"{leak.same_target.num:,} of them its target too"
            found.append(f"{which} have the input of a row of {leak.split!r}, which is trained on; {both}")
        else:
            found.append(f"no row has the input of a row of {leak.split!r}, which is trained on")
    return found


def _numbers(rows: Rows) -> str:
    return f"row {', '.join(map(str, rows.first))}" + " ..." * (rows.num > len(rows.first))
