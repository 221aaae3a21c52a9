"""Write real DeepSpeed checkpoints on the CPU, each beside what it must convert to.

    python generate_checkpoints.py ROOT

One parent imports torch, DeepSpeed, transformers and peft once and forks the ranks of two
sessions (2 and 3 ranks) that run at the same time. ROOT/<case>/ck is the checkpoint,
live.safetensors the masters gathered by the running engine, deepspeed.safetensors what
DeepSpeed's own converter returns for it (absent where that fails).
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(DS_ACCELERATOR="cpu", DS_IGNORE_CUDA_DETECTION="1", OMP_NUM_THREADS="1", DS_SKIP_CUDA_CHECK="1")

import accelerate  # type: ignore[import-untyped]
import deepspeed  # type: ignore[import-untyped]
import deepspeed.ops  # type: ignore[import-untyped]
import functorch.compile  # type: ignore[import-untyped]  # noqa: F401  # 580 modules; else each rank imports them
import peft
import torch
import transformers
from deepspeed.checkpoint import ds_to_universal  # type: ignore[import-untyped]
from deepspeed.utils import (  # type: ignore[import-untyped]
    safe_get_full_fp32_param,
    zero_to_fp32,
    zero_to_torch,
)
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

# Without this each rank would compile the shared-memory communication extension.
deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
# torch computes fp16 on the CPU; DeepSpeed asks an extension that it would have to build.
deepspeed.get_accelerator().is_fp16_supported = lambda: True


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: which engine settings wrote it, and what the model looked like."""

    name: str
    stage: int
    dtype: str = "bf16"
    world_size: int = 2
    model: str = "odd"
    is_embedding_frozen: bool = False
    is_frozen_excluded: bool = False
    has_converter: bool = True
    has_one_group: bool = False
    zero: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


_PLAIN_ADAM = {"zero_force_ds_cpu_optimizer": False}  # DeepSpeed's own would have to be built

CASES = (
    Case(name="z3_bf16", stage=3, model="llama"),
    Case(name="z3_fp32", stage=3, dtype="fp32"),
    Case(name="z3_fp16", stage=3, dtype="fp16"),
    Case(name="z3_subgroups", stage=3, zero={"sub_group_size": 150}),
    Case(name="z3_tied", stage=3, model="tied"),
    Case(name="z3_lora", stage=3, model="lora", is_frozen_excluded=True),
    Case(name="z2_lora", stage=2, model="lora", is_frozen_excluded=False),
    Case(name="z2_round_robin", stage=2, zero={"round_robin_gradients": True}),
    Case(name="z2_frozen_fp16", stage=2, dtype="fp16", is_embedding_frozen=True),
    Case(name="z1_frozen", stage=1, is_embedding_frozen=True, has_converter=False),
    Case(
        name="z1_fp32_accumulation",
        stage=1,
        has_converter=False,
        extra={"data_types": {"grad_accum_dtype": "fp32"}},
    ),
    Case(name="z0_tied", stage=0, dtype="fp32", model="tied", has_converter=False),
    Case(name="z3_bf16_3_ranks", stage=3, world_size=3),
    Case(name="z3_frozen_3_ranks", stage=3, world_size=3, is_embedding_frozen=True),
    Case(name="z1_3_ranks", stage=1, world_size=3, dtype="fp16"),
    Case(name="z3_one_group", stage=3, has_one_group=True),
    Case(name="z3_offload", stage=3, zero={"offload_optimizer": {"device": "cpu"}}, extra=_PLAIN_ADAM),
    Case(name="z3_hpz", stage=3, zero={"zero_hpz_partition_size": 2}),
    Case(name="z3_tied_frozen_3_ranks", stage=3, world_size=3, model="tied", is_embedding_frozen=True),
    Case(name="z3_lora_whole", stage=3, model="lora"),
    Case(name="z2_bf16", stage=2),
    Case(name="z2_fp32", stage=2, dtype="fp32"),
    Case(name="z2_offload", stage=2, zero={"offload_optimizer": {"device": "cpu"}}, extra=_PLAIN_ADAM),
    Case(name="z2_tied", stage=2, model="tied"),
    Case(name="z2_round_robin_3_ranks", stage=2, world_size=3, zero={"round_robin_gradients": True}),
    Case(name="z1_bf16", stage=1),
    Case(name="z1_lora", stage=1, model="lora", has_converter=False),
    Case(name="z1_frozen_tied", stage=1, model="tied", is_embedding_frozen=True, has_converter=False),
)
# Made into DeepSpeed's universal checkpoints too.
UNIVERSAL = ("z3_bf16", "z3_frozen_3_ranks", "z2_frozen_fp16", "z2_tied")


class OddNet(torch.nn.Module):
    """A model of odd sizes, so that nearly every tensor is padded, with every kind of buffer."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(37, 11)
        self.norm = torch.nn.LayerNorm(11)
        self.up = torch.nn.Linear(11, 7)
        self.gain = torch.nn.Parameter(torch.randn(1))
        self.down = torch.nn.Linear(7, 11, bias=False)
        self.head = torch.nn.Linear(11, 37, bias=False)
        self.register_buffer("num_seen", torch.tensor(5))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("rates", torch.rand(5) * 3)
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.norm(self.embed(input_ids))
        return self.head(hidden + self.down(torch.tanh(self.up(hidden) * self.gain))).float().pow(2).mean()


def tiny_llama(*, is_tied: bool = False) -> Any:
    """Build a random Llama of odd sizes."""
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=18,
        intermediate_size=23,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=is_tied,
    )
    return transformers.LlamaForCausalLM(config)


LORA: dict[str, Any] = dict(
    r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], use_rslora=True
)


def build_model(case: Case, root: Path) -> Any:
    """Build the model of *case*, the same on every rank."""
    torch.manual_seed(11)
    model: Any
    if case.model == "lora":
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights=False, **LORA))
    elif case.model == "llama":
        model = tiny_llama()
    else:
        model = OddNet(is_tied=case.model == "tied")
    if case.is_embedding_frozen:
        model.embed.weight.requires_grad_(False)
    return model


def build_engine(case: Case, model: Any) -> Any:
    """Wrap *model* in the engine that *case* asks for; two parameter groups, plain Adam."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if case.has_one_group:
        groups = [{"params": trained}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        **case.extra,
    }
    if case.dtype != "fp32":
        config[case.dtype] = {"enabled": True}
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train_a_step(engine: Any, rank: int) -> None:
    """Take one optimizer step on rows that differ by rank."""
    torch.manual_seed(rank)
    input_ids = torch.randint(0, 37, (6, 5) if hasattr(engine.module, "config") else (6,))
    if hasattr(engine.module, "config"):
        loss = engine(input_ids=input_ids, labels=input_ids).loss
    else:
        loss = engine(input_ids)
    engine.backward(loss)
    engine.step()


def live_masters(engine: Any, case: Case) -> dict[str, torch.Tensor]:
    """Gather the fp32 masters, frozen parameters and buffers from the running engine."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        master = safe_get_full_fp32_param(parameter) if case.stage and parameter.requires_grad else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
                master = parameter.detach().clone()
        tensors[name] = master.clone().contiguous()
    buffers = dict(engine.module.named_buffers())
    return tensors | {name: buffers[name].clone() for name in engine._get_buffer_names()}


def run_case(case: Case, root: Path, rank: int) -> None:
    """Train and save one case on this rank."""
    folder = root / case.name
    engine = build_engine(case, build_model(case, root))
    train_a_step(engine, rank)
    engine.save_checkpoint(str(folder / "ck"), exclude_frozen_parameters=case.is_frozen_excluded)
    tensors = live_masters(engine, case)
    if rank == 0:
        save_file(tensors, folder / "live.safetensors")
        if hasattr(engine.module, "config"):
            engine.module.config.save_pretrained(folder / "ck")
    engine.destroy()


def save_fsdp(folder: Path, rank: int) -> None:
    """Save a model that torch's FSDP shards by rows as accelerate does, and one that is cut by columns."""
    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(11)
    model = OddNet()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(6)).backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    distributed_checkpoint.save({"model": weights}, checkpoint_id=folder / "ck" / "pytorch_model_fsdp_0")
    distributed_checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "together")
    columns = distribute_tensor(torch.arange(5 * 7.0).view(5, 7), mesh, [Shard(1)])
    distributed_checkpoint.save({"model": {"x.weight": columns}}, checkpoint_id=folder / "columns")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "live.safetensors")


class AppState(Stateful):
    """What torch's tutorial on distributed checkpoints saves: model and optimizer as one object."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        weights, states = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optim": states}


def save_loops(folder: Path, rank: int) -> None:
    """Save a Llama that FSDP shards as training loops of several kinds do, each beside the same config.json."""
    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(11)
    model = tiny_llama()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    input_ids = torch.randint(0, 37, (2, 5))
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    weights, states = get_state_dict(model, optimizer)
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    progress = {"step": torch.tensor(3), "ntokens_seen": torch.tensor(30)}
    safetensors = FileSystemWriter(folder / "safetensors", serialization_format=SerializationFormat.SAFETENSORS)
    loops: dict[str, tuple[dict[str, Any], Any]] = {
        "tutorial": ({"app": AppState(model, optimizer)}, None),
        "state_dicts": ({"model_state_dict": wrapped, "optimizer_state_dict": states, "epoch": 1}, None),
        "lightning": ({"state_dict": {f"net.{name}": tensor for name, tensor in weights.items()}}, None),
        "titan": ({**weights, "optimizer": flat, "train_state": progress, "lr_scheduler": {"last_epoch": 3}}, None),
        "safetensors": ({"model": weights, "optim": states}, safetensors),
        "hf_shards": (weights, HuggingFaceStorageWriter(str(folder / "hf_shards"), save_distributed=True)),
    }
    for name, (content, writer) in loops.items():
        distributed_checkpoint.save(content, checkpoint_id=None if writer else folder / name, storage_writer=writer)
        if rank == 0:
            model.config.architectures = ["LlamaForCausalLM"]
            model.config.save_pretrained(folder / name)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "live.safetensors")


def run_session(world_size: int, root: Path) -> list[int]:
    """Fork the ranks of one session and return their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            run_rank(rank, world_size, port, root)
        children.append(child)
    return children


def run_rank(rank: int, world_size: int, port: int, root: Path) -> None:
    """Be one rank: run every case of this world size, then leave without the parent's clean-up."""
    code = 1
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        for case in CASES:
            if case.world_size == world_size:
                with timed(case.name, rank):
                    run_case(case, root, rank)
        if world_size == 3:
            with timed("fsdp", rank):
                save_fsdp(root / "fsdp", rank)
            with timed("loops", rank):
                save_loops(root / "loops", rank)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def timed(what: str, rank: int) -> Iterator[None]:
    start = time.monotonic()
    yield
    if rank == 0:
        print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


def convert(case: Case, root: Path) -> None:
    """Write what DeepSpeed's own converter makes of a case."""
    folder = root / case.name
    if case.has_converter:
        state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder / "ck"))
        order = [name for name in state]
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in state.items()},
            folder / "deepspeed.safetensors",
        )
        (folder / "order.json").write_text(json.dumps(order))


def convert_to_files(root: Path) -> None:
    """Run zero_to_torch.py itself, for one file and for many, as the reference byte for byte."""
    for case, limit in (("z3_bf16", "5GB"), ("z3_bf16", "3KB"), ("z3_bf16_3_ranks", "1KB")):
        out = root / case / f"zero_to_torch-{limit}"
        arguments = ["--dtype", "fp16", "--safe_serialization", "--max_shard_size", limit]
        zero_to_torch.main([str(root / case / "ck"), str(out), *arguments])


def make_universal(root: Path) -> None:
    """Run ds_to_universal.py on some cases; its own progress bars are of no interest."""
    for name in UNIVERSAL:
        with redirect_stdout(io.StringIO()):
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=str(root / name / "ck" / "global_step1"),
                    output_folder=str(root / name / "universal" / "global_step1_universal"),
                    num_extract_workers=1,
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )


def lower_masters(root: Path) -> None:
    """Make the checkpoint that bf16_master_weights_and_grads would write: bf16 masters."""
    source, target = root / "z3_fp16", root / "z3_bf16_masters"
    shutil.copytree(source / "ck", target / "ck")
    for path in (target / "ck").glob("*/*_optim_states.pt"):
        state = torch.load(path, weights_only=False)
        inner = state["optimizer_state_dict"]
        inner["fp32_flat_groups"] = [group.detach().bfloat16() for group in inner["fp32_flat_groups"]]
        torch.save(state, path)
    convert(Case(name=target.name, stage=3), root)


def merge_with_peft(root: Path) -> None:
    """Write the base, the adapter as peft saves it, and the model as peft merges it."""
    folder = root / "z3_lora"
    torch.manual_seed(11)
    base = tiny_llama()
    base.save_pretrained(folder / "base")
    model: Any = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **LORA))
    masters = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder / "ck"))
    model.load_state_dict(masters, strict=False)
    model.save_pretrained(folder / "adapter")
    shutil.copy(folder / "adapter" / "adapter_config.json", folder / "ck")
    model.merge_and_unload().save_pretrained(folder / "merged")


def merge_conv1d_with_peft(root: Path) -> None:
    """Do the same for weights stored (in, out), an adapted embedding and a rank that has its own alpha."""
    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=37, n_embd=18, n_layer=2, n_head=3, n_positions=16)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(root / "conv1d" / "base")
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["c_attn", "wte"],
        alpha_pattern={"h.1.attn.c_attn": 19},
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    model: Any = peft.get_peft_model(base, lora)
    model.save_pretrained(root / "conv1d" / "adapter")
    model.merge_and_unload().save_pretrained(root / "conv1d" / "merged")


def save_with_accelerate(root: Path) -> None:
    """Save a peft model's training state as accelerate does: the base and the adapter in one model.safetensors."""
    torch.manual_seed(11)
    model: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights=False, **LORA))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(root / "accelerate" / "ck"))
    model.base_model.model.config.architectures = ["LlamaForCausalLM"]
    model.base_model.model.config.save_pretrained(root / "accelerate" / "ck")
    accelerator.unwrap_model(prepared).save_pretrained(root / "accelerate" / "adapter")
    accelerator.unwrap_model(prepared).merge_and_unload().save_pretrained(root / "accelerate" / "merged")


def main(root: Path) -> None:
    """Generate every case below *root*."""
    for case in CASES:
        (root / case.name).mkdir(parents=True)
    gc.freeze()  # zero_to_torch collects after each shard, which takes 0.2 s with all that is imported here
    children = [child for world_size in (2, 3) for child in run_session(world_size, root)]
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("a rank failed")
    for case in CASES:
        convert(case, root)
    convert_to_files(root)
    make_universal(root)
    lower_masters(root)
    merge_with_peft(root)
    merge_conv1d_with_peft(root)
    save_with_accelerate(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
