"""Every task, method, sharding and precision together: what trains also resumes, is a model that loads, and predicts.

`make test-matrix` runs all cells, `make test` those of `ALWAYS`. A task is one row of `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from sousbatch.errors import EXIT_NO_ROOM

Ask = Callable[[dict[str, Any]], dict[str, Any]]

_NUMBERS = {
    split: [{"input": f"{number} {number + 1}", "target": f"{number + 2} {number}"} for number in range(first, last)]
    for split, first, last in (("train", 0, 16), ("validation", 16, 22))
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {
    **{"pad_token_id": 0, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 2},
}


def _answers(target: str) -> dict[str, list[Any]]:
    """Return the first word of *target* as the answer, which a passage begins with."""
    return {"text": [target.split()[0]], "answer_start": [0]}


# The model of each task, its rows, settings of its own, and the pattern of a layer that is frozen.
TASKS: dict[str, dict[str, Any]] = {
    "causal_lm": {
        "config": "LlamaConfig",
        "class": "LlamaForCausalLM",
        "sizes": _IDS | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "rows": _NUMBERS,
        "frozen": "layers:0-0",
    },
    "seq2seq": {
        "config": "BartConfig",
        "class": "BartForConditionalGeneration",
        "sizes": _IDS
        | {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"decoder_start_token_id": 2},
        "rows": _NUMBERS,
        "frozen": "layers:0-0",
    },
    "question_answering": {
        "config": "BertConfig",
        "class": "BertForQuestionAnswering",
        "sizes": _ENCODER,
        "rows": {
            split: [
                {"question": row["input"], "context": f"{row['target']} 7 8", "answers": _answers(row["target"])}
                for row in rows
            ]
            for split, rows in _NUMBERS.items()
        },
        "settings": ["question_answering.max_question_tokens=4", "question_answering.stride_tokens=2"],
        "frozen": "layers:0-0",
    },
    "classification": {
        "config": "BertConfig",
        "base": "BertForMaskedLM",  # so that the head is new, as it mostly is
        "class": "BertForSequenceClassification",
        "sizes": _ENCODER,
        "rows": {
            split: [{"input": row["input"], "target": ("low", "middle", "high")[place % 3]} for place, row in rows]
            for split, rows in ((split, enumerate(rows)) for split, rows in _NUMBERS.items())
        },
        "frozen": "layers:0-0",
    },
}
METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "frozen": ("model.freeze=[FROZEN]",),
    "lora": ("adapter.method=lora", "adapter.rank=2", "adapter.alpha=4"),
    "qlora": ("adapter.method=qlora", "adapter.rank=2", "adapter.alpha=4"),
}
CELLS = list(product(TASKS, METHODS, range(4), ("float32", "bfloat16")))
# Each task, method, stage and precision, and each method with each stage.
ALWAYS = [
    ("causal_lm", "full", 0, "bfloat16"),
    ("causal_lm", "full", 3, "float32"),
    ("causal_lm", "frozen", 2, "bfloat16"),
    ("causal_lm", "lora", 3, "bfloat16"),
    ("causal_lm", "qlora", 0, "bfloat16"),
    ("seq2seq", "full", 1, "float32"),
    ("seq2seq", "lora", 0, "float32"),
    ("question_answering", "full", 1, "bfloat16"),
    ("classification", "lora", 2, "float32"),
]


def _marks(cell: tuple[str, str, int, str]) -> list[pytest.MarkDecorator]:
    if cell in ALWAYS:  # one process imports for all of them
        return [pytest.mark.cell, pytest.mark.xdist_group("forked")]
    return [pytest.mark.matrix]


@pytest.mark.parametrize(
    ("task", "method", "stage", "precision"),
    [pytest.param(*cell, marks=_marks(cell), id="-".join(map(str, cell))) for cell in CELLS],
)
def test_what_trains_resumes_becomes_a_model_and_predicts(
    forked: Ask, task: str, method: str, stage: int, precision: str
) -> None:
    row = TASKS[task]
    overrides = [*row.get("settings", ()), *(one.replace("FROZEN", row["frozen"]) for one in METHODS[method])]
    overrides += [f"train.zero.stage={stage}", f"train.precision={precision}"]
    seen = forked({"do": "stop_and_resume", "task": task, "overrides": overrides, **row})
    assert "refused" not in seen, seen["refused"]
    assert seen["resumed"] == pytest.approx(seen["losses"], rel=1e-6)
    assert {"loss 1", "loss 4", "eval_loss 4"} <= seen["losses"].keys()
    assert seen["changed"] and seen["unequal"] == seen["missing"] == seen["other names"] == []
    assert seen["dtype"] == "torch.float16"
    assert seen["rows"] == len(row["rows"]["validation"])


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize(
    ("overrides", "is_random", "words"),
    [
        ((*METHODS["qlora"], "model.from_scratch=true"), True, "trains beside pretrained weights"),
        ((*METHODS["lora"], "model.freeze=[layers:0-0]"), False, "model.freeze"),
        (("train.precision=float16",), False, "float16 does not train on a CPU"),
        (("train.zero.stage=3", "train.zero.offload=optimizer"), False, "train.zero.offload has no meaning on a CPU"),
    ],
    ids=["qlora of random weights", "lora and frozen layers", "float16", "offload"],
)
def test_what_does_not_fit_together_is_refused_when_planning(
    forked: Ask, overrides: tuple[str, ...], is_random: bool, words: str
) -> None:
    request = {"do": "stop_and_resume", "task": "causal_lm", "overrides": overrides, "is_random": is_random}
    assert words in forked(request | TASKS["causal_lm"])["refused"]


@pytest.mark.xdist_group("forked")
def test_a_head_of_other_labels_is_made_anew_when_it_is_sharded(forked: Ask) -> None:
    """Those of the base are two, those of the rows three."""
    row = TASKS["classification"] | {"base": "BertForSequenceClassification"}
    overrides = ["train.zero.stage=3", "train.precision=float32", "consolidate.dtype=float32"]
    seen = forked({"do": "stop_and_resume", "task": "classification", "overrides": overrides, **row})
    assert {"classifier.weight", "classifier.bias"} <= {*seen["changed"]}
    assert seen["unequal"] == seen["missing"] == []
    assert seen["rows"] == 6


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize(
    ("task", "kind", "method"),
    [("seq2seq", "switch_transformers", "full"), ("causal_lm", "cohere2_moe", "lora")],
    ids=["each a module", "adapted beside the attention"],
)
def test_ranks_that_need_other_experts_gather_them_all(forked: Ask, task: str, kind: str, method: str) -> None:
    overrides = ["train.zero.stage=3", "train.steps=2", "train.precision=float32", "consolidate.dtype=float32"]
    overrides += ["predict.num_beams=1", f"adapter.method={method}"]
    request = {"do": "compare_with_rows_alone", "task": task, "kind": kind, "rows": _NUMBERS}
    seen = forked(request | {"overrides": overrides})
    assert seen["answers"] == seen["alone"]
    assert seen["eval_loss"] == pytest.approx(seen["loss alone"], rel=2e-4)


@pytest.mark.xdist_group("forked")
def test_the_loss_of_a_step_is_the_mean_over_all_tokens_that_are_learned(forked: Ask) -> None:
    """A step of all rows, in micro batches of several lengths, is measured."""
    rows = [{"input": "1 2 3 4 5"[: 2 * place + 1], "target": "6 7 8"[: 2 * (place % 3) + 1]} for place in range(5)]
    request = {
        "config": "GPT2Config",
        "class": "GPT2LMHeadModel",  # no name that says ForCausalLM
        "sizes": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "rows": {"train": rows + rows[:3], "validation": rows},
    }
    overrides = ["data.loss_on=all", "train.eval_split=train", "train.eval_every_steps=1", "train.precision=float32"]
    overrides += ["train.global_batch=8", "train.micro_batch=2", "train.learning_rate=1e-9"]
    seen = forked({"do": "stop_and_resume", "task": "causal_lm", "overrides": overrides, **request})
    assert seen["losses"]["loss 1"] == pytest.approx(seen["losses"]["eval_loss 1"], rel=1e-5)


@pytest.mark.xdist_group("forked")
def test_an_adapter_is_trained_on_an_earlier_stages_model_and_merged_into_it(forked: Ask) -> None:
    """Chained training, of which the second is sharded and the first is not."""
    adapter = "{adapter: {method: lora, rank: 2, alpha: 4}, train: {zero: {stage: 3}}}"
    stages = (
        f"stages={{train: {{}}, consolidate: {{}}, tune: {{kind: train, of: consolidate, set: {adapter}}}, "
        "merged: {kind: consolidate, of: tune}, predict: {of: merged}, merge: {}}"
    )
    request = {"do": "train_in_a_chain", "task": "causal_lm", "overrides": [stages, "train.zero.stage=0"]}
    seen = forked(request | TASKS["causal_lm"])
    assert seen["changed"] and all("proj" in name for name in seen["changed"])
    assert seen["unequal"] == seen["missing"] == []
    assert seen["rows"] == 6


@pytest.mark.xdist_group("forked")
@pytest.mark.parametrize("lies", [False, True], ids=["is right", "lies, as where a quota counts"])
def test_on_a_full_disk_a_training_goes_on_and_the_reserve_takes_its_weights(
    forked: Ask, mount_tmpfs: Callable[[str], Path], lies: bool
) -> None:
    row = TASKS["causal_lm"] | {"sizes": TASKS["causal_lm"]["sizes"] | {"hidden_size": 128, "intermediate_size": 256}}
    overrides = ["train.steps=8", "train.learning_rate=0.001", "checkpoints.max_skipped=null"]
    disk = str(mount_tmpfs("size=24m"))
    seen = forked(
        {"do": "fill_the_disk", "task": "causal_lm", "overrides": overrides, "disk": disk, "lies": lies} | row
    )
    assert seen["codes"] == [0, 0]
    assert seen["kept"] == [[2, "full"], [8, "weights"]]
    assert seen["wrong"] == seen["left"] == []
    assert (seen["consolidate"], seen["after it is freed"]) == (EXIT_NO_ROOM, 0)
    assert seen["step"] == 8
