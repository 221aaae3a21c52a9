"""Say what `predict.output` writes: its columns, their sources, the rows' order.

Planning asks it before anything runs, and the merge writes by it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UsageError, nearest
from ...predictions.export import SUFFIXES, Format, Rows, check_ids, export, merged_rows, placed, selected
from ...predictions.rows import ID, INDEX, PREDICTION, RAW_PREDICTION
from ..schema import StageSettings
from ..tasks import task_of
from .rows import read_rows

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Table:
    """The file to write, with the source of each column by its name.

    A source is a field of a prediction, or a column of its row. Rows are placed by the column *by*, in the
    order of the template in *place*, which the user calls *template*.
    """

    columns: Mapping[str, str]
    format: Format
    template: str = ""
    place: Path | None = None
    by: str = ""


def fields_of(settings: StageSettings) -> tuple[str, ...]:
    """Return the fields that every merged prediction of a predict stage has."""
    raw = (RAW_PREDICTION,) if settings.predict.post else ()
    identity = (ID,) if settings.data.columns.id else ()
    return (INDEX, *identity, PREDICTION, *raw, *task_of(settings.task).fields)


def table_of(
    *,
    fields: Sequence[str],
    inputs: Sequence[str],
    columns: Mapping[str, str],
    template: str | None = None,
    place: Path | None = None,
    format: Format | None = None,
    identity: str | None = None,
    target: str | None = None,
    key: str = "predict.output.columns",
) -> Table:
    """Return the table that an output asks for; *place* is where its template lies.

    Predictions have *fields*, their rows the columns *inputs*, with the ids in *identity* and the right answers in
    *target*. A column of the template is what *columns* says, else the field, the prediction for the target, or the
    column of that name. Where the rows have a column `index` or `id`, it is that one.

    Raises:
        UsageError: a column is given by nothing, or nothing says which row is which.
    """
    if place is None:
        for name, source in columns.items():
            _check_source(name, source, fields, inputs, key)
        return _checked(Table(columns=columns, format=format or "csv"), key)
    wanted = list(next(iter(read_rows(place, template)), {}))
    if not wanted:
        raise UsageError(f"template {template} has no row")
    if unknown := [name for name in columns if name not in wanted]:
        raise UsageError(f"{key} names {unknown[0]!r}, which template {template} does not have: {', '.join(wanted)}")
    found: dict[str, str] = {}
    for name in wanted:
        default = name if name in fields else PREDICTION if name == target else name
        found[name] = columns.get(name, default)
        _check_source(name, found[name], fields, inputs, key, f" of template {template}")
    # what says it best comes first
    marks = ({ID, identity or ID}, {INDEX}, {*inputs, *found.values()} - {*fields})
    by = next((name for mark in marks for name, source in found.items() if source in mark), None)
    if by is None:
        raise UsageError(
            f"template {template} has {', '.join(wanted)}, none of which says which row is which; map one to index by "
            f"{key} where it counts the rows from 0, or leave the template out to write the rows in their own order"
        )
    return _checked(
        Table(columns=found, format=format or _format_of(place), template=str(template), place=place, by=by), key
    )


def _check_source(
    name: str, source: str, fields: Sequence[str], inputs: Sequence[str], key: str, where: str = ""
) -> None:
    if source in fields or source in inputs:
        return
    hint = nearest(source, [*fields, *inputs])
    rows = f", and their rows have {', '.join(inputs)}" if inputs else ""
    raise UsageError(
        f"column {name!r}{where} is given by nothing called {source!r}: predictions have {', '.join(fields)}{rows}"
        + (f" ({hint})" if hint else "")
        + f"; say what it is in {key}, such as {{{name}: {PREDICTION}}}"
    )


def _checked(table: Table, key: str) -> Table:
    if table.format == "json" and len(table.columns) not in (0, 2):
        raise UsageError(f"a .json file holds {{id: prediction}}, and {key} has {', '.join(table.columns)}; name two")
    if table.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError("Parquet needs pyarrow, which is not installed: pip install 'sousbatch[data]'")
    return table


def _format_of(place: Path) -> Format:
    """Return the format of a template, which may be packed."""
    suffix = next((one for one in reversed(place.suffixes) if one in SUFFIXES.values()), ".csv")
    if suffix == ".csv":
        with place.open("rb") as stream:
            return "csv_bom" if stream.read(3) == _BOM else "csv"
    return next(format for format, known in SUFFIXES.items() if known == suffix)


def check_template(table: Table, split: Path, num_rows: int, identity: str | None, *, is_part: bool) -> None:
    """Compare the ids of a template with those of the rows that will be predicted.

    Raises:
        UsageError: they are not the same ids, once each, or a JSON object cannot have the rows' ids.
    """
    if table.format == "json":
        _check_names(table, split, num_rows, identity)
    if table.place is None:
        return
    source = table.columns[table.by]
    rows = enumerate(islice(read_rows(split), num_rows))
    places = ({INDEX: position, ID: row.get(identity or ID), **row} for position, row in rows)
    there = (place.get(source) for place in places)
    check_ids(there, _ids(table), table.template, is_part=is_part)


def _check_names(table: Table, split: Path, num_rows: int, identity: str | None) -> None:
    """Refuse rows that cannot have one name each in a JSON object."""
    source = next(iter(table.columns.values()), ID)
    column = identity if source == ID else source
    if column is None:
        raise UsageError(
            "predict.output.format is json, which holds {id: prediction}, and rows have no id; set "
            "data.columns.id=COLUMN or predict.output.format=csv"
        )
    seen = set[str]()
    for number, row in enumerate(islice(read_rows(split), num_rows), 1):
        if column in row and (name := str(row[column])) in seen:
            raise UsageError(
                f"row {number} has the {column} {name!r} of an earlier row, and predict.output.format=json holds one "
                "prediction of each; give each row its own, or set predict.output.format=csv"
            )
        seen.add(str(row.get(column)))


def _ids(table: Table) -> Iterator[Any]:
    assert table.place is not None, "a table with a template"
    return (row.get(table.by) for row in read_rows(table.place, table.template))


def write_output(table: Table, merged: Path, out: Path, inputs: Rows | None, *, is_part: bool = False) -> None:
    """Write the predictions of a merged file as *table*.

    *inputs* are the rows that were predicted.

    Raises:
        UsageError: the ids are not those of the template, or a row lacks a column.
        NoRoomError: the disk is full.
    """
    if not table.columns:
        export(lambda: merged_rows(merged), out, table.format)
        return
    rows = selected(lambda: merged_rows(merged), inputs, table.columns)
    if (place := table.place) is not None:
        check_ids((row[table.by] for row in rows()), _ids(table), table.template, is_part=is_part)
        rows = placed(rows, lambda: read_rows(place, table.template), table.by, out.parent)
    export(rows, out, table.format, tuple(table.columns))
