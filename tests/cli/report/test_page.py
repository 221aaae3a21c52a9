"""The page of runs: complete, small, and safe to open whatever stands in a run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Collection
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sousbatch import events, ledger
from sousbatch.checkpoints import commit
from sousbatch.cli.report.facts import Asked
from sousbatch.cli.report.gather import read_run
from sousbatch.cli.report.page import MAX_BYTES, render_page
from sousbatch.events import Ended, Error, Saved, Sent, Started, Step
from sousbatch.files import make_private_dir, write_json
from sousbatch.launchers.freeze import freeze
from sousbatch.launchers.registry import choose_site, launcher_of
from sousbatch.launchers.states import StageState
from sousbatch.launchers.sweep_point import open_point
from sousbatch.recipes.sweep import plan_sweep
from sousbatch.run_folder import RunPaths, run_paths
from sousbatch.run_index import remember_run
from sousbatch.tracking.identity import write_identity
from sousbatch.tracking.wandb_files import Part
from sousbatch.tracking.wandb_files import Sent as Mark

from ...tracking.conftest import make_identity

Run = Callable[..., tuple[int, str, str]]
Make = Callable[..., RunPaths]
_VOID = {"meta", "br"}
_EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Checker(HTMLParser):
    """Fails on a tag that is not closed in order, and keeps all tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(page: str, links: Collection[str] = ()) -> Checker:
    """Return the page, of which nothing of a run is markup, which loads nothing and leads to *links* alone."""
    found = Checker(page)
    assert [tag for tag, _ in found.tags if tag in ("img", "iframe", "link", "object", "base", "form")] == []
    assert [tag for tag, _ in found.tags].count("script") == 1
    names = {name for _, attributes in found.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("style", "src")]
    addresses = [str(attributes["href"]) for tag, attributes in found.tags if tag == "a"]
    assert {address for address in addresses if not address.startswith("./")} == set(links)
    for link in links:
        page = page.replace(escape(link), "")
    policy = next(each["content"] for _, each in found.tags if each.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy) and "unsafe" not in str(policy)
    assert len(page.encode()) < 2_000_000 and "http" not in page.replace("http-equiv", "")
    return found


@pytest.fixture
def make(sousbatch: Run, project: Path, tmp_path: Path) -> Make:
    """Return what makes a run folder with a plan and the values that differ from it."""
    _, out, _ = sousbatch("plan", "small.yaml", "--json")

    def made(run_id: str = "<b>1", **changes: Any) -> RunPaths:
        paths, plan = RunPaths(root=tmp_path / "runs" / "small" / run_id), json.loads(out)
        plan["recipe"]["train"] |= changes
        make_private_dir(paths.root.parent)
        make_private_dir(paths.root)
        write_json(paths.plan, plan)
        return paths

    return made


def page(paths: RunPaths, states: dict[str, StageState] | None = None) -> str:
    """Return the page of one run."""
    return render_page([read_run(paths, states=states or {})], out=paths.report, written_at=0)


def train(paths: RunPaths, *written: events.Event, code: int | None = 0) -> None:
    """Let one attempt at training write events, and end."""
    attempt = ledger.open_attempt(paths.ledger_dir, "train", 0)
    attempt.write(Started(host="node-<7>"))
    job = ledger.open_job(paths.ledger_dir, "train", 0, attempt.number)
    for event in written:
        job.write(event)
    job.close()
    if code is not None:
        attempt.write(Ended(exit_code=code))
    attempt.close()


def saved(step: int, held: int, budget: int = 12_000_000) -> Saved:
    return Saved(step=step, num_bytes=5_000_000, held_bytes=held, budget_bytes=budget)


def test_the_page_stands_alone_and_nothing_of_the_run_is_markup(make: Make) -> None:
    run = make()
    gone = {"step": 1, "num_bytes": 5_000_000, "held_bytes": 5_000_000, "budget_bytes": 12_000_000}
    train(
        run,
        *(Step(step=step, values={"loss": 2.0 / step, "<i>": 1.0}) for step in (1, 2)),
        Step(step=2, values={"eval_loss": float("nan")}),
        *(saved(step, 5_000_000 * step) for step in (1, 2)),
        events.Removed(**gone, reason="older than the last"),
        events.Skipped(step=3, message=f"no space {_EVIL}"),
    )
    run.predictions("predict").mkdir(parents=True)
    run.submission_file("predict", ".csv").touch()
    run.recipe.write_text(f"name: {_EVIL}")
    found = checked(page(run, {"train": StageState(word="failed", reason=_EVIL)}))
    assert found.text.count(_EVIL) == 4, "the banner, the stage, the save, the recipe"
    assert "submission (predict)" in found.text and "submission.csv" in found.text
    assert "10 MB at most of a budget of 12 MB" in found.text
    assert re.search(r"removed at [\d.]+ s: older than the last", found.text)
    charts = [each["aria-label"] for tag, each in found.tags if tag == "svg" and "aria-label" in each]
    assert charts == [
        "Loss",
        "<i>",
        "Examples a second",
        "Stages over time",
        "Storage of train",
        "Checkpoints of train",
    ]


def test_the_places_that_show_a_run_are_linked_where_a_browser_opens_them(make: Make) -> None:
    run = make()
    for url in ("https://host/<b>", "s3://bucket/x", "javascript:alert(1)"):
        train(run, events.Published(url=url))
    write_identity(make_identity(trackers=("wandb", "tensorboard")), run.tracking_dir)
    (run.tracking_dir / "tensorboard").mkdir()
    Part(folder=run.tracking_dir / "wandb/train-0-1").write(Mark())
    text = page(run)
    links = re.search('id="links">.*?<tbody>(.*?)</tbody>', text)
    assert links and re.findall("<tr><td>(.*?)</td></tr>", links[1].replace("</td><td>", "  ")) == [
        "wandb  offline, not yet sent: <code>sousbatch sync &lt;b&gt;1</code>",
        f"tensorboard  <code>tensorboard --logdir &#x27;{escape(str(run.tracking_dir))}/tensorboard&#x27;</code>",
        'published  <a href="https://host/&lt;b&gt;" rel=noreferrer>https://host/&lt;b&gt;</a>',
        "published  <code>s3://bucket/x</code>",
        "published  <code>javascript:alert(1)</code>",
    ]
    checked(text, ["https://host/<b>"])
    assert '<a href="https://host/&lt;b&gt;" rel=noreferrer>published</a></p></header>' in text


def test_a_run_that_has_not_begun_has_a_page(make: Make) -> None:
    assert "keys" not in checked(page(make())).open


def test_a_run_that_failed_says_why_and_what_helps_before_all_else(make: Make) -> None:
    run = make()
    train(run, Error(message="out of memory"), code=1)
    run.log_dir.mkdir()
    run.log("train", 0).write_text(f"first\n{_EVIL}\nlast line")
    state = StageState(word="failed", reason="out of memory", advice="give it less: `train.micro_batch=1`")
    text = page(run, {"train": state})
    found = checked(text)
    assert text.index("train failed") < text.index("<h2>Stages")
    assert "out of memory" in found.text and "last line" in found.text
    assert "<code>train.micro_batch=1</code>" in text


def test_a_run_in_the_queue_says_for_how_long_and_why(make: Make) -> None:
    run = make()
    client = ledger.open_client(run.ledger_dir)
    client.write(Sent(stage="train", key="k", launcher="local", job_id="1"))
    client.close()
    (path,) = run.ledger_dir.iterdir()
    sent = json.loads(path.read_text())
    path.write_text(json.dumps(sent | {"time": time.time() - 7200}) + "\n")
    found = checked(page(run, {"train": StageState(word="waiting", reason="(Priority)")}))
    assert "train waits in the queue for 2 h" in found.text and "(Priority)" in found.text
    assert "waited for devices" in found.text


def test_a_checkpoint_that_is_gone_from_the_folder_is_not_still_there(make: Make) -> None:
    """The process that removed it was killed before it could record that."""
    run = make()
    temporary = commit.begin(run.checkpoints("train"), 2, 1)
    commit.commit(temporary, step=2, attempt=1, metric=None, world_size=1, check_fence=lambda: None)
    train(run, saved(1, 5_000_000), saved(2, 5_000_000))
    rows = re.findall(r"<tr><td class=n data-v=\"(\d)\">.*?<td>([^<]*)</td></tr>", page(run))
    assert rows == [("1", "no longer there"), ("2", "still there")]


@pytest.mark.parametrize(
    ("allowed", "said", "drawn"),
    [
        ([12_000_000, 12_000_000], "10 MB at most of a budget of 12 MB.", {12_000_000}),
        (
            [8_000_000, 16_000_000],
            "10 MB at most; 8 MB to 16 MB were allowed, as free space changed.",
            {8_000_000, 16_000_000},
        ),
        ([90_000_000, 90_000_000], "10 MB at most of a budget of 90 MB.", set()),
    ],
)
def test_a_budget_that_moves_is_drawn_as_it_moved(allowed: list[int], said: str, drawn: set[int], make: Make) -> None:
    run = make()
    train(run, *(saved(step, 5_000_000 * step, budget) for step, budget in enumerate(allowed, 1)))
    text = page(run)
    assert re.findall(r"Held by checkpoints: (.*?)</p>", text) == [said]
    limits = re.findall(r'<path class="line limit" data-label="budget" d="([^"]*)"', text)
    assert {float(y) for path in limits for y in re.findall(r"(?:V|M\S+ )([\d.e+]+)", path)} == drawn


def test_what_is_said_at_every_save_is_one_row_of_the_page(make: Make) -> None:
    run = make()
    kept = [events.Kept(step=1, message="it is damaged")] * 30
    train(run, saved(1, 5), *kept, events.Kept(step=2, message="it is damaged"))
    said = re.findall(r"<td>it is damaged(.*?)</td>", page(run))
    assert len(said) == 2 and said[0].startswith(" (said 30 times, last at ") and said[1] == ""


def score(paths: RunPaths, cer: float, *rows: dict[str, Any], name: str = "score") -> None:
    """Write the scores of a stage, and the rows that it keeps."""
    paths.metrics_dir.mkdir(parents=True, exist_ok=True)
    known = json.loads(paths.metrics.read_text()) if paths.metrics.exists() else {}
    scores = {"model": {"cer": cer}, "copy_input": {"cer": 0.9}}
    write_json(paths.metrics, known | {name: {"split": "test", "num_rows": 9, "scores": scores}})
    stage, _, decoding = name.partition("@")
    paths.stage_examples(stage, decoding).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def row(why: str = "worst", index: int = 7, **texts: Any) -> dict[str, Any]:
    return {"why": why, "index": index, "input": "in", "target": "out", **texts, "scores": {"cer": 0.25}}


def test_rows_of_a_score_stage_are_shown_without_markup_or_marks_of_direction(make: Make) -> None:
    run = make()
    score(run, 0.5, row(input=_EVIL, target="\u05e9\u05dc\u05d5\u05dd\u202e", prediction="\uac00" * 9000))
    text = page(run)
    found = checked(text)
    assert "Worst rows (1)" in found.text and _EVIL in found.text and "0.250" in found.text
    assert "<div dir=auto class=text>\u05e9\u05dc\u05d5\u05dd\\u202e</div>" in text
    assert "show more" in found.text and "(9,000 characters)" in found.text
    assert text.count("\uac00") < 9000


def test_answers_that_are_no_text_are_shown_as_json(make: Make) -> None:
    run = make()
    score(run, 0.5, row(input=None, target=["a", "b"], prediction={"label": "<b>", "odds": 0.5}, id=3))
    text = page(run)
    assert "[&quot;a&quot;, &quot;b&quot;]" in text and "&quot;label&quot;: &quot;&lt;b&gt;&quot;" in text
    assert "<dt>input</dt>" not in text and "id 3" in text


def test_damaged_rows_are_left_out(make: Make) -> None:
    run = make()
    score(run, 0.5, row(prediction="a"))
    with run.stage_examples("score").open("a") as stream:
        stream.write("{damaged")
    assert "Worst rows" not in page(run) and "0.500" in page(run)


def test_decodings_of_a_stage_stand_beside_each_other(make: Make) -> None:
    run = make()
    plan = json.loads(run.plan.read_text())
    for stage in plan["stages"]:
        stage["settings"]["predict"]["decodings"] = {"greedy": {"num_beams": 1}, "beam": {"num_beams": 2}}
    run.plan.write_text(json.dumps(plan))
    for name, cer in (("greedy", 0.5), ("beam", 0.25)):
        score(run, cer, row(prediction=name), name=f"score@{name}")
    text = page(run)
    heads = re.findall(r"<thead><tr>(.*?)</tr>", text)
    assert "<th>score</th><th class=n>greedy</th><th class=n>beam</th><th class=n>copying the input</th>" in heads
    assert "score, greedy" in text and "score, beam" in text


def test_predictions_that_nothing_scored_are_shown_with_their_inputs(make: Make, project: Path) -> None:
    run = make()
    run.predictions("predict").mkdir(parents=True)
    run.predictions_file("predict").write_text(
        '{"index": 0, "prediction": "first"}\n{"index": 1, "prediction": "2nd"}\n'
    )
    found = checked(page(run))
    first = json.loads((project / "test.jsonl").read_text().splitlines()[0])
    assert "Nothing scored these." in found.text and "first" in found.text and first["input"] in found.text


def test_a_run_of_another_version_has_a_page_that_says_so(make: Make) -> None:
    run = make()
    write_json(run.plan, json.loads(run.plan.read_text()) | {"format": 2, "version": "0.3.0"})
    train(run, Step(step=1, values={"loss": 1.0}), saved(1, 5))
    found = checked(page(run))
    assert "was made by sousbatch 0.3.0 with plan format 2" in found.text and "Storage of train" in found.text


def test_a_plan_with_an_unknown_key_hides_no_more_than_itself(make: Make) -> None:
    run = make()
    plan = json.loads(run.plan.read_text())
    plan["recipe"]["unheard_of"] = 1
    write_json(run.plan, plan)
    train(run, saved(1, 5))
    found = checked(page(run))
    assert "unheard_of is not a key" in found.text and "Storage of train" in found.text


def test_two_runs_stand_over_each_other_with_what_sets_them_apart(sousbatch: Run, make: Make, tmp_path: Path) -> None:
    for name, rate, cer in (("aaa", 0.1, 0.5), ("bbb", 0.2, 0.25)):
        run = make(name, learning_rate=rate)
        remember_run(run)
        train(run, *(Step(step=step, values={"loss": rate / step}) for step in (1, 2, 3)))
        score(run, cer, row("random", prediction=f"{name} says {_EVIL}"))
    out = tmp_path / "both.html"
    assert sousbatch("report", "aaa", "bbb", "aaa", "--out", str(out))[:2] == (0, f"{out}\n")
    text = out.read_text()
    found = checked(text)
    assert re.findall(r"<h2>(?!<)([^<]*?) ?<", text)[:6] == [
        *("Runs", "Curves", "Differences", "Time", "The same rows"),
        "learning_rate=0.2",
    ], "the best run comes first"
    assert re.findall(r'<path class="line (k\d)" data-label="(learning_rate=0.\d)"', text)[:2] == [
        ("k1", "learning_rate=0.1"),
        ("k0", "learning_rate=0.2"),
    ]
    assert '<td class=n data-v="0.25"><b>0.250</b></td>' in text and "<td>train.learning_rate</td>" in text
    assert f"aaa says {_EVIL}" in found.text and f"bbb says {_EVIL}" in found.text


def test_a_sweep_shows_the_points_that_have_begun_and_counts_the_others(
    sousbatch: Run, project: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    plan = plan_sweep("small.yaml", [], ["train.learning_rate=0.1,0.2,0.3"], choose_site("local"), runs)
    sweep = run_paths(runs, plan.recipe.name, plan.run_id)
    make_private_dir(sweep.root.parent)
    make_private_dir(sweep.root)
    freeze(plan, launcher_of(plan), sweep)
    remember_run(sweep)
    for index in (0, 1):
        _, point, _ = open_point(plan, sweep, index)
        train(point, Step(step=1, values={"loss": 1.0}), Error(message="no luck"), code=1 if index else None)
    ended = ledger.open_attempt(sweep.ledger_dir, plan.stages[0].name, 1)
    ended.write(Ended(exit_code=1))
    ended.close()
    assert sousbatch("report", plan.run_id)[:2] == (0, f"{sweep.report}\n")
    text = sweep.report.read_text()
    found = checked(text)
    assert f"lost 1 \u00b7 failed 1 \u00b7 waiting 1 \u00b7 {plan.run_id}" in found.text
    status = sousbatch("status", plan.run_id)[1]
    assert re.findall(r"^ +([01]) +(\w+) ", status, re.MULTILINE) == [("0", "lost"), ("1", "failed")]
    assert "\npoint 1: no luck\n" in status and "point 0: " not in status
    assert "no luck" in found.text and f"<code>sousbatch resume {plan.run_id}</code> resumes it" in text
    assert sousbatch("report", str(point.root))[0] == 0
    assert '<h1>small <span class="badge failed">' in point.report.read_text(), "a point that is named by its folder"
    labels = re.findall(r'<path class="line k\d" data-label="([^"]*)"', text)
    assert set(labels) == {"train.learning_rate=0.1", "train.learning_rate=0.2"}


def test_a_sweep_of_which_nothing_has_begun_says_what_it_waits_for(make: Make) -> None:
    asked = Asked(names=("sweep-81d0",), num_waiting=4, notes=(f"sweep-81d0: waiting {_EVIL}",))
    found = checked(render_page([], out=Path("report.html"), written_at=0, asked=asked))
    assert "waiting 4 · sweep-81d0" in found.text and _EVIL in found.text
    run = make()
    train(run, Step(step=1, values={"loss": 1.0}), code=None)
    found = checked(render_page([read_run(run, state="running")], out=run.report, written_at=0, asked=asked))
    assert "running 1 · waiting 4 · sweep-81d0" in found.text


def test_a_hundred_runs_are_one_small_page(sousbatch: Run, make: Make, tmp_path: Path) -> None:
    names = [f"{number:03d}aaa" for number in range(100)]
    for number, name in enumerate(names):
        run = make(name, learning_rate=0.001 * (number + 1))
        train(run, *(Step(step=step, values={"loss": number / step, "grad_norm": 1.0}) for step in range(1, 80)))
        score(run, 1 / (number + 2), row(prediction="x" * 3000))
    out = tmp_path / "page.html"
    began = time.perf_counter()
    assert sousbatch("report", *(str(tmp_path / "runs" / "small" / name) for name in names), "--out", str(out))[0] == 0
    assert time.perf_counter() - began < 20, "it takes 3 s on a machine that does nothing else"
    found = checked(out.read_text())
    lines = [each for tag, each in found.tags if tag == "path" and each.get("class", "").startswith("line ")]  # type: ignore[union-attr]
    assert len(lines) >= 300 and "Best run: " in found.text
    assert "cer by train.learning_rate" in found.text


def test_a_page_that_would_be_too_large_shows_less(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    train(run, *(Step(step=step, values={"loss": 1 + step % 7}) for step in range(1, 3000)))
    score(run, 0.5, row(prediction="x" * 7000, input="y" * 7000))
    whole = page(run)
    assert len(whole) < MAX_BYTES
    monkeypatch.setattr("sousbatch.cli.report.page.MAX_BYTES", len(whole) - 1)
    assert len(page(run)) < len(whole) - 5000
