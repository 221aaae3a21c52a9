"""Rows of shards without an index are found as the real samplers deal them out, and padding is dropped by its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler

from sousbatch.errors import IncompleteError, UsageError
from sousbatch.predictions.samplers import SAMPLERS, Dealing, Sampler, repeated_rows, rows_of_rank
from sousbatch.predictions.shard_merge import merge_shards

SIZES = [(1, 1), (3, 4), (13, 3), (16, 4), (17, 4), (100, 7)]


def _distributed(num_rows: int, rank: int, num_ranks: int) -> list[int]:
    return list(DistributedSampler(range(num_rows), num_ranks, rank, shuffle=False))  # type: ignore[arg-type]


def _contiguous(num_rows: int, rank: int, num_ranks: int) -> list[int]:
    state = PartialState(cpu=True)
    state.num_processes, state.process_index = num_ranks, rank
    try:
        with state.split_between_processes(list(range(num_rows)), apply_padding=True) as part:
            return list(part)
    finally:
        PartialState._reset_state()


def _batches(num_rows: int, rank: int, num_ranks: int) -> list[int]:
    batches = BatchSampler(SequentialSampler(range(num_rows)), 3, drop_last=False)
    return [row for batch in BatchSamplerShard(batches, num_ranks, rank) for row in batch]


REAL: dict[Sampler, Callable[[int, int, int], list[int]]] = {
    "distributed": _distributed,
    "contiguous": _contiguous,
    "batches": _batches,
}


@pytest.mark.parametrize(("num_rows", "num_ranks"), SIZES)
@pytest.mark.parametrize("sampler", REAL)
def test_rows_are_those_of_the_real_sampler_and_each_is_real_once(
    sampler: Sampler, num_rows: int, num_ranks: int
) -> None:
    if num_ranks == 1 and sampler == "contiguous":
        return  # it splits nothing then
    seen: list[int] = []
    for rank in range(num_ranks):
        ours = rows_of_rank(sampler, num_rows, rank, num_ranks, 3 if sampler == "batches" else 1).tolist()
        theirs = REAL[sampler](num_rows, rank, num_ranks)
        assert len(ours) == len(theirs)
        assert [(our, their) for our, their in zip(ours, theirs, strict=True) if our not in (their, -1)] == []
        padding = [their for our, their in zip(ours, theirs, strict=True) if our < 0]
        assert repeated_rows(sampler, num_rows, rank, num_ranks, 3 if sampler == "batches" else 1).tolist() == padding
        seen += [row for row in ours if row >= 0]
    assert sorted(seen) == list(range(num_rows))


def test_in_turn_is_the_same_without_padding() -> None:
    rows = [rows_of_rank("interleaved", 5, rank, 3).tolist() for rank in range(3)]
    assert rows == [[0, 3], [1, 4], [2]]


def _write(folder: Path, sampler: Sampler, num_rows: int, num_ranks: int) -> list[Path]:
    """Write shards as ranks do that answer padding, too: each in other words."""
    paths = [folder / f"rank{rank}.jsonl" for rank in range(num_ranks)]
    for rank, path in enumerate(paths):
        rows = rows_of_rank(sampler, num_rows, rank, num_ranks)
        path.write_text("".join(f'{{"p": "{row if row >= 0 else "padding"}"}}\n' for row in rows))
    return paths


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shards_are_joined_by_the_sampler(sampler: Sampler, tmp_path: Path) -> None:
    paths, out = _write(tmp_path, sampler, 13, 4), tmp_path / "out.jsonl"
    report = merge_shards(paths, out, num_rows=13, dealing=Dealing(sampler=sampler))
    assert [json.loads(line)["p"] for line in out.read_text().splitlines()] == [str(row) for row in range(13)]
    assert (report.num_padding, report.num_duplicates) == (0 if sampler == "interleaved" else 3, 0)


def test_a_shard_that_ends_early_lacks_its_last_rows(tmp_path: Path) -> None:
    paths, out = _write(tmp_path, "distributed", 13, 4), tmp_path / "out.jsonl"
    paths[1].write_text("".join(paths[1].read_text().splitlines(keepends=True)[:2]) + '{"p": "cut')
    with pytest.raises(IncompleteError, match="missing rows: 9; incomplete rows: 1"):
        merge_shards(paths, out, num_rows=13, dealing=Dealing(sampler="distributed"))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("lost", "names", "says"), [(2, "rank{}", "no shard between"), (3, "rank{}", "4 ranks"), (1, "{}rank", "between")]
)
def test_a_lost_shard_is_refused_since_every_row_would_get_a_wrong_position(
    tmp_path: Path, sampler: Sampler, lost: int, names: str, says: str
) -> None:
    paths = _write(tmp_path, sampler, 13, 4)
    named = [path.rename(tmp_path / f"{names.format(rank)}.jsonl") for rank, path in enumerate(paths)]
    left = [path for rank, path in enumerate(named) if rank != lost]
    dealing, out = Dealing(sampler=sampler), tmp_path / "out.jsonl"
    with pytest.raises(UsageError, match=f"{says}.*--ranks N"):
        merge_shards(left, out, num_rows=13, dealing=dealing)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(UsageError, match="--ranks is 4, and here are 3 shards"):
        merge_shards(left, out, num_rows=13, dealing=replace(dealing, num_ranks=4))
    named[lost].write_text("")  # an empty one in its place
    with pytest.raises(IncompleteError, match="missing rows"):
        merge_shards(named, out, num_rows=13, dealing=replace(dealing, num_ranks=4))
    rows = [json.loads(line)["p"] for line in out.with_name("out.jsonl.partial").read_text().splitlines()]
    there = rows_of_rank(sampler, 13, lost, 4).tolist()
    assert rows == [str(row) for row in range(13) if row not in there]


def test_wrong_batches_that_fit_are_found_by_what_rows_say_beside_their_prediction(
    tmp_path: Path, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    for rank in range(2):
        rows = rows_of_rank("batches", 12, rank, 2, 3).tolist()
        lines = [f'{{"name": "n{row}", "prediction": "p{row}"}}\n' for row in rows]
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(lines))
    data, out = tmp_path / "data.csv", tmp_path / "out.jsonl"
    data.write_text("name,text\n" + "".join(f"n{row},t\n" for row in range(12)))
    given = ["predictions", "merge", str(tmp_path), "--sampler", "batches", "--rows", "12", "--out", str(out)]
    shards = [str(tmp_path / f"rank{rank}.jsonl") for rank in range(2)]
    given[2:3] = shards
    code, said, err = sousbatch(*given, "--batch-rows", "2")
    assert code == 0 and "by sampler batches of 2 rows: assumed, since nothing in the rows was compared" in said, err
    out.unlink()
    code, _, err = sousbatch(*given, "--batch-rows", "2", "--data", str(data))
    assert code == 2 and "row 2 would be the one whose name is 'n3', and in" in err and not out.exists()
    code, said, err = sousbatch(*given, "--batch-rows", "3", "--data", str(data))
    assert code == 0 and "of 3 rows: name of every row as in" in said, err
    assert [json.loads(line)["name"] for line in out.read_text().splitlines()] == [f"n{row}" for row in range(12)]


@pytest.mark.parametrize(
    ("order", "shards"),
    [
        (["--sampler", "distributed"], [[0, 2], [1, 0]]),
        (["--in-file-order"], [[0, 1], [2]]),
        (["--index", "p", "--export", "o.csv"], [[2], [1, 0]]),
    ],
)
def test_the_data_say_how_many_rows_there_must_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sousbatch: Callable[..., tuple[int, str, str]],
    order: list[str],
    shards: list[list[int]],
) -> None:
    """By a sampler with one row less the last one would be taken for padding."""
    monkeypatch.chdir(tmp_path)
    for rank, rows in enumerate(shards):
        Path(f"rank{rank}.jsonl").write_text("".join(f'{{"p": {row}}}\n' for row in rows))
    Path("data.csv").write_text("text\na\nb\nc\n")
    given = ["predictions", "merge", "rank0.jsonl", "rank1.jsonl", *order, "--out", "m.jsonl", "--data", "data.csv"]
    code, _, err = sousbatch(*given, "--rows", "2")
    assert code == 2 and "--rows is 2, and data.csv has 3 rows" in err and not Path("m.jsonl").exists()
    code, _, err = sousbatch(*given)
    assert code == 0 and [json.loads(line)["p"] for line in Path("m.jsonl").read_text().splitlines()] == [0, 1, 2], err
    Path("data.csv").write_text("text\na\nb\nc\nd\ne\n")
    assert sousbatch(*given)[0] != 0


def test_padding_that_is_not_what_it_should_repeat_is_said(
    tmp_path: Path, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    shards = [str(path) for path in _write(tmp_path, "distributed", 13, 4)]
    for rank, path in enumerate(shards):
        rows = [*range(rank, 13, 4), *([rank - 1] if rank else [])]  # as DistributedSampler pads them
        Path(path).write_text("".join(f'{{"p": {row}}}\n' for row in rows))
    given = ["predictions", "merge", "--sampler", "distributed", "--out", str(tmp_path / "o.jsonl")]
    assert "of padding" not in sousbatch(*given, *shards, "--rows", "13")[1]
    for order, num_rows, num_differing in ((shards, 14, 2), ([*shards[:2], shards[3], shards[2]], 13, 2)):
        said = sousbatch(*given, *order, "--rows", str(num_rows))[1]
        assert f"{num_differing} of {16 - num_rows} rows of padding are not those that they should repeat" in said


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"num_rows": None}, None, "give --rows, too"),
        ({"num_rows": 12}, None, "rank0.jsonl has 4 rows, and rank 0 of 4 has 3 of 12 by --sampler distributed"),
        ({}, '{"p": \n{"p": 1}\n', "positions after a broken line are unknown"),
    ],
)
def test_what_does_not_fit_the_sampler_is_refused(
    options: dict[str, Any], change: str | None, message: str, tmp_path: Path
) -> None:
    paths = _write(tmp_path, "distributed", 13, 4)
    if change is not None:
        paths[2].write_text(change)
    with pytest.raises(UsageError, match=message):
        merge_shards(
            paths, tmp_path / "o.jsonl", **{"num_rows": 13, "dealing": Dealing(sampler="distributed"), **options}
        )


def test_the_command_line_names_the_sampler(tmp_path: Path, sousbatch: Callable[..., tuple[int, str, str]]) -> None:
    _write(tmp_path, "distributed", 13, 12)
    arguments = ("--sampler", "distributed", "--rows", "13", "--out", str(tmp_path / "out") + ".jsonl")
    code, out, err = sousbatch("predictions", "merge", str(tmp_path), *arguments)
    assert (code, err) == (0, "") and "13 of 13 rows" in out
    code, _, err = sousbatch("predictions", "merge", *sorted(map(str, tmp_path.glob("rank*"))), *arguments)
    assert code == 2 and "alphabetical order" in err


@pytest.mark.parametrize(
    "arguments", [["--sampler", "batches"], ["--sampler", "batches", "--batch-rows", "0"], ["--batch-rows", "3"]]
)
def test_the_rows_of_a_batch_are_said_with_batches_and_only_then(
    arguments: list[str], tmp_path: Path, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    _write(tmp_path, "batches", 13, 4)
    out = ("--rows", "13", "--out", str(tmp_path / "o.jsonl"))
    code, _, err = sousbatch("predictions", "merge", str(tmp_path), *arguments, *out)
    assert code == 2 and "--sampler batches needs --batch-rows" in err


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a folder; name the merged file"), ("no/o.jsonl", "no such folder")]
)
def test_a_place_that_cannot_hold_the_merged_file_is_named(
    name: str, message: str, tmp_path: Path, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    _write(tmp_path, "interleaved", 13, 4)
    out = ("--in-file-order", "--out", str(tmp_path / name))
    code, _, err = sousbatch("predictions", "merge", str(tmp_path), *out)
    assert code == 2 and message in err and ".tmp-" not in err
