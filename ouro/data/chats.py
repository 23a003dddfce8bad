"""A row of a training set -> a chat -> masked tokens, in the model's own chat template."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ouro.data.batches import trained_mask
from ouro.data.thai import GARBLED, normalise
from ouro.files import UserError
from ouro.settings import Settings

import numpy as np
from jinja2 import TemplateError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"  # the published tokenizer's eos is <|endoftext|>, but this is what ends an answer
KEPT_QUESTION = 32  # tokens of a question that truncate_prompt leaves at least
Chat = list[dict[str, str]]
THINK = ("<think>", "</think>")


def close_think(text: str, answer: str | None) -> str | None:
    """A completion whose <think> and </think> pair, or None where they cannot be made to.

    None of the two is right as it is. A lone </think> gets its opening (templates often write that in the prompt); a
    lone <think> is a thought without its answer, which is added where the row has one in another column.
    """
    opening, closing = (text.count(tag) for tag in THINK)
    if (opening, closing) == (0, 1):
        return f"<think>\n{text}"
    if (opening, closing) == (1, 0) and answer and answer.strip():
        return f"{text}\n</think>\n\n{answer.strip()}"
    if (opening, closing) == (0, 0) or (
        (opening, closing) == (1, 1) and text.index("<think>") < text.index("</think>")
    ):
        return text
    return None


def to_chat(row: dict, entry: dict, settings: Settings, where: str = "row") -> tuple[Chat | None, str]:
    """One row as a chat that ends with an assistant turn, or None and why not.

    Raises:
        UserError: a column holds something other than text, or `messages` is not a list of turns.
    """

    def text(column: str) -> str:
        value = row[column]
        if not isinstance(value, str | None):
            raise UserError(f"{where}, column {column}: expected text, found {type(value).__name__}")
        value = value or ""
        return (normalise(value) if settings.normalise_thai else value).strip()

    if column := entry.get("messages"):
        chat = []
        turns = row[column] or []
        if not isinstance(turns, list):
            raise UserError(f"{where}, column {column}: expected a list of turns, found {type(turns).__name__}")
        for number, turn in enumerate(turns, 1):
            place = f"{where}, column {column}, turn {number}"
            if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
                raise UserError(f"{place}: expected {{role: system, user or assistant, content: text}}, found {turn!r}")
            content = turn.get("content")
            if not isinstance(content, str | None):
                raise UserError(f"{place}: expected text in content, found {type(content).__name__}")
            content = content or ""
            content = (normalise(content) if settings.normalise_thai else content).strip()
            if turn["role"] != "system" or content:
                chat.append({"role": turn["role"], "content": content})
        while chat and chat[-1]["role"] != "assistant":
            chat.pop()  # nothing in them to train
        spoken = chat[1:] if chat and chat[0]["role"] == "system" else chat
        if not spoken or any(not turn["content"] for turn in spoken):
            return None, f"empty ({column})"
        if [turn["role"] for turn in spoken] != ["user", "assistant"] * (len(spoken) // 2):
            return None, "turns of user and assistant do not alternate"
    else:
        parts, answer = [text(column) for column in entry["prompt"]], text(entry["completion"])
        if not parts[0] or not answer:
            return None, f"empty ({entry['completion'] if parts[0] else entry['prompt'][0]})"
        if entry.get("think"):
            answer = close_think(answer, text(entry["answer"]) if "answer" in entry else None)
            if answer is None:
                return None, f"unbalanced <think> ({entry['completion']})"
        chat = [
            {"role": "user", "content": "\n\n".join(part for part in parts if part)},
            {"role": "assistant", "content": answer},
        ]
    if settings.system_prompt and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": settings.system_prompt})
    if any(GARBLED.search(turn["content"]) for turn in chat):
        return None, "garbled (U+FFFD or mojibake)"
    return chat, ""


def digest(chat: Chat) -> bytes:
    return hashlib.blake2b(json.dumps(chat, ensure_ascii=False).encode(), digest_size=16).digest()


def question(chat: Chat) -> Chat:
    """All that comes before the last answer, without the system turn."""
    return [turn for turn in chat[:-1] if turn["role"] != "system"]


def in_hash_share(row: dict, chat: Chat, rule: dict) -> bool:
    """Whether a hash split holds this row out: by the column it names, or the question where that is empty."""
    value = row[rule["hash"]]
    text = normalise(value if isinstance(value, str) and value.strip() else question(chat)[0]["content"]).strip()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < rule["share"] * 2**64


@dataclass
class Tokens:
    """A tokenised chat: ids, the trained stretches [start, stop, start, stop, …], where the first answer begins."""

    ids: np.ndarray
    trained: list[int]
    boundary: int


def generation_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], int]:
    """What the template puts before an answer, as text and tokens; and the tokens of this chat's prompt if it asked
    nothing."""
    system = chat[0]["content"] if chat[0]["role"] == "system" else None
    return _generation_prompt(tokenizer, tokenizer.chat_template, system)


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, generation: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a chat: {error}") from None


@lru_cache(maxsize=64)
def _generation_prompt(tokenizer, template: str, system: str | None) -> tuple[str, list[int], int]:
    chat = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": ""}]
    without, whole = (render(chat, tokenizer, g) for g in (False, True))
    if not whole.startswith(without):
        raise UserError("the chat template's generation prompt changes what stands before it: no boundary to mask at")
    header = whole[len(without) :]
    ids = tokenizer(header, add_special_tokens=False).input_ids
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise UserError(f"the chat template's generation prompt {header!r} does not begin with a special token")
    return header, ids, len(tokenizer(whole, add_special_tokens=False).input_ids)


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, places: Sequence[str] | None = None
) -> list[Tokens]:
    """Tokens of chats, of which every assistant turn's text and end-of-turn token are trained.

    A boundary is where the template's own generation prompt ends, so that training starts exactly where generation
    will; what the template puts after the end-of-turn token is not trained. One tokenisation serves all turns: special
    tokens part a text, so what precedes a generation prompt is tokenised as it would be alone, and the prompt's own
    tokens are compared.

    Raises:
        UserError: the template does not continue its own generation prompt, changes an answer, or ends no turn with
            <|im_end|>.
    """

    def wrong(place: str, what: str) -> UserError:
        return UserError(f"{place}{': ' if place else ''}the chat template {what}")

    texts = [render(chat, tokenizer) for chat in chats]
    end, special = tokenizer.convert_tokens_to_ids(END_OF_TURN), set(tokenizer.all_special_ids)
    result = []
    for chat, text, encoding, place in zip(
        chats, texts, _encode_batch(texts, tokenizer), places or [""] * len(chats), strict=True
    ):
        ids, trained = encoding.ids, []
        header, header_ids, _ = generation_prompt(chat, tokenizer)
        for i, turn in enumerate(chat):
            if turn["role"] != "assistant":
                continue
            prompt = render(chat[:i], tokenizer, True)
            if not (text.startswith(prompt) and prompt.endswith(header)):
                raise wrong(place, "does not continue its own generation prompt: no boundary to mask at")
            if not text.startswith(turn["content"], len(prompt)):
                raise wrong(place, "changes the answer it is given")
            start = encoding.char_to_token(len(prompt))
            if start is None or ids[start - len(header_ids) : start] != header_ids:
                raise wrong(place, "lets a token reach from its generation prompt into the answer: no boundary")
            try:
                stop = ids.index(end, start) + 1
            except ValueError:
                raise wrong(place, f"does not end the answer with {END_OF_TURN}") from None
            if not special.isdisjoint(ids[start : stop - 1]):
                raise wrong(place, f"does not end the answer with {END_OF_TURN}")
            trained += [start, stop]
        result.append(Tokens(np.array(ids, np.uint32), trained, trained[0]))
    return result


def _encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """On all cores; the switch is put back, for the library warns of every later fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if before is None else before


def cuttable(chat: Chat, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens `truncate_prompt` may take from the first question."""
    return max(0, tokens.boundary - generation_prompt(chat, tokenizer)[2] - KEPT_QUESTION)


def cut_question(chat: Chat, tokens: Tokens, limit: int, tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """The chat with the end of its first question cut off so that it has at most `limit` tokens; None if it cannot.

    The end, because the instruction comes first and its material after it. Not inside a character (a token may be a
    piece of one) nor between a letter and its marks.
    """
    first = next(i for i, turn in enumerate(chat) if turn["role"] == "user")
    text = chat[first]["content"]
    whole = _encode_batch([text], tokenizer)[0]
    excess = len(tokens.ids) - limit
    if excess > cuttable(chat, tokens, tokenizer):
        return None
    while True:
        stop = whole.token_to_chars(len(whole.ids) - excess)[0]
        while stop and unicodedata.category(text[stop])[0] == "M":
            stop -= 1
        short = [*chat[:first], chat[first] | {"content": text[:stop].rstrip()}, *chat[first + 1 :]]
        cut = encode([short], tokenizer)[0]
        if len(cut.ids) <= limit:
            return cut
        excess += len(cut.ids) - limit  # the cut fell inside a merged token


def split_row(tokens: Tokens, limit: int) -> list[Tokens]:
    """The row as stretches of `limit` tokens, each after half a stretch of what precedes it; every trained token is
    trained in one of them, and an answer's end in the last."""
    mask, pieces = trained_mask(len(tokens.ids), tokens.trained), []
    for start, fresh, stop in stretches(len(tokens.ids), limit):
        trained = mask[start:stop].copy()
        trained[: fresh - start] = False
        if trained.any():
            edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()
            pieces.append(Tokens(tokens.ids[start:stop], edges, edges[0]))
    return pieces


def stretches(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Where each stretch starts, where what no earlier one has begins, and where it stops."""
    fresh = 0
    while fresh < length:
        start = max(0, min(fresh - limit // 2, length - limit)) if fresh else 0
        yield start, fresh, (fresh := min(start + limit, length))


def truncate(tokens: Tokens, limit: int) -> list[Tokens]:
    """The first `limit` tokens; nothing if none of them is trained."""
    trained = [min(edge, limit) for edge in tokens.trained]
    pairs = [p for p in zip(trained[::2], trained[1::2], strict=True) if p[0] < p[1]]
    return [Tokens(tokens.ids[:limit], [edge for p in pairs for edge in p], tokens.boundary)] if pairs else []
