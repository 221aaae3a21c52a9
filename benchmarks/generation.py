"""Time our generation against bare `generate`, batches by tokens against fixed ones, and drawing a token.

    python benchmarks/generation.py --rows 256 --repeat 3

The sides take turns in one process with one thread; CPU seconds count, so that other work beside disturbs little.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sousbatch.jobs.generation import Prompt
from sousbatch.jobs.generation.drawing import draw, uniforms
from sousbatch.jobs.generation.transformers_engine import TransformersEngine
from sousbatch.recipes.schema import Predict, StageSettings

PAD, END, FIXED_ROWS = 0, 1, 32


def make_model() -> Any:
    """Return a Llama of 4 layers that never says its end token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8000, num_key_value_heads=4, **sizes)).eval()
    return model


def make_prompts(num_rows: int, ratio: float | None) -> list[Prompt]:
    """Return prompts of mixed lengths: a median of 60 tokens, at most 512."""
    chance = random.Random(0)
    lengths = [min(512, max(4, round(chance.lognormvariate(math.log(60), 0.9)))) for _ in range(num_rows)]
    return [
        Prompt(
            ids=[chance.randrange(2, 8000) for _ in range(length)],
            row=row,
            max_new_tokens=max(1, math.ceil(ratio * length)) if ratio else 32,
        )
        for row, length in enumerate(lengths)
    ]


def bare(model: Any, prompts: list[Prompt]) -> None:
    """Continue one batch as a script by hand would: padded to the longest, up to the most tokens of all."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[PAD] * (longest - len(one.ids)) + list(one.ids) for one in prompts])
    mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in prompts])
    most = max(prompt.max_new_tokens for prompt in prompts)
    with torch.no_grad():
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=PAD, eos_token_id=END
        )


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of *work*."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(num_rows: int, repeat: int, ratio: float | None) -> None:
    """Print the rows a second of each side."""
    model, prompts = make_model(), make_prompts(num_rows, ratio)
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD, eos_token_id=END, bos_token_id=None)
    settings = StageSettings(predict=Predict())
    batches: list[list[Prompt]] = []
    engine = TransformersEngine(settings, model, tokenizer)
    inner = engine._continue
    engine._continue = lambda some: batches.append(some) or inner(some)  # type: ignore[method-assign, func-returns-value]
    engine.generate(prompts)  # warms up, and tells the batches
    engine = TransformersEngine(settings, model, tokenizer)
    fixed = [prompts[first : first + FIXED_ROWS] for first in range(0, num_rows, FIXED_ROWS)]
    sides: dict[str, Callable[[], object]] = {
        "sousbatch": lambda: engine.generate(prompts),
        "bare generate, the same batches": lambda: [bare(model, some) for some in batches],
        f"bare generate, {FIXED_ROWS} rows as they come": lambda: [bare(model, some) for some in fixed],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, work in sides.items():
            seconds[name].append(timed(work))
    print(f"{num_rows} rows, answers of " + (f"{ratio} of the prompt" if ratio else "32 tokens"))
    ours = median(seconds["sousbatch"])
    for name, found in seconds.items():
        print(f"  {name:44}{num_rows / median(found):8.1f} rows/s   sousbatch is {median(found) / ours:.2f} x")


def measure_drawing(repeat: int) -> None:
    """Print the milliseconds of one step of 32 rows at a vocabulary of 256,000."""
    rows, size, width = 32, 256_000, 640
    head, hidden = torch.randn(size, width), torch.randn(rows, width)
    scores = torch.randn(rows, size)
    scores[:, :100] += 12  # few tokens hold most of the probability, as a model's do
    generators = [torch.Generator().manual_seed(row) for row in range(rows)]

    def gumbel() -> None:
        uniform = torch.stack([torch.rand(size, generator=generator) for generator in generators])
        (scores - torch.log(-torch.log(uniform.clamp_min(1e-20)))).argmax(-1)

    def drawn(**options: Any) -> Callable[[], object]:
        return lambda: draw(scores, uniforms(0, [(row, 0, 0) for row in range(rows)], 1)[:, 0], **options)

    sides: dict[str, Callable[[], object]] = {
        "draw": drawn(),
        "draw, top_k=50": drawn(top_k=50),
        "draw, top_p=0.9": drawn(top_p=0.9),
        "draw, top_k=20, top_p=0.9, temperature=0.2": drawn(top_k=20, top_p=0.9, temperature=0.2),
        "noise of a generator for each row (before)": gumbel,
        "torch.multinomial of a softmax": lambda: torch.multinomial(scores.softmax(-1), 1),
        f"a head of width {width} alone": lambda: hidden @ head.T,
    }
    print(f"one step of {rows} rows at a vocabulary of {size:,}")
    for name, work in sides.items():
        work()
        print(f"  {name:44}{1000 * median(timed(work) for _ in range(repeat)):8.1f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure_drawing(arguments.repeat + 2)
    for ratio in (None, 0.5):
        measure(arguments.rows, arguments.repeat, ratio)


if __name__ == "__main__":
    main()
