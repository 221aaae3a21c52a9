"""Two real ranks that agree: what fails on one fails on both, by the worst that befell either."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import errno, json, os, sys
import torch.distributed as dist
from sousbatch.errors import FencedError, RunError
from sousbatch.jobs.training.collectives import Ranks

def hidden():
    try:
        raise OSError(errno.EIO, "gone")
    except OSError:
        raise RuntimeError("torch's own words")

def fail(how):
    if how == "hidden":
        hidden()
    errors = {"full": OSError(errno.ENOSPC, "full"), "gone": OSError(errno.EIO, "gone"), "value": ValueError("no"),
              "fenced": FencedError("newer"), "run": RunError("wrong")}
    if how != "-":
        raise errors[how]

def outcome(ranks, how):
    try:
        ranks.do("saving", lambda: fail(how))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "-"

folder, cases = sys.argv[1], json.loads(sys.argv[2])
rank = 1 if os.fork() else 0
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
ranks = Ranks()
found = {"do": [outcome(ranks, case[rank]) for case in cases], "first": ranks.from_first([rank + 5, 2**40 + rank]),
         "largest": ranks.largest(float(rank))}
dist.barrier()
with open(f"{folder}/{rank}.json.tmp", "w") as stream:
    json.dump(found, stream)
os.rename(f"{folder}/{rank}.json.tmp", f"{folder}/{rank}.json")
if rank:
    os.wait()
os._exit(0)
"""
CASES = {  # what befalls rank 0 and rank 1, and the error that each raises
    ("-", "-"): ("-", "-"),
    ("value", "-"): ("RunError: saving failed: no", "RunError: saving failed on another rank; its log says why"),
    ("-", "gone"): ("StorageError: saving failed on another rank", "StorageError: saving failed: [Errno 5] gone"),
    ("hidden", "-"): ("StorageError: saving failed: torch's own words", "StorageError: saving failed on another rank"),
    ("-", "full"): ("NoRoomError: no space left while saving", "NoRoomError: no space left while saving"),
    ("run", "full"): ("NoRoomError: no space left while saving", "NoRoomError: no space left while saving"),
    ("run", "-"): ("RunError: wrong", "RunError: saving failed on another rank"),
    ("fenced", "-"): ("FencedError: newer", "FencedError: a newer attempt took over while saving"),
    ("fenced", "gone"): ("FencedError: newer", "FencedError: a newer attempt took over while saving"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", CHILD, folder, json.dumps(list(CASES))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_what_fails_on_one_rank_fails_on_both(ranks: list[dict[str, Any]], case: tuple[str, str]) -> None:
    number = list(CASES).index(case)
    for rank, expected in enumerate(CASES[case]):
        assert ranks[rank]["do"][number].startswith(expected)


def test_numbers_of_the_first_and_the_largest_are_known_to_both(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["first"] == [5, 2**40] and found["largest"] == 1.0
