"""Dequantise a GGUF file into a model folder.

Run as `python -m sousbatch.recipes.inspect.gguf FILE FOLDER`, in a process of its own, so that planning never imports
torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ...checkpoints.capacity.limits import read_limits, tightest
from ...errors import UsageError

_LARGEST_HALF = 65504


def main(file: Path, folder: Path) -> None:
    """Write config, tokenizer and weights of *file* to *folder*.

    Weights become float16, which keeps more of a quantised value than bfloat16; float32 where one is too large for it.

    Raises:
        UsageError: memory or disk cannot take it, or transformers does not know the architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UsageError(f"it needs the package gguf; {sys.executable} -m pip install gguf") from error
    try:
        num_params = sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # the package has no class of its own for a damaged file
        raise UsageError(f"it is damaged, or no GGUF file ({error})") from error
    _check_space(num_params, folder)
    _convert(file, folder)


def _check_space(num_params: int, folder: Path) -> None:
    import psutil

    limit = tightest(read_limits(folder))
    if 2 * num_params > (limit.num_bytes or 0):
        raise UsageError(
            f"{2 * num_params / 1e9:,.3g} GB are needed in the cache {folder.parent}, which can take "
            f"{(limit.num_bytes or 0) / 1e9:,.3g} GB ({limit.source}); set SOUSBATCH_CACHE to a folder with more"
        )
    # weights as float32, each read beside its float32 values; measured: 6.3 B a parameter with all libraries
    needed, free = 4 * num_params + (1 << 30), psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"about {needed / 1e9:,.3g} GB of memory are needed and {free / 1e9:,.3g} GB are free; convert it on a "
            "larger machine, or take the model that it was made of"
        )


def _convert(file: Path, folder: Path) -> None:
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(transformers, "GgufConfig"):  # later versions keep weights packed where they have a kernel for them
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError, OSError, RuntimeError) as error:
        raise UsageError(f"transformers cannot read it: {' '.join(str(error).split())[:300]}") from error
    if all(bool(value.detach().abs().max() <= _LARGEST_HALF) for value in model.parameters()):
        model.half()
    model.hf_quantizer = None
    for config in (model.config, model.generation_config):
        for name in ("quantization_config", "_name_or_path"):
            if hasattr(config, name):
                setattr(config, name, None) if name.startswith("_") else delattr(config, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UsageError as error:
        sys.exit(str(error))
