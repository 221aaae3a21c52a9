"""Train for the tests on two forked ranks: `forked_trainings.py FOLDER`, one JSON request per line of stdin.

Everything is imported once. Each request and each of its ranks is a fork, so that a training takes seconds; nothing but
the launcher is left out. A request names a function below in `do`, the model (class of its config, its own class,
sizes), the rows of each split and the overrides. One line of JSON says what was seen.
"""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sousbatch.errors import EXIT_STOPPED

RECIPE = """\
name: tiny
task: {task}
model: {{path: model}}
data: {{splits: {{train: train.jsonl, validation: validation.jsonl, test: validation.jsonl}}, max_tokens: 32}}
train:
  {{steps: 4, global_batch: 4, micro_batch: 1, learning_rate: 0.01, log_every_steps: 1, zero: {{config: {zero}}}}}
checkpoints: {{every_steps: 2}}
consolidate: {{choose: last}}
predict: {{max_new_tokens: 4}}
tracking: {{mode: disabled}}
resources: {{default: {{device: cpu}}, train: {{device: cpu, nodes: 1, devices_per_node: 2}}}}
"""
# What every rank and every job imports; each alone takes tenths of a second.
PREPARED = (
    *("bitsandbytes", "functorch.compile", "hydra", "rapidfuzz", "rouge_score.rouge_scorer"),
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3"),
    *("deepspeed.runtime.zero.muon.muon_optimizer", "torch.distributed.algorithms.ddp_comm_hooks"),
    *("peft.tuners.lora.bnb", "peft.utils.transformers_weight_conversion"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bart", "bert", "gpt2", "llama", "mixtral", "t5")),
    *(f"sousbatch.jobs.{name}" for name in ("train", "consolidate", "predict", "merge", "score")),
    *(f"sousbatch.jobs.tasks.{name}" for name in ("causal_lm", "seq2seq", "question_answering", "classification")),
    *(f"sousbatch.jobs.training.{name}" for name in ("callback", "model", "resume", "trainer")),
    *("sousbatch.checkpoints.consolidation.consolidate", "sousbatch.jobs.generation.transformers_engine"),
    *("sousbatch.cli.plan", "sousbatch.launchers.submission", "sousbatch.recipes.compose"),
)
# ZeRO-3 would keep models as small as these whole on every rank.
ZERO = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    }
}


def prepare() -> None:
    """Import what every rank needs before the forks."""
    warnings.simplefilter("ignore")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch refuses threads of a forked process now and then
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1", "DS_SKIP_CUDA_CHECK": "1"}
    import deepspeed.ops
    import torch
    from transformers import AutoModelForCausalLM

    from sousbatch.checkpoints.consolidation import model_names
    from sousbatch.recipes.inspect import architecture, model

    sys.path.append(str(Path(__file__).parent))
    for name in (*PREPARED, "small_models"):
        import_module(name)
    AutoModelForCausalLM._model_mapping.keys()  # 300 modules of configs
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def compare_names(question: dict[str, Any]) -> Any:
        names = {name: tuple(shape) for name, shape in question["names"].items()}
        return json.loads(json.dumps(model_names._answer(question["config"], names)))

    # each is asked of a process of its own, which would import everything again
    model._run_architecture = lambda question: json.loads(json.dumps(architecture.answer(question)))
    model_names._asked = compare_names
    gc.freeze()  # else each collection in a fork would copy the memory of all that was imported


def write_project(request: dict[str, Any]) -> None:
    """Write model, tokenizer, rows and recipe into the working directory."""
    import torch
    import transformers
    from small_models import small_model
    from small_tokenizers import small_tokenizer
    from tokenizers import processors

    from sousbatch.recipes.tasks import task_of

    torch.manual_seed(0)
    texts = [value for rows in request["rows"].values() for row in rows for value in row.values()]
    tokenizer = small_tokenizer(request.get("tokenizer", "words"), [one for one in texts if isinstance(one, str)])
    num_words = tokenizer.get_vocab_size()
    if "kind" in request:
        model = small_model(request["kind"], getattr(transformers, task_of(request["task"]).model_class), num_words)
        if isinstance(model, str):
            raise NoSmallModelError(model)
    else:
        config = getattr(transformers, request["config"])(**{"vocab_size": num_words} | request["sizes"])
        model = getattr(transformers, request.get("base", request["class"]))(config)
    if request.get("has_own_head"):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5)
    model.save_pretrained("model")
    if request.get("is_random"):
        Path("model/model.safetensors").unlink()
    if request.get("has_code"):
        Path("model/helpers.py").write_text("BASE = __import__('transformers').LlamaForCausalLM\n")
        Path("model/modeling_own.py").write_text("from .helpers import BASE\n\n\nclass Own(BASE):\n    pass\n")
        named = json.loads(Path("model/config.json").read_text())
        named["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        Path("model/config.json").write_text(json.dumps(named))
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if request["task"] in ("question_answering", "classification"):  # an encoder reads <s> question </s> passage </s>
        options |= {"cls_token": "<s>", "sep_token": "</s>"}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    if request.get("has_template"):
        options["chat_template"] = "{% for turn in messages %}{{ turn.content + ' </s> ' }}{% endfor %}"
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained("model")
    Path("recipe.yaml").write_text(RECIPE.format(task=request["task"], zero=json.dumps(ZERO)))
    for split, rows in request["rows"].items():
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(*arguments: str) -> tuple[int, str, str]:
    """Return the exit code of a command line, and what it prints."""
    from sousbatch.cli.main import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


class NoSmallModelError(Exception):
    """No sizes were found that an architecture takes."""


class Refused(Exception):
    """Planning refused the recipe."""


def start_run(folder: Path, request: dict[str, Any]) -> Path:
    """Plan, and return the run's folder below *folder*."""
    code, plan, refusal = command("plan", "recipe.yaml", *request["overrides"], "--json")
    if code != 0:
        raise Refused(refusal)
    run = folder / "tiny/0123456789ab"
    run.mkdir(parents=True)
    (run / "plan.json").write_text(plan)
    return run


def train_on_two_ranks(
    run: Path,
    stage: str = "train",
    *,
    at_each_step: Callable[[int, int], None] | None = None,
    is_recorded: bool = False,
) -> list[int]:
    """Make the next attempt of a training and return how each rank ended.

    *at_each_step* is called with rank and step before each micro batch. Where it *is_recorded*, each rank leaves what
    it takes, and rank 0 the first weights and those of every saved step.
    """
    from sousbatch import ledger
    from sousbatch.cluster.ports import free_port
    from sousbatch.run_folder import RunPaths

    attempt = ledger.open_attempt(RunPaths(root=run).ledger_dir, stage, 0)
    attempt.close()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SOUSBATCH_ATTEMPT": str(attempt.number)}
                os.environ |= place | own
                code = work_as_rank(run, stage, rank, at_each_step, is_recorded=is_recorded)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < 2:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] not in (0, EXIT_STOPPED):  # the other one would wait for it
            time.sleep(1)
            [os.kill(other, signal.SIGKILL) for other in pids if other not in codes]
    return [codes[pid] for pid in pids]


def work_as_rank(
    run: Path, stage: str, rank: int, at_each_step: Callable[[int, int], None] | None, *, is_recorded: bool
) -> int:
    """Train as one rank; rank 0 keeps the weights of the last step as the engine gathers them."""
    import torch

    from sousbatch.jobs.context import run_job
    from sousbatch.jobs.train import train
    from sousbatch.jobs.training.trainer import RecipeTrainer

    save, step = RecipeTrainer._save_checkpoint, RecipeTrainer.training_step

    def gathered(self: Any) -> dict[str, torch.Tensor]:
        named = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        found = self._saver._engine.gathered(self, named)
        return {name: value.detach().float().clone() for name, value in found if value.is_floating_point()}

    def save_and_gather(self: Any, model: Any, trial: Any) -> None:
        save(self, model, trial)
        if is_recorded or self.state.global_step == self._batch.steps:
            full = gathered(self)
            if rank == 0:
                torch.save(full, f"{stage}-{self.state.global_step}.pt" if is_recorded else f"{stage}.pt")

    def record(self: Any, inputs: dict[str, Any]) -> None:
        path = Path(f"{stage}-rank{rank}.jsonl")
        if not path.exists():
            values = gathered(self)
            named = self.accelerator.unwrap_model(self.model).named_parameters()
            if rank == 0:
                trained = [name for name, value in named if value.requires_grad]
                torch.save({"values": values, "trained": trained}, f"{stage}-first.pt")
        taken = {name: value.tolist() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        with path.open("a") as lines:
            line = {"step": self.state.global_step, "rate": self.optimizer.param_groups[0]["lr"], "inputs": taken}
            print(json.dumps(line), file=lines)

    def look_and_step(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        if at_each_step is not None:
            at_each_step(rank, self.state.global_step)
        if is_recorded:
            record(self, inputs)
        return step(self, model, inputs, *arguments, **options)

    RecipeTrainer._save_checkpoint, RecipeTrainer.training_step = save_and_gather, look_and_step
    return run_job("train", train, [str(run), stage])


def expect(found: Any, expected: Any, what: str) -> None:
    assert found == expected, f"{what} ended with {found}"


def do_job(run: Path, kind: str, stage: str = "") -> int:
    """Run the job of a stage in this process."""
    from sousbatch.jobs.context import run_job

    return run_job(kind, getattr(import_module(f"sousbatch.jobs.{kind}"), kind), [str(run), stage or kind])


def losses(run: Path) -> dict[str, float]:
    """Return the losses of a training by step and kind."""
    found = {}
    for path in sorted((run / "ledger").glob("job.train-*")):
        for event in map(json.loads, path.read_text().splitlines()):
            if event["kind"] == "step":
                found |= {f"{kind} {event['step']}": event[kind] for kind in ("loss", "eval_loss") if kind in event}
    return found


def merged_by_peft(settings: Any, model: Any, base: Path, weights: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of *model* after an adapter with the trained *weights* is merged into it by peft itself."""
    from sousbatch.jobs.training.model import load_tokenizer
    from sousbatch.recipes.building import prepare_model

    # into the base as it was before it was quantised, and all in float32
    adapter, train = replace(settings.adapter, method="lora"), replace(settings.train, precision="float32")
    settings = replace(settings, adapter=adapter, train=train)
    adapted = prepare_model(settings, model, load_tokenizer(settings, base))
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            value.data.copy_(weights.pop(name))
    return dict(adapted.merge_and_unload().named_parameters())


def compare(request: dict[str, Any], run: Path, *, base: Path = Path("model"), train: str, consolidate: str) -> Any:
    """Return what is unequal between the weights that were trained and the model that was made of them.

    Also what training changed, and the names of files' tensors that only one of base and model has.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    from sousbatch.recipes.plan import read_plan

    model_class, weights = getattr(transformers, request["class"]), torch.load(f"{train}.pt")
    settings = read_plan(run / "plan.json").stage(train).settings
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # a head of other labels is made anew
    model, of_base = model_class.from_pretrained(base, **options, **settings.model.config)
    before = {name: value.detach().clone() for name, value in model.float().named_parameters()}
    after = weights if settings.adapter.method == "full" else merged_by_peft(settings, model, base, weights)
    folder = run / "model" / consolidate
    found, told = model_class.from_pretrained(folder, output_loading_info=True)
    unequal = [
        name
        for name, value in found.named_parameters()
        if not torch.allclose(value.float(), after[name].to(value.dtype).float(), rtol=2e-3, atol=1e-6)
    ]
    names = [{*chain(*map(load_file, path.glob("*.safetensors")))} for path in (base, folder)]
    return {
        "unequal": unequal,
        "missing": sorted({*told["missing_keys"], *told["unexpected_keys"]}),
        "changed": [
            name
            for name, value in before.items()
            if name not in of_base["missing_keys"]
            and (value.shape != after[name].shape or not torch.equal(value, after[name]))
        ],
        "other names": sorted((names[0] ^ names[1]) - {*of_base["missing_keys"], *of_base["unexpected_keys"]}),
        "dtype": str(found.dtype),
    }


def compare_with_rows_alone(request: dict[str, Any]) -> dict[str, Any]:
    """Train, make a model, predict; return loss and answers beside those of rows alone."""
    import transformers
    from small_models import plain_answers, plain_labels, plain_spans

    from sousbatch.recipes.plan import read_plan
    from sousbatch.recipes.tasks import task_of

    run = start_run(Path("runs").absolute(), request)
    expect(train_on_two_ranks(run), [0, 0], "the training")
    plan = read_plan(run / "plan.json")
    for stage in plan.stages[1:]:
        expect(do_job(run, stage.kind, stage.name), 0, stage.name)
    task, settings, rows = task_of(request["task"]), plan.stages[0].settings, request["rows"]["validation"]
    model, told = getattr(transformers, task.model_class).from_pretrained(
        run / "model/consolidate", output_loading_info=True
    )
    model, tokenizer = model.eval(), transformers.AutoTokenizer.from_pretrained("model")
    (path,) = run.glob("predictions/*/predictions.jsonl")
    made = [json.loads(line) for line in path.read_text().splitlines()]
    loss = None
    if task.name == "classification":
        answers: list[Any] = [value for one in made for value in one["probabilities"]]
        found, loss = plain_labels(model, tokenizer, rows)
        alone: list[Any] = [*chain(*found)]
    elif task.name == "question_answering":
        answers = [one["score"] for one in made]
        stride = settings.question_answering.stride_tokens
        alone = plain_spans(model, tokenizer, rows, settings.data.max_tokens, stride)
    else:
        answers = [one["prediction"] for one in made]
        encoded = task.encode(settings, "predict", rows, tokenizer, settings.data.max_tokens)
        prompts = [list(one.ids) for one in encoded]
        targets = [[*tokenizer(row["target"], add_special_tokens=False)["input_ids"], 2] for row in rows]
        ids, loss = plain_answers(model, prompts, targets, settings.predict.max_new_tokens)
        alone = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {
        "answers": answers,
        "alone": alone,
        "eval_loss": losses(run)["eval_loss 2"],
        "loss alone": loss,
        "missing": sorted({*told["missing_keys"], *told["unexpected_keys"]}),
        "warnings": plan.warnings,
    }


def num_predicted(run: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in run.glob("predictions/*/predictions.jsonl"))


def stop(run: Path) -> None:
    """Train until the first step has been saved."""
    from sousbatch.run_folder import RunPaths

    flag = RunPaths(root=run).stop_flag("train", 0)
    flag.parent.mkdir(parents=True, exist_ok=True)
    flag.touch()
    expect(train_on_two_ranks(run)[0], EXIT_STOPPED, "the training with a stop")
    flag.unlink()


def kill(run: Path) -> None:
    """Train until a rank is killed after the third step, of which nothing is saved."""

    def at_each_step(rank: int, step: int) -> None:
        if (rank, step) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    expect(train_on_two_ranks(run, at_each_step=at_each_step)[1], -signal.SIGKILL, "the training with a kill")


def stop_and_resume(request: dict[str, Any]) -> dict[str, Any]:
    """Train undisturbed; train again with a stop or a kill; make a model of that, predict, merge, score."""
    from sousbatch.recipes.plan import read_plan

    undisturbed, run = (start_run(Path(name).absolute(), request) for name in ("undisturbed", "resumed"))
    expect(train_on_two_ranks(undisturbed), [0, 0], "the training without a stop")
    (kill if request.get("is_killed") else stop)(run)
    expect(train_on_two_ranks(run), [0, 0], "the training that was resumed")
    for stage in read_plan(run / "plan.json").stages[1:]:
        expect(do_job(run, stage.kind, stage.name), 0, stage.name)
    found = compare(request, run, train="train", consolidate="consolidate")
    return found | {"losses": losses(undisturbed), "resumed": losses(run), "rows": num_predicted(run)}


def train_in_a_chain(request: dict[str, Any]) -> dict[str, Any]:
    """Train, make a model, tune an adapter on that model, merge it in, and predict with the result."""
    run = start_run(Path("runs").absolute(), request)
    expect(train_on_two_ranks(run), [0, 0], "train")
    expect(do_job(run, "consolidate"), 0, "consolidate")
    expect(train_on_two_ranks(run, "tune"), [0, 0], "tune")
    for kind, stage in (("consolidate", "merged"), ("predict", ""), ("merge", "")):
        expect(do_job(run, kind, stage), 0, stage or kind)
    found = compare(request, run, base=run / "model/consolidate", train="tune", consolidate="merged")
    return found | {"rows": num_predicted(run)}


def do_every_stage(request: dict[str, Any]) -> dict[str, Any]:
    """Do the stages of a recipe one after another; each model is compared with what was trained for it."""
    from sousbatch.recipes.plan import read_plan
    from sousbatch.recipes.tasks import task_of

    run = start_run(Path("runs").absolute(), request)
    plan = read_plan(run / "plan.json")
    request["class"] = task_of(request["task"]).model_class
    models: dict[str, Any] = {}
    for stage in plan.stages:
        if stage.kind == "train":
            expect(train_on_two_ranks(run, stage.name), [0, 0], stage.name)
            continue
        expect(do_job(run, stage.kind, stage.name), 0, stage.name)
        if stage.kind == "consolidate":
            trained = plan.stage(stage.of)
            base = run / "model" / trained.of if trained.of else Path("model")
            models[stage.name] = compare(request, run, base=base, train=trained.name, consolidate=stage.name)
    rows = {
        stage.name: [stage.splits["predict"].num_rows, len(path.read_text().splitlines())]
        for stage in plan.stages
        if stage.kind == "predict"
        for path in (run / "predictions" / stage.name).glob("predictions.jsonl")
    }
    return {"models": models, "rows": rows}


def diverge(request: dict[str, Any]) -> dict[str, Any]:
    """Train until the training ends itself, and make a model of what it kept."""
    from sousbatch.checkpoints import commit

    run = start_run(Path("runs").absolute(), request)
    codes = train_on_two_ranks(run)
    kept = {one.step: one.metric for one in commit.committed(run / "checkpoints/train")}
    expect(do_job(run, "consolidate"), 0, "consolidate")
    manifest = json.loads((run / "model/consolidate/manifest.json").read_text())
    events = [json.loads(line) for path in run.glob("ledger/*.jsonl") for line in path.read_text().splitlines()]
    why = [event["message"] for event in events if event["kind"] == "diverged"]
    return {"codes": codes, "why": why, "losses": losses(run), "kept": kept, "step": manifest["step"]}


def resume_and_predict_twice(request: dict[str, Any]) -> dict[str, Any]:
    """Train undisturbed, and with a kill; make a model, predict, merge, score; predict again in other batches.

    Overrides that planning refuses are left out.
    """
    from sousbatch.recipes.plan import read_plan

    refusals = leave_out_what_is_refused(request)
    undisturbed = run = start_run(Path("undisturbed").absolute(), request)
    codes = train_on_two_ranks(undisturbed)
    if codes != [0, 0]:
        return {"codes": codes, "events": told(undisturbed), "overrides": request["overrides"]}
    if request["killed_at"] is not None:
        run = start_run(Path("resumed").absolute(), request)

        def at_each_step(rank: int, step: int) -> None:
            if (rank, step) == (1, request["killed_at"]):
                os.kill(os.getpid(), signal.SIGKILL)

        if train_on_two_ranks(run, at_each_step=at_each_step) != [0, 0]:
            expect(train_on_two_ranks(run), [0, 0], "the training that was resumed")
    stages = read_plan(run / "plan.json").stages[1:]
    again = Path("again/tiny/0123456789ab").absolute()
    answers: list[Any] = []
    for stage in stages:
        expect(do_job(run, stage.kind, stage.name), 0, stage.name)
        if stage.kind == "consolidate":
            shutil.copytree(run, again)
    batches = ["predict.batch_rows=2", "predict.unit_rows=3", "predict.batch_tokens=10000"]
    code, plan, refusal = command("plan", "recipe.yaml", *request["overrides"], *batches, "--json")
    expect(code, 0, f"the plan with other batches ({refusal})")
    (again / "plan.json").write_text(plan)
    for stage in stages[1:3]:
        expect(do_job(again, stage.kind, stage.name), 0, f"{stage.name} again")
    for folder in (run, again):
        paths = sorted(folder.glob("predictions/*/predictions*.jsonl"))
        answers.append({path.name: [*map(json.loads, path.read_text().splitlines())] for path in paths})
    predict = next(stage for stage in stages if stage.kind == "predict")
    return {
        "refusals": refusals,
        "overrides": request["overrides"],
        "losses": [losses(undisturbed), losses(run)],
        "answers": answers,
        "rows": predict.splits["predict"].num_rows,
        "warnings": read_plan(run / "plan.json").warnings,
    }


def compare_with_plain_training(request: dict[str, Any]) -> dict[str, Any]:
    """Do every stage of a recipe, then all of it again in plain torch; return in what they differ."""
    from plain_oracle import differences, followed

    from sousbatch.recipes.plan import read_plan

    followed(request)
    refusals = leave_out_what_is_refused(request)
    run = start_run(Path("run").absolute(), request)
    codes = train_on_two_ranks(run, is_recorded=True)
    if codes != [0, 0]:
        return {"codes": codes, "events": told(run), "overrides": request["overrides"]}
    for stage in read_plan(run / "plan.json").stages[1:]:
        expect(do_job(run, stage.kind, stage.name), 0, stage.name)
    return {"refusals": refusals, "overrides": request["overrides"], "differences": differences(run)}


def leave_out_what_is_refused(request: dict[str, Any]) -> list[str]:
    """Take out of the overrides those that a refusal names, else the last one; return the refusals."""
    refusals = []
    while request["overrides"]:
        code, _, refusal = command("plan", "recipe.yaml", *request["overrides"], "--json")
        if code == 0:
            break
        refusals.append(refusal)
        named = [one for one in request["overrides"] if one.partition("=")[0] in refusal]
        request["overrides"] = [one for one in request["overrides"] if one not in (named or request["overrides"][-1:])]
    return refusals


def told(run: Path) -> list[Any]:
    """Return what the ledger of a run has of failures."""
    events = [json.loads(line) for path in run.glob("ledger/*.jsonl") for line in path.read_text().splitlines()]
    return [event for event in events if event["kind"] in ("diverged", "error")]


def fill_the_disk(request: dict[str, Any]) -> dict[str, Any]:
    """Train on the file system of *disk*, which is full from step 3 on; then consolidate there, and free it."""
    from sousbatch.checkpoints import commit

    disk = Path(request["disk"])
    run = start_run(disk, request)

    def fill(rank: int, step: int) -> None:
        if rank == 0 and step == 3:
            with (disk / "others").open("wb") as others:
                room = os.fstatvfs(others.fileno())
                os.posix_fallocate(others.fileno(), 0, room.f_bavail * room.f_frsize)

    if request["lies"]:  # as where a quota counts
        os.statvfs = lambda path: SimpleNamespace(f_bavail=10**9, f_frsize=4096, f_favail=10**9, f_files=10**9)
    codes = train_on_two_ranks(run, at_each_step=fill)
    kept = commit.committed(run / "checkpoints/train")
    found = {
        "codes": codes,
        "kept": [[one.step, one.content] for one in kept],
        "wrong": [problem for one in kept for problem in commit.verify(one)],
        "left": [path.name for path in run.glob("checkpoints/train/.*") if path.name != ".writer"],
        "consolidate": do_job(run, "consolidate"),
    }
    (disk / "others").unlink()
    found["after it is freed"] = do_job(run, "consolidate")
    return found | {"step": json.loads((run / "model/consolidate/manifest.json").read_text())["step"]}


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Do a request in a process of its own; return what it saw, how planning refused it, or how it failed."""
    folder.mkdir()
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        [os.dup2(log, number) for number in (0, 1, 2)]
        try:
            if "seed" in request:
                from random_recipes import draw

                request = draw(request["seed"]) | request
            write_project(request)
            seen = globals()[request["do"]](request)
            Path("seen.json").write_text(json.dumps(seen))
        except Refused as refusal:
            Path("seen.json").write_text(json.dumps({"refused": str(refusal)}))
        except NoSmallModelError as fault:
            Path("seen.json").write_text(json.dumps({"no small model": str(fault)}))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    if (folder / "seen.json").exists():
        return dict(json.loads((folder / "seen.json").read_text()))
    return {"failed": (folder / "log").read_text(errors="replace")[-6000:]}


def main(folder: Path) -> None:
    os.chdir(folder)
    answers, sys.stdout = sys.stdout, sys.stderr  # transformers prints what it thinks of the environment
    prepare()
    for number, line in enumerate(iter(sys.stdin.readline, "")):
        print(json.dumps(answer(json.loads(line), folder / f"request-{number}")), file=answers, flush=True)
    os._exit(0)  # to take down all that was imported takes a second


if __name__ == "__main__":
    main(Path(sys.argv[1]))
