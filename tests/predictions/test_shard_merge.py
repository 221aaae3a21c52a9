from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from sousbatch.api import merge_predictions
from sousbatch.cli.main import main
from sousbatch.errors import DamagedError, IncompleteError, NotFoundError, UsageError
from sousbatch.predictions import shard_merge
from sousbatch.predictions.merge import partial_path, report_path
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.shard_files import find_shards
from sousbatch.predictions.shard_merge import merge_shards
from sousbatch.predictions.units import open_layout, write_unit

NUM_ROWS, NUM_RANKS = 60, 4
MakeRows = Callable[[int, int], list[dict[str, Any]]]
JsonLine = Callable[[dict[str, Any]], bytes]
CsvLines = tuple[bytes, list[bytes]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "predictions.jsonl"


@pytest.fixture
def lines(make_rows: MakeRows, json_line: JsonLine) -> list[bytes]:
    return [json_line(row) for row in make_rows(0, NUM_ROWS)]


@pytest.fixture
def shards(tmp_path: Path, lines: list[bytes]) -> list[Path]:
    """Row i lies in the shard of rank i % 4."""
    paths = [tmp_path / f"rank={rank}.jsonl" for rank in range(NUM_RANKS)]
    for rank, path in enumerate(paths):
        path.write_bytes(b"".join(lines[rank::NUM_RANKS]))
    return paths


def rewrite(path: Path, change: Any) -> None:
    path.write_bytes(change(path.read_bytes()))


def assert_merged(out: Path, lines: list[bytes], missing: Collection[int] = ()) -> None:
    path = partial_path(out) if missing else out
    assert path.read_bytes() == b"".join(line for i, line in enumerate(lines) if i not in missing)
    assert out.exists() == (not missing)
    assert partial_path(out).exists() == bool(missing)


def test_interleaved_shards_come_out_in_order_byte_for_byte(shards: list[Path], out: Path, lines: list[bytes]) -> None:
    report = merge_shards(shards, out, num_rows=NUM_ROWS)
    assert_merged(out, lines)
    assert (report.num_rows, report.num_written, report.faults) == (NUM_ROWS, NUM_ROWS, ())
    assert report.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [source["num_rows"] for source in report.sources] == [15] * NUM_RANKS


def cut_in_a_character(data: bytes) -> bytes:
    at = data.rfind("요".encode())
    return data[: at + 1]


LOSSES = {
    "incomplete tail": (lambda data, lines: data[:-20], {57}, "num_incomplete"),
    "cut in a character": (lambda data, lines: cut_in_a_character(data), {57}, "num_incomplete"),
    "NUL tail": (lambda data, lines: data[: -len(lines[57])] + b"\0" * 300, {57}, "num_incomplete"),
    "incomplete and continued": (
        lambda data, lines: data.replace(lines[21], lines[21][:30]),
        {21},
        "num_corrupt",
    ),
    "NUL hole": (lambda data, lines: data.replace(lines[21], b"\0" * 50), {21}, "num_corrupt"),
    "index as a float": (
        lambda data, lines: data.replace(b'"index": 21,', b'"index": 21.0,'),
        {21},
        "num_corrupt",
    ),
    "no index": (lambda data, lines: data.replace(b'"index": 21,', b'"i": 21,'), {21}, "num_corrupt"),
    "huge index": (
        lambda data, lines: data.replace(b'"index": 21,', b'"index": 9223372036854775807,'),
        {21},
        "num_corrupt",
    ),
    "bit rot": (lambda data, lines: data.replace(lines[21][-12:], b"\xff" * 11 + b"\n"), {21}, "num_corrupt"),
    "a list": (lambda data, lines: data.replace(lines[21], b"[1, 2]\n"), {21}, "num_corrupt"),
}


@pytest.mark.parametrize(("change", "lost", "counter"), LOSSES.values(), ids=LOSSES)
def test_a_damaged_row_is_dropped_counted_and_named(
    shards: list[Path], out: Path, lines: list[bytes], change: Any, lost: set[int], counter: str
) -> None:
    rewrite(shards[1], lambda data: change(data, lines))
    with pytest.raises(IncompleteError, match=f"missing rows: {','.join(map(str, sorted(lost)))};"):
        merge_shards(shards, out, num_rows=NUM_ROWS)
    assert_merged(out, lines, lost)
    report = json.loads(report_path(out).read_text())
    assert report[counter] == 1
    assert report["faults"][0].startswith(f"{shards[1]}: byte ")


@pytest.mark.parametrize(("change", "lost", "counter"), LOSSES.values(), ids=LOSSES)
def test_damage_does_no_harm_when_the_rows_were_predicted_again(
    shards: list[Path],
    out: Path,
    lines: list[bytes],
    tmp_path: Path,
    change: Any,
    lost: set[int],
    counter: str,
) -> None:
    rewrite(shards[1], lambda data: change(data, lines))
    again = tmp_path / "again.jsonl"
    again.write_bytes(b"".join(lines[i] for i in sorted(lost)))
    report = merge_shards([*shards, again], out, num_rows=NUM_ROWS)
    assert_merged(out, lines)
    assert getattr(report, counter) == 1


def test_without_the_number_of_rows_an_incomplete_line_may_have_been_the_last(
    shards: list[Path], out: Path, lines: list[bytes], tmp_path: Path
) -> None:
    rewrite(shards[3], lambda data: data[:-20])
    with pytest.raises(IncompleteError, match="59 of 59 rows .* incomplete rows: 1"):
        merge_shards(shards, out)
    with pytest.raises(IncompleteError, match="missing rows: 59"):
        merge_shards(shards, out, num_rows=NUM_ROWS)


def test_without_the_number_of_rows_the_highest_index_is_the_last(
    shards: list[Path], out: Path, lines: list[bytes]
) -> None:
    assert merge_shards(shards, out).num_rows == NUM_ROWS
    assert_merged(out, lines)


def test_a_lost_rank_is_named(shards: list[Path], out: Path, lines: list[bytes]) -> None:
    with pytest.raises(IncompleteError, match="45 of 60 rows .* missing rows: 2,6,10,14,18 and 10 more ranges"):
        merge_shards(shards[:2] + shards[3:], out, num_rows=NUM_ROWS)
    assert_merged(out, lines, set(range(2, NUM_ROWS, 4)))


def test_any_order_of_rows_and_shards_will_do(shards: list[Path], out: Path, lines: list[bytes]) -> None:
    for path in shards:
        rewrite(path, lambda data: b"".join(sorted(data.splitlines(keepends=True), reverse=True)))
    shards[0].write_bytes(b"".join(lines[0::NUM_RANKS][::-1]))
    shards[1].write_bytes(b"".join(lines[1::NUM_RANKS][7:] + lines[1::NUM_RANKS][:7]))
    shards[2].write_bytes(b"".join(lines[2::NUM_RANKS]))
    shards[3].write_bytes(b"".join(lines[3::NUM_RANKS][::2] + lines[3::NUM_RANKS][1::2]))
    merge_shards(shards[::-1], out, num_rows=NUM_ROWS)
    assert_merged(out, lines)


def test_the_same_row_twice_is_dropped_and_counted(shards: list[Path], out: Path, lines: list[bytes]) -> None:
    rewrite(shards[0], lambda data: data + data[: len(lines[0])])
    rewrite(shards[2], lambda data: data + lines[1] + lines[2])
    assert merge_shards(shards, out, num_rows=NUM_ROWS).num_duplicates == 3
    assert_merged(out, lines)


def test_two_predictions_of_one_row_are_never_clean(shards: list[Path], out: Path, lines: list[bytes]) -> None:
    rewrite(
        shards[3],
        lambda data: data + lines[8].replace("요".encode(), "오".encode()) + lines[9][:-3] + b"1}\n",
    )
    with pytest.raises(DamagedError, match="rows with two different predictions: 8-9; .*row 8 differs from the one"):
        merge_shards(shards, out, num_rows=NUM_ROWS)
    assert not out.exists()
    assert partial_path(out).read_bytes() == b"".join(lines)
    assert json.loads(report_path(out).read_text())["conflicts"] == "8-9"


def test_the_shard_of_an_older_run_is_unexpected(
    shards: list[Path],
    out: Path,
    lines: list[bytes],
    tmp_path: Path,
    make_rows: MakeRows,
    json_line: JsonLine,
) -> None:
    stale = tmp_path / "rank=4.jsonl"
    stale.write_bytes(b"".join(map(json_line, make_rows(NUM_ROWS, NUM_ROWS + 10))))
    with pytest.raises(
        DamagedError, match=r"unexpected rows: 10; .*rank=4.jsonl: byte 0: row 60 is none of the 60 rows"
    ):
        merge_shards([*shards, stale], out, num_rows=NUM_ROWS)
    assert partial_path(out).read_bytes() == b"".join(lines)


def test_a_padding_row_with_a_negative_index_is_unexpected(shards: list[Path], out: Path, json_line: JsonLine) -> None:
    rewrite(shards[0], lambda data: data + json_line({"index": -1, "prediction": "pad"}))
    with pytest.raises(DamagedError, match="unexpected rows: 1"):
        merge_shards(shards, out)


def test_an_absurd_index_costs_no_memory(shards: list[Path], out: Path, json_line: JsonLine) -> None:
    rewrite(shards[0], lambda data: data + json_line({"index": 10**15}))
    with pytest.raises(IncompleteError, match=f"missing rows: 60-{10**15 - 1}"):
        merge_shards(shards, out)


def test_a_last_line_without_newline_and_blank_lines_are_complete(
    shards: list[Path], out: Path, lines: list[bytes]
) -> None:
    rewrite(shards[1], lambda data: data[:-1])
    rewrite(shards[3], lambda data: b"\n\n" + data.replace(lines[7], b"\n  \n" + lines[7])[:-1])
    report = merge_shards(shards, out, num_rows=NUM_ROWS)
    assert_merged(out, lines)
    assert report.num_incomplete + report.num_corrupt == 0


def test_an_object_within_an_incomplete_row_is_not_taken_for_a_row(tmp_path: Path, out: Path) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b'{"index": 0}\n{"index": 1, "source": {"index": 2}\n{"index": 3}\n')
    with pytest.raises(IncompleteError, match="missing rows: 1-2"):
        merge_shards([shard], out, num_rows=4)


def test_another_field_may_hold_the_index(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"row id": 1}\n{"row id": 0}\n')
    merge_shards([tmp_path / "a.jsonl"], out, index_field="row id")
    assert out.read_bytes() == b'{"row id": 0}\n{"row id": 1}\n'


def test_an_empty_shard_is_a_rank_without_rows(
    shards: list[Path], out: Path, lines: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "rank=4.jsonl").touch()
    merge_shards([*shards, tmp_path / "rank=4.jsonl"], out, num_rows=NUM_ROWS)
    assert_merged(out, lines)


@pytest.mark.parametrize("num_rows", [None, 0])
def test_only_empty_shards_are_no_rows(tmp_path: Path, out: Path, num_rows: int | None) -> None:
    (tmp_path / "a.jsonl").touch()
    assert merge_shards([tmp_path / "a.jsonl"], out, num_rows=num_rows).is_complete
    assert out.read_bytes() == b""


def test_rows_longer_than_a_gathered_block_are_complete(tmp_path: Path, out: Path, json_line: JsonLine) -> None:
    rows = [json_line({"index": i, "prediction": "가" * size}) for i, size in enumerate([3_000_000, 1, 3_000_000, 2])]
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows[::-1]))
    merge_shards([tmp_path / "a.jsonl"], out, num_rows=4)
    assert out.read_bytes() == b"".join(rows)


@pytest.mark.parametrize(
    ("names", "error", "word"),
    [
        ([], UsageError, "no shards"),
        (["rank=0.jsonl", "gone.jsonl"], NotFoundError, "no such shard: .*gone.jsonl"),
        (["rank=0.jsonl", "b.csv"], UsageError, "CSV shards merge into a CSV file"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    shards: list[Path], out: Path, tmp_path: Path, names: list[str], error: type[Exception], word: str
) -> None:
    (tmp_path / "b.csv").write_text("index\n0\n")
    with pytest.raises(error, match=word):
        merge_shards([tmp_path / name for name in names], out)


@pytest.fixture
def csv_lines(make_rows: MakeRows) -> CsvLines:
    def line(*cells: object) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerow(cells)
        return text.getvalue().encode()

    header = line("id", "index", "prediction")
    return header, [line(f"a-{row['index']}", row["index"], row["prediction"]) for row in make_rows(0, NUM_ROWS)]


@pytest.fixture
def csv_shards(tmp_path: Path, csv_lines: CsvLines) -> list[Path]:
    header, lines = csv_lines
    paths = [tmp_path / f"rank={rank}.csv" for rank in range(NUM_RANKS)]
    for rank, path in enumerate(paths):
        path.write_bytes(header + b"".join(lines[rank::NUM_RANKS]))
    return paths


def test_csv_records_keep_their_newlines_and_quotes(
    csv_shards: list[Path], csv_lines: CsvLines, tmp_path: Path
) -> None:
    header, lines = csv_lines
    merge_shards(csv_shards, tmp_path / "out.csv", num_rows=NUM_ROWS)
    assert (tmp_path / "out.csv").read_bytes() == header + b"".join(lines)


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda data, lines: data[:-4], "57"),
        (lambda data, lines: data.replace(lines[21], b"a-21,21,"), "21,25"),
        (lambda data, lines: data.replace(b",21,", b",21.0,"), "21"),
        (lambda data, lines: data.replace(lines[21], b"\0" * 40 + b"\n"), "21"),
    ],
    ids=["incomplete tail", "continued", "float index", "NUL hole"],
)
def test_a_damaged_csv_record_is_dropped(
    csv_shards: list[Path], csv_lines: CsvLines, tmp_path: Path, change: Any, missing: Any
) -> None:
    rewrite(csv_shards[1], lambda data: change(data, csv_lines[1]))
    with pytest.raises(IncompleteError, match=f"missing rows: {missing};"):
        merge_shards(csv_shards, tmp_path / "out.csv", num_rows=NUM_ROWS)


def test_a_csv_record_cut_within_quotes_is_not_merged(
    csv_shards: list[Path], csv_lines: CsvLines, tmp_path: Path
) -> None:
    header, lines = csv_lines
    record = lines[9]
    assert record.count(b'"') == 6
    rewrite(csv_shards[1], lambda data: data.replace(record, record[: record.index(b'"') + 3]))
    with pytest.raises(IncompleteError, match="missing rows: 9"):
        merge_shards(csv_shards, tmp_path / "out.csv", num_rows=NUM_ROWS)
    merged = (tmp_path / "out.csv.partial").read_bytes().decode()
    for cells in list(csv.reader(io.StringIO(merged, newline="")))[1:]:
        assert cells == next(csv.reader([lines[int(cells[1])].decode()]))


def test_a_csv_shard_with_other_columns_is_unexpected(csv_shards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("index,text\n0,x\n1,y\n")
    with pytest.raises(DamagedError, match="unexpected rows: 2; .*old.csv: its columns are not .*index,text.*id,index"):
        merge_shards([*csv_shards, tmp_path / "old.csv"], tmp_path / "out.csv", num_rows=NUM_ROWS)


def test_a_csv_without_the_index_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n0,x\n")
    with pytest.raises(UsageError, match="a.csv has no column 'index'; it has id, text"):
        merge_shards([tmp_path / "a.csv"], tmp_path / "out.csv")


def test_a_csv_with_two_index_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("index,index,text\n0,1,x\n")
    with pytest.raises(UsageError, match="more than one column called 'index'"):
        merge_shards([tmp_path / "a.csv"], tmp_path / "out.csv")


def test_a_byte_order_mark_and_long_cells_are_read(tmp_path: Path) -> None:
    text = "\ufeffindex,text\n0," + "가" * 200_000 + "\n"
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    merge_shards([tmp_path / "a.csv"], tmp_path / "out.csv", num_rows=1)
    assert (tmp_path / "out.csv").read_text(encoding="utf-8") == text


def test_nan_as_python_writes_it_is_data(tmp_path: Path, out: Path) -> None:
    rows = [{"index": 1, "score": float("nan")}, {"index": 0, "score": float("-inf")}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = merge_shards([tmp_path / "a.jsonl"], out, num_rows=2)
    assert report.num_corrupt == 0
    assert out.read_text() == '{"index": 0, "score": -Infinity}\n{"index": 1, "score": NaN}\n'


def test_the_word_nan_saves_no_broken_row(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"index": 0}\n{"index": NaN}\n{"index": 1, "score": NaN\n')
    with pytest.raises(IncompleteError):
        merge_shards([tmp_path / "a.jsonl"], out, num_rows=2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_shards_without_an_index_are_refused_with_the_ways_out(tmp_path: Path, suffix: str) -> None:
    shard = tmp_path / f"a{suffix}"
    shard.write_text('{"text": "x"}\n' if suffix == ".jsonl" else "text\nx\n")
    with pytest.raises(UsageError, match="'index'; it has text; name the field .* --index FIELD, .*--in-file-order"):
        merge_shards([shard], tmp_path / f"out{suffix}")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_shards_merge_in_file_order_where_that_is_said(tmp_path: Path, suffix: str) -> None:
    head, rows = ("", ['{"t": 1}', '{"t": NaN}', '{"t": 3}']) if suffix == ".jsonl" else ("t\n", ["1", "nan", "3"])
    first, second, out = (tmp_path / f"{name}{suffix}" for name in ("b", "a", "out"))
    first.write_text(head + f"{rows[0]}\n{rows[1]}\n")
    second.write_text(head + f"{rows[2]}\n")
    merge_shards([first, second], out, num_rows=3, index_field=None)
    assert out.read_text() == head + "\n".join(rows) + "\n"
    with pytest.raises(IncompleteError):
        merge_shards([first, second], out, num_rows=4, index_field=None)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("again", ["c", "b"])
def test_rows_that_say_the_same_position_are_not_joined_in_file_order(tmp_path: Path, suffix: str, again: str) -> None:
    """Padding, or a rank that ran twice: the rows' own index would tell, so it is not set aside."""
    out, paths = tmp_path / f"out{suffix}", [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path, rows in zip(paths, ([(0, "a"), (1, "b")], [(1, again), (2, "d")]), strict=True):
        lines = [f"{index},{text}\n" for index, text in rows]
        if suffix == ".jsonl":
            lines = [json.dumps({"index": index, "prediction": text}) + "\n" for index, text in rows]
        path.write_text(("index,prediction\n" if suffix == ".csv" else "") + "".join(lines))
    with pytest.raises(UsageError, match=r"a\..*: byte .* and .*b\..* the same 'index'.*without --in-file-order"):
        merge_shards(paths, out, index_field=None)
    assert not out.exists()


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, out: Path) -> None:
    rows = b'{"index": 0, "prediction": "a"}\n{"index": 1, "prediction": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows)
    for field in ("index", None):
        merge_shards([tmp_path / "a.jsonl"], out, num_rows=2, index_field=field)
        assert out.read_bytes() == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_shard_in_another_encoding_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, suffix: str, encoding: str
) -> None:
    text = '{"index": 0, "prediction": "가"}\n' if suffix == ".jsonl" else "index,prediction\n0,가\n"
    path = tmp_path / f"a b{suffix}"
    path.write_text(text, encoding=encoding)
    with pytest.raises(UsageError, match="a b.* is in (UTF-.*) and not UTF-8; write it again: iconv -f") as caught:
        merge_shards([path], tmp_path / f"out{suffix}")
    subprocess.run(str(caught.value).split("again: ")[1], shell=True, check=True)
    merge_shards([tmp_path / f"a b-utf8{suffix}"], tmp_path / f"out{suffix}")
    assert (tmp_path / f"out{suffix}").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"index": 0}\n'), "is packed; unpack it first: gunzip"),
        (b"\x28\xb5\x2f\xfd", "is packed; unpack it first: zstd -d"),
        (b"PK\x03\x04", "is an archive, as torch.save or numpy.savez"),
        (b"\x93NUMPY", "is an array of numpy; call it .npy"),
        (b"PAR1", "is Parquet; call it .parquet"),
        (pickle.dumps([{"index": 0}]), "is a pickle"),
        (b'[{"index": 0}]', "is one JSON list"),
        (b' \n[\n {"index": 0}]', "is one JSON list"),
    ],
    ids=["gzip", "zstd", "zip", "numpy", "parquet", "pickle", "a JSON list", "a JSON list with space"],
)
def test_what_is_no_text_is_named(tmp_path: Path, out: Path, content: bytes, words: str) -> None:
    (tmp_path / "rank0.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=rf"rank0.jsonl {words}"):
        merge_shards([tmp_path / "rank0.jsonl"], out)


@pytest.mark.parametrize(
    ("shard", "name", "words"),
    [
        ("a.tsv", "o.jsonl", "a.tsv .*write it with commas, as .csv"),
        ("a.jsonl", "o.parquet", "o.parquet .*lines of JSON.*--export"),
        ("a.jsonl", "o.jsonl.gz", "o.jsonl.gz .*lines of JSON"),
        ("a.jsonl", "pipe", "pipe is no regular file"),
        ("pipe", "o.jsonl", "pipe: .*read twice"),
    ],
)
def test_names_that_promise_another_format_are_refused(tmp_path: Path, shard: str, name: str, words: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    for one in ("a.jsonl", "a.tsv"):
        (tmp_path / one).write_text('{"index": 0}\n')
    with pytest.raises(UsageError, match=words):
        merge_predictions([tmp_path / shard], tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()


def test_a_shard_that_changes_while_it_is_merged_is_named(
    shards: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank_and_rewrite(index: Any, num_rows: int | None) -> Any:
        rewrite(shards[1], lambda data: data.swapcase())
        return rank(index, num_rows)

    rank = shard_merge._rank
    monkeypatch.setattr(shard_merge, "_rank", rank_and_rewrite)
    with pytest.raises(DamagedError, match="rank=1.jsonl was changed while it was merged; merge again"):
        merge_shards(shards, out, num_rows=NUM_ROWS)
    assert sorted(out.parent.iterdir()) == sorted(shards)


def test_nothing_is_written_among_the_units_of_a_run(tmp_path: Path, make_rows: MakeRows) -> None:
    layout = open_layout(tmp_path / "units", "key", 2, 2)
    rows = [PredictionRow.from_json(row, position=row["index"]) for row in make_rows(0, 2)]
    write_unit(tmp_path / "units", layout, 0, rows, "key", 0, 0)
    before = sorted((tmp_path / "units").iterdir())
    for name in ("unit-000000.jsonl", "o.jsonl"):
        with pytest.raises(UsageError, match="holds the units of a run, and nothing else"):
            merge_predictions([tmp_path / "units"], tmp_path / "units" / name)
    assert sorted((tmp_path / "units").iterdir()) == before


def test_more_rows_than_numbers_of_json_are_refused(shards: list[Path], out: Path) -> None:
    with pytest.raises(UsageError, match="rows are more than"):
        merge_shards(shards, out, num_rows=10**20)


def test_a_broken_header_loses_its_shard_alone(csv_shards: list[Path], tmp_path: Path) -> None:
    rewrite(csv_shards[1], lambda data: b"\xff" + data)
    with pytest.raises(IncompleteError, match="missing rows: 1,5,9,.*corrupt rows: 1; .*rank=1.csv: byte 0: corrupt"):
        merge_shards(csv_shards, tmp_path / "out.csv", num_rows=NUM_ROWS)


def test_a_broken_line_makes_the_order_of_the_file_unknown(tmp_path: Path, out: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": 1}\n{"t": \n{"t": 3}\n')
    with pytest.raises(UsageError, match="positions after a broken line are unknown"):
        merge_shards([tmp_path / "a.jsonl"], out, index_field=None)


def test_the_order_of_letters_is_not_taken_for_that_of_the_numbers(tmp_path: Path) -> None:
    names = [f"rank{number}.jsonl" for number in (1, 2, 10)]
    for name in names:
        (tmp_path / name).write_text(f'{{"prediction": "{name}"}}\n')
    out, paths = tmp_path / "out.jsonl", [str(tmp_path / name) for name in names]
    arguments = ["predictions", "merge", "--in-file-order", "--out", str(out)]
    assert main([*arguments, *sorted(paths)]) == 2, "as a shell's pattern names them"
    for given in (paths, [str(tmp_path)]):
        assert main([*arguments, *given]) == 0
        assert [json.loads(line)["prediction"] for line in out.read_text().splitlines()] == names
        out.unlink()


def test_brackets_beyond_what_a_parser_takes_are_a_broken_row(tmp_path: Path, out: Path) -> None:
    deep = b'{"index": 0, "prediction": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    (tmp_path / "rank0.jsonl").write_bytes(deep + b'{"index": 1, "prediction": "b"}\n')
    with pytest.raises(IncompleteError, match="missing rows: 0; corrupt rows: 1"):
        merge_shards([tmp_path / "rank0.jsonl"], out)
    (tmp_path / "rank0.jsonl").write_bytes(deep)
    with pytest.raises(IncompleteError, match="corrupt rows: 1"):
        merge_shards([tmp_path / "rank0.jsonl"], out)


def test_a_shard_is_never_written_over(shards: list[Path]) -> None:
    before = shards[0].read_bytes()
    with pytest.raises(UsageError, match="rank=0.jsonl is read and would be written over"):
        merge_shards(shards, shards[0])
    assert shards[0].read_bytes() == before


def test_a_shard_that_is_named_twice_gets_no_second_place(shards: list[Path], out: Path) -> None:
    with pytest.raises(UsageError, match="rank=0.jsonl is named twice"):
        merge_shards([shards[0], shards[0].parent / "." / shards[0].name], out, index_field=None)


def test_a_folder_with_two_formats_loses_none_of_them(tmp_path: Path) -> None:
    for name in ("rank0.jsonl", "rank1.parquet"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=r"holds \.jsonl and \.parquet files; name the shards"):
        find_shards([tmp_path])


@pytest.mark.parametrize("name", ["rank1.jsonl.gz", "rank1.jsonl.tmp", "RANK1.JSONL"])
def test_a_folder_with_what_may_be_a_shard_is_not_merged_without_it(name: str, tmp_path: Path) -> None:
    for other in ("rank0.jsonl", "notes.txt", name):
        (tmp_path / other).touch()
    with pytest.raises(UsageError, match=rf"holds '{name}', which may be a shard"):
        find_shards([tmp_path])
    (tmp_path / name).unlink()
    for left in ("all.jsonl.partial", "all.report.json", ".rank0.jsonl.swp"):
        (tmp_path / left).touch()
    assert [path.name for path in find_shards([tmp_path])] == ["rank0.jsonl"]


def test_units_of_two_predictions_are_not_shards_of_one(tmp_path: Path, out: Path, make_rows: MakeRows) -> None:
    """Each has half of the rows: only their headers tell that they are answers of two models."""
    folders = [tmp_path / key for key in ("older", "newer")]
    for number, folder in enumerate(folders):
        layout = open_layout(folder, folder.name, 4, 2)
        rows = [PredictionRow.from_json(row, position=0) for row in make_rows(2 * number, 2 * number + 2)]
        write_unit(folder, layout, number, rows, folder.name, 1, 0)
    for named in (folders, [next(folder.glob("unit-*")) for folder in folders]):
        with pytest.raises(UsageError, match="unit-000000.jsonl is a unit of a run, .* name their folder alone"):
            merge_predictions(named, out, num_rows=4)
    assert not out.exists()


def test_a_column_without_a_name_may_hold_the_index(tmp_path: Path) -> None:
    """pandas writes its index so."""
    for rank, rows in ((0, "2,c\n0,a\n"), (1, "1,b\n")):
        (tmp_path / f"{rank}.csv").write_text(f",prediction\n{rows}")
    merge_shards([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path / "out.csv", num_rows=3, index_field="")
    assert (tmp_path / "out.csv").read_text() == ",prediction\n0,a\n1,b\n2,c\n"


@pytest.mark.parametrize("cell", ["1_0", "\u0661", "1.0", ""])
def test_a_cell_that_only_python_reads_as_a_number_is_no_index(cell: str, tmp_path: Path) -> None:
    (tmp_path / "0.csv").write_text(f"index,prediction\n0,a\n{cell},b\n")
    with pytest.raises(IncompleteError, match="corrupt rows: 1"):
        merge_shards([tmp_path / "0.csv"], tmp_path / "out.csv")
