"""Multiple-choice benchmarks at any loop depths, base and adapter, from one forward pass each.

    python evaluate.py --config configs/smoke.yaml --exp exp2-wangchan-ut1      # after training it
    python evaluate.py --config configs/default.yaml --exp exp1-wangchan-ut4 --ut_steps 1,2,3,4 --limit 50

Scores the run's adapter and, so that a gain can be told from what the base already knew at that depth, the base model
without it. Writes RESULTS_DIR/<run>/ and RESULTS_DIR/base-<precision>/: <benchmark>-ut<k>.json, and one line an item in
<benchmark>-ut<k>.items.jsonl.
"""

import argparse
import contextlib
import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from settings import (
    Resolved,
    Settings,
    UserError,
    call,
    nearest,
    parse,
    read_yaml,
    resolve,
    write_atomic,
    write_json,
)

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data_config import load_tokenizer
from modeling_ouro import OuroForCausalLM, load_ouro
from sources import EVALS, benchmark_files, read_benchmark, read_file
from thai import normalise

LETTERS = "abcde"


def load_items(
    name: str, spec: dict, local: str | None, limit: int | None = None, normalise_thai: bool = True
) -> list[dict]:
    """The items of a benchmark, each {id, subset, question, options: {letter: text}, gold}, in the spelling that the
    run was trained on.

    Options keep their letters; an empty one is left out, so that no letter moves. With `limit`, the first of each
    subset.

    Raises:
        UserError: a file is missing, or an item has no question, no options, or a gold letter that is not among them.
    """
    spell = normalise if normalise_thai else str
    items = []
    for subset, file in zip(spec["subsets"], benchmark_files(spec), strict=True):
        for number, (_, row) in enumerate(read_benchmark(name, spec, local, file), 1):
            where = f"{local or spec['hub_id']}, {file}, item {number}"
            for key in ("question", "answer"):
                if not isinstance(row.get(key), str) or not row[key].strip():
                    raise UserError(f"{where}: no text in {key!r}; keys: {', '.join(row)}")
            texts = {letter: row.get(letter) for letter in LETTERS}
            options = {letter: spell(text) for letter, text in texts.items() if isinstance(text, str) and text}
            if len(options) < 2 or row["answer"] not in options:
                raise UserError(f"{where}: answer {row['answer']!r} is not among the options {', '.join(options)}")
            items.append(
                {"id": f"{subset}-{number}", "subset": subset, "question": spell(row["question"]), "options": options,
                 "gold": row["answer"]}
            )  # fmt: skip
            if number == limit:
                break
    return items


def render(item: dict, spec: dict) -> tuple[str, list[str]]:
    """The prompt of an item, and the continuation that stands for each of its options."""
    options = "\n".join(spec["option"].format(letter=letter, text=text) for letter, text in item["options"].items())
    prompt = spec["prompt"].format(question=item["question"], options=options)
    return prompt, [f" {letter}" for letter in item["options"]]


@torch.no_grad()
def score(
    model: OuroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[tuple[str, list[str]]],
    depths: list[int],
    batch_size: int,
    description: str = "score",
) -> list[list[list[float]]]:
    """Log-probability of each continuation after its prompt, at each depth: [question][depth][continuation].

    The tokens of prompt + continuation are those of the joined text; the continuation's are what follows the prompt's.
    All depths are read from one pass through the deepest. Continuations that need the same input (all letters after one
    prompt do) share a pass. Rows are padded on the right, which causal attention cannot see: batches change nothing.
    """
    wanted: dict[tuple, list] = {}  # model input -> (question, continuation, position of its first logits, its tokens)
    for q, (prompt, continuations) in enumerate(questions):
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        for c, continuation in enumerate(continuations):
            ids = tokenizer(prompt + continuation, add_special_tokens=False).input_ids
            wanted.setdefault(tuple(ids[:-1]), []).append((q, c, start - 1, ids[start:]))
    scores = [[[0.0] * len(continuations) for _ in depths] for _, continuations in questions]
    inputs = sorted(wanted, key=len, reverse=True)  # the longest first: memory runs out at once or not at all
    device = model.lm_head.weight.device
    progress = tqdm(total=len(inputs), desc=description, unit=" prompts", leave=False, disable=None)
    for at in range(0, len(inputs), batch_size):
        rows = inputs[at : at + batch_size]
        width = len(rows[0])
        batch = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        states = model.model(batch, total_ut_steps=max(depths)).loop_hidden_states
        for r, row in enumerate(rows):
            first = min(position for _, _, position, _ in wanted[row])
            for d, depth in enumerate(depths):
                logits = model.lm_head(states[depth - 1][r, first : len(row)])
                log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                for q, c, position, targets in wanted[row]:
                    index = torch.arange(position - first, position - first + len(targets), device=device)
                    scores[q][d][c] = log_p[index, torch.tensor(targets, device=device)].sum().item()
        progress.update(len(rows))
    progress.close()
    return scores


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927; Brown, Cai and DasGupta 2001 recommend it for small n)."""
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(items: list[dict], predictions: list[str]) -> dict:
    """Accuracy with its interval, beside what guessing and always answering the commonest letter would reach."""
    right = sum(item["gold"] == p for item, p in zip(items, predictions, strict=True))
    low, high = wilson(right, len(items))
    subsets = {}
    for subset in dict.fromkeys(item["subset"] for item in items):
        hits = [item["gold"] == p for item, p in zip(items, predictions, strict=True) if item["subset"] == subset]
        subsets[subset] = {"accuracy": sum(hits) / len(hits), "items": len(hits)}
    return {
        "items": len(items),
        "correct": right,
        "accuracy": right / len(items),
        "accuracy_ci95": [low, high],
        "chance": sum(1 / len(item["options"]) for item in items) / len(items),
        "majority": Counter(item["gold"] for item in items).most_common(1)[0][1] / len(items),
        "macro_accuracy": sum(s["accuracy"] for s in subsets.values()) / len(subsets),
        "subsets": subsets,
        "predicted": dict(sorted(Counter(predictions).items())),
    }


def save(folder: Path, benchmark: str, depth: int, summary: dict, items: list[dict], scores: list[list[float]]) -> None:
    lines = []
    for item, values in zip(items, scores, strict=True):
        by_letter = dict(zip(item["options"], values, strict=True))
        line = {"id": item["id"], "prompt_sha256": item["prompt_sha256"], "log_probabilities": by_letter,
                "prediction": predict(item, values), "gold": item["gold"]}  # fmt: skip
        lines.append(json.dumps(line, ensure_ascii=False))
    write_atomic(folder / f"{benchmark}-ut{depth}.items.jsonl", "\n".join(lines) + "\n")
    write_json(folder / f"{benchmark}-ut{depth}.json", summary)  # last: its presence says that the items are there


def predict(item: dict, scores: list[float]) -> str:
    return max(zip(scores, item["options"], strict=True), key=lambda pair: pair[0])[1]


def run_settings(run: Resolved) -> tuple[Path, Settings]:
    """The folder of a trained run, and the settings it was trained with.

    Raises:
        UserError: it is not trained yet; the message holds the command that does it.
    """
    folder = Path(run.settings.output_dir) / run.run
    if not (folder / "completed").exists():
        state = "has been started but not finished" if folder.exists() else "has not been trained"
        config, exp = f" --config {run.config}" if run.config else "", f" --exp {run.run}" if run.options.exp else ""
        raise UserError(f"{run.run} {state}: no {folder / 'completed'}\ntrain it: python train_qlora.py{config}{exp}")
    recorded = read_yaml(folder / "config.yaml")
    return folder, Settings(**{name: parse(name, value, f"{folder}/config.yaml") for name, value in recorded.items()})


def parse_depths(text: str) -> list[int]:
    depths = sorted({int(part) for part in text.split(",") if part.strip().isdigit()})
    if not depths or depths[0] < 1 or len(depths) != len(text.split(",")):
        raise UserError(f"--ut_steps must be different loop counts like 1,2,3,4, got {text!r}")
    return depths


def evaluate(run: Resolved) -> None:
    options = run.options
    depths = parse_depths(options.ut_steps)
    benchmarks = read_yaml(EVALS)
    if options.benchmark not in benchmarks:
        raise UserError(f"unknown benchmark {options.benchmark!r}{nearest(options.benchmark, benchmarks)}")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    folder, trained = run_settings(run)
    spec = benchmarks[options.benchmark]
    if "prompt" not in spec:
        raise UserError(
            f"{options.benchmark} has no protocol in configs/evals.yaml yet, only items to look for in training rows"
        )
    local = run.settings.paths.get(options.benchmark)
    items = load_items(options.benchmark, spec, local, options.limit, trained.normalise_thai)
    questions = [render(item, spec) for item in items]
    for item, (prompt, _) in zip(items, questions, strict=True):
        item["prompt_sha256"] = hashlib.sha256(prompt.encode()).hexdigest()

    tokenizer = load_tokenizer(trained.model_name_or_path, trained.model_revision)
    dtype = torch.bfloat16 if trained.bf16 else torch.float32
    if trained.bf16 and not torch.cuda.is_available():
        raise UserError(f"{run.run} was trained in bf16 on a GPU, and no CUDA GPU is found here")
    try:
        base = load_ouro(
            trained.model_name_or_path,
            trained.model_revision,
            dtype=dtype,
            nf4=trained.use_qlora,
            double_quant=trained.bnb_4bit_use_double_quant,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        model = PeftModel.from_pretrained(base, folder / "final_adapter").eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {trained.model_name_or_path} with {folder / 'final_adapter'}: {error}") from None

    precision = "nf4" if trained.use_qlora else "bf16" if trained.bf16 else "fp32"
    table: dict[str, dict[int, dict]] = {}
    for name, adapted in ((f"base-{precision}", False), (run.run, True)):
        with contextlib.nullcontext() if adapted else model.disable_adapter():
            scores = score(base, tokenizer, questions, depths, run.settings.eval_batch_size, f"score {name}")
        table[name] = {}
        for d, depth in enumerate(depths):
            values = [by_depth[d] for by_depth in scores]
            summary = {
                "run": name,
                "benchmark": options.benchmark,
                "total_ut_steps": depth,
                "trained_ut_steps": trained.total_ut_steps if adapted else None,
                "model": trained.model_name_or_path,
                "model_revision": trained.model_revision,
                "precision": precision,
                "benchmark_revision": spec["revision"],
                "limit": options.limit,
                "protocol": {key: spec[key] for key in ("prompt", "option", "split")},
            } | summarise(items, [predict(item, v) for item, v in zip(items, values, strict=True)])
            table[name][depth] = summary
            save(Path(run.settings.results_dir) / name, options.benchmark, depth, summary, items, values)
    print_tables(run, folder, trained, options.benchmark, table)


def print_tables(run: Resolved, folder: Path, trained: Settings, benchmark: str, table: dict) -> None:
    log = [row for _, row in read_file(folder / "metrics.jsonl")]
    tokens = log[-1]["num_tokens"]
    rate = tokens / sum((b - a) / r["tokens_per_second"] for a, b, r in _spans(log))
    print(f"\ntraining of {run.run} at {trained.total_ut_steps} loops, {log[-1]['step']} steps, {tokens:,} tokens")
    print(f"  loss            first {log[0]['loss']:.4f}   last {log[-1]['loss']:.4f}")
    print(f"  token accuracy  first {log[0]['mean_token_accuracy']:.3f}    last {log[-1]['mean_token_accuracy']:.3f}")
    print(f"  tokens/s        {rate:,.0f}")
    (base, base_rows), (name, rows) = table.items()
    some = next(iter(rows.values()))
    majority = f"always the commonest letter {some['majority']:.1%}"
    print(f"\n{benchmark}: {some['items']} items, chance {some['chance']:.1%}, {majority}")
    interval = f"{'95 % interval':>15}"
    print(f"  loops  {base:>10} {interval}  {'adapted':>8} {interval}   {'gain':>6}   adapted answers")
    for depth, row in rows.items():
        other = base_rows[depth]
        letters = " ".join(f"{letter}:{count}" for letter, count in row["predicted"].items())
        print(
            f"  {depth:>5}  {other['accuracy']:>10.1%} {_interval(other):>15}  {row['accuracy']:>8.1%} "
            f"{_interval(row):>15}  {row['accuracy'] - other['accuracy']:>+7.1%}   {letters}"
        )
        letter, count = max(row["predicted"].items(), key=lambda pair: pair[1])
        if count > 0.8 * row["items"]:
            print(f"         warning: {count} of {row['items']} answers are {letter!r}: letter bias, not knowledge")
    print(f"\nfiles: {folder}/ (adapter, metrics.jsonl, data_report.json)")
    print(f"       {Path(run.settings.results_dir) / name}/ and {Path(run.settings.results_dir) / base}/")


def _spans(log: list[dict]):
    before = 0
    for row in log:
        yield before, row["num_tokens"], row
        before = row["num_tokens"]


def _interval(row: dict) -> str:
    return "{:.1%} – {:.1%}".format(*row["accuracy_ci95"])


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ut_steps", default="1,2,3,4", help="loop depths to score (default: 1,2,3,4)")
    parser.add_argument("--benchmark", default="thai_exam", help="a benchmark of configs/evals.yaml")
    parser.add_argument("--limit", type=int, help="only the first items of each subset")


def main() -> None:
    evaluate(resolve(__doc__, add_options=options))


if __name__ == "__main__":
    call(main)
