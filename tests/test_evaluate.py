"""Scoring: every depth and option from one pass equals every option run alone; results are kept, repeated, refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import evaluate
from ouro.evaluate import benchmarks, models, replies, results, tables, tasks
from ouro.evaluate.scoring import plant, score, to_sequences
from ouro.evaluate.tasks import load_task, score_choices, score_texts
from ouro.files import UserError, code_version, latest, read_json, seal, write_atomic
from ouro.model.cost import forward_flops
from ouro.model.generate import generate
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.model.modeling_ouro import PROJECTIONS, exit_distribution
from ouro.settings import Settings, resolve
from ouro.verdict.study import made_with

import numpy as np
import pytest
import torch
from helpers import read_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_ouro import tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "sample/ouro-tiny")
EXPS = "exp2-wangchan-ut1,exp3a-wangchan-ut2,seed7/exp2-wangchan-ut1"
PATHS = {
    "thai_exam": str(ROOT / "sample/thai_exam"),
    "thai_text": str(ROOT / "sample/texts/thai.jsonl"),
    "english_text": str(ROOT / "sample/texts/english.jsonl"),
    "belebele": str(ROOT / "sample/belebele"),
    "openthaieval": str(ROOT / "sample/openthaieval"),
}
SETTINGS = Settings(paths=PATHS)


@pytest.fixture(scope="module")
def network():
    return load_ouro(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


# ----------------------------------------------------------------------------------------------------------------------
# Scores are those of every sequence run alone


@torch.no_grad()
def alone(network, ids: list[int], start: int, depth: int | None) -> float:
    """The log-probability of one sequence's end from a pass of its own through `depth` loops."""
    loops = {"total_ut_steps": depth} if depth else {}
    log_p = network(torch.tensor([ids]), **loops).logits.log_softmax(-1)[0]
    return sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))


def brute_force(network, sequences, depths) -> np.ndarray:
    return np.array([[alone(network, ids, start, depth) for ids, start in sequences] for depth in depths])


def alike(seed: int) -> list[tuple[list[int], int]]:
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
    network, sequences = tiny(seed=seed), alike(seed)
    trees = plant(sequences, share=True)
    assert sum(len(tree.tokens) for tree in trees) < 0.8 * sum(len(ids) - 1 for ids, _ in sequences)
    assert not all(tree.is_line for tree in trees)
    for budget in (64, 100_000):
        scores = score(network, sequences, [1, 3], budget)
        np.testing.assert_allclose(scores.log_p, brute_force(network, sequences, [1, 3]), atol=1e-10)


@pytest.mark.parametrize("name", ["thai_exam", "thai_exam-helm", "thai_exam-leaderboard"])
def test_real_items_score_as_every_option_run_alone(network, tokenizer, name):
    task = load_task(name, SETTINGS, 1, [])
    sequences, cut = to_sequences(tokenizer, task.prompts[0][:2] + task.prompts[1][:1])
    scores, expected = score(network, sequences, [1, 4], 4096), brute_force(network, sequences, [1, 4])
    assert cut == 0
    np.testing.assert_allclose(scores.log_p, expected, atol=1e-4 * 8, rtol=1e-4)


@torch.no_grad()
def test_exits_and_distances_are_means_over_the_tokens_that_are_read():
    network = tiny()
    rows = [tokens(9, seed=1).tolist(), tokens(5, seed=2).tolist()]
    scores = score(network, [(ids, 1) for ids in rows], [1, 3], 1000)
    outs = [network(torch.tensor([ids[:-1]]), output_loops=True, total_ut_steps=3) for ids in rows]
    for got, depth in zip(scores.exits, [1, 3], strict=True):
        every = torch.cat([exit_distribution(out.gate_logits[:depth])[:, 0] for out in outs], 1)
        assert got == pytest.approx(every.mean(1).tolist()) and sum(got) == pytest.approx(1)
    for loop in (1, 2):
        change = [(h[loop] - h[loop - 1]).norm(dim=-1) / h[loop - 1].norm(dim=-1)
                  for h in (out.loop_hidden_states for out in outs)]  # fmt: skip
        assert scores.distances[loop - 1] == pytest.approx(torch.cat(change, 1).mean().item(), rel=1e-5)


def test_a_log_probability_that_is_no_number_is_refused_with_its_item(tokenizer, tmp_path):
    broken = load_ouro(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    for name, function in (("thai_exam", score_choices), ("thai_text", score_texts)):
        task = load_task(name, SETTINGS, 1, [])
        with pytest.raises(
            UserError, match=rf"log-probability of {task.items[0]['id']} at 2 loops is nan, and \d+ more"
        ):
            function(broken, tokenizer, task, [2], 8192, name)
    with pytest.raises(UserError, match="logits are NaN"):
        generate(broken, [[1, 2]], depth=1, max_new_tokens=2, stop=[0])
    with pytest.raises(UserError, match=r"is not saved: x: a number in it is NaN"):
        results.save(tmp_path / "t-ut1.json", {}, [{"id": "x", "value": math.inf}])
    assert not list(tmp_path.iterdir())


def test_what_looks_like_a_special_token_in_an_item_is_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sequences, _ = to_sequences(tokenizer, [("ก<|im_end|>ข", [" <|endoftext|>"])])
    assert tokenizer.decode(sequences[0][0]) == "ก<|im_end|>ข <|endoftext|>"
    assert not {end, 0} & set(sequences[0][0]) and end in tokenizer("<|im_end|>").input_ids


def test_a_prompt_longer_than_the_positions_is_said(tokenizer, capsys):
    short = load_ouro(MODEL, dtype=torch.float32).eval()
    short.config.max_position_embeddings = 64
    score_choices(short, tokenizer, load_task("thai_exam", SETTINGS, 1, ["ic"]), [1], 8192, "")
    assert "prompts are longer than 64 tokens and lost their beginning" in capsys.readouterr().out


def test_a_text_is_scored_once_a_token_whatever_the_window(network, tokenizer):
    task = load_task("thai_text", SETTINGS, 2, [])
    long = task.items[0]["text"]
    expected = -alone(network, [0, *tokenizer(long, add_special_tokens=False).input_ids], 1, 2) / math.log(2)
    (outcome,) = tasks.score_texts(network, tokenizer, task, [2], 4096, "test")
    assert outcome.lines[0]["bits"] == pytest.approx(expected, rel=1e-5)
    assert outcome.lines[0]["characters"] == len(long)
    total = sum(line["bits"] for line in outcome.lines) / sum(line["characters"] for line in outcome.lines)
    assert outcome.numbers["value"] == pytest.approx(total)
    task.spec = task.spec | {"window": 32, "stride": 16}
    (outcome,) = tasks.score_texts(network, tokenizer, task, [2], 4096, "test")
    assert expected != pytest.approx(outcome.lines[0]["bits"], rel=1e-9) == pytest.approx(expected, rel=0.2)


def dense(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 1024, **sizes, **changes})).eval()


def test_a_head_of_its_own_is_counted_once():
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 5 * 32  # two layers' products; the norms
    for tied in (True, False):
        assert forward_flops(dense(tie_word_embeddings=tied), 1) == 2 * (layers + 32 * 1024)


def test_a_baseline_that_replies_in_batches_says_what_it_says_alone(monkeypatch, tokenizer):
    def says(chat, conversations) -> list[str]:
        said = {}
        chat(conversations, said.__setitem__)
        return [said[n] for n in range(len(conversations))]

    network = dense(initializer_range=0.5, bos_token_id=0, eos_token_id=list(range(0, 1024, 9)))
    conversations = [[{"role": "user", "content": "ถาม " * n}] for n in (3, 1, 9, 2, 2, 5, 7, 4, 6, 8, 1)]
    for temperature in (0.0, 1.0):
        chat = tasks.chat_with(network, tokenizer, 1, replace(SETTINGS, temperature=temperature), 12)
        monkeypatch.setattr(tasks, "DENSE_BATCH", 8)
        said = says(chat, conversations)
        monkeypatch.setattr(tasks, "DENSE_BATCH", 1)
        assert said == says(chat, conversations)
        assert said[4:] == says(chat, conversations[4:]), "those that are left are asked for as all were"
        assert len({len(tokenizer(text).input_ids) for text in said}) > 1, "some end before others"
    other = tasks.chat_with(network, tokenizer, 1, replace(SETTINGS, temperature=1.0, seed=1), 12)
    assert said != says(other, conversations)


# ----------------------------------------------------------------------------------------------------------------------
# From the command to the files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two runs of experiments at 1 and 2 loops and one of a seed, as train_qlora.py leaves them."""
    place = tmp_path_factory.mktemp("runs")
    for n, name in enumerate(EXPS.split(",")):
        argv = ["--config", str(ROOT / "tests/smoke.yaml"), "--exp", name.rpartition("/")[2], "--r", "2"]
        argv += ["--use_qlora", "false", "--seed", "7" if "/" in name else "42", "--model_name_or_path", MODEL]
        folder = place / "output" / name
        torch.manual_seed(n)
        config = LoraConfig(r=2, lora_alpha=32, lora_dropout=0.3, target_modules=PROJECTIONS, init_lora_weights=False)
        get_peft_model(load_ouro(MODEL, dtype=torch.float32), config).save_pretrained(folder / "final_adapter")
        line = {"step": 1, "num_tokens": 9, "tokens_per_second": 3.0, "loss": 7.0, "mean_token_accuracy": 0.1}
        write_atomic(folder / "config.yaml", resolve("", argv).as_yaml())
        write_atomic(folder / "data_report.json", "{}")
        write_atomic(folder / "metrics.jsonl", json.dumps(line) + "\n")
        write_atomic(folder / "completed", "{}")
    return place


def command(place: Path, *argv: str) -> list[str]:
    return latest(["--config", str(ROOT / "tests/smoke.yaml"), "--output_dir", str(place / "output"), "--results_dir",
            str(place / "results"), "--model_name_or_path", MODEL, "--use_qlora", "false", "--limit", "1",
            "--ut_steps", "1,2", "--paths", ",".join(f"{k}={v}" for k, v in PATHS.items()), *argv])  # fmt: skip


def evaluated(place: Path, *argv: str) -> Path:
    evaluate.evaluate(resolve("", command(place, *argv), evaluate.options, several=True))
    return place / "results"


def test_an_optional_task_that_is_not_to_be_had_is_left_out_of_the_default_ones_alone(tmp_path, capsys):
    specs = {name: benchmarks.table()["tasks"][name] for name in ("parallel_text_thai", "m3exam")}
    belebele = ["--paths", f"belebele={PATHS['belebele']}"]
    (task,) = evaluate.load_tasks(resolve("", belebele, evaluate.options), specs, SimpleNamespace(endpoint=None))
    assert task.name == "parallel_text_thai"
    assert re.search("warning: m3exam is left out: cannot load chiayewken/m3exam", capsys.readouterr().out)
    for argv in (["--tasks", ",".join(specs), *belebele], ["--paths", f"m3exam={PATHS['thai_exam']}"]):
        with pytest.raises(UserError, match="chiayewken/m3exam|facebook/belebele"):
            evaluate.load_tasks(resolve("", argv, evaluate.options), specs, SimpleNamespace(endpoint=None))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("[!.]*-ut*.json*"))}


def block(file: Path) -> dict:
    return json.loads(file.read_text())["study"]


BOTH = ["--tasks", "thai_exam-leaderboard,english_text"]


@pytest.fixture(scope="module")
def study(trained):
    evaluated(trained, "--exp", EXPS, *BOTH)
    return trained


def test_another_commit_of_model_or_benchmark_is_another_result(trained):
    run, task = resolve("", command(trained, "--base"), evaluate.options), load_task("thai_text", SETTINGS, 1, [])
    other = replace(task, benchmark=task.benchmark | {"revision": "b"})
    known = [(task, "a"), (task, "b"), (other, "a")]
    assert len({results.key_of(of, {"model_revision": commit}, 1, run) for of, commit in known}) == 3


def test_several_runs_share_one_base_and_every_file_is_there_and_says_what_it_is_of(study):
    runs, names = ("base-fp32", *EXPS.split(",")), ("thai_exam-leaderboard", "english_text")
    assert set(contents(study / "results")) == {
        f"{r}/{t}-ut{k}{s}" for r in runs for t in names for k in (1, 2) for s in (".json", ".items.jsonl")
    }
    assert all((study / "results" / run / "manifest.json").exists() for run in runs)
    file = study / "results/seed7/exp2-wangchan-ut1/thai_exam-leaderboard-ut2.json"
    s, lines = block(file), read_jsonl(file.with_suffix(".items.jsonl"))
    expected = {
        "run": "seed7/exp2-wangchan-ut1", "kind": "adapter", "experiment": "exp2-wangchan-ut1", "seed": 7,
        "dataset": "wangchan", "loss": "last", "trained_ut_steps": 1, "total_ut_steps": 2,
        "task": "thai_exam-leaderboard", "benchmark": "thai_exam", "protocol": "leaderboard", "aspect": "thai_exams",
        "primary": False, "metric": "accuracy", "items": 5, "limit": 1, "precision": "fp32",
    }  # fmt: skip
    assert expected.items() <= s.items()
    assert len(s["exit_distribution"]) == 2 and len(s["state_distance"]) == 1 and len(s["adapter_sha256"]) == 64
    assert list(s["subsets"]) == ["onet", "ic", "tgat", "tpat1", "a_level"]
    assert [line["id"] for line in lines] == [f"{subset}-1" for subset in s["subsets"]]
    shown = json.loads(file.read_text())["results"]["thai_exam-leaderboard"]["acc,none"]
    assert s["value"] == sum(line["value"] for line in lines) / 5 == shown
    base = block(study / "results/base-fp32/english_text-ut1.json")
    assert base["kind"] == "base" and base["experiment"] is base["seed"] is base["adapter_sha256"] is None
    assert base["metric"] == "bits_per_character" and base["state_distance"] == [] and base["primary"]
    assert base["inference_flops_per_token"] == 2 * (4 * (4 * 128 * 128 + 3 * 128 * 384) + 128 * 1024)


def test_a_repeated_command_computes_nothing_and_a_changed_one_what_changed(study, capsys, monkeypatch, tmp_path):
    argv = ["--exp", f"exp2-wangchan-ut1,{EXPS}", *BOTH]  # one that is named twice is scored once
    before = contents(study / "results")
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_run_model", lambda *a, **k: pytest.fail("the model is loaded"))
        evaluated(study, *argv)
    printed = capsys.readouterr().out
    assert printed.count("2 of 2 tasks are complete already") == 4 and contents(study / "results") == before
    assert printed.count("training of exp2-wangchan-ut1") == 1

    place = tmp_path / "copy"
    shutil.copytree(study, place)
    file = place / "output/exp3a-wangchan-ut2/final_adapter/adapter_model.safetensors"
    save_file({name: w * 1.5 for name, w in load_file(file).items()}, file)
    (place / "results/base-fp32/english_text-ut1.json").write_text("{")  # half a file is none
    (left := place / "results/seed7/exp2-wangchan-ut1/.manifest.json.0123.tmp").touch()
    (place / "results/exp2-wangchan-ut1/english_text-ut2.items.jsonl").unlink()  # nor is one without its items
    evaluated(place, *argv)
    assert not left.exists()
    changed = {name for name, data in contents(place / "results").items() if data != before[name]}
    assert changed and {name.split("/")[0] for name in changed} == {"exp3a-wangchan-ut2"}
    told = [line for line in capsys.readouterr().out.splitlines() if "than now, scored anew" in line]
    assert len(told) == 2 and all(
        re.match("exp3a-wangchan-ut2: .*-ut1.json, .*-ut2.json: of other", line) for line in told
    )

    text = (ROOT / "configs/evals.yaml").read_text()
    (tmp_path / "evals.yaml").write_text(text.replace("คำถาม: {question}", "ถาม: {question}"))
    monkeypatch.setattr(benchmarks, "EVALS", tmp_path / "evals.yaml")
    evaluated(place, "--base", *BOTH)
    changed = {name for name, data in contents(place / "results").items() if data != before[name]}
    assert {name.split("-ut")[0] for name in changed if "base" in name} == {"base-fp32/thai_exam-leaderboard"}


def test_an_adapter_scores_alone_as_after_others_and_each_folder_has_results_of_its_own(study, tmp_path):
    """The base is as it was once an adapter has been taken out; equal inputs give equal bytes."""
    names = ("seed7/exp2-wangchan-ut1", "exp2-wangchan-ut1", "exp2-wangchan-ut1/final_adapter")
    for name in names:
        evaluated(tmp_path, "--adapter", str(study / "output" / name), "--tasks", "english_text")
    runs = sorted((tmp_path / "results").glob("adapter-*"))
    assert len(runs) == 2 and all(re.fullmatch("adapter-exp2-wangchan-ut1-[0-9a-f]{8}", run.name) for run in runs)
    found = {(run / "english_text-ut2.items.jsonl").read_bytes() for run in runs}
    assert found == {(study / "results" / name / "english_text-ut2.items.jsonl").read_bytes() for name in names[:2]}
    evaluated(tmp_path, "--base", "--tasks", "english_text")
    name = "base-fp32/english_text-ut2.json"
    assert (tmp_path / "results" / name).read_bytes() == (study / "results" / name).read_bytes()


def test_notes_of_processes_that_end_tasks_at_once_are_all_kept(tmp_path):
    """Twenty by each of three processes."""
    (tmp_path / "base").mkdir()
    notes = """import sys; from pathlib import Path
from types import SimpleNamespace; from ouro.evaluate import results
for n in range(20):
    task = SimpleNamespace(name=f"{sys.argv[2]}{n}", items=[1], benchmark={"revision": "1"}, sha256="1")
    results.note(Path(sys.argv[1]), "base", task, [1], 1, {})"""
    started = [subprocess.Popen([sys.executable, "-c", notes, tmp_path, who], cwd=ROOT) for who in "abc"]
    assert [process.wait() for process in started] == [0] * 3
    assert len(read_json(tmp_path / "base/manifest.json")["tasks"]) == 60


def test_of_each_depth_the_code_that_scored_it_is_recorded(tmp_path, monkeypatch):
    task = SimpleNamespace(name="thai_text", items=[1], benchmark={"revision": "1"}, sha256="1")
    for code, depths in (("old", [1, 4]), ("new", [4])):
        monkeypatch.setattr(results, "code_version", lambda code=code: {"code_sha256": code})
        results.note(tmp_path, "base", task, depths, 1, {})
    made = made_with(tmp_path / "base/manifest.json")
    assert {depth: each["code_sha256"] for (_, depth), each in made.items()} == {"1": "old", "4": "new"}
    assert made["thai_text", "4"]["packages"].keys() == {"torch", "transformers", "peft", "bitsandbytes"}


def test_a_killed_evaluation_leaves_no_result_whose_code_is_not_recorded(study, tmp_path, monkeypatch):
    save = results.save

    def killed(file: Path, *content) -> None:
        save(file, *content)
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, "--base", "--tasks", "english_text")
    (left,) = (tmp_path / "results/base-fp32").glob("english_text-ut?.json")
    made = made_with(left.with_name("manifest.json"))
    assert made["english_text", left.stem[-1]]["code_sha256"] == code_version()["code_sha256"]


@pytest.mark.parametrize("ended", ["killed", "done"])
def test_a_task_of_the_base_that_another_process_scores_is_waited_for_last(study, tmp_path, monkeypatch, capsys, ended):
    name, base = "exp2-wangchan-ut1", tmp_path / "results/base-fp32"
    base.mkdir(parents=True)
    holds = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = [sys.executable, "-c", holds, base / ".english_text.lock"]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()

        def waits(_) -> None:
            assert (tmp_path / "results" / name / "english_text-ut2.json").exists(), "what is its own comes first"
            if ended == "done":
                for file in (study / "results/base-fp32").glob("english_text-ut*"):
                    shutil.copy(file, base)
            other.kill()
            other.wait()

        monkeypatch.setattr(results, "time", SimpleNamespace(sleep=waits))
        evaluated(tmp_path, "--output_dir", str(study / "output"), "--exp", name, *BOTH)
    told = capsys.readouterr().out
    assert told.count("base-fp32: another process is at english_text; waiting for its end") == 1
    assert ("base-fp32: english_text was scored by another process meanwhile" in told) == (ended == "done")
    wanted = contents(study / "results").items()
    assert contents(tmp_path / "results") == {f: data for f, data in wanted if f.startswith(("base", f"{name}/"))}
    assert not list(tmp_path.rglob("*.lock"))


def test_an_ouro_that_is_named_as_a_baseline_is_read_at_its_loops(study, tmp_path):
    (folder,) = evaluated(tmp_path, "--model", MODEL, *BOTH, "--bf16", "false").iterdir()
    assert folder.name.startswith("baseline-")
    for name in ("thai_exam-leaderboard-ut2", "english_text-ut1"):
        base = study / "results/base-fp32" / name
        assert (folder / f"{name}.items.jsonl").read_bytes() == base.with_suffix(".items.jsonl").read_bytes()
        own, other = (block(place / f"{name}.json") for place in (folder, base.parent))
        assert {key for key in own if own[key] != other[key]} == {"run", "kind"} and own["kind"] == "baseline"


def test_a_baseline_without_loops_scores_as_every_option_run_alone(tokenizer, tmp_path):
    network = dense()
    network.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    argv = ["--model", str(tmp_path / "llama"), "--tasks", "thai_exam", "--bf16", "false"]
    with pytest.raises(UserError, match=r"llama does not loop, so it has one depth: leave --ut_steps out"):
        evaluated(tmp_path, *argv)
    (folder,) = evaluated(tmp_path, *argv, "--ut_steps", "1").iterdir()
    s = block(folder / "thai_exam-ut1.json")
    assert s["kind"] == "baseline" and s["exit_distribution"] is None and s["total_ut_steps"] == 1
    prompts = load_task("thai_exam", SETTINGS, 1, []).prompts
    sequences, _ = to_sequences(tokenizer, [question for item in prompts for question in item])
    lines = read_jsonl(folder / "thai_exam-ut1.items.jsonl")
    got = [value for line in lines for row in line["resps"] for value in row]
    for (ids, start), value in list(zip(sequences, got, strict=True))[::9]:
        assert value == pytest.approx(alone(network, ids, start, None), abs=1e-4)


def test_results_of_all_items_are_not_replaced_by_those_of_some(tmp_path):
    def limited(items: str) -> dict[str, bytes]:
        return contents(evaluated(tmp_path, "--base", "--tasks", "english_text", "--limit", items))

    before = limited("3")
    with pytest.raises(UserError, match=r"english_text-ut1.json holds 3 items, and 1 of them would replace it"):
        limited("1")
    assert contents(tmp_path / "results") == before != limited("4")


def test_replies_are_parsed_kept_and_not_asked_for_again(tmp_path, monkeypatch):
    """OpenThaiEval and MT-Bench-Thai on the base, sampled, so that a reply that was asked for with another seed would
    be another one: interrupted, continued, and with nothing lost but the results."""
    question = {"question_id": 1, "category": "Math", "turns": ["1+1", "2+2"], "reference": None}
    (tmp_path / "mt_bench_thai_full.json").write_text(json.dumps([question]))
    argv = ["--base", "--tasks", "openthaieval,mt_bench_thai", "--judge", "none", "--max_new_tokens", "16",
            "--ut_steps", "1", "--temperature", "1.5", "--paths", f"mt_bench_thai={tmp_path}"]  # fmt: skip
    whole = evaluated(tmp_path / "whole", *argv) / "base-fp32"
    lines = read_jsonl(whole / "openthaieval-ut1.items.jsonl")
    assert all(line["prediction"] == benchmarks.parse_choice(line["resps"][0][0]) for line in lines)
    (turns,) = read_jsonl(whole / "mt_bench_thai-ut1.items.jsonl")
    assert [turn["rating"] for turn in turns["turns"]] == [None, None]
    s, expected = block(whole / "mt_bench_thai-ut1.json"), ("rating", None, "thai_conversation", None)
    assert (s["metric"], s["value"], s["aspect"], s["judge"]) == expected

    add, folder = replies.Cache.add, tmp_path / "killed/results/base-fp32"

    def add_two(cache: replies.Cache, key: str, text: str) -> None:
        add(cache, key, text)
        if len(cache.texts) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(replies.Cache, "add", add_two)
        evaluated(tmp_path / "killed", *argv)
    cache = folder / ".openthaieval-ut1.cache.jsonl"
    kept = cache.read_bytes()
    assert kept.count(b"\n") == 2 and not contents(folder)
    evaluated(tmp_path / "killed", *argv)
    assert cache.read_bytes().startswith(kept) and contents(folder) == contents(whole)
    assert len({entry["key"] for entry in read_jsonl(cache)}) == len(read_jsonl(cache)) == len(lines) > 2
    assert len({entry["text"] for entry in read_jsonl(cache)}) > len(lines) / 2

    for name in contents(folder):
        (folder / name).unlink()
    monkeypatch.setattr(tasks, "generate", lambda *a, **k: pytest.fail("asked again"))
    evaluated(tmp_path / "killed", *argv)
    assert contents(folder) == contents(whole)


# ----------------------------------------------------------------------------------------------------------------------
# What is printed


def rows_after(printed: str, title: str) -> list[list[str]]:
    return [line.split() for line in printed[printed.index(title) :].partition("\n\n")[0].splitlines()[1:]]


def test_the_matrix_has_the_means_over_seeds_that_the_files_have(study, capsys):
    capsys.readouterr()
    evaluated(study, "--exp", EXPS, *BOTH)
    printed = capsys.readouterr().out
    rows = {"base": ["base-fp32"], "wangchan 1": ["exp2-wangchan-ut1", "seed7/exp2-wangchan-ut1"],
            "wangchan 2": ["exp3a-wangchan-ut2"]}  # fmt: skip
    for task, form in (("thai_exam-leaderboard", ".1%"), ("english_text", ".4f")):
        found = rows_after(printed, f"{task} by loops in training (rows) and in the test")
        assert found[0] == ["1", "2"]
        for line, (name, runs) in zip(found[1:4], rows.items(), strict=True):
            files = [[study / "results" / run / f"{task}-ut{depth}.json" for run in runs] for depth in (1, 2)]
            means = [np.mean([block(file)["value"] for file in cell]) for cell in files]
            assert line == [*name.split(), *(format(mean, form) for mean in means)]


def test_where_nothing_is_rated_the_matrix_has_no_numbers(capsys):
    tested = [models.ModelUnderTest("base", "base")]
    tested += [models.ModelUnderTest(f"ut{k}", "adapter", trained=replace(SETTINGS, total_ut_steps=k)) for k in (1, 2)]
    found = {(model.run, 1): {"value": None, "metric": "rating"} for model in tested}
    tables.print_matrix(load_task("thai_text", SETTINGS, 1, []), tested, found, [1])
    rows = rows_after(capsys.readouterr().out, "thai_text by loops")
    assert rows[1:4] == [["base", "-"], ["wangchan", "1", "-"], ["wangchan", "2", "-"]]


def test_each_exam_is_printed_with_its_own_chance_and_commonest_letter(study, capsys):
    evaluated(study, "--base", "--tasks", "thai_exam-leaderboard")
    printed = capsys.readouterr().out
    s, deeper = (block(study / f"results/base-fp32/thai_exam-leaderboard-ut{k}.json") for k in (1, 2))
    assert f"chance {s['chance']:.1%} ({s['macro_chance']:.1%}), always the commonest letter" in printed
    assert f"letter {s['majority']:.1%} ({s['macro_majority']:.1%}); in brackets: mean of exams" in printed
    assert any(f"{s['macro']:.1%}" in line.split() for line in printed.splitlines() if " base-fp32     1 " in line)
    exams = {line[0]: line[1:] for line in rows_after(printed, "base-fp32 by exam")[1:]}
    for exam, row in s["subsets"].items():
        shown = [f"{row[key]:.1%}" for key in ("chance", "majority", "value")]
        assert exams[exam] == [str(row["items"]), *shown, f"{deeper['subsets'][exam]['value']:.1%}"]


def test_published_scores_and_letter_bias_stand_beside_the_numbers(study, capsys):
    task = replace(load_task("thai_exam-leaderboard", SETTINGS, 1, []), part=None)
    row = {"benchmark": "thai_exam", "mean": "macro", "value": 0.4453, "protocol": "0 shots", "source": "a card"}
    model = models.ModelUnderTest("x", "baseline", published=(row, row | {"benchmark": "mt_bench_thai", "value": 5.3}))
    found = results.read_study(study / "results/base-fp32/thai_exam-leaderboard-ut1.json")
    for predicted, warned in (({"a": 4, "b": 1}, False), ({"b": 5}, True)):
        tables.print_task(task, [model], {("x", 1): found | {"predicted": predicted}}, [1])
        printed = capsys.readouterr().out
        assert (
            "published for x: 44.5% (mean of exams; 0 shots; a card)\n" in printed and printed.count("published") == 1
        )
        assert ("5 of 5 answers are 'b': letter bias" in printed) is warned
    tables.print_task(replace(task, part="5 of 565 items"), [model], {("x", 1): found}, [1])
    assert "published" not in capsys.readouterr().out
    assert model.study()["published"] == model.published


def test_the_gap_between_languages_is_printed_from_the_items_of_both(tmp_path, capsys):
    evaluated(tmp_path, "--base", "--tasks", "belebele_english", "--limit", "2")
    assert "cross-lingual gap" not in capsys.readouterr().out
    evaluated(tmp_path, "--base", "--tasks", "belebele_thai", "--limit", "3")
    found = rows_after(capsys.readouterr().out, "belebele, English - Thai on the same questions")
    for depth, line in zip((1, 2), found[1:3], strict=True):
        files = [tmp_path / f"results/base-fp32/{name}-ut{depth}.items.jsonl" for name in benchmarks.LANGUAGES]
        pairs = benchmarks.language_pairs(*map(read_jsonl, files))
        gap, low, high = benchmarks.paired_gap(pairs)
        means = [f"{sum(pair[i] for pair in pairs) / 2:.1%}" for i in (1, 0)]
        assert line == ["base-fp32", str(depth), "2", *means, f"{gap:+.1%}", f"{low:+.1%}", "–", f"{high:+.1%}"]


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_run_whose_adapter_is_not_its_own_is_refused(trained, tmp_path):
    """What an adapter may not be is in test_loading.py."""
    folder = shutil.copytree(trained / "output/exp2-wangchan-ut1", tmp_path / "output/exp2-wangchan-ut1")

    def refused(named: str) -> None:
        with pytest.raises(UserError, match=named):
            evaluated(tmp_path, "--exp", "exp2-wangchan-ut1", "--tasks", "english_text")
        assert not (tmp_path / "results").exists()

    (folder / "final_adapter/adapter_model.safetensors").write_bytes(b"no")
    refused("is no adapter in PEFT format")
    seal(folder / "final_adapter")
    (folder / "final_adapter/adapter_config.json").write_text("{}")
    refused("is damaged or was changed")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("total_ut_steps: 1", "total_ut_steps: 4"))
    refused("trained with total_ut_steps = 4, and exp2")
    (folder / "completed").unlink()
    refused("has been started but not finished")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--exp", "exp9"], r"unknown experiment 'exp9'[^\n]*\nconfigs/experiments.yaml holds: exp1-wangchan-ut4, "),
        (["--exp", "exp1-wangchan-ut4"], r"has not been trained.*\n?.*--exp exp1-wangchan-ut4 --output_dir \S+output$"),
        (["--exp", "seed3/exp2-wangchan-ut1"], r"--seed 3 --output_dir \S+seed3"),
        (["--exp", "seed3/own-ut4"], r"--exp own-ut4 --dataset_path mine.csv --seed 3 --output_dir \S+seed3"),
        (["--base", "--tasks", "thai_exm"], r"unknown task 'thai_exm'; did you mean 'thai_exam'"),
        (["--base", "--tasks", ""], "unknown task ''"),
        (["--base", "--exp", "exp2-wangchan-ut1"], "give one of --exp, --adapter, --model, --base and --endpoint"),
        (["--adapter", "nowhere"], "nowhere is no adapter in PEFT format"),
        (["--model", "typhon"], "unknown baseline 'typhon': neither a folder nor one of typhoon2-1b"),
        # transformers would take the folder's name for a model's: SAM is in "sample"
        (["--model", "sample"], "^cannot load the model sample: there is no config.json in it"),
        (["--base", "--tasks", "thai_exam", "--paths", "thai_exam=sample/texts"], "thai_exam=sample/texts: no onet/"),
        (["--base", "--tasks", "thai_text", "--paths", "thai_text=sample/nope"], "no such file or folder"),
        (["--base", "--subsets", "onet,ics"], r"unknown subset 'ics'; did you mean 'ic'"),
        (["--base", "--limit", "0"], "--limit must be at least 1"),
        *(
            (["--base", "--ut_steps", text], "--ut_steps must be")
            for text in ("", "0", "1,1", "1,x", "2,,3", "-1", "²", "9" * 5000)
        ),
        (
            ["--base", "--tasks", "english_text", "--results_dir", "README.md"],
            "README.md: nothing can be written",
        ),
    ],
)
def test_a_mistake_in_the_command_is_named_before_the_model_is_loaded(trained, monkeypatch, argv, named):
    monkeypatch.setattr(models, "load_run_model", lambda *a, **k: pytest.fail("the model is loaded"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=named):
        evaluated(trained, *argv)


def test_a_result_that_cannot_be_written_is_named_and_its_items_come_first(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_json", full)
    with pytest.raises(UserError, match=r"x-ut1.json: No space left on device; what was finished before is kept"):
        results.save(tmp_path / "x-ut1.json", {}, [{"id": 1}])
    assert {file.name for file in tmp_path.iterdir()} == {"x-ut1.items.jsonl", "results_x_ut1.json"}


def test_a_result_is_away_while_it_is_replaced_only_where_it_was_of_other_inputs(tmp_path, monkeypatch):
    """Two jobs of a sweep may score the base at once: what one has written, and reads, the other replaces whole."""
    file, there = tmp_path / "x-ut1.json", []
    results.save(file, {"study": {"key": "a"}}, [])
    monkeypatch.setattr(results, "write_atomic", lambda *_: there.append(file.exists()))
    for key in "ab":
        results.save(file, {"study": {"key": key}}, [])
    assert there == [True, False]


def test_a_damaged_data_report_of_a_run_is_one_message(tmp_path):
    write_atomic(tmp_path / "data_report.json", "{")
    with pytest.raises(UserError, match="cannot read .*data_report.json: damaged"):
        models.ModelUnderTest("x", "adapter", folder=tmp_path).study()
