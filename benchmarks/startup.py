"""Time the start of the command line beside its peers.

    python benchmarks/startup.py --repeat 15

It also checks that the command line imports nothing heavy. Each round runs every command once, in turn, so that all see
the same noise. Targets: `sousbatch --help` under 0.1 s and `sousbatch plan` with inputs cached under 0.5 s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

HEAVY = ("torch", "transformers", "deepspeed", "peft", "wandb", "accelerate", "numpy", "pandas", "hydra")
MODULE = (sys.executable, "-m", "sousbatch")
PLAN = ("plan", "hangul-restoration")
TARGETS_S = {"sousbatch --help": 0.1, "sousbatch plan hangul-restoration": 0.5}
# In a process of its own: run the command and print which of the heavy modules it left behind.
LOOK = """
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from sousbatch.cli.main import main
with redirect_stdout(StringIO()), suppress(SystemExit):
    main(sys.argv[2:])
print(*(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run of a command took, its children included."""

    wall_s: float
    cpu_s: float


def commands() -> dict[str, tuple[str, ...]]:
    """Return what is timed: ours, then those of the peers that are installed."""
    here = Path(sys.executable).parent
    script = here / "sousbatch"
    ours = (str(script),) if script.exists() else MODULE
    found = {
        "sousbatch --help": (*ours, "--help"),
        "sousbatch plan hangul-restoration": (*ours, *PLAN),
        "python -c pass": (sys.executable, "-c", "pass"),
        "python -c 'import hydra'": (sys.executable, "-c", "import hydra"),
    }
    for name, rest in (("torchrun", ("--help",)), ("accelerate", ("launch", "--help"))):
        if path := shutil.which(name, path=f"{here}{os.pathsep}{os.environ['PATH']}"):
            found[" ".join((name, *rest))] = (path, *rest)
    return found


def measure(command: tuple[str, ...], folder: Path) -> Cost:
    """Run *command* once in *folder*."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not look for it again
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return Cost(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime)


def heavy_imports(arguments: tuple[str, ...], folder: Path) -> list[str]:
    """Return which heavy modules `sousbatch ARGUMENTS` imports."""
    command = (sys.executable, "-c", LOOK, ",".join(HEAVY), *arguments)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()


def main() -> int:
    """Print medians and what was imported; return 1 when a target was missed."""
    parser = argparse.ArgumentParser(description="Time the start of the command line beside its peers.")
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    timed = commands()
    found: dict[str, list[Cost]] = {name: [] for name in timed}
    is_good = True
    with tempfile.TemporaryDirectory(prefix="startup-") as temporary:
        folder = Path(temporary)
        for command in timed.values():  # bytecode and the inputs of `plan` are cached from here on
            measure(command, folder)
        for _ in range(repeat):
            for name, command in timed.items():
                found[name].append(measure(command, folder))
        for arguments in (("--help",), PLAN):
            heavy = heavy_imports(arguments, folder)
            is_good = is_good and not set(heavy) - {"hydra"}
            print(f"sousbatch {' '.join(arguments)} imports of {', '.join(HEAVY)}: {', '.join(heavy) or 'none'}")
    print(f"{'command':<36}{'wall s':>8}{'least':>8}{'CPU s':>8}  target")
    for name, costs in found.items():
        wall_s, cpu_s = median(cost.wall_s for cost in costs), median(cost.cpu_s for cost in costs)
        reach = ""
        if name in TARGETS_S:
            is_met = wall_s < TARGETS_S[name]
            is_good = is_good and is_met
            reach = f"  < {TARGETS_S[name]} s: {'met' if is_met else 'MISSED'}"
        print(f"{name:<36}{wall_s:>8.3f}{min(cost.wall_s for cost in costs):>8.3f}{cpu_s:>8.3f}{reach}")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
