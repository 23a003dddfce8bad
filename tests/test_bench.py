"""What bench.py does around its measurements; the measurements themselves are no tests."""

import sys

from ouro.files import UserError, read_yaml
from ouro.model.loading import load_tokenizer
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
    monkeypatch.setattr(bench, "measure", lambda *_, **__: (103.0, 8.5, 1.0))


def test_the_plan_has_a_line_for_each_experiment(bench_py):
    lines = {line[0]: line for line in bench_py("plan", *SMOKE, "--gpu", "H100", "--count", "2")[2:]}
    assert list(lines) == list(read_yaml("configs/experiments.yaml"))
    for name, line in lines.items():
        assert float(line[-1]) == pytest.approx(2 * float(line[-2]), abs=0.1), name  # GPU-hours and hours
    asked = bench_py("plan", *SMOKE, "--total_ut_steps", "2")[2:]
    assert [line[1] for line in asked] == ["2"] * len(lines), "the command line comes after the experiment's row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--count", "0"], "--count must be at least 1"),
        (["train", "--loops", "2"], "no such row has 2 loops: the table has 4 and 1, nf4 4 alone"),
        (["train", "--only", "nf4", "--loops", "1"], "no such row has 1 loops"),
        (["train"], "bench.py train measures a GPU, and there is none here"),
        (["trainer"], "bench.py trainer measures a GPU, and there is none here"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench_py, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        bench_py(*arguments)


def test_training_is_measured_row_by_row_beside_stock(bench_py, a_gpu, monkeypatch):
    monkeypatch.setattr(bench, "save_random", lambda *_: None)
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e12)
    lines = bench_py("train", *SMOKE, "--only", "stock bf16", "bf16", "nf4", "--loops", "4", "--max_length", "64")
    assert "commit" in lines[0]
    assert [line[:3] for line in lines[3:]] == [["stock", "bf16", "4"], ["bf16", "4", "4"]] + [
        ["nf4", "4", batch] for batch in "134"
    ]
    (only,) = bench_py("train", *SMOKE, "--only", "bf16", "--loops", "1", "--batch", "3", "--max_length", "64")[3:]
    assert only[:4] == ["bf16", "1", "3", "103"] and only[-3:] == [only[-3], "1.0", "s"]


def test_each_gpu_is_measured_by_itself_and_then_all_together(bench_py, a_gpu, monkeypatch):
    speeds = {(1, 0): 100.0, (1, 1): 96.0, (2, None): 188.0}
    asked = []

    def run(run, folder, name, processes, gpu, **settings):
        asked.append((processes, gpu, settings["max_steps"], settings["gradient_accumulation_steps"]))
        return [{"tokens_per_second": rate, "memory_gib": 9} for rate in (1.0, 2.0, speeds[processes, gpu])]

    monkeypatch.setattr(bench, "train_beside", run)
    monkeypatch.setattr(bench, "write_full_rows", lambda *_: None)
    tokenizer = load_tokenizer("sample/ouro-tiny", None)
    monkeypatch.setattr(bench, "save_random", lambda s, folder: tokenizer.save_pretrained(folder))
    assert bench_py("trainer", "--loops", "1", "--count", "2")[3:] == [
        ["bare", "loop,", "GPU", "0", "1", "8", "103", "8.5"],
        ["train_qlora.py,", "GPU", "0", "1", "8", "100", "0.971", "0.0%", "9.0"],
        ["train_qlora.py,", "GPU", "1", "1", "8", "96", "0.0%", "9.0"],
        ["train_qlora.py,", "2", "GPUs", "1", "8", "188", "1.918", "0.0%", "9.0"],  # of the mean of 100 and 96
    ]
    assert sorted(asked[:2]) == [(1, 0, 25, 4), (1, 1, 25, 4)] and asked[2:] == [(2, None, 25, 4)]


@pytest.mark.slow
def test_every_step_of_the_trainer_that_is_timed_is_full_of_rows_without_padding(bench_py, a_gpu, monkeypatch):
    run, lines = bench.train_beside, []
    monkeypatch.setattr(bench, "train_beside", lambda *a, **b: lines.extend(run(*a, **b)) or lines)
    printed = bench_py("trainer", *SMOKE, "--max_length", "64", "--loops", "4", "--batch", "8")
    assert [(line["step"], line["padding"]) for line in lines] == [(1, 0), (5, 0), (10, 0)]
    assert lines[-1]["num_tokens"] == 10 * 32 * 64
    assert printed[-1][:3] == ["train_qlora.py,", "GPU", "0"]


@pytest.mark.parametrize("what", ["generate", "score"])
def test_generation_and_scoring_are_measured_on_a_cpu_too(bench_py, monkeypatch, what):
    monkeypatch.setattr(bench, "NEW", 4)
    monkeypatch.setattr(bench, "matrix_rate", lambda device: 1e12)
    loops = ["--loops", "2", "--batch", "2"] if what == "generate" else []
    lines = bench_py(what, *SMOKE, "--eval_batch_tokens", "512", *loops)
    names = [line[0] for line in lines[3:]]
    assert names == (["generate", "generate", "stock"] if what == "generate" else ["letters,", "texts,"])


def test_a_row_is_compared_with_stock_at_its_batch_else_at_its_best():
    known = {(4, 1): 500.0, (4, 2): 1200.0, (1, 8): 9000.0}
    asked = [(4, 1), (4, 3), (2, 3)]
    assert [bench.times_stock(1500, *row, known) for row in asked] == ["3.00", "1.25", ""]
