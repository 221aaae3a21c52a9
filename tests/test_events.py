"""The events of a ledger: what is written, what is read, and what the documentation says of them."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sousbatch import ledger
from sousbatch.errors import NotFoundError, UsageError
from sousbatch.events import KINDS, Error, Event, Kept, Problem, Removed, Retention, Saved, Step, of

DOCUMENT = Path(__file__).parents[1] / "docs" / "run-folder.md"
_PLACE = {one.name for one in fields(Event)}


def written(folder: Path, event: Event) -> dict[str, Any]:
    """Return the line that an event becomes."""
    writer = ledger.open_job(folder, "train", 0, 1)
    writer.write(event)
    writer.close()
    line: dict[str, Any] = json.loads(writer.path.read_text().splitlines()[-1])
    return line


def test_the_documentation_names_every_kind_with_its_fields() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [\w, ]+ \| ([^|]*) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    own = {kind: {one.name for one in fields(cls)} - _PLACE for kind, cls in KINDS.items()}
    for kind in ("intent", "sent", "adopted", "cancel"):
        own[kind].add("stage")
    assert {kind: set(re.findall(r"`(\w+)`", names)) for kind, names in rows} == own


def test_what_has_no_value_is_not_written(tmp_path: Path) -> None:
    line = written(tmp_path, Saved(step=3, num_bytes=10))
    assert set(line) == {"sequence", "time", "kind", "step", "num_bytes"}
    line = written(tmp_path, Step(step=3, values={"loss": 1.5, "learning_rate": 0.1}))
    assert (line["kind"], line["step"], line["loss"], line["learning_rate"]) == ("step", 3, 1.5, 0.1)


def test_an_older_line_with_empty_values_and_a_newer_one_with_more_are_read(tmp_path: Path) -> None:
    writer = ledger.open_client(tmp_path)
    head = '{"sequence": 0, "time": 1.5, "kind": '
    with writer.path.open("a") as stream:
        stream.write(f'{head}"saved", "stage": "train", "step": 1, "metric": null, "budget_bytes": null}}\n')
        stream.write(f'{head}"saved", "stage": "train", "step": 2, "colour": "green"}}\n')
        stream.write(f'{head}"painted", "stage": ["x"], "step": "two"}}\n')
    writer.close()
    reader = ledger.LedgerReader(tmp_path)
    assert [(one.step, one.metric, one.stage) for one in of(reader.poll(), Saved)] == [
        (1, None, "train"),
        (2, None, "train"),
    ]
    assert reader.damage == "", "a kind that is unknown here may be a newer version's"


def test_events_are_chosen_by_class_and_base_class() -> None:
    found = [Saved(step=1), Kept(step=1), Problem(message="x"), Removed(step=2)]
    assert of(found, Problem) == [Problem(message="x")]
    assert of(found, Retention) == [Kept(step=1), Removed(step=2)]
    assert of(found, Saved, Retention) == [Saved(step=1), Kept(step=1), Removed(step=2)]


@pytest.mark.parametrize(
    "error, message, advice",
    [
        (NotFoundError("a\n  b"), "a b", None),
        (UsageError("a", advice="try b"), "a", "try b"),
        (ValueError("hf_" + "x" * 20), "ValueError: <secret>", None),
    ],
)
def test_an_error_is_one_line_without_secrets(error: Exception, message: str, advice: str | None) -> None:
    event = Error.of_exception(error, exit_code=3)
    assert (event.message, event.advice, event.exit_code) == (message, advice, 3)
