"""What planning refuses of an engine: what it cannot do, where it is missing, how many devices it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]
VLLM, ZERO3 = "predict.engine=vllm", "predict.engine=zero3"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([VLLM, "predict.num_beams=4"], "predict.num_beams is beyond vllm, which searches no beams"),
        ([VLLM, "predict.no_repeat_ngram=3"], "predict.no_repeat_ngram is beyond vllm"),
        (
            [VLLM, "predict.sample=true", "predict.temperature=2.5"],
            "predict.temperature is 2.5, and vllm draws up to 2",
        ),
        ([VLLM, "predict.decodings={a: {no_repeat_ngram: 2}}"], "decodings.a.no_repeat_ngram"),
        ([VLLM, "predict.vllm.memory_share=1.5"], "predict.vllm.memory_share"),
        ([VLLM, "predict.vllm.max_tokens=9999"], "positions; set predict.vllm.max_tokens="),
        (
            [VLLM, "predict.offload=true"],
            "predict.offload is for engine transformers or zero3, and predict.engine is vllm",
        ),
        ([ZERO3, "predict.load_in=4bit"], "predict.load_in is for engine transformers, and predict.engine is zero3"),
        (["predict.load_in=8bit", "predict.offload=true"], "predict.offload keeps no weights of predict.load_in 8bit"),
        (["predict.offload=true"], "predict.offload has no meaning on a CPU"),
        (["predict.load_in=3bit"], "predict.load_in"),
        (["predict.load_in_4bit=true"], "predict.load_in"),
        (["predict.vllm.max_tokens=64"], "(leave it out, or set predict.engine=vllm)"),
        ([VLLM, "predict.vllm.max_model_len=64"], "max_tokens"),
        (
            [ZERO3, "+resources.predict={devices_per_node: 2, nodes: 2}"],
            "a task of predict uses the devices of one node; set resources.predict.nodes=1",
        ),
        (["predict.engine=zero"], "(did you mean 'zero3'?)"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_by_its_key(
    sousbatch: Run, project: Path, stand_in_vllm: Path, overrides: list[str], says: str
) -> None:
    code, _, err = sousbatch("plan", "small.yaml", *overrides)
    assert code == 2
    assert says in err


def test_an_engine_that_the_jobs_python_lacks_is_refused_with_what_to_install(sousbatch: Run, project: Path) -> None:
    code, _, err = sousbatch("plan", "small.yaml", VLLM)
    assert code == 2
    assert "the Python of the jobs has no package vllm: pip install vllm there" in err


def test_a_vllm_that_was_built_for_other_devices_is_refused(sousbatch: Run, project: Path, stand_in_vllm: Path) -> None:
    installed = next(stand_in_vllm.parent.glob("site/*.dist-info/METADATA"))
    installed.write_text(installed.read_text().replace("+cpu", ""))
    code, _, err = sousbatch("plan", "small.yaml", VLLM)
    assert code == 2
    assert "whose version 0.33.0 was not built for CPUs; set resources.predict.device=gpu" in err


@pytest.mark.parametrize("engine", [VLLM, ZERO3, "predict.engine=transformers"])
def test_an_engine_spreads_over_the_devices_of_its_task(
    sousbatch: Run, project: Path, stand_in_vllm: Path, engine: str
) -> None:
    code, out, err = sousbatch("plan", "small.yaml", engine, "+resources.predict={devices_per_node: 2}", "--json")
    assert code == 0, err
    predict = next(stage for stage in json.loads(out)["stages"] if stage["kind"] == "predict")
    assert (predict["resources"]["devices_per_node"], predict["num_tasks"]) == (2, 1)
