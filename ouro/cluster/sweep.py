"""What a sweep of the cluster has left to do, beside the user's live jobs, which standard input has.

    squeue … | python -m ouro.cluster.sweep --exps "exp1-wangchan-ut4" --config configs/a100.yaml [any setting]
    squeue … | python -m ouro.cluster.sweep --study english            # a row of configs/studies.yaml

The plan is decided here and submitted by slurm/run_experiments.sh, because Python may run in a container that has no
sbatch: a line a job, tab-separated, as Job has them. What was submitted stands in slurm/logs/jobs.tsv, everything else
in the runs' own folders.
"""

import argparse
import os
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from ouro.cluster.plan import predict
from ouro.cluster.status import Queue, evaluated, live_jobs
from ouro.files import Parser, UserError, call, latest, nearest, one_line, read_yaml
from ouro.settings import EXPERIMENTS, STUDIES, Resolved, resolve
from ouro.train.run_folder import checkpoints, has_begun, other_settings, step_of


@dataclass
class Job:
    """A job of a sweep: one that is to be submitted, or why it is not. No field is empty: the shell would skip it."""

    kind: str  # train, eval or report
    name: str  # of the job and its logs
    folder: Path  # of the run
    scores: Path  # the run's folder in RESULTS_DIR
    id: str  # "new": to be submitted; "-": nothing to do; else of a live job (a report's: to be cancelled before)
    hours: str  # predicted, or "-"
    state: str
    arguments: list[str]  # of train_qlora.py, evaluate.py or report.py
    gpu_hours: float = 0.0  # predicted, of what is left to train


def study_of(name: str) -> tuple[list[str], list[str], bool]:
    """Experiments and seeds of a part of the study, and whether its runs are evaluated.
    Raises UserError: there is none of this name."""
    studies = read_yaml(STUDIES)
    if name not in studies:
        raise UserError(f"STUDY: unknown part of the study {name!r}{nearest(name, studies)}")
    study = studies[name]
    of_arm = [exp for exp, row in read_yaml(EXPERIMENTS).items() if row.get("arm") == study.get("arm")]
    return study.get("experiments", of_arm), [str(seed) for seed in study["seeds"]], study.get("evaluate", True)


def plan(
    exps: list[str], seeds: list[str], processes: int, argv: list[str], queue: Queue, evaluate: bool = True
) -> list[Job]:
    """Training and evaluation of each run of a sweep; then the report, unless nothing is evaluated.

    A run with a seed is in OUTPUT_DIR/seed<n>/<experiment>, its scores likewise. Its evaluation is called from the
    folder above, so that all seeds share the base's scores.
    Raises UserError: an unknown experiment, setting or GPU, an experiment or seed named twice or with a comma, or too
    small a GPU."""
    for kind, names in (("experiment", exps), ("seed", seeds)):
        if commas := [name for name in names if "," in name]:
            raise UserError(f"{kind}s are separated by spaces: {commas[0].replace(',', ' ')!r}, not {commas[0]!r}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise UserError(f"{kind} {', '.join(sorted(twice))} is named twice")
    live, jobs = {work: (id, f"{state}, left alone") for id, state, _, work in queue}, []
    for exp, seed in product(exps, seeds or [""]):
        chosen = ["--seed", seed] if seed else []
        run = resolve(__doc__, [*argv, "--exp", exp, *chosen])
        s = run.settings
        above, name = (f"seed{s.seed}/", f"{exp}-seed{s.seed}") if seed else ("", exp)
        folder, scores = (Path(place, above, exp).absolute() for place in (s.output_dir, s.results_dir))

        state, step = state_of(folder, run)
        finished = state.startswith(("complete", "refused"))
        predicted = None if finished else predict(s, os.environ.get("GPU_TYPE", ""), processes)
        hours, left = (predicted.told(step), processes * predicted.left(step)) if predicted else ("-", 0.0)
        id, state = ("-", state) if finished else live.get(f"train {folder}", ("new", state))
        places = ["--output_dir", str(Path(s.output_dir, above)), "--results_dir", str(Path(s.results_dir, above))]
        arguments = latest([*argv, "--exp", exp, *places, *chosen])
        jobs.append(Job("train", name, folder, scores, id, hours, state, arguments, left))
        if state.startswith("refused") or not evaluate:
            continue
        scored = evaluated(folder, scores)
        id, state = ("-", "complete, skipped") if scored else live.get(f"eval {folder}", ("new", "new"))
        places = ["--output_dir", s.output_dir, "--results_dir", s.results_dir]
        arguments = latest([*argv, "--exp", above + exp, *places])
        jobs.append(Job("eval", f"{name}-eval", folder, scores, id, "-", state, arguments))
    if any(job.kind == "eval" and job.id != "-" for job in jobs):
        here = Path.cwd()
        id = live.get(f"report {here}", ("new",))[0]  # submitted anew: one that is queued would not wait for new jobs
        jobs.append(Job("report", "report", here, here, id, "-", "new", argv))
    return jobs


def state_of(folder: Path, run: Resolved) -> tuple[str, int]:
    """What a sweep finds in a run's folder, and the step that a training goes on from."""
    if not (folder / "config.yaml").exists():
        return "new", 0
    if (others := other_settings(folder, run)) and has_begun(folder):
        return f"refused: {folder} holds a run with other {', '.join(others)}; use another OUTPUT_DIR", 0
    if (folder / "completed").exists():
        return "complete, skipped", 0
    step = next(map(step_of, checkpoints(folder)), 0)
    return f"resumes at step {step}" if step else "new", step


def main() -> None:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exps", default="", help="experiments of the sweep, with spaces between them")
    parser.add_argument("--seeds", default="", help="their seeds, likewise; none: the config's")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of a run")
    parser.add_argument("--study", default="", help="or a part of the study, with its own seeds unless some are named")
    options, rest = parser.parse_known_args()
    exps, seeds, evaluate = options.exps.split(), options.seeds.split(), True
    if options.study:
        exps, own, evaluate = study_of(options.study)
        seeds = seeds or own
    jobs = plan(exps, seeds, options.processes, latest(rest), live_jobs(), evaluate)
    for job in jobs:
        fields = (job.kind, job.name, job.folder, job.scores, job.id, job.hours, one_line(job.state), *job.arguments)
        if bad := [text for text in map(str, fields) if not text or "\t" in text or "\n" in text]:
            raise UserError(f"{bad[0]!r} cannot be passed to a job (empty, a tab or a line end): use a config file")
        print(*fields, sep="\t")
    said = (word for word in ("at most ", "about ") for job in jobs if job.hours.startswith(word))
    total = f"{next(said, '')}{sum(job.gpu_hours for job in jobs):,.1f} GPU-hours of training"
    print("total", *"-" * 5, total, sep="\t")  # shown below the plan


if __name__ == "__main__":
    call(main)
