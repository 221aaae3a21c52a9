"""Faults that lost, shifted or doubled rows elsewhere: here each is repaired or named, and never passes unseen."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sousbatch.errors import DamagedError, IncompleteError, NoRoomError, UsageError
from sousbatch.predictions.export import export, merged_rows
from sousbatch.predictions.merge import merge_units, partial_path
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.samplers import Dealing, rows_of_rank
from sousbatch.predictions.shard_merge import merge_shards
from sousbatch.predictions.units import committed_units, open_layout, read_layout, unit_path, write_unit

NUM_ROWS, NUM_RANKS = 1001, 8
DISTRIBUTED = Dealing(sampler="distributed")
Write = Callable[[str, list[Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return written


@pytest.fixture
def shards(write: Write) -> list[Path]:
    """What 8 ranks of a `DistributedSampler` write of 1001 rows: 7 of them twice."""
    dealt = [rows_of_rank("distributed", NUM_ROWS, rank, NUM_RANKS).tolist() for rank in range(NUM_RANKS)]
    return [
        write(f"rank{rank}.jsonl", [{"prediction": f"answer {row if row >= 0 else rank - 1}"} for row in rows])
        for rank, rows in enumerate(dealt)
    ]


def answers(path: Path) -> list[str]:
    return [row["prediction"] for row in merged_rows(path)]


def test_padding_shifts_no_row(shards: list[Path], tmp_path: Path) -> None:
    """Concatenated, sorted and cut to the template's length, 1000 of 1001 rows had another row's answer."""
    report = merge_shards(shards, tmp_path / "out.jsonl", num_rows=NUM_ROWS, dealing=DISTRIBUTED)
    assert answers(tmp_path / "out.jsonl") == [f"answer {row}" for row in range(NUM_ROWS)]
    assert report.num_padding == 7


def test_a_lost_row_and_a_doubled_one_do_not_make_up_for_each_other(write: Write, tmp_path: Path) -> None:
    """The length was right, and 497 of 1001 rows were wrong."""
    rows = [{"index": row, "prediction": f"answer {row}"} for row in range(NUM_ROWS) if row != 504]
    path = write("all.jsonl", [*rows, rows[3]])
    with pytest.raises(IncompleteError, match="missing rows: 504;"):
        merge_shards([path], tmp_path / "out.jsonl", num_rows=NUM_ROWS)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("dtype", "first_wrong"), [("float16", 2049), ("float32", 16_777_217)])
def test_an_index_that_went_through_a_float_is_refused(dtype: str, first_wrong: int, tmp_path: Path) -> None:
    """Concatenated to the logits, the index was cast to their type: rows above 2048 shared numbers."""
    assert int(np.array(first_wrong).astype(dtype)) != first_wrong
    rows = np.array([(0.5, first_wrong)], dtype=[("logit", dtype), ("index", dtype)])
    np.save(tmp_path / "rank0.npy", rows)
    with pytest.raises(UsageError, match="a row's position is a whole number"):
        merge_shards([tmp_path / "rank0.npy"], tmp_path / "out.jsonl")
    np.save(tmp_path / "rank0.npy", np.array([0.5] * 3, dtype=dtype))
    np.save(tmp_path / "rank0.index.npy", np.array([0, 1, first_wrong]))
    with pytest.raises(IncompleteError, match=f"missing rows: 2-{first_wrong - 1}"):
        merge_shards([tmp_path / "rank0.npy"], tmp_path / "out.jsonl")


def _predict(folder: Path, who: int) -> None:
    layout = open_layout(folder, "key", 60, 3)
    for unit in range(layout.num_units):
        rows = [PredictionRow(index=row, prediction=f"{who} says {row}") for row in layout.rows_of(unit)]
        write_unit(folder, layout, unit, rows, "key", 1, who)


def test_two_predictors_on_the_same_units_leave_one_answer_each(tmp_path: Path) -> None:
    """Named by the local rank, the files of two nodes met: one was overwritten, or the second node died."""
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_predict, args=(tmp_path / "units", who)) for who in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    merge_units(tmp_path / "units", tmp_path / "out.jsonl")
    found = answers(tmp_path / "out.jsonl")
    assert [text.split(" says ")[1] for text in found] == [str(row) for row in range(60)]
    for first in range(0, 60, 3):
        assert len({text[0] for text in found[first : first + 3]}) == 1, "a unit is one predictor's"


ODD = {
    "empty": "",
    "U+2028 and U+0085": "a\u2028b\u0085c\x0b\x0c\x1c",
    "NUL": "a\0b",
    "1 MB": "가나다" * 120_000,
    "right to left": "שלום \u202eعالم\u202c!",
    "newlines and quotes": 'a\r\n"b",\n\rc\t',
    "a row in a text": '{"index": 3, "prediction": "x"}\n{"index": 4',
    "NaN as a word": "NaN",
    "emoji": "👩‍👩‍👧\ufeff",
}


@pytest.mark.parametrize("form", ["units", "jsonl", "csv"])
def test_odd_texts_and_ids_come_out_as_they_went_in(form: str, tmp_path: Path, write: Write) -> None:
    """Missing texts were written as NaN, and newlines replaced by blanks to survive CSV."""
    csv.field_size_limit(1 << 30)
    texts, out = list(ODD.values()), tmp_path / ("out.csv" if form == "csv" else "out.jsonl")
    rows = [{"index": at, "id": f"id {name}", "prediction": text} for at, (name, text) in enumerate(ODD.items())]
    if form == "units":
        layout = open_layout(tmp_path / "units", "key", len(rows), 2)
        for unit in range(layout.num_units):
            made = [PredictionRow.from_json(rows[at], position=at) for at in layout.rows_of(unit)]
            write_unit(tmp_path / "units", layout, unit, made, "key", 1, 0)
        merge_units(tmp_path / "units", out)
    else:
        paths = [write(f"{name}.jsonl", part) for name, part in (("b", rows[1::2]), ("a", rows[::2]))]
        if form == "csv":
            for path in paths:
                export(lambda path=path: merged_rows(path), path.with_suffix(".csv"), "csv")  # type: ignore[misc]
            paths = [path.with_suffix(".csv") for path in paths]
        merge_shards(paths, out, num_rows=len(rows))
    if form == "csv":
        with out.open(encoding="utf-8", newline="") as stream:
            assert [row["prediction"] for row in csv.DictReader(stream)] == texts
        return
    assert list(merged_rows(out)) == rows
    export(lambda: merged_rows(out), tmp_path / "table.csv", "csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        assert [(row["id"], row["prediction"]) for row in csv.DictReader(stream)] == [
            (f"id {name}", text) for name, text in ODD.items()
        ]


def test_a_disk_that_fills_within_a_unit_and_within_the_merge_loses_nothing(
    mount_tmpfs: Callable[[str], Path],
) -> None:
    folder, text = mount_tmpfs("size=1m"), "x" * 40_000
    layout = open_layout(folder / "units", "key", 40, 2)

    def commit(unit: int) -> None:
        rows = [PredictionRow(index=row, prediction=text) for row in layout.rows_of(unit)]
        write_unit(folder / "units", layout, unit, rows, "key", 1, 0)

    with pytest.raises(NoRoomError, match="unit .* of the predictions"):
        for unit in range(20):
            commit(unit)
    done = committed_units(folder / "units", layout, "key")
    assert 5 < len(done) < 20 and not list((folder / "units").glob(".tmp-*"))
    with pytest.raises(NoRoomError, match="out.jsonl"):
        merge_units(folder / "units", folder / "out.jsonl")
    assert sorted(path.name for path in folder.iterdir()) == ["units"]
    assert committed_units(folder / "units", layout, "key") == done
    for unit in list(done)[3:]:
        unit_path(folder / "units", unit).unlink()
    with pytest.raises(IncompleteError, match="6 of 40 rows"):
        merge_units(folder / "units", folder / "out.jsonl")
    assert partial_path(folder / "out.jsonl").is_file()


def test_input_that_changed_between_attempts_mixes_no_answers(predicted: Path, key: str, tmp_path: Path) -> None:
    """Another input has another key and so another folder; the same key over another number of rows is refused."""
    with pytest.raises(DamagedError, match="its num_rows is 22, not 23"):
        open_layout(predicted, key, 23, 5)
    newer = tmp_path / "newer"
    open_layout(newer, "newer", 22, 5)
    for number in (0, 1):
        unit_path(newer, number).write_bytes(unit_path(predicted, number).read_bytes())
    with pytest.raises(IncompleteError, match=f"0 of 22 rows .* its key is '{key}'"):
        merge_units(newer, tmp_path / "out.jsonl")
    assert read_layout(predicted)[0] == key


@pytest.mark.parametrize("seed", range(3))
def test_shards_damaged_at_random_never_pass_for_complete_ones(seed: int, write: Write, tmp_path: Path) -> None:
    """What comes out complete is right in every row; anything else is named."""
    chance = random.Random(seed)
    rows = [{"index": row, "prediction": f"{chance.choice(list(ODD.values())[:2])} {row}"} for row in range(40)]
    paths = [write(f"rank{rank}.jsonl", rows[rank::4]) for rank in range(4)]
    expected = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    for attempt in range(25):
        before = [path.read_bytes() for path in paths]
        for path in chance.sample(paths, chance.randint(1, 3)):
            path.write_bytes(_damaged(path.read_bytes(), chance))
        out = tmp_path / f"{attempt}.jsonl"
        try:
            merge_shards(paths, out, num_rows=40)
            assert out.read_bytes() == expected
        except (IncompleteError, DamagedError):
            assert not out.exists()
        for path, whole in zip(paths, before, strict=True):
            path.write_bytes(whole)


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Cut, glue, blank, double, drop or shuffle, as crashes and restarts do."""
    first, last = sorted(chance.sample(range(len(data)), 2))
    lines = data.splitlines(keepends=True)
    return chance.choice(
        [
            data[:last],
            data[:first] + data[last:],
            data[:first] + b"\0" * (last - first) + data[last:],
            data[:last] + data[first:],
            data + b"\0" * 100,
            b"".join(chance.sample(lines, len(lines))),
            data + b"".join(lines[: chance.randint(1, len(lines))]),
        ]
    )
