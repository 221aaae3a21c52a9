"""Conversations: which tokens are learned under which chat template, and rows that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sousbatch.cli.main import main
from sousbatch.recipes.data.chat import RowFault, input_of, target_of, turns_of
from sousbatch.recipes.data.conversations import encode_conversations, encode_questions
from sousbatch.recipes.data.encode import is_kept, render_prompt
from sousbatch.recipes.schema import Data

HEAD = "{% for m in messages %}<|{{ m.role }}|>\n"
ASKS = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
ANSWER = "{%- generation %}{{ m.content }}{% endgeneration %}"
MARKED = "{% if m.role == 'assistant' %}" + ANSWER + "{% else %}{{ m.content }}{% endif %}"
TEMPLATES = {
    "an end token a turn": HEAD + "{{ m.content }}</s>\n{% endfor %}" + ASKS,
    "marks": HEAD + MARKED + "</s>\n{% endfor %}" + ASKS,
}
NO_ENDS = HEAD + "{{ m.content }}\n{% endfor %}" + ASKS
SPEC = Data(prompt="messages", max_tokens=400)
KOREAN = [
    *({"role": "user", "content": "안녕"}, {"role": "assistant", "content": "네, 끝"}),
    *({"role": "user", "content": "또?"}, {"role": "assistant", "content": "그럼"}),
]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}, {"from": "human", "value": "more"}]


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """Return a tokenizer with a token a byte, so that a Korean syllable has three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [*pre_tokenizers.ByteLevel.alphabet(), "</s>"]
    inner = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def _learned(spec: Data, tokenizer: Any, *conversations: Any) -> list[list[str]]:
    rows = encode_conversations(spec, [{"messages": one} for one in conversations], tokenizer)
    return [[tokenizer.decode(ids) for is_learned, ids in row.parts if is_learned] for row in rows]


@pytest.mark.parametrize("template", TEMPLATES)
def test_all_that_the_assistant_says_is_learned_with_the_end_of_its_turns(bytes_tokenizer: Any, template: str) -> None:
    bytes_tokenizer.chat_template = TEMPLATES[template]
    shown = replace(SPEC, system="요약", examples=({"input": "q", "target": "a"},))
    for spec in (SPEC, shown):
        assert _learned(spec, bytes_tokenizer, KOREAN, SHARED) == [["네, 끝</s>", "그럼</s>"], ["yes</s>"]]
    (whole,) = encode_conversations(replace(shown, loss_on="all"), [{"messages": SHARED}], bytes_tokenizer)
    assert [part[0] for part in whole.parts] == [True]
    assert bytes_tokenizer.decode(whole.ids).startswith(
        "<|system|>\n요약</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nhi</s>"
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_of_weight_0_is_read_and_not_learned(bytes_tokenizer: Any, template: str) -> None:
    bytes_tokenizer.chat_template = TEMPLATES[template]
    first, last, none = ([dict(turn) for turn in KOREAN] for _ in range(3))
    first[1]["weight"] = last[3]["weight"] = none[1]["weight"] = none[3]["weight"] = 0
    shown = replace(SPEC, examples=({"input": "q", "target": "a"},))
    for spec in (SPEC, shown):
        assert _learned(spec, bytes_tokenizer, first, last, none) == [["그럼</s>"], ["네, 끝</s>"], []]


def test_a_template_without_ends_gets_one_behind_the_last_answer(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = NO_ENDS
    assert _learned(SPEC, bytes_tokenizer, KOREAN) == [["네, 끝", "그럼", "</s>"]]


def test_the_end_token_follows_the_end_of_a_turn_that_is_another(bytes_tokenizer: Any) -> None:
    """What stands between them is not learned, so that an answer would not come to the end."""
    bytes_tokenizer.chat_template = HEAD + "{{ m.content }}<|end|>\n{% endfor %}" + ASKS
    (row,) = encode_conversations(SPEC, [{"messages": SHARED}], bytes_tokenizer)
    assert bytes_tokenizer.decode(row.ids).endswith("<|assistant|>\nyes<|end|></s>")
    assert _learned(SPEC, bytes_tokenizer, SHARED) == [["yes<|end|>", "</s>"]]


def test_a_template_may_end_the_whole_by_the_end_token(bytes_tokenizer: Any) -> None:
    """As that of Phi-3, which has it in place of what asks for an answer."""
    asks = "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
    bytes_tokenizer.chat_template = HEAD + "{{ m.content }}<|end|>\n{% endfor %}" + asks
    assert _learned(SPEC, bytes_tokenizer, KOREAN) == [["네, 끝<|end|>", "그럼<|end|>\n</s>"]]


def test_a_prompt_is_what_precedes_the_last_answer_and_training_begins_with_it(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = TEMPLATES["marks"]
    row = {"messages": [{"role": "system", "content": "own"}, *KOREAN]}
    spec = replace(SPEC, system="not this")
    (prompt,), (trained,) = (
        encode_questions(spec, [row], bytes_tokenizer, None),
        encode_conversations(spec, [row], bytes_tokenizer),
    )
    assert trained.ids[: len(prompt.ids)] == prompt.ids and trained.learned[-1][0] == len(prompt.ids)
    assert bytes_tokenizer.decode(prompt.ids).startswith("<|system|>\nown</s>")
    assert (target_of(spec, row, "messages"), input_of(spec, row)) == ("그럼", "또?")
    (asked,) = encode_questions(spec, [{"messages": SHARED}], bytes_tokenizer, None)
    assert bytes_tokenizer.decode(asked.ids).endswith("more</s>\n<|assistant|>\n")


def test_a_prompt_that_ends_with_a_blank_is_that_of_training(bytes_tokenizer: Any) -> None:
    """A tokenizer with words joins the blank with the first word of an answer, where both are one text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *(sign for sign in "abcdefghijklmnopqrstuvwxyz:ĊĠ"), "Ġy", "Ġn"]
    merges = [("Ġ", "y"), ("Ġ", "n")]
    inner = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "hyin", strict=True)]
    (trained,) = encode_conversations(SPEC, [{"messages": turns}], tokenizer)
    (asked,) = encode_questions(SPEC, [{"messages": turns}], tokenizer, None)
    assert trained.ids[: len(asked.ids)] == asked.ids and trained.learned[1][0] == len(asked.ids)


def test_rows_whose_answers_are_gone_are_not_trained_on(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = TEMPLATES["marks"]
    spec = replace(SPEC, max_tokens=20, long_rows="cut_right")
    rows = [{"messages": one} for one in (KOREAN[:1], [{"role": "user", "content": "long " * 9}, *KOREAN[1:]], SHARED)]
    found = encode_conversations(replace(spec, max_tokens=40), rows, bytes_tokenizer)
    assert [is_kept(spec, row) for row in found] == [False, False, True]


def test_few_shot_turns_come_before_a_row_in_a_chat(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = TEMPLATES["marks"]
    spec = Data(prompt="chat", system="s", examples=({"input": "q", "target": "a"},))
    text = "<|system|>\ns</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nhi</s>\n<|assistant|>\n"
    assert render_prompt(spec, {"input": "hi"}, bytes_tokenizer) == text


def test_alpaca_has_a_form_for_rows_with_a_context() -> None:
    spec = Data(prompt="alpaca")
    bare, paired = (render_prompt(spec, {"input": "가", "context": text}, None) for text in ("", "나"))
    assert bare.endswith("the request.\n\n### Instruction:\n가\n\n### Response:\n") and "paired" not in bare
    assert paired.endswith("### Instruction:\n가\n\n### Input:\n나\n\n### Response:\n") and "paired" in paired


WRONG: dict[str, tuple[Any, str]] = {
    "no list": ("hi", "has no conversation but 'hi'; a list of turns {role, content} is expected"),
    "empty": ([], "has no conversation but '[]'"),
    "a text": (["hi"], "has a turn 1 that is no {role, content} but 'hi'"),
    "a role": ([{"role": "bot", "content": "a"}], "has role 'bot' in turn 1; known: system, user, human, assistant"),
    "a tool": ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "has a tool call in turn 1"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}], "has an image or other data in turn 1"),
    "a share": (
        [{"role": "assistant", "content": "a", "weight": 0.5}],
        "has weight 0.5 in turn 1; what a turn says is",
    ),
    "nothing": ([{"role": "user"}], "has None and no text in turn 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_conversation_is_named(name: str, bytes_tokenizer: Any) -> None:
    value, problem = WRONG[name]
    bytes_tokenizer.chat_template = TEMPLATES["marks"]
    with pytest.raises(RowFault) as caught:
        encode_conversations(SPEC, [{"messages": KOREAN}, {"messages": value}], bytes_tokenizer)
    assert caught.value.number == 2 and caught.value.problem.startswith(problem)


def test_an_answer_that_nothing_precedes_is_named(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = NO_ENDS
    with pytest.raises(RowFault, match="row 1 begins with what the assistant says, and nothing that it answers; put a"):
        encode_conversations(SPEC, [{"messages": [{"role": "assistant", "content": "a"}, *KOREAN]}], bytes_tokenizer)


def test_a_conversation_may_be_text_in_json_with_texts_in_parts() -> None:
    assert turns_of('[{"role": "user", "content": [{"type": "text", "text": "가"}]}]') == [
        {"role": "user", "content": "가"}
    ]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            NO_ENDS.replace("m.content", "m.content if loop.last else m.content | upper"),
            "cannot be learned turn by turn",
        ),
        (
            TEMPLATES["an end token a turn"].replace("|>\n{{", "|> {{"),
            "would be learned after 'b</s>\\n<|assistant|> ' and asked after 'b</s>\\n<|assistant|>\\n'",
        ),
        ("{{ raise_exception('no system, please') }}", "is refused by the chat template of the tokenizer (no system"),
    ],
)
def test_a_template_that_does_not_fit_is_named(bytes_tokenizer: Any, template: str, problem: str) -> None:
    bytes_tokenizer.chat_template = template
    turns = [{**turn, "content": "a b"} for turn in KOREAN]
    with pytest.raises(RowFault, match="row 1 ") as caught:
        encode_conversations(SPEC, [{"messages": turns}], bytes_tokenizer)
    assert caught.value.problem.startswith(problem)


def test_conversations_without_an_answer_to_compare_with_are_refused_where_they_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "방"}, {"role": "assistant", "content": "좋다"}]
    for name, row in (("a", turns), ("b", [*turns, turns[0]])):
        Path(f"{name}.jsonl").write_text((json.dumps({"messages": row}, ensure_ascii=False) + "\n") * 4)
    Path("r.yaml").write_text(
        "model: {path: 'library:tiny-hangul-chat', from_scratch: true}\n"
        "data: {splits: {train: a.jsonl, validation: a.jsonl, test: b.jsonl}, prompt: messages, max_tokens: 64}\n"
        "train: {global_batch: 2, precision: float32}\npredict: {max_new_tokens: 4}\n"
        "resources: {default: {device: cpu}}\n"
    )
    assert main(["plan", "r.yaml", "--launcher", "local"]) == 2
    assert "4 of 4 conversations (row 1, 2, 3, 4) come without an answer at their end" in capsys.readouterr().err
    stages = "stages={train: {}, consolidate: {}, predict: {}, merge: {}}"
    assert main(["plan", "r.yaml", stages, "--launcher", "local"]) == 0
    measured = ["checkpoints.metric=cer", "data.splits.validation=b.jsonl", "train.metric_rows=2"]
    assert main(["plan", "r.yaml", stages, *measured, "--launcher", "local"]) == 2
    said = (
        "2 of 2 conversations (row 1, 2) come without an answer at their end, and nothing to compare a prediction with"
    )
    assert (
        f"{said}; end them with what the assistant says, or set checkpoints.metric=eval_loss" in capsys.readouterr().err
    )
