"""How far the experiments of a cluster sweep are, and what is left to submit.

    squeue … | python -m ouro.cluster.sweep        # make status: a line an experiment, and why one failed
    python -m ouro.cluster.sweep --plan --exps "exp1-wangchan-ut4" --config configs/a100.yaml [any setting]

The second is for slurm/run_experiments.sh: the runs of a sweep, tab-separated. What was submitted stands in
slurm/logs/jobs.tsv, everything else in the runs' own folders.
"""

import argparse
import json
import math
import os
import re
import sys
from datetime import timedelta
from pathlib import Path

from ouro.cluster.plan import requeues
from ouro.files import Parser, UserError, call, read_yaml
from ouro.settings import Resolved, resolve
from ouro.train.run_folder import has_begun, other_settings

LOGS = Path("slurm/logs")


def checkpoint_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return max((int(name[1]) for name in names if name), default=0)


def evaluated(folder: Path, results: Path) -> bool:
    """Whether the run was scored after it was trained; eval.sbatch leaves the file."""
    done, scored = folder / "completed", results / "evaluated"
    return done.exists() and scored.exists() and scored.stat().st_mtime >= done.stat().st_mtime


def plan(exps: list[str], seeds: list[str], processes: int, argv: list[str]) -> list[tuple[str, ...]]:
    """Name, experiment, seed, output_dir, results_dir, folders of the run and of its scores, state, "yes" once it is
    evaluated, and predicted hours, of each run of a sweep. With seeds, each has its own OUTPUT_DIR and RESULTS_DIR.

    Raises:
        UserError: an unknown experiment or setting, one named twice, no GPU_TYPE in the environment, steps that the
            processes cannot share, or too small a GPU.
    """
    from ouro.model.cost import check_share

    if "GPU_TYPE" not in os.environ:
        raise UserError("GPU_TYPE is not set: `set -a; . slurm/site.sh` first, or GPU_TYPE=H100 before it")
    for kind, names in (("experiment", exps), ("seed", seeds)):
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{kind} {', '.join(sorted(twice))} is named twice")
    rows = []
    for exp in exps:
        for seed in seeds or ["-"]:
            chosen = [] if seed == "-" else ["--seed", seed]
            run = resolve(__doc__, [*argv, "--exp", exp, *chosen])
            s = run.settings
            check_share(s, processes)
            if chosen:
                s.output_dir, s.results_dir = (f"{place}/seed{s.seed}" for place in (s.output_dir, s.results_dir))
            folder, results = (Path(place).absolute() / run.run for place in (s.output_dir, s.results_dir))
            state, step = "new", 0
            if (folder / "config.yaml").exists():
                other = other_settings(folder, run)
                if other and has_begun(folder):
                    state = f"refused: {folder} holds a run with other {', '.join(other)}; use another OUTPUT_DIR"
                elif (folder / "completed").exists():
                    state = "complete"
                elif step := checkpoint_step(folder):
                    state = f"resumes at step {step}"
            name = exp if seed == "-" else f"{exp}-seed{s.seed}"
            done = "yes" if evaluated(folder, results) else "no"
            hours = "-" if state == "complete" or state.startswith("refused") else predicted(run, processes, step)
            rows.append((name, exp, seed, s.output_dir, s.results_dir, str(folder), str(results), state, done, hours))
    return rows


def predicted(run: Resolved, processes: int, done: int) -> str:
    """The hours that the steps after `done` take by the plan's count, and the requeues that they mean."""
    from ouro.cluster.plan import predict

    p = predict(run.settings, os.environ["GPU_TYPE"], processes)
    hours = p.hours * (1 - done / max(p.steps, 1))
    return f"{'at most ' * p.at_most}{hours:.1f}{requeues(hours)}"


def why(job: str, name: str) -> str:
    """The last error that a job's log holds since it was last requeued."""
    log = LOGS / f"{job}_{name}.err"
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = text.rpartition("DUE TO JOB REQUEUE ***")[2].splitlines()
    errors = [line.strip() for line in lines if re.search("error", line, re.IGNORECASE)]
    ours = [line for line in errors if not line.startswith("srun:")]  # which only repeats that a process failed
    return (ours or errors or ["no message: it was killed, or its node failed"])[-1]


def progress(folder: Path) -> tuple[str, str, str, str]:
    """Step of all steps, loss, tokens/s and time left, by the last line of metrics.jsonl."""
    try:
        *before, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        settings = read_yaml(folder / "config.yaml")
    except (OSError, ValueError):  # not started, or a line is just being written
        return "-", "-", "-", "-"
    step, rate = last["step"], last["tokens_per_second"]
    total = settings["max_steps"]
    if total < 0:
        total = math.ceil(round(step / last["epoch"]) * settings["num_train_epochs"])
    earlier = before[-1] if before else {"step": 0, "num_tokens": 0}
    pace = (last["num_tokens"] - earlier["num_tokens"]) / rate / (step - earlier["step"])  # seconds per step
    left = timedelta(seconds=round(pace * (total - step)))
    return f"{step}/{total}", f"{last['loss']:.4f}", f"{rate:,.0f}", str(left)


def status(queue: list[str]) -> None:
    """Prints a line for each run that was submitted from here; `queue`: live jobs as id, state, reason, …"""
    jobs = LOGS / "jobs.tsv"
    if not jobs.exists():
        raise UserError("nothing has been submitted from here yet: make cluster-sweep")
    live = {}
    for line in filter(None, queue):
        job, state, reason, *_ = line.split("\t")
        live[job] = state if state == "RUNNING" else f"{state} ({reason})"
    runs: dict[str, dict[str, tuple[str, str]]] = {}  # folder -> kind -> job and its name, the newest
    results = {}
    for line in jobs.read_text().splitlines():
        job, kind, name, folder, scores = line.split("\t")
        runs.setdefault(folder, {})[kind] = (job, name)
        results[folder] = Path(scores)
    layout = "{:<28} {:>8} {:<24} {:>12} {:>8} {:>9} {:>16}  {}"
    print(layout.format("experiment", "job", "state", "step", "loss", "tokens/s", "time left", "evaluation"))
    for folder, kinds in runs.items():
        if "report" in kinds:
            continue
        job, name = kinds.get("train", ("-", Path(folder).name))
        done, reasons = (Path(folder) / "completed").exists(), []
        step, loss, rate, left = progress(Path(folder))
        if done or job not in live:
            left = "-"
        if not done and job not in live:
            reasons.append(f"job {job}: {why(job, name)}")
        state = "complete" if done else live.get(job, "failed")
        scoring, eval_name = kinds.get("eval", ("-", ""))
        if evaluated(Path(folder), results[folder]):
            scored = "complete"
        elif scoring in live:
            scored = f"job {scoring} {live[scoring]}"
        elif done:
            scored = "failed"
            reasons.append(f"job {scoring}: {why(scoring, eval_name)}")
        else:
            scored = "-"
        print(layout.format(name, job, state, step, loss, rate, left, scored))
        for reason in reasons:
            print(f"    {reason}\n    then: make cluster-sweep again, which continues it")
    if job := runs.get(str(Path.cwd()), {}).get("report"):
        print(f"report: job {job[0]} {live.get(job[0], 'has ended')}")


def main() -> None:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="the runs of a sweep, instead of how far they are")
    parser.add_argument("--exps", default="", help="experiments of the sweep, with spaces between them")
    parser.add_argument("--seeds", default="", help="their seeds, likewise; none: the config's")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of a run")
    options, rest = parser.parse_known_args()
    if not options.plan:
        status(sys.stdin.read().splitlines())
        return
    for row in plan(options.exps.split(), options.seeds.split(), options.processes, rest):
        print("\t".join(row))


if __name__ == "__main__":
    call(main)
