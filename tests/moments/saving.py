"""Two ranks that save, commit, thin and rotate with the real Saver, at a bad moment: run with moments.so preloaded.

`saving.py FOLDER kill|ENOSPC FIRST STRIDE COUNT` tries COUNT moments; each kills rank 0, rank 1 or both in
turn, or lets all fail from then on that takes room. What is left is checked, and a second attempt of two
ranks must resume from it and end. Prints one JSON line.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sousbatch.checkpoints import budget, commit
from sousbatch.cluster.site import Site
from sousbatch.jobs.context import JobContext
from sousbatch.jobs.training.saving import Saver
from sousbatch.jobs.training.together import Ranks
from sousbatch.ledger import open_job
from sousbatch.recipes.plan import Batch, Forecast, Inputs, ModelFacts, Plan, Room, Stage, TensorFacts
from sousbatch.recipes.schema import Checkpoints, Model, Recipe, Resources, Train
from sousbatch.rundir import RunPaths

SHIM = ctypes.CDLL(None)
METRICS = {1: 0.9, 2: 0.1, 3: 0.8, 4: 0.7, 5: 0.6}  # 2 is the best, and will be thinned
STEPS, WIDTH = len(METRICS), 40_000


@dataclass
class State:
    global_step: int = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)

    def save_to_json(self, path: str) -> None:
        Path(path).write_text(json.dumps(asdict(self)))


class Beside:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")


class Trainer:
    """What the Saver asks of transformers' Trainer, with a model of one layer."""

    is_deepspeed_enabled = False

    def __init__(self, rank: int) -> None:
        self.rank, self.state, self.args = rank, State(), type("Args", (), {"world_size": 2})
        self.model = torch.nn.Linear(WIDTH, 1, bias=False)
        self.model.config = Beside()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.lr_scheduler, self.accelerator = self.optimizer, self

    def unwrap_model(self, model: Any) -> Any:
        return model

    def save_model(self, folder: str, _internal_call: bool) -> None:
        save_file({"weight": self.model.weight.data}, Path(folder) / "model.safetensors")

    def _save_rng_state(self, folder: str) -> None:
        torch.save({"state": torch.zeros(100)}, Path(folder) / f"rng_state_{self.rank}.pt")

    def _save_scaler(self, folder: str) -> None:
        pass

    def step(self) -> None:
        self.state.global_step += 1
        self.model(torch.ones(WIDTH)).backward()
        self.optimizer.step()
        self.state.log_history.append({"step": self.state.global_step, "eval_loss": METRICS[self.state.global_step]})


def context(root: Path, attempt: int) -> JobContext:
    recipe = Recipe(
        name="r",
        model=Model(path="m"),
        train=Train(precision="float32"),
        checkpoints=Checkpoints(every_steps=1, thin=True, budget_gb=0.0025),
    )
    batch = Batch(
        world_size=2, micro_batch=1, accumulation=1, steps=STEPS, steps_per_epoch=5, warmup_steps=0, save_every_steps=1
    )
    stage = Stage(name="train", kind="train", of=None, resources=Resources(), num_tasks=1, after=(), batch=batch)
    tensor = TensorFacts(name="weight", shape=(1, WIDTH), dtype="float32")
    model = ModelFacts(
        folder="m", tokenizer_folder="m", digest="", has_weights=True, num_params=WIDTH, tensors=(tensor,), config={}
    )
    plan = Plan(
        recipe=recipe,
        site=Site(name="here", launcher="local", cpus_per_node=1, memory_bytes=1, gpus_per_node=0, gpu_memory_bytes=0),
        inputs=Inputs(model=model, splits={}, room=Room(folder="/", free_bytes=1, free_inodes=1), code_digest=""),
        stages=(stage,),
        forecast=Forecast(storage=(), storage_peak_bytes=3 * 12 * WIDTH, device={}),
    )
    paths = RunPaths(root=root / "runs" / "r" / "1")
    return JobContext(paths=paths, plan=plan, stage=stage, recipe=recipe, task=0, attempt=attempt, batch=batch)


def work(root: Path, rank: int, attempt: int, moment: int, mode: int) -> None:
    """One rank: resume, train, save at every step; the moment is counted from the second save on."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting-{attempt}", rank=rank, world_size=2)
    job = context(root, attempt)
    folder = job.paths.checkpoints("train")
    last = [one.step for one in commit.committed(folder) if one.content == "full"]
    trainer = Trainer(rank)
    trainer.state.global_step = last[-1] if last else 0
    ledger = open_job(job.paths.ledger_dir, "train", 0, attempt) if rank == 0 else None
    saver = Saver(job, job.batch, Ranks(), ledger, Beside(), lambda step, values: None)
    while trainer.state.global_step < STEPS:
        trainer.step()
        if trainer.state.global_step == 2:
            SHIM.arm(moment, mode)
        saver.save(trainer)
    saver.close()


def group(root: Path, attempt: int, moments: tuple[int, int], mode: int = 0) -> list[int]:
    """Run two ranks and return how each ended; when one is killed the other must end by itself."""
    pids = []
    for rank, moment in enumerate(moments):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                torch.manual_seed(0)
                work(root, rank, attempt, moment, mode)
                code = 0
            except BaseException:
                with open(root / f"error-{attempt}-{rank}", "w") as stream:
                    traceback.print_exc(file=stream)
            finally:
                os._exit(code)
        pids.append(pid)
    deadline, codes = time.monotonic() + 60, {}
    while len(codes) < len(pids):
        for pid in pids:
            found, status = os.waitpid(pid, os.WNOHANG) if pid not in codes else (0, 0)
            if found:
                codes[pid] = status
        if time.monotonic() > deadline:
            [os.kill(pid, signal.SIGKILL) for pid in pids if pid not in codes]
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def tried(root: Path, moments: tuple[int, int], mode: int) -> tuple[list[int], list[str]]:
    shutil.rmtree(root, ignore_errors=True)
    paths = context(root, 1).paths
    paths.root.mkdir(parents=True)
    paths.plan.write_text("{}")
    codes = group(root, 1, moments, mode)
    folder = paths.checkpoints("train")
    found = [text for one in commit.committed(folder) for text in commit.verify(one)]
    full = [one.step for one in commit.committed(folder) if one.content == "full"]
    if not full:
        found.append("nothing is left to resume from")
    again = group(root, 2, (0, 0))
    if again != [0, 0]:
        found += [path.read_text() for path in root.glob("error-2-*")]
    found += [text for one in commit.committed(folder) for text in commit.verify(one)]
    names = sorted(path.name for path in folder.iterdir() if path.name != ".writer")
    if names != ["step-00000002-weights", "step-00000005"]:
        found.append(f"at the end there is {names}")
    held = budget.held_bytes(folder)
    if held > 2_500_000:
        found.append(f"{held} bytes are held")
    return codes, found


def main(root: Path, how: str, first: int, stride: int, count: int) -> None:
    torch.set_num_threads(1)
    wrong, num_ended, last, mode = {}, 0, 0, 0 if how == "kill" else errno.ENOSPC
    for place in range(count):
        moment = first + place * stride
        whom = ((moment, 0), (0, 1 + moment // 8), (moment, 1 + moment // 8))[place % 3]
        codes, found = tried(root / "work", whom, mode)
        if found:
            wrong[str(whom)] = found
        if any(codes):
            num_ended += 1
            last = moment
    print(json.dumps({"tried": count, "ended": num_ended, "last": last, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))
