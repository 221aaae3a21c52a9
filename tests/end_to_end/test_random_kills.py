"""kill -9 of everything at random moments: `resume` still gives every row once."""

from __future__ import annotations

import json
import random
import time

import pytest

from .conftest import wait_for


@pytest.mark.faults
def test_after_five_random_kills_every_row_is_there_once(place, small, five_stages):
    chance = random.Random(20261122)
    arguments = ["submit", "hangul-restoration", *small, five_stages, "predict.unit_rows=3"]
    moments = []
    for _ in range(5):
        client = place.start(*arguments)
        moments.append(chance.uniform(2, 25))
        time.sleep(moments[-1])
        client.kill()
        client.communicate()
        place.kill_all()
        if list((place.root / "runs").glob("*/*/plan.json")):
            arguments = ["resume", place.run_dir().name]
    place.run(*arguments)
    lines = (place.run_dir() / "predictions/predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(24)), moments
    wait_for(lambda: not place.processes(), "the end of all processes", timeout_s=10)
