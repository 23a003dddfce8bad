"""What is trained, and what is refused before a step is paid for."""

import json
import re
from pathlib import Path

from settings import Settings, UserError

import pytest
from datasets import Dataset

import data_config
from data_config import DATASETS, load_tokenizer, marked, prepare, read_rows, tokenize
from modeling_ouro import IGNORE

ROOT = Path(data_config.__file__).parent
SAMPLES = {"wangchan": ROOT / "sample/wangchan", "synthetic": ROOT / "sample/synthetic", "r1": ROOT / "sample/r1"}
ROW = {"ID": "1", "Domain": "Legal", "Instruction": "ถาม", "Input": "", "Output": "ตอบ", "License": "Apache-2.0"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "sample/ouro-tiny"))


def write(folder: Path, rows: list, name: str = "train.jsonl") -> Settings:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return Settings(paths={"wangchan": str(folder)})


def trained_text(row: dict, tokenizer) -> str:
    return tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE])


@pytest.mark.parametrize("name", SAMPLES)
def test_prompt_tokens_are_not_trained(name, tokenizer):
    rows, report = prepare(name, Settings(paths={name: str(SAMPLES[name])}), tokenizer, quiet=True)
    raw = [json.loads(line) for line in (SAMPLES[name] / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(raw) == report["rows_kept"]
    for row, source in zip(rows, raw, strict=True):
        assert trained_text(row, tokenizer) == source[DATASETS[name].completion] + "<|im_end|>"
        boundary = next(i for i, label in enumerate(row["labels"]) if label != IGNORE)
        prompt = tokenizer.decode(row["input_ids"][:boundary])
        assert prompt.endswith("<|im_start|>assistant\n") and source[DATASETS[name].prompt[0]] in prompt
        assert all(label in (IGNORE, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))


def test_an_empty_input_leaves_no_blank_lines(tokenizer):
    messages = data_config.to_messages(ROW, DATASETS["wangchan"], "row")
    assert messages[0]["content"] == "ถาม"
    messages = data_config.to_messages(ROW | {"Input": "ข้อความ"}, DATASETS["wangchan"], "row")
    assert messages[0]["content"] == "ถาม\n\nข้อความ"


def test_lower_case_columns_are_refused_not_trained_as_empty_rows(tmp_path, tokenizer):
    # The predecessor read row.get("instruction") from these rows, got None, and trained three jobs on nothing.
    settings = write(tmp_path, [{key.lower(): value for key, value in ROW.items()}])
    with pytest.raises(UserError, match=r"row 1: no column 'Instruction'; did you mean 'instruction'\?"):
        prepare("wangchan", settings, tokenizer)


def test_empty_rows_are_counted_and_above_a_share_refused(tmp_path, tokenizer):
    rows = [ROW] * 98 + [ROW | {"Output": " \n"}, ROW | {"Instruction": None}]
    settings = write(tmp_path, rows)
    with pytest.raises(UserError, match=r"2 of 100 rows .* have an empty question or answer; .*max_empty_share = 0.01"):
        prepare("wangchan", settings, tokenizer, quiet=True)
    settings.max_empty_share = 0.02
    kept, report = prepare("wangchan", settings, tokenizer, quiet=True)
    assert len(kept) == 98 and report["rows_dropped"] == {"empty": 2} and report["rows_in"] == 100


def test_an_answer_is_never_trained_without_its_end(tmp_path, tokenizer):
    # The predecessor cut nearly every row at 2,048 tokens, so that the end of the answer was never learnt.
    settings = write(tmp_path, [ROW] * 9 + [ROW | {"Output": "ยาว" * 200}])
    full = len(tokenize(data_config.to_messages(ROW | {"Output": "ยาว" * 200}, DATASETS["wangchan"], ""), tokenizer)[0])
    settings.max_length = full
    assert prepare("wangchan", settings, tokenizer, quiet=True)[1]["rows_kept"] == 10
    settings.max_length = full - 1
    kept, report = prepare("wangchan", settings, tokenizer, quiet=True)
    assert report["rows_dropped"] == {"longer than max_length": 1} and report["end_token_survival"] == 1
    assert all(trained_text(row, tokenizer) == "ตอบ<|im_end|>" for row in kept)
    settings.max_dropped_share = 0.05
    with pytest.raises(UserError, match=r"1 of 10 rows .* are longer than max_length"):
        prepare("wangchan", settings, tokenizer, quiet=True)


def test_text_that_spells_a_special_token_cannot_end_the_turn(tmp_path, tokenizer):
    settings = write(tmp_path, [ROW, ROW | {"Output": "ก<|im_end|>ข"}, ROW | {"Input": "<|endoftext|>"}])
    assert prepare("wangchan", settings, tokenizer, quiet=True)[1]["rows_dropped"] == {"special token in the text": 2}


def test_the_end_of_turn_is_trained_though_bos_eos_and_pad_are_one_token(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    _, labels = tokenize([{"role": "user", "content": "ก"}, {"role": "assistant", "content": "ข"}], tokenizer)
    trained = [label for label in labels if label != IGNORE]
    assert trained[-1] == 2 and trained.count(2) == 1 and labels[-1] == IGNORE  # the template's newline after it is not


def test_a_template_that_does_not_continue_its_prompt_is_refused(tokenizer):
    other = load_tokenizer(str(ROOT / "sample/ouro-tiny"))
    messages = [{"role": "user", "content": "ก"}, {"role": "assistant", "content": "ข"}]
    other.chat_template = tokenizer.chat_template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(UserError, match="does not continue its own generation prompt"):
        tokenize(messages, other)
    other.chat_template = tokenizer.chat_template.replace("['content'] }}<|im_end|>", "['content'] }}")
    with pytest.raises(UserError, match=r"does not end the answer with <\|im_end\|>"):
        tokenize(messages, other)


def test_the_shown_row_marks_exactly_what_is_trained(tokenizer):
    ids, labels = tokenize([{"role": "user", "content": "ก"}, {"role": "assistant", "content": "ขค"}], tokenizer)
    text = marked({"input_ids": ids, "labels": labels}, tokenizer)
    assert re.findall("⟦(.*?)⟧", text, re.DOTALL) == ["ขค<|im_end|>"]
    assert text.replace("⟦", "").replace("⟧", "") == tokenizer.decode(ids)


def test_parquet_and_data_subfolder_give_the_same_rows(tmp_path):
    rows = read_rows("wangchan", Settings(paths={"wangchan": str(SAMPLES["wangchan"])}))[0]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        source = read_rows("wangchan", Settings(paths={"wangchan": str(SAMPLES["wangchan"])}), split)[0]
        Dataset.from_list(source).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert read_rows("wangchan", Settings(paths={"wangchan": str(tmp_path)}))[0] == rows
    assert len(rows) == 72 and len(source) == 12


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW, '{"Instruction": '], r"train.jsonl, line 3: not valid JSON"),
        ([ROW, '["list"]'], r"train.jsonl, line 2: expected an object, found list"),
        ([ROW | {"Output": ["ก"]}], r"row 1, column Output: expected text, found list"),
        ([ROW | {"Output": 7}], r"row 1, column Output: expected text, found int"),
        ([{k: v for k, v in ROW.items() if k != "Output"}], r"row 1: no column 'Output'"),
        ([], r"no rows in train.jsonl"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, tokenizer, rows, message):
    settings = write(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        prepare("wangchan", settings, tokenizer, quiet=True)


def test_invalid_utf8_is_named_by_line(tmp_path):
    settings = write(tmp_path, [ROW])
    (tmp_path / "train.jsonl").write_bytes(b'{"a": "b"}\n{"a": "\xff"}\n')
    with pytest.raises(UserError, match=r"train.jsonl, line 2: not valid UTF-8"):
        read_rows("wangchan", settings)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no such file or folder"):
        read_rows("wangchan", Settings(paths={"wangchan": str(tmp_path / "nope")}))
    with pytest.raises(UserError, match=r"holds neither train\*.jsonl nor train\*.parquet"):
        read_rows("wangchan", Settings(paths={"wangchan": str(tmp_path)}))
    with pytest.raises(UserError, match=r"no folder .*nope"):
        load_tokenizer(str(tmp_path / "nope"))


def test_the_sample_is_what_it_claims_to_be():
    rows = {name: [json.loads(x) for x in (p / "train.jsonl").read_text().splitlines()] for name, p in SAMPLES.items()}
    assert len(rows["wangchan"]) >= 64 and sum(row["Input"] == "" for row in rows["wangchan"]) >= 10
    assert " ".join(rows["wangchan"][0]) == "ID Domain Instruction Input Output Tags Task_type License"
    assert len({row["Domain"] for row in rows["wangchan"]}) == 4
    test = [json.loads(line) for line in (SAMPLES["wangchan"] / "test.jsonl").read_text().splitlines()]
    assert not {row["Output"] for row in test} & {row["Output"] for row in rows["wangchan"]}
    for language in ("thai", "english"):
        assert len((ROOT / f"sample/texts/{language}.jsonl").read_text().splitlines()) == 12
    everything = "".join(path.read_text() for path in (ROOT / "sample").rglob("*.jsonl"))
    assert "\u0e4d\u0e32" not in everything and "\u200b" not in everything  # decomposed sara am, zero-width space


def test_the_sample_model_is_rebuilt_byte_for_byte(tmp_path):
    import sys

    sys.path.insert(0, str(ROOT / "sample"))
    try:
        import build
    finally:
        sys.path.pop(0)
    build.build(tmp_path)
    committed = sorted(path.name for path in (ROOT / "sample/ouro-tiny").iterdir())
    assert committed == sorted(path.name for path in tmp_path.iterdir())
    for name in committed:
        assert (tmp_path / name).read_bytes() == (ROOT / "sample/ouro-tiny" / name).read_bytes(), name
