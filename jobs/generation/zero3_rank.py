"""Run a rank of zero3: `python -m sousbatch.jobs.generation.zero3_rank PIPE`.

It holds its part of the model and answers the prompts that come through the pipe, with transformers' `generate`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...cluster import processes
from ...errors import RunError, SousbatchError
from ...recipes.schema import StageSettings, validate
from ..training.model import load_tokenizer
from . import Prompt
from .transformers_engine import TransformersEngine


class InStep:
    """Has all ranks run the model at the same time.

    ZeRO-3 gathers each layer from all of them when it is its turn. A rank without rows computes one token and throws it
    away, until no rank has any. So the ranks may have batches of other sizes and numbers. With transformers'
    `synced_gpus` a rank that is done would go on with its own rows, beyond the positions that the model has, and wait
    at the end of each batch. An encoder-decoder would need more: it leaves out layers whose outputs it remembers.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._is_padding = model, False
        model.register_forward_pre_hook(self._before, prepend=True)

    def wait_for_others(self) -> None:
        """Take part in what other ranks compute, until none has anything to do."""
        token = torch.ones((1, 1), dtype=torch.long, device=self._model.device)
        while self._agree(0):
            self._is_padding = True
            with torch.no_grad():
                self._model(input_ids=token, attention_mask=token, use_cache=False)
            self._is_padding = False

    def _before(self, model: Any, inputs: Any) -> None:
        if not self._is_padding:
            self._agree(1)

    def _agree(self, wants: int) -> bool:
        """Return whether any rank wants to run the model."""
        vote = torch.tensor(wants, device=self._model.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote.item())


def _load(asked: Mapping[str, Any]) -> tuple[TransformersEngine, InStep]:
    import deepspeed
    import deepspeed.ops
    import transformers
    from transformers.integrations import HfDeepSpeedConfig

    settings, device = _settings(asked), asked["device"]
    if device == "cpu":  # its shared-memory extension would be compiled by all ranks at once; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        deepspeed.init_distributed("nccl", auto_mpi_discovery=False)
    config = _config(settings, asked["dtype"], dist.get_world_size())
    kept = HfDeepSpeedConfig(config)  # while it lives, transformers loads a model in parts
    spec, folder = settings.model, asked["model_dir"]
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    own = transformers.AutoConfig.from_pretrained(folder, **options, **spec.config)
    if spec.attention:
        options["attn_implementation"] = spec.attention
    model = getattr(transformers, asked["model_class"]).from_pretrained(
        folder, config=own, dtype=getattr(torch, asked["dtype"]), **options
    )
    sharded = deepspeed.initialize(model=model.eval(), config=config)[0]
    model = sharded.module.eval()
    model.sharded_by = (kept, [sharded])  # which live as long as the model
    generate = model.generate

    def refusing_halves(**arguments: Any) -> Any:
        try:
            return generate(**arguments, synced_gpus=False)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            raise RunError(  # a smaller batch after it would meet ranks that wait in this one
                f"the memory of device {os.environ['RANK']} is too small for {len(arguments['input_ids'])} rows at "
                "once; lower predict.batch_rows, or set predict.offload=true"
            ) from error

    model.generate = refusing_halves
    tokenizer = load_tokenizer(settings, Path(asked["tokenizer_dir"]))
    return TransformersEngine(settings, model, tokenizer), InStep(model)


def _config(settings: StageSettings, dtype: str, world_size: int) -> dict[str, Any]:
    sharding: dict[str, Any] = {"stage": 3}
    if settings.predict.offload:
        sharding["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants it; nothing trains
        "train_batch_size": world_size,
        "zero_optimization": sharding,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "steps_per_print": 1_000_000_000,
    }


def _settings(asked: Mapping[str, Any]) -> StageSettings:
    settings, faults = validate.build(StageSettings, asked["settings"])
    assert settings is not None, faults
    return settings


def serve(pipe: Connection) -> None:
    """Answer what comes through *pipe* until its other end is closed."""
    engine, in_step = _load(json.loads(pipe.recv_bytes()))
    pipe.send_bytes(json.dumps({"config": engine.config} if os.environ["RANK"] == "0" else {}).encode())
    while True:
        asked = json.loads(pipe.recv_bytes())
        prompts = [Prompt(**one) for one in asked["prompts"]]
        made = engine.with_settings(_settings(asked)).generate(prompts) if prompts else []
        in_step.wait_for_others()
        pipe.send_bytes(json.dumps({"generations": [asdict(one) for one in made]}).encode())


def main(handle: str) -> int:
    """Serve until the job's process closes the pipe; return the exit code."""
    processes.die_with_parent(signal.SIGKILL)
    pipe = Connection(int(handle))
    try:
        serve(pipe)
    except EOFError:
        return 0
    except Exception as error:  # the job's process says it once; the trace stays in the log
        traceback.print_exc()
        is_clear = isinstance(error, SousbatchError)
        text = str(error) if is_clear else f"{type(error).__name__}: {error}"
        pipe.send_bytes(json.dumps({"error": text, "is_clear": is_clear}).encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
