"""What is trained, and what is refused before a step is paid for: training sets, masks, length policies, the report."""

import copy
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

from ouro.data import chats, sources
from ouro.data import report as data_report
from ouro.data.cache import prepare
from ouro.data.chats import Tokens, cut_question, encode_chats, split_row, to_chat
from ouro.data.report import print_report
from ouro.data.thai import normalise
from ouro.files import UserError, read_yaml
from ouro.model.loading import load_tokenizer
from ouro.model.modeling_ouro import IGNORE
from ouro.settings import DATASETS, Settings, resolve
from ouro.train.collate import collate
from ouro.train.run_folder import model_card

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from conftest import PATIENCE
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pythainlp.tokenize import word_tokenize

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "sample/ouro-tiny"
END = "<|im_end|>"
ENTRIES = read_yaml(DATASETS)
SHARED = next((place for place in (ROOT.parent / "shared/data",) if place.is_dir()), None)
ROW = {"ID": "1", "Domain": "Legal", "Instruction": "ถามว่าอะไร", "Input": "", "Output": "ตอบว่าอย่างนี้", "Tags": "",
       "Task_type": "open_qa", "License": "Apache-2.0"}  # fmt: skip
THOUGHT = {"problem": "โจทย์", "solution": "เฉลย", "reannotated_assistant_content": "<think>\nคิด\n</think>\n\nตอบ",
           "id": 1, "source": "olympiads", "verified": None, "quality_metrics": None}  # fmt: skip
UNBOUNDED = {"max_too_long_share": 1, "min_end_survival": 0, "min_trained_share": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY))


def write(path: Path, rows: list | str | bytes | pa.Table) -> None:
    """JSONL (of objects, or lines as they are), a JSON list or Parquet, by the name; text and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes | str):
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    elif path.suffix == ".parquet":
        pa.parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """Writes files {name: rows} (or the rows of train.jsonl) as a training set, and prepares it."""
    numbers = itertools.count()

    def run(dataset: str, files: dict | list, path: str = "", split: str = "train", tokenizer=tokenizer, **changes):
        folder = tmp_path / f"set{next(numbers)}"
        folder.mkdir()
        for name, rows in (files if isinstance(files, dict) else {"train.jsonl": files}).items():
            write(folder / name, rows)
        settings = Settings(dataset=dataset, dataset_path=str(folder / path), overlap="none",
                            cache_dir=str(tmp_path / "cache"), **changes)  # fmt: skip
        return prepare(settings, tokenizer, split, quiet=True)

    return run


def chatml(*turns: str, system: str = "You are a helpful assistant.") -> str:
    """Turns of user and assistant as Ouro's template writes them, here without the template."""
    named = [("system", system), *zip(itertools.cycle(("user", "assistant")), turns, strict=False)]
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in named)


def texts(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(rows.row(i)[0]) for i in range(len(rows))]


def trained_texts(rows, tokenizer) -> list[str]:
    pairs = [rows.row(i) for i in range(len(rows))]
    assert all(((labels == ids) | (labels == IGNORE)).all() for ids, labels in pairs)
    return [tokenizer.decode(ids[labels != IGNORE]) for ids, labels in pairs]


def spans(tokens: Tokens, tokenizer) -> list[str]:
    return [tokenizer.decode(tokens.ids[a:b]) for a, b in zip(tokens.trained[::2], tokens.trained[1::2], strict=True)]


def count(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def hashed(text: str) -> float:
    """Where in [0, 1) the SHA-256 puts a text: below 0.02 it is held out of the sets that have no test split."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16


def questions(count: int, held_out: bool = False, suffix: str = "") -> list[str]:
    endless = (f"คำถามข้อที่ {i} คืออะไร{suffix}" for i in itertools.count())
    return list(itertools.islice((q for q in endless if (hashed(q) < 0.02) == held_out), count))


def sample_text(count: int, length: int, seed: int = 0) -> list[str]:
    """Stretches of the sample's Thai texts, of up to `length` characters."""
    chance = random.Random(seed)
    whole = "\n".join(row["text"] for _, row in sources.read_file(ROOT / "sample/texts/thai.jsonl"))
    found = (whole[at : at + chance.randrange(8, length)].strip() for at in
             (chance.randrange(len(whole) - length) for _ in itertools.count()))  # fmt: skip
    return list(itertools.islice((text for text in found if text), count))


# ----------------------------------------------------------------------------------------------------------------------
# training sets in their published layouts


def wangchan(question: str, context: str, answer: str) -> tuple[dict, tuple[str, ...]]:
    row = {"ID": "00001", "Domain": "Legal", "Instruction": question, "Input": context, "Output": answer,
           "Tags": "กฎหมาย", "Task_type": "open_qa", "License": "CC-BY-NC-4.0"}  # fmt: skip
    return row, ("\n\n".join(filter(None, (question, context))), answer)


def synthetic(question: str, context: str, answer: str) -> tuple[dict, tuple[str, ...]]:
    row = {"instruction": question, "context": context or None, "output": answer, "type": "summarization",
           "context_length": len(context), "rating": 8.5, "qc_rationale": "short"}  # fmt: skip
    return row, ("\n\n".join(filter(None, (question, context))), answer)


def r1(question: str, context: str, answer: str) -> tuple[dict, tuple[str, ...]]:
    thought = f"<think>\nคิด {context}\n</think>\n\n{answer}"
    return THOUGHT | {"problem": question, "reannotated_assistant_content": thought}, (question, thought)


def pairs(question: str, context: str, answer: str) -> tuple[dict, tuple[str, ...]]:
    return {"prompt": question, "completion": answer}, (question, answer)


def chat(question: str, context: str, answer: str) -> tuple[dict, tuple[str, ...]]:
    turns = (question, answer, f"แล้ว {context} ล่ะ", f"{answer} อีกครั้ง")
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}, turns


SETS = {"wangchan": wangchan, "sample": wangchan, "synthetic": synthetic, "r1": r1, "pairs": pairs, "chat": chat}
README = """---
configs:
- config_name: {name}
  data_files:
  - {{split: train, path: data/train-*}}
- config_name: paper
  data_files:
  - {{split: train, path: paper/train-*}}
---
"""


def published(name: str, count: int = 12) -> list[tuple[dict, tuple[str, ...]]]:
    """Rows with the columns of a published training set, each beside its turns; the second half has no context."""
    asked = questions(2 * count)
    contexts = asked[count : count + count // 2] + [""] * (count - count // 2)
    return [SETS[name](q, c, f"คำตอบที่ {i} ค่ะ") for i, (q, c) in enumerate(zip(asked[:count], contexts, strict=True))]


def layouts(rows: list, other: list) -> dict[str, tuple[dict, str]]:
    """The same rows in every form that is read, and what of it the path names; `other` is of the config `paper`."""
    shards = {f"data/train-{i:05}-of-00003.parquet": rows[4 * i : 4 * i + 4] for i in range(3)}
    paper = {"paper/train-00000-of-00001.parquet": other}
    return {
        "a JSONL file": ({"mine.jsonl": rows}, "mine.jsonl"),
        "a JSON list": ({"mine.json": rows}, "mine.json"),
        "a Parquet file": ({"mine.parquet": rows}, "mine.parquet"),
        "a folder": ({"train.jsonl": rows}, ""),
        "a data folder": ({"data/train.jsonl": rows}, ""),
        "JSONL shards": ({f"train-{i:05}-of-00002.jsonl": rows[6 * i : 6 * i + 6] for i in range(2)}, ""),
        "Parquet shards": (shards, ""),
        "two configs": (shards | paper | {"README.md": README.format(name="default")}, ""),
        "two configs without README": (shards | paper, ""),
    }


@pytest.mark.parametrize("name", SETS)
def test_every_layout_of_a_training_set_gives_the_same_rows_and_never_the_other_config(name, prepared, tokenizer):
    rows, turns = zip(*published(name), strict=True)
    other = [SETS[name]("จากอีกชุด", "", "ไม่ควรเห็น")[0]]
    for form, (files, path) in layouts(list(rows), other).items():
        got, report = prepared(name, files, path)
        assert texts(got, tokenizer) == [chatml(*t) for t in turns], form
        assert trained_texts(got, tokenizer) == ["".join(f"{a}{END}" for a in t[1::2]) for t in turns], form
        assert report["rows_in"] == report["rows_kept"] == report["rows_written"] == 12 and not report["rows_dropped"]


def test_a_repository_without_the_config_is_refused_and_its_configs_named(prepared):
    rows = [row for row, _ in published("wangchan")]
    files, _ = layouts(rows, rows)["two configs"]
    with pytest.raises(UserError, match=r"default.*not found.*first.*paper"):
        prepared("wangchan", files | {"README.md": README.format(name="first")})


def test_a_place_in_a_parquet_file_is_its_row(prepared):
    rows = [ROW] * 299 + [ROW | {"Output": None}]
    _, report = prepared("wangchan", {"train.parquet": rows})
    places = report["first_dropped"]["empty (Output)"]
    assert [Path(place).name for place in places] == ["train.parquet, row 300"]


def test_the_test_split_is_held_out(prepared, tokenizer):
    train = [ROW | {"Instruction": q} for q in questions(5)]
    test = [ROW | {"Instruction": q, "Output": "ของชุดทดสอบ"} for q in questions(3, suffix="ทดสอบ")]
    files = {"train.jsonl": train, "test.jsonl": test}
    assert trained_texts(prepared("wangchan", files)[0], tokenizer) == [ROW["Output"] + END] * 5
    rows, report = prepared("wangchan", files, split="held_out")
    assert trained_texts(rows, tokenizer) == ["ของชุดทดสอบ" + END] * 3 and report["rows_in"] == 3
    with pytest.raises(UserError, match="has no split 'test', which dataset wangchan holds out"):
        prepared("wangchan", train, split="held_out")


def test_a_question_of_the_test_split_is_not_trained(prepared, tokenizer):
    train = [ROW | {"Instruction": q} for q in questions(4)]
    test = [train[1] | {"Output": "อื่น"}, train[2] | {"Instruction": train[2]["Instruction"][:5] + "\u200b" +
                                                       train[2]["Instruction"][5:]}]  # fmt: skip
    rows, report = prepared("wangchan", {"train.jsonl": train, "test.jsonl": test})
    assert texts(rows, tokenizer) == [chatml(train[i]["Instruction"], ROW["Output"]) for i in (0, 3)]
    assert report["rows_dropped"] == {"question is in the held-out split too": 2}


def test_a_hash_split_keeps_equal_contexts_together_and_loses_no_row(prepared, tokenizer):
    contexts = [f"บริบทที่ {i}" for i in range(300)]
    rows = [synthetic(f"ถาม {kind}", context, f"ตอบ {context} {kind}")[0] for kind in "กขค" for context in contexts]
    parts = {split: trained_texts(prepared("synthetic", rows, split=split)[0], tokenizer)
             for split in ("train", "held_out")}  # fmt: skip
    away = {context for context in contexts if hashed(context) < 0.02}
    assert 2 <= len(away) <= 12
    expected = {"train": [r["output"] + END for r in rows if r["context"] not in away],
                "held_out": [r["output"] + END for r in rows if r["context"] in away]}  # fmt: skip
    assert parts == expected and sum(map(len, parts.values())) == 900


@pytest.mark.parametrize("name", ["synthetic", "r1", "pairs", "chat"])
def test_sets_without_a_test_split_are_split_by_context_or_question(name, prepared, tokenizer):
    rows, said = zip(*(SETS[name](q, "", f"ตอบ {q}") for q in questions(5) + questions(3, held_out=True)), strict=True)
    got, report = prepared(name, list(rows))
    assert texts(got, tokenizer) == [chatml(*t) for t in said[:5]] and report["rows_dropped"] == {"held out": 3}
    got, report = prepared(name, list(rows), split="held_out")
    assert texts(got, tokenizer) == [chatml(*t) for t in said[5:]] and report["rows_dropped"] == {"in training": 5}


def test_contexts_that_are_equal_once_normalised_stay_together(prepared, tokenizer):
    # As they are trained they are one context: in both parts, it would be held out and trained.
    plain = next(q for q in questions(50, held_out=True) if hashed(q + "\u200b") > 0.02)
    rows = [synthetic("สรุป", text, "ตอบ")[0] for text in (plain, plain + "\u200b", questions(1)[0])]
    assert len(prepared("synthetic", rows)[0]) == 1
    assert texts(prepared("synthetic", rows, split="held_out")[0], tokenizer) == [chatml(f"สรุป\n\n{plain}", "ตอบ")] * 2


def test_text_is_normalised_and_stripped_unless_told_otherwise(prepared, tokenizer):
    row = ROW | {"Instruction": " น\u200bำ้\n", "Output": "เเก้ว\u0e4d\u0e32\ufeff  "}
    assert texts(prepared("wangchan", [row])[0], tokenizer) == [chatml("น้ำ", "แก้วำ")]
    rows, _ = prepared("wangchan", [row], normalise_thai=False)
    assert texts(rows, tokenizer) == [chatml("น\u200bำ้", "เเก้ว\u0e4d\u0e32\ufeff")]


def test_the_system_prompt_is_of_rows_that_have_none(prepared, tokenizer):
    asked = questions(3)
    told = (None, "เป็นครู", "\u200b ")  # the last one is empty once normalised
    rows = [{"messages": turns(q, "ก", system=system)} for q, system in zip(asked, told, strict=True)]
    for prompt, default in (("เป็นเพื่อน",) * 2, (None, "You are a helpful assistant.")):
        got = texts(prepared("chat", rows, system_prompt=prompt)[0], tokenizer)
        assert got == [chatml(q, "ก", system=s) for q, s in zip(asked, (default, "เป็นครู", default), strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# what is trained


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    told = [{"role": "system", "content": system}] if system else []
    return told + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def with_template(tokenizer, *changes: tuple[str, str]):
    other = copy.deepcopy(tokenizer)
    for old, new in changes:
        assert old in other.chat_template
        other.chat_template = other.chat_template.replace(old, new)
    return other


def test_prompt_tokens_are_not_trained(tokenizer):
    tokens = encode_chats([turns("ถาม ๑๒", "ตอบ")], tokenizer)[0]
    whole = tokenizer(chatml("ถาม ๑๒", "ตอบ"), add_special_tokens=False).input_ids
    prompt = chatml("ถาม ๑๒") + "<|im_start|>assistant\n"
    assert tokens.ids.tolist() == whole
    assert tokens.trained == [count(prompt, tokenizer), len(whole) - 1]  # the newline after <|im_end|> is not trained
    assert spans(tokens, tokenizer) == ["ตอบ" + END]


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer):
    tokens = encode_chats([turns("ก", "ข ๆ", "ค", "ง\n\nจ", "ฉ", "ช", system="ครู")], tokenizer)[0]
    assert tokenizer.decode(tokens.ids) == chatml("ก", "ข ๆ", "ค", "ง\n\nจ", "ฉ", "ช", system="ครู")
    assert spans(tokens, tokenizer) == ["ข ๆ" + END, "ง\n\nจ" + END, "ช" + END]


def test_turns_after_the_last_answer_are_left_out(prepared, tokenizer):
    asked = questions(2)
    rows = [{"messages": turns(asked[0], "ตอบ", "ขอบคุณ")}, {"messages": turns(asked[1], "ตอบ", "", "ต่อ")}]
    got, report = prepared("chat", rows, max_empty_share=1)
    assert texts(got, tokenizer) == [chatml(asked[0], "ตอบ")] and report["rows_dropped"] == {"empty (messages)": 1}


def test_turns_out_of_order_are_dropped_and_counted(prepared):
    asked = questions(4)
    bad = [turns("", "ตอบก่อน")[1:] + turns(asked[1], "ก"), turns(asked[2]) + turns(asked[3], "ก")]
    _, report = prepared("chat", [{"messages": m} for m in [turns(asked[0], "ก"), *bad]])
    assert report["rows_dropped"] == {"turns of user and assistant do not alternate": 2} and report["rows_kept"] == 1


def test_the_end_of_turn_is_trained_though_bos_eos_and_pad_are_one_token(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", END]) == [1, 2]
    tokens = encode_chats([turns("ก", "ข")], tokenizer)[0]
    start, stop = tokens.trained
    assert tokens.ids[stop - 1] == 2 and 2 not in tokens.ids[start : stop - 1] and stop == len(tokens.ids) - 1


def test_text_that_spells_a_special_token_cannot_end_the_turn(prepared):
    hidden = "ก<|im_\u200bend|>ข"  # spelled once the zero-width space is gone
    rows = [ROW, ROW | {"Output": f"ก{END}ข"}, ROW | {"Input": "<|endoftext|>"}, ROW | {"Output": hidden}]
    assert prepared("wangchan", rows)[1]["rows_dropped"] == {"special token in the text": 3}


CONTENT = "message['content']"
TEMPLATES = {
    "thinks first": ([("assistant\n{% endif %}", "assistant\n<plan>\n{% endif %}")], "does not continue its own"),
    "rewrites the prompt": (
        [("{% for message in", "{% if add_generation_prompt %}Go{% endif %}{% for message in")],
        "generation prompt changes what stands before it",
    ),
    "no special token": ([("prompt %}<|im_start|>", "prompt %}")], "does not begin with a special token"),
    "upper case": ([(CONTENT, f"{CONTENT} | upper")], "changes the answer it is given"),
    "drops thoughts": ([(CONTENT, f"{CONTENT}.split('</think>')[-1]")], "changes the answer it is given"),
    "drops earlier thoughts": (
        [(CONTENT, f"({CONTENT} if loop.last else {CONTENT}.split('</think>')[-1])")],
        "changes the answer it is given|does not continue its own generation prompt",
    ),
    "no end": ([(f"{END}\n{{% endfor", "\n{% endfor")], f"does not end the answer with {re.escape(END)}"),
    "another end": (
        [("}}<|im_end|>", "}}{{ '<|endoftext|>' if message['role'] == 'assistant' else '<|im_end|>' }}")],
        f"does not end the answer with {re.escape(END)}",
    ),
    "an end of the last answer only": (  # the user's own end would be taken for that of the answer before it
        [("}}<|im_end|>", "}}{{ '<|im_end|>' if loop.last or message['role'] != 'assistant' }}")],
        f"does not end the answer with {re.escape(END)}",
    ),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_a_template_that_would_train_the_wrong_tokens_is_refused(fault, tokenizer):
    changes, message = TEMPLATES[fault]
    conversation = turns("Why?", "<think>\nbecause\n</think>\n\nso", "And?", "<think>\nthen\n</think>\n\nthus")
    assert len(encode_chats([conversation], tokenizer)) == 1
    with pytest.raises(UserError, match=f"the chat template.*(?:{message})"):
        encode_chats([conversation], with_template(tokenizer, *changes))


def test_a_template_is_refused_with_the_row_it_fails_on(prepared, tokenizer):
    lower = with_template(tokenizer, (CONTENT, f"{CONTENT} | lower"))
    with pytest.raises(UserError, match=r"train.jsonl, line 2: the chat template changes the answer it is given"):
        prepared("wangchan", [ROW, ROW | {"Output": "ABC"}], tokenizer=lower)


def test_a_template_that_refuses_a_chat_is_an_error_of_one_line(prepared, tokenizer):
    loop, refusal = "{% for message in messages %}", "{{ raise_exception('No system turns here') }}"
    strict = with_template(tokenizer, (loop, f"{loop}{{% if message['role'] == 'system' %}}{refusal}{{% endif %}}"))
    assert prepared("wangchan", [ROW], tokenizer=strict)[1]["rows_kept"] == 1
    with pytest.raises(UserError, match="the chat template.*No system turns here"):
        prepared("wangchan", [ROW], tokenizer=strict, system_prompt="เป็นครู")


def test_a_prompt_that_ends_with_a_space_is_refused_where_the_answer_takes_it(tokenizer):
    spaced = with_template(tokenizer, ("assistant\n", "assistant: "), ("['role'] }}\n", "['role'] }}: "))
    with pytest.raises(UserError, match="lets a token reach from its generation prompt into the answer"):
        encode_chats([turns("ถาม", "ตอบ")], spaced)


THAI = "กขคงจนมรสอ ะาำิีึืุูเแโใไ็่้๊๋์ๆฯ๐๑๒"
OTHER = " \n\t0aZ<|>⟦é\u0301\u0302👩\u200d🌾🏽\ufe0f\u20e3\u0915\u093f\u2028\x85\xa0\x00"
WORDS = st.text(st.one_of(st.sampled_from(THAI), st.sampled_from(OTHER), st.characters(exclude_categories=["Cs"])),
                min_size=1, max_size=30)  # fmt: skip
CONTENTS = st.integers(1, 3).flatmap(lambda n: st.lists(WORDS, min_size=2 * n, max_size=2 * n))


@hypothesis_settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.none() | WORDS, CONTENTS)
def test_whatever_the_answers_hold_they_and_their_ends_are_what_is_trained(tokenizer, system, contents):
    found, _ = to_chat({"messages": turns(*contents, system=system)}, ENTRIES["chat"], Settings())
    assume(found)  # none: a turn is empty once normalised, or garbled
    clean = [normalise(content).strip() for content in contents]
    assert [turn["content"] for turn in found if turn["role"] != "system"] == clean
    tokens = encode_chats([found], tokenizer)[0]
    assert tokens.ids.tolist() == tokenizer.apply_chat_template(found)
    assert spans(tokens, tokenizer) == [answer + END for answer in clean[1::2]]


def test_the_shown_row_marks_exactly_what_is_trained(tokenizer):
    tokens = encode_chats([turns("ก", "ขค", "ง", "จ")], tokenizer)[0]
    labels = np.full(len(tokens.ids), IGNORE)
    for start, stop in zip(tokens.trained[::2], tokens.trained[1::2], strict=True):
        labels[start:stop] = tokens.ids[start:stop]
    shown = data_report.marked(tokens.ids, labels, tokenizer)
    assert re.findall("⟦(.*?)⟧", shown, re.DOTALL) == ["ขค" + END, "จ" + END]
    assert shown.replace("⟦", "").replace("⟧", "") == tokenizer.decode(tokens.ids)


# ----------------------------------------------------------------------------------------------------------------------
# length policies

LONG = ROW | {"Instruction": "สรุป", "Input": " ".join(sample_text(4, 120, seed=1)), "Output": "ยาวมาก " * 20 + "จบ"}


def length(row: dict, tokenizer) -> int:
    return count(chatml(*wangchan(row["Instruction"], row["Input"], row["Output"])[1]), tokenizer)


def test_a_row_of_just_max_length_is_kept_and_one_token_more_dropped(prepared, tokenizer):
    rows, n = [ROW] * 9 + [LONG], length(LONG, tokenizer)
    assert prepared("wangchan", rows, max_length=n)[1]["rows_kept"] == 10
    got, report = prepared("wangchan", rows, max_length=n - 1)
    assert report["rows_dropped"] == {f"longer than {n - 1} tokens": 1} and report["end_token_survival"] == 1
    assert trained_texts(got, tokenizer) == [ROW["Output"] + END] * 9


def test_truncate_prompt_shortens_the_question_and_leaves_the_answer_whole(prepared, tokenizer):
    n = length(LONG, tokenizer)
    question = f"{LONG['Instruction']}\n\n{LONG['Input']}"
    limit = n - count(LONG["Input"], tokenizer) // 2
    got, report = prepared("wangchan", [ROW, LONG], max_length=limit, length_policy="truncate_prompt", **UNBOUNDED)
    assert report["rows_touched"] == {"question cut": 1} and got.lengths.max() <= limit < n
    assert trained_texts(got, tokenizer) == [ROW["Output"] + END, LONG["Output"] + END]
    asked = re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", texts(got, tokenizer)[1], re.DOTALL)[1]
    assert question.startswith(asked) and len(question) // 4 < len(asked) < len(question)
    answer = count(chatml("", LONG["Output"]), tokenizer)
    got, report = prepared("wangchan", [ROW, LONG], max_length=answer, length_policy="truncate_prompt", **UNBOUNDED)
    assert report["rows_dropped"] == {f"longer than {answer} tokens": 1}
    assert trained_texts(got, tokenizer) == [ROW["Output"] + END]


def test_a_question_is_not_cut_inside_a_character_nor_before_its_marks(tokenizer):
    question = "ที่นี้น้ำผึ้งกี่ขวด 🐝 เก้าอี้ 1️⃣ é\u0301 कि ก็ได้ค่ะ\n" * 6
    conversation = turns(question.strip(), "ได้ครับ", "แล้ว?", "ครับ")
    tokens, seen = encode_chats([conversation], tokenizer)[0], set()
    for limit in range(len(tokens.ids) - 1, len(tokens.ids) - 150, -1):
        cut = cut_question(conversation, tokens, limit, tokenizer)
        assert len(cut.ids) <= limit and spans(cut, tokenizer) == ["ได้ครับ" + END, "ครับ" + END]
        asked = tokenizer.decode(cut.ids).split("<|im_start|>user\n")[1].split(END)[0]
        assert asked and question.startswith(asked)
        assert not unicodedata.category(question[len(asked)]).startswith("M"), (limit, question[: len(asked) + 1])
        seen.add(len(asked))
    assert len(seen) > 30  # no more is cut than the limit asks for


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(8, 40))
def test_split_trains_every_trained_token_exactly_once(stretches, limit):
    edges = np.cumsum([n for stretch in stretches for n in stretch]).tolist()
    ids = np.arange(edges[-1] + 1, dtype=np.uint32)
    pieces = split_row(Tokens(ids, edges), limit)
    trained = [piece.ids[a:b] for piece in pieces for a, b in zip(piece.trained[::2], piece.trained[1::2], strict=True)]
    whole = [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert np.concatenate(trained).tolist() == np.concatenate(whole).tolist()
    for piece in pieces:
        assert len(piece.ids) == min(limit, len(ids)) and (np.diff(piece.ids.astype(int)) == 1).all()  # without gaps
        assert piece.ids[0] == 0 or piece.trained[0] >= limit // 2  # after half a stretch of what precedes it


def test_split_trains_long_rows_in_pieces_up_to_their_end(prepared, tokenizer):
    asked = sample_text(6, 200, seed=2)
    rows = [ROW | {"Instruction": q, "Output": a} for q, a in zip(asked, sample_text(6, 400, seed=3), strict=True)]
    whole, _ = prepared("wangchan", rows)
    got, report = prepared("wangchan", rows, max_length=100, length_policy="split")
    assert got.lengths.max() <= 100 and report["rows_written"] == len(got) > len(whole) == report["rows_kept"]
    assert report["rows_touched"] == {"split": int((whole.lengths > 100).sum())} and report["end_token_survival"] == 1

    def trained(part) -> list[int]:
        pairs = [part.row(i) for i in range(len(part))]
        return np.concatenate([labels[labels != IGNORE] for _, labels in pairs]).tolist()

    assert trained(got) == trained(whole) and report["trained_tokens"] == len(trained(whole))
    assert trained(got).count(2) == 6


def test_truncate_keeps_the_beginning_and_counts_the_ends_it_loses(prepared, tokenizer):
    n = length(LONG, tokenizer)
    full, _ = prepared("wangchan", [LONG])
    got, report = prepared("wangchan", [ROW, LONG], max_length=n - 20, length_policy="truncate", **UNBOUNDED)
    ids, labels = got.row(1)
    assert ids.tolist() == full.row(0)[0][: n - 20].tolist() and labels.tolist() == full.row(0)[1][: n - 20].tolist()
    assert report["end_token_survival"] == 0.5 and report["rows_touched"] == {"answer cut": 1}
    asked = count(chatml(f"{LONG['Instruction']}\n\n{LONG['Input']}"), tokenizer)
    got, report = prepared("wangchan", [ROW, LONG], max_length=asked, length_policy="truncate", **UNBOUNDED)
    assert report["rows_dropped"] == {f"longer than {asked} tokens": 1} and len(got) == 1  # nothing of it is trained


def test_an_answer_that_only_loses_the_newline_after_its_end_is_not_counted_as_cut(prepared, tokenizer):
    n = length(LONG, tokenizer)
    got, report = prepared("wangchan", [ROW, LONG], max_length=n - 1, length_policy="truncate")
    assert trained_texts(got, tokenizer)[1] == LONG["Output"] + END and report["end_token_survival"] == 1
    assert "answer cut" not in report["rows_touched"]


def test_a_chat_whose_last_answer_is_lost_does_not_count_as_trained_to_its_end(prepared, tokenizer):
    asked = questions(1)[0]
    row = {"messages": turns(asked, "ตอบ", "ยาว" * 60, "ปลาย")}
    limit = count(chatml(asked, "ตอบ"), tokenizer) + 30  # within the second question: <|im_end|> of the first is there
    got, report = prepared("chat", [row], max_length=limit, length_policy="truncate", **UNBOUNDED)
    assert trained_texts(got, tokenizer) == ["ตอบ" + END]
    assert report["end_token_survival"] == 0


def test_the_policy_error_names_the_row(prepared, tokenizer):
    n = length(LONG, tokenizer)
    assert prepared("wangchan", [ROW, LONG], max_length=n, length_policy="error")[1]["rows_kept"] == 2
    with pytest.raises(UserError, match=rf"train.jsonl, line 2: {n} tokens, more than max_length = {n - 1}"):
        prepared("wangchan", [ROW, LONG], max_length=n - 1, length_policy="error")


def test_the_reports_table_is_what_the_policies_then_do(prepared, tokenizer, monkeypatch):
    asked, answers = sample_text(40, 300, seed=4), sample_text(40, 200, seed=5)
    rows = [ROW, *(ROW | {"Instruction": q, "Output": a} for q, a in zip(asked, answers, strict=True))]
    ns = [length(row, tokenizer) for row in rows]
    # Round ones; some where just the last newline is too much; some where the question can just be cut short enough.
    limits = {*range(80, 200, 30), *(n - 1 for n in ns[1:4])}
    limits |= {n - count(q, tokenizer) + chats.KEPT_QUESTION for n, q in zip(ns[6:11], asked[5:10], strict=True)}
    limits = sorted(limits)
    monkeypatch.setattr(data_report, "LENGTHS", limits)
    told = prepared("wangchan", rows)[1]["too_long"]
    done = {}
    for limit in limits:
        long = sum(n > limit for n in ns)
        got = {policy: prepared("wangchan", rows, max_length=limit, length_policy=policy, **UNBOUNDED | {
            "max_too_long_share": 2}) for policy in ("drop", "truncate_prompt", "split", "truncate")}  # fmt: skip
        reports = {policy: report for policy, (_, report) in got.items()}
        ended = sum(text.endswith(END) for text in trained_texts(got["truncate"][0], tokenizer))
        done[str(limit)] = {
            "drop": len(rows) - len(got["drop"][0]),
            "truncate_prompt_cut": reports["truncate_prompt"]["rows_touched"].get("question cut", 0),
            "truncate_prompt_dropped": len(rows) - len(got["truncate_prompt"][0]),
            "split_pieces": len(got["split"][0]) - (len(rows) - long),
            "truncate_ends_lost": len(rows) - ended,
        }
        assert done[str(limit)]["drop"] == long
    for column in done[str(limits[0])]:
        before, after = ({limit: row[column] for limit, row in table.items()} for table in (told, done))
        assert before == after, column


# ----------------------------------------------------------------------------------------------------------------------
# floors

FLOORS = {
    "max_empty_share": ("wangchan", {"Output": " \n"}, {}),
    "max_garbled_share": ("wangchan", {"Output": "ก\ufffdข"}, {}),
    "max_unbalanced_share": ("r1", {"reannotated_assistant_content": "<think>ก<think>"}, {}),
    "max_too_long_share": ("wangchan", {"Output": "ยาว" * 300}, {"max_length": 200}),
}


@pytest.mark.parametrize("floor", FLOORS)
def test_bad_rows_above_a_share_are_refused_with_the_first_of_them(floor, prepared):
    name, change, settings = FLOORS[floor]
    rows = [row for row, _ in published(name, 8)] + [(THOUGHT if name == "r1" else ROW) | change] * 2
    _, report = prepared(name, rows, **settings, **{floor: 0.2})
    assert report["rows_kept"] == 8 and sum(report["rows_dropped"].values()) == 2
    with pytest.raises(UserError) as caught:
        prepared(name, rows, **settings, **{floor: 0.19})
    assert f"{floor} = 0.19" in str(caught.value) and "2 of 10 rows" in str(caught.value)
    assert "train.jsonl, line 9" in str(caught.value)


def test_lost_ends_above_a_share_are_refused_with_the_first_of_them(prepared):
    rows = [ROW] * 8 + [ROW | {"Output": "ยาว" * 300}] * 2
    settings = {"max_length": 200, "length_policy": "truncate", "max_too_long_share": 1}
    assert prepared("wangchan", rows, **settings, min_end_survival=0.8)[1]["end_token_survival"] == 0.8
    with pytest.raises(UserError, match=r"only 80.0% of the answers .* min_end_survival = 0.81") as caught:
        prepared("wangchan", rows, **settings, min_end_survival=0.81)
    assert "train.jsonl, line 9" in str(caught.value)


def test_too_small_a_share_of_trained_tokens_is_refused(prepared, tokenizer):
    rows = [ROW | {"Instruction": "ถามยาว " * 50, "Output": "ก"}] * 4
    whole, answer = count(chatml(rows[0]["Instruction"].strip(), "ก"), tokenizer), count(f"ก{END}", tokenizer)
    share = answer / whole
    assert prepared("wangchan", rows, min_trained_share=share)[1]["trained_share"] == share
    with pytest.raises(UserError, match=rf"only {share:.2%} of the tokens of .*set1 are trained.*min_trained_share"):
        prepared("wangchan", rows, min_trained_share=share + 0.0001)


def test_all_reasons_are_given_at_once(prepared):
    rows = [ROW | {"Output": ""}] * 5 + [ROW | {"Output": "à¸à¸"}] * 5
    with pytest.raises(UserError, match=r"(?s)max_empty_share.*line 1: .*max_garbled_share.*line 6: .*no row of"):
        prepared("wangchan", rows)


# ----------------------------------------------------------------------------------------------------------------------
# <think>

TAGS = {  # the completion, the solution -> what is trained
    "both": ("<think>\nคิด\n</think>\n\nตอบ", "เฉลย", "<think>\nคิด\n</think>\n\nตอบ"),
    "neither": ("ตอบเลย", "เฉลย", "ตอบเลย"),
    "no opening": ("คิด\n</think>\n\nตอบ", "เฉลย", "<think>\nคิด\n</think>\n\nตอบ"),
    "no closing": ("<think>\nคิด", " เฉลย\n", "<think>\nคิด\n</think>\n\nเฉลย"),
    "no closing, no solution": ("<think>\nคิด", None, None),
    "no closing, blank solution": ("<think>\nคิด", " \n", None),
    "two openings": ("<think>ก<think>ข</think>", "เฉลย", None),
    "two closings": ("<think>ก</think>ข</think>", "เฉลย", None),
    "wrong order": ("</think>ก<think>", "เฉลย", None),
}


@pytest.mark.parametrize("case", TAGS)
def test_think_tags_pair_or_the_row_is_dropped(case, prepared, tokenizer):
    completion, solution, expected = TAGS[case]
    fine, odd = questions(2)
    rows = [THOUGHT | {"problem": fine},
            THOUGHT | {"problem": odd, "reannotated_assistant_content": completion, "solution": solution}]  # fmt: skip
    got, report = prepared("r1", rows, max_unbalanced_share=0.5)
    assert trained_texts(got, tokenizer)[1:] == ([] if expected is None else [expected + END])
    assert report["rows_touched"] == ({"<think> tags completed": 1} if case in ("no opening", "no closing") else {})
    assert sum(report["rows_dropped"].values()) == (expected is None)


def test_completed_think_tags_are_counted_in_kept_rows_only(prepared):
    completion = {"reannotated_assistant_content": "คิด\n</think>\n\nตอบ"}
    asked = questions(3) + questions(4, held_out=True)
    _, report = prepared("r1", [THOUGHT | {"problem": q} | completion for q in asked])
    assert report["rows_dropped"] == {"held out": 4} and report["rows_kept"] == 3
    assert report["rows_touched"] == {"<think> tags completed": 3}


# ----------------------------------------------------------------------------------------------------------------------
# licences

LICENCES = ["CC-BY-SA-4.0", "cc_by_sa_4.0", "CC BY-SA 4.0", " MIT", "CC-BY-NC-4.0", "CC-BY-NC-4.0", None, ""]


def test_rows_are_chosen_by_licence_however_it_is_spelled(prepared):
    rows = [ROW | {"Instruction": q, "License": licence} for q, licence in zip(questions(8), LICENCES, strict=True)]
    _, everything = prepared("wangchan", rows)
    counts = {"CC-BY-SA-4.0": 1, "cc_by_sa_4.0": 1, "CC BY-SA 4.0": 1, " MIT": 1, "CC-BY-NC-4.0": 2, "not stated": 2}
    assert everything["licences"] == counts and everything["licences_left_out"] == {}
    _, report = prepared("wangchan", rows, licence="permissive")
    assert report["licences"] == dict.fromkeys(["CC-BY-SA-4.0", "cc_by_sa_4.0", "CC BY-SA 4.0", " MIT"], 1)
    assert report["licences_left_out"] == {"CC-BY-NC-4.0": 2, "not stated": 2}
    assert report["rows_dropped"] == {"licence not permissive": 4} and report["rows_kept"] == 4


def test_the_model_card_and_the_printed_report_name_the_licences(prepared, capsys):
    rows = [ROW | {"Instruction": q, "License": licence} for q, licence in zip(questions(8), LICENCES, strict=True)]
    _, report = prepared("wangchan", rows, licence="permissive")
    run = resolve("", ["--config", str(ROOT / "tests/smoke.yaml")])
    log = [{"step": 1, "loss": 3.0, "num_tokens": 9}]
    card = model_card(run, report, "sample/ouro-tiny", log)
    assert "| frozen weights | nf4 |" in card
    for changes, kind in (({"bf16": False}, "fp32"), ({"bf16": True}, "bf16"), ({"frozen_weights": "fp8"}, "fp8")):
        other = replace(run, settings=replace(run.settings, use_qlora=False, **changes))
        assert f"| frozen weights | {kind} |" in model_card(other, report, "sample/ouro-tiny", log)
    for name in ("CC-BY-SA-4.0", "cc_by_sa_4.0", "CC BY-SA 4.0"):
        assert f"{name}: 1 rows" in card
    assert "CC-BY-NC-4.0" not in card
    print_report(report)
    assert "CC-BY-SA-4.0 (1 rows), cc_by_sa_4.0 (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "licence"), [("synthetic", "MIT"), ("r1", "none stated"), ("pairs", "not stated")])
def test_a_set_under_one_licence_is_used_whole_or_not_at_all(name, licence, prepared):
    rows = [row for row, _ in published(name)]
    assert prepared(name, rows)[1]["licences"] == {licence: 12}
    if licence == "MIT":
        assert prepared(name, rows, licence="permissive")[1]["rows_kept"] == 12
    else:
        with pytest.raises(UserError, match=r'no row of .* is left to train on: .*"licence not permissive": 12'):
            prepared(name, rows, licence="permissive")


# ----------------------------------------------------------------------------------------------------------------------
# the report


def test_duplicates_are_counted(prepared):
    asked = questions(3)
    rows = [ROW | {"Instruction": q, "Output": a} for q, a in zip([*asked, asked[0], asked[0], asked[1] + "\u200b"],
                                                                 "กขคกงข", strict=True)]  # fmt: skip
    assert prepared("wangchan", rows)[1]["duplicates"] == {"rows": 2, "questions": 3}


def test_lengths_in_the_report_are_those_of_the_tokenised_rows(prepared, tokenizer):
    rows = [ROW | {"Instruction": q, "Output": a} for q, a in zip(questions(101), sample_text(101, 250), strict=True)]
    lengths = sorted(length(row, tokenizer) for row in rows)
    answers = sum(count(row["Output"] + END, tokenizer) for row in rows)
    got, report = prepared("wangchan", rows)
    assert report["tokens_per_row"] == {f"p{q}": lengths[q] for q in (5, 50, 95, 100)}  # 101 rows: no interpolation
    assert (report["tokens"], report["trained_tokens"]) == (sum(lengths), answers)
    assert report["trained_share"] == answers / sum(lengths)
    limit = lengths[50]
    got, report = prepared("wangchan", rows, max_length=limit, **UNBOUNDED)
    edges, bars = report["histogram"]["edges"], report["histogram"]["rows"]
    assert edges[0] == 0 and edges[-1] == lengths[-1] and len(bars) == 40  # rows that the policy drops are in it
    expected = [0] * 40
    for n in lengths:
        expected[min(n * 40 // lengths[-1], 39)] += 1
    assert bars == expected and sum(bars) == 101
    assert report["tokens"] == int(got.lengths.sum()) == sum(n for n in lengths if n <= limit)


def test_tokens_per_character_and_word_are_those_of_the_answers(prepared, tokenizer):
    answers = sample_text(40, 200, seed=6)
    _, report = prepared("wangchan", [ROW | {"Output": a} for a in answers])
    tokens, characters = sum(count(a, tokenizer) for a in answers), sum(map(len, answers))
    words = sum(bool(word.strip()) for a in answers for word in word_tokenize(a, engine="newmm"))
    thai = {"tokens_per_character": round(tokens / characters, 3), "tokens_per_word": round(tokens / words, 2)}
    assert report["tokens_per_unit"]["Thai"] == thai | {"texts": 40}
    english = [row["text"] for _, row in sources.read_file(ROOT / "sample/texts/english.jsonl")]
    per_word = sum(count(t, tokenizer) for t in english) / sum(len(t.split()) for t in english)
    assert report["tokens_per_unit"]["English"]["tokens_per_word"] == round(per_word, 2)


def test_the_tokens_per_character_of_a_large_set_are_estimated_from_all_of_it(prepared, tokenizer):
    # The first half of the rows is Thai, the second emoji: a sample of the first rows would tell of the first alone.
    answers = sample_text(400, 60, seed=7) + ["🐝" * 30] * 400
    _, report = prepared("wangchan", [ROW | {"Output": a} for a in answers])
    unit = report["tokens_per_unit"]["Thai"]
    assert unit["texts"] == data_report.SAMPLE
    whole, thai, emoji = (sum(count(a, tokenizer) for a in part) / sum(map(len, part))
                            for part in (answers, answers[:400], answers[400:]))  # fmt: skip
    assert abs(unit["tokens_per_character"] - whole) < 0.3 * abs(thai - emoji)


@pytest.mark.parametrize(
    ("answer", "share"),
    [("กาแฟ น้ำ ๆ", 1.0), ("coffee", 0.0), ("กขคง abcd!?", 0.5), ("กข 12345678 🐝 …", 1.0)],
)
def test_the_thai_share_is_of_letters_and_nothing_else(answer, share, prepared):
    assert prepared("wangchan", [ROW | {"Output": answer}])[1]["thai_share_of_letters"] == share


def test_the_report_shows_the_first_the_median_and_the_longest_row(prepared, tokenizer):
    answers = ["ก" * n for n in (20, 40, 30, 10, 50)]
    _, report = prepared("wangchan", [ROW | {"Output": a} for a in answers])
    expected = [chatml(ROW["Instruction"], f"⟦ก{answers[i][1:]}") for i in (0, 2, 4)]
    assert report["examples"] == [text.removesuffix("\n") + "⟧\n" for text in expected]


def test_a_long_row_is_shown_with_both_ends_of_what_is_trained(prepared):
    # Most rows of the published sets are longer than what is shown of them.
    row = ROW | {"Input": "เนื้อความ " * 300, "Output": "เริ่มตอบ " + "ต่อไป " * 300 + "ตอบจบ"}
    example = prepared("wangchan", [row])[1]["examples"][0]
    assert len(example) < 2000 and example.count("⟦") == example.count("⟧") == 1
    assert "<|im_start|>assistant\n⟦เริ่มตอบ" in example and f"ตอบจบ{END}⟧" in example


def test_the_report_is_printed_with_its_counts(prepared, capsys):
    rows = [ROW | {"Instruction": q} for q in questions(30)] + [ROW | {"Output": ""}, ROW | {"Output": END}]
    _, report = prepared("wangchan", rows, max_empty_share=0.5)
    print_report(report)
    out = capsys.readouterr().out
    assert re.search(r"rows +32 in, 30 kept", out)
    for why in (r"empty \(Output\)", "special token in the text"):
        assert re.search(f" 1 +dropped: {why}\n", out)
    assert re.search(rf"tokens +{report['tokens']:,}; trained {report['trained_share']:.1%}", out)
    assert f"⟦{ROW['Output']}{END}⟧" in out and "\033" not in out


def test_refused_data_is_shown_before_it_is_refused(tmp_path, tokenizer, capsys):
    write(tmp_path / "train.jsonl", [ROW, ROW | {"Output": ""}])
    settings = Settings(dataset="wangchan", dataset_path=str(tmp_path), overlap="none", cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match="max_empty_share"):
        prepare(settings, tokenizer)
    assert re.search(r"rows +2 in, 1 kept", capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------------------------
# bad input


def broken_parquet() -> bytes:
    """A Parquet file whose footer is whole and whose pages are not, as after a bad copy."""
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist([ROW] * 500), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    pages = slice(4, len(content) - 8 - int.from_bytes(content[-8:-4], "little"))
    content[pages] = bytes(byte ^ 0x5A for byte in content[pages])
    return bytes(content)


def parquet_of_latin_1() -> pa.Table:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    return pa.table({name: text if name == "Output" else [ROW[name]] for name in ROW})


LINE = json.dumps(ROW, ensure_ascii=False)
LOWER = {name.lower(): value for name, value in ROW.items()}
BAD = {  # dataset, files, what the message says
    "lower-case columns": (
        "wangchan",
        {"train.jsonl": [LOWER]},
        r"train.jsonl, line 1: no column 'Instruction'; did you mean 'instruction'\?; columns found: id, domain",
    ),
    "lower-case columns in Parquet": (
        "wangchan",
        {"train.parquet": [LOWER]},
        r"train.parquet: no column 'Instruction'; did you mean 'instruction'\?",
    ),
    "missing column": (
        "wangchan",
        {"train.jsonl": [ROW, {k: v for k, v in ROW.items() if k != "License"}]},
        r"train.jsonl, line 2: no column 'License'",
    ),
    "null": (
        "wangchan",
        {"train.jsonl": [ROW | {"Output": None}]},
        r"(?s)1 of 1 rows.*max_empty_share.*train.jsonl, line 1: empty \(Output\)",
    ),
    "number": (
        "wangchan",
        {"train.jsonl": [ROW, ROW | {"Output": 7}]},
        r"train.jsonl, line 2, column Output: expected text, found int",
    ),
    "list": (
        "wangchan",
        {"train.jsonl": [ROW, ROW | {"Input": ["ก"]}]},
        r"train.jsonl, line 2, column Input: expected text, found list",
    ),
    "list in Parquet": (
        "wangchan",
        {"train.parquet": [ROW | {"Output": ["ก", "ข"]}]},
        r"train.parquet, row 1, column Output: expected text, found list",
    ),
    "not an object": ("wangchan", {"train.jsonl": [ROW, '["a"]']}, r"line 2: expected an object, found list"),
    "empty file": ("wangchan", {"train.jsonl": []}, r"has no rows"),
    "broken JSON": (
        "wangchan",
        {"train.jsonl": [ROW] * 6 + [LINE[:30], ROW]},
        r"train.jsonl, line 7: not valid JSON \(.*, column 3[01]\)",
    ),
    "broken JSON list": (
        "wangchan",
        {"train.json": "[\n" + f"{LINE},\n" * 5 + LINE[:25] + "\n]"},
        r"train.json, line 7: not valid JSON \(.*, column \d+\)",
    ),
    "not UTF-8": (
        "wangchan",
        {"train.jsonl": f"{LINE}\n".encode() + '{"Output": "ก"}\n'.encode("cp874")},
        r"train.jsonl, line 2: not valid UTF-8 \(byte 13\)",
    ),
    "not UTF-8 in Parquet": ("wangchan", {"train.parquet": parquet_of_latin_1()}, r"train.parquet.*not valid UTF-8"),
    "half an emoji": (
        "wangchan",
        {"train.jsonl": [ROW, LINE.replace("ตอบ", "\\ud83d")]},
        r"(?s)train.jsonl, line 2",
    ),
    "a number of many digits": (
        "wangchan",
        {"train.jsonl": [LINE[:-1] + ', "n": ' + "9" * 5000 + "}"]},
        r"train.jsonl, line 1: not valid JSON",
    ),
    "lost bytes": (
        "wangchan",
        {"train.jsonl": [ROW] * 6 + [ROW | {"Input": "ก\ufffd"}]},
        r"(?s)1 of 7 rows .* hold U\+FFFD or mojibake.*max_garbled_share.*train.jsonl, line 7: garbled",
    ),
    "mojibake": (
        "wangchan",
        {"train.jsonl": [ROW] * 6 + [ROW | {"Input": "กข".encode().decode("latin-1")}]},
        r"(?s)1 of 7 rows .* hold U\+FFFD or mojibake.*max_garbled_share.*train.jsonl, line 7: garbled",
    ),
    "<think> tags": (
        "r1",
        {"train.jsonl": [THOUGHT | {"reannotated_assistant_content": "</think>ก<think>"}]},
        r"(?s)<think> tags that do not pair.*max_unbalanced_share.*line 1: unbalanced <think> \(reannotated_assis",
    ),
    "CSV": ("wangchan", {"train.csv": "ID,Instruction\n1,ก\n"}, r"is JSONL, JSON or Parquet; found train.csv"),
    "empty folder": ("wangchan", {}, r"doesn't contain any data files|holds no train"),
    "only a test split": ("wangchan", {"test.jsonl": [ROW]}, r"holds no train\*.jsonl or train\*.parquet"),
    "missing shard": (
        "wangchan",
        {"data/train-00000-of-00003.parquet": [ROW], "data/train-00002-of-00003.parquet": [ROW]},
        r"2 of the 3 files of split train are there",
    ),
    "half a Parquet file": ("wangchan", {"train.parquet": broken_parquet()[:500]}, r"train.parquet is not a readable"),
    "empty Parquet file": ("wangchan", {"train.parquet": b""}, r"train.parquet is not a readable Parquet file"),
    "damaged Parquet file": ("wangchan", {"train.parquet": broken_parquet()}, r"train.parquet is not a readable"),
    "unknown dataset": ("wangchn", {"train.jsonl": [ROW]}, r"unknown dataset 'wangchn'; did you mean 'wangchan'\?"),
    "bad role": (
        "chat",
        {"train.jsonl": [{"messages": [{"role": "user", "content": "ก"}, {"role": "bot", "content": "ข"}]}]},
        r"train.jsonl, line 1, column messages, turn 2: expected .*role: system, user or assistant.*'bot'",
    ),
    "no turns": ("chat", {"train.jsonl": [{"messages": "ก"}]}, r"line 1, column messages: expected a list of turns"),
    "content of another kind": (
        "chat",
        {"train.jsonl": [{"messages": [{"role": "user", "content": ["ก"]}]}]},
        r"line 1, column messages, turn 1, content: expected text, found list",
    ),
}
REFUSED_BY_FLOOR = {"null", "empty file", "lost bytes", "mojibake", "<think> tags", "half an emoji"}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_named_by_its_place_and_leaves_nothing_behind(fault, prepared, tmp_path):
    dataset, files, message = BAD[fault]
    with pytest.raises(UserError, match=message):
        prepared(dataset, files)
    left = [path.name for path in tmp_path.glob("cache/*")]
    assert not [name for name in left if name.startswith(".")]
    assert fault in REFUSED_BY_FLOOR or not left  # those are read and counted; another floor can be asked of them


def test_places_that_cannot_be_read_are_named(tmp_path, tokenizer):
    write(tmp_path / "mine.csv", "ID,Instruction\n")
    for dataset, path, message in (
        ("wangchan", str(tmp_path / "mine.csv"), "mine.csv: a training set is JSONL, JSON or Parquet; found mine.csv"),
        ("wangchan", str(tmp_path / "nope"), "no such file or folder: .*nope"),
        ("pairs", None, "dataset pairs is for data of your own: name its folder or file with --dataset_path"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(Settings(dataset=dataset, dataset_path=path, overlap="none"), tokenizer)
    with pytest.raises(UserError, match=r"no folder .*nope"):
        load_tokenizer(str(tmp_path / "nope"))


def changed_checkpoint(folder: Path, changes: dict) -> str:
    """A copy of the tiny checkpoint with its files' text changed."""
    shutil.copytree(TINY, folder)
    for name in ("config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'"chat_template"': '"another"'}, "has no chat template"),
        ({END: "<|end|>"}, rf"has no token {re.escape(END)}"),
        ({'"vocab_size": 1024': '"vocab_size": 1000'}, "has 1024 tokens, its model only 1000"),
        ({'"model"': '"mod'}, "cannot load the tokenizer of"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tokenizer(changed_checkpoint(tmp_path / "model", changes))


def test_rows_longer_than_the_models_positions_are_refused():
    assert load_tokenizer(str(TINY), max_length=8192)
    with pytest.raises(UserError, match=r"max_length = 8193 is more than the 8192 positions of"):
        load_tokenizer(str(TINY), max_length=8193)


def test_the_command_says_in_one_message_what_is_wrong_and_leaves_nothing(tmp_path):
    cases = {fault: BAD[fault] for fault in ("lower-case columns", "broken JSON")}
    running = {}
    environment = {k: v for k, v in os.environ.items() if k not in ("CONFIG", "OUTPUT_DIR", "TOTAL_UT_STEPS")}
    for fault, (dataset, files, _) in cases.items():
        folder = tmp_path / fault.replace(" ", "-")
        for name, rows in files.items():
            write(folder / "data" / name, rows)
        command = [sys.executable, "data_config.py", "--config", "tests/smoke.yaml", "--dataset", dataset,
                   "--dataset_path", str(folder / "data"), "--output_dir", str(folder / "output"),
                   "--cache_dir", str(folder / "cache")]  # fmt: skip
        running[fault] = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE)  # fmt: skip
    for fault, process in running.items():
        out, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2 and out == "", (fault, out, error)
        assert re.fullmatch(f"error: [^\n]*{cases[fault][2]}[^\n]*\n", error), (fault, error)
        folder = tmp_path / fault.replace(" ", "-")
        assert not list(folder.glob("output/*")) and not list(folder.glob("cache/*"))


# ----------------------------------------------------------------------------------------------------------------------
# the predecessor's faults: facts of its logs, each here once by name


def test_predecessor_lower_case_fields_gave_empty_rows(prepared, tokenizer):
    # It read row.get("instruction") from rows with capitalised names, got None, and trained three jobs on nothing.
    with pytest.raises(UserError, match=r"no column 'Instruction'; did you mean 'instruction'\?"):
        prepared("wangchan", [LOWER] * 20)
    _, report = prepared("wangchan", [ROW] * 20)
    assert report["tokens"] / report["rows_kept"] > 10 and report["trained_tokens"] / report["rows_kept"] > 2
    assert report["tokens"] == 20 * length(ROW, tokenizer)


def test_predecessor_stale_cache_served_the_old_mapping(tmp_path, tokenizer, monkeypatch):
    # The field names were mended, and the library's cache still gave the rows of the wrong ones.
    file = tmp_path / "data/train.jsonl"
    write(file, [ROW | {"Input": "สอง"}, LONG])
    settings = Settings(dataset="wangchan", dataset_path=str(file.parent), overlap="none",
                        cache_dir=str(tmp_path / "cache"), **UNBOUNDED)  # fmt: skip

    def now(**changes) -> tuple[list[str], bool]:
        rows, report = prepare(Settings(**vars(settings) | changes), changes.pop("tok", tokenizer), quiet=True)
        return texts(rows, tokenizer), report["from_cache"]

    question = f"{ROW['Instruction']}\n\nสอง"
    long = chatml(f"{LONG['Instruction']}\n\n{LONG['Input']}", LONG["Output"])
    before = [chatml(question, ROW["Output"]), long]
    assert now() == (before, False) and now() == (before, True)
    assert now(max_length=length(LONG, tokenizer) - 1) == (before[:1], False)  # the setting
    assert now(system_prompt="ครู") == ([t.replace("You are a helpful assistant.", "ครู") for t in before], False)

    entries = read_yaml(DATASETS)
    entries["wangchan"] |= {"prompt": ["Output"], "completion": "Instruction"}  # the mapping
    (tmp_path / "datasets.yaml").write_text(yaml.safe_dump(entries, allow_unicode=True), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(sources, "DATASETS", tmp_path / "datasets.yaml")
        swapped = [chatml(ROW["Output"], ROW["Instruction"]), chatml(LONG["Output"], LONG["Instruction"])]
        assert now() == (swapped, False)

    other = with_template(tokenizer, ("You are a helpful assistant.", "ตอบเป็นภาษาไทย"))  # the template
    rows, report = prepare(settings, other, quiet=True)
    assert not report["from_cache"] and "ตอบเป็นภาษาไทย" in texts(rows, tokenizer)[0]

    stamp, size = file.stat(), file.stat().st_size
    file.write_text(file.read_text(encoding="utf-8").replace("สอง", "สาม"), encoding="utf-8")  # the data
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == size
    assert now() == ([chatml(question.replace("สอง", "สาม"), ROW["Output"]), long], False)


def test_predecessor_prompt_was_trained(tokenizer, tmp_path):
    for name in ("wangchan", "synthetic", "r1"):
        entry, folder = ENTRIES[name], ROOT / "sample" / name
        settings = Settings(dataset=name, dataset_path=str(folder), overlap="none", cache_dir=str(tmp_path))
        rows, report = prepare(settings, tokenizer, quiet=True)
        raw = [row for _, row in sources.read_file(folder / "train.jsonl")]
        column = entry["held_out"].get("hash")
        raw = [row for row in raw if not column or hashed(row[column] or row[entry["prompt"][0]]) >= 0.02]
        assert len(rows) == len(raw) == report["rows_kept"] > 20
        for text, row in zip(trained_texts(rows, tokenizer), raw, strict=True):
            answer = row[entry["completion"]]
            assert text == answer + END or (name == "r1" and answer in text and text.endswith(END))
        for (ids, labels), row in zip(map(rows.row, range(len(rows))), raw, strict=True):
            prompt = tokenizer.decode(ids[: int((labels != IGNORE).argmax())])
            assert prompt.endswith("<|im_start|>assistant\n") and row[entry["prompt"][0]] in prompt


def test_predecessor_messages_were_stripped_before_the_collator(prepared, tokenizer):
    # TRL's collator wanted the raw `messages` that its trainer had removed; here the masks are in the rows.
    rows, turns_of = zip(*published("chat", 3), strict=True)
    got, _ = prepared("chat", list(rows))
    batch = collate([got[i] for i in range(3)])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "trained"}
    for ids, labels, said in zip(batch["input_ids"], batch["labels"], turns_of, strict=True):
        assert tokenizer.decode(ids[labels != IGNORE]) == "".join(answer + END for answer in said[1::2])


def test_predecessor_cut_answers_before_their_end(prepared, tokenizer):
    # At 2,048 tokens nearly every row was cut on the right, so that the end of an answer was hardly ever trained.
    rows = [ROW] * 9 + [ROW | {"Output": "ยาว " * 2000}]
    got, report = prepared("wangchan", rows, max_length=2048)
    assert trained_texts(got, tokenizer) == [ROW["Output"] + END] * 9 and report["end_token_survival"] == 1
    assert report["too_long"]["2048"]["truncate_ends_lost"] == 1
    with pytest.raises(UserError, match=r"are trained up to their <\|im_end\|>, less than min_end_survival = 0.99"):
        prepared("wangchan", rows, max_length=2048, length_policy="truncate")
    with pytest.raises(UserError, match=r"10 of 10 rows .* longer than max_length = 64 .* max_too_long_share = 0.2"):
        prepared("wangchan", [rows[-1]] * 10, max_length=64)


# ----------------------------------------------------------------------------------------------------------------------
# what lies in the repository, and beside it


def sample_rows(name: str) -> list[dict]:
    return [row for _, row in sources.read_file(ROOT / "sample" / name)]


def test_the_sample_is_what_it_claims_to_be():
    rows = sample_rows("wangchan/train.jsonl")
    assert len(rows) >= 64 and sum(row["Input"] == "" for row in rows) >= 10
    assert " ".join(rows[0]) == "ID Domain Instruction Input Output Tags Task_type License"
    assert len({row["Domain"] for row in rows}) == 4 and {row["License"] for row in rows} == {"Apache-2.0"}
    assert not {row["Output"] for row in sample_rows("wangchan/test.jsonl")} & {row["Output"] for row in rows}
    assert list(sample_rows("synthetic/train.jsonl")[0]) == list(synthetic("", "", "")[0])
    for language in ("thai", "english"):
        prose = sample_rows(f"texts/{language}.jsonl")
        assert len({row["id"] for row in prose}) == len({row["text"] for row in prose}) == len(prose) >= 30
        assert sum(len(row["text"].encode()) for row in prose) >= 33 * 1024
    thai, english = (sample_rows(f"belebele/data/{dialect}.jsonl") for dialect in ("tha_Thai", "eng_Latn"))
    gold = [row["correct_answer_num"] for row in thai]
    assert gold == [row["correct_answer_num"] for row in english] and sorted(gold) == sorted("1234" * 6)
    for path in (ROOT / "sample").rglob("*.jsonl"):
        text = path.read_text(encoding="utf-8")
        assert normalise(text) == text, path


def test_the_sample_model_is_rebuilt_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "sample"))
    import build

    build.build(tmp_path)
    committed = sorted(path.name for path in TINY.iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name


def test_the_sample_openthaieval_holds_its_items_in_the_layout_of_the_hub():
    rows = sample_rows("openthaieval/items.jsonl")
    assert [row for _, row in sources.read_file(ROOT / "sample/openthaieval/data/test.parquet")] == rows
    assert len(rows) == 20 and len({row["exam_type"] for row in rows}) == 17
    assert all(row["result"] in row["input"] for row in rows)


@pytest.mark.skipif(SHARED is None, reason="the government news are not part of the repository")
def test_government_news_give_a_report_from_end_to_end(prepared, tokenizer):
    news = [row["text"].split("\n", 1) for _, row in sources.read_file(SHARED / "thaigov.jsonl")]
    wanted = [(normalise(title).strip(), normalise(body).strip()) for title, body in news]
    asked = [{"messages": turns(f"เขียนข่าว: {title}", body)} for title, body in news]
    kept = [pair for pair in wanted if hashed(f"เขียนข่าว: {pair[0]}") >= 0.02]
    files = {"data/train-00000-of-00001.parquet": asked}
    got, report = prepared("chat", files, max_length=8192)
    assert report["rows_in"] == 150 and len(got) == report["rows_kept"] == len(kept) > 140
    assert trained_texts(got, tokenizer) == [body + END for _, body in kept]
    assert report["thai_share_of_letters"] > 0.9 and report["end_token_survival"] == 1
    assert sum(report["histogram"]["rows"]) == len(kept)
    medians = statistics.median(got.lengths.tolist())
    assert report["tokens_per_row"]["p50"] == int(medians) and report["tokens_per_row"]["p100"] == got.lengths.max()
    unit = report["tokens_per_unit"]["Thai"]
    assert unit["texts"] == len(kept) and 0.5 < unit["tokens_per_character"] < 1.5 < unit["tokens_per_word"] < 8
    assert report["too_long"]["1024"]["drop"] == int((got.lengths > 1024).sum()) > 0
    pieces, report = prepared("chat", files, max_length=1024, length_policy="split")
    assert pieces.lengths.max() <= 1024 and report["end_token_survival"] == 1
    assert "".join(trained_texts(pieces, tokenizer)).count(END) == len(kept)
    assert report["trained_tokens"] == int(sum((got.row(i)[1] != IGNORE).sum() for i in range(len(got))))
