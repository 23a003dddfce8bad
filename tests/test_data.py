"""Training sets: their layouts, splits and licences, the data report, and what is refused before a step is paid for."""

import gzip
import json
import re
import shutil
import sys

import data_config
from ouro.data.cache import prepare
from ouro.data.formats import read_file
from ouro.data.report import print_report
from ouro.data.sources import split_files
from ouro.files import ROOT, UserError, call, write_atomic
from ouro.model import loading
from ouro.model.loading import load_tokenizer
from ouro.settings import Settings, resolve
from ouro.train.run_folder import model_card

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from pythainlp.tokenize import word_tokenize
from training_sets import (
    END,
    ROW,
    THOUGHT,
    UNBOUNDED,
    chatml,
    count,
    hashed,
    questions,
    sample_text,
    texts,
    trained_texts,
    turns,
    write,
)

TINY = ROOT / "sample/ouro-tiny"


def length(row: dict, tokenizer) -> int:
    return count(chatml(*wangchan(row["Instruction"], row["Input"], row["Output"])[1]), tokenizer)


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
    said = (question, answer, f"แล้ว {context} ล่ะ", f"{answer} อีกครั้ง")
    return {"messages": turns(*said)}, said


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
    shards = {f"data/train-{i:05}-of-00003-a1b2{i}.parquet": rows[4 * i : 4 * i + 4] for i in range(3)}
    paper = {"paper/train-00000-of-00001.parquet": other}
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    return {
        "a JSONL file": ({"mine.jsonl": rows}, "mine.jsonl"),
        "a JSON list by the name of JSONL": ({"mine.jsonl": f"\n[{', '.join(text)}]"}, "mine.jsonl"),
        "a byte-order mark and blank lines": ({"mine.json": "\ufeff\n \n" + "\r\n\n".join(text)}, "mine.json"),
        "a compressed file": ({"mine.jsonl.gz": rows}, "mine.jsonl.gz"),
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


def test_the_test_split_is_held_out_and_its_questions_are_not_trained(prepared, tokenizer):
    asked = questions(4)
    train = [ROW | {"Instruction": q} for q in asked]
    test = [ROW | {"Instruction": q, "Output": "ของชุดทดสอบ"} for q in (asked[1], f"{asked[2]}\u200b", "ถามอื่น")]
    files = {"train.jsonl": train, "test.jsonl": test}
    rows, report = prepared("wangchan", files)
    assert texts(rows, tokenizer) == [chatml(asked[i], ROW["Output"]) for i in (0, 3)]
    assert report["rows_dropped"] == {"question is in the held-out split too": 2}
    rows, report = prepared("wangchan", files, split="held_out")
    assert trained_texts(rows, tokenizer) == ["ของชุดทดสอบ" + END] * 3 and report["rows_in"] == 3
    with pytest.raises(UserError, match="has no split 'test', which dataset wangchan holds out"):
        prepared("wangchan", train, split="held_out")


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
    contexts = {"สรุป": plain, "แปล": plain + "\u200b", "ย่อ": questions(1)[0]}
    rows = [synthetic(asked, context, "ตอบ")[0] for asked, context in contexts.items()]
    assert len(prepared("synthetic", rows)[0]) == 1
    held_out = texts(prepared("synthetic", rows, split="held_out")[0], tokenizer)
    assert held_out == [chatml(f"{asked}\n\n{plain}", "ตอบ") for asked in ("สรุป", "แปล")]


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


def test_the_refusal_of_long_rows_names_settings_that_keep_them(prepared):
    asked, told = ROW | {"Instruction": "ยาว" * 300}, ROW | {"Output": "ยาว" * 300}
    rows = [*[ROW] * 7, asked, asked, told]
    with pytest.raises(UserError, match="3 of 10 rows .* max_length = 200") as caught:
        prepared("wangchan", rows, max_length=200, length_policy="drop", max_too_long_share=0)
    ways = re.findall(r"--(\w+) ([\w.]+) ", str(caught.value))
    policies = ["truncate_prompt", "split", "truncate"]
    assert [value for name, value in ways if name == "length_policy"] == policies
    assert "truncate_prompt shortens the question of 2, leaves out 1" in str(caught.value)
    length, share = int(dict(ways)["max_length"]), float(dict(ways)["max_too_long_share"])
    for kept, given in (
        (10, {"max_length": length, "length_policy": "drop", "max_too_long_share": 0}),
        (9, {"max_length": 200, "length_policy": "truncate_prompt", "max_too_long_share": 0.1}),
        (10, {"max_length": 200, "length_policy": "split", "max_too_long_share": 0}),
        (7, {"max_length": 200, "length_policy": "drop", "max_too_long_share": share}),
    ):
        assert prepared("wangchan", rows, **given)[1]["rows_kept"] == kept, given
    _, report = prepared("wangchan", rows[:-1], max_length=200, length_policy="truncate_prompt", max_too_long_share=0)
    assert report["rows_kept"] == 9 and report["rows_touched"] == {"question cut": 2}, "no row is lost"


def test_the_table_of_lengths_ends_at_the_models_own(prepared, tokenizer, monkeypatch):
    assert list(prepared("wangchan", [ROW], max_length=3000)[1]["too_long"]) == ["1024", "2048", "3000", "4096", "8192"]
    monkeypatch.setattr(tokenizer, "model_max_length", 65536)
    assert list(prepared("wangchan", [ROW])[1]["too_long"])[-1] == "65536"


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
    with pytest.raises(UserError, match=rf"only {share:.2%} of the tokens of .*set.* are trained.*min_trained_share"):
        prepared("wangchan", rows, min_trained_share=share + 0.0001)


def test_all_reasons_are_given_at_once(prepared):
    rows = [ROW | {"Output": ""}] * 5 + [ROW | {"Output": "à¸à¸"}] * 5
    with pytest.raises(UserError, match=r"(?s)max_empty_share.*line 1: .*max_garbled_share.*line 6: .*no row of"):
        prepared("wangchan", rows)


# ----------------------------------------------------------------------------------------------------------------------
# licences

LICENCES = ["CC-BY-SA-4.0", "cc_by_sa_4.0", "CC BY-SA 4.0", " MIT", "CC-BY-NC-4.0", "CC-BY-NC-4.0", None, ""]


def test_rows_are_chosen_by_licence_however_it_is_spelled_and_card_and_report_name_it(prepared, capsys):
    rows = [ROW | {"Instruction": q, "License": licence} for q, licence in zip(questions(8), LICENCES, strict=True)]
    _, everything = prepared("wangchan", rows)
    counts = {"CC-BY-SA-4.0": 1, "cc_by_sa_4.0": 1, "CC BY-SA 4.0": 1, " MIT": 1, "CC-BY-NC-4.0": 2, "not stated": 2}
    assert everything["licences"] == counts and everything["licences_left_out"] == {}
    _, report = prepared("wangchan", rows, licence="permissive")
    assert report["licences"] == dict.fromkeys(["CC-BY-SA-4.0", "cc_by_sa_4.0", "CC BY-SA 4.0", " MIT"], 1)
    assert report["licences_left_out"] == {"CC-BY-NC-4.0": 2, "not stated": 2}
    assert report["rows_dropped"] == {"licence not permissive": 4} and report["rows_kept"] == 4
    run = resolve("", ["--config", str(ROOT / "tests/smoke.yaml")])
    card = model_card(run, report, "sample/ouro-tiny", [{"step": 1, "loss": 3.0, "num_tokens": 9}])
    assert "CC-BY-SA-4.0: 1 rows" in card and "CC-BY-NC-4.0" not in card
    print_report(report)
    assert "CC-BY-SA-4.0 (1 rows), cc_by_sa_4.0 (1 rows)" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# the report


def test_duplicates_are_counted(prepared):
    asked = questions(3)
    rows = [ROW | {"Instruction": q, "Output": a} for q, a in zip([*asked, asked[0], asked[0], asked[1] + "\u200b"],
                                                                 "กขคกงข", strict=True)]  # fmt: skip
    assert prepared("wangchan", rows)[1]["duplicates"] == {"rows": 2, "questions": 3}


def test_keys_of_turns_that_nothing_reads_are_named_once(prepared, capsys):
    mark, names = {"weight": 1, "tool_calls": None}, {"name": "ก", "tone\x1b": True}
    rows = [{"messages": [turn | mark | names for turn in turns(q, "ตอบ")] + turns("ต่อ", "จบ")} for q in questions(3)]
    _, report = prepared("chat", rows)
    print_report(report)
    assert report["unread_keys"] == {"name": 6, "tone\x1b": 6}
    said = r"not read +what turns hold beside role and content, or what sounds like a mark: "
    said += r"name \(6 times\), tone\\x1b \(6 times\)\n"
    assert len(re.findall(said, capsys.readouterr().out)) == 1


def test_lengths_in_the_report_are_those_of_the_tokenised_rows(prepared, tokenizer):
    rows = [ROW | {"Instruction": q, "Output": a} for q, a in zip(questions(101), sample_text(101, 250), strict=True)]
    lengths = sorted(length(row, tokenizer) for row in rows)
    answers = sum(count(row["Output"] + END, tokenizer) for row in rows)
    got, report = prepared("wangchan", rows)
    assert report["tokens_per_row"] == {f"p{q}": lengths[q] for q in (5, 50, 95, 100)}  # 101 rows: no interpolation
    assert (report["tokens"], report["trained_tokens"]) == (sum(lengths), answers)
    assert report["trained_share"] == answers / sum(lengths)
    limit = lengths[50]
    got, report = prepared("wangchan", rows, max_length=limit, length_policy="drop", **UNBOUNDED)
    histogram = report["histogram"]  # rows that the policy drops are in it
    assert sum(histogram["rows"]) == 101 and histogram["edges"][-1] == lengths[-1]
    assert report["tokens"] == int(got.lengths.sum()) == sum(n for n in lengths if n <= limit)


def test_tokens_per_character_and_word_are_those_of_the_answers(prepared, tokenizer):
    answers = sample_text(40, 200, seed=6)
    _, report = prepared("wangchan", [ROW | {"Output": a} for a in answers])
    tokens, characters = sum(count(a, tokenizer) for a in answers), sum(map(len, answers))
    words = sum(bool(word.strip()) for a in answers for word in word_tokenize(a, engine="newmm"))
    thai = {"tokens_per_character": round(tokens / characters, 3), "tokens_per_word": round(tokens / words, 2)}
    assert report["tokens_per_unit"]["Thai"] == thai | {"texts": 40}
    english = [row["text"] for _, row in read_file(ROOT / "sample/texts/english.jsonl")]
    per_word = sum(count(t, tokenizer) for t in english) / sum(len(t.split()) for t in english)
    assert report["tokens_per_unit"]["English"]["tokens_per_word"] == round(per_word, 2)


def test_the_thai_share_is_of_letters_and_nothing_else(prepared):
    for answer, share in {"กาแฟ น้ำ ๆ": 1.0, "coffee": 0.0, "กขคง abcd!?": 0.5, "กข 12345678 🐝 …": 1.0}.items():
        assert prepared("wangchan", [ROW | {"Output": answer}])[1]["thai_share_of_letters"] == share


def test_the_report_shows_the_first_the_median_and_the_longest_row_with_both_ends(prepared):
    row = ROW | {"Input": "เนื้อความ " * 300, "Output": "เริ่มตอบ " + "ต่อไป " * 300 + "ตอบจบ"}
    answers = ["ก" * n for n in (20, 40, 30, 10)]
    *examples, longest = prepared("wangchan", [*(ROW | {"Output": a} for a in answers), row])[1]["examples"]
    expected = [chatml(ROW["Instruction"], f"⟦ก{answers[i][1:]}") for i in (0, 2)]
    assert examples == [text.removesuffix("\n") + "⟧\n" for text in expected]
    assert len(longest) < 2000 and longest.count("⟦") == longest.count("⟧") == 1
    assert "<|im_start|>assistant\n⟦เริ่มตอบ" in longest and f"ตอบจบ{END}⟧" in longest


def test_the_report_is_printed_with_its_counts_and_before_it_is_refused(prepared, tmp_path, tokenizer, capsys):
    rows = [ROW | {"Instruction": q} for q in questions(30)] + [ROW | {"Output": ""}, ROW | {"Output": END}]
    _, report = prepared("wangchan", rows, max_empty_share=0.5)
    print_report(report)
    out = capsys.readouterr().out
    assert re.search(r"rows +32 in, 30 kept", out)
    for why in (r"empty \(Output\)", "special token in the text"):
        assert re.search(f" 1 +dropped: {why}\n", out)
    assert re.search(rf"tokens +{report['tokens']:,}; trained {report['trained_share']:.1%}", out)
    assert f"⟦{ROW['Output']}{END}⟧" in out and "\033" not in out
    settings = Settings(dataset="wangchan", dataset_path=report["source"], overlap="none", cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="max_empty_share"):
        prepare(settings, tokenizer)
    assert re.search(r"rows +32 in, 30 kept", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("terminal", "term", "no_colour", "coloured"),
    [(True, "xterm", "", True), (True, "xterm", "1", False), (True, "dumb", "", False), (False, "xterm", "", False)],
)
def test_data_is_shown_and_never_obeyed(terminal, term, no_colour, coloured, prepared, monkeypatch, capsys):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", no_colour)
    row = ROW | {"Input": "⟦ก\x1b]0;x\x07\x9b2J", "Output": "ข⟧\r\u202eค", "License": "MIT\x1b[2J"}
    report = prepared("wangchan", [row])[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    print_report(report)
    out = capsys.readouterr().out
    assert r"\u27e6ก\x1b]0;x\x07\x9b2J" in out and r"MIT\x1b[2J (1 rows)" in out
    shown = rf"ข\u27e7\r\u202eค{END}"
    assert (f"\x1b[32m{shown}\x1b[0m" if coloured else f"⟦{shown}⟧") in out
    assert set(re.findall("[\x00-\x1f]", out)) <= ({"\n", "\x1b"} if coloured else {"\n"})


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


def parquet_with_a_broken_name() -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist([ROW]), sink)
    return sink.getvalue().to_pybytes().replace(b"Instruction", b"Instructio\xee")


def broken_arrow() -> bytes:
    """An Arrow stream of which one text begins behind the end of the file."""
    sink, table = pa.BufferOutputStream(), pa.table({name: ["ก", "ข"] for name in ROW})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    places = [np.array([0, 3, end], np.int32).tobytes() for end in (6, -9)]
    return sink.getvalue().to_pybytes().replace(*places)


def parquet_of_latin_1() -> pa.Table:
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    return pa.table({name: text if name == "Output" else [ROW[name]] for name in ROW})


LINE = json.dumps(ROW, ensure_ascii=False)
LOWER = {name.lower(): value for name, value in ROW.items()}
CSV = "Instruction,Input,Output,License\n"
NO_LICENCE = {name: value for name, value in ROW.items() if name != "License"}
SHARDS = {f"data/train-0000{i}-of-00003-9f{i}e.parquet": [ROW] for i in (0, 2)}
TWICE = {f"train.0000{i}-of-00002{after}.jsonl": [ROW] for i, after in ((0, ""), (1, "-a"), (1, "-b"))}
ROW_TWICE = pa.table([[value] for value in (*ROW.values(), "ก")], [*ROW, "Input"])
BAD = {  # the file of a training set in wangchan's layout, its rows, what the message says
    "lower-case columns": ("jsonl", [LOWER], r"line 1: no column 'Instruction'; did you mean 'instruction'\?.*: id, "),
    "missing column": ("jsonl", [ROW, NO_LICENCE], r"line 2: no column 'License'"),
    "null": ("jsonl", [ROW | {"Output": None}], r"(?s)1 of 1 rows.*max_empty_share.*line 1: empty \(Output\)"),
    "list in Parquet": ("parquet", [ROW | {"Output": ["ก"]}] * 300, r"row 1, column Output: expected text, found list"),
    "empty file": ("jsonl", [], r"has no rows: set dataset_path to"),
    "broken JSON": ("jsonl", [ROW] * 6 + [LINE[:30], ROW], r"line 7: not valid JSON \(.*, column 3[01]\)"),
    "broken JSON list": ("json", f"[\n{LINE},\n{LINE[:25]}\n]", r"line 3: not valid JSON \(.*, column \d+\)"),
    "not UTF-8": (
        "jsonl",
        f"{LINE}\n".encode() + '{"Output": "ก"}\n'.encode("cp874"),
        r"line 2: not valid UTF-8 \(byte",
    ),
    "not UTF-8 in Parquet": ("parquet", parquet_of_latin_1(), r"not a readable Parquet file: .*utf-8"),
    "half an emoji": ("jsonl", [ROW, LINE.replace("ตอบ", "\\ud83d")], r"(?s)max_garbled_share.*line 2"),
    "a number of many digits": ("jsonl", [LINE[:-1] + ', "n": ' + "9" * 5000 + "}"], r"line 1: not valid JSON"),
    "mojibake": ("jsonl", [ROW | {"Input": "กข".encode().decode("latin-1")}], r"(?s)max_garbled_share.*line 1: gar"),
    "CSV of other columns": ("csv", "ID,Instruction\n1,ก\n", r"column 'Input'; wanted are Instr.*: ID, .*DATASET=mine"),
    "CSV with a cell too many": ("csv", CSV + '1,"ก\n",ค,"ง"\n\nก,ข,ค,ง,จ\n', r"line 5: 5 cells, the header has 4"),
    "CSV with an open quote": ("csv", CSV + 'ก,ข,ค,ง\n"ก,ข\n', r"line 3: not valid CSV \(unexpected end of data\)"),
    "CSV of Thai Windows": ("csv", (CSV + "กขค,ข,ค,ง\n").encode("cp874"), r"save it as CSV UTF-8 .*iconv -f CP874 "),
    "CSV in UTF-16": ("csv", CSV.encode("utf-16"), r"save it as CSV UTF-8 .*iconv -f UTF-16 "),
    "CSV in Latin-1": ("csv", (CSV + "é,b,c,d\n").encode("latin-1"), r"save it as CSV UTF-8$"),
    "CSV with semicolons": ("csv", CSV.replace(",", ";"), r"its cells are separated by ';': save it with commas"),
    "CSV with a column twice": ("csv", "Input,Input\nก,ข\n", r"column 'Input' stands twice"),
    "damaged Arrow file": ("arrow", broken_arrow(), r"train.arrow is not a readable Arrow file"),
    "half an Arrow file": ("arrow", b"ARROW1", r"train.arrow is not a readable Arrow file"),
    "zeros behind a compressed file": (
        "jsonl.gz",
        gzip.compress(LINE.encode()) + bytes(2 << 20),
        r"train.jsonl.gz is damaged: 1024 KiB of it hold next to nothing",
    ),
    "half a compressed file": ("jsonl.gz", gzip.compress(LINE.encode())[:-9], r"train.jsonl.gz is damaged"),
    "objects over several lines": ("json", json.dumps(ROW, indent=1) * 2, r"line 1: an object over several lines"),
    "a key twice": ("jsonl", [ROW, LINE[:-1] + ', "Output": "ก"}'], r"line 2: not valid JSON \('Output' stands twice"),
    "a column twice": ("parquet", ROW_TWICE, r"column 'Input' stands twice"),
    "pairs": ("parquet", [{"prompt": "ก", "completion": "ข"}], r"no column 'Instruction'; .* by DATASET=pairs "),
    "a weight between no and yes": ("jsonl", [ROW, ROW | {"weight": 0.5}], r"line 2, weight: expected 0, 1, .* 0.5"),
    "Parquet with a broken name": ("parquet", parquet_with_a_broken_name(), r"train.parquet is not a readable Parquet"),
    "damaged Parquet file": ("parquet", broken_parquet(), r"train.parquet is not a readable Parquet file"),
}
BAD_SETS = {  # dataset, files, what the message says
    "empty folder": ("wangchan", {}, r"doesn't contain any data files; name the file itself, or a folder with"),
    "only a test split": ("wangchan", {"test.jsonl": [ROW]}, r"holds no train\*.jsonl or train\*.parquet"),
    "missing shard": ("wangchan", SHARDS, r"split train: 2 of the 3 files are there, without train-00001-of-00003$"),
    "a shard twice": ("wangchan", TWICE, r"split train: train.00001-of-00002-a.jsonl, train.00001-of-00002-b.j"),
    "a mask that is no number": (
        "chat",
        [{"messages": [*turns("ก"), {"role": "assistant", "content": "ข", "loss_mask": [0, 1]}]}],
        r"line 1, column messages, turn 2, loss_mask: expected 0, 1, true or false, found \[0, 1\]",
    ),
    "unknown dataset": ("wangchn", {"train.jsonl": [ROW]}, r"unknown dataset 'wangchn'; did you mean 'wangchan'\?"),
    "<think> tags": (
        "r1",
        [THOUGHT | {"reannotated_assistant_content": "</think>ก<think>"}],
        r"(?s)max_unbalanced_share.*line 1: unbalanced <think> \(reannotated_assis",
    ),
    "bad role": ("chat", [{"messages": [{"role": "bot", "content": "ข"}]}], r"line 1, column messages, turn 1:.*'bot'"),
    "no turns": ("chat", [{"messages": "ก"}], r"line 1, column messages: expected a list of turns"),
    "no turns, marked": ("chat", [{"messages": "ก", "train": False}], r"no row of .*marked not to be trained"),
    "turns that are texts": ("chat", [{"messages": ["ก", "ข"]}], r"column messages, turn 1: expected .*, found 'ก'"),
    "turns of lists": ("chat", [{"messages": turns(["ก"])}], r"messages, turn 1, content: expected text, found list"),
}
BAD_SETS |= {name: ("wangchan", {f"train.{form}": rows}, message) for name, (form, rows, message) in BAD.items()}
REFUSED_BY_FLOOR = {"no turns, marked", "null", "empty file", "mojibake", "<think> tags", "half an emoji"}


@pytest.mark.parametrize("fault", BAD_SETS)
def test_bad_input_is_named_by_its_place_and_leaves_nothing_behind(fault, prepared, tmp_path):
    dataset, files, message = BAD_SETS[fault]
    with pytest.raises(UserError, match=message):
        prepared(dataset, files, max_empty_share=0)
    left = [path.name for path in tmp_path.glob("cache/*")]
    assert not [name for name in left if name.startswith(".")]
    assert fault in REFUSED_BY_FLOOR or not left  # those are read and counted; another floor can be asked of them


SPARK = "b8f5a1c2-3d4e-4f60-9a7b-1c2d3e4f5a6b"
OF_3 = [f"train-0000{i}-of-00003.jsonl" for i in range(3)]
FILES = {  # those of a folder -> what is said of them; None: they are read
    ("train.jsonl", "train.jsonl.gz"): "train.jsonl, train.jsonl.gz seem to hold the same rows",
    ("train.jsonl", "train (1).jsonl"): "train (1).jsonl, train.jsonl seem to hold the same rows",
    ("train.jsonl", "train_old.jsonl"): "seem to hold the same rows",
    ("train.jsonl", "train-mine.jsonl=train.jsonl"): "train-mine.jsonl, train.jsonl seem to hold the same rows",
    ("train.jsonl", *OF_3): "train-00002-of-00003.jsonl, train.jsonl seem to hold the same rows",
    ("train.jsonl", "train.parquet"): "train.parquet would be read, and train.jsonl not",
    ("train.jsonl", "data/train-00000-of-00001.jsonl"): "00001.jsonl would be read, and train.jsonl not",
    (*OF_3, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"): "seem to hold the same rows",
    (*OF_3, "train-1-of-3.jsonl"): "train-00001-of-00003.jsonl, train-1-of-3.jsonl seem to hold the same rows",
    (*OF_3, "train-00005-of-00003.jsonl"): "train-00005-of-00003.jsonl is beyond the 3 files",
    ("train-00000.of.00002.jsonl",): "1 of the 2 files are there, without train-00001.of.00002",
    ("v2-train-1of3.jsonl", "v2-train-3of3.jsonl"): "2 of the 3 files are there, without v2-train-2of3",
    ("train-00000.jsonl", "train-00002.jsonl"): "2 of the 3 files are there, without train-00001",
    ("train-00001.jsonl", "train-00002.jsonl"): None,
    ("train-1-of-9999999999.jsonl",): "1 of the 9999999999 files are there, without train-0-of-9999999999, ",
    ("train-2021.jsonl", "train-2022.jsonl", "train-2024.jsonl"): None,
    ("train-1k.jsonl", "train-10k.jsonl", "train-100k.jsonl"): None,
    tuple(f"data_{i}.jsonl" for i in range(11)): None,
    tuple(f"part-0000{i}-{SPARK}.jsonl" for i in "02"): f"of the 3 files are there, without part-00001-{SPARK}",
    tuple(f"data_{i}.jsonl" for i in (0, 1, 3)): "3 of the 4 files are there, without data_2",
    tuple(f"train-part{i}.jsonl" for i in (1, 2, 4)): "3 of the 4 files are there, without train-part3",
    ("train-1_3.jsonl", "train-2_3.jsonl"): "2 of the 3 files are there, without train-0_3 or train-3_3",
    tuple(f"train-{i}_3.jsonl" for i in (1, 2, 3)): None,
    tuple(f"train-{year}-0000{i}.jsonl" for year, i in ((23, 0), (23, 2), (24, 0))): "without train-23-00001",
    ("train-legal-00000-of-00001.jsonl", "train-medical-00000-of-00001.jsonl"): None,
    tuple(f"train-{i}-of-12.jsonl" for i in range(1, 13)): None,
}  # fmt: skip


@pytest.mark.parametrize("names", FILES)
def test_files_of_the_same_rows_or_without_some_are_named(tmp_path, names):
    for name in names:
        file, _, like = name.partition("=")
        write(tmp_path / "rows" / file, [ROW | {"Input": like or file}])
    (tmp_path / "link").symlink_to("rows")
    for place in (tmp_path / "rows", tmp_path / "link"):
        if said := FILES[names]:
            with pytest.raises(UserError, match=re.escape(said)):
                split_files(place, None, "train")
        else:
            assert sorted(file.name for file in split_files(place, None, "train")) == sorted(names)


def test_places_that_cannot_be_read_are_named(tmp_path, tokenizer):
    write(tmp_path / "mine.xlsx", "ID,Instruction\n")
    write(tmp_path / "mine.ods", "ID,Instruction\n")
    write_atomic(tmp_path / "mine/mine.py", "raise SystemExit")
    for name, message in {
        "mine.xlsx": "mine.xlsx is not a readable Excel workbook: File is not a zip file",
        "mine.ods": "mine.ods: a training set is JSONL, JSON, CSV .*; found mine.ods",
        "mine": "Dataset scripts are no longer supported, but found mine.py",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(Settings(dataset="wangchan", dataset_path=str(tmp_path / name), overlap="none"), tokenizer)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    assert load_tokenizer(str(TINY), max_length=8192)
    with pytest.raises(UserError, match="max_length = 8193 is more than the 8192 positions of"):
        load_tokenizer(str(TINY), max_length=8193)
    folder = shutil.copytree(TINY, tmp_path / "model")
    for name, old, new, message in (
        ("config.json", '"vocab_size": 1024', '"vocab_size": 1000', "has 1024 tokens, its model only 1000"),
        ("tokenizer_config.json", '"chat_template"', '"another"', "has no chat template"),
    ):
        text = (folder / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(folder))
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(loading, "END_OF_TURN", "<|end|>")
    with pytest.raises(UserError, match="has no token <.end.>"):
        load_tokenizer(str(folder))


def test_the_command_says_in_one_message_what_is_wrong_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    write(tmp_path / "data/train.jsonl", [LOWER])
    paths = {name: str(tmp_path / name) for name in ("output_dir", "cache_dir")}
    argv = [word for name, value in paths.items() for word in (f"--{name}", value)]
    argv += ["--config", str(ROOT / "tests/smoke.yaml"), "--model_name_or_path", str(TINY), "--dataset", "wangchan"]
    monkeypatch.setattr(sys, "argv", ["data_config.py", *argv, "--dataset_path", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as end:
        call(data_config.main)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == "" and re.fullmatch("error: .*no column 'Instruction'.*\n", error)
    assert not list(tmp_path.glob("output_dir/*")) and not list(tmp_path.glob("cache_dir/*"))


# ----------------------------------------------------------------------------------------------------------------------
# what lies in the repository, and beside it


def test_the_sample_model_is_rebuilt_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "sample"))
    import build

    build.build(tmp_path)
    committed = sorted(path.name for path in TINY.iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
