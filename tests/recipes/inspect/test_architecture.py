"""What planning learns by building a model without memory: what trains, and what no job could finish.

The model is built in this process, for the sake of its imports.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MT5Config, MT5ForConditionalGeneration

from sousbatch.errors import UsageError
from sousbatch.recipes.compose import compose
from sousbatch.recipes.forecast.parameters import deciding_settings
from sousbatch.recipes.inspect import model as model_facts
from sousbatch.recipes.inspect.architecture import answer
from sousbatch.recipes.inspect.model import ModelPlaces, read_model
from sousbatch.recipes.schema import Adapter, Model, StageSettings, Train

# peft calls transformers by names that are deprecated there
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning"),  # it looks at modules only
]
LLAMA = ("llama", {"num_key_value_heads": 2})
MIXTRAL = ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 3})
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA4 = ("llama4_text", {"num_key_value_heads": 2, "num_local_experts": 2, "head_dim": 8})
BART = (
    "bart",
    {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2},
)
LAYER = 4 * 16 * 16 + 3 * 16 * 24


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 64 words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *map(str, range(61))])}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | empty))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"})
    )
    return folder


def ask(kind: tuple[str, dict[str, Any]], tokenizer_folder: Path, tmp_path: Path, **asked: Any) -> dict[str, Any]:
    """Return the answer for one training of a small model."""
    sizes = {name: value for name, value in {**SIZES, **kind[1]}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind[0], **sizes}))
    settings = asked.pop("settings", StageSettings())
    question: dict[str, Any] = {
        "folder": str(tmp_path),
        "tokenizer_folder": str(tokenizer_folder),
        "task": "causal_lm",
        "changes": {},
        "trusts": False,
        "attentions": [],
        "tables": {},
        "add_tokens": settings.model.add_tokens,
        "stored": {},
        "trainings": {"one": deciding_settings(settings)},
    }
    return answer(question | asked)


def lora(dropout: float = 0.0, **values: Any) -> StageSettings:
    return StageSettings(adapter=Adapter(method="lora", rank=2, dropout=dropout, **values))


def test_all_of_a_model_trains_unless_it_is_frozen(tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = StageSettings(model=Model(freeze=("layers:0-0", "model.embed_tokens.*")))
    found = ask(LLAMA, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]
    frozen = LAYER + 2 * 16 + 64 * 16
    assert found["frozen"] == frozen
    assert found["trainable"] == LAYER + 3 * 16 + 64 * 16


def test_an_adapter_trains_its_factors_and_what_is_saved_beside_them(tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = lora(target_modules=("q_proj",), modules_to_save=("lm_head",))
    found = ask(LLAMA, tokenizer_folder, tmp_path, settings=settings)
    trained = found["trained"]["one"]
    factors, head = 2 * 2 * (16 + 16), 64 * 16
    assert (trained["trainable"], trained["num_tensors"]) == (factors + head, 5)
    assert trained["quantisable"] == 2 * LAYER
    assert trained["frozen"] == sum(
        len(shape) == 1 and shape[0] or shape[0] * shape[1] for _, shape in found["tensors"]
    )


def test_ids_beyond_the_rows_of_the_model_are_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    gapped = tmp_path / "gapped"
    shutil.copytree(tokenizer_folder, gapped)
    text = (gapped / "tokenizer.json").read_text()
    (gapped / "tokenizer.json").write_text(text.replace('"60": 63', '"60": 99'))
    with pytest.raises(UsageError, match=r"ids up to 99 for 64 tokens, and the model has rows for 64 ids"):
        ask(LLAMA, gapped, tmp_path)
    assert ask(LLAMA, gapped, tmp_path, changes={"vocab_size": 100})["trained"]["one"]


def test_added_tokens_lengthen_the_embeddings_and_their_rows_train(tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = StageSettings(
        model=Model(add_tokens=("[A]", "[B]")), adapter=Adapter(method="lora", rank=2, target_modules=("q_proj",))
    )
    found = ask(LLAMA, tokenizer_folder, tmp_path, settings=settings)
    assert ["model.embed_tokens.weight", [66, 16]] in [list(one) for one in found["tensors"]]
    assert found["trained"]["one"]["trainable"] == 2 * 2 * (16 + 16) + 2 * 2 * 16


PROBLEMS: dict[str, tuple[tuple[str, dict[str, Any]], StageSettings, str]] = {
    "a layer that is not there": (
        LLAMA,
        lora(target_modules=("q_proj", "query")),
        "no layer is called 'query'; known: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    ),
    "no layer at all": (LLAMA, lora(target_modules=("query", "key")), "no layer is called 'query'; known: down_proj"),
    "a module that is not there": (
        LLAMA,
        lora(modules_to_save=("lm_haed",)),
        "adapter.modules_to_save: LlamaForCausalLM has no module 'lm_haed' (did you mean 'lm_head'?)",
    ),
    "a pattern without a parameter": (
        LLAMA,
        StageSettings(model=Model(freeze=("layers:0-0", "layers:4-9"))),
        "model.freeze: 'layers:4-9' names layer 9, and the model's layers are 0 to 1",
    ),
    "nothing left": (LLAMA, StageSettings(model=Model(freeze=("*",))), "leaves nothing to train"),
    "a block that several layers are": (
        (
            "zamba2",
            {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1}
            | {"num_attention_heads": 2, "num_key_value_heads": 2, "mamba_headdim": 4, "n_mamba_heads": 8},
        ),
        lora(target_modules=("all-linear",)),
        "would be merged; leave out down_proj, gate_up_proj, gate_up_proj_adapter_list, k_proj, o_proj, q_proj,",
    ),
    "experts with dropout": (
        MIXTRAL,
        lora(dropout=0.1),
        "set adapter.dropout=0, or name the layers of the attention: "
        "adapter.target_modules=[k_proj,o_proj,q_proj,v_proj]",
    ),
    "experts with dora": (
        MIXTRAL,
        lora(dora=True),
        "adapter.dora cannot be used on the experts of MixtralForCausalLM, which are held in one tensor a layer; set "
        "adapter.dora=false, or name the layers of the attention: adapter.target_modules=[k_proj,o_proj,q_proj,v_proj]",
    ),
    "experts in full": (
        MIXTRAL,
        lora(modules_to_save=("experts",)),
        "adapter.modules_to_save ['experts'] has the experts of MixtralForCausalLM, which peft adapts and cannot",
    ),
    "layers that Mamba reads past": (
        ("mamba", {"state_size": 4}),
        lora(target_modules=("all-linear",)),
        "name others: adapter.target_modules=[in_proj]",
    ),
    "a linear layer that Mamba reads past": (
        ("mamba", {"state_size": 4}),
        lora(target_modules=("in_proj", "dt_proj")),
        "adapter.target_modules: MambaForCausalLM does not call backbone.layers.1.mixer.dt_proj, but reads its weight",
    ),
    "a router": (
        LLAMA4,
        lora(target_modules=("q_proj", "router")),
        "adapter.target_modules: model.layers.0.feed_forward.router is a Llama4Router, which computes more than a "
        "product, so that peft cannot adapt it; leave it out, or train it in full: adapter.modules_to_save=[router]",
    ),
    "tokens and a tied head with a bias": (
        ("ctrl", {"n_embd": 16, "n_head": 2, "n_layer": 1, "dff": 16}),
        replace(lora(), model=Model(add_tokens=("[A]",))),
        "the output layer of CTRLLMHeadModel has one weight with the embeddings and a bias of its own",
    ),
    "a part of a tensor": (
        MIXTRAL,
        StageSettings(model=Model(freeze=("*.experts.0.w2.*",))),
        "'model.layers.0.block_sparse_moe.experts.0.w2.weight' is frozen and "
        "'model.layers.0.block_sparse_moe.experts.1.w2.weight' is not",
    ),
}


def test_an_adapter_on_embeddings_that_do_not_look_up_what_they_are_given_is_refused(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    asked = {"task": "seq2seq", "settings": replace(lora(target_modules=("embed_positions",)), task="seq2seq")}
    problem = ask(BART, tokenizer_folder, tmp_path, **asked)["trained"]["one"]["problem"]
    assert problem.startswith(
        "adapter.target_modules: model.encoder.embed_positions is a BartLearnedPositionalEmbedding"
    )
    assert problem.endswith("adapter.modules_to_save=[embed_positions]")


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2"])
def test_an_adapter_on_embeddings_that_the_model_reads_past_their_layer_is_refused(
    kind: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    deberta = (kind, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"})

    def asked(*targets: str) -> Any:
        settings = replace(lora(target_modules=targets), task="classification")
        return ask(deberta, tokenizer_folder, tmp_path, task="classification", settings=settings)["trained"]["one"]

    name = {"deberta": "Deberta", "deberta-v2": "DebertaV2"}[kind]
    assert asked("word_embeddings", "rel_embeddings")["problem"] == (
        f"adapter.target_modules: {name}ForSequenceClassification does not call deberta.encoder.rel_embeddings, but "
        "reads its weight or nothing of it, so that an adapter of it would not train; leave it out, or train it in "
        "full by adapter.modules_to_save=[rel_embeddings]"
    )
    assert asked("word_embeddings")["trainable"] > 0


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|ensure_weight_tying|fan_in_fan_out):UserWarning")
@pytest.mark.parametrize(("kind", "words"), [("gpt2", "wte"), ("bloom", "word_embeddings"), ("llama", "embed_tokens")])
def test_embeddings_and_a_head_of_one_weight_train_as_one_by_the_name_that_is_advised(
    kind: str, words: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    tied = (kind, {"tie_word_embeddings": True, "num_key_value_heads": 2, "n_embd": 16, "n_head": 2, "n_layer": 1})

    def asked(**values: Any) -> Any:
        given = {"target_modules": ("all-linear",)} | values
        return ask(tied, tokenizer_folder, tmp_path, settings=lora(**given))["trained"]["one"]

    for target in (words, "lm_head"):
        said = asked(target_modules=(target,))["problem"]
        assert "has one weight with" in said and said.endswith("train it in full: adapter.modules_to_save=[lm_head]")
    if kind != "llama":
        said = asked(modules_to_save=(words,))["problem"]
        assert said.endswith("would train it apart from them; name lm_head instead, which stands for both")
    assert asked(modules_to_save=("lm_head",))["trainable"] == asked()["trainable"] + 64 * 16


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|ensure_weight_tying):UserWarning")
@pytest.mark.parametrize("name", ["embed_tokens", "shared", "lm_head"])
def test_embeddings_of_one_weight_do_not_train_apart(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = ("t5", {**sizes, "decoder_start_token_id": 0})
    given = {"task": "seq2seq", "settings": replace(lora(modules_to_save=(name,)), task="seq2seq")}
    problem = ask(t5, tokenizer_folder, tmp_path, **given)["trained"]["one"]["problem"]
    named = "shared" if name == "shared" else "encoder.embed_tokens"
    assert problem.startswith(f"adapter.modules_to_save: {named} has one weight with ")
    tied = (LLAMA[0], LLAMA[1] | {"tie_word_embeddings": True})  # whose one weight trains as one
    settings = lora(target_modules=("q_proj",), modules_to_save=(name if name == "lm_head" else "embed_tokens",))
    assert ask(tied, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]["num_tensors"] in (5, 6)


@pytest.mark.filterwarnings("ignore")
def test_a_new_head_trains_as_a_whole_once(tokenizer_folder: Path) -> None:
    """peft would train the last layer of a BigBird's head again, in its copy of the head."""
    from transformers import AutoTokenizer, BigBirdConfig, BigBirdForQuestionAnswering

    from sousbatch.recipes.building import prepare_model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BigBirdForQuestionAnswering(BigBirdConfig(vocab_size=400, attention_type="original_full", **sizes))
    settings = replace(lora(target_modules=("query",)), task="question_answering")
    ready = prepare_model(settings, model, AutoTokenizer.from_pretrained(tokenizer_folder))
    trained = [name for name, weight in ready.named_parameters() if weight.requires_grad and "qa_outputs" in name]
    assert trained == [
        f"base_model.model.qa_classifier.modules_to_save.default.qa_outputs.{one}" for one in ("weight", "bias")
    ]


@pytest.mark.parametrize("targets", [("classifier",), ("query", "classifier"), ("pooler.dense",)], ids=str)
def test_a_target_in_a_new_head_is_told_that_it_trains_in_full(
    targets: tuple[str, ...], tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = {"task": "classification", "settings": replace(lora(target_modules=targets), task="classification")}
    problem = ask(("bert", {}), tokenizer_folder, tmp_path, **given)["trained"]["one"]["problem"]
    assert problem.startswith(f"adapter.target_modules: {targets[-1]!r} is of the new head (classifier, bert.pooler), ")


def test_a_model_of_convolutions_is_told_which_of_them_can_be_adapted(tokenizer_folder: Path, tmp_path: Path) -> None:
    squeezebert = ("squeezebert", {"embedding_size": 16})

    def asked(*targets: str) -> Any:
        settings = replace(lora(target_modules=targets), task="classification")
        return ask(squeezebert, tokenizer_folder, tmp_path, task="classification", settings=settings)["trained"]["one"]

    assert asked("all-linear")["problem"] == (
        "adapter.target_modules: all-linear finds no linear layer in SqueezeBertForSequenceClassification beside a "
        "new head; name layers of another kind, or train it in full: adapter=full"
    )
    assert asked("query")["problem"].startswith(
        "adapter.target_modules: transformer.encoder.layers.0.attention.query is a convolution in 4 groups, "
    )
    assert asked("post_attention.conv1d")["trainable"] > 0


def test_layers_within_one_that_trains_in_full_train_with_it_and_no_others(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    given = {"task": "classification", "settings": replace(lora(modules_to_save=("dense",)), task="classification")}
    found = ask(("bert", {}), tokenizer_folder, tmp_path, **given)["trained"]["one"]
    dense = 2 * (16 * 16 + 16 + 16 * 24 + 24 + 24 * 16 + 16)
    head = 16 * 16 + 16 + 2 * 16 + 2
    factors = 2 * 3 * 2 * (16 + 16)  # all-linear: query, key and value are left
    assert found["trainable"] == dense + head + factors
    llama = ask(LLAMA, tokenizer_folder, tmp_path, settings=lora(target_modules=("q_proj",), modules_to_save=("norm",)))
    assert llama["trained"]["one"]["trainable"] == 2 * 2 * (16 + 16) + 16  # not those of the layers


@pytest.mark.parametrize(("kind", "settings", "problem"), PROBLEMS.values(), ids=PROBLEMS)
def test_what_could_not_train_is_named(
    kind: Any, settings: StageSettings, problem: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    assert problem in ask(kind, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]["problem"]


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.block_sparse_moe.experts.*", "*.w[123].weight"])
def test_experts_are_frozen_by_their_names_in_memory_and_in_files(
    pattern: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    patterns = (pattern,) if "w[" not in pattern else tuple(pattern.replace("[123]", str(one)) for one in (1, 2, 3))
    settings = StageSettings(model=Model(freeze=patterns))
    assert (
        ask(MIXTRAL, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]["frozen"] == 2 * 3 * 3 * 16 * 24
    )


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "w1", "w2", "w3")])
def test_experts_get_adapters_by_the_names_of_their_files(
    targets: tuple[str, ...], tokenizer_folder: Path, tmp_path: Path
) -> None:
    found = ask(MIXTRAL, tokenizer_folder, tmp_path, settings=lora(target_modules=targets))["trained"]["one"]
    experts = 3 * (4 * (16 + 48) + 2 * (24 + 16))  # gate and up are one tensor, with the rank of both
    assert found["trainable"] >= 2 * experts


def test_all_linear_leaves_out_routers_that_compute_more_than_a_product(tokenizer_folder: Path, tmp_path: Path) -> None:
    def trainable(*targets: str) -> int:
        found = ask(LLAMA4, tokenizer_folder, tmp_path, settings=lora(target_modules=targets))["trained"]["one"]
        return int(found["trainable"])

    named = ("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.gate_proj", "shared_expert.up_proj")
    assert trainable("all-linear") == trainable(*named, "shared_expert.down_proj")


def test_several_trainings_are_looked_at_and_each_has_its_own_answer(tokenizer_folder: Path, tmp_path: Path) -> None:
    trainings = {"bad": deciding_settings(lora(target_modules=("nope",))), "good": deciding_settings(lora())}
    found = ask(LLAMA, tokenizer_folder, tmp_path, trainings=trainings)["trained"]
    assert "nope" in found["bad"]["problem"] and found["good"]["trainable"] > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hiden_size": 4}, "has 'hiden_size', which LlamaConfig does not (did you mean 'hidden_size'?)"),
        ({"colour": 4}, "model.config has 'colour', which LlamaConfig does not (it has "),
    ],
)
def test_a_key_that_the_models_configuration_does_not_have_is_named(
    changes: dict[str, int], reason: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        ask(LLAMA, tokenizer_folder, tmp_path, changes=changes)
    assert reason in str(caught.value)


SPEECH = {"d_model": 16, "num_mel_bins": 4, "decoder_layers": 1, "encoder_layers": 1} | dict.fromkeys(
    ("encoder_attention_heads", "decoder_attention_heads", "pad_token_id", "bos_token_id", "eos_token_id"), 2
)
WRONG = {
    "no text": (
        ("vit", {}),
        "causal_lm",
        "is a vit, which has no ModelForCausalLM in transformers; take another model",
    ),
    "another task": (
        LLAMA,
        "seq2seq",
        "is a llama, which has no ModelForSeq2SeqLM in transformers; set task=causal_lm or task=classification or "
        "task=question_answering",
    ),
    "one length": (
        ("nystromformer", {"num_landmarks": 16, "segment_means_seq_len": 32}),
        "classification",
        "set model.config.num_landmarks=32",
    ),
    "no separators": (
        ("longformer", {"attention_window": [8, 8], "sep_token_id": 2}),
        "question_answering",
        "its tokenizer puts 0 separators (id 2) into a question with its passage",
    ),
    "blocks ahead": (("big_bird", {"is_decoder": True}), "causal_lm", "set model.config.attention_type=original_full"),
    "no language": (
        ("xmod", {"languages": ["en_XX", "ko_KR"]}),
        "classification",
        "set model.config.default_language to one of en_XX, ko_KR",
    ),
    "scores that later tokens change": (
        ("prophetnet", {"num_hidden_layers": None}),
        "seq2seq",
        "is a ProphetNet, whose scores of a token depend on how many follow it",
    ),
    "rows of one length": (
        ("reformer", {"num_hidden_layers": None, "is_decoder": False, "hidden_size": 256}),
        "classification",
        "is a reformer that trains on rows of 4,096 tokens alone",
    ),
    "positions of padding": (
        ("trocr", {"num_hidden_layers": None, "is_encoder_decoder": False}),
        "causal_lm",
        "is a decoder for the text of images or speech, which counts padding among its positions",
    ),
    "images before text": (("git", {}), "causal_lm", "is a GIT, whose loss leaves out places of an image"),
    "images and text": (("qwen2_vl", {}), "classification", "take another model"),
    "speech": (
        ("whisper", SPEECH),
        "causal_lm",
        "is an encoder-decoder (whisper), and task causal_lm takes a decoder; take another model",
    ),
}


@pytest.mark.parametrize(("kind", "task", "problem"), WRONG.values(), ids=WRONG)
def test_a_model_that_the_class_of_the_task_does_not_know_is_refused(
    kind: Any, task: str, problem: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        ask(kind, tokenizer_folder, tmp_path, task=task)
    assert problem in str(caught.value)


def _stored(found: dict[str, Any], **others: list[int] | None) -> dict[str, Any]:
    """Return the files' tensors: those in memory, with other shapes or left out."""
    shapes = {name: shape for name, shape in found["tensors"]} | {
        name.replace("__", "."): shape for name, shape in others.items()
    }
    return {name: (shape, "float32") for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"model__norm__weight": None}, "the model lacks 1 of 21 weights of LlamaForCausalLM, which would be random: "),
        ({"lm_head__weight": None}, "the model lacks 1 of 21 weights of LlamaForCausalLM, which would be random: "),
        ({"model__norm__weight": [9]}, "would be random: model.norm.weight is [9] and not [16]; the files are incomp"),
    ],
)
def test_weights_that_would_be_random_are_named(
    other: dict[str, Any], problem: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    stored = _stored(ask(LLAMA, tokenizer_folder, tmp_path, trainings={}), **other)
    with pytest.raises(UsageError) as caught:
        ask(LLAMA, tokenizer_folder, tmp_path, stored=stored)
    assert problem in str(caught.value)


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_head_may_be_new_or_tied(task: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    tied = ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0})
    stored = _stored(ask(tied, tokenizer_folder, tmp_path, trainings={}))
    found = ask(tied, tokenizer_folder, tmp_path, stored=stored, settings=StageSettings(task=task), task=task)
    assert found["trained"]["one"]["trainable"] > 0


def test_gradient_checkpointing_is_tried(tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = StageSettings(train=Train(gradient_checkpointing=True))
    assert "trainable" in ask(LLAMA, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (LLAMA, lora(modules_to_save=("lm_head",)), False),
        (MIXTRAL, lora(target_modules=("q_proj",)), False),
        (MIXTRAL, lora(), True),
    ],
)
def test_it_is_known_before_the_training_who_will_merge_the_adapter(
    kind: Any, settings: StageSettings, expected: bool, tokenizer_folder: Path, tmp_path: Path
) -> None:
    plain = ask(kind, tokenizer_folder, tmp_path, trainings={})
    stored = {name: (shape, "float32") for name, shape in plain["tensors"]}
    found = ask(kind, tokenizer_folder, tmp_path, settings=settings, stored=stored)["trained"]["one"]
    assert found["merges_in_memory"] is expected


def test_peft_merges_where_new_tokens_lack_their_bias(tokenizer_folder: Path, tmp_path: Path) -> None:
    """BART's files hold a buffer with a number for each token."""
    kind = (BART[0], {**BART[1], "pad_token_id": 1, "decoder_start_token_id": 2})
    plain = ask(kind, tokenizer_folder, tmp_path, task="seq2seq", trainings={})
    stored = {name: (shape, "float32") for name, shape in plain["tensors"]} | {
        "final_logits_bias": ([1, 64], "float32")
    }
    for tokens, expected in ((), False), (("[A]",), True):
        settings = replace(lora(target_modules=("q_proj",)), task="seq2seq", model=Model(add_tokens=tokens))
        asked = {"task": "seq2seq", "settings": settings, "stored": stored}
        found = ask(kind, tokenizer_folder, tmp_path, **asked)["trained"]["one"]
        assert found["merges_in_memory"] is expected


def test_a_model_that_cannot_compute_its_activations_again_is_known(tokenizer_folder: Path, tmp_path: Path) -> None:
    asked = {"task": "question_answering", "settings": StageSettings(task="question_answering")}
    for kind, expected in ((("albert", {"embedding_size": 8}), False), (("bert", {}), True)):
        assert ask(kind, tokenizer_folder, tmp_path, **asked)["trained"]["one"]["recomputes"] is expected


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_layer_that_trains_in_full_stays_tied(saved: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    settings = lora(target_modules=("q_proj",), modules_to_save=(saved,))
    tied = ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True})
    plain = ask(tied, tokenizer_folder, tmp_path, trainings={})
    stored = {name: (shape, "float32") for name, shape in plain["tensors"]}
    found = ask(tied, tokenizer_folder, tmp_path, settings=settings, stored=stored)["trained"]["one"]
    assert found["trainable"] == 2 * 2 * (16 + 16) + 64 * 16 and not found["merges_in_memory"]


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_new_tokens_of_a_tied_layer_that_trains_in_full_need_no_rows(
    saved: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = StageSettings(
        model=Model(add_tokens=("[A]", "[B]")),
        adapter=Adapter(method="lora", rank=2, target_modules=("q_proj",), modules_to_save=(saved,)),
    )
    tied = ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True})
    found = ask(tied, tokenizer_folder, tmp_path, settings=settings)["trained"]["one"]
    assert found["trainable"] == 2 * 2 * (16 + 16) + 66 * 16


def test_a_kernel_of_attention_that_the_model_cannot_use_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    xlnet = ("xlnet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16})
    asked = {"task": "classification", "settings": StageSettings(task="classification")}
    ask(xlnet, tokenizer_folder, tmp_path, attentions=["eager"], **asked)
    said = "model.attention is sdpa, which XLNetForSequenceClassification cannot use; set model.attention=eager$"
    with pytest.raises(UsageError, match=said):
        ask(xlnet, tokenizer_folder, tmp_path, attentions=["eager", "sdpa"], **asked)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"target_modules": ("q", "shared")},
            "adapter.target_modules: shared has one weight with encoder.embed_tokens",
        ),
        ({"target_modules": ("embed_tokens",)}, "embed_tokens has one weight with shared, "),
        ({"modules_to_save": ("lm_head",)}, "has one weight with a layer of another kind (Embedding and Linear)"),
    ],
)
def test_embeddings_that_an_encoder_and_a_decoder_share_are_not_adapted_apart(
    values: dict[str, Any], problem: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = ("t5", {**sizes, "decoder_start_token_id": 0})
    adapter = Adapter(method="lora", rank=2, **({"target_modules": ("q",)} | values))
    settings = StageSettings(task="seq2seq", adapter=adapter)
    found = ask(t5, tokenizer_folder, tmp_path, settings=settings, task="seq2seq")
    assert problem in found["trained"]["one"]["problem"]


@pytest.mark.parametrize(("last", "untied"), [(1.0, []), (2.0, ["lm_head.weight"])])
def test_a_head_whose_values_are_its_own_counts_and_needs_a_loader_that_keeps_it(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: float, untied: list[str]
) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    config = {"model_type": "mt5", "vocab_size": 64, "decoder_start_token_id": 0, "pad_token_id": 0, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = MT5ForConditionalGeneration(MT5Config(**config))
    values = {name: torch.ones_like(value) for name, value in model.state_dict().items() if "embed_tokens" not in name}
    values["lm_head.weight"] = torch.full((64, 16), last)
    save_file(values, tmp_path / "model.safetensors")
    places = ModelPlaces(folder=tmp_path, tokenizer_folder=tokenizer_folder, is_cached=False)
    asked: list[Any] = []
    monkeypatch.setenv("SOUSBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_facts, "_run_architecture", lambda question: asked.append(answer(question)) or asked[-1])
    (tmp_path / "recipe.yaml").write_text(
        f"{{task: seq2seq, model: {{path: {tmp_path}}}, data: {{splits: {{train: a.csv, validation: a.csv, "
        "test: a.csv}}}"
    )
    recipe = compose(str(tmp_path / "recipe.yaml"))
    facts = read_model(recipe, places)
    assert read_model(recipe, places) == facts and len(asked) == 1, "the answer is remembered"
    (tmp_path / "look.py").write_text("another version")
    monkeypatch.setattr(model_facts, "_LOOK", (tmp_path / "look.py",))
    assert read_model(recipe, places) == facts and len(asked) == 2, "but not that of another version"
    assert asked[0]["untied"] == untied
    assert facts.num_params == sum(value.numel() for value in values.values()) - (not untied) * 64 * 16
    grown = read_model(compose(str(tmp_path / "recipe.yaml"), ["model.add_tokens=['[A]']"]), places)
    assert grown.num_params == facts.num_params + 16 * (1 + len(untied))
    sharded = compose(str(tmp_path / "recipe.yaml"), ["train.zero.stage=3"])
    if untied:
        with pytest.raises(UsageError, match=r"train.zero.stage=3 \(stage train\): lm_head.weight .* differs"):
            read_model(sharded, places)
    else:
        read_model(sharded, places)


def test_a_decoder_without_a_token_to_begin_with_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    asked = {"task": "seq2seq", "settings": StageSettings(task="seq2seq")}
    found = ask(("t5", sizes), tokenizer_folder, tmp_path, **asked)
    assert "give its config.json a decoder_start_token_id" in found["trained"]["one"]["problem"]
    found = ask(("t5", {**sizes, "decoder_start_token_id": 0}), tokenizer_folder, tmp_path, **asked)
    assert "problem" not in found["trained"]["one"]


def test_a_model_without_rows_for_tokens_is_named_and_one_that_does_not_count_them_is_taken(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    asked = {"task": "classification", "settings": StageSettings(task="classification")}
    with pytest.raises(UsageError, match="CanineForSequenceClassification has no embeddings with a row for each token"):
        ask(("canine", sizes), tokenizer_folder, tmp_path, **asked)
    found = ask(("ibert", {**sizes, "pad_token_id": 0}), tokenizer_folder, tmp_path, **asked)
    assert "problem" not in found["trained"]["one"]


@pytest.mark.parametrize(
    ("kind", "name", "own"),
    [
        ("marian", "MarianMTModel", {}),
        ("fsmt", "FSMTForConditionalGeneration", {"src_vocab_size": 64, "tgt_vocab_size": 64}),
    ],
)
def test_a_class_that_cannot_be_given_tokens_is_named(
    tokenizer_folder: Path, tmp_path: Path, kind: str, name: str, own: dict[str, Any]
) -> None:
    """Marian resizes in a way of its own, and FSMT not all that has a row for each token."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
    settings = StageSettings(task="seq2seq", model=Model(add_tokens=("[A]", "[B]")))
    with pytest.raises(UsageError, match=rf"model.add_tokens: {name} .* leave model.add_tokens out"):
        ask((kind, {**sizes, **heads, **own}), tokenizer_folder, tmp_path, task="seq2seq", settings=settings)
