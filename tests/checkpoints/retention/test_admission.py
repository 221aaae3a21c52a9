"""How much a save keeps, as sums of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.admission import SaveRequirements, admit
from sousbatch.checkpoints.retention.policies import standard_rules

NEED: dict[str, Any] = {"full_bytes": 100, "weights_bytes": 20}


def full(step: int, **more: Any) -> Checkpoint:
    return Checkpoint(path=Path(f"step-{step}"), step=step, **{"num_bytes": 100, "metric": 1.0} | more)


def light(step: int, **more: Any) -> Checkpoint:
    return full(step, num_bytes=20, content="weights", **more)


BEST = {"metric": 0.5}
CASES: dict[str, tuple[list[Checkpoint], dict[str, Any], int, tuple[str, list[str]]]] = {
    "room for all": ([full(1, **BEST), full(2)], {}, 100, ("full", [])),
    "the best is stripped": ([full(1, **BEST), full(2)], {}, 20, ("full", ["strip 1"])),
    "weights, where no second full state fits": ([full(1)], {}, 60, ("weights", [])),
    "not even weights": ([full(1)], {}, 19, ("none", [])),
    "a full state that stays must leave space for the best, the last and new weights": ([], {}, 159, ("weights", [])),
    "it leaves it": ([], {}, 160, ("full", [])),
    "where training stops, it need only leave the last weights theirs": ([], {"is_stop": True}, 120, ("full", [])),
    "and these it must": ([], {"is_stop": True}, 119, ("weights", [])),
    "the last save needs to leave none": ([], {"is_last": True}, 120, ("full", [])),
    "what follows training counts": ([], {"later_bytes": 10}, 169, ("weights", [])),
    "what follows is left alone by weights, too": ([], {"later_bytes": 150}, 169, ("none", [])),
    "but not by the last ones": ([], {"later_bytes": 150, "is_last": True}, 20, ("weights", [])),
    "older weights go for newer ones": ([light(1, **BEST), light(2), light(3)], {}, 0, ("weights", ["delete 2"])),
}


@pytest.mark.parametrize(("checkpoints", "need", "free", "expected"), CASES.values(), ids=CASES)
def test_the_highest_level_that_fits_is_taken(
    checkpoints: list[Checkpoint], need: dict[str, Any], free: int, expected: tuple[str, list[str]]
) -> None:
    found = admit(checkpoints, standard_rules(), SaveRequirements(**NEED | need), free_bytes=free)
    acts = [f"{one.action} {one.checkpoint.step}" for one in found.decisions]
    assert (found.level, acts) == expected


def test_no_level_above_the_one_asked_for_is_taken() -> None:
    assert admit([], standard_rules(), SaveRequirements(**NEED), free_bytes=1000, highest="weights").level == "weights"


def test_a_pinned_checkpoint_is_room_for_nobody() -> None:
    mine, rules = [full(1, is_pinned=True), full(2)], standard_rules(keep_best=0)
    assert [admit(mine, rules, SaveRequirements(**NEED), free_bytes=free).level for free in (39, 40, 99, 100)] == [
        *("none", "weights"),  # besides this one's, there must be room for those at the end
        *("weights", "full"),
    ]
