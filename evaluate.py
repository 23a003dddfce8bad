"""Benchmarks at any loop depths, from one forward pass: trained runs beside the base at the same depth, and baselines.

    python evaluate.py --config configs/smoke.yaml                             # the run that `make smoke` trained
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4 --ut_steps 1,2,3,4 --limit 50
    python evaluate.py --config configs/a100.yaml --exp exp1-wangchan-ut4,seed1/exp2-wangchan-ut1 --tasks thai_exam
    python evaluate.py --config configs/a100.yaml --base                       # the base alone; --adapter FOLDER
    python evaluate.py --config configs/a100.yaml --model typhoon2-3b          # a baseline of evals.yaml, any Hub id

Writes RESULTS_DIR/<run>/<task>-ut<k>.json, in lm-evaluation-harness's shape with a block "study" of ours, one line an
item in <task>-ut<k>.items.jsonl, and manifest.json; the base's results, which all runs share, are in base-<precision>/.
What is there already is not computed again, unless something that its numbers depend on has changed, or with --again.
"""

import argparse
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ouro.data.sources import check_places
from ouro.evaluate import benchmarks
from ouro.files import UserError, call, file_sha256, message, one_line, place, remove_left
from ouro.settings import Resolved, Settings, resolve


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ut_steps", help="loop depths to score (default: 1,2,3,4)")
    parser.add_argument("--limit", type=int, help="only the first items of each subset")
    parser.add_argument("--subsets", help="only these, as onet,ic where a local copy has no more")
    parser.add_argument("--base", action="store_true", help="the base alone")
    parser.add_argument("--adapter", type=place, help="a folder in PEFT format in place of an experiment")
    parser.add_argument("--endpoint", help="address of a served model (…/v1), for tasks of replies, with --ut_steps")
    parser.add_argument("--judge", choices=("api", "none"), default="api",
                        help="api: JUDGE_BASE_URL, JUDGE_MODEL, JUDGE_API_KEY; none: no ratings")  # fmt: skip
    parser.add_argument("--again", action="store_true",
                        help="score, ask and rate anew what is there; the old files are kept as ….old")  # fmt: skip
    parser.add_argument("--model", type=place, help="a baseline of configs/evals.yaml, a Hub id or a folder")


def asked_tasks(run: Resolved) -> dict[str, dict]:
    """The rows of evals.yaml that --tasks names."""
    if run.options.limit is not None and run.options.limit < 1:
        raise UserError(f"--limit must be at least 1, got {run.options.limit}")
    specs = benchmarks.table()["tasks"]
    names = benchmarks.named(run.settings.tasks, specs, "task")
    check_places(run.settings, names, trained=False)  # before the network is asked for another of them
    return {name: specs[name] for name in names}


def parse_depths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(set(parts)) < len(parts) or not all(re.fullmatch("[1-9][0-9]?", part) for part in parts):
        raise UserError(f"--ut_steps must be different loop counts like 1,2,3,4, got {text!r}")
    return sorted(map(int, parts))


def command() -> Resolved:
    """What is asked for. Raises UserError: a mistake in it, or a file that it names is not there."""
    run = resolve(__doc__, add_options=options, several=True)
    asked_tasks(run)
    parse_depths(run.options.ut_steps)
    return run


ASKED: list[Resolved] = []  # read once: --config may be a pipe
if __name__ == "__main__":
    call(lambda: ASKED.append(command()), last=False)  # tells a mistake before ten seconds of imports

from ouro.data.formats import read_file
from ouro.data.thai import reply_tokens
from ouro.evaluate import judge, results, tables
from ouro.evaluate.benchmarks import LANGUAGES, REPLIES, Task, digest
from ouro.evaluate.endpoint import Server, find_endpoint, find_judge
from ouro.evaluate.models import ModelUnderTest, Weights, find_models
from ouro.evaluate.tasks import Outcome, chat_with, load_task, score_choices, score_replies, score_texts
from ouro.model.cost import forward_flops
from ouro.model.loading import model_files, read_config, warn_of_depth, with_adapter
from ouro.train.run_folder import check_base

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Job:
    """A task on which a model under test has no current result at some depths."""

    model: ModelUnderTest
    task: Task
    study: dict  # what the study block says of the model
    keys: dict[int, str]  # by depth: what the result's numbers depend on


def evaluate(run: Resolved) -> None:
    """Scores what the command asks for, and prints the tables.
    Raises UserError: a mistake in the command, the configuration or the data."""
    specs = asked_tasks(run)
    asked = parse_depths(run.options.ut_steps)
    weights, settings, models = find_models(run)
    depths = find_depths(asked, weights)
    tasks = load_tasks(run, specs, weights)
    jobs = find_jobs(run, weights, models, tasks, depths)
    if jobs:
        score_jobs(run, jobs, weights, settings, models)
    print_results(run, models, tasks, depths)


def find_depths(asked: list[int] | None, weights: Weights) -> list[int]:
    """The depths to score.
    Raises UserError: they are not of this model: one that does not loop has one, and so has a served one."""
    if weights.looped:
        if asked:
            warn_of_depth(asked[-1], read_config(weights.path, weights.revision).total_ut_steps)
        return asked or [1, 2, 3, 4]
    if told := weights.served_depths:
        if not set(asked or told) <= set(told):
            raise UserError(
                f"{weights.path} at {weights.endpoint} answers at depth {', '.join(map(str, told))}: leave --ut_steps "
                "out; make serve UT=… serves another depth"
            )
        return asked or told
    if weights.endpoint and (asked is None or len(asked) > 1):
        raise UserError(
            f"{weights.endpoint} answers at one depth and does not say which: name it by --ut_steps, as --ut_steps 4 "
            "(--ut_steps 1 for a model that does not loop)"
        )
    if not weights.endpoint and asked not in (None, [1]):
        raise UserError(f"{weights.path} does not loop, so it has one depth: leave --ut_steps out")
    return asked or [1]


def load_tasks(run: Resolved, specs: dict[str, dict], weights: Weights) -> list[Task]:
    """The tasks with their items.
    Raises UserError: a served model cannot be asked for them, or the items cannot be read."""
    silent = [name for name, spec in specs.items() if spec["protocol"] not in REPLIES]
    if weights.endpoint and silent:
        raise UserError(
            f"a served model gives no log-probabilities; {', '.join(silent)} needs them: --tasks openthaieval"
        )
    rows = benchmarks.table()["benchmarks"]
    known = {subset: 1 for spec in specs.values() for subset in rows[spec["benchmark"]].get("subsets", ())}
    subsets = benchmarks.named(run.options.subsets, known, "subset") if run.options.subsets else []
    tasks = []
    for name, spec in specs.items():
        try:
            tasks.append(load_task(name, run.settings, run.options.limit, subsets))
        except UserError as error:
            if not spec.get("optional") or run.origins["tasks"] != "default":
                raise
            print(f"  warning: {name} is left out: {message(error)}")
    return tasks


def find_jobs(
    run: Resolved, weights: Weights, models: list[ModelUnderTest], tasks: list[Task], depths: list[int]
) -> list[Job]:
    """What is to be scored: whatever has no current result.
    Raises UserError: results of all items would be replaced by those of some, or a run was trained on another base."""
    options, s = run.options, run.settings
    loaded = {}
    if not weights.endpoint:  # main is looked up once: what is loaded later is of this commit
        weights.revision = read_config(weights.path, weights.revision)._commit_hash or weights.revision
        loaded = model_files(weights.path, weights.revision)
        for model in models:
            if model.folder:
                check_base(model.folder, weights.path, loaded)
    base = {"model": weights.path, "model_revision": weights.revision, "precision": weights.precision,
            "weights": digest([*loaded.items()])}  # fmt: skip
    known = base | {"double_quant": weights.double_quant,
                    "normalise_thai": s.normalise_thai, "system_prompt": s.system_prompt}  # fmt: skip
    jobs = []
    for model in models:
        study = model.study() | base
        config = model.adapter and file_sha256(model.adapter / "adapter_config.json")
        known |= {"adapter": study["adapter_sha256"], "adapter_config": config}
        most = len(jobs) + len(tasks)  # jobs there would be if none of the tasks had a current result
        for task in tasks:
            files = {depth: file_of(run, model, task, depth) for depth in depths}
            keys = {depth: results.key_of(task, known, depth, run) for depth in depths}
            stale = {
                d: key for d, key in keys.items() if options.again or not is_current(files[d], task, key, options.judge)
            }
            if stale and (options.limit or options.subsets or task.part):
                results.spare_the_fuller([files[depth] for depth in stale], task)
            if stale:
                jobs.append(Job(model, task, study, stale))
                old = [
                    files[depth].name
                    for depth, key in stale.items()
                    if (was := results.read_study(files[depth]))
                    and key not in (was.get("key"), was.get("generation_key"))
                ]
                if old and not options.again:
                    print(f"{model.run}: {', '.join(old)}: of other weights, items or settings than now, scored anew")
        if most > len(jobs):
            # nothing is written where all is complete, and so nothing met that a killed process left there
            remove_left(Path(s.results_dir) / model.run / "manifest.json")
            print(f"{model.run}: {most - len(jobs)} of {len(tasks)} tasks are complete already")
    return jobs


def file_of(run: Resolved, model: ModelUnderTest, task: Task, depth: int) -> Path:
    return results.result_file(Path(run.settings.results_dir), model.run, task.name, depth)


def is_current(file: Path, task: Task, key: str, choice: str) -> bool:
    """Whether a result is there, with its items, and of these inputs, rated as --judge says. One that is rated is not
    replaced by one that is not."""
    study = results.read_study(file) or {}
    if not file.with_suffix(".items.jsonl").exists():
        return False
    if task.spec["protocol"] == "mt_bench":
        return study.get("generation_key") == key and judge.is_rated(study, choice)
    return study.get("key") == key


@dataclass
class Loaded:
    """What answers: the weights in memory and their tokenizer, or neither where a server has them; and the judge."""

    weights: Weights
    network: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    grader: Server | None


def score_jobs(
    run: Resolved, jobs: list[Job], weights: Weights, settings: Settings, models: list[ModelUnderTest]
) -> None:
    """Loads the weights and scores one model after the other; what is scored is on the disk before the next task. The
    base comes first, but for the tasks on which another job of a sweep scores it just now: they are looked at last."""
    folder, started = Path(run.settings.results_dir), time.monotonic()
    results.check_writable(folder)
    loaded = Loaded(weights, None, None, find_grader(jobs, run))
    if not weights.endpoint:
        loaded.tokenizer, loaded.network = weights.tokenizer(), weights.load(settings)
    if run.options.again:
        for job in jobs:
            results.set_aside([file_of(run, job.model, job.task, depth) for depth in job.keys])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for model, wait in [(models[0], False), *((model, True) for model in models[1:]), (models[0], True)]:
        own = [job for job in jobs if job.model is model and job.keys]
        if not own:
            continue
        with with_adapter(loaded.network, model.adapter, weights.precision):
            for job in own:
                with results.alone(folder / model.run / f".{job.task.name}.lock", wait) as mine:
                    if not mine or not still_to_do(job, run):
                        continue
                    begin = time.monotonic()
                    tokens = score_job(job, run, loaded)
                    seconds = time.monotonic() - begin
                    facts = {"tokens": tokens, "model": asdict(weights), "seed": run.settings.seed, "gpu": gpu}
                    results.note(folder, model.run, job.task, job.keys, seconds, facts)
                    job.keys = {}
                where = f"model {models.index(model) + 1} of {len(models)}, {time.monotonic() - started:.0f} s so far"
                done = f"{job.task.name}, {len(job.task.items)} items in {seconds:.1f} s"
                print(f"{model.run}: {done} ({where})", flush=True)


def still_to_do(job: Job, run: Resolved) -> bool:
    """Leaves to the job the depths of which no other process has written a current result since `find_jobs`."""
    files = {depth: file_of(run, job.model, job.task, depth) for depth in job.keys}
    job.keys = {d: k for d, k in job.keys.items() if not is_current(files[d], job.task, k, run.options.judge)}
    if not job.keys:
        print(f"{job.model.run}: {job.task.name} was scored by another process meanwhile", flush=True)
    return bool(job.keys)


def find_grader(jobs: list[Job], run: Resolved) -> Server | None:
    """The judge, after telling what it will cost and one call that shows that it is there; None if nothing is to be
    rated. Errors as judge.py's."""
    rated = [job for job in jobs if job.task.spec["protocol"] == "mt_bench"]
    if not rated:
        return None
    grader = find_judge(run.options.judge)
    number = sum(len(job.keys) for job in rated)
    room = run.settings.max_new_tokens or 0.75 * rated[0].task.spec["reply_characters"]  # tokens of the judge
    judge.announce(rated[0].task.items, grader, number, room)
    if grader:
        grader.check()
    return grader


def score_job(job: Job, run: Resolved, loaded: Loaded) -> int:
    """Saves the results of a task at the job's depths; the number of tokens that were read."""
    depths, tokens = list(job.keys), 0
    if apart := job.task.spec["protocol"] in REPLIES:  # one depth is saved before the next is asked
        outcomes = (reply(job, depth, run, loaded) for depth in depths)
    else:
        function = score_texts if job.task.spec["protocol"] == "text" else score_choices
        title, budget = f"{job.model.run}, {job.task.name}", run.settings.eval_batch_tokens
        outcomes = function(loaded.network, loaded.tokenizer, job.task, depths, budget, title)
    for depth, outcome in zip(depths, outcomes, strict=True):
        study = study_block(job, depth, run, loaded.network) | outcome.numbers
        file = file_of(run, job.model, job.task, depth)
        if apart or depth == depths[0]:
            results.note(Path(run.settings.results_dir), job.model.run, job.task, [depth] if apart else depths)
        results.save(file, results.content(job.task, study, loaded.weights.looped), outcome.lines)
        tokens = outcome.tokens
    return tokens


def study_block(job: Job, depth: int, run: Resolved, network: PreTrainedModel | None) -> dict:
    """What a result says of itself, but for its numbers."""
    task, protocol = job.task, job.task.spec["protocol"]
    return {
        "format": results.FORMAT,
        **job.study,
        "total_ut_steps": depth,
        "task": task.name,
        "benchmark": task.spec["benchmark"],
        "protocol": task.spec.get("name", protocol),
        "aspect": task.spec["aspect"],
        "primary": task.spec.get("primary", False),
        "metric": results.METRIC[protocol],
        "higher_is_better": protocol != "text",
        "benchmark_revision": task.benchmark["revision"],
        "split": task.benchmark.get("split"),
        "limit": run.options.limit,
        "skipped": task.skipped,
        "stripped": sum(item.get("stripped", False) for item in task.items),
        "part": task.part,
        "mean": task.spec.get("mean", "micro"),  # what is reported first
        "replies": {name: getattr(run.settings, name) for name in ("seed", "temperature", "max_new_tokens")}
        if protocol in REPLIES
        else None,  # `seed` is the training's
        "prompt_sha256": task.sha256,
        "key": job.keys[depth],
        "exit_distribution": None,
        "state_distance": [],
        "inference_flops_per_token": network and forward_flops(network, depth),
        "thai_share": None,
        "judge": None,
    }


def reply(job: Job, depth: int, run: Resolved, loaded: Loaded) -> Outcome:
    """A task of replies at one depth. What was replied, and rated, before a process died is not asked for again."""
    s, task, key = run.settings, job.task, job.keys[depth]
    title = f"{job.model.run} at {depth} loops, {task.name}"
    length = s.max_new_tokens or reply_tokens(loaded.tokenizer, task.spec["reply_characters"])
    if endpoint := loaded.weights.endpoint:
        by_request = depth if len(loaded.weights.served_depths) > 1 else None
        chat = find_endpoint(endpoint, length, s.temperature, s.seed, s.system_prompt, by_request)
    else:
        chat = chat_with(loaded.network, loaded.tokenizer, depth, s, length)
    file = file_of(run, job.model, task, depth)
    cache = results.cache_of(file)
    if task.spec["protocol"] == "generate":
        return score_replies(task, chat, key, cache, title)
    numbers, lines = judge.run_mt_bench(task.items, chat, loaded.grader, who=key, cache=cache, name=title)
    rated = judge.result_key(key, loaded.grader)
    return Outcome(numbers | {"generation_key": key, "key": rated}, lines)


def print_results(run: Resolved, models: list[ModelUnderTest], tasks: list[Task], depths: list[int]) -> None:
    for model in models:
        if model.folder:
            tables.print_training(model)
    for task in tasks:
        found = {(m.run, d): results.read_study(file_of(run, m, task, d)) for m in models for d in depths}
        tables.print_task(task, models, found, depths)
    folder, rows = Path(run.settings.results_dir), []
    if any(task.name in LANGUAGES for task in tasks):  # the other language may have been scored before
        for name, depth in ((model.run, depth) for model in models for depth in depths):
            both = [results.result_file(folder, name, task, depth).with_suffix(".items.jsonl") for task in LANGUAGES]
            if all(file.exists() for file in both):
                rows.append((name, depth, *([line for _, line in read_file(file)] for file in both)))
    if rows:
        tables.print_gaps(rows)
    for model in models:
        print(one_line(f"files: {folder / model.run}/" + (f" and {model.folder}/" if model.folder else "")))


def main() -> None:
    try:
        evaluate(ASKED.pop() if ASKED else command())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command scores what is not there yet", file=sys.stderr)
        raise


if __name__ == "__main__":
    call(main)
