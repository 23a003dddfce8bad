"""The report: known answers are found and no more is claimed, unlike runs are not pooled, broken files are named."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ouro.evaluate import benchmarks
from ouro.verdict import plots, rule, stats, study, tables

import fabricate
import numpy as np
import pytest
from conftest import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
EQUAL = (0.5, 0.5, 0.5, 0.5)


def verdicts(root: Path, **how) -> tuple[dict[str, rule.Verdict], study.Reader]:
    reader = study.Reader(*fabricate.study(root, **how))
    return {v.aspect: v for v in rule.verdicts(study.panels(reader))}, reader


def command(root: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    places = ["--output_dir", str(root / "output"), "--results_dir", str(root / "results")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "report.py"), *places, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study whose report was written, with tables as files."""
    root = tmp_path_factory.mktemp("study")
    fabricate.study(root, items=60)
    done = command(root, "--csv", "--latex")
    return root, done


# ------------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    "name, gains, base, label",
    [
        ("helps", (0.45, 0.50, 0.53, 0.55), (2.9,) * 4, "helps"),
        ("hurts", (0.55, 0.53, 0.50, 0.45), (2.9,) * 4, "hurts"),
        ("nothing", EQUAL, (2.9,) * 4, "no evidence"),
        ("a base that is worse at one loop, and equal gains", EQUAL, (3.3, 3.1, 3.0, 2.9), "no evidence"),
        ("more to gain at one loop, and still behind", (0.7, 0.6, 0.55, 0.5), (3.3, 3.05, 2.97, 2.9), "mixed"),
        ("more to gain at one loop, and level afterwards", (0.9, 0.7, 0.6, 0.5), (3.3, 3.1, 3.0, 2.9), "mixed"),
        ("an interaction of 0.05 bits", (0.50, 0.50, 0.50, 0.55), (2.9,) * 4, "helps"),
    ],
)
def test_the_verdict_of_a_study_with_a_known_answer(tmp_path, name, gains, base, label):
    found, _ = verdicts(
        tmp_path, gains={"thai_text": gains}, base={"thai_text": base}, tasks=("thai_text",), items=400, run_seed=1
    )
    verdict = found["thai_text"]
    assert verdict.label == label, verdict.text
    assert verdict.missing == []
    assert "bits per character" in verdict.text and "[" in verdict.text
    helps = "looping helps" in verdict.text
    assert helps == (label == "helps")


def test_a_worse_base_is_named_as_depth_and_not_as_adaptation(tmp_path):
    found, _ = verdicts(
        tmp_path, gains={"thai_text": EQUAL}, base={"thai_text": (3.3, 3.1, 3.0, 2.9)}, tasks=("thai_text",)
    )
    assert "but so was the base" in found["thai_text"].text
    assert "depth, not adaptation" in found["thai_text"].text


def test_a_gain_from_further_behind_is_said_in_these_words(tmp_path):
    how = {"gains": {"thai_text": (0.7, 0.6, 0.55, 0.5)}, "base": {"thai_text": (3.3, 3.05, 2.97, 2.9)}}
    found, _ = verdicts(tmp_path, tasks=("thai_text",), items=400, **how)
    sentence = found["thai_text"].text
    assert "The gain is larger at 1 loop, because the base starts from" in sentence
    assert "4 loops are still better by" in sentence


def test_exams_conversation_and_english_have_words_of_their_own(tmp_path):
    gains = {
        "thai_exam": (0.02, 0.10, 0.15, 0.30),
        "mt_bench_thai": (0.5, 0.8, 1.0, 1.5),
        "english_text": (-0.02, -0.05, -0.07, -0.10),
    }
    base = {"english_text": (1.0,) * 4}
    found, _ = verdicts(tmp_path, gains=gains, base=base, items=500, seed_sd=0.002)
    assert found["thai_exams"].label == found["thai_conversation"].label == "helps"
    assert "points" in found["thai_exams"].text and "rating points" in found["thai_conversation"].text
    assert found["english"].label == "hurts" and "looping forgets more" in found["english"].text
    assert "measurably forgotten at 1, 2, 3 and 4 loops" in found["english"].text


def test_false_helps_and_hurts_are_rare_where_the_base_alone_is_worse_at_one_loop():
    rng, items, base = np.random.default_rng(0), 60, (3.3, 3.1, 3.0, 2.9)
    weights, ids, called = stats.resample(items, 500), [str(i) for i in range(items)], []
    for _ in range(100):
        ease, characters = 0.4 * rng.normal(size=items), rng.integers(100, 900, items).astype(float)

        def result(trained, depth, seed, level, ease=ease, characters=characters):
            values = level + ease + 0.04 * rng.normal(size=items) + 0.01 * rng.normal() * bool(trained)
            block = fabricate.study_block("run", "thai_text", depth, trained, seed, "wangchan", values)
            return study.Result(block, Path("file"), ids, values * characters, characters)

        bases = [result(None, depth, None, base[depth - 1]) for depth in fabricate.DEPTHS]
        adapted = [result(d, d, seed, base[d - 1] - 0.5) for seed in range(3) for d in fabricate.DEPTHS]
        called.append(rule.judge("thai_text", "wangchan", study.Panel(adapted, bases, weights)).label)
    assert called.count("helps") + called.count("hurts") <= 5
    assert called.count("no evidence") >= 90


# ----------------------------------------------------------------------------------------------- no more than there is


def test_one_seed_is_said_in_the_verdict_and_as_missing(tmp_path):
    found, _ = verdicts(tmp_path, gains={"thai_text": (0.3, 0.4, 0.5, 0.6)}, seeds=(0,), tasks=("thai_text",))
    assert found["thai_text"].label == "helps" and "one seed" in found["thai_text"].text
    assert any(
        what == "at least 3 seeds: now 1 at 1 loop, 1 at 2 loops, 1 at 3 loops and 1 at 4 loops"
        for what in found["thai_text"].missing
    )


def test_a_depth_a_base_and_a_benchmark_that_are_missing_are_named(tmp_path):
    output, results = fabricate.study(tmp_path, depths=(1, 4), tasks=("thai_text",))
    (results / "base-bf16" / "thai_text-ut1.json").unlink()
    found = {v.aspect: v for v in rule.verdicts(study.panels(study.Reader(output, results)))}
    assert found["thai_text"].label == "no comparison"
    assert {"a model trained at 2 loops", "a model trained at 3 loops", "the base at 1 loop"} <= set(
        found["thai_text"].missing
    )
    assert found["thai_exams"].label == "no comparison"


@pytest.mark.parametrize(
    "key, value",
    [
        ("loss", "mixture"),
        ("precision", "nf4"),
        ("model_revision", "b" * 40),
        ("limit", 50),
        ("prompt_sha256", "0" * 64),
        ("protocol", "helm"),
        ("benchmark_revision", "other"),
    ],
)
def test_a_run_that_was_trained_or_measured_otherwise_is_flagged_and_not_pooled(tmp_path, key, value):
    output, results = fabricate.study(tmp_path, tasks=("thai_text",), items=50, lines=2)
    odd = results / "seed1" / "exp2-wangchan-ut1" / "thai_text-ut1.json"
    content = json.loads(odd.read_text())
    content["study"][key] = value
    odd.write_text(json.dumps(content))
    reader = study.Reader(output, results)
    panel = study.panels(reader)["thai_text", "wangchan"]
    assert panel.seeds[1, 1] == [0, 2] and panel.seeds[4, 4] == [0, 1, 2]
    assert [(path, key in why) for path, why in reader.left_out] == [(str(odd), True)]


def test_other_data_and_other_settings_are_not_pooled_and_the_seeds_padding_is_no_difference(tmp_path):
    output, results = fabricate.study(tmp_path, tasks=("thai_text",), items=50, lines=2)
    report_file = output / "seed2" / "exp1-wangchan-ut4" / "data_report.json"
    report_file.write_text(json.dumps(json.loads(report_file.read_text()) | {"rows_kept": 7}))
    config = output / "seed0" / "exp1-wangchan-ut4" / "config.yaml"
    config.write_text(config.read_text().replace("0.0002", "0.001"))
    reader = study.Reader(output, results)
    panel = study.panels(reader)["thai_text", "wangchan"]
    assert panel.seeds[4, 4] == [1] and panel.seeds[1, 1] == [0, 1, 2]
    whys = {Path(path).parts[-3]: why for path, why in reader.left_out}
    assert "data report" in whys["seed2"] and "learning_rate 0.001" in whys["seed0"]


def test_results_whose_training_folder_is_elsewhere_are_counted_and_named(tmp_path):
    output, results = fabricate.study(tmp_path, tasks=("thai_text",), items=50, lines=2)
    shutil.rmtree(output / "seed1" / "exp2-wangchan-ut1")
    reader = study.Reader(output, results)
    assert study.panels(reader)["thai_text", "wangchan"].seeds[1, 1] == [0, 1, 2]
    ((path, why),) = set(reader.left_out)
    assert path == str(results / "seed1" / "exp2-wangchan-ut1") and "could not be compared" in why


def test_answers_without_ratings_are_said_to_be_there(tmp_path):
    output, results = fabricate.study(tmp_path, tasks=("mt_bench_thai",), items=9, lines=2, seeds=(0,))
    for path in results.rglob("*.json"):
        content = json.loads(path.read_text())
        content["study"] |= {"value": None, "ci95": None, "stderr": None, "judge": None}
        path.write_text(json.dumps(content))
        items = path.with_suffix(".items.jsonl")
        items.write_text(
            "".join(json.dumps(json.loads(x) | {"value": None}) + "\n" for x in items.read_text().splitlines())
        )
    command(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "There are answers, and no ratings of them" in text and "คำตอบ 4" in text


def test_training_sets_are_judged_apart(tmp_path):
    fabricate.study(tmp_path, tasks=("thai_text",), items=100, lines=2)
    found = study.Reader(
        *fabricate.study(tmp_path, tasks=("thai_text",), items=100, lines=2, dataset="r1", depths=(1, 4))
    )
    made = rule.verdicts(study.panels(found))
    assert [(v.dataset, v.aspect) for v in made if v.label != "no comparison"] == [
        ("wangchan", "thai_text"),
        ("r1", "thai_text"),
    ]


# -------------------------------------------------------------------------------------------------------- broken inputs


def test_broken_inputs_are_listed_and_the_rest_is_reported(tmp_path):
    output, results = fabricate.study(tmp_path, tasks=("thai_text",), items=50, lines=5)
    folder = results / "seed0" / "exp1-wangchan-ut4"

    def damage(name: str, change) -> Path:
        content = json.loads((folder / name).read_text())
        change(content["study"])
        (folder / name).write_text(json.dumps(content))
        return folder / name

    half = folder / "thai_text-ut1.json"
    half.write_text(half.read_text()[:200])
    future = damage("thai_text-ut2.json", lambda s: s.update(format=9))
    nan = damage("thai_text-ut3.json", lambda s: s.update(value=float("nan")))
    none = damage("thai_text-ut4.json", lambda s: s.update(items=0))
    folder = results / "seed1" / "exp3a-wangchan-ut2"
    depth = damage("thai_text-ut1.json", lambda s: s.update(trained_ut_steps=None))
    keyless = damage("thai_text-ut2.json", lambda s: s.pop("aspect"))
    other = results / "seed1" / "exp1-wangchan-ut4"
    lines = (other / "thai_text-ut4.items.jsonl").read_text().splitlines()
    (other / "thai_text-ut4.items.jsonl").write_text("\n".join([*lines[:-1], lines[0]]) + "\n")  # an item twice
    (other / "thai_text-ut3.items.jsonl").unlink()
    shutil.copytree(results / "seed2", results / "seed3")  # the same runs once more
    big = output / "seed0" / "exp1-wangchan-ut4" / "metrics.jsonl"
    with open(big, "wb") as file:
        file.truncate(200 << 20)
    torn = output / "seed1" / "exp1-wangchan-ut4" / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 60, "lo')
    text = output / "seed2" / "exp1-wangchan-ut4" / "metrics.jsonl"
    text.write_text('{"step": "x"}\n[]\n')
    (output / "seed2" / "exp3a-wangchan-ut2" / "config.yaml").write_text("a: [")
    (output / "seed2" / "exp3b-wangchan-ut3" / "manifest.json").write_text("{")

    done = command(tmp_path)
    page, results_md = (tmp_path / "report.html").read_text(), (tmp_path / "RESULTS.md").read_text()
    listed = results_md[results_md.index("What was left out") :]
    for path, why in [
        (half, "cannot be used"),
        (future, "format 9"),
        (nan, "nan"),
        (none, "0 items"),
        (depth, "not a whole number"),
        (keyless, "has no 'aspect'"),
        (other / "thai_text-ut4.json", "49 different items in 50 lines"),
        (other / "thai_text-ut3.json", "No such file"),
        (results / "seed3" / "exp1-wangchan-ut4" / "thai_text-ut4.json", "counted once"),
        (big, "200 MiB"),
        (torn, "1 of 6 lines"),
        (text, "not"),
        (output / "seed2" / "exp3a-wangchan-ut2", "not valid YAML"),
        (output / "seed2" / "exp3b-wangchan-ut3" / "manifest.json", "cannot be read"),
    ]:
        entry = [line for line in listed.splitlines() if line.startswith(f"| {path} |")]
        assert entry and any(why in line for line in entry), (path, entry)
        assert str(path) in page
    assert "things left out" in done.stdout


@pytest.mark.parametrize("task", ["thai_text", "thai_exam", "mt_bench_thai"])
def test_a_value_that_is_not_that_of_its_items_is_not_used(tmp_path, task):
    output, results = fabricate.study(tmp_path, tasks=(task,), items=20, lines=2, seeds=(0,), depths=(1,))
    odd = results / "base-bf16" / f"{task}-ut3.json"
    content = json.loads(odd.read_text())
    content["study"]["value"] += 0.05
    odd.write_text(json.dumps(content))
    assert [(path, "the items give" in why) for path, why in study.Reader(output, results).left_out] == [
        (str(odd), True)
    ]


def test_runs_that_have_not_ended_are_shown_as_such(tmp_path):
    output, _ = fabricate.study(tmp_path, tasks=(), lines=5, seeds=(0,))
    (output / "exp2-wangchan-ut1" / "completed").unlink()
    (output / "exp3a-wangchan-ut2" / "completed").unlink()
    (output / "exp3a-wangchan-ut2" / "metrics.jsonl").write_text("")
    bad = output / "exp3b-wangchan-ut3"
    (bad / "completed").unlink()
    (bad / "metrics.jsonl").write_text('{"step": 10, "loss": NaN, "num_tokens": 5, "tokens_per_second": 1}\n')
    reader = study.Reader(output, tmp_path / "results")
    assert [run.state for run in reader.runs.values()] == [
        "complete", "not finished: step 50 of 50", "no step logged", "failed: loss is not a number at step 10",
    ]  # fmt: skip
    command(tmp_path)


def test_nothing_at_all_gives_a_report_that_says_so(tmp_path):
    wrong = command(tmp_path, code=2)
    assert f"nothing to report on: {tmp_path / 'output'} (which is not there) and" in wrong.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "output").mkdir()
    done = command(tmp_path)
    assert f"read: {tmp_path / 'output'} and {tmp_path / 'results'} (which is not there)\n" in done.stdout
    assert "0 training runs, 0 results" in done.stdout and "not comparable yet" in (tmp_path / "RESULTS.md").read_text()
    assert "not comparable yet" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("what", ["runs", "base", "adapted"])
def test_any_part_of_a_study_gives_a_report(tmp_path, what):
    output, results = fabricate.study(
        tmp_path, tasks=() if what == "runs" else ("thai_exam",), seeds=(0,), items=30, lines=3
    )
    for folder in results.glob("*"):
        if (folder.name == "base-bf16") != (what == "base"):
            shutil.rmtree(folder)
    if what == "base":
        shutil.rmtree(output)
    command(tmp_path)


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_same_inputs_give_the_same_bytes(written, tmp_path):
    root, _ = written
    shutil.copytree(root, tmp_path / "study")
    kept = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    command(root, "--csv", "--latex")
    for path, content in kept.items():
        assert (root / path).read_bytes() == content, path
    assert not list(root.rglob("*.tmp"))


def test_numbers_of_the_runs_table_are_those_of_the_log(written):
    root, _ = written
    table = (root / "results" / "report" / "runs.csv").read_text().splitlines()
    log = [json.loads(x) for x in (root / "output/seed0/exp1-wangchan-ut4/metrics.jsonl").read_text().splitlines()]
    row = next(line for line in table if line.startswith("seed0/exp1-wangchan-ut4"))
    hours = log[-1]["num_tokens"] / log[-1]["tokens_per_second"] / 3600
    for number in (f"{log[-1]['loss']:.4f}", f"{sum(x['loss'] for x in log) / len(log):.4f}", f"{hours:.2f}", "41.0%"):
        assert number in row
    assert f"{7500:,}" in row and ",complete," in row


def test_the_table_of_gains_is_filled(written):
    root, _ = written
    head, *rows = csv.reader((root / "results" / "report" / "gains.csv").read_text().splitlines())
    assert len(rows) == 16
    for row in rows:
        empty = [name for name, cell in zip(head, row, strict=True) if cell == "–"]
        assert empty == (["gain minus gain at 1 loop", "Holm p", "smallest found"] if row[2] == "1" else [])


def test_the_held_out_loss_is_drawn_by_loop_beside_the_bases(written):
    root, _ = written
    reader = study.Reader(root / "output", root / "results")
    figure = plots.draw(reader, study.panels(reader), "wangchan", lambda run, told: None)["levels"]
    axis = next(axis for axis in figure.axes if axis.get_title() == "held-out training rows")
    base, *adapted = (list(line.get_ydata()) for line in axis.lines)
    assert base == [1.5, 1.3, 1.25, 1.2] and [len(losses) for losses in adapted] == [1, 2, 3, 4]
    np.testing.assert_allclose(adapted[-1], [0.9, 0.7, 0.65, 0.64])


def test_latex_tables_escape_what_latex_reads(written):
    root, _ = written
    text = (root / "results" / "report" / "runs.tex").read_text()
    assert r"41.0\%" in text and text.count(r"\begin{tabular}") == 1 and "_" not in text.replace(r"\_", "")


def test_the_terminal_ends_with_the_verdict_and_the_paths(written):
    root, done = written
    assert "Thai text: " in done.stdout and "English retention:" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("report.html, RESULTS.md; plots in ")
    labels = {v["aspect"]: v["label"] for v in json.loads((root / "results/report/verdict.json").read_text())}
    assert set(labels) == set(study.ASPECTS)


def test_a_macro_mean_stands_beside_its_own_chance_and_commonest_answer(written):
    root, _ = written
    rows = list(csv.DictReader((root / "results" / "report" / "benchmarks.csv").read_text().splitlines()))
    for row in rows:
        told = [row[name] for name in ("chance", "always the commonest", "its chance", "its commonest")]
        assert told == (["21.0", "26.0", "22.5", "29.0"] if row["benchmark"] == "thai_exam" else ["–"] * 4)
    block = json.loads((root / "results" / "base-bf16" / "thai_exam-ut2.json").read_text())["study"]
    row = next(
        row for row in rows if (row["benchmark"], row["model"], row["read at"]) == ("thai_exam", "base model", "2")
    )
    assert row["macro"] == f"{block['macro']:.1%}"[:-1] != row["value"].split()[0] == f"{block['value']:.1%}"[:-1]


def test_chance_of_an_older_macro_is_taken_from_the_subsets_as_the_macro_was():
    by_exam = {"onet_m3_thai": 0.2, "onet_m3_math": 0.4, "onet_m6_thai": 0.5, "tgat": 0.25}
    subsets = {name: {"value": 0.5, "items": 3, "chance": chance} for name, chance in by_exam.items()}
    assert study.over_exams({"subsets": subsets}, "chance") == pytest.approx(benchmarks.macro(by_exam))
    assert study.over_exams({"subsets": subsets, "macro_chance": 0.3}, "chance") == 0.3
    for lacking in ({"subsets": subsets}, {"subsets": {}}, {"subsets": None}, {"subsets": ["onet"]}, {}):
        assert study.over_exams(lacking, "majority") is None


# -------------------------------------------------------------------------------- baselines, and what is published


def baseline(task: str, published, /, **more) -> dict:
    values = [4.0, 5.0] * 5 if task == "mt_bench_thai" else [1.0] * 4 + [0.0] * 4 + [1.0] * 2  # micro 0.6, macro 0.75
    return fabricate.study_block("baseline-x", task, 1, None, None, "x", values, published=published) | {
        "kind": "baseline", "values": values, **more,
    }  # fmt: skip


def baselines(root: Path, *blocks: dict) -> tuple[list[dict[str, str]], study.Reader]:
    """The rows of the table."""
    for block in blocks:
        characters = np.full(10, 100) if block["metric"] == "bits_per_character" else None
        fabricate.write_result(root / "results", block, block.pop("values"), characters)
    reader = study.Reader(root / "output", root / "results")
    table = next(t for t in tables.tables(reader, study.panels(reader)) if t.name == "baselines")
    return [dict(zip(table.columns, row, strict=True)) for row in table.texts()], reader


PUBLISHED = {name: row["published"] for name, row in benchmarks.table()["baselines"].items() if "published" in row}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_score_of_evals_yaml_stands_beside_ours_in_our_unit_and_its_mean(tmp_path, name):
    told = PUBLISHED[name]
    blocks = {}
    for score in told:
        benchmark = score["benchmark"]
        task = benchmark if benchmark in fabricate.TASKS else "thai_exam"
        more = {"macro": 4.75} if benchmark == "mt_bench_thai" else {}
        blocks[benchmark] = baseline(task, told, benchmark=benchmark, task=benchmark, **more)
    rows, reader = baselines(tmp_path, *blocks.values())
    assert len(rows) == len(told) and not reader.left_out
    for score in told:
        (row,) = [r for r in rows if (r["benchmark"], r["source"]) == (score["benchmark"], score["source"])]
        rating = score["benchmark"] == "mt_bench_thai"
        assert 1 <= score["value"] <= 10 if rating else 0 < score["value"] < 1
        assert row["published"] == f"{score['value'] * (1 if rating else 100):.4g}"
        micro, macro = ("4.50", "4.75") if rating else ("60.0", "75.0")
        assert row["measured here"].split()[0] == (macro if score["mean"] == "macro" else micro)
        assert (row["mean"], row["its protocol"]) == (score["mean"], score["protocol"])
        assert row["unit"] == ("rating, 1 to 10" if rating else "accuracy, %")


def test_a_published_score_stands_beside_its_own_benchmark_alone(tmp_path):
    score = {"benchmark": "thai_exam", "mean": "micro", "value": 0.5204, "protocol": "zero-shot", "source": "card"}
    blocks = [baseline("thai_exam", [score]), baseline("thai_exam", [score], task="thai_exam-helm", protocol="helm")]
    blocks += [baseline(task, [score]) for task in ("belebele_thai", "mt_bench_thai", "thai_text")]
    rows, _ = baselines(tmp_path, *blocks)
    shown = {row["benchmark"]: (row["published"], row["its protocol"], row["source"]) for row in rows}
    score, none = ("52.04", "zero-shot", "card"), ("–", "–", "–")
    assert shown == {"thai_exam": score, "thai_exam-helm": score} | dict.fromkeys(
        ("belebele_thai", "mt_bench_thai", "thai_text"), none
    )


@pytest.mark.parametrize("told", [{"value": 44.53}, {"value": 0.4453}, None, "0.4", ["0.4", None], [{}]])
def test_published_scores_that_do_not_say_of_what_are_not_shown(tmp_path, told):
    (row,), reader = baselines(tmp_path, baseline("thai_exam", told))
    assert (row["published"], row["measured here"].split()[0]) == ("–", "60.0")
    whys = [why for path, why in reader.left_out if path == str(tmp_path / "results" / "baseline-x")]
    assert ["older form" in why for why in whys] == [True] * isinstance(told, dict)


# ---------------------------------------------------------------------------------------------- English minus Thai


def gap(root: Path, **how) -> tuple[tuple[study.Panel, study.Panel, study.Panel] | None, study.Reader]:
    reader = study.Reader(*fabricate.study(root, **{"tasks": study.LANGUAGES, "lines": 2} | how))
    return study.gaps(study.panels(reader), reader.left_out).get("wangchan"), reader


def test_the_gap_between_the_languages_and_its_change_by_training_are_found(tmp_path):
    (thai, english, both), reader = gap(tmp_path, items=900)
    assert reader.left_out == []
    for k in fabricate.DEPTHS:
        base, adapted, change = both.estimate(both.base[k]), both.estimate(both.adapted[k, k]), both.gain(k, k)
        true = fabricate.TASKS["belebele_english"][2][k - 1] - fabricate.TASKS["belebele_thai"][2][k - 1]
        for e, value in ((base, true), (adapted, true - 0.15), (change, -0.15)):  # Thai +0.10, English -0.05
            assert abs(e.value - value) < 2 * (e.value - e.low)
        assert base.value == pytest.approx(english.base[k].values[0] - thai.base[k].values[0])
        apart = np.hypot(*(level.estimate(level.base[k]).stderr for level in (thai, english)))
        assert base.stderr < 0.95 * apart  # paired
    shown = tables.gap_table(reader, study.panels(reader)).texts()
    assert [row[:3] for row in shown[:5]] == [["base model", "–", d] for d in "1234"] + [["wangchan", "1", "1"]]
    assert len(shown) == 20 and all((row[-1] == "–") == (row[0] == "base model") for row in shown)
    assert {v.label for v in rule.verdicts(study.panels(reader))} == {"no comparison"}  # it is a description


def test_questions_are_paired_by_their_number_and_not_by_their_place(tmp_path):
    (*_, before), _ = gap(tmp_path, items=60, seeds=(0,))
    for path in (tmp_path / "results").rglob("belebele_english-*.items.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    reader = study.Reader(tmp_path / "output", tmp_path / "results")
    *_, after = study.gaps(study.panels(reader), reader.left_out)["wangchan"]
    for k in fabricate.DEPTHS:
        assert before.gain(k, k) == after.gain(k, k)


def test_only_questions_that_both_languages_have_are_compared(tmp_path):
    gap(tmp_path, items=60, tasks=study.LANGUAGES[:1])
    panels, reader = gap(tmp_path, items=40, tasks=study.LANGUAGES[1:], limit=40)
    assert [panel.items for panel in panels] == [40] * 3 and reader.left_out == []


def test_questions_whose_right_answers_differ_are_no_pairs_and_that_is_said(tmp_path):
    gap(tmp_path, items=60, seeds=(0,))
    files = sorted((tmp_path / "results").rglob("belebele_english-*.items.jsonl"))

    def change(path: Path, gold: str | None) -> None:
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | {"gold": gold}), *rest]) + "\n")

    def found() -> tuple[study.Panel | None, set]:
        reader = study.Reader(tmp_path / "output", tmp_path / "results")
        *_, panel = study.gaps(study.panels(reader), reader.left_out).get("wangchan", (None,))
        return panel, set(reader.left_out)

    change(files[0], "d")
    panel, left_out = found()
    why = "not compared: 59 of 60 questions of one number have the same right answer"
    assert list(panel.base) == [2, 3, 4] and len(panel.adapted) == 16
    assert left_out == {("belebele_thai and belebele_english", why)}
    for path in files:
        change(path, None)
    panel, left_out = found()
    assert panel is None and left_out == {("belebele_thai and belebele_english", why)}
    command(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert why in text and "From English to Thai" not in text


def test_two_runs_are_compared_item_by_item(written, tmp_path):
    root, _ = written
    done = command(root, "--compare", "seed0/exp2-wangchan-ut1", "seed0/exp1-wangchan-ut4:4")
    assert "60 items in common" in done.stdout and "exact McNemar p" in done.stdout
    assert "ข้อที่" in done.stdout and "คำตอบ 4" in done.stdout
    assert "left out" not in done.stdout
    copy = shutil.copytree(root, tmp_path / "damaged")
    (result := next((copy / "results/seed0/exp2-wangchan-ut1").glob("*-ut*.json"))).write_text("")
    done = command(copy, "--compare", "seed0/exp2-wangchan-ut1", "seed0/exp1-wangchan-ut4:4")
    assert f"left out: {result}".replace("_", "") in done.stdout.replace("\\", "").replace("_", "")
    wrong = command(root, "--compare", "exp9", "exp1", code=2)
    assert "no results of 'exp9'; runs with results: base-bf16, seed0/exp1-wangchan-ut4" in wrong.stderr


def test_make_report_passes_the_folders_on(written, tmp_path):
    root, _ = written
    names = {"OUT": str(tmp_path), "OUTPUT_DIR": str(root / "output"), "RESULTS_DIR": str(root / "results")}
    planned = subprocess.run(
        ["make", "-n", "report", *(f"{k}={v}" for k, v in names.items())], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr
    assert f"--out {tmp_path}" in planned.stdout and f"--results_dir {root / 'results'}" in planned.stdout
