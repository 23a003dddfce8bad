"""A model behind OpenAI's /chat/completions: the judge, or the model under test."""

import contextlib
import math
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

from ouro.files import UserError

import httpx
from tqdm import tqdm

MAX_NEW_TOKENS = 1024  # of a reply
TEMPERATURE, JUDGEMENT_TOKENS = 0.0, 2048  # of a judgement, as published
JUDGE_THREADS, ENDPOINT_THREADS = 8, 64  # requests at once
ATTEMPTS = 8  # of one request: at most two minutes of waiting in all
FIRST_WAIT, LONGEST_WAIT, TOO_LONG_A_WAIT = 1.0, 60.0, 300.0  # seconds; doubled from the first to the longest
TIMEOUT = httpx.Timeout(300, connect=10)  # seconds without a byte


class Stopped(Exception):
    """Of a request that is not made any more, since another one failed for good."""


Messages = list[dict]  # [{"role": …, "content": …}, …]
Done = Callable[[int, str], None]  # told of each reply as it ends: the conversation's number, the text
Chat = Callable[[list[Messages], Done], None]  # replies to conversations


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


@dataclass
class Server:
    """A model behind OpenAI's /chat/completions: the judge, or the model under test."""

    kind: str  # "judge" or "endpoint"
    url: str
    model: str
    key: str = field(repr=False)
    threads: int
    max_tokens: int
    temperature: float
    seed: int | None = None
    system: str | None = None
    price: tuple[float, float] | None = None  # dollars per million tokens in, out

    def __post_init__(self):
        try:
            self.client = httpx.Client(
                timeout=TIMEOUT,
                limits=httpx.Limits(max_connections=self.threads),
                headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            )
        except (ValueError, ImportError, OSError):  # whose messages may hold the proxy's password
            raise UserError(
                f"{self.kind}: a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) or certificate file (SSL_CERT_FILE) of the "
                "environment cannot be used"
            ) from None
        self.stop = threading.Event()

    def complete(self, messages: Messages) -> str:
        """The text that follows `messages`."""
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        body = {
            "model": self.model, "messages": messages, "temperature": self.temperature, "max_tokens": self.max_tokens,
            **({} if self.seed is None else {"seed": self.seed}),
        }  # fmt: skip

        def text(answer: dict) -> str:
            content = answer["choices"][0]["message"]["content"]
            if not isinstance(content, str | None):
                raise TypeError
            return (content or "").encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent on

        return self.request("POST", "/chat/completions", text, body)

    def __call__(self, conversations: list[Messages], done: Done) -> None:
        """Asks for the replies to all, several at a time; `done` is called as each is there.

        Raises:
            UserError: as `request`; then no more are asked for.
        """
        self.stop.clear()

        def one(number: int, messages: Messages) -> None:
            if self.stop.is_set():
                raise Stopped
            try:
                done(number, self.complete(messages))
            except UserError:
                self.stop.set()
                raise

        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for finished in as_completed([pool.submit(one, *job) for job in enumerate(conversations)]):
                    with contextlib.suppress(Stopped):
                        finished.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)  # what is under way will be paid for: it is waited for and kept
                raise

    def check(self) -> None:
        """One small call, so that a wrong address, key or model is found before hours of generation.

        Raises:
            UserError: as `request`.
        """
        self.complete([_user("Say: Rating: [[5]]")])

    def request(self, method: str, path: str, read: Callable, body: dict | None = None):
        """`read` of the answer's JSON. Waits and asks again where that can help: 408, 409, 425, 429, 5xx, no or a
        broken connection, an answer that is not what was asked for.

        Raises:
            UserError: any other status, or the last attempt failed too.
        """
        for attempt in range(1, ATTEMPTS + 1):
            told = None
            try:
                response = self.client.request(method, self.url + path, json=body)
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if response.status_code == 200:
                    try:
                        return read(response.json())
                    except (ValueError, LookupError, TypeError, RecursionError):
                        problem = f"not the JSON that was asked for: {self._said(response)}"
                else:
                    problem = f"{response.status_code}: {self._said(response)}"
                    told = _retry_after(response.headers.get("Retry-After"))
                    again = response.status_code in (408, 409, 425, 429) or response.status_code >= 500
                    if not again or "insufficient_quota" in response.text:
                        raise self.error(problem, response.status_code)
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1) if told is None else told
            if wait > TOO_LONG_A_WAIT:
                raise self.error(f"{problem}; it wants to be left alone for {wait:.0f} s")
            if attempt == ATTEMPTS:
                raise self.error(f"{problem}; given up after {ATTEMPTS} attempts")
            tqdm.write(
                self.hide(f"{self.kind}: {problem}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.0f} s"), sys.stderr
            )
            if self.stop.wait(wait):
                raise Stopped

    def _said(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            text = str(response.json()["error"]["message"])
        return (text if len(text) <= 300 else f"{text[:300]}…") or "an empty answer"

    def error(self, problem: str, status: int | None = None) -> UserError:
        prefix = self.kind.upper()
        hint = {
            401: f"\nis {prefix}_API_KEY set, and the key for this server?",
            403: f"\nmay {prefix}_API_KEY use {self.model}?",
            404: f"\nis there a model {self.model!r} ({prefix}_MODEL), and do {self.url}/chat/completions exist?",
        }.get(status, "")
        return UserError(self.hide(f"{self.kind} {self.model} at {self.url}: {problem}{hint}"))

    def hide(self, text: str) -> str:
        """Servers quote keys, and so may the library's errors."""
        return text.replace(self.key, "***") if self.key else text


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        seconds = float(value)
        return seconds if seconds >= 0 else None
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _server(kind: str, url: str, model: str, **rest) -> Server:
    name = f"{kind.upper()}_API_KEY"
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{name}: not a key: it holds a space or another character that no key has")
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL as error:
        raise UserError(f"{kind}: not an address: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query or parsed.fragment:
        raise UserError(
            f"{kind}: the address must be like https://host/v1, what stands before /chat/completions, with the key "
            f"in {name} and not in the address"
        )
    path = parsed.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return Server(kind, str(parsed.copy_with(path=path)), model.strip(), key, **rest)


def find_judge(choice: str = "api") -> Server | None:
    """The judge that the environment names; None for `none`.

    Raises:
        UserError: JUDGE_BASE_URL or JUDGE_MODEL is not set, or one of them, the key or the price is malformed.
    """
    if choice == "none":
        return None
    if choice != "api":
        raise UserError(f"--judge must be api or none, got {choice!r}")
    url, model = (os.environ.get(name, "").strip() for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"))
    if not url or not model:
        missing = ", ".join(n for n, v in (("JUDGE_BASE_URL", url), ("JUDGE_MODEL", model)) if not v)
        raise UserError(
            f"mt_bench_thai is rated by a judge; not set: {missing}. Export JUDGE_BASE_URL=https://host/v1, "
            "JUDGE_MODEL and JUDGE_API_KEY, or generate the replies alone with --judge none"
        )
    price, given = None, os.environ.get("JUDGE_PRICE", "").strip()
    if given:
        try:
            price = tuple(float(part) for part in given.split(","))
        except ValueError:
            price = ()
        if len(price) != 2 or not all(0 <= part < math.inf for part in price):
            raise UserError(f"JUDGE_PRICE must be dollars per million tokens in and out, like 2.5,10, got {given!r}")
    return _server("judge", url, model, threads=JUDGE_THREADS, max_tokens=JUDGEMENT_TOKENS,
                   temperature=TEMPERATURE, price=price)  # fmt: skip


def find_endpoint(
    url: str, max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0, seed: int | None = None,
    system: str | None = None
) -> Server:  # fmt: skip
    """A served model to be tested: ENDPOINT_MODEL, or the only one in the server's list.

    Raises:
        UserError: not an address, no answer, or several models and none chosen.
    """
    server = _server("endpoint", url, os.environ.get("ENDPOINT_MODEL", ""), threads=ENDPOINT_THREADS,
                     max_tokens=max_new_tokens, temperature=temperature, seed=seed, system=system)  # fmt: skip
    if not server.model:
        names = server.request("GET", "/models", lambda answer: [str(m["id"]) for m in answer["data"]])
        if len(names) != 1:
            raise UserError(f"endpoint {server.url} serves {', '.join(names) or 'no model'}: set ENDPOINT_MODEL to one")
        server.model = names[0]
    return server


def local_chat(
    tokenizer, generate: Callable[[list[list[int]], Callable[[int, list[int]], None]], None], system: str | None = None
) -> Chat:
    """Replies of a model in this process: `generate` makes new tokens from prompts' tokens, and tells of each reply."""

    def chat(conversations: list[Messages], done: Done) -> None:
        first = [{"role": "system", "content": system}] * (system is not None)
        texts = [
            tokenizer.apply_chat_template(first + conversation, tokenize=False, add_generation_prompt=True)
            for conversation in conversations
        ]
        prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        generate(prompts, lambda number, tokens: done(number, tokenizer.decode(tokens, skip_special_tokens=True)))

    return chat
