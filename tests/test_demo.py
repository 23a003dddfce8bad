"""make demo: the command itself, and its verdict on recorded results of it, as they are and spoilt.

demo_results.json holds what `make demo` measured (sample/ouro-nano, three seeds): the characters of each text, its bits
by "language/trained depth/seed" and depth read ("base/0/0" is the base), and the verdict. To record another:

    make demo && .venv/bin/python tests/test_demo.py results/demo
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ouro.files import UserError

import numpy as np
import pytest
from conftest import PATIENCE
from fabricate import NAMES, study_block, write_result, write_run
from helpers import ROOT, read_jsonl
from reports import verdicts, write_report

RECORDED = json.loads((ROOT / "tests" / "demo_results.json").read_text())
DEPTHS, TRAINED = (1, 2, 3, 4), (1, 4)
SETS = {"th": "wangchan", "en": "smol-smoltalk"}  # training sets


def words(folder: Path, bits: dict) -> dict[str, dict[str, str]]:
    """The words of the verdict of report.py on bits[task]["<language>/<trained>/<seed>"][depth read - 1]."""
    rng = np.random.default_rng(0)
    for language, trained, seed in itertools.product(SETS, TRAINED, range(3)):
        write_run(folder / "output", run_name(language, trained, seed), trained, seed, SETS[language], 4, rng)
    for task, models in bits.items():
        characters = np.array(RECORDED["characters"][task])
        for model, depths in models.items():
            language, trained, seed = model.split("/")
            base = language == "base"
            name = "base-bf16" if base else run_name(language, int(trained), seed)
            for depth, values in zip(DEPTHS, depths, strict=True):
                values = np.array(values) / characters
                who = (None, None, "") if base else (int(trained), int(seed), SETS[language])
                block = study_block(name, task, depth, *who, values, language)
                write_result(folder / "results", block, values, characters)
    write_report(folder)
    return {aspect: told["words"] for aspect, told in verdicts(folder).items()}


def run_name(language: str, trained: int, seed: object) -> str:
    return f"seed{seed}/{NAMES[trained].format(SETS[language])}"


def scaled(task: str, **factors: float) -> dict:
    """The recorded bits of a task, times a factor for each language, of adapters trained at 4 loops."""
    return {model: [[x * factors.get(model[:2], 1) if model[2:5] == "/4/" else x for x in texts] for texts in depths]
            for model, depths in RECORDED["bits"][task].items()}  # fmt: skip


def test_the_recorded_demo_has_its_words_whatever_the_base_and_others_where_four_loops_are_better(tmp_path):
    found = words(tmp_path, RECORDED["bits"])
    assert {aspect: found[aspect] for aspect in RECORDED["words"]} == RECORDED["words"]
    other_base = {task: models | {"base/0/0": models["base/0/0"][::-1]} for task, models in RECORDED["bits"].items()}
    assert words(tmp_path / "base", other_base)["thai_text"] == found["thai_text"]
    better = {task: scaled(task, th=0.8) for task in ("thai_text", "parallel_text_thai")}
    told = words(tmp_path / "better", RECORDED["bits"] | better)["thai_text"]
    assert told == {"4": "helps Thai more than English"}
    both = better | {"parallel_text_english": scaled("parallel_text_english", en=0.5)}
    assert words(tmp_path / "both", RECORDED["bits"] | both)["thai_text"] == {"4": "helps Thai, less than English"}


def demo(folder: Path, **environment: str) -> tuple[list[str], dict]:
    command = [sys.executable, "tools/demo.py", "--model_name_or_path", "sample/ouro-tiny", "--max_steps", "2"]
    command += ["--max_length", "8192"]  # of English, of which that one's tokenizer has few words
    command += ["--logging_steps", "1", "--max_new_tokens", "1"]
    command += ["--output_dir", str(folder / "output"), "--results_dir", str(folder / "results")]
    return command, {"cwd": ROOT, "text": True, "env": os.environ | {"DEMO_SEEDS": "1"} | environment}


@pytest.mark.slow
def test_the_demo_goes_on_after_it_was_stopped_and_ends_with_its_verdict(tmp_path):
    command, options = demo(tmp_path)
    for number, code, runs in ((signal.SIGKILL, -9, 1), (signal.SIGTERM, 143, 2)):
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
        trained = {}
        while len(trained) < runs and first.poll() is None:
            trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("output/seed0/*/completed")}
            time.sleep(0.2)
        first.send_signal(number)
        assert first.wait(PATIENCE) == code and len(trained) >= runs
        end = time.monotonic() + 10  # no step runs on: the kernel ends them soon after
        while (left := subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True)).returncode == 0:
            assert time.monotonic() < end, left.stdout

    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    for aspect in ("Thai text", "Thai exams", "Thai conversation", "English retention"):
        assert re.search(rf"^{aspect}[:,]", done.stdout, re.MULTILINE), done.stdout
    assert len(list(tmp_path.glob("output/seed0/*/completed"))) == 4
    assert all(path.stat().st_mtime_ns == at for path, at in trained.items())
    for file in ("RESULTS.md", "report.html", "report/gain.png", "report/levels.svg"):
        assert (tmp_path / "results" / file).stat().st_size > 1000
    both = ("parallel_text_thai", "parallel_text_english")
    for name in ("base-fp32", "seed0/exp2-wangchan-ut1", "seed0/exp1-wangchan-ut4", "seed0/exp6d-english-ut4"):
        for task in both if "english" in name else (*both, "thai_text", "english_text", "mt_bench_thai"):
            assert len(list((tmp_path / "results" / name).glob(f"{task}-ut[1-4].json"))) == 4

    whole = ["--exp", "seed0/exp2-wangchan-ut1", "--tasks", "thai_text,parallel_text_thai"]
    places = ["--results_dir", str(tmp_path / "results"), "--output_dir", str(tmp_path / "output"), *command[2:8]]
    subprocess.run([command[0], "evaluate.py", "--config", "configs/demo.yaml", *places, *whole], check=True, **options)
    again = subprocess.run(command, capture_output=True, **options)
    assert again.returncode == 0 and "Thai text" in again.stdout, again.stderr[-3000:]
    for name in ("base-fp32", "seed0/exp2-wangchan-ut1", "seed0/exp1-wangchan-ut4"):
        for depth in DEPTHS:
            file = tmp_path / "results" / name / f"thai_text-ut{depth}.json"
            assert json.loads(file.read_text())["study"]["items"] == 33, "all were asked as much as one"


def test_a_demo_asks_no_fewer_items_than_there_are_results_of(tmp_path):
    from tools import demo

    few = ("--tasks", "thai_text", "--limit", "10")
    block = study_block("base-bf16", "thai_text", 4, None, None, "", np.ones(33))
    for name, limit, asked in (("a", 10, few), ("b", 5, few), ("c", 20, few[:2]), ("d", None, few[:2])):
        write_result(tmp_path / name, block | {"limit": limit}, np.ones(33), np.ones(33))
        assert demo.unless_fuller(few, tmp_path / name) == asked, limit
    assert demo.unless_fuller(few, tmp_path / "nowhere") == few
    assert demo.unless_fuller(few[:2], tmp_path / "a") == few[:2]


@pytest.mark.slow
def test_a_signal_while_a_step_is_started_stops_the_demo(tmp_path):
    """Python drops exceptions, a handler's too, while it runs the hooks of a fork."""
    command, options = demo(tmp_path)
    program = """
import os, runpy, signal, sys
del sys.argv[0]
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([command[0], "-c", program, *command[1:]], capture_output=True, timeout=PATIENCE, **options)
    assert done.returncode == 143 and not list(tmp_path.rglob("completed")), done.stderr


@pytest.mark.parametrize("seeds", ["0", "three"])
def test_a_number_of_seeds_that_is_none_is_an_error(monkeypatch, seeds):
    from tools import demo

    monkeypatch.setenv("DEMO_SEEDS", seeds)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(UserError, match="DEMO_SEEDS must be"):
        demo.main()


@pytest.mark.slow
def test_a_step_that_fails_ends_the_demo_with_the_end_of_its_log(tmp_path):
    command, options = demo(tmp_path)
    done = subprocess.run([*command, "--dataset_path", str(tmp_path / "nothing")], capture_output=True, **options)
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr
    assert re.search(r"^error: train seed0/\S+ failed \(exit code 2\); the end of ", done.stderr, re.M)


def record(results: Path) -> None:
    found = {"words": {}, "characters": {}, "bits": {}}
    for told in json.loads((results / "report/verdict.json").read_text()):
        if told["aspect"] in ("thai_text", "english"):
            found["words"][told["aspect"]] = told["words"]
    for task in ("thai_text", "english_text", "parallel_text_thai", "parallel_text_english"):
        models = found["bits"][task] = {}
        for file in sorted(results.rglob(f"{task}-ut[1-4].json")):  # by model, then by the depth read
            block = json.loads(file.read_text())["study"]
            items = read_jsonl(file.with_suffix(".items.jsonl"))
            found["characters"][task] = [item["characters"] for item in items]
            model = f"{block['language'] or 'base'}/{block['trained_ut_steps'] or 0}/{block['seed'] or 0}"
            models.setdefault(model, []).append([round(item["bits"], 1) for item in items])
    (ROOT / "tests/demo_results.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
