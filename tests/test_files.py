"""Files: written whole, under names of their own until then, and nothing of killed processes stays."""

import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from weakref import WeakSet

from ouro import files

import pytest
from conftest import PATIENCE

FORKS = multiprocessing.get_context("fork")


def write_until_killed(path, folder, began) -> None:
    with files.unfinished(path) as file:
        file.write(b"half")
        if folder:
            os.mkdir(f"{file.name}.d")
            open(f"{file.name}.d/rows", "wb").close()
        began.set()
        signal.pause()


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, folder):
    path, began = tmp_path / "note.json", FORKS.Event()
    (tmp_path / ".note.json.kept").touch()  # is no temporary file
    writer = FORKS.Process(target=write_until_killed, args=(path, folder, began))
    writer.start()
    assert began.wait(PATIENCE)
    mine = {f for f in tmp_path.iterdir() if f.name != ".note.json.kept"}
    assert len(mine) == 1 + folder and not path.exists()
    files.write_atomic(path, "first")
    assert mine < set(tmp_path.iterdir()), "its process lives"
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(PATIENCE)
    files.write_atomic(path, "second")
    assert sorted(f.name for f in tmp_path.iterdir()) == [".note.json.kept", "note.json"]
    assert path.read_text() == "second"


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "note.json", "old")
    monkeypatch.setattr(os, "replace", lambda *names: os.stat(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "note.json", "new")
    assert [f.name for f in tmp_path.iterdir()] == ["note.json"] and (tmp_path / "note.json").read_text() == "old"


def test_a_file_that_is_replaced_while_it_is_looked_at_is_no_pipe(tmp_path, monkeypatch):
    file, look = tmp_path / "result.json", Path.stat
    file.touch()

    def gone_then(path: Path, **options):
        found = look(path, **options)
        file.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", gone_then)
    assert files.regular(file, 10) == file


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_names_what_begins_without_a_share_and_tells_a_log_a_line_at_a_time(monkeypatch, capsys, terminal):
    monkeypatch.setattr(files, "MINUTE", 0.05)
    monkeypatch.setattr(files.tqdm, "_instances", WeakSet())  # without the bars that tests before left open
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    clock = itertools.count(1, 1e-6)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))

    def told(text: str) -> str:
        """What is told until this is."""
        shown, end = "", time.monotonic() + PATIENCE
        while text not in shown and time.monotonic() < end:
            time.sleep(0.05)
            shown += capsys.readouterr().err
        return shown

    with files.Progress("loading the model", 4, "files") as progress:
        progress.refresh()
        begun = told("gone")
        progress.update(2)
        progress.refresh()
        half = told("left")
    assert "loading the model: 00:00 gone" in begun and "%" not in begun and "?" not in begun
    assert re.search(r"loading the model: 50 %.*2 of 4 files, 00:00 gone, 00:00 left", half)
    assert begun.count("\n") == begun.count("gone") * (not terminal) and ("\r" in begun) is terminal
    with files.Progress("quiet", 4, quiet=True) as progress:
        progress.update(2)
        time.sleep(0.1)
    assert "quiet" not in capsys.readouterr().err


def test_the_codes_hash_is_another_after_an_edit_that_is_not_committed(monkeypatch, tmp_path):
    (tmp_path / "ouro/train").mkdir(parents=True)
    program, others = tmp_path / "ouro/train/trainer.py", [tmp_path / "output.py.log", tmp_path / "mine.yaml"]
    monkeypatch.setattr(files, "ROOT", tmp_path)
    told = []
    for content in ("loss = 1", "loss = -1", "loss = 1"):
        program.write_text(content)
        others.pop().touch() if others else None
        told.append(files.code_version()["code_sha256"])
    assert told[0] == told[2] != told[1]


def test_ctrl_c_during_imports_prints_no_traceback():
    told = subprocess.run([sys.executable, "-c", "import ouro; raise KeyboardInterrupt"], capture_output=True)
    assert told.returncode == -signal.SIGINT and told.stderr == b""
