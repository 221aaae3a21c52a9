"""Train with each sharding engine on two real ranks, and print as JSON what the engines' contract speaks of.

`two_ranks.py FOLDER {"name": [ZERO_STAGE, OPTIMIZER]}`: each case trains two steps with `jobs.train` and saves at both;
then the second checkpoint is removed, and a second attempt resumes at the first.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import sys
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

RECIPE = """\
name: tiny
model: {path: model}
data: {splits: {train: train.jsonl, validation: validation.jsonl}, max_tokens: 32}
train: {steps: 2, global_batch: 4, micro_batch: 1, precision: bfloat16, learning_rate: 0.01}
checkpoints: {every_steps: 1, keep_last: 2, metric: character_accuracy}
predict: {max_new_tokens: 3}
resources: {default: {device: cpu}, train: {device: cpu, nodes: 1, devices_per_node: 2}}
stages: {train: {}}
"""


def prepare(folder: Path) -> None:
    """Import what every rank needs before the forks, and write a project of a hundred thousand parameters."""
    warnings.simplefilter("ignore")
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1", "DS_SKIP_CUDA_CHECK": "1"}
    import deepspeed
    import deepspeed.ops
    import functorch.compile  # noqa: F401  # 580 modules
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import sousbatch.jobs.training.callback
    import sousbatch.jobs.training.resume
    import sousbatch.jobs.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(folder / "model")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *map(str, range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder / "model")
    rows = [{"input": f"{number} {number + 1}", "target": f"{number + 2}"} for number in range(8)]
    rows[2]["target"] = "4 5 6 7 8"
    for split, number in (("train", 8), ("validation", 3)):  # which two ranks do not share evenly
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:number]))
    (folder / "recipe.yaml").write_text(RECIPE)


def command(*arguments: str) -> str:
    """Return what a command line prints."""
    from sousbatch.cli.main import main

    with redirect_stdout(io.StringIO()) as printed:
        code = main(arguments)
    assert code == 0, (arguments, printed.getvalue())
    return printed.getvalue()


def rank_of(run: Path, out: Path, rank: int, attempt: int) -> None:
    """Train as one rank; after each save, leave what the engine says of the model."""
    from sousbatch.jobs.context import read_context
    from sousbatch.jobs.train import train
    from sousbatch.jobs.training.trainer import RecipeTrainer

    save = RecipeTrainer._save_checkpoint

    def save_and_look(self: Any, model: Any, trial: Any) -> None:
        save(self, model, trial)
        look(self, out / f"{attempt}-{self.state.global_step}-{rank}")

    RecipeTrainer._save_checkpoint = save_and_look
    code = train(read_context([str(run), "train"]))
    assert code == 0, code


def look(trainer: Any, path: Path) -> None:
    import torch

    engine = trainer._saver._engine
    named = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    full = {name: value.detach().float().clone() for name, value in engine.gathered(trainer, named)}
    facts = {
        "losses": [one["eval_loss"] for one in trainer.state.log_history if "eval_loss" in one],
        "metrics": [one["eval_character_accuracy"] for one in trainer.state.log_history if "eval_loss" in one],
        "digest": hashlib.sha256(b"".join(value.numpy().tobytes() for value in full.values())).hexdigest(),
        "shapes": all(engine.full_shape(named[name]) == tuple(value.shape) for name, value in full.items()),
        "largest_part": max(float(engine.local_part(value).abs().max()) for value in named.values()),
        "largest": max(float(value.bfloat16().abs().max()) for value in full.values()),
    }
    path.with_suffix(".json").write_text(json.dumps(facts))
    torch.save(full, path.with_suffix(".pt"))


def both_ranks(run: Path, out: Path, attempt: int) -> None:
    from sousbatch import ledger
    from sousbatch.cluster.ports import free_port
    from sousbatch.run_folder import RunPaths

    ledger.open_attempt(RunPaths(root=run).ledger_dir, "train", 0).close()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.environ |= place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "SOUSBATCH_ATTEMPT": str(attempt)}
                os.dup2(2, 1)
                rank_of(run, out, rank, attempt)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    for _ in range(2):
        pid, status = os.wait()
        pids.remove(pid)
        if status:  # the other one would wait for it
            [os.kill(other, signal.SIGKILL) for other in pids]
            raise SystemExit(f"a rank of attempt {attempt} ended with status {status}")


def mean_loss(model_dir: Path, path: Path) -> float:
    """Return the mean loss of all tokens of the targets in *path*, row by row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    losses = []
    for row in map(json.loads, path.read_text().splitlines()):
        prompt, target = tokenizer(row["input"])["input_ids"], tokenizer(row["target"] + "</s>")["input_ids"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(target), reduction="none"))
    return float(torch.cat(losses).mean())


def facts_of(folder: Path, zero_stage: int, optimizer: str) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    out, run = folder / f"out-{zero_stage}", folder / f"runs/tiny/{zero_stage:012d}"
    out.mkdir()
    run.mkdir(parents=True)
    (run / "plan.json").write_text(
        command("plan", "recipe.yaml", f"train.zero.stage={zero_stage}", f"train.optimizer={optimizer}", "--json")
    )
    both_ranks(run, out, 1)
    first, second = sorted((run / "checkpoints/train").glob("step-*"))
    num_bytes = sum(path.stat().st_size for path in second.rglob("*") if path.is_file())
    command("checkpoints", "consolidate", str(second), str(out / "model"), "--dtype", "float32")
    full, model = torch.load(out / "1-2-0.pt"), load_file(out / "model/model.safetensors")
    loss = mean_loss(out / "model", folder / "validation.jsonl")
    shutil.rmtree(second)
    both_ranks(run, out, 2)
    return {
        "num_bytes": num_bytes,
        "loss": loss,
        "unequal": [name for name, value in full.items() if not torch.equal(value, model[name])],
        "shapes": {name: list(value.shape) for name, value in full.items()},
        "saw": {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")},
    }


def main(folder: Path, cases: dict[str, tuple[int, str]]) -> None:
    os.chdir(folder)
    prepare(folder)
    print(json.dumps({name: facts_of(folder, *case) for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
