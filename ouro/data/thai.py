"""Text: one Thai spelling for training and evaluation, which texts are Thai, and which share a passage."""

import math
import re
import unicodedata
from collections import defaultdict

from pythainlp.util import remove_zw, reorder_vowels
from transformers import PreTrainedTokenizerBase

# Lost bytes; Thai in UTF-8 that was once read as Latin-1; half of a surrogate pair, as "\\ud83d" in JSON.
GARBLED = re.compile("\ufffd|à[¸¹]|[\ud800-\udfff]")
MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e"  # Thai vowels and tone marks above and below: no letters for Unicode
MARK = re.compile(f"[{MARKS}]")
THAI = re.compile("[\u0e01-\u0e3a\u0e40-\u0e4e]")  # letters and marks
IGNORED = re.compile(f"[^\\w{MARKS}]|[_\U00010000-\U0010ffff]")  # of a passage: all but letters, digits and Thai marks
WINDOW = 50  # characters of a passage: 13 Thai words (3.7 to 5.5 characters each) at the least
BLOCK = WINDOW // 2


def normalise(text: str) -> str:
    """Thai text in one spelling: no zero-width characters, composed sara am, tone marks in order, เเ as แ, ๅ as า.

    Lines and spaces stay, unlike in pythainlp's `normalize`; and unlike NFKC, which takes ำ apart, nothing is split.
    """
    text = remove_zw(text).replace("\ufeff", "").replace("\u2060", "")
    while (ordered := reorder_vowels(text)) != text:  # one correction can make room for another
        text = ordered
    return text


# White space, and what is not seen: control and zero-width characters, what turns the direction of writing.
UNSEEN = "\\s\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
ENDS = re.compile(f"\\A[{UNSEEN}]+|[{UNSEEN}]+\\Z")
WIDE = {0x3000: " "} | {0xFF01 + n: chr(0x21 + n) for n in range(94)}  # ＡＢＣ１２３


def trim(text: str) -> str:
    """A text without the white space and the unseen characters at its ends, whatever `normalise_thai` says."""
    return ENDS.sub("", text)


def as_seen(text: str) -> str:
    """A text as a reader sees it, to be compared: letters composed, wide ones as others, white space as one space and
    nothing that is not seen. x² stays other than x2."""
    text = unicodedata.normalize("NFC", normalise(text.translate(WIDE)))
    return " ".join(re.sub(f"(?!\\s)[{UNSEEN}]", "", text).split())


def count_letters(text: str) -> tuple[int, int]:
    """How many Thai letters and marks a text has, and how many letters and marks in all."""
    return len(THAI.findall(text)), sum(map(str.isalpha, text)) + len(MARK.findall(text))


CODE = re.compile(
    r"```.*?(?:```|\Z)|^ {0,3}~~~.*?^ {0,3}~~~|<(pre|code)\b[^>]*>.*?(?:</\1>|\Z)|`[^`\n]*`|https?://\S+",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
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


TEXT = (  # article 1 of the Universal Declaration of Human Rights
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกันด้วยเจตนารมณ์แห่งภราดรภาพ"
)
TOKENS_A_CHARACTER = 2  # of a served model, whose tokenizer is not known: Ouro's has 1.9


def reply_tokens(tokenizer: PreTrainedTokenizerBase | None, characters: int) -> int:
    """How many tokens so many characters of Thai take."""
    if tokenizer is None:
        return TOKENS_A_CHARACTER * characters
    return math.ceil(characters * len(tokenizer(TEXT, add_special_tokens=False).input_ids) / len(TEXT))


def squash(text: str) -> str:
    """The letters, digits and Thai marks of a text, in one spelling: what overlap is judged on."""
    # The spelling comes last: text from a PDF may have spaces between a letter and its marks, which are gone only now.
    return normalise(IGNORED.sub("", text.lower()))


class Overlap:
    """Finds the first WINDOW consecutive characters of a text that also stand in a benchmark item.

    Characters and not words: Thai has no spaces, and a segmenter may cut the same sentence in two ways. The items are
    cut into blocks of BLOCK characters, one after the other. Any WINDOW characters of an item hold a whole block, which
    begins among the first BLOCK of them: a text is compared with an item only around a block that both have.
    """

    def __init__(self, items: list[tuple[str, str]]):
        self.names = [name for name, _ in items]
        self.texts = [squash(text) for _, text in items]
        self.short = sum(len(text) < WINDOW for text in self.texts)  # cannot be looked for
        self.blocks: dict[str, list[tuple[int, int]]] = defaultdict(list)  # block -> number of the item, place in it
        for number, text in enumerate(self.texts):
            for place in range(0, len(text) - BLOCK + 1, BLOCK):
                self.blocks[text[place : place + BLOCK]].append((number, place))

    def find(self, text: str) -> tuple[str, str] | None:
        """The first item that has them, and the shared characters; None without any."""
        text = squash(text)
        first = (len(text), 0)  # where the shared characters begin, number of the item
        for at in range(len(text) - BLOCK + 1):
            if at >= first[0] + BLOCK:
                break  # what this block could find begins later
            for number, place in self.blocks.get(text[at : at + BLOCK], ()):
                for before in range(min(BLOCK - 1, at, place), -1, -1):
                    window = text[at - before : at - before + WINDOW]
                    if len(window) == WINDOW and self.texts[number].startswith(window, place - before):
                        first = min(first, (at - before, number))
                        break
        start, number = first
        return (self.names[number], text[start : start + WINDOW]) if start < len(text) else None
