"""Refuse what `train.zero.config` says otherwise than the recipe.

So is what DeepSpeed does not know. People paste the file of an earlier training there. Its batch sizes, precision and
optimizer would go before those of the plan, or end the job. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import nearest
from ..schema import StageSettings

_SHARDING = "zero_optimization"
# Keys of it in DeepSpeed 0.19; another one ends the job. A test compares them with the installed one's.
KNOWN = frozenset(
    """allgather_bucket_size allgather_partitions compute_grad_norm contiguous_gradients cpu_offload cpu_offload_param
    cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module
    legacy_stage1 load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear offload_optimizer
    offload_param overlap_comm override_module_apply parameter_alignment pipeline_loading_checkpoint reduce_bucket_size
    reduce_scatter round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save stage3_max_live_parameters
    stage3_max_reuse_distance stage3_model_persistence_threshold stage3_module_granularity_threshold
    stage3_param_persistence_threshold stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
    sub_group_size use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
    zero_quantized_nontrainable_weights zero_quantized_weights""".split()
)


def config_refusals(settings: StageSettings) -> Iterator[str]:
    """Yield each key of `train.zero.config` that is another key's, or unknown."""
    config = settings.train.zero.config
    for path, (key, allowed) in _decided(settings).items():
        value = _at(config, path)
        if value is not None and value not in allowed:
            shown = "a section" if isinstance(value, Mapping) else str(value).lower()
            yield f"train.zero.config has {path} ({shown}), which {key} decides; leave it out there, and set {key}"
    sharding = config.get(_SHARDING, {})
    for name in sorted(sharding.keys() - KNOWN) if isinstance(sharding, Mapping) else ():
        hint = nearest(name, sorted(KNOWN)) or "leave it out"
        yield f"train.zero.config has {_SHARDING}.{name}, which DeepSpeed does not know ({hint})"


def _at(config: Any, path: str) -> Any:
    """Return the value of a dotted *path*, None where there is none."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config


def _decided(settings: StageSettings) -> Mapping[str, tuple[str, tuple[Any, ...]]]:
    """Return what other keys decide, by its place in the config.

    Each has its key, and the values that say the same.
    """
    train, offload = settings.train, settings.train.zero.offload
    places = ("cpu", "nvme")
    return {
        "train_batch_size": ("train.global_batch", ("auto", train.global_batch)),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", ("auto",)),  # which shrinks when memory runs out
        "gradient_accumulation_steps": ("train.global_batch", ("auto",)),
        "gradient_clipping": ("train.max_grad_norm", ("auto", train.max_grad_norm)),
        "optimizer": ("train.optimizer", ()),
        "scheduler": ("train.schedule", ()),
        "fp16.enabled": ("train.precision", ("auto", train.precision == "float16")),
        "bf16.enabled": ("train.precision", ("auto", train.precision == "bfloat16")),
        f"{_SHARDING}.stage": ("train.zero.stage", (train.zero.stage,)),
        f"{_SHARDING}.offload_optimizer.device": ("train.zero.offload", places if offload != "none" else ("none",)),
        f"{_SHARDING}.offload_param.device": ("train.zero.offload", places if offload == "both" else ("none",)),
    }
