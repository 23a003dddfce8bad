"""Thai text: one spelling for training and evaluation; every passage that a row shares with a benchmark is found."""

import random
import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

from ouro.data.cache import prepare
from ouro.data.chats import END_OF_TURN
from ouro.data.sources import benchmark_items, strings
from ouro.data.thai import LEAST, MOST, Overlap, is_thai, normalise
from ouro.evaluate.benchmarks import load_items
from ouro.files import ROOT, read_yaml
from ouro.settings import EVALS, Settings, resolve

import pytest
from helpers import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

EXAM = ROOT / "sample/thai_exam"
SPEC = read_yaml(EVALS)["benchmarks"]["thai_exam"]
NIKHAHIT, AA, AM, MAI_THO, ZWSP = "\u0e4d", "\u0e32", "\u0e33", "\u0e49", "\u200b"
MARKS = [chr(c) for c in (0x0E31, *range(0x0E34, 0x0E3B), *range(0x0E47, 0x0E4F))]
VOWELS = "เแะาำๅ\u0e31\u0e34-\u0e39\u0e47\u0e4d"
MESSY = f"ท{MAI_THO}ำง{ZWSP}าน น{MAI_THO}{NIKHAHIT}{AA} เเละ น{AM}{MAI_THO}"  # as in exams and scraped pages
CLEAN = "ท้ำงาน น้ำ และ น้ำ"
repeatable = hypothesis_settings(deadline=None, derandomize=True, max_examples=300, database=None)


def whole(row: dict) -> str:
    return "\n".join(strings(row))


# ------------------------------------------------------------------------------------------------ one spelling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"น{NIKHAHIT}{AA}", "นำ"),
        (f"น{MAI_THO}{NIKHAHIT}{AA}", "น้ำ"),
        (f"น{NIKHAHIT}{MAI_THO}{AA}", "น้ำ"),
        (f"น{AM}{MAI_THO}", "น้ำ"),
        (f"น{NIKHAHIT}{ZWSP}{AA}", "นำ"),
        ("ท\u0e48\u0e35", "ที่"),
        ("ผ\u0e49\u0e39", "ผู้"),
        ("ส\u0e34ทธ\u0e4c\u0e34", "สิทธ\u0e34\u0e4c"),
        ("มา\u0e48น", "ม่าน"),
        ("เเปลก เเละเเตก", "แปลก และแตก"),
        ("ภาษา\u200bไทย\u200cง่าย\ufeffๆ\u2060", "ภาษาไทยง่ายๆ"),
        ("\u200b\ufeff", ""),
        (MESSY, CLEAN),
    ],
)
def test_one_word_has_one_spelling(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "บรรทัดแรก\n\n\n  ย่อหน้า\n\tแท็บ  สองช่อง\r\nท้าย \n",
        "def น้ำ(x):\n    if x:\n        return {'ก': 1}  # หมายเหตุ\n\n\n    return None\n",
        "เด็ก ๆ กรุงเทพฯ ข้าว ฯลฯ ๏ ๚ ๛ ฿100 ๒๕๖๗ ฤๅษี ฤ ฦๅ พระอินทร์ กฺวิ",
        "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 ❤️ 🇹🇭",
        "Crème brûlée, e\u0301 naïve, ﬁ ① ½ ™ x² ＡＢ \u00a0 “quoted” – dash",
        'x = a ** 2 != b // 3;\t<p class="a">&nbsp;</p> C:\\new\\table `$\\frac{1}{2}$`',
        "日本語 한국어 русский हिन्दी العربية",
    ],
    ids=["lines", "code", "signs", "emoji", "Latin", "markup", "other scripts"],
)
def test_everything_else_stays(text):
    assert normalise(text) == text


def test_sara_am_is_never_taken_apart_as_nfkc_does():
    assert normalise("น้ำ") == unicodedata.normalize("NFC", "น้ำ") == f"น{MAI_THO}{AM}"
    assert unicodedata.normalize("NFKC", "น้ำ") == f"น{MAI_THO}{NIKHAHIT}{AA}"
    assert normalise(unicodedata.normalize("NFKC", "น้ำ คำ ตำรา")) == "น้ำ คำ ตำรา"


pieces = st.one_of(st.sampled_from("กนฤเแโะาำๅๆฯ aB1๑.\n \u200b\u200c\u200d\ufeff👩"), st.sampled_from(MARKS))
texts = st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=30))


@repeatable
@given(texts)
def test_normalising_twice_is_normalising_once(text):
    once = normalise(text)
    assert normalise(once) == once


@repeatable
@given(texts)
def test_only_thai_vowels_marks_and_zero_width_characters_change(text):
    def rest(value: str) -> str:
        return re.sub(f"[{VOWELS}{''.join(MARKS)}\u200b\u200c\ufeff\u2060]", "", value)

    done = normalise(text)
    assert rest(done) == rest(text)
    assert done.count(AM) >= text.count(AM)
    assert not set(done) & set("\u200b\u200c\ufeff\u2060")


# ------------------------------------------------------------------------------------------------ training, evaluation


def exam(folder: Path, items: list[dict]) -> str:
    """A copy of thai_exam whose subset ic holds these items and whose other subsets are the sample's."""
    shutil.copytree(EXAM, folder)
    write_jsonl(folder / "data/ic/ic_test.jsonl", *items)
    return str(folder)


def training_set(folder: Path, rows: list[tuple[str, str]], **settings) -> Settings:
    """Settings whose training set holds these questions and answers, and sixty others."""
    rows = [*rows, *((f"คำถามที่ {n}", f"คำตอบที่ {n} ของชุดนี้") for n in range(60))]
    path = write_jsonl(folder / "train.jsonl", *({"prompt": asked, "completion": said} for asked, said in rows))
    return Settings(dataset="pairs", dataset_path=path, cache_dir=str(folder / "cache"), **settings)


@pytest.mark.parametrize(("on", "spelling"), [(True, CLEAN), (False, MESSY)], ids=["on", "off"])
def test_training_and_evaluation_read_the_same_spelling(tmp_path, tokenizer, on, spelling):
    item = {"question": MESSY, "a": MESSY + "ก", "b": "ข", "c": "", "d": "", "answer": "a"}
    items = load_items("thai_exam", SPEC, exam(tmp_path / "exam", [item]), normalise if on else str)
    (read,) = [i for i in items if i["subset"] == "ic"]
    assert (read["question"], read["options"]["a"]) == (spelling, spelling + "ก")
    s = training_set(tmp_path, [(MESSY, MESSY + "ก")], normalise_thai=on, overlap="none")
    rows, _ = prepare(s, tokenizer, quiet=True)
    said = tokenizer.decode(rows.row(0)[0])
    assert f"{spelling}{END_OF_TURN}" in said and f"{spelling}ก{END_OF_TURN}" in said


# ------------------------------------------------------------------------------------------------ shared passages


def plain(text: str) -> str:
    """What overlap is judged on, written another way: letters, digits and Thai marks, in one spelling and case."""
    return "".join(c for c in normalise(text).lower() if c < "\U00010000" and (c.isalnum() or c in MARKS))


def searched(items: list[tuple[str, list[str]]]) -> list[tuple[str, str, int]]:
    """What is looked for: the item, one of its texts, and how much of that repeats it."""
    parts = [(name, part) for name, texts in items for part in map(plain, texts) if len(part) >= LEAST]
    named = {name for name, _ in parts}
    parts += [(name, "".join(map(plain, texts))) for name, texts in items if name not in named]
    return [(name, part, min(max(LEAST, len(part) // 2), MOST)) for name, part in parts]


@pytest.mark.parametrize("seed", range(4))
def test_find_gives_what_a_search_of_every_passage_gives(seed):
    chance = random.Random(seed)
    alphabet = ["กข่ ab.A1", f"กนำ{NIKHAHIT}{AA}{MAI_THO}เ{ZWSP}", "ab", "ก่้ AZaz09๑ๆ-\n👩"][seed % 4]

    def some(low: int, high: int) -> str:
        return "".join(chance.choices(alphabet, k=chance.randint(low, high)))

    items = [(f"item {n}", [some(0, 300), some(0, 70)]) for n in range(12)]
    overlap = Overlap(items)
    found = []
    for _ in range(60):
        text = some(0, 150)
        if chance.random() < 0.6:
            item = "".join(chance.choice(items)[1])
            at = chance.randrange(len(item) + 1)
            text += item[at : at + chance.randint(40, 180)] + some(0, 40)
        found.append(overlap.find(text))
        text, hit = plain(text), found[-1]
        if hit is None:
            for _, part, least in searched(items):
                assert not any(text[at : at + least] in part for at in range(len(text) - least + 1)), text
        else:
            name, passage = hit
            fitting = [
                len(passage) >= least for item, part, least in searched(items) if item == name and passage in part
            ]
            assert passage in text and any(fitting), text
    assert overlap.short == sum(len(plain("".join(texts))) < LEAST for _, texts in items)
    assert 5 < sum(hit is not None for hit in found) < 60 or alphabet == "ab"


PASSAGE = ("ผู้ลงทุนควรศึกษาข้อมูลก่อนตัดสินใจลงทุนและทำความเข้าใจลักษณะของสินค้า")[:LEAST]
LATIN = "The Quick Brown Fox Jumps Over Lazy Dogs While Sphinx Judges My Quartz Vow".replace(" ", "")[:LEAST]
AMS = ("น้ำทำคำนำจำกำลำตำรำ" * 3)[:LEAST]
DISGUISES = {
    "none": str,
    "lines": lambda text: "\n".join(text[i : i + 7] for i in range(0, len(text), 7)),
    "punctuation": lambda text: "".join(f"{c}{'.,!?…“”()-/*_|:;'[i % 16]}" for i, c in enumerate(text)),
    "Thai punctuation": lambda text: "".join(f"{c}{'฿๏๚๛'[i % 4]}" for i, c in enumerate(text)),
    "upper case": str.upper,
    "NFKC and spaces, as from a PDF": lambda text: " ".join(unicodedata.normalize("NFKC", text)),
    "zero-width": lambda text: ZWSP.join(text),
    "emoji": lambda text: "👩\u200d👧".join(text[i : i + 9] for i in range(0, len(text), 9)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("passage", [PASSAGE, LATIN, AMS], ids=["Thai", "Latin", "sara am"])
def test_fifty_shared_characters_are_found_in_any_disguise_and_forty_nine_are_not(passage, disguise):
    assert len(passage) == len(plain(passage)) == LEAST
    overlap = Overlap([("other", ["ก" * 80]), ("item", ["?", f"xx {passage} yy"])])
    window = plain(passage)
    assert overlap.find(f"ฮฮ{DISGUISES[disguise](passage)}ฮฮ") == ("item", window)
    for part in (passage[1:], passage[:-1]):
        if not unicodedata.category(part[0]).startswith("M"):
            assert overlap.find(f"ฮฮ{DISGUISES[disguise](part)}ฮฮ") is None
    whole = Overlap([("item", [DISGUISES[disguise](passage)])])
    assert whole.find(f"ฮฮ{passage}ฮฮ") == ("item", window)


TITLE = "พลตำรวจเอกสมชาย ใจดี รัฐมนตรีว่าการกระทรวงการพัฒนาสังคมและความมั่นคงของมนุษย์ เปิดเผยว่า"  # stock, 80 characters
QUESTION = f"ข้อใดเป็นผลจากที่ {TITLE} จะขยายเบี้ยยังชีพแก่ผู้สูงอายุทุกคนโดยไม่ตรวจรายได้ ถ้ารายรับภาษีไม่เพิ่มและหนี้สาธารณะใกล้เพดาน"


def test_a_stock_phrase_of_a_long_question_is_no_repetition_and_the_question_is():
    overlap = Overlap([("item", [QUESTION, "หนี้เกินเพดาน", "ไม่มีผล"])])
    assert len(plain(TITLE)) > LEAST
    assert overlap.find(f"วันนี้ {TITLE} จะมีฝนตกหนัก") is None
    assert overlap.find(f"จงตอบ: {'  '.join(QUESTION)}") == ("item", plain(QUESTION))
    half = plain(QUESTION)[-(len(plain(QUESTION)) // 2) :]
    assert LEAST < len(half) < MOST
    assert overlap.find(f"ฮ{half}ฮ") == ("item", half) and overlap.find(half[1:]) is None


# ------------------------------------------------------------------------------------------------ the training set

IC, TGAT = (read_jsonl(EXAM / f"data/{subset}/{subset}_test.jsonl") for subset in ("ic", "tgat"))
SHORT = sum(len(plain(whole(item))) < LEAST for file in EXAM.glob("data/*/*_test.jsonl") for item in read_jsonl(file))


@pytest.mark.parametrize("drop", [True, False])
def test_rows_that_repeat_an_exam_item_are_listed_and_dropped_unless_told_otherwise(tmp_path, tokenizer, drop):
    spelt = unicodedata.normalize("NFKC", IC[4]["question"] + IC[4]["a"]).replace(" ", ZWSP)
    rows = [("ข้อสอบ", f"คำตอบคือ {whole(TGAT[2])}"), (f"ช่วยทำข้อนี้ {spelt} {IC[4]['b']} {IC[4]['c']}", "ข้อ ก")]
    rows.append(("อะไร", whole(IC[5])[:30]))  # too little of it
    settings = training_set(
        tmp_path, rows, overlap="thai_exam", paths={"thai_exam": str(EXAM)}, drop_overlap=drop, normalise_thai=False
    )  # the search spells for itself
    kept, report = prepare(settings, tokenizer, quiet=True)
    hits = report["overlap"]["rows"]
    assert [(Path(hit["row"]).name, hit["item"]) for hit in hits] == [
        ("train.jsonl, line 1", "thai_exam, tgat_test.jsonl, item 3"),
        ("train.jsonl, line 2", "thai_exam, ic_test.jsonl, item 5"),
    ]
    for hit, item in zip(hits, (TGAT[2], IC[4]), strict=True):
        assert len(hit["shared"]) >= LEAST and hit["shared"] in plain(whole(item))
    assert (report["overlap"]["items"], report["overlap"]["too_short"]) == (100, SHORT)
    assert SHORT < 5
    assert report["rows_dropped"].get("repeats a benchmark item", 0) == (2 if drop else 0)
    assert len(kept) == report["rows_kept"] == 63 - sum(report["rows_dropped"].values())
    trained = "".join(tokenizer.decode(kept.row(i)[0]) for i in range(len(kept)))
    assert (TGAT[2]["question"] in trained) is not drop
    assert whole(IC[5])[:30] in trained


@pytest.fixture(scope="module")
def sampled() -> dict[str, str]:
    """Of the demo's `paths` those of benchmarks and texts, and the sample's training set."""
    return {name: str(ROOT / path) for name, path in read_yaml(ROOT / "configs/demo.yaml")["paths"].items()}


@pytest.mark.parametrize("language", ["tha_Thai", "eng_Latn"])
def test_a_passage_that_a_verdict_rests_on_is_found_without_asking_for_it(tmp_path, tokenizer, sampled, language):
    passages = [row["flores_passage"] for row in read_jsonl(ROOT / f"sample/belebele/data/{language}.jsonl")]
    settings = training_set(tmp_path, [(f"เขียนต่อ {n}", text) for n, text in enumerate(passages)], paths=sampled)
    _, report = prepare(settings, tokenizer, quiet=True)
    found = [hit["row"] for hit in report["overlap"]["rows"] if hit["item"].startswith(f"belebele, {language}")]
    assert len(found) == len(passages) == 24 == report["rows_dropped"]["repeats a benchmark item"]


def test_held_out_answers_are_found_in_a_training_set_of_ones_own_and_their_own_set_leaves_out_their_questions(
    tmp_path, tokenizer, sampled
):
    from_hub = {name: path for name, path in sampled.items() if name != "thai_text"}  # wangchan's test split
    answers = [row["Output"] for row in read_jsonl(ROOT / "sample/wangchan/test.jsonl")]
    settings = training_set(tmp_path, [(f"ถาม {n}", text) for n, text in enumerate(answers)], paths=from_hub)
    _, report = prepare(settings, tokenizer, quiet=True)
    hits = {hit["row"]: hit["item"] for hit in report["overlap"]["rows"]}
    assert len(hits) == len(answers) == report["rows_dropped"]["repeats a benchmark item"]
    assert all(item == f"thai_text, text {row.rpartition(' ')[2]}" for row, item in hits.items())
    itself = Settings(paths=from_hub, cache_dir=str(tmp_path / "cache"))
    _, report = prepare(itself, tokenizer, quiet=True)
    assert report["overlap"]["benchmarks"] == itself.overlap.removesuffix(",thai_text"), "it says what was not checked"
    assert report["rows_kept"] == report["rows_in"] == 204


@pytest.mark.parametrize("task", ["thai_text", "thai_wikipedia", "english_text"])
def test_texts_that_paths_names_are_checked_against_when_overlap_names_their_task(tmp_path, tokenizer, sampled, task):
    first, *_ = read_jsonl(Path(sampled[task]))
    settings = training_set(tmp_path, [("เล่าเรื่อง", f"ได้เลย {first['text'][50:300]}")], overlap=task,
                            paths={task: sampled[task]})  # fmt: skip
    _, report = prepare(settings, tokenizer, quiet=True)
    (hit,) = report["overlap"]["rows"]
    assert (hit["item"], report["overlap"]["benchmarks"]) == (f"{task}, text 1", task)


@pytest.mark.parametrize("config", ["demo", "smoke"])
def test_the_sample_s_training_sets_repeat_nothing_that_is_checked(config):
    s = resolve("", ["--config", f"configs/{config}.yaml"]).settings
    assert s.overlap == Settings().overlap
    for dataset in s.paths.keys() & {"wangchan", "synthetic", "r1", "smol-smoltalk", "r1-english"}:
        items = Overlap(benchmark_items(replace(s, dataset=dataset)))
        rows = [whole(row) for file in Path(s.paths[dataset]).glob("train.jsonl") for row in read_jsonl(file)]
        assert len(items.texts) > 200 and not [row for row in rows if items.find(row)]


# ------------------------------------------------------------------------------------------------ replies


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
