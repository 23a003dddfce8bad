"""The report's tables: baselines and published scores, English minus Thai, two runs item by item; its curves."""

import itertools
import json
import re
import shutil
from pathlib import Path

from ouro.evaluate.benchmarks import LANGUAGES
from ouro.files import UserError
from ouro.verdict import panels, plots, rule, stats, tables
from ouro.verdict.panels import Key

import fabricate
import numpy as np
import pytest
from helpers import read_jsonl, write_jsonl
from reports import change, read, table, write_report


def test_a_published_score_stands_beside_ours_in_its_unit_and_its_mean_at_its_own_benchmark_alone(tmp_path):
    scores = [("thai_exam", "macro", 0.4453), ("thai_exam", "micro", 0.5204), ("mt_bench_thai", "macro", 6.1)]
    published = [
        {"benchmark": benchmark, "mean": mean, "value": value, "protocol": "zero-shot", "source": f"card {value}"}
        for benchmark, mean, value in scores
    ]
    for task in ("thai_exam", "mt_bench_thai", "belebele_thai", "thai_text"):
        exams = [1.0] * 4 + [0.0] * 4 + [1.0] * 2  # micro 0.6, macro 0.75
        values = [4.0, 5.0] * 5 if task == "mt_bench_thai" else exams
        block = fabricate.study_block("baseline-x", task, 1, None, None, "x", values, published=published)
        block |= {"kind": "baseline"} | ({"macro": 4.75} if task == "mt_bench_thai" else {})
        fabricate.write_result(tmp_path / "results", block, values, np.full(10, 100) if task == "thai_text" else None)
    write_report(tmp_path, "--csv")
    rows = [[*row.values()] for row in table(tmp_path, "baselines")]
    assert sorted((row[2], row[5], row[6].split()[0], *row[7:]) for row in rows) == [
        ("belebele_thai", "micro", "60.0", "–", "accuracy, %", "–", "–"),
        ("mt_bench_thai", "macro", "4.75", "6.1", "rating, 1 to 10", "zero-shot", "card 6.1"),
        ("thai_exam", "macro", "75.0", "44.53", "accuracy, %", "zero-shot", "card 0.4453"),
        ("thai_exam", "micro", "60.0", "52.04", "accuracy, %", "zero-shot", "card 0.5204"),
        ("thai_text", "micro", "0.600", "–", "bits per character", "–", "–"),
    ]


# ---------------------------------------------------------------------------------------------- English minus Thai


def gap(root: Path, **how) -> tuple[tuple[panels.Panel, panels.Panel] | None, set]:
    """Belebele in Thai and in English, and what was left out."""
    if how:
        fabricate.study(root, **{"tasks": LANGUAGES, "lines": 2} | how)
    reader, found = read(root)
    return panels.gaps(found, reader.left_out).get(Key(LANGUAGES[0], "wangchan")), set(reader.left_out)


def test_the_gap_between_the_languages_and_its_change_by_training_are_found(tmp_path):
    (thai, english), left_out = gap(tmp_path, items=900)
    assert not left_out
    both = {place: english.cells[place] - thai.cells[place] for place in thai.cells}
    for k in fabricate.DEPTHS:
        true = fabricate.TASKS["belebele_english"][2][k - 1] - fabricate.TASKS["belebele_thai"][2][k - 1]
        pairs = (both[None, k], true), (both[k, k], true - 0.15), (both[k, k] - both[None, k], -0.15)
        for cell, value in pairs:  # Thai +0.10, English -0.05
            e = stats.estimate([cell])
            assert abs(e.value - value) < 2 * e.half()
        apart = np.hypot(*(stats.estimate([level.base[k]]).half() for level in (thai, english)))
        assert stats.estimate([both[None, k]]).half() < 0.95 * apart  # paired
    reader, found = read(tmp_path)
    shown = tables.Table("gap", tables.gap_rows(found, [])).texts()
    assert [row[:3] for row in shown[:5]] == [["base model", "–", d] for d in "1234"] + [["wangchan", "1", "1"]]
    assert len(shown) == 20 and all((row[-1] == "–") == (row[0] == "base model") for row in shown)
    assert not any(v.words for v in rule.verdicts(reader, found))  # it is a description


def test_questions_of_both_languages_are_paired_by_their_number_and_not_by_their_place(tmp_path):
    gap(tmp_path, items=60, tasks=LANGUAGES[:1])
    pair, left_out = gap(tmp_path, items=40, tasks=LANGUAGES[1:], limit=40)
    assert [panel.items for panel in pair] == [40] * 2 and not left_out
    for path in (tmp_path / "results").rglob("belebele_english-*.items.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    (_, turned), _ = gap(tmp_path)
    for place, cell in pair[1].cells.items():
        np.testing.assert_array_equal(cell.parts, turned.cells[place].parts)


def test_questions_whose_right_answers_differ_are_no_pairs_and_that_is_said(tmp_path):
    gap(tmp_path, items=60, seeds=(0,))
    files = sorted((tmp_path / "results").rglob("belebele_english-*.items.jsonl"))
    what = " and ".join(LANGUAGES)
    left_out = {(what, "not compared: 59 of 60 items of one number have the same right answer")}
    for path in files:
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | {"gold": "d"}), *rest]) + "\n")
    assert gap(tmp_path) == (None, left_out)
    write_report(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "59 of 60 items" in text and "From English to Thai" not in text


def test_an_item_that_has_no_rating_of_one_of_two_models_is_not_compared(tmp_path):
    _, results = fabricate.study(tmp_path, tasks=("mt_bench_thai",), items=30, lines=2, seeds=(0,), depths=(1, 4))
    names = ["exp2-wangchan-ut1", "exp1-wangchan-ut4"]
    for name, places in zip(names, ((0, 1), (1, 2)), strict=True):
        (file,) = (results / name).glob(f"mt_bench_thai-{name[-3:]}.items.jsonl")
        items = [item | ({"value": None} if i in places else {}) for i, item in enumerate(read_jsonl(file))]
        write_jsonl(file, *items)
        rated = [item["value"] for item in items if item["value"] is not None]
        change(file.with_name(file.name.replace(".items.jsonl", ".json")), value=sum(rated) / len(rated))
    text = write_report(tmp_path, "--compare", *names)
    assert "27 items in common" in text
    shown = re.findall(r"^### .*-(\d+)$", text, re.MULTILINE)
    assert len(shown) == 5 and not set(shown) & {"1", "2", "3"}


def test_two_runs_are_compared_item_by_item(tmp_path):
    fabricate.study(root := tmp_path / "study", items=60)
    two = ["--compare", "seed0/exp2-wangchan-ut1", "seed0/exp1-wangchan-ut4:4"]
    text = write_report(root, *two)
    for told in ("60 items in common", "exact McNemar p", "ข้อที่", "คำตอบ 4"):
        assert told in text
    assert "left out" not in text
    copy = shutil.copytree(root, tmp_path / "damaged")
    (result := next((copy / "results/seed0/exp2-wangchan-ut1").glob("*-ut*.json"))).write_text("")
    assert f"left out: {result}" in write_report(copy, *two).replace("\\", "")
    with pytest.raises(UserError, match="no results of 'exp9'; runs with results: base-bf16, seed0/exp1-wangchan-ut4"):
        write_report(root, "--compare", "exp9", "exp1")


def test_two_runs_are_compared_by_the_scores_of_what_stands_in_their_folders(tmp_path):
    """A folder kept from before a run was trained again, or a copy, would else be read in the run's place."""
    output, results = fabricate.study(tmp_path, items=60, seeds=(0,), depths=(1, 4), tasks=("thai_text",))
    one, two = "exp2-wangchan-ut1", "exp1-wangchan-ut4"
    before = write_report(tmp_path, "--compare", one, two)
    shutil.copytree(results / two, results / "zz")
    for file in (results / "zz").glob("*.items.jsonl"):
        file.write_text(re.sub(r'"bits": [^,]*', '"bits": 1.0', file.read_text()))
    assert write_report(tmp_path, "--compare", one, two) == before
    with pytest.raises(
        UserError, match=rf"(?s)no results of 'zz'.*its scores are of the run '{two}', and it stands in"
    ):
        write_report(tmp_path, "--compare", "zz", two)
    (output / two / "final_adapter/adapter_model.safetensors").write_text("trained again")
    with pytest.raises(UserError, match=f"results of '{two}' are of another adapter than its run's"):
        write_report(tmp_path, "--compare", one, two)


WRONG = (None, 5, "x", [{}])


def test_a_result_whose_values_are_of_other_kinds_is_left_out_and_the_rest_reported(tmp_path):
    _, results = fabricate.study(tmp_path, items=9, seeds=(0,), depths=(1,), tasks=("thai_text", "thai_exam"))
    for kind, folder in ("baseline", "base-bf16"), ("base", "base-bf16"), ("adapter", "exp2-wangchan-ut1"):
        file = results / folder / "thai_text-ut1.json"
        content = json.loads(whole := file.read_text())
        study = {"published": [], "ci95": None, "part": None, "mean": "micro"} | content["study"] | {"kind": kind}
        for key, wrong in itertools.product(study, WRONG):
            file.write_text(json.dumps(content | {"study": study | {key: wrong}}))
            reader, found = read(tmp_path)
            tables.tables(reader, found, rule.verdicts(reader, found))
        file.write_text(whole)


def test_the_curves_of_several_training_sets_are_told_apart(tmp_path):
    sets = ("wangchan", "smol-smoltalk")
    for number, dataset in enumerate(sets):
        language = "en" if number else "th"
        fabricate.study(tmp_path, dataset=dataset, depths=(1, 4), tasks=("thai_text",), items=9, lines=30,
                        run_seed=number, language=language)  # fmt: skip
    runs = read(tmp_path)[0].runs
    for chosen in sets, sets[:1]:
        some = {name: run for name, run in runs.items() if run.config["dataset"] in chosen}
        for axis in plots.learning([], some, "wangchan").axes:
            legend = [text.get_text() for text in axis.get_legend().get_texts()]
            assert legend == ["1 loop", "4 loops", *(chosen if len(chosen) > 1 else ())]
            assert [line.get_linestyle() for line in axis.lines].count("-") == 6 == len(axis.lines) / len(chosen)
