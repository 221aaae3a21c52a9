"""Which rows share an example: every row once, no example too long, nearly no padding, the same every time."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from sousbatch.recipes.data.packing import PACKABLE, for_use, num_blocks, pack_refusal, packs_of
from sousbatch.recipes.schema import Data, Model, StageSettings
from sousbatch.recipes.tasks import task_faults

ROWS = StageSettings(data=Data(packing="rows"))


def test_every_row_is_in_one_pack_and_packs_are_nearly_full() -> None:
    chance = random.Random(0)
    lengths = [min(512, 3 + int(chance.lognormvariate(4.3, 0.9))) for _ in range(20_000)]
    packs = list(packs_of(lengths, 512))
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert max(sum(lengths[row] for row in pack) for pack in packs) <= 512
    assert len(packs) <= 1.01 * math.ceil(sum(lengths) / 512)
    assert packs == list(packs_of(lengths, 512))


@pytest.mark.parametrize(("lengths", "num"), [([], 0), ([8], 1), ([8, 8], 2), ([5, 3, 4, 4], 2), ([1] * 17, 3)])
def test_few_rows_are_packed_as_well_as_they_can_be(lengths: list[int], num: int) -> None:
    assert len(list(packs_of(lengths, 8))) == num


def test_rows_that_lie_sorted_in_the_file_are_mixed() -> None:
    packs = list(packs_of([100] * 10_000 + [400] * 10_000, 500))
    assert len(packs) < 10_400  # each long one with a short one, but for what the windows differ by


def test_blocks_lose_no_token_but_a_last_one_alone() -> None:
    assert [num_blocks(tokens, 8) for tokens in (0, 1, 2, 8, 9, 10, 16)] == [0, 0, 1, 1, 1, 2, 2]


def test_rows_to_measure_stay_apart_but_for_plain_text() -> None:
    blocks = StageSettings(data=Data(packing="blocks", prompt=""))
    found = {(s.data.packing, use): for_use(s, use).data.packing for s in (ROWS, blocks) for use in ("train", "eval")}
    assert found == {
        ("rows", "train"): "rows",
        ("rows", "eval"): "none",
        ("blocks", "train"): "blocks",
        ("blocks", "eval"): "blocks",
    }
    assert for_use(ROWS, "predict").data.packing == "none"


@pytest.mark.parametrize("kind", ["mamba", "bloom", "opt", "t5", None])
def test_a_model_that_is_not_known_to_keep_rows_apart_is_refused(kind: str | None) -> None:
    assert kind not in PACKABLE
    said = pack_refusal(ROWS, {"model_type": kind}) or ""
    assert f"model type {kind!r}" in said and "set data.packing=none" in said
    assert pack_refusal(StageSettings(), {"model_type": kind}) is None
    assert pack_refusal(ROWS, {"model_type": "llama"}) is None


def test_a_model_with_code_of_its_own_is_refused() -> None:
    settings = replace(ROWS, model=Model(trust_remote_code=True))
    assert "code of its own" in (pack_refusal(settings, {"model_type": "llama", "auto_map": {"": ""}}) or "")


def test_blocks_are_of_plain_text() -> None:
    settings = StageSettings(data=Data(packing="blocks"))
    assert [(fault.key, fault.hint) for fault in task_faults(settings, ["train"])] == [
        ("data.packing", "set data.prompt='', or data.packing=rows")
    ]
