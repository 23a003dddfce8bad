"""Benchmarks at any loop depths, from one forward pass: trained runs beside the base at the same depth, and baselines.

    python evaluate.py --config configs/smoke.yaml                             # the run that `make smoke` trained
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4 --ut_steps 1,2,3,4 --limit 50
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4,seed1/exp2-wangchan-ut1 --tasks thai_exam
    python evaluate.py --config configs/a100.yaml --base                       # the base alone; --adapter FOLDER
    python evaluate.py --config configs/a100.yaml --model typhoon2-3b          # a baseline of evals.yaml, any Hub id

Writes RESULTS_DIR/<run>/<task>-ut<k>.json, in lm-evaluation-harness's shape with a block "study" of ours, one line an
item in <task>-ut<k>.items.jsonl, and manifest.json; the base's results, which all runs share, are in base-<precision>/.
What is there already is not computed again, unless something that its numbers depend on has changed.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from ouro.data.sources import read_file
from ouro.evaluate import benchmarks, judge, tables
from ouro.evaluate.benchmarks import LANGUAGES, REPLIES, Task
from ouro.evaluate.endpoint import Server, find_endpoint, find_judge
from ouro.evaluate.results import (
    FORMAT,
    METRIC,
    check_writable,
    content,
    key_of,
    note,
    read_study,
    result_file,
    save,
    spare_the_fuller,
)
from ouro.evaluate.subjects import Model, Subject, find_subjects, fingerprint
from ouro.evaluate.tasks import (
    Outcome,
    chat_with,
    load_task,
    score_choices,
    score_replies,
    score_texts,
)
from ouro.files import UserError, call, file_sha256
from ouro.model.cost import forward_flops
from ouro.model.loading import read_config
from ouro.settings import Resolved, resolve

import torch
from transformers import PreTrainedModel


def find_depths(asked: list[int] | None, model: Model) -> list[int]:
    """The depths to score.

    Raises:
        UserError: they are not of this model: one that does not loop has one, and so has a served one.
    """
    if model.looped:
        return asked or [1, 2, 3, 4]
    if model.endpoint and (asked is None or len(asked) > 1):
        raise UserError(
            f"{model.endpoint} answers at one depth and does not say which: name it by --ut_steps, as --ut_steps 4 "
            "(--ut_steps 1 for a model that does not loop)"
        )
    if not model.endpoint and asked not in (None, [1]):
        raise UserError(f"{model.path} does not loop, so it has one depth: leave --ut_steps out")
    return asked or [1]


def is_current(file: Path, task: Task, key: str, choice: str) -> bool:
    """Whether a result is there, with its items, and of these inputs, rated as --judge says. One that is rated is not
    replaced by one that is not."""
    study = read_study(file) or {}
    if not file.with_suffix(".items.jsonl").exists():
        return False
    if task.spec["protocol"] == "mt_bench":
        return study.get("generation_key") == key and judge.is_rated(study, choice)
    return study.get("key") == key


def find_grader(wanted: list[tuple[Task, list[int], dict]], choice: str, max_new_tokens: int) -> Server | None:
    """The judge, after telling what it will cost and one call that shows that it is there; None if nothing is to be
    rated. Errors as judge.py's."""
    spoken = [(task, stale) for task, stale, _ in wanted if task.spec["protocol"] == "mt_bench"]
    if not spoken:
        return None
    grader = find_judge(choice)
    judge.announce(spoken[0][0].items, grader, sum(len(stale) for _, stale in spoken), max_new_tokens)
    if grader:
        grader.check()
    return grader


def evaluate(run: Resolved) -> None:
    """Scores what the command asks for, and prints the tables.

    Raises:
        UserError: a mistake in the command, the configuration or the data.
    """
    options, s = run.options, run.settings
    asked = None if options.ut_steps is None else parse_depths(options.ut_steps)
    table = benchmarks.table()
    names = benchmarks.task_names(s.tasks, table["tasks"])
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {options.limit}")
    model, base_settings, subjects = find_subjects(run)
    depths = find_depths(asked, model)
    spoken = {name for name in names if table["tasks"][name]["protocol"] in REPLIES}
    if model.endpoint and (silent := [name for name in names if name not in spoken]):
        raise UserError(
            f"a served model gives no log-probabilities; {', '.join(silent)} needs them: --tasks openthaieval"
        )
    subsets = benchmarks.subset_names(options.subsets, [table["tasks"][name] for name in names])
    tasks = [load_task(name, s, options.limit, subsets) for name in names]
    results = Path(s.results_dir)
    if not model.endpoint:  # main is read once: what is loaded below is of this commit
        model.revision = read_config(model.path, model.revision)._commit_hash or model.revision
    base = {"model": model.path, "model_revision": model.revision, "precision": model.precision}
    identity = base | {"weights": fingerprint(model.path, model.revision), "double_quant": model.double_quant,
                       "normalise_thai": s.normalise_thai, "system_prompt": s.system_prompt}  # fmt: skip
    plan = []
    for subject in subjects:
        study = subject.study() | base
        adapter = subject.adapter and file_sha256(subject.adapter / "adapter_config.json")
        known = identity | {"adapter": study["adapter_sha256"], "adapter_config": adapter}
        wanted = []
        for task in tasks:
            keys = {d: key_of(task, known, d, run) for d in depths}
            files = {d: result_file(results, subject.run, task.name, d) for d in depths}
            stale = [d for d in depths if not is_current(files[d], task, keys[d], options.judge)]
            if stale:
                if options.limit or options.subsets:
                    spare_the_fuller([files[d] for d in stale], task)
                wanted.append((task, stale, keys))
        plan.append((subject, study, wanted))
        done = len(tasks) - len(wanted)
        if done:
            print(f"{subject.run}: {done} of {len(tasks)} tasks are complete already")
    everything = [part for _, _, wanted in plan for part in wanted]
    if everything:
        check_writable(results)
    grader = find_grader(everything, options.judge, s.max_new_tokens)
    tokenizer = model.tokenizer() if everything and not model.endpoint else None
    loaded, started = None, time.monotonic()
    for number, (subject, study, wanted) in enumerate(plan):
        if not wanted:
            continue
        if loaded is None and not model.endpoint:
            loaded = model.load(base_settings)
        with model.attach(loaded, subject.adapter):
            for task, stale, keys in wanted:
                begin = time.monotonic()
                tokens = score_task(task, stale, keys, subject, loaded, tokenizer, model, study, run, grader)
                seconds = time.monotonic() - begin
                gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
                facts = {"tokens": tokens, "model": asdict(model), "seed": s.seed, "gpu": gpu}
                note(results, subject.run, task, seconds, facts)
                where = f"model {number + 1} of {len(subjects)}, {time.monotonic() - started:.0f} s so far"
                print(f"{subject.run}: {task.name}, {len(task.items)} items in {seconds:.1f} s ({where})", flush=True)
    print_results(results, subjects, tasks, depths)


def print_results(results: Path, subjects: list[Subject], tasks: list[Task], depths: list[int]) -> None:
    for subject in subjects:
        if subject.folder:
            tables.print_training(subject)
    for task in tasks:
        found = {(x.run, d): read_study(result_file(results, x.run, task.name, d)) for x in subjects for d in depths}
        tables.print_task(task, subjects, found, depths)
    if any(task.name in LANGUAGES for task in tasks):  # the other language may have been scored before
        rows = []
        for subject, depth in ((subject, depth) for subject in subjects for depth in depths):
            files = [results / subject.run / f"{name}-ut{depth}.items.jsonl" for name in LANGUAGES]
            if all(file.exists() for file in files):
                rows.append((subject.run, depth, *([line for _, line in read_file(file)] for file in files)))
        if rows:
            tables.print_gaps(rows)
    for subject in subjects:
        print(f"files: {results / subject.run}/" + (f" and {subject.folder}/" if subject.folder else ""))


def score_task(
    task: Task, depths: list[int], keys: dict, subject: Subject, loaded: PreTrainedModel | None, tokenizer,
    model: Model, study: dict, run: Resolved, grader: Server | None,
) -> int:  # fmt: skip
    """Scores a task at some depths and saves each; the number of tokens that were read."""
    s, protocol = run.settings, task.spec["protocol"]
    scores, cut, longest = None, 0, None
    if protocol in REPLIES:
        outcomes = (
            replied(task, depth, keys[depth], subject, loaded, tokenizer, model, run, grader) for depth in depths
        )
    else:
        longest = None if model.looped else getattr(loaded.config, "max_position_embeddings", None)
        function = score_texts if protocol == "text" else score_choices
        outcomes, scores, cut = function(loaded, tokenizer, task, depths, s.eval_batch_tokens, longest, subject.run)
    if cut:
        print(f"  warning: {task.name}: {cut} prompts are longer than {longest} tokens and lost their beginning")
    for d, (depth, outcome) in enumerate(zip(depths, outcomes, strict=True)):
        block = {
            "format": FORMAT,
            **study,
            "total_ut_steps": depth,
            "task": task.name,
            "benchmark": task.spec["benchmark"],
            "protocol": task.spec.get("name", protocol),
            "aspect": task.spec["aspect"],
            "primary": task.spec.get("primary", False),
            "metric": METRIC[protocol],
            "higher_is_better": protocol != "text",
            "benchmark_revision": task.benchmark["revision"],
            "split": task.benchmark.get("split"),
            "limit": run.options.limit,
            "skipped": task.skipped,
            "replies_seed": s.seed if protocol in REPLIES else None,  # `seed` is the training's
            "prompt_sha256": task.sha256,
            "key": keys[depth],
            "exit_distribution": scores and scores.exits and scores.exits[d],
            "state_distance": scores.distances[: depth - 1] if scores else [],
            "inference_flops_per_token": loaded and forward_flops(loaded, depth),
            "thai_share": None,
            "judge": None,
            **outcome.numbers,
        }
        file = result_file(Path(s.results_dir), subject.run, task.name, depth)
        save(file, content(task, block, model.looped), outcome.lines)
    return scores.tokens if scores else 0


def replied(
    task: Task, depth: int, key: str, subject: Subject, loaded: PreTrainedModel | None, tokenizer, model: Model,
    run: Resolved, grader: Server | None,
) -> Outcome:  # fmt: skip
    """A task of replies at one depth. What was replied, and rated, before a process died is not asked for again."""
    s, who = run.settings, f"{subject.run} at {depth} loops, {task.name}"
    length = task.spec.get("max_new_tokens", s.max_new_tokens)
    if model.endpoint:
        chat = find_endpoint(model.endpoint, length, s.temperature, s.seed, s.system_prompt)
    else:
        chat = chat_with(loaded, tokenizer, depth, s, length)
    cache = result_file(Path(s.results_dir), subject.run, task.name, depth).with_suffix(".cache.jsonl")
    cache = cache.with_name(f".{cache.name}")
    if task.spec["protocol"] == "generate":
        return score_replies(task, chat, key, cache, who)
    numbers, lines = judge.run_mt_bench(task.items, chat, grader, who=key, cache=cache, name=who)
    return Outcome(numbers | {"generation_key": key, "key": judge.result_key(key, grader and grader.model)}, lines)


def parse_depths(text: str) -> list[int]:
    depths = sorted({int(part) for part in text.split(",") if part.strip().isdigit()})
    if not depths or depths[0] < 1 or len(depths) != len(text.split(",")):
        raise UserError(f"--ut_steps must be different loop counts like 1,2,3,4, got {text!r}")
    return depths


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ut_steps", help="loop depths to score (default: 1,2,3,4)")
    parser.add_argument("--limit", type=int, help="only the first items of each subset")
    parser.add_argument("--subsets", help="only these, as onet,ic where a local copy has no more")
    parser.add_argument("--base", action="store_true", help="the base alone")
    parser.add_argument("--adapter", help="a folder in PEFT format in place of an experiment")
    parser.add_argument("--endpoint", help="address of a served model (…/v1), for tasks of replies, with --ut_steps")
    parser.add_argument("--judge", choices=("api", "none"), default="api",
                        help="api: JUDGE_BASE_URL, JUDGE_MODEL, JUDGE_API_KEY; none: no ratings")  # fmt: skip
    parser.add_argument("--model", help="a baseline of configs/evals.yaml, or a causal model: Hub id or folder")


def main() -> None:
    evaluate(resolve(__doc__, add_options=options, several=True))


if __name__ == "__main__":
    call(main)
