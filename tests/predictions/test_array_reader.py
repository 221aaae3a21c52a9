"""Shards that are no lines of text: Parquet, numpy's arrays and torch's files, whatever a trainer put into them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sousbatch.errors import DamagedError, IncompleteError, UsageError
from sousbatch.predictions.samplers import Dealing
from sousbatch.predictions.shard_files import find_shards
from sousbatch.predictions.shard_merge import merge_shards

TEXTS = ("줄\n바꿈", "U+2028\u2028 'x'", "", "NUL \0", "עברית", "가" * 50)


def _merged(folder: Path, *names: str, **options: Any) -> list[dict[str, Any]]:
    out = folder / "out" / "merged.jsonl"
    out.parent.mkdir(exist_ok=True)
    paths = [folder / name for name in names] if names else find_shards([folder])
    merge_shards(paths, out, **{"num_rows": 6} | options)
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged.jsonl", "merged.report.json"]
    return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]


def test_parquet_shards_in_any_order_become_rows(tmp_path: Path) -> None:
    for rank in (0, 1):
        at = [5, 3, 1] if rank else [0, 2, 4]
        columns = {"prediction": [TEXTS[i] for i in at], "index": at, "top": [[i, "x"[:i]] and [i] for i in at]}
        pq.write_table(pa.table(columns), tmp_path / f"rank={rank}.parquet", row_group_size=2)
    assert _merged(tmp_path) == [{"prediction": TEXTS[i], "index": i, "top": [i]} for i in range(6)]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None])
def test_nan_of_parquet_stays_what_it_is(tmp_path: Path, value: float | None) -> None:
    table = pa.table({"index": [1, 0], "score": [0.5, value], "both": [[value], [0.25]]})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second = _merged(tmp_path, num_rows=2)
    assert str(first["score"]) == str(value) == str(second["both"][0])


def test_texts_that_parquet_holds_as_bytes_are_texts(tmp_path: Path) -> None:
    table = pa.table({"index": [0, 1], "prediction": ["가".encode(), b"a\xff"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row["prediction"] for row in _merged(tmp_path, num_rows=2)] == ["가", "a\\xff"]


def test_npy_has_its_indices_beside_it_or_in_fields(tmp_path: Path) -> None:
    logits = np.arange(18, dtype=np.float16).reshape(6, 3)
    for rank in (0, 1):
        np.save(tmp_path / f"rank{rank}.npy", logits[rank::2])
        np.save(tmp_path / f"rank{rank}.index.npy", np.arange(rank, 6, 2))
    assert [row["prediction"] for row in _merged(tmp_path)] == logits.tolist()
    fields = np.array([(1, 0.5), (0, 0.25)], dtype=[("index", "i8"), ("p", "f4")])
    (tmp_path / "fields").mkdir()
    np.save(tmp_path / "fields" / "a.npy", fields)
    assert _merged(tmp_path / "fields", num_rows=2) == [{"index": 0, "p": 0.25}, {"index": 1, "p": 0.5}]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool])
def test_a_tensor_gives_a_row_for_each_of_its_first_axis(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(12).reshape(6, 2).to(dtype)
    torch.save(values, tmp_path / "a.pt")
    assert [row["prediction"] for row in _merged(tmp_path, index_field=None)] == values.tolist()


AT = [[4, 0], [2, 1], [5, 3]]
OF_PT = {
    "batches of texts": [[TEXTS[i] for i in batch] for batch in AT],
    "batches of columns": [{"prediction": [TEXTS[i] for i in batch], "n": torch.tensor(batch)} for batch in AT],
    "rows": [{"prediction": TEXTS[i]} for batch in AT for i in batch],
    "texts": [TEXTS[i] for batch in AT for i in batch],
    "columns": {"prediction": [TEXTS[i] for batch in AT for i in batch]},
}


@pytest.mark.parametrize("value", OF_PT.values(), ids=OF_PT)
def test_what_lightning_writes_has_its_indices_beside_it(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "predictions_0.pt")
    torch.save([AT], tmp_path / "batch_indices_0.pt")
    rows = _merged(tmp_path)
    assert [(row["index"], row["prediction"]) for row in rows] == list(enumerate(TEXTS))


def test_a_batch_of_one_is_a_batch_where_its_indices_say_so(tmp_path: Path) -> None:
    for rank, (values, indices) in enumerate([([1.0, 2.0], [[0, 1]]), ([3.0], [[2]])]):
        torch.save([torch.tensor(values)], tmp_path / f"predictions_{rank}.pt")
        torch.save(indices, tmp_path / f"batch_indices_{rank}.pt")
    assert [row["prediction"] for row in _merged(tmp_path, num_rows=3)] == [1.0, 2.0, 3.0]
    torch.save([2], tmp_path / "batch_indices_1.pt")
    assert _merged(tmp_path, num_rows=3)[2]["prediction"] == [3.0]


@pytest.mark.parametrize("options", [{"index_field": None}, {"dealing": Dealing(sampler="interleaved")}])
def test_indices_beside_a_shard_are_not_set_aside(tmp_path: Path, options: dict[str, Any]) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    np.save(tmp_path / "a.index.npy", [2, 0, 1])
    with pytest.raises(UsageError, match="a.index.npy says the positions of the rows"):
        _merged(tmp_path, num_rows=3, **options)


def test_rows_that_contradict_the_indices_beside_them_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([(1, 0.5), (0, 0.25)], dtype=[("index", "i8"), ("p", "f4")]))
    np.save(tmp_path / "a.index.npy", [0, 1])
    with pytest.raises(UsageError, match="a.npy: a row's 'index' is 1, and 0 in the file beside it"):
        _merged(tmp_path, num_rows=2)


def test_batches_of_tensors_are_rows(tmp_path: Path) -> None:
    logits = torch.arange(12.0).reshape(6, 2)
    torch.save([logits[:4], logits[4:]], tmp_path / "a.pt")
    assert [row["prediction"] for row in _merged(tmp_path, index_field=None)] == logits.tolist()
    torch.save([torch.tensor([1, 0]), torch.tensor([7])], tmp_path / "predictions_0.pt")
    torch.save([[1, 0], [2]], tmp_path / "batch_indices_0.pt")
    assert [row["prediction"] for row in _merged(tmp_path, "predictions_0.pt", num_rows=3)] == [0, 1, 7]


class _Runs:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([_Runs()], tmp_path / "a.pt")
    with pytest.raises(IncompleteError, match="would call .*mkdir.*; it was not called"):
        _merged(tmp_path, "a.pt")
    np.save(tmp_path / "a.npy", np.array([_Runs()], dtype=object))
    with pytest.raises(UsageError, match="a.npy holds Python objects, whose loading could run code"):
        _merged(tmp_path, "a.npy")
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".pt"])
def test_a_file_that_was_cut_off_is_named_and_its_rows_are_missing(tmp_path: Path, suffix: str) -> None:
    for rank in (0, 1):
        at, path = list(range(rank, 6, 2)), tmp_path / f"predictions_{rank}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.table({"index": at, "prediction": ["x"] * 3}), path)
        elif suffix == ".npy":
            np.save(path, np.ones((3, 2)))
            np.save(path.with_suffix(".index.npy"), at)
        else:
            torch.save({"index": torch.tensor(at), "prediction": ["x"] * 3}, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IncompleteError, match=f"missing rows: 1,3,5; corrupt rows: 1; {path}"):
        _merged(tmp_path)


DAMAGES = {
    "a flipped bit of a tensor": ("a.pt", lambda data: data.replace(b"\x2a" * 8, b"\x2a" * 7 + b"\x2b")),
    "a flipped bit of a page": ("a.parquet", lambda data: data.replace(b"\x2a" * 8, b"\x2a" * 7 + b"\x2b", 1)),
    "bytes that moved": ("a.npy", lambda data: data[:150] + data[140:]),
    "a header that is none": ("a.npy", lambda data: data.replace(b"'shape'", b"'shape\0")),
    "an open bracket": ("a.npy", lambda data: data.replace(b"(6,", b"((6")),
    "a column's name": ("a.parquet", lambda data: data.replace(b"prediction", b"predict\xf2on")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_was_damaged_within_is_named(tmp_path: Path, damage: str) -> None:
    values = np.full(6, 0x2A2A2A2A2A2A2A2A)
    name, change = DAMAGES[damage]
    torch.save({"index": torch.arange(6), "prediction": torch.tensor(values)}, tmp_path / "a.pt")
    table = pa.table({"index": range(6), "prediction": values})
    plain = {"use_dictionary": False, "compression": None, "write_statistics": False}
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, **plain)
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "a.index.npy", np.arange(6))
    before = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(change(before))
    assert (tmp_path / name).read_bytes() != before
    with pytest.raises(IncompleteError, match=f"0 of 6 rows .*corrupt rows: 1; {tmp_path / name}"):
        _merged(tmp_path, name)
    (tmp_path / name).write_bytes(before)
    assert len(_merged(tmp_path, name)) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: pq.write_table(pa.table({"id": ["a"]}), path / "a.parquet"), "has no column 'index'; it has id"),
        (
            lambda path: pq.write_table(pa.table([[0], ["a"], ["b"]], names=["index", "p", "p"]), path / "a.parquet"),
            "a.parquet has more than one column called 'p'",
        ),
        (
            lambda path: torch.save([{"index": 0, "score": np.float32(0.5)}], path / "a.pt"),
            "a.pt: it holds an object of a class.*save tensors, texts, plain",
        ),
        (lambda path: torch.save({"index": torch.arange(2), "p": np.ones(2)}, path / "a.pt"), "an object of a class"),
        (lambda path: torch.save({"index": [0], "p": [b"x"]}, path / "a.pt"), "an object of a class"),
        (lambda path: torch.save([{"index": 0, "p": [{1, 2}]}], path / "a.pt"), "an object of a class"),
        (lambda path: pq.write_table(pa.table({"index": [0.5]}), path / "a.parquet"), "has no whole numbers"),
        (lambda path: np.save(path / "a.npy", np.ones(3)), "has no field 'index'; it has prediction; .* --sampler"),
        (lambda path: np.save(path / "a.npy", np.float32(3)), "holds one value, and no rows"),
        (lambda path: torch.save({"index": [0.5]}, path / "a.pt"), "is 0.5, and a row's position is a whole number"),
        (lambda path: torch.save(3, path / "a.pt"), "holds int, and rows are a tensor"),
        (
            lambda path: torch.save(["a"], path / "predictions.pt") or torch.save([1, 2], path / "batch_indices.pt"),
            "has 1 rows, and 2 indices beside it",
        ),
        (
            lambda path: torch.save(["a"], path / "predictions.pt") or torch.save(["b"], path / "batch_indices.pt"),
            "holds str, and indices are whole numbers",
        ),
    ],
)
def test_what_has_no_rows_or_no_indices_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UsageError, match=message):
        _merged(tmp_path)


def test_shards_of_two_formats_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.jsonl").write_text('{"index": 0}\n')
    with pytest.raises(UsageError, match="are all of one format"):
        merge_shards([tmp_path / "a.npy", tmp_path / "a.jsonl"], tmp_path / "out.jsonl")


def test_two_answers_of_one_row_are_named_by_their_places(tmp_path: Path) -> None:
    for name, text in (("a", "x"), ("b", "y")):
        pq.write_table(pa.table({"index": [0], "prediction": [text]}), tmp_path / f"{name}.parquet")
    with pytest.raises(
        DamagedError, match=r"b.parquet: its row 0: row 0 differs from the one at .*a.parquet: its row 0"
    ):
        _merged(tmp_path, "a.parquet", "b.parquet", num_rows=1)


@pytest.mark.parametrize("index", [[0, None], pa.array([0, 2**64 - 1], pa.uint64())], ids=["null", "64 bits"])
def test_an_index_that_is_no_row_number_is_named(tmp_path: Path, index: Any) -> None:
    pq.write_table(pa.table({"index": index, "prediction": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(IncompleteError, match="a.parquet: a row's index is no row number"):
        _merged(tmp_path, num_rows=2)
