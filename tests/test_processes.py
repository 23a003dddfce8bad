"""Several training processes: what a launcher must say, which of them speaks, and that they train as one."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import train_qlora
from ouro.files import UserError, latest
from ouro.train import processes, run_folder

import pytest
import torch
from conftest import PATIENCE
from helpers import SMALL, assert_same_run, in_processes, metrics, port, trained

pytestmark = pytest.mark.usefixtures("in_the_repository")
FOUR = ["--total_ut_steps", "1", "--rows_per_step", "2", "--pass_tokens", "500", "--eval_rows", "5", "--max_steps", "4"]
FOUR += ["--save_steps", "2", "--logging_steps", "2", "--eval_steps", "3"]


def test_a_process_of_a_group_ends_without_taking_the_group_down(monkeypatch):
    """Taking gloo's down waits for its thread, which may wait for Python: for ever, after a run that was complete."""
    ended = []
    monkeypatch.setattr(processes, "WORLD_SIZE", 2)
    monkeypatch.setattr(train_qlora, "train", lambda run: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append("taken down"))
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", *SMALL])
    train_qlora.main()
    assert ended == [0]
    monkeypatch.setattr(processes, "WORLD_SIZE", 1)
    train_qlora.main()
    assert ended == [0], "one that is alone returns"


GROUP = "RANK=1 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500"
LAUNCHERS = ("", "RANK=0 WORLD_SIZE=1", "MASTER_ADDR=a", f"{GROUP} LOCAL_WORLD_SIZE=1")  # whole
HALVES = ["WORLD_SIZE=2", "RANK=1 WORLD_SIZE=1", "RANK=1", "LOCAL_RANK=0", "RANK=x", "WORLD_SIZE=", "WORLD_SIZE=0",
          "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", f"{GROUP} MASTER_PORT=", f"{GROUP} MASTER_PORT=http",
          f"{GROUP} RANK=2", f"{GROUP} LOCAL_RANK=2", f"{GROUP} LOCAL_RANK=1 LOCAL_WORLD_SIZE=1"]  # fmt: skip


@pytest.mark.parametrize("variables", [*LAUNCHERS, *HALVES])
def test_half_of_a_launchers_variables_is_refused_before_anything_is_read(monkeypatch, variables):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (pair.split("=") for pair in variables.split()):
        monkeypatch.setenv(name, value)
    if variables in LAUNCHERS:
        return processes.check_launcher()
    monkeypatch.setattr(train_qlora, "resolve", None)
    with pytest.raises(UserError, match=f"^.*{variables.split()[-1]}.* in the environment is no process of a group"):
        train_qlora.main()


def test_of_processes_that_fail_the_first_speaks(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(processes, "_get_default_store", lambda: store)
    assert [processes.speaks(UserError(text)) for text in "abc"] == [True] * 3, "before they know of each other"
    monkeypatch.setattr(processes, "LOCAL_RANK", 1)
    assert not processes.speaks(UserError("that process 0 says too")) and processes.speaks(RuntimeError("not ours"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert [processes.speaks(RuntimeError(text)) for text in "abc"] == [True, False, False]

    def gone():
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(processes, "_get_default_store", gone)
    assert not processes.speaks(RuntimeError("Connection closed by peer"))


# ----------------------------------------------------------------------------------------------------------------------
# two of them


def both(folder: Path, *argv: str) -> tuple[list[int], list[str]]:
    return in_processes(2, "train_qlora.py", *latest([*SMALL, *FOUR, "--output_dir", str(folder), *argv]))


def torchrun(output: Path, argv: list[str], number: int) -> str:
    """Sends a signal to its second worker in step 2; what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]
    with open(output, "w") as file:
        process = subprocess.Popen([*command, "train_qlora.py", *argv], stdout=file, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + PATIENCE
            while "\nstep     " not in output.read_text():
                assert process.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.005)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            workers = [pid for pid in children if b"train_qlora.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(workers) == 2
            os.kill(int(workers[1]), number)
            assert process.wait(PATIENCE) != 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "no worker is left"
        finally:
            process.kill()
            process.wait()
    return output.read_text()


def assert_close_runs(run: Path, other: Path) -> None:
    assert len(metrics(run)) == len(metrics(other))
    for a, b in zip(metrics(run), metrics(other), strict=True):
        for name in ("step", "num_tokens", "mean_token_accuracy"):
            assert a[name] == b[name]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a.get("held_out_loss", []) == pytest.approx(b.get("held_out_loss", []), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_and_are_stopped_killed_and_continued(tmp_path, capsys):
    one, two = trained(tmp_path / "one", *FOUR), tmp_path / "two/smoke"
    codes, printed = both(tmp_path / "two")
    assert codes == [0, 0], printed
    assert [text.count("\nstep ") for text in printed] == [4, 0]
    assert_close_runs(two, one)

    folder, run = tmp_path / "parts", tmp_path / "parts/smoke"
    argv = latest([*SMALL, *FOUR, "--output_dir", str(folder)])
    told = torchrun(tmp_path / "term.txt", argv, signal.SIGTERM)
    step = int(re.search(r"stopped after step (\d), which is saved; the same command", told)[1])
    newest = run_folder.checkpoints(run)[0]
    assert newest.name == f"checkpoint-{step}" and step < 4 and run_folder.damage(newest) is None
    assert not (run / "completed").exists()
    shutil.copytree(run, tmp_path / "stopped")

    assert f"continuing from {newest}" in torchrun(tmp_path / "kill.txt", argv, signal.SIGKILL)
    assert not (run / "completed").exists()
    codes, printed = both(folder)
    assert codes == [0, 0] and "continuing from" in printed[0] and "not the same bytes" not in printed[0]
    assert_same_run(run, two)

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "stopped", run)
    assert_close_runs(trained(folder, *FOUR), one)
    assert "with 1 process after 2: the same rows in each step, but another order of sums" in capsys.readouterr().out


@pytest.mark.slow
def test_of_two_processes_of_which_one_fails_for_both_it_speaks_and_neither_hangs(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n{"prompt"\n')
    codes, printed = both(tmp_path / "run", "--dataset", "pairs", "--dataset_path", str(rows))
    assert codes == [2, 2] and f"{rows}" in printed[0] and "line 2" in printed[0]
    assert "Traceback" not in printed[1] and "error: " not in printed[1]
