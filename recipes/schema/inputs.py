"""The sections on the input: the model, what of it trains, and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .fields import key


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model to start from, and its tokenizer."""

    path: str = key(
        "",
        "hub id, local folder or URL, GGUF file, or library:NAME for one that this package ships or finds installed",
        also=("model_name_or_path", "pretrained_model_name_or_path", "base_model"),
    )
    add_tokens_from: str | None = key(
        None,
        "tokens to add: a file with one a line, a SentencePiece .model or .vocab, or spm:N for N that a SentencePiece "
        "model of the training text finds; those that the tokenizer has are left out",
    )
    revision: str | None = key(None, "branch, tag or commit of a hub model")
    from_scratch: bool = key(False, "take only the architecture; weights are drawn from the seed")
    config: dict[str, Any] = key(dict, "values that replace those of the model's own config")
    tokenizer: str | None = key(
        None, "where the tokenizer is; the model's own when not given", also=("tokenizer_name",)
    )
    add_tokens: tuple[str, ...] = key(
        (), "tokens to add; embeddings are resized before any adapter, and the new rows train beside it"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = key(
        None, "attention kernel; transformers chooses when not given", also=("attn_implementation",)
    )
    freeze: tuple[str, ...] = key(
        (), "parameters that do not train: shell patterns of their names, layers:0-11 or layers:0"
    )
    trust_remote_code: bool = key(False, "run Python code that comes with the model")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The part that trains: all weights, or low-rank adapters beside frozen ones."""

    method: Literal["full", "lora", "qlora"] = key(
        "full", "full, lora, or qlora (lora over 4-bit weights)", also=("peft_type", "use_lora", "load_in_4bit")
    )
    rank: int = key(16, "rank of the two factors", also=("r", "lora_r"), at_least=1)
    alpha: float = key(32.0, "scale: the product is multiplied by alpha / rank", also=("lora_alpha",), above=0)
    dropout: float = key(0.0, "dropout before the factors", also=("lora_dropout",), at_least=0, at_most=0.99)
    rslora: bool = key(False, "divide alpha by the root of rank, so that high ranks learn too", also=("use_rslora",))
    dora: bool = key(
        False, "train the length of each layer's outputs beside their direction: a slower step", also=("use_dora",)
    )
    target_modules: tuple[str, ...] = key(
        ("all-linear",),
        "layers that get an adapter: ends of their names, patterns of whole names such as '.*(q_proj|v_proj)', or "
        "all-linear",
    )
    modules_to_save: tuple[str, ...] = key(
        (),
        "layers that train in full beside the adapters: names or their last parts, so that norm is no input_layernorm",
    )


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The names of the data's columns."""

    id: str | None = key(None, "a row's own id, carried into the predictions")
    input: str = key("input", "what the model reads", also=("input_column", "prompt_column"))
    target: str = key("target", "what it should answer", also=("target_column", "output", "response_column"))
    text: str = key("text", "plain text, for continued pretraining: data.prompt is empty")
    messages: str = key(
        "messages",
        "a conversation: a list of turns {role, content} or {from, value}; data.prompt is messages",
        also=("conversations", "column_messages"),
    )
    context: str = key("context", "the passage, for question answering", also=("context_column",))
    question: str = key("question", "the question, for question answering", also=("question_column",))
    answers: str = key(
        "answers",
        "its right answers: a text, a list, or {text, answer_start} as `datasets` writes it; empty for no answer",
        also=("answer_column",),
    )
    answer_start: str = key("answer_start", "place of an answer's first character, from 0, where answers has none")


GeneratorName = Literal["hangul", "labels", "questions", "dialogues", "essays", "smalltalk"]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """Rows made by a rule that this package ships."""

    name: GeneratorName = key(
        "hangul",
        "Korean lodging reviews. hangul: obfuscated, with a split test_other_mix beside train, validation and test; "
        "labels: with a label; questions: with a question on each; dialogues: with a summary; essays: longer ones. "
        "smalltalk: Korean questions and answers of the package chatterbot-corpus",
    )
    seed: int = key(0, "seed of the rows", at_least=0)
    num_train: int = key(12800, "rows to train on", at_least=1)
    num_validation: int = key(200, "rows to validate on", at_least=1)
    num_test: int = key(400, "rows to test on", at_least=1)


@dataclass(frozen=True, kw_only=True)
class Bm25:
    """The best rows for each of some queries, by BM25 (Robertson and Zaragoza 2009)."""

    queries: tuple[str, ...] = key((), "what to look for; a row stays that is among the best of any", also=("query",))
    k: int = key(500, "most rows of each query", at_least=1)
    column: str | None = key(
        None, "where to look; data.columns.input when not given, and data.columns.text of plain text"
    )


@dataclass(frozen=True, kw_only=True)
class Select:
    """Which of the training rows are used. What is named here is done in this order."""

    function: str | None = key(None, "own function, as module:function: a row -> whether it stays")
    bm25: Bm25 | None = key(None, "the best rows for some queries")
    sample: int | None = key(None, "so many rows, drawn by the seed", at_least=1)
    seed: int = key(0, "seed of the sample", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Training rows made of training rows, which stay."""

    name: str = key(
        "",
        "hangul: the input is the target as Koreans obfuscate it; or own function, as module:function: a row, or a row "
        "and a random.Random -> a row, a list of rows, or None",
    )
    copies: int = key(1, "times that each row is given to it", at_least=1)
    seed: int = key(0, "seed of what it draws", at_least=0)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows: where they are and how they become tokens."""

    splits: dict[str, str | tuple[str, ...]] = key(
        dict,
        "split name -> files (.jsonl, .json, .csv, .tsv, .txt, .parquet; .gz, .zst): a path from the working folder "
        "on, a pattern, a URL, hf:NAME?config=C&split=S of `datasets`, or a list of these",
        also=("train_file", "dataset"),
    )
    generator: Generator | None = key(None, "make splits by rule; those of data.splits stand beside them")
    columns: Columns = key(Columns, "how the columns are called")
    prompt: str = key(
        "{input}",
        "template over the columns, or a name: alpaca, plain, chat (the tokenizer's own), messages (the column of that "
        "name, by the tokenizer's own); empty trains on plain text",
        also=("template", "prompt_template"),
    )
    system: str | None = key(None, "system message of a chat; a row's own comes before it")
    examples: tuple[dict[str, str], ...] = key(
        (), "turns before each row's own in a chat: {input, target} of each", also=("few_shot", "num_fewshot")
    )
    loss_on: Literal["response", "all"] = key("response", "which tokens count in the loss", also=("train_on_inputs",))
    max_tokens: int = key(
        512,
        "longest row in tokens, prompt and response together; of seq2seq and classification the longest prompt",
        also=("max_seq_length", "cutoff_len", "max_length"),
        at_least=8,
    )
    packing: Literal["none", "blocks", "rows"] = key(
        "none",
        "how rows share an example of max_tokens, so that there is no padding: blocks joins plain text with end tokens "
        "and cuts it; rows puts training rows side by side, each of which sees itself alone",
        also=("sample_packing", "group_texts"),
    )
    max_target_tokens: int = key(
        128,
        "longest target in tokens, for task seq2seq, which encodes it apart",
        also=("max_target_length", "generation_max_length"),
        at_least=2,
    )
    pad_input_to: int | None = key(
        None,
        "pad every prompt to this many tokens, so that a small model finds input and output at one distance",
        at_least=1,
    )
    separator: str = key("", "text between the prompt and the response, after any padding")
    clean: tuple[str, ...] = key(
        (),
        "steps over every text before it is used: "
        "unicode, control, html, urls, emails, symbols, repeats, blanks; filters of rows to train on and to measure: "
        "drop_empty, drop_duplicates, min_chars:N, max_chars:N; or own functions, as module:function",
    )
    select: Select | None = key(None, "which training rows are used, after they are cleaned")
    augment: Augment | None = key(None, "training rows made of the selected ones, beside them")
    long_rows: Literal["refuse", "drop", "cut_left", "cut_right"] = key(
        "refuse",
        "what happens to rows longer than max_tokens, max_target_tokens or pad_input_to: drop leaves them out of "
        "training, cut_left and cut_right shorten them on that side, and prompts beyond the model's context too, which "
        "are never dropped",
        was=("keep_long",),
    )
