"""A predict job with an engine of another package, whose process dies in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

import sousbatch.jobs.merge as merging
import sousbatch.jobs.predict as predicting
from sousbatch import ledger
from sousbatch.jobs.context import run_job
from sousbatch.run_folder import RunPaths

Run = Callable[..., tuple[int, str, str]]


def test_after_an_engine_died_the_next_attempt_answers_what_is_missing(
    sousbatch: Run,
    project: Path,
    tmp_path: Path,
    stand_in_vllm: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overrides = ["predict.engine=vllm", "predict.max_new_tokens=2", "predict.unit_rows=2", "predict.batch_rows=3"]
    code, out, err = sousbatch("plan", "small.yaml", "stages={predict: {}, merge: {}}", *overrides, "--json")
    assert code == 0, err
    paths = RunPaths(root=tmp_path / "runs" / "small" / "0123456789ab")
    paths.root.mkdir(parents=True)
    paths.plan.write_text(out)
    monkeypatch.setattr(predicting, "Watchdog", Mock())  # pytest has no stderr that a stack can be dumped to
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
