"""The report as a page on this machine, `make report SERVE=1`: in it each run's loss so far, and the time it has left.

It is made again when a run or a result is complete, and reloads while something changes. Nothing but the page can be
asked for: no file is read by a name that a request gives.
"""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ouro.verdict.page import fill
from ouro.verdict.study import folders, logged, progress

HERE, PORT = "127.0.0.1", 8765  # or any free port, where another program has this one
LOOK, RELOAD, QUIET = 2, 20, 900  # seconds: between looks for what is new, and reloads; after the last change of a file
POINTS = 200  # of a curve


def runs_now(output: Path) -> list[dict[str, str]]:
    """What the page shows of each run that has logged a step: those that are not complete first, then by age."""
    shown = []
    begun = [(name, folder) for name, folder in folders(output) if (folder / "metrics.jsonl").is_file()]
    for name, folder in sorted(begun, key=lambda run: (done(run[1]), -changed(run[1] / "metrics.jsonl"))):
        losses: list[float] = []
        with suppress(OSError):  # the run was deleted since it was found
            losses = [x for line in logged(folder) if math.isfinite(x := line.get("loss", math.nan))]
        if not losses:
            continue
        low, high = min(losses), max(losses)
        drawn = losses[:: -(-len(losses) // POINTS)]
        points = (
            f"{i / max(len(drawn) - 1, 1):.4f},{(high - x) / ((high - low) or 1):.4f}" for i, x in enumerate(drawn)
        )
        step, loss, rate, left = progress(folder)
        ago = timedelta(seconds=round(max(0, time.time() - changed(folder / "metrics.jsonl"))))
        state = "complete" if done(folder) else f"{left} left, {rate} tokens/s, last line {ago} ago"
        told = f"step {step}, loss {loss} (first {losses[0]:.4f}), {state}"
        shown.append({"name": name, "told": told, "points": " ".join(points)})
    return shown


def done(folder: Path) -> bool:
    return (folder / "completed").exists()


def changed(file: Path) -> float:
    """When it was last written; 0 of one that is not there, or has just been replaced."""
    with suppress(OSError):
        return file.stat().st_mtime
    return 0


def inputs(output: Path, results: Path) -> dict[Path, float]:
    """What the report is made of, as far as it is complete, and when each file was written."""
    files = [folder / "completed" for _, folder in folders(output)]
    files += [file for _, folder in folders(results) for file in folder.glob("*-ut*.json")]
    return {file: changed(file) for file in files}


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.headers.get("Host", "").partition(":")[0]
        if name not in (HERE, "localhost"):  # another site's name that was made to lead here could read the page
            self.send_error(403)
        elif self.path != "/":
            self.send_error(404)
        else:
            output, results = self.server.places
            page = fill("report.html", **self.server.content | {"live": runs_now(output)}).encode()
            logs = [changed(folder / "metrics.jsonl") for _, folder in folders(output)]
            last = max([0, *logs, *inputs(output, results).values()])
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            if time.time() - last < QUIET:
                self.send_header("Refresh", str(RELOAD))
            self.end_headers()
            with suppress(ConnectionError):  # the reader has gone on
                self.wfile.write(page)

    def log_message(self, *_) -> None:
        """No line for each request."""


def serve(content: dict, again: Callable[[], dict], seen: dict[Path, float], output: Path, results: Path) -> None:
    """Serves the report until Ctrl-C. content: what its template shows, made of the inputs `seen`; again: makes it."""
    try:
        server = ThreadingHTTPServer((HERE, PORT), Page)
    except OSError:
        server = ThreadingHTTPServer((HERE, 0), Page)
    server.content, server.places = {"made": time.ctime()} | content, (output, results)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    print(f"\nhttp://{HERE}:{port}/ until Ctrl-C; from elsewhere: ssh -L {port}:{HERE}:{port} THIS_MACHINE", flush=True)
    while True:
        time.sleep(LOOK)
        if (now := inputs(output, results)) != seen:
            seen, server.content = now, {"made": time.ctime()} | again()
