"""The folder of a training run: to which settings it belongs, its checkpoints, and what the run records in it.

    with hold(folder):                     # no other process trains into it meanwhile
        state = claim(folder, run)         # "new", "complete", or the newest good checkpoint, to continue from
        seal(folder / "checkpoint-100")    # writes checksums and syncs (ouro/files.py); damage(…) compares them

OUTPUT_DIR/<experiment>/ has config.yaml, manifest.json, data_report.json, metrics.jsonl, checkpoint-*/, final_adapter/
and, last, `completed`. A process may be killed at any moment: a file or folder is whole, or has a name under which
nothing reads it.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path

from ouro.data.sources import entry_of, overlap_names, overlap_place
from ouro.files import (
    SUMS,
    UserError,
    code_version,
    damage,
    file_sha256,
    lock,
    markdown,
    quoted,
    read_json,
    regular,
    seal,
    sync_file,
    write_atomic,
    write_json,
    yaml_line,
)
from ouro.model.loading import frozen_kind, model_files
from ouro.settings import FIELDS, Resolved, Settings, begun_with, recorded_settings
from ouro.train.processes import RANK, REQUEUED, WORLD_SIZE, print0

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

LEASE = 180  # seconds for which a file server may keep the lock of a node that has failed

# What progress.json of a checkpoint holds: LoopTrainer's state beside transformers' own.
PROGRESS = ("sums", "tokens", "logged_step", "log_bytes", "log_sha256", "processes", "recent", "rates", "since_log")
PLANNED = ("pass_tokens", "pass_grain")  # keys of manifest.json: a continued run puts rows into passes as before
EARLY = ("config.yaml", "data_report.json", "wandb", "tensorboard")  # what a run writes before its manifest.json
# What is deleted where a run without a checkpoint starts again. Other hidden files may be a file browser's or server's.
REWRITTEN = (*EARLY, "manifest.json", "metrics.jsonl", ".saving", ".final_adapter")
WRITTEN = (*REWRITTEN, "completed", "final_adapter", "merged", "generation_config.json")  # the last: make serve
RETRAIN = "train the run again (train_qlora.py --overwrite)"  # in messages, what helps where a file is lost
# In messages, how a run takes another value of a setting.
ANEW = "with --overwrite or another --output_dir (a run keeps what it began with)"
UNFINISHED = r"\..+\.tmp(\.d)?"  # temporary names, which a killed process leaves
FORMS = re.compile(rf"checkpoint-\d+|damaged-\d+-(checkpoint-\d+|metrics\.jsonl|manifest\.json)|{UNFINISHED}")


def is_ours(name: str) -> bool:
    """Whether a run, or its export, writes a file or folder of this name into the run's folder."""
    return name in WRITTEN or FORMS.fullmatch(name) is not None


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds more than what is written before manifest.json. A run that was refused before that
    has not begun, and its folder may be used with other settings."""
    return any(is_ours(name) and name not in EARLY and not name.startswith(".") for name in os.listdir(folder))


def other_settings(folder: Path, run: Resolved) -> dict[str, tuple[object, object]]:
    """The settings in which config.yaml of a run's folder and `run` differ, name -> (recorded, asked now), but for
    those that change nothing in training."""
    names = overlap_names(run.settings)
    used = {run.settings.dataset, *names, *map(overlap_place, names)}

    def compared(s: Settings) -> dict:
        values = vars(s) | {"paths": {name: path for name, path in s.paths.items() if name in used}}
        return {name: x for name, x in values.items() if FIELDS[name].metadata["changes"] != "nothing"}

    there, asked = compared(recorded_settings(folder)), compared(run.settings)
    return {name: (x, asked[name]) for name, x in there.items() if x != asked[name]}


def run_settings(run: Resolved, name: str | None = None) -> tuple[Path, Settings]:
    """The folder of a trained run, and the settings it was trained with. model_revision of a model on the Hub is the
    commit that was trained on.
    Raises UserError: it is not trained yet (the message holds the command that trains it); as `recorded_settings`."""
    name = name or run.run
    folder = Path(run.settings.output_dir) / name
    if not (folder / "completed").exists():
        state = "has been started but not finished" if folder.exists() else "has not been trained"
        seed, _, experiment = name.rpartition("/")
        command = ["python", "train_qlora.py", *(("--config", run.config) if run.config else ())]
        command += ("--exp", experiment) if run.options.exp else ()
        s = recorded_settings(folder) if (folder / "config.yaml").exists() else run.settings
        if s.dataset_path or s.dataset not in s.paths and not {"hub_id", "path"} & entry_of(s.dataset).keys():
            command += ("--dataset_path", s.dataset_path or "mine.csv")  # data of one's own are in no table
        command += ("--seed", seed.removeprefix("seed")) if seed else ()
        command += ("--output_dir", str(folder.parent)) if seed or run.origins["output_dir"] == "command line" else ()
        raise UserError(f"{name} {state}: no {folder / 'completed'}", f"train it: {' '.join(map(quoted, command))}")
    trained = recorded_settings(folder)
    if trained.model_revision is None and (folder / "manifest.json").exists():  # the main branch may have moved since
        trained.model_revision = read_json(folder / "manifest.json").get("model_files", {}).get("commit")
    return folder, trained


def check_base(folder: Path, path: str, files: dict[str, str] | None = None) -> None:
    """Refuses a base in a local folder whose files have changed since the run was trained on it. A base on the Hub is
    the same one by its commit, see `run_settings`.

    path: where the base is. files: its `model_files`, where the caller knows them.
    Raises UserError: it has changed, so the adapter does not belong to it; or manifest.json is damaged."""
    record = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    found = {"model_files": files or model_files(path, None)} if "model_files" in record and Path(path).is_dir() else {}
    if changed := changed_inputs(record, found):
        raise UserError(f"{folder} was trained on {changed} {path}: put the old files back, or {RETRAIN}")


def finished_run(run: Resolved) -> tuple[Path, Settings, Path]:
    """A run's folder, the settings it was trained with, and its adapter.
    Raises UserError: it is not trained, the adapter is damaged, or its base is another one now."""
    folder, trained = run_settings(run)
    check_base(folder, trained.model_name_or_path)
    return folder, trained, whole(folder / "final_adapter", f"restore it from a copy, or {RETRAIN}")


def whole(folder: Path, remedy: str) -> Path:
    """`folder`, after its checksums were compared. remedy: what the user is told to do where it is not whole.
    Raises UserError: it is not there, or its files are not those that were written."""
    if not folder.is_dir():
        raise UserError(f"no {folder}: {remedy}")
    if why := damage(folder):
        raise UserError(f"{folder} is damaged or was changed, {why}: {remedy}")
    return folder


def in_short(error: Exception) -> str:
    """An error's message in one line of at most 300 characters, without torch's advice on its allocator."""
    return " ".join(str(error).partition(" Of the allocated memory")[0].split())[:300]


def what_next(folder: Path) -> str:
    """For messages, what the command that has just failed does when it is given again."""
    if not (there := checkpoints(folder)):
        return "the same command begins anew"
    refusing = [option for option in ("--overwrite", "--resume never") if option in " ".join(sys.argv)]
    without = f" without {' and '.join(refusing)}" if refusing else ""
    return f"the same command{without} continues from {there[0].name}"


def out_of_memory(what: str, error: torch.OutOfMemoryError, folder: Path, s: Settings) -> UserError:
    """The message where a run that has begun meets a full GPU. what: what it was doing."""
    return UserError(
        f"{what}: {in_short(error)}",
        f"if another process uses this GPU (nvidia-smi), end it: {what_next(folder)}",
        f"else set activation_checkpointing to full, or lower max_length ({s.max_length}), {ANEW}",
    )


@contextmanager
def writing(what: str, folder: Path, unfinished: Path):
    """Raises UserError where the block cannot write its files, as on a full disk, and deletes `unfinished`.

    what: what is written, for the message; folder: the run's."""
    try:
        yield
    except Exception as error:  # torch.save raises RuntimeError, the library tokenizers Exception itself
        of_a_disk = isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception
        if not of_a_disk or isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, but about a GPU's memory
            raise
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{what} could not be written to {folder}: {in_short(error)} ({shutil.disk_usage(folder).free / 1e6:,.0f} "
            f"MB free); when that is mended, {what_next(folder)}"
        ) from None


def remove(path: Path) -> None:
    """Deletes a file or folder that a run has written. Files that a file server holds on to (.nfs…) stay, and of a link
    only the link goes."""
    if path.is_dir() and not path.is_symlink():
        (path / SUMS).unlink(missing_ok=True)  # first: a half-deleted checkpoint without checksums is none
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def set_aside(damaged: list[Path], with_them: Sequence[Path] = ()) -> None:
    """Renames damaged checkpoints, and before them `with_them`, the records that belong to them, to damaged-N-NAME, N
    the first number that is free for all of them. They are not deleted: perhaps a file server only failed to read
    them."""
    paths = [*with_them, *damaged]
    names = ([path.with_name(f"damaged-{n}-{path.name}") for path in paths] for n in count(1))
    free = next(each for each in names if not any(map(os.path.lexists, each)))
    for path, aside in zip(paths, free, strict=True):
        path.rename(aside)
    told = ", ".join(map(str, damaged))
    print0(f"{told}: damaged, renamed to {', '.join(path.name for path in free)}, which you may delete")


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.split("-")[1])


def holds_all_steps(checkpoint: Path) -> bool:
    """Whether a checkpoint is of the last step, so that only the adapter and `completed` are left to be written."""
    state = read_json(checkpoint / "trainer_state.json", "global_step", "max_steps")
    return state["global_step"] >= state["max_steps"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    named = (path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(filter(Path.is_dir, named), key=step_of, reverse=True)


@contextmanager
def hold(folder: Path):
    """Keeps other processes from training into `folder` meanwhile. Process 0 does it for its whole group.
    Raises UserError: another trains into it; for a job that was requeued, still after LEASE."""
    if RANK > 0:
        yield
        return
    real = Path(os.path.realpath(folder))  # a folder that two links lead to has one lock
    path = real.with_name(f".{real.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LEASE * REQUEUED
    with open(path, "a+", encoding="utf-8") as file:  # closing it unlocks it
        while True:
            try:
                if lock(file):
                    break
            except OSError as error:
                why = f"no locks on its file system ({error.strerror})"
                print0(f"{folder}: nothing keeps a second run out of it: {why}")
                break
            if time.monotonic() > end:
                file.seek(0)
                other = file.read().strip() or "another process"
                raise UserError(f"{other} trains into {folder} now: wait for it, or use another --output_dir")
            time.sleep(1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {now()},")
        file.flush()
        yield


def claim(folder: Path, run: Resolved) -> str | Path:
    """Makes `folder` belong to this run, and says what is there: "new" (nothing), "complete" (the same run, which is
    done), or the checkpoint to continue from. Process 0 goes first, and the others see what it left. Where there are
    checkpoints and none is whole, they are renamed with the run's log and manifest, and the folder is "new".
    Raises UserError: the folder holds something else: a run with other settings that has begun, which is neither
    continued nor counted as this one, or files that are no run; or it is not the same folder for all processes."""
    if run.options.overwrite and REQUEUED:
        print0("a job that was requeued continues: --overwrite was done when it began")
    overwrite = run.options.overwrite and RANK == 0 and not REQUEUED
    with PartialState().main_process_first():
        state = state_of(folder, run, overwrite)
        if state == "new" and RANK == 0:
            if not overwrite and (damaged := checkpoints(folder)):
                record = [folder / name for name in ("metrics.jsonl", "manifest.json")]
                set_aside(damaged, [path for path in record if path.exists()])
            empty(folder, all_of_it=overwrite)
            write_atomic(folder / "config.yaml", run.as_yaml())
        if state == "complete" and RANK == 0:
            for checkpoint in checkpoints(folder):  # of a run killed just after `completed`
                remove(checkpoint)
    found = gather_object([str(state) if (folder / "config.yaml").exists() else "nothing"])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise UserError(
                f"output_dir = {run.settings.output_dir} is not one shared folder: process 0 finds {found[0]} there, "
                f"process {rank} {theirs}; use one that all nodes share"
            )
    return state


def state_of(folder: Path, run: Resolved, overwrite: bool) -> str | Path:
    """What `claim` gives; nothing is changed here. "new" is also a run that --overwrite is to delete, that was ended
    before its first checkpoint, or of which no checkpoint is whole."""
    # a kill while config.yaml is first written leaves its temporary file in the folder, and that is hidden
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return "new"
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds files but no run (no config.yaml); use another --output_dir")
    if overwrite:
        return "new"
    others = other_settings(folder, run)
    if others and has_begun(folder):
        raise UserError(
            f"{folder} holds a run with other settings:",
            *(f"  {n}: {there!r} there, {asked!r} asked" for n, (there, asked) in others.items()),
            "use another --output_dir or experiment, or --overwrite to delete that run",
        )
    if (folder / "completed").exists():
        whole(folder / "final_adapter", "restore it from a copy, or --overwrite trains the run again")
        return "complete"
    for path in folder.glob("checkpoint-*"):
        if FORMS.fullmatch(path.name) and not path.is_dir():  # met when it is to be written, all steps would be lost
            raise UserError(f"{path} is no folder, and a checkpoint may be written there: move it away")
    lost, there = [], checkpoints(folder)
    for checkpoint in there:
        if run.options.resume == "never":
            raise UserError(f"{checkpoint} is there: --resume auto continues from it, --overwrite starts anew")
        why = damage(checkpoint)
        if why is None:
            for line in lost:
                print0(f"{line}: an older one is used")
            return checkpoint
        lost.append(f"{checkpoint} is damaged: {why}")
    if made := [f"{path} is there" for path in (folder / "final_adapter", folder / "merged") if path.exists()]:
        raise UserError(
            f"{folder} holds an unfinished run without a checkpoint to continue from:",
            *(f"  {line}" for line in (*lost, *made)),
            "restore one from a copy, use another --output_dir, or --overwrite to delete that run",
        )
    for file in (file for checkpoint in there for file in checkpoint.glob("[!.]*") if file.is_file()):
        file_sha256(file)  # a UserError where the file cannot be read: the checkpoint may be whole, and is not given up
    if lost:
        steps = f"all {step_of(there[0])} steps are trained again"
        print0(f"warning: no checkpoint is whole, so {run.run} starts from zero and {steps}: {'; '.join(lost)}")
    return "new"


def empty(folder: Path, all_of_it: bool) -> None:
    """Deletes what a run has written into a folder: all of it, or else (of a run that was ended before its first
    checkpoint) what it is going to write again. Files of others stay. So does config.yaml, which the caller writes
    anew: without it the folder would not count as a run's. A kill in between leaves an unfinished run, which can be
    deleted again."""
    config = folder / "config.yaml"
    if not config.exists():
        return
    if all_of_it:
        print0(f"deleting the {'' if (folder / 'completed').exists() else 'unfinished '}run in {folder}")
    first = [folder / "completed", *checkpoints(folder)]
    rest = [path for path in sorted(folder.iterdir()) if path not in (*first, config)]
    for path in (*first, *rest):
        if is_ours(path.name) if all_of_it else path.name in REWRITTEN or re.fullmatch(UNFINISHED, path.name):
            remove(path)
    if kept := [path.name for path in rest if not is_ours(path.name) and not path.name.startswith(".")]:
        print0(f"left in {folder}, as no run has written it: {', '.join(kept)}")


def inputs(s: Settings, report: dict) -> dict:
    """For manifest.json, what a run learns from: hashes of model, tokenizer, data and rows. A run is only continued
    while they are the same."""
    files = model_files(s.model_name_or_path, s.model_revision)
    return {"model_files": files} | {
        name: report[name] for name in ("tokenizer_sha256", "data_revision", "rows_sha256")
    }


def changed_inputs(record: dict, found: dict) -> str:
    """In words, which inputs recorded in a manifest differ from those found now; "" where none does."""
    told = []
    for name, new in found.items():
        old = record.get(name, new)
        if isinstance(new, dict):
            names = [file for file in sorted({**old, **new}) if old.get(file) != new.get(file)]
            told += [f"another {', '.join(names)} of the model"] if names else []
        elif old != new:
            told.append(f"{name} {old}, and this is {new}")
    return "; ".join(told)


def continue_from(checkpoint: Path, s: Settings, report: dict) -> None:
    """Cuts metrics.jsonl back to what it was when the checkpoint was saved, and adds to manifest.json that the run was
    continued.
    Raises UserError: model, data or tokenizer are not those that the run began with, manifest or log are damaged, or
    the log is not the one that the checkpoint was saved with."""
    folder, step = checkpoint.parent, step_of(checkpoint)
    advice = "put back what was there, use another --output_dir, or --overwrite to delete that run"
    found = inputs(s, report)
    try:
        record = read_json(folder / "manifest.json", *found, "packages", "git_commit", "gpu", *PLANNED)
        progress = read_json(checkpoint / "progress.json", *PROGRESS)
        log = regular(folder / "metrics.jsonl")
        kept = log.read_bytes()[: progress["log_bytes"]] if log.exists() else b""
        if hashlib.sha256(kept).hexdigest() != progress["log_sha256"]:
            raise UserError(f"{log} is not the log that {checkpoint.name} was saved with")
    except UserError as error:
        raise UserError(*error.args, advice) from None
    if changed := changed_inputs(record, found):
        raise UserError(f"{folder} began with {changed}: {advice}")
    print0(f"continuing from {checkpoint}")
    if progress["processes"] != WORLD_SIZE:
        print0(
            f"  with {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)} after {progress['processes']}: the same rows in "
            "each step, but another order of sums, so not the same bytes"
        )
    here = environment()
    record.setdefault("code_sha256", here["code_sha256"])  # a run that began before it was recorded
    parts = ("git_commit", "code_sha256", "gpu")
    before, today = (x["packages"] | {name: x[name] for name in parts} for x in (record, here))
    if changed := [f"{name} {x} after {before.get(name)}" for name, x in today.items() if x != before.get(name)]:
        print0(f"  unlike when it began: {', '.join(changed)}")
    write_atomic(log, kept)
    entry = {"step": step, "processes": WORLD_SIZE, "at": now(), **here}
    write_json(folder / "manifest.json", record | {"continued": [*record.get("continued", []), entry]})


def with_rate(record: dict, flops: float | None) -> dict:
    """manifest.json of a continued run, with the GPU's rate since."""
    *before, entry = record["continued"]
    return record | {"continued": [*before, entry | {"gpu_tflops": tflops(flops)}]}


def tflops(flops: float | None) -> float | None:
    """Of bf16 products, measured, for manifest.json: model_flop_use is a share of it."""
    return flops and round(flops / 1e12, 1)


def now() -> str:
    """The time in UTC, as in 2026-11-30T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def environment() -> dict:
    """For manifest.json: the commit of the code, the versions of packages, the GPU."""
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    return {
        **code_version(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def manifest(run: Resolved, model: PeftModel, report: dict, flops: float | None, memory: dict) -> dict:
    """The content of manifest.json: what is needed to repeat the run, code, versions, machine, revisions and seed.

    flops: the GPU's measured FLOP/s; memory: what `plan_steps` planned."""
    return {
        "run": run.run,
        "command": sys.argv,
        **environment(),
        "gpu_tflops": tflops(flops),
        **memory,
        "processes": WORLD_SIZE,
        "model": run.settings.model_name_or_path,
        "model_commit": getattr(model.config, "_commit_hash", None),
        **inputs(run.settings, report),
        "arm": run.settings.arm,
        "language": report["language"],
        "data": report["source"],
        "seed": run.settings.seed,
        "settings": begun_with(run.settings),
        "started": now(),
    }


def model_card(run: Resolved, report: dict, base: str, log: list[dict]) -> str:
    """README.md of an adapter. report: the data report; base: the base model's name; log: the lines of
    metrics.jsonl."""
    s, data, language = run.settings, markdown(report["dataset"]), report["language"]
    spoken = {"th": "Thai", "en": "English"}.get(language, language)
    licences = markdown(", ".join(f"{name}: {count} rows" for name, count in report["licences"].items()))
    return f"""---
{yaml_line(f"base_model: {json.dumps(base, ensure_ascii=False)}")}
library_name: peft
language: {language}
tags: [lora, looped-transformer, ouro]
---
# {run.run}

A LoRA adapter (r {s.r}, alpha {s.lora_alpha}, the seven projections of every layer) for {base}, trained on
{spoken} instructions at `total_ut_steps = {s.total_ut_steps}` with `loss: {s.loss}`. Read it at that depth:
the base model must be loaded with `total_ut_steps={s.total_ut_steps}`.

| | |
|---|---|
| data | {data}: {report["rows_kept"]} rows, {report["trained_tokens"]} trained tokens per epoch |
| licence of the data | {licences} |
| frozen weights | {frozen_kind(s)} |
| steps | {log[-1]["step"]} |
| loss, first and last logged | {log[0]["loss"]:.4f}, {log[-1]["loss"]:.4f} |

Settings: config.yaml of the run; a turn ends with `<|im_end|>` (id 2).
"""


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, run: Resolved, report: dict
) -> None:
    """Writes final_adapter/, then, when that is on the disk, `completed`; then deletes the checkpoints.
    Raises UserError: the disk is full."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    unfinished = folder / ".final_adapter"
    for left in (unfinished, folder / ".saving"):  # by a kill in between, or just after the last checkpoint's rename
        shutil.rmtree(left, ignore_errors=True)
    with writing("the adapter", folder, unfinished):
        model.save_pretrained(unfinished)
        config = json.loads((unfinished / "adapter_config.json").read_text(encoding="utf-8"))
        config["target_modules"].sort()  # PEFT writes a set, in another order in each process
        write_json(unfinished / "adapter_config.json", config)
        tokenizer.save_pretrained(unfinished)
        write_atomic(unfinished / "README.md", model_card(run, report, run.settings.model_name_or_path, log))
        seal(unfinished)
        shutil.rmtree(folder / "final_adapter", ignore_errors=True)  # of a run killed between here and `completed`
        os.replace(unfinished, folder / "final_adapter")
        sync_file(folder / "metrics.jsonl")
        write_json(folder / "completed", {"steps": log[-1]["step"], "loss": log[-1]["loss"]})
    for checkpoint in checkpoints(folder):
        remove(checkpoint)
    print0(f"adapter: {folder / 'final_adapter'}")
