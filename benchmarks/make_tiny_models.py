"""Write the tokenizers of the library's models `tiny-bert` and `tiny-llama`.

    python benchmarks/make_tiny_models.py recipes/library/models

Both are trained on the texts that the generators of `recipes/data/reviews.py` write: WordPiece as BERT has it, and BPE
over blanks as Llama and BART have it, whose roles of a chat are tokens. `tiny-bart` uses the latter, too. This file
shows how the tokenizers came about; the order in which WordPiece numbers its pieces varies.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sousbatch.recipes.data.generators import GENERATORS

NUM_TOKENS = 1000
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")


def texts() -> Iterator[str]:
    """Yield the texts of all rows of `recipes/data/reviews.py`."""
    for name in ("labels", "questions", "dialogues", "essays"):
        for rows in GENERATORS[name](seed=0, num_train=2000, num_validation=0, num_test=0).values():
            for row in rows:
                yield from (
                    str(row[column]) for column in ("input", "target", "question", "context", "text") if column in row
                )


def wordpiece() -> Tokenizer:
    """Return the tokenizer of `tiny-bert`."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=NUM_TOKENS, special_tokens=list(BERT_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    first, last = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def bpe() -> Tokenizer:
    """Return the tokenizer of `tiny-llama` and `tiny-bart`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS, special_tokens=list(LLAMA_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


if __name__ == "__main__":
    for name, tokenizer in (("tiny-bert", wordpiece()), ("tiny-llama", bpe())):
        (Path(sys.argv[1]) / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(Path(sys.argv[1]) / name / "tokenizer.json"))
