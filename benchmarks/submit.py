"""Time submission and status on a private Slurm beside plain sbatch and submitit.

    python benchmarks/submit.py --repeat 9

It starts a private Slurm of its own (see `sousbatch sandbox`) and stops it at the end; all jobs are
held, so that nothing runs beside the measurement. Each round runs every command once, in turn, as a
process of its own. Reach: a job accepted less than 0.3 s above what starting Python and Hydra costs; a
sweep of 1,000 points under 1 s in one call of sbatch; the status of 1,000 runs under 0.5 s in one
call; five watchers together ask at most every 30 s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sousbatch.cluster.sandbox import lifecycle
from sousbatch.run_folder import RunPaths
from sousbatch.run_index import remember_run

MANY = 1000
COMMAND = (sys.executable, "-m", "sousbatch")
RECIPE = ("hangul-restoration", "stages={train: {}}", "resources.default.sbatch=[--hold]", "--launcher", "slurm")
SCRIPT = "#!/bin/bash\n#SBATCH --hold --output=/dev/null\ntrue\n"
PYTHON_AND_HYDRA = """
from hydra import compose, initialize_config_dir
import sousbatch.recipes.catalog as catalog
with initialize_config_dir(config_dir=str(catalog.LIBRARY_DIR), version_base="1.3"):
    compose("hangul-restoration", overrides=["++seed={seed}", "++stages={{train: {{}}}}"])
"""
SUBMITIT = """
import submitit
executor = submitit.SlurmExecutor("submitit")
executor.update_parameters(time=5, additional_parameters={{"hold": True}})
executor.{call}
"""
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "sacctmgr", "scancel")
# Notes each call with its moment, then does it.
WRAPPER = '#!/bin/bash\necho "$EPOCHREALTIME {name}" >> {log}\nexec {path} "$@"\n'


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run of a command took; CPU seconds are those of it and its children."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A private Slurm, and an environment that counts each call of its commands."""

    folder: Path
    environment: Mapping[str, str]
    calls: Path

    def run(self, *command: str, is_counted: bool = False) -> tuple[Cost, str]:
        """Run a command and return its cost and what it printed.

        Counting costs some milliseconds a call.
        """
        environment = dict(self.environment)
        if is_counted:
            environment["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environment['PATH']}"
        start, before = time.perf_counter(), os.times()
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True)
        wall_s, after = time.perf_counter() - start, os.times()
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
        cpu_s = sum(after[2:4]) - sum(before[2:4])
        return Cost(wall_s=wall_s, cpu_s=cpu_s), done.stdout

    def count(self, *command: str) -> Counter[str]:
        """Run a command and return how often it called each of Slurm's."""
        self.calls.unlink(missing_ok=True)
        self.run(*command, is_counted=True)
        return Counter(line.split()[1] for line in self.calls.read_text().splitlines())

    def clear(self) -> None:
        """Cancel all jobs."""
        self.run("scancel", "--user", str(os.getuid()))


def open_desk(folder: Path) -> Desk:
    """Start a private Slurm in *folder*, and lay wrappers of its commands beside."""
    box = lifecycle.start(folder / "slurm", settings={"MaxArraySize": str(MANY + 1), "MinJobAge": "2"})
    calls, wrappers = folder / "calls", folder / "bin"
    wrappers.mkdir()
    for name in COMMANDS:
        path = shutil.which(name)
        if path:
            (wrappers / name).write_text(WRAPPER.format(name=name, log=calls, path=path))
            (wrappers / name).chmod(0o755)
    own = {f"SOUSBATCH_{name.upper()}": str(folder / name) for name in ("state", "cache", "runs")}
    (folder / "job.sh").write_text(SCRIPT)
    return Desk(folder=folder, environment=os.environ | own | {"SLURM_CONF": str(box.conf)}, calls=calls)


def one_job(number: int) -> dict[str, tuple[str, ...]]:
    """Return the commands that send one job.

    *number* makes it another one than the last.
    """
    return {
        "python -c pass": (sys.executable, "-c", "pass"),
        "python, hydra, one recipe": (sys.executable, "-c", PYTHON_AND_HYDRA.format(seed=number)),
        "sbatch": ("sbatch", "job.sh"),
        "submitit submit": (sys.executable, "-c", SUBMITIT.format(call="submit(print, 1)")),
        "sousbatch submit": (*COMMAND, "submit", *RECIPE, "--detach", f"seed={number}"),
    }


def many_jobs(number: int) -> dict[str, tuple[str, ...]]:
    """Return the commands that send a thousand jobs or tasks."""
    seeds = f"seed=range({number * MANY},{(number + 1) * MANY})"
    return {
        "sbatch --array": ("sbatch", f"--array=0-{MANY - 1}", "job.sh"),
        "submitit map_array": (sys.executable, "-c", SUBMITIT.format(call=f"map_array(print, range({MANY}))")),
        "sousbatch submit --sweep": (
            *COMMAND,
            "submit",
            *RECIPE,
            "--detach",
            "--runs",
            f"runs-{number}",
            "--sweep",
            seeds,
        ),
    }


def measure(desk: Desk, rounds: list[dict[str, tuple[str, ...]]]) -> dict[str, list[Cost]]:
    """Return the costs of each command of each round.

    The first round warms up and is left out.
    """
    found: dict[str, list[Cost]] = {name: [] for name in rounds[0]}
    for number, commands in enumerate(rounds):
        for name, command in commands.items():
            cost, _ = desk.run(*command)
            if number:
                found[name].append(cost)
        desk.clear()
    return found


def make_runs(desk: Desk) -> Cost:
    """Make a thousand runs, each with a job in the queue.

    Return how long a loop of sbatch took for those jobs. The runs are copies of one that was submitted, with other ids
    of run and job.
    """
    sent = [desk.run("sbatch", "--parsable", "job.sh") for _ in range(MANY)]
    loop = Cost(wall_s=sum(cost.wall_s for cost, _ in sent), cpu_s=sum(cost.cpu_s for cost, _ in sent))
    _, run_id = desk.run(*COMMAND, "submit", *RECIPE, "--detach", "seed=4000000")
    first = RunPaths(root=desk.folder / "runs" / "hangul-restoration" / run_id.strip())
    shutil.rmtree(desk.folder / "state" / "runs")
    os.environ["SOUSBATCH_STATE"] = str(desk.folder / "state")
    for number, (_, job) in enumerate(sent):
        paths = RunPaths(root=first.root.parent / f"{number:012x}")
        shutil.copytree(first.root, paths.root)
        (ledger,) = paths.ledger_dir.glob("client.0002.*")
        *lines, last = ledger.read_text().splitlines()
        ledger.write_text("\n".join([*lines, f'{last.rpartition(": ")[0]}: "{job.strip()}"}}', ""]))
        remember_run(paths)
    return loop


def measure_status(desk: Desk, repeat: int) -> tuple[dict[str, list[Cost]], Counter[str]]:
    """Return what a look at all runs costs, and the calls that it makes."""
    status, peer = (*COMMAND, "status"), ("squeue", "--me")
    found: dict[str, list[Cost]] = {"squeue --me": [], "sousbatch status": [], "again within 30 s": []}
    for number in range(repeat + 1):
        forget_answers(desk)
        for name, command in zip(found, (peer, status, status), strict=True):
            cost, text = desk.run(*command)
            assert text.count("\n") > MANY, "a header, and a line a run"
            found[name] += [cost] * (number > 0)
    forget_answers(desk)
    return found, desk.count(*status)


def forget_answers(desk: Desk) -> None:
    """Remove what watchers share."""
    for cache in (desk.folder / "state").glob("slurm-queue-*.json"):
        cache.unlink()


def watch(desk: Desk, seconds: float, num_watchers: int) -> list[float]:
    """Let several watch for *seconds*.

    Return the moments at which the queue was asked.
    """
    forget_answers(desk)
    desk.calls.unlink(missing_ok=True)
    environment = dict(desk.environment) | {"PATH": f"{desk.folder / 'bin'}{os.pathsep}{desk.environment['PATH']}"}
    command = (*COMMAND, "status", "--watch")
    watchers = [
        subprocess.Popen(command, env=environment, cwd=desk.folder, stdout=subprocess.DEVNULL)
        for _ in range(num_watchers)
    ]
    time.sleep(seconds)
    for watcher in watchers:
        watcher.terminate()
        watcher.wait()
    lines = [line.split() for line in desk.calls.read_text().splitlines()]
    return [float(moment) for moment, name in lines if name in ("squeue", "sacct", "scontrol", "sinfo")]


def table(found: Mapping[str, list[Cost]]) -> None:
    """Print medians, and the least wall time."""
    print(f"{'':<30}{'wall s':>8}{'least':>8}{'CPU s':>8}")
    for name, costs in found.items():
        least, cpu_s = min(cost.wall_s for cost in costs), median(cost.cpu_s for cost in costs)
        print(f"{name:<30}{wall(costs):>8.3f}{least:>8.3f}{cpu_s:>8.3f}")


def wall(costs: list[Cost]) -> float:
    """Return the median of the wall times."""
    return median(cost.wall_s for cost in costs)


def verdict(what: str, value: float, limit: float) -> bool:
    """Print whether a reach was met."""
    print(f"{what}: {value:.3f}, reach < {limit}: {'met' if value < limit else 'MISSED'}")
    return value < limit


def main() -> int:
    """Print what was measured; return 1 when a reach was missed."""
    parser = argparse.ArgumentParser(description="Time submission and status on a private Slurm.")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--watch", type=float, default=70, metavar="SECONDS", help="how long five watchers watch")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="submit-"))
    try:
        desk = open_desk(folder)
        print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
        one = measure(desk, [one_job(number) for number in range(arguments.repeat + 1)])
        print("one job")
        table(one)
        many = measure(desk, [many_jobs(number + 1) for number in range(arguments.repeat + 1)])
        calls = desk.count(*many_jobs(1001)["sousbatch submit --sweep"])
        desk.clear()
        loop = make_runs(desk)
        print(f"{MANY} jobs or tasks")
        table(many | {"sbatch in a loop": [loop]})
        print(f"calls of a sweep of {MANY}: {dict(calls)}")
        asked, status_calls = measure_status(desk, arguments.repeat)
        print(f"status of {MANY} runs that wait in the queue")
        table(asked)
        print(f"calls of a status: {dict(status_calls)}")
        moments = watch(desk, arguments.watch, 5)
        gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
        print(f"five watchers asked {len(moments)} times in {arguments.watch:.0f} s, {[round(gap, 1) for gap in gaps]}")
        print(f"load {os.getloadavg()[0]:.1f}")
        base = wall(one["python, hydra, one recipe"])
        reached = [
            verdict("one job, s above Python and Hydra", wall(one["sousbatch submit"]) - base, 0.3),
            verdict(f"sweep of {MANY}, s", wall(many["sousbatch submit --sweep"]), 1),
            verdict(f"status of {MANY}, s", wall(asked["sousbatch status"]), 0.5),
            calls["sbatch"] == 1,
            status_calls == {"squeue": 1},
            all(gap > 29 for gap in gaps),
        ]
        return 0 if all(reached) else 1
    finally:
        lifecycle.stop(folder / "slurm")
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
