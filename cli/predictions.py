"""`sousbatch predictions` and its verb `merge`.

`scoring` has the verb `score`, `ensembling` has `ensemble`, `prediction_view` has `show`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..errors import NotFoundError, UsageError
from ..files import refuse_input
from ..predictions.rows import INDEX
from ..predictions.samplers import SAMPLERS
from .ensembling import define_ensemble
from .parser import Parser, add_command, add_verbs, count, define
from .prediction_view import define_show
from .scoring import define_score


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
    merge.add_argument("--data", metavar="FILE", help="the rows that were predicted, whose columns can be exported")


def _merge(arguments: Namespace) -> int:
    from ..api import merge_predictions

    out = Path(arguments.out).expanduser().absolute()
    _check_export(arguments, out)
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
        post=arguments.post,
    )
    print("\n  ".join([str(report), *report.writers()]))
    return _export(out, arguments)


def _check_order(named: list[str]) -> None:
    """Refuse shards in the order of letters, where rank10 comes before rank2."""
    from ..predictions.shard_merge import by_number

    if named == sorted(named) and named != sorted(named, key=by_number):
        at = next(number for number, text in enumerate(sorted(named, key=by_number)) if text != named[number])
        raise UsageError(
            f"the shards are named in alphabetical order, in which {named[at]!r} comes before smaller numbers; "
            "name them in the order of their rows, such as with $(ls -v PATTERN)"
        )


def _check_export(arguments: Namespace, out: Path) -> None:
    from ..predictions.export import format_of

    if arguments.export is None:
        if given := [name for name in ("template", "column", "data") if getattr(arguments, name)]:
            raise UsageError(f"--{given[0]} says what --export writes; give --export FILE, too")
        return
    format_of(Path(arguments.export))
    if out.suffix != ".jsonl":
        raise UsageError(f"--export needs --out to be a .jsonl file, and it is {out.name!r}")
    for name in ("template", "data"):
        given_file = getattr(arguments, name)
        if given_file is not None and not Path(given_file).is_file():
            raise NotFoundError(f"--{name} {given_file!r} does not exist")
    read = [out, *(Path(one) for one in (*arguments.paths, arguments.template, arguments.data) if one is not None)]
    refuse_input(Path(arguments.export), read)
    if wrong := [one for one in arguments.column if "=" not in one]:
        raise UsageError(f"--column {wrong[0]!r} is not NAME=FIELD, such as summary=prediction")


def _export(merged: Path, arguments: Namespace) -> int:
    """Write the merged rows once more in another form, where one is asked for."""
    if arguments.export is None:
        return 0
    from ..predictions.export import format_of, merged_rows
    from ..recipes.data.output import table_of, write_output
    from ..recipes.data.rows import read_rows

    path = Path(arguments.export).expanduser().absolute()
    data = Path(arguments.data) if arguments.data is not None else None
    table = table_of(
        fields=tuple(next(merged_rows(merged), {})),
        inputs=tuple(next(iter(read_rows(data)), {})) if data is not None else (),
        columns=dict(one.split("=", 1) for one in arguments.column),
        template=arguments.template,
        place=Path(arguments.template) if arguments.template is not None else None,
        format=format_of(path),
        key="--column",
    )
    write_output(table, merged, path, (lambda: read_rows(data)) if data is not None else None)
    print(path)
    return 0
