"""`sousbatch predictions` and its verb `merge`.

`scoring` has the verb `score`, `ensembling` has `ensemble`, `prediction_view` has `show`.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotFoundError, SousbatchError, UsageError
from ..files import refuse_input
from ..predictions.rows import INDEX
from ..predictions.samplers import SAMPLERS
from .ensembling import define_ensemble
from .parser import Parser, add_command, add_verbs, count, define
from .prediction_view import define_show
from .scoring import define_score

if TYPE_CHECKING:
    from ..recipes.data.output import Table


def define_predictions(parser: Parser) -> None:
    """Define `predictions` and its verbs."""
    define(parser, None, "predictions merge shards/rank*.jsonl --out predictions.jsonl")
    verbs = add_verbs(parser)
    _define_merge(add_command(verbs, "merge", "join shards into one file in row order, or name what is missing"))
    define_score(add_command(verbs, "score", "measure predictions against a data file, or those of runs"))
    define_ensemble(add_command(verbs, "ensemble", "join the predictions of several models"))
    define_show(add_command(verbs, "show", "show rows with their input, target, prediction and scores"))


def _define_merge(merge: Parser) -> None:
    define(
        merge,
        _merge,
        "predictions merge shards/rank*.jsonl --out predictions.jsonl --rows 5000",
        "predictions merge shards/rank*.jsonl --out joined.jsonl --in-file-order",
    )
    merge.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="shards (.jsonl, .csv, .parquet, .npy or .pt), a folder of them, or one of units",
    )
    merge.add_argument("--out", required=True, metavar="FILE", help="the merged file")
    merge.add_argument("--rows", type=count, help="how many rows there must be")
    order = merge.add_mutually_exclusive_group()
    order.add_argument(
        "--index", default=INDEX, metavar="FIELD", help=f"field that holds a row's position (default {INDEX})"
    )
    order.add_argument(
        "--in-file-order", action="store_true", help="rows have no index: one shard after the other, as named here"
    )
    order.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="rows have no index: what dealt them out, the shards in the order of the ranks; "
        + "; ".join(f"{name}: {does}" for name, does in SAMPLERS.items()),
    )
    merge.add_argument("--batch-rows", type=count, help="rows of a rank's batch, for --sampler batches")
    merge.add_argument("--ranks", type=count, metavar="N", help="how many ranks there were, for --sampler")
    merge.add_argument(
        "--post", action="append", default=[], metavar="STEP", help="repair the texts, as predict.post of a recipe does"
    )
    merge.add_argument(
        "--export",
        metavar="FILE",
        help="also write them as .csv, .tsv, .jsonl, .parquet, or as .json, {id: prediction}",
    )
    merge.add_argument("--template", metavar="FILE", help="file with the export's columns and the ids of its rows")
    merge.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="NAME=FIELD",
        help="a column of the export, and the field of the rows, or of those of --data, that it holds",
    )
    merge.add_argument(
        "--data",
        metavar="FILE",
        help="the rows that were predicted, as many as there must be: their columns can be exported, and rows without "
        "an index are compared with them in the columns that both have",
    )


def _merge(arguments: Namespace) -> int:
    from ..api import merge_predictions

    out = Path(arguments.out).expanduser().absolute()
    table = _check_export(arguments, out)
    if arguments.in_file_order or arguments.sampler:
        _check_order(arguments.paths)
    field = None if arguments.in_file_order else arguments.index
    report = merge_predictions(
        arguments.paths,
        out,
        num_rows=arguments.rows,
        index_field=field,
        sampler=arguments.sampler,
        batch_rows=arguments.batch_rows,
        num_ranks=arguments.ranks,
        data=arguments.data,
        post=arguments.post,
    )
    print("\n  ".join([str(report), *report.writers()]))
    return _export(out, arguments, table)


def _check_order(named: list[str]) -> None:
    """Refuse shards in the order of letters, where rank10 comes before rank2."""
    from ..predictions.samplers import by_number

    if named == sorted(named) and named != sorted(named, key=by_number):
        at = next(number for number, text in enumerate(sorted(named, key=by_number)) if text != named[number])
        raise UsageError(
            f"the shards are named in alphabetical order, in which {named[at]!r} comes before smaller numbers; "
            "name them in the order of their rows, such as with $(ls -v PATTERN)"
        )


def _check_export(arguments: Namespace, out: Path) -> Table | None:
    """Return what to export, as far as it can be said before merging.

    What cannot work is refused.
    """
    from ..predictions.export import format_of

    if arguments.data is not None and not Path(arguments.data).is_file():
        raise NotFoundError(f"--data {arguments.data!r} does not exist")
    if arguments.export is None:
        is_compared = arguments.in_file_order or arguments.sampler
        names = ("template", "column") if is_compared else ("template", "column", "data")
        if given := [name for name in names if getattr(arguments, name)]:
            raise UsageError(f"--{given[0]} says what --export writes; give --export FILE, too")
        return None
    format_of(Path(arguments.export))
    if out.suffix != ".jsonl":
        raise UsageError(f"--export needs --out to be a .jsonl file, and it is {out.name!r}")
    if arguments.template is not None and not Path(arguments.template).is_file():
        raise NotFoundError(f"--template {arguments.template!r} does not exist")
    refuse_input(Path(arguments.export), _read(arguments, out))
    if not Path(arguments.export).absolute().parent.is_dir():
        raise NotFoundError(f"--export {arguments.export!r} is to lie in a folder that does not exist")
    if wrong := [one for one in arguments.column if "=" not in one]:
        raise UsageError(f"--column {wrong[0]!r} is not NAME=FIELD, such as summary=prediction")
    columns = [one.partition("=")[0] for one in arguments.column]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UsageError(f"--column says twice what {twice[0]!r} holds: {', '.join(arguments.column)}")
    fields = _first_fields(arguments)
    if not fields:
        return None
    table = _table(arguments, fields)
    if arguments.data is not None and table.place is not None:
        from ..predictions.rows import ID
        from ..recipes.data.output import check_template
        from ..recipes.data.rows import read_rows

        source = table.columns[table.by]
        if source == INDEX or (source in next(read_rows(Path(arguments.data)), {}) and source != ID):
            check_template(table, Path(arguments.data), arguments.rows or sys.maxsize, None, is_part=False)
    return table


def _read(arguments: Namespace, out: Path) -> list[Path]:
    """Return the files that an export must not replace."""
    from ..predictions.merge import report_path
    from ..predictions.units import is_unit, is_unit_folder

    named = [Path(one).expanduser() for one in arguments.paths]
    files = [one for folder in named if folder.is_dir() for one in folder.iterdir() if one.is_file()]
    within = [one for one in files if is_unit(one) or not is_unit_folder(one.parent)]
    beside = [Path(one) for one in (arguments.template, arguments.data) if one is not None]
    return [out, report_path(out), *named, *within, *beside]


def _first_fields(arguments: Namespace) -> tuple[str, ...]:
    """Return the fields of the first row to be merged.

    There are none where that cannot be seen yet.
    """
    from ..predictions.rows import RAW_PREDICTION
    from ..predictions.shard_files import find_shards
    from ..predictions.units import is_unit_folder
    from ..recipes.data.rows import read_rows

    first = Path(arguments.paths[0]).expanduser()
    with suppress(SousbatchError, ValueError, OSError):
        if is_unit_folder(first):
            with next(iter(sorted(first.glob("unit-*.jsonl")))).open(encoding="utf-8") as lines:
                next(lines)  # what the unit is
                found = tuple(json.loads(next(lines)))
        else:
            shard = find_shards([first])[0]
            found = tuple(next(read_rows(shard), {})) if shard.suffix in (".jsonl", ".csv", ".parquet") else ()
        return (*found, RAW_PREDICTION) if found and arguments.post else found
    return ()


def _table(arguments: Namespace, fields: Sequence[str]) -> Table:
    from ..predictions.export import format_of
    from ..recipes.data.output import table_of
    from ..recipes.data.rows import read_rows

    data = Path(arguments.data) if arguments.data is not None else None
    return table_of(
        fields=fields,
        inputs=tuple(next(iter(read_rows(data)), {})) if data is not None else (),
        columns=dict(one.split("=", 1) for one in arguments.column),
        template=arguments.template,
        place=Path(arguments.template) if arguments.template is not None else None,
        format=format_of(Path(arguments.export)),
        key="--column",
    )


def _export(merged: Path, arguments: Namespace, table: Table | None) -> int:
    """Write the merged rows once more in another form, where one is asked for."""
    if arguments.export is None:
        return 0
    from ..predictions.export import merged_rows
    from ..recipes.data.output import write_output
    from ..recipes.data.rows import read_rows

    path = Path(arguments.export).expanduser().absolute()
    data = Path(arguments.data) if arguments.data is not None else None
    table = table or _table(arguments, tuple(next(merged_rows(merged), {})))
    write_output(table, merged, path, (lambda: read_rows(data)) if data is not None else None)
    print(path)
    return 0
