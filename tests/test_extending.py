"""docs/extending.md: what its table names is there, and what it shows works as it is printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.decisions import decide
from sousbatch.checkpoints.retention.policies import AnyOf, KeepLast, RetentionRules
from sousbatch.recipes.stage_kinds import STAGE_KINDS, StageKind
from sousbatch.tracking.base import TRACKERS
from sousbatch.tracking.identity import Identity

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
POINTS = re.findall(r"```ini\n(.*?)```", PAGE, re.DOTALL)[0]
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and "|---" not in line][1:]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the page's code, as pip would."""
    installed = tmp_path / "site" / "kitchen-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kitchen\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(POINTS)
    (installed.parent / "kitchen.py").write_text(CODE)
    monkeypatch.syspath_prepend(installed.parent)
    monkeypatch.delitem(sys.modules, "kitchen", raising=False)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_files_tables_and_tests_of_the_table_are_there(row: str) -> None:
    _, _, file, table, _, test, _ = row.split("|")
    for name in re.findall(r"`([\w/.]+(?:/|\.py|\.yaml))`", file):
        pattern = re.sub(r"NAME|KIND|NOUN", "*", name)
        assert next(ROOT.glob(pattern), None), name
    for symbol, path in re.findall(r"`(\w+)` in `([\w/.]+\.py)`", table):
        assert re.search(rf"^(def )?{symbol}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            symbol,
            path,
        )
    assert all((ROOT / name).exists() for name in re.findall(r"`(tests/[\w/.]+)`", test)), test


@pytest.mark.usefixtures("kitchen")
def test_the_installed_metric_command_and_launcher_are_used(
    sousbatch: Callable[..., tuple[int, str, str]], project: Path
) -> None:
    (project / "made.jsonl").write_text('{"index": 0, "prediction": "답"}\n{"index": 1, "prediction": "답 1 23"}\n')
    (project / "data.jsonl").write_text('{"input": "a", "target": "답"}\n{"input": "b", "target": "답 1"}\n')
    scored = sousbatch(
        "predictions", "score", "made.jsonl", "--data", "data.jsonl", "--metric", "length_error", "--json"
    )
    assert scored[0] == 0 and json.loads(scored[1])["model"] == {"length_error": 1.5}
    assert sousbatch("longest", "made.jsonl") == (0, "답 1 23\n", "")
    code, out, err = sousbatch("plan", "small.yaml", "score.metrics=[length_error]", "--launcher", "quiet", "--json")
    assert code == 0, err
    assert json.loads(out)["site"]["launcher"] == "quiet"


@pytest.mark.usefixtures("kitchen")
def test_the_installed_tracker_shows_a_run(tmp_path: Path) -> None:
    identity = Identity(
        id="r-train",
        name="r",
        group="r",
        job_type="train",
        prefix="",
        notes="",
        project="p",
        entity=None,
        tags=(),
        mode="offline",
        folder=tmp_path,
        part="train-0-1",
        config={},
    )
    tracker = TRACKERS.load("lines")()
    tracker.start(identity)
    tracker.log(1, {"loss": 0.5})
    tracker.finish(0)
    assert (tmp_path / "r-train.txt").read_text() == "1 {'loss': 0.5}\nexit code 0\n"


@pytest.mark.usefixtures("kitchen")
def test_the_policy_and_the_stage_kind_are_values_of_ours() -> None:
    import kitchen  # type: ignore[import-not-found]

    saved = [Checkpoint(path=Path(f"{step}"), step=step, content="full", num_bytes=10) for step in (1, 2, 3)]
    rules = RetentionRules(policy=AnyOf((KeepLast(1), kitchen.KeepFirst())))
    assert [(one.action, one.reason) for one in decide(saved, rules)][0] == ("keep", "where it began")
    assert [one.action for one in decide(saved, rules)] == ["keep", "delete", "keep"]
    assert isinstance(kitchen.EXPORT, StageKind) and kitchen.EXPORT.source in STAGE_KINDS
