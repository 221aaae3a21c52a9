"""Consolidate again and again, each time stopped at another system call; used by test_faults.py.

    python kill_everywhere.py HOW CHECKPOINT FOLDER

HOW is `kill` (SIGKILL before and after each call) or `full` (the call fails with ENOSPC or EDQUOT, in turn). Each
attempt is a fork that resumes from what the one before left. Prints one JSON line: how many moments were hit and what
was found wrong.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import pathlib
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sousbatch.checkpoints.consolidation import stream
from sousbatch.checkpoints.consolidation.consolidate import consolidate
from sousbatch.checkpoints.consolidation.manifest import verify_manifest
from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
from sousbatch.checkpoints.consolidation.torch_cast import copier
from sousbatch.checkpoints.formats.detect import open_source
from sousbatch.errors import NoRoomError

CALLS = "pwrite fsync rename replace unlink rmdir mkdir ftruncate".split()
FAILING = "pwrite fsync rename replace mkdir ftruncate".split()
OPTIONS = ConsolidateOptions(max_shard_bytes=6000, num_workers=2)


class Moments:
    """Counts the calls of one attempt and acts at the *at*-th."""

    def __init__(self, at: int, how: str) -> None:
        self.at = at
        self.how = how
        self.count = 0
        self.names: list[str] = []

    def pass_through(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.tick(f"before {name}")
            result = call(*arguments, **options)
            if self.how == "kill":
                self.tick(f"after {name}")
            return result

        return counted

    def tick(self, name: str) -> None:
        self.count += 1
        self.names.append(name)
        if self.count != self.at:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = (errno.ENOSPC, errno.EDQUOT)[self.at % 2]
        raise OSError(number, os.strerror(number))


def place(moments: Moments) -> None:
    """Put the moments at every call that changes the disk."""
    for name in CALLS if moments.how == "kill" else FAILING:
        setattr(os, name, moments.pass_through(name, getattr(os, name)))
    stream.allocate = moments.pass_through("fallocate", stream.allocate)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            moments.tick("before write")
            # In halves, so that a kill can fall between them.
            half = max(1, len(data) // 2)
            written = super().write(data[:half])
            if moments.how == "kill":
                moments.tick("after write")
            return written or 0

    real = io.open

    def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode in ("wb", "w"):
            return io.BufferedWriter(Raw(file, "w"))
        return real(file, mode, *rest, **options)

    pathlib.io.open = opened  # type: ignore[attr-defined]


def attempt(source_dir: Path, out: Path, moments: Moments) -> None:
    """Consolidate in a fork; leave with 0 done, 3 no space, 4 anything else."""
    child = os.fork()
    if child:
        return
    code = 4
    try:
        source = open_source(source_dir)
        place(moments)
        consolidate(source, out, OPTIONS)
        code = 0
    except NoRoomError:
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        report = out.parent / "moments"
        with open(os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as stream_:
            stream_.write(f"{moments.count} " + " ".join(moments.names[-1:]))
        os._exit(code)


def is_whole(out: Path, expected: dict[str, bytes]) -> bool:
    return {path.name: path.read_bytes() for path in out.iterdir()} == expected


def main(how: str, source_dir: Path, folder: Path) -> None:
    """Stop one consolidation at each of its moments, from a fresh start and while going on."""
    copier()  # before the forks: loading torch's library takes 0.2 s
    gc.freeze()  # a collection in a fork would copy every page of the modules
    reference = folder / "reference"
    consolidate(open_source(source_dir), reference, OPTIONS)
    verify_manifest(reference)
    expected = {path.name: path.read_bytes() for path in reference.iterdir()}
    wrong: list[str] = []
    num_moments = num_hit = 0
    for is_fresh in (True, False):
        home = folder / ("fresh" if is_fresh else "going-on")
        for at in range(1, 10_000):
            if is_fresh:
                shutil.rmtree(home, ignore_errors=True)
            home.mkdir(exist_ok=True)
            out = home / "out"
            attempt(source_dir, out, Moments(at, how))
            _, status = os.wait()
            num_moments += 1
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                break
            num_hit += 1
            if code not in (-signal.SIGKILL, 3):
                wrong.append(f"moment {at}: ended with {code}")
            if out.exists() and not is_whole(out, expected):
                wrong.append(f"moment {at}: the output is there and not whole")
            strays = [path.name for path in home.iterdir() if path.name not in ("out", "moments", ".tmp-out.part")]
            wrong += [f"moment {at}: {name} is left" for name in strays if not name.startswith(".tmp-")]
        if not (out.exists() and is_whole(out, expected)):
            wrong.append(f"{home.name}: never ended well")
        left = [path.name for path in home.iterdir() if path.name not in ("out", "moments")]
        # A kill while the emptied work folder is deleted leaves its renamed rest, which every cleaner knows at sight.
        wrong += [f"{home.name}: {name} is left at the end" for name in left if how != "kill" or is_fresh]
    print(json.dumps({"moments": num_moments, "hit": num_hit, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
