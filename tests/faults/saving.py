"""Two ranks that save, commit, strip and rotate with the real Saver, at a bad moment: run with fail_at.so preloaded.

`saving.py FOLDER kill|ENOSPC|EDQUOT ZERO_STAGE [COUNT [PART PARTS]]` counts the moments of each rank, then tries all
of them, or COUNT that are spread evenly: each kills rank 0, rank 1, or both at once, or lets all fail from then on that
takes room. What is left is checked, and a second attempt of two ranks must resume from it and end. PART of PARTS is for
several processes that share the work. Prints one JSON line.
"""

from __future__ import annotations

import ctypes
import errno
import gc
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

from sousbatch.checkpoints import commit
from sousbatch.checkpoints.capacity import allocation
from sousbatch.checkpoints.commit import Checkpoint
from sousbatch.cluster.site import Site
from sousbatch.jobs.context import JobContext
from sousbatch.jobs.training.collectives import Ranks
from sousbatch.jobs.training.engines import deepspeed as deepspeed_engine
from sousbatch.jobs.training.saver import Saver
from sousbatch.ledger import open_job
from sousbatch.recipes.facts import DiskSpace, Inputs, ModelFacts, TensorFacts
from sousbatch.recipes.forecast.storage import weights_of, with_slack
from sousbatch.recipes.plan import Batch, CheckpointForecast, Forecast, ForecastLine, Plan, Stage
from sousbatch.recipes.schema import Checkpoints, Model, Recipe, Resources, Train, Zero
from sousbatch.run_folder import RunPaths

SHIM = ctypes.CDLL(None)
STEPS, BEST, WIDTH = 4, 2, 40_000  # the best will be stripped to weights
KILL, KILL_BOTH = 0, -1
FULL_BYTES = 12 * WIDTH
STARTS_AT, BUDGET_BYTES = 0.5, 2_500_000
WHOM = {"rank 0": (1, 0), "rank 1": (0, 1), "both": (1, 0)}  # whose moment is counted


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

    def __init__(self, rank: int) -> None:
        self.rank, self.state, self.args = rank, State(), type("Args", (), {"world_size": 2})
        self.model = torch.nn.Linear(WIDTH, 1, bias=False)
        torch.nn.init.constant_(self.model.weight, STARTS_AT)
        self.model.config = Beside()
        self.model.save_pretrained = self._save_model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.accelerator = self

    def unwrap_model(self, model: Any) -> Any:
        return model

    def _save_model(self, folder: Path, **options: bool) -> None:
        save_file({"weight": self.model.weight.data}, Path(folder) / "model.safetensors")

    def _save_rng_state(self, folder: str) -> None:
        torch.save({"state": torch.zeros(100)}, Path(folder) / f"rng_state_{self.rank}.pt")

    def _save_scaler(self, folder: str) -> None:
        pass

    def resume(self, checkpoint: Checkpoint) -> None:
        self.state.global_step = checkpoint.step

    def step(self) -> None:
        self.state.global_step += 1
        self.learn()
        self.state.log_history.append({"step": self.state.global_step, "eval_loss": abs(self.state.global_step - BEST)})

    def learn(self) -> None:
        self.model(torch.ones(WIDTH)).backward()
        self.optimizer.step()


class ZeroTrainer(Trainer):
    """The same with DeepSpeed's real engine."""

    def __init__(self, rank: int, zero_stage: int) -> None:
        import deepspeed

        super().__init__(rank)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
        }
        self.model_wrapped = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=config)[0]
        deepspeed_engine.make_safe(self.model_wrapped)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Load what was saved; every weight must be what so many steps make of it."""
        from deepspeed.utils import safe_get_full_fp32_param

        self.model_wrapped.load_checkpoint(str(checkpoint.path))
        assert self.model_wrapped.global_steps == checkpoint.step
        found = safe_get_full_fp32_param(self.model.weight)
        expected = STARTS_AT - 1e-3 * checkpoint.step  # Adam's steps have the size of its rate while gradients agree
        assert torch.allclose(found, torch.full_like(found, expected), atol=2e-5), (checkpoint, found)
        super().resume(checkpoint)

    def learn(self) -> None:
        self.model_wrapped.backward(self.model_wrapped(torch.ones(WIDTH)).sum())
        self.model_wrapped.step()


def context(
    paths: RunPaths, attempt: int, *, zero_stage: int = 0, peak_bytes: int = 3 * FULL_BYTES, **budget: float
) -> JobContext:
    """Return a job that saves at every step within a *budget*, as the recipe's checkpoints name it."""
    recipe = Recipe(
        name="r",
        model=Model(path="m"),
        train=Train(precision="float32", zero=Zero(stage=zero_stage)),
        checkpoints=Checkpoints(every_steps=1, thin=True, **budget),
    )
    batch = Batch(
        world_size=2, micro_batch=1, accumulation=1, steps=STEPS, steps_per_epoch=5, warmup_steps=0, save_every_steps=1
    )
    stage = Stage(
        name="train", kind="train", of=None, resources=Resources(), num_tasks=1, after=(), batch=batch, settings=recipe
    )
    tensor = TensorFacts(name="weight", shape=(1, WIDTH), dtype="float32")
    model = ModelFacts(
        folder="m", tokenizer_folder="m", digest="", has_weights=True, num_params=WIDTH, tensors=(tensor,), config={}
    )
    least_bytes = with_slack(weights_of(recipe, model).num_bytes)
    kept = CheckpointForecast(
        save_level="full", keeps_all=True, free_bytes=0, full_bytes=0, least_bytes=least_bytes, fits=True, change=""
    )
    plan = Plan(
        recipe=recipe,
        site=Site(name="here", launcher="local", cpus_per_node=1, memory_bytes=1, gpus_per_node=0, gpu_memory_bytes=0),
        inputs=Inputs(
            model=model, splits={}, disk_space=DiskSpace(folder="/", free_bytes=1, free_inodes=1), code_digest=""
        ),
        stages=(stage,),
        forecast=Forecast(
            storage=(ForecastLine(what="logs", num_bytes=60_000, formula=""),),
            storage_peak_bytes=peak_bytes,
            device={},
            checkpoints={"train": kept},
        ),
    )
    return JobContext(paths=paths, plan=plan, stage=stage, task=0, attempt=attempt, batch=batch)


def work(root: Path, rank: int, attempt: int, zero_stage: int, moment: int, mode: int) -> None:
    """One rank: resume, train, save at every step; the moment is counted from the second save on."""
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting-{attempt}", rank=rank, world_size=2)
    job = context(RunPaths(root=root / "runs/r/1"), attempt, zero_stage=zero_stage, budget_gb=BUDGET_BYTES / 1e9)
    last = [one for one in commit.committed(job.paths.checkpoints("train")) if one.content == "full"]
    trainer = ZeroTrainer(rank, zero_stage) if zero_stage else Trainer(rank)
    if last:
        trainer.resume(last[-1])
    ledger = open_job(job.paths.ledger_dir, "train", 0, attempt) if rank == 0 else None
    saver = Saver(job, job.batch, Ranks(), ledger, Beside(), lambda step, values: None)
    while trainer.state.global_step < STEPS:
        trainer.step()
        if trainer.state.global_step == 2:
            SHIM.arm(moment, mode)
        saver.save(trainer)
    saver.close()
    (root / f"moments-{rank}").write_text(str(SHIM.counted()))


def group(root: Path, attempt: int, zero_stage: int, moments: tuple[int, int], mode: int = 0) -> list[int]:
    """Run two ranks, a process group of their own, and return how each ended; none may wait for a dead one for ever."""
    pids: list[int] = []
    for rank, moment in enumerate(moments):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                work(root, rank, attempt, zero_stage, moment, mode)
                code = 0
            except BaseException:
                with open(root / f"error-{attempt}-{rank}", "w") as stream:
                    traceback.print_exc(file=stream)
            finally:
                os._exit(code)
        os.setpgid(pid, pids[0] if pids else pid)
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


def tried(root: Path, zero_stage: int, moments: tuple[int, int], mode: int) -> tuple[list[int], list[str]]:
    shutil.rmtree(root, ignore_errors=True)
    paths = RunPaths(root=root / "runs/r/1")
    paths.root.mkdir(parents=True)
    paths.plan.write_text("{}")
    codes = group(root, 1, zero_stage, moments, mode)
    folder = paths.checkpoints("train")
    found = [text for one in commit.committed(folder) for text in commit.verify(one)]
    full = [one.step for one in commit.committed(folder) if one.content == "full"]
    if not full:
        found.append("nothing is left to resume from")
    again = group(root, 2, zero_stage, (0, 0))
    if again != [0, 0]:
        found += [f"the second attempt ended with {again}", *(path.read_text() for path in root.glob("error-2-*"))]
    found += [text for one in commit.committed(folder) for text in commit.verify(one)]
    names = sorted(path.name for path in folder.iterdir() if path.name != ".writer")
    if names != ["step-00000002-weights", f"step-{STEPS:08d}"]:
        found.append(f"at the end there is {names}")
    held = allocation.measure_usage(folder)
    if held > BUDGET_BYTES:
        found.append(f"{held} bytes are held")
    return codes, found


def main(root: Path, how: str, zero_stage: int, count: int | None = None, part: int = 0, parts: int = 1) -> None:
    prepare()
    if zero_stage:
        prepare_deepspeed()
    gc.freeze()  # a collection in a child would copy every page that torch's objects lie on
    is_kill = how == "kill"
    (root / "work" / "runs/r/1").mkdir(parents=True)
    (root / "work" / "runs/r/1/plan.json").write_text("{}")
    if group(root / "work", 1, zero_stage, (0, 0), KILL if is_kill else getattr(errno, how)) != [0, 0]:
        raise SystemExit("\n".join(path.read_text() for path in (root / "work").glob("error-1-*")))
    num_moments = [int((root / "work" / f"moments-{rank}").read_text()) for rank in range(2)]
    todo = [
        (whom, moment)
        for whom, (first, second) in WHOM.items()
        for moment in range(1, first * num_moments[0] + second * num_moments[1] + 1)
    ]
    if count is not None:
        stride = len(todo) // count | 1  # odd, so that before and after a call take turns
        todo = todo[stride // 2 :: stride]
    faults, num_ended = dict[str, list[str]](), 0
    for whom, moment in todo[part::parts]:
        mode = getattr(errno, how) if not is_kill else KILL_BOTH if whom == "both" else KILL
        first, second = WHOM[whom] if is_kill or whom != "both" else (1, 1)
        codes, wrong = tried(root / "work", zero_stage, (first * moment, second * moment), mode)
        print(f"{whom} at {moment}: {codes} {wrong}", file=sys.stderr, flush=True)
        if wrong:
            faults[f"{whom} at {moment}"] = wrong
        num_ended += any(codes)
    print(json.dumps({"moments": num_moments, "tried": len(todo[part::parts]), "ended": num_ended, "wrong": faults}))


def prepare() -> None:
    """Import once, before the forks, what each process would import: a first step takes a second."""
    import sousbatch.checkpoints.consolidation.consolidate  # noqa: F401

    torch.set_num_threads(1)
    Trainer(0).step()


def prepare_deepspeed() -> None:
    """The same of DeepSpeed, without its extensions, which each rank would compile."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1", "DS_SKIP_CUDA_CHECK": "1"}
    import deepspeed
    import deepspeed.ops
    import functorch.compile  # noqa: F401  # 580 modules

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
