"""What several test modules need: a small run, trained in this process, and what its folder holds.

    run = trained(tmp_path, "--max_steps", "2")      # the folder tmp_path/smoke, by tests/smoke.yaml
    assert_same_run(run, trained(tmp_path / "again", "--max_steps", "2"))

Paths in tests/smoke.yaml are relative: a module that trains uses the fixture `in_the_repository` of conftest.py.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from ouro import FOREIGN
from ouro.files import latest
from ouro.settings import Resolved, resolve

from conftest import PATIENCE

ROOT = Path(__file__).resolve().parents[1]
CACHE = tempfile.TemporaryDirectory(prefix="ouro-thai-cache-")  # tokenised rows, for all tests of this process
SMALL = ["--config", "tests/smoke.yaml", "--report_to", "none", "--overlap", "none", "--cache_dir", CACHE.name]
MEASURED = ("tokens_per_second", "padded_tokens_per_second", "seconds", "memory_gib")  # differs when a run is repeated


def write_jsonl(path: Path, *rows: dict) -> str:
    """The path, as text: an argument of a command."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def resolved(*argv: str) -> Resolved:
    """The settings of a small run, by what train_qlora.py's command line takes."""
    import train_qlora  # not above: tests of the report need no torch

    return resolve("", latest([*SMALL, *argv]), add_options=train_qlora.options)


def trained(folder: Path, *argv: str) -> Path:
    """Trains in this process; the run's folder, in `folder`."""
    import train_qlora

    return train_qlora.train(resolved("--output_dir", str(folder), *argv))


def metrics(run: Path) -> list[dict]:
    return read_jsonl(run / "metrics.jsonl")


def repeatable(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured by the clock."""
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in metrics(run)]


def assert_same_run(run: Path, whole: Path) -> None:
    """Both are complete, with the same bytes, and nothing that belongs to a run in progress is left."""
    assert (run / "completed").read_bytes() == (whole / "completed").read_bytes()
    assert repeatable(run) == repeatable(whole)
    for name in ("adapter_model.safetensors", "tokenizer.json", "README.md", "SHA256SUMS"):
        assert (run / "final_adapter" / name).read_bytes() == (whole / "final_adapter" / name).read_bytes(), name
    assert not list(run.glob("checkpoint-*")) and not list(run.glob(".*")), "only the adapter remains"


def port() -> str:
    """A free port of this machine, of those that the kernel does not hand out: it stays free until it is used."""
    while True:
        number = random.randrange(10_000, 32_768)
        with suppress(OSError), socket.socket() as opened:
            opened.bind(("127.0.0.1", number))
            return str(number)


def in_processes(count: int, *command: str) -> tuple[list[int], list[str]]:
    """Runs python with these arguments so many times, as torchrun does; the exit codes, and what was printed."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    places |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}  # training sets some
    started = [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=environment | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], printed
