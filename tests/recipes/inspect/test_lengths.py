"""Every row is looked at in tokens before the queue, with the very function that the jobs use."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from sousbatch.cluster.site import Site
from sousbatch.errors import PlanError, RecipeError, UsageError
from sousbatch.jobs.tasks.causal_lm import load_examples
from sousbatch.recipes.catalog import LIBRARY_DIR
from sousbatch.recipes.compile import compile
from sousbatch.recipes.compose import compose
from sousbatch.recipes.data.encode import Encoded, Span, encode_prompts, encode_rows, fit, is_kept
from sousbatch.recipes.inspect import lengths
from sousbatch.recipes.inspect.inputs import inspect
from sousbatch.recipes.inspect.tokenizer import load_full, load_light
from sousbatch.recipes.model_kinds import max_positions
from sousbatch.recipes.plan import Plan
from sousbatch.recipes.schema import Data

SITE = Site(
    name="this machine",
    launcher="local",
    cpus_per_node=4,
    memory_bytes=16 * 10**9,
    gpus_per_node=0,
    gpu_memory_bytes=0,
)
TINY = LIBRARY_DIR / "models" / "tiny-hangul"
# A word is a token, and the end token is one more.
LONG = {"input": " ".join(["word"] * 600), "target": "answer"}
TRAIN_ONLY = "stages={train: {set: {train: {eval_split: null}}}}"
PREDICT_ONLY = "stages={predict: {}}"


def _rows(project: Path, split: str, rows: Sequence[dict[str, Any]]) -> None:
    (project / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _plan(*overrides: str) -> Plan:
    recipe = compose("./small.yaml", overrides)
    return compile(recipe, SITE, inspect(recipe, Path("runs")))


def _reasons(*overrides: str) -> str:
    with pytest.raises(PlanError) as caught:
        _plan(*overrides)
    return "\n".join(caught.value.reasons)


GOOD = {"input": "a b", "target": "c"}


def test_long_rows_are_counted_and_refused_with_their_numbers(project: Path) -> None:
    _rows(project, "train", [GOOD, LONG, *[GOOD] * 7, *[LONG] * 6])
    reason = _reasons(TRAIN_ONLY)
    assert "split 'train': 7 of 15 rows (row 2, 10, 11, 12, 13 and 2 more) are longer than data.max_tokens=32" in reason
    assert "the longest has 602 tokens; set data.long_rows=drop" in reason


@pytest.mark.parametrize(
    ("policy", "kept", "warning"),
    [
        ("drop", 1, "are left out"),
        ("cut_left", 3, "are cut (cut_left)"),
        ("cut_right", 1, "2 of 3 rows (row 2, 3) come without a token to learn, and are left out"),
    ],
)
def test_steps_are_counted_from_the_rows_that_remain(project: Path, policy: str, kept: int, warning: str) -> None:
    _rows(project, "train", [GOOD, LONG, LONG])
    plan = _plan(TRAIN_ONLY, f"data.long_rows={policy}", "train.global_batch=1", "train.epochs=1")
    found = plan.inputs.lengths_of("train", "train")
    assert found is not None and (found.num_examples, found.num_rows, found.longest) == (kept, 3, 602)
    assert plan.stages[0].steps == kept
    assert any(warning in text for text in plan.warnings)


def test_empty_targets_are_told_and_all_of_them_refused(project: Path) -> None:
    _rows(project, "train", [GOOD, GOOD | {"target": " "}])
    assert any(
        "1 of 2 rows (row 2) come with an empty target, and are left out" in text for text in _plan(TRAIN_ONLY).warnings
    )
    _rows(project, "train", [GOOD | {"target": ""}] * 3)
    assert "all 3 rows are empty in column 'target'; name another with data.columns.target" in _reasons(TRAIN_ONLY)


def test_text_that_the_tokenizer_does_not_know_is_told(project: Path) -> None:
    folder, told = json.dumps(str(TINY)), "the tokenizer does not know"
    _rows(project, "train", [{"input": "Где ты", "target": "да"}] * 2)
    (warning,) = [text for text in _plan(TRAIN_ONLY, f"model.tokenizer={folder}").warnings if told in text]
    assert "stage 'train', split 'train': the tokenizer does not know 78 % of the tokens" in warning
    _rows(project, "train", [{"input": "방이", "target": "좋다"}] * 2)
    assert not [text for text in _plan(TRAIN_ONLY, f"model.tokenizer={folder}").warnings if told in text]


def test_prompts_are_held_against_the_models_context_and_never_dropped(project: Path) -> None:
    _rows(project, "test", [GOOD, LONG])
    for policy in ("refuse", "drop"):
        reason = _reasons(PREDICT_ONLY, f"data.long_rows={policy}")
        assert "1 of 2 prompts (row 2) are longer than 384 tokens (the model's 512 positions less 128" in reason
        assert "set data.long_rows=cut_left or data.long_rows=cut_right" in reason
    plan = _plan(PREDICT_ONLY, "data.long_rows=cut_left")
    found = plan.inputs.lengths_of("predict", "predict")
    assert found is not None and (found.num_examples, found.longest_kept) == (2, 384)
    assert "leaves no tokens for a prompt" in _reasons(PREDICT_ONLY, "predict.max_new_tokens=512")


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"])
def test_the_context_has_many_names(name: str) -> None:
    assert max_positions({name: 512}) == 512


def test_rows_beyond_the_models_positions_do_not_train(project: Path) -> None:
    _rows(project, "train", [LONG])
    assert "a row has 602 tokens and the model has 512 positions" in _reasons(TRAIN_ONLY, "data.max_tokens=700")


def test_a_look_is_remembered_by_what_decides_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _plan().inputs.lengths
    asked: list[str] = []
    real = lengths._answer

    def answer(wanted: lengths.Wanted, *rest: Any) -> Any:
        asked.append(wanted.use)
        return real(wanted, *rest)

    monkeypatch.setattr(lengths, "_answer", answer)
    assert _plan("train.learning_rate=1e-3").inputs.lengths == before and asked == []
    _rows(project, "test", [GOOD])
    _plan()
    assert asked == ["predict"]
    _plan("data.prompt='x {input}'")
    assert asked == ["predict", "train", "eval", "predict"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer that begins each text, with a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the hat"] * 9, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("policy", ["refuse", "drop", "cut_left", "cut_right"])
def test_the_light_tokenizer_encodes_as_that_of_the_jobs(bpe: Path, policy: Any) -> None:
    draw = random.Random(0)
    words = ["the", "cat", "모자", "<s>", "</s>", "\n", "  ", "é", "", "𝄞", "mat."]
    rows = [
        {"input": " ".join(draw.choices(words, k=draw.randint(0, 30))), "target": draw.choice(words)}
        for _ in range(200)
    ]
    for folder in (bpe, TINY):
        small, full = load_light(folder, ()), load_full(folder, (), trusts_code=False)
        assert small is not None
        spec = Data(prompt="{input} =>", separator="\n", max_tokens=30, long_rows=policy)
        for one in (spec, replace(spec, pad_input_to=24), replace(spec, loss_on="all")):
            assert encode_rows(one, rows, small) == encode_rows(one, rows, full)
            assert encode_prompts(one, rows, small, 20) == encode_prompts(one, rows, full, 20)
        plain = replace(spec, prompt="")
        texts = [{"text": row["input"]} for row in rows]
        assert encode_rows(plain, texts, small) == encode_rows(plain, texts, full)


def test_a_model_whose_own_tokenizer_class_is_taken_has_no_light_one(bpe: Path, tmp_path: Path) -> None:
    """transformers knows for which models it passes over what tokenizer_config.json says."""
    from transformers.models.auto import tokenization_auto as auto

    usual = {"TokenizersBackend", "PreTrainedTokenizerFast", "PythonBackend", "MistralCommonBackend", None}
    wrong = auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    own = [kind for kind in wrong if auto.TOKENIZER_MAPPING_NAMES[kind] not in usual]
    assert "qwen2" in own
    folder = Path(shutil.copytree(bpe, tmp_path / "model"))
    for kind in [*own, "llama"]:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        assert (load_light(folder, ()) is None) == (kind != "llama"), kind


def test_a_begin_token_survives_a_cut_on_the_left_and_stays_masked(bpe: Path) -> None:
    tokenizer = load_light(bpe, ())
    assert tokenizer is not None
    spec = Data(max_tokens=8, long_rows="cut_left")
    (row,) = encode_rows(spec, [{"input": "the cat sat on the mat and the hat " * 3, "target": "the"}], tokenizer)
    assert (row.ids[0], len(row.ids), row.is_long) == (tokenizer.bos_token_id, 8, True)
    assert [tokenizer.decode(ids) for learned, ids in row.parts if learned] == ["the</s>"] and is_kept(spec, row)


def test_plain_text_begins_and_ends_as_a_prompt_with_its_target_does(bpe: Path) -> None:
    tokenizer = load_light(bpe, ())
    assert tokenizer is not None
    (row,) = encode_rows(Data(prompt="", packing="blocks"), [{"text": "the cat"}], tokenizer)
    assert tokenizer.decode(row.ids) == "<s>the cat</s>"


def test_several_learned_spans_are_cut_on_either_side() -> None:
    def part(policy: Literal["cut_left", "cut_right"], learned: tuple[Span, ...]) -> list[tuple[bool, list[int]]]:
        row = Encoded([10, 11, 12, 13, 14, 15, 16, 17, 18, 19], learned, 10, False)
        return list(fit(Data(max_tokens=8, long_rows=policy), row, False, SimpleNamespace(bos_token_id=None)).parts)

    spans = ((1, 3), (5, 6), (9, 10))
    assert part("cut_left", spans) == [
        *((True, [12]), (False, [13, 14]), (True, [15]), (False, [16, 17, 18]), (True, [19]))
    ]
    assert part("cut_right", spans) == [
        *((False, [10]), (True, [11, 12]), (False, [13, 14]), (True, [15]), (False, [16, 17]))
    ]


def test_a_chat_template_is_counted_in_a_process_of_its_own(
    project: Path, bpe: Path, sousbatch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["data.prompt=chat", "data.system=Be kind", f"model.tokenizer={json.dumps(str(bpe))}"]
    overrides += ["data.max_tokens=64", TRAIN_ONLY]
    found = _plan(*overrides).inputs.lengths
    code, out, err = sousbatch("plan", "./small.yaml", "--rows", "1", *overrides)
    assert code == 0, err
    assert f"row 1: {found[0].longest} tokens" in out  # all rows are as long
    assert "  masked  | <s>system: Be kind\n  masked  | <s>user: train 0\n  masked  | assistant:\n" in out
    assert "  learned | 답 0</s>" in out


@pytest.mark.parametrize("prompt", ["chat", "{input}"])
def test_a_tokenizer_without_an_end_token_is_refused(project: Path, bpe: Path, tmp_path: Path, prompt: str) -> None:
    config = json.loads((bpe / "tokenizer_config.json").read_text())
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless/tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    (tmp_path / "endless/tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(
        UsageError, match='endless: it has no end token, so that no answer would end; write "eos_token"'
    ):
        _plan(f'data.prompt="{prompt}"', f"model.tokenizer={json.dumps(str(tmp_path / 'endless'))}", TRAIN_ONLY)


def test_rows_are_shown_as_training_sees_them(project: Path, sousbatch: Any) -> None:
    _rows(project, "train", [GOOD, LONG])
    code, out, err = sousbatch("plan", "./small.yaml", "--rows", "2", TRAIN_ONLY)
    assert code == 0, err
    assert "train, split train, row 1: 4 tokens, 2 learned" in out
    assert "row 2: 602 tokens, not used for training (602 before data.long_rows=refuse)" in out


def test_planning_imports_neither_torch_nor_transformers(project: Path) -> None:
    code = "import sys; from sousbatch.cli.main import main; main(['plan', './small.yaml']); "
    code += "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr
    assert "all rows checked" in done.stdout


def test_rows_show_what_a_cut_leaves_of_a_prompt(project: Path, sousbatch: Any) -> None:
    _rows(project, "test", [LONG])
    code, out, err = sousbatch("plan", "./small.yaml", "--rows", "1", PREDICT_ONLY, "data.long_rows=cut_right")
    assert code == 0, err
    (head,) = [line for line in out.splitlines() if line.startswith("predict, split test, row 1: ")]
    assert head.endswith("(600 before data.long_rows=cut_right)") and "longer than" not in head


@pytest.mark.parametrize(
    ("limits", "advised", "not_advised"),
    [
        (["data.pad_input_to=3", "data.max_tokens=32"], "set a larger data.pad_input_to, ", "data.max_tokens="),
        (["data.pad_input_to=20", "data.max_tokens=21"], "set data.max_tokens=22, ", "pad_input_to, "),
    ],
)
def test_the_limit_that_a_row_is_beyond_is_the_one_to_raise(
    project: Path, limits: list[str], advised: str, not_advised: str
) -> None:
    _rows(project, "train", [{"input": "a b c d", "target": "e"}, GOOD])
    reasons = _reasons(TRAIN_ONLY, *limits)
    assert advised in reasons and not_advised not in reasons.partition("; set ")[2]


@pytest.mark.parametrize(
    ("overrides", "num", "longest"),
    [
        (["data.packing=rows"], 2, 32),
        (["data.packing=blocks", "data.prompt=''", "data.columns.text=input"], 2, 32),
        ([], 8, 14),
    ],
    ids=["rows", "blocks", "none"],
)
def test_examples_of_packed_rows_are_counted_as_the_job_makes_them(
    project: Path, overrides: list[str], num: int, longest: int
) -> None:
    words = [9, 3, 8, 12, 1, 7, 5, 3]
    _rows(project, "train", [{"input": " ".join(["word"] * count), "target": "answer"} for count in words])
    plan = _plan(TRAIN_ONLY, "train.global_batch=1", "train.epochs=1", *overrides)
    found, stage = plan.inputs.lengths_of("train", "train"), plan.stage("train")
    assert found is not None and (found.num_examples, found.longest_kept) == (num, longest)
    assert (stage.steps, stage.splits["train"].num_rows) == (num, 8)
    examples = load_examples(
        stage.settings, project / "train.jsonl", load_full(project / "model", (), trusts_code=False)
    )
    assert len(examples) == num


def test_packs_longer_than_the_models_positions_are_refused(project: Path) -> None:
    _rows(project, "train", [GOOD] * 900)
    reason = _reasons(TRAIN_ONLY, "data.packing=rows", "data.max_tokens=1000")
    assert "an example has " in reason and "set data.max_tokens=" in reason and "long_rows" not in reason


def test_a_long_plain_text_is_refused_with_blocks_as_a_way_out(project: Path) -> None:
    _rows(project, "train", [LONG])
    assert "data.packing=blocks" in _reasons(TRAIN_ONLY, "data.prompt=''", "data.columns.text=input")


def test_packs_get_less_noise_than_rows_and_are_not_grouped_by_length(project: Path) -> None:
    plan = _plan(TRAIN_ONLY, "data.packing=rows", "train.neftune_alpha=5")
    assert [warning for warning in plan.warnings if "rows get less noise" in warning]
    with pytest.raises(RecipeError, match="train.group_by_length does nothing with data.packing=rows"):
        _plan(TRAIN_ONLY, "data.packing=rows", "train.group_by_length=true")
