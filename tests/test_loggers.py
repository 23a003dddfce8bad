"""TensorBoard and W&B get the numbers of metrics.jsonl; a W&B run that could not be logged is refused at the start."""

import base64
import json
import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ouro.files import UserError, latest
from ouro.settings import Settings
from ouro.train import loggers, stopping, trainer

import pytest
import wandb
from conftest import PATIENCE
from helpers import ROOT, SMALL, metrics, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerControl, TrainerState
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

pytestmark = pytest.mark.usefixtures("in_the_repository")
KEY, OTHER_KEY = "0123456789abcdef" * 3, "fedcba9876543210" * 3
THREE = ["--total_ut_steps", "2", "--max_steps", "3", "--save_steps", "1", "--logging_steps", "1", "--eval_steps", "2"]


@pytest.fixture(autouse=True)
def nobody(in_the_repository, monkeypatch, tmp_path):
    """A user who has no login."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    yield
    wandb.teardown()


class Viewer(BaseHTTPRequestHandler):
    """What W&B's server answers when it is asked whose key this is."""

    def do_POST(self):
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["query"]
        key = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode().removeprefix("api:")
        self.server.asked.append("viewer" in query and key)
        user = {"id": "VXNlcjox", "username": "tester", "entity": "tester", "flags": "{}", "teams": {"edges": []}}
        answer = json.dumps({"data": {"viewer": user if key == KEY else None}}).encode()
        self.send_response(200 if key == KEY else self.server.refusal)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Viewer)
    server.asked, server.refusal = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


WANDB = Settings(report_to="wandb")


def test_a_key_that_the_server_accepts_is_enough_from_the_environment_or_a_stored_login(server, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    loggers.check_logger(WANDB)
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = Path(os.environ["NETRC"])
    netrc.parent.mkdir(exist_ok=True)
    netrc.write_text(f"machine 127.0.0.1:{server.server_port}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    loggers.check_logger(WANDB)
    assert server.asked and set(server.asked) == {KEY} and KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("refusal", [200, 401])
def test_a_key_that_the_server_refuses_is_refused_and_not_shown(server, monkeypatch, capfd, refusal):
    server.refusal = refusal
    monkeypatch.setenv("WANDB_API_KEY", OTHER_KEY)
    with pytest.raises(UserError, match="no run can be logged: .*API key") as error:
        loggers.check_logger(WANDB)
    assert "set WANDB_API_KEY or run `wandb login`" in str(error.value)
    assert set(server.asked) == {OTHER_KEY} and OTHER_KEY not in str(error.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "No API key configured"),
        ({"WANDB_API_KEY": "short-secret"}, r"API key must have 40\+ characters"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "127.0.0.1:9.* connection refused"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "of"}, "WANDB_MODE: Input should be 'online', 'offline'"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "WANDB_DISABLED is set: unset it"),
    ],
)
def test_what_else_would_lose_a_run_is_named(server, monkeypatch, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=reason) as error:
        loggers.check_logger(WANDB)
    assert not server.asked and KEY not in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_without_a_server_no_key_is_needed(server, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    loggers.check_logger(WANDB)
    loggers.check_logger(Settings(report_to="tensorboard"))
    assert not server.asked


@pytest.mark.slow
def test_on_a_terminal_a_missing_key_is_an_error_not_a_question(server, tmp_path):
    terminal, end = pty.openpty()
    argv = latest([*SMALL, *THREE, "--report_to", "wandb", "--output_dir", str(tmp_path / "out")])
    done = subprocess.run(
        [sys.executable, "train_qlora.py", *argv], stdin=end, stdout=end, stderr=end, timeout=PATIENCE
    )
    os.close(end)
    printed = os.read(terminal, 10**6).decode()
    os.close(terminal)
    assert done.returncode == 2 and printed.count("\n") == 2 and not (tmp_path / "out").exists()
    assert printed.startswith("error: report_to = wandb, and no run can be logged: No API key configured.")


def three(folder: Path, *argv: str) -> Path:
    """Trains for three steps; the run's folder."""
    try:
        return trained(folder, *THREE, *argv)
    finally:
        wandb.finish()  # as the end of a process does
        wandb.teardown()  # waits until its files are written


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of metrics.jsonl by the names that they have in a logger."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics(run):
        step, losses = line.pop("step"), line.pop("held_out_loss", [])
        line |= {f"held_out_loss/loop{i}": loss for i, loss in enumerate(losses, 1)}
        for name, value in line.items():
            series.setdefault(f"train/{name}", []).append((step, pytest.approx(value, rel=1e-6)))
    assert [step for step, _ in series["train/loss"]] == [1, 2, 3]
    assert [step for step, _ in series["train/held_out_loss/loop2"]] == [2, 3] and "step" not in series
    return series


def test_tensorboard_gets_every_number_and_drops_those_after_the_checkpoint_that_a_run_continues_from(tmp_path, caplog):
    with pytest.raises(stopping.Stopped):
        three(tmp_path, "--report_to", "tensorboard", "--time_limit", "0")
    with SummaryWriter(str(tmp_path / "smoke/tensorboard")) as writer:  # as before a kill
        for step in (1, 2, 3):
            writer.add_scalar("train/lost", step, step)
    run = three(tmp_path, "--report_to", "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/lost")] == [1]
    for name, points in expected(run).items():
        assert {event.step: event.value for event in events.Scalars(name)} == dict(points), name
    assert "dropped this attribute" not in caplog.text


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused(monkeypatch, logger):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    monkeypatch.setattr(loggers, "is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match=f"report_to = {logger} needs the package {logger}"):
        loggers.check_logger(Settings(report_to=logger))


def history(file: Path) -> list[dict]:
    """The logged lines in a .wandb file."""
    store, lines = DataStore(), []
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return lines


def test_wandb_gets_every_number_in_one_run_also_when_continued_and_no_file_holds_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    before = set(ROOT.iterdir())
    with pytest.raises(stopping.Stopped):
        three(tmp_path, "--report_to", "wandb", "--time_limit", "0")
    run = three(tmp_path, "--report_to", "wandb")
    assert set(ROOT.iterdir()) == before, "nothing in the working directory"

    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{(run / 'wandb/run_id').read_text()}"}
    lines = [line for file in files for line in history(file)]
    for name, points in expected(run).items():
        logged = [(line["train/global_step"], line[name]) for line in lines if name in line and "train/loss" in line]
        assert logged == points, name
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_between_logged_steps_one_is_told_when_a_minute_is_over(monkeypatch, capsys, tmp_path):
    told_by, control = trainer.Metrics(tmp_path / "metrics.jsonl", eval_steps=0), TrainerControl()
    state = TrainerState(global_step=2, max_steps=10)
    told_by.on_step_begin(None, state, control)
    for minute, told in ((60, ""), (0, "step     3/10  left 0:00:0")):
        monkeypatch.setattr(trainer, "MINUTE", minute)
        state.global_step = 3
        told_by.on_step_end(None, state, control)
        assert capsys.readouterr().out[:26] == told
