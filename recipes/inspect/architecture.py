"""Print the shapes of a model's parameters.

Run as `python -m sousbatch.recipes.inspect.architecture FOLDER CLASS CHANGES TRUSTS`, in a process of its own, so that
planning never imports torch. The model is built on the meta device: a model of any size takes no memory.
"""

from __future__ import annotations

import json
import sys

from ...errors import nearest


def main(folder: str, model_class: str, changes: str, trusts: str) -> None:
    """Write one JSON object to stdout.

    It has the config, and a list of (name, shape, dtype).
    """
    import torch
    import transformers

    options = {"trust_remote_code": trusts == "True"}
    config, unused = transformers.AutoConfig.from_pretrained(
        folder, **options, **json.loads(changes), return_unused_kwargs=True
    )
    unknown = sorted(unused.keys() & json.loads(changes).keys())
    if unknown:  # transformers passes over it
        known = sorted({*config.to_dict(), *config.attribute_map})
        hint = nearest(unknown[0], known) or f"it has {', '.join(known)}"
        sys.exit(f"model.config has {unknown[0]!r}, which {type(config).__name__} does not ({hint})")
    with torch.device("meta"):
        model = getattr(transformers, model_class).from_config(config, **options)
    tensors = [(name, list(tensor.shape), "float32") for name, tensor in model.named_parameters()]
    print(json.dumps({"config": json.loads(config.to_json_string(use_diff=False)), "tensors": tensors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
