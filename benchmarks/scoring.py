"""Time ROUGE of many pairs beside `rouge_score` on the same tokens, and the memory of scoring a million rows.

    python benchmarks/scoring.py --pairs 100000 --peer-pairs 5000 --rows 1000000

The peer scores the first pairs only, since its time grows with their number alone; both sides take turns, and their
figures must agree on these pairs to 1e-12.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
from rouge_score.rouge_scorer import RougeScorer

from sousbatch.predictions.measure import Case
from sousbatch.predictions.metrics.tokenizers import TOKENIZERS
from sousbatch.predictions.rows import PredictionRow
from sousbatch.predictions.scoring import score_cases, score_texts

KINDS = ("rouge1", "rouge2", "rougeL")
FIELDS = {"precision": "precision", "recall": "recall", "f1": "fmeasure"}


def make_pairs(count: int) -> list[tuple[str, str]]:
    """Return predictions and targets: 5 to 60 words, 3 of 10 of them wrong."""
    draw = random.Random(1)
    words = ["".join(draw.choices("가나다라마바사아자차카타파하거너더러", k=draw.randint(1, 4))) for _ in range(5000)]
    pairs = []
    for _ in range(count):
        target = draw.choices(words, k=draw.randint(5, 60))
        text = [word if draw.random() > 0.3 else draw.choice(words) for word in target]
        pairs.append((" ".join(text), " ".join(target) + "."))
    return pairs


def ours(pairs: list[tuple[str, str]], tokenizer: str, workers: int) -> tuple[float, dict[str, float]]:
    """Return seconds and scores: of one process those of its CPU, of several those that pass."""
    cases = (
        Case(row=PredictionRow(index=place, prediction=text), target=target, input=None)
        for place, (text, target) in enumerate(pairs)
    )
    clock = time.process_time if workers == 1 else time.perf_counter
    start = clock()
    found = score_cases(cases, metrics=["rouge"], tokenizer=tokenizer, workers=workers, baseline=False)
    return clock() - start, found["model"]


def peers(pairs: list[tuple[str, str]], tokenizer: str) -> tuple[float, dict[str, float]]:
    """Return the same of rouge_score."""
    scorer = RougeScorer(list(KINDS), tokenizer=SimpleNamespace(tokenize=TOKENIZERS[tokenizer]))
    start = time.process_time()
    rows = [scorer.score(target, text) for text, target in pairs]
    seconds = time.process_time() - start
    means = {
        f"{kind}_{part}": sum(getattr(row[kind], field) for row in rows) / len(rows)
        for kind in KINDS
        for part, field in FIELDS.items()
    }
    return seconds, means


def compare(pairs: list[tuple[str, str]], num_peer: int, repeat: int) -> None:
    """Print microseconds a pair of both sides."""
    workers = len(os.sched_getaffinity(0))
    print(f"{'tokens':<12}{'peer':>8}{'ours':>8}{'ratio':>8}{f'{workers} processes':>14}  figures; us a pair")
    for tokenizer in ("words", "characters"):
        part = pairs[:num_peer]
        expected = found = {}
        times: dict[str, list[float]] = {"peer": [], "one": [], "many": []}
        for _ in range(repeat):
            seconds, expected = peers(part, tokenizer)
            times["peer"].append(seconds / len(part))
            times["one"].append(ours(pairs, tokenizer, 1)[0] / len(pairs))
            times["many"].append(ours(pairs, tokenizer, workers)[0] / len(pairs))
        found = score_texts(*map(list, zip(*part, strict=True)), metrics=["rouge"], tokenizer=tokenizer)
        is_same = all(abs(found[name] - value) < 1e-12 for name, value in expected.items())
        peer, one, many = (statistics.median(times[name]) * 1e6 for name in ("peer", "one", "many"))
        print(
            f"{tokenizer:<12}{peer:>8.0f}{one:>8.1f}{peer / one:>7.1f}x{many:>14.1f}  "
            f"{'equal' if is_same else 'DIFFER'}"
        )


def memory_of(command: list[str]) -> tuple[float, float]:
    """Return the seconds of a command, and the most MB that its processes held together."""
    most, done = 0.0, threading.Event()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:

        def watch() -> None:
            nonlocal most
            while not done.wait(0.2):
                try:
                    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                    most = max(most, sum(one.memory_info().rss for one in family) / 1e6)
                except psutil.Error:
                    continue

        thread = threading.Thread(target=watch)
        thread.start()
        assert process.wait() == 0
        done.set()
        thread.join()
    return time.perf_counter() - start, most


def main() -> None:
    """Measure what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--peer-pairs", type=int, default=5_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    pairs = make_pairs(arguments.pairs)
    compare(pairs, arguments.peer_pairs, arguments.repeat)
    with tempfile.TemporaryDirectory() as folder:
        data, made = Path(folder, "data.jsonl"), Path(folder, "made.jsonl")
        with data.open("w") as rows, made.open("w") as answers:
            for place in range(arguments.rows):
                text, target = pairs[place % len(pairs)]
                rows.write(json.dumps({"input": text, "target": target}, ensure_ascii=False) + "\n")
                answers.write(json.dumps({"index": place, "prediction": text}, ensure_ascii=False) + "\n")
        del pairs
        score = [sys.executable, "-m", "sousbatch", "predictions", "score", str(made), "--data", str(data)]
        for options in (
            ["--metric", "cer"],
            ["--metric", "rouge"],
            ["--metric", "rougeL", "--intervals", "--draws", "20"],
        ):
            seconds, megabytes = memory_of([*score, *options])
            print(f"{arguments.rows:,} rows, {' '.join(options)}: {seconds:.0f} s, {megabytes:.0f} MB of all processes")


if __name__ == "__main__":
    main()
