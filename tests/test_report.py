"""The report: known answers are found and no more is claimed, unlike runs are not pooled, broken files are named."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import report
from ouro.evaluate.benchmarks import LANGUAGES
from ouro.files import UserError
from ouro.settings import LEARNING
from ouro.verdict import plots, rule, study, tables

import fabricate
import numpy as np
import pytest
import yaml
from helpers import ROOT, read_jsonl

EQUAL, LEVEL = (0.5,) * 4, (2.9,) * 4
FAR = {"gains": (0.7, 0.6, 0.55, 0.5), "base": (3.3, 3.05, 2.97, 2.9)}  # more to gain at one loop, and still behind
TEXT = {"tasks": ("thai_text",), "items": 50, "lines": 2}


def write_report(root: Path, *arguments: str, figures: bool = False) -> str:
    """Runs report.py in this process on root/output and root/results, in root; what it prints."""
    places = ["--output_dir", str(root / "output"), "--results_dir", str(root / "results")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["report.py", *places, *arguments])
        if not figures:  # most of the time goes to them
            patch.setattr(report, "draw", lambda *_: {})
        report.main()
    return printed.getvalue()


def verdicts(root: Path) -> dict[str, dict]:
    return {told["aspect"]: told for told in json.loads((root / "results/report/verdict.json").read_text())}


def read(root: Path) -> tuple[study.Reader, dict]:
    """A study's reader and panels."""
    reader = study.Reader(root / "output", root / "results")
    return reader, study.panels(reader)


def change(file: Path, **values) -> None:
    """Sets values of a result's study block, or of any other JSON object."""
    content = json.loads(file.read_text())
    content.get("study", content).update(values)
    file.write_text(json.dumps(content))


def table(root: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((root / f"results/report/{name}.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study whose report was written, with tables as files; what was printed."""
    root = tmp_path_factory.mktemp("study")
    fabricate.study(root, items=60)
    return root, write_report(root, "--csv", "--latex", figures=True)


# ------------------------------------------------------------------------------------------------------ known answers


@pytest.mark.parametrize(
    "gains, base, label, words",
    [
        ((0.45, 0.50, 0.53, 0.55), LEVEL, "helps", "looping helps"),
        ((0.55, 0.53, 0.50, 0.45), LEVEL, "hurts", "looping hurts"),
        (EQUAL, LEVEL, "no evidence", "four times in five"),
        (EQUAL, (3.3, 3.1, 3.0, 2.9), "no evidence", "bits per character: that is depth, not adaptation"),
        (*FAR.values(), "mixed", "The gain is larger at 1 loop, because the base starts from .* still better by"),
        ((0.9, 0.7, 0.6, 0.5), (3.3, 3.1, 3.0, 2.9), "mixed", "do not differ measurably"),  # and level afterwards
        ((0.50, 0.50, 0.50, 0.55), LEVEL, "helps", "looping helps"),  # an interaction of 0.05 bits
    ],
)
def test_the_verdict_of_a_study_with_a_known_answer(tmp_path, gains, base, label, words):
    how = {"gains": {"thai_text": gains}, "base": {"thai_text": base}, "tasks": ("thai_text",), "items": 400}
    fabricate.study(tmp_path, run_seed=1, lines=2, **how)
    write_report(tmp_path)
    told = verdicts(tmp_path)["thai_text"]
    text = f"{told['headline']}. {told['sentence']}"
    assert (told["label"], told["missing"]) == (label, []), text
    assert "bits per character" in text and "[" in text
    assert re.search(words, text) and ("looping helps" in text) == (label == "helps")


def test_exams_conversation_and_english_have_words_of_their_own(tmp_path):
    gains = {"thai_exam": (0.02, 0.10, 0.15, 0.30), "mt_bench_thai": (0.5, 0.8, 1.0, 1.5)}
    gains["english_text"] = (-0.02, -0.05, -0.07, -0.10)
    fabricate.study(tmp_path, gains=gains, base={"english_text": (1.0,) * 4}, items=500, seed_sd=0.002, lines=2)
    write_report(tmp_path)
    found = verdicts(tmp_path)
    assert found["thai_exams"]["label"] == found["thai_conversation"]["label"] == "helps"
    assert "points" in found["thai_exams"]["sentence"] and "rating points" in found["thai_conversation"]["sentence"]
    assert (found["english"]["label"], found["english"]["headline"]) == ("hurts", "looping forgets more")
    assert "measurably forgotten at 1, 2, 3 and 4 loops" in found["english"]["sentence"]


def test_false_helps_and_hurts_are_rare_where_the_base_alone_is_worse_at_one_loop():
    rng, items, base = np.random.default_rng(0), 60, (3.3, 3.1, 3.0, 2.9)
    ids, called = [str(i) for i in range(items)], []
    for _ in range(100):
        ease, characters = 0.4 * rng.normal(size=items), rng.integers(100, 900, items).astype(float)

        def result(trained, depth, seed, level, ease=ease, characters=characters):
            values = level + ease + 0.04 * rng.normal(size=items) + 0.01 * rng.normal() * bool(trained)
            block = fabricate.study_block("run", "thai_text", depth, trained, seed, "wangchan", values)
            return study.Result(block, Path("file"), ids, values * characters, characters)

        bases = [result(None, depth, None, base[depth - 1]) for depth in fabricate.DEPTHS]
        adapted = [result(d, d, seed, base[d - 1] - 0.5) for seed in range(3) for d in fabricate.DEPTHS]
        called.append(rule.decide("thai_text", "wangchan", study.Panel(adapted + bases)).label)
    assert called.count("helps") + called.count("hurts") <= 5
    assert called.count("no evidence") >= 90


# ----------------------------------------------------------------------------------------------- no more than there is


def test_one_seed_is_said_in_the_verdict_and_as_missing(tmp_path):
    fabricate.study(tmp_path, gains={"thai_text": (0.3, 0.4, 0.5, 0.6)}, seeds=(0,), tasks=("thai_text",))
    verdict = rule.verdicts(read(tmp_path)[1])[0]
    assert verdict.label == "helps" and "one seed" in verdict.text
    assert "at least 3 seeds: now 1 at 1 loop, 1 at 2 loops, 1 at 3 loops and 1 at 4 loops" in verdict.missing


def test_a_depth_a_base_and_a_benchmark_that_are_missing_are_named(tmp_path):
    _, results = fabricate.study(tmp_path, **TEXT | {"depths": (1, 4)})
    (results / "base-bf16" / "thai_text-ut1.json").unlink()
    found = {v.aspect: v for v in rule.verdicts(read(tmp_path)[1])}
    assert found["thai_text"].label == found["thai_exams"].label == "no comparison"
    missing = {"a model trained at 2 loops", "a model trained at 3 loops", "the base at 1 loop"}
    assert missing <= set(found["thai_text"].missing)


@pytest.mark.parametrize("key", ["loss", *study.MEASURED_ALIKE])
def test_a_result_that_was_trained_or_measured_otherwise_is_flagged_and_not_pooled(tmp_path, key):
    _, results = fabricate.study(tmp_path, **TEXT)
    odd = results / "seed1" / "exp2-wangchan-ut1" / "thai_text-ut1.json"
    change(odd, **{key: "accuracy" if key == "metric" else "another"})
    if key == "metric":  # which reads other columns of the items, the same numbers here
        change(odd, value=float(np.mean([item["value"] for item in read_jsonl(odd.with_suffix(".items.jsonl"))])))
    reader, panels = read(tmp_path)
    panel = panels["thai_text", "wangchan"]
    assert panel.seeds[1, 1] == [0, 2] and panel.seeds[4, 4] == [0, 1, 2]
    assert [(path, f"{key} is " in why) for path, why in reader.left_out] == [(str(odd), True)]


@pytest.fixture(scope="module")
def of_two_depths(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    fabricate.study(root, **TEXT | {"items": 20, "depths": (1, 4)})
    return root


@pytest.mark.parametrize("name", [*study.SETTINGS_ALIKE, "per_device_train_batch_size", "gradient_accumulation_steps"])
def test_runs_that_differ_in_what_is_learnt_are_neither_pooled_nor_compared(of_two_depths, name):
    def train_otherwise(*seeds: int) -> tuple[study.Reader, dict]:
        kept = {}
        for seed in seeds:
            file = of_two_depths / f"output/seed{seed}/exp2-wangchan-ut1/config.yaml"
            kept[file] = file.read_text()
            config = yaml.safe_load(kept[file])
            config[name] = config[name] * 2 if name.startswith(("per_device", "gradient")) else "another"
            file.write_text(yaml.safe_dump(config))
        found = read(of_two_depths)
        for file, text in kept.items():
            file.write_text(text)
        return found

    reason = f"setting {name} is another, not " if name in study.SETTINGS_ALIKE else "rows per step is 64, not 32"
    reader, panels = train_otherwise(1)
    panel = panels["thai_text", "wangchan"]
    assert panel.seeds[1, 1] == [0, 2] and panel.seeds[4, 4] == [0, 1, 2]
    assert {Path(path).parts[-3] for path, why in reader.left_out if reason in why} == {"seed1"}

    reader, panels = train_otherwise(0, 1, 2)
    assert len(panels["thai_text", "wangchan"].trained) == 1 and len(reader.left_out) == 12
    assert rule.verdicts(panels)[0].label == "no comparison"


def test_all_that_is_learnt_counts_but_what_the_study_compares_and_how_rows_are_shared_out(tmp_path):
    assert set(LEARNING) - set(study.SETTINGS_ALIKE) == {"dataset", "total_ut_steps"}
    output, _ = fabricate.study(tmp_path, **TEXT)
    file = output / "seed0/exp1-wangchan-ut4/config.yaml"
    shared = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8, "torch_compile": False}
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | shared))
    reader, panels = read(tmp_path)
    assert panels["thai_text", "wangchan"].seeds[4, 4] == [0, 1, 2] and not reader.left_out


def test_other_data_is_not_pooled_and_a_training_folder_elsewhere_is_named(tmp_path):
    output, results = fabricate.study(tmp_path, **TEXT)
    change(output / "seed2" / "exp1-wangchan-ut4" / "data_report.json", rows_kept=7)
    shutil.rmtree(output / "seed1" / "exp2-wangchan-ut1")
    reader, panels = read(tmp_path)
    seeds = panels["thai_text", "wangchan"].seeds
    assert seeds[4, 4] == [0, 1] and seeds[1, 1] == [0, 1, 2]
    whys = {Path(path).parts[-3]: why for path, why in reader.left_out if path.endswith(".json")}
    assert list(whys) == ["seed2"] and "data report" in whys["seed2"]
    (why,) = {why for path, why in reader.left_out if path == str(results / "seed1" / "exp2-wangchan-ut1")}
    assert "could not be compared" in why


def test_answers_without_ratings_are_said_to_be_there(tmp_path):
    _, results = fabricate.study(tmp_path, tasks=("mt_bench_thai",), items=9, lines=2, seeds=(0,))
    for path in results.rglob("*.json"):
        change(path, value=None, ci95=None, judge=None)
        items = path.with_suffix(".items.jsonl")
        rows = [json.loads(line) | {"value": None} for line in items.read_text().splitlines()]
        items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "There are answers, and no ratings of them" in text and "คำตอบ 4" in text


def test_training_sets_are_judged_apart(tmp_path):
    fabricate.study(tmp_path, **TEXT)
    fabricate.study(tmp_path, **TEXT | {"dataset": "r1", "depths": (1, 4)})
    made = rule.verdicts(read(tmp_path)[1])
    compared = [(v.dataset, v.aspect) for v in made if v.label != "no comparison"]
    assert compared == [("wangchan", "thai_text"), ("r1", "thai_text")]


# -------------------------------------------------------------------------------------------------------- broken inputs


def test_broken_inputs_are_listed_and_the_rest_is_reported(tmp_path):
    output, results = fabricate.study(tmp_path, **TEXT | {"lines": 5})
    folder, other = results / "seed0" / "exp1-wangchan-ut4", results / "seed1" / "exp1-wangchan-ut4"
    expected = []

    def broken(file: Path, why: str, content: str | None = None, **values) -> Path:
        """Overwrites a file, or some of its values; the report is to say why it cannot be used."""
        expected.append((file, why))
        if content is not None:
            file.write_text(content)
        elif values:
            change(file, **values)
        return file

    half = folder / "thai_text-ut1.json"
    broken(half, "cannot be used", half.read_text()[:200])
    broken(folder / "thai_text-ut2.json", "format 9", format=9)
    broken(folder / "thai_text-ut3.json", "nan", value=float("nan"))
    broken(folder / "thai_text-ut4.json", "and 0 were scored", items=0)
    broken(results / "seed1/exp3a-wangchan-ut2/thai_text-ut1.json", "not a whole number", trained_ut_steps=None)
    keyless = broken(results / "seed1/exp3a-wangchan-ut2/thai_text-ut2.json", "has no 'aspect'")
    keyless.write_text(keyless.read_text().replace('"aspect"', '"other"'))
    twice = broken(other / "thai_text-ut4.json", "49 different items in 50 lines").with_suffix(".items.jsonl")
    lines = twice.read_text().splitlines()
    twice.write_text("\n".join([*lines[:-1], lines[0]]) + "\n")
    broken(other / "thai_text-ut3.json", "No such file").with_suffix(".items.jsonl").unlink()
    shutil.copytree(results / "seed2", results / "seed3")  # the same runs once more
    broken(results / "seed3/exp1-wangchan-ut4/thai_text-ut4.json", "counted once")
    with open(broken(output / "seed0/exp1-wangchan-ut4/metrics.jsonl", "600 MiB"), "wb") as file:
        file.truncate(600 << 20)
    torn = output / "seed1/exp1-wangchan-ut4/metrics.jsonl"
    broken(torn, "1 of 6 lines", torn.read_text() + '{"step": 60, "lo')
    broken(output / "seed2/exp1-wangchan-ut4/metrics.jsonl", "cannot be used: could not convert", '{"step": "x"}\n')
    broken(output / "seed2/exp2-wangchan-ut1/metrics.jsonl", "cannot be used: 'list'", "[]\n")
    broken(output / "seed2/exp3a-wangchan-ut2/config.yaml", "not valid YAML", "a: [")
    broken(output / "seed1/exp3a-wangchan-ut2/config.yaml", "not a whole number", "total_ut_steps: many")
    broken(output / "seed2/exp3b-wangchan-ut3/manifest.json", "cannot be used", "{")
    broken(output / "seed2/exp3b-wangchan-ut3/data_report.json", "not a JSON object", "[]")

    printed = write_report(tmp_path, figures=True)
    page, results_md = (tmp_path / "report.html").read_text(), (tmp_path / "RESULTS.md").read_text()
    listed = results_md[results_md.index("What was left out") :].splitlines()
    for path, why in expected:
        entries = [line for line in listed if line.startswith(f"| {path} |")]
        assert any(why in line.replace("\\", "") for line in entries), (path, why, entries)
        assert str(path) in page
    assert "things left out" in printed


@pytest.mark.parametrize("task", ["thai_text", "thai_exam", "mt_bench_thai"])
def test_a_value_that_is_not_that_of_its_items_is_not_used(tmp_path, task):
    _, results = fabricate.study(tmp_path, tasks=(task,), items=20, lines=2, seeds=(0,), depths=(1,))
    odd = results / "base-bf16" / f"{task}-ut3.json"
    change(odd, value=json.loads(odd.read_text())["study"]["value"] + 0.05)
    reader, _ = read(tmp_path)
    assert [(path, "the items give" in why) for path, why in reader.left_out] == [(str(odd), True)]


def test_runs_that_have_not_ended_are_shown_as_such(tmp_path):
    output, _ = fabricate.study(tmp_path, tasks=(), lines=5, seeds=(0,))
    (output / "exp2-wangchan-ut1" / "completed").unlink()
    for name, log in (
        ("exp3a-wangchan-ut2", ""),
        ("exp3b-wangchan-ut3", '{"step": 10, "loss": NaN, "num_tokens": 5, "tokens_per_second": 1}\n'),
    ):
        (output / name / "completed").unlink()
        (output / name / "metrics.jsonl").write_text(log)
    reader, _ = read(tmp_path)
    assert [run.state for run in reader.runs.values()] == [
        "complete", "not finished: step 50 of 50", "no step logged", "failed: loss is not a number at step 10",
    ]  # fmt: skip
    write_report(tmp_path, figures=True)


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to report on: .*output .which is not there. and"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["nothing", "runs", "base", "adapted"])
def test_any_part_of_a_study_gives_a_report(tmp_path, what):
    tasks = () if what in ("nothing", "runs") else ("thai_exam",)
    output, results = fabricate.study(tmp_path, tasks=tasks, seeds=(0,), items=30, lines=3)
    for folder in results.glob("*"):
        if (folder.name == "base-bf16") != (what == "base"):
            shutil.rmtree(folder)
    if what in ("nothing", "base"):
        shutil.rmtree(output)
        output.mkdir()
    printed = write_report(tmp_path, "--csv", "--latex", figures=True)
    assert ("0 training runs" in printed) == (what in ("nothing", "base"))
    for page in ("RESULTS.md", "report.html"):
        assert "not comparable yet" in (tmp_path / page).read_text()


# ------------------------------------------------------------------------------------------------------------ the files


def test_the_same_inputs_give_the_same_bytes_in_another_process(written):
    root, printed = written
    kept = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    places = ["--output_dir", root / "output", "--results_dir", root / "results"]
    command = [sys.executable, ROOT / "report.py", *places, "--csv", "--latex"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    assert kept == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_runs_and_replies_say_is_text_in_the_pages(tmp_path):
    """tests/test_report_html.py asks a browser the same."""
    evil = "<script>alert(1)</script>"
    fabricate.study(tmp_path, tasks=("mt_bench_thai",), items=3, lines=2, seeds=(0,), dataset=evil[:8], reply=evil)
    write_report(tmp_path)
    page, results_md = (tmp_path / "report.html").read_text(), (tmp_path / "RESULTS.md").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 4" in page and "alert(1)&lt;/script&gt; 4" in results_md
    assert page.count("<script>") == 1 and "<script" not in results_md
    script = page.partition("<script>")[2].partition("</script>")[0].encode()
    allowed = page.partition("script-src 'sha256-")[2].partition("'")[0]
    assert base64.b64decode(allowed) == hashlib.sha256(script).digest()


def test_numbers_of_the_runs_table_are_those_of_the_log(written):
    root, _ = written
    log = read_jsonl(root / "output/seed0/exp1-wangchan-ut4/metrics.jsonl")
    row = next(row for row in table(root, "runs") if row["run"] == "seed0/exp1-wangchan-ut4")
    assert row["hours"] == f"{log[-1]['num_tokens'] / log[-1]['tokens_per_second'] / 3600:.2f}"
    assert (row["final loss"], row["state"]) == (f"{log[-1]['loss']:.4f}", "complete")
    assert row["average loss"] == f"{sum(x['loss'] for x in log) / len(log):.4f}"
    assert (row["model-FLOP use"], row["tokens/s"]) == ("41.0%", "7,500")


def test_the_table_of_gains_is_filled(written):
    rows = table(written[0], "gains")
    assert len(rows) == 16
    for row in rows:
        empty = [name for name, cell in row.items() if cell == "–"]
        assert empty == (["gain minus gain at 1 loop", "Holm p", "smallest found"] if row["loops"] == "1" else [])


def test_the_held_out_loss_is_drawn_by_loop_beside_the_bases(written):
    reader, panels = read(written[0])
    figure = plots.draw(reader.runs, panels, "wangchan")["levels"]
    axis = next(axis for axis in figure.axes if axis.get_title() == "held-out training rows")
    base, *adapted = (list(line.get_ydata()) for line in axis.lines)
    assert base == [1.5, 1.3, 1.25, 1.2] and [len(losses) for losses in adapted] == [1, 2, 3, 4]
    np.testing.assert_allclose(adapted[-1], [0.9, 0.7, 0.65, 0.64])


def test_latex_is_escaped_and_the_terminal_ends_with_the_verdict_and_the_paths(written):
    root, printed = written
    text = (root / "results" / "report" / "runs.tex").read_text()
    assert r"41.0\%" in text and text.count(r"\begin{tabular}") == 1 and "_" not in text.replace(r"\_", "")
    assert "Thai text: " in printed and "English retention:" in printed
    assert printed.splitlines()[-1].startswith("report.html, RESULTS.md; plots in ")
    assert set(verdicts(root)) == set(study.ASPECTS)


def test_a_macro_mean_stands_beside_its_own_chance_and_commonest_answer(written):
    root, rows = written[0], table(written[0], "benchmarks")
    for row in rows:
        told = [row[name] for name in ("chance", "always the commonest", "its chance", "its commonest")]
        assert told == (["21.0", "26.0", "22.5", "29.0"] if row["benchmark"] == "thai_exam" else ["–"] * 4)
    block = json.loads((root / "results" / "base-bf16" / "thai_exam-ut2.json").read_text())["study"]
    base = {row["read at"]: row for row in rows if (row["benchmark"], row["model"]) == ("thai_exam", "base model")}
    macro, micro = base["2"]["macro"], base["2"]["value"].split()[0]
    assert macro == f"{block['macro']:.1%}"[:-1] != micro == f"{block['value']:.1%}"[:-1]


# -------------------------------------------------------------------------------- baselines, and what is published


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
    assert sorted((row[1], row[4], row[5].split()[0], *row[6:]) for row in rows) == [
        ("belebele_thai", "micro", "60.0", "–", "accuracy, %", "–", "–"),
        ("mt_bench_thai", "macro", "4.75", "6.1", "rating, 1 to 10", "zero-shot", "card 6.1"),
        ("thai_exam", "macro", "75.0", "44.53", "accuracy, %", "zero-shot", "card 0.4453"),
        ("thai_exam", "micro", "60.0", "52.04", "accuracy, %", "zero-shot", "card 0.5204"),
        ("thai_text", "micro", "0.600", "–", "bits per character", "–", "–"),
    ]


# ---------------------------------------------------------------------------------------------- English minus Thai


def gap(root: Path, **how) -> tuple[tuple[study.Panel, study.Panel, study.Panel] | None, set]:
    """(Thai, English, English minus Thai), and what was left out."""
    if how:
        fabricate.study(root, **{"tasks": LANGUAGES, "lines": 2} | how)
    reader, panels = read(root)
    return study.gaps(panels, reader.left_out).get("wangchan"), set(reader.left_out)


def test_the_gap_between_the_languages_and_its_change_by_training_are_found(tmp_path):
    (thai, english, both), left_out = gap(tmp_path, items=900)
    assert not left_out
    for k in fabricate.DEPTHS:
        base, adapted, change = both.estimate(both.base[k]), both.estimate(both.adapted[k, k]), both.gain(k, k)
        true = fabricate.TASKS["belebele_english"][2][k - 1] - fabricate.TASKS["belebele_thai"][2][k - 1]
        for e, value in ((base, true), (adapted, true - 0.15), (change, -0.15)):  # Thai +0.10, English -0.05
            assert abs(e.value - value) < 2 * (e.value - e.low)
        assert base.value == pytest.approx(english.base[k].values[0] - thai.base[k].values[0])
        apart = np.hypot(*(level.estimate(level.base[k]).stderr for level in (thai, english)))
        assert base.stderr < 0.95 * apart  # paired
    _, panels = read(tmp_path)
    shown = tables.Table("gap", tables.gap_rows(panels, [])).texts()
    assert [row[:3] for row in shown[:5]] == [["base model", "–", d] for d in "1234"] + [["wangchan", "1", "1"]]
    assert len(shown) == 20 and all((row[-1] == "–") == (row[0] == "base model") for row in shown)
    assert {v.label for v in rule.verdicts(panels)} == {"no comparison"}  # it is a description


def test_questions_of_both_languages_are_paired_by_their_number_and_not_by_their_place(tmp_path):
    gap(tmp_path, items=60, tasks=LANGUAGES[:1])
    panels, left_out = gap(tmp_path, items=40, tasks=LANGUAGES[1:], limit=40)
    assert [panel.items for panel in panels] == [40] * 3 and not left_out
    for path in (tmp_path / "results").rglob("belebele_english-*.items.jsonl"):
        path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    (*_, reversed_panel), _ = gap(tmp_path)
    for k in fabricate.DEPTHS:
        assert panels[2].gain(k, k) == reversed_panel.gain(k, k)


def test_questions_whose_right_answers_differ_are_no_pairs_and_that_is_said(tmp_path):
    gap(tmp_path, items=60, seeds=(0,))
    files = sorted((tmp_path / "results").rglob("belebele_english-*.items.jsonl"))
    left_out = {(" and ".join(LANGUAGES), "not compared: 59 of 60 questions of one number have the same right answer")}

    def answer_first(path: Path, gold: str | None) -> None:
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | {"gold": gold}), *rest]) + "\n")

    answer_first(files[0], "d")
    (*_, panel), why = gap(tmp_path)
    assert list(panel.base) == [2, 3, 4] and len(panel.adapted) == 16 and why == left_out
    for path in files:
        answer_first(path, None)
    assert gap(tmp_path) == (None, left_out)
    write_report(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "59 of 60 questions" in text and "From English to Thai" not in text


def test_two_runs_are_compared_item_by_item(written, tmp_path):
    root, _ = written
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
