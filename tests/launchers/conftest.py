"""A plan made by hand, small file systems, waiting with a deadline, and stages as jobs of a private Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sousbatch import ledger
from sousbatch.cluster.sandbox import build, lifecycle
from sousbatch.cluster.site import Site
from sousbatch.cluster.slurm_site import read_site
from sousbatch.events import Event
from sousbatch.launchers.slurm.launcher import SlurmLauncher
from sousbatch.launchers.states import StageState, is_final
from sousbatch.launchers.status import job_refs, run_states
from sousbatch.launchers.submission import submit
from sousbatch.recipes.compile import stage_model
from sousbatch.recipes.facts import DiskSpace, Inputs, ModelFacts
from sousbatch.recipes.inspect.cache import code_digest_of
from sousbatch.recipes.inspect.model import model_digest
from sousbatch.recipes.plan import After, Batch, Forecast, Plan, Stage
from sousbatch.recipes.schema import Environment, Model, Recipe, Resources, StageSpec

DEADLINE_S = 120
CPU = Resources(device="cpu")
HERE = Site(name="here", launcher="local", cpus_per_node=2, memory_bytes=1, gpus_per_node=0, gpu_memory_bytes=0)


def make_plan(
    stages: Sequence[Stage],
    environment: Environment | None = None,
    site: Site = HERE,
    **recipe: Any,
) -> Plan:
    """Return a plan of *stages* that no model or data stands behind."""
    environment = environment or Environment()
    code = code_digest_of([Path(folder) for folder in environment.code])
    model = ModelFacts(
        folder="/",
        tokenizer_folder="/",
        digest=model_digest(Path("/"), Path("/"), {}),
        has_weights=True,
        num_params=1,
        tensors=(),
        config={},
    )
    return Plan(
        recipe=Recipe(name="toy", model=Model(path="/"), environment=environment, **recipe),
        site=site,
        inputs=Inputs(
            model=model,
            splits={},
            disk_space=DiskSpace(folder="/", free_bytes=1, free_inodes=1),
            code_digest=code,
        ),
        stages=tuple(replace(stage, model=stage_model(model, None)) for stage in stages),
        forecast=Forecast(storage=(), storage_peak_bytes=0, device={}),
    )


@pytest.fixture(name="make_plan")
def _make_plan() -> Callable[..., Plan]:
    return make_plan


def until(claim: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Return the first true value of *claim*, or fail after *timeout_s*; a Slurm of others may limit our rate."""
    deadline = time.monotonic() + timeout_s * (5 if "SOUSBATCH_TEST_SANDBOX" in os.environ else 1)
    while not (value := claim()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    return value


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until


def living(word: str) -> list[psutil.Process]:
    """Return the processes that have *word* in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if word in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(name="living")
def _living() -> Callable[[str], list[psutil.Process]]:
    return living


@pytest.fixture
def small_disk(mount_tmpfs: Callable[[str], Path]) -> Path:
    """A file system of 512 KiB."""
    return mount_tmpfs("size=512k")


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 30  # a job's process records the end a moment before its own
    while (left := living(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        process.kill()
    assert not left, f"processes outlived the test: {left}"


# Stages as jobs of a private Slurm. The jobs themselves are small stand-ins.

# Python imports it at every start, from the run's own code folder: it runs `job.py` in place of a job.
HOOK = """
import os, runpy
_run_module = runpy.run_module
def run_module(name, *args, **kwargs):
    if name in ("sousbatch.jobs.train", "sousbatch.jobs.predict"):
        return runpy.run_path(os.path.join(os.path.dirname(__file__), "job.py"), run_name="__main__")
    return _run_module(name, *args, **kwargs)
runpy.run_module = run_module
"""
# A step takes 0.1 s; all ranks look at the flag at each, and rank 0 saves and leaves with 75. Until it has done all
# its steps, or the file `enough` is there.
JOB = """
import os, pathlib, sys, time
from sousbatch import events, ledger
from sousbatch.cluster import processes
root, name, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
attempt, task = int(os.environ["SOUSBATCH_ATTEMPT"]), int(os.environ["SOUSBATCH_TASK"])
flag, place = pathlib.Path(os.environ["SOUSBATCH_STOP_FLAG"]), root / f"step-{name}-{task}"
(root / "ranks").mkdir(exist_ok=True)
facts = [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME")]
(root / "ranks" / f"{attempt}.{rank}").write_text(" ".join(facts))
step = int(place.read_text()) if place.exists() else 0
print(f"rank {rank} begins at step {step}", flush=True)
def save():
    if rank == 0:
        try:
            ledger.check_fence(root / "ledger", name, task, attempt)
        except Exception as error:
            (root / f"refused-{attempt}").write_text(str(error))
            raise
        place.write_text(str(step))
        writer = ledger.open_job(root / "ledger", name, task, attempt)
        writer.write(events.Saved(step=step))
        writer.close()
INSTEAD
goal = STEPS
while step < goal and not (root / "enough").exists():
    time.sleep(0.1)
    step += 1
    if flag.exists():
        save()
        processes.leave(75 if rank == 0 else 0)  # as the real jobs do
    if step % EVERY == 0:
        save()
"""
BATCH = Batch(
    world_size=2, micro_batch=4, accumulation=1, steps=10, steps_per_epoch=10, warmup_steps=0, save_every_steps=5
)
ONE_NODE = Resources(device="cpu", time_min=5)


class Desk:
    """A run on the private Slurm, and what a person or the site does to it."""

    def __init__(self, plan: Plan, runs: Path) -> None:
        self.launcher = SlurmLauncher()
        self.plan, self.paths = plan, submit(plan, self.launcher, runs).paths

    @property
    def states(self) -> dict[str, StageState]:
        return run_states(self.plan, self.paths, self.launcher)

    def slurm(self, *words: str) -> str:
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout

    def job(self, stage: str = "train") -> str:
        return job_refs(ledger.read(self.paths.ledger_dir))[stage].job_id

    def events(self, kind: str, stage: str = "train") -> list[Event]:
        return [one for one in ledger.read(self.paths.ledger_dir) if one.kind == kind and one.stage == stage]

    def log(self, stage: str = "train", task: int = 0) -> str:
        path = self.paths.log(stage, task)
        return path.read_text() if path.exists() else ""

    def wait_until_saved(self, times: int = 1, stage: str = "train") -> None:
        until(lambda: len(self.events("saved", stage)) >= times)

    def wait_until_begun(self, times: int = 1, stage: str = "train") -> None:
        until(lambda: self.log(stage).count("rank 0 begins") >= times)

    def end(self, timeout_s: float = 60) -> dict[str, str]:
        until(lambda: is_final(self.states), timeout_s)
        return {name: state.word for name, state in self.states.items()}


def make_stage(name: str, *after: After, kind: Any = "train", tasks: int = 1, resources: Resources = ONE_NODE) -> Stage:
    batch = BATCH if kind == "train" else None
    return Stage(name=name, kind=kind, of=None, resources=resources, num_tasks=tasks, after=after, batch=batch)


@pytest.fixture(name="make_stage")
def _make_stage() -> Callable[..., Stage]:
    return make_stage


@pytest.fixture
def write_job(tmp_path: Path) -> Callable[..., Path]:
    """Write the stand-in for jobs into a folder of code and return it."""

    def write(*, steps: int = 60, every: int = 5, job: str = "", code: str = "standin") -> Path:
        folder = tmp_path / code
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        text = JOB.replace("STEPS", str(steps)).replace("EVERY", str(every)).replace("INSTEAD", job)
        (folder / "job.py").write_text(text)
        return folder

    return write


@pytest.fixture
def standin_plan(slurm: object, write_job: Callable[..., Path]) -> Callable[..., Plan]:
    """Return the plan of a stage `train`, and others, whose jobs are stand-ins."""

    def plan_of(
        *stages: Stage, resources: Resources = ONE_NODE, environment: Environment | None = None, **job: Any
    ) -> Plan:
        train = make_stage("train", resources=resources)
        specs = {stage.name: StageSpec(kind=stage.kind) for stage in (train, *stages)}
        environment = replace(environment or Environment(), code=(str(write_job(**job)),))
        plan = make_plan([train, *stages], environment, site=read_site())
        return replace(plan, recipe=replace(plan.recipe, stages=specs))

    return plan_of


@pytest.fixture
def start(standin_plan: Callable[..., Plan], tmp_path: Path) -> Callable[..., Desk]:
    def _start(*stages: Stage, runs: Path | None = None, **options: Any) -> Desk:
        return Desk(standin_plan(*stages, **options), runs or tmp_path / "runs")

    return _start


@pytest.fixture
def desk_of(slurm: object, tmp_path: Path) -> Callable[..., Desk]:
    """Submit a plan that is there already."""
    return lambda plan: Desk(plan, tmp_path / "runs")


@pytest.fixture
def another_slurm(
    slurm: object, slurm_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Start a private Slurm of the test's own, to set otherwise or to break, and return its folder."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-"))

    def start_another(*, accounting: bool = False, **settings: str) -> Path:
        if missing := build.missing_packages(accounting=accounting):
            pytest.skip(f"needs {', '.join(missing)}")
        box = lifecycle.start(folder, accounting=accounting, settings=slurm_settings | settings)
        own.setenv("SLURM_CONF", str(box.conf))
        return folder

    with monkeypatch.context() as own:
        yield start_another
    lifecycle.stop(folder)
    shutil.rmtree(folder, ignore_errors=True)
