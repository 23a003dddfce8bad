"""Log-likelihoods and accuracies of a folder that we wrote are, item by item, lm-evaluation-harness's of it; and its
tools read our result files.
"""

import json
import os
import subprocess
from pathlib import Path

from ouro.evaluate import results, tasks
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.settings import Settings

import pytest
import torch
import yaml
from conftest import PATIENCE

pytestmark = pytest.mark.slow  # another environment; test_evaluate.py compares the same scores with brute force
ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-peers/bin/python"
MODEL = ROOT / "sample/ouro-tiny"
DEPTH = 2

# Runs in the peers' environment, with nothing of ours but the folder.
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

place, model = sys.argv[1:]
lm = HFLM(pretrained=model, trust_remote_code=True, dtype="float32", device="cpu", batch_size=8, max_length=4096)
manager = TaskManager(include_path=place, include_defaults=False)
names = ["letters", "text"]
found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
samples = found["samples"]
print("RESULT", json.dumps({
    "letters": [[[float(r[0][0]) for r in s["resps"]], s["acc"]] for s in samples["letters"]],
    "text": [float(s["resps"][0][0]) for s in samples["text"]],
    "results": {k: {m: v for m, v in r.items() if "," in m} for k, r in found["results"].items()},
}))
"""


def peers() -> Path:
    if not PEERS.exists():
        reason = "no .venv-peers here: tests/peers.sh builds it"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return PEERS


@pytest.fixture(scope="module")
def two_tasks():
    paths = {"thai_exam": str(ROOT / "sample/thai_exam"), "thai_text": str(ROOT / "sample/texts/thai.jsonl")}
    settings = Settings(paths=paths)
    letters = tasks.load_task("thai_exam-leaderboard", settings, 3, [])
    text = tasks.load_task("thai_text", settings, 4, [])
    text.items = [item | {"text": item["text"][:150]} for item in text.items]  # one window in both
    return letters, text


@pytest.fixture(scope="module")
def theirs(two_tasks, tmp_path_factory):
    letters, text = two_tasks
    place = tmp_path_factory.mktemp("lm_eval")
    rows = [
        {"prompt": question[0][0], "choices": [c.strip() for c in question[0][1]], "gold": "abcde".index(item["gold"])}
        for item, question in zip(letters.items, letters.prompts, strict=True)
    ]
    for name, content in (("letters", rows), ("text", [{"text": item["text"]} for item in text.items])):
        (place / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    common = {"dataset_path": "json", "test_split": "test"}
    specs = {
        "letters": {"output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "choices",
                    "doc_to_target": "gold", "metric_list": [{"metric": "acc"}]},
        "text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                 "metric_list": [{"metric": "bits_per_byte"}]},
    }  # fmt: skip
    for name, spec in specs.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(place / f"{name}.jsonl")}}}
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | files | spec), encoding="utf-8")
    load_ouro(str(MODEL), total_ut_steps=DEPTH, dtype=torch.float32).save_pretrained(place / "model")
    load_tokenizer(str(MODEL)).save_pretrained(place / "model")
    environment = os.environ | {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [peers(), "-c", PROGRAM, place, place / "model"],
        capture_output=True, text=True, cwd=place, env=environment, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])


@pytest.fixture(scope="module")
def ours(two_tasks):
    model, tokenizer = load_ouro(str(MODEL), dtype=torch.float32).eval(), load_tokenizer(str(MODEL))
    (choices,) = tasks.score_choices(model, tokenizer, two_tasks[0], [DEPTH], 4096, "test")
    (texts,) = tasks.score_texts(model, tokenizer, two_tasks[1], [DEPTH], 4096, "test")
    return choices, texts


def test_every_letter_of_every_item_has_their_log_likelihood(ours, theirs):
    choices, _ = ours
    assert len(choices.lines) == len(theirs["letters"]) == 15
    for line, (values, correct) in zip(choices.lines, theirs["letters"], strict=True):
        assert line["resps"][0] == pytest.approx(values, abs=1e-4)
        assert line["value"] == correct
    assert choices.numbers["value"] == theirs["results"]["letters"]["acc,none"]


def test_every_text_has_their_log_likelihood(ours, theirs, two_tasks):
    _, texts = ours
    for line, value in zip(texts.lines, theirs["text"], strict=True):
        assert line["resps"][0][0] == pytest.approx(value, rel=1e-5)
    size = sum(len(item["text"].encode()) for item in two_tasks[1].items)
    bits = sum(line["bits"] for line in texts.lines)
    assert theirs["results"]["text"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-5)


def test_their_finder_finds_our_files_and_their_tables_are_made_from_them(ours, two_tasks, tmp_path):
    peers()
    task = two_tasks[0]
    study = {"metric": "accuracy", "higher_is_better": True, "limit": None, "total_ut_steps": DEPTH,
             "prompt_sha256": "0"}  # fmt: skip
    study |= {"task": task.name, "model": "sample/ouro-tiny", "model_revision": None, "precision": "fp32"}
    write = results.content(task, study | ours[0].numbers, True)
    results.save(tmp_path / "results/seed0/exp2/thai_exam-leaderboard-ut2.json", write, ours[0].lines)
    program = (
        "import glob, json\nfrom lm_eval.utils import get_results_filenames, make_table\n"
        "(file,) = get_results_filenames(glob.glob('**/*', recursive=True))\n"
        "print(make_table(json.load(open(file)), 'results'))\n"
    )
    done = subprocess.run([peers(), "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    value = f"{ours[0].numbers['value']:.4f}"
    assert any(value in row and "thai_exam-leaderboard" in row for row in done.stdout.splitlines()), done.stdout
