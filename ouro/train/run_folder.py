"""The folder of a training run: whose it is, its checkpoints, and what it records.

    state = claim(folder, run, overwrite)       # "new", "complete", or the newest good checkpoint, to continue from
    seal(folder / "checkpoint-100")             # checksums, all on the disk; is_good(…) looks at them again
    write_json(folder / "manifest.json", manifest(run, model, report, flops, memory))

OUTPUT_DIR/<experiment>/ has config.yaml, manifest.json, data_report.json, metrics.jsonl, checkpoint-*/, final_adapter/
and, last, `completed`. A process may be killed at any moment: what is there is whole, or named so that it is not read.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from ouro.files import UserError, code_version, read_yaml, write_atomic, write_json
from ouro.model.loading import frozen_kind
from ouro.settings import FIELDS, Resolved, Settings, other_settings, parse
from ouro.train.processes import RANK, REQUEUED, WORLD_SIZE

import torch
from peft import PeftModel
from safetensors import SafetensorError


def run_settings(run: Resolved, name: str | None = None) -> tuple[Path, Settings]:
    """The folder of a trained run, and the settings it was trained with.

    Raises:
        UserError: it is not trained yet; the message holds the command that does it.
    """
    name = name or run.run
    folder = Path(run.settings.output_dir) / name
    if not (folder / "completed").exists():
        state = "has been started but not finished" if folder.exists() else "has not been trained"
        config = f" --config {run.config}" if run.config else ""
        seed, _, experiment = name.rpartition("/")
        exp = f" --exp {experiment}" if run.options.exp else ""
        exp += f" --seed {seed.removeprefix('seed')}" if seed else ""
        exp += f" --output_dir {folder.parent}" if seed or run.origins["output_dir"] == "command line" else ""
        raise UserError(f"{name} {state}: no {folder / 'completed'}\ntrain it: python train_qlora.py{config}{exp}")
    return folder, recorded_settings(folder)


def recorded_settings(folder: Path) -> Settings:
    recorded, origin = read_yaml(folder / "config.yaml"), f"{folder}/config.yaml"
    return Settings(**{name: parse(name, value, origin) for name, value in recorded.items() if name in FIELDS})


LEASE = 180  # seconds for which a file server may keep the lock of a node that has failed
HELD: dict[Path, TextIO] = {}  # the locks of this process
SUMS = "SHA256SUMS"  # of a checkpoint, as `sha256sum -c` reads it


def in_short(error: Exception) -> str:
    return " ".join(str(error).partition(" Of the allocated memory")[0].split())[:300]


@contextmanager
def writing(what: str, folder: Path, unfinished: Path):
    """Raises UserError where something of a run could not be written, as on a full disk; what is older stays."""
    try:
        yield
    except torch.OutOfMemoryError:  # of a GPU
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save's
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(
            f"{what} could not be written to {folder}: {in_short(error)} ({shutil.disk_usage(folder).free / 1e6:,.0f} "
            "MB free); the same command continues from the last good checkpoint"
        ) from None


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def seal(folder: Path) -> None:
    """Writes all of a folder to the disk, and the SHA-256 of every file in it beside them."""
    lines = []
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as opened:
            lines.append(f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {file.name}\n")
        sync_file(file)
    write_atomic(folder / SUMS, "".join(lines))  # which syncs the folder too


def is_good(folder: Path) -> bool:
    """Whether every file of a checkpoint is there and is what was written."""
    try:
        sums = dict(line.split("  ", 1)[::-1] for line in (folder / SUMS).read_text().splitlines())
        if sums.keys() != {file.name for file in folder.iterdir()} - {SUMS}:
            return False
        for name, digest in sums.items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return False
    except (OSError, ValueError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


@contextmanager
def letting_go():
    """What is held inside is free again afterwards."""
    try:
        yield
    finally:
        while HELD:
            HELD.popitem()[1].close()


def hold(folder: Path) -> None:
    """Keeps other processes from training into `folder`.

    Raises:
        UserError: one trains into it; for a job that was requeued, still after LEASE.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    HELD[folder] = file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  it is locked as long as it is open
    end = time.monotonic() + LEASE * REQUEUED
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the kind that works over NFS, too
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"{folder}: nothing keeps a second run out of it: no locks on its file system ({error.strerror})")
                return
            if time.monotonic() > end:
                file.seek(0)
                other = file.read().strip() or "another process"
                raise UserError(f"{other} trains into {folder} now: wait for it, or use another --output_dir") from None
            time.sleep(1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {now()},")
    file.flush()


def claim(folder: Path, run: Resolved, overwrite: bool) -> str | Path:
    """Makes `folder` this run's: "new", "complete" if the same run is done there already, or the checkpoint to
    continue from.

    Raises:
        UserError: the folder holds something else: a run with other settings that has begun, which is neither continued
            nor counted as this one, or files that are no run; or another process trains into it.
    """
    if RANK == 0:
        hold(folder)
    config = folder / "config.yaml"
    if folder.exists() and any(not path.name.startswith(".config.yaml.") for path in folder.iterdir()):
        if not config.exists():
            raise UserError(f"{folder} holds files but no run (no config.yaml); use another --output_dir")
        others = other_settings(folder, run)
        if others and not overwrite and has_begun(folder):
            differences = "".join(f"\n  {n}: {there!r} there, {asked!r} asked" for n, (there, asked) in others.items())
            raise UserError(
                f"{folder} holds a run with other settings:{differences}\n"
                "use another --output_dir or experiment, or --overwrite to delete that run"
            )
        if not overwrite:
            if (folder / "completed").exists():
                if RANK == 0:
                    for checkpoint in checkpoints(folder):  # of a run killed just after `completed`
                        shutil.rmtree(checkpoint)
                return "complete"
            for checkpoint in checkpoints(folder):
                if run.options.resume == "never":
                    raise UserError(f"{checkpoint} is there: --resume auto continues from it, --overwrite starts anew")
                if is_good(checkpoint):
                    return checkpoint
                if RANK == 0:
                    print(f"{checkpoint} is damaged (its files are not those of {SUMS}): looking for an older one")
        if RANK == 0:
            print(f"deleting the {'' if (folder / 'completed').exists() else 'unfinished '}run in {folder}")
            # A kill in between leaves an unfinished run, and no checkpoint without what belongs to it.
            first = [folder / "completed", *checkpoints(folder)]
            rest = set(folder.iterdir()) - {*first, config}
            for path in (*first, *sorted(rest), config):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
    if RANK == 0:
        write_atomic(config, run.as_yaml())
    return "new"


def continue_from(checkpoint: Path, report: dict) -> None:
    """Takes back what the run recorded after its checkpoint, and records that it was continued.

    Raises:
        UserError: the training data or the tokenizer are not those that the run began with.
    """
    folder, step = checkpoint.parent, step_of(checkpoint)
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("data_revision", "tokenizer_sha256"):
        if record[name] != report[name]:
            raise UserError(
                f"{folder} began with {name} {record[name]}, and this is {report[name]}: bring it back, or --overwrite"
            )
    progress = json.loads((checkpoint / "progress.json").read_text())
    print(f"continuing from {checkpoint}")
    if progress["processes"] != WORLD_SIZE:
        print(
            f"  with {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)} after {progress['processes']}: the same rows in "
            "each step, but other dropout masks and another order of sums, so not the same bytes"
        )
    here, there = machine(), {name: record.get(name) for name in ("git_commit", "gpu")} | record["packages"]
    packages = {name: number for name, number in here["packages"].items() if number != there.get(name)}
    changed = packages | {name: here[name] for name in ("git_commit", "gpu") if here[name] != there[name]}
    if changed:
        print("  unlike when it began: " + ", ".join(f"{n} {now} after {there.get(n)}" for n, now in changed.items()))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(metrics, "".join(f"{line}\n" for line in kept))
    entry = {"step": step, "processes": WORLD_SIZE, "at": now(), **here, "packages": packages}
    record.setdefault("continued", []).append(entry)
    write_json(folder / "manifest.json", record)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine() -> dict:
    """Code, versions, GPU."""
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    return {
        **code_version(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def manifest(run: Resolved, model: PeftModel, report: dict, flops: float | None, memory: dict) -> dict:
    """What is needed to repeat the run: code, versions, machine, revisions, seed."""
    return {
        "run": run.run,
        "command": sys.argv,
        **machine(),
        "gpu_tflops": flops and round(flops / 1e12, 1),  # of bf16 products, measured: model_flop_use is a share of it
        **memory,
        "processes": WORLD_SIZE,
        "model": run.settings.model_name_or_path,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "tokenizer_sha256": report["tokenizer_sha256"],
        "data": report["source"],
        "data_revision": report["data_revision"],
        "seed": run.settings.seed,
        "started": now(),
    }


def model_card(run: Resolved, report: dict, base: str, log: list[dict]) -> str:
    s = run.settings
    return f"""---
base_model: {base}
library_name: peft
language: th
tags: [lora, looped-transformer, ouro]
---
# {run.run}

A LoRA adapter (r {s.r}, alpha {s.lora_alpha}, the seven projections of every layer) for {base}, trained on Thai
instructions at `total_ut_steps = {s.total_ut_steps}` with `loss: {s.loss}`. Read it at that depth:
the base model must be loaded with `total_ut_steps={s.total_ut_steps}`.

| | |
|---|---|
| data | {report["dataset"]}: {report["rows_kept"]} rows, {report["trained_tokens"]} trained tokens per epoch |
| licence of the data | {", ".join(f"{name}: {count} rows" for name, count in report["licences"].items())} |
| frozen weights | {frozen_kind(s)} |
| steps | {log[-1]["step"]} |
| loss, first and last logged | {log[0]["loss"]:.4f}, {log[-1]["loss"]:.4f} |

Settings: config.yaml of the run; a turn ends with `<|im_end|>` (id 2).
"""


def has_begun(folder: Path) -> bool:
    """Whether a run's folder holds more than what is written before its manifest, as after a refusal so early."""
    early = ("config.yaml", "data_report.json", "wandb", "tensorboard")
    return any(path.name not in early and not path.name.endswith(".tmp") for path in folder.iterdir())
