"""How a job ends: its exit code says it, also where there is no space to write anything down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch import ledger
from sousbatch.errors import EXIT_NO_ROOM
from sousbatch.jobs.context import run_job
from sousbatch.jobs.score import score
from sousbatch.recipes.plan_summary import read_summary
from sousbatch.run_folder import RunPaths


@pytest.fixture
def few_inodes(mount_tmpfs: Callable[[str], Path]) -> Path:
    """A real file system of 100 inodes."""
    return mount_tmpfs("nr_inodes=100")


def test_a_score_without_an_inode_left_says_that_there_is_no_room(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path, few_inodes: Path
) -> None:
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=few_inodes / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    names = {stage.kind: stage.name for stage in read_summary(paths.plan).stages}
    ledger.open_attempt(paths.ledger_dir, names["score"], 0).close()
    paths.predictions(names["predict"]).mkdir(parents=True)
    rows = "".join(json.dumps({"index": number, "prediction": "답"}) + "\n" for number in range(5))
    (paths.predictions(names["predict"]) / "predictions.jsonl").write_text(rows)
    with pytest.raises(OSError, match="No space"):
        for number in range(100):
            (few_inodes / str(number)).touch()
    assert run_job("score", score, [str(paths.root), names["score"]]) == EXIT_NO_ROOM
