"""How often the whole rule says a false word: studies with a known answer, through the product's own panels and words.

    PYTHONPATH=. python tests/simulate.py 1000        # studies a row; docs/verdict.md shows what it prints

A study is what the matrix of an arm gives: Thai text, exams, conversation and English at four depths, Thai- and
English-trained adapters, 120 items a benchmark, of which so many share a passage (intra-class correlation 0.3).
"""

import itertools
import sys
from collections import defaultdict
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
NOISE = {"bits_per_character": (0.05, 0.02, 0.01), "accuracy": (0.3, 0.3, 0.05), "rating": (0.3, 0.3, 0.1)}
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
    of_depth, of_item, of_run = NOISE[metric]  # what a depth and a run do with an item, and a run with all of them
    results = []
    for depth in DEPTHS:
        base_noise = noise(of_depth)
        for seed in (None, *range(seeds[depth - 1])):
            own = base_noise
            if seed is not None:
                run = of_run * spread[depth - 1] * rng.normal()
                own = own + noise(of_item) + run
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


def study(rng, seeds: tuple[int, ...], spread, cluster: int, effect: dict) -> dict[Key, Panel]:
    """effect: by depth, what it is truly worth on Thai text after training on Thai; on English it is worth nothing."""
    found = {}
    for task in ("thai_text", "thai_exam", "mt_bench_thai", "english_text"):
        own = effect if task == "thai_text" else {}
        found[Key(task, "wangchan")] = panel(rng, task, "th", seeds, spread, cluster, own, rng.normal(size=ITEMS))
    for thai, english in (TEXT[1:3], LANGUAGES):
        shared = rng.normal(size=ITEMS)
        own = effect if thai in TEXT else {}
        found[Key(thai, "wangchan")] = panel(rng, thai, "th", seeds, spread, cluster, own, shared)
        found[Key(english, "smol")] = panel(rng, english, "en", seeds, spread, cluster, {}, shared)
    return found


def run(studies: int, seeds: tuple[int, ...], spread, cluster: int, effect: dict) -> tuple[float, dict[str, float]]:
    """Share of studies with any false word; coverage of the intervals by kind."""
    rng, false, covered = np.random.default_rng(0), 0, defaultdict(list)
    for _ in range(studies):
        reader = SimpleNamespace(runs=defaultdict(lambda: STUB), left_out=[], answers=[])
        found = study(rng, seeds, spread, cluster, effect)
        wrong = False
        for test in (test for verdict in verdicts(reader, found) for test in verdict.tests):
            base = fabricate.TASKS["english_text"][2]
            truth = effect.get(test.depth, 0) if test.aspect == "thai_text" else 0.0
            truth = np.log(base[test.depth - 1] / base[3]) if test.quantity == "F" else truth
            true = {"more": truth > 0, "less": truth < 0, "same": abs(truth) < test.metric.margin}
            wrong |= not true.get(test.word, True)
            e = test.estimate
            covered[f"{test.quantity} 95 %"].append(abs(e.value - truth) <= e.half())
            covered[f"{test.quantity} of the family"].append(abs(e.value - truth) <= e.half(test.level))
        false += wrong
        text = found[Key("thai_text", "wangchan")]
        level = np.exp(0.2**2 / 2 + (0.05**2 + 0.02**2) / 2) * fabricate.TASKS["thai_text"][2][3]
        for k in DEPTHS:
            _, low, high = text.level(text.adapted[k, k])
            covered["level 95 %"].append(low <= level * np.exp(-effect.get(k, 0)) <= high)
    return false / studies, {kind: float(np.mean(hits)) for kind, hits in covered.items()}


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    truths = {"nothing": {}, "just above the margin": dict.fromkeys((2, 3, 4), 0.0203)}
    print("| truth | seeds | spreads | items a cluster | any false word | least coverage |\n|---|---|---|---|---|---|")
    for counts, (name, spread), cluster in itertools.product(
        ((3,) * 4, (5,) * 4, (5, 3, 3, 5)), SPREADS.items(), (1, 2, 5)
    ):
        for truth, effect in truths.items():
            false, covered = run(studies, counts, spread, cluster, effect)
            least = min(covered, key=covered.get)
            seeds = "/".join(map(str, dict.fromkeys(counts)))
            told = f"{100 * false:.1f} % | {100 * covered[least]:.1f} % ({least})"
            print(f"| {truth} | {seeds} | {name} | {cluster} | {told} |", flush=True)


if __name__ == "__main__":
    main()
