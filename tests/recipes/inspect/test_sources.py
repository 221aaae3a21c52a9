"""Which files a split is, and the one local file that is made of what is packed, several or elsewhere."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from sousbatch import files
from sousbatch.errors import UsageError
from sousbatch.recipes.inspect import sources
from sousbatch.recipes.inspect.sources import find_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def _write(name: str, *rows: dict[str, object]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if Path(name).suffix == ".csv":
        content = "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]).encode()
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def _rows(*texts: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in find_source("train", texts).path.read_text().splitlines()]


def test_one_plain_file_is_read_where_it_lies(cache: Path) -> None:
    _write("a[1].jsonl", {"a": 1})
    assert find_source("train", ["a[1].jsonl"]).path == Path("a[1].jsonl").resolve() and not cache.exists()


def test_packed_and_several_files_are_joined_in_their_order_with_all_columns() -> None:
    _write("b.jsonl.gz", {"z": "가", "a": None})
    _write("a2.csv", {"a": 3, "b": 4}, {"a": 5, "b": 6})
    _write("a1.csv", {"a": 1, "b": 2})
    assert _rows("b.jsonl.gz", "a?.csv") == [
        *({"z": "가", "a": None}, {"a": "1", "b": "2"}, {"a": "3", "b": "4"}, {"a": "5", "b": "6"})
    ]
    joined = find_source("train", ["b.jsonl.gz", "a?.csv"])
    assert [(part.name, part.num_rows) for part in joined.parts] == [("b.jsonl.gz", 1), ("a1.csv", 1), ("a2.csv", 2)]


def test_the_same_bytes_are_joined_once_and_changed_ones_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = sources._write_rows
    monkeypatch.setattr(sources, "_write_rows", lambda *given: (made.append(given), real(*given))[1])
    _write("a.jsonl", {"a": 1})
    _write("b.jsonl", {"a": 2})
    paths = [find_source("train", ["*.jsonl"]).path for _ in range(2)]
    assert paths[0] == paths[1] and len(made) == 2
    _write("b.jsonl", {"a": 3})
    assert _rows("*.jsonl") == [{"a": 1}, {"a": 3}] and len(made) == 4


def test_several_plans_at_once_make_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, writing = [], threading.Event()
    real = sources._write_rows

    def slowly(*given: object) -> int:
        counted.append(given)
        writing.wait(10)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "_write_rows", slowly)
    _write("a.jsonl.gz", {"a": 1})
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_source("train", ["a.jsonl.gz"]).path)) for _ in "abc"]
    for thread in threads:
        thread.start()
    writing.set()
    for thread in threads:
        thread.join()
    assert len(counted) == 1 and len(set(found)) == 1 and len(found) == 3


def test_a_pattern_of_urls_is_fetched_file_by_file() -> None:
    store = fsspec.filesystem("memory")
    for name in ("two", "one"):
        store.pipe(f"/forms/{name}.csv", f"a\n{name}\n".encode())
    assert _rows("memory://forms/*.csv") == [{"a": "one"}, {"a": "two"}]
    one = find_source("train", ["memory://forms/one.csv"])
    store.rm("/forms", recursive=True)
    assert find_source("train", ["memory://forms/one.csv"]) == one and one.path.read_text() == "a\none\n"


def test_a_dataset_is_streamed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(Path("hub").resolve()))
    Path("set").mkdir()
    _write("set/train.jsonl", {"질문": "가", "n": 1}, {"질문": "나", "n": 2})
    for text in ("hf:set", "hf:set?split=train&config=default"):
        assert _rows(text) == [{"질문": "가", "n": 1}, {"질문": "나", "n": 2}]
    with pytest.raises(UsageError, match=r"data.splits.dev: 'hf:set' cannot be fetched: ValueError: Bad split: dev"):
        find_source("dev", ["hf:set"])


BAD = {
    "no match": ("part-*.csv", "the pattern 'part-*.csv' matches no file: looked in /"),
    "commas": ("a.jsonl,b.jsonl", "several are a list: [a.jsonl,b.jsonl]"),
    "an unknown part": ("*.xlsx", "data file 'a.xlsx' has an unknown format; known: .jsonl"),
    "an unknown option": ("hf:org/name?subset=a", "has 'subset'; known: config, split, revision"),
    "no such URL": ("memory://none/*.csv", "'memory://none/*.csv' matches no file"),
    "a URL of another format": ("memory://none/a.bin", "data file 'memory://none/a.bin' has an unknown format"),
    "a broken line": ("broken/*.jsonl", "broken/b.jsonl, line 2 is not JSON"),
    "bytes": ("*.parquet", "a.parquet, row 1: column 'image' holds no text but bytes"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
def test_what_is_no_split_is_named(text: str, reason: str) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("a.xlsx", "b.xlsx"):
        Path(name).touch()
    Path("broken").mkdir()
    _write("broken/a.jsonl", {"a": 1})
    Path("broken/b.jsonl").write_text('{"a": 1}\n{"a\n')
    for name in ("a.parquet", "b.parquet"):
        parquet.write_table(pyarrow.table({"image": [b"\xff"]}), name)
    with pytest.raises(UsageError) as caught:
        find_source("train", [text])
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_cache_without_room_is_refused_before_and_while_it_is_filled(
    mount_tmpfs: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mount_tmpfs("size=1m")
    monkeypatch.setenv("SOUSBATCH_CACHE", str(place / "cache"))
    _write("a.jsonl.gz", *({"a": "가" * 1000, "n": number} for number in range(1000)))
    with pytest.raises(UsageError) as caught:
        find_source("train", ["a.jsonl.gz"])
    assert f"data.splits.train: the cache {place / 'cache'} became full" in str(caught.value)
    assert not list(place.rglob(f"{files.TEMPORARY_PREFIX}*"))
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("word\n" * 200_000)
    with pytest.raises(UsageError, match=r"can take 0.001\d* GB .*copy of 0.002 GB or more; free some space, or set"):
        find_source("train", ["*.txt"])
