"""Predict jobs that real faults strike: killed at any moment, without memory, without room, over changed rows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers

import sousbatch.jobs.merge as merging
import sousbatch.jobs.predict as predicting
import sousbatch.recipes
from sousbatch import ledger
from sousbatch.errors import EXIT_DEVICE_MEMORY, EXIT_NO_ROOM
from sousbatch.jobs.context import run_job
from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]
TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
ODD = ("", "a\u2028b\u0085c", "a\0b", "שלום \u202eعالم", "줄\r\n바꿈", '{"index": 3, "prediction": "x"}\n')
TEXTS = [*ODD, *("가나다라마바사아"[: 1 + number % 8] for number in range(53)), "가나" * 170_000]  # the last has 1 MB
ROWS = [{"id": f"행 {number}", "input": text} for number, text in enumerate(TEXTS)]
# Every field that generating can write, in two ways of choosing tokens.
OVERRIDES = (
    "stages={predict: {}, merge: {}}",
    "model.path=random",
    "data.columns.id=id",
    "data.prompt='{input}\\n답: '",
    "data.long_rows=cut_left",
    "tracking.mode=disabled",
    "predict.unit_rows=2",
    "predict.batch_rows=3",
    "predict.max_new_tokens=6",
    "predict.sample=true",
    "predict.keep_logprobs=2",
    "predict.samples=2",
    "predict.decodings={drawn: {}, warm: {temperature: 2, max_new_tokens: 4}}",
)
NUM_KILLS = 15


@pytest.fixture
def make_run(
    sousbatch: Run,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., RunPaths]:
    """Return a run folder with the plan of the small recipe; each one that is made is another run."""
    monkeypatch.setattr(predicting, "Watchdog", Mock())  # pytest has no stderr that a stack can be dumped to

    def made(*overrides: str, below: Path = tmp_path / "runs") -> RunPaths:
        capsys.readouterr()  # what libraries and jobs have printed
        code, out, err = sousbatch("plan", "small.yaml", *overrides, "--json")
        assert code == 0, err
        paths = RunPaths(root=below / f"small-{len(list(below.glob('*')))}" / "0123456789ab")
        paths.root.mkdir(parents=True)
        paths.plan.write_text(out)
        return paths

    return made


def test_after_an_engine_died_the_next_attempt_answers_what_is_missing(
    make_run: Callable[..., RunPaths], stand_in_vllm: Path
) -> None:
    overrides = ["predict.engine=vllm", "predict.max_new_tokens=2", "predict.unit_rows=2", "predict.batch_rows=3"]
    paths = make_run("stages={predict: {}, merge: {}}", *overrides)
    stand_in_vllm.write_text("3")  # in the second unit
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 1
    (error,) = [event for event in ledger.read(paths.ledger_dir) if event.kind == "error"]
    assert error.message.startswith("a process of vLLM has ended while it generated")
    stand_in_vllm.unlink()
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 0
    units = [event.unit for event in ledger.read(paths.ledger_dir) if event.kind == "unit"]
    assert units == [0, 1, 2], "no unit twice, and none of the rows that were lost"
    assert run_job("merge", merging.merge, [str(paths.root), "merge"]) == 0
    assert len(paths.predictions_file("predict").read_text().splitlines()) == 5

    import vllm

    given = vllm.LLM.last.given
    assert (given["max_num_seqs"], given["tensor_parallel_size"], given["max_model_len"]) == (3, 1, -1)


@pytest.fixture
def campaign(project: Path, make_run: Callable[..., RunPaths]) -> Callable[..., RunPaths]:
    """Return a run over odd rows, with a model whose answers show which row they answer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(TINY))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)
    model.save_pretrained(project / "random")
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(project / "random")
    text = "".join(json.dumps(row | {"target": "답"}, ensure_ascii=False) + "\n" for row in ROWS)
    (project / "test.jsonl").write_text(text, encoding="utf-8")
    return lambda *more, **options: make_run(*OVERRIDES, *more, **options)


def start(paths: RunPaths, task: int, attempt: int) -> int:
    """Start a rank of the predict stage and return its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number in (1, 2):
            os.dup2(os.open(paths.root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        torch.set_num_threads(1)
        own = {"SOUSBATCH_TASK": str(task), "SOUSBATCH_ATTEMPT": str(attempt), "HF_DEACTIVATE_ASYNC_LOAD": "1"}
        os.environ |= own  # torch refuses threads of a forked process now and then
        code = run_job("predict", predicting.predict, [str(paths.root), "predict"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def next_attempt(paths: RunPaths, task: int) -> int:
    opened = ledger.open_attempt(paths.ledger_dir, "predict", task)
    opened.close()
    return opened.number


def ends(processes: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in processes]


def units(paths: RunPaths) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in paths.predictions("predict").glob("*/unit-*.jsonl")}


def merged(paths: RunPaths) -> dict[str, bytes]:
    """Merge and return the bytes of each decoding's predictions."""
    assert run_job("merge", merging.merge, [str(paths.root), "merge"]) == 0
    return {path.name: path.read_bytes() for path in paths.predictions("predict").glob("predictions.*.jsonl")}


def undisturbed(paths: RunPaths) -> dict[str, bytes]:
    """Run the predict stage in one piece, and return what `merged` does."""
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 0
    found = merged(paths)
    for content in found.values():
        rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
        assert [(row["index"], row["id"]) for row in rows] == [(at, row["id"]) for at, row in enumerate(ROWS)]
        assert len({row["prediction"] for row in rows}) > len(rows) / 2, "answers show whose they are"
    return found


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2))
def test_ranks_killed_at_15_random_moments_in_changing_numbers_write_every_row_once(
    campaign: Callable[..., RunPaths], seed: int
) -> None:
    expected = undisturbed(campaign())
    chance, paths, num_ranks, seen = random.Random(seed), campaign(), 0, dict[Path, int]()
    for _ in range(NUM_KILLS):
        num_ranks = chance.choice([number for number in range(1, 6) if number != num_ranks])
        paths.plan.write_text(campaign(f"resources.predict.tasks={num_ranks}").plan.read_text())
        ranks = [start(paths, task, next_attempt(paths, task)) for task in range(num_ranks)]
        wanted = len(seen) + chance.randint(0, 3)
        while len(units(paths)) < wanted and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.1)
        for rank in chance.sample(ranks, num_ranks):
            os.kill(rank, signal.SIGKILL)
            time.sleep(chance.random() * 0.01)
        assert -9 in ends(ranks), (paths.root / "log").read_text()
        now = units(paths)
        assert now.items() >= seen.items(), "a committed unit was rewritten"
        seen = now
    assert 0 < len(seen) < 2 * len(ROWS) / 2, "the kills came while it worked"
    paths.plan.write_text(campaign("resources.predict.tasks=3").plan.read_text())
    assert ends([start(paths, task, next_attempt(paths, task)) for task in range(3)]) == [0, 0, 0]
    assert merged(paths) == expected


@pytest.mark.faults
def test_two_predictors_on_the_units_of_a_run_leave_one_answer_each(
    campaign: Callable[..., RunPaths],
) -> None:
    expected, paths = undisturbed(campaign()), campaign()
    attempt = next_attempt(paths, 0)
    assert ends([start(paths, 0, attempt), start(paths, 0, attempt)]) == [0, 0], (paths.root / "log").read_text()
    assert merged(paths) == expected


@pytest.mark.faults
def test_a_disk_that_fills_within_a_unit_costs_that_unit(
    campaign: Callable[..., RunPaths], mount_tmpfs: Callable[[str], Path]
) -> None:
    kept, disk = "predict.keep_logprobs=400", mount_tmpfs("size=1m")
    paths, other = campaign(kept, below=disk), campaign(kept)
    assert run_job("predict", predicting.predict, [str(other.root), "predict"]) == 0
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == EXIT_NO_ROOM
    done = units(paths)
    assert 0 < len(done) < len(units(other))
    assert not [path.name for path in paths.predictions("predict").rglob("*") if "tmp" in path.name]
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 0
    assert units(paths).items() >= done.items()
    assert merged(paths) == merged(other)


def test_a_device_that_runs_out_of_memory_within_a_unit_gets_smaller_batches_from_then_on(
    campaign: Callable[..., RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("predict.rows=16", "predict.unit_rows=8", "predict.batch_rows=4", "predict.keep_logprobs=0")
    paths, other = campaign(*few), campaign(*few)
    assert run_job("predict", predicting.predict, [str(other.root), "predict"]) == 0
    forward, tried = transformers.LlamaForCausalLM.forward, list[int]()

    def allocating(self: Any, input_ids: Any, *given: Any, **named: Any) -> Any:
        if input_ids.shape[1] > 1:
            tried.append(len(input_ids))
            if len(tried) > 4 and len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, input_ids, *given, **named)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", allocating)
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 0
    _look, *batches = tried  # at what the model makes of padding
    assert batches[:5] == [4, 4, 4, 4, 2] and max(batches[4:]) == 2, (
        "what fitted is remembered over units and decodings"
    )
    texts = [[json.loads(line)["prediction"] for line in one.splitlines()] for one in merged(paths).values()]
    assert texts == [[json.loads(line)["prediction"] for line in one.splitlines()] for one in merged(other).values()]


def test_a_row_that_no_memory_holds_ends_the_job_and_leaves_what_is_done(
    campaign: Callable[..., RunPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = campaign("predict.rows=6")
    forward, tried = transformers.LlamaForCausalLM.forward, list[int]()

    def allocating(self: Any, input_ids: Any, *given: Any, **named: Any) -> Any:
        tried.append(len(input_ids))
        if len(units(paths)) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, input_ids, *given, **named)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", allocating)
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == EXIT_DEVICE_MEMORY
    assert len(units(paths)) == 2


def test_rows_that_change_while_they_are_answered_are_not_mixed(
    campaign: Callable[..., RunPaths], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, write = campaign(), predicting.write_unit
    data = project / "test.jsonl"

    def edited(*given: Any) -> Any:
        unit = write(*given)
        data.write_text("".join(data.read_text().splitlines(keepends=True)[::-1]))
        return unit

    monkeypatch.setattr(predicting, "write_unit", edited)
    assert run_job("predict", predicting.predict, [str(paths.root), "predict"]) == 1
    assert len(units(paths)) == 1
    (error,) = [event for event in ledger.read(paths.ledger_dir) if event.kind == "error"]
    assert error.message == (
        f"{data} was changed while its rows were answered; put back what was submitted and resume, or submit again"
    )
