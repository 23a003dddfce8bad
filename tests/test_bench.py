"""What bench.py does around its measurements; the measurements themselves are no tests."""

import sys

from ouro.files import UserError
from tools import bench

import pytest
import torch

pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture
def bench_py(monkeypatch, capsys):
    """bench.py with these arguments, in this process: what it prints below the title, line by line in words."""

    def run(*arguments: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", ["tools/bench.py", *arguments, "--config", "tests/smoke.yaml", "--loops", "2"])
        bench.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    return run


@pytest.mark.parametrize("count", ["0", "1"])
def test_more_gpus_than_there_are_cannot_be_measured(bench_py, monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"--count {count}: this machine has 0 GPUs"):
        bench_py("train", "--count", count)


def test_a_large_model_is_not_measured_on_a_cpu(bench_py):
    with pytest.raises(UserError, match="no CUDA GPU found"):
        bench_py("generate", "--bf16", "true")


@pytest.mark.slow
def test_the_real_program_is_what_is_measured_with_the_settings_that_were_typed(bench_py, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(bench, "REAL", 200)
    monkeypatch.setattr(bench, "real_length", lambda chance: chance.randrange(60, 200))
    monkeypatch.setattr(bench, "TRAIN", {"small": ({}, None, 200, (2,)), "wrong": ({"r": 0}, None, 200, (2,))})
    title, _, row, failed = bench_py("train", "--max_steps", "3")
    assert title[-1] == "--max_steps=3"
    assert row[:3] == ["small", "2", "1"] and float(row[3].replace(",", "")) > 0
    assert failed[:2] == ["wrong", "2"] and "r" in failed


@pytest.mark.parametrize(
    ("what", "rows"), [("generate", ["generate"] * 2 + ["stock"]), ("score", ["letters,", "texts,"])]
)
def test_generation_and_scoring_are_measured_on_a_cpu_too(bench_py, monkeypatch, what, rows):
    monkeypatch.setattr(bench, "NEW", 4)
    _, _, *lines = bench_py(what, "--eval_batch_tokens", "512")
    assert [line[0] for line in lines] == rows
