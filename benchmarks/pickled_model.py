"""Convert a `pytorch_model.bin` to safetensors: ours beside `cat` and beside torch.

python benchmarks/pickled_model.py --gigabytes 1 --repeat 3
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OURS = """
import sys
from pathlib import Path
from sousbatch.checkpoints.formats.pickled_model import read_pickled
from sousbatch.recipes.inspect.conversion import write_tensors
status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0])
before = peak()
write_tensors(read_pickled([Path(sys.argv[1])]), Path(sys.argv[2]))
print((peak() - before) / 1024)
"""
TORCH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0])
before = peak()
save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2] + "/model.safetensors")
print((peak() - before) / 1024)
"""


def make_model(path: Path, num_bytes: int) -> None:
    """Write a model of half-precision layers of 32 MiB."""
    import torch

    layers = {f"h.{number}.weight": torch.randn(4096, 4096).half() for number in range(num_bytes >> 25)}
    torch.save(layers, path)


def measure(command: list[str], target: Path) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and MiB above the start of a command that writes to *target*."""
    for old in target.iterdir():
        old.unlink()
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    wall = time.monotonic() - began
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return wall, cpu, float(done.stdout or 0)


def main() -> None:
    """Print medians of the ways, which take turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default=None)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, target = Path(folder, "pytorch_model.bin"), Path(folder, "out")
        target.mkdir()
        make_model(source, int(given.gigabytes * 1e9))
        ways = {
            "cat": ["sh", "-c", f"cat {source} > {target}/copy"],
            "ours": [sys.executable, "-c", OURS, str(source), str(target)],
            "torch.load, save_file": [sys.executable, "-c", TORCH, str(source), str(target)],
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        measure(ways["cat"], target)  # the source is in the page cache from here on
        for _ in range(given.repeat):
            for name, command in ways.items():
                found[name].append(measure(command, target))
        base = statistics.median(one[0] for one in found["cat"])
        print(f"{source.stat().st_size / 1e9:.2f} GB, {given.repeat} times each")
        print(f"{'way':22} wall s  least  CPU s  times cat  MiB above start")
        for name, runs in found.items():
            walls, cpus, peaks = zip(*runs, strict=True)
            wall = statistics.median(walls)
            print(
                f"{name:22} {wall:6.2f} {min(walls):6.2f} {statistics.median(cpus):6.2f} "
                f"{wall / base:10.1f} {statistics.median(peaks):16.0f}"
            )


if __name__ == "__main__":
    main()
