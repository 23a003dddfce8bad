"""How far the runs are that were submitted from here, and why one failed. The user's live jobs are standard input's.

    squeue … | python -m ouro.cluster.status         # make status: a line a run

What was submitted stands in slurm/logs/jobs.tsv, everything else in the runs' own folders. No torch in here: its import
takes seconds, and this is typed again and again.
"""

import os
import re
import sys
from pathlib import Path

from ouro.files import UserError, call, one_line
from ouro.verdict.study import progress

LOGS = Path("slurm/logs")

Queue = list[list[str]]  # of each live job of the user's: id, state, reason, and kind and folder of a Job of sweep.py


def live_jobs() -> Queue:
    """What squeue says, from standard input."""
    return [row[:4] for row in rows(sys.stdin.buffer.read())]


def rows(text: bytes) -> list[list[str]]:
    """The cells of tab-separated lines, which hold paths, in whatever locale. They end at \\n alone: U+2028 may stand
    inside."""
    return [line.split("\t") for line in os.fsdecode(text).split("\n") if line]


def evaluated(folder: Path, scores: Path) -> bool:
    """Whether the run was scored after it was trained; eval.sbatch leaves the file."""
    done, scored = folder / "completed", scores / "evaluated"
    return done.exists() and scored.exists() and scored.stat().st_mtime >= done.stat().st_mtime


def why(job: str, name: str) -> str:
    """The last error that a job's log holds since it was last requeued."""
    log = LOGS / f"{job}_{name}.err"
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = text.rpartition("DUE TO JOB REQUEUE ***")[2].splitlines()
    errors = [line.strip() for line in lines if re.search("error", line, re.IGNORECASE)]
    ours = [line for line in errors if not line.startswith("srun:")]  # srun's only repeat that a process failed
    return (ours or errors or ["no message: it was killed, or its node failed"])[-1]


def print_status(queue: Queue) -> None:
    """Prints a line for each run that was submitted from here, and below it why one failed."""
    if not (LOGS / "jobs.tsv").exists():
        raise UserError("nothing has been submitted from here yet: make cluster-sweep")
    live = {id: state if state == "RUNNING" else f"{state} ({reason})" for id, state, reason, _ in queue}
    runs: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}  # folders -> kind -> the newest job's id and name
    for job, kind, name, folder, scores in rows((LOGS / "jobs.tsv").read_bytes()):
        runs.setdefault((folder, scores), {})[kind] = job, name
    layout = "{:<28} {:>8} {:<24} {:>12} {:>8} {:>9} {:>16}  {}"
    print(layout.format("experiment", "job", "state", "step", "loss", "tokens/s", "time left", "evaluation"))
    for (folder, scores), kinds in runs.items():
        if "report" in kinds:
            continue
        (job, name), (scoring, its_name) = kinds.get("train", ("-", Path(folder).name)), kinds.get("eval", ("-", ""))
        *numbers, left = progress(Path(folder))
        done = (Path(folder) / "completed").exists()
        state, scored = "complete" if done else live.get(job, "failed"), "-"
        if evaluated(Path(folder), Path(scores)):
            scored = "complete"
        elif scoring in live:
            scored = f"job {scoring} {live[scoring]}"
        elif done and "eval" in kinds:  # some parts of the study are trained only
            scored = "failed"
        print(one_line(layout.format(name, job, state, *numbers, left if job in live and not done else "-", scored)))
        for number, of, how in ((job, name, state), (scoring, its_name, scored)):
            if how == "failed":
                print(one_line(f"    job {number}: {why(number, of)}"))
                print("    then: make cluster-sweep again, which continues it")
    if report := runs.get((os.getcwd(),) * 2):
        job, _ = report["report"]
        print(one_line(f"report: job {job} {live.get(job, 'has ended')}"))


if __name__ == "__main__":
    call(lambda: print_status(live_jobs()))
