"""Result files: their shape, when one is current, and how they are written."""

import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from ouro.evaluate import judge
from ouro.evaluate.subjects import Model, Subject
from ouro.evaluate.tasks import REPLIES, Task, digest
from ouro.files import UserError, code_version, write_atomic, write_json
from ouro.settings import Resolved

import torch

FORMAT = 1  # of the result files
VERSION = {"ours": 1, "labels": 1, "generate": 1, "text": 1}  # of each protocol's code: a new one scores anew
METRIC = {"ours": "accuracy", "labels": "accuracy", "generate": "accuracy", "text": "bits_per_character",
          "mt_bench": "rating"}  # fmt: skip


def result(task: Task, study: dict, model: Model) -> dict:
    """The file's content: what lm-evaluation-harness writes, and our block."""
    name, metric = task.name, {"accuracy": "acc"}.get(study["metric"], study["metric"])
    numbers = {name: {"alias": name, "sample_len": study["items"], f"{metric},none": study["value"],
                      f"{metric}_stderr,none": "N/A" if study["stderr"] is None else study["stderr"]}}  # fmt: skip
    subsets = {f"{name}_{key}": row for key, row in study["subsets"].items()}
    for key, row in subsets.items():
        numbers[key] = {"alias": f" - {key}", "sample_len": row["items"], f"{metric},none": row["value"]}
    every = list(numbers)
    spec = {key: value for key, value in task.spec.items() if key != "protocol"}
    return {
        "results": numbers,
        "group_subtasks": {name: list(subsets)},
        "configs": {key: {"task": key, "metadata": {"version": VERSION.get(task.spec["protocol"], 1)}, **spec}
                    for key in every},
        "versions": dict.fromkeys(every, VERSION.get(task.spec["protocol"], 1)),
        "n-shot": dict.fromkeys(every, task.spec.get("shots", 0)),
        "higher_is_better": {key: {metric: study["higher_is_better"]} for key in every},
        "n-samples": {key: dict.fromkeys(("original", "effective"), numbers[key]["sample_len"]) for key in every},
        "config": {"model": "ouro" if model.looped else "hf", "limit": study["limit"],
                   "model_args": f"pretrained={model.path},revision={model.revision},dtype={model.precision},"
                                 f"total_ut_steps={study['total_ut_steps']}"},
        "git_hash": None,
        "task_hashes": {name: study["prompt_sha256"]},
        "study": study,
    }  # fmt: skip


def result_file(results: Path, subject: Subject, task: Task, depth: int) -> Path:
    return results / subject.run / f"{task.name}-ut{depth}.json"


def read_result(file: Path) -> dict | None:
    """The study block of a file that is there and whole."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["study"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(results: Path, subject: Subject, task: Task, depth: int, content: dict, lines: list[dict]) -> None:
    file = result_file(results, subject, task, depth)
    file.unlink(missing_ok=True)  # of other items than those that are written now
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        write_atomic(file.with_suffix(".items.jsonl"), text)
        write_json(file, content)  # last: its presence says that the items are there
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; what was finished before is kept") from None


def note(results: Path, subject: Subject, task: Task, seconds: float, tokens: int, model: Model, seed: int) -> None:
    """RESULTS_DIR/<run>/manifest.json: what is not the same each time, and what each task was."""
    file = results / subject.run / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    manifest["run"] = subject.run
    manifest.setdefault("tasks", {})[task.name] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "items_per_second": round(len(task.items) / seconds, 2),
        "tokens": tokens,
        "model": asdict(model),
        "benchmark_revision": task.benchmark["revision"],
        "prompt_sha256": task.sha256,
        "seed": seed,
        **code_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        write_json(file, manifest)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--results_dir {folder}: nothing can be written there: {error.strerror}") from None


def key_of(task: Task, known: dict, depth: int, run: Resolved) -> str:
    """SHA-256 of all that the numbers of a result depend on, but for a judge."""
    protocol, s = task.spec["protocol"], run.settings
    parts = {"format": FORMAT, "version": VERSION.get(protocol), "task": task.spec, "prompts": task.sha256,
             "revision": task.benchmark["revision"], "depth": depth, "limit": run.options.limit}  # fmt: skip
    if protocol in REPLIES:
        parts |= {"temperature": s.temperature, "seed": s.seed, "max_new_tokens": s.max_new_tokens}
    return digest(parts | known)


def is_current(file: Path, task: Task, key: str, choice: str) -> bool:
    """Whether a result is there, with its items, and of these inputs, rated as --judge says. One that is rated is not
    replaced by one that is not."""
    study = read_result(file) or {}
    if not file.with_suffix(".items.jsonl").exists():
        return False
    if task.spec["protocol"] == "mt_bench":
        return study.get("generation_key") == key and judge.is_rated(study, choice)
    return study.get("key") == key


def spare_the_fuller(results: Path, subject: Subject, task: Task, depths: list[int], run: Resolved) -> None:
    """Raises UserError where results of some items, asked for by --limit or --subsets, would replace those of more."""
    if not (run.options.limit or run.options.subsets):
        return
    for file in (result_file(results, subject, task, depth) for depth in depths):
        items = (read_result(file) or {}).get("items", 0)
        if items > len(task.items):
            raise UserError(
                f"{file} holds {items} items, and {len(task.items)} of them would replace it: name another folder by "
                "--results_dir, or move that one away"
            )
