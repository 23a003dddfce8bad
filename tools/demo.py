"""The whole study in miniature, on CPUs and without a network, in about eight minutes on two cores: `make demo`.

    python tools/demo.py                   # 4 depths x 3 seeds, scored beside the base at each depth; the report
    DEMO_SEEDS=1 python tools/demo.py       # one seed: the same in a third of the time, and less sure
    python tools/demo.py --seed 3 --output_dir output/other --results_dir results/other     # other seeds; any setting

What it does is what one does on a cluster: train_qlora.py for each experiment and seed, evaluate.py for each and the
base, report.py; only that as many run at once as there are cores. Repeated, it continues. The answer stands in
results/demo/report.html; each step's own output in output/demo/logs/.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

import evaluate
import report
import train_qlora
from ouro.files import UserError, call, read_yaml
from ouro.settings import EXPERIMENTS, resolve

import torch
from tqdm import tqdm

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers with and without a GPU, and nothing to wait for
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CONFIG = "configs/demo.yaml"
STUDY = {"exp2-wangchan-ut1": 1, "exp3a-wangchan-ut2": 2, "exp3b-wangchan-ut3": 3, "exp1-wangchan-ut4": 4}
SCORES = (  # what evaluate.py is asked for; the exams are far beyond so small a model, so few items will do
    ("--tasks", "thai_text", "--limit", "10"),
    ("--tasks", "english_text"),
    ("--tasks", "thai_exam", "--limit", "1"),
    ("--tasks", "mt_bench_thai", "--limit", "2", "--judge", "none"),
)
Job = tuple[str, float, Callable[[], None], list[tuple[str, ...]]]  # name, share of the time, main, its command lines
# SIGTERMs so far. Noted, not raised: what is raised while a process is forked, Python prints and forgets.
SIGNALS: list[int] = []


def run(main: Callable[[], None], commands: list[tuple[str, ...]], log: Path) -> None:
    """In a process of its own: one main after the other, all output into the log."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if SIGNALS:  # it came before this line
        sys.exit(143)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    for command in commands:
        sys.argv = [Path(sys.modules[main.__module__].__file__).name, *command]
        call(main)
        sys.stdout.flush()


def together(jobs: list[Job], logs: Path, cores: int, progress: tqdm) -> None:
    """All jobs, in their order, as many at once as there are cores.

    Raises:
        UserError: one failed; with the end of its log. Those that run are stopped first; repeated, they continue.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                name, share, main, commands = waiting.pop(0)
                log = logs / f"{name.replace('/', '-')}.log"
                process = context.Process(target=run, args=(main, commands, log))
                process.start()
                running[process] = name, share, log
            if SIGNALS:
                sys.exit(143)
            progress.set_postfix_str(", ".join(name for name, _, _ in running.values()), refresh=False)
            if progress.fp.isatty():
                progress.refresh()
            for process in [process for process in running if not process.is_alive()]:
                name, share, log = running.pop(process)
                if process.exitcode:
                    end = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
                    raise UserError(f"{name} failed (exit code {process.exitcode}); the end of {log}:\n{end}")
                progress.update(share)
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def main() -> None:
    arguments = ("--config", CONFIG, *sys.argv[1:])
    s = resolve(__doc__, list(arguments)).settings
    try:
        seeds = range(s.seed, s.seed + int(os.environ.get("DEMO_SEEDS") or 3))
    except ValueError:
        raise UserError(f"DEMO_SEEDS must be a number, got {os.environ['DEMO_SEEDS']!r}") from None
    if not seeds:
        raise UserError("DEMO_SEEDS must be at least 1")
    unknown = STUDY.keys() - read_yaml(EXPERIMENTS).keys()
    if unknown:
        raise UserError(f"configs/experiments.yaml does not have {', '.join(sorted(unknown))}, which the demo trains")
    signal.signal(signal.SIGTERM, lambda number, _: SIGNALS.append(number))  # so that the others are stopped too
    logs = Path(s.output_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    started = time.monotonic()

    # The longest first, so that the cores end together.
    runs = sorted(((f"seed{seed}/{exp}", exp, seed) for exp in STUDY for seed in seeds), key=lambda r: -STUDY[r[1]])
    scored = [(*arguments, *options) for options in SCORES]
    training: list[Job] = [("base", 4, evaluate.main, [(*command, "--base") for command in scored])]
    for name, exp, seed in runs:
        place = ("--exp", exp, "--seed", f"{seed}", "--output_dir", f"{s.output_dir}/seed{seed}")
        training.append((f"train {name}", 2 + 3 * STUDY[exp], train_qlora.main, [(*arguments, *place)]))
    scoring: list[Job] = [
        (f"score {name}", 4, evaluate.main, [(*command, "--exp", name) for command in scored]) for name, _, _ in runs
    ]
    layout = "{desc}: {percentage:3.0f} %|{bar}| {elapsed} gone, {remaining} left  {postfix}"
    total = sum(share for _, share, _, _ in training + scoring)
    with tqdm(total=total, desc=f"{len(runs)} runs on {cores} cores", bar_format=layout, mininterval=1) as progress:
        together(training, logs, cores, progress)
        together(scoring, logs, cores, progress)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["report.py", *arguments, "--out", s.results_dir]
    report.main()
    print(f"{len(runs)} runs, {(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    call(main)
