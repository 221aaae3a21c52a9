"""Save, strip, archive and delete once, killed or failed at a moment: run with fail_at.so preloaded.

`keeping.py FOLDER kill|half|ENOSPC|EDQUOT [STRIDE]` prints one JSON line: how many moments there are (of a kill:
before and after each call), how many were tried, and what was wrong after any of them. Each is tried in a child of its
own, on a new folder; then a second child, which nothing befalls, takes up what the first left.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.checkpoints.retention.decisions import decide
from sousbatch.checkpoints.retention.policies import standard_rules
from sousbatch.checkpoints.rotation import RemovalOptions, carry_out
from sousbatch.errors import is_no_room

SHIM = ctypes.CDLL(None)
METRICS = {10: 0.9, 20: 0.1, 30: 0.8, 40: 0.7}  # 20 is the best
OLD, NEW = (10, 20, 30), 40


def save(folder: Path, step: int) -> Checkpoint:
    temporary = commit.begin(folder, step, 1)
    for rank in range(2):
        torch.save({"moments": torch.full((500,), float(step))}, temporary / f"rank_{rank}.pt")
    save_file({"weight": torch.full((8, 8), float(step))}, temporary / "model.safetensors")
    (temporary / "config.json").write_text("{}")
    return commit.commit(temporary, step=step, attempt=1, metric=METRICS[step], world_size=2, check_fence=lambda: None)


def keep(folder: Path, archive: Path) -> None:
    """What a save and the settling after it do: 40 is saved, 20 stripped, 10 and 30 archived; 50 is third-party."""
    if not any(one.step == NEW for one in commit.committed(folder)):
        save(folder, NEW)
    rules = standard_rules(keep_last=1, keep_best=1, strips=True, archives=True)
    options = RemovalOptions(check_fence=lambda: None, archive_url=str(archive))
    for done in carry_out(decide(commit.committed(folder), rules), options):
        if done.problem and not any(word in done.problem for word in ("No space", "quota")):
            raise AssertionError(done.problem)


def child(folder: Path, archive: Path, moment: int, mode: int) -> int:
    """Do the work in a child and return how it ended, as waitpid says."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    code = 1
    try:
        SHIM.arm(moment, mode)
        keep(folder, archive)
        code = 0
    except BaseException as error:
        code = 28 if is_no_room(error) else 1
        if code == 1:
            traceback.print_exc()
    finally:
        os._exit(code)


def problems(folder: Path, archive: Path, *, is_over: bool) -> list[str]:
    """Return what was lost: nothing may be, at any moment."""
    here = {(one.step, one.content): one for one in commit.committed(folder)}
    there = {one.step: one for one in commit.committed(archive)}
    found = [text for one in (*here.values(), *there.values()) for text in commit.verify(one)]
    found += [f"step {step} is gone" for step in OLD if step not in {one[0] for one in here} | set(there)]
    newest = max((step for step, content in here if content == "full"), default=0)
    if newest < 30:
        found.append(f"the newest to resume from is step {newest}")
    if is_over:
        names = sorted(path.name for path in folder.iterdir())
        if names != ["checkpoint-50", "step-00000020-weights", "step-00000040"]:
            found.append(f"at the end there is {names}")
        if sorted(there) != [10, 30]:
            found.append(f"in the archive is {sorted(there)}")
    return found


def tried(root: Path, moment: int, mode: int) -> tuple[int, list[str]]:
    folder, archive = root / "train", root / "archive"
    for place in (folder, archive):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    shutil.copytree(root / "before", folder, dirs_exist_ok=True)
    status = child(folder, archive, moment, mode)
    found = problems(folder, archive, is_over=False)
    commit_begin = commit.begin(folder, 99, 2)  # what the next save does first
    commit_begin.rmdir()
    if child(folder, archive, 0, 0) != 0:
        found.append("the next attempt failed")
    return status, found + problems(folder, archive, is_over=True)


def count(root: Path, mode: int) -> int:
    """Return how many moments the work has when nothing befalls it."""
    shutil.copytree(root / "before", root / "train")
    (root / "archive").mkdir()
    SHIM.arm(0, mode)
    keep(root / "train", root / "archive")
    return int(SHIM.counted())


def main(root: Path, how: str, stride: int) -> None:
    before = root / "before"
    (before / "checkpoint-50").mkdir(parents=True)
    for step in OLD:
        save(before, step)
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy every page that torch's objects lie on
    mode = {"kill": 0, "half": 1, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT}[how]
    moment, wrong, ended, num_tried, num_moments = 1, {}, 0, 0, count(root, mode)
    while True:
        status, found = tried(root, moment, mode)
        num_tried += 1
        if found:
            wrong[moment] = found
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, 28):
            wrong[moment] = [*found, f"ended with {os.WEXITSTATUS(status)}"]
        ended += status != 0
        if moment > num_moments:
            break
        moment += stride
    print(json.dumps({"moments": num_moments, "tried": num_tried, "ended": ended, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
