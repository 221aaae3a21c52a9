"""Reading data files: every format, and every broken line named with its number."""

from __future__ import annotations

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
    "a list": ("a.json", b"[\n", "line 1 is not JSON"),
    "no object": ("a.jsonl", b'{"a": 1}\n["x"]\n', "line 2 is no object of columns but '[\"x\"]'"),
    "JSON that is not UTF-8": ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not JSON"),
    "NaN": ("a.jsonl", b'{"a": NaN}\n', "line 1 is not JSON"),
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
