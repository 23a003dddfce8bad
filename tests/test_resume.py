"""Stopping and going on: an interrupted run ends in the bytes of one that was not, whatever interrupted it."""

import errno
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import train_qlora
from ouro import files
from ouro.data import sources
from ouro.files import UserError, latest, read_yaml
from ouro.model.loading import load_ouro
from ouro.train import processes, run_folder, stopping, trainer

import pytest
import torch
from conftest import PATIENCE
from helpers import ROOT, SMALL, assert_same_run, metrics, repeatable, resolved, trained, write_jsonl
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("in_the_repository")
SIX = ["--total_ut_steps", "1", "--rows_per_step", "2", "--pass_tokens", "500", "--eval_rows", "2", "--max_steps", "6"]
SIX += ["--save_steps", "2", "--logging_steps", "2", "--eval_steps", "3"]
ROWS = [
    {"prompt": f"question {n}", "completion": " ".join(f"{n}th answer, part {i}" for i in range(9))} for n in range(11)
]
# A process takes 10 s to import all this. These come from a server that has, but has computed nothing; train_qlora.py
# itself they run afresh, as a user types it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ouro.train.machine", "ouro.evaluate.benchmarks", "ouro.data.cache"])


def six(folder: Path, *argv: str) -> Path:
    """Six steps in this process, or what is left of them; the run's folder."""
    return trained(folder, *SIX, *argv)


def one_step(folder: Path, *argv: str) -> int:
    """Goes on for one step in this process; the step that it stopped after."""
    with pytest.raises(stopping.Stopped, match="the time limit: stopped after step") as stopped:
        six(folder, "--time_limit", "0", *argv)
    return int(re.search(r"after step (\d+), which is saved", str(stopped.value))[1])


def run_script(argv: list[str], output: str, moment: str, number: int) -> None:
    """Runs train_qlora.py, which kills itself before it opens the `number`-th file, or makes the folder, that `moment`
    matches: its path, and how it is opened or the folder's mode."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in ("open", "os.mkdir") and re.search(moment, f"{arguments[0]} {arguments[1]}"):
            left -= 1
            if not left:
                signal.raise_signal(signal.SIGKILL)

    sys.addaudithook(hook)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["train_qlora.py", *argv]
    runpy.run_path("train_qlora.py", run_name="__main__")


def killed(folder: Path, moment: str, number: int = 1) -> str:
    """Six steps in a process of its own, which is killed as `run_script` says; what it has printed."""
    output = folder.parent / f"output-{time.monotonic_ns()}.txt"
    output.touch()
    argv = latest([*SMALL, *SIX, "--output_dir", str(folder)])
    process = FORKS.Process(target=run_script, args=(argv, str(output), moment, number))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL, output.read_text()
    return output.read_text()


def names(run: Path) -> list[str]:
    return [path.name for path in run_folder.checkpoints(run)]


def all_good(run: Path) -> bool:
    return not any(map(run_folder.damage, run_folder.checkpoints(run)))


def copied(run: Path, folder: Path, **settings: object) -> Path:
    """A copy of a run that takes itself for one of `folder`, with these settings."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    recorded = read_yaml(copy / "config.yaml") | {"output_dir": str(folder)} | settings
    (copy / "config.yaml").write_text(json.dumps(recorded))
    return copy


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps without a stop."""
    return six(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The same run, stopped after each of its first three steps; do not write to it."""
    folder = tmp_path_factory.mktemp("stopped")
    for step in (1, 2, 3):
        assert one_step(folder) == step
        kept = [f"checkpoint-{step}"] + [f"checkpoint-{step - 1}"] * (step > 1)
        assert names(folder / "smoke") == kept, "save_total_limit of them"
    return folder / "smoke"


def test_a_run_stopped_at_every_step_ends_in_the_same_bytes(whole, stopped, tmp_path):
    run = copied(stopped, tmp_path)
    for step in (4, 5):
        assert one_step(tmp_path) == step
        assert not (run / "final_adapter").exists() and not (run / "completed").exists()
    assert six(tmp_path, "--time_limit", "0") == run, "the last step is not stopped: it is done"
    assert_same_run(run, whole)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 6]
    assert [line["step"] for line in metrics(run) if "held_out_loss" in line] == [3, 6]
    continued = json.loads((run / "manifest.json").read_text())["continued"]
    assert [(c["step"], c["processes"]) for c in continued] == [(step, 1) for step in range(1, 6)]


@pytest.mark.slow
def test_a_run_stopped_at_every_step_of_two_uneven_epochs_ends_in_the_same_bytes(tmp_path):
    data = ["--dataset", "pairs", "--dataset_path", write_jsonl(tmp_path / "pairs.jsonl", *ROWS)]
    argv = [*data, "--max_steps", "-1", "--num_train_epochs", "2", "--rows_per_step", "4"]
    whole = six(tmp_path / "whole", *argv)
    report = json.loads((whole / "data_report.json").read_text())
    assert report["rows_kept"] % 4 and 8 < report["rows_kept"] < 12, "steps of 4 rows, three in each epoch"
    assert metrics(whole)[-1]["num_tokens"] == 2 * report["tokens"], "each row once in each epoch"
    for step in range(1, 6):
        assert one_step(tmp_path / "parts", *argv) == step
    assert_same_run(six(tmp_path / "parts", *argv), whole)


def test_killed_after_a_step_while_saving_and_after_the_last_checkpoint(whole, tmp_path, capsys):
    folder, run = tmp_path / "runs", tmp_path / "runs/smoke"
    killed(folder, r"/metrics\.jsonl a$", 4)
    assert names(run) == ["checkpoint-2"] and [line["step"] for line in metrics(run)] == [1, 2, 3]

    printed = killed(folder, r"/checkpoint-4/trainer_state\.json w$")
    assert f"continuing from {run}/checkpoint-2" in printed
    assert names(run) == ["checkpoint-2"] and (run / ".saving").exists(), "what is half written counts for nothing"

    killed(folder, r"/\.final_adapter 511$")
    assert not (run / "completed").exists() and names(run)[0] == "checkpoint-6"
    (run / ".saving").mkdir()  # as if killed just after the checkpoint was renamed
    (run / "final_adapter").mkdir()  # and again just before `completed` was written
    (run / "final_adapter/README.md").write_text("half")
    (run / "final_adapter/rest").write_text("of before")
    assert_same_run(six(folder), whole)
    assert f"continuing from {run}/checkpoint-6\n" in capsys.readouterr().out
    assert not (run / "final_adapter/rest").exists()


def test_signals_while_saving_end_the_run_after_the_next_step(whole, tmp_path, monkeypatch):
    """A checkpoint is due in step 2."""
    work, sent = trainer.LoopTrainer._save_checkpoint, []

    def signalled(self, *args):
        if not sent:
            sent.append([os.kill(os.getpid(), signal.SIGTERM) for _ in range(3)])
        return work(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.LoopTrainer, "_save_checkpoint", signalled)
        with pytest.raises(stopping.Stopped, match="^SIGTERM: stopped after step 3, which is saved"):
            six(tmp_path)
    run = tmp_path / "smoke"
    assert sent and names(run)[0] == "checkpoint-3" and all_good(run)
    assert_same_run(six(tmp_path), whole)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimizer.pt", lambda file: os.truncate(file, 1000)),
        ("adapter_model.safetensors", flip_a_bit),
        ("scheduler.pt", Path.unlink),
        ("SHA256SUMS", Path.unlink),
        ("SHA256SUMS", lambda file: os.truncate(file, 0)),
        ("SHA256SUMS", lambda file: file.write_bytes(b"\xff")),
        ("SHA256SUMS", lambda file: file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))),
    ],
)
def test_damage_is_seen(stopped, tmp_path, name, damage):
    checkpoint = shutil.copytree(stopped / "checkpoint-3", tmp_path / "checkpoint-3")
    assert run_folder.damage(checkpoint) is None
    damage(checkpoint / name)
    assert run_folder.damage(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run_whatever_its_checksums_say(stopped, tmp_path, name):
    run, ran = copied(stopped, tmp_path), tmp_path / "ran"
    pickled = f"c__builtin__\neval\n(Vopen({str(ran)!r}, 'w')\ntR."
    (run / "checkpoint-3" / name).write_text(pickled)
    run_folder.seal(run / "checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3 holds what no training writes"):
        six(tmp_path)
    assert not ran.exists()


def test_files_of_others_are_no_damage_and_are_neither_counted_nor_deleted(stopped, tmp_path):
    run, checkpoint = copied(stopped, tmp_path), tmp_path / "smoke/checkpoint-3"
    for place in (run, checkpoint):
        for name in (".DS_Store", "._optimizer.pt", ".nfs0001", "Thumbs.db"):
            (place / name).touch()
        (place / ".ipynb_checkpoints").mkdir()
    run_folder.seal(checkpoint)
    assert not [name for name in files.sealed_files(checkpoint) if name.startswith(".")]
    (checkpoint / ".nfs0001").unlink()
    assert one_step(tmp_path) == 4 and (run / ".DS_Store").exists() and (run / "Thumbs.db").exists()

    refused = tmp_path / "refused"  # before its first step, under other settings
    refused.mkdir()
    (refused / ".DS_Store").touch()
    assert run_folder.claim(refused, resolved(*SIX)) == "new"
    assert run_folder.claim(refused, resolved(*SIX, "--seed", "1")) == "new" and (refused / ".DS_Store").exists()
    (refused / "manifest.json").touch()  # ended before its first checkpoint
    (refused / "notes.txt").touch()
    assert run_folder.claim(refused, resolved(*SIX, "--seed", "1")) == "new"
    assert {path.name for path in refused.iterdir()} == {".DS_Store", "notes.txt", "config.yaml"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    flip_a_bit(run / "checkpoint-3/adapter_model.safetensors")
    assert one_step(tmp_path) == 3
    printed = capsys.readouterr().out
    assert f"{run}/checkpoint-3 is damaged" in printed and f"continuing from {run}/checkpoint-2\n" in printed
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (run / "checkpoint-3" / name).read_bytes() == (stopped / "checkpoint-3" / name).read_bytes(), name
    assert repeatable(run) == repeatable(stopped), "the line of step 3 is there once"
    assert (run / "damaged-1-checkpoint-3/optimizer.pt").exists(), "nothing is deleted"


def test_without_a_good_checkpoint_all_are_set_aside_and_the_run_starts_anew(whole, stopped, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    flip_a_bit(run / "checkpoint-3/adapter_model.safetensors")
    for name in ("SHA256SUMS", "adapter_model.safetensors"):  # as a file system leaves both after a power cut
        os.truncate(run / "checkpoint-2" / name, 0)
    before = contents(run)
    with pytest.raises(UserError, match="checkpoint-3 is there: --resume auto continues"):
        six(tmp_path, "--resume", "never")
    (run / "final_adapter").mkdir()  # as of a copy that lost `completed`
    with pytest.raises(UserError, match="(?s)checkpoint-3 is damaged.*final_adapter is there\nrestore one from a copy"):
        six(tmp_path)
    (run / "final_adapter").rmdir()
    assert contents(run) == before
    assert_same_run(six(tmp_path), whole)
    printed = capsys.readouterr().out
    assert "warning: no checkpoint is whole, so smoke starts from zero and all 3 steps are trained again: " in printed
    assert f"{run}/checkpoint-3 is damaged: its files are not those of its SHA256SUMS: adapter_model" in printed
    assert f"{run}/checkpoint-2 is damaged: its SHA256SUMS is empty\n" in printed
    for name in ("checkpoint-3/optimizer.pt", "checkpoint-2/optimizer.pt", "metrics.jsonl", "manifest.json"):
        assert (run / f"damaged-1-{name}").read_bytes() == (stopped / name).read_bytes(), "nothing is deleted"
    assert "continued" not in json.loads((run / "manifest.json").read_text())


def test_a_file_where_a_checkpoint_belongs_is_named_before_the_first_step(stopped, tmp_path):
    run = copied(stopped, tmp_path)
    (run / "checkpoint-4").write_text("notes")
    before = contents(run)
    with pytest.raises(UserError, match="checkpoint-4 is no folder, .* move it away"):
        six(tmp_path)
    assert contents(run) == before


def test_checkpoints_that_cannot_be_read_now_are_not_taken_for_damaged(stopped, tmp_path, monkeypatch):
    run = copied(stopped, tmp_path)

    def away(opened, algorithm):
        raise OSError(errno.EIO, "Input/output error")

    before = contents(run)
    with monkeypatch.context() as patch:
        patch.setattr(files.hashlib, "file_digest", away)
        with pytest.raises(UserError, match="cannot read .*/checkpoint-3/.*: Input/output error"):
            run_folder.claim(run, resolved(*SIX))
    assert contents(run) == before


def test_overwrite_deletes_what_a_run_writes_and_nothing_else(stopped, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    mine = ("notes.txt", "plots/loss.png", "old.tmp", "checkpoint-best/weights")
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    for name in ("damaged-1-checkpoint-1", "merged", ".manifest.json.0.tmp.d"):
        (run / name).mkdir()
    for name in (".manifest.json.0.tmp", "generation_config.json"):
        (run / name).touch()
    assert one_step(tmp_path, "--overwrite") == 1
    printed = capsys.readouterr().out
    assert f"deleting the unfinished run in {run}" in printed
    assert f"left in {run}, as no run has written it: checkpoint-best, notes.txt, old.tmp, plots\n" in printed
    assert names(run) == ["checkpoint-1"] and [line["step"] for line in metrics(run)] == [1]
    assert "continued" not in json.loads((run / "manifest.json").read_text())
    ours = {"config.yaml", "manifest.json", "data_report.json", "metrics.jsonl", "checkpoint-1"}
    assert set(os.listdir(run)) == ours | {name.partition("/")[0] for name in mine}
    assert all((run / name).exists() for name in mine)


def full(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))


def test_with_one_checkpoint_kept_a_newer_damaged_one_goes_and_an_older_one_only_after_the_new_one_is_there(
    stopped, tmp_path, monkeypatch
):
    run = copied(stopped, tmp_path, save_total_limit=1)
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-20")
    (run / "checkpoint-20/optimizer.pt").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", full)
        with pytest.raises(UserError, match="^step 4: the checkpoint could not be written"):
            six(tmp_path, "--save_total_limit", "1")
    assert names(run) == ["checkpoint-20", "checkpoint-3", "checkpoint-2"]
    assert one_step(tmp_path, "--save_total_limit", "1") == 4
    assert names(run) == ["checkpoint-4"] and all_good(run)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Exception("No space left (os error 28)")])
def test_an_adapter_that_cannot_be_written_keeps_the_last_checkpoint(whole, stopped, tmp_path, monkeypatch, error):
    def full(folder):  # the second as the library tokenizers raises it
        raise error

    run = copied(stopped, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "seal", full)
        with pytest.raises(UserError, match=rf"^the adapter could not be written to {run}: .+ \([\d,]+ MB free\)"):
            six(tmp_path)
    assert names(run)[0] == "checkpoint-6" and all_good(run)
    assert not (run / "final_adapter").exists() and not (run / ".final_adapter").exists()
    assert_same_run(six(tmp_path), whole)


def test_guards_go_on_with_what_they_had_seen(stopped, tmp_path):
    """The losses that a spike is measured by, the rates that a slow machine is, and the time since the last line."""
    run = copied(stopped, tmp_path)
    progress = run / "checkpoint-3/progress.json"
    there = json.loads(progress.read_text())
    assert len(there["recent"]) == 3 and len(there["rates"]) == 2 and there["since_log"] < 60
    progress.write_text(json.dumps(there | {"since_log": 1000.0}))
    run_folder.seal(progress.parent)
    assert one_step(tmp_path) == 4
    after = json.loads((run / "checkpoint-4/progress.json").read_text())
    assert (after["recent"][:3], after["rates"][:2]) == (there["recent"], there["rates"])
    assert metrics(run)[3]["tokens_per_second"] < 10, "the tokens since the last line, by all their time"


def test_the_rates_of_more_processes_are_no_measure_of_fewer(stopped, tmp_path, capsys):
    """Not even in part: the first line after the checkpoint has steps of both."""
    progress = copied(stopped, tmp_path) / "checkpoint-3/progress.json"
    there = json.loads(progress.read_text()) | {"processes": 4, "rates": [1e9, 1e9], "logged_step": 2}
    progress.write_text(json.dumps(there))
    run_folder.seal(progress.parent)
    assert one_step(tmp_path) == 4
    assert json.loads((tmp_path / "smoke/checkpoint-4/progress.json").read_text())["rates"] == []
    assert "does another process use this GPU" not in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch):
    """The trainer's, and a function that makes the next calls of a method or function seem to take an hour more."""
    late = []

    def delayed(module, name: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: late.append(3600) or real(*args, **kwargs))

    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(late)))
    return delayed


def test_loading_saving_and_the_held_out_loss_are_not_in_the_times_of_steps(tmp_path, clock, capsys):
    """Nor is what was measured before the first step in the time that the steps left will take."""
    clock(trainer, "seal")
    clock(trainer.LoopTrainer, "_load_optimizer_and_scheduler")
    clock(trainer.LoopTrainer, "held_out_loss")
    argv = ["--eval_steps", "2", "--eval_rows", "1", "--save_steps", "1", "--logging_steps", "1"]
    for step in (1, 2, 3):
        assert one_step(tmp_path, *argv) == step
        told = re.search(rf"step +{step}/6 .* left (\d+):", capsys.readouterr().out)
        assert int(told[1]) <= (step == 2) * 4, "the held-out loss of step 2 is measured in it, and will be again"
    lines = metrics(six(tmp_path, *argv))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["seconds"] < 1800 for line in lines)


def test_sha256sum_verifies_checkpoints_and_adapter_and_their_modes_are_the_umasks(stopped, whole):
    os.umask(mask := os.umask(0))
    modes = {path.stat().st_mode & 0o777 for run in (stopped, whole) for path in run.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}
    for folder in (stopped / "checkpoint-3", stopped / "checkpoint-2", whole / "final_adapter"):
        listed = files.sealed_files(folder).keys()
        assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
        done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == len(listed), done.stdout + done.stderr


def test_a_complete_run_is_the_adapter_and_is_not_repeated(whole, stopped, tmp_path, capsys):
    before = contents(whole)
    assert not list(whole.glob("checkpoint-*")) and not list(whole.glob(".*"))
    assert six(whole.parent) == whole and "is complete already" in capsys.readouterr().out
    assert contents(whole) == before
    assert json.loads(before["completed"]) == {"steps": 6, "loss": metrics(whole)[-1]["loss"]}
    last = max(path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file())  # of several within a tick
    assert (whole / "completed").stat().st_mtime_ns == last
    model = load_ouro("sample/ouro-tiny", dtype=torch.float32, nf4=True, total_ut_steps=1)
    adapted = PeftModel.from_pretrained(model, str(whole / "final_adapter")).state_dict()
    weights = load_file(whole / "final_adapter/adapter_model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(adapted[name.replace(".weight", ".default.weight")], weight) and weight.abs().max() > 0
    run = copied(whole, tmp_path)
    shutil.copytree(stopped / "checkpoint-3", run / "checkpoint-3")  # as of a kill just after `completed` was written
    assert_same_run(six(tmp_path), whole)
    flip_a_bit(run / "final_adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match="final_adapter is damaged.*adapter_model.safetensors: restore it from a copy"):
        six(tmp_path)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--max_steps", "7", "--seed", "1"], r"settings:\n  max_steps: 6 there, 7 asked\n  seed: 42 there, 1 asked\n"),
        (["--paths", f"wangchan={ROOT / 'sample/wangchan'}"], r"other settings:\n  paths: .* asked\nuse another"),
        (["--resume", "never"], r"checkpoint-3 is there: --resume auto continues from it, --overwrite"),
        ([], r"^output_dir = \S+ is not one shared folder: process 0 finds \S+/checkpoint-3 there, process 2 nothing;"),
    ],
)
def test_a_run_that_another_command_would_spoil_is_refused_untouched(stopped, tmp_path, monkeypatch, argv, told):
    run = copied(stopped, tmp_path)
    before = contents(run)
    if not argv:
        monkeypatch.setattr(run_folder, "gather_object", lambda mine: [*mine, *mine, "nothing"])
    with pytest.raises(UserError, match=told):
        six(tmp_path, *argv)
    assert contents(run) == before


@pytest.mark.parametrize(("name", "value"), [("learning_rate", 0.003), ("seed", 7)])
def test_a_run_whose_config_was_edited_is_neither_continued_nor_used(whole, stopped, tmp_path, name, value):
    """Else it would go on as it had begun, or with other rows, and its record would be false."""
    told = rf"config.yaml was edited after the run began: {name} is {value}, and was [\d.]+: put"
    for run in whole, stopped:
        run = copied(run, tmp_path / run.parent.name, **{name: value})
        before = contents(run)
        with pytest.raises(UserError, match=told):
            six(run.parent, f"--{name}", str(value))
        assert contents(run) == before
    of_whole = resolved(*SIX, "--output_dir", str(tmp_path / whole.parent.name))
    with pytest.raises(UserError, match=told):
        run_folder.finished_run(of_whole)
    (tmp_path / whole.parent.name / whole.name / "config.yaml").write_text("")
    with pytest.raises(UserError, match="config.yaml is empty: restore it from a copy"):
        run_folder.finished_run(of_whole)


def test_settings_that_change_no_training_neither_refuse_nor_repeat_a_run(whole, stopped, tmp_path, capsys):
    """Also the same folder, named otherwise; paths are those of what is neither read nor scored."""
    copied(stopped, tmp_path)
    here = ["--results_dir", str(tmp_path), "--tasks", "thai_text", "--eval_batch_tokens", "9", "--max_new_tokens", "3"]
    here += ["--output_dir", os.path.relpath(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    here += ["--report_to", "tensorboard"]
    sets, read = read_yaml("tests/smoke.yaml")["paths"], ("wangchan", "thai_text")
    here += ["--paths", ",".join(f"{n}={p if n in read else p + '/nowhere'}" for n, p in sets.items())]
    for _ in range(2):
        assert_same_run(six(tmp_path, *here), whole)
    printed = capsys.readouterr().out
    assert printed.count("continuing from ") == 1 and printed.count("is complete already") == 1


def test_a_run_says_and_records_what_is_not_as_it_began(stopped, tmp_path, capsys, monkeypatch):
    run, build_model = copied(stopped, tmp_path), train_qlora.build_model
    monkeypatch.setattr(train_qlora, "build_model", lambda *args: (build_model(*args)[0], 7e14))
    manifest = json.loads((run / "manifest.json").read_text())
    before = manifest["packages"] | {"torch": "2.0"}
    began = {"git_commit": "12ab", "code_sha256": "34cd", "gpu": "H100", "packages": before}
    (run / "manifest.json").write_text(json.dumps(manifest | began))
    assert one_step(tmp_path) == 4
    torch_now, commit = manifest["packages"]["torch"], manifest["git_commit"]
    code = f"git_commit {commit} after 12ab, code_sha256 {manifest['code_sha256']} after 34cd"
    line = f"  unlike when it began: torch {torch_now} after 2.0, {code}, gpu None after H100\n"
    assert capsys.readouterr().out.count(line) == 1
    *_, entry = json.loads((run / "manifest.json").read_text())["continued"]
    assert (entry["step"], entry["git_commit"], entry["gpu"]) == (3, commit, None)
    assert entry["packages"] == manifest["packages"] and entry["gpu_tflops"] == 700, "FLOP use is a share of it"


def change(file: Path, old: bytes, new: bytes) -> None:
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("manifest.json", lambda f: os.truncate(f, 99), "cannot read .*manifest.json: damaged"),
        ("manifest.json", Path.unlink, "cannot read .*manifest.json: No such file"),
        ("manifest.json", lambda f: change(f, b"tokenizer_sha256", b"x"), "json has no tokenizer_sha256: .*version"),
        ("manifest.json", lambda f: f.write_text("[1]"), "json has no object"),
        ("metrics.jsonl", Path.unlink, "not the log that checkpoint-3 was saved with"),
        ("metrics.jsonl", lambda f: os.truncate(f, f.stat().st_size - 9), "not the log that checkpoint-3 was saved"),
        ("metrics.jsonl", lambda f: change(f, b'"loss": ', b'"loss": 1'), "not the log that checkpoint-3 was saved"),
        ("checkpoint-3/progress.json", lambda f: f.write_text('{"processes": 1}'), "progress.json has no sums"),
    ],
)
def test_a_damaged_record_is_one_message_before_a_step_and_nothing_is_lost(stopped, tmp_path, name, damage, told):
    run = copied(stopped, tmp_path)
    damage(run / name)
    files.seal(run / "checkpoint-3")
    before = contents(run)
    with pytest.raises(UserError, match=f"(?s){told}.*put back what was there"):
        six(tmp_path)
    assert contents(run) == before


def other_rows(place: Path) -> None:
    write_jsonl(place / "rows.jsonl", *ROWS[1:], ROWS[0])


def other_weights(place: Path) -> None:
    change(place / "model/config.json", b'"init_seed": 0', b'"init_seed": 7')


def other_template(place: Path) -> None:
    change(place / "model/tokenizer_config.json", b"You are a helpful assistant.", b"Answer in English.")


def rows_left_out(place: Path) -> None:
    (place / "items").write_text(ROWS[3]["completion"])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of what a run is trained on, its command, and the run: after one of its two steps, and complete."""
    place, out = tmp_path_factory.mktemp("there"), tmp_path_factory.mktemp("out")
    write_jsonl(place / "rows.jsonl", *ROWS)
    shutil.copytree("sample/ouro-tiny", place / "model")
    (place / "items").touch()
    argv = ["--dataset", "pairs", "--dataset_path", str(place / "rows.jsonl"), "--eval_steps", "0",
            "--model_name_or_path", str(place / "model"), "--max_steps", "2"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "benchmark_items", lambda s: [("exam, item 1", (place / "items").read_text())])
        assert one_step(out, *argv) == 1
        half = shutil.copytree(out / "smoke", out / "half/smoke")
        yield place, argv, half, six(out, *argv)


@pytest.mark.parametrize(
    ("alter", "told"),
    [
        (other_rows, r"data_revision sha256:\w+, and this is sha256:\w+; rows_sha256 \w+, and this is \w+"),
        (other_weights, "another config.json of the model"),
        (other_template, "another tokenizer_config.json of the model; rows_sha256"),
        (rows_left_out, r"rows_sha256 \w+, and this is \w+"),
    ],
)
def test_a_run_is_continued_and_used_with_what_it_was_begun_with_alone(begun, tmp_path, capsys, alter, told):
    place, argv, half, complete = begun
    half, complete = copied(half, tmp_path / "half"), copied(complete, tmp_path / "complete")
    before = contents(half)
    shutil.copytree(place, tmp_path / "kept")
    try:
        alter(place)
        with pytest.raises(UserError, match=f"began with {told}.*: put back what was there"):
            six(half.parent, *argv)
        assert contents(half) == before
        capsys.readouterr()
        six(complete.parent, *argv)
        assert re.search(f"is complete already; .*\n  it was trained on {told}", capsys.readouterr().out)
        if "of the model" in told:
            with pytest.raises(
                UserError, match="was trained on another .*: put the old files back, or train .* --overwrite"
            ):
                run_folder.finished_run(resolved(*SIX, *argv, "--output_dir", str(complete.parent)))
    finally:
        shutil.copytree(tmp_path / "kept", place, dirs_exist_ok=True)


def test_a_run_killed_with_all_its_steps_only_writes_its_end(tmp_path, monkeypatch):
    """Another step would also stand in metrics.jsonl."""

    def killed(*args) -> None:
        raise KeyboardInterrupt

    argv = ["--max_steps", "-1", "--num_train_epochs", "0.015", "--lr_scheduler_type", "constant_with_warmup"]
    argv += ["--eval_steps", "0"]
    whole = six(tmp_path / "whole", *argv)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_qlora, "save_adapter", killed)
        six(tmp_path / "parts", *argv)
    assert_same_run(six(tmp_path / "parts", *argv), whole)


# ----------------------------------------------------------------------------------------------------------------------
# whose a folder is


def test_a_kill_while_config_yaml_was_first_written_does_not_block_the_run(tmp_path):
    run = tmp_path / "smoke"
    run.mkdir()
    (run / ".config.yaml.77.tmp").write_text("# run smo")
    assert run_folder.claim(run, resolved(*SIX, "--output_dir", str(tmp_path))) == "new"


def test_a_kill_while_a_run_is_deleted_leaves_a_run(stopped, tmp_path, monkeypatch):
    """Else the same command would find files that are no run, and refuse; or a checkpoint without its manifest."""
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda path, **_: Path(path).exists() and Path(path).rename(tmp_path / f"deleted-{time.monotonic_ns()}"),
    )
    asked, left, unlink = resolved(*SIX, "--output_dir", str(tmp_path), "--overwrite"), [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **options: (left.append(contents(run)), unlink(path, **options)))
    run = copied(stopped, tmp_path)
    assert run_folder.claim(run, asked) == "new"
    assert len(left) >= 3
    for there in left:
        assert "config.yaml" in there
        assert "manifest.json" in there or not any(name.startswith("checkpoint-") for name in there)


def test_a_requeued_job_does_not_delete_its_own_run(stopped, tmp_path, monkeypatch, capsys):
    run = copied(stopped, tmp_path)
    monkeypatch.setattr(run_folder, "REQUEUED", True)
    asked = resolved(*SIX, "--output_dir", str(tmp_path), "--overwrite")
    assert run_folder.claim(run, asked) == run / "checkpoint-3"
    assert "requeued continues: --overwrite was done" in capsys.readouterr().out


def hold_until(folder: Path, held, free) -> None:
    with run_folder.hold(folder):
        held.set()
        free.wait(PATIENCE)


def test_one_process_holds_a_folder_and_only_a_requeued_job_waits_for_it(tmp_path, monkeypatch):
    """Also where another name leads to the folder."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/smoke").symlink_to(tmp_path / "smoke")
    run, held, free = tmp_path / "smoke", FORKS.Event(), FORKS.Event()
    other = FORKS.Process(target=hold_until, args=(tmp_path / "other/smoke", held, free))
    other.start()
    assert held.wait(PATIENCE)
    with pytest.raises(UserError, match=rf"^process {other.pid} on \S+, since \S+, trains into {run} now: wait for it"):
        six(tmp_path, "--overwrite")
    monkeypatch.setattr(run_folder, "REQUEUED", True)
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: (free.set(), other.join(PATIENCE)))
    with run_folder.hold(run):
        assert f"process {os.getpid()} on " in (tmp_path / ".smoke.lock").read_text() and other.exitcode == 0


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch, capsys):
    def refuse(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", refuse)
    with run_folder.hold(tmp_path / "run"):
        assert "nothing keeps a second run out of it: no locks on its file system (No locks" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# how a process ends


def test_a_stop_is_exit_75_and_says_which_command_continues(stopped, tmp_path, monkeypatch, capsys):
    copied(stopped, tmp_path)
    again = " without --overwrite"
    for argv, which in (([], ""), (["--overwrite"], again), (["--args=--overwrite"], again)):  # the last is make's
        monkeypatch.setattr(processes, "WORLD_SIZE", 1)
        monkeypatch.setattr(
            sys, "argv", ["train_qlora.py", *SMALL, *SIX, "--output_dir", str(tmp_path), "--time_limit", "0", *argv]
        )
        with pytest.raises(SystemExit) as ended:
            train_qlora.main()
        assert ended.value.code == 75
        assert f"which is saved; the same command{which} continues (exit code 75)\n" in capsys.readouterr().out
