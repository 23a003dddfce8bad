"""Served models, as judge and under test: how they are asked and known, thoughts, cut replies, refusals."""

import json
import re

import evaluate
from ouro import settings
from ouro.data.thai import reply_tokens
from ouro.evaluate import endpoint, tables
from ouro.evaluate.endpoint import Reply, find_endpoint
from ouro.evaluate.models import ModelUnderTest
from ouro.evaluate.tasks import load_task
from ouro.files import UserError
from ouro.verdict import tables as report_tables
from ouro.verdict.study import Reader

import pytest
from fake_openai import FAULTS
from helpers import ROOT, read_jsonl
from judging import KEY, SAMPLE, chat, run, says

# ------------------------------------------------------------------------------------------------------- a served model


def find_served(url):
    return find_endpoint(url, 7, 0.2, 3, "สั้น ๆ")


def test_a_served_model_answers_both_turns(server, model, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("ENDPOINT_API_KEY", KEY)
    model.answer = lambda messages: says(chat, [messages[1:]])[0]
    model.faults = list(FAULTS.values())
    served = find_served(model.url.removesuffix("/v1"))
    result = run(questions, tmp_path / "served", model=served)
    assert result == run(questions, tmp_path / "local") == run(questions, tmp_path / "served", model=served)
    assert len(model.bodies) == 18 + len(FAULTS) and model.keys() == {f"Bearer {KEY}"}
    expected = {"model": "tiny", "max_tokens": 7, "temperature": 0.2, "seed": 3}
    assert all({k: body[k] for k in expected} == expected for body in model.bodies)
    assert {body["messages"][0]["content"] for body in model.bodies} == {"สั้น ๆ"}
    assert {len(body["messages"]) for body in model.bodies} == {2, 4}


def test_a_served_model_is_named_by_the_servers_list_or_by_the_environment(server, model, monkeypatch):
    assert find_served(model.url).model == "tiny"
    for models, message in (
        (["base", "exp2"], "serves base, exp2: set ENDPOINT_MODEL to one"),
        ([], "serves no model"),
        ([None], "not the JSON that was asked for"),
        (["a\x1b[2J"], r"not a model's name: 'a\\x1b\[2J'"),
        (["a" * 201], "not a model's name: 'aaa"),
    ):
        model.models = models
        with pytest.raises(UserError, match=message):
            find_served(model.url)
    monkeypatch.setenv("ENDPOINT_MODEL", "exp2")
    assert find_served(model.url).model == "exp2"


def test_a_served_model_is_known_by_address_name_and_what_the_list_tells(server, model, monkeypatch):
    found = []
    for told in ({}, {"root": "a"}, {"root": "b"}, {"root": "b", "max_model_len": 4096}, {"root": "b", "created": 5}):
        model.models = [{"id": "tiny"} | told]
        found += [find_served(model.url).identity] * 2
        model.models = [{"id": "tiny", "pricing": {"prompt": "1"}, "status": {"value": "loaded"}} | told]
        assert find_served(model.url).identity == found[-1], "no clock, random number, price or state is part of it"
    server.models = model.models
    found.append(find_served(server.url).identity)
    assert len(set(found)) == 6
    monkeypatch.setenv("ENDPOINT_MODEL", "another")
    unlisted = find_served(f"{model.url}/none")
    assert unlisted.identity not in found


BASES = [[{"id": "thai", "root": "a", "parent": "base"}, {"id": "base", "root": root, "parent": None}] for root in "bc"]
FILES = [[{"id": "a.gguf", "meta": {"size": 1}}], [{"id": "b.gguf", "meta": {"size": 1}}]]


@pytest.mark.parametrize("lists", [BASES, FILES], ids=["the base of its adapter", "the one model, by another name"])
def test_a_served_model_is_known_by_what_it_is_made_of_too(lists, model, monkeypatch):
    monkeypatch.setenv("ENDPOINT_MODEL", "thai")
    found = []
    for model.models in lists:
        found.append(find_served(model.url).identity)
        model.models = [*model.models, {"id": "neighbour"}] if len(model.models) > 1 else model.models
        assert find_served(model.url).identity == found[-1]
    assert found[0] != found[1]


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """evaluate.py with a config's settings and these arguments, in this process: what it prints."""
    monkeypatch.chdir(ROOT)

    def evaluated(*arguments):
        argv = ["--config", "tests/smoke.yaml", "--results_dir", str(tmp_path), *map(str, arguments)]
        evaluate.evaluate(settings.resolve("", argv, evaluate.options, several=True))
        return capsys.readouterr()

    return evaluated


def test_the_command_scores_a_served_model_and_asks_it_nothing_twice(server, model, tmp_path, evaluated):
    model.answer = lambda messages: f"คำตอบคือ ({1 + len(messages[1]['content']) % 4})"
    command = ["--endpoint", model.url, "--tasks", "openthaieval,mt_bench_thai", "--limit", 2, "--judge", "none",
               "--max_new_tokens", 9, "--ut_steps", 1, "--system_prompt", "สั้น ๆ"]  # fmt: skip
    evaluated(*command)
    posts = len(model.bodies)
    assert "2 of 2 tasks are complete already" in evaluated(*command).out
    assert posts == len(model.bodies) == len({json.dumps(body) for body in model.bodies})
    assert all(body["messages"][0] == {"role": "system", "content": "สั้น ๆ"} for body in model.bodies)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("baseline-"))
    lines = read_jsonl(folder / "openthaieval-ut1.items.jsonl")
    study = json.loads((folder / "openthaieval-ut1.json").read_text())["study"]
    assert study["kind"] == "baseline" and study["items"] == len(lines) > 1
    assert all(line["resps"][0][0] == f"คำตอบคือ ({line['prediction']})" for line in lines)
    assert study["value"] == sum(line["prediction"] == line["gold"] for line in lines) / len(lines)
    whole = {file: file.read_bytes() for file in folder.glob("[!.]*-ut1*")}
    evaluated(*command, "--again")
    assert len(model.bodies) == 2 * posts
    assert all(
        file.read_bytes() == text == file.with_name(f"{file.name}.old").read_bytes() for file, text in whole.items()
    )
    model.models = [{"id": "tiny", "root": "another"}]
    model.answer = lambda messages: {"finish_reason": "length", "message": {"content": "ยังไม่"}}
    unlimited = [part for part in command if part not in ("--max_new_tokens", 9)]
    assert re.search(r"warning: \d+ replies were cut", evaluated(*unlimited).out) and len(model.bodies) == 3 * posts
    assert {body["max_tokens"] for body in model.bodies[-posts:]} == {2 * 500, 2 * 2500}, "of Thai, not of tokens"
    with pytest.raises(UserError, match="gives no log-probabilities; thai_exam needs them"):
        evaluated(*("thai_exam" if part == "openthaieval,mt_bench_thai" else part for part in command))
    with pytest.raises(UserError, match="answers at one depth and does not say which: name it by --ut_steps"):
        evaluated(*("1,2" if part == 1 else part for part in command))


def test_results_of_a_served_run_have_the_depth_that_the_server_tells(model, tmp_path, evaluated):
    model.answer = lambda messages: "คำตอบคือ (1)"
    command = ["--endpoint", model.url, "--tasks", "openthaieval", "--limit", 1]
    for depth in (2, 4):
        model.models = [{"id": f"seed0/exp2:{depth}", "owned_by": "vllm"}]
        evaluated(*command)
    files = sorted((tmp_path / "baseline-seed0--exp2").glob("*-ut?.json"))
    assert [json.loads(file.read_text())["study"]["total_ut_steps"] for file in files] == [2, 4]
    with pytest.raises(UserError, match="answers at depth 4: leave --ut_steps out"):
        evaluated(*command, "--ut_steps", 2)
    evaluated(*command, "--ut_steps", 4)
    rows = report_tables.baseline_rows(Reader(tmp_path, tmp_path).results)
    assert [row["read at"][1] for row in rows] == ["2", "4"]
    model.models, before = [{"id": "any:1-3", "owned_by": "vllm"}], len(model.bodies)
    evaluated(*command, "--ut_steps", "1,3")
    assert {body["vllm_xargs"]["total_ut_steps"] for body in model.bodies[before:]} == {1, 3}
    assert len(list((tmp_path / "baseline-any").glob("*-ut[13].json"))) == 2
    assert not any("vllm_xargs" in body for body in model.bodies[:before])
    model.models = [{"id": "a:4", "owned_by": "library"}]
    with pytest.raises(UserError, match="does not say which: name it by --ut_steps"):
        evaluated(*command)


def test_the_command_needs_a_judge_only_for_what_is_not_rated(server, tmp_path, monkeypatch, evaluated):
    command = ["--base", "--use_qlora", "false", "--tasks", "mt_bench_thai", "--ut_steps", "1,2", "--max_new_tokens", 5]
    out, err = evaluated(*command)
    assert "at most 36 calls" in out and KEY not in err
    assert len(server.bodies) == 1 + 36, "one call shows that the judge is there"
    before = {file.name: file.read_bytes() for file in (tmp_path / "base-fp32").glob("mt*")}
    studies = [json.loads(before[f"mt_bench_thai-ut{depth}.json"])["study"] for depth in (1, 2)]
    assert all(study["judge"] == "a-judge" and f"{study['value']:.2f}" in out for study in studies)
    for name in ("JUDGE_BASE_URL", "JUDGE_MODEL"):
        monkeypatch.delenv(name)
        assert "1 of 1 tasks are complete already" in evaluated(*command).out
    (tmp_path / "base-fp32/mt_bench_thai-ut2.items.jsonl").unlink()
    with pytest.raises(UserError, match="JUDGE_BASE_URL is not set"):
        evaluated(*command)
    monkeypatch.setenv("JUDGE_BASE_URL", server.url)
    monkeypatch.setenv("JUDGE_MODEL", "a-judge")
    evaluated(*command)
    assert len(server.bodies) == 1 + 36 + 1, "its judgements were kept"
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "base-fp32").glob("mt*")}


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
    for prompt, system in ((prompts[1], "You are a helpful assistant."), (prompts[3], "ตอบสั้น ๆ")):
        turn = f"<|im_start|>user\n{questions[1]['turns'][0]}<|im_end|>\n<|im_start|>assistant\n"
        assert prompt == f"<|im_start|>system\n{system}<|im_end|>\n{turn}"
    count = len(tokenizer("ตอบแล้ว<|im_end|>").input_ids)
    for limit, end in ((count + 1, ""), (count, "cut")):
        assert says(endpoint.local_chat(tokenizer, generate, None, limit), conversations)[0].end == end
    tokenizer.chat_template += "<think>\n"
    assert says(endpoint.local_chat(tokenizer, generate, None), conversations)[0] == "<think>\nตอบแล้ว"
    assert reply_tokens(tokenizer, 1000) == pytest.approx(703, abs=9) and reply_tokens(None, 1000) == 2000


# ---------------------------------------------------------------------------------- thoughts, cut replies, refusals


def test_a_cut_thought_is_no_answer_and_cut_replies_are_named(server, questions, tmp_path, capsys):
    """A template that begins the thought leaves no <think> in the reply: that of the others' </think> tells."""
    ends = {
        0: ("<think>\nLet me", ""),
        1: ("Okay, they ask", "cut"),
        2: ("ก้อน</think>ตอบ", ""),
        3: ("คิด</think>ตอบไม่", "cut"),
    }
    seen = []

    def thinks(conversations, done):
        seen.append(conversations)
        for n, _ in enumerate(conversations):
            done(n, Reply(*ends[n]))

    numbers, lines = run(questions[:4], tmp_path, model=thinks)
    assert [line["turns"][0]["reply"] for line in lines] == ["", "", "ตอบ", "ตอบไม่"]
    assert [c[1]["content"] for c in seen[1]] == ["", "", "ตอบ", "ตอบไม่"]
    assert "Let me" not in str(server.bodies) and "Okay" not in str(server.bodies)
    assert (numbers["cut"], numbers["unfinished_thoughts"], numbers["unparsed"]) == (4, 4, 0)
    named = "cut before their end: mt_bench_thai-2 turn 1, mt_bench_thai-2 turn 2, mt_bench_thai-4 turn 1"
    assert named in capsys.readouterr().out
    assert run(questions[:4], tmp_path, model=None) == (numbers, lines)
    tested = ModelUnderTest("x", "baseline")
    task = load_task("mt_bench_thai", settings.Settings(paths={"mt_bench_thai": str(SAMPLE)}), 1, [])
    tables.print_task(task, [tested], {("x", 1): numbers | {"protocol": "mt_bench", "refused": 3}}, [1])
    printed = capsys.readouterr().out
    assert "4 replies were cut" in printed and "4 replies are thoughts without an answer" in printed
    assert "3 requests were refused by the server: their turns are in none of the means" in printed


def test_what_a_server_refuses_is_left_out_and_the_rest_goes_on(server, model, questions, tmp_path):
    filtered = "The response was filtered due to the prompt"
    server.refuse = lambda body: filtered if questions[1]["turns"][1] in body["messages"][-1]["content"] else None
    first = questions[2]["turns"][0]
    model.refuse = lambda body: "maximum context length" if body["messages"][-1]["content"] == first else None
    model.answer = lambda messages: {"finish_reason": "content_filter", "message": {"role": "assistant"}} if (
        messages[-1]["content"] == questions[3]["turns"][1]) else "ตอบ"  # fmt: skip
    numbers, lines = run(questions[:4], tmp_path, model=find_served(model.url))
    rated = [[turn["rating"] is not None for turn in line["turns"]] for line in lines]
    assert rated == [[True, True], [True, False], [False, False], [True, False]]
    assert filtered in lines[1]["turns"][1]["judgement"] and "maximum context" in lines[2]["turns"][0]["end"]
    assert numbers["refused"] == numbers["unparsed"] == 4 and numbers["value"] is not None
    asked = len(server.bodies), len(model.bodies)
    assert run(questions[:4], tmp_path, model=find_served(model.url)) == (numbers, lines)
    assert (len(server.bodies), len(model.bodies)) == asked


PARTICULAR = {
    "max_tokens": "max_tokens is not supported with this model. Use max_completion_tokens instead.",
    "temperature": "Unsupported value: temperature does not support 0 with this model.",
    "system": "System role not supported",
}


@pytest.mark.parametrize("wants", [*([name] for name in PARTICULAR), list(PARTICULAR)])
def test_a_judge_is_asked_as_it_wants_which_it_says_once(server, questions, tmp_path, one_thread, wants):
    def refuse(body):
        has = body | {"system": 1} if body["messages"][0]["role"] == "system" else body
        return next((PARTICULAR[name] for name in wants if name in has), None)

    server.refuse = refuse
    one_thread.check()
    assert len(server.bodies) == 1 + len(wants)
    numbers, _ = run(questions, tmp_path, one_thread)
    assert len(server.bodies) == 1 + len(wants) + 18 and numbers["refused"] == numbers["unparsed"] == 0
    body = server.bodies[-1]
    assert ("max_completion_tokens" in body, "temperature" in body) == (
        "max_tokens" in wants,
        "temperature" not in wants,
    )
    assert all("impartial judge" in str(body["messages"]) for body in server.bodies[1 + len(wants) :])


def test_a_judge_that_thinks_has_room_and_its_thought_is_not_its_answer(server, questions, tmp_path, one_thread):
    thought = {"role": "assistant", "content": None, "reasoning_content": "Rating: [[3]]"}
    limits = []

    def refuse(body):
        limits.append(body["max_tokens"])

    def answer(messages):
        text = "Perhaps [[2]].\nRating: [[8]]"
        whole = thought | {"content": text} if len(limits) % 2 else {"role": "assistant", "reasoning_content": text}
        return {"finish_reason": "length", "message": thought} if limits[-1] == 2048 else {"message": whole}

    server.refuse, server.answer = refuse, answer
    _, lines = run(questions[:2], tmp_path, one_thread)
    assert [[t["rating"] for t in line["turns"]] for line in lines] == [[8, 8]] * 2
    assert limits == [2048, *[endpoint.ROOM_TO_THINK] * 4]
