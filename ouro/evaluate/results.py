"""Result files: what stands in them, and how they are written and read. No torch in here: judge.py needs none.

RESULTS_DIR/<run>/<task>-ut<depth>.json has lm-evaluation-harness's shape and a block "study" of ours; beside it
<task>-ut<depth>.items.jsonl has a line an item, and manifest.json what each task took. results_<task>_ut<depth>.json is
a link to the first, under a name that lm-evaluation-harness's own finder knows.
"""

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO

from ouro.evaluate.benchmarks import REPLIES, Task, digest
from ouro.files import WHOLE, UserError, code_version, lock, one_line, regular, write_atomic, write_json
from ouro.settings import Resolved

FORMAT = 1  # of the result files
VERSION = 3  # of the protocols' code: a higher one scores everything anew
METRIC = {"ours": "accuracy", "labels": "accuracy", "generate": "accuracy", "text": "bits_per_character",
          "mt_bench": "rating"}  # fmt: skip


def harness_metric(study: dict) -> str:
    return {"accuracy": "acc"}.get(study["metric"], study["metric"])


def harness_rows(study: dict) -> dict[str, dict]:
    """The block `results` as lm-evaluation-harness writes it, of the task and of each of its subsets."""
    task, metric = study["task"], harness_metric(study)
    rows = {task: {"alias": task, "sample_len": study["items"], f"{metric},none": study["value"],
                   f"{metric}_stderr,none": "N/A" if study["stderr"] is None else study["stderr"]}}  # fmt: skip
    for subset, row in study["subsets"].items():
        rows[f"{task}_{subset}"] = {"alias": f" - {task}_{subset}", "sample_len": row["items"],
                                    f"{metric},none": row["value"]}  # fmt: skip
    return rows


def content(task: Task, study: dict, looped: bool) -> dict:
    """A result file: what lm-evaluation-harness writes, so that its tools read it, and our block."""
    rows = harness_rows(study)
    metric = harness_metric(study)
    spec = {key: value for key, value in task.spec.items() if key != "protocol"}
    return {
        "results": rows,
        "group_subtasks": {task.name: [row for row in rows if row != task.name]},
        "configs": {row: {"task": row, "metadata": {"version": VERSION}, **spec} for row in rows},
        "versions": dict.fromkeys(rows, VERSION),
        "n-shot": dict.fromkeys(rows, task.spec.get("shots", 0)),
        "higher_is_better": {row: {metric: study["higher_is_better"]} for row in rows},
        "n-samples": {row: dict.fromkeys(("original", "effective"), rows[row]["sample_len"]) for row in rows},
        "config": {"model": "ouro" if looped else "hf", "limit": study["limit"],
                   "model_args": f"pretrained={study['model']},revision={study['model_revision']},"
                                 f"dtype={study['precision']},total_ut_steps={study['total_ut_steps']}"},
        "git_hash": None,
        "task_hashes": {task.name: study["prompt_sha256"]},
        "study": study,
    }  # fmt: skip


def result_file(results: Path, run: str, task: str, depth: int) -> Path:
    return results / run / f"{task}-ut{depth}.json"


def harness_name(file: str) -> str:
    """By which lm-evaluation-harness finds a result file; the report, which looks for "-ut", does not."""
    return f"results_{file.replace('-ut', '_ut')}"


def cache_of(file: Path) -> Path:
    """Where the replies and judgements of a result are kept as they come."""
    return file.with_name(f".{file.stem}.cache.jsonl")


@contextlib.contextmanager
def alone(path: Path, wait: bool) -> Iterator[bool]:
    """A lock that one process has at a time: True, it is this one's until the block ends; False, another has it. wait:
    for the other to end, be it by a kill. Where the file system has no locks each has it, and all write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        with open(path, "a") as file:
            if (mine := holds(file, path)) or not wait:
                try:
                    yield mine
                finally:
                    if mine:
                        path.unlink(missing_ok=True)
                return
        if number == 0:
            print(f"{path.parent.name}: another process is at {path.stem[1:]}; waiting for its end", flush=True)
        time.sleep(1)


def holds(file: IO, path: Path) -> bool:
    """Whether this process has the lock now, of the file that stands at `path`: who had it has deleted what it locked,
    and a third process may have made and locked another."""
    try:
        return lock(file) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
    except OSError:  # no locks
        return True


def set_aside(files: list[Path]) -> None:
    """Renames results, their items and replies to ….old: after an interruption the command goes on without --again."""
    for file in files:
        for old in (file, file.with_suffix(".items.jsonl"), cache_of(file)):
            if old.exists():
                old.replace(old.with_name(f"{old.name}.old"))
    print(f"{', '.join(map(one_line, files))}: anew (after an interruption go on without --again)")


def read_study(file: Path) -> dict | None:
    """The block "study" of a file that is there and whole. Raises UserError: it is a named pipe or a device."""
    try:
        return json.loads(regular(file, WHOLE).read_text(encoding="utf-8"))["study"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(file: Path, content: dict, lines: list[dict], meanwhile: dict | None = None) -> None:
    """Writes a result and the lines of its items. The only place that writes results. One of the same inputs is never
    away: another job of a sweep, which has scored the base too, may be reading it.

    meanwhile: what stands there until both are written, so that no interruption leaves old numbers beside new items;
    nothing where all can be computed again.
    Raises UserError: a full disk, a folder that cannot be written, or a number that is NaN or infinite."""
    text, where = "", "its means"
    try:
        json.dumps(content, allow_nan=False)
        for line in lines:
            where = line["id"]
            text += json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError:
        raise UserError(f"{file} is not saved: {where}: a number in it is NaN or infinite") from None
    try:
        if meanwhile is None:
            if (read_study(file) or {}).get("key") != content.get("study", {}).get("key"):
                file.unlink(missing_ok=True)
        else:
            write_json(file, meanwhile)
        write_atomic(file.with_suffix(".items.jsonl"), text)
        with contextlib.suppress(OSError):  # it is there already, or the file system has no links
            file.with_name(harness_name(file.name)).symlink_to(file.name)
        write_json(file, content)  # last: its presence says that the items and the link are there
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; what was finished before is kept") from None


def note(
    results: Path, run: str, task: Task, depths: Iterable[int], seconds: float | None = None, facts: dict | None = None
) -> None:
    """Adds to RESULTS_DIR/<run>/manifest.json what differs each time, so is in no result: with what code and packages
    these depths are scored, which is said before a result is written, as a kill must leave none of which it is not; and
    of the task how long that took, with the caller's facts, where they are given."""
    file = results / run / "manifest.json"
    with alone(file.with_name(".manifest.lock"), wait=True):  # two jobs may score the base's tasks
        try:
            manifest = json.loads(regular(file, WHOLE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            manifest = {}
        manifest["run"] = run
        tasks, code = manifest.setdefault("tasks", {}), code_version()
        packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
        made = {"code_sha256": code["code_sha256"], "packages": packages}
        entry = tasks.setdefault(task.name, {})
        entry["depths"] = entry.get("depths", {}) | {str(depth): made for depth in depths}
        if seconds is not None:
            tasks[task.name] = {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 1),
                "items_per_second": round(len(task.items) / seconds, 2),
                "benchmark_revision": task.benchmark["revision"],
                "prompt_sha256": task.sha256,
                **facts,
                **code,
                "packages": packages,
                "depths": entry["depths"],
            }
        write_json(file, manifest)


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--results_dir {folder}: nothing can be written there: {error.strerror}") from None


def key_of(task: Task, known: dict, depth: int, run: Resolved) -> str:
    """SHA-256 of all that the numbers of a result depend on, but for a judge. known: what is known of the model."""
    protocol, s = task.spec["protocol"], run.settings
    parts = {"format": FORMAT, "version": VERSION, "task": task.spec, "prompts": task.sha256,
             "revision": task.benchmark["revision"], "depth": depth, "limit": run.options.limit}  # fmt: skip
    if protocol in REPLIES:
        parts |= {"temperature": s.temperature, "seed": s.seed, "max_new_tokens": s.max_new_tokens}
    return digest(parts | known)


def spare_the_fuller(files: list[Path], task: Task) -> None:
    """Raises UserError where results of some items, as of a local copy, would replace those of more."""
    for file in files:
        if (items := (read_study(file) or {}).get("items", 0)) > len(task.items):
            fewer, remedy = f"{len(task.items)} of them", "name another folder by --results_dir, or move that one away"
            raise UserError(f"{file} holds {items} items, and {fewer} would replace it: {remedy}")
