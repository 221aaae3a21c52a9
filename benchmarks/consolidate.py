"""Consolidate beside DeepSpeed's zero_to_torch.py and zero_to_fp32.py.

    python benchmarks/consolidate.py make CHECKPOINT            0.4 billion parameters, ZeRO-3, 4 ranks, by DeepSpeed
    python benchmarks/consolidate.py write CHECKPOINT           1.6 billion in the same format, without DeepSpeed
    python benchmarks/consolidate.py run CHECKPOINT --repeat 5

The tools run in turn, warm and cold. `make` takes 16 GB of memory and 5 GB of disk, `write` 5 GB and 20 GB. The limit
is the same bytes read and written by as many threads, with the space taken and the sync at the end, and no cast.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD_SIZE = 4
SIZE: dict[str, Any] = dict(
    vocab_size=32003,
    hidden_size=1023,
    head_dim=32,
    num_attention_heads=33,
    num_key_value_heads=11,
    num_hidden_layers=26,
)
OURS = ("ours", "ours, no statistics")
PEERS = ("zero_to_torch", "zero_to_fp32")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one tool.

    It has the seconds of the whole process, and after its imports where it says so; MB at its peak.
    """

    wall_s: float
    inner_s: float | None
    anonymous_mb: float


def make(path: Path) -> None:
    """Train one step of a Llama with real DeepSpeed on the CPU, and save it.

    It has 0.4 billion parameters.
    """
    os.environ.update(DS_ACCELERATOR="cpu", DS_IGNORE_CUDA_DETECTION="1", OMP_NUM_THREADS="1")
    import deepspeed
    import deepspeed.ops
    import torch
    import transformers

    deepspeed.ops.__compatible_ops__ = {**deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm": False}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(WORLD_SIZE):
        if os.fork():
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
        }
        torch.manual_seed(1)
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(intermediate_size=3380, tie_word_embeddings=False, **SIZE)
        )
        torch.set_default_dtype(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        rows = torch.randint(0, 32003, (1, 8))
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
        engine.save_checkpoint(str(path))
        if rank == 0:
            model.config.save_pretrained(path)
        os._exit(0)
    while True:
        try:
            if os.wait()[1]:
                raise SystemExit("a rank failed")
        except ChildProcessError:
            return


def write(path: Path, scale: int = 4) -> None:
    """Write a ZeRO-3 checkpoint of *scale* times the parameters of `make`.

    It has weights, and zeros as moments.
    """
    import torch

    hidden, inner, vocab = 1023, 3380, 32003
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(26 * scale + 5):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (1024 if part == "q" else 256, hidden) for part in "qkv"}
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, 1024)
        shapes |= {f"{name}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{name}.{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    tag = path / "global_step1"
    tag.mkdir(parents=True)
    model = {
        "module": {name: torch.empty(0) for name in shapes},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "ds_version": "0.19.8",
    }
    num_elements = sum(-(-torch.Size(shape).numel() // WORLD_SIZE) for shape in shapes.values())
    for rank in range(WORLD_SIZE):
        torch.manual_seed(rank)
        masters = torch.randn(num_elements).mul_(0.02)
        moments = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros(num_elements),
            "exp_avg_sq": torch.zeros(num_elements),
        }
        state = {
            "zero_stage": 3,
            "partition_count": WORLD_SIZE,
            "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0), **moments}}, "param_groups": []},
            "fp32_flat_groups": [masters],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save({"optimizer_state_dict": state, "ds_config": {}}, tag / f"bf16_{name}_optim_states.pt")
        torch.save(model, tag / f"{name}_model_states.pt")
    (path / "latest").write_text("global_step1")


def inner(what: str, checkpoint: Path, out: Path, num_workers: int) -> None:
    """Consolidate, or move the same bytes, in this process.

    Print the seconds after the imports.
    """
    from sousbatch.checkpoints.consolidation.consolidate import consolidate
    from sousbatch.checkpoints.consolidation.options import ConsolidateOptions
    from sousbatch.checkpoints.consolidation.torch_cast import copier
    from sousbatch.checkpoints.formats.detect import open_source

    options = ConsolidateOptions(num_workers=num_workers, has_statistics=what == "ours")
    copier()
    started = time.perf_counter()
    if what == "limit":
        move(checkpoint, out, num_workers)
    else:
        consolidate(open_source(checkpoint), out, options)
    print(f"inner {time.perf_counter() - started}")


def move(checkpoint: Path, out: Path, num_workers: int) -> None:
    """Read what a consolidation reads, and write as many bytes as it writes.

    They are written durably: this is the limit.
    """
    from sousbatch.checkpoints.capacity.allocation import allocate
    from sousbatch.checkpoints.formats.detect import open_source

    segments = [segment for tensor in open_source(checkpoint).tensors for segment in tensor.segments]
    blocks, position = [], 0
    for segment in segments:
        for first in range(0, segment.num_elements, 1 << 20):
            count = min(1 << 20, segment.num_elements - first)
            blocks.append((segment.path, segment.offset_bytes + 4 * first, count, position))
            position += 2 * count
    sources = {path: os.open(path, os.O_RDONLY) for path in {path for path, _, _, _ in blocks}}
    target = os.open(out, os.O_WRONLY | os.O_CREAT, 0o666)
    allocate(target, position)

    def work(part: int) -> None:
        buffer = memoryview(bytearray(4 << 20))
        for path, offset, count, at in blocks[part::num_workers]:
            os.preadv(sources[path], [buffer[: 4 * count]], offset)
            os.pwrite(target, buffer[: 2 * count], at)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(target)
    for descriptor in (target, *sources.values()):
        os.close(descriptor)


def command(tool: str, checkpoint: Path, out: Path, num_workers: int) -> list[str]:
    """Return the command line of a tool."""
    if tool.startswith("zero_to"):
        script = f"import sys; from deepspeed.utils import {tool} as tool; "
        options = "['--dtype', 'fp16', '--safe_serialization']" if tool == "zero_to_torch" else "[]"
        if tool == "zero_to_torch":
            return [sys.executable, "-c", f"{script}tool.main([{str(checkpoint)!r}, {str(out)!r}, *{options}])"]
        return [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", str(checkpoint), str(out)]
    if tool in OURS:
        more = ["--no-statistics"] if tool == OURS[1] else []
        copying = ["--copy-from", str(checkpoint)] if (checkpoint / "config.json").is_file() else []
        whole = ["-m", "sousbatch", "checkpoints", "consolidate", str(checkpoint), str(out)]
        return [sys.executable, "-P", *whole, "--workers", str(num_workers), *copying, *more]
    return [
        sys.executable,
        "-P",
        __file__,
        "inner",
        tool.removeprefix("inner "),
        str(checkpoint),
        str(out),
        str(num_workers),
    ]


def measure(arguments: list[str]) -> Run:
    """Run a command, looking at its memory every 5 ms."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, status = 0.0, Path(f"/proc/{process.pid}/status")
    reading = threading.Thread(target=process.wait)
    reading.start()
    while reading.is_alive():
        with suppress(OSError):  # it has just ended
            found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
            peak = max(peak, int(found[1]) / 1000) if found else peak
        reading.join(0.005)
    wall_s = time.perf_counter() - started
    text, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{arguments}: {errors[-3000:]}")
    said = re.search(r"^inner ([\d.]+)", text, re.MULTILINE)
    return Run(wall_s=wall_s, inner_s=float(said[1]) if said else None, anonymous_mb=peak)


def forget(checkpoint: Path) -> None:
    """Drop the checkpoint from the page cache."""
    for path in checkpoint.rglob("*.pt"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm(checkpoint: Path) -> None:
    """Bring what is read of the checkpoint into the page cache."""
    move(checkpoint, checkpoint / "aside", 2)
    (checkpoint / "aside").unlink()


def rounds(repeat: int, tools: list[str]) -> Iterator[str]:
    """Yield the tools in turn, each round from another one on."""
    for number in range(repeat):
        shift = number % len(tools)
        yield from tools[shift:] + tools[:shift]


def run(checkpoint: Path, *, repeat: int, num_workers: int, without: list[str]) -> None:
    """Measure all tools in turn and print medians."""
    outs = checkpoint.parent / "consolidate-benchmark"
    tools = [tool for tool in (*OURS, *PEERS, "inner ours", "inner quick", "inner limit") if tool not in without]
    prepare: dict[str, Callable[[Path], None]] = {"warm": warm, "cold": forget}
    for state in prepare:
        found: dict[str, list[Run]] = {tool: [] for tool in tools}
        for tool in rounds(repeat, tools):
            shutil.rmtree(outs, ignore_errors=True)
            outs.mkdir()
            os.sync()
            prepare[state](checkpoint)
            found[tool].append(measure(command(tool, checkpoint, outs / "out", num_workers)))
        show(state, found)
    compare(checkpoint, outs, num_workers)


def show(state: str, found: dict[str, list[Run]]) -> None:
    """Print one table."""
    print(f"\n{state}; load {os.getloadavg()[0]:.1f}; {len(next(iter(found.values())))} runs each")
    print(f"{'tool':24}{'wall s: median':>16}{'least':>8}{'inner s':>9}{'least':>8}{'anon. MB':>10}")
    for tool, runs in found.items():
        walls = [one.wall_s for one in runs]
        inners = [one.inner_s for one in runs if one.inner_s is not None]
        shown = f"{statistics.median(inners):9.2f}{min(inners):8.2f}" if inners else " " * 17
        memory = max(one.anonymous_mb for one in runs)
        print(f"{tool:24}{statistics.median(walls):16.2f}{min(walls):8.2f}{shown}{memory:10.0f}", flush=True)


def compare(checkpoint: Path, outs: Path, num_workers: int) -> None:
    """Say whether our files are zero_to_torch's, byte for byte."""
    shutil.rmtree(outs, ignore_errors=True)
    outs.mkdir()
    for tool in (OURS[0], PEERS[0]):
        measure(command(tool, checkpoint, outs / tool, num_workers))
    names = sorted(path.name for path in (outs / PEERS[0]).iterdir())
    same = [filecmp.cmp(outs / PEERS[0] / name, outs / OURS[0] / name, shallow=False) for name in names]
    print(f"\n{', '.join(names)}: {'the same bytes' if all(same) else 'DIFFERENT'}")
    shutil.rmtree(outs)


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "write", "run", "inner"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without", nargs="*", default=[], help="tools to leave out")
    arguments = parser.parse_args()
    if arguments.what == "inner":
        what, checkpoint, out, num_workers = arguments.paths
        inner(what, Path(checkpoint), Path(out), int(num_workers))
    elif arguments.what == "run":
        run(Path(arguments.paths[0]), repeat=arguments.repeat, num_workers=arguments.workers, without=arguments.without)
    else:
        {"make": make, "write": write}[arguments.what](Path(arguments.paths[0]))


if __name__ == "__main__":
    main()
