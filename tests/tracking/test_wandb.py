"""W&B's names are known in one module only."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sousbatch.tracking.base import Ending, Outcome, Place, Trackers, doubts, has_left, places, send_left, start
from sousbatch.tracking.identity import write_identity
from sousbatch.tracking.wandb import _variables
from sousbatch.tracking.wandb_files import Part, Sent, only_writer
from sousbatch.tracking.wandb_server import Arrived, OutOfReachError, find_server

from .conftest import RUN, make_identity
from .stand_in import KEY, StandIn

ROOT = Path(__file__).parents[2]
# Where else the name may stand, and why.
ALLOWED = {
    **{str(path.relative_to(ROOT)): "what is W&B's own" for path in ROOT.glob("tracking/wandb*.py")},
    "tracking/base.py": "the table",
    "recipes/schema/execution.py": "help of the keys",
    "recipes/schema/rules.py": "a W&B key written into the recipe is refused",
    "recipes/inspect/cache.py": "a folder that is no code of the user",
    "redaction.py": "what a key looks like",
    "cli/doctor.py": "what is installed, and whether there is a key",
    "cli/dashboards.py": "help of a command, and where a key comes from",
    "cli/main.py": "help of a command",
}


def test_no_other_module_knows_wandb() -> None:
    sources = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks")]
    named = {
        str(path.relative_to(ROOT))
        for path in sources
        if not path.relative_to(ROOT).parts[0].startswith((".", "build"))
        and re.search(r"wandb|w&b", path.read_text(encoding="utf-8"), re.IGNORECASE)
    }
    assert named == ALLOWED.keys()


@pytest.mark.parametrize("task, wanted", [(None, "0123456789ab-train"), (3, "0123456789ab-train-3")], ids=str)
def test_the_variables_are_those_of_the_identity(task: int | None, wanted: str, tmp_path: Path) -> None:
    identity = make_identity(per="task", tags=("a", "b"), entity="our-team").of_task(
        "train", "train", task, tmp_path, 1
    )
    found = _variables(identity)
    named = ("RUN_ID", "RUN_GROUP", "NAME", "JOB_TYPE", "PROJECT", "ENTITY", "TAGS", "RESUME", "DIR")
    assert [found[f"WANDB_{name}"] for name in named] == [
        *(
            wanted,
            "toy-0123456789ab",
            "toy 012345 train",
            "train",
            "our-project",
            "our-team",
            "a,b",
            "allow",
        ),
        str(tmp_path / f"wandb/train-{task or 0}-1"),
    ]


def test_without_tags_and_entity_those_of_the_shell_stay(tmp_path: Path) -> None:
    found = _variables(make_identity().of_task("train", "train", None, tmp_path, 1))
    assert not found.keys() & {"WANDB_TAGS", "WANDB_ENTITY"}


ATTEMPT = """
import os, sys, time
from pathlib import Path
from sousbatch.tracking.base import Trackers, start
folder, attempt, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
trackers, began = Trackers(), time.monotonic()
start(trackers, folder, stage="train", kind="train", task=None, attempt=attempt)
print(time.monotonic() - began)
for step in range(first, first + 5):
    trackers.log(step, {"loss": 1 / (step + 1)})
if end == "killed":
    time.sleep(1.5)  # its file is written each second
    os.kill(os.getpid(), 9)
if end == "preempted":  # Slurm's SIGTERM reaches W&B's own process, too
    import psutil
    [service] = [one for one in psutil.Process().children() if "wandb-core" in one.name()]
    service.terminate()
    service.wait()
    for step in range(first + 5, first + 7):
        trackers.log(step, {"loss": 1 / (step + 1)})
    end = "75"
if end == "stop":
    while not trackers.wants_stop():
        time.sleep(0.1)
began = time.monotonic()
trackers.finish(0 if end == "silent" else int(end))
print(time.monotonic() - began)
"""


def attempt(folder: Path, number: int, first: int, end: str) -> tuple[list[float], str]:
    """Run an attempt in a process of its own; return how long its start and its end took, and what it warned of."""
    words = [sys.executable, "-c", ATTEMPT, str(folder), str(number), str(first), end]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    return [float(line) for line in done.stdout.split()], done.stderr


def mark(folder: Path, number: int) -> Sent | None:
    return Part(folder=folder / f"wandb/train-0-{number}").read()


def test_attempts_are_one_run_online_also_when_one_was_killed(tracked: Callable[..., Path], server: StandIn) -> None:
    folder = tracked(mode="auto")
    attempt(folder, 1, 0, "killed")
    assert attempt(folder, 2, 3, "preempted")[1] == ""  # it repeats two steps
    assert attempt(folder, 3, 10, "0")[1] == ""
    (run,) = server.runs.values()
    page = f"{server.url}/team/our-project/runs/{RUN}"
    assert places([folder]) == [Place(tracker="wandb", link=page)]
    assert places([folder, folder]) == [Place(tracker="wandb", link=f"{server.url}/team/our-project")]
    assert [row["train/step"] for row in run.rows] == list(range(15)) == [row["_step"] for row in run.rows]
    ends = [(end["preempting"], end["exitcode"]) for end in run.endings if end["exitcode"] is None or end["complete"]]
    assert ends[-3:] == [(True, None), (None, 75), (None, 0)]
    assert [mark(folder, number) for number in (1, 2, 3)] == [Sent(arrived=5, is_done=True)] * 3
    holding = [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []


@pytest.mark.parametrize("fault, why", [("refused", "refuses the key"), ("errors", "answers 500")])
def test_a_server_that_is_of_no_use_makes_an_attempt_offline(
    tracked: Callable[..., Path], server: StandIn, fault: str, why: str
) -> None:
    server.fault = fault
    folder = tracked(mode="online")
    (start_s, end_s), said = attempt(folder, 1, 0, "0")
    assert said.count(why) == 1 and f"`sousbatch sync {RUN}` sends it" in said
    assert start_s < 20 and end_s < 5 and mark(folder, 1) == Sent()


def test_a_server_that_goes_away_at_the_end_holds_nobody(
    tracked: Callable[..., Path], server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
    server.rows_before_fault = (1, "silent")
    folder = tracked(mode="auto")
    (_, end_s), said = attempt(folder, 1, 0, "silent")
    assert end_s < 10 and "does not answer within 3 s" in said
    sent = mark(folder, 1)
    assert sent is not None and sent.base == 0 and not sent.is_done


def test_an_attempt_is_offline_while_another_task_of_the_run_is_online(
    tracked: Callable[..., Path], server: StandIn
) -> None:
    folder = tracked(mode="auto")
    with only_writer(folder, RUN):
        _, said = attempt(folder, 1, 0, "0")
    assert "another task of the run is online" in said and not server.runs


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_environment_decides_where_the_recipe_leaves_it_open(
    tracked: Callable[..., Path], server: StandIn, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert attempt(tracked(mode="auto"), 1, 0, "0")[1] == ""
    assert server.asked == {}


def test_without_a_route_a_look_takes_no_longer_than_three_seconds(server: StandIn) -> None:
    for variables, why in [
        ({"WANDB_BASE_URL": "http://name.invalid"}, "cannot be reached"),
        ({"WANDB_BASE_URL": f"http://127.0.0.1:{_closed_port()}"}, "cannot be reached: "),
        ({"WANDB_BASE_URL": server.url}, "does not answer within 3 s"),
    ]:
        server.fault, began = "silent", time.monotonic()
        with pytest.raises(OutOfReachError, match=why):
            find_server(variables | {"WANDB_API_KEY": KEY}).look("p", None, RUN)
        assert time.monotonic() - began < 3.5


def _closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("machine", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_key_of_the_public_server_is_found_under_both_of_its_names(machine: str, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine {machine} login user password {KEY}\n")
    found = find_server({"HOME": str(tmp_path)})
    assert (found.url, found.key) == ("https://api.wandb.ai", KEY)


def test_a_key_comes_from_a_variable_from_netrc_or_from_an_identity_file(server: StandIn, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server.url}\n")
    (home / "token").write_text("a.b.c\n")
    with pytest.raises(OutOfReachError, match="there is no key for 127.0.0.1"):
        find_server({"HOME": str(home)})
    (home / ".netrc").write_text(f"machine {server.url.removeprefix('http://')} login user password {KEY}\n")
    by_file = {"HOME": str(home), "WANDB_IDENTITY_TOKEN_FILE": str(home / "token")}
    for variables in ({"HOME": str(home)}, {"HOME": str(home), "WANDB_API_KEY": KEY}, by_file):
        found = find_server(variables)
        assert found.url == server.url and found.look("p", None, RUN) == Arrived(num_rows=0)
        assert KEY not in repr(found)


CONTENT = """
import sys
from pathlib import Path
from sousbatch.tracking.base import Artifact, Trackers, start
folder, trackers = Path(sys.argv[1]), Trackers()
start(trackers, folder, stage="score", kind="score", task=None, attempt=1)
trackers.table("samples", ("input", "bleu"), [(f"text {number}", number / 7) for number in range(1500)])
for kind, is_made in (("data", False), ("predictions", True), ("model", True)):
    path = folder.parent / f"{kind}.txt"
    path.write_text(kind)
    facts = {"rows": 3}
    one = Artifact(name=f"toy {kind}", kind=kind, path=path, digest="d" * 64, is_made=is_made, facts=facts)
    trackers.artifact(one)
trackers.alert("done", "toy: score done", "all stages are done")
trackers.finish(0)
"""


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_tables_artifacts_and_alerts_arrive_online_and_by_a_sync(
    tracked: Callable[..., Path], server: StandIn, mode: str
) -> None:
    folder = tracked(mode=mode, alerts=("done",), uploads=("model",))
    done = subprocess.run([sys.executable, "-c", CONTENT, str(folder)], capture_output=True, text=True, cwd=folder)
    assert done.stderr == ""
    sent = list(send_left(folder, {"score-0-1": Ending(exit_code=0)}, limit_s=60))
    assert sent == ([] if mode == "online" else [Outcome(what="score-0-1")])
    run = server.runs[RUN]
    (name,) = [name for name in run.files if name.endswith(".table.json")]
    table = json.loads(run.files[name])
    assert table["columns"] == ["input", "bleu"] and len(table["data"]) == 1000 and table["data"][7] == ["text 7", 1.0]
    assert [row["score/samples"]["nrows"] for row in run.rows] == [1000]
    assert [alert["title"] for alert in run.alerts] == ["toy: score done"]
    by_kind = {one["artifactTypeName"]: one for one in server.artifacts}
    facts = {"digest": "d" * 64, "path": str(folder.parent / "predictions.txt"), "rows": 3}
    assert json.loads(by_kind["predictions"]["metadata"]) == facts
    (entry,) = by_kind["predictions"]["manifest"]["contents"].values()
    assert entry["ref"] == (folder.parent / "predictions.txt").as_uri()
    (entry,) = by_kind["model"]["manifest"]["contents"].values()
    assert "ref" not in entry and by_kind["model"]["artifactCollectionName"] == "toy-model"
    assert server.used == [by_kind["data"]["id"]]


def test_the_stop_button_is_told_to_the_job(tracked: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own process calls it: seen by hand within 15 s of the button."""
    given: dict[str, Any] = {}

    class Run:
        summary = config = property(lambda self: self)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: given.setdefault("calls", []).append(name)

    fake = SimpleNamespace(Settings=SimpleNamespace, init=lambda **options: given.update(options) or Run())
    monkeypatch.setattr("os.environ", {"WANDB_CONSOLE": "auto"})
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers = Trackers()
    start(trackers, tracked(), stage="train", kind="train", task=None, attempt=1)
    assert not trackers.wants_stop()
    given["settings"].stop_fn()
    assert trackers.wants_stop()
    trackers.finish(75)
    assert given["calls"][-1] == "finish" and "mark_preempting" not in given["calls"]
    assert os.environ["WANDB_CONSOLE"] == "auto" and os.environ["WANDB_SILENT"] == "true"


NODE = """
import sys
from pathlib import Path
from sousbatch.tracking.base import Trackers, start
folder, node, trackers = Path(sys.argv[1]), int(sys.argv[2]), Trackers()
start(trackers, folder, stage="train", kind="train", task=None, attempt=1, node=node)
if not node:
    trackers.log(1, {"loss": 1.0})
sys.stdin.read()
trackers.finish(0)
"""


@pytest.mark.parametrize("mode, said", [("online", "offline;"), ("shared", "offline; the metrics of other nodes")])
def test_a_missing_key_is_told_before_a_job_starts(mode: str, said: str, tmp_path: Path) -> None:
    (warning,) = doubts(["wandb", "tensorboard"], mode, {"HOME": str(tmp_path)})
    assert warning.startswith(f"tracking.mode={mode}: there is no key for ") and f"jobs will record {said}" in warning
    assert "\n" not in warning and "`wandb login`" in warning
    assert doubts(["wandb"], mode, {"HOME": str(tmp_path), "WANDB_API_KEY": KEY}) == []
    assert doubts(["wandb"], "auto", {"HOME": str(tmp_path)}, ["done"]) == [], "most people have no account"


@pytest.mark.parametrize(("names", "mode"), [(["tensorboard"], "auto"), ([], "auto"), (["wandb"], "disabled")])
def test_alerts_that_nobody_sends_are_told(names: list[str], mode: str) -> None:
    (warning,) = doubts(names, mode, {}, ["done", "failed"])
    assert warning == "tracking.alerts=[done,failed]: no tracker of this run sends them; wandb does"


@pytest.mark.parametrize("mode", ["shared", "online"])
def test_every_node_shows_what_it_measures_where_that_is_asked_for(
    tracked: Callable[..., Path], server: StandIn, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")
    folder = tracked(mode=mode)
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, str(folder), str(node)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
        )
        for node in (0, 1)
    ]

    def labels() -> set[str]:
        events = server.runs[RUN].events if RUN in server.runs else []
        return {name.rpartition("/l:")[2] for event in list(events) for name in event if "/l:" in name}

    expected, deadline = {"node0", "node1"} if mode == "shared" else set(), time.monotonic() + 60
    while not (RUN in server.runs and labels() >= expected) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [one.communicate()[1] for one in nodes] == [b"", b""]
    run = server.runs[RUN]
    assert labels() == expected
    assert [row["train/step"] for row in run.rows] == [1] and not has_left(folder)


FULL = """
import sys
from pathlib import Path
from sousbatch.tracking.base import Trackers, start
folder, trackers = Path(sys.argv[1]), Trackers()
start(trackers, folder, stage="train", kind="train", task=None, attempt=1)
assert trackers
try:
    with (folder / "fill").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(512))
except OSError:
    pass
for step in range(300):
    trackers.log(step, {"loss": "x" * 1000})
trackers.finish(0)
print("done")
"""


def test_a_disk_that_is_full_costs_the_job_nothing(mount_tmpfs: Callable[[str], Path]) -> None:
    folder = mount_tmpfs("size=300k") / "tracking"
    write_identity(make_identity(), folder)
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")
