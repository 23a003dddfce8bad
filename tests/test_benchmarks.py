"""Items are read as they are, none dropped and no letter moved; prompts and parsers do what each protocol says."""

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ouro.data.formats import read_file
from ouro.evaluate import benchmarks, tasks
from ouro.evaluate.benchmarks import choose, item_prompts, load, load_items, load_shots, parse_choice, windows
from ouro.evaluate.results import METRIC
from ouro.files import UserError
from ouro.settings import Settings, resolve

import pyarrow as pa
import pyarrow.parquet
import pytest
from helpers import read_jsonl, write_jsonl
from scipy.stats import binomtest
from training_sets import write

ROOT = Path(__file__).resolve().parents[1]
TABLE = benchmarks.table()
SPEC, TASKS = TABLE["benchmarks"]["thai_exam"], TABLE["tasks"]
SAMPLE = str(ROOT / "sample/thai_exam")


@pytest.fixture(scope="module")
def items():
    return load_items("thai_exam", SPEC, SAMPLE)


def exam(folder: Path, edit: Callable[[list[dict]], list[dict]], pattern: str = "onet_test") -> str:
    """A copy of the sample with edited rows."""
    shutil.copytree(SAMPLE, folder / "exam")
    for file in (folder / "exam").rglob(f"{pattern}.jsonl"):
        write_jsonl(file, *edit(read_jsonl(file)))
    return str(folder / "exam")


def second(**change) -> Callable[[list[dict]], list[dict]]:
    return lambda rows: [rows[0], rows[1] | change, *rows[2:]]


def test_every_task_names_what_there_is():
    aspects = {spec["aspect"] for spec in TASKS.values()}
    for name, spec in TASKS.items():
        benchmark = TABLE["benchmarks"][spec["benchmark"]]
        assert spec["protocol"] in METRIC and "split" in benchmark, name
        assert set(spec.get("subsets", ())) <= set(benchmark.get("subsets", ())), name
    for aspect in aspects:
        assert sum(spec.get("primary", False) for spec in TASKS.values() if spec["aspect"] == aspect) == 1, aspect
    for name, row in TABLE["baselines"].items():
        assert {"hub_id", "revision", "licence"} <= row.keys(), name
        for score in row.get("published", ()):
            assert score.keys() == {"benchmark", "mean", "value", "protocol", "source"}, name
            assert score["benchmark"] in TABLE["benchmarks"] and score["mean"] in ("macro", "micro"), name
            assert 1 <= score["value"] <= 10 if score["benchmark"] == "mt_bench_thai" else 0 < score["value"] < 1, name
    exams = TABLE["benchmarks"]["openthaieval"]
    assert len(exams["exams"]) == 17 and exams["items"].keys() == exams["exams"].keys()
    totals = {name: sum(row["items"].values()) for name, row in TABLE["benchmarks"].items() if "items" in row}
    assert totals == {"thai_exam": 565, "m3exam": 2168, "openthaieval": 1169, "mt_bench_thai": 91, "belebele": 2 * 900}


@pytest.mark.parametrize("config", ["smoke", "demo"])
def test_every_task_that_make_eval_scores_is_embedded_and_no_exam_item_of_it_is_real(config, monkeypatch):
    """tests/conftest.py leaves no network: what sample/ lacks would be asked for."""
    monkeypatch.chdir(ROOT)
    s = resolve("", ["--config", f"configs/{config}.yaml"]).settings
    assert s.tasks == Settings().tasks, "what make eval scores"
    for name in s.tasks.split(","):
        task = tasks.load_task(name, s, None, [])
        known = task.benchmark.get("items")
        assert len(task.items) >= 12 and (task.part or not known), name
    for file in [*Path("sample/thai_exam").rglob("*.jsonl"), *Path("sample").glob("*/items.jsonl")]:
        assert all("from no exam" in row["note"] for row in read_jsonl(file)), file
    assert all("from no encyclopedia" in row["note"] for row in read_jsonl(Path("sample/texts/thai_wikipedia.jsonl")))


def test_the_embedded_parquet_files_are_those_of_their_items():
    for name in ("m3exam", "openthaieval"):
        (file,) = (ROOT / "sample" / name).rglob("*.parquet")
        assert file == ROOT / "sample" / name / TABLE["benchmarks"][name]["file"]
        assert [row for _, row in read_file(file)] == read_jsonl(ROOT / "sample" / name / "items.jsonl")


def test_other_numbers_of_items_than_expected_are_named():
    row = {"items": {"a": 2, "b": 1, "c": 5}, "subsets": ["a", "b"]}
    items = [{"subset": "a"}, {"subset": "a"}, {"subset": "b"}]
    assert benchmarks.miscounted(items, row) == benchmarks.miscounted(items, {}) == ""
    assert benchmarks.miscounted(items[1:], row) == "a 1 items (2 expected)"
    assert benchmarks.miscounted([*items, {"subset": "d"}], row) == "d 1 items (0 expected)"
    assert benchmarks.miscounted([{"category": "c"}], {"items": {"c": 2}}) == "c 1 items (2 expected)"


def test_options_keep_their_letters_and_no_item_is_dropped(items):
    rows = sum(len(read_jsonl(file)) for file in Path(SAMPLE).rglob("*_test.jsonl"))
    assert len(items) == rows == len({item["id"] for item in items})
    odd = next(item for item in items if len(item["options"]) == 2)
    assert list(odd["options"]) == ["a", "d"] and odd["gold"] == "a"
    prompt, _ = item_prompts(odd, TASKS["thai_exam"])[0]
    assert "\na. " in prompt and "\nd. " in prompt and "\nb. " not in prompt
    assert item_prompts(odd, TASKS["thai_exam-helm"])[0][1] == [" A", " B"]  # HELM's letters have no gap
    assert item_prompts(odd, TASKS["thai_exam-leaderboard"])[0][1] == [" a", " b", " c", " d", " e"]


def test_the_order_of_a_rows_keys_changes_nothing_and_the_limit_takes_the_first_of_each_subset(tmp_path, items):
    turned = exam(tmp_path, lambda rows: [dict(reversed(row.items())) for row in rows], "*")
    assert load_items("thai_exam", SPEC, turned) == items
    few = load("thai_exam", Settings(paths={"thai_exam": SAMPLE}), limit=2)
    assert [item["id"] for item in few] == [f"{s}-{n}" for s in SPEC["subsets"] for n in (1, 2)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        *(({"answer": key}, f"answer '{key}' is not among the options a, b, c, d") for key in ("f", "A", "9" * 5000)),
        ({"a": "", "b": " ", "c": "", "d": ""}, "answer"),
        ({"question": " "}, "no text in 'question'"),
        ({"question": {"th": "ก"}}, "'question' must be a text"),
        *(({"b": wrong}, "'b' must be a text") for wrong in (["x"], True, float("nan"))),
    ],
)
def test_a_bad_item_is_named_by_file_and_line(tmp_path, change, named):
    with pytest.raises(UserError, match=f"onet/onet_test.jsonl, line 2: {named}"):
        load_items("thai_exam", SPEC, exam(tmp_path, second(**change)))


def test_options_that_are_numbers_are_text_and_null_ones_are_none(tmp_path):
    change = second(a=10, b=2.5, c=None, d="สิบ", answer="a")
    found = load_items("thai_exam", SPEC, exam(tmp_path, change))[1]
    assert found["options"].items() >= {"a": "10", "b": "2.5", "d": "สิบ"}.items() and "c" not in found["options"]


@pytest.mark.parametrize("name", ["data/{0}/{1}", "thai_exam/{0}/{1}", "{0}/{1}", "./{1}"])
def test_the_archive_of_the_hub_is_read_from_a_local_folder_too(tmp_path, items, name):
    def archive(pattern: str) -> None:
        with tarfile.open(tmp_path / "thai_exam.tar.gz", "w:gz") as tar:
            for file in Path(SAMPLE).rglob(pattern):
                tar.add(file, name.format(file.parent.name, file.name))

    settings = Settings(paths={"thai_exam": str(tmp_path)})
    archive("*.jsonl")
    assert load("thai_exam", settings) == items
    assert load("thai_exam", settings, subsets=["ic"]) == [item for item in items if item["subset"] == "ic"]
    archive("onet_*.jsonl")
    with pytest.raises(UserError, match=r"thai_exam.tar.gz holds no ic/ic_test.jsonl"):
        load("thai_exam", settings)


def test_a_missing_subset_is_named_and_can_be_left_out_by_name(tmp_path, items):
    for subset in ("onet", "ic"):
        shutil.copytree(f"{SAMPLE}/data/{subset}", tmp_path / "data" / subset)
    settings = Settings(paths={"thai_exam": str(tmp_path)})
    with pytest.raises(UserError, match="no tgat, tpat1, a_level in it; --subsets onet,ic scores"):
        load("thai_exam", settings)
    found = load("thai_exam", settings, subsets=["onet", "ic"])
    assert found == [item for item in items if item["subset"] in ("onet", "ic")]


def test_belebele_has_the_same_question_at_the_same_number_whatever_the_order_of_the_files(tmp_path):
    for code in ("tha_Thai", "eng_Latn"):
        rows = read_jsonl(ROOT / f"sample/belebele/data/{code}.jsonl")
        (tmp_path / "data").mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"data/{code}.jsonl", *(rows if code == "tha_Thai" else rows[::-1]))
    settings = Settings(paths={"belebele": str(tmp_path)})
    thai, english = (load(name, settings, limit=10) for name in benchmarks.LANGUAGES)
    assert [item["gold"] for item in thai] == [item["gold"] for item in english] and len(thai) == 10
    assert len({item["gold"] for item in thai}) > 1 and thai[0]["id"] == "tha_Thai-1"
    assert [item["cluster"] for item in thai] == [item["cluster"] for item in english] and "stratum" not in thai[0]
    prompt, continuations = item_prompts(english[0], TASKS["belebele_english"])[0]
    assert prompt.startswith(f"Passage: {english[0]['passage']}\nQuestion: {english[0]['question']}\nOptions:\na. ")
    assert continuations == [f" {text}" for text in english[0]["options"].values()]
    write_jsonl(tmp_path / "data/tha_Thai.jsonl", rows[0] | {"correct_answer_num": "5"})
    with pytest.raises(UserError, match=r"tha_Thai.jsonl, line 1: answer 'e' is not among the options a, b, c, d"):
        load("belebele_thai", settings)


def test_parallel_text_is_each_passage_once_under_the_same_id_in_both_languages(tmp_path):
    for code in ("tha_Thai", "eng_Latn"):
        rows = read_jsonl(ROOT / f"sample/belebele/data/{code}.jsonl")[:4]
        again = rows[1] | {"question_number": 2, "question": "?"}
        other = rows[2] | {"question_number": 3, "flores_passage": f"{code}: a passage of the same article"}
        write(tmp_path / f"data/{code}.jsonl", [*rows, again, other][:: 1 if code == "tha_Thai" else -1])
    settings = Settings(paths={"belebele": str(tmp_path)})
    thai, english = (tasks.load_task(f"parallel_text_{name}", settings, None, []) for name in ("thai", "english"))
    ids = [item["id"] for item in thai.items]
    assert ids == [item["id"] for item in english.items] and len(set(ids)) == 5
    assert [item["cluster"] for item in thai.items] == [f"sample/belebele#{n}" for n in (1, 2, 3, 3, 4)]
    assert [item["text"] for item in english.items][:2] == [row["flores_passage"] for row in rows[:2]]
    assert english.part == "5 of 488 items" and not english.prompts


M3EXAM = {"question_text": "ข้อใดถูก", "background": [], "options": ["1. ก", "2. ข", "3. ค", "4. ง"],
          "answer_text": "2", "language": "thai", "level": "low", "subject": "thai", "year": "2562"}  # fmt: skip


def m3exam(folder: Path, *rows: dict) -> Settings:
    """M3Exam as it is published, of a row for each dict of changes."""
    write(folder / TABLE["benchmarks"]["m3exam"]["file"], [M3EXAM | row for row in rows])
    return Settings(paths={"m3exam": str(folder)})


def test_m3exam_is_read_as_published_with_its_exams_and_what_items_share(tmp_path):
    thai_digits = {"level": "high", "options": ["๑. 1.5 กม.", "๒. ข", "๓. ค", "๔. ง", "๕. จ"], "answer_text": "๕"}
    shared = {"background": ["อ่านข้อความ", "แล้วตอบ"], "level": "mid"}
    bare = {"options": ["1.5", "2.5", "ไม่มีข้อถูก"], "answer_text": "3"}  # without a number before every option
    gap = {"options": ["1. ก", None, "3. ค", "4. ง"], "answer_text": "4"}
    settings = m3exam(tmp_path, {}, thai_digits, shared, shared | {"question_text": "ข้อใดผิด"}, bare, gap)
    task = tasks.load_task("m3exam", settings, None, [])
    assert [item["id"] for item in task.items] == [
        "m3exam-low-1", "m3exam-high-1", "m3exam-mid-1", "m3exam-mid-2", "m3exam-low-2", "m3exam-low-3",
    ]  # fmt: skip
    assert [item["gold"] for item in task.items] == ["b", "e", "b", "b", "c", "d"]
    assert task.items[1]["options"] == {"a": "1.5 กม.", "b": "ข", "c": "ค", "d": "ง", "e": "จ"}
    assert task.items[4]["options"] == {"a": "1.5", "b": "2.5", "c": "ไม่มีข้อถูก"}
    assert task.items[5]["options"].keys() == {"a", "c", "d"}, "no letter moves"
    assert [item["stratum"] for item in task.items] == [item["subset"] for item in task.items]
    assert task.items[2]["cluster"] == task.items[3]["cluster"] and "cluster" not in task.items[0]
    assert task.part == "6 of 2,168 items" and len(load("m3exam", settings, limit=1)) == 3
    assert task.prompts[0][0][0] == "คำถาม: ข้อใดถูก\nตัวเลือก:\na. ก\nb. ข\nc. ค\nd. ง\nคำตอบ:"
    assert task.prompts[2][0][0].startswith("อ่านข้อความ\nแล้วตอบ\nคำถาม: ข้อใดถูก\nตัวเลือก:\n")


def test_the_leaderboards_m3exam_shows_no_passage_and_has_four_labels(tmp_path):
    five = {"background": "อ่านข้อความ", "options": [f"{n}. {n}" for n in range(1, 6)], "answer_text": "5"}
    task = tasks.load_task("m3exam-leaderboard", m3exam(tmp_path, {"background": ""}, five), None, [])
    ((prompt, continuations),) = task.prompts[1]
    assert prompt.startswith("\n---\nคำถาม: ข้อใดถูก\nตัวเลือก: a. 1\nb. 2\n") and prompt.endswith("e. 5\nคำตอบ:")
    assert continuations == [" a", " b", " c", " d"]
    assert benchmarks.accuracy(task.items, ["b", "d"], task.spec)["chance"] == 1 / 8, "the key of one is no label"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer_text": "5"}, "row 1: answer 'e' is not among the options a, b, c, d"),
        ({"options": ["1. ก"], "answer_text": "1"}, "row 1: answer 'a' is not among the options a, or is the only one"),
        ({"level": ""}, "row 1: no text in 'level'"),
        ({"options": '["1. ก", "2. ข"]'}, "row 1: 'options' must be a list, found '[\"1. ก\""),
    ],
)
def test_an_item_of_m3exam_without_a_key_is_refused_by_its_number(tmp_path, row, told):
    with pytest.raises(UserError, match=re.escape(told)):
        load("m3exam", m3exam(tmp_path, row))


@pytest.mark.parametrize("space", ["\u00a0\u00ad{}\u00ad", "{}\u200b "])
@pytest.mark.parametrize("normalised", [True, False])
def test_what_is_not_seen_around_a_text_of_m3exam_changes_nothing_but_the_count(tmp_path, space, normalised):
    def with_option(text: str) -> dict:
        return {"options": ["1. ก", text, "3. ค", "4. ง"]}

    changed = {"question_text": space.format("ข้อใดถูก"), "level": space.format("low"), "answer_text": space.format("2")}
    rows = {}, with_option(space.format("2. ข")), with_option(f"2. {space.format('ข')}"), changed
    plain, *others = load("m3exam", replace(m3exam(tmp_path, *rows), normalise_thai=normalised))
    assert others == [plain | {"id": f"m3exam-low-{n}", "stripped": True} for n in (2, 3, 4)]


def thai_eval(folder: Path, *rows: dict) -> Settings:
    whole = {"exam_type": "xnli_th", "instruction": "ข้อใด", "input": "(1) ก (2) ข (3) ค", "result": "(2) คือคำตอบ",
             "isAnswerable": True, "isMultipleChoice": "TRUE", "isSingleChoiceSolution": True}  # fmt: skip
    (folder / "data").mkdir()
    content = [{key: None if value is None else str(value) for key, value in (whole | row).items()} for row in rows]
    pa.parquet.write_table(pa.Table.from_pylist(content), folder / "data/test.parquet")
    return Settings(paths={"openthaieval": str(folder)})


def test_the_official_filter_keeps_what_one_choice_answers(tmp_path):
    rows = {}, {"isAnswerable": False}, {"isSingleChoiceSolution": False}, {"exam_type": "a_level"}
    items = load("openthaieval", thai_eval(tmp_path, *rows))
    assert [(i["id"], i["gold"], i["choices"]) for i in items] == [("xnli_th-1", "2", 3), ("a_level-1", "2", 5)]
    prompt, continuations = item_prompts(items[0], TASKS["openthaieval"])[0]
    assert continuations == [] and prompt.endswith("'คำตอบที่ถูกต้องคือ (1)'\nคำถาม: ข้อใด\nChoice: (1) ก (2) ข (3) ค")
    numbers = benchmarks.accuracy(items, ["2", None], TASKS["openthaieval"])
    assert numbers["chance"] == pytest.approx((1 / 3 + 1 / 5) / 2)
    assert numbers["unparsed"] == 1 and numbers["value"] == 0.5


def test_a_thought_is_not_read_as_the_answer_and_one_without_an_answer_is_counted(tmp_path):
    task = tasks.load_task("openthaieval", thai_eval(tmp_path, *({"instruction": x} for x in "กขค")), None, [])
    replies = ["<think>\nตัดข้อ (1) ออก\n</think>\n\n(2)", "ตัดข้อ (1) ออก</think> คำตอบคือ (2)", "<think>ข้อ (2) หรือ"]

    def chat(conversations, done):
        for number, reply in enumerate(replies):
            done(number, reply)

    outcome = tasks.score_replies(task, chat, "x", tmp_path / "cache.jsonl", "x")
    assert [line["prediction"] for line in outcome.lines] == ["2", "2", None]
    assert (outcome.numbers["unfinished_thoughts"], outcome.numbers["unparsed"]) == (1, 1)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"exam_type": "gat"}, "row 1: exam_type 'gat'"),
        ({"result": "ข้อ 2"}, r"row 1: no \(1\) … \(5\) in result"),
        ({"isAnswerable": False}, "no items of openthaieval"),
        ({"isAnswerable": None}, "no items of openthaieval"),
        ({"input": None}, "row 1: no text in 'input'"),
        ({"instruction": " "}, "row 1: no text in 'instruction'"),
        ({"result": None}, r"row 1: no \(1\) … \(5\) in result None"),
    ],
)
def test_rows_that_are_none_of_openthaieval_are_refused(tmp_path, row, named):
    with pytest.raises(UserError, match=named):
        load("openthaieval", thai_eval(tmp_path, row))


def test_texts_are_read_from_any_jsonl_or_the_held_out_part_of_a_training_set(tmp_path):
    file = tmp_path / "x.jsonl"
    settings = Settings(paths={"thai_text": str(file), "wangchan": str(ROOT / "sample/wangchan")})
    write_jsonl(file, {"text": "นำ้"}, {"text": "b", "id": 1})
    found = load("thai_text", settings)
    assert [(i["id"], i["text"]) for i in found] == [("thai_text-1", "น้ำ"), ("thai_text-2", "b")], "in one spelling"
    answers = load("thai_text", Settings(paths={"wangchan": str(ROOT / "sample/wangchan")}))
    assert [item["text"] for item in answers] == [
        row["Output"] for row in read_jsonl(ROOT / "sample/wangchan/test.jsonl")
    ]
    for rows, named in (([{"body": "a"}], "body"), ([{"text": 1}], "no text in 'Output'"), ([], "x.jsonl: no items")):
        write_jsonl(file, *rows)
        with pytest.raises(UserError, match=named):
            load("thai_text", settings)


def test_an_empty_text_is_passed_over_and_counted_until_there_are_too_many(tmp_path):
    file = tmp_path / "x.jsonl"
    settings = Settings(paths={"thai_text": str(file)}, max_empty_share=0.25)
    rows = [{"text": text} for text in ("ก", " ", "ข", "ค", "ง")]
    write_jsonl(file, *rows)
    items, skipped = benchmarks.read("thai_text", benchmarks.row_of("thai_text", settings), settings)
    assert [item["id"] for item in items] == [f"thai_text-{n}" for n in (1, 3, 4, 5)] and skipped == 1
    write_jsonl(file, *rows, {"text": None})
    with pytest.raises(UserError, match=r"line 2: no text in 'Output', like 2 of 6 rows; more than max_empty_share"):
        load("thai_text", settings)


@pytest.mark.parametrize(("rows", "take"), [(10, 3), (7, 7), (5, 9), (1000, 7), (3, 1)])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "one.json", "parquet"])
def test_a_sample_is_evenly_spaced_over_all_files(tmp_path, rows, take, kind):
    texts = [{"text": f"t{n}"} for n in range(1, rows + 1)]
    one_line, blank_lines = (
        json.dumps(texts),
        "\ufeff\n\n" + "\n\n".join(map(json.dumps, texts)),
    )  # no newline at the end
    write(tmp_path / f"x.{kind}", {"one.json": one_line, "jsonl": blank_lines}.get(kind, texts))
    spec = {"name": "wiki", "text": "text", "take": take, "file": f"x.{kind}"}
    settings = Settings(paths={"wiki": str(tmp_path)})
    items, _ = benchmarks.load_texts("thai_wikipedia", spec, settings, None)
    numbers = [int(item["text"][1:]) for item in items]
    assert len(items) == min(rows, take) and numbers[0] == 1
    gaps = {b - a for a, b in zip([*numbers, rows + 1], numbers[1:] + [rows + 1], strict=False)}
    assert max(gaps - {0}) - min(gaps - {0}) <= 1
    assert [item["id"] for item in items] == [f"thai_wikipedia-{n}" for n in numbers]
    assert benchmarks.load_texts("thai_wikipedia", spec, settings, 2)[0] == items[:2]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 12, 13, 40, 41])
def test_windows_score_each_token_once_after_enough_others(length):
    tokens = list(range(1, length + 1))
    pieces = windows(tokens, [0], 8, 4)
    assert [t for ids, start in pieces for t in ids[start:]] == tokens
    assert all(len(ids) <= 8 and start >= 1 for ids, start in pieces)
    for ids, start in pieces[1:]:
        assert start >= 4 and ids == list(range(ids[0], ids[0] + len(ids)))


def test_each_option_stands_once_at_each_letter(items):
    for item in (items[0], next(item for item in items if len(item["options"]) == 2)):
        asked = item_prompts(item, TASKS["thai_exam"])
        texts = [f" {text}" for text in item["options"].values()]
        assert len(asked) == len(texts) and all(continuations == texts for _, continuations in asked)
        for letter in item["options"]:
            at = {next(text for text in texts if f"\n{letter}.{text}\n" in prompt) for prompt, _ in asked}
            assert at == set(texts)


ASKED = {"id": "onet-1", "subset": "onet", "passage": "", "question": "ข้อใดถูก", "gold": "d",
         "options": {"a": "นำ้", "b": "ข", "d": "ง"}}  # fmt: skip
ORDERS = {"onet": "23014", "ic": "14023", "tgat": "41032", "tpat1": "41023", "a_level": "04231"}  # HELM's, of seed 0


def test_published_protocols_ask_as_published_to_the_byte():
    """The prompts of HELM and of the ThaiLLM Leaderboard (seacrowd-eval), written out."""
    assert item_prompts(ASKED, TASKS["thai_exam-leaderboard"]) == [
        ("\n---\nคำถาม: ข้อใดถูก\nตัวเลือก: a. นำ้\nb. ข\nd. ง\nคำตอบ:", [" a", " b", " c", " d", " e"])
    ]
    block = "Question: ข้อใดถูก\nA. นำ้\nB. ข\nC. ง\nAnswer:"
    first = "The following are multiple choice questions (with answers).\n\n"
    assert item_prompts(ASKED, TASKS["thai_exam-helm"], [ASKED]) == [
        (f"{first}{block} C\n\n{block}", [" A", " B", " C"])
    ]
    assert {exam: "".join(map(str, order)) for exam, order in TASKS["thai_exam-helm"]["order"].items()} == ORDERS


def test_published_protocols_read_the_spelling_as_it_is_written(tmp_path):
    settings = Settings(paths={"thai_exam": exam(tmp_path, second(question="นำ้"))})
    found = {name: load(name, settings)[1]["question"] for name in TASKS if name.startswith("thai_exam")}
    assert found == {"thai_exam": "น้ำ", "thai_exam-helm": "นำ้", "thai_exam-leaderboard": "นำ้"}


@pytest.mark.parametrize("space", [" {}", "{} ", "\n{}\t", "\u202a{}\u202c", "\x00{}"])
@pytest.mark.parametrize("normalised", [True, False])
def test_white_space_around_a_text_changes_nothing_but_the_count(tmp_path, items, space, normalised, capsys):
    def spaced(rows: list[dict]) -> list[dict]:
        return [row | {key: space.format(row[key]) for key in ("question", "c", "answer") if row[key]} for row in rows]

    settings = Settings(paths={"thai_exam": exam(tmp_path, spaced)}, normalise_thai=normalised)
    task = tasks.load_task("thai_exam", settings, None, ["onet"])
    plain = [item for item in items if item["subset"] == "onet"]
    assert [item | {"stripped": True} for item in plain] == task.items
    assert f"was taken off in {len(plain)} items" in capsys.readouterr().out


def test_examples_come_from_the_train_split_of_the_same_exam(tmp_path, items):
    task = TASKS["thai_exam-helm"]
    shots = load_shots(task, SPEC, Settings(paths={"thai_exam": SAMPLE}), ["onet", "ic"])
    prompt, continuations = item_prompts(items[0], task, shots["onet"])[0]
    parts = prompt.split("\n\n")
    assert parts[0] == "The following are multiple choice questions (with answers)." and len(parts) == 7
    train = read_jsonl(Path(SAMPLE) / "data/onet/onet_train.jsonl")
    assert [shot["question"] for shot in shots["onet"]] == [train[int(n)]["question"] for n in ORDERS["onet"]]
    for part, shot in zip(parts[1:6], shots["onet"], strict=True):
        assert part.startswith(f"Question: {shot['question']}\nA. ")
        assert part.endswith(f"\nAnswer: {shot['gold'].upper()}")
    assert parts[6].startswith(f"Question: {items[0]['question']}\n") and prompt.endswith("\nAnswer:")
    assert continuations == [" A", " B", " C", " D", " E"][: len(items[0]["options"])]
    assert not {item["question"] for item in items} & {shot["question"] for shot in shots["onet"] + shots["ic"]}
    short = exam(tmp_path, lambda rows: rows[:1], "ic_train")
    with pytest.raises(UserError, match="5 examples are asked for, the train split has fewer of ic"):
        load_shots(task, SPEC, Settings(paths={"thai_exam": short}), ["onet", "ic"])


SEVERAL = ("(1) หรือ (2)", "คำตอบคือ (1)/(2)", "(3), (4) และ (5)", "ข้อ (1) และข้อ (2)", "(1)–(3)", "(1) หรือไม่ก็ (2)",
           "**(1)** or maybe **(2)**")  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("คำตอบที่ถูกต้องคือ (3)", "3"),
        ("(1) ผิด เพราะ… คำตอบคือ (4)", "4"),
        ("ตอบว่า: (2) ไม่ใช่ (3)", "2"),
        ("คำตอบที่ถูกต้องคือ (1) … คำตอบที่ถูกต้องคือ (5)", "5"),
        ("neutral", "2"),
        (" contradiction\n", "3"),
        ("it is neutral", None),
        ("3", None),
        ("(6)", None),
        ("(1) แต่ คำตอบคือ ก", None),
        ("", None),
        *dict.fromkeys(("(4) (1) และ (2)", "(4) เฉพาะ (1)/(2)", "(4) หรือ (4)"), "4").items(),  # of one option's text
        *dict.fromkeys(SEVERAL).items(),
    ],
)
def test_choices_are_read_by_the_official_rules_and_several_are_none(reply, choice):
    assert parse_choice(reply) == choice


@pytest.mark.parametrize("name", ["thai_exam", "thai_exam-helm", "thai_exam-leaderboard"])
@pytest.mark.parametrize("twin", ["น้ำ 1", " นำ้  1", "น้ำ\u3000１", "น้\u200bำ 1\u200e"])
def test_an_option_that_reads_as_the_key_is_right_whichever_letter_is_chosen(name, twin):
    options = {"a": "น้ำ 1", "b": "7", "c": "8", "d": "9", "e": twin}
    for n in range(20):
        item = {"id": f"onet-{n}", "subset": "onet", "options": options, "gold": "a"}
        sure = [0.0 if letter in "ae" else -20.0 for letter in options]
        assert choose(item, TASKS[name], [sure] * 5)[1] == "a"
    for prediction, value in (("a", 1), ("e", 1), ("b", 0), (None, 0)):
        numbers = benchmarks.accuracy([item], [benchmarks.settle(item, prediction)], TASKS[name])
        assert (numbers["value"], numbers["chance"]) == (value, 0.4), prediction
    said = {"options": "(1) ก (2) ข (3)  ก", "gold": "1"}
    assert [benchmarks.settle(said, number) for number in ("1", "2", "3", None)] == ["1", "2", "1", None]


def test_ties_have_no_favourite_letter(items):
    task, whole = TASKS["thai_exam"], next(item for item in items if len(item["options"]) == 5)
    found = [choose(whole | {"id": f"{n}"}, task, [[0.0] * 5] * 5)[1] for n in range(50)]
    assert all(found.count(letter) > 2 for letter in "abcde")
    assert choose(items[0], TASKS["thai_exam-leaderboard"], [[-1.0, -3.0, -2.0, -4.0, -5.0]])[1] == "a"


def numbers_of(opinion: Callable[[dict, str, str], float], items: list[dict]) -> dict:
    """The numbers of a model under `ours` whose log-probability of a continuation is opinion(item, prompt, it)."""
    predictions = []
    for item in items:
        asked = item_prompts(item, TASKS["thai_exam"])
        scores = [[opinion(item, prompt, text) for text in continuations] for prompt, continuations in asked]
        predictions.append(choose(item, TASKS["thai_exam"], scores)[1])
    return benchmarks.accuracy(items, predictions, TASKS["thai_exam"])


def test_a_model_that_prefers_a_letter_is_at_chance_and_one_that_knows_half_scores_half():
    options = {letter: f"w{n}" for n, letter in enumerate("abcde")}
    items = [{"id": f"x-{n}", "subset": "x", "question": "?", "gold": "abc"[n % 3], "options": options}
             for n in range(600)]  # fmt: skip
    numbers = numbers_of(lambda item, prompt, text: -2.0 * (f"\ne.{text}\n" not in prompt), items)
    assert all(80 < count < 160 for count in numbers["predicted"].values()), "it has no favourite where texts rotate"
    assert binomtest(round(600 * numbers["value"]), 600, 0.2).pvalue > 0.001

    def knows_half(item: dict, _: str, text: str) -> float:
        known = item["gold"] if int(item["id"][2:]) % 2 else "e"
        return -2.0 * (text != f" {options[known]}")

    numbers = numbers_of(knows_half, items)
    assert numbers["value"] == 0.5 and numbers["predicted"]["e"] == 300


def test_a_text_score_is_a_character_s_mean_over_rotations():
    item = {"id": "x", "options": {"a": "ab", "c": "abcd"}}
    by_letter, best = choose(item, TASKS["thai_exam"], [[-2.0, -2.0], [-4.0, -6.0]])
    assert by_letter == {"a": -1.5, "c": -1.0} and best == "c"


def test_the_mean_over_exams_counts_the_onet_exams_as_two():
    by_exam = {"a_level": 0.0, "xcopa_th": 1.0, "onet_m3_thai": 1.0, "onet_m3_math": 0.0, "onet_m6_thai": 1.0}
    assert benchmarks.macro(by_exam) == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    assert benchmarks.macro({"onet": 0.2, "ic": 0.4}) == pytest.approx(0.3)


def test_the_summary_sets_chance_and_majority_beside_the_accuracy(items):
    task, n = TASKS["thai_exam"], len(items)
    always = benchmarks.accuracy(items, ["c" if "c" in item["options"] else "a" for item in items], task)
    assert always["predicted"] == {"a": 1, "c": n - 1}
    groups = {subset: [item for item in items if item["subset"] == subset] for subset in SPEC["subsets"]}
    for row, some in [(always, items), *((always["subsets"][subset], some) for subset, some in groups.items())]:
        golds = [item["gold"] for item in some]
        assert row["items"] == len(some) and row["majority"] == max(map(golds.count, golds)) / len(some)
        assert row["chance"] == pytest.approx(sum(1 / len(item["options"]) for item in some) / len(some))
    for name, key in (("macro", "value"), ("macro_chance", "chance"), ("macro_majority", "majority")):
        assert always[name] == pytest.approx(sum(row[key] for row in always["subsets"].values()) / 5)
    perfect = benchmarks.accuracy(items, [item["gold"] for item in items], task)
    assert perfect["value"] == perfect["macro"] == 1 == pytest.approx(perfect["ci95"][1]) and perfect["stderr"] == 0
    assert benchmarks.accuracy(items, ["e"] * n, TASKS["thai_exam-leaderboard"])["chance"] == pytest.approx(0.2)


def test_bits_per_character_is_a_ratio_of_sums():
    numbers = benchmarks.bits_per_character([10.0, 40.0, 16.0], [10, 20, 10])
    assert numbers["value"] == 66 / 40
    rest = [10 - 16.5, 40 - 33.0, 16 - 16.5]
    assert numbers["stderr"] == pytest.approx((sum(r * r for r in rest) * 3 / 2) ** 0.5 / 40)


def test_the_gap_between_languages_is_paired_by_question():
    def lines(code: str, right: str) -> list[dict]:
        return [{"id": f"{code}-{n}", "gold": "ab"[n % 2], "value": float(r)} for n, r in enumerate(right, 1)]

    thai, english = lines("tha_Thai", "110010"), lines("eng_Latn", "1110110")
    found = benchmarks.language_pairs(thai, english[::-1])
    assert found == [(True, True), (True, True), (False, True), (False, False), (True, True), (False, True)]
    gap, low, high = benchmarks.paired_gap(found)
    # Bonett and Price (2012): (2 + 1) / 8 and (0 + 1) / 8 in place of 2 / 6 and 0
    half = 1.959964 * ((3 / 8 + 1 / 8 - (2 / 8) ** 2) / 8) ** 0.5
    assert gap == pytest.approx(2 / 6) and (low, high) == pytest.approx((2 / 8 - half, 2 / 8 + half))
    with pytest.raises(ValueError, match="tha_Thai-1 and eng_Latn-1 have different answers"):
        benchmarks.language_pairs(thai, [line | {"gold": "a"} for line in english])


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ("(1) ก (2) ข (3) ถูกเฉพาะข้อ (1) (4) ถูกเฉพาะข้อ (2) (5) ก", {"1", "5"}),
        ("(1) ก (2) ก (3) ถูกเฉพาะข้อ (1) (4) ค (5) ถูกเฉพาะข้อ (2)", {"5"}),
        ("(1) 5, (2) 7, (3) 8, (4) 9, (5) 5", {"1", "5"}),
        ("(1) 5; (2) 7; (3) 8; (4) 9; (5) 5;", {"1", "5"}),
        ("(1) 5， (2) 7， (3) 8， (4) 9， (5) 5", {"1", "5"}),
        ("(1) Go, (2) Go; (3) Go. (4) Go (5) Go!", {"5"}),  # what differs is the question
        ("(1) , (2) ; (3) . (4) : (5) -", {"5"}),
    ],
)
def test_options_of_the_same_text_are_right_and_a_comma_between_them_is_no_part_of_one(options, same):
    assert benchmarks.right_answers({"options": options, "gold": "5"}) == same
