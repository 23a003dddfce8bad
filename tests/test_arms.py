"""The arms of the study: as many tokens of another set, answers of other rows, development rows, learning rates that
are chosen among runs, and the parts of the study that a sweep submits."""

import io
import re
from functools import partial
from pathlib import Path

import train_qlora
from ouro import settings
from ouro.cluster import sweep
from ouro.data.report import BEYOND, print_report
from ouro.files import UserError, read_yaml
from ouro.settings import Settings, resolve

import numpy as np
import pytest
from helpers import write_jsonl
from training_sets import ROW, UNBOUNDED, prepare_set, questions, texts, trained_texts, turns, write

pytestmark = pytest.mark.usefixtures("in_the_repository")
EXPERIMENTS = read_yaml(settings.EXPERIMENTS)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    return partial(prepare_set, tmp_path, tokenizer=tokenizer, **UNBOUNDED)


def thai(number: int) -> list[dict]:
    return [ROW | {"Instruction": q, "Output": f"คำตอบที่ {i} ค่ะ"} for i, q in enumerate(questions(number))]


def english(number: int) -> dict[str, list[dict]]:
    chats = [{"messages": turns(f"question {i}", "word " * (i % 7 + 5)), "source": "x"} for i in range(number)]
    return {"data/train-00000-of-00001.parquet": chats, "data/test-00000-of-00001.parquet": chats[:1]}


# ------------------------------------------------------------------------------------------------ as many tokens


def test_a_set_is_cut_to_so_many_tokens_in_whole_rows_evenly_spaced(prepared, tokenizer):
    whole, rows = prepared("wangchan", thai(400)), thai(400)
    budget = whole[1]["tokens"] // 4
    cut, report = prepared("wangchan", rows, max_tokens=str(budget))
    longest = whole[0].lengths.max()
    assert budget - longest < report["tokens"] <= budget and report["tokens"] == cut.lengths.sum()
    assert set(texts(cut, tokenizer)) < set(texts(whole[0], tokenizer)), "each row is whole"
    places = [int(cut.place(i).split()[-1]) for i in range(len(cut))]
    quarters = np.histogram(places, bins=4, range=(1, 401))[0]
    assert quarters.max() - quarters.min() <= 3
    assert report["rows_dropped"] == {BEYOND: 400 - len(cut)} and report["rows_in"] == 400
    again, _ = prepared("wangchan", rows, max_tokens=str(budget))
    assert texts(again, tokenizer) == texts(cut, tokenizer)


def test_a_set_is_cut_to_as_many_tokens_as_another_and_the_report_says_so(prepared, tmp_path, tokenizer, capsys):
    write(tmp_path / "thai.jsonl", thai(40))
    _, other = prepared("wangchan", thai(40))
    _, report = prepared("smol-smoltalk", english(600), max_tokens="wangchan",
                         paths={"wangchan": str(tmp_path / "thai.jsonl")})  # fmt: skip
    assert report["max_tokens"] == other["tokens"] and other["max_tokens"] is None
    assert other["tokens"] - 100 < report["tokens"] <= other["tokens"]
    print_report(report)
    said = capsys.readouterr().out
    assert f"to {other['tokens']:,} tokens (max_tokens = wangchan), rows evenly spaced" in said
    assert f"dropped: {BEYOND}" in said and report["language"] == "en" and "answers " in said


@pytest.mark.parametrize(
    ("max_tokens", "told"),
    [("wangchan", "wangchan is the training set itself"),
     ("wangchn", "unknown dataset 'wangchn'; did you mean 'wangchan'"),
     ("1000000", r"has [\d,]+ tokens to train on, and max_tokens = 1000000 asks for 1,000,000: name a larger set")],
)  # fmt: skip
def test_tokens_that_are_not_there_are_refused(prepared, max_tokens, told):
    with pytest.raises(UserError, match=told):
        prepared("wangchan", thai(20), max_tokens=max_tokens)


# ------------------------------------------------------------------------------------------------ controls, development


def test_shuffled_answers_are_each_another_rows_and_always_the_same(prepared, tokenizer, capsys):
    rows = thai(50)
    plain, _ = prepared("wangchan", rows)
    shuffled, report = prepared("wangchan", rows, shuffle_answers=True)
    own, others = trained_texts(plain, tokenizer), trained_texts(shuffled, tokenizer)
    assert sorted(own) == sorted(others) and not any(a == b for a, b in zip(own, others, strict=True))
    asked = [[text.replace(answer, "") for text, answer in zip(texts(r, tokenizer), trained_texts(r, tokenizer),
              strict=True)] for r in (plain, shuffled)]  # fmt: skip
    assert asked[0] == asked[1], "the questions stay"
    again, _ = prepared("wangchan", rows, shuffle_answers=True, seed=7)
    assert texts(again, tokenizer) == texts(shuffled, tokenizer)
    print_report(report)
    assert "control          each question has the answer of another row" in capsys.readouterr().out
    few, _ = prepared("wangchan", rows, shuffle_answers=True, max_tokens=str(int(shuffled.lengths.sum()) // 2))
    assert {few.place(0), few.place(len(few) - 1)} <= {plain.place(n) for n in (0, 1, 48, 49)}, "evenly spaced"
    with pytest.raises(UserError, match="line 1: shuffle_answers is for sets of one question and one answer a row"):
        prepared("chat", [{"messages": turns("a", "b", "c", "d")}], shuffle_answers=True)


def test_development_rows_are_held_out_of_training_and_no_test_row_is_among_them(prepared, tokenizer, monkeypatch):
    files = {"train.jsonl": thai(500), "test.jsonl": [ROW | {"Instruction": "ข้อสอบ"}]}
    both = prepared("wangchan", files)
    train, report = prepared("wangchan", files, development=True)
    held, _ = prepared("wangchan", files, split="development", development=True)
    assert sorted(texts(train, tokenizer) + texts(held, tokenizer)) == sorted(texts(both[0], tokenizer))
    assert 3 <= len(held) <= 25 and report["rows_dropped"] == {"held out for development": len(held)}

    asked = []
    monkeypatch.setattr(train_qlora, "prepare", lambda s, _, split, **__: (asked.append(split), (held, {}))[1])
    for development in (True, False):
        train_qlora.held_out_rows(Settings(development=development), tokenizer)
    assert asked == ["development", "held_out"]


# ------------------------------------------------------------------------------------------------ tuned learning rates


def rates(output: Path, losses: dict[str, float], depth: int = 2, seed: str = "seed0", **changes) -> None:
    """Complete runs of the arm `rates` at a depth, by the factor of the learning rate."""
    for factor, loss in losses.items():
        name = f"exp9-rates-x{factor}-ut{depth}"
        folder = output / seed / name
        folder.mkdir(parents=True)
        run = resolve("", ["--exp", name, *(f"--{key}={value}" for key, value in changes.items())])
        (folder / "config.yaml").write_text(run.as_yaml(), encoding="utf-8")
        log = [{"step": 1}, {"step": 2, "held_out_loss": [9.0, loss + 1]}, {"step": 3, "held_out_loss": [9.0, loss]}]
        write_jsonl(folder / "metrics.jsonl", *log)
        (folder / "completed").write_text("{}", encoding="utf-8")


LOSSES = {"0.25": 1.5, "0.5": 1.2, "1": 1.3, "2": 1.4, "4": 1.6}
TUNED = ["--exp", "exp10b-tuned-ut2", "--output_dir"]


@pytest.mark.parametrize("place", ["", "seed3"])
def test_tuned_is_the_rate_with_the_smallest_held_out_loss_and_its_origin_says_among_what(tmp_path, place):
    rates(tmp_path, LOSSES)
    run = resolve("", [*TUNED, str(tmp_path / place)])
    assert run.settings.learning_rate == 1e-4 and run.settings.arm == "tuned"
    (line,) = [line for line in run.as_yaml().splitlines() if line.startswith("learning_rate")]
    tried = "x0.25-ut2 at 5e-05: 1.5000, exp9-rates-x0.5-ut2 at 0.0001: 1.2000, exp9-rates-x1-ut2 at 0.0002: 1.3000"
    assert line.startswith(f"learning_rate: 0.0001  # tuned, by the held-out loss of exp9-rates-{tried}")
    (tmp_path / "again.yaml").write_text(run.as_yaml(), encoding="utf-8")
    assert resolve("", ["--config", str(tmp_path / "again.yaml")]).settings == run.settings
    rates(tmp_path, {"1": 0.7}, seed="seed1")  # with it the mean of x1 is the smallest
    assert resolve("", [*TUNED, str(tmp_path)]).settings.learning_rate == 2e-4


def test_tuned_is_refused_in_one_sentence_while_the_sweep_is_missing_or_was_trained_otherwise(tmp_path):
    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as error:
            resolve("", [*TUNED, str(tmp_path), *argv])
        return str(error.value)

    rates(tmp_path, LOSSES, depth=3)
    assert re.fullmatch("learning_rate: tuned takes the best of the arm `rates` on wangchan with .*, "
                        "exp9-rates-x4-ut2: make cluster-sweep STUDY=rates", refused())  # fmt: skip
    rates(tmp_path, LOSSES | {"4": 0.1})
    (tmp_path / "seed0/exp9-rates-x4-ut2/completed").unlink()
    assert "there is no completed exp9-rates-x4-ut2: make" in refused()
    assert "there is no completed run of it" in refused("--dataset", "r1")
    what_trains_nothing = resolve("", [*TUNED, str(tmp_path)], several=True)
    assert what_trains_nothing.settings.learning_rate == 2e-4
    log = tmp_path / "seed0/exp9-rates-x2-ut2/metrics.jsonl"
    kept = log.read_text()
    log.write_text('{"step": 1}\n')
    assert f"{log.parent} was trained without a held-out loss (eval_steps = 100): train it" in refused()
    log.write_text(kept)
    rates(tmp_path, LOSSES, seed="seed1", lora_dropout=0)
    assert "exp9-rates-x0.25-ut2 was trained with lora_dropout = 0.0, and this run has 0.05" in refused()


# ------------------------------------------------------------------------------------------------ parts of the study


@pytest.mark.parametrize("name", read_yaml(settings.STUDIES))
def test_the_parts_of_the_study_name_experiments_of_their_arm(name):
    exps, seeds, evaluated = sweep.study_of(name)
    study = read_yaml(settings.STUDIES)[name]
    assert {EXPERIMENTS[exp].get("arm", "equal-tokens") for exp in exps} == {study.get("arm", "equal-tokens")}
    assert {EXPERIMENTS[exp]["total_ut_steps"] for exp in exps} >= {1, 4} and len(set(exps)) == len(exps)
    assert seeds and set(seeds) <= set("012") and evaluated == (name != "rates")


def test_a_part_of_the_study_is_planned_with_its_own_seeds_and_the_hours_of_all_its_gpus(tmp_path, monkeypatch, capsys):
    for name, value in {"GPU_TYPE": "H100", "TIME": "24:00:00", "GRACE": "300"}.items():
        monkeypatch.setenv(name, value)

    def lines(*argv: str) -> list[list[str]]:
        argv = ["sweep.py", "--processes", "2", "--output_dir", str(tmp_path), "--use_qlora", "false", *argv]
        monkeypatch.setattr("sys.argv", argv)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        sweep.main()
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    *jobs, total = lines("--study", "english")
    names = [f"exp6{letter}-english-ut{k}-seed{seed}" for letter, k in (("a", 1), ("d", 4)) for seed in range(3)]
    assert [job[1] for job in jobs] == [job for name in names for job in (name, f"{name}-eval")] + ["report"]
    hours = sum(float(job[5].removeprefix("about ").split(",")[0]) for job in jobs if job[0] == "train")
    told = re.fullmatch(r"about ([\d,.]+) GPU-hours of training", total[-1])
    assert total[0] == "total" and float(told[1].replace(",", "")) == pytest.approx(2 * hours, abs=0.8)
    *jobs, _ = lines("--study", "rates", "--seeds", "5")
    assert {job[0] for job in jobs} == {"train"} and len(jobs) == 20 and all(job[1].endswith("seed5") for job in jobs)
    with pytest.raises(UserError, match="unknown part of the study 'englsh'; did you mean 'english'"):
        lines("--study", "englsh")
