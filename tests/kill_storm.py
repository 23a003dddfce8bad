"""Kills programs at their file events, gives the same command again, and compares what is left with what an undisturbed
run leaves.

    python tests/kill_storm.py                        # at least 20, a few of each program: two minutes on two cores
    python tests/kill_storm.py --kills 200            # that many, of all programs, the demo and two processes too
    python tests/kill_storm.py --every training       # of the programs whose names begin so: once at each file event

A file event is what changes a file or folder, or waits for the disk. At a chance one (seeded) the process gets SIGKILL,
up to three times before the command is left alone, the demo nine times. Both then must hold the same folders and
bytes, and nothing must be left over.
"""

import argparse
import hashlib
import json
import mmap
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
TIMES = ("tokens_per_second", "padded_tokens_per_second", "seconds", "memory_gib")  # of metrics.jsonl
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SETTINGS = ["--config", "tests/smoke.yaml", "--overlap", "none", "--report_to", "none", "--total_ut_steps", "1",
            "--max_length", "256", "--length_policy", "truncate", "--min_end_survival", "0", "--max_too_long_share",
            "1", "--activation_checkpointing", "none"]  # fmt: skip


@dataclass
class Program:
    script: str
    arguments: list[str]
    needs: list[str] = field(default_factory=list)  # what is made before: folders of others' undisturbed runs
    processes: int = 1
    in_a_row: int = 3  # kills, at most, before it is left alone
    timed: bool = False  # its report tells how fast its runs were


def programs(place: Path) -> dict[str, Program]:
    """By name, each with the folder place/now in which it works."""
    now, cache = place / "now", ["--cache_dir", str(place / "cache")]
    train = [*SETTINGS, *cache, "--output_dir", str(now / "output"), "--save_steps", "2", "--dataset", "synthetic"]
    run = ["--output_dir", str(now / "output"), "--results_dir", str(now / "results")]
    score = [*SETTINGS, *run, "--limit", "1", "--ut_steps", "1,2", "--max_new_tokens", "4", "--judge", "none"]
    score += ["--tasks", "thai_exam,thai_text,mt_bench_thai"]
    replies = str(now / "results/smoke/mt_bench_thai-ut1.json")
    constant = ["--lr_scheduler_type", "constant_with_warmup"]
    epochs = ["--rows_per_step", "7", "--num_train_epochs"]  # 24 rows
    demo = ["--model_name_or_path", "sample/ouro-tiny", "--max_steps", "2", "--max_new_tokens", "1"]
    return {
        "training": Program("train_qlora.py", [*train, "--max_steps", "4"]),
        "training, constant rate": Program("train_qlora.py", [*train, "--max_steps", "3", *constant]),
        "training, 0.5 epochs": Program("train_qlora.py", [*train, *epochs, "0.5"]),
        "training, 1 epoch": Program("train_qlora.py", [*train, *constant, *epochs, "1"]),
        "data": Program("data_config.py", [*SETTINGS, *run, "--cache_dir", str(now / "cache")]),
        "merge": Program("tools/export.py", ["merge", *SETTINGS, *run], ["training"]),
        "evaluation": Program("evaluate.py", score, ["training"]),
        "judge": Program("tools/judge.py", [replies], ["training", "evaluation"]),
        "report": Program("report.py", [*run, "--out", str(now / "out"), "--csv"], ["training", "evaluation"]),
        "two processes": Program("train_qlora.py", [*train, "--max_steps", "3"], processes=2),
        "demo": Program("tools/demo.py", [*demo, *run], in_a_row=9, timed=True),
    }


def main_of(script: str) -> Callable[[], None]:
    return runpy.run_path(str(ROOT / script), run_name="storm")["main"]


def count_events(kill_at: int, place: str) -> mmap.mmap:
    """Counts the file events in `place` of this process and of those that it forks, in the number that the memory they
    share holds. At one of them this process gets SIGKILL, 0: never."""
    count, main = mmap.mmap(-1, 8), os.getpid()

    def tick() -> None:
        number = int.from_bytes(count[:]) + 1
        count[:] = number.to_bytes(8)
        if 0 < kill_at <= number:
            os.kill(main, signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        path = str(arguments[0]) if arguments else ""
        if path.startswith(place) and (event in EVENTS or event == "open" and (arguments[2] or 0) & WRITING):
            tick()

    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        tick()

    os.fsync = fsync
    sys.addaudithook(hook)
    return count


def run_here(program: Program, main: Callable[[], None], kill_at: int, place: str) -> None:
    """Runs a program in this process, which then ends; its number of events is in place/events-RANK."""
    from ouro.files import call

    log = os.open(f"{place}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = [program.script, *program.arguments]
    count, leave = count_events(kill_at, f"{place}/now"), os._exit

    def end(code: int) -> None:
        sys.stdout.flush()
        (Path(place) / f"events-{os.environ.get('RANK', 0)}").write_text(str(int.from_bytes(count[:])))
        leave(code)

    os._exit = end  # by which processes of a group leave
    code = 0
    try:
        call(main)
    except SystemExit as asked:
        code = asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    end(code)


def serve(orders: Connection, environment: dict[str, str]) -> None:
    """A process that has imported everything, and forks a copy for each order: (program, kill_at, place, variables)."""
    os.environ.update(environment)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    mains = {program.script: main_of(program.script) for program in programs(Path()).values()}
    while order := orders.recv():
        program, kill_at, place, variables = order
        if (child := os.fork()) == 0:
            os.environ.update(variables)
            run_here(program, mains[program.script], kill_at, place)
        orders.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def server(**environment: str) -> Connection:
    here, there = Pipe()
    if os.fork() == 0:
        here.close()
        try:
            serve(there, environment)
        finally:  # also where the storm has ended
            os._exit(0)
    there.close()
    return here


class Storm:
    """Runs programs, one at a time, in place/now."""

    def __init__(self, place: Path, judge: str):
        self.place, self.bases, self.shown = place, {}, {}
        common = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DEMO_SEEDS": "1",
                  "JUDGE_BASE_URL": judge, "JUDGE_MODEL": "a-judge"}  # fmt: skip
        both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        both = [both | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        self.environments = {1: [common], 2: [common | one for one in both]}
        self.servers: dict[int, list[Connection]] = {}  # by number of processes, started when they are needed

    def run(self, program: Program, kill_at: int = 0, rank: int = 0) -> list[int]:
        """The exit codes of its processes, of which one is killed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = {"MASTER_PORT": str(free.getsockname()[1])}
        count = program.processes
        if count not in self.servers:
            self.servers[count] = [server(**environment) for environment in self.environments[count]]
        servers = self.servers[count]
        for number, orders in enumerate(servers):
            orders.send((program, kill_at if number == rank else 0, str(self.place), variables))
        for orders in servers:
            assert orders.poll(PATIENCE), f"hangs: {self.place}/log"
        return [orders.recv() for orders in servers]

    def clear(self, program: Program) -> None:
        """The folder as it is before the program: with what others, undisturbed, left."""
        shutil.rmtree(self.place / "now", ignore_errors=True)
        (self.place / "now").mkdir()
        for name in program.needs:
            shutil.copytree(self.bases[name], self.place / "now", dirs_exist_ok=True, symlinks=True)

    def base(self, name: str, program: Program) -> list[int]:
        """Runs it undisturbed, keeps what it leaves, and gives the number of its file events, by process."""
        for _ in range(2):  # the second time with rows in the cache, as all that are killed have them
            self.clear(program)
            codes = self.run(program)
            assert set(codes) == {0}, (self.place / "log").read_text()[-3000:]
        self.bases[name] = self.place / f"base-{len(self.bases)}"
        shutil.copytree(self.place / "now", self.bases[name], symlinks=True)
        self.shown[name] = contents(self.place / "now", program.timed)
        return [int((self.place / f"events-{rank}").read_text()) for rank in range(program.processes)]

    def attempt(self, name: str, program: Program, kills: list[tuple[int, int]]) -> tuple[int, str]:
        """Kills at (rank, event) one after the other, then not; how many of them came, and what is not the same."""
        self.clear(program)
        came = 0
        for rank, event in kills:
            came += -signal.SIGKILL in self.run(program, event, rank)
        codes, found = self.run(program), contents(self.place / "now", program.timed)
        if set(codes) != {0}:
            return came, f"exit codes {codes}: {(self.place / 'log').read_text()[-300:]!r}"
        wanted = self.shown[name]
        different = [file for file in sorted({**wanted, **found}) if wanted.get(file) != found.get(file)]
        return came, f"not the same: {', '.join(different)}" if different else ""


def contents(folder: Path, timed: bool) -> dict[str, str]:
    """By file, a digest of all that does not tell the time, and by folder nothing. timed: not the numbers in a report's
    text and page; its verdict.json has those that are no times."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[name] = ""
        if not path.is_file() or path.suffix == ".lock" or path.name == "manifest.json" or "logs/" in name:
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k not in TIMES} for line in lines]).encode()
        elif timed and path.name in ("RESULTS.md", "report.html"):
            data = re.sub(rb"\d[\d.,]*(e[-+]?\d+)?", b"", data)
        elif path.name.endswith(".cache.jsonl"):  # in the order in which they were answered
            data = b"\n".join(sorted(data.splitlines()))
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def at_chance(kills: int, program: Program, events: list[int], chance: random.Random) -> list[tuple[int, int]]:
    """At most so many kills in a row, each (process, event), spread over the run: the count begins anew after each."""
    count = min(chance.randint(1, program.in_a_row), kills)
    ranks = chance.choices(range(len(events)), events, k=count)
    return [(rank, chance.randint(1, max(1, 2 * events[rank] // (count + 1)))) for rank in ranks]


def storm(kills: int, every: str | None, judge: str, place: Path) -> bool:
    chance, weather, came, same = random.Random(0), Storm(place, judge), 0, 0
    everything = programs(place)
    chosen = [name for name in everything if kills >= 100 or name not in ("two processes", "demo")]
    if every is not None:
        chosen = [name for name in everything if name.startswith(every)]
    for name in chosen:
        program = everything[name]
        events = weather.base(name, program)
        each = [(rank, event) for rank, count in enumerate(events) for event in range(1, count + 1)]
        began, mine, good, wrong = time.monotonic(), 0, 0, []
        while (left := (-(-kills // len(chosen)) - mine) if every is None else len(each)) > 0:
            these = at_chance(left, program, events, chance) if every is None else [each.pop()]
            killed, difference = weather.attempt(name, program, these)
            mine += killed
            good += 0 if difference else killed
            wrong += [f"  killed at {these}: {difference}"] if difference else []
        spent = time.monotonic() - began
        print(f"{name}: {events} events; {good} of {mine} kills left the same behind, {spent:.0f} s", flush=True)
        print("".join(f"{line}\n" for line in wrong), end="", flush=True)
        came, same = came + mine, same + good
    for orders in sum(weather.servers.values(), []):
        orders.send(None)
    print(f"{same} of {came}")
    return same == came


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", help="kill the programs whose names begin so at each of their file events")
    options = parser.parse_args()
    os.chdir(ROOT)
    here, there = Pipe()
    if (judge := os.fork()) == 0:  # in a process of its own, for it has threads
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        from fake_openai import FakeServer

        there.send(FakeServer().url)
        signal.pause()
    try:
        with tempfile.TemporaryDirectory() as place:
            sys.exit(0 if storm(options.kills, options.every, here.recv(), Path(place)) else 1)
    finally:
        os.kill(judge, signal.SIGTERM)


if __name__ == "__main__":
    main()
