"""Train with DeepSpeed's ZeRO: configure it, save and load safely, gather."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ....errors import DamagedError
from ....recipes.schema import StageSettings
from .base import SavableTrainer


def start_process_group(device: str) -> None:
    """Start the process group on a CPU, where transformers would not.

    transformers recognises DeepSpeed by a GPU's backend, so it gets a state that says so.
    """
    if device != "cpu":
        return
    import deepspeed
    import deepspeed.ops
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    # its shared-memory extension would be compiled by all ranks at once; gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    state = PartialState(cpu=True, backend="gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    state.distributed_type = DistributedType.DEEPSPEED


def arguments(settings: StageSettings, device: str) -> dict[str, Any]:
    """Return the configuration; on a CPU also that the started group is to be used."""
    return {"deepspeed": config_of(settings), "accelerator_config": {"use_configured_state": device == "cpu"}}


def config_of(settings: StageSettings) -> dict[str, Any]:
    """Return DeepSpeed's config, with `zero.config` of the recipe merged over it."""
    zero, train = settings.train.zero, settings.train
    sharding: dict[str, Any] = {"stage": zero.stage}
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if zero.offload == "both":
        sharding["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": sharding,
        "bf16": {"enabled": train.precision == "bfloat16"},
        "fp16": {"enabled": train.precision == "float16"},
        # torch's AdamW needs no compiler; DeepSpeed's own would be built at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
    return _merged(config, zero.config)


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    found = dict(config)
    for key, value in changes.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return found


def wrap(trainer: Any) -> None:
    """Make the DeepSpeed engine safe as soon as it exists."""
    prepare = trainer.accelerator._prepare_deepspeed

    def prepare_and_wrap(*args: Any, **kwargs: Any) -> Any:
        _gather_together(trainer.model)
        found = prepare(*args, **kwargs)
        if trainer.accelerator.deepspeed_engine_wrapped is not None:  # it also prepares the data loaders
            make_safe(trainer.accelerator.deepspeed_engine_wrapped.engine)
        return found

    trainer.accelerator._prepare_deepspeed = prepare_and_wrap


def _gather_together(model: Any) -> None:
    """Let ZeRO-3 gather a block of experts as one.

    Where each expert, or what stands for none (LongCat-Flash), is a module, ranks call others in a step, and would
    gather others. peft reads experts that it adapts outside the forward of their module; a block that gets no gradient
    for its input, as Cohere2-MoE's first, which stands beside the attention, would let their adapters go too early.
    """
    from deepspeed.utils import set_z3_leaf_module
    from peft.tuners.lora.layer import ParamWrapper

    for module in model.modules():
        children = dict(module.named_children())
        if any(isinstance(child, ParamWrapper) for child in children.values()):
            set_z3_leaf_module(module, True)
            model.enable_input_require_grads()
        elif type(experts := children.get("experts")) in (torch.nn.ModuleList, torch.nn.ModuleDict):
            set_z3_leaf_module(module, True)
        elif isinstance(experts, torch.nn.ModuleDict) or _skips_some(experts):
            set_z3_leaf_module(experts, True)


def _skips_some(experts: Any) -> bool:
    return experts is not None and any(isinstance(part, torch.nn.Identity) for part in experts.children())


def save_state(trainer: SavableTrainer, folder: Path, *, is_writer: bool) -> None:
    """Let each rank write its own files; an adapter's frozen base is left out."""
    engine = trainer.model_wrapped
    safe = engine.checkpoint_engine
    safe.error = None
    engine.save_checkpoint(
        str(folder), save_latest=False, exclude_frozen_parameters=hasattr(trainer.model, "peft_config")
    )
    if safe.error is not None:
        raise safe.error
    if is_writer:
        (folder / "latest").write_text(f"global_step{engine.global_steps}")


def full_shape(value: torch.Tensor) -> tuple[int, ...]:
    """Return the shape that a parameter of ZeRO-3 has when it is gathered."""
    return tuple(getattr(value, "ds_shape", value.shape))


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return this rank's part under ZeRO-3, else the full working copy."""
    found: torch.Tensor = getattr(parameter, "ds_tensor", parameter.data)
    return found


def gathered(trainer: SavableTrainer, named: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every full tensor on every rank: the float32 master of what is trained."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    # under it DeepSpeed gives back other parameters' masters; the working copy is right
    is_shuffled = trainer.model_wrapped.zero_round_robin_gradients()
    for name, value in named.items():
        master = None
        if value.requires_grad and not is_shuffled:
            master = safe_get_full_fp32_param(value)
        is_spread = master is None and hasattr(value, "ds_id")
        with deepspeed.zero.GatheredParameters([value]) if is_spread else nullcontext():
            yield name, value.data if master is None else master


def _member_of(kind: type[Enum]) -> Callable[[object, str], Enum]:
    """Return a getattr for loading checkpoints that finds only members of *kind*."""

    def member(owner: object, name: str) -> Enum:
        if owner is not kind or name not in kind.__members__:
            raise DamagedError(f"loading it would call getattr({owner!r}, {name!r}), which no checkpoint needs")
        return kind[name]

    return member


def make_safe(engine: Any) -> None:
    """Make a DeepSpeed engine write without hanging and read without running code.

    A write that fails on one rank is remembered until all have passed the engine's barriers,
    and a file is read by the restricted unpickler with the few classes that DeepSpeed stores.
    Of an adapter's model only what is trained is written: DeepSpeed leaves frozen parameters out, but
    not their second names (a tied head) and not bitsandbytes' constants, which every ZeRO-3 rank repeats.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    is_adapter = hasattr(engine.module, "peft_config")
    trained = {name for name, value in engine.module.named_parameters() if value.requires_grad}

    class SafeEngine(TorchCheckpointEngine):
        error: Exception | None = None

        def save(self, state_dict: Any, path: str) -> None:
            if is_adapter and state_dict.get("module") is not None:
                state_dict = state_dict | {"module": {k: v for k, v in state_dict["module"].items() if k in trained}}
            try:
                with open(path, "wb") as stream:
                    torch.save(state_dict, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
            except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
                self.error = self.error or error

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            try:
                os.makedirs(path, exist_ok=exist_ok)
            except OSError as error:
                self.error = self.error or error

        def load(self, path: str, map_location: Any = None) -> Any:
            # Python 3.11.0 to 3.11.3 pickle a member of an Enum as getattr(class, name)
            enum = (_member_of(ZeroStageEnum), "builtins.getattr")
            known = [DynamicLossScaler, LossScaler, ZeroStageEnum, enum, fragment_address]
            try:
                with torch.serialization.safe_globals(known):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except UnpicklingError as error:  # torch's own words advise to load it without any safety
                raise DamagedError(f"{path}: holds what no training state does, and was not loaded") from error

    engine.checkpoint_engine = SafeEngine(None)
    # Its copy of zero_to_fp32.py beside every checkpoint is not needed, and would raise on rank 0 alone.
    engine._copy_recovery_script = lambda save_path: None
