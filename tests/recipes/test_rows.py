"""Reading data files: every format, and every broken line named with its number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sousbatch.errors import UsageError
from sousbatch.recipes.rows import read_rows

GOOD = {
    "a.jsonl": b'{"a": "\xea\xb0\x80\\n"}\n\n{"a": "x\xe2\x80\xa8y"}',
    "a.json": b'{"a": "\xea\xb0\x80\\n"}\n{"a": "x\xe2\x80\xa8y"}\n',
    "a.csv": b'\xef\xbb\xbfa\n"\xea\xb0\x80\n"\nx\xe2\x80\xa8y\n',
}


@pytest.mark.parametrize(("name", "content"), GOOD.items(), ids=GOOD)
def test_rows_come_in_order_and_only_newlines_end_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row["a"] for row in read_rows(tmp_path / name)] == ["가\n", "x\u2028y"]


def test_a_list_of_objects_is_rows_and_nan_is_data(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n [{"a": 1}, {"a": NaN}]')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": -Infinity}\n')
    assert [str(row["a"]) for row in read_rows(tmp_path / "a.json")] == ["1", "nan"]
    assert [str(row["a"]) for row in read_rows(tmp_path / "b.jsonl")] == ["1", "-inf"]


def test_the_advice_for_a_file_of_semicolons_or_tabs_works_in_a_shell(tmp_path: Path) -> None:
    for name, content in (("my file.csv", "a;b\n1;x,y\n"), ("other.tsv", "a\tb\n1\tx,y\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError) as caught:
            list(read_rows(tmp_path / name))
        command = "python -c" + str(caught.value).split("python -c", 1)[1]
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
        made = command.rsplit("> '", 1)[1].rstrip("'")
        assert list(read_rows(Path(made))) == [{"a": "1", "b": "x,y"}]


def test_a_text_file_has_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("하나\r\n둘\x0b\n".encode())
    assert [row["text"] for row in read_rows(tmp_path / "a.txt")] == ["하나", "둘\x0b"]


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"a": ["가", "나"]}), tmp_path / "a.parquet")
    assert [row["a"] for row in read_rows(tmp_path / "a.parquet")] == ["가", "나"]


BAD = {
    "broken JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    "a broken list": ("a.json", b"[\n", "starts as a JSON list and is none"),
    "a list of no objects": ("a.json", b"[1]", "item 1 is no object of columns but '1'"),
    "Latin-1": ("a.csv", b"a\ncaf\xe9\n", "iconv -f WINDOWS-1252 -t UTF-8"),
    "UTF-16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "semicolons": ("a.csv", b"a;b\n1;2\n", "columns apart by ';'"),
    "tabs": ("a.tsv", b"a\tb\n", "csv.reader(sys.stdin, delimiter="),
    "packed": ("a.jsonl.gz", b"", "gunzip -k"),
    "no object": ("a.jsonl", b'{"a": 1}\n["x"]\n', "line 2 is no object of columns but '[\"x\"]'"),
    "JSON that is not UTF-8": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not UTF-8"),
    "too few cells": ("a.csv", b"a,b\n1,2\n3\n", "line 3 has another number of columns than the header (2)"),
    "too many cells": ("a.csv", b"a,b\n1,2,3\n", "line 2 has another number of columns"),
    "unclosed quote": ("a.csv", b'a,b\n1,"2\n', "line 2 is not CSV"),
    "CSV that is not UTF-8": ("a.csv", b"a\n1\n\xff\n", "line 3 is not UTF-8"),
    "text that is not UTF-8": ("a.txt", b"a\n\xff\n", "line 2 is not UTF-8"),
    "no Parquet": ("a.parquet", b"PAR0", "is not a Parquet file"),
    "unknown format": ("a.xlsx", b"", "has an unknown format; known: .jsonl"),
}


@pytest.mark.parametrize(("name", "content", "reason"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(read_rows(tmp_path / name))
    assert name in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("encoding", "text"), [("CP949", "안녕하세요"), ("WINDOWS-1252", "café à la crème")])
def test_the_command_that_is_advised_for_another_encoding_reads_the_text(
    tmp_path: Path, encoding: str, text: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"input,target\n{text},x\n".encode(encoding))
    with pytest.raises(UsageError, match=f"iconv -f {encoding} "):
        list(read_rows(path))
