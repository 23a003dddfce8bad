"""The report: known answers are found and no more is claimed, unlike runs are not pooled, broken files are named."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import report
from ouro.files import UserError, file_sha256, write_atomic
from ouro.settings import ARMS, LEARNING
from ouro.verdict import panels, plots, power, rule, study, tables
from ouro.verdict.panels import Key

import fabricate
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import simulate
import yaml
from helpers import ROOT, read_jsonl, write_jsonl
from reports import change, read, set_config, table, verdicts, write_report

TEXT = {"tasks": ("thai_text",), "items": 50, "lines": 2}
THAI_TEXT = Key("thai_text", "wangchan")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study whose report was written, with tables as files; what was printed."""
    root = tmp_path_factory.mktemp("study")
    fabricate.study(root, items=60)
    return root, write_report(root, "--csv", "--latex", figures=True)


# ------------------------------------------------------------------------------------------------------ known answers


NONE, SOME, MUCH = (0, 0, 0, 0), (0, 0.05, 0.06, 0.08), (0, 0.11, 0.12, 0.14)  # what depth is worth, in log bits
WORSE = tuple(-x for x in SOME)
PAIR = ("parallel_text_thai", "parallel_text_english")
BROKEN = dict.fromkeys(("thai_text", *PAIR), (20.0, 5.0, 3.0, 2.9))


def make_study(root: Path, thai: tuple, english: tuple | None, sets: dict | None = None, **how) -> None:
    """Adapters trained on Thai and on English, to which depth is worth so much. sets: English ones, with settings."""
    worth = {"thai_text": (2.4, thai), PAIR[0]: (2.4, thai), PAIR[1]: (0.9, english or NONE)}
    levels = {task: tuple(level * np.exp(-x) for x in by) for task, (level, by) in worth.items()}
    how = {"items": 400, "lines": 2, "seed_sd": 0.003, "levels": levels} | how
    fabricate.study(root, tasks=("thai_text", PAIR[0]), **how)
    for name, settings in (sets or {"smol-smoltalk": {}}).items() if english else ():
        by_depth = dict.fromkeys(fabricate.DEPTHS, settings)
        fabricate.study(root, tasks=PAIR[1:], dataset=name, language="en", settings=by_depth, **how)


@pytest.mark.parametrize(
    "thai, english, how, word",
    [
        (SOME, SOME, {}, "helps Thai as it helps English"),
        (SOME, SOME, {"base": BROKEN}, "helps Thai as it helps English"),
        (MUCH, SOME, {}, "helps Thai more than English"),
        (SOME, MUCH, {}, "helps Thai, less than English"),
        (NONE, MUCH, {"base": BROKEN}, "no difference that matters; worth less than on English"),
        (SOME, None, {}, "helps Thai; beside English: not measured"),
        (MUCH, MUCH, {"seed_sd": 0.02}, "helps Thai; beside English: undecided"),
        (WORSE, SOME, {}, "hurts Thai; worth less than on English"),
        (WORSE, WORSE, {}, "hurts Thai"),
        (NONE, NONE, {}, "no difference that matters"),
        (NONE, NONE, {"seed_sd": 0.2}, "undecided"),
        ((0, 0.01, 0.01, 0.01), None, {"seed_sd": 0.001}, "no difference that matters"),  # measurable, but too small
        (MUCH, SOME, {"seeds": (0, 1)}, "provisional"),
        (MUCH, SOME, {"seeds": (0,)}, "provisional"),
    ],
)
def test_the_words_of_a_study_with_a_known_answer_whatever_the_base(tmp_path, thai, english, how, word):
    make_study(tmp_path, thai, english, **how)
    write_report(tmp_path)
    told = verdicts(tmp_path)["thai_text"]
    text, sentence = (tmp_path / "RESULTS.md").read_text(), " ".join(told["numbers"])
    assert told["words"] == dict.fromkeys("234", word), sentence
    assert f"Thai text, 2, 3 and 4 loops: {word}**" in text and "nan" not in text and "mixed" not in text
    for fact in ("400 items in 400 clusters", "training runs (seeds)", "tokens a run", "FLOPs a run"):
        assert fact in told["rests"]
    assert ("[" in sentence) == (how.get("seeds") != (0,))  # one run has no interval
    assert ("four times in five" in sentence) == ("undecided" in word)
    assert ("measurable, and inside the margin of 2.00 %" in sentence) == (max(thai) == 0.01)


def test_exams_conversation_and_english_have_words_of_their_own(tmp_path):
    gains = {"thai_exam": (0.02, 0.12, 0.30, 0.40), "mt_bench_thai": (0.5, 0.8, 1.0, 1.5)}
    gains["english_text"] = (-0.08, -0.08, 0, 0.08)
    fabricate.study(tmp_path, gains=gains, base={"english_text": (1.0,) * 4}, items=500, seed_sd=0.002, lines=2)
    write_report(tmp_path, "--csv")
    found = verdicts(tmp_path)
    beside = "; beside English: not measured"
    assert found["thai_exams"]["words"]["4"] == found["thai_conversation"]["words"]["4"] == "helps Thai" + beside
    units = {"thai_exams": r"[\d.]+ points \[", "thai_conversation": r"[\d.]+ rating points \["}
    assert all(re.search(unit, found[aspect]["numbers"][0]) for aspect, unit in units.items())
    headline = "1 and 2 loops: forgotten. 3 loops: no loss that matters. 4 loops: better than the base"
    assert found["english"]["headline"] == headline
    family = {row["tests in it"] for row in table(tmp_path, "tests")}
    assert family == {"13"}, "one family: three depths of three aspects, and English at four"


@pytest.mark.parametrize(("items", "word"), [(5, "undecided"), (400, "no difference that matters")])
def test_a_few_questions_that_all_models_answer_alike_show_nothing(tmp_path, items, word):
    none = {"thai_exam": (-1,) * 4}
    fabricate.study(tmp_path, items=items, levels=none, base=none, tasks=["thai_exam"], depths=(1, 4))
    write_report(tmp_path)
    assert verdicts(tmp_path)["thai_exams"]["words"] == {"4": word}


def test_a_verdict_is_what_numpy_and_scipy_make_of_the_items_files(tmp_path):
    """One whole verdict by hand: values, standard errors by cluster, Welch, Holm, to the printed digits."""
    make_study(tmp_path, (0, 0.01, 0.03, 0.05), (0, 0.005, 0.01, 0.02), items=200, seed_sd=0.02, cluster=5)
    write_report(tmp_path)

    def depth_of(name: str, task: str, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Minus the logarithm of each seed's bits per character; (40, 3) what each passage adds to its error."""
        values, parts = [], []
        for seed in range(3):
            run = fabricate.NAMES[depth].format(name)
            rows = read_jsonl(tmp_path / f"results/seed{seed}/{run}/{task}-ut{depth}.items.jsonl")
            bits, characters = (np.array([row[key] for row in rows], float) for key in ("bits", "characters"))
            values.append(-np.log(bits.sum() / characters.sum()))
            error = (bits - bits.sum() / characters.sum() * characters).reshape(40, 5).sum(1) / bits.sum()
            parts.append(-(error - error.mean()) * np.sqrt(40 / 39))
        return np.array(values), np.array(parts).T

    tests, halves = [], []
    for english in (False, True):
        for k in (2, 3, 4):
            task = PAIR[0] if english else "thai_text"
            groups = [depth_of("wangchan", task, k), depth_of("wangchan", task, 1)]
            groups += [depth_of("smol-smoltalk", PAIR[1], depth) for depth in (k, 1)] if english else []
            signs = (1, -1, -1, 1)[: len(groups)]
            value = sum(sign * values.mean() for sign, (values, _) in zip(signs, groups, strict=True))
            item = (sum(sign * parts.mean(1) for sign, (_, parts) in zip(signs, groups, strict=True)) ** 2).sum()
            item -= sum(parts.var(1, ddof=1).sum() / 3 for _, parts in groups)
            runs = np.array([values.var(ddof=1) / 3 for values, _ in groups])
            free = runs.sum() ** 2 / (runs**2 / 2).sum()

            def half(level, item=item, runs=runs, free=free):
                over_items, over_runs = scipy.stats.t.isf(level / 2, 39), scipy.stats.t.isf(level / 2, free)
                return np.sqrt(over_items**2 * max(item, 0) + over_runs**2 * runs.sum())

            p = scipy.optimize.brentq(lambda x, half=half, value=value: half(10**x) - abs(value), -30, 0)
            tests.append((value, 10**p))
            halves.append(half)
    order = np.argsort([p for _, p in tests])
    rejected = 0
    while rejected < 6 and tests[order[rejected]][1] <= 0.05 / (6 - rejected):
        rejected += 1
    told = verdicts(tmp_path)["thai_text"]
    for place, index in enumerate(order):
        value, _ = tests[index]
        width = halves[index](0.05 / max(1, 6 - min(place, rejected)))
        low, middle, high = (100 * (1 - np.exp(-x)) for x in (value - width, value, value + width))
        assert any(f"{middle:+.2f} % [{low:+.2f}, {high:+.2f}]" in line for line in told["numbers"])
    assert 0 < rejected < 6 and {test["seeds"] == [3, 3] for test in told["tests"]} == {True, False}


# ----------------------------------------------------------------------------------------------- no more than there is


def test_a_depth_a_base_a_benchmark_and_english_adapters_that_are_missing_are_named(tmp_path):
    _, results = fabricate.study(tmp_path, **TEXT | {"depths": (1, 4), "tasks": ("thai_text", "english_text")})
    (results / "base-bf16" / "english_text-ut1.json").unlink()
    found = {v.aspect: v for v in rule.verdicts(*read(tmp_path))}
    assert list(found["thai_text"].words) == [4] and list(found["english"].words) == [4]
    missing = {"a model trained at 2 loops", "a model trained at 3 loops"}
    assert missing | {f"{PAIR[0]} and {PAIR[1]}, which compare Thai with English"} == set(found["thai_text"].missing)
    assert missing | {"the base at 1 loop"} == set(found["english"].missing)
    assert found["thai_exams"].words == {} and found["thai_exams"].missing == ["scores of runs (make eval)"]


def test_seeds_of_unequal_numbers_are_compared_and_fewer_than_three_are_not(tmp_path):
    make_study(tmp_path, MUCH, None, seeds=(0, 1, 2, 3, 4))
    for seed, name in enumerate([*["exp3a-wangchan-ut2"] * 3, *["exp2-wangchan-ut1"] * 2]):
        shutil.rmtree(tmp_path / f"output/seed{seed}/{name}")
    (verdict,) = (v for v in rule.verdicts(*read(tmp_path)) if v.aspect == "thai_text")
    assert [test.estimate.seeds for test in verdict.tests] == [[2, 3], [5, 3], [5, 3]]
    assert verdict.words[2] == "provisional" and verdict.words[3].startswith("helps Thai")
    assert "at least 3 seeds: now 2 at 2 loops" in verdict.missing


@pytest.fixture(scope="module")
def of_two_depths(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    fabricate.study(root, **TEXT | {"items": 20, "depths": (1, 4)})
    return root


@pytest.mark.parametrize(
    "where, key",
    [*(("result", key) for key in panels.MEASURED_ALIKE), *(("config", name) for name in panels.SETTINGS_ALIKE),
     ("config of a depth", "learning_rate"), ("data", "data report")],
)  # fmt: skip
def test_no_majority_decides_between_results_that_are_unlike(of_two_depths, tmp_path, where, key):
    """One odd run of six, and all three of a depth, are unlike the others all the same."""
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    run, odd = tmp_path / "output/seed1/exp2-wangchan-ut1", tmp_path / "results/seed1/exp2-wangchan-ut1"
    usual = yaml.safe_load((run / "config.yaml").read_text()).get(key)
    seeds = (0, 1, 2) if where == "config of a depth" else (1,)
    if where == "result" and key == "metric":  # which reads other columns of the items, the same numbers here
        items = read_jsonl(odd / "thai_text-ut1.items.jsonl")
        change(odd / "thai_text-ut1.json", metric="accuracy", value=float(np.mean([item["value"] for item in items])))
    elif where == "result":
        change(odd / "thai_text-ut1.json", **{key: "another"})
    elif where == "data":
        change(run / "data_report.json", rows_kept=7)
        for path in odd.glob("*-ut?.json"):
            change(path, data_report_sha256=file_sha256(run / "data_report.json"))
    else:
        for seed in seeds:
            set_config(tmp_path / f"output/seed{seed}/exp2-wangchan-ut1", **{key: "another"})
    reader, found = read(tmp_path)
    assert THAI_TEXT not in found
    ((what, why),) = reader.left_out
    assert what == "thai_text wangchan equal-tokens" and f"{key} is " in why and "python report.py --NAME VALUE" in why
    assert "another (seed" in why or key in ("metric", "data report")
    if where.startswith("config"):
        reader, found = read(tmp_path, **{key: usual})
        assert found[THAI_TEXT].seeds.get((1, 1), []) == [seed for seed in (0, 1, 2) if seed not in seeds]
        assert {why for _, why in reader.left_out} == {f"setting {key} is another, and {usual} was asked for"}


def test_all_that_is_learnt_counts_but_what_the_study_compares_and_how_rows_are_shared_out(tmp_path):
    assert set(LEARNING) - set(panels.SETTINGS_ALIKE) == {"dataset", "total_ut_steps"}
    assert set(panels.ARMS) == set(ARMS)
    output, _ = fabricate.study(tmp_path, **TEXT)
    shared = {"pass_tokens": 512, "activation_checkpointing": "full", "torch_compile": False}
    set_config(output / "seed0/exp1-wangchan-ut4", **shared)
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == [0, 1, 2] and not reader.left_out


STALE = {  # what is done to a run's folder, by why its results do not count then
    "how it was trained is not known: its folder in OUTPUT_DIR is not here": shutil.rmtree,
    "its run is not complete (not finished: step 20 of 20)": lambda run: (run / "completed").unlink(),
    "of another adapter": lambda run: (run / "final_adapter/adapter_model.safetensors").write_text("trained again"),
    "of another data report than its run's": lambda run: change(run / "data_report.json", rows_kept=7),
    "its folder has no config.yaml or no data_report.json": lambda run: (run / "config.yaml").unlink(),
    "its trained_ut_steps is 4, and its run's config.yaml says": lambda run: set_config(run, total_ut_steps=2),
    "its dataset is wangchan, and its run's config.yaml says": lambda run: set_config(run, dataset="r1"),
    "its seed is 1, and its run's config.yaml says": lambda run: set_config(run, seed=7),
}


@pytest.mark.parametrize("reason", STALE)
def test_what_is_stale_unfinished_or_of_unknown_training_is_left_out(of_two_depths, tmp_path, reason):
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    STALE[reason](tmp_path / "output/seed1/exp1-wangchan-ut4")
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == [0, 2] and found[THAI_TEXT].seeds[1, 1] == [0, 1, 2]
    assert len(reader.left_out) == 4 and all(reason in why for _, why in reader.left_out)
    assert {Path(path).parent for path, _ in reader.left_out} == {tmp_path / "results/seed1/exp1-wangchan-ut4"}


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (
            {},
            "was edited after the run began: learning_rate is 0.0002, and was 0.001; arm is equal-tokens, and was rank",
        ),
        ({"learning_rate": "x"}, "learning_rate must be a number, got 'x'"),
    ],
)
def test_a_run_whose_config_was_edited_does_not_count(of_two_depths, tmp_path, alter, told):
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "output/seed1/exp1-wangchan-ut4"
    set_config(run, **alter)
    change(run / "manifest.json", settings={"learning_rate": 0.001, "seed": 1, "arm": "rank", "of_later_code": 3})
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == [0, 2]
    (why,) = (why for path, why in reader.left_out if path == str(run / "config.yaml"))
    assert told in why


def test_a_run_that_was_copied_to_another_seed_is_counted_once(of_two_depths, tmp_path):
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    for kind in ("output", "results"):
        shutil.copytree(tmp_path / kind / "seed1", tmp_path / kind / "seed3")
        for file in (tmp_path / kind / "seed3").rglob("*.*"):
            told = file.read_text().replace("seed1/", "seed3/").replace('"seed": 1', '"seed": 3')
            file.write_text(told.replace("seed: 1", "seed: 3"))
    for file in (tmp_path / "results/seed3").rglob("*-ut?.json"):
        run = json.loads(file.read_text())["study"]["run"]
        files = {"adapter_sha256": "final_adapter/adapter_model.safetensors", "data_report_sha256": "data_report.json"}
        shutil.copy(tmp_path / "output" / run.replace("seed3", "seed1") / files["adapter_sha256"],
                    tmp_path / "output" / run / files["adapter_sha256"])  # fmt: skip
        change(file, **{key: file_sha256(tmp_path / "output" / run / name) for key, name in files.items()})
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == found[THAI_TEXT].seeds[1, 1] == [0, 1, 2]
    assert len(reader.left_out) == 8
    assert all("seed3/" in path and "depth and adapter as" in why for path, why in reader.left_out)


def test_runs_of_other_code_or_packages_count_and_are_named(of_two_depths, tmp_path):
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    for seed in (0, 1, 2):
        for name in ("exp1-wangchan-ut4", "exp2-wangchan-ut1"):
            change(tmp_path / f"output/seed{seed}/{name}/manifest.json",
                   code_sha256=("b" if seed == 2 and "ut4" in name else "a") * 64,
                   packages={"torch": "2.11.0" if seed == 1 else "2.7.1"})  # fmt: skip
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == [0, 1, 2]
    odd = "seed1/exp1-wangchan-ut4, seed1/exp2-wangchan-ut1"
    told = f"code aaaaaaaaaaaa, but bbbbbbbbbbbb (seed2/exp1-wangchan-ut4); torch 2.7.1, but 2.11.0 ({odd})"
    assert reader.left_out == [("runs", f"counted, but trained unlike: {told}")]


def test_results_of_other_code_or_packages_count_and_are_named(of_two_depths, tmp_path):
    """By task and depth: of another task, and at the other depths, all are of one code."""
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)

    def made(code: str, torch: str = "2.7.1") -> dict:
        return {"code_sha256": code * 64, "packages": {"torch": torch}}

    for folder in (tmp_path / "results").glob("*/*-ut?"):
        entry = made("a", "2.11.0" if folder.parent.name == "seed1" else "2.7.1")
        if folder.parent.name == "seed2" and "ut4" in folder.name:
            entry |= {"depths": dict.fromkeys("1234", made("a")) | {"4": made("b")}}
        (folder / "manifest.json").write_text(json.dumps({"tasks": {"thai_text": entry, "english_text": made("c")}}))
    (tmp_path / "results/base-bf16/manifest.json").write_text('{"tasks": {"thai_text": {"depths": [1]}}}')
    reader, found = read(tmp_path)
    assert found[THAI_TEXT].seeds[4, 4] == [0, 1, 2]
    (base, _), (what, told) = reader.left_out
    assert (base, what) == (str(tmp_path / "results/base-bf16/manifest.json"), "results of thai_text")
    code = "code aaaaaaaaaaaa, but bbbbbbbbbbbb (seed2/exp1-wangchan-ut4), not recorded (base-bf16)"
    torch = "torch 2.7.1, but 2.11.0 (seed1/exp1-wangchan-ut4, seed1/exp2-wangchan-ut1)"
    assert told == f"counted, but measured unlike: {code}; {torch}"


@pytest.mark.parametrize(
    "why, change_log",
    [("no step can be read there", Path.unlink), ("no step can be read there", lambda log: log.write_text("")),
     ("ends at step 10", lambda log: write_jsonl(log, read_jsonl(log)[0]))],
)  # fmt: skip
def test_a_log_that_does_not_end_where_the_run_ended_is_not_used_and_said(of_two_depths, tmp_path, why, change_log):
    """Its tokens and FLOPs would be a part's, and the other depth's would seem to be those of both."""
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    log = tmp_path / "output/seed1/exp1-wangchan-ut4/metrics.jsonl"
    before = {v.aspect: v for v in rule.verdicts(*read(tmp_path))}["thai_text"]
    change_log(log)
    reader, found = read(tmp_path)
    told = {v.aspect: v for v in rule.verdicts(reader, found)}["thai_text"]
    assert reader.left_out == [(str(log), f"{why}, and `completed` says 20: its loss, tokens and cost are not known")]
    assert reader.runs["seed1/exp1-wangchan-ut4"].state == "complete, but without its log"
    assert (told.words, told.numbers) == (before.words, before.numbers)
    assert "tokens a run 1.3 million;" in before.rests and "1.3 million (1 loop), not known (4 loops);" in told.rests
    (log.parent / "completed").write_text("")
    assert "completed: damaged" in read(tmp_path)[0].left_out[0][1]


def test_of_a_run_that_was_renamed_the_folder_that_has_its_adapter_is_named(of_two_depths, tmp_path):
    shutil.copytree(of_two_depths, tmp_path, dirs_exist_ok=True)
    there = tmp_path / "output/seed1/mine"
    (tmp_path / "output/seed1/exp1-wangchan-ut4").rename(there)
    (told,) = {why for _, why in read(tmp_path)[0].left_out}
    assert told.endswith(f"is not here, but {there} has its adapter: name it seed1/exp1-wangchan-ut4 again")


def scale_tokens(folder: Path, factor: float) -> None:
    """A run of so many times the tokens, in as many times the time."""
    lines = [line | {"num_tokens": line["num_tokens"] * factor} for line in read_jsonl(folder / "metrics.jsonl")]
    write_jsonl(folder / "metrics.jsonl", *lines)


def test_arms_are_never_pooled_and_equal_flops_give_a_second_line(tmp_path):
    """Runs of equal tokens; of equal FLOPs, where epochs differ between depths; of two ranks, each a study."""
    how = {"items": 50, "lines": 2, "tasks": ("thai_text",)}
    fabricate.study(tmp_path, **how, depths=(1, 2, 4))
    arms = [("equal-flops", "num_train_epochs", 13.0, 0.7), ("tuned", "learning_rate", 1e-4, 4e-4),
            ("rank", "r", 4, 4), ("rank", "r", 64, 64)]  # fmt: skip
    for arm, name, *values in arms:
        settings = {depth: {"arm": arm, name: value} for depth, value in zip((1, 4), values, strict=True)}
        fabricate.study(tmp_path, **how, depths=(1, 4), suffix=f"-{arm}-{values[0]}", settings=settings)
    for folder in tmp_path.glob("output/seed*/*equal-flops*"):  # a token costs four times as much at 4 loops
        scale_tokens(folder, 4 if "ut1" in folder.name else 1 / 4)
    reader, found = read(tmp_path)
    assert not reader.left_out
    arms = {(key.arm, key.condition): panel.seeds[4, 4] for key, panel in found.items()}
    ranks = [("rank", f"r {r}, lora_alpha 32") for r in (4, 64)]
    assert arms == dict.fromkeys([("equal-tokens", ""), ("equal-flops", ""), ("tuned", ""), *ranks], [0, 1, 2])
    write_report(tmp_path, "--csv")
    assert [row["arm"] for row in table(tmp_path, "arms")] == ["equal-flops", "rank", "rank", "tuned"]
    few, many = (each.partition("FLOPs a run ")[2] for each in equal_flops(tmp_path))
    assert float(many.rstrip(")")) == pytest.approx(4 * float(few.rstrip(")")), rel=0.01)
    line = r"4 loops against 1: [+-][\d.]+ % \[.*tokens a run \S+ million \(1 loop\), \S+ million \(4 loops\)"
    assert all(re.match(line, each) for each in equal_flops(tmp_path))

    scale_tokens(tmp_path / "output/seed0/exp1-wangchan-ut4-equal-flops-13.0", 1.5)
    write_report(tmp_path)
    assert len(equal_flops(tmp_path)) == 1, "the other took more than the runs of one loop"
    for file in tmp_path.glob("results/seed*/*equal-flops*/*-ut?.items.jsonl"):  # measured on fewer items
        kept = read_jsonl(file)[:40]
        value = sum(item["bits"] for item in kept) / sum(item["characters"] for item in kept)
        change(file.with_name(file.name.replace(".items.jsonl", ".json")), items=40, value=value)
        write_jsonl(file, *kept)
    set_config(tmp_path / "output/seed1/exp1-wangchan-ut4-tuned-0.0001", learning_rate=1e-4)  # unlike its own depth
    reader, found = read(tmp_path)
    assert THAI_TEXT in found and THAI_TEXT._replace(arm="tuned") not in found
    assert [what for what, _ in reader.left_out if "base" not in what] == ["thai_text wangchan tuned"]
    write_report(tmp_path)
    assert equal_flops(tmp_path) == ["no runs of two depths took as many operations"]


def equal_flops(root: Path) -> list[str]:
    """What is said on Thai text of depths at equal FLOPs."""
    lines = verdicts(root)["thai_text"]["numbers"]
    return [line.partition("at equal FLOPs")[2].strip(",: ") for line in lines if "at equal FLOPs" in line]


NO_ENGLISH = "; beside English: not measured"


@pytest.mark.parametrize(
    "sets, word",
    [({"smol-smoltalk": {"max_tokens": "wangchan"}}, " as it helps English"),
     ({"smol-smoltalk": {"max_tokens": "r1"}}, NO_ENGLISH),
     ({"smol-smoltalk": {"max_tokens": "wangchan"}, "r1-english": {"max_tokens": "r1"}}, " as it helps English"),
     ({"smol-smoltalk": {}, "r1-english": {}}, NO_ENGLISH),
     ({"smol-smoltalk": {"learning_rate": 1.0}}, NO_ENGLISH)],
)  # fmt: skip
def test_beside_a_thai_set_stands_the_english_one_cut_to_as_many_tokens_and_trained_alike(tmp_path, sets, word):
    make_study(tmp_path, SOME, SOME, sets)
    (verdict,) = (v for v in rule.verdicts(*read(tmp_path)) if v.aspect == "thai_text")
    assert set(verdict.words.values()) == {"helps Thai" + word}
    unlike = [what for what in verdict.missing if "English adapters trained alike (learning_rate is 0.0002" in what]
    assert bool(unlike) == ("learning_rate" in sets["smol-smoltalk"])


def test_answers_without_ratings_are_said_to_be_there(tmp_path):
    _, results = fabricate.study(tmp_path, tasks=("mt_bench_thai",), items=9, lines=2, seeds=(0,))
    for path in results.rglob("*.json"):
        change(path, value=None, ci95=None, judge=None)
        items = path.with_suffix(".items.jsonl")
        write_jsonl(items, *(item | {"value": None} for item in read_jsonl(items)))
    write_report(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "There are answers, and no ratings of them" in text and "คำตอบ 4" in text


def test_training_sets_are_judged_apart(tmp_path):
    fabricate.study(tmp_path, **TEXT)
    fabricate.study(tmp_path, **TEXT | {"dataset": "r1", "depths": (1, 4)})
    made = rule.verdicts(*read(tmp_path))
    compared = [(v.dataset, v.aspect) for v in made if v.words]
    assert compared == [("wangchan", "thai_text"), ("r1", "thai_text")]


# ---------------------------------------------------------------------------------------------------------------- power


def test_what_a_study_can_find_is_simulated_with_the_spreads_that_its_results_have(tmp_path):
    panel = simulate.panel(np.random.default_rng(0), "thai_text", "th", (9,) * 4, (1,) * 4, 1, {}, np.zeros(120))
    spreads = power.measured(panel)
    for name, true in (("item", 0.05), ("run", 0.02), ("seed", 0.01)):  # as tests/simulate.py makes them
        assert getattr(spreads, name) == pytest.approx(true, rel=0.25)
    family = power.Family(power.simulate({"thai_text": spreads}, 5, {"thai_text": 120}, studies=200))
    assert len(family.places) == 3 + 3 + 4  # U, X and F
    margin, place = panel.metric.margin, ("U", "thai_text", 4)
    smallest = family.smallest(place, panel.metric)
    shares = [family.power(place, effect, margin) for effect in (0, smallest / 2, smallest, 2 * smallest)]
    assert shares == sorted(shares) and shares[0] <= 0.02 and 0.8 <= shares[2] <= 0.83


def test_power_is_of_the_items_that_each_quantity_is_tested_on_in_their_clusters():
    """X of exams on Belebele, whose passages have two questions or one, however many exam items U rests on."""
    spreads = {aspect: some[0] for aspect, some in power.ASSUMED.items()}
    for exams in (565, 2733):
        found = power.simulate(spreads, 3, {"thai_text": 500, "thai_exams": exams}, studies=50)
        free = {(quantity, aspect): e.items_free for (quantity, aspect, _), e in found.items()}
        assert free == {("U", "thai_text"): 499, ("X", "thai_text"): 487, ("U", "thai_exams"): exams - 1,
                        ("X", "thai_exams"): 487, ("F", "english"): 499}  # fmt: skip
        s, twice, once = spreads["thai_exams"], 900 - 488, 2 * 488 - 900
        each = (2 * 1.3 * twice + once) / 900**2  # the variance of a mean over questions that spread by 1
        assert found["X", "thai_exams", 4].items.mean() == pytest.approx(4 * s.item**2 * each, rel=0.1)


@pytest.mark.slow
def test_power_is_told_before_anything_is_trained(tmp_path):
    fabricate.study(tmp_path, tasks=("thai_text",), items=60, lines=2)
    printed = write_report(tmp_path, "--power", "--out", str(tmp_path))
    measured, assumed = (
        [line for line in printed.splitlines() if f"({how})" in line] for how in ("measured", "assumed")
    )
    assert len(measured) == len(assumed) == 4 and all("worth (U) " in line for line in measured + assumed)
    assert (tmp_path / "power.png").stat().st_size > 1000 and not (tmp_path / "RESULTS.md").exists()


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
    broken(results / "seed2/exp3a-wangchan-ut2/thai_text-ut1.json", "recursion", "[" * 100_000)
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
    broken(results / "seed3/exp1-wangchan-ut4/thai_text-ut4.json", "stands in the folder of")
    with open(broken(output / "seed0/exp1-wangchan-ut4/metrics.jsonl", "600 MiB"), "wb") as file:
        file.truncate(600 << 20)
    torn = output / "seed1/exp1-wangchan-ut4/metrics.jsonl"
    broken(torn, "1 of 6 lines", torn.read_text() + '{"step": 60, "lo')
    broken(output / "seed2/exp1-wangchan-ut4/metrics.jsonl", "cannot be used: could not convert", '{"step": "x"}\n')
    broken(output / "seed2/exp2-wangchan-ut1/metrics.jsonl", "cannot be used: 'list'", "[]\n")
    broken(output / "seed2/exp3a-wangchan-ut2/config.yaml", "not valid YAML", "a: [")
    broken(output / "seed1/exp3a-wangchan-ut2/config.yaml", "not a whole number", "total_ut_steps: many")
    broken(output / "seed1/exp3b-wangchan-ut3/config.yaml", "arm 'best' is unknown", "arm: best")
    broken(output / "seed2/exp3b-wangchan-ut3/manifest.json", "cannot be used", "{")
    broken(output / "seed2/exp3b-wangchan-ut3/data_report.json", "no object", "[]")
    items = results / "seed2/exp3b-wangchan-ut3/thai_text-ut3.items.jsonl"
    broken(items.with_name("thai_text-ut3.json"), f"{items}: a named pipe")
    pipe = broken(results / "seed2/exp3b-wangchan-ut3/thai_text-ut4.json", "named pipe")
    for file in (items, pipe, broken(output / "seed0/exp3b-wangchan-ut3/metrics.jsonl", "named pipe")):
        file.unlink()
        os.mkfifo(file)  # which would be waited for

    printed = write_report(tmp_path, figures=True)
    page, results_md = (tmp_path / "report.html").read_text(), (tmp_path / "RESULTS.md").read_text()
    listed = results_md[results_md.index("What was left out") :].splitlines()
    for path, why in expected:
        entries = [line for line in listed if line.startswith(f"| {path} |")]
        assert any(why in line.replace("\\", "") for line in entries), (path, why, entries)
        assert str(path) in page
    assert "things left out" in printed and "nan million" not in printed


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
    assert "not comparable yet" in write_report(tmp_path, figures=True)


def test_where_nothing_is_the_folders_that_hold_runs_are_named(tmp_path):
    for name in ("smoke/smoke", "demo/seed0/exp1"):
        write_atomic(tmp_path / name / "config.yaml", f"results_dir: results/{name[:4]}")
    assert report.elsewhere(tmp_path).split("\n  make report ")[1:] == [
        f"OUTPUT_DIR={tmp_path}/{name} RESULTS_DIR=results/{name[:4]}" for name in ("demo", "smoke")
    ]


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to report on: .*output .which is not there. and"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_base_alone_gives_a_report(tmp_path):
    output, results = fabricate.study(tmp_path, tasks=("thai_exam",), seeds=(0,), depths=(1,), items=30, lines=3)
    shutil.rmtree(results / "exp2-wangchan-ut1")
    shutil.rmtree(output)
    assert "0 training runs" in write_report(tmp_path, "--csv", "--latex", figures=True)
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


def test_numbers_of_the_runs_table_are_those_of_the_log(written):
    root, _ = written
    log = read_jsonl(root / "output/seed0/exp1-wangchan-ut4/metrics.jsonl")
    row = next(row for row in table(root, "runs") if row["run"] == "seed0/exp1-wangchan-ut4")
    assert row["hours"] == f"{log[-1]['num_tokens'] / log[-1]['tokens_per_second'] / 3600:.2f}"
    assert (row["final loss"], row["state"]) == (f"{log[-1]['loss']:.4f}", "complete")
    assert row["average loss"] == f"{sum(x['loss'] for x in log) / len(log):.4f}"
    assert (row["model-FLOP use"], row["tokens/s"]) == ("41.0%", "7,500")


def test_gpu_hours_and_flops_count_the_gpus_that_each_part_of_a_run_was_trained_on(tmp_path):
    """Half of the tokens on four H200, as many on one H100, as the run was continued; a step was logged twice."""
    output, _ = fabricate.study(tmp_path, tasks=("thai_text",), items=9, seeds=(0,), depths=(1,), lines=4)
    folder = output / "exp2-wangchan-ut1"
    log = [{"step": step, "loss": 1.0, "num_tokens": step * 10**6, "tokens_per_second": rate, "model_flop_use": use}
           for step, rate, use in ((10, 40000, 0.4), (20, 40000, 0.4), (30, 10000, 0.5), (40, 10000, 0.5))]  # fmt: skip
    write_jsonl(folder / "metrics.jsonl", *log)
    one = {"gpu": "NVIDIA H100", "processes": 1, "gpu_tflops": 560.0}
    lost = {"step": 30, "gpu": "NVIDIA A100", "processes": 8, "gpu_tflops": 250.0}  # its lines were cut off
    change(folder / "manifest.json", processes=4, continued=[lost, one | {"step": 20}])
    reader, _ = read(tmp_path)
    run = reader.runs["exp2-wangchan-ut1"]
    assert run.gpu_hours == pytest.approx((500 * 4 + 2000) / 3600)
    assert run.flops({}) == pytest.approx(500 * 0.4 * 4 * 700e12 + 2000 * 0.5 * 560e12)
    (row,) = tables.cost_rows(reader.runs.values(), reader.results)
    assert row["device"] == "NVIDIA H100, NVIDIA H200" and row["GPU-hours"][1] == "1.11"
    del one["gpu_tflops"]  # as before it was recorded: half of the tokens are known
    change(folder / "manifest.json", continued=[one | {"step": 20}])
    assert read(tmp_path)[0].runs[run.name].flops({}) == pytest.approx(2 * 500 * 0.4 * 4 * 700e12)
    change(folder / "manifest.json", continued=[one | {"step": 20, "gpu": "NVIDIA H200"}])  # the start's rate
    assert read(tmp_path)[0].runs[run.name].flops({}) == pytest.approx((500 * 0.4 * 4 + 2000 * 0.5) * 700e12)


def test_each_caption_says_benchmark_items_and_unit_and_of_english_a_change_is_told(written):
    text = (written[0] / "RESULTS.md").read_text()
    captions = re.findall(r"^.* Of: .*$", text, re.MULTILINE)
    assert len(captions) == text.count("![") == 8
    assert all("items" in caption or "12 runs" in caption for caption in captions)
    assert "thai_exam, 60 items, points" in captions[0] and "mt_bench_thai, 60 items, rating, 1 to 10" in text
    assert "Change by depth: english_text" in text and "Gain by depth: thai_text" in text


def test_the_tables_of_gains_and_of_the_chain_behind_the_words_are_filled(written):
    rows = table(written[0], "gains")
    assert len(rows) == 16 and all(cell != "–" for row in rows for cell in row.values())
    for row in table(written[0], "tests"):
        empty = {name for name, cell in row.items() if cell == "–"}
        assert empty == (set() if row["word"] == "undecided" else {"found 4 times in 5"})
    chain = write_report(written[0], "--explain").partition("The chain behind each word")[2]
    assert chain.count("p in the family") == 13 and "seeds 3, 3" in chain


def test_both_benchmarks_of_exams_are_one_with_each_exam_a_stratum(tmp_path):
    how = {"lines": 2, "gains": {"thai_exam": (0, 0, 0, 0.3), "m3exam": (0, 0, 0, 0.1)}, "depths": (1, 4)}
    fabricate.study(tmp_path, tasks=("thai_exam",), items=100, **how)
    fabricate.study(tmp_path, tasks=("m3exam",), items=300, **how)
    write_report(tmp_path, "--csv")
    told = verdicts(tmp_path)["thai_exams"]
    assert "thai_exam and m3exam, 400 items in 400 clusters" in told["rests"]
    rows = {(row["benchmark"], row["trained at"], row["read at"]): row for row in table(tmp_path, "benchmarks")}
    for depth in ("1", "4"):
        one, other, both = (
            float(rows[task, depth, depth]["value"].split()[0])
            for task in ("thai_exam", "m3exam", "thai_exam and m3exam")
        )
        assert both == pytest.approx((one + 3 * other) / 4, abs=0.11)
    _, found = read(tmp_path)
    panel = found[Key("thai_exam and m3exam", "wangchan")]
    assert panel.cells[4, 4].free == 400 - 4 and sum(p.study["primary"] for p in found.values()) == 1
    next((tmp_path / "results/seed1/exp1-wangchan-ut4").glob("m3exam-ut4.json")).unlink()
    reader, found = read(tmp_path)
    assert found[Key("thai_exam", "wangchan")].study["primary"] and len(found) == 2
    (note,) = reader.left_out
    assert note[1].startswith("not pooled: seed1/exp1-wangchan-ut4: scored on one")


def test_an_exams_interval_stays_between_0_and_100_and_a_single_item_has_none(tmp_path):
    levels = {"thai_exam": (0.99, 0.01, 0.5, 0.3)}
    fabricate.study(tmp_path, tasks=("thai_exam",), levels=levels, items=12, lines=2)
    write_report(tmp_path, "--csv", figures=True)
    found = [re.findall(r"[\d.]+", row["value"]) for row in table(tmp_path, "benchmarks")]
    for value, low, high in (map(float, numbers) for numbers in found):
        assert 0 <= low <= value <= high <= 100 and low < high
    drawn = {path.stem for path in (tmp_path / "results/report").glob("*.png")}
    assert drawn == {"learning"}, "so few items are no figure"
    fabricate.study(tmp_path / "one", tasks=("thai_exam",), items=1, lines=2)
    write_report(tmp_path / "one", "--csv", figures=True)
    text = (tmp_path / "one/RESULTS.md").read_text()
    assert "nan" not in text and "inf" not in text.replace("inference", "").replace("information", "")
    assert set(verdicts(tmp_path / "one")["thai_exams"]["words"].values()) == {"provisional"}


def test_the_held_out_loss_is_drawn_by_loop_beside_the_bases(written):
    reader, found = read(written[0])
    figure = plots.draw(reader.runs, found, rule.verdicts(reader, found))["levels"]
    axis = next(axis for axis in figure.axes if axis.get_legend().get_title().get_text() == "held-out training rows")
    base, *adapted = (list(line.get_ydata()) for line in axis.lines)
    assert base == [1.5, 1.3, 1.25, 1.2] and [len(losses) for losses in adapted] == [1, 2, 3, 4]
    np.testing.assert_allclose(adapted[-1], [0.9, 0.7, 0.65, 0.64])


def test_the_held_out_loss_of_another_arm_or_of_an_unfinished_run_is_not_drawn(tmp_path):
    """As control (answers of other rows) and rates (development rows) would pull mean and base away."""
    how = TEXT | {"depths": (1, 4)}
    output, _ = fabricate.study(tmp_path, **how)
    for arm in ("control", "rates", "unfinished"):
        settings = dict.fromkeys((1, 4), {"arm": arm} if arm != "unfinished" else {})
        fabricate.study(tmp_path, **how, suffix=f"-{arm}", settings=settings)
        for folder in output.glob(f"seed*/*-{arm}"):
            depth = int(folder.name.partition("ut")[2][0])
            write_jsonl(folder / "metrics.jsonl", {"step": 10, "loss": 1, "held_out_loss": [5.0] * depth})
            change(folder / "manifest.json", base_held_out_loss=[9.0] * depth)
            if arm == "unfinished":
                (folder / "completed").unlink()
    reader, found = read(tmp_path)
    figure = plots.draw(reader.runs, found, rule.verdicts(reader, found))["levels"]
    base, *adapted = (list(line.get_ydata()) for line in figure.axes[-1].lines)
    assert base == [1.5, 1.3, 1.25, 1.2] and [len(losses) for losses in adapted] == [1, 4]
    np.testing.assert_allclose(adapted[-1], [0.9, 0.7, 0.65, 0.64])


def test_latex_is_escaped_and_the_terminal_ends_with_the_verdict_and_the_paths(written):
    root, printed = written
    text = (root / "results" / "report" / "runs.tex").read_text()
    assert r"41.0\%" in text and text.count(r"\begin{tabular}") == 1 and "_" not in text.replace(r"\_", "")
    assert "Thai text, " in printed and "English retention, " in printed
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
