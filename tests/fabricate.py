"""A simulated study with a known answer, in the files that training and evaluation write (report.py reads them)."""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from ouro.settings import Settings

import numpy as np

DEPTHS = (1, 2, 3, 4)
TASKS = {  # task: metric, aspect, base by depth, better is higher, spread between items
    "thai_text": ("bits_per_character", "thai_text", (3.00, 2.95, 2.92, 2.90), False, 0.4),
    "thai_exam": ("accuracy", "thai_exams", (0.30, 0.30, 0.30, 0.30), True, None),
    "m3exam": ("accuracy", "thai_exams", (0.30, 0.30, 0.30, 0.30), True, None),
    "mt_bench_thai": ("rating", "thai_conversation", (3.0, 3.2, 3.3, 3.4), True, 1.5),
    "english_text": ("bits_per_character", "english", (1.20, 1.05, 1.02, 1.00), False, 0.2),
    "belebele_thai": ("accuracy", "thai_exams", (0.30, 0.32, 0.34, 0.36), True, None),
    "belebele_english": ("accuracy", "english", (0.50, 0.60, 0.64, 0.66), True, None),
    "parallel_text_thai": ("bits_per_character", "thai_text", (3.00, 2.95, 2.92, 2.90), False, 0.4),
    "parallel_text_english": ("bits_per_character", "english", (1.20, 1.05, 1.02, 1.00), False, 0.2),
}
GAINS = {"thai_text": (0.5,) * 4, "thai_exam": (0.05,) * 4, "mt_bench_thai": (0.8,) * 4, "english_text": (-0.03,) * 4}
PRIMARY = tuple(GAINS)
GAINS |= {"belebele_thai": (0.10,) * 4, "belebele_english": (-0.05,) * 4}
GAINS |= {"m3exam": (0.05,) * 4}
GAINS |= {"parallel_text_thai": (0.5,) * 4, "parallel_text_english": (0.1,) * 4}
SUBSETS = {"thai_exam": ["onet", "ic"], "m3exam": ["low", "high"]}
SUBSETS |= {"belebele_thai": ["tha_Thai"], "belebele_english": ["eng_Latn"]}
CHANCES = {
    "onet": (0.2, 0.24),
    "ic": (0.25, 0.34),
    "low": (0.25, 0.3),
    "high": (0.2, 0.3),
}  # and majority
CHANCES |= {"tha_Thai": (0.25, 0.27), "eng_Latn": (0.25, 0.27)}
NAMES = {1: "exp2-{}-ut1", 2: "exp3a-{}-ut2", 3: "exp3b-{}-ut3", 4: "exp1-{}-ut4"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def study_block(run: str, task: str, depth: int, trained: int | None, seed: int | None, dataset: str, values, **more):
    metric, aspect, _, higher, _ = TASKS[task]
    adapted = trained is not None
    letters = {"a": 60, "b": 50, "c": 45, "d": 45} if metric == "accuracy" else None
    own, subsets = subsets_of(task, len(values)), {}
    for name in dict.fromkeys(own) if letters else ():
        mine = [value for value, subset in zip(values, own, strict=True) if subset == name]
        chance, majority = CHANCES[name]
        subsets[name] = {"value": float(np.mean(mine)), "items": len(mine), "chance": chance, "majority": majority}

    def mean(key: str, by: list) -> float | None:
        return float(np.mean([subsets[name][key] for name in by])) if subsets else None

    return {
        "format": 1,
        "run": run,
        "kind": "adapter" if adapted else "base",
        "experiment": run.split("/")[-1] if adapted else None,
        "seed": seed,
        "arm": "equal-tokens" if adapted else None,
        "dataset": dataset if adapted else None,
        "language": "th" if adapted else None,
        "adapter_sha256": digest(run) if adapted else None,
        "data_report_sha256": digest(data_report(dataset, run)) if adapted else None,
        "loss": "last" if adapted else None,
        "trained_ut_steps": trained,
        "total_ut_steps": depth,
        "model": "ByteDance/Ouro-2.6B",
        "model_revision": "c" * 40,
        "precision": "bf16",
        "task": task,
        "benchmark": task.partition("_")[0] if task.startswith("belebele") else task,
        "protocol": "ours",
        "aspect": aspect,
        "primary": task in PRIMARY,
        "metric": metric,
        "higher_is_better": higher,
        "benchmark_revision": "d" * 40,
        "split": "test",
        "limit": None,
        "prompt_sha256": digest(task),
        "items": len(values),
        "value": float(np.mean(values)),
        "ci95": [float(np.mean(values) - 0.02), float(np.mean(values) + 0.02)],
        "chance": mean("chance", own),
        "majority": mean("majority", own),
        "macro": mean("value", list(subsets)),
        "macro_chance": mean("chance", list(subsets)),
        "macro_majority": mean("majority", list(subsets)),
        "subsets": subsets,
        "predicted": letters,
        "unparsed": 0,
        "exit_distribution": (np.arange(1, depth + 1) / np.arange(1, depth + 1).sum()).tolist(),
        "state_distance": [0.5 / k - (0.05 / k if adapted else 0) for k in range(2, depth + 1)],
        "inference_flops_per_token": 5e9 * depth,
        "published": None,
        "thai_share": 0.97 if metric == "rating" else None,
        "judge": "gpt-oss-120b" if metric == "rating" else None,
    } | more


def data_report(dataset: str, run: str) -> str:
    report = {"dataset": dataset, "split": "train", "data_revision": "sha256:0", "rows_in": 1000, "rows_kept": 990}
    report |= {"rows_dropped": {"empty": 10}, "trained_tokens": 400_000, "tokens": 900_000, "trained_share": 0.44}
    report |= {"end_token_survival": 1.0, "tokens_per_row": {"p5": 90, "p50": 900, "p95": 2000, "p100": 4000}}
    report |= {"tokens_per_unit": {"Thai": {"tokens_per_character": 1.9}}, "licences": {"CC-BY-SA-4.0": 990}}
    report |= {"thai_share_of_letters": 0.98, "settings": {"max_length": 4096, "length_policy": "drop"}}
    return json.dumps(report | {"cache": run})  # differs by run, as the real one may


def subsets_of(task: str, items: int) -> list[str]:
    """Each item's: four of five in the first."""
    names = SUBSETS.get(task, ["all"])
    return [names[i * 5 >= items * 4] if len(names) > 1 else names[0] for i in range(items)]


def write_result(results: Path, study: dict, values, characters=None, reply: str = "คำตอบ", cluster: int = 1) -> None:
    """cluster: so many items in a row share a passage."""
    folder = results / study["run"]
    folder.mkdir(parents=True, exist_ok=True)
    lines, count = [], defaultdict(int)
    for i, (value, subset) in enumerate(zip(values, subsets_of(study["task"], len(values)), strict=True)):
        count[subset] += 1
        item = {
            "doc": {"question": f"ข้อที่ {i}"},
            "id": f"{study['benchmark'] if subset == 'all' else subset}-{count[subset]}",
            "subset": subset,
            "value": float(value),
        }
        if cluster > 1:
            item["cluster"] = f"passage {i // cluster}"
        if study["task"] in ("thai_exam", "m3exam"):
            item["stratum"] = subset
        if study["metric"] == "bits_per_character":
            item |= {"bits": float(value * characters[i]), "characters": int(characters[i])}
        elif study["metric"] == "accuracy":
            gold, wrong = "abcd"[i % 4], "bcda"[i % 4]
            item |= {"prediction": gold if value else wrong, "gold": gold, "scores": {gold: -1.0, wrong: -1.5}}
        else:
            turn = {"prompt": f"ถามข้อ {i}", "reply": reply, "rating": float(value), "judgement": None, "thai": True}
            item |= {"category": "writing", "turns": [turn]}
        lines.append(json.dumps(item, ensure_ascii=False))
    stem = f"{study['task']}-ut{study['total_ut_steps']}"
    if characters is not None:
        study |= {"value": float(np.dot(values, characters) / characters.sum())}
    (folder / f"{stem}.items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{stem}.json").write_text(json.dumps({"results": {}, "study": study}), encoding="utf-8")


def write_run(output: Path, run: str, depth: int, seed: int, dataset: str, lines: int, rng) -> None:
    folder = output / run
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(dataset=dataset, total_ut_steps=depth, seed=seed, max_steps=lines * 10, use_qlora=False)
    (folder / "config.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in asdict(settings).items()))
    record = {"run": run.split("/")[-1], "gpu": "NVIDIA H200", "gpu_tflops": 700.0, "processes": 1, "seed": seed}
    record |= {"base_held_out_loss": [1.5, 1.3, 1.25, 1.2][:depth]}
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "data_report.json").write_text(data_report(dataset, run))
    (folder / "final_adapter").mkdir(exist_ok=True)
    (folder / "final_adapter/adapter_model.safetensors").write_text(run)
    step = np.arange(1, lines + 1) * 10
    loss = (1.2 + 0.2 / depth) * step**-0.12 + 0.02 * rng.normal(size=lines)
    rows = [
        {
            "step": int(s),
            "loss": round(float(x), 6),
            "mean_token_accuracy": round(float(1 - x / 2), 4),
            "num_tokens": int(s) * 65536,
            "tokens_per_second": 30000.0 / depth,
            "memory_gib": 40.0,
            "model_flop_use": 0.41,
        }
        for s, x in zip(step, loss, strict=True)
    ]
    if rows:
        rows[-1]["held_out_loss"] = [0.9, 0.7, 0.65, 0.64][:depth]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "completed").write_text(json.dumps({"steps": int(step[-1]), "loss": rows[-1]["loss"]}))


def study(
    root: Path,
    gains: dict | None = None,  # task: gain over the base by depth, positive is better
    base: dict | None = None,  # task: level by depth
    levels: dict | None = None,  # task: level after training, by depth; in place of gains
    seeds=(0, 1, 2),
    depths=DEPTHS,
    items: int = 200,
    seed_sd: float = 0.005,
    dataset: str = "wangchan",
    tasks=PRIMARY,
    lines: int = 40,
    run_seed: int = 0,
    reply: str = "คำตอบ",
    language: str = "th",
    cluster: int = 1,
    **more,  # keys of the study block to replace
) -> tuple[Path, Path]:
    """Writes root/output and root/results; returns both."""
    rng = np.random.default_rng(run_seed)
    output, results = root / "output", root / "results"
    gains, base = GAINS | (gains or {}), {task: TASKS[task][2] for task in TASKS} | (base or {})
    for task, after in (levels or {}).items():
        sign = 1 if TASKS[task][3] else -1
        gains[task] = tuple(sign * (level - start) for level, start in zip(after, base[task], strict=True))
    runs = [
        (f"seed{seed}/{NAMES[depth].format(dataset)}" if len(seeds) > 1 else NAMES[depth].format(dataset), depth, seed)
        for seed in seeds
        for depth in depths
    ]
    for run, depth, seed in runs:
        write_run(output, run, depth, seed, dataset, lines, rng)
    for task in tasks:
        metric, _, _, higher, spread = TASKS[task]
        chars = rng.integers(100, 900, items) if metric == "bits_per_character" else None
        ease = rng.random(items) if spread is None else spread * rng.normal(size=items)
        if task.startswith("belebele"):  # the same questions
            ease = np.random.default_rng(run_seed).random(items)
        if task.startswith("parallel"):  # the same passages, and in English half as hard
            ease = spread * np.random.default_rng(run_seed).normal(size=items)
        sign = 1 if higher else -1

        def values(level, noise, ease=ease, spread=spread, metric=metric):
            if spread is None:  # an item is right when its ease, a little shifted by the model, is below the level
                return ((ease + 0.1 * rng.normal(size=items)) % 1.0 < level + noise).astype(float)
            result = level + noise + ease + 0.1 * spread * rng.normal(size=items)
            return np.clip(result, 0.05, 10.0 if metric == "rating" else None)

        for depth in DEPTHS:
            name = "base-bf16"
            v = values(base[task][depth - 1], 0)
            block = study_block(name, task, depth, None, None, dataset, v, **more)
            write_result(results, block, v, chars, reply, cluster)
        scale = 1 if spread is None else spread / 0.4
        for run, trained, seed in runs:
            noise = seed_sd * scale * rng.normal()
            for depth in DEPTHS:
                level = base[task][depth - 1] + sign * gains[task][trained - 1] * 0.6 ** abs(trained - depth)
                v = values(level, noise)
                block = study_block(run, task, depth, trained, seed, dataset, v, **{"language": language} | more)
                write_result(results, block, v, chars, f"{reply} {depth}", cluster)
    return output, results
