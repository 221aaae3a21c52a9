"""Reading data files: every format, and every broken line named with its number."""

from __future__ import annotations

import gzip
import re
import shlex
import subprocess
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
import zstandard

from sousbatch.errors import UsageError
from sousbatch.recipes.data.rows import read_rows

GOOD = {
    "a.jsonl": b'{"a": "\xea\xb0\x80\\n"}\n\n{"a": "x\xe2\x80\xa8y"}',
    "a.json": b'{"a": "\xea\xb0\x80\\n"}\n{"a": "x\xe2\x80\xa8y"}\n',
    "a.csv": b'\xef\xbb\xbfa\n"\xea\xb0\x80\n"\nx\xe2\x80\xa8y\n',
    "a.tsv": b'a\tb\r\n"\xea\xb0\x80\n"\t1\r\n\r\nx\xe2\x80\xa8y\t2',
    "b.jsonl": b'\xef\xbb\xbf{"a": "\xea\xb0\x80\\n"}\n{"a": "x\xe2\x80\xa8y"}\n',
    "b.json": b'{"version": 1, "data": [\n{"a": "\xea\xb0\x80\\n"}, {"a": "x\xe2\x80\xa8y"}]}\n',
}
GOOD |= {"a.csv.gz": gzip.compress(GOOD["a.csv"]), "b.json.zst": zstandard.compress(GOOD["b.json"])}
GOOD |= {"c.jsonl.zst": zstandard.compress(GOOD["a.jsonl"][:5]) + zstandard.compress(GOOD["a.jsonl"][5:])}


@pytest.mark.parametrize(("name", "content"), GOOD.items(), ids=GOOD)
def test_rows_come_in_order_and_only_newlines_end_them(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row["a"] for row in read_rows(tmp_path / name)] == ["가\n", "x\u2028y"]


def test_a_list_of_objects_is_rows_and_nan_is_data(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n [{"a": 1}, {"a": NaN}]')
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n{"a": -Infinity}\n')
    assert [str(row["a"]) for row in read_rows(tmp_path / "a.json")] == ["1", "nan"]
    assert [str(row["a"]) for row in read_rows(tmp_path / "b.jsonl")] == ["1", "-inf"]


@pytest.mark.parametrize("content", ['{{"a": {}}}\n{{"a": {}}}\n', '[{{"a": {}}}, {{"a": {}}}]'])
def test_whole_numbers_of_any_size_are_themselves(tmp_path: Path, content: str) -> None:
    """Ids such as the bits of a UUID: as floats two of them could be the same."""
    (tmp_path / "a.json").write_text(content.format(2**80, 2**80 + 1))
    assert [row["a"] for row in read_rows(tmp_path / "a.json")] == [2**80, 2**80 + 1]


def test_a_text_file_has_a_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("하나\r\n둘\x0b\n".encode())
    assert [row["text"] for row in read_rows(tmp_path / "a.txt")] == ["하나", "둘\x0b"]


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"a": ["가", "나"]}), tmp_path / "a.parquet")
    assert [row["a"] for row in read_rows(tmp_path / "a.parquet")] == ["가", "나"]


def test_dates_and_the_like_of_parquet_are_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    values = {"day": date(2026, 1, 2), "price": Decimal("1.50"), "is_new": True, "inner": [{"at": date(2026, 1, 2)}]}
    parquet.write_table(pyarrow.table({name: [value] for name, value in values.items()}), tmp_path / "a.parquet")
    (row,) = read_rows(tmp_path / "a.parquet")
    assert row == {"day": "2026-01-02", "price": "1.50", "is_new": True, "inner": [{"at": "2026-01-02"}]}


BAD = {
    "broken JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
    "a broken list": ("a.json", b"[\n", "starts as a JSON list and is none"),
    "a list of no objects": ("a.json", b"[1]", "item 1 is not an object of columns but '1'"),
    "Latin-1": ("a.csv", b"a\ncaf\xe9\n", "iconv -f WINDOWS-1252 -t UTF-8"),
    "UTF-16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "semicolons": ("a.csv", b"a;b\n1;2\n", "columns apart by ';'"),
    "tabs": ("a.csv", b"a\tb\n1\t2\n", "columns apart by '\\t': 'a\\tb'; call it .tsv"),
    "no pack": ("a.jsonl.gz", b"{}", "cannot be unpacked"),
    "a pack that was cut": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], "it is damaged, or was cut off"),
    "zstd that was cut": ("a.csv.zst", zstandard.compress(b"a\n1\n")[:-2], "it is damaged, or was cut off"),
    "packed otherwise": ("a.csv.xz", b"", "; unpack it first"),
    "a line that was cut": ("a.jsonl", b'{"a": 1}\n{"a": "b', "line 2 (the last line, which no newline ends"),
    "a quote that never ends": ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n7,8\n', "line 3 is not CSV: it opens a quote that"),
    "a quote in a cell": ("a.csv", b'a,b\n1,"2" x\n', "line 2 is not CSV: ',' expected after"),
    "a name twice": ("a.csv", b"a,b,a\n1,2,3\n", "more than one column called 'a'"),
    "NUL in JSON": ("a.jsonl", b'{"a": 1}\n{"a": "\0"}\n', "line 2 holds a NUL byte"),
    "NUL in CSV": ("a.csv", b"a,b\n1,\0\n", "line 2 holds a NUL byte"),
    "UTF-16 in CSV": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "a line of another encoding": (
        *("a.csv", "a\n가\n".encode() + "나\n다\n".encode("cp949")),
        "line 3 is not UTF-8 but, as it seems, CP949 (from byte 1 on: b3 aa 0a), while other lines are UTF-8",
    ),
    "no object": ("a.jsonl", b'{"a": 1}\n["x"]\n', "line 2 is not an object of columns but '[\"x\"]'"),
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


_WRITTEN_OTHERWISE = {
    "CP949": ("a.csv", "input,target\n안녕,x\n".encode("cp949")),
    "WINDOWS-1252": ("a.csv", "input,target\n안녕,x\n".replace("안녕", "café").encode("cp1252")),
    "semicolons": ("a.csv", "input;target\n안녕;x,y\n".encode()),
    "CP949 in a pack": ("a.csv.gz", gzip.compress("input,target\n안녕,x\n".encode("cp949"))),
    "a line of CP949": ("a.jsonl", '{"input": "안녕", "target": "x"}\n'.encode("cp949") + '{"a": "é"}\n'.encode()),
}


@pytest.mark.parametrize(("name", "content"), _WRITTEN_OTHERWISE.values(), ids=_WRITTEN_OTHERWISE)
def test_the_command_that_is_advised_makes_a_file_that_is_read(tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(read_rows(folder / name))
    command = re.search(r"(?:gunzip|iconv|python) .*", str(caught.value))
    assert command is not None
    python = f"{shlex.quote(sys.executable)} -c"
    subprocess.run(["bash", "-c", command[0].replace("python -c", python)], check=True)
    (made,) = set(folder.iterdir()) - {folder / name}
    expected = ("café" if "1252" in command[0] else "안녕", "x,y" if "commas" in command[0] else "x")
    assert [(row["input"], row["target"]) for row in read_rows(made) if "input" in row] == [expected]


def test_a_damaged_page_of_parquet_is_named_with_its_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": ["가나다" * 100] * 50}), path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path} is not a Parquet file, or a damaged one"):
        list(read_rows(path))
