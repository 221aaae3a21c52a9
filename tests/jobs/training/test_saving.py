"""Saving with two real ranks: killed at system calls, and as far down the ladder as the room asks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS = Path(__file__).parents[2] / "moments"


@pytest.mark.parametrize(("how", "first", "stride", "count"), [("kill", 20, 31, 3), ("ENOSPC", 2, 40, 2)])
def test_a_kill_or_a_full_disk_at_any_moment_of_a_save_costs_no_committed_checkpoint(
    tmp_path: Path, how: str, first: int, stride: int, count: int
) -> None:
    """One rank, the other, and both; then a second attempt of two ranks resumes and ends."""
    if shutil.which("gcc") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs gcc and Linux")
    shim = tmp_path / "moments.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", shim, MOMENTS / "moments.c", "-ldl"], check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(MOMENTS / "saving.py"),
            str(tmp_path / "runs"),
            how,
            str(first),
            str(stride),
            str(count),
        ],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == {}, done.stderr
    assert found["ended"] >= 1, f"no moment was reached: {found}"  # a rank makes fewer calls when the other clears up
