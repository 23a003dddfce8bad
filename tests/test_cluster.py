"""The cluster scripts on a real Slurm with one node and on a made-up queue; preflight and known causes of failure."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from ouro import files
from ouro.cluster import plan, preflight, sweep
from ouro.data.sources import HubSession, constants
from ouro.files import UserError
from ouro.settings import Settings, resolve

import pytest
from conftest import PATIENCE
from helpers import ROOT, metrics, repeatable, write_jsonl

pytestmark = pytest.mark.usefixtures("in_the_repository")
STUDY = ("exp1-wangchan-ut4", "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "exp3b-wangchan-ut3")
SMALL = "--overlap none --rows_per_step 4 --eval_steps 0 --model_name_or_path sample/ouro-tiny"
# Variables of a shell in `salloc --mem-per-cpu=4G`, and of users' own profiles, none of which may reach a job.
SESSION = {"SLURM_JOB_ID": "77", "SLURM_MEM_PER_CPU": "4096", "SLURM_GPUS": "1", "SLURM_CPU_BIND": "mask_cpu:0x1"}
SESSION |= {"SLURM_EXPORT_ENV": "NONE", "SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "0-3", "SBATCH_WAIT": "1"}
SESSION |= {"SQUEUE_STATES": "RUNNING", "SQUEUE_FORMAT2": "name", "SCANCEL_STATE": "PENDING", "TMPDIR": "/gone"}
SLURM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def copy_of_the_repository(folder: Path) -> Path:
    for name in ("configs", "ouro", "sample", "slurm", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("logs", "site.env"))
    for path in (ROOT / "Makefile", ROOT / "requirements.txt", *ROOT.glob("*.py")):
        shutil.copy(path, folder)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


def table(printed: str) -> dict[str, tuple[str, str]]:
    """Job and the rest of the line of each row of a sweep."""
    rows = re.findall(r"^(-|\d+|new) +(exp\S+) +(.*)$", printed, re.MULTILINE)
    return {name: (job, " ".join(rest.split())) for job, name, rest in rows}


# ----------------------------------------------------------------------------------------------------------------------
# a real Slurm


class Cluster:
    def __init__(self, folder: Path, configuration: str):
        self.folder, self.output = folder, folder / "output/smoke"
        # All experiments of a dataset are then the same run, and so what each must end in.
        self.environment = os.environ | {"SLURM_CONF": configuration, "PATH": SLURM_PATH}
        self.environment |= {"TOTAL_UT_STEPS": "1", "CONFIG": "configs/our smoke.yaml"}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def make(self, *arguments: str) -> str:
        return self.run("env", *(f"{name}={value}" for name, value in SESSION.items()), "make", *arguments)

    def wait(self, condition) -> None:
        end = time.monotonic() + PATIENCE
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
            conf = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
            if f"SLURM_JOB_ID={job}".encode() in environment and conf in environment:
                found.append(int(folder.name))
        return found

    def steps(self, exp: str) -> int:
        log = self.output / exp / "metrics.jsonl"
        return log.read_text().count("\n") if log.exists() else 0


def need(packages: str, *programs: str) -> None:
    """CI has installed them; a laptop need not."""
    if missing := [name for name in programs if not shutil.which(name, path=SLURM_PATH)]:
        reason = f"no {', '.join(missing)} here: apt-get install {packages}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    need("slurm-wlm munge", "slurmctld", "slurmd", "munged", "sbatch")
    state = tmp_path_factory.mktemp("slurm")
    script = [ROOT / "tests/slurm.sh"]
    done = subprocess.run([*script, "up", state], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        folder = copy_of_the_repository(tmp_path_factory.mktemp("study") / "ผล, 'one' & \"two\"")
        config = (folder / "configs/smoke.yaml").read_text()
        (folder / "configs/our smoke.yaml").write_text(f"{config}tasks: thai_text\n")
        yield Cluster(folder, done.stdout.strip())
    finally:
        subprocess.run([*script, "down", state], check=True)


@pytest.mark.slow
def test_a_sweep_ends_in_the_same_bytes_whatever_happens_to_its_jobs(cluster):
    submitted = undisturbed, requeued, killed = STUDY[1:]
    arguments = f"ARGS={SMALL} --max_steps 32 --save_steps 4"
    sweep = ["cluster-sweep", "GPUS=1", arguments, f"EXPS={' '.join(submitted)}"]
    jobs = table(cluster.make(*sweep))
    for exp in submitted:
        assert jobs[exp][1] == "- 1 24:00:00 at most 0.0 new"
        assert jobs[f"{exp}-eval"][1] == f"{jobs[exp][0]} 1 04:00:00 - new"
    again = table(cluster.make(*sweep))  # on a slow machine the first job may have ended meanwhile
    assert all(rest.endswith(("left alone", "skipped")) for _, rest in again.values()), again
    assert len(cluster.run("squeue", "-h", "--name=report").splitlines()) == 1, "the later one alone"

    def kill() -> None:
        pids = cluster.processes(jobs[killed][0])
        assert len(pids) >= 3, "batch shell, srun, training"
        for pid in pids:
            with suppress(ProcessLookupError):  # gone with its parent
                os.kill(pid, signal.SIGKILL)

    todo = {requeued: lambda: cluster.run("scontrol", "requeue", jobs[requeued][0]), killed: kill}

    def disturbed() -> bool:
        for exp in [exp for exp in todo if cluster.steps(exp) >= 5]:
            todo.pop(exp)()
        return not todo

    cluster.wait(disturbed)
    run = cluster.output / killed
    assert not (run / "completed").exists() and 5 <= cluster.steps(killed) < 32
    cluster.wait(lambda: re.search(rf"{killed} +\d+ failed", cluster.make("status")))
    told = cluster.make("status")
    assert re.search(rf"{killed} +\d+ failed +\d+/32 .*\n    job \d+: .*\n    then: make cluster-sweep again", told)
    again = table(cluster.make(*sweep))
    assert re.fullmatch(r"- 1 24:00:00 0\.0 resumes at step \d+", again[killed][1]), "its rows are in the cache now"
    assert [exp for exp in submitted if again[exp][1].endswith(("left alone", "skipped"))] == [undisturbed, requeued]

    runs = [cluster.output / exp for exp in submitted]
    scores = [cluster.folder / "results/smoke" / exp for exp in submitted]
    cluster.wait(lambda: all((folder / "evaluated").exists() for folder in scores))
    first = runs[0]
    for run, folder in zip(runs, scores, strict=True):
        assert (run / "completed").read_bytes() == (first / "completed").read_bytes()
        assert repeatable(run) == repeatable(first) and len(metrics(run)) == 32
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (run / "final_adapter" / name).read_bytes() == (first / "final_adapter" / name).read_bytes()
        for depth in (1, 2, 3, 4):
            assert json.loads((folder / f"thai_text-ut{depth}.json").read_text())["study"]["items"] == 33
    continued = [json.loads((run / "manifest.json").read_text()).get("continued", []) for run in runs]
    assert [len(times) for times in continued] == [0, 1, 1]
    assert continued[2][0]["step"] % 4 == 0, "from the last checkpoint before the SIGKILL"
    assert all(rest.endswith("complete, skipped") for _, rest in table(cluster.make(*sweep)).values())
    cluster.wait((cluster.folder / "RESULTS.md").exists)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_requeues_itself_and_continues(cluster):
    exp = "exp5a-r1-ut1"
    # Two processes. The signal comes 20 to 50 s before the limit of two minutes; one minute is the least that there is.
    sweep = ["cluster-sweep", f"EXPS={exp}", "GPUS=2", "TIME=2", "GRACE=20", f"ARGS={SMALL} --max_steps 5000"]
    job = table(cluster.make(*sweep))[exp][0]
    cluster.wait(lambda: "\nstep " in cluster.log(job).partition("continuing from")[2])
    before, _, after = cluster.log(job).partition("requeued before the time limit")
    step = re.search(r"SIGUSR1: stopped after step (\d+), which is saved", before)[1]
    assert ", 2 processes\n" in before and f"/checkpoint-{step}\n" in after and "not the same bytes" not in after
    assert re.search(rf"{exp} +{job} RUNNING +\d+/5000 .*job \d+ PENDING \(Dependency\)", cluster.make("status"))
    assert "\nstep " in cluster.make("logs", f"EXP={exp}")
    assert job in cluster.make("cancel", f"EXP={exp}")
    cluster.wait(lambda: cluster.run("squeue", "-h") == "")
    assert re.search(rf"{exp} +{job} failed .*\n    job {job}: .*CANCELLED", cluster.make("status")), "not requeued"
    assert "nothing to cancel" in cluster.make("cancel")


@pytest.mark.slow
def test_an_experiment_that_fails_says_why_and_takes_only_its_own_evaluation_with_it(cluster):
    wrong = ["cluster-sweep", "GPUS=1", "EXPS=exp4-synthetic-ut4", "ARGS=--dataset_path nowhere.jsonl"]
    job, after = (job for job, _ in table(cluster.make(*wrong)).values())
    queue = ["squeue", "-h", "-j", f"{job},{after}", "-t", "all", "-o", "%A %T"]
    cluster.wait(lambda: {f"{job} FAILED", f"{after} CANCELLED"} == set(cluster.run(*queue).splitlines()))
    told = cluster.make("status")
    reason = "dataset synthetic: no such file or folder: nowhere.jsonl"
    assert re.search(rf"exp4-synthetic-ut4 +{job} failed .*\n    job {job}: error: preflight: .*: {reason} in /", told)
    assert cluster.log(after) == "", "never started"
    assert not (cluster.output / "exp4-synthetic-ut4").exists()


@pytest.mark.slow
def test_a_time_limit_that_comes_before_the_first_step_fails_instead_of_requeueing_for_ever(cluster):
    job = table(cluster.make("cluster-sweep", "GPUS=1", "EXPS=exp5b-r1-ut4", "TIME=7"))["exp5b-r1-ut4"][0]
    cluster.wait(lambda: "ok    settings" in cluster.log(job))
    cluster.run("scancel", "--signal=USR1", job)  # as Slurm does it
    cluster.wait(lambda: "FAILED" in cluster.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T"))
    told = "error: the time limit came before the first step: raise TIME (7, of which the last 300 s are for saving)"
    assert told in cluster.make("status") and told in cluster.log(job, "err")


@pytest.mark.slow
def test_preflight_asks_slurm_whether_it_would_take_the_job(cluster, monkeypatch):
    for change, told in (
        ("NODES=1", None),
        ("TIME=3-00:00:00", "TIME = 3-00:00:00 is more than the partition's 2-00:00:00"),
        ("GPUS=9", "a training job would be refused: allocation failure: Requested node configuration"),
        ("PARTITION=gpu", "a training job would be refused: sbatch: error: invalid partition specified: gpu"),
        ("TIME=5", "TIME = 5 leaves nothing after the GRACE = 300 s for saving"),
    ):
        names = ("PARTITION", "NODES", "GPUS", "GPU_TYPE", "TIME", "GRACE")
        shell = f"export {change}; . slurm/site.sh; for name in {' '.join(names)}; do echo ${{!name}}; done; slurm_says"
        *values, says = cluster.run("bash", "-c", shell).split("\n", len(names))
        for name, value in zip((*names, "SLURM_SAYS"), (*values, says), strict=True):
            monkeypatch.setenv(name, value)
        if told:
            assert told in refused(preflight.check_slurm)
        else:
            assert preflight.check_slurm(resolved()).startswith("defq takes 24:00:00 on 1 x 4 H100; predicted hours: ")


# ----------------------------------------------------------------------------------------------------------------------
# preflight


def resolved(*argv: str):
    return resolve("", ["--config", "tests/smoke.yaml", *argv], add_options=preflight.options)


def refused(check, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        check(resolved(*argv))
    return str(error.value)


def test_preflight_of_the_embedded_default_is_green(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--config", "configs/smoke.yaml"])
    preflight.main()
    printed = capsys.readouterr().out
    names = [check.__name__.removeprefix("check_") for check in preflight.CHECKS]
    assert [line.split()[1] for line in printed.splitlines()] == ["settings", *names] and "FAIL" not in printed


def test_what_fails_is_marked_and_ends_preflight(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--exp", "exp1"])
    with pytest.raises(UserError, match="preflight: settings: unknown experiment 'exp1'"):
        preflight.main()
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--config", "configs/smoke.yaml", "--output_dir", "/proc/x"])
    with pytest.raises(UserError, match=r"preflight: 1 of \d+ checks failed, the first: disk: output_dir = /proc/x"):
        preflight.main()
    assert len(re.findall("^FAIL  (settings|disk) ", capsys.readouterr().out, re.MULTILINE)) == 2


@pytest.mark.slow
def test_preflight_ends_with_a_real_step(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--gpu", "--config", "tests/smoke.yaml"])
    told = preflight.check_step(resolved("--gpu"))
    assert re.fullmatch(r"loss \d\.\d+, .* tokens/s, .*; one item scored", told)


def test_preflight_can_say_what_is_wrong_with_the_libraries():
    code = "import sys, ouro.cluster.preflight; sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "imported before they are checked"


@pytest.mark.parametrize("at_fault", ["proxy", "offline"])
def test_a_hub_that_cannot_be_reached_is_named_with_its_proxy(monkeypatch, tmp_path, at_fault):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", at_fault == "offline")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HubSession, "failure", None)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    real = resolved("--model_name_or_path", "ByteDance/Ouro-2.6B")
    real.settings.paths = {}
    for check, name in (
        (preflight.check_model, "ByteDance/Ouro-2.6B"),
        (preflight.check_data, "airesearch/WangchanThaiInstruct"),
        (preflight.check_benchmarks, "scb10x/thai_exam"),
    ):
        with pytest.raises(UserError, match=f"^{name} is not in {tmp_path}, and .*make fetch") as error:
            check(real)
        assert "secret" not in str(error.value)
        assert at_fault == "offline" or "through the proxy http://…@127.0.0.1:9 (ProxyError)" in str(error.value)


def test_a_benchmark_that_several_tasks_share_is_asked_for_once(monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "on_hub", lambda name, settings: asked.append(name))
    real = resolved("--tasks", "thai_exam,thai_exam-helm,thai_text")
    real.settings.paths = {}
    told = preflight.check_benchmarks(real)
    assert told.count("to be downloaded") == 3 and asked == ["thai_exam", "wangchan"]


def test_preflight_leaves_out_what_an_evaluation_would(monkeypatch):
    def refuse(name: str, settings: Settings) -> None:
        if name == "wikipedia":
            raise UserError("not to be had")

    monkeypatch.setattr(preflight, "on_hub", refuse)
    real = resolved()
    real.settings.paths, real.settings.tasks, real.origins["tasks"] = {}, "thai_exam,thai_wikipedia", "default"
    told = preflight.check_benchmarks(real)
    assert "thai_exam to be downloaded" in told and "thai_wikipedia left out, as it is not to be had" in told
    real.origins["tasks"] = "command line"
    with pytest.raises(UserError, match="not to be had"):
        preflight.check_benchmarks(real)


def test_a_training_set_that_cannot_be_trained_on_is_refused(tmp_path):
    rows = [{"prompt": f"ก {n}", "completion": "ข" if n % 2 else ""} for n in range(20)]
    path = write_jsonl(tmp_path / "train.jsonl", *rows)
    found = refused(preflight.check_data, "--dataset", "pairs", "--dataset_path", path)
    assert re.match(r"10 of the first 20 rows cannot be trained on, the first: .*empty \(completion\)", found)
    marked = [{"prompt": f"ก {n}", "completion": "ข", "train": n % 2} for n in range(20)]
    path = write_jsonl(tmp_path / "marked.jsonl", *marked)  # which training leaves out
    assert "20 rows read" in preflight.check_data(resolved("--dataset", "pairs", "--dataset_path", path))


def test_libraries_that_are_not_the_locked_ones_or_broken_are_refused(monkeypatch, tmp_path):
    about = "Metadata-Version: 2.1\nName: transformers\nVersion: 4.50.0\n"
    files.write_atomic(tmp_path / "transformers-4.50.0.dist-info/METADATA", about)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "transformers 4.50.0, locked 4.54.1 (1 of " in refused(preflight.check_versions)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "import of trl halted" in refused(preflight.check_imports)


def test_a_step_that_fails_is_told_with_its_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\n  raise\nValueError: no columns match\nmore\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert refused(preflight.check_step) == "train_qlora.py: ValueError: no columns match"


def test_too_little_disk_or_memory_is_refused(monkeypatch):
    monkeypatch.setattr(preflight, "DISK", 1e18)
    assert re.search(r"output_dir = .*: \d+\.\d GB free, 1000000000 GB are needed", refused(preflight.check_disk))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "3000")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert refused(preflight.check_memory) == "3.1 GB for 4 processes, 8 GB are needed: raise MEM"


def test_preflight_compares_the_limits_with_the_predicted_hours(monkeypatch, tmp_path):
    site = {"TIME": "12:00:00", "GRACE": "600", "NODES": "1", "GPUS": "1", "GPU_TYPE": "RTX3080", "PARTITION": "defq"}
    says = "sbatch: Job 1 to start at 2026-01-01T00:00:00\nPartitionName=defq MaxTime=UNLIMITED"
    for name, value in (site | {"SLURM_SAYS": says}).items():
        monkeypatch.setenv(name, value)
    run = resolve("", ["--config", "configs/default.yaml", "--cache_dir", str(tmp_path)])
    run.settings.total_ut_steps = 1
    told = r"defq takes 12:00:00 on 1 x 1 RTX3080; predicted hours: about \d+\.\d, \d+ requeues"
    assert re.fullmatch(told, preflight.check_slurm(run))
    monkeypatch.setenv("GRACE", "100")
    with pytest.raises(UserError, match=r"a step is predicted to take about \d+ s, more than GRACE = 100 s"):
        preflight.check_slurm(run)


# ----------------------------------------------------------------------------------------------------------------------
# settings of the cluster, containers


def site(folder: Path, command: str, path: str = SLURM_PATH, **environment: str) -> subprocess.CompletedProcess:
    """A shell in a repository of which nothing but slurm/ is there."""
    if not (folder / "slurm").exists():
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("logs", "site.env"))
    return subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f". slurm/site.sh; {command}"], capture_output=True, text=True,
        cwd=folder, env={"PATH": path, "HOME": str(folder)} | environment,
    )  # fmt: skip


def program(path: Path, text: str = "") -> str:
    """Writes a shell script; its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path.parent)


def test_the_command_line_wins_over_site_env_and_that_over_the_defaults(tmp_path):
    site(tmp_path, "true")
    (tmp_path / "slurm/site.env").write_text(': "${PARTITION:=gpu}"\n: "${TIME:=2:00:00}"\nSBATCH_ACCOUNT=thai\n')
    done = site(tmp_path, 'echo "${train[*]}"; env', TIME="1:00:00")
    assert done.stdout.startswith(
        "--partition=gpu --nodes=1 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=8 --mem=128G --time=1:00:00 "
        "--signal=USR1@300\n"
    )
    assert "SBATCH_ACCOUNT=thai\n" in done.stdout, "for sbatch"
    given = {"SLURM_CONF": "x", "SBATCH_QOS": "long", "SBATCH_ACCOUNT": "other"}
    done = site(tmp_path, "env", **SESSION, **given)
    left = {line for line in done.stdout.splitlines() if re.match("S[A-Z]+_|TMPDIR", line)}
    assert left == {"SLURM_CONF=x", "SBATCH_QOS=long", "SBATCH_ACCOUNT=thai"}
    assert "not heeded: SBATCH_EXPORT=NONE; if it is meant, write it into slurm/site.env" in done.stderr


def test_a_job_has_the_proxy_of_the_settings_or_none(tmp_path):
    own, job = {"http_proxy": "http://login:1", "HTTPS_PROXY": "http://login:1"}, {"SLURM_JOB_ID": "1", "in_job": "1"}
    assert "login" not in site(tmp_path, "env", **job, **own).stdout
    assert "https_proxy=http://web:2\n" in site(tmp_path, "env", PROXY="http://web:2", **job, **own).stdout
    assert "HTTPS_PROXY=http://login:1\n" in site(tmp_path, "env", **own).stdout, "not in a job"


def test_a_job_knows_the_commit_that_the_login_node_saw(tmp_path):
    say = "echo ${OURO_THAI_COMMIT:-none}"
    assert site(tmp_path, say).stdout == "none\n"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "x", "--allow-empty"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert site(tmp_path, say, OURO_THAI_COMMIT="old").stdout == head
    without_git = program(tmp_path / "bin/none")
    assert site(tmp_path, say, path=without_git, OURO_THAI_COMMIT=head.strip()).stdout == head


def test_an_image_or_a_module_that_is_not_there_is_refused(tmp_path):
    empty = program(tmp_path / "empty/uname")
    with_apptainer = program(tmp_path / "bin/apptainer")
    for path, settings, told in (
        (empty, {"IMAGE": "ouro.sif"}, "neither apptainer nor singularity is found on"),
        (f"{with_apptainer}:{SLURM_PATH}", {"IMAGE": "ouro.sif"}, "no image ouro.sif on"),
        (SLURM_PATH, {"MODULES": "apptainer"}, "there is no command module here"),
    ):
        done = site(tmp_path, "true", path=path, **settings)
        assert done.returncode == 2 and told in done.stderr and "slurm/site.env" in done.stderr


def test_what_a_shell_script_refuses_is_named_on_one_line(tmp_path):
    hostile = "/ภาพ\x1b[2J\nerror: x"
    for settings in ({"MODULES": hostile}, {"SBATCH_X": hostile, "IMAGE": hostile}):
        told = site(tmp_path, "true", path=f"{program(tmp_path / 'bin/apptainer')}:{SLURM_PATH}", **settings).stderr
        assert told.count("/ภาพ?[2J?error: x") == len(settings) == told.count("\n") and "\x1b" not in told


def test_in_an_image_everything_that_a_run_reads_and_writes_is_bound(tmp_path):
    path, other, hub = f"{program(tmp_path / 'bin/apptainer')}:{SLURM_PATH}", tmp_path / "elsewhere", tmp_path / "hub"
    (tmp_path / "ouro.sif").touch()
    (tmp_path / "my $(data)").mkdir()
    other.mkdir()
    image = {"path": path, "IMAGE": "ouro.sif", "HF_HOME": str(hub)}
    done = site(tmp_path, 'echo "${python[*]}"', BINDS=f"  {other}\n'{tmp_path}/my $(data)':/data", **image)
    command = done.stdout
    assert command.startswith(f"{tmp_path}/bin/apptainer exec --nv --contain --writable-tmpfs --env HF_HOME={hub} ")
    assert command.endswith(" ouro.sif python\n") and f"--pwd {tmp_path} " in command
    for place in (tmp_path, hub, "/tmp:/tmp", "/dev/shm", other, f"{tmp_path}/my $(data):/data"):
        assert f"--bind {place} " in command
    for binds, told in ((f"{tmp_path}/my $(data)", f"no {tmp_path}/my on "), ("'/a", "a quote that is not closed")):
        done = site(tmp_path, "true", BINDS=binds, **image)
        assert done.returncode == 2 and told in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# a sweep without Slurm


def test_a_sweep_submits_what_is_left_and_leaves_the_rest_alone(tmp_path):
    """With stand-ins for Slurm's commands: a training that runs and a report that waits are in the queue already."""
    folder, output = copy_of_the_repository(tmp_path / "study"), tmp_path / "study/output/smoke/seed0"
    lines = [("7", "RUNNING", "None", f"train {output}/{STUDY[1]}", folder)]
    lines += [("9", "PENDING", "x", f"report {folder}", "")]
    files.write_atomic(tmp_path / "queue", "".join("\t".join(map(str, line)) + "\n" for line in lines))
    path, log = program(tmp_path / "bin/squeue", f"cat {tmp_path}/queue"), tmp_path / "log"
    program(tmp_path / "bin/scancel", f'echo scancel "$@" >>{log}')
    program(tmp_path / "bin/sbatch", f'echo "$EVALUATED $@" >>{log}; echo "$((100 + $(wc -l <{log})));cluster"')
    arguments = ["CONFIG=configs/smoke.yaml", "SEEDS=0", f"EXPS={STUDY[1]} {STUDY[0]}", "GPUS=2"]
    arguments += ["ARGS=--r 8\n--system_prompt 'ก ข'"]

    def sweep(*more: str, code: int = 0) -> str:
        done = subprocess.run(
            ["make", "cluster-sweep", *arguments, *more], capture_output=True, text=True, cwd=folder,
            env={"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path)} | SESSION,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    names = [f"{exp}-seed0{what}" for exp in (STUDY[1], STUDY[0]) for what in ("", "-eval")]
    planned = sweep("DRY=1")
    assert "DRY: nothing was submitted" in planned and not log.exists() and not (folder / "slurm/logs").exists()
    assert [job for job, _ in table(planned).values()] == ["7", "new", "new", "new"]
    printed = table(sweep())
    assert list(printed) == names and [job for job, _ in printed.values()] == ["7", "101", "102", "103"]
    assert printed[names[0]][1].endswith("RUNNING, left alone") and printed[names[3]][1] == "102 1 04:00:00 - new"
    first, second, third, cancel, report = log.read_text().splitlines()
    settings = "--config configs/smoke.yaml --r 8 --system_prompt ก ข --exp"
    assert first.startswith(f"{folder}/results/smoke/seed0/{STUDY[1]}/evaluated --parsable ")
    assert f"--comment=eval {output}/{STUDY[1]} " in first and "--dependency=afterok:7 slurm/eval.sbatch" in first
    assert first.endswith(f"{settings} seed0/{STUDY[1]} --output_dir output/smoke --results_dir results/smoke")
    assert "--ntasks-per-node=2" in second and "--dependency" not in second
    places = "--output_dir output/smoke/seed0 --results_dir results/smoke/seed0"
    assert second.endswith(f"slurm/train.sbatch {settings} {STUDY[0]} {places} --seed 0")
    assert "--dependency=afterok:102 " in third and cancel == "scancel 9"
    assert "--dependency=afterany:101:103 --wrap" in report
    assert "'report.py' '--config' 'configs/smoke.yaml' '--r' '8'" in report
    submitted = [line.split("\t") for line in (folder / "slurm/logs/jobs.tsv").read_text().splitlines()]
    assert [line[:3] for line in submitted] == [
        ["101", "eval", names[1]], ["102", "train", names[2]], ["103", "eval", names[3]], ["105", "report", "report"]
    ]  # fmt: skip
    program(tmp_path / "bin/sbatch", "exit 1")
    assert f"Slurm does not take {names[1]}: correct slurm/site.env" in sweep(code=2)


@pytest.fixture
def on_a_cluster(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, value in (("GPU_TYPE", "H100"), ("TIME", "1:00:00"), ("GRACE", "300")):
        monkeypatch.setenv(name, value)
    argv = ["--config", str(ROOT / "tests/smoke.yaml"), "--output_dir", "runs", "--max_steps", "200"]
    return [*argv, "--paths", f"wangchan={ROOT / 'sample/wangchan'}"]


def test_each_seed_and_each_state_of_a_run_is_told_apart(on_a_cluster, monkeypatch):
    argv, exp, seeds = on_a_cluster, STUDY[1], ["1", "2", "3", "4"]

    def planned(kind: str, field: str, seeds: list[str] = seeds) -> list:
        return [getattr(job, field) for job in sweep.plan([exp], seeds, 1, argv, []) if job.kind == kind]

    assert planned("train", "state") == planned("eval", "state") == ["new"] * 4
    for seed in seeds:
        settings = resolve("", [*argv, "--exp", exp, "--seed", seed])
        files.write_atomic(f"runs/seed{seed}/{exp}/config.yaml", settings.as_yaml())
    for file in ("runs/seed1/{}/completed", "results/smoke/seed1/{}/evaluated", "runs/seed2/{}/checkpoint-9/x",
                 "runs/seed2/{}/checkpoint-100/x", "runs/seed4/{}/metrics.jsonl"):  # fmt: skip
        files.write_atomic(file.format(exp), "")
    other = Path(f"runs/seed4/{exp}/config.yaml")
    other.write_text(other.read_text().replace("learning_rate: 0.002", "learning_rate: 0.1"))
    *states, refused = planned("train", "state")
    assert states == ["complete, skipped", "resumes at step 100", "new"]
    assert refused.startswith("refused: ") and "a run with other learning_rate;" in refused
    assert planned("eval", "state") == ["complete, skipped", "new", "new"] and planned("report", "id") == ["new"]
    monkeypatch.setattr(sweep, "predict", lambda *_: plan.Prediction(0, 0, 0, 200, 20, ""))
    assert planned("train", "hours") == ["-", "10.0, 10 requeues", "20.0, 21 requeues", "-"]
    (other.parent / "metrics.jsonl").unlink()
    assert planned("train", "state", ["4"]) == ["new"], "nothing has begun there"
    assert planned("report", "id", ["1"]) == [], "everything is done"
    os.utime(f"runs/seed1/{exp}/completed", (time.time() + 9, time.time() + 9))  # trained again
    assert planned("eval", "state", ["1"]) == ["new"]


@pytest.fixture
def printed_plan(on_a_cluster, monkeypatch, capsys):
    """Plans a sweep as run_experiments.sh does; what is printed."""

    def plan_of(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--exps", STUDY[0], *on_a_cluster, *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        sweep.main()
        return capsys.readouterr().out

    return plan_of


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "0,1,2"], "seeds are separated by spaces: '0 1 2', not '0,1,2'"),
        (["--seeds", "0 1 0"], "seed 0 is named twice"),
        (["--seeds", "3", "--args=--seed 4"], "--seed is given twice"),
        (["--args=--r 8 'x"], "ARGS: no closing quotation: --r 8 'x"),
        (["--args=--system_prompt 'a\nb'"], r"'a\nb' cannot be passed to a job (empty, a tab or a line end)"),
        (["--args=--system_prompt ''"], "'' cannot be passed to a job"),
    ],
)
def test_a_mistake_in_a_sweep_is_refused_before_anything_is_submitted(printed_plan, words, told):
    with pytest.raises(UserError, match=re.escape(told)):
        printed_plan(*words)


def test_a_time_limit_that_is_no_time_is_refused(printed_plan, monkeypatch):
    monkeypatch.setenv("TIME", "12h")
    with pytest.raises(UserError, match="TIME = 12h"):
        printed_plan()


def test_args_are_words_as_in_a_shell_on_any_number_of_lines_and_replace_what_stands_before_them(printed_plan):
    text = "--system_prompt 'a b' \\\n --r\t8\n--max_steps 7 --output_dir elsewhere"
    train, evaluation, *_ = [line.split("\t") for line in printed_plan("--seeds", "3", f"--args={text}").splitlines()]
    for job in (train, evaluation):
        assert "\t--system_prompt\ta b\t--r\t8\t--max_steps\t7\t--exp\t" in "\t".join(job)
        options = [word for word in job[7:] if word.startswith("--")]
        assert len(set(options)) == len(options) and job[2] == str(Path("elsewhere/seed3", STUDY[0]).absolute())


def test_the_status_is_read_in_any_locale_and_a_run_that_is_only_trained_has_not_failed(tmp_path):
    runs = {"7": "ไทย", "8": "rates"}
    lines = [f"{job}\ttrain\t{name}\t{tmp_path}/{name}\t{tmp_path}/{name}\n" for job, name in runs.items()]
    files.write_atomic(tmp_path / "slurm/logs/jobs.tsv", "".join(lines))
    files.write_atomic(tmp_path / "rates/completed", "")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "ouro.cluster.status"], cwd=tmp_path, env=environment, capture_output=True,
        input=f"7\tRUNNING\tไทย\ttrain {tmp_path}/ไทย\t{tmp_path}\n".encode(),
    )  # fmt: skip
    assert done.returncode == 0 and b" 7 RUNNING " in done.stdout, done.stderr
    assert b" 8 complete " in done.stdout and b"failed" not in done.stdout


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["cluster-sweep", "GPUS=x", "DRY=1"], "NODES = 1 and GPUS = x must be whole numbers"),
        (["cluster-sweep", "EXP=exp2"], "make cluster-sweep does not take EXP. It takes ARGS BINDS CONFIG CPUS DRY"),
        (["cancel", "EXPS=exp2"], "make cancel does not take EXPS. It takes BINDS CPUS"),
        (["train", "EXP=x", "max_steps=2", "GPUS=2"], "It takes ARGS CONFIG DATASET DATASET_PATH EXP (settings: ARGS="),
        (["logs", "EXP=exp2-wangchan-ut1"], "error: no log of exp2-wangchan-ut1 in slurm/logs"),
        (["train"], "name an experiment: make train EXP="),
    ],
)
def test_a_mistake_in_a_make_command_is_refused(command, told):
    done = subprocess.run(["make", *command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and told in done.stderr and "cannot access" not in done.stderr


def test_a_job_script_that_runs_in_slurms_spool_folder_says_so(tmp_path):
    for name in ("train.sbatch", "eval.sbatch"):
        done = subprocess.run(["bash", ROOT / "slurm" / name], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and f"error: '{tmp_path}' is not the repository" in done.stderr


def test_the_shell_scripts_are_clean():
    need("shellcheck", "shellcheck")
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("slurm/*.s*"), *ROOT.glob("t*/*.sh"), ROOT / "tests/images/run"]
    names = [str(path.relative_to(ROOT)) for path in (*scripts, ROOT / ".ci/run") if path.name != "site.env"]
    done = subprocess.run(["shellcheck", "-x", *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_a_squeue_that_no_slurm_answers_is_told_in_one_line(tmp_path):
    path = program(tmp_path / "bin/squeue", "echo first >&2; echo no controller >&2; exit 1")
    env = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["make", "-s", "ENV=true", "status"], capture_output=True, text=True, cwd=ROOT, env=env)
    told = done.stderr.splitlines()
    assert told[0].startswith("error: squeue is here, and no Slurm answers it (no controller): ")
    assert done.returncode == 2 and len(told) == 2 and told[1].startswith("make: ") and not done.stdout
    program(tmp_path / "bin/sbatch", "exit 1")
    says = ["bash", "-c", ". slurm/site.sh; slurm_says"]  # for preflight, which goes on
    assert not subprocess.check_output(says, text=True, cwd=ROOT, env=env, stderr=subprocess.STDOUT)


FLAGS = ("GPU", "MERGED", "PUBLIC", "RUN", "SERVE")


@pytest.mark.parametrize("origin", ["command line", "environment"])
def test_make_hands_every_variable_to_its_program_as_one_word(tmp_path, origin):
    """With a stand-in for the programs, which prints its arguments and what it reads from the environment."""
    show = 'printf "<%s>" "$@" "$CONFIG" "$OUTPUT_DIR" "$RESULTS_DIR" "$DEMO_SEEDS"'
    path = [program(tmp_path / "bin" / name, show) for name in ("apptainer", "rsync")][0]
    program(tmp_path / "bin/squeue")
    env = {"PATH": f"{path}:{os.environ['PATH']}", "HOME": str(tmp_path), "IMAGE": "Makefile"}
    for target, line in re.findall(r"^([a-z.-]+):.*## (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE):
        taken = re.findall(r"\b([A-Z_]+)=", line)
        planned = not taken or target in ("cluster-sweep", "sif", "pixi.lock")  # these would do something
        flags = {name: str(int(name != "MERGED")) for name in taken if name in FLAGS}
        ran = tmp_path / "ran"
        text = f"a  b'\"; touch {ran}; $(touch {ran}) `touch {ran}` $(shell touch {ran}) & ก\n\\*"
        given = {name: f"{name}: {text}" for name in taken} | flags
        words = [f"{name}={value}" for name, value in given.items()] if origin == "command line" else []
        command = ["make", "-n" if planned else "-s", "ENV=true", "PY=apptainer", "PYTHON=apptainer", target, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | ({} if words else given))
        told = done.stdout + done.stderr
        assert done.returncode == 0 or target == "logs", told
        shown = {} if planned or target in ("logs", "cancel") else given
        lost = [name for name, value in shown.items() if name not in flags and value not in told]
        assert not lost and "unbound" not in told, (target, lost, told)
        assert "--merged" not in told and ("--public" in told) == (target == "push"), target
        assert not ran.exists(), target
