"""Notice texts in a language that a model's tokenizer cuts into small pieces. Ours.

Code, numbers and technical terms are cut into pieces too. A language with Latin letters is
therefore noticed only if the texts have its most frequent words, and another script by unknown
tokens or by the number of letters of a token.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from droppeft.data.findings import Findings

FREQUENT_WORDS = {
    "English": "the and to of is that it with you for was this are have not",
    "German": "der die und das ist nicht ich ein eine mit auf für sie den von",
    "French": "le la les et des est une que pas pour dans du je ne avec",
    "Spanish": "el la los que en una por no con para las del se pero está",
    "Italian": "il di che la un per non una sono del con ho le più anche",
    "Portuguese": "que não uma de da um para na por mas está você foi meu muito",
    "Dutch": "de het een en van ik niet dat op te met voor zijn mijn maar",
    "Polish": "nie się na jest że jak po mi już od czy za dla ale tak",
    "Turkish": "bir ve bu için çok da ne ama değil var mi daha ben gibi kadar",
}
"""Words of two letters or more, in languages that are written with Latin letters."""

SAMPLED_TEXTS = 300
SAMPLED_WORDS = 2000
"""The most frequent different words of the sampled texts are tokenised."""

FEWEST_WORDS = 50
"""Nothing is said about fewer words than this."""

FREQUENT_SHARE = 0.1
"""A language is noticed if its frequent words are at least this share of all words."""

PIECES_PER_WORD = 1.45
"""A tokenizer that knows a language cuts its words into fewer tokens than this (English: 1.1)."""

UNKNOWN_SHARE = 0.05
"""A tokenizer with a larger share of unknown tokens does not know a script."""

LETTERS_PER_TOKEN = 1.2
"""A tokenizer with fewer letters of a word per token cuts it into its letters."""

_WORD = re.compile(r"[^\W\d_]+")
_LAST_LATIN = "\u024f"
_NO_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese and Japanese


def with_language(findings: Findings, texts: Sequence[str], tokenizer: Any) -> Findings:
    """Add the language of texts that a tokenizer cuts into small pieces.

    Args:
        findings: what is known so far.
        texts: of which some are looked at.
        tokenizer: of the model.
    """
    words = Counter(word for text in islice(texts, SAMPLED_TEXTS) for word in _WORD.findall(text))
    if not words:
        return findings
    common = Counter(dict(words.most_common(SAMPLED_WORDS)))
    cut = {word: tokenizer.tokenize(word) for word in common}
    pieces = _total(common, lambda word: len(cut[word])) / common.total()
    language = _script(common, cut, tokenizer.unk_token) or _latin(words, pieces)
    return replace(findings, language=language, pieces_per_word=pieces) if language else findings


def _script(words: Counter[str], cut: Mapping[str, Sequence[str]], unknown: str | None) -> str:
    """Name the script if it is not Latin and the tokenizer does not know it."""
    others = Counter({word: count for word, count in words.items() if max(word) > _LAST_LATIN})
    letters = _total(words, len)
    if letters < FEWEST_WORDS or _total(others, len) < letters / 2:
        return ""
    tokens = _total(others, lambda word: len(cut[word]))
    not_known = _total(others, lambda word: list(cut[word]).count(unknown or ""))
    with_spaces = Counter({word: n for word, n in others.items() if not _NO_SPACES.search(word)})
    pieces = _total(with_spaces, lambda word: len(cut[word]))
    if (
        not_known > UNKNOWN_SHARE * tokens
        or pieces * LETTERS_PER_TOKEN > _total(with_spaces, len) > 0
    ):
        return "a language of another script"
    return ""


def _latin(words: Counter[str], pieces: float) -> str:
    """Name the language if its words are more frequent than those of English."""
    lower: Counter[str] = Counter()
    for word, count in words.items():
        lower[word.casefold()] += count
    total = sum(lower.values())
    if total < FEWEST_WORDS or pieces < PIECES_PER_WORD:
        return ""
    shares = {
        name: sum(lower[word] for word in frequent.split()) / total
        for name, frequent in FREQUENT_WORDS.items()
    }
    likely = max(shares, key=lambda name: shares[name])
    return "" if likely == "English" or shares[likely] < FREQUENT_SHARE else likely


def _total(words: Counter[str], value: Callable[[str], int]) -> int:
    """The sum of a value of each word, as often as the word occurs."""
    return sum(value(word) * count for word, count in words.items())
