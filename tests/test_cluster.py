"""The cluster scripts on a real Slurm with one node, and preflight before the causes that jobs are known to fail of."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import settings
from settings import UserError, resolve

import huggingface_hub
import pytest

import preflight
import status

ROOT = Path(settings.__file__).parent
STUDY = ("exp1-wangchan-ut4", "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "exp3b-wangchan-ut3")
SLURM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def copy_of_the_repository(folder: Path) -> Path:
    for name in ("Makefile", "env.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "sample", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("logs", "site.env"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# a real Slurm


class Cluster:
    def __init__(self, folder: Path, configuration: str):
        self.folder, self.output = folder, folder / "output/smoke"
        # All experiments of a dataset are then the same run, and so what each must end in.
        self.environment = os.environ | {
            "SLURM_CONF": configuration, "TOTAL_UT_STEPS": "1", "OMP_NUM_THREADS": "1", "PATH": SLURM_PATH,
            "CONFIG": "configs/smoke.yaml",
        }  # fmt: skip

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def make(self, *arguments: str, code: int = 0) -> str:
        return self.run("make", *arguments, code=code)

    def wait(self, condition, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = sorted((self.folder / "slurm/logs").glob("*_*"))
                told = "".join(f"\n{log.name}\n{log.read_text()[-1500:]}" for log in logs)
                raise AssertionError(self.make("status") + self.run("squeue") + told)
            time.sleep(0.1)

    def log(self, job: str, kind: str = "out") -> str:
        found = list((self.folder / "slurm/logs").glob(f"{job}_*.{kind}"))
        return found[0].read_text() if found else ""

    def processes(self, job: str) -> list[int]:
        """The batch shell of a job and all that came from it, on this machine."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # ended meanwhile
                continue
            if f"SLURM_JOB_ID={job}".encode() in environment and f"SLURM_CONF={self.conf}".encode() in environment:
                found.append(int(folder.name))
        return found

    @property
    def conf(self) -> str:
        return self.environment["SLURM_CONF"]

    def steps(self, run: Path) -> int:
        metrics = run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if not shutil.which(tool, path=SLURM_PATH)]
    if missing:
        reason = f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    state = tmp_path_factory.mktemp("slurm")
    script = [ROOT / "tests/slurm.sh"]
    done = subprocess.run([*script, "up", state], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        yield Cluster(copy_of_the_repository(tmp_path_factory.mktemp("study")), done.stdout.strip())
    finally:
        subprocess.run([*script, "down", state], check=True)


def table(printed: str) -> dict[str, tuple[str, str]]:
    """Job and the rest of the line of each row of a sweep."""
    rows = re.findall(r"^(-|\d+|new) +(exp\S+(?: evaluation)?) +(.*)$", printed, re.MULTILINE)
    return {name: (job, " ".join(rest.split())) for job, name, rest in rows}


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gib")} for line in lines]


def test_a_sweep_ends_in_the_same_bytes_whatever_happens_to_its_jobs(cluster):
    small = "--overlap none --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_steps 0"
    sweep = ["cluster-sweep", "GPUS=1", f"ARGS={small} --max_steps 30 --save_steps 4"]

    planned = table(cluster.make(*sweep, "DRY=1"))
    assert list(planned) == [f"{exp}{what}" for exp in STUDY for what in ("", " evaluation")]
    assert not (cluster.folder / "slurm/logs").exists() and cluster.run("squeue", "-h") == ""

    printed = cluster.make(*sweep)
    jobs = table(printed)
    assert ("no report.py" in printed) is not (cluster.folder / "report.py").exists()
    for exp in STUDY:
        assert jobs[exp][1] == "- 1 24:00:00 new"
        assert jobs[f"{exp} evaluation"][1] == f"{jobs[exp][0]} 1 04:00:00 new"
    # Two processes, until Slurm's signal comes 20 to 50 s before a limit of two minutes.
    limited = cluster.make(
        "cluster-sweep", "EXPS=exp5a-r1-ut1", "GPUS=2", "TIME=2", "GRACE=20", f"ARGS={small} --max_steps 5000"
    )
    limited_job = table(limited)["exp5a-r1-ut1"][0]
    assert all("left alone" in rest for _, rest in table(cluster.make(*sweep)).values()), "submitted once"

    requeued, killed = (cluster.output / exp for exp in STUDY[2:])
    cluster.wait(lambda: cluster.steps(requeued) >= 6)
    cluster.run("scontrol", "requeue", jobs[STUDY[2]][0])
    cluster.wait(lambda: cluster.steps(killed) >= 6)
    pids = cluster.processes(jobs[STUDY[3]][0])
    assert len(pids) >= 3, "batch shell, srun, training"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not (killed / "completed").exists() and 6 <= cluster.steps(killed) < 30
    cluster.wait(lambda: re.search(rf"{STUDY[3]} +\d+ failed", cluster.make("status")))
    told = cluster.make("status")
    assert re.search(rf"{STUDY[3]} +\d+ failed +\d+/30 .*\n    job \d+: .*\n    then: make cluster-sweep again", told)
    again = table(cluster.make(*sweep))
    assert re.fullmatch(r"- 1 24:00:00 resumes at step \d+", again[STUDY[3]][1])
    assert [exp for exp in STUDY if again[exp][1].endswith(("left alone", "skipped"))] == list(STUDY[:3])

    runs = [cluster.output / exp for exp in STUDY]
    scores = [cluster.folder / "results/smoke" / exp for exp in STUDY]
    cluster.wait(lambda: all((folder / "evaluated").exists() for folder in scores))
    first = runs[0]
    for run, folder in zip(runs, scores, strict=True):
        assert (run / "completed").read_bytes() == (first / "completed").read_bytes()
        assert metrics(run) == metrics(first) and len(metrics(run)) == 30
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (run / "final_adapter" / name).read_bytes() == (first / "final_adapter" / name).read_bytes()
        for depth in (1, 2, 3, 4):
            assert json.loads((folder / f"thai_exam-ut{depth}.json").read_text())["items"] == 65
    continued = [json.loads((run / "manifest.json").read_text()).get("continued", []) for run in runs]
    assert [len(times) for times in continued] == [0, 0, 1, 1]
    assert continued[3][0]["step"] % 4 == 0, "from the last checkpoint before the SIGKILL"
    assert all(rest.endswith("complete, skipped") for _, rest in table(cluster.make(*sweep)).values())

    cluster.wait(lambda: "continuing from" in cluster.log(limited_job))
    before, _, after = cluster.log(limited_job).partition("requeued before the time limit")
    assert "2 processes" in before and "SIGUSR1: stopped after step" in before
    cluster.wait(lambda: "\nstep " in cluster.log(limited_job).partition("continuing from")[2])
    assert "not the same bytes" not in cluster.log(limited_job)
    assert re.search(r"exp5a-r1-ut1 +\d+ RUNNING +\d+/5000 .*job \d+ PENDING \(Dependency\)", cluster.make("status"))
    assert "step " in cluster.make("logs", "EXP=exp5a-r1-ut1")
    assert limited_job in cluster.make("cancel", "EXP=exp5a-r1-ut1")
    cluster.wait(lambda: cluster.run("squeue", "-h") == "")
    assert re.search(r"exp5a-r1-ut1 +\d+ failed .*\n    job \d+: .*CANCELLED", cluster.make("status"))
    assert "nothing to cancel" in cluster.make("cancel")


def test_preflight_asks_slurm_whether_it_would_take_the_job(cluster):
    assert "partition defq takes 24:00:00 on 1 x 4 GPUs" in cluster.make("preflight")
    for change, told in (
        ("TIME=3-00:00:00", "TIME = 3-00:00:00 is more than the partition's 2-00:00:00"),
        ("GPUS=9", "a training job would be refused: allocation failure: Requested node configuration"),
        ("PARTITION=gpu", "a training job would be refused: sbatch: error: invalid partition specified: gpu"),
    ):
        cluster.environment |= dict([change.split("=")])
        try:
            done = subprocess.run(
                ["bash", "-c", ". slurm/site.sh && slurm_says"], capture_output=True, text=True, cwd=cluster.folder,
                env=cluster.environment,
            )  # fmt: skip
        finally:
            del cluster.environment[change.split("=")[0]]
        names = ("TIME", "GRACE", "PARTITION", "NODES", "GPUS")
        site = {"TIME": "24:00:00", "GRACE": "300", "PARTITION": "defq", "NODES": "1", "GPUS": "4"}
        site |= dict([change.split("=")]) | {"SLURM_SAYS": done.stdout}
        assert set(names) < set(site)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("SLURM_JOB_ID", raising=False)
            for name, value in site.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match=re.escape(told)):
                preflight.check_slurm(resolved())


# ----------------------------------------------------------------------------------------------------------------------
# without one


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("CONFIG", "OUTPUT_DIR", "REPORT_TO", "TOTAL_UT_STEPS", "SLURM_JOB_ID", "SLURM_SAYS", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def resolved(*argv: str):
    return resolve("", ["--config", str(ROOT / "configs/smoke.yaml"), *argv], add_options=preflight.options)


def script(*argv: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "preflight.py", *argv], capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    return done.returncode, done.stdout + done.stderr
