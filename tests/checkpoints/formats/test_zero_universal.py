"""What ds_to_universal.py makes of a checkpoint converts to the same model as the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import DamagedError, IncompleteError

CASES = ("z3_bf16", "z3_frozen_3_ranks", "z2_frozen_fp16", "z2_tied")
Weights = Callable[[Path], dict[str, torch.Tensor]]


@pytest.mark.parametrize("below", ["", "global_step1_universal"])
@pytest.mark.parametrize("case", CASES)
def test_it_converts_to_the_bits_of_the_checkpoint_that_it_was_made_of(
    case: str, below: str, cases: Path, tmp_path: Path, weights: Weights
) -> None:
    source = open_source(cases / case / "universal" / below)
    assert (source.kind, source.step) == ("DeepSpeed universal checkpoint", 1)
    consolidate(source, tmp_path / "universal")
    consolidate(open_source(cases / case / "ck"), tmp_path / "zero")
    found, expected = weights(tmp_path / "universal"), weights(tmp_path / "zero")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def universal(cases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cases / "z3_bf16" / "universal" / "global_step1_universal", tmp_path / "universal"))


def test_a_parameter_without_a_folder_is_named(universal: Path) -> None:
    shutil.rmtree(universal / "zero" / "lm_head.weight")
    with pytest.raises(IncompleteError, match=r"no folder of 1 parameters: lm_head\.weight"):
        open_source(universal)


def test_a_parameter_of_the_wrong_size_is_named(universal: Path) -> None:
    torch.save(torch.zeros(5), universal / "zero" / "lm_head.weight" / "fp32.pt")
    with pytest.raises(DamagedError, match="holds 5 elements for 'lm_head.weight'"):
        open_source(universal)


def test_a_file_that_holds_no_tensor_is_named(universal: Path) -> None:
    torch.save({"other": 3}, universal / "zero" / "lm_head.weight" / "fp32.pt")
    with pytest.raises(DamagedError, match="lm_head.weight/fp32.pt: holds no tensor of a parameter"):
        open_source(universal)
