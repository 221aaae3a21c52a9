"""A checkpoint of ours with a damaged, swapped or missing rank file: `verify` and consolidation name it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.archive import upload
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.integrity import open_verified
from sousbatch.checkpoints.retention.decisions import RetentionDecision
from sousbatch.checkpoints.rotation import RemovalOptions, carry_out, strip_to_weights
from sousbatch.cli.main import main
from sousbatch.errors import DamagedError
from sousbatch.remote import parse_place

RANK_1 = "global_step1/zero_pp_rank_1_mp_rank_00_optim_states.pt"
RANK_0 = RANK_1.replace("rank_1", "rank_0")


@pytest.fixture
def made(tmp_path: Path, write_zero3: Callable[..., Path]) -> Checkpoint:
    """Two checkpoints of one training, and of them the newer; another attempt took the other at the same step."""
    shapes = {"a.weight": (30, 20), "b.weight": (5,)}
    for step, factor in ((100, 2.0), (200, 1.0)):
        temporary = commit.begin(tmp_path / "train", step, 1)
        for file in write_zero3(tmp_path / str(step), shapes=shapes, world_size=2).rglob("*_states.pt"):
            state = torch.load(file)
            for master in state.get("optimizer_state_dict", {}).get("fp32_flat_groups", ()):
                master *= factor
            with file.open("wb") as stream:  # as our own saving does, so that the file does not hold its name
                torch.save(state, stream)
        shutil.copytree(tmp_path / str(step), temporary, dirs_exist_ok=True)
        (temporary / "expected.pt").unlink()
        (temporary / "config.json").write_text("{}")
        made = commit.commit(temporary, step=step, attempt=1, metric=None, world_size=2, check_fence=lambda: None)
    return made


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    """Flip a bit of the master weights."""
    master = torch.load(path)["optimizer_state_dict"]["fp32_flat_groups"][0].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(master) + 202] ^= 4
    path.write_bytes(data)


def swap(path: Path) -> None:
    """Exchange the files of two ranks: of the same size and step, each whole in itself."""
    other = path.with_name(path.name.replace("rank_1", "rank_0"))
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def take_from_another_step(path: Path) -> None:
    """Take the same rank's file out of another checkpoint; here the optimizers' counts agree."""
    shutil.copyfile(Path(str(path).replace("step-00000200", "step-00000100")), path)


DAMAGES = [truncate, remove, flip, swap, take_from_another_step]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_rank_file_is_named_by_verify_and_by_consolidate(
    damage: Callable[[Path], None], made: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate = ["checkpoints", "consolidate", str(made.path), str(tmp_path / "model")]
    assert (main(["checkpoints", "verify", str(made.path)]), main(consolidate)) == (0, 0)
    shutil.rmtree(tmp_path / "model")
    damage(made.path / RANK_1)
    capsys.readouterr()
    assert main(["checkpoints", "verify", str(made.path)]) == 1
    assert "rank_1_mp_rank_00_optim_states.pt" in capsys.readouterr().out
    assert main(consolidate) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and not (tmp_path / "model").exists()
    missing = "optim_states of rank 1 of 2 missing"
    assert (missing if damage is remove else RANK_0 if damage is swap else RANK_1) in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_thinned(damage: Callable[[Path], None], made: Checkpoint) -> None:
    damage(made.path / RANK_1)
    decision = RetentionDecision(checkpoint=made, action="strip", reason="")
    (done,) = carry_out([decision], RemovalOptions(check_fence=lambda: None))
    assert done.outcome == "kept" and "optim_states" in done.problem
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["step-00000100", "step-00000200"]


def test_an_archived_one_is_compared_with_its_marker_too(made: Checkpoint) -> None:
    store = fsspec.filesystem("memory")
    upload(made, "memory://old", lambda: None)
    url, folder = "memory://old/step-00000200", "/old/step-00000200"
    assert len(open_verified(parse_place(url)).tensors) == 2
    store.pipe_file(f"{folder}/{RANK_0}", store.cat_file(f"{folder}/{RANK_1}"))
    with pytest.raises(DamagedError, match=f"{RANK_0}: is another file than was committed"):
        open_verified(parse_place(url))
    store.rm("/old", recursive=True)


def test_without_deepspeed_a_flipped_bit_is_found_by_the_markers_digest(tmp_path: Path) -> None:
    """safetensors has no checksums."""
    temporary = commit.begin(tmp_path, 7, 1)
    save_file({"a.weight": torch.arange(600.0)}, temporary / "model.safetensors")
    made = commit.commit(temporary, step=7, attempt=1, metric=None, world_size=1, check_fence=lambda: None)
    assert len(open_verified(made.path).tensors) == 1
    data = bytearray((made.path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (made.path / "model.safetensors").write_bytes(data)
    assert load_file(made.path / "model.safetensors")
    with pytest.raises(DamagedError, match="model.safetensors: is another file than was committed"):
        open_verified(made.path)


def test_what_consolidation_does_not_read_may_be_gone(made: Checkpoint) -> None:
    """Somebody who needs room may have removed another rank's states of the model."""
    (made.path / RANK_1.replace("optim", "model")).write_bytes(b"")
    assert len(open_verified(made.path / "global_step1").tensors) == 2


def test_a_flipped_bit_of_thinned_weights_is_found_by_consolidate(
    made: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    light = strip_to_weights(made, RemovalOptions(check_fence=lambda: None))
    assert light.path.name == "step-00000200-weights"
    consolidate = ["checkpoints", "consolidate", str(light.path), str(tmp_path / "model")]
    data = bytearray((light.path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (light.path / "model.safetensors").write_bytes(data)
    assert main(consolidate) == 1 and not (tmp_path / "model").exists()
    assert "model.safetensors: is another file than was committed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["step-00000020", ".tmp-step-00000020.0001", ".tmp-step-00000020.0a1b2c3d"])
@pytest.mark.parametrize("below", ["", "global_step1"])
def test_what_a_killed_save_or_removal_left_makes_no_model(
    name: str, below: str, tmp_path: Path, write_zero3: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_zero3(tmp_path / name, shapes={"a.weight": (3, 2)}, world_size=2)
    if name.startswith(".tmp-"):
        (path / commit.MARKER).write_text("{}")  # the last that is written before the rename, and goes with the rest
    assert main(["checkpoints", "consolidate", str(path / below), str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert f"{path}: was never committed" in said and "rename it if another trainer wrote it" in said


@pytest.mark.parametrize(
    ("spoil", "code", "said"),
    [
        (lambda path: None, 0, ": intact\n"),
        (Path.unlink, 1, "optim_states of rank 1 of 2 missing"),
        (
            lambda path: path.rename(path.with_name("mp_rank_01_model_states.pt")),
            0,
            ": intact, judged by its files alone",
        ),
    ],
    ids=["intact", "incomplete", "tensor parallel"],
)
def test_verify_opens_what_another_trainer_wrote(
    spoil: Callable[[Path], object],
    code: int,
    said: str,
    tmp_path: Path,
    write_zero3: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_zero3(tmp_path / "checkpoint-5", shapes={"a.weight": (3, 2)}, world_size=2)
    spoil(path / RANK_1)
    assert main(["checkpoints", "verify", str(tmp_path)]) == code
    assert said in capsys.readouterr().out
