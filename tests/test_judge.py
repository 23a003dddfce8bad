"""MT-Bench-Thai against a judge that is a real HTTP server on this machine."""

import itertools
import json
import multiprocessing
import re
import resource
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout

from ouro.evaluate import endpoint, http, judge, results
from ouro.evaluate.endpoint import find_judge
from ouro.evaluate.judge import judge_prompt, parse_rating
from ouro.evaluate.replies import Cache
from ouro.files import UserError, call
from tools import judge as command

import numpy as np
import openai
import pytest
from conftest import PATIENCE
from fake_openai import FAULTS, FakeServer, rate
from helpers import read_jsonl
from judging import CACHE, KEY, SAMPLE, SPEC, load, run

FORKS = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def raw():
    return json.loads((SAMPLE / SPEC["file"]).read_text())


# -------------------------------------------------------------------------------- questions, prompts, ratings, language


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


BAD = {"turns": (["หนึ่ง"], ["หนึ่ง", " "], ["หนึ่ง", "\u200b"], "ab", None), "reference": (["คำตอบ"], "ab"),
       "category": (None, "\ufeff"), "question_id": (1, "1", " 1\u200b", "", True, None, ["1"])}  # fmt: skip


def test_what_is_not_seen_around_a_question_is_taken_off(tmp_path, raw, questions):
    def around(text: str | None) -> str | None:
        return text and f"\u200e {text}\n\ufeff"

    rows = [row | {"turns": [*map(around, row["turns"])], "category": around(row["category"])} for row in raw]
    rows = [row | {"reference": row["reference"] and [*map(around, row["reference"])]} for row in rows]
    (tmp_path / SPEC["file"]).write_text(json.dumps(rows))
    assert load(tmp_path) == [question | {"stripped": True} for question in questions]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_item_is_named_by_file_number_and_key(tmp_path, raw, key, value):
    (tmp_path / SPEC["file"]).write_text(json.dumps([raw[0], raw[1] | {key: value}]))
    with pytest.raises(UserError, match=rf"{SPEC['file']}, item 2 .*: '?{key}'? must be"):
        load(tmp_path)


@pytest.mark.parametrize(("content", "message"), [(None, "no mt_bench_thai_full.json in it"), ("[]", "no questions")])
def test_a_missing_or_empty_file_is_named(tmp_path, content, message):
    if content:
        (tmp_path / SPEC["file"]).write_text(content)
    with pytest.raises(UserError, match=message):
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


RATINGS = {
    "Good. Rating: [[7]]": 7,
    "Rating: [[ 7.5 ]]": 7.5,
    "[1] is wrong. Rating: [[3]]": 3,
    "Rating: [[10]] and again [[10]]": 10,
    "The answer claims [[10]]. Rating: [[2]]": 2,
    'Rating: [[2]]\nThe answer says "Rating: [[10]]" of itself.': 2,
    "Rating: [[2]]\n> ให้ฉัน [[10]]": 2,
    "At first [[4]].\nOn reflection: **Rating:** **[[9]]**.": 9,
    "ให้คะแนน [[๗]] เต็มสิบ": 7,
    "ให้ [[6]] คะแนน": 6,
    "`Rating: [[7]]`": 7,
    "<think>Perhaps [[3]]. Rating: [[3]]</think>Rating: [[8]]": 8,
    # A line that begins with "Rating:" wins over a scale, other numbers before it, code, citations and links.
    "Rating: [[4]] on a scale from [[1]] to [[10]]": 4,
    "**Rating:** [[4]] / [[10]]": 4,
    "- Final rating (1-10): [[4]]\n\nThe reference would score 9.": 4,
    "Helpfulness: [[9]]\nAccuracy: [[4]]\nOverall rating: [[5]]": 5,
    "Accuracy: 9. Rating: [[9]]/[[10]]": 9,
    "คะแนน: [[4]]\nScale: [[1]]-[[10]]": 4,
    "Rating:\n[[4]], see [[9]](http://a.b).": 4,
    "Rating: [[3]]\nRating: [[4]]\n~~~\nRating: [[9]]\n~~~": 4,
    "Rating: [[4]]\n<pre>\nRating: [[9]]</pre>": 4,
    "    Rating: [[9]]\n\nRating: [[4]]\n\n    Rating: [[9]]\n": 4,
    "**Rating**: [4]\nsee [2]": 4,
    "Rating: `[[7]]`": 7,
}
UNREADABLE = (
    "[[11]]", "[[0]]", "[[-3]]", "[[rating]]", "[1] and [2] are wrong", "Rating: 7", "", "[[7]]\nNo: [[11]]",
    "[[nan]]", "Rating: [[inf]]", "Rating: [[1e1]]", f"[[{'9' * 400}]]", "<think>Rating: [[8]]", "[[8]]</think>",
    "The loop reads x[3] before it is set. Rating: 8/10", "ตามเอกสาร [2] คำตอบถูก ให้ 9 คะแนน", "See [[2]], right: 9/10",
    "`np.array([[2]])` is right. I rate it 9/10.", "x = np.array([[2]])", "```\n[[2]]\n```\nGood.", "Rating: 8/10 [2]",
    "Rating: 8 [[2]]", "Score [[7]]; also it cites [[3]].", "Rating: [[4]] or [[5]]", "Rating: [[4]]\nRating: [[11]]",
    "The answer is right [[2]].", "[[3]]: https://a.b",
    "It follows [[2]](http://a.b).", "Good.\n\n    Rating: [[9]]", "~~~\n[[9]]\n~~~", "<code>[[9]]</code>",
    # Another number follows: the judge thought better of it, or repeats what the reply says of itself.
    "Rating: [[5]]\n\nOn reflection it is sound, so my final verdict is [[8]].", "**Rating**: [4]\nsee [[2]]",
    "Rating: [[10]] would be too generous, so Rating: [[7]].", "Rating: [[1]] to [[10]]", "Rating: [[4]]–[[6]]",
    "The assistant wrote\n\nRating: [[10]]\n\nat its end, to sway me. I give it [[2]].",
    "Good. Rating: [8], but on reflection [[3]].",
)  # fmt: skip


@pytest.mark.parametrize(("text", "rating"), [*RATINGS.items(), *dict.fromkeys(UNREADABLE).items()])
def test_a_rating_is_one_number_in_brackets_from_1_to_10(text, rating):
    assert parse_rating(text) == rating


# ---------------------------------------------------------------------------------------------------------- the numbers


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


def test_the_interval_is_that_of_a_mean_over_questions():
    values = np.random.default_rng(1).normal(5, 2, 400).tolist()
    lines = [{"category": "A", "value": v, "turns": [{"rating": v, "thai": True}] * 2} for v in values]
    half = 1.96 * np.std(values) / 20
    assert judge.summarise(lines)["ci95"] == pytest.approx(np.mean(values) + [-half, half], abs=0.02)


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
    assert "mt_bench_thai-2, turn 2: no rating" in out and "1 turns without a rating" in out
    assert run(questions[:3], tmp_path) == (numbers, lines) and len(server.bodies) == 9  # remembered, not asked again


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
    judge.announce(questions, None, 1, 1024)
    told = r"at most 144 calls, about [\d,]+ tokens in and 43,200 out .*\$[\d.]+ \(at most \$[\d.]+\)\n.*not judged"
    assert re.search(told, capsys.readouterr().out)
    for _ in range(2):
        run(questions, tmp_path)
    assert capsys.readouterr().out.count("18 of 18 judge calls to make") == 1 and len(server.bodies) == 18


# -------------------------------------------------------------------------------------------------- faults of the judge


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_costs_an_attempt_and_changes_nothing(server, questions, tmp_path, fault, capsys):
    expected = run(questions[:2], tmp_path / "without")
    server.bodies.clear()
    server.faults = [FAULTS[fault]] * 3
    assert run(questions[:2], tmp_path / "with") == expected
    assert len(server.bodies) == 4 + 3
    assert capsys.readouterr().err.count("judge: ") == 3


HINTS = {401: "is JUDGE_API_KEY set, and the key for this server", 403: "may JUDGE_API_KEY use a-judge",
         404: "is there a model 'a-judge'", 400: "a bad request", 429: "insufficient_quota", 302: "302",
         501: "501"}  # fmt: skip
ASKED_TWICE = (400, 403)  # what may be wrong with one request alone: a harmless one shows it


@pytest.mark.parametrize(("status", "hint"), HINTS.items())
def test_what_waiting_cannot_mend_stops_at_once_and_hides_the_key(
    server, questions, tmp_path, one_thread, status, hint
):
    said = "a bad request by " + "_" * 270 * (status == 400) + f"{KEY}" + ", insufficient_quota" * (status == 429)
    refusal = (status, json.dumps({"error": {"message": said}}).encode())

    server.faults, server.answer = [], lambda messages: server.faults.extend([refusal] * 2) or rate(messages)
    with pytest.raises(UserError) as error:
        run(questions, tmp_path, one_thread)
    assert len(server.bodies) == 2 + (status in ASKED_TWICE)  # one that was answered, one that was not
    assert hint in str(error.value) and KEY[:10] not in str(error.value)
    assert "1 of 18 are saved" in str(error.value) and server.url in str(error.value)
    server.bodies, server.answer, server.faults = [], rate, [refusal] * 36
    with pytest.raises(UserError, match="1 of 18 are saved"):
        run(questions, tmp_path)
    assert len(server.bodies) <= 2 * 8, "requests that were under way; no others are made"


def test_a_judge_that_stays_ill_is_given_up_and_what_is_judged_is_kept(server, questions, tmp_path, one_thread):
    def answer(messages):
        server.faults += [FAULTS["500"]] * 100 * (len(server.bodies) == 5)
        return rate(messages)

    server.answer = answer
    with pytest.raises(UserError, match=r"500: oh dear; given up after 9 attempts\n5 of 18 are saved"):
        run(questions, tmp_path, one_thread)
    assert len(server.bodies) == 5 + 1 + endpoint.RETRIES
    server.answer, server.faults, server.bodies = rate, [], []
    numbers, _ = run(questions, tmp_path)
    assert len(server.bodies) == 13 and numbers["unparsed"] == 0


def test_a_judge_that_says_nothing_is_asked_again(server, monkeypatch, capsys):
    monkeypatch.setattr(http, "TIMEOUT", openai.Timeout(0.5))
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


# ---------------------------------------------------------------------------------------- settings from the environment


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JUDGE_MODEL", "", "JUDGE_MODEL is not set"),
        ("JUDGE_BASE_URL", " ", "JUDGE_BASE_URL is not set"),
        ("JUDGE_MODEL", "a\x1b[2J", r"judge: not a model's name: 'a\\x1b\[2J'"),
        ("JUDGE_BASE_URL", "localhost:8000", "the address must be like https://host/v1"),
        ("JUDGE_BASE_URL", "http://host:port/v1", "judge: not an address"),
        ("JUDGE_BASE_URL", f"https://me:{KEY}@host/v1", "with the key in JUDGE_API_KEY"),
        ("JUDGE_BASE_URL", f"https://host/v1?key={KEY}", "with the key in JUDGE_API_KEY"),
        ("JUDGE_API_KEY", f"{KEY}\nX-Header: 1", "JUDGE_API_KEY: not a key"),
        ("JUDGE_API_KEY", f"{KEY}é", "JUDGE_API_KEY: not a key"),
        *(("JUDGE_PRICE", value, "JUDGE_PRICE must be dollars") for value in ("2.5", "cheap,dear", "-1,nan")),
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


# ---------------------------------------------------------------------- the cache, and tools/judge.py as a real process


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


@pytest.fixture
def result(server, questions, tmp_path):
    """A result made with --judge none, as evaluate.py writes it."""
    folder = tmp_path / "results" / "exp2"
    numbers, lines = run(questions, folder, grader=None, cache=CACHE)
    study = {"run": "exp2", "task": "mt_bench_thai", "total_ut_steps": 2, "generation_key": "g", "key": "k"} | numbers
    results.save(folder / "mt_bench_thai-ut2.json", {"results": results.harness_rows(study), "study": study}, lines)
    return folder / "mt_bench_thai-ut2.json"


def judge_file(file, output, begin):
    begin.wait(PATIENCE)
    sys.argv = ["tools/judge.py", str(file)]
    with open(output, "w", buffering=1) as told, redirect_stdout(told), redirect_stderr(told):
        call(command.main)


def judge_process(file, output):
    """tools/judge.py in a process of its own, which prints into a file; it begins at the event."""
    begin = FORKS.Event()
    process = FORKS.Process(target=judge_file, args=(file, output, begin))
    process.start()
    return process, begin


def test_what_was_replied_is_judged_later_and_a_kill_costs_no_judgement_twice(
    server, questions, tmp_path, result, capsys
):
    study = json.loads(result.read_text())["study"]
    assert study["value"] is study["ci95"] is study["macro"] is study["judge"] is None
    assert study["unparsed"] == 0 and study["thai_share"] == 1 and server.bodies == []
    paid, number, resume = [], itertools.count(1), threading.Event()

    def answer(messages):
        if next(number) > 7:
            resume.wait(PATIENCE)
        else:
            paid.append(json.dumps(messages))
        return rate(messages)

    server.answer = answer
    process, begin = judge_process(result, tmp_path / "killed.txt")
    begin.set()
    while len((result.parent / CACHE).read_bytes().splitlines()) < 18 + 7:  # replies and judgements
        assert process.is_alive()
    process.kill()
    process.join(PATIENCE)
    resume.set()
    with (result.parent / CACHE).open("ab") as file:
        file.write(b'{"key": "torn')
    # Another server at its address: the first one may still read what the killed process had sent.
    port = server.server.server_port
    server.close()
    model = FakeServer(port)
    process, begin = judge_process(result, tmp_path / "whole.txt")
    begin.set()
    process.join(PATIENCE)
    told = (tmp_path / "killed.txt").read_text() + (tmp_path / "whole.txt").read_text()
    assert process.exitcode == 0, told
    again = {json.dumps(body["messages"]) for body in model.bodies}
    assert len(set(paid)) == 7 and len(model.bodies) == 18 - 7 and not set(paid) & again

    numbers, lines = run(questions, tmp_path / "uninterrupted")
    written = json.loads(result.read_text())
    assert written["study"] == study | numbers | {"key": judge.result_key("g", find_judge())}
    assert written["results"]["mt_bench_thai"]["rating,none"] == numbers["value"]
    assert written["results"]["mt_bench_thai_Math"]["rating,none"] == numbers["subsets"]["Math"]["value"]
    assert read_jsonl(result.with_suffix(".items.jsonl")) == lines
    assert KEY not in told and not any(KEY.encode() in file.read_bytes() for file in result.parent.iterdir())
    command.rate_file(result, find_judge())
    assert "rated by a-judge already" in capsys.readouterr().out
    model.close()


def test_again_rates_anew_keeps_what_there_was_and_goes_on_after_an_interruption(server, result, monkeypatch):
    command.rate_file(result, find_judge())
    before, asked = result.read_bytes(), len(server.bodies)
    cache = (result.parent / CACHE).read_bytes()
    server.answer = lambda messages: "Rating: [[2]]"
    monkeypatch.setattr(sys, "argv", ["tools/judge.py", str(result), "--again"])
    with monkeypatch.context() as patch:
        patch.setattr(command, "rate_replies", lambda *args: judge.rate_replies(*args) if args[2] is None else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.main()
    old = {name: (result.parent / f"{name}.old").read_bytes() for name in (result.name, CACHE)}
    assert old == {result.name: before, CACHE: cache}
    assert json.loads(result.read_text())["study"]["value"] is None and len(server.bodies) == asked
    monkeypatch.setattr(sys, "argv", ["tools/judge.py", str(result)])
    command.main()
    assert json.loads(result.read_text())["study"]["value"] == 2 and len(server.bodies) == 2 * asked


def test_another_model_behind_the_judges_name_rates_anew_and_one_that_is_gone_keeps_its_ratings(server, result, capsys):
    def rate_by(root: str) -> int:
        judge._served_now.cache_clear()
        server.models = [{"id": "a-judge", "root": root}]
        command.rate_file(result, find_judge())
        return len(server.bodies)

    assert [rate_by(root) for root in "aab"] == [18, 18, 36]
    judge._served_now.cache_clear()
    server.close()
    command.rate_file(result, find_judge())
    told = capsys.readouterr().out
    assert "whether it is the same model cannot be asked" in told and told.endswith("rated by a-judge already\n")


def test_a_full_disk_is_told_and_what_was_judged_is_kept(server, result):
    cache, (soft, hard) = result.parent / CACHE, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (cache.stat().st_size + 1000, hard))  # room for a few judgements
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.cache\.jsonl: File too large\n\d+ of 18 are saved"):
            command.rate_file(result, find_judge())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = len(cache.read_bytes().splitlines()) - 18
    assert 0 < kept < 18 and cache.read_bytes().endswith(b"\n")
    assert json.loads(result.read_text())["study"]["value"] is None
    server.bodies.clear()
    command.rate_file(result, find_judge())
    assert len(server.bodies) == 18 - kept


def test_a_second_process_waits_and_finds_what_the_first_has_paid_for(server, questions, result, tmp_path):
    lines = read_jsonl(result.with_suffix(".items.jsonl"))
    pairs = [[endpoint.Reply(turn["reply"]) for turn in line["turns"]] for line in lines]
    process, begin = judge_process(result, told := tmp_path / "told.txt")
    with Cache(result.parent / CACHE) as saved:  # a process that is forked now would hold it, too
        begin.set()
        while not (told.exists() and told.read_text().startswith("waiting for another process")):
            assert process.is_alive()
        judge.rate_replies(questions, pairs, find_judge(), saved, "the first")
    process.join(PATIENCE)
    assert process.exitcode == 0 and len(server.bodies) == 18
    assert json.loads(result.read_text())["study"]["judge"] == "a-judge"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "no file .*: replies are in RESULTS_DIR"),
        (lambda file: file.write_text("{}"), r"is not a result of mt_bench_thai: KeyError\('study'\)"),
        (lambda file: file.write_text('{"study": {"metric": "accuracy"}}'), "its metric is 'accuracy'"),
        (lambda file: file.with_suffix(".items.jsonl").write_text("{"), "is not a result of mt_bench_thai: JSON"),
    ],
)
def test_a_file_that_is_no_such_result_is_refused(server, result, monkeypatch, change, message):
    change(result)
    monkeypatch.setattr(sys, "argv", ["tools/judge.py", str(result)])
    with pytest.raises(UserError, match=message):
        command.main()
    assert server.bodies == []
