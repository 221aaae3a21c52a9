"""`sousbatch runs`: what ran, with what, how well, and where it lies."""

from __future__ import annotations

import csv
import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, nearest
from ..run_index import find_run, known_runs
from .parser import Parser, define, setting
from .tables import format_size, format_table, format_value

if TYPE_CHECKING:
    from ..launchers.history import RunRow

_MOST_KEYS = 4  # that have a column each; more stand in one


def define_runs(parser: Parser) -> None:
    """Define `runs`."""
    define(
        parser,
        _runs,
        "runs",
        "runs hangul-restoration --sort cer",
        "runs hangul-restoration --best cer",
        "runs --where adapter.method=lora --where state=done --csv",
        "runs hangul-restoration --seeds",
        "runs --diff 3f2a 77c1",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="runs of this recipe, points of this sweep, or this run; all when left out",
    )
    parser.add_argument(
        "--where",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="only with this value of a key, or state",
    )
    show = parser.add_mutually_exclusive_group()
    show.add_argument(
        "--sort", metavar="COLUMN", help="by a score, the best first, or another column (default: oldest first)"
    )
    show.add_argument(
        "--best",
        metavar="SCORE",
        help="the best run by a score, such as cer: what sets it apart, and where its model is",
    )
    show.add_argument(
        "--seeds", action="store_true", help="mean and standard deviation over runs that differ by seed alone"
    )
    show.add_argument(
        "--diff", nargs=2, metavar="RUN", help="two runs side by side: what differs in what went in, and what came out"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, with the whole recipe of each run")
    form.add_argument("--csv", action="store_true", help="as CSV, with the whole recipe of each run")


def _runs(arguments: Namespace) -> int:
    from ..launchers.history import by_seed, read_history
    from ..launchers.registry import launcher_named

    if arguments.diff:
        return _diff(arguments)
    chosen = [paths for paths in known_runs() if not arguments.names or paths.recipe_name in arguments.names]
    chosen += [find_run(name) for name in arguments.names if all(name != paths.recipe_name for paths in chosen)]
    rows = _where(read_history(chosen, launcher_named), arguments.where)
    if not rows:
        print("no such run; `sousbatch status` lists all" if chosen else "no runs yet; `sousbatch submit` makes one")
        return 0
    if arguments.sort:
        rows = _sorted(rows, arguments.sort)
    if arguments.best and not (scored := _scored(rows, arguments.best)):
        print(f"none of these {len(rows)} runs has {arguments.best}", file=sys.stderr)
        return 1
    if arguments.json or arguments.csv:
        _print_all(scored[:1] if arguments.best else rows, as_json=arguments.json)
    elif arguments.best:
        print(_describe_best(scored, arguments.best))
    elif arguments.seeds:
        print(_describe_seeds(list(by_seed(rows))))
    else:
        print(_table(rows))
    return 0


def _diff(arguments: Namespace) -> int:
    from .run_differences import describe_differences

    if arguments.names or arguments.where or arguments.csv:
        raise UsageError("runs --diff takes two runs, and --json; no other name, no --where, no --csv")
    print(describe_differences([find_run(name) for name in arguments.diff], as_json=arguments.json))
    return 0


def _where(rows: Sequence[RunRow], wanted: Iterable[tuple[str, str]]) -> list[RunRow]:
    """Return the rows that have each wanted value."""
    for key, value in wanted:
        known = {"state", "recipe", "run", *(name for row in rows for name in row.values)}
        if rows and key not in known:
            hint = nearest(key, sorted(known))
            raise UsageError(f"--where {key}: no recipe of these runs has that key" + (f" ({hint})" if hint else ""))
        rows = [row for row in rows if format_value(row.values.get(key, getattr(row, key, None))) == value]
    return list(rows)


def columns_of(rows: Sequence[RunRow], *, most_keys: int = _MOST_KEYS) -> dict[str, Callable[[RunRow], Any]]:
    """Return the columns that say something of these rows.

    Each comes with how it gets its value.
    """
    from ..launchers.history import differing
    from ..predictions.scoring import headlines
    from ..recipes.site_file import device_hour_price

    keys = differing(rows)
    found: dict[str, Callable[[RunRow], Any]] = {"run": lambda row: row.run}
    if len({row.recipe for row in rows}) > 1:
        found["recipe"] = lambda row: row.recipe
    if any(row.decoding for row in rows):
        found["decoding"] = lambda row: row.decoding
    found |= {"state": lambda row: row.state, "sent": lambda row: _date(row.sent_at)}
    if len(keys) > most_keys:
        found["differs in"] = lambda row: " ".join(
            f"{key}={format_value(row.values[key])}"
            for key in keys[: 2 * _MOST_KEYS]
            if row.values.get(key) is not None
        )
    else:
        found |= {key: lambda row, key=key: format_value(row.values.get(key)) for key in keys}  # type: ignore[misc]
    if any(row.steps for row in rows):
        found |= {
            "steps": lambda row: f"{row.step}/{row.steps}" if row.steps else "",
            "loss": lambda row: row.loss,
            "best": lambda row: row.best,
            "examples/s": lambda row: row.examples_per_s,
            "tokens/s": lambda row: row.tokens_per_s,
        }
        if any(row.device_memory_gb for row in rows):
            found["device GB"] = lambda row: row.device_memory_gb
    oldest_first = sorted(rows, key=lambda row: (row.sent_at, row.run))  # so that sorting moves no column
    names = dict.fromkeys(name for row in oldest_first for name in headlines(row.scores))
    found |= {name: lambda row, name=name: row.scores.get(name) for name in names}  # type: ignore[misc]
    found["device hours"] = lambda row: row.device_hours
    if price := device_hour_price():
        found["cost"] = lambda row: row.device_hours * price
    found["holds"] = lambda row: format_size(row.held_bytes)
    return found


def _table(rows: Sequence[RunRow]) -> str:
    columns = columns_of(rows)
    return format_table([[_cell(get(row)) for get in columns.values()] for row in rows], header=tuple(columns))


def _sorted(rows: Sequence[RunRow], column: str) -> list[RunRow]:
    """Return the rows by a column.

    Scores have the best first; rows without a value come last.
    """
    from ..predictions.metrics import is_lower_better

    get = _column(rows, column)
    is_reverse = any(_score(row, column) is not None for row in rows) and not is_lower_better(column)
    having = [row for row in rows if get(row) is not None]
    return sorted(having, key=get, reverse=is_reverse) + [row for row in rows if get(row) is None]


def _column(rows: Sequence[RunRow], name: str) -> Callable[[RunRow], Any]:
    columns = columns_of(rows)
    if name in columns:
        return columns[name]
    if any(_score(row, name) is not None for row in rows):
        return lambda row: _score(row, name)
    known = list(dict.fromkeys([*columns, *(score for row in rows for score in row.scores)]))
    hint = nearest(name, known) or f"known: {', '.join(known)}"
    raise UsageError(f"{name!r} is no column of these runs ({hint})")


def _score(row: RunRow, name: str) -> float | None:
    """Return a score by its name, that of the first stage where several score."""
    return next((value for key, value in row.scores.items() if name in (key, key.rpartition("/")[2])), None)


def _scored(rows: Sequence[RunRow], score: str) -> list[RunRow]:
    """Return the rows that have a score, the best first."""
    get = _column(rows, score)
    return [row for row in _sorted(rows, score) if get(row) is not None]


def _describe_best(scored: Sequence[RunRow], score: str) -> str:
    """Return the best run beside the next, what sets it apart, and its model.

    The first of *scored* is the best.
    """
    from ..launchers.history import differing

    get = _column(scored, score)
    best, second = scored[0], next((row for row in scored if row.folder != scored[0].folder), None)
    facts: list[tuple[str, object]] = [("run", best.run), (score, _cell(get(best)))]
    if best.decoding:
        facts.append(("decoding", best.decoding))
    if len(scored) > 1:
        facts.append(("next", f"{_cell(get(scored[1]))} of {_named(scored[1])}, among {len(scored)} with this score"))
    for key in differing(scored):
        own, other = (format_value(row.values.get(key)) for row in (best, scored[1]))
        facts.append((key, own if own == other else f"{own}  (next: {other})"))
    untrained = "was removed" if best.steps else best.values.get("model.path", "")
    facts += [("folder", best.folder), ("model", best.model or untrained)]
    advice = []
    if best.model:
        advice.append(f"predict with it again: model.path=run:{_name(best)}")
    if second is not None:
        advice.append(f"all that differs: sousbatch runs --diff {_name(best)} {_name(second)}")
    return "\n".join([format_table(facts), *([""] if advice else []), *advice])


def _name(row: RunRow) -> str:
    """Return what names a run in a shell's command: its id, of a point its folder."""
    return shlex.quote(str(row.folder)) if row.sweep else row.run


def _named(row: RunRow) -> str:
    return f"{row.run} ({row.decoding})" if row.decoding else row.run


def _describe_seeds(groups: Sequence[tuple[Sequence[RunRow], Mapping[str, tuple[float, float]]]]) -> str:
    from ..launchers.history import differing
    from ..predictions.scoring import headlines

    if not groups:
        return "none of these runs is done"
    keys = differing([group[0] for group, _ in groups])
    keys = [key for key in keys if key != "seed"]
    names = dict.fromkeys(name for _, scores in groups for name in headlines({one: 0.0 for one in scores}))
    table = [
        [
            len(group),
            ", ".join(str(row.values.get("seed")) for row in group),
            *(format_value(group[0].values.get(key)) for key in keys),
            *("{:.4f} ± {:.4f}".format(*scores[name]) if name in scores else "" for name in names),
        ]
        for group, scores in groups
    ]
    return format_table(table, header=("runs", "seeds", *keys, *names))


def _print_all(rows: Sequence[RunRow], *, as_json: bool) -> None:
    plain = [
        {
            **{name: value for name, value in vars(row).items() if name not in ("values", "scores", "data")},
            "folder": str(row.folder),
            "model": str(row.model or "") or None,
            "scores": dict(row.scores),
            "data": dict(row.data),
            "recipe_values": dict(row.values),
        }
        for row in rows
    ]
    if as_json:
        print(json.dumps(plain, indent=1, ensure_ascii=False))
        return
    lines = []
    for row in plain:
        parts = {"scores.": row.pop("scores"), "data.": row.pop("data"), "": row.pop("recipe_values")}
        nested = {
            f"{part}{key}": format_value(value) for part, values in parts.items() for key, value in values.items()
        }
        lines.append(row | nested)
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(sys.stdout, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else value
