"""Rows with the texts that break shard files: Hangul, newlines, quotes, U+2028 and more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.units import open_layout, write_unit

KEY = "key-of-these-predictions"
TEXTS = (
    "방이 깨끗하고 직원분들이 친절해요",
    "줄을\n바꾸고\r\n또 바꿔요",
    '그는 "좋아요, 정말"이라고 했다',
    "U+2028\u2028과 U+0085\u0085는 줄이 아니다",
    'a row in a text: {"index": 3, "prediction": "x"}',
    "",
    "이모지 👩‍👩‍👧 \\n 역슬래시, 쉼표",
)
Row = dict[str, Any]


def make_rows(first: int, stop: int) -> list[Row]:
    return [{"index": i, "prediction": f"{TEXTS[i % len(TEXTS)]} #{i}", "score": i / 7} for i in range(first, stop)]


def as_rows(rows: list[Row]) -> list[PredictionRow]:
    return [PredictionRow.from_json(row, position=number) for number, row in enumerate(rows)]


def json_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


@pytest.fixture(name="make_rows")
def _make_rows() -> Callable[[int, int], list[Row]]:
    return make_rows


@pytest.fixture(name="json_line")
def _json_line() -> Callable[[Row], bytes]:
    return json_line


@pytest.fixture
def key() -> str:
    return KEY


@pytest.fixture
def predicted(tmp_path: Path) -> Path:
    """A folder with all 5 units of 22 rows."""
    folder = tmp_path / KEY
    layout = open_layout(folder, KEY, 22, 5)
    for number in range(layout.num_units):
        rows = layout.rows_of(number)
        write_unit(folder, layout, number, as_rows(make_rows(rows.start, rows.stop)), KEY, 1, number % 2)
    return folder
