"""Time `sousbatch plan` of a model as large as those of the hub, cold and cached, and compiling the library.

    python benchmarks/planning.py --repeat 5

The model has the config and the tensors of a Llama of 7 billion parameters, in sparse files: headers and no weights on
the disk. They lie as in the hub's cache, where a file's name is its digest, or in a plain folder, of which a cold plan
reads every byte. Cold means an empty cache of sousbatch. Compiling is what remains once model and
data were inspected: every small recipe of the library for every profile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from startup import MODULE, Cost, measure

from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.site_file import read_site_file

HIDDEN, INNER, LAYERS, WORDS, SHARDS = 4096, 11008, 32, 32000, 3
IMPORT = "import of Llama alone"
AIMS_S = {"cold": 5, "cached": 1}
RECIPE = """
model: {path: ./FOLDER}
data:
  splits: {train: train.jsonl}
  prompt: "{input} =>"
train: {eval_split: null}
stages: {train: {}, consolidate: {}}
resources: {default: {device: cpu}}
"""


def tensors() -> dict[str, list[int]]:
    """Return the names and shapes of a Llama of 7 billion parameters."""
    layer = {f"self_attn.{name}_proj.weight": [HIDDEN, HIDDEN] for name in "qkvo"}
    layer |= {f"mlp.{name}_proj.weight": [INNER, HIDDEN] for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": [HIDDEN, INNER], "input_layernorm.weight": [HIDDEN]}
    layer["post_attention_layernorm.weight"] = [HIDDEN]
    found = {"model.embed_tokens.weight": [WORDS, HIDDEN]}
    found |= {f"model.layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    return {**found, "model.norm.weight": [HIDDEN], "lm_head.weight": [WORDS, HIDDEN]}


def write_model(folder: Path, blobs: Path | None = None) -> None:
    """Write a folder as the hub has it, with holes in place of weights.

    In a hub's cache the weights are links into *blobs*.
    """
    folder.mkdir(parents=True)
    for path in (LIBRARY_DIR / "models" / "tiny-llama").glob("tokenizer*.json"):
        shutil.copy(path, folder)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": WORDS}
    config |= {"intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "dtype": "float16"}
    config |= {"num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config |= {"hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    names, where = list(tensors().items()), {}
    for shard in range(SHARDS):
        header: dict[str, object] = {}
        end, file = 0, f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        for name, shape in names[shard::SHARDS]:
            begin, end = end, end + 2 * shape[0] * (shape[1] if shape[1:] else 1)
            header[name], where[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}, file
        text = json.dumps(header).encode()
        path = folder / file
        if blobs:
            blobs.mkdir(exist_ok=True)
            path = blobs / hashlib.sha256(text).hexdigest()
            (folder / file).symlink_to(path)
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def time_plans(folder: Path, repeat: int) -> dict[str, list[Cost]]:
    """Return what `plan` took with an empty cache and then once more, in a hub's cache, and cold in a plain folder."""
    write_model(folder / "plain")
    write_model(folder / "hub" / "snapshots" / "main", folder / "hub" / "blobs")
    rows = [{"input": f"손님 {number}", "target": "좋아요"} for number in range(1000)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "hub.yaml").write_text(RECIPE.replace("FOLDER", "hub/snapshots/main"))
    (folder / "plain.yaml").write_text(RECIPE.replace("FOLDER", "plain"))
    os.environ["SOUSBATCH_CACHE"] = str(folder / "cache")
    found: dict[str, list[Cost]] = {"cold": [], "cached": [], "cold, plain folder": [], IMPORT: []}
    for _ in range(repeat):
        found[IMPORT].append(measure((sys.executable, "-c", "import transformers.models.llama.modeling_llama"), folder))
        for name, recipe in (("cold, plain folder", "plain"), ("cold", "hub"), ("cached", "hub")):
            if name != "cached":
                shutil.rmtree(folder / "cache", ignore_errors=True)
            found[name].append(measure((*MODULE, "plan", f"./{recipe}.yaml"), folder))
    return found


def time_compiling(folder: Path) -> list[tuple[float, str]]:
    """Return the seconds that each recipe took to compile for each profile, the longest first."""
    found = []
    profiles = sorted(path.stem for path in (LIBRARY_DIR / "resources").glob("*.yaml"))
    for name in sorted(path.stem for path in LIBRARY_DIR.glob("*-small.yaml")):
        inputs = inspect(compose(name), folder)
        for profile in profiles:
            recipe, (site, space) = compose(name, [f"resources={profile}"]), read_site_file(profile)
            start = time.process_time()
            compile(recipe, site, replace(inputs, disk_space=space))
            found.append((time.process_time() - start, f"{name}, {profile}"))
    return sorted(found, reverse=True)


def main() -> None:
    """Print medians beside what is aimed at."""
    parser = argparse.ArgumentParser(description="Time planning of a large model, and compiling of the library.")
    parser.add_argument("--repeat", type=int, default=5)
    with tempfile.TemporaryDirectory(prefix="planning-") as temporary:
        folder = Path(temporary)
        print(f"{'plan of a 7B model':<24}{'wall s':>8}{'least':>8}{'CPU s':>8}  aim")
        found = time_plans(folder, parser.parse_args().repeat)
        for name, costs in found.items():
            wall_s, cpu_s = median(cost.wall_s for cost in costs), median(cost.cpu_s for cost in costs)
            least = min(cost.wall_s for cost in costs)
            aim = AIMS_S.get(name)
            end = f"  < {aim} s: {'met' if least < aim else 'MISSED'}" if aim else ""
            print(f"{name:<24}{wall_s:>8.2f}{least:>8.2f}{cpu_s:>8.2f}{end}")
        times = time_compiling(folder)
    print(f"{len(times)} compilations, CPU s: median {median(time for time, _ in times):.4f}, most {times[0][0]:.4f}")
    print(f"({times[0][1]}); aim < 0.1 s: {'met' if times[0][0] < 0.1 else 'MISSED'}")


if __name__ == "__main__":
    sys.exit(main())
