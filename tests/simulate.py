"""How often the whole rule says a false word: studies with a known answer, through the product's own panels and words.

    PYTHONPATH=. python tests/simulate.py 1000        # studies a row; docs/verdict.md shows what it prints

A study is what the matrix of an arm gives: Thai text, exams, conversation and English at four depths, Thai- and
English-trained adapters, 120 items a benchmark, of which so many share a passage (intra-class correlation 0.3).
"""

import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

from ouro.evaluate.benchmarks import LANGUAGES
from ouro.verdict.panels import Key, Panel
from ouro.verdict.rule import verdicts
from ouro.verdict.study import Result, Run

import fabricate
import numpy as np

DEPTHS, ITEMS = (1, 2, 3, 4), 120
TEXT = ("thai_text", "parallel_text_thai", "parallel_text_english", "english_text")
SPREADS = {"equal": (1, 1, 1, 1), "one loop x 3": (3, 1, 1, 1), "four loops x 3": (1, 1, 1, 3)}
SEED_SD = {"bits_per_character": 0.01, "accuracy": 0.05, "rating": 0.1}
STUB = Run("run", Path(), {}, {}, {}, {name: np.array([1e8]) for name in ("num_tokens", "tokens_per_second")} | {
    "model_flop_use": np.array([np.nan]), "step": np.array([1.0])}, [], True)  # fmt: skip


def panel(rng, task: str, language: str, seeds: tuple[int, ...], spread, cluster: int, effect: dict, shared) -> Panel:
    """One benchmark read by adapters of all depths, each at its own, and by the base. effect: by depth, in logarithms
    of bits; shared: what all models find in each item, the same in both languages."""
    metric, _, base, *_ = fabricate.TASKS[task]
    passages = np.arange(ITEMS) // cluster
    labels = np.full(ITEMS, "a", object)  # right answers and exams: the same of all items

    def noise(scale: float) -> np.ndarray:
        """(items,): of each item, and of its passage."""
        return scale * (np.sqrt(0.7) * rng.normal(size=ITEMS) + np.sqrt(0.3) * rng.normal(size=ITEMS)[passages])

    characters = rng.integers(100, 900, ITEMS).astype(float)
    results = []
    for depth in DEPTHS:
        of_depth = noise(0.3 if metric != "bits_per_character" else 0.05)
        for seed in (None, *range(seeds[depth - 1])):
            own = of_depth
            if seed is not None:
                run = SEED_SD[metric] * spread[depth - 1] * rng.normal()
                own = own + noise(0.3 if metric != "bits_per_character" else 0.02) + run
            if metric == "bits_per_character":
                level = np.log(base[depth - 1] if seed is None else base[3]) - effect.get(depth, 0) * (seed is not None)
                above, below = np.exp(level + 0.2 * shared + own) * characters, characters
            elif metric == "accuracy":
                above, below = (shared + own > 0.5).astype(float), np.ones(ITEMS)
            else:
                above, below = np.clip(5 + shared + own, 1, 10), np.ones(ITEMS)
            trained = None if seed is None else depth
            block = BLOCKS[task] | {"kind": "base" if seed is None else "adapter", "seed": seed, "language": language}
            block |= {"trained_ut_steps": trained, "total_ut_steps": depth, "run": f"seed{seed}/{language}{trained}"}
            ids = [f"x-{i}" for i in range(ITEMS)]
            results.append(Result(block, Path(), ids, above, below, labels, passages, labels))
    return Panel(results)


BLOCKS = {task: fabricate.study_block("run", task, 1, 1, 0, "wangchan", [1.0]) for task in fabricate.TASKS}


def study(rng, seeds: tuple[int, ...], spread, cluster: int, thai: dict, english: dict) -> dict[Key, Panel]:
    """thai, english: by depth, what it is truly worth to adapters trained on each; F is true to it, too."""
    found = {}
    for task in ("thai_text", "thai_exam", "mt_bench_thai", "english_text"):
        effect = thai if task == "thai_text" else {}
        found[Key(task, "wangchan")] = panel(rng, task, "th", seeds, spread, cluster, effect, rng.normal(size=ITEMS))
    for tasks in (TEXT[1:3], LANGUAGES):
        shared = rng.normal(size=ITEMS)
        text = tasks is not LANGUAGES
        for task, language, data, effect in zip(
            tasks, ("th", "en"), ("wangchan", "smol"), (thai, english), strict=True
        ):
            effect = effect if text else {}
            found[Key(task, data)] = panel(rng, task, language, seeds, spread, cluster, effect, shared)
    return found


def run(studies: int, seeds: tuple[int, ...], spread, cluster: int, thai: dict | None = None,
        english: dict | None = None, seed: int = 0) -> tuple[float, dict[str, float], Counter]:  # fmt: skip
    """Share of studies with any false word; coverage of the intervals by kind; how often each word of U and X fell."""
    rng, thai, english = np.random.default_rng(seed), thai or {}, english or {}
    false, covered, words = 0, defaultdict(list), Counter()
    for _ in range(studies):
        reader = SimpleNamespace(runs=defaultdict(lambda: STUB), left_out=[], answers=[])
        found = study(rng, seeds, spread, cluster, thai, english)
        tests = [test for verdict in verdicts(reader, found) for test in verdict.tests]
        wrong = False
        for test in tests:
            truth = 0.0
            if test.quantity in "UX" and test.aspect == "thai_text":
                truth = thai.get(test.depth, 0) - (english.get(test.depth, 0) if test.quantity == "X" else 0)
            if test.quantity == "F":
                truth = np.log(
                    fabricate.TASKS["english_text"][2][test.depth - 1] / fabricate.TASKS["english_text"][2][3]
                )
            true = {"more": truth > 0, "less": truth < 0, "same": abs(truth) < test.metric.margin}
            wrong |= not true.get(test.word, True)
            e = test.estimate
            covered[f"{test.quantity} 95 %"].append(abs(e.value - truth) <= e.half())
            covered[f"{test.quantity} of the family"].append(abs(e.value - truth) <= e.half(test.level))
            if test.aspect == "thai_text":
                words[test.quantity, test.depth, test.word] += 1
        false += wrong
        text = found[Key("thai_text", "wangchan")]
        level = np.exp(0.2**2 / 2 + (0.05**2 + 0.02**2) / 2) * fabricate.TASKS["thai_text"][2][3]
        for k in DEPTHS:
            value, low, high = text.level(text.adapted[k, k])
            covered["level 95 %"].append(low <= level * np.exp(-thai.get(k, 0)) <= high)
    return false / studies, {kind: float(np.mean(hits)) for kind, hits in covered.items()}, words


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    nothing, margin = {}, dict.fromkeys((2, 3, 4), 0.0203)
    print("| truth | seeds | spreads | items a cluster | any false word | least coverage |\n|---|---|---|---|---|---|")
    for counts, (name, spread), cluster in itertools.product(
        ((3,) * 4, (5,) * 4, (5, 3, 3, 5)), SPREADS.items(), (1, 2, 5)
    ):
        for truth, effect in (("nothing", nothing), ("just above the margin", margin)):
            false, covered, _ = run(studies, counts, spread, cluster, effect)
            least = min(covered, key=covered.get)
            seeds = "/".join(map(str, dict.fromkeys(counts)))
            told = f"{100 * false:.1f} % | {100 * covered[least]:.1f} % ({least})"
            print(f"| {truth} | {seeds} | {name} | {cluster} | {told} |", flush=True)


if __name__ == "__main__":
    main()
