"""Write Korean lodging reviews and obfuscate them.

Koreans can still read them. The data of the demo recipe `hangul-restoration`. The sentences come from the grammar
below, the obfuscation from rules on the letters of a syllable, as guests do it who want to warn other Koreans without
the landlord's translator noticing. An obfuscated sentence has as many characters as its original. The same seed gives
the same rows on every version of Python: the only source of chance is `random.Random(seed).random()`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

from ...errors import UsageError

MAX_CHARS = 24
# A million draws hold 650,000 distinct sentences; with more than this many the draws repeat too often.
MAX_SENTENCES = 200_000

_FIRST_SYLLABLE = ord("가")
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The probability of each rule to touch a syllable that it can touch."""

    liaison: float
    onset: float
    y_vowel: float
    like_vowel: float
    changed_final: float
    added_final: float


# Chosen so that a copied input has 0.40 of its characters right.
MAIN_MIX = Mix(liaison=0.6, onset=0.6, y_vowel=0.4, like_vowel=0.0, changed_final=0.7, added_final=0.4)
# Fewer of the habits that a model has learnt, and one that it has never met.
OTHER_MIX = Mix(liaison=0.9, onset=0.2, y_vowel=0.1, like_vowel=0.8, changed_final=0.3, added_final=0.7)


def generate(seed: int, num_train: int, num_validation: int, num_test: int) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the splits train, validation, test and test_other_mix.

    A row has `id`, `input` (obfuscated) and `target` (the original). No sentence is in two
    of train, validation and test. `test_other_mix` holds the sentences of `test`, obfuscated
    by another mix of the rules, so that the two scores differ by the mix alone. The test rows
    depend on nothing but *seed* and *num_test*: another size of train leaves them as they are.

    Raises:
        UsageError: more than `MAX_SENTENCES` are asked for.
    """
    count = num_test + num_validation + num_train
    if count > MAX_SENTENCES:
        raise UsageError(f"{count} different sentences are too many for the hangul generator; at most {MAX_SENTENCES}")
    drawn = _distinct_sentences(random.Random(8 * seed), count)
    test = drawn[:num_test]
    validation = drawn[num_test : num_test + num_validation]
    train = drawn[num_test + num_validation :]
    return {
        "train": _rows("train", train, random.Random(8 * seed + 1), MAIN_MIX),
        "validation": _rows("validation", validation, random.Random(8 * seed + 2), MAIN_MIX),
        "test": _rows("test", test, random.Random(8 * seed + 3), MAIN_MIX),
        "test_other_mix": _rows("test_other_mix", test, random.Random(8 * seed + 4), OTHER_MIX),
    }


def _rows(split: str, sentences: Sequence[str], chance: random.Random, mix: Mix) -> list[dict[str, str]]:
    return [
        {"id": f"{split}-{number:06d}", "input": obfuscate(sentence, chance, mix), "target": sentence}
        for number, sentence in enumerate(sentences)
    ]


@dataclass(frozen=True)
class Topic:
    """Nouns, and what can be good and bad about them.

    The latter are past stems, which take any ending.
    """

    nouns: tuple[str, ...]
    praise: tuple[str, ...]
    blame: tuple[str, ...]


def _topic(nouns: str, praise: str, blame: str) -> Topic:
    return Topic(*(tuple(words.split(", ")) for words in (nouns, praise, blame)))


TOPICS = (
    _topic(
        "방, 객실, 침실, 거실, 욕실, 화장실, 로비, 복도, 수영장, 휴게실",
        "넓었, 깨끗했, 아늑했, 조용했, 따뜻했, 예뻤, 쾌적했",
        "좁았, 추웠, 어두웠, 지저분했, 시끄러웠, 답답했",
    ),
    _topic(
        "침대, 이불, 베개, 소파, 의자, 수건, 매트리스",
        "편했, 푹신했, 깨끗했, 보드라웠, 넉넉했",
        "딱딱했, 낡았, 불편했, 눅눅했, 얼룩졌",
    ),
    _topic(
        "에어컨, 보일러, 냉장고, 인터넷, 샤워기, 엘리베이터, 텔레비전",
        "잘 됐, 괜찮았, 쓸 만했, 만족스러웠",
        "낡았, 자꾸 꺼졌, 별로였, 말썽이었",
    ),
    _topic(
        "직원, 직원분, 사장님, 주인, 매니저, 관리인",
        "친절했, 상냥했, 다정했, 꼼꼼했, 잘 웃어 줬",
        "불친절했, 무뚝뚝했, 차가웠, 성의 없었",
    ),
    _topic(
        "조식, 저녁, 커피, 빵, 과일, 고기, 국수, 볶음밥",
        "맛있었, 푸짐했, 신선했, 훌륭했",
        "싱거웠, 짰, 부족했, 느끼했, 맛없었",
    ),
    _topic(
        "전망, 야경, 정원, 바다 풍경, 산책길, 노을",
        "멋졌, 아름다웠, 근사했, 볼만했, 환상적이었",
        "평범했, 실망스러웠, 그저 그랬, 안 보였",
    ),
    _topic(
        "위치, 가격, 교통, 서비스, 분위기, 청소 상태, 방음",
        "좋았, 괜찮았, 훌륭했, 만족스러웠",
        "나빴, 아쉬웠, 애매했, 형편없었",
    ),
)
_OPENERS = tuple("여기, 역시, 일단, 솔직히, 이번에도, 가족과 갔는데, 친구랑 왔는데, 2박 했는데, 3층이라".split(", "))
_ADVERBS = tuple("정말, 아주, 너무, 꽤, 참, 무척, 진짜, 생각보다, 사진보다, 의외로".split(", "))
_ENDINGS = ("어요", "습니다", "네요", "음", "답니다")
_STOPS = ("", "", ".", ".", "!", "~")
_PRAISING_CLOSERS = tuple("또 올게요, 추천합니다, 다시 가고 싶어요, 잘 쉬었어요, 별 5개요".split(", "))
_BLAMING_CLOSERS = tuple("다신 안 가요, 비추천합니다, 돈이 아까워요, 잠을 못 잤어요, 별 1개요".split(", "))


def _distinct_sentences(chance: random.Random, count: int) -> list[str]:
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        sentence = _sentence(chance)
        if len(sentence) <= MAX_CHARS:
            sentences[sentence] = None
    return list(sentences)


def _sentence(chance: random.Random) -> str:
    first, second = pick(chance, TOPICS), pick(chance, TOPICS)
    is_praise = chance.random() < 0.5
    if first is not second and chance.random() < 0.4:
        return _two_clauses(chance, first, second, is_praise)
    opener = pick(chance, _OPENERS) + " " if chance.random() < 0.3 else ""
    sentence = opener + _clause(chance, first, is_praise) + write_end(chance)
    if not opener and chance.random() < 0.5:
        sentence += " " + pick(chance, _PRAISING_CLOSERS if is_praise else _BLAMING_CLOSERS)
    return sentence


def _two_clauses(chance: random.Random, first: Topic, second: Topic, is_praise: bool) -> str:
    link, turns = ("지만", True) if chance.random() < 0.5 else ("고", False)
    return f"{_clause(chance, first, is_praise)}{link} {_clause(chance, second, is_praise != turns)}{write_end(chance)}"


def has_final(word: str) -> bool:
    """Say whether the last syllable of *word* ends in a consonant.

    That decides the particle.
    """
    return (ord(word[-1]) - _FIRST_SYLLABLE) % 28 > 0


def _clause(chance: random.Random, topic: Topic, is_praise: bool) -> str:
    noun = pick(chance, topic.nouns)
    particle = pick(chance, ("은", "이", "도") if has_final(noun) else ("는", "가", "도"))
    adverb = pick(chance, _ADVERBS) + " " if chance.random() < 0.5 else ""
    return f"{noun}{particle} {adverb}{pick(chance, topic.praise if is_praise else topic.blame)}"


def write_end(chance: random.Random) -> str:
    """Return the ending of a stem with what closes the sentence, if anything."""
    return pick(chance, _ENDINGS) + pick(chance, _STOPS)


def pick(chance: random.Random, choices: Sequence[_T]) -> _T:
    """Return one of *choices*, the same on every version of Python."""
    return choices[int(chance.random() * len(choices))]


# The letters in the order in which Unicode counts syllables; "-" is the empty final.
_ONSETS = "ㄱㄲㄴㄷㄸㄹㅁㅂㅃㅅㅆㅇㅈㅉㅊㅋㅌㅍㅎ"
_VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
_FINALS = "-ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"

_HARSHER_ONSETS = {
    **{"ㄱ": "ㄲㅋ", "ㄷ": "ㄸㅌ", "ㅂ": "ㅃㅍ", "ㅅ": "ㅆ", "ㅈ": "ㅉㅊ", "ㄲ": "ㅋ", "ㄸ": "ㅌ", "ㅃ": "ㅍ"},
    **{"ㅉ": "ㅊ", "ㅋ": "ㄲ", "ㅌ": "ㄸ", "ㅍ": "ㅃ", "ㅊ": "ㅉ"},
}
_Y_VOWELS = {"ㅏ": "ㅑ", "ㅓ": "ㅕ", "ㅗ": "ㅛ", "ㅜ": "ㅠ", "ㅐ": "ㅒ", "ㅔ": "ㅖ"}
# Vowels that sound alike, or nearly so.
_LIKE_VOWELS = {
    **{"ㅐ": "ㅔ", "ㅔ": "ㅐ", "ㅒ": "ㅖ", "ㅖ": "ㅒ", "ㅚ": "ㅙㅞ", "ㅙ": "ㅞㅚ", "ㅞ": "ㅙㅚ"},
    **{"ㅡ": "ㅢ", "ㅣ": "ㅟ", "ㅢ": "ㅡ", "ㅟ": "ㅣ", "ㅘ": "ㅏ", "ㅝ": "ㅓ"},
}
# Finals that sound alike at the end of a syllable.
_LIKE_FINALS = {
    final: "".join(other for other in group if other != final)
    for group in ("ㄱㄲㄳㅋ", "ㄴㄵㄶ", "ㄷㅅㅆㅈㅊㅌ", "ㄹㅀㄽㄾ", "ㅁㄻ", "ㅂㅍㅄ")
    for final in group
}
# An added final melts into the onset that follows it, as these do when spoken.
_MELTING_FINALS = {
    **{"ㄱ": "ㄱ", "ㄲ": "ㄱ", "ㅋ": "ㄱ", "ㄴ": "ㄴ", "ㅁ": "ㅁ", "ㄹ": "ㄹ", "ㅂ": "ㅂ", "ㅃ": "ㅂ", "ㅍ": "ㅂ"},
    **dict.fromkeys("ㄷㄸㅌㅅㅆㅈㅉㅊ", "ㅅㄷㅊ"),
}


@dataclass
class _Syllable:
    onset: str
    vowel: str
    final: str


def obfuscate(sentence: str, chance: random.Random, mix: Mix) -> str:
    """Return *sentence* with the rules of *mix* applied by *chance*.

    Its length stays.
    """
    letters = [_syllable(character) for character in sentence]
    for here, after in zip_longest(letters, letters[1:]):
        if here is not None:
            _change_end(here, after, chance, mix)
    for here in letters:
        if here is not None:
            _change_onset_and_vowel(here, chance, mix)
    return "".join(
        character if here is None else _character(here) for character, here in zip(sentence, letters, strict=True)
    )


def _change_end(here: _Syllable, after: _Syllable | None, chance: random.Random, mix: Mix) -> None:
    can_move = after is not None and after.onset == "ㅇ" and here.final in _ONSETS and here.final != "ㅇ"
    if after and can_move and chance.random() < mix.liaison:
        here.final, after.onset = "-", here.final
    elif here.final in _LIKE_FINALS and chance.random() < mix.changed_final:
        here.final = pick(chance, _LIKE_FINALS[here.final])
    elif here.final == "-" and chance.random() < mix.added_final:
        here.final = pick(chance, _MELTING_FINALS.get(after.onset if after else "", "ㅎ"))


def _change_onset_and_vowel(here: _Syllable, chance: random.Random, mix: Mix) -> None:
    if here.onset in _HARSHER_ONSETS and chance.random() < mix.onset:
        here.onset = pick(chance, _HARSHER_ONSETS[here.onset])
    if here.vowel in _Y_VOWELS and chance.random() < mix.y_vowel:
        here.vowel = _Y_VOWELS[here.vowel]
    elif here.vowel in _LIKE_VOWELS and chance.random() < mix.like_vowel:
        here.vowel = pick(chance, _LIKE_VOWELS[here.vowel])


def _syllable(character: str) -> _Syllable | None:
    number = ord(character) - _FIRST_SYLLABLE
    if not 0 <= number < len(_ONSETS) * len(_VOWELS) * len(_FINALS):
        return None
    onset, rest = divmod(number, len(_VOWELS) * len(_FINALS))
    vowel, final = divmod(rest, len(_FINALS))
    return _Syllable(_ONSETS[onset], _VOWELS[vowel], _FINALS[final])


def _character(syllable: _Syllable) -> str:
    onset, vowel = _ONSETS.index(syllable.onset), _VOWELS.index(syllable.vowel)
    final = _FINALS.index(syllable.final)
    return chr(_FIRST_SYLLABLE + (onset * len(_VOWELS) + vowel) * len(_FINALS) + final)
