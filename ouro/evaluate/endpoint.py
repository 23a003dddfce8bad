"""A model behind OpenAI's /chat/completions: the judge of mt_bench_thai, or a served model under test.

The judge is named by JUDGE_BASE_URL and JUDGE_MODEL, a served model by --endpoint and, where the server has several, by
ENDPOINT_MODEL. Keys are read from JUDGE_API_KEY and ENDPOINT_API_KEY alone, are shown in no message and saved nowhere.

The package openai asks, and asks again after 408, 409, 429, 5xx and broken connections, as late as Retry-After says.
Added here: an answer without a reply counts as a broken connection; a server that wants its requests otherwise (no
temperature, max_completion_tokens, no system turn) says so once; a request that it refuses, while it answers a harmless
one, is left out; a spent quota or another status ends all of them.
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
ROOM_TO_THINK = 16_384  # tokens of a judgement, once one was cut at the published limit
OTHERWISE = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None, "system": None}
REFUSALS = (400, 403, 413, 422)  # statuses that may concern one request alone: a content filter, its length
# What a list tells of an offer or its state, which change while the model stays
OFFER = re.compile("pric|descri|provider|limit|param|deprecat|expir|link|stat(?:e|us)")
PAUSE = 1.1  # seconds between two looks at a server's list: what differs by then is a clock or a random number
RETRIES = 8  # of one request, over 40 seconds unless Retry-After asks for more
DEPTHS = re.compile(r":(?:(1)-)?([1-9])$")  # at the end of a served model's name
LONGEST_NAME = 200  # characters of a served model
# A choice's finish_reason: at the limit, by a filter, or not by itself. None: the server does not know that it ended.
AT_LIMIT, FILTERED = ("length", "max_tokens", "model_length", "none"), ("content_filter", "safety", "refusal")
BROKEN_OFF = ("error", "abort", "aborted", "cancelled", "canceled", "failed", "timeout")

Messages = list[dict]  # [{"role": …, "content": …}, …]
HARMLESS = [{"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Say: Rating: [[5]]"}]  # fmt: skip
Done = Callable[[int, str], None]  # told of each reply as it ends: the conversation's number, the text
Chat = Callable[[list[Messages], Done], None]  # replies to conversations


class Reply(str):
    """A text that knows how it ended: "" by itself, "cut" at its limit, or "refused: …", when there is no text.

    What a cut left of its last character (U+FFFD) is no part of it."""

    end: str

    def __new__(cls, text: str, end: str | None = None):
        end = getattr(text, "end", "") if end is None else end
        reply = super().__new__(cls, text.rstrip("\ufffd") if end == "cut" else text)
        reply.end = end
        return reply


class Refused(UserError):
    """A server's refusal of one request; `said` is all of its answer."""

    said = ""


class NotListed(UserError):
    """Of a server that has no list of its models, or shows it to other keys."""


class NotAsked(Exception):
    """Of a request that is not made any more, since another one failed for good."""


@dataclass
class Server:
    """A model behind OpenAI's /chat/completions; called with conversations, it is a `Chat`."""

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
        self.wanted = self.options | {"system": True}  # `options` as the server wants them; system: a turn of its own
        from ouro.evaluate.http import connect  # not before a server is asked: see there

        self.client = connect(self)

    def complete(self, messages: Messages) -> Reply:
        """The text that follows `messages`.
        Raises UserError: a status that asking again cannot change, a spent quota, or the last attempt failed too;
        Refused: of these messages alone; NotAsked: another request failed so before."""
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
        """As `complete`; options that the server does not want are left out, and remembered if it then answers."""
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
        message, finish = choice.message, finish_of(choice.to_dict(warnings=False))
        text = text_of(message.content)
        refusal = getattr(message, "refusal", None) or text_of(message.content, "refusal")
        if finish in FILTERED or refusal and not text.strip():
            raise self.error(f"its reply is a refusal: {beginning(str(refusal or finish))}", 400)
        end = "cut" if finish in AT_LIMIT else ""
        thought = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
        thought = thought or text_of(message.content, "thinking")
        if thought and not text.strip():  # a judge without tags has answered there; another thought has no answer
            text = str(thought) if self.kind == "judge" and not end else f"<think>\n{thought}"
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent on, nor saved
        return Reply(self.hide(text), end)

    def models(self) -> dict[str, dict]:
        """What the server tells of the models that it serves, by name. Errors as `complete`."""
        with self._errors():
            return {model.id: model.model_dump() for model in self.client.models.list()}

    @cached_property
    def identity(self) -> str:
        """A hash of address, served name, and what the server's list tells of the model: its root, its length, …

        Errors as `complete`."""
        if told := self._told():
            time.sleep(PAUSE)
            told = [
                {name: value for name, value in one.items() if later.get(name) == value and not OFFER.search(name)}
                for one, later in zip(told, self._told(), strict=False)
            ]
        return digest([self.url, self.model, *(told or [{}])])[:12]

    def depths(self) -> list[int]:
        """The depths that vLLM answers at, which the name that `make serve` gives tells: RUN:4, or RUN:1-4 where each
        request names one; none where it does not. Errors as `complete`."""
        told, found = self._told(), DEPTHS.search(self.model)
        if found and told and told[0].get("owned_by") == "vllm":
            return [*range(int(found[1] or found[2]), int(found[2]) + 1)]
        return []

    def _told(self) -> list[dict]:
        """The list's entry of the model, and of those it is an adapter of; where its name is not in the list, as with
        llama.cpp, which answers to any, that of the only one listed. None of a server without a list."""
        listed, told = {}, {}
        with contextlib.suppress(NotListed):
            listed = self.models()
        name = self.model if self.model in listed or len(listed) != 1 else next(iter(listed))
        while name in listed and name not in told:
            told[name] = listed[name]
            name = str(told[name].get("parent"))
        return [*told.values()]

    def check(self) -> None:
        """One small call: a wrong address, key or model is found before hours of generation. Errors as `complete`."""
        try:
            self._ask(HARMLESS[self.system is not None :])
        except Refused as error:
            raise UserError(str(error)) from None

    def __call__(self, conversations: list[Messages], done: Done) -> None:
        """Asks for the replies to all, several at a time; `done` is called as each is there.
        Raises UserError: as `complete`, or of `done`; then no more are asked for."""
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
                self.stop.set()  # what is under way will be paid for: the pool waits for it, and it is kept
                raise

    @contextlib.contextmanager
    def _errors(self):
        """openai's errors as UserErrors."""
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
        prefix = self.kind.upper()
        hint = {
            401: f"\nis {prefix}_API_KEY set, and the key for this server?",
            403: f"\nmay {prefix}_API_KEY use {self.model}?",
            404: f"\nis there a model {self.model!r} ({prefix}_MODEL), and do {self.url}/chat/completions exist?",
        }.get(status, "")
        kind = Refused if status in REFUSALS else UserError
        error = kind(message(self.hide(f"{self.kind} {self.model} at {self.url}: {problem}{hint}")))
        error.said = said
        return error

    def said(self, response: httpx2.Response) -> str:
        """The status and the beginning of what a server said, without the key, which some quote."""
        text = " ".join(response.text.split())
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            text = str(response.json()["error"]["message"])
        return f"{response.status_code}: {beginning(self.hide(text)) or 'an empty answer'}"

    def hide(self, text: str) -> str:
        """A reply or message without the key, as it is or as JSON and addresses may write it."""
        forms = (self.key, self.key.replace("/", "\\/"), quote(self.key, safe="")) if len(self.key) >= HIDDEN else ()
        for form in forms:
            text = text.replace(form, "***")
        return text

    def tell(self, text: str) -> None:
        """Shows a line beside the progress."""
        tqdm.write(message(self.hide(text)), sys.stderr)


def beginning(text: str) -> str:
    """What is shown of a text that may be long."""
    return text if len(text) <= 300 else f"{text[:300]}…"


def finish_of(choice: dict) -> str:
    """A choice's finish_reason in small letters, "none" for null; "" where the server does not tell at all."""
    return str(choice["finish_reason"]).lower() if "finish_reason" in choice else ""


def text_of(content: str | list | None, kind: str = "text") -> str:
    """The text of a reply, which some servers send in parts of several types, or what its parts of another one hold."""
    if not isinstance(content, list):
        return (content or "") if kind == "text" else ""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return "".join(text_of(part[kind]) for part in parts if part.get("type") in (kind, f"output_{kind}"))


def without_system(messages: Messages) -> Messages:
    """The system turn at the beginning of the user's first."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [user | {"content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _server(kind: str, url: str, model: str, **rest) -> Server:
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
    """A model's name: it is printed, and results are named by it."""
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
    """A served model to be tested: ENDPOINT_MODEL, or the only one in the server's list. depth: of each request, where
    it names one.
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


Generate = Callable[[list[list[int]], Callable[[int, list[int]], None]], None]  # (prompts' tokens, told of each reply)


def local_chat(tokenizer, generate: Generate, system: str | None, limit: float = math.inf) -> Chat:
    """Replies of a model in this process: `generate` makes up to `limit` new tokens from prompts' tokens, and tells of
    each reply, without the token that ended it."""

    def chat(conversations: list[Messages], done: Done) -> None:
        first = [] if system is None else [{"role": "system", "content": system}]
        prompts = [prompt_tokens(first + conversation, tokenizer) for conversation in conversations]
        # Some templates begin the thought themselves: a reply that is cut in it would look like an answer.
        begun = [begun_by(tokenizer.decode(ids[-16:])) for ids in prompts]
        # A thought's tags may be special tokens.
        added = tokenizer.added_tokens_decoder.items()
        dropped = {number for number, token in added if token.special and not marks_thought(token.content)}

        def ended(number: int, tokens: list[int]) -> None:
            text = tokenizer.decode([token for token in tokens if token not in dropped])
            done(number, Reply(with_beginning(text, begun[number]), "cut" if len(tokens) >= limit else ""))

        generate(prompts, ended)

    return chat
