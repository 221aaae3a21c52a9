"""`checkpoints list`, `verify` and `prune` on folders and on runs, from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch import events, files, ledger
from sousbatch.checkpoints import commit
from sousbatch.checkpoints.rotation import WRITER_LOCK
from sousbatch.cli.report.gather import read_run
from sousbatch.cli.report.page import render_page
from sousbatch.ledger_queries import checkpoint_lifetimes, timed
from sousbatch.recipes.forecast.storage import weights_of
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import remember_run

Run = Callable[..., tuple[int, str, str]]


def save(folder: Path, step: int, metric: float, attempt: int = 1, num_bytes: int = 1000) -> None:
    temporary = commit.begin(folder, step, attempt)
    (temporary / "weights").write_bytes(b"x" * num_bytes)
    commit.commit(temporary, step=step, attempt=attempt, metric=metric, world_size=1, check_fence=lambda: None)


def steps(folder: Path) -> list[int]:
    return [one.step for one in commit.committed(folder)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of four steps, of which the second is the best."""
    place = tmp_path / "kept"
    for step, metric in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5)):
        save(place, step, metric)
    return place


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], [20, 40]),
        (["--keep-last", "2"], [20, 30, 40]),
        (["--keep-best", "0"], [40]),
        (["--keep-best", "3"], [20, 30, 40]),
    ],
    ids=str,
)
def test_pruning_leaves_the_last_and_the_best_and_a_dry_run_all(
    sousbatch: Run, folder: Path, options: list[str], left: list[int]
) -> None:
    code, said, _ = sousbatch("checkpoints", "prune", str(folder), "--dry-run", *options)
    assert code == 0 and steps(folder) == [10, 20, 30, 40]
    gone = {f"step-000000{step}: delete" for step in (10, 20, 30, 40) if step not in left}
    assert all(f"{one} (older than the last and not among the best, " in said for one in gone)
    code, said, _ = sousbatch("checkpoints", "prune", str(folder), *options)
    assert code == 0 and steps(folder) == left
    assert said.count(": removed (") == 4 - len(left)


def test_what_another_trainer_wrote_is_never_pruned(sousbatch: Run, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (tmp_path / "theirs" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "theirs" / f"checkpoint-{step}" / "trainer_state.json").write_text(
            json.dumps({"global_step": step})
        )
    code, said, _ = sousbatch("checkpoints", "prune", str(tmp_path / "theirs"), "--keep-best", "0")
    assert code == 0 and said.count("keep (third-party, not ours to remove)") == 3
    assert len(list((tmp_path / "theirs").glob("checkpoint-*"))) == 3


def test_a_folder_that_a_job_writes_to_is_not_pruned_from_outside(sousbatch: Run, folder: Path) -> None:
    with files.locked(folder / WRITER_LOCK, wait=False):
        code, _, said = sousbatch("checkpoints", "prune", str(folder))
    assert code == 2 and "a job writes checkpoints to" in said and steps(folder) == [10, 20, 30, 40]


Planned = Callable[..., RunPaths]


@pytest.fixture
def planned(sousbatch: Run, project: Path, tmp_path: Path) -> Planned:
    """Make the folder of a run that was planned with some overrides."""

    def plan(*overrides: str) -> RunPaths:
        _, out, _ = sousbatch("plan", "small.yaml", *overrides, "--json")
        paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
        paths.root.mkdir(parents=True)
        paths.plan.write_text(out)
        ledger.open_client(paths.ledger_dir).close()
        remember_run(paths)
        return paths

    return plan


def test_a_run_is_pruned_by_its_own_policy_and_its_report_knows(sousbatch: Run, planned: Planned) -> None:
    paths = planned("checkpoints.keep_last=2")
    for attempt in (1, 2):  # the second attempt saves a step of the first again
        ledger.open_attempt(paths.ledger_dir, "train", 0).close()
        writer = ledger.open_job(paths.ledger_dir, "train", 0, attempt)
        for step, metric in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 1.5)) if attempt == 1 else ((40, 1.5), (50, 2.0)):
            save(paths.checkpoints("train"), step, metric, attempt)
            writer.write(events.Saved(step=step, num_bytes=1000, held_bytes=1000, budget_bytes=9000))
        writer.close()
    code, _, _ = sousbatch("checkpoints", "prune", str(paths.root))
    assert code == 0 and steps(paths.checkpoints("train")) == [20, 40, 50]
    fates = [(one.step, one.attempt, one.fate) for one in checkpoint_lifetimes(timed(ledger.read(paths.ledger_dir)))]
    assert sorted(fates) == [
        *[(10, 1, "removed"), (20, 1, "kept"), (30, 1, "removed")],
        *[(40, 2, "kept"), (50, 2, "kept")],
    ]
    page = render_page([read_run(paths, states={})], out=paths.report, written_at=0)
    assert re.search(r"removed at [\d.]+ s: older than the last and not among the best", page)


def test_list_and_verify_say_what_is_there_and_what_is_damaged(sousbatch: Run, folder: Path) -> None:
    code, said, _ = sousbatch("checkpoints", "list", str(folder), "--json")
    assert code == 0 and [one["step"] for one in json.loads(said)] == [10, 20, 30, 40]
    assert sousbatch("checkpoints", "verify", str(folder))[0] == 0
    (folder / "step-00000020" / "weights").write_bytes(b"x" * 999)
    code, said, _ = sousbatch("checkpoints", "verify", str(folder))
    assert code == 1 and said.count(": intact") == 3 and "step-00000020: weights" in said


def test_what_thinning_frees_is_less_than_what_goes(sousbatch: Run, planned: Planned) -> None:
    paths = planned("checkpoints.thin=true")
    weights = weights_of(read_plan(paths.plan).recipe, read_plan(paths.plan).inputs.model).num_bytes
    for step, metric in ((10, 1.0), (20, 2.0)):
        save(paths.checkpoints("train"), step, metric, num_bytes=weights + 5000)
    _, said, _ = sousbatch("checkpoints", "prune", str(paths.root), "--dry-run")
    assert "step-00000010: strip (among the best, 5 kB)" in said


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/train"])
def test_what_a_kill_left_in_a_run_is_pruned_unless_a_job_writes(place: str, sousbatch: Run, planned: Planned) -> None:
    folder = planned().checkpoints("train")
    save(folder, 10, 1.0)
    left = folder / ".tmp-step-00000020.0001"
    left.mkdir()
    (left / "weights").write_bytes(b"x" * 500)
    assert re.search(r"^ *20 .* incomplete ", sousbatch("checkpoints", "list", str(folder))[1], re.MULTILINE)
    prune = ("checkpoints", "prune", str(folder.parent.parent / place))
    with files.locked(folder / WRITER_LOCK, wait=False):
        assert f"{left}: keep (incomplete" in sousbatch(*prune, "--dry-run")[1]
    code, said, _ = sousbatch(*prune, "--dry-run")
    assert f"{left}: delete (left by a save or a removal that was killed, 500 B)" in said and left.is_dir()
    code, said, _ = sousbatch(*prune)
    assert code == 0 and f"{left}: removed (left by a save" in said and not left.exists()
    assert steps(folder) == [10]


def test_in_a_folder_that_is_no_runs_unfinished_work_is_left(sousbatch: Run, folder: Path) -> None:
    (folder / ".tmp-step-00000020-model.part").mkdir()  # of a consolidation, say
    assert sousbatch("checkpoints", "prune", str(folder))[0] == 0
    assert (folder / ".tmp-step-00000020-model.part").is_dir()


@pytest.mark.parametrize("verb", ["list", "verify"])
@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/train"])
def test_a_run_is_also_meant_by_the_folders_of_its_checkpoints(
    verb: str, place: str, sousbatch: Run, planned: Planned
) -> None:
    folder = planned().checkpoints("train")
    save(folder, 10, 1.0)
    code, said, _ = sousbatch("checkpoints", verb, str(folder.parent.parent / place))
    assert code == 0 and str(folder / "step-00000010") in said


@pytest.mark.parametrize("place", ["{root}", "0123", "{root}/checkpoints", "{root}/checkpoints/train"])
def test_consolidate_names_the_newest_checkpoint_where_it_was_given_several(
    place: str, sousbatch: Run, planned: Planned
) -> None:
    paths = planned()
    given = place.format(root=paths.root)
    for step in (10, 20):
        save(paths.checkpoints("train"), step, 1.0)
    code, _, said = sousbatch("checkpoints", "consolidate", given, "out")
    newest = paths.checkpoints("train") / "step-00000020"
    assert (
        code == 2
        and said == f"sousbatch: {given}: is not a checkpoint, but holds 2; name one, the newest is {newest}\n"
    )
