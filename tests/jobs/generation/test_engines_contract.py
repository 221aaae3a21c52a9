"""What every engine must do alike. vLLM is a stand-in; `make test-gpu` takes the real one, where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import sousbatch.recipes
from sousbatch.cluster.site import visible_gpus
from sousbatch.errors import RunError
from sousbatch.jobs.generation import Engine, LoadRequest, Prompt, load_engine
from sousbatch.recipes.schema import Data, Model, Predict, Recipe, StageSettings
from sousbatch.recipes.stages import settings_of

TINY = Path(sousbatch.recipes.__file__).parent / "library/models/tiny-hangul"
STAND_IN = Path(__file__).parents[2] / "toys/stand_in_vllm"
DAMAGED = 160  # a token whose embedding is no numbers
CONFIG = {"hidden_act": "silu"}  # in the recipe, in place of what the model's folder says
PREDICT = Predict(max_new_tokens=6, batch_rows=2)
PROMPTS = [Prompt(ids=list(range(20, 20 + size)), row=row, max_new_tokens=6) for row, size in enumerate([3, 12, 1, 7])]
pytestmark = pytest.mark.xdist_group("engines")  # one start of the ranks


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY, tie_word_embeddings=False))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(4)  # answers that differ from token to token
        model.get_input_embeddings().weight[DAMAGED] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, beside a config that says something else than `CONFIG`."""
    folder = shutil.copytree(model_dir, tmp_path_factory.mktemp("other") / "model")
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"hidden_act": "relu"}))
    return folder


def settings_with(**changes: Any) -> StageSettings:
    return settings_of(
        Recipe(model=Model(path="x", config=CONFIG), data=Data(prompt="{input}"), predict=replace(PREDICT, **changes))
    )


def load(name: str, model_dir: Path, device: str = "cpu", num_devices: int = 2) -> Engine:
    from sousbatch.jobs.training.model import load_tokenizer

    settings = settings_with(engine=name)
    request = LoadRequest(
        settings=settings,
        model_dir=model_dir,
        tokenizer=load_tokenizer(settings, TINY),
        model_class="AutoModelForCausalLM",
        device=device,
        dtype="float32",
        num_devices=num_devices,
    )
    return load_engine(request)


@pytest.fixture(
    scope="module",
    params=[
        *("transformers", "vllm", "zero3"),
        *(pytest.param(f"{name} on GPUs", marks=pytest.mark.gpu) for name in ("transformers", "vllm", "zero3")),
    ],
)
def engine(request: pytest.FixtureRequest, other_dir: Path) -> Iterator[Engine]:
    if request.param.endswith(" on GPUs"):
        name = request.param.partition(" ")[0]
        if not visible_gpus():
            pytest.skip("no NVIDIA GPU is visible to this process: nvidia-smi shows none")
        pytest.importorskip("vllm" if name == "vllm" else "torch")
        yield load(name, other_dir, "cuda", 1 if name == "vllm" else len(visible_gpus()))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_IN))
        yield load(request.param, other_dir)
        for name in [one for one in sys.modules if one.partition(".")[0] == "vllm"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def greedy(model_dir: Path) -> list[list[int]]:
    """What the engine of transformers answers, one prompt at a time."""
    made = load("transformers", model_dir)
    return [made.generate([prompt])[0].ids for prompt in PROMPTS]


def ids_of(engine: Engine, prompts: list[Prompt], **changes: Any) -> list[list[int]]:
    return [one.ids for one in engine.with_settings(settings_with(**changes)).generate(prompts)]


def test_no_prompts_have_no_answers(engine: Engine) -> None:
    assert engine.generate([]) == []


def test_answers_come_in_order_and_are_those_of_transformers(engine: Engine, greedy: list[list[int]]) -> None:
    assert len({tuple(ids) for ids in greedy}) == len(PROMPTS), "the answers show whose they are"
    assert ids_of(engine, PROMPTS) == greedy
    assert ids_of(engine, PROMPTS[::-1]) == greedy[::-1]
    assert ids_of(engine, PROMPTS[2:3]) == greedy[2:3]


def test_a_prompt_has_a_limit_of_its_own(engine: Engine, greedy: list[list[int]]) -> None:
    limits = [1, 6, 3, 2]
    capped = [replace(prompt, max_new_tokens=most) for prompt, most in zip(PROMPTS, limits, strict=True)]
    found = engine.generate(capped)
    assert [one.ids for one in found] == [ids[:most] for ids, most in zip(greedy, limits, strict=True)]
    assert found[0].ended == "length"


def test_drawing_depends_on_the_row_and_the_sample_alone(engine: Engine) -> None:
    together = ids_of(engine, PROMPTS, sample=True, temperature=1.5)
    assert [ids_of(engine, [prompt], sample=True, temperature=1.5)[0] for prompt in PROMPTS[:2]] == together[:2]
    assert ids_of(engine, PROMPTS, sample=True, temperature=1.5) == together
    other = [replace(PROMPTS[1], row=9), replace(PROMPTS[1], sample=1), PROMPTS[1]]
    drawn = ids_of(engine, other, sample=True, temperature=1.5)
    assert drawn[2] == together[1]
    assert len({tuple(ids) for ids in drawn}) == 3


def test_other_settings_are_another_engine_with_the_same_model(engine: Engine, greedy: list[list[int]]) -> None:
    assert ids_of(engine, PROMPTS, repetition_penalty=5.0) != greedy
    assert ids_of(engine, PROMPTS) == greedy
    assert engine.config["vocab_size"] > 0


def test_a_stop_text_or_token_ends_an_answer(engine: Engine, greedy: list[list[int]]) -> None:
    from transformers import AutoTokenizer

    ids = greedy[1]
    (found,) = engine.with_settings(settings_with(stop_ids=(ids[2],))).generate(PROMPTS[1:2])
    assert (found.ids, found.ended) == (ids[:2], "stop")
    stop = AutoTokenizer.from_pretrained(TINY).decode(ids[1:2])
    (found,) = engine.with_settings(settings_with(stop=(stop,))).generate([replace(PROMPTS[1], max_new_tokens=40)])
    assert found.ended == "stop"
    assert found.ids[:2] == ids[:2]
    assert len(found.ids) < 12, "an engine may look at the texts every few tokens"


def test_no_end_comes_before_the_least_tokens(engine: Engine, greedy: list[list[int]]) -> None:
    early = min(range(len(greedy)), key=lambda row: len(greedy[row]))
    assert len(greedy[early]) < 6, "an answer ends by itself"
    assert len(ids_of(engine, [PROMPTS[early]], min_new_tokens=6)[0]) == 6


def test_the_likeliest_tokens_are_kept_on_request(engine: Engine, greedy: list[list[int]], model_dir: Path) -> None:
    settings = settings_with(keep_logprobs=2)
    (found,) = engine.with_settings(settings).generate(PROMPTS[1:2])
    assert found.ids == greedy[1]
    assert found.logprobs is not None
    assert [step[0] for step in found.logprobs.top] == list(zip(found.ids, found.logprobs.chosen, strict=True))
    assert [len(step) for step in found.logprobs.top] == [2] * len(found.ids)
    (wanted,) = load("transformers", model_dir).with_settings(settings).generate(PROMPTS[1:2])
    assert wanted.logprobs is not None
    assert found.logprobs.chosen == pytest.approx(wanted.logprobs.chosen, abs=1e-4)


def test_scores_that_are_no_numbers_name_the_row(engine: Engine) -> None:
    """It is the last test of an engine: the ranks of zero3 end with it, and the next request says so."""
    damaged = Prompt(ids=[20, DAMAGED], row=77, max_new_tokens=3)
    if type(engine).__name__ == "VllmEngine":
        pytest.skip("vLLM shows its scores only where log-probabilities are kept")
    with pytest.raises(RunError, match="row 77"):
        engine.generate([*PROMPTS, damaged])


@pytest.mark.faults
def test_a_killed_rank_is_one_clear_error_and_leaves_none_behind(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(psutil.Process().children())
    engine = load("zero3", model_dir)
    ranks = sorted(set(psutil.Process().children()) - before, key=lambda one: one.create_time())
    os.kill(ranks[1].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="rank 1 of engine zero3 was killed by signal 9"):
        engine.generate(PROMPTS)
    assert not any(one.is_running() for one in ranks)
