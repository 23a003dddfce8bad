"""What of a reply is a thought, and what its answer.

A thought begins with a tag at the beginning of the reply or of a line, and ends at the closing tag that belongs to it:
pairs inside of it are part of it. A closing tag alone ends a thought that the template began in the prompt. Elsewhere,
between quotation marks and in fenced code a tag is text. A thought that was closed goes on to another closing tag of it
that begins a line before the answer. The answer is what stands behind the last thought.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ouro.data.thai import trim

WORDS = (
    "think", "thinking", "thought", "thoughts", "reasoning", "reflection", "analysis", "scratchpad", "seed:think",
    "internal_monologue",
)  # fmt: skip
DETAILS = ('<details type="reasoning">', "</details>")  # its closing tag is HTML, too
PAIRS = (  # with what models begin and end a thought, in any case
    *((f"<{word}>", f"</{word}>") for word in WORDS),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|think|>", "<|content|>"),
    ("<|im_start|>think", "<|im_start|>answer"),
    DETAILS,
)


def _any(tags_of_a_kind: Iterable[str]) -> str:
    """A pattern, with a group each; a tag such as <think> may have spaces in it and attributes."""
    patterns = []
    for tag in tags_of_a_kind:
        word = re.fullmatch(r"<(/?)([^|]+)>", tag)
        patterns.append(rf"< ?{word[1]} ?{re.escape(word[2])}(?: \w+=[^<>\n]*| )?>" if word else re.escape(tag))
    return "|".join(f"({pattern})" for pattern in patterns)


# Groups: 1 at the beginning of a line, then one a tag. Behind <|start|>assistant a thought goes on in another message.
OPENING, CLOSING = map(_any, zip(*PAIRS, strict=True))
TAG = re.compile(rf"(^ {{0,3}})?(?:(?<!<\|start\|>assistant)(?:{OPENING})|{CLOSING})", re.IGNORECASE | re.MULTILINE)
BEGIN = re.compile(rf"\A(?:<s>|<bos>|<\|begin_of_text\|>)\s*(?={OPENING})", re.IGNORECASE)  # not decoded, as END
FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.DOTALL | re.MULTILINE)
QUOTES = re.compile("[\"'`“‘«][\"'`”’»]")
END = re.compile(r"(?:<\|(?:return|end)\|>\s*)+\Z")  # of a message that was not decoded


class Tag(NamedTuple):
    """A tag in a text; pair: its number in PAIRS; first: at the beginning of a line."""

    pair: int
    opens: bool
    first: bool
    start: int
    end: int


def tags(text: str) -> Iterator[Tag]:
    """The tags of a text, but for those that are quoted."""
    text, details = FENCE.sub(_without_tags, text), 0
    for match in TAG.finditer(text):
        start, end = match.span(match.lastindex)
        if not QUOTES.fullmatch(text[start - 1 : start] + text[end : end + 1]):
            opens, pair = match.lastindex <= len(PAIRS) + 1, (match.lastindex - 2) % len(PAIRS)
            if PAIRS[pair] == DETAILS:
                details += 1 if opens else -1
                if details < 0:
                    details = 0
                    continue
            yield Tag(pair, opens, match[1] is not None, start, end)


def _without_tags(fenced: re.Match) -> str:
    """Code as other text of its length; but a thought may end in code that the thought left open."""
    opens = [match.lastindex <= len(PAIRS) + 1 for match in TAG.finditer(fenced[0])]
    return fenced[0] if opens.count(False) > opens.count(True) else "x" * len(fenced[0])


def answer_of(reply: str) -> str | None:
    """What a model says after its thought: all of a reply without one. None if a thought does not end, as when a reply
    is cut: it holds no answer."""
    text = _trimmed(reply)
    begin, inside, closed, open_tags = 0, None, None, Counter()
    for tag in tags(text):
        if tag.opens:
            adjacent = begin and tag.start - begin < 10 and not trim(text[begin : tag.start])
            if inside is None and (tag.first or adjacent):
                inside, open_tags = tag.pair, Counter()
            open_tags[tag.pair] += 1
        elif open_tags[tag.pair]:
            open_tags[tag.pair] -= 1
            if inside == tag.pair and not open_tags[inside]:
                inside, closed, begin = None, tag.pair, tag.end
        elif inside is None and (closed is None or tag.first and tag.pair == closed and trim(text[tag.end :])):
            closed, begin = tag.pair, tag.end
    return trim(END.sub("", text[begin:])) if inside is None else None


def _trimmed(reply: str) -> str:
    """Without what is not seen at its ends, and the token that begins a text before a thought."""
    return trim(BEGIN.sub("", trim(reply)))


def marks_thought(token: str) -> bool:
    """Whether a special token is one of those that thoughts are told from answers by."""
    return any(token.lower() in tag.lower() for pair in (*PAIRS, ("<|start|>", "<|end|>")) for tag in pair)


def begun_by(prompt: str) -> str:
    """The tag with which a prompt begins the thought of its reply; else nothing."""
    prompt = prompt.rstrip()
    return next((prompt[tag.start :] for tag in tags(prompt) if tag.opens and tag.end == len(prompt)), "")


def with_beginning(reply: str, opening: str) -> str:
    """A reply whose thought was begun in the prompt, with that beginning, unless the model repeats it."""
    first = next(tags(_trimmed(reply)), None)
    return reply if not opening or first and first.opens and first.start == 0 else f"{opening}\n{reply}"


def usual_beginning(replies: list[str], ended: list[bool]) -> str:
    """The tag with which an unknown prompt seems to begin the thought of each of these replies; else nothing.

    Such replies close a thought that they do not open. Most of those that ended by themselves must: one of them may
    speak of tags."""
    first = [next(tags(reply), None) for reply in replies]
    closed = [tag.pair for tag in first if tag and not tag.opens]
    others = sum(end and (tag is None or tag.opens) for tag, end in zip(first, ended, strict=True))
    return PAIRS[Counter(closed).most_common(1)[0][0]][0] if len(closed) > others else ""


def close_thought(text: str, answer: str) -> str | None:
    """A training answer whose tags are one pair, or None where they cannot be made so.

    None at all is right as it is. A closing tag alone gets its opening (templates often write that in the prompt); an
    opening one alone begins a thought without its answer, which is added where the row has one in another column."""
    found = list(tags(text))
    opening, closing = PAIRS[found[0].pair] if found else ("", "")
    match [(tag.pair == found[0].pair, tag.opens) for tag in found]:
        case [] | [(True, True), (True, False)]:
            return text
        case [(True, False)]:
            return f"{opening}\n{text}"
        case [(True, True)] if answer:
            return f"{text}\n{closing}\n\n{answer}"
    return None
