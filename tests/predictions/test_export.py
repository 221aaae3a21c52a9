from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.predictions import export
from sousbatch.predictions.export import check_ids, merged_rows

MakeRows = Callable[[int, int], list[dict[str, Any]]]
JsonLine = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def merged(tmp_path: Path, make_rows: MakeRows, json_line: JsonLine) -> Path:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"".join(map(json_line, make_rows(0, 20))))
    return path


def write(merged: Path, path: Path) -> None:
    """Write all fields of a merged file in the form that the name asks for."""
    export.export(lambda: merged_rows(merged), path, export.format_of(path))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_csv_keeps_newlines_quotes_and_line_separators(merged: Path, tmp_path: Path, make_rows: MakeRows) -> None:
    write(merged, tmp_path / "out.csv")
    expected = [{name: str(value) for name, value in row.items()} for row in make_rows(0, 20)]
    assert read_csv(tmp_path / "out.csv") == expected


def test_csv_has_the_fields_of_all_rows_and_json_for_what_is_no_text(tmp_path: Path, json_line: JsonLine) -> None:
    rows: list[dict[str, Any]] = [
        {"index": 0, "prediction": None},
        {"index": 1, "top": ["가", 0.5], "is_cut": True},
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(json_line, rows)))
    write(tmp_path / "a.jsonl", tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv") == [
        {"index": "0", "prediction": "", "top": "", "is_cut": ""},
        {"index": "1", "prediction": "", "top": '["가", 0.5]', "is_cut": "true"},
    ]


def test_parquet_holds_the_same_rows_in_batches(
    merged: Path, tmp_path: Path, make_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(export, "_BATCH_ROWS", 6)
    write(merged, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == make_rows(0, 20)


def test_a_column_that_starts_empty_gets_the_type_that_comes_later(
    tmp_path: Path, json_line: JsonLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(export, "_BATCH_ROWS", 1)
    rows: list[dict[str, Any]] = [
        {"index": 0, "a": None, "b": 1},
        {"index": 1, "a": "가", "b": 0.5, "c": [1]},
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(json_line, rows)))
    write(tmp_path / "a.jsonl", tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [rows[0] | {"c": None}, rows[1]]


def test_parquet_refuses_a_column_of_two_types_and_leaves_nothing(tmp_path: Path, json_line: JsonLine) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.jsonl").write_bytes(json_line({"index": 0, "a": 1}) + json_line({"index": 1, "a": "가"}))
    with pytest.raises(UsageError, match="does not fit into Parquet's columns: .*keep it as JSONL"):
        write(tmp_path / "a.jsonl", tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_parquet_without_pyarrow_names_the_remedy(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="pip install pyarrow"):
        write(merged, tmp_path / "out.parquet")


def test_no_rows_are_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    write(tmp_path / "a.jsonl", tmp_path / "out.csv")
    assert read_csv(tmp_path / "out.csv") == []


def test_answers_are_one_object_by_id_and_ids_are_checked(tmp_path: Path, json_line: JsonLine) -> None:
    rows: list[dict[str, Any]] = [
        {"index": 0, "id": "6548850-0", "prediction": "교향곡", "n_best": [{"text": "교향곡"}]},
        {"index": 1, "id": 7, "prediction": ""},
    ]
    (tmp_path / "a.jsonl").write_bytes(b"".join(map(json_line, rows)))
    write(tmp_path / "a.jsonl", tmp_path / "answers.json")
    assert json.loads((tmp_path / "answers.json").read_text()) == {"6548850-0": "교향곡", "7": ""}
    for bad, message in (({"prediction": "a"}, "row 3 has no id"), (rows[0], "row 3 has the id '6548850-0'")):
        (tmp_path / "b.jsonl").write_bytes(b"".join(map(json_line, [*rows, bad])))
        with pytest.raises(UsageError, match=message):
            write(tmp_path / "b.jsonl", tmp_path / "b.json")


def test_whole_numbers_as_pandas_writes_them_are_the_same_ids() -> None:
    check_ids([2, 10], [10.0, 2.0], "template.parquet")
    with pytest.raises(UsageError, match="'2.5'"):
        check_ids([2], [2.5], "template.parquet")
