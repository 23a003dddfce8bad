"""make report SERVE=1: asked as a browser would, of a process of its own, while a run is being trained."""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from ouro.verdict import live

import fabricate
import pytest
from conftest import PATIENCE
from helpers import ROOT


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The study's folder, and what asks for a path: status, headers, text."""
    root = tmp_path_factory.mktemp("served")
    output, _ = fabricate.study(root, tasks=("thai_text",), items=5, lines=4, seeds=(0,), depths=(1, 4))
    (output / "exp1-wangchan-ut4/completed").unlink()
    places = ["--output_dir", output, "--results_dir", root / "results", "--out", root]
    command = [sys.executable, "-u", ROOT / "report.py", "--serve", *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ) as process:
        port = next(int(m[1]) for line in process.stdout if (m := re.match(r"http://127\.0\.0\.1:(\d+)/ ", line)))

        def ask(path: str, host: str = "localhost") -> tuple[int, http.client.HTTPMessage, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

        yield root, port, ask
        process.kill()


def test_the_page_shows_each_runs_loss_and_time_left_and_is_made_again_when_one_is_complete(served):
    root, _, ask = served
    status, headers, page = ask("/")
    assert status == 200 and headers["Refresh"] and "no-store" in headers["Cache-Control"]
    assert page.count("<polyline") == 2 and "</b> step 40/40" in page and page.count("0:00:00 left") == 1
    run = root / "output/exp1-wangchan-ut4"
    config = (run / "config.yaml").read_text().replace("max_steps: 40", "max_steps: 100")
    (run / "config.yaml").write_text(config)
    with open(run / "metrics.jsonl", "a") as log:
        line = {"step": 50, "loss": 0.5, "num_tokens": 50 * 65536, "tokens_per_second": 65536}
        log.write(f'{{"torn\n{json.dumps(line)}\n{{')  # the last line is just being written
    told = re.search(r"exp1-wangchan-ut4</b> (.*?)<", ask("/")[2])[1]
    assert told.startswith("step 50/100, loss 0.5000 (first ") and "0:00:50 left, 65,536 tokens/s, last line " in told
    assert "not finished: step 40" in page
    assert (made := re.search("All else on this page is of (.*?);", page)[1]) in ask("/")[2], "no run is complete since"
    (run / "completed").write_text("{}")
    end = time.monotonic() + PATIENCE
    while "not finished" in (page := ask("/")[2]):
        assert time.monotonic() < end
        time.sleep(0.5)
    assert page.count(", complete<") == 2 and made not in page


def test_a_run_that_is_deleted_while_the_page_is_made_is_left_out(tmp_path, monkeypatch):
    output, _ = fabricate.study(tmp_path, tasks=("thai_text",), items=5, lines=4, seeds=(0,), depths=(1, 4))
    gone, *left = (folder for _, folder in live.folders(output))

    def changed(file: Path) -> float:  # asked of each log that was found
        (gone / "metrics.jsonl").unlink(missing_ok=True)
        return 0

    monkeypatch.setattr(live, "changed", changed)
    assert [run["name"] for run in live.runs_now(output)] == [folder.name for folder in left]


@pytest.mark.parametrize(
    "path",
    ["/report.html", "/RESULTS.md", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/?x",
     "/output/exp1-wangchan-ut4/config.yaml", "file:///etc/passwd"],
)  # fmt: skip
def test_nothing_but_the_page_can_be_asked_for(served, path):
    status, _, text = served[2](path)
    assert status in (404, 400) and "root:" not in text and "wangchan" not in text


def test_only_this_machine_is_answered_and_under_its_own_name(served):
    _, port, ask = served
    assert ask("/", host="evil.example")[0] == 403
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))  # where a server on all addresses would answer
