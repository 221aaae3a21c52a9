"""What breaks while a run is under way: nothing is lost, and `resume` ends the run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

SITECUSTOMIZE = """
import os, sys
if os.environ.get("SOUSBATCH_ATTEMPT") == "1" and "RANK" in os.environ:
    import transformers, torch
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory (played by a test)")
    transformers.Trainer.training_step = fail
"""


def ranks(place):
    return [process for process in place.processes() if "sousbatch.jobs.train" in process.cmdline()]


@pytest.mark.parametrize("zero", [3, 0])
def test_a_killed_rank_costs_an_attempt_and_no_accuracy(place, only_train, until, zero):
    """The next attempt goes on, and ends with the loss of a run that nobody killed."""
    arguments = ["submit", "hangul-restoration", *only_train, "train.steps=8", f"train.zero.stage={zero}"]
    client = place.start(*arguments)
    until(lambda: place.events("saved"), "a first checkpoint", client)
    ranks(place)[-1].send_signal(signal.SIGKILL)
    _, err = client.communicate(timeout=300)
    assert client.returncode == 0, err + place.logs()
    assert len(place.events("attempt")) >= 3  # two of train, one of consolidate
    assert place.events("resumed")[0]["step"] >= 2
    if zero == 0:
        return  # one comparison is enough: it takes a second run
    place.run(*arguments, "--again")
    killed, whole = sorted(place.root.glob("runs/*/*/ledger"))
    assert last_loss(killed) == pytest.approx(last_loss(whole), abs=1e-6)


def last_loss(ledger: Path) -> float:
    paths = sorted(ledger.glob("job.train-*"))
    events = [json.loads(line) for line in paths[-1].read_text().splitlines()]
    return [event["eval_loss"] for event in events if event.get("step") == 8 and "eval_loss" in event][-1]


def test_after_kill_9_of_every_process_resume_ends_the_run(place, small, five_stages, until):
    client = place.start("submit", "hangul-restoration", *small, five_stages)
    until(lambda: place.events("saved"), "a first checkpoint", client)
    client.kill()
    client.communicate()
    place.kill_all()
    assert place.states()["train"]["state"] == "lost"
    place.run("resume", "hangul-restoration")
    lines = (place.run_dir() / "predictions/predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(24))


def test_kill_9_of_the_client_leaves_the_jobs_running(place, only_train, until):
    client = place.start("submit", "hangul-restoration", *only_train)
    until(lambda: place.events("attempt"), "the first attempt", client)
    client.kill()
    client.communicate()
    second = place.run("submit", "hangul-restoration", *only_train)
    assert "under way already" in second.stderr
    until(lambda: all(stage["state"] == "done" for stage in place.states().values()), "the end of the run")
    assert len(place.events("attempt")) == 2


def test_ctrl_c_saves_stops_and_leaves_no_process(place, only_train, until):
    client = place.start("submit", "hangul-restoration", *only_train, "train.steps=400", "checkpoints.every_steps=400")
    until(
        lambda: any("step 10 of" in path.read_text() for path in place.root.glob("runs/*/*/logs/train*")),
        "ten steps",
        client,
    )
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=120)
    assert client.returncode == 1, err
    assert "stopping after saving" in err and "sousbatch resume" in err
    (saved,) = place.events("saved")
    assert 10 <= saved["step"] < 400
    assert place.states()["train"]["state"] == "stopped"
    assert place.processes() == []


def test_cancel_ends_all_at_once(place, only_train, until):
    place.run("submit", "hangul-restoration", *only_train, "train.steps=400", "--detach")
    until(lambda: ranks(place), "the ranks")
    place.run("cancel", "hangul-restoration")
    until(lambda: not place.processes(), "the end of all processes", timeout_s=30)
    assert {stage["state"] for stage in place.states().values()} == {"cancelled"}


def test_out_of_device_memory_halves_the_micro_batch_and_keeps_the_global_one(place, only_train, tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    (code / "sitecustomize.py").write_text(SITECUSTOMIZE)
    place.run("submit", "hangul-restoration", *only_train, f"environment.code=[{code}]", "train.steps=2")
    sizes = [
        (event["micro_batch"], event["accumulation"]) for event in place.events("attempt") if "micro_batch" in event
    ]
    assert sizes == [(4, 1), (2, 2)]
