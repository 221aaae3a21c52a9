"""A plan made by hand, small file systems, and waiting with a deadline."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from sousbatch.cluster.site import Site
from sousbatch.recipes.inputs import code_digest_of
from sousbatch.recipes.models import model_digest
from sousbatch.recipes.plan import Forecast, Inputs, ModelFacts, Plan, Room, SplitFacts, Stage
from sousbatch.recipes.schema import Environment, Model, Recipe, Resources

DEADLINE_S = 30.0
CPU = Resources(device="cpu")
HERE = Site(name="here", launcher="local", cpus_per_node=2, memory_bytes=1, gpus_per_node=0, gpu_memory_bytes=0)


def make_plan(
    stages: Sequence[Stage],
    environment: Environment | None = None,
    splits: dict[str, SplitFacts] | None = None,
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
            model=model, splits=splits or {}, room=Room(folder="/", free_bytes=1, free_inodes=1), code_digest=code
        ),
        stages=tuple(stages),
        forecast=Forecast(storage=(), storage_peak_bytes=0, device={}),
    )


@pytest.fixture(name="make_plan")
def _make_plan() -> Callable[..., Plan]:
    return make_plan


def until(claim: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Return the first true value of *claim*, or fail after *timeout_s*."""
    deadline = time.monotonic() + timeout_s
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
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a small file system needs the right to mount one")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(autouse=True)
def _no_process_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5  # a job's process records the end a moment before its own
    while (left := living(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        process.kill()
    assert not left, f"processes outlived the test: {left}"
