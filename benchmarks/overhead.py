"""Measure what training through the recipe costs above the same Trainer by hand.

    python benchmarks/overhead.py --pairs 20
    python benchmarks/overhead.py --pairs 3 --device gpu

Both sides train the demo's model on one rank under torchrun: one as `sousbatch submit` does it, with
the ledger, logs and W&B offline; one by `by_hand.py`. The two of a pair run at once but compute in
turn, a step each, so that a machine whose speed changes from second to second slows both alike; who
begins changes from pair to pair. Compared are the CPU seconds between two steps of the rank, its
children (W&B's service) and the processes that watch it. Reach: under 2 % more.

On a GPU the sides train one after the other, a model of 29 million parameters, and what is compared
is the time that passes from step to step, which is what a user of the card pays for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

HERE = Path(__file__).parent
FIRST, REACH = 10, 1.02
# 97.5 % points of Student's t by degrees of freedom; between them the lower freedom's is taken
T_POINTS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045}
VALUES = (
    "stages={train: {}}",
    "train.zero.stage=0",
    "train.eval_split=null",
    "train.schedule={name: constant, warmup_ratio: 0}",
    "resources.train.nodes=1",
    "data.generator.num_train=3200",
    "tracking.mode=offline",
)
# on a GPU: large enough that the card computes longer than Python takes to ask it to
LARGER: dict[str, int] = {
    **{"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    **{"num_key_value_heads": 8, "head_dim": 64},
}
# what the stage's own script sets, for the script by hand too
SAME = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment(out: Path, last: int, turns: list[Path]) -> dict[str, str]:
    """Return the environment of either side."""
    probe = {"PROBE_OUT": str(out), "PROBE_STEPS": f"{FIRST},{last}", "PROBE_TOP": str(os.getpid())}
    own = {"PROBE_TURNS": os.pathsep.join(map(str, turns)), "SOUSBATCH_STATE": str(out / "state")}
    return {**os.environ, **SAME, **probe, **own}


def start(command: list[str], variables: dict[str, str], out: Path) -> subprocess.Popen[bytes]:
    """Start one side; its output goes to a file."""
    out.mkdir()
    with (out / "log").open("w") as log:
        return subprocess.Popen(command, env=variables, cwd=out, stdout=log, stderr=subprocess.STDOUT)


def values(device: str) -> list[str]:
    """Return the overrides of the recipe."""
    config = ", ".join(f"{name}: {value}" for name, value in LARGER.items())
    larger = [f"model.config={{{config}}}"] if device == "gpu" else []
    return [*VALUES, *larger, f"resources.default.device={device}"]


def by_recipe(device: str, steps: int, out: Path) -> list[str]:
    """Return the command that trains as a user of sousbatch does."""
    own = [f"train.steps={steps}", f"checkpoints.every_steps={steps}", f"environment.code=[{HERE / 'probe'}]"]
    command = [sys.executable, "-m", "sousbatch", "submit", "hangul-restoration"]
    return [*command, *values(device), *own, "--runs", str(out / "runs")]


def by_hand(device: str, steps: int, inputs: dict[str, Any], out: Path) -> list[str]:
    """Return the command that trains with the plain script.

    It trains on the files that the plan names.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", str(HERE / "by_hand.py")]
    files = [f"--model={inputs['model']['folder']}", f"--data={inputs['splits']['train']['path']}"]
    config = json.dumps(LARGER if device == "gpu" else {})
    return [*command, *files, f"--out={out}", f"--steps={steps}", f"--device={device}", f"--config={config}"]


def run_pair(folder: Path, last: int, inputs: dict[str, Any], order: list[str], device: str) -> dict[str, Any]:
    """Train on both sides and return what the probe wrote.

    On the CPU the sides take turns from step to step, the first of *order* first; on a GPU the second one waits for the
    end of the first.
    """
    folder.mkdir()
    fifos = {side: folder / f"{side}.turn" for side in order} if device == "cpu" else {}
    for fifo in fifos.values():
        os.mkfifo(fifo)
    turns = {side: os.open(fifo, os.O_RDWR) for side, fifo in fifos.items()}  # open, so that no turn is lost
    if turns:
        os.write(turns[order[0]], b".")
    outs = {side: folder / side for side in order}
    steps = last + 2  # the save at the end must not disturb the other side's last step
    commands = {
        "recipe": by_recipe(device, steps, outs["recipe"]),
        "hand": by_hand(device, steps, inputs, outs["hand"]),
    }
    processes = {}
    for side, other in (order, order[::-1]):
        own = environment(outs[side], last, [fifos[side], fifos[other]] if fifos else [])
        if side == "hand":
            own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE / "probe"), own.get("PYTHONPATH")]))
        processes[side] = start(commands[side], own, outs[side])
        if not fifos:
            processes[side].wait()
    for side, process in processes.items():
        if process.wait():
            raise SystemExit((outs[side] / "log").read_text()[-2000:] + f"\n{side} failed")
    for turn in turns.values():
        os.close(turn)
    return {side: json.loads((out / "0.json").read_text()) for side, out in outs.items()}


def losses(found: dict[str, Any], last: int) -> list[float]:
    """Return the losses up to step *last*.

    The recipe logs that of the very last step too.
    """
    return [round(loss, 6) for loss in found["losses"][: last // 10]]


def step_cpu_s(found: dict[str, Any], last: int, *, is_all: bool) -> float:
    """Return the CPU seconds of a step of the rank, or of all processes.

    Those above the rank look around every so often, also while it waits for its turn: they count by
    the second of its own work.
    """
    first, end = found["cpu_s"][str(FIRST)], found["cpu_s"][str(last)]
    took = {name: end[name] - first[name] for name in end}
    others = took["children"] + took["above"] * took["own"] / took["wall"] if is_all else 0.0
    return float(took["own"] + others) / (last - FIRST)


def step_wall_s(found: dict[str, Any], last: int) -> float:
    """Return the seconds that pass in a step."""
    return float(found["cpu_s"][str(last)]["wall"] - found["cpu_s"][str(FIRST)]["wall"]) / (last - FIRST)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of *ratios* and its 95 % confidence interval.

    The interval is by Student's t.
    """
    logs = [math.log(ratio) for ratio in ratios]
    point = next(T_POINTS[freedom] for freedom in sorted(T_POINTS, reverse=True) if freedom <= len(logs) - 1)
    half = point * stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(fmean(logs) + shift) for shift in (-half, 0, half))
    return low, middle, high


def least_step_cpu_s(side: list[dict[str, Any]], last: int) -> float:
    """Return the CPU seconds of a step of the rank.

    They are the least of each step over all runs: noise only adds.
    """
    steps = [[end - start for start, end in pairwise(found["own_cpu_s"][FIRST - 1 : last])] for found in side]
    return fmean(map(min, zip(*steps, strict=True)))


def report(title: str, recipe: list[float], hand: list[float]) -> None:
    """Print one comparison and its verdict."""
    low, mean, high = interval([ours / theirs for ours, theirs in zip(recipe, hand, strict=True)])
    verdict = "under 2 %" if high < REACH else "over 2 %" if low > REACH else "inconclusive"
    costs = f"{title:<42}{median(recipe) * 1000:>8.1f}{median(hand) * 1000:>8.1f}"
    print(f"{costs}  {mean:.4f} [{low:.4f}, {high:.4f}]  {verdict}")


def main() -> None:
    """Run the pairs and print mean ratio and confidence interval."""
    parser = argparse.ArgumentParser(description="Measure the recipe's CPU seconds a step against a script by hand.")
    parser.add_argument("--pairs", type=int, default=20, help="at least 2")
    parser.add_argument("--last", type=int, default=40, help="last step; the first ten are not measured")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args()
    plan = [sys.executable, "-m", "sousbatch", "plan", "hangul-restoration", *values(args.device), "--json"]
    inputs = json.loads(subprocess.run(plan, check=True, capture_output=True, text=True).stdout)["inputs"]
    step_s = partial(step_cpu_s, is_all=True) if args.device == "cpu" else step_wall_s
    recipe: list[dict[str, Any]] = []
    hand: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="overhead-") as temporary:
        for number in range(args.pairs):
            order = ["recipe", "hand"] if number % 2 else ["hand", "recipe"]
            pair = run_pair(Path(temporary) / str(number), args.last, inputs, order, args.device)
            recipe.append(pair["recipe"])
            hand.append(pair["hand"])
            is_same = losses(recipe[-1], args.last) == losses(hand[-1], args.last)
            costs = [step_s(found[-1], args.last) for found in (recipe, hand)]
            print(f"pair {number}: {costs[0] / costs[1]:.4f}, losses {'equal' if is_same else 'DIFFER'}", flush=True)
    print(f"losses every 10 steps: {losses(recipe[-1], args.last)}, by hand {losses(hand[-1], args.last)}")
    what = "CPU ms a step, medians" if args.device == "cpu" else "ms a step, medians"
    print(f"{what:<42}{'recipe':>8}{'hand':>8}  mean ratio [95 % interval]")
    if args.device == "gpu":
        report("the time that passes", *([step_s(found, args.last) for found in side] for side in (recipe, hand)))
        return
    for title, is_all in (("rank, its children, those above", True), ("rank alone", False)):
        report(title, *([step_cpu_s(found, args.last, is_all=is_all) for found in side] for side in (recipe, hand)))
    ours, theirs = (least_step_cpu_s(side, args.last) for side in (recipe, hand))
    print(f"{'rank alone, least of each step':<42}{ours * 1000:>8.1f}{theirs * 1000:>8.1f}  {ours / theirs:.4f}")


if __name__ == "__main__":
    main()
