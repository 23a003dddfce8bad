"""Files: written whole, under names of their own until then, and nothing of killed processes stays."""

import multiprocessing
import os
import signal

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
