"""Stopping and going on: an interrupted run ends in the bytes of one that was not, whatever interrupted it."""

import errno
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import train_qlora
from ouro.files import UserError, read_yaml
from ouro.model.loading import load_ouro
from ouro.settings import resolve
from ouro.train import processes, run_folder, stopping, trainer

import pytest
import torch
from conftest import PATIENCE
from peft import PeftModel
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--config", "tests/smoke.yaml", "--report_to", "none", "--total_ut_steps", "1", "--overlap", "none",
         "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_rows", "4"]  # fmt: skip
SIX = [*SMALL, "--max_steps", "6", "--save_steps", "2", "--logging_steps", "2", "--eval_steps", "3"]
LATER = ("tokens_per_second", "padded_tokens_per_second", "memory_gib")  # what may differ in metrics.jsonl
STATE = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
# A process takes 10 s to import all this. These come from a server that has, but has computed nothing; train_qlora.py
# itself they run afresh, as a user types it.
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def in_the_repository():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("CONFIG", "OUTPUT_DIR", "REPORT_TO", "TOTAL_UT_STEPS"):
            patch.delenv(name, raising=False)
        imported = ["settings", "torch", "peft", "trl.trainer.sft_trainer", "bitsandbytes", "data_config", "batches"]
        FORKS.set_forkserver_preload(imported)
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def arguments(folder: Path, cache: str, *argv: str) -> list[str]:
    return [*SIX, "--output_dir", str(folder), "--cache_dir", cache, *argv]


def trained(folder: Path, cache: str, *argv: str) -> Path:
    """Trains in this process; the run's folder."""
    return train_qlora.train(resolve("", arguments(folder, cache, *argv), add_options=train_qlora.options))


def one_step(folder: Path, cache: str, *argv: str) -> int:
    """Goes on for one step in this process; the step that it stopped after."""
    with pytest.raises(stopping.Stopped, match="the time limit: stopped after step") as stopped:
        trained(folder, cache, "--time_limit", "0", *argv)
    return int(re.search(r"after step (\d+), which is saved", str(stopped.value))[1])


def run_script(argv: list[str], output: str, environment: dict[str, str]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = ["train_qlora.py", *argv]
    runpy.run_path("train_qlora.py", run_name="__main__")


class Script:
    """`python train_qlora.py ARGV` in a process of its own."""

    def __init__(self, folder: Path, argv: list[str], **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        self.output.touch()
        self.process = FORKS.Process(target=run_script, args=(argv, str(self.output), environment))
        self.process.start()

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def wait(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive() and time.monotonic() < end, self.printed
            time.sleep(0.0005)

    def code(self) -> int:
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {PATIENCE} s:\n{self.printed}")
        return self.process.exitcode

    def kill_when(self, condition) -> int:
        self.wait(condition)
        os.kill(self.process.pid, signal.SIGKILL)
        return self.code()


def names(run: Path) -> list[str]:
    return [path.name for path in run_folder.checkpoints(run)]


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in LATER} for line in lines]


def assert_same(run: Path, whole: Path) -> None:
    assert (run / "completed").read_bytes() == (whole / "completed").read_bytes()
    assert metrics(run) == metrics(whole)
    for name in ("adapter_model.safetensors", "tokenizer.json", "README.md", "SHA256SUMS"):
        assert (run / "final_adapter" / name).read_bytes() == (whole / "final_adapter" / name).read_bytes(), name
    assert not list(run.glob("checkpoint-*")) and not list(run.glob(".*")), "only the adapter remains"


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run that takes itself for one of `folder`."""
    copy = folder / run.name
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(run.parent), str(folder)))
    return copy


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Six steps without a stop."""
    return trained(tmp_path_factory.mktemp("whole"), cache)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cache):
    """The same run, stopped after each of its first three steps; do not write to it."""
    folder = tmp_path_factory.mktemp("stopped")
    for step in (1, 2, 3):
        assert one_step(folder, cache) == step
    assert names(folder / "smoke") == ["checkpoint-3", "checkpoint-2"]
    return folder / "smoke"


def test_a_run_stopped_at_every_step_ends_in_the_same_bytes(whole, cache, tmp_path):
    for step in range(1, 6):
        assert one_step(tmp_path, cache) == step
        kept = [f"checkpoint-{step}"] + [f"checkpoint-{step - 1}"] * (step > 1)
        assert names(tmp_path / "smoke") == kept, "save_total_limit of them"
        assert not (tmp_path / "smoke/final_adapter").exists() and not (tmp_path / "smoke/completed").exists()
    run = trained(tmp_path, cache, "--time_limit", "0")  # the last step is not stopped: it is done
    assert_same(run, whole)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 6]
    assert [line["step"] for line in metrics(run) if "held_out_loss" in line] == [3, 6]
    continued = json.loads((run / "manifest.json").read_text())["continued"]
    assert [(c["step"], c["processes"]) for c in continued] == [(step, 1) for step in range(1, 6)]


def test_a_run_stopped_at_every_step_of_two_uneven_epochs_ends_in_the_same_bytes(cache, tmp_path):
    rows = [json.loads(line) for line in Path("sample/wangchan/train.jsonl").read_text().splitlines()[:11]]
    data = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i} {row['Instruction']}", "completion": row["Output"]} for i, row in enumerate(rows)]
    data.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    argv = ["--dataset", "pairs", "--dataset_path", str(data), "--max_steps", "-1", "--num_train_epochs", "2"]
    whole = trained(tmp_path / "whole", cache, *argv)
    report = json.loads((whole / "data_report.json").read_text())
    assert report["rows_kept"] % 4 and 8 < report["rows_kept"] < 12, "steps of 4 rows, three in each epoch"
    assert metrics(whole)[-1]["num_tokens"] == 2 * report["tokens"], "each row once in each epoch"
    for step in range(1, 6):
        assert one_step(tmp_path / "parts", cache, *argv) == step
    assert_same(trained(tmp_path / "parts", cache, *argv), whole)


def test_killed_after_a_step_while_saving_and_after_the_last_checkpoint(whole, cache, tmp_path, capsys):
    run = tmp_path / "smoke"
    first = Script(tmp_path / "out", arguments(tmp_path, cache))
    assert first.kill_when(lambda: "step     3/" in first.printed) == -signal.SIGKILL
    assert names(run) == ["checkpoint-2"] and [line["step"] for line in metrics(run)] == [1, 2, 3]

    second = Script(tmp_path / "out", arguments(tmp_path, cache))
    assert second.kill_when((run / ".saving/checkpoint-4/adapter_model.safetensors").exists) == -signal.SIGKILL
    assert f"continuing from {run}/checkpoint-2" in second.printed
    assert names(run) == ["checkpoint-2"] and (run / ".saving").exists(), "what is half written counts for nothing"

    third = Script(tmp_path / "out", arguments(tmp_path, cache))
    assert third.kill_when((run / "checkpoint-6").exists) == -signal.SIGKILL
    assert not (run / "completed").exists() and names(run)[0] == "checkpoint-6"
    (run / "final_adapter").mkdir(exist_ok=True)  # as if killed just before `completed` was written
    (run / "final_adapter/README.md").write_text("half")
    (run / "final_adapter/rest").write_text("of before")
    assert_same(trained(tmp_path, cache), whole)
    assert f"continuing from {run}/checkpoint-6\n" in capsys.readouterr().out
    assert not (run / "final_adapter/rest").exists()


def test_killed_in_every_step_a_run_ends_in_the_same_bytes(cache, tmp_path):
    argv = ["--max_steps", "3", "--save_steps", "1", "--logging_steps", "1", "--eval_steps", "0"]
    whole = trained(tmp_path / "whole", cache, *argv)
    run = tmp_path / "parts/smoke"
    for step in (1, 2, 3):
        script = Script(tmp_path / "out", arguments(tmp_path / "parts", cache, *argv))
        code = script.kill_when(lambda step=step, script=script: f"step     {step}/3" in script.printed)
        assert code == -signal.SIGKILL and not (run / "completed").exists()
        kept = [int(name.split("-")[1]) for name in names(run)]
        assert kept[:1] in ([step], [step - 1], []) and all(map(run_folder.is_good, run_folder.checkpoints(run)))
        assert kept or step == 1, "a run starts anew only where nothing was saved"
    assert_same(trained(tmp_path / "parts", cache, *argv), whole)


@pytest.mark.parametrize(("where", "last"), [("held_out_loss", 4), ("_save_checkpoint", 3)])
def test_a_first_signal_in_evaluation_or_while_saving_ends_the_run_after_the_next_step(
    whole, cache, tmp_path, monkeypatch, where, last
):
    """The held-out loss is due in step 3, a checkpoint in step 2."""
    work, sent = getattr(trainer.LoopTrainer, where), []

    def signalled(self, *args):
        if self.state.global_step == last - 1 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return work(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.LoopTrainer, where, signalled)
        with pytest.raises(stopping.Stopped, match=f"^SIGTERM: stopped after step {last}, which is saved"):
            trained(tmp_path, cache)
    run = tmp_path / "smoke"
    assert sent and names(run)[0] == f"checkpoint-{last}"
    assert all(map(run_folder.is_good, run_folder.checkpoints(run)))
    assert_same(trained(tmp_path, cache), whole)


def damage_truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", (checkpoint / "optimizer.pt").stat().st_size // 2)


def damage_flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "adapter_model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "adapter_model.safetensors").write_bytes(content)


def damage_remove(checkpoint: Path) -> None:
    (checkpoint / "scheduler.pt").unlink()


def damage_no_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()


def damage_cut_sums(checkpoint: Path) -> None:
    """What a file system leaves of both after a power cut that lost their contents."""
    os.truncate(checkpoint / "SHA256SUMS", 0)
    os.truncate(checkpoint / "adapter_model.safetensors", 0)


DAMAGES = [damage_truncate, damage_flip, damage_remove, damage_no_sums, damage_cut_sums]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, cache, tmp_path, capsys, damage):
    run = copied(stopped, tmp_path)
    damage(run / "checkpoint-3")
    assert one_step(tmp_path, cache) == 3
    printed = capsys.readouterr().out
    assert f"{run}/checkpoint-3 is damaged" in printed and f"continuing from {run}/checkpoint-2\n" in printed
    for name in STATE:
        assert (run / "checkpoint-3" / name).read_bytes() == (stopped / "checkpoint-3" / name).read_bytes(), name
    assert metrics(run) == metrics(stopped), "the line of step 3 is there once"


def test_a_damaged_newer_checkpoint_does_not_outlive_the_one_that_is_saved(stopped, cache, tmp_path):
    """With one kept, it would else be the damaged one."""
    run = copied(stopped, tmp_path)
    shutil.rmtree(run / "checkpoint-2")
    shutil.copytree(run / "checkpoint-3", run / "checkpoint-20")
    damage_truncate(run / "checkpoint-20")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("save_total_limit: 2", "save_total_limit: 1"))
    assert one_step(tmp_path, cache, "--save_total_limit", "1") == 4
    assert names(run) == ["checkpoint-4"] and run_folder.is_good(run / "checkpoint-4")


def test_older_checkpoints_go_only_after_the_new_one_is_there(stopped, cache, tmp_path, monkeypatch):
    run = copied(stopped, tmp_path)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("save_total_limit: 2", "save_total_limit: 1"))

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "seal", full)
        with pytest.raises(UserError, match="^step 4: the checkpoint could not be written"):
            trained(tmp_path, cache, "--save_total_limit", "1")
    assert names(run) == ["checkpoint-3", "checkpoint-2"] and all(map(run_folder.is_good, run_folder.checkpoints(run)))
    assert one_step(tmp_path, cache, "--save_total_limit", "1") == 4 and names(run) == ["checkpoint-4"]


def test_guards_go_on_with_what_they_had_seen(whole, cache, tmp_path, monkeypatch):
    """The losses that a spike is measured by, the rates that a slow machine is, and the time since the last line."""
    seen = []
    for step in (1, 2, 3):
        assert one_step(tmp_path, cache) == step
    train = trainer.SFTTrainer.train

    def kept(self, **options):
        seen.append((list(self._recent), list(self._rates), time.perf_counter() - self._logged_at))
        return train(self, **options)

    progress = tmp_path / "smoke/checkpoint-3/progress.json"
    there = json.loads(progress.read_text())
    assert len(there["recent"]) == 3 and len(there["rates"]) == 2 and there["since_log"] < 60
    progress.write_text(json.dumps(there | {"since_log": 1000.0}))
    (progress.parent / run_folder.SUMS).unlink()
    run_folder.seal(progress.parent)
    monkeypatch.setattr(trainer.SFTTrainer, "train", kept)
    run = trained(tmp_path, cache)
    ((recent, rates, since),) = seen
    assert (recent, rates) == (there["recent"], there["rates"]) and 1000 <= since < 1100
    line = next(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[3:])
    assert line["step"] == 4 and line["tokens_per_second"] < 10, "the tokens since the last line, by all their time"
    assert_same(run, whole)


def test_with_all_checkpoints_damaged_the_run_starts_anew_and_says_so(stopped, cache, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    damage_flip(run / "checkpoint-3")
    damage_no_sums(run / "checkpoint-2")
    assert one_step(tmp_path, cache) == 1
    printed = capsys.readouterr().out
    assert printed.count("is damaged") == 2 and f"deleting the unfinished run in {run}" in printed
    assert names(run) == ["checkpoint-1"] and [line["step"] for line in metrics(run)] == [1]
    assert "continued" not in json.loads((run / "manifest.json").read_text())


def test_sha256sum_verifies_checkpoints_and_adapter(stopped, whole):
    for folder in (stopped / "checkpoint-3", stopped / "checkpoint-2", whole / "final_adapter"):
        listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
        assert listed == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
        done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == len(listed), done.stdout + done.stderr


def test_a_complete_run_is_the_adapter_and_is_not_repeated(whole, cache, capsys):
    before = contents(whole)
    assert not list(whole.glob("checkpoint-*")) and not list(whole.glob(".*"))
    assert trained(whole.parent, cache) == whole and "is complete already" in capsys.readouterr().out
    assert contents(whole) == before
    assert json.loads(before["completed"]) == {"steps": 6, "loss": metrics(whole)[-1]["loss"]}
    last = max((path for path in whole.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    assert last == whole / "completed"
    model = load_ouro("sample/ouro-tiny", dtype=torch.float32, nf4=True, total_ut_steps=1)
    adapted = PeftModel.from_pretrained(model, str(whole / "final_adapter")).state_dict()
    weights = load_file(whole / "final_adapter/adapter_model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(adapted[name.replace(".weight", ".default.weight")], weight) and weight.abs().max() > 0


def test_checkpoints_that_a_kill_left_beside_completed_go(whole, stopped, cache, tmp_path):
    run = copied(whole, tmp_path)
    shutil.copytree(stopped / "checkpoint-3", run / "checkpoint-3")
    assert_same(trained(tmp_path, cache), whole)


def test_a_started_run_with_other_settings_is_refused_untouched(stopped, cache, tmp_path):
    run = copied(stopped, tmp_path)
    before = contents(run)
    with pytest.raises(UserError, match=r"other settings:\n  max_steps: 6 there, 7 asked\n  seed: 42 there, 1 asked\n"):
        trained(tmp_path, cache, "--max_steps", "7", "--seed", "1")
    assert contents(run) == before


def test_settings_that_change_no_training_neither_refuse_nor_repeat_a_run(whole, stopped, cache, tmp_path, capsys):
    """Also the same folder, named otherwise; paths are those of what the run does not read."""
    copied(stopped, tmp_path)
    here = ["--results_dir", str(tmp_path), "--tasks", "thai_text", "--eval_batch_tokens", "9", "--max_new_tokens", "3"]
    here += ["--output_dir", os.path.relpath(tmp_path), "--cache_dir", os.path.relpath(cache)]
    here += ["--report_to", "tensorboard"]
    sets = read_yaml("tests/smoke.yaml")["paths"]
    here += ["--paths", ",".join(f"{n}={p if n == 'wangchan' else p + '/nowhere'}" for n, p in sets.items())]
    for _ in range(2):
        assert_same(trained(tmp_path, cache, *here), whole)
    printed = capsys.readouterr().out
    assert printed.count("continuing from ") == 1 and printed.count("is complete already") == 1
    with pytest.raises(UserError, match=r"other settings:\n  paths: .* asked\nuse another"):
        trained(tmp_path, cache, "--paths", f"wangchan={ROOT / 'sample/wangchan'}")


def test_a_run_says_and_records_what_is_not_as_it_began(stopped, cache, tmp_path, capsys):
    run = copied(stopped, tmp_path)
    manifest = json.loads((run / "manifest.json").read_text())
    before = manifest["packages"] | {"torch": "2.0", "trl": manifest["packages"]["trl"]}
    (run / "manifest.json").write_text(json.dumps(manifest | {"git_commit": "12ab", "gpu": "H100", "packages": before}))
    assert one_step(tmp_path, cache) == 4 and one_step(tmp_path, cache) == 5
    torch_now, commit = manifest["packages"]["torch"], manifest["git_commit"]
    line = f"  unlike when it began: torch {torch_now} after 2.0, git_commit {commit} after 12ab, gpu None after H100\n"
    assert capsys.readouterr().out.count(line) == 2
    *_, entry = json.loads((run / "manifest.json").read_text())["continued"]
    assert (entry["step"], entry["git_commit"], entry["gpu"]) == (4, commit, None)
    assert entry["packages"] == manifest["packages"]
    assert "unlike" not in capsys.readouterr().out


def test_the_folders_of_nodes_that_share_none_are_refused(stopped, cache, tmp_path, monkeypatch):
    run = copied(stopped, tmp_path)
    before, checkpoint = contents(run), f"{run}/checkpoint-3"
    monkeypatch.setattr(run_folder, "gather_object", lambda mine: [*mine, checkpoint, "nothing"])
    told = rf"^output_dir = {tmp_path} is not one shared folder: process 0 finds {checkpoint} there, process 2 nothing;"
    with pytest.raises(UserError, match=told):
        trained(tmp_path, cache)
    assert contents(run) == before


def test_a_run_with_checkpoints_is_not_continued_where_that_is_forbidden(stopped, cache, tmp_path):
    run = copied(stopped, tmp_path)
    before = contents(run)
    with pytest.raises(UserError, match=r"checkpoint-\d+ is there: --resume auto continues from it, --overwrite"):
        trained(tmp_path, cache, "--resume", "never")
    assert contents(run) == before


def test_a_run_is_not_continued_on_other_data(cache, tmp_path):
    rows = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(8))
    rows.write_text(text)
    data = ["--dataset", "pairs", "--dataset_path", str(rows)]
    assert one_step(tmp_path / "out", cache, *data) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "out/smoke").iterdir() if path.is_file()}
    rows.write_text(text.replace("a 3", "b 3"))
    with pytest.raises(UserError, match=r"began with data_revision sha256:\w+, and this is sha256:\w+: bring it back"):
        one_step(tmp_path / "out", cache, *data)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out/smoke").iterdir() if path.is_file()}
    rows.write_text(text)
    assert one_step(tmp_path / "out", cache, *data) == 2


def test_a_kill_while_config_yaml_was_first_written_does_not_block_the_run(cache, tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke/.config.yaml.77.tmp").write_text("# run smo")
    assert one_step(tmp_path, cache) == 1


def test_a_kill_while_a_run_is_deleted_leaves_a_run(stopped, cache, tmp_path):
    """Else the same command would find files that are no run, and refuse."""
    run = copied(stopped, tmp_path)
    many = [run / f"checkpoint-{i}" for i in range(1000, 5000)]
    for folder in many:
        folder.mkdir()
    script = Script(tmp_path / "out", arguments(tmp_path, cache, "--overwrite"))
    script.kill_when(lambda: len(os.listdir(run)) < 1000)
    assert len(os.listdir(run)) > 1, "killed in the middle"
    assert (run / "config.yaml").exists() and (run / "manifest.json").exists()
    assert one_step(tmp_path, cache, "--overwrite") == 1


def test_a_second_run_of_the_same_folder_is_refused_while_the_first_is_there(whole, cache, tmp_path):
    first = Script(tmp_path / "out", arguments(tmp_path, cache))
    first.wait(lambda: "step     1/" in first.printed)
    for argv in ([], ["--overwrite"]):
        second = Script(tmp_path / "out", arguments(tmp_path, cache, *argv))
        assert second.code() == 2
        told = rf"error: process {first.process.pid} on \S+, since \S+, trains into {tmp_path}/smoke now: wait for it"
        assert re.match(told, second.printed.splitlines()[-1])
    assert first.code() == 0, first.printed
    assert_same(tmp_path / "smoke", whole)


def hold_for(folder: Path, seconds: float, held) -> None:
    with run_folder.hold(folder):
        held.set()
        time.sleep(seconds)


def test_only_a_requeued_job_waits_for_the_lock_of_a_node_that_has_failed(tmp_path, monkeypatch):
    held = FORKS.Event()
    other = FORKS.Process(target=hold_for, args=(tmp_path / "run", 5, held))
    other.start()
    assert held.wait(PATIENCE)
    with pytest.raises(UserError, match=f"^process {other.pid} on .* trains into"), run_folder.hold(tmp_path / "run"):
        pass
    monkeypatch.setattr(run_folder, "REQUEUED", True)
    with run_folder.hold(tmp_path / "run"):
        assert f"process {os.getpid()} on " in (tmp_path / ".run.lock").read_text()
    other.join(PATIENCE)
    assert other.exitcode == 0


def test_a_file_system_without_locks_is_said_and_trained_on(tmp_path, monkeypatch, capsys):
    def refuse(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with run_folder.hold(tmp_path / "run"):
        pass
    assert "nothing keeps a second run out of it: no locks on its file system (No locks" in capsys.readouterr().out


def test_a_requeued_job_does_not_delete_its_own_run(whole, cache, tmp_path, monkeypatch, capsys):
    copied(whole, tmp_path)
    assert one_step(tmp_path, cache, "--overwrite") == 1
    monkeypatch.setattr(run_folder, "REQUEUED", True)
    assert one_step(tmp_path, cache, "--overwrite") == 2
    assert "requeued continues: --overwrite was done" in capsys.readouterr().out


def test_a_stop_says_which_command_continues(cache, tmp_path):
    script = Script(tmp_path / "out", arguments(tmp_path, cache, "--time_limit", "0", "--overwrite"))
    assert script.code() == 75
    assert "which is saved; the same command without --overwrite continues (exit code 75)" in script.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_in_step_evaluation_and_saving_stop_once_with_that_step_saved(stopped, cache, tmp_path, number):
    script, run = Script(tmp_path / "out", arguments(tmp_path, cache)), tmp_path / "smoke"
    script.wait(lambda: "step     2/" in script.printed and (run / "checkpoint-2").exists())
    sent = 0

    def over() -> bool:
        nonlocal sent
        if "exit code 75" not in script.printed:
            os.kill(script.process.pid, number)
            sent += 1
        return "exit code 75" in script.printed

    script.wait(over)
    assert script.code() == 75 and sent > 20
    line = f"{number.name}: stopped after step 3, which is saved; the same command continues (exit code 75)\n"
    assert script.printed.endswith(line) and script.printed.count("stopped after") == 1
    assert "Traceback" not in script.printed
    assert names(run) == ["checkpoint-3", "checkpoint-2"] and metrics(run) == metrics(stopped)
    for name in STATE:
        assert (run / "checkpoint-3" / name).read_bytes() == (stopped / "checkpoint-3" / name).read_bytes(), name


def test_the_time_limit_exits_with_75_and_a_bad_one_with_2(cache, tmp_path):
    script = Script(tmp_path / "out", arguments(tmp_path, cache, "--time_limit", "00:00:01"))
    assert script.code() == 75
    step = int(re.search(r"the time limit: stopped after step (\d), which is saved", script.printed)[1])
    assert step < 6 and names(tmp_path / "smoke")[0] == f"checkpoint-{step}"
    wrong = Script(tmp_path / "out", arguments(tmp_path / "wrong", cache, "--time_limit", "2h"))
    assert wrong.code() == 2 and not (tmp_path / "wrong").exists()
    told = "error: command line: argument --time_limit: '2h' is neither seconds nor HH:MM:SS nor D-HH:MM:SS\n"
    assert wrong.printed == told


@pytest.mark.parametrize("text", ["", "-1", "1:002:03", "1:00:00:00", "1-", "nan", "1e3"])
def test_a_bad_time_limit_is_refused(text):
    with pytest.raises(UserError, match="neither seconds nor HH:MM:SS"):
        resolve("", [*SIX, f"--time_limit={text}"], add_options=train_qlora.options)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("01:30", 90), ("36:00:05", 129605), ("1-00:00:00", 86400), ("2-12", 216000)]
)
def test_a_time_limit_is_read_as_slurm_writes_it(text, seconds):
    assert resolve("", [*SIX, "--time_limit", text], train_qlora.options).options.time_limit == seconds


@contextmanager
def small_disk(folder: Path, size: int):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_full_disk_keeps_the_older_checkpoint_and_the_run_goes_on_after(whole, stopped, cache, tmp_path):
    folder, run = tmp_path / "disk", tmp_path / "disk/smoke"
    size = size_of(stopped / "checkpoint-2")
    with small_disk(folder, int(size * 1.7)):
        script = Script(tmp_path / "out", arguments(folder, cache))
        assert script.code() == 2, script.printed
        errors = script.printed[script.printed.index("error: ") :]
        assert re.fullmatch(
            rf"error: step 4: the checkpoint could not be written to {run}: .+ \(\d+ MB free\); the same command "
            r"continues from the last good checkpoint\n", errors
        )  # fmt: skip
        assert "Traceback" not in script.printed
        assert names(run) == ["checkpoint-2"] and run_folder.is_good(run / "checkpoint-2")
        assert not (run / ".saving").exists()
        subprocess.run(["mount", "-o", f"remount,size={size * 6}", folder], check=True)
        assert_same(trained(folder, cache), whole)


def test_a_disk_that_the_adapter_fills_keeps_the_last_checkpoint(whole, stopped, cache, tmp_path):
    folder, run = tmp_path / "disk", tmp_path / "disk/smoke"
    size = size_of(stopped / "checkpoint-2")
    with small_disk(folder, size + size_of(whole / "final_adapter") // 2):
        told = rf"^the adapter could not be written to {run}: .+ \(\d+ MB free\); the same command continues from the"
        with pytest.raises(UserError, match=told):
            trained(folder, cache, "--save_steps", "6")
        assert names(run) == ["checkpoint-6"] and run_folder.is_good(run / "checkpoint-6")
        assert not (run / "final_adapter").exists() and not (run / ".final_adapter").exists()
        subprocess.run(["mount", "-o", f"remount,size={size * 6}", folder], check=True)
        assert_same(trained(folder, cache, "--save_steps", "6"), whole)


# ----------------------------------------------------------------------------------------------------------------------
# two processes

TWO = ["--max_steps", "4", "--lora_dropout", "0", "--eval_rows", "5"]


def port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


class Started(Script):
    """The same in a process that was not forked: where several wait for each other, threads must not be missing."""

    def __init__(self, folder: Path, argv: list[str], **environment: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / f"output-{time.monotonic_ns()}.txt"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "train_qlora.py", *argv], stdout=output, stderr=output, env=os.environ | environment
            )

    def code(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {PATIENCE} s:\n{self.printed}") from None


def both(folder: Path, argv: list[str]) -> list[Started]:
    """What torchrun starts."""
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [Started(folder / str(rank), argv, RANK=str(rank), LOCAL_RANK=str(rank), **places) for rank in (0, 1)]


def workers(launcher: int) -> list[int]:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(pid) for pid in children if b"train_qlora.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def torchrun(output: Path, argv: list[str], number: int) -> tuple[int, str]:
    """Sends a signal to its second worker in step 2; exit code, what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]
    with open(output, "w") as file:
        process = subprocess.Popen([*command, "train_qlora.py", *argv], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
        try:
            end = time.monotonic() + PATIENCE
            while "\nstep     " not in output.read_text():
                assert process.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.005)
            pids = workers(process.pid)
            assert len(pids) == 2
            os.kill(pids[1], number)
            code = process.wait(PATIENCE)
            assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "no worker is left"
        finally:
            process.kill()
            process.wait()
    return code, output.read_text()


def test_two_processes_train_as_one_and_are_stopped_killed_and_continued(cache, tmp_path):
    one = trained(tmp_path / "one", cache, *TWO)
    scripts = both(tmp_path / "out", arguments(tmp_path / "two", cache, *TWO))
    assert [script.code() for script in scripts] == [0, 0], scripts[0].printed + scripts[1].printed
    two = tmp_path / "two/smoke"
    assert [script.printed.count("\nstep ") for script in scripts] == [4, 0]
    assert [line["step"] for line in metrics(two)] == [line["step"] for line in metrics(one)] == [1, 2, 3, 4]
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["num_tokens"] == b["num_tokens"] and a["mean_token_accuracy"] == b["mean_token_accuracy"]
        assert a.get("held_out_loss", []) == pytest.approx(b.get("held_out_loss", []), rel=1e-5)

    folder, run = tmp_path / "parts", tmp_path / "parts/smoke"
    argv = arguments(folder, cache, *TWO)
    code, printed = torchrun(tmp_path / "term.txt", argv, signal.SIGTERM)
    assert code != 0
    step = int(re.search(r"stopped after step (\d), which is saved; the same command", printed)[1])
    assert names(run)[0] == f"checkpoint-{step}" and step < 4 and run_folder.is_good(run / f"checkpoint-{step}")
    assert not (run / "completed").exists()
    shutil.copytree(run, tmp_path / "stopped")

    code, printed = torchrun(tmp_path / "kill.txt", argv, signal.SIGKILL)
    assert code != 0 and f"continuing from {run}/checkpoint-{step}" in printed
    assert not (run / "completed").exists()

    scripts = both(tmp_path / "out", argv)
    assert [script.code() for script in scripts] == [0, 0], scripts[0].printed + scripts[1].printed
    assert "continuing from" in scripts[0].printed and "not the same bytes" not in scripts[0].printed
    assert_same(run, two)

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "stopped", run)
    alone = Script(tmp_path / "out", argv)
    assert alone.code() == 0 and "with 1 process after 2: the same rows in each step" in alone.printed
    assert [line["num_tokens"] for line in metrics(run)] == [line["num_tokens"] for line in metrics(one)]
    assert [line["loss"] for line in metrics(run)] == pytest.approx([m["loss"] for m in metrics(one)], rel=1e-4)


def test_what_one_process_began_two_continue_and_their_time_limit_stops_them_together(cache, tmp_path):
    one = trained(tmp_path / "one", cache, *TWO)
    folder, run = tmp_path / "parts", tmp_path / "parts/smoke"
    assert one_step(folder, cache, *TWO) == 1
    for limit, codes, step in (["--time_limit", "0"], [75, 75], 2), ([], [0, 0], 4):
        scripts = both(tmp_path / "out", arguments(folder, cache, *TWO, *limit))
        assert [script.code() for script in scripts] == codes, scripts[0].printed + scripts[1].printed
        assert metrics(run)[-1]["step"] == step and scripts[1].printed.count("step ") == 0
    told = "with 2 processes after 1: the same rows in each step, but other dropout masks"
    assert [entry["processes"] for entry in json.loads((run / "manifest.json").read_text())["continued"]] == [2, 2]
    assert told not in scripts[0].printed, "after 2"
    losses = {line["step"]: line["loss"] for line in metrics(one)}
    assert all(line["loss"] == pytest.approx(losses[line["step"]], rel=1e-4) for line in metrics(run))
    assert [line["num_tokens"] for line in metrics(run)] == [line["num_tokens"] for line in metrics(one)]


def test_steps_that_two_processes_cannot_share_are_refused(cache, tmp_path):
    scripts = both(tmp_path / "out", arguments(tmp_path / "run", cache, "--gradient_accumulation_steps", "3"))
    assert [script.code() for script in scripts] == [2, 2]
    message = "error: gradient_accumulation_steps = 3 forward passes a step cannot be shared by 2 processes; use a "
    assert scripts[0].printed.startswith(message) and scripts[1].printed == "" and not (tmp_path / "run").exists()


def test_of_two_processes_the_second_does_not_wait_for_data_that_the_first_cannot_read(cache, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n{"prompt"\n')
    scripts = both(tmp_path / "out", arguments(tmp_path, cache, "--dataset", "pairs", "--dataset_path", str(rows)))
    assert [script.code() for script in scripts] == [2, 2]
    assert f"{rows}" in scripts[0].printed and "line 2" in scripts[0].printed and "Traceback" not in scripts[1].printed
    assert "error: " not in scripts[1].printed


def test_of_two_processes_that_fail_with_a_full_disk_one_says_so_and_neither_hangs(stopped, cache, tmp_path):
    with small_disk(tmp_path / "disk", size_of(stopped / "checkpoint-2") // 2):
        scripts = both(tmp_path / "out", arguments(tmp_path / "disk", cache, *TWO))
        codes, printed = [script.code() for script in scripts], [script.printed for script in scripts]
        assert codes == [2, 1] and printed[0].endswith("the same command continues from the last good checkpoint\n")
        assert [text.count("error: ") for text in printed] == [1, 0] and "Traceback" not in "".join(printed)
        assert "error: step 2: the checkpoint could not be written to" in printed[0]


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
