"""What a private Slurm starts again and again is one run at a stand-in for W&B, and no key of it is written anywhere.

The jobs are stand-ins, too, which show their steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sousbatch.recipes.schema import Environment, Resources
from sousbatch.tracking.base import has_left

from ...tracking.stand_in import StandIn

Start = Callable[..., Any]
pytestmark = pytest.mark.faults

# It saves each fifth step. On even attempts it does not look whether it is asked to stop, so that it is killed.
TRACKED = """
from sousbatch.jobs.context import read_context
trackers = read_context(sys.argv[1:]).open_trackers() if rank == 0 else None
while not (root / "enough").exists():
    time.sleep(0.05)
    step += 1
    if trackers:
        trackers.log(step, {"loss": 1 / step})
    if flag.exists() and attempt % 2:
        save()
        if trackers:
            trackers.finish(75)
        sys.exit(75 if rank == 0 else 0)
    if step % 5 == 0:
        save()
if trackers:
    trackers.finish(0)
sys.exit(0)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    found = StandIn()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in (found.variables() | {"WANDB_MODE": "online"}).items():
        monkeypatch.setenv(name, value)
    yield found
    found.close()


@pytest.fixture
def tracked(start: Start) -> Start:
    environment = Environment(inherit=("WANDB_API_KEY",))
    return lambda **options: start(
        resources=Resources(device="cpu", time_min=5), environment=environment, job=TRACKED, **options
    )


def test_ten_requeues_each_to_another_node_are_one_run_with_each_step_once(
    tracked: Start, server: StandIn, until: Start, sousbatch: Start
) -> None:
    desk = tracked()
    nodes = []
    for number in range(1, 11):
        until(lambda number=number: desk.log().count("rank 0 begins") == number)
        before = len(desk.events("saved"))
        until(lambda before=before: len(desk.events("saved")) > before + 1)
        nodes.append((desk.paths.root / f"ranks/{number}.0").read_text().split()[-1])
        desk.slurm("scontrol", "requeue", desk.job())
        desk.slurm("scontrol", "update", f"JobId={desk.job()}", f"ExcNodeList={nodes[-1]}")
    until(lambda: desk.log().count("rank 0 begins") == 11)
    (desk.paths.root / "enough").touch()
    assert desk.end() == {"train": "done"}
    assert nodes == ["n1", "n2"] * 5
    until(lambda: desk.slurm("squeue", "--noheader") == "")
    assert sousbatch("sync")[0] == 0 and not has_left(desk.paths.tracking_dir)
    (run,) = server.runs.values()
    last = int((desk.paths.root / "step-train-0").read_text())
    steps = sorted(row["train/step"] for row in run.rows)
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= last


KEY, TOKEN = "5e5a" * 10, "ZXlK.b3Blbi1zZXNhbWU.c2lnbmF0dXJl"


@pytest.mark.parametrize("given", ["by ~/.netrc", "by an inherited variable", "by an identity file"])
def test_a_key_is_written_nowhere(
    another_slurm: Start,
    tracked: Start,
    server: StandIn,
    until: Start,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    slurm, home = another_slurm(accounting=True), tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if given != "by an inherited variable":
        monkeypatch.delenv("WANDB_API_KEY")
    if given == "by ~/.netrc":
        host = server.url.removeprefix("http://")
        (home / ".netrc").write_text(f"machine {host} login user password {KEY}\n")
        (home / ".netrc").chmod(0o600)
    if given == "by an identity file":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(home / "token"))
    desk = tracked()
    until(lambda: any(run.rows for run in server.runs.values()))
    job = desk.job()
    said = [
        desk.slurm("scontrol", "show", "job", "--details", job),
        desk.slurm("scontrol", "write", "batch_script", job, "-"),
    ]
    held = holding(tmp_path, slurm)
    (desk.paths.root / "enough").touch()
    assert desk.end() == {"train": "done"}
    said.append(desk.slurm("sacct", "--parsable2", "--allusers", "--format=ALL"))
    assert job in said[-1]
    assert not any(secret in text for text in said for secret in (KEY, TOKEN))
    held |= holding(tmp_path, slurm)
    # Slurm keeps there what a job is given of the shell: docs/slurm.md says so
    assert {path.name for path in held} == ({"environment"} if given == "by an inherited variable" else set())


def holding(*folders: Path) -> set[Path]:
    """Return the files that hold a secret, without those that a person wrote it into."""
    found = set()
    for path in (path for folder in folders for path in folder.rglob("*") if "home" not in path.parts):
        try:
            if path.is_file() and any(secret.encode() in path.read_bytes() for secret in (KEY, TOKEN)):
                found.add(path)
        except FileNotFoundError:  # of what runs
            continue
    return found
