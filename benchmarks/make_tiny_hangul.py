"""Write the tokenizer of the library's model `tiny-hangul`.

    python benchmarks/make_tiny_hangul.py FOLDER

Text is decomposed (NFD), a syllable without a final gets the mark of an empty one, so that every syllable is exactly
three tokens; every other character is one. Decoding drops the mark and leaves letters in NFD: the code that writes the
text composes it again (NFC), which is exact. This file shows how the tokenizer came about.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<sep>")
EMPTY_FINAL = "∅"
ONSETS = [chr(code) for code in range(0x1100, 0x1113)]
VOWELS = [chr(code) for code in range(0x1161, 0x1176)]
FINALS = [chr(code) for code in range(0x11A8, 0x11C3)]
PRINTABLE_ASCII = [chr(code) for code in range(0x20, 0x7F)]


def jamo_tokenizer() -> Tokenizer:
    """Return the tokenizer of 169 tokens.

    They are specials, letters, the mark and printable ASCII.
    """
    words = [*SPECIAL_TOKENS, *ONSETS, *VOWELS, *FINALS, EMPTY_FINAL, "\n", *PRINTABLE_ASCII]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    after_a_vowel_without_final = Regex(f"(?<=[{VOWELS[0]}-{VOWELS[-1]}])(?![{FINALS[0]}-{FINALS[-1]}])")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Replace(after_a_vowel_without_final, EMPTY_FINAL)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(EMPTY_FINAL, "")])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
    return tokenizer


if __name__ == "__main__":
    jamo_tokenizer().save(str(Path(sys.argv[1]) / "tokenizer.json"))
