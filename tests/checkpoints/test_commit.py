"""Committed or not there: kills, damage, third-party folders, fences."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch import files, ledger
from sousbatch.checkpoints import commit
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.errors import DamagedError, FencedError, NotFoundError

NUM_RECORDS = 3


def no_fence() -> None:
    pass


def write_zip(path: Path, seed: int, num_bytes: int = 2000) -> None:
    """Write what torch.save does: a zip of stored records."""
    content = random.Random(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for record in range(NUM_RECORDS):
            archive.writestr(f"archive/data/{record}", content.randbytes(num_bytes))


def make(folder: Path, step: int, attempt: int = 1, metric: float | None = None, **values: Any) -> Checkpoint:
    temporary = commit.begin(folder, step, attempt)
    (temporary / f"global_step{step}").mkdir()
    for rank in range(2):
        write_zip(temporary / f"global_step{step}" / f"rank_{rank}_optim_states.pt", seed=step * 10 + rank)
    (temporary / "config.json").write_text(json.dumps({"step": step}))
    options = {"world_size": 2, "check_fence": no_fence} | values
    return commit.commit(temporary, step=step, attempt=attempt, metric=metric, **options)


def steps(folder: Path) -> list[int]:
    return [one.step for one in commit.committed(folder)]


def test_a_commit_is_read_back_as_it_was_made(tmp_path: Path) -> None:
    made = make(tmp_path / "train", 100, attempt=3, metric=0.25)
    assert made.path == tmp_path / "train" / "step-00000100"
    assert (made.step, made.attempt, made.metric, made.world_size, made.is_pinned) == (100, 3, 0.25, 2, False)
    assert made.num_bytes == files.num_bytes_below(made.path) - (made.path / commit.MARKER).stat().st_size
    assert commit.committed(tmp_path / "train") == (made,)
    assert commit.list_checkpoints(made.path) == (made,), "a checkpoint's own folder is a listing of one"
    assert commit.verify(made) == ()
    (made.path / "pinned").touch()
    assert commit.read_checkpoint(made.path).is_pinned


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), None])
def test_a_metric_that_is_no_number_is_none_and_costs_no_checkpoint(tmp_path: Path, metric: float | None) -> None:
    assert make(tmp_path, 1, metric=metric).metric is None


def test_newer_means_step_and_attempt_never_the_time_of_a_file(tmp_path: Path) -> None:
    for place, step in enumerate((30, 10, 200, 9)):
        path = make(tmp_path, step).path
        os.utime(path, (1e9 - place, 1e9 - place))
    assert steps(tmp_path) == [9, 10, 30, 200]
    last = commit.last_committed(tmp_path)
    assert last is not None and last.step == 200
    older = Checkpoint(path=tmp_path, step=5, attempt=1)
    newer = Checkpoint(path=tmp_path, step=5, attempt=2)
    assert older.order < newer.order
    went_back = make(tmp_path, 15, attempt=2)
    assert commit.last_committed(tmp_path) == went_back


def test_the_best_is_by_the_metric_and_the_newest_where_nothing_was_measured(tmp_path: Path) -> None:
    assert commit.best_committed(tmp_path / "none", "lowest") is None
    make(tmp_path, 1)
    make(tmp_path, 2)
    assert commit.best_committed(tmp_path, "lowest").step == 2  # type: ignore[union-attr]
    for step, metric in ((3, 0.5), (4, 0.1), (5, 0.5), (6, 0.0)):
        make(tmp_path, step, metric=metric)
    assert commit.best_committed(tmp_path, "lowest").step == 6  # type: ignore[union-attr]
    assert commit.best_committed(tmp_path, "highest").step == 5  # type: ignore[union-attr]


def test_a_fenced_attempt_commits_nothing(tmp_path: Path) -> None:
    ledger_dir, folder = tmp_path / "ledger", tmp_path / "train"
    make(folder, 1)
    ledger.open_attempt(ledger_dir, "train", 0).close()
    ledger.open_attempt(ledger_dir, "train", 0).close()

    def fence(attempt: int) -> Callable[[], None]:
        return lambda: ledger.check_fence(ledger_dir, "train", 0, attempt)

    with pytest.raises(FencedError):
        make(folder, 2, attempt=1, check_fence=fence(1))
    assert steps(folder) == [1]
    make(folder, 2, attempt=2, check_fence=fence(2))
    assert steps(folder) == [1, 2]


def test_a_step_that_is_committed_again_replaces_the_older_one(tmp_path: Path) -> None:
    make(tmp_path, 7, attempt=1)
    assert make(tmp_path, 7, attempt=2).attempt == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_leftovers_of_killed_saves_go_with_the_next_begin_and_nothing_else_does(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / "checkpoint-5").mkdir()
    (commit.begin(tmp_path, 2, 1) / "half").write_text("x")
    (tmp_path / ".tmp-step-00000001.0a1b2c3d").mkdir()
    fresh = commit.begin(tmp_path, 3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [fresh.name, "checkpoint-5", "step-00000001"]
    assert list(fresh.iterdir()) == []


def test_a_list_says_what_is_committed_incomplete_and_third_party(tmp_path: Path) -> None:
    make(tmp_path, 10)
    damaged = make(tmp_path, 20)
    (damaged.path / commit.MARKER).write_text("{")
    commit.begin(tmp_path, 30, 1)
    for name in ("checkpoint-5", "global_step40", "tokenizer", "step-00000050"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    write_zip(tmp_path / "mine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", 1)
    found = [(one.step, one.status) for one in commit.list_checkpoints(tmp_path)]
    assert found == [
        (0, "third-party"),
        (5, "third-party"),
        (10, "committed"),
        (20, "incomplete"),
        (30, "incomplete"),
        (40, "third-party"),
    ]
    assert steps(tmp_path) == [10]


@pytest.mark.parametrize("name", ["checkpoint-5", "global_step5"])
def test_another_trainers_checkpoint_is_a_listing_of_one_and_its_parts_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "global_step5").mkdir(parents=True)
    (one,) = commit.list_checkpoints(tmp_path / name)
    assert (one.path, one.status, one.step) == (tmp_path / name, "third-party", 5)


def test_a_stage_may_be_called_as_another_trainers_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "checkpoint-1", 10)
    assert steps(tmp_path / "checkpoint-1") == [10]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "{}", '{"files": []}', '{"files": {"a": {}}}', "\udcff"])
def test_a_marker_that_cannot_be_read_is_damage(tmp_path: Path, text: str) -> None:
    path = make(tmp_path, 1).path
    (path / commit.MARKER).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DamagedError, match="cannot be read"):
        commit.read_checkpoint(path)
    assert steps(tmp_path) == []


def test_what_is_no_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is no committed checkpoint"):
        commit.read_checkpoint(tmp_path)
    with pytest.raises(NotFoundError, match="is not a folder"):
        commit.list_checkpoints(tmp_path / "none")
    assert commit.committed(tmp_path / "none") == ()


def test_a_checkpoint_that_is_removed_during_a_listing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = make(tmp_path, 1)
    make(tmp_path, 2)
    read = commit.read_checkpoint

    def removed_before(path: Path) -> Checkpoint:
        if path == gone.path:
            files.remove_tree(path)
        return read(path)

    monkeypatch.setattr(commit, "read_checkpoint", removed_before)
    assert steps(tmp_path) == [2]


# verify


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def damage_swap(path: Path) -> None:
    """Put the other rank's file in its place: whole, of the same size, and wrong."""
    other = path.parent / path.name.replace("rank_1", "rank_0")
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "damage, expected",
    [
        (damage_truncate, "bytes; "),
        (damage_remove, "is missing"),
        (damage_flip, "is damaged"),
        (damage_swap, "is another file than was committed"),
    ],
)
def test_verify_names_the_file_and_what_is_wrong_with_it(
    tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    made = make(tmp_path, 5)
    damage(made.path / "global_step5" / "rank_1_optim_states.pt")
    (problem,) = commit.verify(made)
    assert "global_step5/rank_1_optim_states.pt" in problem and expected in problem


@pytest.mark.parametrize("damage", [damage_truncate, damage_remove, damage_flip])
def test_verify_sees_damage_of_other_files_too(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    made = make(tmp_path, 5)
    damage(made.path / "config.json")
    (problem,) = commit.verify(made)
    assert problem.startswith("config.json")


def test_every_flipped_bit_of_a_record_and_its_directory_is_seen_and_none_breaks_verify(tmp_path: Path) -> None:
    made = make(tmp_path, 5)
    path = made.path / "global_step5" / "rank_1_optim_states.pt"
    whole, chance = path.read_bytes(), random.Random(5)
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[1].header_offset
        header, directory = start + 30 + len("archive/data/1"), archive.start_dir
    places = [chance.randrange(header, header + 2000) for _ in range(60)]
    assert all(problem_after_flip(made, path, whole, place) for place in places), "a flip in a record was missed"
    for place in range(directory, len(whole)):  # some flips there change nothing that anyone reads
        problem_after_flip(made, path, whole, place)
    for field in (10, 16, 42):  # the method, the CRC, the offset of a directory entry
        assert problem_after_flip(made, path, whole, directory + field)


def problem_after_flip(made: Checkpoint, path: Path, whole: bytes, place: int) -> tuple[str, ...]:
    data = bytearray(whole)
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)
    return commit.verify(made)


def test_of_third_party_ones_the_torch_files_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5" / "global_step5"
    folder.mkdir(parents=True)
    write_zip(folder / "rank_0_optim_states.pt", 1)
    (other,) = commit.list_checkpoints(tmp_path)
    assert commit.verify(other) == ()
    damage_flip(folder / "rank_0_optim_states.pt")
    assert "rank_0_optim_states.pt: record archive/data/" in commit.verify(other)[0]
    damage_truncate(folder / "rank_0_optim_states.pt")
    assert "is not an intact torch file" in commit.verify(other)[0]


def test_a_torn_one_was_never_committed(tmp_path: Path) -> None:
    commit.begin(tmp_path, 3, 1)
    (incomplete,) = commit.list_checkpoints(tmp_path)
    assert "was never committed" in commit.verify(incomplete)[0]


# kills

SAVER = """
import sys, zipfile
from pathlib import Path
from sousbatch.checkpoints import commit
from sousbatch.checkpoints.retention.decisions import decide
from sousbatch.checkpoints.retention.policies import standard_rules
from sousbatch.checkpoints.rotation import RemovalOptions, carry_out

folder, step, attempt = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
while True:
    step += 1
    temporary = commit.begin(folder, step, attempt)
    for rank in range(2):
        with zipfile.ZipFile(temporary / f"rank_{rank}.pt", "w") as archive:
            archive.writestr("archive/data/0", bytes([step % 256]) * 50_000)
    commit.commit(temporary, step=step, attempt=attempt, metric=1 / step, world_size=2, check_fence=lambda: None)
    decisions = decide(commit.committed(folder), standard_rules(keep_last=2, keep_best=0))
    list(carry_out(decisions, RemovalOptions(check_fence=lambda: None)))
    print(step, flush=True)
"""


def test_kills_at_random_moments_of_saving_leave_the_older_ones_whole(tmp_path: Path) -> None:
    folder, chance, said = tmp_path / "train", random.Random(11), 0
    files.make_private_dir(folder)
    for attempt in range(1, 9):
        newest = commit.last_committed(folder)
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder), str(newest.step if newest else 0), str(attempt)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert saver.stdout is not None and saver.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        saver.send_signal(signal.SIGKILL)
        said = max([said, *map(int, saver.communicate()[0].split())])
        found = commit.committed(folder)
        assert found[-1].step >= said, "a checkpoint that was reported is gone"
        assert len(found) >= min(2, found[-1].step)
        assert [problem for one in found for problem in commit.verify(one)] == []
    left = [path for path in folder.iterdir() if path.name.startswith(files.TEMPORARY_PREFIX)]
    fresh = commit.begin(folder, 10_000, 99)
    assert [path for path in folder.iterdir() if path.name.startswith(files.TEMPORARY_PREFIX)] == [fresh], left


# what torch really writes


def test_a_file_of_torchs_own_is_vouched_for_by_its_records(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    temporary = commit.begin(tmp_path, 1, 1)
    torch.save({"weights": torch.arange(1000.0)}, temporary / "state.pt")
    made = commit.commit(temporary, step=1, attempt=1, metric=None, world_size=1, check_fence=no_fence)
    assert set(files.read_json(made.path / commit.MARKER)["files"]["state.pt"]) == {"num_bytes", "zip_directory"}
    assert commit.verify(made) == ()
    damage_flip(made.path / "state.pt")
    assert len(commit.verify(made)) == 1
