"""Small tokenizers of the kinds that models have, trained on the rows at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *map(str, range(28))]
KINDS = ("words", "bytes", "pieces", "unigram", "letters")
_NUM_TOKENS = 300  # at most; the bytes alone are 256


def small_tokenizer(kind: str, texts: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of *kind* for *texts*, whose first tokens are `SPECIAL`."""
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer
    options = {"vocab_size": _NUM_TOKENS, "special_tokens": SPECIAL, "show_progress": False}
    if kind == "bytes":  # GPT-2, Llama 3, Qwen
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "pieces":  # BERT
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "unigram":  # T5, XLM-R: SentencePiece
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:  # Llama 2, Gemma: bytes where a letter is unknown
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = decoders.Strip(content=" ", left=1)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
        tokenizer.decoder = decoders.Sequence(steps)
        options |= {"vocab_size": 330, "special_tokens": [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]}
        trainer = trainers.BpeTrainer(initial_alphabet=["▁", *"0123456789"], limit_alphabet=30, **options)
    tokenizer.train_from_iterator(texts, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = made["added_tokens"][: len(SPECIAL)]  # the bytes are plain tokens
    return Tokenizer.from_str(json.dumps(made))
