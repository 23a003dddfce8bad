"""A row of a training set -> a chat -> masked tokens, in the model's own chat template."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from ouro.data.batches import trained_mask
from ouro.data.marks import INVERSE_MARKS, MARKS, speaks_of_training
from ouro.data.thai import GARBLED, normalise, trim
from ouro.data.thoughts import close_thought
from ouro.files import UserError, from_json
from ouro.settings import Settings

import numpy as np
from jinja2 import TemplateError
from tokenizers import Encoding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"  # the published tokenizer's eos is <|endoftext|>, but this is what ends an answer
PATIENCE = 5  # seconds of processor time for a chat template and a chat; Ouro's takes 0.0001
ROOM = 512 << 20  # bytes of memory for the same
KEPT_QUESTION = 32  # tokens of a question that truncate_prompt leaves at least
SPEAKERS = {"human": "user", "gpt": "assistant"}  # the names of ShareGPT's roles
Chat = list[dict]  # turns of role and content; an answer that is not trained has `train: False`
MARKS_AS_TEXT = {"0": 0, "0.0": 0, "false": 0, "no": 0, "1": 1, "1.0": 1, "true": 1, "yes": 1}  # as cells of CSV are
MARKS_AS_TEXT |= {"": None, "user": None}  # NeMo's mask: User names the turns that are never trained
UNTRAINED = f"marked not to be trained ({', '.join([*MARKS, *INVERSE_MARKS])})"


def is_trained(marked: dict, where: str) -> bool:
    """What a row or turn says of itself, or its metadata do, however deep, as objects or as JSON in a text. Raises
    UserError where that is neither yes nor no."""
    trained, objects = True, [(marked, where, False)]
    for found, place, facts in objects:
        for key, value in found.items():
            kind = speaks_of_training(key)
            if kind in ("mark", "inverse"):
                value = MARKS_AS_TEXT.get(value.strip().lower(), value) if isinstance(value, str) else value
                if value not in (None, 0, 1):  # False and True are among them
                    raise UserError(f"{place}, {key}: expected 0, 1, true or false, found {value!r}: all of an answer "
                                    "is trained, or nothing")  # fmt: skip
                trained &= value != (kind == "inverse")
            elif facts or kind == "facts":
                if kind == "facts" and isinstance(value, str) and value.lstrip().startswith("{"):
                    with suppress(ValueError, RecursionError):  # Parquet's metadata are often JSON
                        value = from_json(value)
                if isinstance(value, dict):
                    objects.append((value, f"{place}, {key}", True))
    return trained


def to_chat(row: dict, entry: dict, settings: Settings, where: str = "row") -> tuple[Chat | None, str]:
    """One row as a chat that ends with an assistant turn, or None and why not.
    Raises UserError: a column holds something other than text, or `messages` is not a list of turns."""

    def clean(value: object, place: str) -> str:
        if not isinstance(value, str | None):
            raise UserError(f"{place}: expected text, found {type(value).__name__}")
        text = (normalise(value or "") if settings.normalise_thai else value or "").strip()
        return text if trim(text) else ""

    if not is_trained(row, where):
        return None, UNTRAINED
    if column := entry.get("messages"):
        chat, why = turns_of(row[column] or [], column, where, clean)
    else:
        columns = [*entry["prompt"], entry["completion"], *([entry["answer"]] if "answer" in entry else [])]
        texts = {column: clean(row.get(column), f"{where}, column {column}") for column in columns}
        chat, why = pair_of(texts, entry)
    if chat is None:
        return None, why
    if settings.system_prompt and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": settings.system_prompt})
    if any(GARBLED.search(turn["content"]) for turn in chat):
        return None, "garbled (U+FFFD or mojibake)"
    return chat, ""


def pair_of(texts: dict[str, str], entry: dict) -> tuple[Chat | None, str]:
    """Question and answer from the texts of a row's columns, or None and why not."""
    asked, answer = [texts[column] for column in entry["prompt"]], texts[entry["completion"]]
    if not asked[0] or not answer:
        return None, f"empty ({entry['completion'] if asked[0] else entry['prompt'][0]})"
    if entry.get("think"):
        answer = close_thought(answer, texts.get(entry.get("answer"), ""))
        if answer is None:
            return None, f"unbalanced <think> ({entry['completion']})"
    question = "\n\n".join(filter(None, asked))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], ""


def turn_keys(turn: dict) -> tuple[str, str]:
    """The keys of a turn's role and text: those of OpenAI or of ShareGPT."""
    return ("from", "value") if turn.get("role") is None and "from" in turn else ("role", "content")


def turns_of(turns: object, column: str, where: str, clean: Callable[[object, str], str]) -> tuple[Chat | None, str]:
    """The turns up to the last answer, their contents cleaned; or None and why not."""
    if not isinstance(turns, list):
        raise UserError(f"{where}, column {column}: expected a list of turns, found {type(turns).__name__}")
    chat = []
    for number, turn in enumerate(turns, 1):
        place, role = f"{where}, column {column}, turn {number}", None
        if isinstance(turn, dict):
            speaker, text = turn_keys(turn)
            role = SPEAKERS.get(str(turn.get(speaker)), turn.get(speaker))
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{place}: expected {{role: system, user or assistant, content: text}}, or {{from: system, "
                            f"human or gpt, value: text}}, found {turn!r}")  # fmt: skip
        content = clean(turn.get(text), f"{place}, {text}")
        if role != "system" or content:
            mark = {} if is_trained(turn, place) or role != "assistant" else {"train": False}
            chat.append({"role": role, "content": content} | mark)
    answered = any(turn["role"] == "assistant" for turn in chat)
    while chat and (chat[-1]["role"] != "assistant" or "train" in chat[-1]):
        chat.pop()  # what follows the last answer that is trained
    if answered and not chat:
        return None, UNTRAINED
    spoken = chat[1:] if chat and chat[0]["role"] == "system" else chat
    if not spoken or not all(turn["content"] for turn in spoken):
        return None, f"empty ({column})"
    if [turn["role"] for turn in spoken] != ["user", "assistant"] * (len(spoken) // 2):
        return None, "turns of user and assistant do not alternate"
    return chat, ""


def chat_digest(chat: Chat) -> bytes:
    said = [[turn["role"], turn["content"]] for turn in chat]
    return hashlib.blake2b(json.dumps(said, ensure_ascii=False).encode(), digest_size=16).digest()


def question_of(chat: Chat) -> Chat:
    """All that comes before the last answer, without the system turn."""
    return [turn for turn in chat[:-1] if turn["role"] != "system"]


def in_hash_share(row: dict, chat: Chat, rule: dict) -> bool:
    """Whether a hash split holds this row out: by the column it names, or the question where there is none or it is
    empty."""
    value = row.get(rule["hash"])
    text = value if isinstance(value, str) and value.strip() else question_of(chat)[0]["content"]
    return int.from_bytes(hashlib.sha256(normalise(text).strip().encode()).digest()[:8]) < rule["share"] * 2**64


@dataclass
class Tokens:
    """A tokenised chat: ids, and each answer's trained stretch [start, stop, start, stop, …]; an empty one if it is
    marked not to be trained."""

    ids: np.ndarray
    trained: list[int]


def chat_text(chat: Chat, tokenizer: PreTrainedTokenizerBase, generation: bool = False) -> str:
    """The chat as the model reads it; with `generation`, up to where an answer begins.
    Raises UserError: the template, which is a program of the model's folder, refuses the chat, fails, or does not end.
    """
    try:
        with at_most(PATIENCE, ROOM):
            return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError,
            MemoryError, TimeoutError) as error:  # fmt: skip
        why = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the chat template refuses a chat: {why}") from None


@contextmanager
def at_most(seconds: float, memory: int) -> Iterator[None]:
    """Raises TimeoutError where a block computes longer, MemoryError where it takes more bytes. Other threads than the
    first get no signals: there it may. While the process is stopped, or others have the cores, no time is counted."""

    def late(*_) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", "rb") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *(x for x in limits if x >= 0)]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def prompt_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat's tokens up to where an answer begins. Special tokens are the template's alone: one that is typed, or
    stands in a benchmark's text, is read as text and ends no turn."""
    names = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    special = "|".join(map(re.escape, names)) or "(?!)"
    said = "".join(turn["content"] for turn in chat)
    typed = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in said)  # marks them while the template runs
    marked = [turn | {"content": re.sub(f"({special})", rf"{typed}\1", turn["content"])} for turn in chat]
    if marked == chat:
        return tokenizer(chat_text(chat, tokenizer, generation=True), add_special_tokens=False).input_ids
    parts = re.split(f"(?<!{typed})({special})", chat_text(marked, tokenizer, generation=True))
    ids = []
    for text, own in zip_longest(parts[::2], parts[1::2]):
        ids += text_tokens(re.sub(f"{typed}({special})", r"\1", text), tokenizer)
        ids += [tokenizer.convert_tokens_to_ids(own)] if own else []
    return ids


def text_tokens(text: str | list[str], tokenizer: PreTrainedTokenizerBase, begin: bool = False) -> list:
    """The tokens of a text, or of each; what looks like a special token in it is text. begin: the tokenizer may put
    its own before it."""
    ids = tokenizer(text, add_special_tokens=begin, split_special_tokens=True).input_ids
    tokenizer.backend_tokenizer.encode_special_tokens = False  # it would hold for whoever comes next
    return ids


def answer_header(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], int]:
    """What the template puts before an answer, as text and as tokens; and the number of tokens of a prompt with this
    chat's system turn and an empty question."""
    system = [turn["content"] for turn in chat[:1] if turn["role"] == "system"]
    return _answer_header(tokenizer, tokenizer.chat_template, *system)


@lru_cache(maxsize=64)
def _answer_header(
    tokenizer: PreTrainedTokenizerBase, template: str, system: str | None = None
) -> tuple[str, list[int], int]:
    chat = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": ""}]
    without, whole = chat_text(chat, tokenizer), chat_text(chat, tokenizer, generation=True)
    if not whole.startswith(without):
        raise UserError("the chat template's generation prompt changes what stands before it: no boundary to mask at")
    header = whole[len(without) :]
    ids = tokenizer(header, add_special_tokens=False).input_ids
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise UserError(f"the chat template's generation prompt {header!r} does not begin with a special token")
    return header, ids, len(tokenizer(whole, add_special_tokens=False).input_ids)


def encode_chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, places: Sequence[str] = ()) -> list[Tokens]:
    """Tokens of chats, of which every assistant turn's text and end-of-turn token are trained.

    A chat is tokenised once, for all its turns: the tokenizer first splits a text at special tokens, so what stands
    before a generation prompt has the tokens that it would have alone. `places` say where the chats stand, for errors.
    Raises UserError: the template does not continue its own generation prompt, changes an answer, or ends no turn with
    <|im_end|>."""
    texts = [chat_text(chat, tokenizer) for chat in chats]
    result = []
    for number, (chat, text, encoding) in enumerate(zip(chats, texts, encode_texts(texts, tokenizer), strict=True)):
        try:
            trained = trained_stretches(chat, text, encoding, tokenizer)
        except ValueError as error:
            raise UserError(f"{f'{places[number]}: ' if places else ''}the chat template {error}") from None
        result.append(Tokens(np.array(encoding.ids, np.uint32), trained))
    return result


def trained_stretches(chat: Chat, text: str, encoding: Encoding, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where each answer's tokens start, and where they stop behind its end-of-turn token.

    An answer starts where the template's own generation prompt ends, so that training starts exactly where generation
    will; what the template puts after the end-of-turn token is not trained.
    Raises ValueError: what is wrong with the template."""
    ids, (header, header_ids, _) = encoding.ids, answer_header(chat, tokenizer)
    end, special = tokenizer.convert_tokens_to_ids(END_OF_TURN), set(tokenizer.all_special_ids)
    trained = []
    for i, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        prompt = chat_text(chat[:i], tokenizer, generation=True)
        if not (text.startswith(prompt) and prompt.endswith(header)):
            raise ValueError("does not continue its own generation prompt: no boundary to mask at")
        if not text.startswith(turn["content"], len(prompt)):
            raise ValueError("changes the answer it is given")
        start = encoding.char_to_token(len(prompt))
        if start is None or ids[start - len(header_ids) : start] != header_ids:
            raise ValueError("lets a token reach from its generation prompt into the answer: no boundary")
        stop = next((at for at in range(start, len(ids)) if ids[at] in special), None)
        if stop is None or ids[stop] != end:
            raise ValueError(f"does not end the answer with {END_OF_TURN}")
        trained += [start, start if "train" in turn else stop + 1]
    return trained


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """The texts' tokens, made on all cores; if the switch were left on, the library would warn at every later fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if before is None else before


def cuttable(chat: Chat, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens `truncate_prompt` may take from the first question."""
    return max(0, tokens.trained[0] - answer_header(chat, tokenizer)[2] - KEPT_QUESTION)


def cut_question(chat: Chat, tokens: Tokens, limit: int, tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """The chat with the end of its first question cut off so that it has at most `limit` tokens; None if it cannot.

    The end, because the instruction comes first and its material after it. Not inside a character (a token may be a
    piece of one) nor between a letter and its marks."""
    first = next(i for i, turn in enumerate(chat) if turn["role"] == "user")
    text = chat[first]["content"]
    whole = encode_texts([text], tokenizer)[0]
    excess = len(tokens.ids) - limit
    if excess > cuttable(chat, tokens, tokenizer):
        return None
    while True:
        stop = whole.token_to_chars(len(whole.ids) - excess)[0]
        while stop and unicodedata.category(text[stop])[0] == "M":
            stop -= 1
        short = [*chat[:first], chat[first] | {"content": text[:stop].rstrip()}, *chat[first + 1 :]]
        cut = encode_chats([short], tokenizer)[0]
        if len(cut.ids) <= limit:
            return cut
        excess += len(cut.ids) - limit  # the cut fell inside a merged token


def split_row(tokens: Tokens, limit: int) -> list[Tokens]:
    """The row as pieces of at most `limit` tokens. A later piece begins with half a piece of what stands before it,
    untrained: every trained token is trained in one piece, and an answer's end in the last."""
    length, mask, pieces = len(tokens.ids), trained_mask(len(tokens.ids), tokens.trained), []
    fresh = 0  # the first token that is in no piece yet
    while fresh < length:
        start = max(0, min(fresh - limit // 2, length - limit)) if fresh else 0
        stop = min(start + limit, length)
        trained = mask[start:stop] & (np.arange(start, stop) >= fresh)
        if trained.any():
            edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()
            pieces.append(Tokens(tokens.ids[start:stop], edges))
        fresh = stop
    return pieces


def first_tokens(tokens: Tokens, limit: int) -> list[Tokens]:
    """The first `limit` tokens; nothing if none of them is trained."""
    pairs = zip(tokens.trained[::2], tokens.trained[1::2], strict=True)
    trained = [edge for start, stop in pairs if start < min(stop, limit) for edge in (start, min(stop, limit))]
    return [Tokens(tokens.ids[:limit], trained)] if trained else []
