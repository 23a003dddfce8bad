"""MT-Bench-Thai against a real HTTP server on this machine, as the judge and as the model under test."""

import contextlib
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import evaluate
from ouro import settings
from ouro.data.thai import is_thai
from ouro.evaluate import endpoint, judge, replies, results
from ouro.evaluate.endpoint import find_endpoint, find_judge
from ouro.evaluate.judge import judge_prompt, load_questions, parse_rating, run_mt_bench
from ouro.evaluate.replies import Cache
from ouro.files import UserError
from tools import judge as command

import numpy as np
import openai
import pytest
from conftest import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample" / "mt_bench_thai"
SPEC = {"hub_id": "ThaiLLM-Leaderboard/mt-bench-thai", "revision": None, "file": "mt_bench_thai_full.json"}
KEY = "sk-not-a-real-key-0123456789"


def rate(messages: list[dict]) -> str:
    """A judgement whose rating depends on all that was sent."""
    text = json.dumps(messages, ensure_ascii=False)
    return f"It is an answer.\n\nRating: [[{1 + zlib.crc32(text.encode()) % 10}]]"


class FakeServer:
    """OpenAI's /v1/chat/completions. `faults` are used up by the first requests, `answer` makes the others' text."""

    def __init__(self):
        self.bodies, self.headers, self.faults, self.answer, self.models = [], [], [], rate, ["tiny"]
        self.lock, self.quiet = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.quiet.set()
        self.server.shutdown()
        self.server.server_close()

    def prompts(self) -> list[str]:
        return [json.dumps(body["messages"]) for body in self.bodies]

    def keys(self) -> set[str | None]:
        return {headers["Authorization"] for headers in self.headers}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeServer

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, headers: dict | None = None, length: int | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that was killed
            self.wfile.write(body)

    def do_GET(self):
        found = self.path == "/v1/models"
        data = {"object": "list", "data": [{"id": name} for name in self.fake.models]}
        self.send(200 if found else 404, json.dumps(data).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.fake
        with fake.lock:
            fake.bodies.append(body)
            fake.headers.append(self.headers)
            fault = fake.faults.pop(0) if fake.faults else None
        if self.path != "/v1/chat/completions":
            self.send(404, b"no such page")
        elif fault is None:
            message = {"role": "assistant", "content": fake.answer(body["messages"])}
            self.send(200, json.dumps({"choices": [{"index": 0, "message": message}]}).encode())
        elif fault == "says nothing":
            fake.quiet.wait(PATIENCE)
            self.close_connection = True
        elif fault == "closes the connection":
            self.close_connection = True
        elif fault == "closes it in mid-body":
            self.send(200, b'{"choices": [{"mess', length=1000)
            self.close_connection = True
        else:
            self.send(*fault)


FAULTS = {
    "429": (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
    "408": (408, b"too late"),
    "409": (409, b"locked"),
    "500": (500, b"oh dear"),
    "503 without a body": (503, b""),
    "nonsense": (200, b"<html>hello</html>"),
    "deep nonsense": (200, b"[" * 100_000),
    "an empty choice list": (200, b'{"choices": []}'),
    "an error that says 200": (200, b'{"error": {"message": "overloaded"}}'),
    "content of another type": (200, b'{"choices": [{"message": {"content": {"a": 1}}}]}'),
    "closes the connection": "closes the connection",
    "closes it in mid-body": "closes it in mid-body",
}


@pytest.fixture
def server(monkeypatch):
    fake = FakeServer()
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("JUDGE_", "ENDPOINT_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JUDGE_BASE_URL", fake.url)
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    yield fake
    fake.close()


@pytest.fixture
def one_thread(server):
    """The judge, asked one thing at a time."""
    grader = find_judge()
    grader.threads = 1
    return grader


@pytest.fixture(scope="module")
def raw():
    return json.loads((SAMPLE / SPEC["file"]).read_text())


def load(place, limit=None):
    return load_questions("mt_bench_thai", SPEC, str(place), limit, True)


@pytest.fixture(scope="module")
def questions():
    return load(SAMPLE)


def chat(conversations, done):
    """A model whose reply tells how many turns it saw, and the end of the last one."""
    for n, c in enumerate(conversations):
        done(n, f"คำตอบที่ {len(c)} ของคำถาม {c[-1]['content'][-20:]}")


def says(model, conversations) -> list[str]:
    texts = {}
    model(conversations, texts.__setitem__)
    return [texts[n] for n in range(len(conversations))]


def run(questions, tmp_path, grader="find", model=chat, cache=".cache.jsonl"):
    grader = find_judge() if grader == "find" else grader
    return run_mt_bench(questions, model, grader, who="a model", cache=tmp_path / cache, name="mt_bench_thai")


# ----------------------------------------------------------------------------------------------------------------------
# questions, prompts, ratings, language


def test_the_sample_has_a_question_of_each_category_in_the_published_layout(questions, raw):
    assert {tuple(row) for row in raw} == {("question_id", "turns", "reference", "generation_kwargs", "category")}
    assert [q["category"] for q in questions] == [
        "Writing", "Roleplay", "Extraction", "Reasoning", "Math", "Coding", "STEM", "Social Science", "Knowledge III",
    ]  # fmt: skip
    assert [bool(q["reference"]) for q in questions] == [False, False, True, True, True, True, False, False, False]
    assert all(is_thai(turn) for q in questions for turn in q["turns"])


def test_a_list_json_lines_and_a_lone_file_give_the_same_questions_and_the_limit_the_first_of_each_category(
    questions, raw, tmp_path
):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in raw)
    for name in (SPEC["file"], "mine.jsonl"):
        (tmp_path / name).write_text(lines)
    assert load(tmp_path) == load(tmp_path / "mine.jsonl") == questions
    more = [row | {"question_id": row["question_id"] + 100} for row in raw]
    (tmp_path / SPEC["file"]).write_text(json.dumps(raw + more))
    assert load(tmp_path, limit=1) == questions


@pytest.mark.parametrize(
    "change",
    [
        {"turns": ["หนึ่ง"]},
        {"turns": ["หนึ่ง", " "]},
        {"turns": "ab"},
        {"turns": None},
        {"reference": ["คำตอบ"]},
        {"reference": "ab"},
        {"category": None},
        {"question_id": 1},
        {"question_id": None},
        {"question_id": ["1"]},
    ],
)
def test_a_bad_item_is_named_by_file_number_and_key(tmp_path, raw, change):
    (tmp_path / SPEC["file"]).write_text(json.dumps([raw[0], raw[1] | change]))
    (key,) = change
    with pytest.raises(UserError, match=rf"{SPEC['file']}, item 2 .*: '?{key}'? must be"):
        load(tmp_path)


def test_an_empty_or_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no mt_bench_thai_full.json in it"):
        load(tmp_path)
    (tmp_path / SPEC["file"]).write_text("[]")
    with pytest.raises(UserError, match="no questions in it"):
        load(tmp_path)


def test_the_judge_sees_the_reference_where_there_is_one_and_both_turns_for_the_second(questions):
    def prompt(question, turn):
        return "\n".join(message["content"] for message in judge_prompt(question, ["R1", "R2"], turn))

    for question in questions:
        first, second = (prompt(question, turn) for turn in (0, 1))
        assert question["turns"][0] in first and question["turns"][1] not in first
        assert "R1" in first and "R2" not in first and "[[rating]]" in first
        assert all(text in second for text in (*question["turns"], "R1", "R2", "[[rating]]", "second question only"))
        for turn, text in enumerate((first, second)):
            shown = [part in text for part in question["reference"] or ()]
            assert shown == ([True, turn == 1] if question["reference"] else [])
            assert ("reference answer" in text) == bool(question["reference"])
    half = questions[4] | {"reference": [None, "ได้ 9 กิโลกรัม"]}  # for the second turn alone
    assert "reference" not in prompt(half, 0)
    assert "ได้ 9 กิโลกรัม" in prompt(half, 1) and "None" not in prompt(half, 1)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7),
        ("Rating: [[ 7.5 ]]", 7.5),
        ("Rating: [8]", 8),
        ("[1] is wrong. Rating: [[3]]", 3),
        ("Rating: [[10]] and again [[10]]", 10),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("Rating: [[-3]]", None),
        ("Rating: [[rating]]", None),
        ("The answer claims [[10]]. Rating: [[2]]", None),  # which of them is the judge's own?
        ("[1] and [2] are wrong", None),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_a_rating_is_one_number_in_brackets_from_1_to_10(text, rating):
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("reply", "thai"),
    [
        ("น้ำแข็งลอยน้ำได้เพราะมีความหนาแน่นน้อยกว่า", True),
        ("การสังเคราะห์ด้วยแสง (photosynthesis in green plants and algae) สร้างน้ำตาล", True),
        ('คำว่า "the quick brown fox jumps over the lazy dog" เป็นประโยคที่มีตัวอักษรครบ', True),
        ("ใช้ฟังก์ชันนี้\n```python\ndef a_long_name(text):\n    return text.split()\n```", True),
        ("ใช้ฟังก์ชันนี้\n```python\ndef never_closed(text):\n    return text.split()", True),
        (r"คำตอบคือ \(\frac{numerator}{denominator}\)", True),
        ("Ice floats because it is less dense than water.", False),
        ("The answer คือ forty two, which everybody knows", False),
        ("น้ำแข็ง ice water density molecules hydrogen", False),
        ("冰浮在水面上", False),
        ('"All of it is in quotation marks"', False),
        ("ไป (ไปเที่ยวไหนมา where have you been)", False),  # a bracket with Thai in it counts whole
        ("", False),
        ("  \n", False),
        ("378", None),
        ("```python\nprint(1)\n```", None),
    ],
)
def test_a_reply_is_thai_by_its_letters_outside_code_and_quoted_english(reply, thai):
    assert is_thai(reply) is thai


# ----------------------------------------------------------------------------------------------------------------------
# the numbers


def test_the_means_are_those_of_the_ratings(server, questions, tmp_path, one_thread):
    given = iter([4, 2, 10, 1, 5, 5])
    wanted = {}

    def answer(messages):
        text = json.dumps(messages)
        wanted.setdefault(text, next(given))
        return f"Rating: [[{wanted[text]}]]"

    server.answer = answer
    same = [q | {"category": c} for q, c in zip(questions[:3], ("A", "A", "B"), strict=True)]
    numbers, lines = run(same, tmp_path, one_thread)
    assert [[t["rating"] for t in line["turns"]] for line in lines] == [[4, 2], [10, 1], [5, 5]]
    assert [line["value"] for line in lines] == [3, 5.5, 5]
    assert numbers["value"] == pytest.approx(13.5 / 3) and numbers["macro"] == pytest.approx((17 / 4 + 5) / 2)
    assert numbers["turns"] == pytest.approx([19 / 3, 8 / 3]) and numbers["items"] == 3
    assert numbers["subsets"]["A"] == {"value": 4.25, "items": 2, "chance": None, "majority": None}
    assert 3 <= numbers["ci95"][0] < numbers["value"] < numbers["ci95"][1] <= 5.5
    assert numbers["thai_share"] == 1 and numbers["unparsed"] == 0 and numbers["judge"] == "a-judge"


def test_the_interval_covers_the_true_mean_about_95_times_in_100():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        lines = [
            {"category": "A", "value": v, "turns": [{"rating": v, "thai": True}] * 2}
            for v in rng.normal(5, 2, 91).tolist()
        ]
        low, high = judge.summarise(lines)["ci95"]
        hits += low <= 5 <= high
    assert 89 <= hits <= 99


def test_a_turn_without_a_rating_is_asked_for_once_more_and_then_left_out(server, questions, tmp_path, capsys):
    def answer(messages):
        again = messages[-1]["content"] == judge.AGAIN
        text = json.dumps(messages, ensure_ascii=False)
        if questions[0]["turns"][0] in text:
            return "Rating: [[8]]" if again else "Excellent! Rating: [[11]]"
        if questions[1]["turns"][1] in text:
            return "I would rather not."
        return "Rating: [[6]]"

    server.answer = answer
    numbers, lines = run(questions[:3], tmp_path)
    assert [[t["rating"] for t in line["turns"]] for line in lines] == [[8, 8], [6, None], [6, 6]]
    assert "[[11]]" in lines[0]["turns"][0]["judgement"] and "[[8]]" in lines[0]["turns"][0]["judgement"]
    assert numbers["unparsed"] == 1 and numbers["value"] == pytest.approx(20 / 3)
    assert numbers["turns"] == pytest.approx([20 / 3, 7])
    assert len(server.bodies) == 6 + 3  # each of the three once more
    out = capsys.readouterr().out
    assert "mt_bench_thai-2, turn 2: no rating" in out and "1 judgements without a rating" in out
    assert run(questions[:3], tmp_path) == (numbers, lines) and len(server.bodies) == 9  # remembered, not asked again


def test_without_a_judge_the_replies_are_there_and_the_numbers_are_not(server, questions, tmp_path):
    numbers, lines = run(questions, tmp_path, grader=find_judge("none"))
    assert numbers["value"] is numbers["ci95"] is numbers["macro"] is numbers["judge"] is None
    assert numbers["unparsed"] == 0 and numbers["thai_share"] == 1 and server.bodies == []
    assert all(t["reply"] and t["rating"] is None for line in lines for t in line["turns"])
    assert lines[0]["value"] is None


def test_the_second_turn_sees_the_models_own_first_reply_without_its_thought(questions, tmp_path):
    seen = []

    def thinks(conversations, done):
        seen.extend(conversations)
        for n, _ in enumerate(conversations):
            done(n, f"<think>\nให้คิดก่อน\n</think>\n\nตอบข้อ {n}")

    _, lines = run(questions[:2], tmp_path, grader=None, model=thinks)
    assert [[m["role"] for m in c] for c in seen] == [["user"]] * 2 + [["user", "assistant", "user"]] * 2
    assert seen[3][1]["content"] == "ตอบข้อ 1" == lines[1]["turns"][0]["reply"]
    assert [m["content"] for m in seen[3][::2]] == questions[1]["turns"]


def test_the_judge_is_asked_as_published_and_one_or_eight_at_a_time_give_the_same(
    server, questions, tmp_path, one_thread
):
    assert run(questions, tmp_path / "1", one_thread) == run(questions, tmp_path / "8")
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in server.bodies} == {("a-judge", 0.0, 2048)}
    assert server.keys() == {f"Bearer {KEY}"} and len(server.bodies) == 36


def test_the_cost_is_told_before_the_start(server, questions, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_PRICE", "2.5,10")
    judge.announce(questions, find_judge(), 8, 1024)
    assert re.search(r"at most 144 calls, about [\d,]+ tokens in and 43,200 out .*\$[\d.]+ \(at most \$[\d.]+\)",
                     capsys.readouterr().out)  # fmt: skip
    run(questions, tmp_path)
    assert "18 of 18 judge calls to make" in capsys.readouterr().out
    run(questions, tmp_path)
    assert "to make" not in capsys.readouterr().out and len(server.bodies) == 18
    judge.announce(questions, None, 1, 1024)
    assert "not judged" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# faults of the judge


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_costs_an_attempt_and_changes_nothing(server, questions, tmp_path, fault, capsys):
    expected = run(questions[:2], tmp_path / "without")
    server.bodies.clear()
    server.faults = [FAULTS[fault]] * 3
    assert run(questions[:2], tmp_path / "with") == expected
    assert len(server.bodies) == 4 + 3
    assert capsys.readouterr().err.count("judge: ") == 3


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, "is JUDGE_API_KEY set, and the key for this server"),
        (403, "may JUDGE_API_KEY use a-judge"),
        (404, "is there a model 'a-judge'"),
        (400, "a bad request"),
        (429, "insufficient_quota"),
        (302, "302"),
    ],
)
def test_what_waiting_cannot_mend_stops_at_once_and_hides_the_key(
    server, questions, tmp_path, one_thread, status, hint
):
    said = "a bad request by " + "_" * 270 * (status == 400) + f"{KEY}" + ", insufficient_quota" * (status == 429)
    refusal = (status, json.dumps({"error": {"message": said}}).encode())

    def answer(messages):
        server.faults.append(refusal)
        return rate(messages)

    server.answer = answer
    with pytest.raises(UserError) as error:
        run(questions, tmp_path, one_thread)
    assert len(server.bodies) == 2  # one that was answered, one that was not
    assert hint in str(error.value) and KEY[:10] not in str(error.value)
    assert "1 of 18 are saved" in str(error.value) and server.url in str(error.value)
    server.answer, server.faults = rate, [refusal] * 18
    server.bodies.clear()
    with pytest.raises(UserError, match="1 of 18 are saved"):
        run(questions, tmp_path)
    assert len(server.bodies) <= 8, "requests that were under way; no others are made"
    server.faults.clear()
    server.bodies.clear()
    run(questions, tmp_path)
    assert len(server.bodies) == 17


def test_a_judge_that_stays_ill_is_given_up_and_what_is_judged_is_kept(server, questions, tmp_path, one_thread):
    def answer(messages):
        server.faults += [FAULTS["500"]] * 100 * (len(server.bodies) == 5)
        return rate(messages)

    server.answer = answer
    with pytest.raises(UserError, match=r"500: oh dear; given up after 9 attempts\n5 of 18 are saved"):
        run(questions, tmp_path, one_thread)
    assert len(server.bodies) == 5 + 1 + endpoint.RETRIES
    server.answer = rate
    server.faults.clear()
    server.bodies.clear()
    numbers, _ = run(questions, tmp_path)
    assert len(server.bodies) == 13 and numbers["unparsed"] == 0


def test_a_judge_that_is_not_there_is_found_before_the_generation(server, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        monkeypatch.setenv("JUDGE_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
        with pytest.raises(UserError, match=r"judge a-judge at .*refused.*; given up after 9 attempts"):
            find_judge().check()
    monkeypatch.setenv("JUDGE_BASE_URL", server.url)
    server.faults = list(FAULTS.values())[: endpoint.RETRIES]
    find_judge().check()
    assert len(server.bodies) == 1 + endpoint.RETRIES, "as many faults as later on are no reason to give up"


def test_a_judge_that_says_nothing_is_asked_again(server, monkeypatch, capsys):
    monkeypatch.setattr(endpoint, "TIMEOUT", openai.Timeout(0.5))
    server.faults = ["says nothing"]
    assert parse_rating(find_judge().complete([]))
    assert "judge: ReadTimeout" in capsys.readouterr().err and len(server.bodies) > 1


def test_waits_grow_unless_the_server_says_how_long(server, monkeypatch):
    waits = []
    monkeypatch.setattr(openai._base_client.time, "sleep", waits.append)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.5)
    monkeypatch.setattr(openai._base_client, "random", lambda: 0)
    server.faults = [FAULTS["500"]] * 8
    find_judge().complete([])
    assert waits == [0.5, 1, 2, 4, 8, 8, 8, 8]
    waits.clear()
    server.faults = [(429, b"", {"Retry-After": value}) for value in ("7", "-1", "soon", "nan", "120")]
    find_judge().complete([])
    assert waits == [7, 1, 2, 4, 120]
    server.faults = [(429, b"come back tomorrow", {"Retry-After": "86400"})]
    with pytest.raises(UserError, match="come back tomorrow; Retry-After: 86400$"):
        find_judge().complete([])


@pytest.mark.parametrize(("content", "text"), [(None, ""), ("", ""), ("ดี \ud83d", "ดี ?")])
def test_a_reply_of_nothing_or_of_half_a_letter_is_a_text(server, content, text):
    server.answer = lambda messages: content
    assert find_judge().complete([]) == text


# ----------------------------------------------------------------------------------------------------------------------
# settings from the environment


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JUDGE_MODEL", "", "JUDGE_MODEL is not set"),
        ("JUDGE_BASE_URL", " ", "JUDGE_BASE_URL is not set"),
        ("JUDGE_BASE_URL", "localhost:8000", "the address must be like https://host/v1"),
        ("JUDGE_BASE_URL", "http://host:port/v1", "judge: not an address"),
        ("JUDGE_BASE_URL", f"https://me:{KEY}@host/v1", "with the key in JUDGE_API_KEY"),
        ("JUDGE_BASE_URL", f"https://host/v1?key={KEY}", "with the key in JUDGE_API_KEY"),
        ("JUDGE_API_KEY", f"{KEY}\nX-Header: 1", "JUDGE_API_KEY: not a key"),
        ("JUDGE_API_KEY", f"{KEY}é", "JUDGE_API_KEY: not a key"),
        ("JUDGE_PRICE", "2.5", "JUDGE_PRICE must be dollars per million tokens"),
        ("JUDGE_PRICE", "cheap,dear", "JUDGE_PRICE must be dollars per million tokens"),
        ("JUDGE_PRICE", "-1,nan", "JUDGE_PRICE must be dollars per million tokens"),
        ("ALL_PROXY", f"ftp://me:{KEY}@host", "a proxy .* cannot be used"),
        ("ALL_PROXY", "socks5://host:1", "a proxy .* cannot be used"),
    ],
)
def test_a_malformed_setting_is_refused_without_showing_a_key(server, monkeypatch, name, value, message):
    assert KEY not in repr(find_judge())
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        find_judge()
    assert KEY not in str(error.value)


def test_a_server_without_keys_gets_none_and_no_other_servers(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("JUDGE_API_KEY", "")
    find_judge().check()
    assert server.keys() == {None} and KEY not in str(server.headers[0])


# ----------------------------------------------------------------------------------------------------------------------
# a served model


def find_served(url):
    return find_endpoint(url, 7, 0.2, 3, "สั้น ๆ")


def test_a_served_model_answers_both_turns(server, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPOINT_API_KEY", KEY)
    model = FakeServer()
    model.answer = lambda messages: says(chat, [messages[1:]])[0]
    model.faults = list(FAULTS.values())
    served = find_served(model.url.removesuffix("/v1"))
    try:
        numbers, lines = run(questions, tmp_path / "served", model=served)
        assert (numbers, lines) == run(questions, tmp_path / "local")
        assert len(model.bodies) == 18 + len(FAULTS) and model.keys() == {f"Bearer {KEY}"}
        expected = {"model": "tiny", "max_tokens": 7, "temperature": 0.2, "seed": 3}
        assert all({k: body[k] for k in expected} == expected for body in model.bodies)
        assert {body["messages"][0]["content"] for body in model.bodies} == {"สั้น ๆ"}
        assert {len(body["messages"]) for body in model.bodies} == {2, 4}
        run(questions, tmp_path / "served", model=served)
        assert len(model.bodies) == 18 + len(FAULTS)
        model.models = ["base", "exp2"]
        with pytest.raises(UserError, match="serves base, exp2: set ENDPOINT_MODEL to one"):
            find_served(model.url)
        monkeypatch.setenv("ENDPOINT_MODEL", "exp2")
        assert find_served(model.url).model == "exp2"
        monkeypatch.delenv("ENDPOINT_MODEL")
        model.models = [None]
        with pytest.raises(UserError, match="not the JSON that was asked for"):
            find_served(model.url)
    finally:
        model.close()
    with pytest.raises(UserError, match="refused.*; given up after 9 attempts"):
        find_served(model.url)


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """evaluate.py with a config's settings and these arguments, in this process: what it prints."""
    monkeypatch.chdir(ROOT)

    def evaluated(*arguments):
        argv = ["--config", "tests/smoke.yaml", "--results_dir", str(tmp_path), *map(str, arguments)]
        evaluate.evaluate(settings.resolve("", argv, evaluate.options, several=True))
        return capsys.readouterr()

    return evaluated


def test_the_command_scores_a_served_model_and_asks_it_nothing_twice(server, tmp_path, evaluated):
    model = FakeServer()
    model.answer = lambda messages: f"คำตอบคือ ({1 + len(messages[1]['content']) % 4})"
    command = ["--endpoint", model.url, "--tasks", "openthaieval,mt_bench_thai", "--limit", 2, "--judge", "none",
               "--max_new_tokens", 9, "--ut_steps", 1, "--system_prompt", "สั้น ๆ"]  # fmt: skip
    try:
        evaluated(*command)
        posts = len(model.bodies)
        assert "2 of 2 tasks are complete already" in evaluated(*command).out
        assert posts == len(model.bodies) == len({json.dumps(body) for body in model.bodies})
        assert all(body["messages"][0] == {"role": "system", "content": "สั้น ๆ"} for body in model.bodies)
        (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("baseline-"))
        lines = [json.loads(x) for x in (folder / "openthaieval-ut1.items.jsonl").read_text().splitlines()]
        study = json.loads((folder / "openthaieval-ut1.json").read_text())["study"]
        assert study["kind"] == "baseline" and study["items"] == len(lines) > 1
        assert all(line["resps"][0][0] == f"คำตอบคือ ({line['prediction']})" for line in lines)
        assert study["value"] == sum(line["prediction"] == line["gold"] for line in lines) / len(lines)
        for extra, message in (
            (["--tasks", "thai_exam"], "gives no log-probabilities; thai_exam needs them"),
            (["--ut_steps", "1,2"], "answers at one depth and does not say which: name it by --ut_steps"),
        ):
            with pytest.raises(UserError, match=message):
                evaluated(*command, *extra)
    finally:
        model.close()


def test_the_command_rates_with_a_judge_of_many_faults_and_needs_none_for_what_is_rated(
    server, tmp_path, monkeypatch, evaluated
):
    """A judge that is ill at the first call and later, and then one that is gone."""
    command = ["--base", "--use_qlora", "false", "--tasks", "mt_bench_thai", "--ut_steps", "1,2", "--max_new_tokens", 5]
    ill = [FAULTS["429"], (500, b"oh dear", {"Retry-After": "0"}), FAULTS["nonsense"], FAULTS["429"]]
    server.faults = list(ill)

    def answer(messages):
        if len(server.bodies) == 20:
            server.faults = [*ill, "closes it in mid-body"]
        return rate(messages)

    server.answer = answer
    out, err = evaluated(*command)
    assert "at most 36 calls" in out and err.count("judge: ") == 9 and KEY not in err
    assert len(server.bodies) == 1 + 36 + 9
    before = {file.name: file.read_bytes() for file in (tmp_path / "base-fp32").glob("mt*")}
    studies = [json.loads(before[f"mt_bench_thai-ut{depth}.json"])["study"] for depth in (1, 2)]
    assert all(study["judge"] == "a-judge" and study["unparsed"] == 0 for study in studies)
    assert [f"{study['value']:.2f}" in out for study in studies] == [True, True]

    for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name)
        assert "1 of 1 tasks are complete already" in evaluated(*command).out
    (tmp_path / "base-fp32/mt_bench_thai-ut2.items.jsonl").unlink()
    with pytest.raises(UserError, match="JUDGE_BASE_URL is not set"):
        evaluated(*command)
    assert len(server.bodies) == 46, "where nothing is to be rated the judge is neither called nor needed"
    monkeypatch.setenv("JUDGE_BASE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    evaluated(*command)
    assert len(server.bodies) == 47, "its judgements were kept: one call shows that it is there"
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "base-fp32").glob("mt*")}


def visible(bar, **how):
    return bar(**how | {"disable": False, "mininterval": 0})


def test_replies_are_saved_as_each_ends_and_their_progress_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(replies, "tqdm", functools.partial(visible, replies.tqdm))
    jobs = {name: [{"role": "user", "content": name}] for name in "abcd"}
    kept = []
    with Cache(tmp_path / ".cache.jsonl") as cache:

        def dies(conversations, done):
            for number in (2, 0):
                done(number, conversations[number][0]["content"].upper())
                kept.append((tmp_path / ".cache.jsonl").read_text().count("\n"))
            raise UserError("it is gone")

        with pytest.raises(UserError, match=r"it is gone\n2 of 4 are saved in .*: the same command goes on from there"):
            replies.fill(cache, jobs, dies, "a model, turn 1")
        assert kept == [1, 2] and cache.texts == {"c": "C", "a": "A"}

        def lives(conversations, done):
            assert [c[0]["content"] for c in conversations] == ["b", "d"]
            for number in range(2):
                done(number, "later")

        replies.fill(cache, jobs, lives, "a model, turn 1")
    shown = capsys.readouterr().err
    assert "a model, turn 1" in shown and "2/4 [" in shown and "1/2 [00:00<00:0" in shown and "2/2 [" in shown


def test_a_model_in_this_process_is_asked_through_the_chat_template(questions):
    from transformers import AutoTokenizer

    tokenizer, prompts = AutoTokenizer.from_pretrained(ROOT / "sample/ouro-tiny"), []

    def generate(batch, done):
        prompts.extend(tokenizer.batch_decode(batch))
        for n, _ in enumerate(batch):
            done(n, tokenizer("ตอบแล้ว<|im_end|>").input_ids)

    conversations = [[{"role": "user", "content": q["turns"][0]}] for q in questions[:2]]
    for system in (None, "ตอบสั้น ๆ"):
        assert says(endpoint.local_chat(tokenizer, generate, system), conversations) == ["ตอบแล้ว"] * 2
    turn = f"<|im_start|>user\n{questions[1]['turns'][0]}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[1] == f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{turn}"
    assert prompts[3] == f"<|im_start|>system\nตอบสั้น ๆ<|im_end|>\n{turn}"


# ----------------------------------------------------------------------------------------------------------------------
# the cache, and tools/judge.py as a real process


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "run" / ".cache.jsonl"
    with Cache(path) as cache:
        cache.add("a", "หนึ่ง")
        cache.add("b", "สอง")
    whole = path.read_bytes()
    for cut in range(1, len(whole.split(b"\n")[1]) + 1):
        path.write_bytes(whole[:-cut])
        with Cache(path) as cache:
            assert cache.texts == {"a": "หนึ่ง"}
            cache.add("b", "สอง")
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match=r"\.cache\.jsonl, line 1 is damaged"):
        Cache(path)


CACHE = ".mt_bench_thai-ut2.cache.jsonl"


@pytest.fixture
def result(server, questions, tmp_path):
    """A result made with --judge none, as evaluate.py writes it."""
    folder = tmp_path / "results" / "exp2"
    numbers, lines = run(questions, folder, grader=None, cache=CACHE)
    study = {"run": "exp2", "task": "mt_bench_thai", "total_ut_steps": 2, "generation_key": "g", "key": "k"} | numbers
    results.save(folder / "mt_bench_thai-ut2.json", {"results": results.harness_rows(study), "study": study}, lines)
    return folder / "mt_bench_thai-ut2.json"


def judge_script(*files, **rest):
    return subprocess.Popen(
        [sys.executable, "tools/judge.py", *map(str, files)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **rest,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_replies_are_judged_later_without_model_and_gpu(server, questions, tmp_path, result, capsys):
    process = judge_script(result)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    numbers, lines = run(questions, tmp_path / "direct")
    written = json.loads(result.read_text())
    assert {k: written["study"][k] for k in numbers} == numbers
    assert written["study"]["key"] == judge.result_key("g", "a-judge") != judge.result_key("g", None)
    assert written["results"]["mt_bench_thai"]["rating,none"] == numbers["value"]
    assert written["results"]["mt_bench_thai_Math"]["rating,none"] == numbers["subsets"]["Math"]["value"]
    items = result.with_name("mt_bench_thai-ut2.items.jsonl").read_text()
    assert [json.loads(line) for line in items.splitlines()] == lines
    server.bodies.clear()
    command.rate_file(result, find_judge())
    assert "rated by a-judge already" in capsys.readouterr().out and not server.bodies


def test_a_killed_process_pays_for_no_judgement_twice_and_leaves_no_key(server, tmp_path, result, monkeypatch):
    copy = tmp_path / "uninterrupted"
    shutil.copytree(result.parent, copy)
    command.rate_file(copy / result.name, find_judge())
    server.bodies.clear()
    paid, number, resume = [], itertools.count(1), threading.Event()

    def answer(messages):
        if next(number) > 7:
            resume.wait(PATIENCE)
        else:
            paid.append(json.dumps(messages))
        return rate(messages)

    server.answer = answer
    process = judge_script(result)
    while len((result.parent / CACHE).read_bytes().splitlines()) < 18 + 7:  # replies and judgements
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    out = "".join(process.communicate())
    resume.set()
    with (result.parent / CACHE).open("ab") as file:
        file.write(b'{"key": "torn')
    other = FakeServer()  # at another address: the first may still read what the killed process had sent
    monkeypatch.setenv("JUDGE_BASE_URL", other.url)
    process = judge_script(result)
    out += "".join(process.communicate())
    other.close()
    assert process.returncode == 0
    assert len(set(paid)) == 7 and len(other.bodies) == 18 - 7 and not set(paid) & set(other.prompts())
    assert contents(result.parent).keys() == contents(copy).keys()
    for name, content in contents(result.parent).items():
        assert KEY.encode() not in content
        if not name.startswith("."):
            assert content == contents(copy)[name]
    assert KEY not in out


def test_a_full_disk_is_told_and_what_was_judged_is_kept(server, result):
    cache = result.parent / CACHE
    room = cache.stat().st_size + 1000  # for a few judgements
    process = judge_script(result, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    _, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    assert re.search(r"error: cannot write .*\.cache\.jsonl: File too large\n\d+ of 18 are saved", err)
    kept = len(cache.read_bytes().splitlines()) - 18
    assert 0 < kept < 18 and cache.read_bytes().endswith(b"\n")
    assert json.loads(result.read_text())["study"]["value"] is None
    server.bodies.clear()
    command.rate_file(result, find_judge())
    assert len(server.bodies) == 18 - kept


def test_two_processes_on_the_same_result_pay_once(server, result):
    with Cache(result.parent / CACHE):
        processes = [judge_script(result) for _ in range(2)]
        for process in processes:
            assert process.stdout.readline().startswith("waiting for another process")
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert len(server.bodies) == 18 == len(set(server.prompts()))


def test_a_file_that_is_not_there_is_said_before_a_judge_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tools/judge.py", str(tmp_path / "nofile")])
    with pytest.raises(UserError, match="no file .*nofile: replies are in"):
        command.main()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "is not a result of mt_bench_thai: FileNotFoundError"),
        (lambda file: file.write_text("{}"), r"is not a result of mt_bench_thai: KeyError\('study'\)"),
        (lambda file: file.write_text('{"study": {"metric": "accuracy"}}'), "its metric is 'accuracy'"),
        (lambda file: file.with_suffix(".items.jsonl").write_text("{"), "is not a result of mt_bench_thai: JSON"),
    ],
)
def test_a_file_that_is_no_such_result_is_refused(server, result, change, message):
    change(result)
    with pytest.raises(UserError, match=message):
        command.rate_file(result, find_judge())
    assert server.bodies == []
