"""Draw recipes at random: a model, rows, and values for some of the keys, as a person might choose them.

Each seed gives one request for forked_trainings.py. Some of the recipes do not work and must be refused by planning;
the others must train, resume, become a model and predict.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from small_tokenizers import KINDS as TOKENIZERS

_SPLITS = {"train": 16, "validation": 7, "test": 9}
KINDS = {
    "causal_lm": """llama gpt2 gpt_neox opt bloom falcon mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2
    stablelm mixtral qwen2_moe qwen3_moe granite mamba mamba2 codegen gptj gpt_neo mpt gpt_bigcode starcoder2 cohere
    deepseek_v3 glm4 gpt_oss smollm3 exaone4 hunyuan_v1_dense lfm2 jamba minimax nemotron recurrent_gemma""".split(),
    "seq2seq": "bart t5 mt5 umt5 mbart pegasus marian led blenderbot m2m_100 longt5 plbart switch_transformers".split(),
    "question_answering": """bert roberta electra albert distilbert deberta deberta-v2 xlm-roberta modernbert mpnet
    camembert xlnet big_bird roformer squeezebert layoutlm bart gpt2""".split(),
    "classification": """bert roberta electra albert distilbert deberta deberta-v2 xlm-roberta modernbert mpnet convbert
    xlnet fnet llama gpt2 qwen2 gemma2 opt bart t5 mixtral""".split(),
}
# What each key may be, for every task; `{}` of one is a name of the data.
_ANY: dict[str, Sequence[Any]] = {
    "seed": [1, 4294967295],
    "model.attention": ["eager", "sdpa"],
    "model.freeze": ["[layers:0]", "[layers:0-1]", "['*embed*']", "['*.bias','*norm*']"],
    "model.add_tokens": ["[new]", "[new,'77','28']"],
    "model.add_tokens_from": ["spm:5"],
    "model.from_scratch": ["true"],
    "adapter.method": ["lora"] * 5 + ["qlora"] * 2,
    "adapter.rank": [1, 3, 16],
    "adapter.alpha": [0.5, 64],
    "adapter.dropout": [0.1],
    "adapter.rslora": ["true"],
    "adapter.dora": ["true"],
    "adapter.target_modules": ["['.*']", "[q_proj,v_proj]", "['.*(query|value|q|v|c_attn|query_key_value)']"],
    "adapter.modules_to_save": ["[embed_tokens]", "[lm_head]", "[norm]", "[wte]"],
    "data.max_tokens": [8, 16, 24, 64],
    "data.long_rows": ["drop", "cut_left", "cut_right"],
    "data.clean": ["[drop_empty]", "[unicode,blanks,drop_duplicates]", "['min_chars:3']", "[symbols,repeats]"],
    "data.select.sample": [3, 7],
    "data.select.bm25.queries": ["['3 4']"],
    "data.augment": ["[{name: hangul, copies: 2}]"],
    "train.steps": [1, 3, 6],
    "train.epochs": [0.3, 1, 2.5],
    "train.global_batch": [2, 6, 8, 16],
    "train.micro_batch": [1, 2, 3, 4],
    "train.learning_rate": [1e-5, 0.003],
    "train.optimizer": ["adamw_fused", "adamw_8bit", "paged_adamw", "adafactor"],
    "train.beta2": [0.95],
    "train.beta1": [0.8],
    "train.epsilon": [1e-6],
    "train.weight_decay": [0.1],
    "train.max_grad_norm": [0, 0.1],
    "train.precision": ["float32"] * 3,
    "train.master_weights": ["false"],
    "train.gradient_checkpointing": ["true"] * 2,
    "train.eval_split": ["null", "test"],
    "train.eval_every_steps": [1],
    "train.eval_rows": [1, 4],
    "train.metric_rows": [2],
    "train.patience": [1, 2],
    "train.log_every_steps": [2, 10],
    "train.label_smoothing": [0.1],
    "train.neftune_alpha": [5],
    "train.group_by_length": ["true"],
    "train.num_workers": [1],
    "train.max_loss_rise": ["null"],
    "train.schedule.name": ["constant", "linear", "cosine_restarts", "step"],
    "train.schedule.warmup_ratio": [0.3],
    "train.schedule.warmup_steps": [1],
    "train.schedule.min_ratio": [0.1],
    "train.schedule.period_steps": [1, 2],
    "train.schedule.period_epochs": [0.5],
    "train.schedule.period_factor": [2],
    "train.schedule.decay": [0.3],
    "train.zero.stage": [1, 2, 3, 3, 3],
    "train.zero.offload": ["optimizer", "both"],
    "checkpoints.every_steps": [1, 3],
    "checkpoints.every_epochs": [0.5, 1],
    "checkpoints.keep_last": [3],
    "checkpoints.keep_best": [0, 2],
    "checkpoints.keep_every_steps": [2],
    "checkpoints.keep_steps": ["[1]", "[2,3]"],
    "checkpoints.metric": ["loss", "exact_match"],
    "checkpoints.thin": ["true"],
    "checkpoints.budget_gb": [0.0003, 0.001, 0.005],
    "checkpoints.max_skipped": ["null"],
    "consolidate.choose": ["best", "best", "step-1"],
    "consolidate.dtype": ["float16", "bfloat16", "float32"],
    "consolidate.max_shard_gb": [0.00003],
    "consolidate.overflow": ["clamp", "bfloat16"],
    "predict.split": ["validation"],
    "predict.rows": [1, 5],
    "predict.dtype": ["float32"],  # in bfloat16 answers depend on the rows beside them
    "predict.unit_rows": [1, 4],
    "predict.batch_rows": [1, 3],
    "predict.batch_tokens": [1, 60],
    "predict.load_in": ["4bit"],
    "predict.post": ["[strip,first_line]", "['cut_chars:3']"],
    "predict.output.format": ["csv", "csv_bom", "tsv", "jsonl", "json", "parquet"],
    "predict.output.columns": ["{of: key, said: prediction}"],
    "data.columns.id": ["key"],
}
_OF_TEXT: dict[str, Sequence[Any]] = {
    "predict.max_new_tokens": [1, 8],
    "predict.max_characters": [4],
    "predict.length_ratio": [0.5, 2],
    "predict.length_ratio_of": ["characters"],
    "predict.stop": ["['5']", "['1',' 2 3']"],
    "predict.stop_ids": ["[7]", "[8,9]"],
    "predict.samples": [2],
    "predict.keep_logprobs": [1, 3],
    "predict.min_new_tokens": [2],
    "predict.sample": ["true"],
    "predict.temperature": [0.7],
    "predict.top_k": [3],
    "predict.top_p": [0.8],
    "predict.num_beams": [1, 2, 3],
    "predict.decodings": ["{greedy: {num_beams: 1}, beams: {num_beams: 2}}", "{one: {}, drawn: {sample: true}}"],
    "predict.repetition_penalty": [1.2],
    "predict.no_repeat_ngram": [2],
    "predict.chunk_tokens": [3],
    "predict.chunk_sentences": [1],
    "score.metrics": ["[cer,wer]", "[rouge,bleu,chrf]", "[exact_match,character_accuracy]"],
    "score.tokenizer": ["characters"],
}
_OF_TASK: dict[str, dict[str, Sequence[Any]]] = {
    "causal_lm": _OF_TEXT
    | {
        "data.prompt": ["''", "plain", "alpaca", "chat", "messages", "'3 {input} 4'", "'{input} {key}'"],
        "data.system": ["'1 2'"],
        "data.examples": ["[{input: '3', target: '4 5'}]"],
        "data.loss_on": ["all"],
        "data.packing": ["rows", "rows", "blocks"],
        "data.separator": ["' 9 '"],
        "data.pad_input_to": [16],
        "data.columns.input": ["question"],
        "data.columns.text": ["context"],
    },
    "seq2seq": _OF_TEXT
    | {
        "data.prompt": ["plain", "'3 {input} 4'"],
        "data.max_target_tokens": [3, 16],
        "data.pad_input_to": [16],
        "data.columns.target": ["question"],
    },
    "question_answering": {
        "question_answering.stride_tokens": [0, 5],
        "question_answering.max_question_tokens": [2, 6],
        "question_answering.max_answer_tokens": [1, 4],
        "question_answering.n_best": [1, 3],
        "question_answering.null_threshold": [0.0, -1.5],
        "score.metrics": ["[squad_em]", "[squad_f1,korquad_em]"],
    },
    "classification": {
        "data.prompt": ["'3 {input} 4'", "'{question} {context}'"],
        "train.class_weights": ["balanced", "{low: 2, middle: 0.5}"],
        "data.pad_input_to": [16],
        "data.columns.target": ["grade"],
        "score.metrics": ["[accuracy,label_f1]", "[macro_f1]"],
    },
}
# What rows are made of where the tokenizer cuts words; "words" has the numbers alone.
_NUMBERS = [*map(str, range(28))]
_WORDS = """0 1 2 3 4 5 7 8 9 28 77 사과 배를 데이터가 학습합니다 naïve Straße ﬁne 🍏 👩‍🔬 don't e.g. x=1; 日本語 re-use
foo_bar 100% New""".split()
# Without these most tiny models would be refused or be no test.
_ALWAYS = {
    "causal_lm": ["data.long_rows=cut_left"],
    "seq2seq": ["data.long_rows=cut_left", "predict.num_beams=1"],
    "question_answering": ["question_answering.max_question_tokens=6", "question_answering.stride_tokens=4"],
    "classification": ["data.long_rows=cut_right"],
}


def draw(seed: int, least: int = 2, most: int = 9) -> dict[str, Any]:
    """Return the request of *seed*, with *least* to *most* keys."""
    chance = random.Random(seed)
    task = chance.choice([*KINDS, "causal_lm"])
    values = _ANY | _OF_TASK[task]
    chosen = {key: chance.choice(values[key]) for key in chance.sample(sorted(values), chance.randint(least, most))}
    for shorter, longer in (("train.epochs", "train.steps"), ("checkpoints.every_epochs", "checkpoints.every_steps")):
        if shorter in chosen:
            chosen.setdefault(longer, "null")
    if any(key.startswith("adapter.") for key in chosen):
        chosen.setdefault("adapter.method", "lora")
    tokenizer = random.Random(f"tokenizer {seed}").choice(["words", *TOKENIZERS])
    frame = random.Random(f"frame {seed}").choice(["$A", "$A", "<s> $A", "<s> $A </s>", "$A </s>"])
    words = _NUMBERS if tokenizer == "words" else _WORDS
    rows = {split: _rows(chance, task, count, words) for split, count in _SPLITS.items()}
    return {
        "do": "resume_and_predict_twice",
        "task": task,
        "kind": chance.choice(KINDS[task]),
        "tokenizer": tokenizer,
        "frame": frame,
        "rows": rows,
        "overrides": [
            "data.splits.test=test.jsonl",
            *(["data.max_tokens=64"] if tokenizer != "words" else []),
            *_ALWAYS[task],
            *(f"{key}={value}" for key, value in chosen.items()),
        ],
        "killed_at": chance.choice([None, None, *range(4)]),
        "has_template": chance.random() < 0.7,
    }


def _rows(chance: random.Random, task: str, count: int, words: Sequence[str]) -> list[Mapping[str, Any]]:
    def some(low: int, high: int) -> str:
        return " ".join(words[chance.randrange(28)] for _ in range(chance.randrange(low, high)))

    is_odd = chance.random() < 0.3
    rows = []
    for place in range(count):
        row: dict[str, Any] = {"key": f"row-{place}", "input": some(1, 14), "target": some(1, 8)}
        row |= {"question": some(1, 9), "context": some(3, 40), "text": some(1, 40), "grade": place % 2}
        if is_odd and chance.random() < 0.2:
            row["input"] = chance.choice(["한글 3 😀", '3,"4"\n5', some(60, 90), "  1 ", "unseen words only"])
        turns = [("user", row["input"]), ("assistant", row["target"])] * chance.randrange(1, 3)
        row["messages"] = [{"role": role, "content": text} for role, text in turns]
        parts = row["context"].split()
        first = chance.randrange(len(parts))
        text, start = " ".join(parts[first : first + 2]), len(" ".join([*parts[:first], ""]))
        has_answer = not is_odd or chance.random() < 0.7
        row["answers"] = {"text": [text] * has_answer, "answer_start": [start] * has_answer}
        row["target"] = ("low", "middle", "high")[place % 3] if task == "classification" else row["target"]
        rows.append(row)
    return rows
