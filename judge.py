"""MT-Bench-Thai: the questions, a model's replies to both turns, and a judge's rating of each from 1 to 10.

    export JUDGE_BASE_URL=https://host/v1 JUDGE_MODEL=gpt-4o-2024-05-13 JUDGE_PRICE=2.5,10
    read -rs JUDGE_API_KEY && export JUDGE_API_KEY
    python judge.py results/exp2-wangchan-ut1/mt_bench_thai-ut4.json …

evaluate.py calls `run_mt_bench`. As a script this rates replies that were made with `--judge none`, without model and
GPU: on a cluster's login node, for jobs without a network. The judge is anything that answers OpenAI's
/chat/completions. JUDGE_PRICE is dollars per million tokens in and out. The key is read from the environment alone.

The protocol is the published one (single-answer grading of FastChat's MT-Bench, English instructions in our own words,
the reference shown wherever there is one, temperature 0) but for this: a judgement without a readable rating, or with
two different ones, is asked for once more and then left out, where the published harness takes the first and averages
in a -1 for none; replies are greedy and may have 1,024 tokens, where it samples at temperature 0.2 and cuts at 512
(about 270 Thai characters); what stands before </think> is not shown to the judge.

Each reply and judgement is appended to a cache file beside the results as soon as it is there: what was killed goes on
without paying twice.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import random
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

from settings import Parser, UserError, call, sync_folder, write_atomic, write_json

import httpx
import numpy as np
from tqdm import tqdm

from thai import count_letters, normalise

MAX_NEW_TOKENS = 1024  # of a reply
TEMPERATURE, JUDGEMENT_TOKENS = 0.0, 2048  # of a judgement, as published
TYPICAL_JUDGEMENT = 300  # for the estimate of the cost
JUDGE_THREADS, ENDPOINT_THREADS = 8, 64  # requests at once
ATTEMPTS = 8  # of one request: at most two minutes of waiting in all
FIRST_WAIT, LONGEST_WAIT, TOO_LONG_A_WAIT = 1.0, 60.0, 300.0  # seconds; doubled from the first to the longest
TIMEOUT = httpx.Timeout(300, connect=10)  # seconds without a byte
THAI_SHARE = 0.7  # of a reply's letters: Thai prose with English terms has more (0.83 at the least in 500 texts)
RESAMPLES = 10_000


class Stopped(Exception):
    """Of a request that is not made any more, since another one failed for good."""


Messages = list[dict]  # [{"role": …, "content": …}, …]
Done = Callable[[int, str], None]  # told of each reply as it ends: the conversation's number, the text
Chat = Callable[[list[Messages], Done], None]  # replies to conversations


# ----------------------------------------------------------------------------------------------------------------------
# questions


def load_questions(
    name: str, spec: dict, local: str | None = None, limit: int | None = None, normalise_thai: bool = True
) -> list[dict]:
    """The benchmark's questions: {id, question_id, category, turns: [2 texts], reference: [2 texts or null] or null}.

    `local` is a folder of the repository's layout, or one JSON or JSONL file. With `limit`, the first of each category.

    Raises:
        UserError: naming file and item: not two turns, no category, a repeated id, a reference of another shape.
    """
    from sources import read_benchmark, read_file  # here: they bring torch, which judging alone does not need

    if local is not None and Path(local).is_file():
        rows = read_file(Path(local))
    else:
        rows = read_benchmark(name, spec, local, spec["file"])
    spell = normalise if normalise_thai else str
    questions, seen, taken = [], set(), {}
    for place, row in rows:
        where = f"{place} (question_id {row.get('question_id')!r})"
        turns, reference = row.get("turns"), row.get("reference")
        if not isinstance(row.get("question_id"), int | str) or row["question_id"] in seen:
            raise UserError(f"{where}: question_id must be a number or text that no other item has")
        if not _texts(turns) or not all(turn.strip() for turn in turns):
            raise UserError(f"{where}: 'turns' must be two texts, found {_short(turns)}; keys: {', '.join(row)}")
        if reference is not None and not _texts(reference, or_null=True):
            raise UserError(f"{where}: 'reference' must be two texts or null, found {_short(reference)}")
        if not isinstance(row.get("category"), str) or not row["category"].strip():
            raise UserError(f"{where}: no text in 'category'; keys: {', '.join(row)}")
        seen.add(row["question_id"])
        taken[row["category"]] = taken.get(row["category"], 0) + 1
        if limit is not None and taken[row["category"]] > limit:
            continue
        if reference is not None:
            reference = [spell(text) if text and text.strip() else None for text in reference]
        questions.append(
            {"id": f"{name}-{row['question_id']}", "question_id": row["question_id"], "category": row["category"],
             "turns": [spell(turn) for turn in turns], "reference": reference if any(reference or ()) else None}
        )  # fmt: skip
    if not questions:
        raise UserError(f"{local or spec['hub_id']}, {spec['file']}: no questions in it")
    return questions


def _texts(value: object, or_null: bool = False) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(text, str) or (or_null and text is None) for text in value)
    )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"


# ----------------------------------------------------------------------------------------------------------------------
# prompts of the judge and its ratings

INSTRUCTION = """\
Act as an impartial judge of {what} that an AI assistant gave to {whom}. Weigh how helpful, relevant, accurate, \
deep, creative and detailed the answer is.{extra} Begin with a short explanation of your verdict, and be as objective \
as possible. After the explanation, rate the answer on a scale from 1 to 10, in exactly this format: "[[rating]]", for \
example: "Rating: [[5]]"."""
REFERENCE = " You are also given a reference answer. Compare the two, and find and correct the assistant's mistakes."
SECOND = " Rate the assistant's answer to the second question only."
AGAIN = 'That has no rating that can be read. Give it alone, as one number from 1 to 10, like this: "Rating: [[5]]".'


def judge_prompt(question: dict, replies: list[str], turn: int) -> Messages:
    """What the judge is sent about turn 0 or 1; about the second, it sees both."""
    reference = question["reference"] and question["reference"][turn] and question["reference"]
    if turn == 0:
        extra = REFERENCE if reference else ""
        parts = [INSTRUCTION.format(what="the answer", whom="the user's question below", extra=extra)]
        parts += [f"[Question]\n{question['turns'][0]}"]
        if reference:
            parts += [_block("Reference Answer", reference[0])]
        parts += [_block("Assistant's Answer", replies[0])]
        return [{"role": "system", "content": "You are a helpful assistant."}, _user("\n\n".join(parts))]
    extra = (REFERENCE if reference else "") + SECOND
    system = INSTRUCTION.format(what="the answers", whom="the user's questions", extra=extra)
    parts = []
    if reference:
        parts += [_conversation("Reference Answer", "Reference answer", question["turns"], reference)]
    parts += [_conversation("Assistant's Conversation with User", "Assistant", question["turns"], replies)]
    return [{"role": "system", "content": system}, _user("\n\n\n".join(parts))]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _block(title: str, text: str) -> str:
    return f"[The Start of {title}]\n{text}\n[The End of {title}]"


def _conversation(title: str, speaker: str, turns: list[str], answers: list[str | None]) -> str:
    text = "\n\n".join(
        f"### User:\n{turn}\n\n### {speaker}:\n{answer or ''}" for turn, answer in zip(turns, answers, strict=True)
    )
    return f"<|The Start of {title}|>\n\n{text}\n\n<|The End of {title}|>"


NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"


def parse_rating(text: str) -> float | None:
    """The number in [[n]], else in [n]: from 1 to 10, and no two different ones (the judge may quote the reply's)."""
    found = re.findall(rf"\[\[{NUMBER}\]\]", text) or re.findall(rf"\[{NUMBER}\]", text)
    ratings = {float(number) for number in found}
    return ratings.pop() if len(ratings) == 1 and 1 <= min(ratings) <= 10 else None


# ----------------------------------------------------------------------------------------------------------------------
# language

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
QUOTED = re.compile(r'"[^"\n]*"|“[^”\n]*”|\([^()\n]*\)|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]', re.DOTALL)


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


# ----------------------------------------------------------------------------------------------------------------------
# a server


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


# ----------------------------------------------------------------------------------------------------------------------
# what is there already


class Cache:
    """Texts by key, in a file of JSON lines; each is on the disk when `add` returns. One process at a time: another
    waits, and then finds what the first one has paid for."""

    def __init__(self, path: Path):
        self.path, self.texts, self.lock = Path(path), {}, threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that is at work on {self.path}", flush=True)
                fcntl.flock(self.file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            print(f"warning: no locks on this file system: let one process at a time work on {self.path}")
        sync_folder(self.path.parent)
        self.file.seek(0)
        lines = self.file.read().split(b"\n")
        if lines[-1]:  # torn when its process was killed
            self.file.truncate(os.fstat(self.file.fileno()).st_size - len(lines[-1]))
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = json.loads(line)
                self.texts[entry["key"]] = entry["text"]
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{self.path}, line {number} is damaged: delete the line, or the file") from None

    def add(self, key: str, text: str) -> None:
        line = (json.dumps({"key": key, "text": text}, ensure_ascii=False) + "\n").encode()
        with self.lock:
            descriptor = self.file.fileno()
            end = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, end)
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            self.texts[key] = text

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def fill(cache: Cache, jobs: dict[str, Messages], chat: Chat, what: str) -> None:
    """Puts into the cache what it lacks of `jobs`, each text as soon as it is there.

    Raises:
        UserError: the server's or the disk's errors; what came before is in the cache.
    """
    missing = {key: messages for key, messages in jobs.items() if key not in cache.texts}
    if not missing:
        return
    keys = list(missing)
    try:
        with tqdm(total=len(missing), desc=what, unit=" replies", leave=False, disable=None) as progress:

            def done(number: int, text: str) -> None:
                cache.add(keys[number], text)
                progress.update()

            chat(list(missing.values()), done)
    except UserError as error:
        kept = sum(key in cache.texts for key in jobs)
        goes_on = f"\n{kept} of {len(jobs)} are saved in {cache.path}: the same command goes on from there"
        raise UserError(f"{error}{goes_on if kept else ''}") from None


def answer(
    conversations: list[Messages], chat: Chat, saved: Cache, what: str, *, who: str,
    max_new_tokens: int = MAX_NEW_TOKENS, temperature: float = 0.0,
) -> list[str]:  # fmt: skip
    """A model's next turn in each conversation; `who` holds what else the replies depend on. Errors as `fill`."""
    if isinstance(chat, Server):
        who, max_new_tokens, temperature = f"{chat.model} {chat.seed} {who}", chat.max_tokens, chat.temperature
    keys = [_hash("reply", who, max_new_tokens, temperature, messages) for messages in conversations]
    fill(saved, dict(zip(keys, conversations, strict=True)), chat, what)
    return [saved.texts[key] for key in keys]


# ----------------------------------------------------------------------------------------------------------------------
# the benchmark


def _tokens(text: str) -> int:
    """An estimate without the judge's tokenizer: four bytes a token, in English and (0.75 a character) in Thai."""
    return len(text.encode()) // 4


def _cost(grader: Server, calls: int, tokens_in: int) -> str:
    typical, most = calls * TYPICAL_JUDGEMENT, calls * JUDGEMENT_TOKENS
    text = f"about {tokens_in:,} tokens in and {typical:,} out (at most {most:,})"
    if grader.price:
        a, b = grader.price
        dollars = [(tokens_in * a + out * b) / 1e6 for out in (typical, most)]
        text += f", about ${dollars[0]:,.2f} (at most ${dollars[1]:,.2f})"
    return text


def announce(questions: list[dict], grader: Server | None, runs: int = 1, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
    """Prints what judging so many results will take, if no reply is rated yet and each is as long as it may be."""
    if grader is None:
        print(f"{len(questions)} questions of two turns; the replies are not judged (--judge none)")
        return
    prompts = [
        _tokens("".join(m["content"] for m in judge_prompt(q, ["", ""], turn))) for q in questions for turn in (0, 1)
    ]
    calls = 2 * len(questions) * runs
    tokens = (sum(prompts) + 3 * max_new_tokens * len(questions)) * runs
    print(f"judge {grader.model} at {grader.url}: at most {calls:,} calls, {_cost(grader, calls, tokens)}")


def run_mt_bench(
    questions: list[dict],
    chat: Chat,
    grader: Server | None,
    *,
    who: str,
    cache: Path,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    name: str = "mt_bench_thai",
) -> tuple[dict, list[dict]]:
    """The numbers of one run at one depth, and a line an item, both in the contract of evaluate.py's results.

    `who` holds all that the replies depend on besides the questions, `max_new_tokens` and `temperature`.

    Raises:
        UserError: the judge or the endpoint fails for good; what it answered before is kept in `cache`.
    """
    replies: list[list[str]] = [[] for _ in questions]
    with Cache(cache) as saved:
        for turn in (0, 1):
            conversations = []
            for question, earlier in zip(questions, replies, strict=True):
                conversations.append([_user(question["turns"][0])])
                for reply in earlier:
                    conversations[-1] += [{"role": "assistant", "content": reply}, _user(question["turns"][1])]
            what = f"{name}, turn {turn + 1}"
            texts = answer(conversations, chat, saved, what, who=who, max_new_tokens=max_new_tokens,
                           temperature=temperature)  # fmt: skip
            for text, earlier in zip(texts, replies, strict=True):
                earlier.append(text.rpartition("</think>")[2].strip())  # the answer, not the thought
        return judge_replies(questions, replies, grader, saved, name)


def judge_replies(
    questions: list[dict], replies: list[list[str]], grader: Server | None, saved: Cache, name: str
) -> tuple[dict, list[dict]]:
    """As `run_mt_bench`, of replies that are there."""
    judgements: list[tuple[float | None, str | None]] = [(None, None)] * (2 * len(questions))
    if grader is not None:
        judgements = _judge(questions, replies, grader, saved, name)
    lines = []
    for number, (question, pair) in enumerate(zip(questions, replies, strict=True)):
        turns = [
            {"prompt": prompt, "reply": reply, "rating": rating, "judgement": judgement, "thai": is_thai(reply)}
            for prompt, reply, (rating, judgement) in zip(
                question["turns"], pair, judgements[2 * number : 2 * number + 2], strict=True
            )
        ]
        ratings = [turn["rating"] for turn in turns if turn["rating"] is not None]
        lines.append(
            {"doc_id": number, "doc": {"question_id": question["question_id"]}, "target": question["reference"],
             "arguments": {}, "resps": [[reply] for reply in pair], "filtered_resps": pair, "id": question["id"],
             "subset": question["category"], "category": question["category"],
             "prompt_sha256": _hash(question["turns"]), "turns": turns,
             "value": statistics.fmean(ratings) if ratings else None}
        )  # fmt: skip
    numbers = summarise(lines) | {"judge": grader and grader.model}
    if grader is None:
        numbers["unparsed"] = 0  # nothing was asked
    print_summary(name, numbers)
    return numbers, lines


def _judge(questions, replies, grader: Server, saved: Cache, name: str) -> list[tuple[float | None, str]]:
    """Rating and judgement of each turn, in the questions' order."""
    prompts = [judge_prompt(q, pair, turn) for q, pair in zip(questions, replies, strict=True) for turn in (0, 1)]

    def key(messages: Messages) -> str:
        return _hash("judgement", grader.model, grader.max_tokens, grader.temperature, messages)

    jobs = {key(prompt): prompt for prompt in prompts}
    missing = [prompt for k, prompt in jobs.items() if k not in saved.texts]
    if missing:
        tokens = sum(_tokens(m["content"]) for prompt in missing for m in prompt)
        print(
            f"{name}: {len(missing)} of {len(jobs)} judge calls to make, {_cost(grader, len(missing), tokens)}",
            flush=True,
        )
    fill(saved, jobs, grader, f"{name}, judge")
    texts = [saved.texts[key(prompt)] for prompt in prompts]
    again = {
        n: [*prompt, {"role": "assistant", "content": text.strip() or "(empty)"}, _user(AGAIN)]
        for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        if parse_rating(text) is None
    }
    fill(saved, {key(prompt): prompt for prompt in again.values()}, grader, f"{name}, judge again")
    result = [(parse_rating(text), text) for text in texts]
    for n, prompt in again.items():
        second = saved.texts[key(prompt)]
        result[n] = parse_rating(second), f"{texts[n]}\n\n[asked again]\n{second}"
        if result[n][0] is None:
            question = questions[n // 2]["id"]
            print(f"{name}: {question}, turn {n % 2 + 1}: no rating from 1 to 10 in {_short(second)}; left out")
    return result


def summarise(lines: list[dict]) -> dict:
    """The study block's numbers: `value` is the mean over questions, `macro` that over categories (as published)."""
    rated = [line["value"] for line in lines if line["value"] is not None]
    subsets = {}
    for category in dict.fromkeys(line["category"] for line in lines):
        some = [line for line in lines if line["category"] == category]
        subsets[category] = {"value": _mean(_ratings(some)), "items": len(some), "chance": None, "majority": None}
    interval = stderr = None
    if len(rated) > 1:
        draws = np.random.default_rng(0).integers(0, len(rated), (RESAMPLES, len(rated)))
        interval = np.percentile(np.array(rated)[draws].mean(1), [2.5, 97.5]).tolist()
        stderr = statistics.stdev(rated) / math.sqrt(len(rated))
    turns = [turn for line in lines for turn in line["turns"]]
    return {
        "metric": "rating",
        "higher_is_better": True,
        "items": len(lines),
        "value": _mean(rated),
        "ci95": interval,
        "stderr": stderr,
        "chance": None,
        "majority": None,
        "macro": _mean([s["value"] for s in subsets.values() if s["value"] is not None]),
        "macro_chance": None,
        "macro_majority": None,
        "subsets": subsets,
        "turns": [_mean(_ratings(lines, turn)) for turn in (0, 1)],
        "predicted": None,
        "unparsed": sum(turn["rating"] is None for turn in turns),
        "thai_share": _mean([turn["thai"] for turn in turns if turn["thai"] is not None]),
    }


def _ratings(lines: list[dict], *which: int) -> list[float]:
    found = [line["turns"][turn]["rating"] for line in lines for turn in which or (0, 1)]
    return [rating for rating in found if rating is not None]


def _mean(values: list) -> float | None:
    return statistics.fmean(values) if values else None


def print_summary(name: str, numbers: dict) -> None:
    def show(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    share = f"replies in Thai {show(numbers['thai_share'], '.1%')}"
    if numbers["judge"] is None:
        print(f"{name}: {numbers['items']} questions answered, not judged; {share}")
        return
    low, high = numbers["ci95"] or (None, None)
    print(
        f"{name}: rating {show(numbers['value'])} (95 % {show(low)} – {show(high)}), mean of categories "
        f"{show(numbers['macro'])}, turns {' and '.join(map(show, numbers['turns']))}; {share}"
    )
    print("  " + ", ".join(f"{category} {show(s['value'])}" for category, s in numbers["subsets"].items()))
    if numbers["unparsed"]:
        print(f"  {numbers['unparsed']} judgements without a rating, asked for twice, are in none of these means")


def result_key(generation_key: str, model: str | None) -> str:
    """A result's `key`: what its replies depend on, and the judge."""
    return _hash(generation_key, model and [model, TEMPERATURE, JUDGEMENT_TOKENS, INSTRUCTION, AGAIN])


def is_rated(study: dict, choice: str) -> bool:
    """Whether a result has what `--judge` asks for: the ratings of JUDGE_MODEL; of any judge, if none is named."""
    model = os.environ.get("JUDGE_MODEL", "").strip()
    if choice == "none":
        return True
    return study["key"] == result_key(study["generation_key"], model) if model else study.get("judge") is not None


# ----------------------------------------------------------------------------------------------------------------------
# python judge.py FILE …


def judge_file(file: Path, grader: Server) -> None:
    """Rates the replies of a result that was made with `--judge none`, and writes it again.

    Raises:
        UserError: not such a result; the judge's errors.
    """
    items = file.with_suffix(".items.jsonl")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        study = result["study"]
        if study["metric"] != "rating":
            raise UserError(f"{file} holds no conversations: its metric is {study['metric']!r}")
        old = [json.loads(line) for line in items.read_text(encoding="utf-8").split("\n") if line]
        questions = [
            {"id": line["id"], "question_id": line["doc"]["question_id"], "category": line["category"],
             "turns": [turn["prompt"] for turn in line["turns"]], "reference": line["target"]}
            for line in old
        ]  # fmt: skip
        replies = [[turn["reply"] for turn in line["turns"]] for line in old]
        key = result_key(study["generation_key"], grader.model)
        done, task, name = study.get("key") == key, study["task"], f"{study['run']} at {study['total_ut_steps']} loops"
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{file} (and {items.name}) is not a result of mt_bench_thai: {what}") from None
    if done:
        print(f"{file}: rated by {grader.model} already")
        return
    with Cache(file.with_name(f".{file.stem}.cache.jsonl")) as saved:
        numbers, lines = judge_replies(questions, replies, grader, saved, name)
    result["study"] = study | numbers | {"key": key}
    rows = {task: numbers} | {f"{task}_{category}": s for category, s in numbers["subsets"].items()}
    for row, part in rows.items():
        if row in result.get("results", {}):
            result["results"][row] |= {"rating,none": part["value"], "rating_stderr,none": part.get("stderr")}
    write_items(items, lines)
    write_json(file, result)


def write_items(path: Path, lines: list[dict]) -> None:
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results/<run>/mt_bench_thai-ut<k>.json")
    files = parser.parse_args().files
    for file in files:
        if not file.is_file():
            raise UserError(f"no file {file}: replies are in RESULTS_DIR/<run>/mt_bench_thai-ut<k>.json")
    grader = find_judge()
    for file in files:
        judge_file(file, grader)


if __name__ == "__main__":
    call(main)
