"""Compare the forecast of a rank's memory with what a rank took, on the CPU.

    python benchmarks/memory.py

Each setting is a real run of three steps. Measured is the peak of a rank's anonymous resident memory
above what it held just before its model was made, less the same of a model of 0.1 million parameters, so
that libraries do not count; every tensor above 64 KiB is mapped by itself (MALLOC_MMAP_THRESHOLD_), so
that what is freed does not stay resident.
Rows fill `data.max_tokens`, as the forecast assumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOKENS, INPUT_TOKENS, STEPS, MIB = 256, 72, 3, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What differs from run to run."""

    zero: int
    hidden: int
    layers: int
    micro_batch: int
    words: int = 1024
    accumulation: int = 1
    is_checkpointed: bool = False
    ranks: int = 0  # two where ZeRO shards, else one
    rank: int | None = None  # of a LoRA adapter, beside weights that are written for it
    more: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Return what changes in the library's model."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": self.hidden // 8,
            "vocab_size": self.words,
        }

    def values(self, data: Path) -> list[str]:
        """Return the recipe's values."""
        ranks, model = self.ranks or (2 if self.zero else 1), self.sizes()
        return [
            "stages={train: {}}",
            "data.generator=null",
            f"data.splits={{train: {data}}}",
            f"data.max_tokens={TOKENS}",
            "model.config={" + ", ".join(f"{name}: {value}" for name, value in model.items()) + "}",
            "train.eval_split=null",
            f"train.zero.stage={self.zero}",
            f"train.steps={STEPS}",
            f"train.micro_batch={self.micro_batch}",
            f"train.global_batch={self.micro_batch * ranks * self.accumulation}",
            f"train.gradient_checkpointing={str(self.is_checkpointed).lower()}",
            f"resources.train.nodes={ranks}",
            f"environment.code=[{HERE / 'probe'}]",
            "tracking.mode=disabled",
            *([f"adapter={{method: lora, rank: {self.rank}}}", "model.config={}"] if self.rank else []),
            *([f"model={{path: {data.parent / 'base'}, from_scratch: false}}"] if self.rank else []),
            *self.more,
        ]


SETTINGS = (
    Setting(zero=0, hidden=512, layers=8, micro_batch=1),
    Setting(zero=0, hidden=512, layers=4, micro_batch=8),
    Setting(zero=0, hidden=256, layers=4, micro_batch=8, words=16384, accumulation=2),
    Setting(zero=0, hidden=512, layers=4, micro_batch=8, is_checkpointed=True),
    Setting(zero=3, hidden=512, layers=8, micro_batch=1),
    Setting(zero=3, hidden=256, layers=8, micro_batch=8),
    Setting(zero=0, hidden=384, layers=6, micro_batch=4, words=4096),
    Setting(zero=2, hidden=384, layers=6, micro_batch=4, words=4096),
    Setting(zero=3, hidden=384, layers=10, micro_batch=2, words=8192),
    Setting(zero=0, hidden=512, layers=8, micro_batch=4, rank=16),
    Setting(zero=0, hidden=512, layers=8, micro_batch=2, more=("train.optimizer=adamw_8bit",)),
    Setting(zero=3, hidden=512, layers=6, micro_batch=2, words=2048),
    Setting(zero=3, hidden=384, layers=6, micro_batch=2, words=4096, ranks=3),
    Setting(zero=3, hidden=512, layers=6, micro_batch=4, rank=8),
)
HALF = ("train.master_weights=false", "train.precision=bfloat16")
# No formula was fitted to these.
HELD_OUT = (
    Setting(zero=0, hidden=448, layers=6, micro_batch=2, words=2048),
    Setting(zero=0, hidden=384, layers=6, micro_batch=4, words=2048, accumulation=3),
    Setting(zero=0, hidden=384, layers=8, micro_batch=8, words=2048, is_checkpointed=True),
    Setting(zero=0, hidden=384, layers=8, micro_batch=4, more=("train.optimizer=adamw_8bit",)),
    Setting(zero=0, hidden=512, layers=8, micro_batch=2, more=HALF),
    Setting(zero=1, hidden=512, layers=6, micro_batch=1, words=4096),
    Setting(zero=2, hidden=448, layers=6, micro_batch=4, words=2048, accumulation=2),
    Setting(zero=3, hidden=448, layers=8, micro_batch=4, words=2048),
    Setting(zero=3, hidden=512, layers=10, micro_batch=1, words=2048),
    Setting(zero=3, hidden=256, layers=6, micro_batch=2, words=8192, ranks=3),
    Setting(zero=3, hidden=384, layers=8, micro_batch=8, rank=4),
)
EMPTY = Setting(zero=0, hidden=64, layers=1, micro_batch=1, words=1024)


def write_rows(path: Path, num_rows: int) -> None:
    """Write rows of exactly TOKENS tokens: filled input, separator, target, end."""
    row = {"input": "a", "target": "a" * (TOKENS - INPUT_TOKENS - 2)}
    path.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number in range(num_rows)))


WRITE_BASE = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, out, *sizes = sys.argv[1:]
changes = {name: int(value) for name, value in (size.split("=") for size in sizes)}
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **changes)).save_pretrained(out)
AutoTokenizer.from_pretrained(folder).save_pretrained(out)
"""


def write_base(setting: Setting, folder: Path) -> None:
    """Write a model with weights, for an adapter to train beside."""
    from sousbatch.recipes.catalog import LIBRARY_DIR

    sizes = [f"{name}={value}" for name, value in setting.sizes().items()]
    library = str(LIBRARY_DIR / "models" / "tiny-hangul")
    subprocess.run([sys.executable, "-c", WRITE_BASE, library, str(folder / "base"), *sizes], check=True)


def sousbatch(verb: str, setting: Setting, folder: Path, *options: str, **variables: str) -> str:
    """Run one command on *setting* in *folder* and return what it printed."""
    values = setting.values(folder.parent / "train.jsonl")
    command = [sys.executable, "-m", "sousbatch", verb, "hangul-restoration", *values, *options]
    command += ["--runs", str(folder / "runs")]
    variables["SOUSBATCH_STATE"] = str(folder / "state")  # so that it waits for nobody else's runs
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:] + f"\n{verb} failed")
    return done.stdout


def measure(setting: Setting, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the forecast's lines and what the probe of rank 0 wrote."""
    folder.mkdir()
    plan = json.loads(sousbatch("plan", setting, folder, "--json"))
    lines = {line["what"]: line["num_bytes"] for line in plan["forecast"]["device"]["train"]}
    probe = {"PROBE_OUT": str(folder), "PROBE_SAMPLE_S": "0.002", "MALLOC_MMAP_THRESHOLD_": "65536"}
    sousbatch("submit", setting, folder, **probe)
    return lines, json.loads((folder / "0.json").read_text())


def main() -> None:
    """Print forecast, measured and error of every setting."""
    parser = argparse.ArgumentParser(description="Compare the memory forecast with real runs.")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings, from 0")
    only = parser.parse_args().only
    print("MiB of a rank  ZeRO hidden layers rows  words  libraries  forecast measured  error")
    with tempfile.TemporaryDirectory(prefix="memory-") as temporary:
        write_rows(Path(temporary) / "train.jsonl", 64)
        libraries: dict[int, int] = {}
        for number, setting in enumerate((*SETTINGS, *HELD_OUT)):
            if only is not None and number not in only:
                continue
            if setting.zero not in libraries:
                lines, found = measure(replace(EMPTY, zero=setting.zero), Path(temporary) / f"empty{setting.zero}")
                libraries[setting.zero] = found["peak_bytes"] - found["before_bytes"] - sum(lines.values())
            if setting.rank:
                write_base(setting, Path(temporary))
            lines, found = measure(setting, Path(temporary) / str(number))
            forecast = sum(lines.values())
            taken = found["peak_bytes"] - found["before_bytes"] - libraries[setting.zero]
            name = f"{setting.accumulation} x forward" + ", rec." * setting.is_checkpointed
            name = ", ".join(text.rpartition("=")[2] for text in setting.more) or name
            name = f"lora, rank {setting.rank}" if setting.rank else name
            shape = f"{setting.zero:>3}{setting.hidden:>7}{setting.layers:>7}{setting.micro_batch:>5}{setting.words:>7}"
            parts = f"{libraries[setting.zero] / MIB:>11.0f}"
            error = f"{100 * (forecast / taken - 1):>+6.0f} %"
            print(f"{name:<16}{shape}{parts}{forecast / MIB:>10.0f}{taken / MIB:>9.0f}{error}")
            print("    " + ", ".join(f"{what} {num_bytes / MIB:.0f}" for what, num_bytes in lines.items()), flush=True)


if __name__ == "__main__":
    main()
