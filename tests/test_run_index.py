"""A run is found from any folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sousbatch import run_index
from sousbatch.errors import NotFoundError, UsageError
from sousbatch.run_folder import RunPaths
from sousbatch.user_folders import state_dir


def make_run(folder: Path, recipe: str, run_id: str) -> RunPaths:
    paths = RunPaths(root=folder / recipe / run_id)
    paths.root.mkdir(parents=True)
    paths.plan.write_text("{}")
    run_index.remember_run(paths)
    return paths


def test_a_run_is_found_by_id_beginning_recipe_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_run(tmp_path, "toy", "0123456789ab")
    make_run(tmp_path, "other", "fedcba987654")
    for name in ("0123456789ab", "0123", "toy", str(paths.root)):
        assert run_index.find_run(name) == paths
    monkeypatch.chdir(paths.root.parent)
    assert run_index.find_run("0123456789ab") == paths


def test_a_point_of_a_sweep_is_found_by_its_id(tmp_path: Path) -> None:
    sweep = make_run(tmp_path, "toy", "sweep-0123456789ab")
    point = RunPaths(root=sweep.root / "toy" / "abcdef012345")
    point.root.mkdir(parents=True)
    point.plan.write_text("{}")
    assert run_index.find_run("abcdef012345") == run_index.find_run("abcd") == point


def test_an_exact_id_wins_over_its_repetitions(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "toy", "0123456789ab")
    make_run(tmp_path, "toy", "0123456789ab-2")
    assert run_index.find_run("0123456789ab") == paths
    with pytest.raises(UsageError, match="names 2 runs: 0123456789ab, 0123456789ab-2; give one id"):
        run_index.find_run("toy")


def test_who_only_looks_gets_a_recipes_newest_run(tmp_path: Path) -> None:
    make_run(tmp_path, "toy", "0123456789ab")
    newest = make_run(tmp_path, "toy", "aaaaaaaaaaaa")
    assert run_index.find_run("toy", newest=True) == newest


def test_an_unknown_run_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="newest known: none yet"):
        run_index.find_run("abc")
    make_run(tmp_path, "toy", "0123456789ab")
    with pytest.raises(NotFoundError, match="run 'abc' does not exist; newest known: 0123456789ab"):
        run_index.find_run("abc")


def test_the_index_forgets_what_is_gone_and_survives_what_is_strange(tmp_path: Path) -> None:
    kept, removed, forgotten = (make_run(tmp_path, "toy", f"{n}23456789abc") for n in range(3))
    shutil.rmtree(removed.root)
    run_index.forget_run(forgotten)
    run_index.forget_run(forgotten)
    index = state_dir() / "runs"
    (index / "no-link").write_text("?")
    (index / ".tmp-left-by-a-kill").symlink_to(kept.root)
    kept.plan.unlink()  # a damaged run is never left out
    assert run_index.known_runs() == (kept,) and run_index.known_runs(gone=True) == (removed,)
    with pytest.raises(NotFoundError, match="its folder .*123456789abc is gone; .*`sousbatch cancel 123456789abc`"):
        run_index.find_run("1234")
    assert run_index.find_run("1234", gone=True) == removed


def test_runs_come_in_the_order_of_their_submission(tmp_path: Path) -> None:
    made = [make_run(tmp_path, "toy", f"{n}23456789abc") for n in (3, 1, 2)]
    for age, paths in enumerate(reversed(made)):
        (link,) = (state_dir() / "runs").glob(f"toy.{paths.run_id}.*")
        os.utime(link, ns=(0, 10**18 - age), follow_symlinks=False)
    assert run_index.known_runs() == tuple(made)


def test_the_same_submission_in_two_runs_folders_is_two_runs(tmp_path: Path) -> None:
    made = [RunPaths(root=tmp_path / store / "small" / "0123456789ab") for store in ("a", "b")]
    for paths in made:
        paths.ledger_dir.mkdir(parents=True)
        paths.plan.write_text("{}")
        run_index.remember_run(paths)
    assert set(run_index.known_runs()) == set(made)
    with pytest.raises(UsageError, match=f"{made[0].root}.*{made[1].root}; give one"):
        run_index.find_run("0123")
    assert run_index.find_run(str(made[0].root)) == made[0]
    run_index.forget_run(made[0])
    assert run_index.known_runs() == (made[1],)


def test_a_run_that_was_moved_by_hand_is_known_once(tmp_path: Path) -> None:
    old, new = (RunPaths(root=tmp_path / store / "small" / "0123456789ab") for store in ("a", "b"))
    old.root.mkdir(parents=True)
    run_index.remember_run(old)
    new.root.parent.mkdir(parents=True)
    old.root.rename(new.root)
    run_index.remember_run(new)
    assert run_index.known_runs() == (new,) and run_index.known_runs(gone=True) == ()


def test_a_run_that_is_gone_here_and_there_elsewhere_is_not_told_as_gone(tmp_path: Path) -> None:
    made = [RunPaths(root=tmp_path / store / "small" / "0123456789ab") for store in ("a", "b")]
    for paths in made:
        paths.root.mkdir(parents=True)
        run_index.remember_run(paths)
    shutil.rmtree(made[0].root)
    assert run_index.known_runs() == (made[1],) and run_index.known_runs(gone=True) == ()
