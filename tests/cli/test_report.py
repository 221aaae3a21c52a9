"""The page of a run: what became of each checkpoint, from events alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sousbatch import events, ledger
from sousbatch.checkpoints import commit
from sousbatch.cli.report import render_page
from sousbatch.launchers.states import StageState
from sousbatch.recipes.plan import read_plan
from sousbatch.run_folder import RunPaths


class Checker(HTMLParser):
    """Fails on a tag that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "rect", "line", "path", "polyline", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def run(sousbatch: Callable[..., tuple[int, str, str]], project: Path, tmp_path: Path) -> RunPaths:
    _, out, _ = sousbatch("plan", "small.yaml", "--json")
    paths = RunPaths(root=tmp_path / "runs" / "small" / "<b>1")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    return paths


def test_the_page_stands_alone_and_nothing_of_the_run_is_markup(run: RunPaths) -> None:
    writer = ledger.open_job(run.ledger_dir, "train", 0, 1)
    for step in (1, 2):
        values = {"loss": 2.0 / step, "eval_loss": float("nan") if step == 1 else 1.5}
        writer.write(events.Step(step=step, values=values))
        writer.write(events.Saved(step=step, num_bytes=5_000_000, held_bytes=5_000_000 * step, budget_bytes=12_000_000))
    gone = {"step": 1, "num_bytes": 5_000_000, "held_bytes": 5_000_000, "budget_bytes": 12_000_000}
    writer.write(events.Removed(**gone, reason="older than the last"))
    writer.write(events.Skipped(step=3, message="no space <script>alert(1)</script>"))
    writer.close()
    run.predictions("predict").mkdir(parents=True)
    run.submission_file("predict", ".csv").touch()
    text = render_page(read_plan(run.plan), run, {"train": StageState(word="failed", reason="<i>")})
    assert "submission (predict)" in text and "submission.csv" in text
    checker = Checker()
    checker.feed(text)
    assert checker.open == ["html", "body"] or checker.open == []
    assert re.findall(r"https?://|src=|href=|@import|<script|<i>", text) == []
    assert "10 MB at most of a budget of 12 MB" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<polyline") == 2
    assert text.count("removed at 0 s: older than the last") == 2, "in the table, and beside the bar"


def test_a_run_that_has_not_begun_has_a_page(run: RunPaths) -> None:
    assert "<h2>Stages</h2>" in render_page(read_plan(run.plan), run, {})


def storage(text: str) -> str:
    """Return the sentence on what was held and allowed."""
    return re.findall(r"Held by checkpoints: (.*?)</p>", text)[0]


def test_a_checkpoint_that_is_gone_from_the_folder_is_not_still_there(run: RunPaths) -> None:
    """The process that removed it was killed before it could record that."""
    temporary = commit.begin(run.checkpoints("train"), 2, 1)
    commit.commit(temporary, step=2, attempt=1, metric=None, world_size=1, check_fence=lambda: None)
    writer = ledger.open_job(run.ledger_dir, "train", 0, 1)
    for step in (1, 2):
        writer.write(events.Saved(step=step, num_bytes=5_000_000, held_bytes=5_000_000, budget_bytes=12_000_000))
    writer.close()
    rows = re.findall(r"<tr><td>(\d)</td>.*?<td>([^<]*)</td></tr>", render_page(read_plan(run.plan), run, {}))
    assert rows == [("1", "no longer there"), ("2", "still there")]


@pytest.mark.parametrize(
    ("allowed", "said", "height"),
    [
        ([12_000_000, 12_000_000], "10 MB at most of a budget of 12 MB.", {14.0}),
        ([8_000_000, 16_000_000], "10 MB at most; 8 MB to 16 MB were allowed, as free space changed.", {97.0, 14.0}),
        ([90_000_000, 90_000_000], "10 MB at most of a budget of 90 MB.", set()),
    ],
)
def test_a_budget_that_moves_is_drawn_as_it_moved(
    allowed: list[int], said: str, height: set[float], run: RunPaths
) -> None:
    writer = ledger.open_job(run.ledger_dir, "train", 0, 1)
    for step, budget in enumerate(allowed, 1):
        writer.write(events.Saved(step=step, num_bytes=5_000_000, held_bytes=5_000_000 * step, budget_bytes=budget))
    writer.close()
    text = render_page(read_plan(run.plan), run, {})
    assert storage(text) == said
    limits = re.findall(r'<path d="([^"]*)" fill=none stroke="var\(--limit\)"', text)
    assert {float(y) for path in limits for y in re.findall(r"V([\d.]+)", path)} == height


def test_what_is_said_at_every_save_is_one_row_of_the_page(run: RunPaths) -> None:
    writer = ledger.open_job(run.ledger_dir, "train", 0, 1)
    writer.write(events.Saved(step=1, num_bytes=5, held_bytes=5, budget_bytes=9))
    for _ in range(30):
        writer.write(events.Kept(step=1, message="it is damaged"))
    writer.write(events.Kept(step=2, message="it is damaged"))
    writer.close()
    text = render_page(read_plan(run.plan), run, {})
    assert re.findall(r"<td>it is damaged(.*?)</td>", text) == [" (said 30 times, last at 0 s)", ""]


def test_rows_of_a_score_stage_are_shown_without_markup_or_marks_of_direction(run: RunPaths) -> None:
    run.metrics_dir.mkdir(parents=True)
    scores = {"score": {"split": "test", "num_rows": 9, "scores": {"model": {"cer": 0.5}}}}
    run.metrics.write_text(json.dumps(scores))
    texts = {"input": "<script>alert(1)</script>", "target": "שלום\u202e", "prediction": "가" * 5000}
    row = {"why": "worst", "index": 7, **texts, "scores": {"cer": 0.25}}
    run.stage_examples("score").write_text(json.dumps(row) + "\n{damaged")
    assert "worst rows" not in render_page(read_plan(run.plan), run, {})
    run.stage_examples("score").write_text(json.dumps(row) + "\n")
    text = render_page(read_plan(run.plan), run, {})
    Checker().feed(text)
    assert "worst rows of score" in text and "&lt;script&gt;alert(1)" in text and "<script>" not in text
    assert "<td dir=auto class=text>שלום\\u202e</td>" in text and "(5,000 characters)" in text and "0.250" in text
