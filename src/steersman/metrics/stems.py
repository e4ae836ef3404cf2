"""Porter's stems by nltk, remembered: the same few thousand words come again and again."""

from __future__ import annotations

from functools import cache, lru_cache


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of a word, lower case."""
    return _porter().stem(word.lower())


class Stemmer:
    """The same as an object, for packages that ask for one."""

    def stem(self, word: str) -> str:
        return stem(word)


@cache
def _porter():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
