"""Kills: whatever is killed, the same command goes on, to the files of a run that was not."""

import subprocess
import sys

import pytest
from conftest import PATIENCE
from helpers import ROOT


@pytest.mark.slow
def test_programs_that_are_killed_go_on_to_the_same_files():
    done = subprocess.run(
        [sys.executable, "tests/kill_storm.py"], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE
    )
    last = done.stdout.splitlines()[-1].split()
    assert done.returncode == 0 and last[0] == last[2] and int(last[0]) >= 16, done.stdout + done.stderr[-3000:]
