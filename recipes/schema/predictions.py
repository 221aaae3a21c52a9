"""The sections on predictions and on how they are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ...checkpoints.formats.tensors import FloatDtype
from ...predictions.export import Format
from ...predictions.metrics import METRICS
from ...predictions.metrics.tokenizers import Tokenizer
from .fields import key


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """The settings of engine vllm."""

    memory_share: float = key(
        0.9, "share of each device's memory that it takes", also=("gpu_memory_utilization",), above=0, at_most=1
    )
    max_tokens: int | None = key(
        None,
        "most tokens of a prompt with its answer; when not given, the model's positions, or as many as memory holds",
        also=("max_model_len",),
        at_least=2,
    )
    prefix_caching: bool = key(True, "compute once what several prompts begin with", also=("enable_prefix_caching",))

    def limit(self, positions: int | None) -> int | None:
        """Return how many of the model's *positions* may be used; None means all."""
        return min((most for most in (positions, self.max_tokens) if most is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Output:
    """The file of predictions that is handed in."""

    template: str | None = key(
        None, "a file with the columns, and the ids in the order of the rows, such as sample_submission.csv"
    )
    columns: dict[str, str] = key(
        dict,
        "column of the file -> field of a prediction (prediction, id, index, ...) or column of its row; when not "
        "given, the template's columns by their names, else every field",
    )
    format: Format | None = key(
        None,
        "csv (RFC 4180), csv_bom (with the mark that Excel looks for), tsv, jsonl, json ({id: prediction}) or parquet; "
        "the template's when not given, else csv",
    )


@dataclass(frozen=True, kw_only=True)
class Predict:
    """The settings of predictions, and of how tokens are chosen."""

    split: str = key("test", "split to predict")
    rows: int | None = key(None, "only the first rows of it", at_least=1)
    engine: str = key(
        "transformers",
        "what generates text: transformers, which deals out the layers over the devices of a task; vllm, where it is "
        "installed, for speed; zero3, which shards each layer; or an engine of another package",
    )
    vllm: Vllm = key(Vllm, "of engine vllm alone")
    post: tuple[str, ...] = key(
        (),
        "steps over every answer as it is merged, which keep the text before beside it: strip, first_line, "
        "special_tokens, cut_chars:N, replace:FILE (a pattern, a tab and its replacement a line), those of data.clean "
        "that change texts, or own functions, as module:function: a text, or a text and its row -> a text",
    )
    output: Output | None = key(None, "one more file of the merged predictions, such as a contest wants it")
    load_in: Literal["4bit", "8bit"] | None = key(
        None,
        "the weights of the linear layers are quantised as the model is loaded, by bitsandbytes: 4bit (NF4) or 8bit "
        "(LLM.int8, whose answers may depend on the rows beside them); for half precision see predict.dtype",
        also=("load_in_4bit", "load_in_8bit", "quantization_config", "quantization"),
    )
    offload: bool = key(
        False,
        "weights are kept in host memory, and come to the devices a layer at a time: by engine transformers those that "
        "the devices do not hold, by zero3 all",
        also=("device_map", "offload_folder"),
    )
    dtype: FloatDtype | None = key(None, "arithmetic; the model's own type on a GPU, float32 on a CPU when not given")
    unit_rows: int = key(256, "rows that are committed at once: what a kill can lose", at_least=1)
    batch_rows: int = key(
        128,
        "most rows that are computed together",
        also=("per_device_eval_batch_size", "eval_batch_size", "max_num_seqs"),
        at_least=1,
    )
    batch_tokens: int = key(
        16384,
        "most tokens that are computed together: rows x (longest prompt + longest answer) x beams; a longer row "
        "is alone",
        also=("max_num_batched_tokens",),
        at_least=1,
    )
    max_new_tokens: int = key(128, "longest answer in tokens", at_least=1)
    max_characters: int | None = key(None, "longest answer in characters; it is cut there", at_least=1)
    length_ratio: float | None = key(
        None,
        "longest answer as a share of its row's input (data.columns.input; the columns of a prompt without it; the "
        "last question of messages); never above max_new_tokens",
        above=0,
    )
    length_ratio_of: Literal["tokens", "characters"] = key("tokens", "what length_ratio counts")
    stop: tuple[str, ...] = key((), "texts before which an answer ends", also=("stop_strings", "stop_sequences"))
    stop_ids: tuple[int, ...] = key(
        (), "tokens at which an answer ends, besides the end token", also=("stop_token_ids",)
    )
    chunk_tokens: int | None = key(
        None, "generate so many tokens at a time, and continue from the prompt and the last sentences", at_least=1
    )
    chunk_sentences: int = key(2, "complete sentences from which a chunk continues", at_least=1)
    samples: int = key(
        1,
        "answers that are drawn for each row; the first one is the prediction",
        also=("num_return_sequences",),
        at_least=1,
    )
    keep_logprobs: int = key(
        0,
        "keep the log-probabilities of so many likeliest tokens, and of the chosen one",
        also=("logprobs",),
        at_least=0,
    )
    min_new_tokens: int = key(0, "shortest answer in tokens; stop texts end it all the same", at_least=0)
    sample: bool = key(False, "draw tokens, seeded by row, instead of taking the likeliest", also=("do_sample",))
    temperature: float = key(1.0, "above 1 flattens the distribution", above=0)
    top_k: int = key(0, "draw among the k likeliest; 0 for all", at_least=0)
    top_p: float = key(1.0, "draw among the likeliest that hold this probability", above=0, at_most=1)
    num_beams: int | None = key(
        None,
        "beams; 1 is greedy. When not given, an encoder-decoder has its own number, others and keep_logprobs have 1",
        at_least=1,
    )
    decodings: dict[str, dict[str, Any]] = key(
        dict,
        "several ways to decode, by name, each with other values of the keys by which the engine chooses tokens, such "
        "as {greedy: {}, beams: {num_beams: 4}}: the model is loaded once, and each has predictions and scores",
    )
    repetition_penalty: float | None = key(
        None, "above 1 makes used tokens less likely; when not given, an encoder-decoder's own, else 1", above=0
    )
    no_repeat_ngram: int | None = key(
        None,
        "n-grams of this length appear once; when not given, an encoder-decoder's own, else 0 for no limit",
        also=("no_repeat_ngram_size",),
        at_least=0,
    )

    @property
    def is_chunked(self) -> bool:
        """Whether a long answer is generated in several chunks."""
        return self.chunk_tokens is not None and 2 * self.chunk_tokens < self.max_new_tokens

    @property
    def held_tokens(self) -> int:
        """The most tokens of an answer that the model holds at once.

        They are all, or a chunk with the sentences that it continues, which are no more than a chunk.
        """
        return 2 * (self.chunk_tokens or 0) if self.is_chunked else self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering:
    """The windows into which long passages are cut.

    It also says how the answer's span is chosen among them.
    """

    stride_tokens: int = key(128, "tokens that neighbouring windows share", also=("doc_stride",), at_least=0)
    max_question_tokens: int = key(64, "longest question", also=("max_query_length",), at_least=1)
    max_answer_tokens: int = key(30, "longest answer", also=("max_answer_length",), at_least=1)
    n_best: int = key(20, "best spans that a prediction keeps", also=("n_best_size",), at_least=1)
    null_threshold: float | None = key(
        None,
        "a question stays without answer where the score of no answer is above the best span's by more than this; "
        "always answered when not given",
        also=("null_score_diff_threshold", "version_2_with_negative"),
    )


@dataclass(frozen=True, kw_only=True)
class Score:
    """The metrics of predictions against the target column."""

    metrics: tuple[str, ...] = key((), "what is measured; the usual metrics of the task when not given", names=METRICS)
    tokenizer: Tokenizer = key(
        "words", "units of ROUGE and BLEU; all keep Hangul, unlike the usual tokenizer; morphemes need kiwipiepy"
    )
