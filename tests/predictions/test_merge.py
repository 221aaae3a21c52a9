from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import DamagedError, IncompleteError, NoRoomError, NotFoundError
from sousbatch.predictions import merge as merging
from sousbatch.predictions.merge import format_rows, merge_units, partial_path, report_path
from sousbatch.predictions.units import committed_units, open_layout, read_layout, unit_path, write_unit

from .conftest import as_rows

MakeRows = Callable[[int, int], list[dict[str, Any]]]
JsonLine = Callable[[dict[str, Any]], bytes]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "predictions.jsonl"


def read_report(out: Path) -> Any:
    return json.loads(report_path(out).read_text())


def test_units_are_joined_in_order_byte_for_byte(
    predicted: Path, out: Path, make_rows: MakeRows, json_line: JsonLine, key: str
) -> None:
    report = merge_units(predicted, out)
    expected = b"".join(map(json_line, make_rows(0, 22)))
    assert out.read_bytes() == expected
    assert (report.output, report.key, report.num_written) == ("predictions.jsonl", key, 22)
    assert (report.num_bytes, report.sha256) == (len(expected), hashlib.sha256(expected).hexdigest())
    assert sorted(path.name for path in out.parent.iterdir()) == [
        key,
        "predictions.jsonl",
        "predictions.report.json",
    ]


def test_the_report_says_who_wrote_what(predicted: Path, out: Path) -> None:
    report = merge_units(predicted, out)
    said = [(source["task"], source["attempt"], source["num_units"], source["rows"]) for source in report.sources]
    assert said == [(0, 1, 3, "0-4,10-14,20-21"), (1, 1, 2, "5-9,15-19")]
    host = report.sources[0]["host"]
    assert list(report.writers()) == [f"task {task}, attempt 1, on {host}: {3 - task} units" for task in (0, 1)]
    assert read_report(out) == report.as_json() | {"faults": [], "sources": list(report.sources)}


def test_missing_units_are_named_and_nothing_is_cut_or_filled(
    predicted: Path, out: Path, make_rows: MakeRows, json_line: JsonLine
) -> None:
    for number in (1, 2, 4):
        unit_path(predicted, number).unlink()
    with pytest.raises(IncompleteError, match=r"10 of 22 rows .* missing rows: 5-14,20-21; details in"):
        merge_units(predicted, out)
    assert not out.exists()
    assert partial_path(out).read_bytes() == b"".join(map(json_line, make_rows(0, 5) + make_rows(15, 20)))
    report = read_report(out)
    assert (report["missing"], report["is_complete"]) == ("5-14,20-21", False)
    assert report["output"] == "predictions.jsonl.partial"


def test_the_command_that_computes_the_rest_is_named(predicted: Path, out: Path) -> None:
    unit_path(predicted, 1).unlink()
    with pytest.raises(IncompleteError, match="missing rows: 5-9; the rest is computed by `sousbatch resume abc`"):
        merge_units(predicted, out, rest="sousbatch resume abc")
    assert read_report(out)["rest"] == "sousbatch resume abc"


def test_merges_into_one_file_at_once_all_end_with_the_same_file(predicted: Path, out: Path) -> None:
    starts = threading.Barrier(4)

    def merge(_: int) -> int:
        starts.wait()
        return merge_units(predicted, out).num_written

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(merge, range(4))) == [22] * 4
    assert sorted(path.name for path in out.parent.iterdir()) == [predicted.name, out.name, report_path(out).name]


def test_a_merge_that_saw_less_leaves_the_complete_file_of_another(
    predicted: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit is committed after the first merge has looked, and a second merge overtakes it."""
    hidden, looked = unit_path(predicted, 1).rename(predicted / "hidden"), merging.read_units

    def overtaken(*arguments: Any) -> Any:
        yield from looked(*arguments)
        if hidden.exists():
            hidden.rename(unit_path(predicted, 1))
            assert merge_units(predicted, out).is_complete

    monkeypatch.setattr(merging, "read_units", overtaken)
    assert merge_units(predicted, out).num_written == 22
    assert not partial_path(out).exists() and read_report(out)["is_complete"]


def test_a_merge_after_the_gap_is_filled_removes_the_partial_file(
    predicted: Path, out: Path, make_rows: MakeRows, key: str
) -> None:
    unit_path(predicted, 1).unlink()
    with pytest.raises(IncompleteError):
        merge_units(predicted, out)
    write_unit(predicted, read_layout(predicted)[1], 1, as_rows(make_rows(5, 10)), key, 2, 0)
    assert merge_units(predicted, out).is_complete
    assert not partial_path(out).exists()
    assert read_report(out)["is_complete"]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_unit_whose_bytes_changed_is_set_aside_and_can_be_predicted_again(
    predicted: Path, out: Path, make_rows: MakeRows, json_line: JsonLine, key: str, number: int
) -> None:
    path = unit_path(predicted, number)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + b"9}\n")
    rows = read_layout(predicted)[1].rows_of(number)
    with pytest.raises(IncompleteError, match=f"missing rows: {rows[0]}-{rows[-1]}; .*its bytes have changed"):
        merge_units(predicted, out)
    kept = [row for row in make_rows(0, 22) if row["index"] not in rows]
    assert partial_path(out).read_bytes() == b"".join(map(json_line, kept))
    assert read_report(out)["sha256"] == hashlib.sha256(partial_path(out).read_bytes()).hexdigest()
    assert path.with_name(path.name + ".damaged").exists()
    layout = read_layout(predicted)[1]
    assert number not in committed_units(predicted, layout, key)
    write_unit(predicted, layout, number, as_rows(make_rows(rows.start, rows.stop)), key, 2, 0)
    assert merge_units(predicted, out).is_complete


def test_a_unit_of_other_predictions_is_not_mixed_in(
    predicted: Path, out: Path, make_rows: MakeRows, tmp_path: Path, key: str
) -> None:
    other = tmp_path / "older"
    layout = open_layout(other, "older-key", 22, 5)
    write_unit(other, layout, 3, as_rows(make_rows(15, 20)), "older-key", 1, 0)
    os.replace(unit_path(other, 3), unit_path(predicted, 3))
    with pytest.raises(IncompleteError, match=r"missing rows: 15-19; .*unit-000003.jsonl: its key is 'older-key'"):
        merge_units(predicted, out)


def test_units_beyond_the_layout_are_not_dropped(predicted: Path, out: Path) -> None:
    layout = predicted / "layout.json"
    layout.write_text(layout.read_text().replace('"num_rows": 22', '"num_rows": 10'))
    with pytest.raises(DamagedError, match="10 of 10 rows .*unexpected rows: 12; .*layout.json has no place for it"):
        merge_units(predicted, out)
    assert not out.exists()


def test_a_complete_output_of_the_same_key_stands_when_units_are_lost(predicted: Path, out: Path) -> None:
    report = merge_units(predicted, out)
    before = (out.read_bytes(), report_path(out).read_bytes())
    unit_path(predicted, 1).unlink()
    assert merge_units(predicted, out) == report
    assert (out.read_bytes(), report_path(out).read_bytes()) == before


def test_an_output_of_another_key_is_replaced_only_by_a_complete_one(
    predicted: Path, out: Path, tmp_path: Path, make_rows: MakeRows
) -> None:
    merge_units(predicted, out)
    before = out.read_bytes()
    folder = tmp_path / "newer"
    layout = open_layout(folder, "newer-key", 2, 1)
    write_unit(folder, layout, 0, as_rows(make_rows(0, 1)), "newer-key", 1, 0)
    with pytest.raises(IncompleteError):
        merge_units(folder, out)
    assert out.read_bytes() == before
    write_unit(folder, layout, 1, as_rows(make_rows(1, 2)), "newer-key", 1, 0)
    merge_units(folder, out)
    assert out.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("text", ["", "[]", '{"is_complete": true}', '{"is_complete": true, "key": 3}'])
def test_a_damaged_report_only_means_merging_again(predicted: Path, out: Path, text: str) -> None:
    whole = merge_units(predicted, out)
    report_path(out).write_text(text)
    assert merge_units(predicted, out) == whole


def test_a_cut_output_is_made_again(predicted: Path, out: Path) -> None:
    merge_units(predicted, out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    merge_units(predicted, out)
    assert out.read_bytes() == whole


def test_a_full_disk_is_named_and_the_older_output_stands(
    predicted: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_text("older")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoomError, match="predictions.jsonl"):
        merge_units(predicted, out)
    assert out.read_text() == "older"
    assert sorted(path.name for path in out.parent.iterdir()) == [predicted.name, "predictions.jsonl"]


def test_no_rows_merge_into_an_empty_file(tmp_path: Path, out: Path, key: str) -> None:
    open_layout(tmp_path / "units", key, 0, 5)
    assert merge_units(tmp_path / "units", out).is_complete
    assert out.read_bytes() == b""


def test_a_folder_where_nothing_was_predicted_is_not_found(tmp_path: Path, out: Path) -> None:
    with pytest.raises(NotFoundError):
        merge_units(tmp_path, out)


def test_many_ranges_are_counted_and_not_listed() -> None:
    ranges = [range(i, i + 1) for i in range(0, 2000, 2)] + [range(5000, 5010)]
    assert format_rows(ranges, 3) == "0,2,4 and 998 more ranges"
    assert format_rows(ranges).endswith(",1998,5000-5009")
