"""What bench.py does around its measurements; the measurements themselves are no tests."""

import sys
from pathlib import Path

from ouro.files import UserError, read_yaml
from ouro.model.loading import load_tokenizer
from ouro.settings import resolve
from tools import bench

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["--config", "tests/smoke.yaml"]
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture
def bench_py(monkeypatch):
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["tools/bench.py", *arguments])
        bench.main()

    return run


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").symlink_to(ROOT / "sample/ouro-tiny")
    return tmp_path


def test_the_trainer_is_measured_on_rows_without_padding(folder):
    run = resolve("", [*SMOKE, "--cache_dir", str(folder / "cache")], add_options=lambda parser: None)
    bench.write_full_rows(folder / "rows.jsonl", 8, 256, load_tokenizer(str(folder / "model"), None))
    rows = (folder / "rows.jsonl").read_text().splitlines()
    assert len(set(rows)) == 8
    data = {"dataset": "pairs", "dataset_path": folder / "rows.jsonl", "cache_dir": folder / "cache"}
    options = {"packing": True, "max_length": 256, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    lines = bench.train_beside(run, folder, "one", 1, **data, **options, max_steps=2)
    assert [(line["step"], line["num_tokens"], line["padding"]) for line in lines] == [(1, 1024, 0), (2, 2048, 0)]
    with pytest.raises(UserError, match=r"(?s)train_qlora.py failed:.*error: 8 of 8 rows .* longer than max_length"):
        bench.train_beside(run, folder, "short", 1, **data, **options | {"max_length": 128}, max_steps=2)


def test_the_plan_has_a_line_for_each_experiment(bench_py, capsys):
    bench_py("plan", *SMOKE, "--gpu", "H100", "--count", "2")
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(lines) == list(read_yaml("configs/experiments.yaml"))
    for name, line in lines.items():
        assert float(line[-1]) == pytest.approx(2 * float(line[-2]), abs=0.1), name  # GPU-hours and hours
    bench_py("plan", *SMOKE, "--total_ut_steps", "2")
    asked = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[1] for line in asked] == ["2"] * len(lines), "the command line comes after the experiment's row"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--count", "0"], "--count, --steps and --rows are at least 1"),
        (["data", "--rows", "0"], "--count, --steps and --rows are at least 1"),
        (["train", "--loops", "2"], "no such row has 2 loops: the table has 4 and 1, nf4 4 alone"),
        (["train", "--only", "nf4", "--loops", "1"], "no such row has 1 loops"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench_py, arguments, message):
    with pytest.raises(UserError, match=message):
        bench_py(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused is a machine without a GPU")
@pytest.mark.parametrize("what", ["train", "trainer", "loss"])
def test_a_machine_without_a_gpu_is_refused(bench_py, what):
    with pytest.raises(UserError, match=f"bench.py {what} measures a GPU, and there is none here"):
        bench_py(what)


def test_each_gpu_is_measured_by_itself_and_then_all_together(bench_py, monkeypatch, capsys):
    speeds = {(1, 0): 100.0, (1, 1): 96.0, (2, None): 188.0}
    asked = []

    def run(run, folder, name, processes, gpu, **settings):
        asked.append((processes, gpu, settings["max_steps"], settings["gradient_accumulation_steps"]))
        return [{"tokens_per_second": rate, "memory_gib": 9} for rate in (1.0, 2.0, speeds[processes, gpu])]

    monkeypatch.setattr(bench, "train_beside", run)
    monkeypatch.setattr(bench, "need_gpus", lambda *_: None)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: (103.0, 8.5, 1.0))
    monkeypatch.setattr(bench, "write_full_rows", lambda *_: None)
    tokenizer = load_tokenizer(str(ROOT / "sample/ouro-tiny"), None)
    monkeypatch.setattr(bench, "build_random", lambda s, folder: tokenizer.save_pretrained(folder))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    bench_py("trainer", "--loops", "1", "--count", "2")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["bare", "loop,", "GPU", "0", "1", "8", "103", "8.5"],
        ["train_qlora.py,", "GPU", "0", "1", "8", "100", "0.971", "0.0%", "9.0"],
        ["train_qlora.py,", "GPU", "1", "1", "8", "96", "0.0%", "9.0"],
        ["train_qlora.py,", "2", "GPUs", "1", "8", "188", "1.918", "0.0%", "9.0"],  # of the mean of 100 and 96
    ]
    assert sorted(asked[:2]) == [(1, 0, 25, 4), (1, 1, 25, 4)] and asked[2:] == [(2, None, 25, 4)]


def test_every_step_of_the_trainer_that_is_timed_is_full(bench_py, monkeypatch, capsys):
    run, lines = bench.train_beside, []
    monkeypatch.setattr(bench, "train_beside", lambda *a, **b: lines.extend(run(*a, **b)) or lines)
    monkeypatch.setattr(bench, "need_gpus", lambda *_: None)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: (1000.0, 1.0, 1.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    bench_py("trainer", *SMOKE, "--max_length", "64", "--loops", "4", "--batch", "8")
    assert [(line["step"], line["padding"]) for line in lines] == [(1, 0), (5, 0), (10, 0)]
    assert lines[-1]["num_tokens"] == 10 * 32 * 64
    assert capsys.readouterr().out.splitlines()[-1].startswith("  train_qlora.py, GPU 0")


def test_two_curves_make_a_picture(tmp_path):
    bench.plot_losses({"bf16": [3.0, 2.0, 1.5], "fp8": [3.0, 2.01, 1.5]}, str(tmp_path / "fp8.png"))
    picture = matplotlib.image.imread(tmp_path / "fp8.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 600 and picture.std() > 0.01


def test_a_row_is_compared_with_stock_at_its_batch_else_at_its_best():
    known = {(4, 1): 500.0, (4, 2): 1200.0, (1, 8): 9000.0}
    assert bench.times_stock(1500, 4, 1, known) == "3.00"
    assert bench.times_stock(1500, 4, 3, known) == "1.25"
    assert bench.times_stock(1500, 2, 3, known) == ""
