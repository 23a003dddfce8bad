"""Answers of servers that are hostile, broken, or of other kinds than usual: what of them is taken, shown and saved."""

import gzip
import json

from ouro.evaluate import http
from ouro.evaluate.endpoint import find_endpoint, find_judge
from ouro.files import UserError

import pytest
from judging import KEY, run

REPLY = {"choices": [{"message": {"content": "ตอบ"}}]}
MESSAGES = [{"role": "user", "content": "?"}]


def whole(content="ตอบ", **message):
    return {"role": "assistant", "content": content} | message


def of_parts(*parts):
    return whole([{"type": kind, kind: text} for kind, text in parts])


# --------------------------------------------------------------------------------------------------- how a reply ended

ENDS = {  # a choice -> reply, counted as
    "no word of it": ({"message": whole()}, "ตอบ", ""),
    "stop": ({"message": whole(), "finish_reason": "stop"}, "ตอบ", ""),
    "eos_token": ({"message": whole(), "finish_reason": "eos_token"}, "ตอบ", ""),
    "length": ({"message": whole(), "finish_reason": "length"}, "ตอบ", "cut"),
    "MAX_TOKENS": ({"message": whole(), "finish_reason": "MAX_TOKENS"}, "ตอบ", "cut"),
    "null": ({"message": whole(), "finish_reason": None}, "ตอบ", "cut"),
    "in a character": ({"message": whole("ตอบ\ufffd\ufffd"), "finish_reason": "length"}, "ตอบ", "cut"),
    "a filter": ({"message": whole(), "finish_reason": "content_filter"}, "", "refused"),
    "a refusal": ({"message": whole(None, refusal="ไม่ได้"), "finish_reason": "stop"}, "", "refused"),
    "a refusal in a part": ({"message": of_parts(("refusal", "ไม่ได้"))}, "", "refused"),
    "error": ({"message": whole(), "finish_reason": "error"}, "", "refused"),
    "abort": ({"message": whole(), "finish_reason": "Abort"}, "", "refused"),
    "speaks of a quota": ({"message": whole("insufficient_quota")}, "insufficient_quota", ""),
    "parts": ({"message": of_parts(("text", "ต"), ("text", "อบ"))}, "ตอบ", ""),
    "a thought in a part": ({"message": of_parts(("thinking", [{"type": "text", "text": "คิด"}]), ("text", "ตอบ"))},
                            "ตอบ", ""),
    "a thought in a part alone": ({"message": of_parts(("thinking", "คิด"))}, "", "unfinished_thoughts"),
    "a thought beside nothing": ({"message": whole("", reasoning="คิด")}, "", "unfinished_thoughts"),
}  # fmt: skip


@pytest.mark.parametrize(("choice", "reply", "counted"), ENDS.values(), ids=ENDS)
def test_how_a_reply_ended_is_read_from_what_servers_say_of_it(
    server, model, questions, tmp_path, choice, reply, counted
):
    strange = questions[1]["turns"][0]
    model.answer = lambda messages: choice if messages[-1]["content"] == strange else {"message": whole("ดี")}
    numbers, lines = run(questions[:3], tmp_path, None, find_endpoint(model.url, 7, 0, 0, None))
    assert [line["turns"][0]["reply"] for line in lines] == ["ดี", reply, "ดี"]
    second = counted == "refused"  # the second turn of what was refused is not asked
    counts = {"cut": 0, "refused": 0, "unfinished_thoughts": 0} | ({counted: 1 + second} if counted else {})
    assert {name: numbers[name] for name in counts} == counts


def test_a_reply_that_was_broken_off_once_is_asked_for_again(server, capsys):
    broken = {"choices": [{"message": whole("ต"), "finish_reason": "abort"}]}
    server.faults, server.answer = [(200, json.dumps(broken).encode())], lambda messages: "ตอบ"
    assert find_judge().complete(MESSAGES) == "ตอบ"
    assert "the reply was broken off (finish_reason abort)" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- how much of an answer is taken


LARGE = {
    "large": ((200, b" " * (16 << 20)), "larger than 16 MB"),
    "unpacked": ((200, gzip.compress(b" " * (17 << 20)), {"Content-Encoding": "gzip"}), "larger than 16 MB"),
    "packed twice": ((200, b"", {"Content-Encoding": "gzip, gzip"}), "packed by gzip, gzip, which was not asked for"),
    "packed otherwise": ((200, b"", {"Content-Encoding": "zstd"}), "packed by zstd"),
    "a large error": ((500, b" " * (16 << 20)), "larger than 16 MB"),
}


@pytest.mark.parametrize(("fault", "message"), LARGE.values(), ids=LARGE)
def test_an_answer_larger_than_any_reply_ends_the_command_at_once(server, fault, message):
    server.faults = [fault]
    with pytest.raises(UserError, match=f"judge a-judge at .*: its answer is {message}"):
        find_judge().complete(MESSAGES)
    assert len(server.bodies) == 1


def test_an_answer_may_be_packed(server):
    server.faults = [(200, gzip.compress(json.dumps(REPLY).encode()), {"Content-Encoding": "gzip"})]
    assert find_judge().complete(MESSAGES) == "ตอบ"


def test_an_answer_that_does_not_end_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(http, "LONGEST", 0.3)
    server.faults = ["drips"]
    with pytest.raises(UserError, match=r"its answer is not whole after 0\.3 seconds"):
        find_judge().complete(MESSAGES)


@pytest.mark.parametrize("wait", ["9" * 5000, "1e999", f"Mon, 01 Jan 2020 {'9' * 20}:00:00 GMT"])
def test_a_retry_after_that_is_too_long_is_told(server, wait):
    server.faults = [(429, b"later", {"Retry-After": wait})]
    with pytest.raises(UserError, match=f"later; Retry-After: {wait[:30]}") as error:
        find_judge().complete(MESSAGES)
    assert len(str(error.value)) < 200


# -------------------------------------------------------------------------------------------- what is shown, and saved


def test_a_key_is_hidden_in_replies_and_messages_before_they_are_cut(server, questions, tmp_path, monkeypatch):
    key = "sk/not+a=real/key"
    monkeypatch.setenv("JUDGE_API_KEY", key)
    forms = [key, key.replace("/", "\\/"), "sk%2Fnot%2Ba%3Dreal%2Fkey"]
    server.answer = lambda messages: "Rating: [[5]] " + " ".join(forms)
    _, lines = run(questions[:1], tmp_path)
    assert lines[0]["turns"][0]["judgement"] == "Rating: [[5]] *** *** ***"
    assert not any(form in file.read_text() for file in tmp_path.iterdir() for form in forms)
    for form in forms:
        said = {"error": {"message": "_" * (300 - len(form) + 2) + form}}
        server.faults = [(401, json.dumps(said).encode())]
        with pytest.raises(UserError) as error:
            find_judge().check()
        assert form[:5] not in str(error.value)


def test_what_a_server_says_is_told_on_one_line(server, monkeypatch):
    said = json.dumps({"error": {"message": "no\r\nerror: all \x1b[31mresults are lost\u2028"}}).encode()
    server.faults = [(401, said)]
    with pytest.raises(UserError) as told:
        find_judge().check()
    first, hint = str(told.value).splitlines()
    assert first.endswith(": 401: no error: all \\x1b[31mresults are lost") and hint.startswith("is JUDGE_API_KEY")
    server.answer = lambda messages: {"message": whole(None, refusal="no\r\nerror: lost"), "finish_reason": "stop"}
    with pytest.raises(UserError, match=r"^judge .* is a refusal: no error: lost$"):
        find_judge().check()


def test_a_short_key_is_a_placeholder_and_hides_no_words(server, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "none")
    server.answer = lambda messages: "Rating: [[5]], for it has none."
    assert find_judge().complete(MESSAGES) == "Rating: [[5]], for it has none."


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [
        ("http://judge.example/v1", KEY, True),
        ("http://192.168.0.7:8000/v1", KEY, True),
        ("http://judge.example/v1", "", False),
        ("https://judge.example/v1", KEY, False),
        ("http://localhost:8000/v1", KEY, False),
        ("http://127.0.0.1/v1", KEY, False),
        ("http://[::1]:8000/v1", KEY, False),
    ],
)
def test_a_key_that_goes_over_plain_http_to_another_machine_is_told(monkeypatch, capsys, url, key, warned):
    for name, value in {"BASE_URL": url, "MODEL": "m", "API_KEY": key}.items():
        monkeypatch.setenv(f"JUDGE_{name}", value)
    find_judge()
    told = capsys.readouterr().err
    assert ("warning: JUDGE_API_KEY is sent to" in told and "by http" in told) == warned and KEY not in told


def test_a_terminal_obeys_nothing_that_a_server_says(server, capsys):
    server.faults = [(503, b"\x1b]52;c;cm0=\x07\x1b[2J")]
    server.answer = lambda messages: "Rating: [[5]]"
    find_judge().complete(MESSAGES)
    assert "\x1b" not in (told := capsys.readouterr().err) and r"\x1b[2J" in told
