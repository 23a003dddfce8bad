"""Scoring: every depth and option from one pass equals every option run alone; results are kept, repeated, refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import evaluate
from evaluate import parse_depths
from ouro.evaluate import benchmarks, results, subjects, tables, tasks
from ouro.evaluate.scoring import encode, plan_rows, score
from ouro.evaluate.tasks import load_task
from ouro.files import UserError, write_atomic
from ouro.model import loading
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.model.modeling_ouro import exit_distribution
from ouro.settings import Settings, resolve

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from local_hub import LocalHub, Scripts, copy_project, write
from safetensors.torch import load_file, save, save_file
from tiny_ouro import tiny, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
PATHS = {
    "thai_exam": str(ROOT / "sample/thai_exam"),
    "thai_text": str(ROOT / "sample/texts/thai.jsonl"),
    "english_text": str(ROOT / "sample/texts/english.jsonl"),
}
SETTINGS = Settings(paths=PATHS)


@pytest.fixture(scope="module")
def model():
    return load_ouro(str(ROOT / "sample/ouro-tiny"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(ROOT / "sample/ouro-tiny"))


@torch.no_grad()
def alone(model, ids: list[int], start: int, depth: int) -> float:
    """The log-probability of one sequence's end from a pass of its own through `depth` loops."""
    log_p = model(torch.tensor([ids]), total_ut_steps=depth).logits.log_softmax(-1)[0]
    return sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))


def brute_force(model, sequences, depths) -> np.ndarray:
    return np.array([[alone(model, ids, start, depth) for ids, start in sequences] for depth in depths])


def tree(seed: int) -> list[tuple[list[int], int]]:
    """Sequences that begin alike in all ways: equal, one the start of another, parted at every place."""
    draw = np.random.default_rng(seed)
    stems = [tokens(int(n), seed=seed + i).tolist() for i, n in enumerate(draw.integers(2, 40, 4))]
    made = []
    for _ in range(14):
        stem = stems[draw.integers(4)]
        cut = int(draw.integers(1, len(stem) + 1))
        ids = stem[:cut] + tokens(int(draw.integers(1, 12)), seed=int(draw.integers(5))).tolist()
        made.append((ids, int(draw.integers(1, len(ids)))))
    return [*made, made[0], (made[1][0], 1)]


@pytest.mark.parametrize("seed", [0, 1])
def test_shared_beginnings_change_no_score(seed):
    model, sequences = tiny(seed=seed), tree(seed)
    rows = plan_rows(sequences, share=True)
    assert sum(len(row.tokens) for row in rows) < 0.8 * sum(len(ids) - 1 for ids, _ in sequences)
    assert not all(row.is_line for row in rows)
    for budget in (64, 100_000):
        scores = score(model, sequences, [1, 3], budget)
        np.testing.assert_allclose(scores.log_p, brute_force(model, sequences, [1, 3]), atol=1e-10)


@pytest.mark.parametrize("name", ["thai_exam", "thai_exam-helm", "thai_exam-leaderboard"])
def test_real_items_score_as_every_option_run_alone(model, tokenizer, name):
    task = load_task(name, SETTINGS, 1, [])
    questions = task.prompts[0][:2] + task.prompts[1][:1]
    sequences, cut = encode(tokenizer, questions)
    scores, expected = score(model, sequences, [1, 4], 4096), brute_force(model, sequences, [1, 4])
    assert cut == 0
    np.testing.assert_allclose(scores.log_p, expected, atol=1e-4 * 8, rtol=1e-4)


def test_batches_and_padding_change_no_prediction(model, tokenizer):
    task = load_task("thai_exam", SETTINGS, 1, [])
    task.items, task.prompts = task.items[:3], task.prompts[:3]
    found = []
    for budget in (1, 4000):
        outcomes, scores, _ = tasks.score_choices(model, tokenizer, task, [1, 4], budget, None, "test")
        found.append(([[line["prediction"] for line in o.lines] for o in outcomes], scores))
    for predictions, scores in found[1:]:
        assert predictions == found[0][0]
        np.testing.assert_allclose(scores.log_p, found[0][1].log_p, atol=2e-4)
        np.testing.assert_allclose(sum(scores.exits, []), sum(found[0][1].exits, []), atol=1e-6)
        assert scores.distances == pytest.approx(found[0][1].distances, rel=1e-5)


@torch.no_grad()
def test_exits_and_distances_are_means_over_the_tokens_that_are_read():
    model = tiny()
    rows = [tokens(9, seed=1).tolist(), tokens(5, seed=2).tolist()]
    scores = score(model, [(ids, 1) for ids in rows], [1, 3], 1000)
    outs = [model(torch.tensor([ids[:-1]]), output_loops=True, total_ut_steps=3) for ids in rows]
    for got, depth in zip(scores.exits, [1, 3], strict=True):
        every = torch.cat([exit_distribution(out.gate_logits[:depth])[:, 0] for out in outs], 1)
        assert got == pytest.approx(every.mean(1).tolist()) and sum(got) == pytest.approx(1)
    for loop in (1, 2):
        change = [(h[loop] - h[loop - 1]).norm(dim=-1) / h[loop - 1].norm(dim=-1)
                  for h in (out.loop_hidden_states for out in outs)]  # fmt: skip
        assert scores.distances[loop - 1] == pytest.approx(torch.cat(change, 1).mean().item(), rel=1e-5)


def test_no_position_that_is_not_asked_for_goes_through_the_head(model, tokenizer):
    task, seen = load_task("thai_exam-leaderboard", SETTINGS, 1, []), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        sequences, _ = encode(tokenizer, [question for item in task.prompts for question in item])
        score(model, sequences, [1, 2], 50_000)
    finally:
        hook.remove()
    assert seen == [5, 5], "one position an item, at each depth"


def test_a_text_is_scored_once_a_token_whatever_the_window(model, tokenizer):
    task = load_task("thai_text", SETTINGS, 2, [])
    long = task.items[0]["text"]
    ids = [0, *tokenizer(long, add_special_tokens=False).input_ids]
    expected = -alone(model, ids, 1, 2) / math.log(2)
    outcome = tasks.score_texts(model, tokenizer, task, [2], 4096, None, "test")[0][0]
    assert outcome.lines[0]["bits"] == pytest.approx(expected, rel=1e-5)
    assert outcome.lines[0]["characters"] == len(long)
    total = sum(line["bits"] for line in outcome.lines) / sum(line["characters"] for line in outcome.lines)
    assert outcome.numbers["value"] == pytest.approx(total)
    task.spec = task.spec | {"window": 32, "stride": 16}
    short = tasks.score_texts(model, tokenizer, task, [2], 4096, None, "test")[0][0].lines[0]["bits"]
    assert short != pytest.approx(expected, rel=1e-9) and short == pytest.approx(expected, rel=0.2)


WORDS, ASKED = [f"w{n}" for n in range(40)], [f"q{n}" for n in range(80)]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of whole words: of "a." and "w7" as of the prompt's own."""
    known = ["<end>", "คำถาม:", "ตัวเลือก:", "คำตอบ:", *"abcde", *(f"{letter}." for letter in "abcde"), *WORDS, *ASKED]
    whole = Tokenizer(WordLevel({word: n for n, word in enumerate(known)}, unk_token="<end>"))
    whole.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="<end>")


def many_items(count: int, seed: int) -> list[dict]:
    draw = np.random.default_rng(seed)
    return [
        {"id": f"x-{n}", "subset": "x", "question": ASKED[n % len(ASKED)], "gold": "abc"[draw.integers(3)],
         "options": dict(zip("abcde", draw.choice(WORDS, 5, replace=False).tolist(), strict=True))}
        for n in range(count)
    ]  # fmt: skip


def taught(words, answers) -> LlamaForCausalLM:
    """A small dense model that has learned `answers(step)`, pairs of a prompt and the word after it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(600):
        ids = torch.tensor(words([prompt + answer for prompt, answer in answers(step)]).input_ids)
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, -2], ids[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            return model.eval()
    raise AssertionError(f"it has not learned: {loss}")


def planted(name: str, items: list[dict]) -> benchmarks.Task:
    spec = benchmarks.table()["tasks"][name]
    return benchmarks.Task(
        name, spec, items, [benchmarks.item_prompts(item, spec) for item in items], {"revision": None}
    )


def numbers_of(model, words, task) -> dict:
    return tasks.score_choices(model, words, task, [1], 8192, None, "test")[0][0].numbers


@pytest.mark.parametrize("favourite", ["a", "c", "e"])
def test_a_model_that_prefers_a_letter_is_at_chance(words, in_the_repository, favourite):
    """It answers with the text that stands at its letter, whatever is asked; golds are a, b and c alone."""

    def answers(step: int) -> list[tuple[str, str]]:
        task = planted("thai_exam", many_items(48, 1000 + step))
        return [
            (prompts[0][0], f" {i['options'][favourite]}") for i, prompts in zip(task.items, task.prompts, strict=True)
        ]

    model, items = taught(words, answers), many_items(600, 1)
    once = planted("thai_exam", items)
    once.prompts = [prompts[:1] for prompts in once.prompts]
    assert numbers_of(model, words, once)["predicted"][favourite] > 590, "asked in one order, it answers that letter"
    numbers = numbers_of(model, words, planted("thai_exam", items))
    low, high = benchmarks.wilson(600 * numbers["value"], 600, z=3.29)  # 99.9 %: three models are looked at
    assert low < 0.2 < high
    assert all(80 < count < 160 for count in numbers["predicted"].values()), numbers["predicted"]


def test_a_model_that_says_one_letter_is_seen_where_letters_are_scored(words, in_the_repository):
    def answers(step: int) -> list[tuple[str, str]]:
        return [(prompts[0][0], " b") for prompts in planted("thai_exam-leaderboard", many_items(32, step)).prompts]

    task = planted("thai_exam-leaderboard", many_items(100, 1))
    numbers = numbers_of(taught(words, answers), words, task)
    assert numbers["predicted"] == {"b": 100}
    assert numbers["value"] == sum(item["gold"] == "b" for item in task.items) / 100


def test_a_model_that_knows_half_of_the_answers_scores_half(words, in_the_repository):
    items = many_items(80, 1)  # each question once
    known = {i["question"]: i["options"][i["gold"] if n % 2 else "e"] for n, i in enumerate(items)}
    task = planted("thai_exam", items)

    def answers(step: int) -> list[tuple[str, str]]:
        pairs = zip(items, task.prompts, strict=True)
        return [(prompts[step % 5][0], f" {known[item['question']]}") for item, prompts in pairs]

    numbers = numbers_of(taught(words, answers), words, task)
    assert numbers["value"] == 0.5 and numbers["predicted"]["e"] == 40


# ----------------------------------------------------------------------------------------------------------------------
# Runs: from the command to the files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs of experiments at 1 and 2 loops and one of a seed, as train_qlora.py leaves them."""
    from ouro.model.modeling_ouro import PROJECTIONS

    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("runs")
    for n, name in enumerate(("exp2-wangchan-ut1", "exp3a-wangchan-ut2", "seed7/exp2-wangchan-ut1")):
        exp = name.rpartition("/")[2]
        argv = ["--config", str(ROOT / "tests/smoke.yaml"), "--exp", exp, "--r", "2", "--use_qlora", "false"]
        run = resolve("", [*argv, "--seed", "7" if "/" in name else "42", "--model_name_or_path", MODEL])
        folder = place / "output" / name
        base = load_ouro(MODEL, dtype=torch.float32)
        torch.manual_seed(n)
        adapter = get_peft_model(
            base,
            LoraConfig(r=2, lora_alpha=32, lora_dropout=0.3, target_modules=PROJECTIONS, init_lora_weights=False),
        )
        adapter.save_pretrained(folder / "final_adapter")
        write_atomic(folder / "config.yaml", run.as_yaml())
        write_atomic(folder / "data_report.json", "{}")
        line = {"step": 1, "num_tokens": 9, "tokens_per_second": 3.0, "loss": 7.0, "mean_token_accuracy": 0.1}
        write_atomic(folder / "metrics.jsonl", json.dumps(line) + "\n")
        write_atomic(folder / "completed", "{}")
    return place


MODEL = str(ROOT / "sample/ouro-tiny")
EXPS = "exp2-wangchan-ut1,exp3a-wangchan-ut2,seed7/exp2-wangchan-ut1"


def command(place: Path, *argv: str) -> list[str]:
    return ["--config", str(ROOT / "tests/smoke.yaml"), "--output_dir", str(place / "output"), "--results_dir",
            str(place / "results"), "--model_name_or_path", MODEL, "--use_qlora", "false", "--limit", "1",
            "--ut_steps", "1,2", "--paths", ",".join(f"{k}={v}" for k, v in PATHS.items()), *argv]  # fmt: skip


def evaluated(place: Path, *argv: str) -> Path:
    evaluate.evaluate(resolve("", command(place, *argv), evaluate.options, several=True))
    return place / "results"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("[!.]*-ut*.json*"))}


@pytest.fixture(scope="module")
def study(trained):
    evaluated(trained, "--exp", EXPS, "--tasks", "thai_exam-leaderboard,english_text")
    return trained


def test_several_runs_share_one_base_and_every_file_is_there(study):
    names = set(contents(study / "results"))
    runs = ("base-fp32", "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "seed7/exp2-wangchan-ut1")
    tasks = ("thai_exam-leaderboard", "english_text")
    assert names == {
        f"{r}/{t}-ut{k}{s}" for r in runs for t in tasks for k in (1, 2) for s in (".json", ".items.jsonl")
    }
    assert all((study / "results" / run / "manifest.json").exists() for run in runs)


def test_a_result_says_what_it_is_of(study):
    file = study / "results/seed7/exp2-wangchan-ut1/thai_exam-leaderboard-ut2.json"
    whole = json.loads(file.read_text())
    s = whole["study"]
    assert (s["run"], s["kind"], s["experiment"], s["seed"]) == (
        "seed7/exp2-wangchan-ut1", "adapter", "exp2-wangchan-ut1", 7
    )  # fmt: skip
    assert (s["dataset"], s["loss"], s["trained_ut_steps"], s["total_ut_steps"]) == ("wangchan", "last", 1, 2)
    assert (s["task"], s["benchmark"], s["protocol"], s["aspect"], s["primary"]) == (
        "thai_exam-leaderboard", "thai_exam", "leaderboard", "thai_exams", False
    )  # fmt: skip
    assert s["metric"] == "accuracy" and s["items"] == 5 and s["limit"] == 1 and s["precision"] == "fp32"
    assert len(s["exit_distribution"]) == 2 and len(s["state_distance"]) == 1 and len(s["adapter_sha256"]) == 64
    assert list(s["subsets"]) == ["onet", "ic", "tgat", "tpat1", "a_level"]
    lines = [json.loads(x) for x in file.with_suffix(".items.jsonl").read_text().splitlines()]
    assert [x["id"] for x in lines] == [f"{x}-1" for x in s["subsets"]]
    assert s["value"] == sum(x["value"] for x in lines) / 5
    assert whole["results"]["thai_exam-leaderboard"]["acc,none"] == s["value"]
    base = json.loads((study / "results/base-fp32/english_text-ut1.json").read_text())["study"]
    assert base["kind"] == "base" and base["experiment"] is base["seed"] is base["adapter_sha256"] is None
    assert base["metric"] == "bits_per_character" and base["state_distance"] == [] and base["primary"]
    layer = 4 * 128 * 128 + 3 * 128 * 384
    assert base["inference_flops_per_token"] == 2 * (4 * layer + 128 * 1024)


def test_a_repeated_command_computes_nothing_and_a_changed_one_what_changed(study, capsys, monkeypatch, tmp_path):
    argv = ["--exp", EXPS, "--tasks", "thai_exam-leaderboard,english_text"]
    before = contents(study / "results")
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_ouro", lambda *a, **k: pytest.fail("the model is loaded"))
        evaluated(study, *argv)
    printed = capsys.readouterr().out
    assert printed.count("2 of 2 tasks are complete already") == 4 and contents(study / "results") == before
    assert "by loops in training (rows) and in the test" in printed

    place = tmp_path / "copy"
    shutil.copytree(study, place)
    file = place / "output/exp3a-wangchan-ut2/final_adapter/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: w * 1.5 for name, w in weights.items()}, file)
    evaluated(place, *argv)
    changed = {name for name, data in contents(place / "results").items() if data != before[name]}
    assert changed and {name.split("/")[0] for name in changed} == {"exp3a-wangchan-ut2"}
    (place / "results/base-fp32/english_text-ut1.json").write_text("{")  # half a file is none
    evaluated(place, *argv)
    assert contents(place / "results")["base-fp32/english_text-ut1.json"] == before["base-fp32/english_text-ut1.json"]

    text = (ROOT / "configs/evals.yaml").read_text()
    table = tmp_path / "evals.yaml"
    table.write_text(
        text.replace("Question: {question}", "Q: {question}").replace("คำถาม: {question}", "ถาม: {question}")
    )
    monkeypatch.setattr(benchmarks, "EVALS", table)
    evaluated(place, *argv)
    changed = {
        name for name, data in contents(place / "results").items() if "base-fp32" in name and data != before[name]
    }
    assert {name.split("/")[1].split("-ut")[0] for name in changed} == {"thai_exam-leaderboard"}


def rows_after(printed: str, title: str) -> list[list[str]]:
    return [line.split() for line in printed[printed.index(title) :].partition("\n\n")[0].splitlines()[1:]]


def test_the_matrix_has_the_means_over_seeds_that_the_files_have(study, capsys):
    capsys.readouterr()
    evaluated(study, "--exp", EXPS, "--tasks", "thai_exam-leaderboard,english_text")
    printed = capsys.readouterr().out
    rows = {"base": ["base-fp32"], "wangchan 1": ["exp2-wangchan-ut1", "seed7/exp2-wangchan-ut1"],
            "wangchan 2": ["exp3a-wangchan-ut2"]}  # fmt: skip
    for task, form in (("thai_exam-leaderboard", ".1%"), ("english_text", ".4f")):
        found = rows_after(printed, f"{task} by loops in training (rows) and in the test")
        assert found[0] == ["1", "2"]
        for line, (name, runs) in zip(found[1:4], rows.items(), strict=True):
            files = [[study / "results" / run / f"{task}-ut{depth}.json" for run in runs] for depth in (1, 2)]
            means = [np.mean([json.loads(f.read_text())["study"]["value"] for f in cell]) for cell in files]
            assert line == [*name.split(), *(format(mean, form) for mean in means)]


def test_where_nothing_is_rated_the_matrix_has_no_numbers(study, tmp_path, capsys):
    shutil.copytree(study / "output", tmp_path / "output")
    paths = f"mt_bench_thai={ROOT / 'sample/mt_bench_thai'}"
    evaluated(tmp_path, "--exp", EXPS, "--tasks", "mt_bench_thai", "--judge", "none", "--max_new_tokens", "2",
              "--paths", paths)  # fmt: skip
    found = rows_after(capsys.readouterr().out, "mt_bench_thai by loops in training (rows) and in the test")
    assert found[1:4] == [["base", "-", "-"], ["wangchan", "1", "-", "-"], ["wangchan", "2", "-", "-"]]


def test_each_exam_is_printed_with_its_own_chance_and_commonest_letter(study, capsys):
    capsys.readouterr()
    evaluated(study, "--base", "--tasks", "thai_exam-leaderboard")
    printed = capsys.readouterr().out
    s, deeper = (json.loads((study / f"results/base-fp32/thai_exam-leaderboard-ut{k}.json").read_text())["study"]
                 for k in (1, 2))  # fmt: skip
    assert f"chance {s['chance']:.1%} ({s['macro_chance']:.1%}), always the commonest letter" in printed
    assert f"letter {s['majority']:.1%} ({s['macro_majority']:.1%}); in brackets: mean of exams" in printed
    assert any(f"{s['macro']:.1%}" in line.split() for line in printed.splitlines() if " base-fp32     1 " in line)
    exams = {line[0]: line[1:] for line in rows_after(printed, "base-fp32 by exam")[1:]}
    for exam, row in s["subsets"].items():
        shown = [f"{row[key]:.1%}" for key in ("chance", "majority", "value")]
        assert exams[exam] == [str(row["items"]), *shown, f"{deeper['subsets'][exam]['value']:.1%}"]


def test_published_scores_stand_beside_those_of_the_same_benchmark(study, capsys):
    task = load_task("thai_exam-leaderboard", SETTINGS, 1, [])
    rows = [
        {
            "benchmark": "thai_exam",
            "mean": "macro",
            "value": 0.4453,
            "protocol": "shots not stated",
            "source": "a card",
        },
        {"benchmark": "mt_bench_thai", "mean": "macro", "value": 5.34, "protocol": "x", "source": "elsewhere"},
    ]
    subject = subjects.Subject("base-fp32", "baseline", published=tuple(rows))
    found = {("base-fp32", 1): results.read_study(study / "results/base-fp32/thai_exam-leaderboard-ut1.json")}
    tables.print_task(task, [subject], found, [1])
    printed = capsys.readouterr().out
    assert "published for base-fp32: 44.5% (mean of exams; shots not stated; a card)\n" in printed
    assert printed.count("published") == 1 and subject.study()["published"] == tuple(rows)


def test_the_gap_between_languages_is_printed_from_the_items_of_both(study, tmp_path, capsys):
    paths = f"belebele={ROOT / 'sample/belebele'}"
    evaluated(tmp_path, "--base", "--tasks", "belebele_english", "--limit", "9", "--paths", paths)
    assert "cross-lingual gap" not in capsys.readouterr().out
    evaluated(tmp_path, "--base", "--tasks", "belebele_thai", "--limit", "12", "--paths", paths)
    found = rows_after(capsys.readouterr().out, "belebele, English - Thai on the same questions")
    for depth, line in zip((1, 2), found[1:], strict=False):
        files = [tmp_path / f"results/base-fp32/belebele_{name}-ut{depth}.items.jsonl" for name in ("thai", "english")]
        pairs = benchmarks.language_pairs(*([json.loads(x) for x in f.read_text().splitlines()] for f in files))
        gap, low, high = benchmarks.paired_gap(pairs)
        means = [f"{sum(pair[i] for pair in pairs) / 9:.1%}" for i in (1, 0)]
        assert line == ["base-fp32", str(depth), "9", *means, f"{gap:+.1%}", f"{low:+.1%}", "–", f"{high:+.1%}"]


def test_a_model_that_answers_one_letter_is_warned_about(study, tmp_path, capsys):
    shutil.copytree(study, tmp_path / "copy")
    file = tmp_path / "copy/results/base-fp32/thai_exam-leaderboard-ut2.json"
    whole = json.loads(file.read_text())
    for predicted, warned in (({"a": 4, "b": 1}, False), ({"b": 5}, True)):
        whole["study"]["predicted"] = predicted
        file.write_text(json.dumps(whole))
        capsys.readouterr()
        evaluated(tmp_path / "copy", "--base", "--tasks", "thai_exam-leaderboard")
        assert ("5 of 5 answers are 'b': letter bias" in capsys.readouterr().out) is warned


def test_the_same_inputs_give_the_same_bytes(study, tmp_path):
    shutil.copytree(study / "output", tmp_path / "output")
    evaluated(tmp_path, "--exp", "exp2-wangchan-ut1", "--tasks", "thai_exam-leaderboard,english_text")
    mine = contents(tmp_path / "results")
    assert len(mine) == 16
    assert all(data == (study / "results" / name).read_bytes() for name, data in mine.items())


def test_replies_are_parsed_kept_and_not_asked_for_again(trained, tmp_path, monkeypatch):
    """OpenThaiEval and MT-Bench-Thai on the base; the second time everything is there but the results."""
    rows = [{"exam_type": "xcopa_th", "instruction": "ข้อใด", "input": "(1) ก (2) ข", "result": "(2)"}
            | dict.fromkeys(benchmarks.FLAGS, True)]  # fmt: skip
    (tmp_path / "exams/data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "exams/data/test.parquet")
    question = {"question_id": 1, "category": "Math", "turns": ["1+1", "2+2"], "reference": None}
    (tmp_path / "mt_bench_thai_full.json").write_text(json.dumps([question]))
    argv = ["--base", "--tasks", "openthaieval,mt_bench_thai", "--judge", "none", "--max_new_tokens", "4",
            "--ut_steps", "1", "--paths", f"openthaieval={tmp_path / 'exams'},mt_bench_thai={tmp_path}"]  # fmt: skip
    folder = evaluated(tmp_path, *argv) / "base-fp32"
    exam, turns = (
        json.loads((folder / f"{name}-ut1.items.jsonl").read_text()) for name in ("openthaieval", "mt_bench_thai")
    )
    assert exam["prediction"] == benchmarks.parse_choice(exam["resps"][0][0]) and exam["gold"] == "2"
    assert [turn["rating"] for turn in turns["turns"]] == [None, None]
    s = json.loads((folder / "mt_bench_thai-ut1.json").read_text())["study"]
    assert (s["metric"], s["value"], s["aspect"], s["judge"]) == ("rating", None, "thai_conversation", None)
    before = contents(folder)
    for name in before:
        (folder / name).unlink()
    monkeypatch.setattr(tasks, "generate", lambda *a, **k: pytest.fail("asked again"))
    evaluated(tmp_path, *argv)
    assert contents(folder) == before


def test_an_adapter_after_others_scores_as_it_does_alone(study, tmp_path):
    """The base is as it was once an adapter has been taken out."""
    folder = study / "output/seed7/exp2-wangchan-ut1"
    evaluated(tmp_path, "--adapter", str(folder), "--tasks", "english_text")
    (place,) = (tmp_path / "results").glob("adapter-exp2-wangchan-ut1-*")
    alone = json.loads((place / "english_text-ut2.json").read_text())["study"]
    among = json.loads((study / "results/seed7/exp2-wangchan-ut1/english_text-ut2.json").read_text())["study"]
    first = json.loads((study / "results/exp2-wangchan-ut1/english_text-ut2.json").read_text())["study"]
    assert alone["value"] == among["value"] != first["value"]


def test_an_ouro_that_is_named_as_a_baseline_is_read_at_its_loops(study, tmp_path):
    names = evaluated(tmp_path, "--model", MODEL, "--tasks", "thai_exam-leaderboard,english_text", "--bf16", "false")
    (folder,) = names.iterdir()
    assert folder.name.startswith("baseline-")
    for name in ("thai_exam-leaderboard-ut1", "thai_exam-leaderboard-ut2", "english_text-ut1", "english_text-ut2"):
        base = study / "results/base-fp32" / name
        assert (folder / f"{name}.items.jsonl").read_bytes() == base.with_suffix(".items.jsonl").read_bytes()
        own, other = (json.loads((place / f"{name}.json").read_text())["study"] for place in (folder, base.parent))
        differ = {key for key in own if own[key] != other[key]}
        assert differ == {"run", "kind"} and own["kind"] == "baseline"


def test_results_of_all_items_are_not_replaced_by_those_of_some(trained, tmp_path):
    evaluated(tmp_path, "--base", "--tasks", "english_text", "--limit", "3")
    before = contents(tmp_path / "results")
    with pytest.raises(UserError, match=r"english_text-ut1.json holds 3 items, and 1 of them would replace it"):
        evaluated(tmp_path, "--base", "--tasks", "english_text", "--limit", "1")
    assert contents(tmp_path / "results") == before
    evaluated(tmp_path, "--base", "--tasks", "english_text", "--limit", "4")
    assert contents(tmp_path / "results") != before


def says(chat, conversations) -> list[str]:
    replies = {}
    chat(conversations, replies.__setitem__)
    return [replies[n] for n in range(len(conversations))]


def test_a_baseline_that_replies_in_batches_says_what_it_says_alone(monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=0, eos_token_id=list(range(0, 1024, 9)),
    )  # fmt: skip
    dense, tokenizer = LlamaForCausalLM(config).eval(), load_tokenizer(MODEL)
    conversations = [[{"role": "user", "content": "ถาม " * n}] for n in (3, 1, 9, 2, 2, 5, 7, 4, 6, 8, 1)]
    for temperature in (0.0, 1.0):
        chat = tasks.chat_with(dense, tokenizer, 1, replace(SETTINGS, temperature=temperature), 12)
        monkeypatch.setattr(tasks, "DENSE_BATCH", 8)
        replies = says(chat, conversations)
        monkeypatch.setattr(tasks, "DENSE_BATCH", 1)
        assert replies == says(chat, conversations)
        assert replies[4:] == says(chat, conversations[4:]), "those that are left are asked for as all were"
        assert len({len(tokenizer(reply).input_ids) for reply in replies}) > 1, "some end before others"
    other = tasks.chat_with(dense, tokenizer, 1, replace(SETTINGS, temperature=1.0, seed=1), 12)
    assert replies != says(other, conversations)


def test_the_base_alone_and_a_baseline_are_scored(study, tmp_path):
    names = evaluated(tmp_path, "--base", "--tasks", "english_text")
    assert (
        contents(names)["base-fp32/english_text-ut1.json"]
        == contents(study / "results")["base-fp32/english_text-ut1.json"]
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    dense = LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "llama")
    tokenizer = load_tokenizer(MODEL)
    tokenizer.save_pretrained(tmp_path / "llama")
    llama = ["--model", str(tmp_path / "llama"), "--tasks", "thai_exam,english_text", "--bf16", "false"]
    with pytest.raises(UserError, match=r"llama does not loop, so it has one depth: leave --ut_steps out"):
        evaluated(tmp_path, *llama)
    evaluated(tmp_path, *llama, "--ut_steps", "1")
    (name,) = [p.name for p in names.iterdir() if p.name.startswith("baseline-")]
    s = json.loads((names / name / "thai_exam-ut1.json").read_text())["study"]
    assert s["kind"] == "baseline" and s["exit_distribution"] is None and s["total_ut_steps"] == 1
    task = load_task("thai_exam", SETTINGS, 1, [])
    sequences, _ = encode(tokenizer, [question for item in task.prompts for question in item])
    lines = [json.loads(x) for x in (names / name / "thai_exam-ut1.items.jsonl").read_text().splitlines()]
    got = [value for line in lines for row in line["resps"] for value in row]
    for (ids, start), value in list(zip(sequences, got, strict=True))[::9]:
        with torch.no_grad():
            log_p = dense(torch.tensor([ids])).logits.log_softmax(-1)[0]
        assert value == pytest.approx(sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids))), abs=1e-4)


def tensor(name: str) -> bytes:
    return save({name: torch.zeros(2, 128)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_config.json": ('"r": 2', '"r": 4')}, "has rank 4, and its run's config.yaml says r: 2"),
        ({"adapter_config.json": (MODEL, "ByteDance/Ouro-1.4B")}, "was made for ByteDance/Ouro-1.4B"),
        ({"../config.yaml": ("total_ut_steps: 1", "total_ut_steps: 4")}, "trained with total_ut_steps = 4, and exp2"),
        ({"adapter_config.json": ("{", "")}, "is no adapter in PEFT format"),
        ({"../completed": None}, "has been started but not finished"),
        ({"adapter_model.safetensors": b"no"}, "is no adapter in PEFT format"),
        ({"adapter_config.json": ('"r": 2', '"rank": 2')}, "adapter_config.json holds no rank, 'r'"),
        ({"adapter_config.json": b"[1]"}, "adapter_config.json holds no rank, 'r'"),
        ({"adapter_config.json": b"1"}, "adapter_config.json holds no rank, 'r'"),
        (
            {"adapter_model.safetensors": tensor("base_model.model.lm_head.lora_A.weight")},
            r"lm_head.lora_A.weight is .2, 128., and no such tensor belongs there",
        ),
        (
            {"adapter_model.safetensors": tensor("model.layers.x.q_proj.lora_A.weight")},
            r"layers.x.q_proj\S+ is .2, 128., and no such tensor",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(trained, tmp_path, change, message):
    shutil.copytree(trained / "output/exp2-wangchan-ut1", tmp_path / "output/exp2-wangchan-ut1")
    for name, how in change.items():
        file = tmp_path / "output/exp2-wangchan-ut1/final_adapter" / name
        if how is None:
            file.unlink()
        elif isinstance(how, bytes):
            file.write_bytes(how)
        else:
            assert how[0] in file.read_text()
            file.write_text(file.read_text().replace(*how, 1))
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path, "--exp", "exp2-wangchan-ut1", "--tasks", "english_text")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("change", ["narrow", "deep"])
def test_an_adapter_of_another_base_is_refused_by_its_sizes(trained, tmp_path, change):
    folder = tmp_path / "output/exp2-wangchan-ut1"
    shutil.copytree(trained / "output/exp2-wangchan-ut1", folder)
    file = folder / "final_adapter/adapter_model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if "layers.3" in n and "lora_A" in n)
    if change == "deep":
        weights[name.replace("layers.3", "layers.9")] = weights.pop(name)
    else:
        weights[name] = weights[name][:, :8].contiguous()
    save_file(weights, file)
    message = (
        r"\(4 layers\): \S+layers\.9\S+ is .*, and no such"
        if change == "deep"
        else r"is \[2, 8\], and \[2, 384\] belongs"
    )
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path, "--exp", "exp2-wangchan-ut1", "--tasks", "english_text")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--exp", "exp9"], r"unknown experiment 'exp9'[^\n]*\nconfigs/experiments.yaml holds: exp1-wangchan-ut4, "),
        (["--exp", "exp1-wangchan-ut4"], r"has not been trained.*\n?.*--exp exp1-wangchan-ut4 --output_dir \S+output$"),
        (["--exp", "seed3/exp2-wangchan-ut1"], r"--seed 3 --output_dir \S+seed3"),
        (["--base", "--tasks", "thai_exm"], r"unknown task 'thai_exm'; did you mean 'thai_exam'"),
        (["--base", "--tasks", "thai_exam,thai_exam"], "tasks must be different names"),
        (["--base", "--exp", "exp2-wangchan-ut1"], "give one of --exp, --adapter, --model, --base and --endpoint"),
        (["--adapter", "nowhere"], "nowhere is no adapter in PEFT format"),
        (["--model", "typhon"], "unknown baseline 'typhon': neither a folder nor one of typhoon2-1b"),
        (
            ["--base", "--paths", "thai_exam=sample/texts"],
            "paths: thai_exam=sample/texts: no onet/onet_test.jsonl in it",
        ),
        (["--base", "--tasks", "thai_text", "--paths", "thai_text=sample/nope"], "no such file or folder"),
        (["--base", "--subsets", "onet,ics"], r"unknown subset 'ics'; did you mean 'ic'"),
    ],
)
def test_a_mistake_in_the_command_is_named(trained, monkeypatch, argv, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        evaluated(trained, *argv)


def test_a_full_disk_gives_a_clear_error_and_keeps_what_is_finished(study, tmp_path):
    """A file system with room for the first task, and for the second one's items but not for all else."""
    results = tmp_path / "results"
    results.mkdir()
    disk = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(results)]
    done = subprocess.run(disk, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        argv = command(tmp_path, "--base", "--tasks", "english_text,thai_exam-leaderboard", "--limit", "2")
        argv = [sys.executable, "evaluate.py", *argv]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        name = r"error: cannot write \S+/base-fp32/thai_exam-leaderboard-ut1\.json: No space left on device; what was"
        assert re.match(name, done.stderr), done.stderr
        kept = contents(results)
        assert {f"base-fp32/english_text-ut{k}{s}" for k in (1, 2) for s in (".json", ".items.jsonl")} <= kept.keys()
        assert all(json.loads(data)["study"]["items"] for name, data in kept.items() if name.endswith("ut1.json"))
        assert not list(results.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=2m", results], check=True)
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "base-fp32: 1 of 2 tasks are complete already" in done.stdout
        assert kept.items() <= contents(results).items()
    finally:
        subprocess.run(["umount", results], check=True)


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_ouro", lambda *a, **k: pytest.fail("the model is loaded"))
    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path / "file", "File exists"), (tmp_path / "file/results", "Not a directory")):
        with pytest.raises(UserError, match=f"--results_dir {place}: nothing can be written there: {said}"):
            evaluated(tmp_path, "--base", "--tasks", "english_text", "--results_dir", str(place))


def test_a_result_without_its_items_is_not_complete(study, tmp_path, capsys):
    shutil.copytree(study / "results", tmp_path / "results")
    before = contents(tmp_path / "results")
    (tmp_path / "results/base-fp32/english_text-ut2.items.jsonl").unlink()
    evaluated(tmp_path, "--base", "--tasks", "english_text,thai_exam-leaderboard")
    assert "base-fp32: 1 of 2 tasks are complete already" in capsys.readouterr().out
    assert contents(tmp_path / "results") == before


def test_an_experiment_that_is_named_twice_is_scored_once(study, capsys):
    evaluated(study, "--exp", "exp2-wangchan-ut1,exp2-wangchan-ut1", "--tasks", "english_text")
    printed = capsys.readouterr().out
    assert printed.count("exp2-wangchan-ut1: 1 of 1 tasks") == 1 and printed.count("training of exp2-wangchan-ut1") == 1


def test_adapters_below_folders_of_one_name_have_results_of_their_own(study, tmp_path):
    folders = [study / "output" / name for name in ("exp2-wangchan-ut1", "seed7/exp2-wangchan-ut1")]
    for folder in folders:
        evaluated(tmp_path, "--adapter", str(folder), "--tasks", "english_text")
    runs = sorted(path.name for path in (tmp_path / "results").glob("adapter-*"))
    assert len(runs) == 2 and all(re.fullmatch("adapter-exp2-wangchan-ut1-[0-9a-f]{8}", run) for run in runs)
    evaluated(tmp_path, "--adapter", str(folders[0] / "final_adapter"), "--tasks", "english_text")
    assert runs == sorted(path.name for path in (tmp_path / "results").glob("adapter-*")), "one adapter, one name"


def test_results_name_the_commits_that_were_read_and_another_commit_is_scored_anew(tmp_path):
    """From a Hub, at main, in real processes."""
    copy_project(tmp_path / "project")
    tiny_model = {file.name: file.read_bytes() for file in Path(MODEL).iterdir()}
    items = {f"data/{file.name}": file.read_bytes() for file in (ROOT / "sample/belebele/data").iterdir()}
    hub, repositories = LocalHub(), ("datasets/facebook/belebele", "a/tiny")
    first = [hub.add(name, write(tmp_path / f"first-{n}", files), branch="main")
             for n, (name, files) in enumerate(zip(repositories, (items, tiny_model), strict=True))]  # fmt: skip
    scripts = Scripts(hub, tmp_path, modules=("evaluate",))
    argv = ["evaluate.py", "--base", "--model_name_or_path", "a/tiny", "--use_qlora", "false", "--bf16", "false",
            "--tasks", "belebele_english", "--ut_steps", "1", "--seed", "5"]  # fmt: skip
    folder = tmp_path / "project/results/base-fp32"

    def revisions() -> list[str]:
        s = json.loads((folder / "belebele_english-ut1.json").read_text())["study"]
        noted = json.loads((folder / "manifest.json").read_text())["tasks"]["belebele_english"]
        assert (
            noted["benchmark_revision"] == s["benchmark_revision"] and noted["model"]["revision"] == s["model_revision"]
        )
        assert noted["prompt_sha256"] == s["prompt_sha256"] and noted["seed"] == 5 and s["skipped"] == 0
        return [s["benchmark_revision"], s["model_revision"]]

    try:
        said = scripts.output(*argv)
        assert "belebele_english: eng_Latn 24 items (900 expected); has facebook/belebele changed since" in said
        assert revisions() == first
        assert "1 of 1 tasks are complete already" in scripts.output(*argv)
        wanted = first[:]
        for n, (name, files) in enumerate(zip(repositories, (items, tiny_model), strict=True)):
            wanted[n] = hub.add(name, write(tmp_path / f"newer-{n}", files), branch="main")
            assert "complete already" not in scripts.output(*argv), "the same content, but another commit"
            assert revisions() == wanted != first
        hub.close()
        offline = Scripts(hub, tmp_path, offline=True, modules=("evaluate",))
        try:
            assert "1 of 1 tasks are complete already" in offline.output(*argv)
        finally:
            offline.close()
            hub.open()
    finally:
        scripts.close()
        hub.close()


def test_replies_that_were_there_when_the_process_was_killed_are_not_asked_for_again(tmp_path):
    """Sampled, so that a reply that was asked for with another seed would be another one."""
    tasks = ["--tasks", "openthaieval", "--ut_steps", "1", "--temperature", "1.5", "--limit", "2",
             "--paths", f"openthaieval={ROOT / 'sample/openthaieval'}"]  # fmt: skip
    whole = evaluated(tmp_path / "whole", "--base", *tasks) / "base-fp32"
    cache = tmp_path / "killed/results/base-fp32/.openthaieval-ut1.cache.jsonl"
    argv = [sys.executable, "evaluate.py", *command(tmp_path / "killed", "--base", *tasks)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (cache.exists() and cache.read_bytes().count(b"\n")):
        assert process.poll() is None
    process.kill()
    process.wait()
    kept = cache.read_bytes()
    total = len((whole / cache.name).read_bytes().splitlines())
    assert 0 < kept.count(b"\n") < total and not cache.with_name("openthaieval-ut1.json").exists()
    evaluated(tmp_path / "killed", "--base", *tasks)
    lines = cache.read_bytes().splitlines()
    assert lines[: kept.count(b"\n")] == kept.splitlines()[: kept.count(b"\n")]
    assert len(lines) == total == len({json.loads(line)["key"] for line in lines})
    assert contents(cache.parent) == contents(whole)
    replies = {json.loads(line)["text"] for line in lines}
    assert len(replies) > total / 2 and len({len(reply) for reply in replies}) > 3


@pytest.mark.parametrize("text", ["", "0", "1,1", "1,x", "2,,3", "-1"])
def test_a_wrong_list_of_depths_is_refused(text):
    with pytest.raises(UserError, match=r"--ut_steps must be different loop counts"):
        parse_depths(text)


def test_depths_are_read_in_order():
    assert parse_depths("4,1") == [1, 4]


@pytest.mark.parametrize("folder", ["sample", "sample/texts"])
def test_a_folder_without_a_model_is_named(folder):
    """transformers would take the folder's name for a model's: SAM is in "sample"."""
    with pytest.raises(UserError, match=f"^cannot load {folder}: there is no config.json in it"):
        subjects.read_config(folder, None)
