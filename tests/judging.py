"""What the tests of the judge and of served models share."""

from ouro.evaluate.endpoint import find_judge
from ouro.evaluate.judge import load_questions, run_mt_bench

from helpers import ROOT

SAMPLE = ROOT / "sample" / "mt_bench_thai"
SPEC = {"hub_id": "ThaiLLM-Leaderboard/mt-bench-thai", "revision": None, "file": "mt_bench_thai_full.json"}
CACHE = ".mt_bench_thai-ut2.cache.jsonl"
KEY = "sk-not-a-real-key-0123456789"


def load(place, limit=None):
    return load_questions("mt_bench_thai", SPEC, str(place), limit)


def chat(conversations, done):
    """A model whose reply tells how many turns it saw, and the end of the last one."""
    for n, c in enumerate(conversations):
        done(n, f"คำตอบที่ {len(c)} ของคำถาม {c[-1]['content'][-20:]}")


def says(model, conversations) -> list[str]:
    texts = {}
    model(conversations, texts.__setitem__)
    return [texts[n] for n in range(len(conversations))]


def run(questions, tmp_path, grader="find", model=chat, cache=CACHE):
    grader = find_judge() if grader == "find" else grader
    return run_mt_bench(questions, model, grader, who="a model", cache=tmp_path / cache, name="mt_bench_thai")
