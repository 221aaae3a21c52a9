"""Real runs through the command line: real torchrun, real DeepSpeed, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

# As small as a chain can be that still trains on two nodes, rotates, predicts in shards and scores.
SMALL = [
    "data.generator.num_train=256",
    "data.generator.num_validation=16",
    "data.generator.num_test=24",
    "train.steps=6",
    "train.global_batch=8",
    "train.micro_batch=4",
    "checkpoints.every_steps=2",
    "predict.unit_rows=5",
    "predict.max_new_tokens=12",
    "tracking.mode=disabled",  # W&B takes seconds of each job to begin and to end
]
TRACKED = [*SMALL, "tracking.mode=offline"]
# One split instead of the demo's two.
FIVE_STAGES = "stages={train: {}, consolidate: {}, predict: {}, merge: {}, score: {}}"
# The two stages that faults of training are about.
ONLY_TRAIN = ["stages={train: {}, consolidate: {}}"]


# What a rank does at a moment that no test could hit from outside. Python imports it at every start, from the run's
# own code folder.
HOOK = """
import os, sys
if "RANK" in os.environ and "sousbatch.jobs.train" in sys.orig_argv:
    import signal, time, transformers, torch
    is_first = os.environ.get("SOUSBATCH_ATTEMPT") == "1"
    true_step = transformers.Trainer.training_step
    def training_step(self, *args, **kwargs):
        step, rank = self.state.global_step, int(os.environ["RANK"])
        WHAT
        return true_step(self, *args, **kwargs)
    transformers.Trainer.training_step = training_step
"""
KILL_A_RANK = (
    "if is_first and sys.argv[-1] == 'train' and rank == 1 and step == 4: os.kill(os.getpid(), signal.SIGKILL)"
)


@dataclass(frozen=True)
class Place:
    """A user's folders, and the command line in them."""

    root: Path
    shell: Mapping[str, str] = field(default_factory=dict)  # more variables

    @property
    def environment(self) -> dict[str, str]:
        own = {"STATE": "state", "CACHE": "cache", "RUNS": "runs"}
        paths = {f"SOUSBATCH_{name}": str(self.root / folder) for name, folder in own.items()}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SOUSBATCH_", "WANDB_"))}
        (self.root / "tmp").mkdir(exist_ok=True)
        own = {"TMPDIR": str(self.root / "tmp"), "TORCH_EXTENSIONS_DIR": str(self.root / "extensions")}
        return kept | paths | own | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | dict(self.shell)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "sousbatch", *arguments],
            env=self.environment,
            cwd=self.root,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
        assert process.returncode == code, f"{arguments} gave {process.returncode}\n{out}\n{err}\n{self.logs()}"
        return subprocess.CompletedProcess(arguments, code, out, err)

    def hook(self, what: str) -> str:
        """Return the override by which each rank does *what*, one line of Python, before each micro-batch."""
        (self.root / "code").mkdir()
        (self.root / "code/sitecustomize.py").write_text(HOOK.replace("WHAT", what))
        return f"environment.code=[{self.root / 'code'}]"

    def run_dir(self) -> Path:
        (plan,) = (self.root / "runs").glob("*/*/plan.json")
        return plan.parent

    def logs(self) -> str:
        paths = sorted((self.root / "runs").glob("*/*/logs/*.log"))
        return "\n".join(f"==> {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = []
        for path in sorted((self.root / "runs").glob("*/*/ledger/*.jsonl")):
            for line in path.read_text().splitlines():
                with suppress(ValueError):  # a line that a kill or a full disk has cut
                    event = json.loads(line)
                    found += [{"file": path.name} | event] if event["kind"] == kind else []
        return found

    def states(self) -> dict[str, dict[str, Any]]:
        (run,) = json.loads(self.run("status", "--json").stdout)
        return {name: stage | {"state": stage["word"]} for name, stage in run["stages"].items()}

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of this place's jobs, of any parent."""
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = str(self.root) in " ".join(process.cmdline())
                if is_ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def kill_all(self) -> None:
        while found := self.processes():
            for process in found:
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    continue


def wait_for(
    condition: Callable[[], Any], what: str, client: subprocess.Popen[str] | None = None, timeout_s: float = 120
) -> Any:
    """Return the first true value of *condition*; fail when none comes in time, or *client* has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert client is None or client.poll() is None, f"{what} did not happen: {client.communicate()[1]}"
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


@contextmanager
def place_at(root: Path, shared_cache: Path) -> Iterator[Place]:
    (root / "cache").symlink_to(shared_cache)
    found = Place(root)
    try:
        yield found
    finally:
        found.kill_all()


@pytest.fixture
def place(tmp_path: Path, shared_cache: Path) -> Iterator[Place]:
    with place_at(tmp_path, shared_cache) as found:
        yield found


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Callable[[], Place]]:
    """Make places for runs that several tests of a module look at; they need one xdist_group."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(place_at(tmp_path_factory.mktemp("shared"), shared_cache))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks at model and data, shared: the first one takes seconds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Train as a request to forked_trainings.py says, and return what it saw."""
    folder = tmp_path_factory.mktemp("forked")
    own = {f"SOUSBATCH_{name}": str(folder / name.lower()) for name in ("STATE", "RUNS", "CACHE")}
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", Path(__file__).with_name("forked_trainings.py"), folder],
        env=os.environ | own | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            print(json.dumps(request), file=process.stdin, flush=True)
            seen = dict(json.loads(process.stdout.readline()))
            assert "failed" not in seen, seen["failed"]
            return seen

        yield ask
        process.stdin.close()


@pytest.fixture(scope="session")
def small() -> list[str]:
    return SMALL


@pytest.fixture(scope="session")
def five_stages() -> str:
    return FIVE_STAGES


@pytest.fixture(scope="session")
def only_train() -> list[str]:
    return SMALL + ONLY_TRAIN


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    return wait_for


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, shared_cache: Path
) -> Iterator[tuple[Place, subprocess.CompletedProcess[str]]]:
    """One run of the whole chain, and what `submit` printed."""
    with place_at(tmp_path_factory.mktemp("finished"), shared_cache) as found:
        yield found, found.run("submit", "hangul-restoration", *TRACKED)
