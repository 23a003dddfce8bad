"""Thai text: one spelling for training and evaluation, and which texts share a passage."""

import re
import unicodedata
from functools import lru_cache

import numpy as np
from pythainlp.util import remove_zw, reorder_vowels

# Lost bytes; Thai in UTF-8 that was once read as Latin-1; half of a surrogate pair, as "\\ud83d" in JSON.
GARBLED = re.compile("\ufffd|à[¸¹]|[\ud800-\udfff]")
WINDOW = 50  # characters without spaces and punctuation: 13 Thai words (3.7 to 5.5 characters each) at the least


def normalise(text: str) -> str:
    """Thai text in one spelling: no zero-width characters, composed sara am, tone marks in order, เเ as แ, ๅ as า.

    Lines and spaces stay, unlike in pythainlp's `normalize`; and unlike NFKC, which takes ำ apart, nothing is split.
    """
    text = remove_zw(text).replace("\ufeff", "").replace("\u2060", "")
    while (ordered := reorder_vowels(text)) != text:  # one correction can make room for another
        text = ordered
    return text


_LETTERS = np.array(  # Thai vowels and tone marks above and below are marks, not letters
    [chr(c).isalnum() or (0x0E00 < c < 0x0E80 and unicodedata.category(chr(c)) == "Mn") for c in range(0x10000)]
)
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


@lru_cache(maxsize=1)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    inverse = pow(_BASE, -1, 2**64)
    return tuple(np.cumprod(np.array([1] + [base] * (count - 1), np.uint64)) for base in (_BASE, inverse))


_ALPHA = _LETTERS & ~np.array([unicodedata.category(chr(c))[0] == "N" for c in range(0x10000)])


def count_letters(text: str) -> tuple[int, int]:
    """How many Thai letters and marks a text has, and how many letters and marks in all."""
    codes = _codes(text)
    codes = codes[codes < 0x10000]
    codes = codes[_ALPHA[codes]]
    return int(((codes >= 0x0E00) & (codes < 0x0E80)).sum()), len(codes)


CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”|\([^()\n]*\)|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]', re.DOTALL)
THAI_SHARE = 0.7  # of a reply's letters: Thai prose with English terms has more (0.83 at the least in 500 texts)


def is_thai(reply: str) -> bool | None:
    """Whether at least 70 % of a reply's letters are Thai; None if it has code or digits alone, in no language.

    Left out: code, addresses, formulas, and quotations and brackets without a Thai letter, unless nothing else is
    there. Vowel and tone marks count as letters. An empty reply is not Thai.
    """
    text = CODE.sub(" ", reply)
    outside = QUOTED.sub(lambda found: found[0] if count_letters(found[0])[0] else " ", text)
    thai, letters = count_letters(outside)
    if not letters:
        thai, letters = count_letters(text)
    if not letters:
        return None if reply.strip() else False
    return thai >= THAI_SHARE * letters


def squash(text: str) -> np.ndarray:
    """The letters, digits and Thai marks of a text, in one spelling, as code points: what overlap is judged on."""
    codes = _codes(text.lower())
    codes = codes[codes < 0x10000]
    # normalised last: what stood between a letter and its marks, as in text from a PDF, is gone by then
    return _codes(normalise(codes[_LETTERS[codes]].tobytes().decode("utf-32-le")))


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def window_hashes(codes: np.ndarray) -> np.ndarray:
    """A hash of each WINDOW characters in a row: polynomial, modulo 2**64, all from one prefix sum (Rabin and Karp)."""
    up, down = _powers(1 << max(16, len(codes).bit_length()))
    prefix = np.concatenate(([np.uint64(0)], np.cumsum(codes * up[: len(codes)], dtype=np.uint64)))
    return (prefix[WINDOW:] - prefix[:-WINDOW]) * down[: max(len(codes) - WINDOW + 1, 0)]


class Overlap:
    """Finds a text's first WINDOW characters in a row that also stand in a benchmark item.

    Characters and not words: Thai has no spaces, and a segmenter may cut the same sentence in two ways. A hash that is
    found is compared as text, so that there are no false hits.
    """

    def __init__(self, items: list[tuple[str, str]]):
        self.names = [name for name, _ in items]
        texts = [squash(text) for _, text in items]
        self.short = sum(len(text) < WINDOW for text in texts)  # cannot be looked for
        hashes = [window_hashes(text) for text in texts]
        self.text = np.concatenate([*texts, np.zeros(0, np.uint32)])
        starts = np.cumsum([0, *map(len, texts)])[:-1]
        where = [np.arange(len(h)) + start for h, start in zip(hashes, starts, strict=True)]
        item = [np.full(len(h), i) for i, h in enumerate(hashes)]
        self.hashes, first = np.unique(np.concatenate([*hashes, np.zeros(0, np.uint64)]), return_index=True)
        self.where = np.concatenate([*where, np.zeros(0, int)])[first]
        self.item = np.concatenate([*item, np.zeros(0, int)])[first]
        self.filter = np.zeros(1 << 24, bool)  # by a hash's high bits: most windows need no search
        self.filter[self.hashes >> np.uint64(40)] = True

    def find(self, text: str) -> tuple[str, str] | None:
        """The item, and the shared characters."""
        codes = squash(text)
        hashes = window_hashes(codes)
        maybe = np.flatnonzero(self.filter[hashes >> np.uint64(40)])
        at = np.searchsorted(self.hashes, hashes[maybe])
        for i, j in zip(maybe, at, strict=True):
            if j < len(self.hashes) and self.hashes[j] == hashes[i]:
                window = codes[i : i + WINDOW]
                if np.array_equal(window, self.text[self.where[j] : self.where[j] + WINDOW]):
                    return self.names[self.item[j]], window.tobytes().decode("utf-32-le")
        return None
