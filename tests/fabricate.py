"""A simulated study with a known answer, in the files that training and evaluation write (report.py reads them)."""

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from ouro.settings import Settings

import numpy as np

DEPTHS = (1, 2, 3, 4)
TASKS = {  # task: metric, aspect, base by depth, better is higher, spread between items, gain over the base
    "thai_text": ("bits_per_character", "thai_text", (3.00, 2.95, 2.92, 2.90), False, 0.4, 0.5),
    "thai_exam": ("accuracy", "thai_exams", (0.30, 0.30, 0.30, 0.30), True, None, 0.05),
    "mt_bench_thai": ("rating", "thai_conversation", (3.0, 3.2, 3.3, 3.4), True, 1.5, 0.8),
    "english_text": ("bits_per_character", "english", (1.20, 1.05, 1.02, 1.00), False, 0.2, -0.03),
    "m3exam": ("accuracy", "thai_exams", (0.30, 0.30, 0.30, 0.30), True, None, 0.05),
    "belebele_thai": ("accuracy", "thai_exams", (0.30, 0.32, 0.34, 0.36), True, None, 0.10),
    "belebele_english": ("accuracy", "english", (0.50, 0.60, 0.64, 0.66), True, None, -0.05),
    "parallel_text_thai": ("bits_per_character", "thai_text", (3.00, 2.95, 2.92, 2.90), False, 0.4, 0.5),
    "parallel_text_english": ("bits_per_character", "english", (1.20, 1.05, 1.02, 1.00), False, 0.2, 0.1),
}
PRIMARY = ("thai_text", "thai_exam", "mt_bench_thai", "english_text")
SUBSETS = {  # chance, and the share of the commonest answer
    "thai_exam": {"onet": (0.2, 0.24), "ic": (0.25, 0.34)},
    "m3exam": {"low": (0.25, 0.3), "high": (0.2, 0.3)},
    "belebele_thai": {"tha_Thai": (0.25, 0.27)},
    "belebele_english": {"eng_Latn": (0.25, 0.27)},
}
NAMES = {1: "exp2-{}-ut1", 2: "exp3a-{}-ut2", 3: "exp3b-{}-ut3", 4: "exp1-{}-ut4"}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def study_block(
    run: str, task: str, depth: int, trained: int | None, seed: int | None, dataset: str, values, language="th", **more
) -> dict:
    metric, aspect, _, higher, *_ = TASKS[task]
    adapted = trained is not None
    whose = {"experiment": run.split("/")[-1], "seed": seed, "dataset": dataset, "language": language,
             "trained_ut_steps": trained, "adapter_sha256": digest(run),
             "data_report_sha256": digest(data_report(dataset, run))}  # fmt: skip
    exams = {}
    if metric == "accuracy":
        own = np.array(subsets_of(task, len(values)))
        names = list(dict.fromkeys(own))
        means = [np.mean(np.array(values)[own == name]) for name in names]
        chance, majority = np.mean([SUBSETS[task][name] for name in own], 0)
        macro_chance, macro_majority = np.mean([SUBSETS[task][name] for name in names], 0)
        exams = {"chance": chance, "majority": majority, "predicted": {"a": 60, "b": 50, "c": 45, "d": 45}}
        exams |= {"macro": np.mean(means), "macro_chance": macro_chance, "macro_majority": macro_majority}
    return {
        "format": 1,
        "run": run,
        "kind": "adapter" if adapted else "base",
        **(whose if adapted else dict.fromkeys(whose)),
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
        "unparsed": 0,
        "exit_distribution": (np.arange(1, depth + 1) / np.arange(1, depth + 1).sum()).tolist(),
        "state_distance": [0.5 / k - (0.05 / k if adapted else 0) for k in range(2, depth + 1)],
        "inference_flops_per_token": 5e9 * depth,
        "thai_share": 0.97 if metric == "rating" else None,
        "judge": "gpt-oss-120b" if metric == "rating" else None,
        **exams,
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
    first, *others = SUBSETS.get(task, ["all"])
    return [others[0] if others and i * 5 >= items * 4 else first for i in range(items)]


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


def write_run(output: Path, run: str, depth: int, seed: int, dataset: str, lines: int, rng, **settings) -> None:
    folder = output / run
    (folder / "final_adapter").mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": lines * 10, "use_qlora": False} | settings
    config = asdict(Settings(dataset=dataset, total_ut_steps=depth, seed=seed)) | settings
    (folder / "config.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in config.items()))
    record = {"run": run.split("/")[-1], "gpu": "NVIDIA H200", "gpu_tflops": 700.0, "processes": 1, "seed": seed}
    record |= {"base_held_out_loss": [1.5, 1.3, 1.25, 1.2][:depth]}
    (folder / "manifest.json").write_text(json.dumps(record))
    (folder / "data_report.json").write_text(data_report(dataset, run))
    (folder / "final_adapter/adapter_model.safetensors").write_text(run)
    measured = {"tokens_per_second": 30000.0 / depth, "memory_gib": 40.0, "model_flop_use": 0.41}
    rows = []
    for step in range(10, lines * 10 + 1, 10):
        loss = round((1.2 + 0.2 / depth) * step**-0.12 + 0.02 * rng.normal(), 6)
        row = {"step": step, "loss": loss, "mean_token_accuracy": round(1 - loss / 2, 4), "num_tokens": step * 65536}
        rows.append(row | measured)
    rows[-1]["held_out_loss"] = [0.9, 0.7, 0.65, 0.64][:depth]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "completed").write_text(json.dumps({"steps": rows[-1]["step"], "loss": rows[-1]["loss"]}))


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
    reply: str = "คำตอบ",
    language: str = "th",
    cluster: int = 1,
    suffix: str = "",  # of the runs' names
    settings: dict | None = None,  # of the runs, by depth
    **more,  # keys of the study block to replace
) -> tuple[Path, Path]:
    """Writes root/output and root/results; returns both."""
    rng = np.random.default_rng(0)
    output, results = root / "output", root / "results"
    gains = {task: (row[5],) * 4 for task, row in TASKS.items()} | (gains or {})
    base = {task: row[2] for task, row in TASKS.items()} | (base or {})
    for task, after in (levels or {}).items():
        sign = 1 if TASKS[task][3] else -1
        gains[task] = tuple(sign * (level - start) for level, start in zip(after, base[task], strict=True))
    runs = {}
    for seed in seeds:
        for depth in depths:
            name = (f"seed{seed}/" if len(seeds) > 1 else "") + NAMES[depth].format(dataset) + suffix
            runs[name] = depth, seed
            write_run(output, name, depth, seed, dataset, lines, rng, **(settings or {}).get(depth, {}))
    for task in tasks:
        metric, _, _, higher, spread, _ = TASKS[task]
        chars = rng.integers(100, 900, items) if metric == "bits_per_character" else None
        # The questions and passages are the same in both languages, the passages in English half as hard.
        own = np.random.default_rng(0) if task.startswith(("belebele", "parallel")) else rng
        ease = own.random(items) if spread is None else spread * own.normal(size=items)
        seed_noise = seed_sd * (1 if spread is None else spread / 0.4)

        for model, (trained, seed) in {"base-bf16": (None, None), **runs}.items():
            noise = seed_noise * rng.normal() if trained else 0
            for depth in DEPTHS:
                gain = gains[task][trained - 1] * 0.6 ** abs(trained - depth) if trained else 0
                level = base[task][depth - 1] + (gain if higher else -gain) + noise
                if spread is None:  # an item is right when its ease, a little shifted by the model, is below the level
                    values = ((ease + 0.1 * rng.normal(size=items)) % 1.0 < level).astype(float)
                else:
                    most = 10.0 if metric == "rating" else None
                    values = np.clip(level + ease + 0.1 * spread * rng.normal(size=items), 0.05, most)
                block = study_block(model, task, depth, trained, seed, dataset, values, language, **more)
                write_result(results, block, values, chars, f"{reply} {depth}", cluster)
    return output, results
