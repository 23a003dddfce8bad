"""What bench.py does around its measurements; the measurements themselves are no tests."""

import sys
from functools import partial

from ouro.files import UserError
from tools import bench

import pytest
import torch

SMOKE = ["--config", "tests/smoke.yaml"]
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture
def bench_py(monkeypatch, capsys):
    """bench.py with these arguments, in this process: what it prints, line by line in words."""

    def run(*arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["tools/bench.py", *arguments])
        bench.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def a_gpu(monkeypatch):
    """Of bench.py's making: what is measured on it is given."""
    monkeypatch.setattr(bench, "need_gpus", lambda *_: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--count", "0"], "--count must be at least 1"),
        (["train"], "--count 1: this machine has 0 GPUs"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench_py, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=message):
        bench_py(*arguments)


@pytest.mark.slow
def test_the_real_program_is_what_is_measured(bench_py, a_gpu, monkeypatch):
    monkeypatch.setattr(bench, "REAL", 200)
    monkeypatch.setattr(bench, "real_length", lambda chance: chance.randrange(60, 200))
    monkeypatch.setattr(bench, "TRAIN", {"small": ({}, None, 200, (2,))})
    monkeypatch.setattr(bench, "write_rows", partial(write_short_rows, bench.write_rows))
    (row,) = bench_py("train", *SMOKE, "--loops", "2")[3:]
    assert row[:4] == ["small", "2", "GPU", "0"] and float(row[4].replace(",", "")) > 0


def write_short_rows(write, path, count, length, tokenizer):
    write(path, count, min(length, 200), tokenizer)


@pytest.mark.parametrize("what", ["generate", "score"])
def test_generation_and_scoring_are_measured_on_a_cpu_too(bench_py, monkeypatch, what):
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e12)
    loops = ["--loops", "2", "--batch", "2"] if what == "generate" else []
    lines = bench_py(what, *SMOKE, "--eval_batch_tokens", "512", *loops)
    names = [line[0] for line in lines[3:]]
    assert names == (["generate", "generate", "stock"] if what == "generate" else ["letters,", "texts,"])
