"""What bench.py does around its measurements; the measurements themselves are no tests."""

import json
import shutil
import sys
from functools import partial

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


def test_the_plan_has_a_line_for_each_experiment(bench_py):
    lines = {line[0]: line for line in bench_py("plan", *SMOKE, "--gpu", "H100", "--count", "2")[2:]}
    assert list(lines) == [name for name in read_yaml("configs/experiments.yaml") if not name.startswith("own")]
    for name, line in lines.items():
        assert float(line[-1]) == pytest.approx(2 * float(line[-2]), abs=0.1), name  # GPU-hours and hours
    asked = bench_py("plan", *SMOKE, "--total_ut_steps", "2")[2:]
    assert [line[1] for line in asked] == ["2"] * len(lines), "the command line comes after the experiment's row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--count", "0"], "--count must be at least 1"),
        (["train"], "bench.py train measures a GPU, and there is none here"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench_py, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        bench_py(*arguments)


def test_each_gpu_is_measured_by_itself_and_then_all_together(bench_py, a_gpu, monkeypatch):
    speeds, asked = {(1, 0): 100.0, (1, 1): 96.0, (2, None): 188.0}, []

    def run(run, folder, processes, gib, gpu, **settings):
        asked.append((processes, gpu, gib, settings["max_length"], settings["total_ut_steps"]))
        slow = {"tokens_per_second": 1, "seconds": 9, "memory_gib": 9, "padding": 0.5}
        timed = slow | {"tokens_per_second": speeds[processes, gpu], "padding": 0.02}
        return [slow, slow, timed, timed], {"plans": [{"estimated_gib": 8.5}, {"estimated_gib": 9.5}]}

    monkeypatch.setattr(bench, "train_beside", run)
    monkeypatch.setattr(bench, "save_random", lambda s, folder: shutil.copytree("sample/ouro-tiny", folder))
    printed = bench_py("train", "--only", "nf4, 10 GB", "--loops", "1", "--count", "2", "--rows_per_step", "2")
    assert [line[3:] for line in printed[3:]] == [
        ["1", "GPU", "0", "100", "0.0%", "2.0%", "9.0", "9.5"],
        ["1", "GPU", "1", "96", "0.0%", "2.0%", "9.0", "9.5"],
        ["1", "2", "188", "1.918", "0.0%", "2.0%", "9.0", "9.5"],  # of the mean of 100 and 96
    ]
    assert sorted(asked[:2]) == [(1, 0, 9.3, 16384, 1), (1, 1, 9.3, 16384, 1)] and asked[2:] == [
        (2, None, 9.3, 16384, 1)
    ]


def test_rows_have_the_length_asked_for_or_lengths_like_the_real_ones(tmp_path):
    tokenizer = load_tokenizer("sample/ouro-tiny", None)
    for length in (200, bench.REAL):
        bench.write_rows(tmp_path / "rows.jsonl", 300, length, tokenizer)
        lengths = [
            len(tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]},
                                               {"role": "assistant", "content": row["completion"]}]))
            for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
        ]  # fmt: skip
        if length == 200:
            assert max(abs(n - 200) for n in lengths) <= 1
        else:
            assert 5000 < sum(lengths) / 300 < 6500 and max(lengths) <= length + 1
            assert 0.35 < sum(n > 4096 for n in lengths) / 300 < 0.6


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
