"""`plan --data` shows the rows as a whole: lengths, what is cut, and rows that training has seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sousbatch.cli.main import main


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["plan", "./small.yaml", "--data", *words]))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_lengths_cuts_and_shared_rows_are_shown(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    rows[0]["input"] = " ".join(["word"] * 60)
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = [{**rows[2], "target": "another"}, rows[3], {"input": "new", "target": "new"}]
    (project / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seen))
    text = _run(capsys, "data.long_rows=cut_left")
    assert "train trains train" in text and "its response" in text and "1 are cut to 32 tokens: " in text
    assert (
        "2 of 3 rows (row 1, 2) have the input of a row of 'train', which is trained on; 1 of them its target" in text
    )
    found = json.loads(_run(capsys, "data.long_rows=cut_left", "--json"))
    assert [one["use"] for one in found] == ["train", "eval", "predict"]
    assert found[0]["cut_rows"] == 1 and found[2]["leaks"][0]["same_target"] == {"num": 1, "first": [2]}


def test_packing_is_shown_where_rows_can_be_packed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "with data.packing " in _run(capsys)
    text = _run(capsys, "task=classification")
    assert "padding is " in text and "data.packing" not in text
    assert "its response" not in text and "all responses" not in text
