"""Carrying decisions out: what goes is gone, what is not ours stays, a fenced attempt removes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.consolidation import output
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.checkpoints.retention.decisions import RetentionDecision, decide
from sousbatch.checkpoints.retention.policies import RetentionRules, standard_rules
from sousbatch.checkpoints.rotation import RemovalOptions, RetentionResult, carry_out, strip_to_weights
from sousbatch.errors import FencedError

LAST = standard_rules(keep_last=1, keep_best=0)


def no_fence() -> None:
    pass


def make(folder: Path, steps: Sequence[int], write: Callable[[Path], object] | None = None) -> list[Checkpoint]:
    found = []
    for step in steps:
        temporary = commit.begin(folder, step, 1)
        (write or (lambda path: (path / "weights").write_bytes(b"x" * 100)))(temporary)
        found.append(commit.commit(temporary, step=step, attempt=1, metric=None, world_size=1, check_fence=no_fence))
    return found


def rotate(
    folder: Path, rules: RetentionRules = LAST, fence: Callable[[], None] = no_fence, url: str = ""
) -> list[RetentionResult]:
    return list(
        carry_out(decide(commit.list_checkpoints(folder), rules), RemovalOptions(check_fence=fence, archive_url=url))
    )


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_model(folder: Path) -> None:
    """A checkpoint without DeepSpeed: a model, its config, and an optimizer beside it."""
    import torch
    from safetensors.torch import save_file

    save_file({"a.weight": torch.arange(6.0).reshape(2, 3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "optimizer.pt").write_bytes(bytes(100_000))


def test_what_the_policy_lets_go_is_removed_and_returned(tmp_path: Path) -> None:
    make(tmp_path, [1, 2, 3])
    assert [(done.checkpoint.step, done.outcome) for done in rotate(tmp_path)] == [(1, "removed"), (2, "removed")]
    assert names(tmp_path) == ["step-00000003"]
    assert rotate(tmp_path) == []


def test_third_party_folders_and_links_stay(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, [5])
    folder = tmp_path / "train"
    make(folder, [10, 20])
    for name in ("checkpoint-5", "global_step7", "notes", "step-00000001"):
        (folder / name).mkdir()
    (folder / "step-00000005").symlink_to(elsewhere / "step-00000005")
    assert [one.status for one in commit.list_checkpoints(folder) if one.step == 5] == ["third-party", "third-party"]
    rotate(folder)
    kept = ["checkpoint-5", "global_step7", "notes", "step-00000001", "step-00000005", "step-00000020"]
    assert names(folder) == kept
    assert commit.verify(commit.read_checkpoint(elsewhere / "step-00000005")) == ()


def test_a_fenced_attempt_removes_nothing_more(tmp_path: Path) -> None:
    make(tmp_path, [1, 2, 3])
    answers = iter([None, None, FencedError("replaced")])

    def fence() -> None:
        if (answer := next(answers)) is not None:
            raise answer

    with pytest.raises(FencedError):
        rotate(tmp_path, fence=fence)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_removal_that_was_killed_half_way_is_no_checkpoint_and_goes_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, [1, 2])

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        rotate(tmp_path)
    assert [one.step for one in commit.committed(tmp_path)] == [2]
    make(tmp_path, [3])
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_busy_file_keeps_no_checkpoint_in_sight_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that another host has open under a name of its own."""
    make(tmp_path, [1, 2])

    def busy(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    (done,) = rotate(tmp_path)
    assert (done.outcome, "not empty" in done.problem) == ("kept", True)
    assert [one.step for one in commit.committed(tmp_path)] == [2]


def test_thinning_leaves_weights_that_consolidate_to_the_same_numbers(tmp_path: Path) -> None:
    full, newest = make(tmp_path, [1, 2], write_model)
    decisions = [RetentionDecision(checkpoint=full, action="strip", reason="among the best")]
    assert [done.outcome for done in carry_out(decisions, RemovalOptions(check_fence=no_fence))] == ["thinned"]
    assert names(tmp_path) == ["step-00000001-weights", "step-00000002"]
    light = commit.list_checkpoints(tmp_path)[0]
    assert (light.step, light.attempt, light.content, light.metric) == (1, 1, "weights", None)
    assert light.num_bytes < 5_000 < full.num_bytes
    assert commit.verify(light) == ()
    (tensor,) = open_source(light.path).tensors
    assert (tensor.name, tensor.shape, tensor.dtype) == ("a.weight", (2, 3), "float16")


def test_a_thinned_adapter_keeps_the_configuration_of_the_model_that_it_was_trained_in(tmp_path: Path) -> None:
    """Its base's knows neither the labels of the training data nor the tokens that were added."""
    trained = {"model_type": "electra", "id2label": {"0": "bad", "1": "fair", "2": "good"}, "vocab_size": 103}

    def write_adapter(folder: Path) -> None:
        write_model(folder)
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        (folder / "config.json").write_text(json.dumps(trained))

    full, _ = make(tmp_path, [1, 2], write_adapter)
    light = strip_to_weights(full, RemovalOptions(check_fence=no_fence, dtype="float32"))
    assert json.loads((light.path / "config.json").read_text()) == trained
    assert open_source(light.path).content == "adapter"


def test_what_cannot_be_thinned_stays_whole(tmp_path: Path) -> None:
    (full, _) = make(tmp_path, [1, 2])
    decisions = [RetentionDecision(checkpoint=full, action="strip", reason="")]
    (done,) = carry_out(decisions, RemovalOptions(check_fence=no_fence))
    assert (done.outcome, "holds no checkpoint" in done.problem) == ("kept", True)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_thinning_that_finds_no_room_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of several files that does not fit whole would be kept for resuming, and thinning never resumes."""
    full, _ = make(tmp_path, [1, 2], write_model)

    def half(source: object, out: Path, *_: object) -> None:
        (output.work_dir(out) / "records").mkdir(parents=True)
        (output.work_dir(out) / "records" / "1.json").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sousbatch.checkpoints.consolidation.consolidate.consolidate", half)
    with pytest.raises(OSError):
        strip_to_weights(full, RemovalOptions(check_fence=no_fence))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["step-00000001", "step-00000002"]


def test_thinning_that_was_cut_off_before_the_full_one_went_is_begun_again(tmp_path: Path) -> None:
    full, _ = make(tmp_path, [1, 2], write_model)
    strip_to_weights(full, RemovalOptions(check_fence=no_fence))
    assert names(tmp_path) == ["step-00000001", "step-00000001-weights", "step-00000002"]
    rotate(tmp_path, standard_rules(keep_last=2))
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", ["../step-00000002/weights", "/etc/passwd", "a/../../b", ".."])
def test_a_marker_that_names_what_lies_outside_is_damaged(name: str, tmp_path: Path) -> None:
    (made, _) = make(tmp_path, [1, 2])
    marker = made.path / commit.MARKER
    marker.write_text(marker.read_text().replace('"weights"', json.dumps(name), 1))
    incomplete, whole = commit.list_checkpoints(tmp_path)
    assert (incomplete.status, whole.status) == ("incomplete", "committed")
    assert f"it names {name!r}" in commit.verify(incomplete)[0]
    rotate(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_what_links_in_a_checkpoint_lead_to_stays_when_it_goes(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("x")

    def linked(folder: Path) -> None:
        (folder / "folder").symlink_to(tmp_path / "elsewhere")
        (folder / "file").symlink_to(tmp_path / "elsewhere" / "precious")

    make(tmp_path / "train", [1, 2], linked)
    rotate(tmp_path / "train")
    (tmp_path / "train" / ".tmp-step-00000009").symlink_to(tmp_path / "elsewhere")
    commit.sweep(tmp_path / "train")
    assert names(tmp_path / "train") == ["step-00000002"]
    assert (tmp_path / "elsewhere" / "precious").read_text() == "x"
