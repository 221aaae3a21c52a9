from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import DamagedError, NoRoomError, NotFoundError, RunError
from sousbatch.predictions.units import (
    Layout,
    committed_units,
    missing_ranges,
    open_layout,
    read_layout,
    survey_units,
    unit_path,
    units_of_task,
    write_unit,
)

from .conftest import as_rows

LAYOUT = Layout(num_rows=22, unit_rows=5)

MakeRows = Callable[[int, int], list[dict[str, Any]]]


def test_a_unit_file_is_one_header_line_and_one_line_a_row(predicted: Path, make_rows: MakeRows, key: str) -> None:
    header_line, *lines = unit_path(predicted, 1).read_bytes().split(b"\n")
    body = unit_path(predicted, 1).read_bytes()[len(header_line) + 1 :]
    assert [json.loads(line) for line in lines[:-1]] == make_rows(5, 10)
    assert lines[-1] == b""
    header = json.loads(header_line)
    assert header.pop("host")
    assert header == {
        "format": 1,
        "key": key,
        "unit": 1,
        "first_row": 5,
        "num_rows": 5,
        "attempt": 1,
        "task": 1,
        "sha256": hashlib.sha256(body).hexdigest(),
        "num_bytes": len(body),
    }


def test_texts_are_written_as_they_are_and_index_comes_first(tmp_path: Path, key: str) -> None:
    layout = open_layout(tmp_path, key, 1, 1)
    write_unit(tmp_path, layout, 0, as_rows([{"prediction": "가\u2028나", "index": 0}]), key, 1, 0)
    assert unit_path(tmp_path, 0).read_bytes().endswith('\n{"index": 0, "prediction": "가\u2028나"}\n'.encode())


def test_a_committed_unit_is_never_rewritten(predicted: Path, make_rows: MakeRows, key: str) -> None:
    before = unit_path(predicted, 0).read_bytes()
    others = [row | {"prediction": "another attempt's"} for row in make_rows(0, 5)]
    unit = write_unit(predicted, LAYOUT, 0, as_rows(others), key, 2, 7)
    assert unit_path(predicted, 0).read_bytes() == before
    assert (unit.attempt, unit.task) == (1, 0)


def test_the_layout_that_is_there_wins_over_other_unit_rows(tmp_path: Path, key: str) -> None:
    assert open_layout(tmp_path / "k", key, 22, 5) == LAYOUT
    assert open_layout(tmp_path / "k", key, 22, 1000) == LAYOUT
    assert read_layout(tmp_path / "k") == (key, LAYOUT)


@pytest.mark.parametrize(("other_key", "num_rows", "word"), [("other", 22, "key"), (None, 23, "num_rows")])
def test_a_folder_of_other_predictions_is_refused(
    predicted: Path, key: str, other_key: str | None, num_rows: int, word: str
) -> None:
    with pytest.raises(DamagedError, match=f"its {word} is"):
        open_layout(predicted, other_key or key, num_rows, 5)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "key": "k", "num_rows": "x", "unit_rows": 0}']
)
def test_a_layout_that_is_none_is_refused(tmp_path: Path, key: str, text: str) -> None:
    (tmp_path / "layout.json").write_text(text)
    with pytest.raises(DamagedError, match="layout.json"):
        open_layout(tmp_path, key, 22, 5)


def test_a_folder_without_layout_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing was predicted there"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: rows + rows[-1:],
        lambda rows: rows[::-1],
        lambda rows: [replace(row, index=float(row.index)) for row in rows],
        lambda rows: [rows[0], replace(rows[1], index=True), *rows[2:]],
    ],
    ids=["too few", "too many", "out of order", "float index", "bool index"],
)
def test_other_rows_than_the_unit_s_are_refused(tmp_path: Path, make_rows: MakeRows, key: str, change: Any) -> None:
    layout = open_layout(tmp_path, key, 22, 5)
    with pytest.raises(ValueError, match="takes the rows 0 to 4, in order"):
        write_unit(tmp_path, layout, 0, change(as_rows(make_rows(0, 5))), key, 1, 0)
    assert committed_units(tmp_path, layout, key) == {}


@pytest.mark.parametrize("value", ["half a pair: \ud800", {1, 2}])
def test_a_row_that_is_no_json_is_named_and_nothing_is_left(
    tmp_path: Path, make_rows: MakeRows, key: str, value: object
) -> None:
    layout = open_layout(tmp_path, key, 22, 5)
    rows = make_rows(0, 5)
    rows[3]["score"] = value
    with pytest.raises(RunError, match="row 3 cannot be written"):
        write_unit(tmp_path, layout, 0, as_rows(rows), key, 1, 0)
    assert not list(tmp_path.glob("*unit*"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_is_data_in_a_unit(tmp_path: Path, make_rows: MakeRows, key: str, value: float) -> None:
    layout = open_layout(tmp_path, key, 5, 5)
    rows = [row | {"score": value} for row in make_rows(0, 5)]
    unit = write_unit(tmp_path, layout, 0, as_rows(rows), key, 1, 0)
    lines = unit.path.read_bytes()[unit.body_offset :].splitlines()
    assert [str(json.loads(line)["score"]) for line in lines] == [str(value)] * 5


def test_a_full_disk_is_named_and_nothing_is_left(
    tmp_path: Path, make_rows: MakeRows, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = open_layout(tmp_path, key, 22, 5)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoomError, match="unit 0 of the predictions"):
        write_unit(tmp_path, layout, 0, as_rows(make_rows(0, 5)), key, 1, 0)
    assert not list(tmp_path.glob("*unit*"))


def test_a_unit_cut_at_any_byte_is_not_committed(predicted: Path, key: str) -> None:
    whole = unit_path(predicted, 2).read_bytes()
    for num_bytes in range(len(whole)):
        unit_path(predicted, 2).write_bytes(whole[:num_bytes])
        assert sorted(committed_units(predicted, LAYOUT, key)) == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data + b"{}\n", "incomplete"),
        (lambda data: b"\0" * len(data), "no unit header"),
        (lambda data: data.replace(b'"key":"key', b'"key":"yek'), "key"),
        (lambda data: data.replace(b'"unit":2', b'"unit":3'), "unit"),
        (lambda data: data.replace(b'"num_rows":5', b'"num_rows":4'), "num_rows"),
        (lambda data: b"[1]\n" + data, "no unit header"),
        (lambda data: data.replace(b'"first_row"', b'"first"'), "no unit header: it lacks 'first_row'"),
        (lambda data: b"x" * 5000 + data, "no unit header"),
    ],
)
def test_a_file_that_is_not_the_unit_is_named_and_can_be_written_again(
    predicted: Path, make_rows: MakeRows, key: str, change: Any, word: str
) -> None:
    path = unit_path(predicted, 2)
    path.write_bytes(change(path.read_bytes()))
    found, (fault,) = survey_units(predicted, LAYOUT, key)
    assert sorted(found) == [0, 1, 3, 4]
    assert str(path) in fault and word in fault
    write_unit(predicted, LAYOUT, 2, as_rows(make_rows(10, 15)), key, 2, 0)
    assert committed_units(predicted, LAYOUT, key)[2].attempt == 2


def test_what_is_not_trusted_is_logged(predicted: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
    unit_path(predicted, 9).write_text("{}")
    assert len(committed_units(predicted, LAYOUT, key)) == 5
    assert "there is no unit 9; the layout has 5" in caplog.text


def test_temporary_and_unknown_files_are_ignored(predicted: Path, key: str) -> None:
    for name in (".tmp-unit-000001.jsonl.ab12", "unit-1.jsonl", "unit-000001.jsonl.damaged", "notes.txt"):
        (predicted / name).write_text("?")
    assert survey_units(predicted, LAYOUT, key)[1] == ()


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7])
def test_every_unit_falls_to_one_task(num_tasks: int) -> None:
    numbers = [number for task in range(num_tasks) for number in units_of_task(LAYOUT, task, num_tasks)]
    assert sorted(numbers) == list(range(LAYOUT.num_units))


def test_a_task_outside_the_array_is_refused() -> None:
    with pytest.raises(ValueError, match="task 3 is not one of 3"):
        units_of_task(LAYOUT, 3, 3)


@pytest.mark.parametrize(
    ("committed", "expected"),
    [
        (range(5), []),
        ((), [range(0, 22)]),
        ((0, 2), [range(5, 10), range(15, 22)]),
        ((1, 2, 3), [range(0, 5), range(20, 22)]),
    ],
)
def test_missing_units_are_named_as_joined_ranges_of_rows(committed: Any, expected: Any) -> None:
    assert list(missing_ranges(LAYOUT, committed)) == expected


def test_no_rows_are_no_units(tmp_path: Path, key: str) -> None:
    layout = open_layout(tmp_path, key, 0, 5)
    assert layout.num_units == 0
    assert missing_ranges(layout, ()) == ()
    assert committed_units(tmp_path, layout, key) == {}
