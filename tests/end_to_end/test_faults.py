"""What breaks while a run is under way: nothing is lost, and `resume` ends the run."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from .conftest import KILL_A_RANK


def ranks(place):
    return [process for process in place.processes() if "sousbatch.jobs.train" in process.cmdline()]


@pytest.mark.xdist_group("finished")
def test_a_killed_rank_costs_an_attempt_and_no_accuracy(finished, place, only_train):
    """The next attempt resumes, and ends with the loss of a run without a kill."""
    place.run("submit", "hangul-restoration", *only_train, place.hook(KILL_A_RANK))
    assert len(place.events("attempt")) == 3  # two of train, one of consolidate
    assert place.events("resumed")[0]["step"] >= 2
    intact, _ = finished
    assert last_loss(place.run_dir()) == pytest.approx(last_loss(intact.run_dir()), abs=1e-6)


def last_loss(run: Path) -> float:
    """Return the loss of step 6; an attempt that found all committed already measures nothing."""
    paths = sorted((run / "ledger").glob("job.train-*"))
    events = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [event["eval_loss"] for event in events if event.get("step") == 6 and "eval_loss" in event][-1]


def test_a_smoke_run_goes_on_without_its_client_and_after_kill_9_of_every_process_resume_ends_it(
    place, five_stages, until
):
    """All is killed in a training that has saved, and in a prediction that has written some of its rows."""
    changes = [five_stages, "predict.unit_rows=1", "tracking.mode=disabled"]
    arguments = ["submit", "hangul-restoration", "--smoke", *changes]
    client = place.start(*arguments)
    until(lambda: place.events("attempt"), "the first attempt", client)
    client.kill()
    client.communicate()
    assert "under way already" in place.run(*arguments, "--detach").stderr
    until(lambda: place.events("saved"), "a save without the client")
    assert len(place.events("attempt")) == 1
    place.kill_all()
    assert place.states()["train"]["state"] == "lost"
    client = place.start("resume", "hangul-restoration")
    until(lambda: place.events("unit"), "the first unit", client)
    client.kill()
    client.communicate()
    place.kill_all()
    assert place.states()["predict"]["state"] == "lost"
    place.run("resume", "hangul-restoration")
    lines = (place.run_dir() / "predictions/predict/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(8))
    assert "8 rows of test\n" in place.run(*arguments).stdout


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
    assert "stopping after a save" in err and "sousbatch resume" in err
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
