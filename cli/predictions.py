"""`sousbatch predictions` and its verb `merge`.

`scoring` has the verb `score`, `prediction_view` has `show`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..errors import UsageError
from ..predictions.rows import INDEX
from .parser import Parser, add_command, add_verbs, count, define
from .prediction_view import define_show
from .scoring import define_score


def define_predictions(parser: Parser) -> None:
    """Define `predictions` and its verbs."""
    define(parser, None, "predictions merge shards/rank*.jsonl --out predictions.jsonl")
    verbs = add_verbs(parser)
    _define_merge(add_command(verbs, "merge", "join shards into one file in row order, or name what is missing"))
    define_score(add_command(verbs, "score", "measure predictions against a data file, or those of runs"))
    define_show(add_command(verbs, "show", "show rows with their input, target, prediction and scores"))


def _define_merge(merge: Parser) -> None:
    define(
        merge,
        _merge,
        "predictions merge shards/rank*.jsonl --out predictions.jsonl --rows 5000",
        "predictions merge shards/rank*.jsonl --out joined.jsonl --in-file-order",
    )
    merge.add_argument(
        "paths", nargs="+", metavar="PATH", help="shards (.jsonl or .csv), a folder of them, or a folder of units"
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
    merge.add_argument(
        "--export",
        metavar="FILE",
        help="also write the merged rows as .csv or .parquet, or their predictions as .json, {id: prediction}",
    )


def _merge(arguments: Namespace) -> int:
    from ..api import merge_predictions

    out = Path(arguments.out).expanduser().absolute()
    _check_export(arguments.export, out)
    if arguments.in_file_order:
        _check_order(arguments.paths)
    field = None if arguments.in_file_order else arguments.index
    report = merge_predictions(arguments.paths, out, num_rows=arguments.rows, index_field=field)
    print("\n  ".join([str(report), *report.writers()]))
    return _export(out, arguments.export)


def _check_order(named: list[str]) -> None:
    """Refuse shards in the order of letters, where rank10 comes before rank2."""
    from ..predictions.shard_merge import by_number

    if named == sorted(named) and named != sorted(named, key=by_number):
        at = next(number for number, text in enumerate(sorted(named, key=by_number)) if text != named[number])
        raise UsageError(
            f"the shards are named in alphabetical order, in which {named[at]!r} comes before smaller numbers; "
            "name them in the order of their rows, such as with $(ls -v PATTERN)"
        )


def _check_export(export: str | None, out: Path) -> None:
    if export is None:
        return
    if Path(export).suffix not in (known := (".csv", ".parquet", ".json")):
        raise UsageError(f"--export {export!r} has an unknown format; known: {', '.join(known)}")
    if out.suffix != ".jsonl":
        raise UsageError(f"--export needs --out to be a .jsonl file, and it is {out.name!r}")


def _export(merged: Path, export: str | None) -> int:
    """Write the merged rows once more in another form, where one is asked for."""
    from ..predictions.export import write_answers, write_csv, write_parquet

    if export is not None:
        path = Path(export).expanduser().absolute()
        {".csv": write_csv, ".parquet": write_parquet, ".json": write_answers}[path.suffix](merged, path)
        print(path)
    return 0
