"""Data of one's own: its layout is recognised and said, whatever form its files have; what is unclear is refused."""

import csv
import importlib
import io
import json
from functools import partial
from pathlib import Path

from ouro.data import formats, sources
from ouro.data.sources import entry_of, find_source
from ouro.files import UserError
from ouro.settings import Settings

import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from helpers import ROOT
from training_sets import chatml, prepare_set, questions, texts, trained_texts, turns

ASKED = questions(3)
MORE = ["เพิ่มเติม", "", '"อ้าง", แล้ว\nขึ้นบรรทัด']
ANSWERS = ["ตอบ ก", "007", "ตอบ, ค\n\nจบ"]
WHOLE = ["\n\n".join(filter(None, pair)) for pair in zip(ASKED, MORE, strict=True)]
BOM = "\ufeff"

ALPACA = [{"instruction": q, "input": i, "output": a} for q, i, a in zip(ASKED, MORE, ANSWERS, strict=True)]
SHAREGPT = [
    {"id": 1, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
    for q, a in zip(WHOLE, ANSWERS, strict=True)
]
OPENAI = [{"messages": turns(q, a)} for q, a in zip(WHOLE, ANSWERS, strict=True)]
PAIRS = [{"prompt": q, "completion": a} for q, a in zip(WHOLE, ANSWERS, strict=True)]


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sheet_csv(rows: list[dict]) -> str:
    """With two empty columns and an empty row, as programs write a sheet in which more was once used."""
    return as_csv(rows).replace("\r\n", ",,\r\n") + ",,,,\r\n"


def as_workbook(*sheets: list[dict]) -> bytes:
    """With an empty row in each sheet, and an empty sheet beside those given."""
    content = io.BytesIO()
    with pd.ExcelWriter(content, engine="openpyxl") as writer:
        for number, rows in enumerate(sheets):
            table = pd.DataFrame([rows[0], dict.fromkeys(rows[0]), *rows[1:]])
            table.to_excel(writer, sheet_name=f"S{number}", index=False)
        pd.DataFrame().to_excel(writer, sheet_name="empty", index=False)
    return content.getvalue()


@pytest.fixture
def prepared(tmp_path, tokenizer):
    return partial(prepare_set, tmp_path, "own", tokenizer=tokenizer)


SPARSE = [{key: value for key, value in row.items() if value} for row in ALPACA]  # no `input` where it is empty
FORMS = {  # name -> files, which of them is named, the layout that is said
    "Alpaca, JSONL": ({"mine.jsonl": ALPACA}, "mine.jsonl", "alpaca: columns instruction, output, input;"),
    "Alpaca without some inputs": ({"mine.jsonl": SPARSE}, "mine.jsonl", "alpaca: columns instruction, output, input;"),
    "Alpaca, JSON with a mark": ({"mine.json": BOM + json.dumps(ALPACA)}, "mine.json", "alpaca: "),
    "Alpaca, Excel's CSV": ({"mine.csv": BOM + as_csv(ALPACA)}, "mine.csv", "alpaca: "),
    "Alpaca, a sheet's CSV": ({"mine.csv": ",,,,\n" + sheet_csv(ALPACA)}, "mine.csv", "alpaca: "),
    "Alpaca, CSV that tells Excel its comma": ({"mine.csv": "sep=,\r\n" + as_csv(ALPACA)}, "mine.csv", "alpaca: "),
    "Alpaca, a workbook": ({"mine.xlsx": as_workbook(ALPACA)}, "mine.xlsx", "alpaca: "),
    "Alpaca, Parquet": ({"mine.parquet": ALPACA}, "mine.parquet", "alpaca: "),
    "ShareGPT": ({"mine.jsonl": SHAREGPT}, "mine.jsonl", "sharegpt: columns conversations; not read: id;"),
    "ShareGPT, Parquet": ({"train.parquet": SHAREGPT}, "", "sharegpt: columns conversations; not read: id;"),
    "OpenAI": ({"mine.parquet": OPENAI}, "mine.parquet", "chat: columns messages;"),
    "prompt and completion, CSV": ({"train.csv": as_csv(PAIRS)}, "", "pairs: columns prompt, completion;"),
    "prompt and completion, JSON": ({"mine.json": PAIRS}, "mine.json", "pairs: columns prompt, completion;"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_and_says_how_it_was_read(form, prepared, tokenizer):
    files, path, said = FORMS[form]
    rows, report = prepared(files, path)
    assert texts(rows, tokenizer) == [chatml(q, a) for q, a in zip(WHOLE, ANSWERS, strict=True)]
    assert report["layout"].startswith(said) and report["layout"].endswith("2 % of the questions, by a hash")
    assert report["rows_kept"] == report["rows_in"] == 3 and not report["unread_keys"]


@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_read_and_its_test_split_held_out(splits, prepared, tmp_path, tokenizer):
    saved = Dataset.from_list(ALPACA)
    rest = Dataset.from_list([{"instruction": WHOLE[0], "output": ANSWERS[0]}])
    (DatasetDict(train=saved, test=rest) if splits else saved).save_to_disk(tmp_path / "saved")
    make = partial(prepare_set, tmp_path, "own", {}, str(tmp_path / "saved"), tokenizer=tokenizer)
    rows, report = make()
    kept = slice(1 if splits else 0, 3)  # the first question is in the split test, too
    assert trained_texts(rows, tokenizer) == [f"{a}<|im_end|>" for a in ANSWERS[kept]]
    assert ("the split test" in report["layout"]) == splits
    assert len(make(split="held_out")[0]) == int(splits)


def test_a_folder_that_is_named_like_a_table_is_read_as_a_folder(tmp_path):
    (folder := tmp_path / "mine.parquet").mkdir()  # as Spark writes them
    pd.DataFrame(PAIRS).to_parquet(folder / "part-00000.parquet")
    settings = Settings(dataset="own", dataset_path=f"{folder}")
    sources.check_places(settings)
    assert find_source(settings).files["train"] == [folder / "part-00000.parquet"]


def test_what_is_held_out_of_ones_own_data_goes_by_the_whole_question(prepared, tokenizer):
    asked = [*questions(4), *questions(2, held_out=True)]
    files = {"mine.jsonl": [{"prompt": q, "completion": f"ตอบ {q}"} for q in asked]}
    assert texts(prepared(files, "mine.jsonl", split="held_out")[0], tokenizer) == [
        chatml(q, f"ตอบ {q}") for q in asked[4:]
    ]
    same = {"mine.jsonl": [{"instruction": "แปล", "input": q, "output": q} for q in questions(300)]}
    kept = [len(prepared(same, "mine.jsonl", split=split)[0]) for split in ("train", "held_out")]
    assert sum(kept) == 300 and 0 < kept[1] < 20


def test_a_mark_in_csv_is_text_and_leaves_its_row_out(prepared, tokenizer):
    marked = [row | {"train": mark} for row, mark in zip(PAIRS, ("TRUE", "false", ""), strict=True)]
    rows, report = prepared({"MINE.CSV": as_csv(marked)}, "MINE.CSV")  # so some name them on Windows
    assert trained_texts(rows, tokenizer) == [f"{ANSWERS[i]}<|im_end|>" for i in (0, 2)]
    assert report["rows_kept"] == 2 and "not read" not in report["layout"]


REFUSED = {
    "two layouts": (
        [PAIRS[0] | OPENAI[0]],
        r"chat \(messages\) and of pairs \(prompt, completion\): which .* DATASET=ch",
    ),
    "two, in different rows": ([PAIRS[0], ALPACA[0]], r"alpaca \(instruction, output\) and of pairs .* DATASET=pairs"),
    "no layout": ([{"ask": "ก", "say": "ข"}], r"are ask, say: not those of alpaca .*; rename .*DATASET=mine"),
    "a published one": ([{"Instruction": "ก", "Input": "", "Output": "ข", "License": "MIT"}], r"by DATASET=wangchan "),
    "no rows": ([], "has no rows: set dataset_path to"),
    "unknown speaker": ([{"conversations": [{"from": "bing", "value": "ก"}]}], r"turn 1: expected .*found .*'bing'"),
    "a row of another layout": ([*[PAIRS[0]] * 256, OPENAI[0]], "line 257: no column 'prompt'.* by DATASET=chat"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_layout_that_is_not_clear_is_asked_for(fault, prepared):
    rows, message = REFUSED[fault]
    with pytest.raises(UserError, match=message):
        prepared({"mine.jsonl": rows}, "mine.jsonl")


def test_a_workbooks_rows_are_placed_and_what_is_no_single_table_is_refused(prepared, tmp_path):
    (tmp_path / "one.xlsx").write_bytes(
        as_workbook([{"prompt": 1, "completion": 2.5}, {"prompt": "ก", "completion": None}])
    )
    read = list(formats.read_file(tmp_path / "one.xlsx"))
    assert [(where.rpartition(", ")[2], row) for where, row in read] == [
        ("row 2", {"prompt": "1", "completion": "2.5"}),
        ("row 4", {"prompt": "ก", "completion": ""}),
    ]
    with pytest.raises(UserError, match=r"mine.xlsx: 2 sheets hold rows \(S0, S1\), one must: save it as CSV UTF-8"):
        prepared({"mine.xlsx": as_workbook(ALPACA, PAIRS)}, "mine.xlsx")
    whole = as_workbook(ALPACA)
    sheet = whole.index(name := b"xl/worksheets/sheet1.xml") + len(name)
    for damaged in (whole[:-900], whole[: sheet + 9] + b"\xff" * 20 + whole[sheet + 29 :]):
        with pytest.raises(UserError, match="mine.xlsx is not a readable Excel workbook"):
            prepared({"mine.xlsx": damaged}, "mine.xlsx")


def test_a_layout_that_is_named_is_read_where_two_would_fit(tmp_path, tokenizer):
    rows, report = prepare_set(tmp_path, "pairs", [PAIRS[0] | OPENAI[1]], tokenizer=tokenizer)
    assert texts(rows, tokenizer) == [chatml(WHOLE[0], ANSWERS[0])] and report["layout"] is None


def test_a_hub_id_is_downloaded_and_named_by_its_commit(tmp_path, monkeypatch):
    place = tmp_path / "snapshots/0123abc"
    place.mkdir(parents=True)
    pa.parquet.write_table(pa.Table.from_pylist(ALPACA), place / "train.parquet")
    asked = []
    monkeypatch.setattr(sources, "snapshot_download", lambda hub_id, **_: asked.append(hub_id) or str(place))
    source = find_source(Settings(dataset="own", dataset_path="me/thai-rows"))
    assert (asked, source.commit, source.entry["completion"]) == (["me/thai-rows"], "0123abc", "output")
    with pytest.raises(UserError, match=r"no such file or folder: data/mine\.jsonl"):
        find_source(Settings(dataset="own", dataset_path="data/mine.jsonl"))


def test_a_row_of_the_table_needs_no_more_than_language_and_columns(tmp_path, monkeypatch):
    table = Path(tmp_path / "datasets.yaml")
    monkeypatch.setattr(sources, "DATASETS", table)
    table.write_text("mine: {language: th, prompt: [ask], completion: say}\n")
    assert entry_of("mine")["held_out"]["share"] == 0.02 and entry_of("mine")["licence"] == "not stated"
    table.write_text("mine: {language: th, prompt: [ask]}\n")
    with pytest.raises(UserError, match=r"datasets.yaml, mine: language, and prompt and completion, or messages, must"):
        entry_of("mine")


@pytest.mark.parametrize(
    ("program", "argv", "told"),
    [
        ("data_config", ["--dataset", "own", "--dataset_path", "nope.csv"], "nope.csv in /.*; correct dataset_path: "),
        ("data_config", ["--dataset", "own", "--dataset_path", "sample/nope"], "no such file or folder: sample/nope"),
        ("data_config", ["--dataset", "own"], r"is for data of your own: name its folder or file with --dataset_path"),
        ("data_config", ["--paths", "thai_exam=nope"], "paths: thai_exam=nope: no such .*; correct it, or leave"),
        ("data_config", ["--overlap", "thai_exm"], "overlap: unknown benchmark 'thai_exm'; did you mean 'thai_exam'"),
        ("data_config", ["--overlap", "wikipedia"], "unknown benchmark 'wikipedia'; did you mean 'thai_wikipedia'"),
        ("data_config", ["--overlap", "parallel_text_thai"], "items of parallel_text_thai are those of belebele: name"),
        ("data_config", ["--overlap", "thai_text", "--paths", "thai_text=nope"], "paths: thai_text=nope: no such file"),
        ("data_config", ["--max_tokens", "wangchn"], "unknown dataset 'wangchn'"),
        ("evaluate", ["--base", "--paths", "english_text=nope.jsonl"], "paths: english_text=nope.jsonl: no such file"),
        ("evaluate", ["--base", "--paths", "belebele=nope"], "paths: belebele=nope: no such file or folder"),
        ("evaluate", ["--model", "./nope"], r"no folder \./nope"),
        ("evaluate", ["--model", "output/exp2-wangchan-ut1/nope"], "no folder output/exp2-wangchan-ut1/nope"),
    ],
)
def test_what_is_not_on_this_machine_is_said_before_the_network_is_asked_for_anything(
    tmp_path, monkeypatch, program, argv, told
):
    def asked(self, method, url, **_):
        raise AssertionError(f"{url} was asked for")

    (tmp_path / "sample").mkdir()
    (tmp_path / "output/exp2-wangchan-ut1").mkdir(parents=True)
    monkeypatch.setattr(sources.HubSession, "request", asked)
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs/default.yaml")
    monkeypatch.setattr("sys.argv", [f"{program}.py", "--config", config, "--bf16", "false", *argv])
    with pytest.raises(UserError, match=told):
        importlib.import_module(program).main()
