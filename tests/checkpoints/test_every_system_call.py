"""kill -9 around, and a full disk at, every system call of save, strip, archive and delete; see faults/keeping.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).parents[1] / "faults"


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that counts the calls which change files, and kills or fails at one of them."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux")
    path = tmp_path_factory.mktemp("moments") / "fail_at.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, FAULTS / "fail_at.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize(
    ("how", "stride", "at_least"),
    [
        ("kill", 1, 200),
        ("half", 15, 8),
        ("ENOSPC", 15, 1),
        ("EDQUOT", 29, 1),
        pytest.param("half", 1, 100, marks=pytest.mark.faults),
        pytest.param("ENOSPC", 1, 10, marks=pytest.mark.faults),
        pytest.param("EDQUOT", 1, 10, marks=pytest.mark.faults),
    ],
)
def test_nothing_committed_is_lost_and_the_next_attempt_ends_the_work(
    shim: Path, memory_dir: Path, how: str, stride: int, at_least: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(FAULTS / "keeping.py"), str(memory_dir), how, str(stride)],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["wrong"] == {}, done.stderr
    assert found["moments"] >= 100 and found["ended"] >= at_least, found
