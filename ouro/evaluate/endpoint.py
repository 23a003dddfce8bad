"""A model behind OpenAI's /chat/completions: the judge of mt_bench_thai, or a served model under test.

The judge is named by JUDGE_BASE_URL and JUDGE_MODEL, a served model by --endpoint and, where the server has several, by
ENDPOINT_MODEL. Keys are read from JUDGE_API_KEY and ENDPOINT_API_KEY alone, are shown in no message and saved nowhere.

The package openai asks, and asks again after 408, 409, 429, 5xx and broken connections, as late as Retry-After says.
Added here: an answer without a reply counts as a broken connection; a spent quota or another status ends all of them.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from ouro.data.chats import prompt_tokens
from ouro.files import UserError

import httpx2
import openai
from tqdm import tqdm

AS_PUBLISHED = {"temperature": 0.0, "max_tokens": 2048}  # of a judgement
RETRIES = 8  # of one request, over 40 seconds unless Retry-After asks for more
TIMEOUT = openai.Timeout(300, connect=10)  # seconds without a byte

Messages = list[dict]  # [{"role": …, "content": …}, …]
Done = Callable[[int, str], None]  # told of each reply as it ends: the conversation's number, the text
Chat = Callable[[list[Messages], Done], None]  # replies to conversations


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
        self.stop = threading.Event()
        try:
            self.client = openai.OpenAI(
                base_url=self.url,
                api_key=self.key or "none",  # openai refuses an empty key; HttpClient does not send this one
                max_retries=RETRIES,
                default_headers={"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit},
                http_client=HttpClient(self),
            )
        except (ValueError, ImportError, OSError):  # their messages may hold a proxy's password
            raise UserError(
                f"{self.kind}: a proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY) or certificate file (SSL_CERT_FILE) of the "
                "environment cannot be used"
            ) from None

    def complete(self, messages: Messages) -> str:
        """The text that follows `messages`.

        Raises:
            UserError: a status that asking again cannot change, a spent quota, or the last attempt failed too.
            NotAsked: another request failed so before.
        """
        with self._errors():
            answer = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "system", "content": self.system}] * (self.system is not None) + messages,
                **self.options,
            )
        text = answer.choices[0].message.content or ""
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent on, nor saved

    def models(self) -> list[str]:
        """The names of the models that are served. Errors as `complete`."""
        with self._errors():
            return [model.id for model in self.client.models.list()]

    def check(self) -> None:
        """One small call: a wrong address, key or model is found before hours of generation. Errors as `complete`."""
        self.complete([{"role": "user", "content": "Say: Rating: [[5]]"}])

    def __call__(self, conversations: list[Messages], done: Done) -> None:
        """Asks for the replies to all, several at a time; `done` is called as each is there.

        Raises:
            UserError: as `complete`, or of `done`; then no more are asked for.
        """
        self.stop.clear()

        def one(number: int, messages: Messages) -> None:
            try:
                done(number, self.complete(messages))
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
        try:
            yield
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            problem = self.said(error.response) if status else repr(error.__cause__)
            if wait := status and error.response.headers.get("Retry-After"):
                problem += f"; Retry-After: {wait}"
            if again := int(error.request.headers["x-stainless-retry-count"]):
                problem += f"; given up after {again + 1} attempts"
            raise self.error(problem, status) from None

    def error(self, problem: str, status: int | None = None) -> UserError:
        prefix = self.kind.upper()
        hint = {
            401: f"\nis {prefix}_API_KEY set, and the key for this server?",
            403: f"\nmay {prefix}_API_KEY use {self.model}?",
            404: f"\nis there a model {self.model!r} ({prefix}_MODEL), and do {self.url}/chat/completions exist?",
        }.get(status, "")
        return UserError(self.hide(f"{self.kind} {self.model} at {self.url}: {problem}{hint}"))

    def said(self, response: httpx2.Response) -> str:
        """The status and the beginning of what a server said, without the key, which some quote."""
        text = " ".join(response.text.split())
        with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
            text = str(response.json()["error"]["message"])
        text = self.hide(text) or "an empty answer"
        return f"{response.status_code}: {text if len(text) <= 300 else f'{text[:300]}…'}"

    def hide(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


class HttpClient(openai.DefaultHttpxClient):
    """What openai sends its requests with: says what was wrong with an answer, and stops where waiting cannot help."""

    def __init__(self, server: Server):
        limits = httpx2.Limits(max_connections=server.threads)
        super().__init__(timeout=TIMEOUT, limits=limits, follow_redirects=False)
        self.server = server

    def send(self, request: httpx2.Request, **options) -> httpx2.Response:
        """One attempt. openai waits and makes another after an httpx2.RequestError and after some statuses."""
        server, problem = self.server, None
        if server.stop.is_set():
            raise NotAsked
        if not server.key:
            request.headers.pop("Authorization", None)
        try:
            response = super().send(request, **options)
            if response.is_success and not _is_whole(response):  # gateways report an overload with status 200, too
                raise httpx2.DecodingError(f"not the JSON that was asked for, {server.said(response)}")
            if "insufficient_quota" in response.text:
                raise server.error(server.said(response))
            if response.status_code in (408, 409, 429) or response.status_code >= 500:
                problem = server.said(response)
            return response
        except httpx2.RequestError as error:
            problem = repr(error)
            raise
        finally:
            if problem:
                attempt = int(request.headers["x-stainless-retry-count"]) + 1
                text = f"{server.kind}: {problem}; attempt {attempt} of {RETRIES + 1}"
                tqdm.write(server.hide(text), sys.stderr)


def _is_whole(response: httpx2.Response) -> bool:
    """Whether an answer has what was asked for: a reply, or a list of models."""
    try:
        answer = response.json()
        if response.request.url.path.endswith("/models"):
            return all(isinstance(model["id"], str) for model in answer["data"])
        return isinstance(answer["choices"][0]["message"]["content"], str | None)
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


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
    url, model = (os.environ.get(name, "").strip() for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"))
    if not url or not model:
        raise UserError(
            f"mt_bench_thai is rated by a judge, and {'JUDGE_MODEL' if url else 'JUDGE_BASE_URL'} is not set. Export "
            "JUDGE_BASE_URL=https://host/v1, JUDGE_MODEL and JUDGE_API_KEY, or generate replies alone with --judge none"
        )
    price, given = None, os.environ.get("JUDGE_PRICE", "").strip()
    if given:
        try:
            price = tuple(float(part) for part in given.split(","))
        except ValueError:
            price = ()
        if len(price) != 2 or not all(0 <= part < math.inf for part in price):
            raise UserError(f"JUDGE_PRICE must be dollars per million tokens in and out, like 2.5,10, got {given!r}")
    return _server("judge", url, model, threads=8, options=AS_PUBLISHED, price=price)


def find_endpoint(url: str, max_tokens: int, temperature: float, seed: int, system: str | None) -> Server:
    """A served model to be tested: ENDPOINT_MODEL, or the only one in the server's list.

    Raises:
        UserError: not an address, no answer, or several models and none chosen.
    """
    options = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    name = os.environ.get("ENDPOINT_MODEL", "")
    server = _server("endpoint", url, name, threads=64, options=options, system=system)
    if not server.model:
        names = server.models()
        if len(names) != 1:
            raise UserError(f"endpoint {server.url} serves {', '.join(names) or 'no model'}: set ENDPOINT_MODEL to one")
        server.model = names[0]
    return server


def local_chat(
    tokenizer, generate: Callable[[list[list[int]], Callable[[int, list[int]], None]], None], system: str | None
) -> Chat:
    """Replies of a model in this process: `generate` makes new tokens from prompts' tokens, and tells of each reply."""

    def chat(conversations: list[Messages], done: Done) -> None:
        first = [] if system is None else [{"role": "system", "content": system}]
        prompts = [prompt_tokens(first + conversation, tokenizer) for conversation in conversations]
        # Some templates begin the thought themselves: a reply that is cut in it would look like an answer.
        begun = ["<think>" * tokenizer.decode(ids[-8:]).rstrip().endswith("<think>") for ids in prompts]

        def ended(number: int, tokens: list[int]) -> None:
            done(number, begun[number] + tokenizer.decode(tokens, skip_special_tokens=True))

        generate(prompts, ended)

    return chat
