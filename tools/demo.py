"""The whole study in miniature, on CPUs and without a network, in seven minutes on two cores: `make demo`.

    python tools/demo.py                   # Thai and English, 1 and 4 loops, 3 seeds of each; scored; the report
    DEMO_SEEDS=1 python tools/demo.py       # one seed: the same in a third of the time, and less sure
    python tools/demo.py --seed 3 --output_dir output/other --results_dir results/other     # other seeds; any setting

What it does is what one does on a cluster: train_qlora.py for each experiment and seed, evaluate.py for each and the
base, report.py; only that as many run at once as there are cores. Repeated, it continues. The answer stands in
results/demo/report.html; each step's own output in output/demo/logs/.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

import evaluate
import report
import train_qlora
from ouro.evaluate.results import read_study
from ouro.files import Parser, Progress, UserError, call, latest, one_line
from ouro.settings import resolve

import torch

CONFIG = "configs/demo.yaml"
STUDY = {"exp2-wangchan-ut1": 1, "exp1-wangchan-ut4": 4, "exp6a-english-ut1": 1, "exp6d-english-ut4": 4}
BOTH = (("--tasks", "parallel_text_thai,parallel_text_english"),)  # asked of adapters for either language
SCORES = (  # asked of those for Thai; exams are not, which are far beyond so small a model
    *BOTH,
    ("--tasks", "thai_text", "--limit", "10"),
    ("--tasks", "english_text"),
    ("--tasks", "mt_bench_thai", "--limit", "2", "--judge", "none"),
)
# SIGTERMs so far. Noted, not raised: Python drops what a handler raises while a process is forked, and a mask does not
# help, since any of torch's threads may take the signal.
SIGNALS: list[int] = []
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends


@dataclass
class Step:
    name: str
    share: float  # of the time
    main: Callable[[], None]
    commands: list[tuple[str, ...]]  # command lines, run one after the other


def unless_fuller(options: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Of SCORES: without its limit where results of more items are there, as `make eval` leaves them. Fewer would
    replace those, which evaluate.py refuses, and runs that were asked unlike items are not compared."""
    if "--limit" not in options:
        return options
    at, task = options.index("--limit"), options[options.index("--tasks") + 1]
    limits = [(read_study(file) or {}).get("limit", 0) for file in folder.rglob(f"{task}-ut*.json")]
    fuller = any(limit is None or limit > int(options[at + 1]) for limit in limits)
    return options[:at] + options[at + 2 :] if fuller else options


def run(step: Step, log: Path, parent: int) -> None:
    """In a process of its own, all output into the log. It ends with the demo, however that ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if SIGNALS or os.getppid() != parent:  # which came before the lines above
        sys.exit(143)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    Progress.set_lock(threading.RLock())  # the parent's may have been taken by its own line when this one was forked
    torch.set_num_threads(1)
    for command in step.commands:
        sys.argv = [Path(sys.modules[step.main.__module__].__file__).name, *command]
        call(step.main)
        sys.stdout.flush()


def together(steps: list[Step], logs: Path, cores: int, progress: Progress) -> None:
    """All steps, in their order, as many at once as there are cores.

    Each in a process of its own, forked, so that torch is imported once and not 25 times. A ProcessPoolExecutor of
    concurrent.futures can neither end a step that runs nor, when it forks, take a new process for each step.
    Raises UserError: one failed; with the end of its log. Those that run are stopped first; repeated, they continue."""
    context, waiting, running = multiprocessing.get_context("fork"), list(steps), {}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                step = waiting.pop(0)
                log = logs / f"{step.name.replace('/', '-')}.log"
                process = context.Process(target=run, args=(step, log, os.getpid()))
                process.start()
                running[process] = step, log
            if SIGNALS:
                sys.exit(143)
            names = ", ".join(step.name for step, _ in running.values())
            progress.set_postfix_str(names, refresh=False)
            for process in [process for process in running if not process.is_alive()]:
                step, log = running.pop(process)
                if process.exitcode:
                    end = log.read_text(errors="replace").splitlines()[-12:]
                    raise UserError(f"{step.name} failed (exit code {process.exitcode}); the end of {log}:", *end)
                progress.update(step.share)
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def main() -> None:
    _, own = Parser(add_help=False, allow_abbrev=False).parse_known_args()  # of make's --args=… the words
    arguments = ("--config", CONFIG, *own)
    s = resolve(__doc__, list(arguments)).settings
    count = os.environ.get("DEMO_SEEDS") or "3"
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f"DEMO_SEEDS must be a number, at least 1, got {count!r}")
    seeds = range(s.seed, s.seed + int(count))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers with and without a GPU
    signal.signal(signal.SIGTERM, lambda number, _: SIGNALS.append(number))
    logs = Path(s.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    started = time.monotonic()

    # The longest first, so that the cores end together.
    runs = sorted(((f"seed{seed}/{exp}", exp, seed) for exp in STUDY for seed in seeds), key=lambda r: -STUDY[r[1]])
    scores = [unless_fuller(options, Path(s.results_dir)) for options in SCORES]
    scored = {exp: [(*arguments, *options) for options in (BOTH if "english" in exp else scores)] for exp in STUDY}
    training = [Step("base", 4, evaluate.main, [(*arguments, *options, "--base") for options in scores])]
    for name, exp, seed in runs:
        place = ("--exp", exp, "--seed", f"{seed}", "--output_dir", f"{s.output_dir}/seed{seed}")
        command = tuple(latest([*arguments, *place]))
        training.append(Step(f"train {name}", 2 + 3 * STUDY[exp], train_qlora.main, [command]))
    scoring = [
        Step(f"score {name}", 4, evaluate.main, [(*command, "--exp", name) for command in scored[exp]])
        for name, exp, _ in runs
    ]
    total = sum(step.share for step in training + scoring)
    with Progress(f"{len(runs)} runs on {cores} cores", total, "parts") as progress:
        together(training, logs, cores, progress)
        together(scoring, logs, cores, progress)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["report.py", *arguments, "--out", s.results_dir]
    report.main()
    print(f"{len(runs)} runs, {(time.monotonic() - started) / 60:.1f} minutes")
    print(f"next: open {one_line(s.results_dir)}/report.html; make chat CONFIG={CONFIG} EXP={runs[0][0]}")


if __name__ == "__main__":
    call(main)
