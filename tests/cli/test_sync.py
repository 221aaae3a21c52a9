"""`sousbatch sync` sends what ended attempts of runs recorded, and nothing of those that still run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.cli.results import describe_results
from sousbatch.events import Ended, Error, Started
from sousbatch.ledger_queries import endings
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths

TOY = """
from sousbatch.tracking.base import Outcome

class Toy:
    def start(self, identity): pass
    @staticmethod
    def link(folders, run): return f"https://toy/{run.run}" if (folders[0] / "all").exists() else ""
    @staticmethod
    def has_left(folder): return not (folder / "all").exists()
    @staticmethod
    def send(folder, run, endings, *, limit_s, by_itself):
        for part, ending in sorted(endings.items()):
            problem = "no route" if (folder / "no").exists() else ""
            yield Outcome(what=f"{part} {ending.exit_code} {ending.error}", problem=problem)
        (folder / "all").touch()
"""


@pytest.fixture
def run(frozen: Callable[..., RunPaths], third_party: Callable[..., None]) -> RunPaths:
    """A run with an attempt that was killed and one that has no end."""
    third_party("sousbatch.trackers", "toy = toy_module:Toy", TOY)
    paths = frozen("tracking.trackers=[toy]")
    for _ in range(2):
        attempt = ledger.open_attempt(paths.ledger_dir, "train", 0)
        attempt.write(Started(job="1"))
        attempt.close()
    return paths


def test_all_that_ended_is_sent_once_and_told(run: RunPaths, sousbatch: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = sousbatch("sync")
    assert (code, err) == (0, "")
    sent = ["train-0-1 1 it was killed: sent", "train-0-2 1 its job was lost: sent"]
    assert out.splitlines() == [*(f"{run.run_id} {line}" for line in sent), f"{run.run_id}: https://toy/{run.run_id}"]
    assert sousbatch("sync", run.run_id) == (0, "", "sousbatch: nothing is left to send\n")


def test_status_and_results_name_where_a_run_is_shown(
    run: RunPaths, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    assert f"\ntoy  offline, not yet sent: `sousbatch sync {run.run_id}`\n" in sousbatch("status", run.run_id)[1]
    (run.tracking_dir / "all").touch()
    for shown in (sousbatch("status", run.run_id)[1], describe_results(read_plan(run.plan), run)):
        assert f"toy  https://toy/{run.run_id}" in shown.splitlines()


def test_what_cannot_be_sent_is_told_and_the_command_fails(
    run: RunPaths, sousbatch: Callable[..., tuple[int, str, str]]
) -> None:
    (run.tracking_dir / "no").touch()
    code, out, _ = sousbatch("sync", run.run_id[:6])
    assert code == 1 and "train-0-1 1 it was killed: no route" in out


def test_a_missing_key_is_told_once_for_all_runs(
    frozen: Callable[..., RunPaths], sousbatch: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for seed in (1, 2):
        paths = frozen(f"seed={seed}")
        (paths.tracking_dir / "wandb/train-0-1").mkdir(parents=True)
    code, out, _ = sousbatch("sync")
    assert code == 1 and len(out.splitlines()) == 1 and out.startswith("W&B: there is no key for ")


def test_how_attempts_ended_is_read_from_the_ledger(tmp_path: Path) -> None:
    first = ledger.open_attempt(tmp_path, "train", 0)
    first.write(Started(job="1"))
    job = ledger.open_job(tmp_path, "train", 0, 1)
    job.write(Error(message="no memory"))
    first.write(Ended(exit_code=76))
    for one in (first, job):
        one.close()
    for _ in range(2):
        attempt = ledger.open_attempt(tmp_path, "train", 0)
        attempt.write(Started())
        attempt.close()
    assert endings(ledger.read(tmp_path)) == {
        ("train", 0, 1): (76, "no memory"),
        ("train", 0, 2): (1, "it was killed"),
        ("train", 0, 3): None,
    }
