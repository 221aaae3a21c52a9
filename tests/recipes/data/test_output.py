"""A contest's file: its columns, the order of its rows, and what does not fit is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import UsageError
from sousbatch.predictions.export import Format
from sousbatch.recipes.data.output import Table, check_template, table_of, write_output
from sousbatch.recipes.data.rows import read_rows

NAMES = ("test_2", "test_0", "테스트,3")
ODD = ("줄\n바꿈", 'U+2028\u2028 "따옴표"', "")


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    rows = [{"index": at, "prediction": text, "score": at / 2} for at, text in enumerate(ODD)]
    (tmp_path / "merged.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return tmp_path / "merged.jsonl"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    rows = [{"fname": name, "dialogue": f"말 {name}", "summary": "정답"} for name in NAMES]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return tmp_path / "test.jsonl"


def template(folder: Path, text: str, name: str = "sample.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return folder / name


def table(place: Path | None = None, **changes: Any) -> Table:
    given: dict[str, Any] = {
        "fields": ("index", "prediction", "score"),
        "inputs": ("fname", "dialogue", "summary"),
        "columns": {},
        "place": place,
        "template": place and place.name,
        "target": "summary",
    }
    return table_of(**given | changes)


def read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def write(found: Table, merged: Path, inputs: Path, out: Path, **options: Any) -> Path:
    write_output(found, merged, out, lambda: read_rows(inputs), **options)
    return out


def test_rows_are_placed_by_id_in_the_template_s_order_and_columns(merged: Path, inputs: Path, tmp_path: Path) -> None:
    place = template(tmp_path, 'summary,fname\r\n0,"테스트,3"\r\n0,test_2\r\n0,test_0\r\n')
    out = write(table(place), merged, inputs, tmp_path / "out.csv")
    assert read(out) == [["summary", "fname"], ["", "테스트,3"], [ODD[0], "test_2"], [ODD[1], "test_0"]]
    assert out.read_bytes().startswith(b"summary,fname\r\n"), "RFC 4180"
    check_template(table(place), inputs, 3, None, is_part=False)


def test_rows_in_the_template_s_order_need_no_placing(merged: Path, inputs: Path, tmp_path: Path) -> None:
    place = template(tmp_path, "fname,summary\n" + "".join(f'"{name}",?\n' for name in NAMES))
    out = write(table(place), merged, inputs, tmp_path / "out.csv")
    assert read(out)[1:] == [list(pair) for pair in zip(NAMES, ODD, strict=True)]


def test_columns_say_where_each_comes_from(merged: Path, inputs: Path, tmp_path: Path) -> None:
    columns = {"ID": "index", "text": "dialogue", "answer": "prediction"}
    out = write(table(columns=columns), merged, inputs, tmp_path / "out.csv")
    assert read(out)[:2] == [["ID", "text", "answer"], ["0", "말 test_2", ODD[0]]]
    place = template(tmp_path, "ID,answer\n2,\n1,\n0,\n")
    out = write(table(place, columns={"ID": "index", "answer": "prediction"}), merged, inputs, tmp_path / "out.csv")
    assert [row[1] for row in read(out)[1:]] == list(ODD[::-1])


@pytest.mark.parametrize("format", ["csv", "csv_bom", "tsv", "jsonl", "json", "parquet"])
def test_every_format_keeps_odd_texts(format: Format, merged: Path, inputs: Path, tmp_path: Path) -> None:
    columns = {"fname": "fname", "summary": "prediction"}
    out = tmp_path / f"out.{format.removesuffix('_bom')}"
    write(table(columns=columns, format=format), merged, inputs, out)
    assert out.read_bytes().startswith(b"\xef\xbb\xbf") == (format == "csv_bom")
    rows = json.loads(out.read_text()).items() if format == "json" else (row.values() for row in read_rows(out))
    assert [tuple(row) for row in rows] == list(zip(NAMES, ODD, strict=True))


@pytest.mark.parametrize(("start", "name", "format"), [("\ufeff", "s.csv", "csv_bom"), ("", "s.tsv", "tsv")])
def test_the_format_is_the_template_s(start: str, name: str, format: str, tmp_path: Path) -> None:
    comma = "\t" if format == "tsv" else ","
    assert table(template(tmp_path, f"{start}fname{comma}summary\na{comma}b\n", name)).format == format


IDS = "fname,summary\n{}"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["test_2", "test_0"], "template sample.csv does not have the id '테스트,3'; ids are compared as text"),
        ([*NAMES, "test_9"], "no row to predict has the id 'test_9'"),
        (["test_2", "test_0", "test_2"], "row 3 of template sample.csv has the id 'test_2' of an earlier row"),
        (["test_2", "0", "1", "2", "3"], "template sample.csv does not have the id 'test_0', '테스트,3'"),
    ],
)
def test_a_template_with_other_ids_is_refused(
    ids: list[str], message: str, merged: Path, inputs: Path, tmp_path: Path
) -> None:
    place = template(tmp_path, "fname,summary\n" + "".join(f'"{name}",\n' for name in ids))
    with pytest.raises(UsageError, match=message):
        check_template(table(place), inputs, 3, None, is_part=False)
    with pytest.raises(UsageError, match=message):
        write(table(place), merged, inputs, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_ids_of_the_rows_must_differ(merged: Path, inputs: Path, tmp_path: Path) -> None:
    inputs.write_text('{"fname": "a"}\n{"fname": "a"}\n{"fname": null}\n')
    place = template(tmp_path, "fname,summary\na,\n")
    with pytest.raises(UsageError, match="row 2 of the rows to predict has the id 'a' of an earlier row"):
        check_template(table(place), inputs, 2, None, is_part=False)
    with pytest.raises(UsageError, match="row 1 of the rows to predict has no id"):
        inputs.write_text('{"fname": null}\n')
        check_template(table(place), inputs, 1, None, is_part=False)


def test_rows_of_one_id_are_refused_for_a_json_object_before_they_are_predicted(inputs: Path) -> None:
    json_table = table_of(fields=("index", "id", "prediction"), inputs=("fname",), columns={}, format="json")
    inputs.write_text('{"fname": "a"}\n{"fname": "b"}\n{"fname": "a"}\n')
    check_template(json_table, inputs, 2, "fname", is_part=False)
    with pytest.raises(UsageError, match="row 3 has the fname 'a' of an earlier row, .* set predict.output.format=csv"):
        check_template(json_table, inputs, 3, "fname", is_part=False)
    with pytest.raises(UsageError, match="rows have no id; set data.columns.id=COLUMN"):
        check_template(json_table, inputs, 3, None, is_part=False)


def test_a_part_of_the_rows_fills_a_part_of_the_template(merged: Path, inputs: Path, tmp_path: Path) -> None:
    for path in (merged, inputs):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    place = template(tmp_path, "fname,summary\ntest_0,\nother,\ntest_2,\n")
    out = write(table(place), merged, inputs, tmp_path / "out.csv", is_part=True)
    assert [row[0] for row in read(out)[1:]] == ["test_0", "test_2"]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("fname,label\na,b\n", {}, "column 'label' of template sample.csv is given by nothing called 'label': predict"),
        ("fname,label\na,b\n", {"columns": {"label": "scores"}}, r"called 'scores'.*\(did you mean 'score'\?\)"),
        ("fname,summary\na,b\n", {"columns": {"x": "score"}}, "names 'x', which template sample.csv does not have"),
        ("prediction,score\na,b\n", {}, "none of which says which row is which; map one to index"),
        ("fname,summary\n", {}, "template sample.csv has no row"),
        ("fname,summary,score\na,b,c\n", {"format": "json"}, "holds {id: prediction}, and .* has fname, summary, sc"),
    ],
)
def test_a_template_that_nothing_fills_is_refused(
    text: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        table(template(tmp_path, text), **changes)


def test_ids_that_are_numbers_are_those_of_the_template_s_text(tmp_path: Path, merged: Path, inputs: Path) -> None:
    inputs.write_text("".join(f'{{"fname": {number}}}\n' for number in (7, 8, 9)))
    place = template(tmp_path, "fname,summary\n9,\n8,\n7,\n")
    assert [row[1] for row in read(write(table(place), merged, inputs, tmp_path / "o.csv"))[1:]] == list(ODD[::-1])


@pytest.mark.parametrize("identity", [None, "index", "id"])
@pytest.mark.parametrize("name", ["index", "id"])
def test_a_column_index_or_id_of_the_rows_is_no_position_and_no_other_id(
    name: str, identity: str | None, tmp_path: Path, merged: Path
) -> None:
    """A table that was shuffled before it was saved has each position in its column `index`, at another place."""
    data = [{"index": 2, "id": 1}, {"index": 0, "id": 2}, {"index": 1, "id": 0}]
    inputs = tmp_path / "shuffled.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in data))
    rows = [json.loads(line) for line in merged.read_text().split("\n")[:-1]]
    if identity is not None:
        rows = [{"index": row["index"], "id": given[identity], **row} for row, given in zip(rows, data, strict=True)]
        merged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = table(
        template(tmp_path, f"{name},summary\n0,\n1,\n2,\n"),
        fields=tuple(rows[0]),
        inputs=("index", "id"),
        identity=identity,
    )
    check_template(found, inputs, 3, identity, is_part=False)
    wanted = [ODD[[row[name] for row in data].index(place)] for place in range(3)]
    assert [row[1] for row in read(write(found, merged, inputs, tmp_path / "out.csv"))[1:]] == wanted


def test_rows_that_were_not_predicted_are_refused(merged: Path, inputs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in merged.read_text().split("\n")[:-1]]
    merged.write_text("".join(json.dumps({"id": NAMES[at], **row}) + "\n" for at, row in enumerate(rows)))
    found, out = table(columns={"ID": "fname", "summary": "prediction"}), tmp_path / "out.csv"
    write(found, merged, inputs, out).unlink()
    lines = inputs.read_text().splitlines(keepends=True)
    for changed, words in (
        ([lines[0], lines[2], lines[1]], "prediction 2 answers the id 'test_0', which is nowhere in input row 2"),
        ([*lines, lines[0]], "more input rows than predictions, of which there are 3"),
        (lines[:2], "more predictions than input rows, of which there are 2"),
    ):
        inputs.write_text("".join(changed))
        with pytest.raises(UsageError, match=words):
            write(found, merged, inputs, out)
        assert not out.exists()
