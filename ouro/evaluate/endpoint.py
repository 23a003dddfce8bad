"""A model on a server, asked through OpenAI's /chat/completions: the judge of mt_bench_thai, or a model under test.

The judge is named by JUDGE_BASE_URL and JUDGE_MODEL, a served model by --endpoint and, where the server has several, by
ENDPOINT_MODEL. Keys are read from JUDGE_API_KEY and ENDPOINT_API_KEY alone, are shown in no message and saved nowhere.

The package openai sends the requests, and repeats them after 408, 409, 429, 5xx (not 501) and broken connections, as
late as Retry-After says. Added here: an answer without a reply counts as a broken connection. Where a server refuses an
option of a request (temperature, max_tokens, a system turn) the request is sent without it, or with it under the name
that newer servers use (OTHERWISE), and so are all later ones. A request that a server refuses, though it answers a
harmless one, is left out. A spent quota, or any other status, ends the command.
"""

import contextlib
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import quote

from ouro.data.chats import prompt_tokens
from ouro.data.thoughts import begun_by, marks_thought, with_beginning
from ouro.evaluate.benchmarks import digest
from ouro.files import HIDDEN, UserError, message, printable

import httpx2
from tqdm import tqdm

AS_PUBLISHED = {"temperature": 0.0, "max_tokens": 2048}  # of a judgement
ROOM_TO_THINK = 16_384  # max_tokens of judgements, from the first on that was cut at the published limit
# An option that a server refuses: the name under which it may want it, or None to leave it out.
OTHERWISE = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None, "system": None}
REFUSALS = (400, 403, 413, 422)  # statuses that may be about one request alone: a content filter, its length
# Keys in a server's list of models that are about its offer or state, and change while the model stays the same.
OFFER = re.compile("pric|descri|provider|limit|param|deprecat|expir|link|stat(?:e|us)")
PAUSE = 1.1  # seconds between two readings of a server's list: what has changed by then does not identify a model
RETRIES = 8  # of one request, over 40 seconds unless Retry-After asks for more
DEPTHS = re.compile(r":(?:(1)-)?([1-9])$")  # at the end of a served model's name: ":4", or ":1-4"
LONGEST_NAME = 200  # characters of a served model's name
# Values of finish_reason. "none" stands for null: the server does not know that the reply ended, so it counts as cut.
AT_LIMIT, FILTERED = ("length", "max_tokens", "model_length", "none"), ("content_filter", "safety", "refusal")
BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "canceled", "failed", "timeout")

Messages = list[dict]  # [{"role": …, "content": …}, …]
HARMLESS = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Say: Rating: [[5]]"}]  # fmt: skip
Done = Callable[[int, str], None]  # called with each reply as it ends: the conversation's number, the text
Chat = Callable[[list[Messages], Done], None]  # makes the replies to conversations


class Reply(str):
    """A reply's text, and in `end` how it ended: "" by itself; "cut" at the limit of tokens; "refused: …", without a
    text.

    A cut may leave a piece of a character (U+FFFD) at the end of the text, which is taken off."""

    end: str

    def __new__(cls, text: str, end: str | None = None):
        end = getattr(text, "end", "") if end is None else end
        reply = super().__new__(cls, text.rstrip("\ufffd") if end == "cut" else text)
        reply.end = end
        return reply


class Refused(UserError):
    """A server refuses one request, perhaps for what is in it. said: the server's whole answer."""

    said = ""


class NotListed(UserError):
    """A server has no list of its models, or does not show it to this key."""


class NotAsked(Exception):
    """A request was not sent, since another one has failed for good."""


@dataclass
class Server:
    """A model on a server. Called with conversations, it is a `Chat`."""

    kind: str  # "judge" or "endpoint"
    url: str
    model: str
    key: str = field(repr=False)  # empty for a server without keys
    threads: int  # requests at once
    options: dict  # of each request: temperature, max_tokens, perhaps seed
    system: str | None = None
    price: tuple[float, float] | None = None  # dollars per million tokens in, out

    def __post_init__(self):
        self.stop, self.lock = threading.Event(), threading.Lock()
        # The options that this server accepts, as far as it is known; system: it accepts a system turn.
        self.wanted = self.options | {"system": True}
        from ouro.evaluate.http import connect  # not before a server is asked: see there

        self.client = connect(self)

    def complete(self, messages: Messages) -> Reply:
        """The reply to a conversation. A judgement that was cut is asked for once more, with ROOM_TO_THINK, and so are
        all later ones from the start.
        Raises UserError: the server answers with a status that no repetition changes, its quota is spent, or the last
        repetition failed, too; Refused: it refuses these messages, and answers others; NotAsked: see there."""
        try:
            reply = self._ask(messages)
        except Refused:
            self.check()
            raise
        limit = next(name for name in self.wanted if name.startswith("max_"))
        if reply.end and self.kind == "judge" and self.wanted[limit] < ROOM_TO_THINK:
            with contextlib.suppress(Refused):
                reply = self._ask(messages, **{limit: ROOM_TO_THINK})
        return reply

    def _ask(self, messages: Messages, **changes) -> Reply:
        """The reply to a conversation, errors as `complete`. Where the server refuses an option, the request is
        repeated without it; if it is answered then, later requests go without it from the start."""
        messages = [{"role": "system", "content": self.system}] * (self.system is not None) + messages
        before = self.wanted
        wanted = before | changes
        while True:
            try:
                with self._errors():
                    options = {name: value for name, value in wanted.items() if name != "system"}
                    sent = messages if "system" in wanted else without_system(messages)
                    answer = self.client.chat.completions.create(model=self.model, messages=sent, **options)
                break
            except Refused as error:
                unwanted = (name for name in OTHERWISE if name in wanted and re.search(rf"(?i)\b{name}\b", error.said))
                if (name := next(unwanted, None)) is None:
                    raise
                instead = {OTHERWISE[name]: wanted[name]} if OTHERWISE[name] else {}
                wanted = {key: value for key, value in wanted.items() if key != name} | instead
        with self.lock:
            if wanted not in (before, self.wanted):
                self.wanted = wanted
                self.tell(f"{self.kind} {self.model} is asked as it wants: {wanted}")
        return self._reply(answer.choices[0])

    def _reply(self, choice) -> Reply:
        """The reply in a choice of the server's answer. Raises Refused: it is the refusal of a filter or of the
        model."""
        message, finish = choice.message, finish_of(choice.to_dict(warnings=False))
        text = text_of(message.content)
        refusal = getattr(message, "refusal", None) or text_of(message.content, "refusal")
        if finish in FILTERED or refusal and not text.strip():
            raise self.error(f"its reply is a refusal: {beginning(str(refusal or finish))}", 400)
        end = "cut" if finish in AT_LIMIT else ""
        thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        thought = thought or text_of(message.content, "thinking")
        if thought and not text.strip():  # of a judge the thought may hold its rating; else there is no answer
            text = str(thought) if self.kind == "judge" and not end else f"<think>\n{thought}"
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent on, nor saved
        return Reply(self.hide(text), end)

    def models(self) -> dict[str, dict]:
        """The server's list of its models, {name: entry}. Errors as `complete`, or NotListed."""
        with self._errors():
            return {model.id: model.model_dump() for model in self.client.models.list()}

    @cached_property
    def identity(self) -> str:
        """A hash by which results know the model: of address, served name and entry in the server's list (root, length,
        …), without what changes between two readings or is about prices and states (OFFER).

        Errors as `complete`."""
        if told := self._told():
            time.sleep(PAUSE)
            told = [
                {name: value for name, value in one.items() if later.get(name) == value and not OFFER.search(name)}
                for one, later in zip(told, self._told(), strict=False)
            ]
        return digest([self.url, self.model, *(told or [{}])])[:12]

    def depths(self) -> list[int]:
        """The depths at which a vLLM server answers, by the name that `make serve` gave the model: RUN:4, or RUN:1-4
        where each request names its depth. Empty where the name has none. Errors as `complete`."""
        told, found = self._told(), DEPTHS.search(self.model)
        if found and told and told[0].get("owned_by") == "vllm":
            return [*range(int(found[1] or found[2]), int(found[2]) + 1)]
        return []

    def _told(self) -> list[dict]:
        """The entries in the server's list of the model and then of its base (`parent`). Where the list has one model,
        under another name, that one counts: llama.cpp answers to any name. Empty for a server without a list."""
        listed, told = {}, {}
        with contextlib.suppress(NotListed):
            listed = self.models()
        name = self.model if self.model in listed or len(listed) != 1 else next(iter(listed))
        while name in listed and name not in told:
            told[name] = listed[name]
            name = str(told[name].get("parent"))
        return [*told.values()]

    def check(self) -> None:
        """Sends a small request, so that a wrong address, key or model shows before hours of generation.
        Raises UserError: it is not answered."""
        try:
            self._ask(HARMLESS[self.system is not None :])
        except Refused as error:
            raise UserError(str(error)) from None

    def __call__(self, conversations: list[Messages], done: Done) -> None:
        """Asks for the replies to all conversations, several at a time, and calls `done` with each as it arrives.
        Raises UserError: as `complete`, or raised by `done`; no further requests are sent then."""
        self.stop.clear()

        def one(number: int, messages: Messages) -> None:
            try:
                try:
                    reply = self.complete(messages)
                except Refused as error:
                    reply = Reply("", f"refused: {error}")
                    self.tell(f"left out: {error}")
                done(number, reply)
            except UserError:
                self.stop.set()
                raise

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for finished in as_completed([pool.submit(one, *job) for job in enumerate(conversations)]):
                    with contextlib.suppress(NotAsked):
                        finished.result()
            except BaseException:
                self.stop.set()  # requests under way are paid for: the pool waits for their replies
                raise

    @contextlib.contextmanager
    def _errors(self):
        """Raises the errors of the package openai as UserErrors."""
        from ouro.evaluate.http import BrokenOff, openai

        try:
            yield
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            problem = self.said(error.response) if status else repr(error.__cause__)
            if wait := status and error.response.headers.get("Retry-After"):
                problem += f"; Retry-After: {wait[:40]}"
            if again := int(error.request.headers["x-stainless-retry-count"]):
                problem += f"; given up after {again + 1} attempts"
            if status in (403, 404, 405, 501) and error.request.url.path.endswith("/models"):
                raise NotListed(f"{self.url} does not list its models: {problem}; set ENDPOINT_MODEL") from None
            if isinstance(error.__cause__, BrokenOff):  # of this request alone, if a harmless one is answered
                raise self.error(problem, REFUSALS[0]) from None
            raise self.error(problem, status, error.response.text if status else "") from None

    def error(self, problem: str, status: int | None = None, said: str = "") -> UserError:
        """The error for a failed request, without the key: a Refused if its status is one of REFUSALS, else a
        UserError."""
        prefix = self.kind.upper()
        hint = {
            401: f"is {prefix}_API_KEY set, and the key for this server?",
            403: f"may {prefix}_API_KEY use {self.model}?",
            404: f"is there a model {self.model!r} ({prefix}_MODEL), and do {self.url}/chat/completions exist?",
        }.get(status)
        kind = Refused if status in REFUSALS else UserError
        told = f"{self.kind} {self.model} at {self.url}: {problem}"
        error = kind(*(message(self.hide(line)) for line in (told, hint) if line))
        error.said = said
        return error

    def said(self, response: httpx2.Response) -> str:
        """The status and the beginning of a server's answer, without the key, which some servers repeat."""
        text = response.text
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            text = str(response.json()["error"]["message"])
        return f"{response.status_code}: {beginning(self.hide(text)) or 'an empty answer'}"

    def hide(self, text: str) -> str:
        """A reply or message with *** for the key, also where JSON or an address writes it with escapes."""
        forms = (self.key, self.key.replace("/", "\\/"), quote(self.key, safe="")) if len(self.key) >= HIDDEN else ()
        for form in forms:
            text = text.replace(form, "***")
        return text

    def tell(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        tqdm.write(message(self.hide(text)), sys.stderr)


def beginning(text: str) -> str:
    """The first 300 characters of a text, on one line, for messages: those of a server may look like two."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def finish_of(choice: dict) -> str:
    """A choice's finish_reason in small letters; "none" for null; "" where the answer does not have it."""
    return str(choice["finish_reason"]).lower() if "finish_reason" in choice else ""


def text_of(content: str | list | None, kind: str = "text") -> str:
    """The text of a reply. Some servers send it in parts of several types: then what the parts of type `kind` hold."""
    if not isinstance(content, list):
        return (content or "") if kind == "text" else ""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return "".join(text_of(part[kind]) for part in parts if part.get("type") in (kind, f"output_{kind}"))


def without_system(messages: Messages) -> Messages:
    """The conversation with its system turn put before the text of the first user turn."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _server(kind: str, url: str, model: str, **rest) -> Server:
    """The server at an address, with its key from the environment. Raises UserError: address, key or name is
    malformed."""
    name = f"{kind.upper()}_API_KEY"
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{name}: not a key: it holds a space or another character that no key has")
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise UserError(f"{kind}: not an address: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        like = "https://host/v1, what stands before /chat/completions"
        raise UserError(f"{kind}: the address must be like {like}, with the key in {name} and not in the address")
    if key and parsed.scheme == "http" and parsed.host not in ("localhost", "127.0.0.1", "::1"):
        print(f"warning: {name} is sent to {parsed.host} by http, where others on the way can read it", file=sys.stderr)
    path = parsed.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return Server(kind, str(parsed.copy_with(path=path)), _name(model.strip(), kind), key, **rest)


def _name(model: str, kind: str) -> str:
    """The name of a model, which is printed, and after which results are named.
    Raises UserError: it is too long, or holds what cannot be printed."""
    if len(model) > LONGEST_NAME or printable(model) != " ".join(model.split()):
        raise UserError(f"{kind}: not a model's name: {beginning(model)!r}")
    return model


def find_judge(choice: str = "api") -> Server | None:
    """The judge that the environment names; None for `none`.
    Raises UserError: JUDGE_BASE_URL or JUDGE_MODEL is not set, or one of them, the key or the price is malformed."""
    if choice == "none":
        return None
    url, model = (os.environ.get(name, "").strip() for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"))
    if not url or not model:
        lacks = f"mt_bench_thai is rated by a judge, and {'JUDGE_MODEL' if url else 'JUDGE_BASE_URL'} is not set"
        remedy = "export JUDGE_BASE_URL=https://host/v1, JUDGE_MODEL and JUDGE_API_KEY, or use --judge none"
        raise UserError(f"{lacks}: {remedy}")
    price, given = None, os.environ.get("JUDGE_PRICE", "").strip()
    if given:
        try:
            price = tuple(float(part) for part in given.split(","))
        except ValueError:
            price = ()
        if len(price) != 2 or not all(0 <= part < math.inf for part in price):
            raise UserError(f"JUDGE_PRICE must be dollars per million tokens in and out, like 2.5,10, got {given!r}")
    return _server("judge", url, model, threads=8, options=AS_PUBLISHED, price=price)


def find_endpoint(
    url: str, max_tokens: int, temperature: float, seed: int, system: str | None, depth: int | None = None
) -> Server:
    """A served model under test: ENDPOINT_MODEL, or the only one in the server's list. depth: sent with each request,
    for a server that answers at several depths.
    Raises UserError: not an address, no answer, or several models and none chosen."""
    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    if depth:
        options["extra_body"] = {"vllm_xargs": {"total_ut_steps": depth}}
    name = os.environ.get("ENDPOINT_MODEL", "")
    server = _server("endpoint", url, name, threads=64, options=options, system=system)
    if not server.model:
        names = list(server.models())
        if len(names) != 1:
            served = beginning(", ".join(names)) or "no model"
            raise UserError(f"endpoint {server.url} serves {served}: set ENDPOINT_MODEL to one")
        server.model = _name(names[0], "endpoint")
    return server


# (tokens of prompts, a function that is called with the number and the tokens of each reply as it ends)
Generate = Callable[[list[list[int]], Callable[[int, list[int]], None]], None]


def local_chat(tokenizer, generate: Generate, system: str | None, limit: float = math.inf) -> Chat:
    """The `Chat` of a model in this process. generate: makes the replies' tokens, at most `limit` of each, without the
    token that ends a reply. system: the text of a system turn before each conversation."""

    def chat(conversations: list[Messages], done: Done) -> None:
        first = [] if system is None else [{"role": "system", "content": system}]
        prompts = [prompt_tokens(first + conversation, tokenizer) for conversation in conversations]
        # Some templates begin the model's thought in the prompt. Without its beginning a thought that is cut would look
        # like an answer.
        begun = [begun_by(tokenizer.decode(ids[-16:])) for ids in prompts]
        # Special tokens are dropped from the text, but for the tags of thoughts, which may be special tokens, too.
        added = tokenizer.added_tokens_decoder.items()
        dropped = {number for number, token in added if token.special and not marks_thought(token.content)}

        def ended(number: int, tokens: list[int]) -> None:
            text = tokenizer.decode([token for token in tokens if token not in dropped])
            done(number, Reply(with_beginning(text, begun[number]), "cut" if len(tokens) >= limit else ""))

        generate(prompts, ended)

    return chat
