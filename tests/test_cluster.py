"""The cluster scripts on a real Slurm with one node, and preflight before the causes that jobs are known to fail of."""

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
from ouro.files import UserError
from ouro.settings import resolve
from ouro.train import time_limit

import huggingface_hub
import pytest
from conftest import PATIENCE
from test_resume import LATER

ROOT = Path(__file__).resolve().parents[1]
STUDY = ("exp1-wangchan-ut4", "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "exp3b-wangchan-ut3")
SMALL = "--overlap none --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --eval_steps 0"
SMALL += " --model_name_or_path sample/ouro-tiny"
SLURM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def copy_of_the_repository(folder: Path) -> Path:
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "ouro", "sample", "slurm", "tools"):
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
            "SLURM_CONF": configuration, "TOTAL_UT_STEPS": "1", "PATH": SLURM_PATH,
            "CONFIG": "configs/smoke.yaml",
        }  # fmt: skip

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.environment)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def make(self, *arguments: str, code: int = 0) -> str:
        return self.run("make", *arguments, code=code)

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
            if f"SLURM_JOB_ID={job}".encode() in environment and f"SLURM_CONF={self.conf}".encode() in environment:
                found.append(int(folder.name))
        return found

    @property
    def conf(self) -> str:
        return self.environment["SLURM_CONF"]

    def steps(self, run: Path) -> int:
        metrics = run / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0


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
        folder = copy_of_the_repository(tmp_path_factory.mktemp("study"))
        config = folder / "configs/smoke.yaml"
        config.write_text(re.sub(r"^tasks: .*", "tasks: thai_text", config.read_text(), flags=re.MULTILINE))
        yield Cluster(folder, done.stdout.strip())
    finally:
        subprocess.run([*script, "down", state], check=True)


def table(printed: str) -> dict[str, tuple[str, str]]:
    """Job and the rest of the line of each row of a sweep."""
    rows = re.findall(r"^(-|\d+|new) +(exp\S+(?: evaluation)?) +(.*)$", printed, re.MULTILINE)
    return {name: (job, " ".join(rest.split())) for job, name, rest in rows}


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in LATER} for line in lines]


def test_a_sweep_ends_in_the_same_bytes_whatever_happens_to_its_jobs(cluster):
    arguments = ["cluster-sweep", "GPUS=1", f"ARGS={SMALL} --max_steps 16 --save_steps 4"]
    planned = table(cluster.make(*arguments, "DRY=1"))
    assert list(planned) == [f"{exp}{what}" for exp in STUDY for what in ("", " evaluation")]
    assert not (cluster.folder / "slurm/logs").exists() and cluster.run("squeue", "-h") == ""

    submitted = undisturbed, requeued, killed = STUDY[1:]
    sweep = [*arguments, f"EXPS={' '.join(submitted)}"]
    printed = cluster.make(*sweep)
    jobs = table(printed)
    reported = (cluster.folder / "report.py").exists()
    assert ("no report.py" in printed) is not reported
    for exp in submitted:
        assert jobs[exp][1] == "- 1 24:00:00 at most 0.0 new"
        assert jobs[f"{exp} evaluation"][1] == f"{jobs[exp][0]} 1 04:00:00 - new"
    again = table(cluster.make(*sweep))  # on a slow machine the first job may have ended meanwhile
    assert all(rest.endswith(("left alone", "skipped")) for _, rest in again.values()), again
    assert len(cluster.run("squeue", "-h", "--name=report").splitlines()) == reported, "the later one alone"

    def kill() -> None:
        pids = cluster.processes(jobs[killed][0])
        assert len(pids) >= 3, "batch shell, srun, training"
        for pid in pids:
            with suppress(ProcessLookupError):  # gone with its parent
                os.kill(pid, signal.SIGKILL)

    todo = {requeued: lambda: cluster.run("scontrol", "requeue", jobs[requeued][0]), killed: kill}

    def disturbed() -> bool:
        for exp in [exp for exp in todo if cluster.steps(cluster.output / exp) >= 5]:
            todo.pop(exp)()
        return not todo

    cluster.wait(disturbed)
    run = cluster.output / killed
    assert not (run / "completed").exists() and 5 <= cluster.steps(run) < 16
    cluster.wait(lambda: re.search(rf"{killed} +\d+ failed", cluster.make("status")))
    told = cluster.make("status")
    assert re.search(rf"{killed} +\d+ failed +\d+/16 .*\n    job \d+: .*\n    then: make cluster-sweep again", told)
    again = table(cluster.make(*sweep))
    assert re.fullmatch(r"- 1 24:00:00 0\.0 resumes at step \d+", again[killed][1]), "its rows are in the cache now"
    assert [exp for exp in submitted if again[exp][1].endswith(("left alone", "skipped"))] == [undisturbed, requeued]

    runs = [cluster.output / exp for exp in submitted]
    scores = [cluster.folder / "results/smoke" / exp for exp in submitted]
    cluster.wait(lambda: all((folder / "evaluated").exists() for folder in scores))
    first = runs[0]
    for run, folder in zip(runs, scores, strict=True):
        assert (run / "completed").read_bytes() == (first / "completed").read_bytes()
        assert metrics(run) == metrics(first) and len(metrics(run)) == 16
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (run / "final_adapter" / name).read_bytes() == (first / "final_adapter" / name).read_bytes()
        for depth in (1, 2, 3, 4):
            assert json.loads((folder / f"thai_text-ut{depth}.json").read_text())["study"]["items"] == 33
    continued = [json.loads((run / "manifest.json").read_text()).get("continued", []) for run in runs]
    assert [len(times) for times in continued] == [0, 1, 1]
    assert continued[2][0]["step"] % 4 == 0, "from the last checkpoint before the SIGKILL"
    assert all(rest.endswith("complete, skipped") for _, rest in table(cluster.make(*sweep)).values())
    cluster.wait(lambda: (cluster.folder / "RESULTS.md").exists() or not reported)


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


def test_an_experiment_that_fails_says_why_and_takes_only_its_own_evaluation_with_it(cluster):
    wrong = ["cluster-sweep", "GPUS=1", "EXPS=exp4-synthetic-ut4", "ARGS=--dataset_path nowhere.jsonl"]
    job, after = (job for job, _ in table(cluster.make(*wrong)).values())
    queue = ["squeue", "-h", "-j", f"{job},{after}", "-t", "all", "-o", "%A %T"]
    cluster.wait(lambda: {f"{job} FAILED", f"{after} CANCELLED"} == set(cluster.run(*queue).splitlines()))
    told = cluster.make("status")
    reason = "dataset synthetic: no such file or folder: nowhere.jsonl"
    assert re.search(rf"exp4-synthetic-ut4 +{job} failed .*\n    job {job}: error: preflight: .*: {reason}\n", told)
    assert cluster.log(after) == "", "never started"
    assert not (cluster.output / "exp4-synthetic-ut4").exists()


def test_a_time_limit_that_comes_before_the_first_step_fails_instead_of_requeueing_for_ever(cluster):
    job = table(cluster.make("cluster-sweep", "GPUS=1", "EXPS=exp5b-r1-ut4", "TIME=7"))["exp5b-r1-ut4"][0]
    cluster.wait(lambda: "ok    settings" in cluster.log(job))
    cluster.run("scancel", "--signal=USR1", job)  # as Slurm does it
    cluster.wait(lambda: "FAILED" in cluster.run("squeue", "-h", "-j", job, "-t", "all", "-o", "%T"))
    told = "error: the time limit came before the first step: raise TIME (7, of which the last 300 s are for saving)"
    assert told in cluster.make("status") and told in cluster.log(job, "err")


def test_preflight_asks_slurm_whether_it_would_take_the_job(cluster):
    asked = "from ouro.cluster.preflight import check_slurm; from ouro.settings import resolve; "
    asked += "print(check_slurm(resolve('', [])))"
    ask = f'. slurm/site.sh; SLURM_SAYS=$(slurm_says) "${{python[@]}}" -c "{asked}"'
    for change, told in (
        ("", "partition defq takes 24:00:00 on 1 x 4 H100; "),
        ("TIME=3-00:00:00", "TIME = 3-00:00:00 is more than the partition's 2-00:00:00"),
        ("GPUS=9", "a training job would be refused: allocation failure: Requested node configuration"),
        ("PARTITION=gpu", "a training job would be refused: sbatch: error: invalid partition specified: gpu"),
        ("TIME=5", "TIME = 5 leaves nothing after the GRACE = 300 s for saving"),
    ):
        assert told in cluster.run("bash", "-c", f"export {change}\n{ask}", code=1 if change else 0)


# ----------------------------------------------------------------------------------------------------------------------
# without one


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("CONFIG", "OUTPUT_DIR", "REPORT_TO", "TOTAL_UT_STEPS", "SLURM_JOB_ID", "SLURM_SAYS", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def resolved(*argv: str):
    return resolve("", ["--config", str(ROOT / "tests/smoke.yaml"), *argv], add_options=preflight.options)


def script(*argv: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ouro.cluster.preflight", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout + done.stderr


def refused(check, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        check(resolved(*argv))
    return str(error.value)


def rows_of(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_preflight_of_the_embedded_default_is_green_and_ends_with_a_real_step(in_the_repository):
    code, printed = script("--config", "configs/smoke.yaml", "--total_ut_steps", "1", "--gpu")
    assert code == 0, printed
    names = [line.split()[1] for line in printed.splitlines()]
    assert names == ["settings", *preflight.CHECKS, "step"]
    assert re.search(r"^ok +step +loss \d\.\d+, .* tokens/s, .*; one item scored$", printed, re.MULTILINE)
    assert "FAIL" not in printed


def test_a_job_script_that_runs_in_slurms_spool_folder_says_so(tmp_path):
    for name in ("train.sbatch", "eval.sbatch"):
        shutil.copy(ROOT / "slurm" / name, tmp_path / "slurm_script")
        done = subprocess.run(["bash", "slurm_script"], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (
            2, f"error: {tmp_path} is not the repository: submit with make cluster-sweep\n"
        )  # fmt: skip


def test_code_that_is_not_all_there_is_refused(in_the_repository, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "ROOT", tmp_path)
    assert f"no train_qlora.py in {tmp_path}: this is a copy, as in Slurm's spool folder" in refused(
        preflight.check_code
    )


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--config", "/configs/a100.yaml"], "cannot read /configs/a100.yaml: No such file or directory"),
        (["--exp", "exp1"], "unknown experiment 'exp1'"),
        (["--learning_rat", "1"], "unknown argument '--learning_rat'; did you mean 'learning_rate'?"),
    ],
)
def test_a_config_or_experiment_that_is_not_there_is_refused(in_the_repository, argv, told):
    code, printed = script(*argv)
    assert code == 2 and re.match("FAIL +settings ", printed) and printed.count(told) == 2, printed


@pytest.mark.parametrize("at_fault", ["proxy", "offline"])
def test_a_hub_that_cannot_be_reached_is_named_with_its_proxy(in_the_repository, monkeypatch, tmp_path, at_fault):
    from ouro.data.sources import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", at_fault == "offline")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    huggingface_hub.configure_http_backend()
    try:
        real = replace_settings(resolved(), model_name_or_path="ByteDance/Ouro-2.6B", paths={})
        for check, name in (
            (preflight.check_model, "ByteDance/Ouro-2.6B"),
            (preflight.check_data, "airesearch/WangchanThaiInstruct"),
            (preflight.check_benchmarks, "scb10x/thai_exam"),
        ):
            with pytest.raises(UserError) as error:
                check(real)
            assert str(error.value).startswith(f"{name} is not in {tmp_path}, and ")
            assert "make fetch" in str(error.value) and "secret" not in str(error.value)
            if at_fault == "proxy":
                assert "through the proxy http://…@127.0.0.1:9 (ProxyError)" in str(error.value)
    finally:
        monkeypatch.undo()
        huggingface_hub.configure_http_backend()


def replace_settings(run, **values):
    for name, value in values.items():
        setattr(run.settings, name, value)
    return run


def test_columns_of_other_names_are_refused(in_the_repository, tmp_path):
    """The rows of lower-case columns would be empty."""
    data = rows_of(tmp_path / "train.jsonl", {"instruction": "ก", "input": "", "output": "ข", "License": "MIT"})
    told = refused(preflight.check_data, "--dataset_path", data)
    assert "no column 'Instruction'; did you mean 'instruction'?; columns found: instruction, input, output" in told


def test_rows_that_are_empty_are_refused(in_the_repository, tmp_path):
    rows = [{"prompt": f"ก {n}", "completion": "ข" if n % 2 else ""} for n in range(20)]
    told = refused(preflight.check_data, "--dataset", "pairs", "--dataset_path", rows_of(tmp_path / "x.jsonl", *rows))
    assert "10 of the first 20 rows cannot be trained on, the first: " in told and "empty (completion)" in told


def test_rows_without_messages_are_refused(in_the_repository, tmp_path):
    data = rows_of(tmp_path / "x.jsonl", {"conversations": []})
    assert "no column 'messages'" in refused(preflight.check_data, "--dataset", "chat", "--dataset_path", data)


def test_an_unknown_training_set_and_a_missing_benchmark_are_refused(in_the_repository, tmp_path):
    assert "'wangchn'; did you mean 'wangchan'?" in refused(preflight.check_data, "--dataset", "wangchn")
    assert "overlap: unknown benchmark 'thai_exm'; did you mean 'thai_exam'?" in refused(
        preflight.check_benchmarks, "--overlap", "thai_exm"
    )
    assert "no onet/onet_test.jsonl in it" in refused(preflight.check_benchmarks, "--paths", f"thai_exam={tmp_path}")


def test_an_exam_item_whose_answer_is_no_option_is_refused(in_the_repository, tmp_path):
    shutil.copytree(ROOT / "sample/thai_exam", tmp_path / "exam")
    file = next((tmp_path / "exam").rglob("onet_test.jsonl"))
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    rows_of(file, first | {"answer": "E"}, *others)
    told = refused(preflight.check_benchmarks, "--paths", f"thai_exam={tmp_path / 'exam'}")
    assert "item 1: answer 'E' is not among the options a, b, c, d" in told


def test_packages_that_are_not_the_locked_ones_are_refused(in_the_repository, monkeypatch, tmp_path):
    other = tmp_path / "transformers-4.50.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.50.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "transformers 4.50.0, locked 4.54.1 (1 of " in refused(preflight.check_versions)


def test_a_library_that_cannot_be_imported_is_refused(in_the_repository, tmp_path):
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl/__init__.py").write_text("from transformers import TopHLogitsWarper\n")
    code, printed = script("--config", "tests/smoke.yaml", PYTHONPATH=str(tmp_path))
    assert code == 2 and re.search("^FAIL +imports +cannot import name 'TopHLogitsWarper'", printed, re.MULTILINE)


def test_a_trainer_that_fails_in_the_first_step_is_caught_by_that_step(in_the_repository, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'train_qlora.py' in sys.orig_argv:\n"
        "    from transformers import Trainer\n"
        "    def get_train_dataloader(self):\n"
        "        raise ValueError('No columns in the dataset match the model\\'s forward method signature')\n"
        "    Trainer.get_train_dataloader = get_train_dataloader\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    argv = ["--config", "tests/smoke.yaml", "--total_ut_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--gpu", *argv])
    told = "train_qlora.py: ValueError: No columns in the dataset match the model's forward method signature"
    assert refused(preflight.check_step) == told


def test_wandb_without_a_key_is_refused(in_the_repository, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    argv = ("--report_to", "wandb")
    assert "set WANDB_API_KEY or run `wandb login`" in refused(preflight.check_logger, *argv)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert preflight.check_logger(resolved(*argv)) == "metrics.jsonl and wandb"


def test_a_folder_that_cannot_be_written_is_refused(in_the_repository):
    assert re.search(
        "output_dir = /proc/x: .* in /proc: choose", refused(preflight.check_disk, "--output_dir", "/proc/x")
    )


def test_too_little_disk_or_memory_is_refused(in_the_repository, monkeypatch):
    monkeypatch.setattr(preflight, "DISK", 1e18)
    assert re.search(r"output_dir = .*: \d+\.\d GB free, 1000000000 GB are needed", refused(preflight.check_disk))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "3000")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert refused(preflight.check_memory) == "3.1 GB for 4 processes, 8 GB are needed: raise MEM"


# ----------------------------------------------------------------------------------------------------------------------
# settings of the cluster, containers


def site(folder: Path, command: str, path: str = SLURM_PATH, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f". slurm/site.sh; {command}"], capture_output=True, text=True,
        cwd=folder, env={"PATH": path, "HOME": str(folder)} | environment,
    )  # fmt: skip


def test_the_command_line_wins_over_site_env_and_that_over_the_defaults(tmp_path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "slurm/site.env").write_text(': "${PARTITION:=gpu}"\n: "${TIME:=2:00:00}"\nSBATCH_ACCOUNT=thai\n')
    done = site(tmp_path, 'echo "${train[*]}"; env', TIME="1:00:00")
    assert done.stdout.startswith(
        "--partition=gpu --nodes=1 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=8 --mem=128G --time=1:00:00 "
        "--signal=USR1@300\n"
    )
    assert "SBATCH_ACCOUNT=thai\n" in done.stdout, "for sbatch"


def test_a_job_has_the_proxy_of_the_settings_or_none(tmp_path):
    copy_of_the_repository(tmp_path)
    own = {"http_proxy": "http://login:1", "HTTPS_PROXY": "http://login:1"}
    assert "login" not in site(tmp_path, "env", SLURM_JOB_ID="1", **own).stdout
    assert "https_proxy=http://web:2\n" in site(tmp_path, "env", SLURM_JOB_ID="1", PROXY="http://web:2", **own).stdout
    assert "HTTPS_PROXY=http://login:1\n" in site(tmp_path, "env", **own).stdout, "not in a job"


def test_a_job_knows_the_commit_that_the_login_node_saw(tmp_path):
    copy_of_the_repository(tmp_path)
    say = "echo ${OURO_THAI_COMMIT:-none}"
    assert site(tmp_path, say).stdout == "none\n"
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=tmp_path).stdout
    assert site(tmp_path, say, OURO_THAI_COMMIT="old").stdout == head
    (tmp_path / "bin").mkdir()  # a node without git
    assert site(tmp_path, say, path=str(tmp_path / "bin"), OURO_THAI_COMMIT=head.strip()).stdout == head


def test_without_a_container_tool_an_image_is_refused(tmp_path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uname").symlink_to(shutil.which("uname"))
    done = site(tmp_path, "true", path=str(tmp_path / "bin"), IMAGE="ouro.sif")
    assert done.returncode == 2 and "neither apptainer nor singularity is found on" in done.stderr
    assert "as MODULES in slurm/site.env" in done.stderr
    done = site(tmp_path, "true", MODULES="apptainer")
    assert done.returncode == 2 and "there is no command module here" in done.stderr


def test_in_an_image_everything_that_a_run_reads_and_writes_is_bound(tmp_path):
    copy_of_the_repository(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "bin/apptainer").chmod(0o755)
    path, other = f"{tmp_path / 'bin'}:{SLURM_PATH}", tmp_path / "elsewhere"
    done = site(tmp_path, "true", path=path, IMAGE="ouro.sif")
    assert done.returncode == 2 and "no image ouro.sif on" in done.stderr
    (tmp_path / "ouro.sif").touch()
    other.mkdir()
    hub = tmp_path / "hub"
    done = site(tmp_path, 'echo "${python[*]}"', path=path, IMAGE="ouro.sif", HF_HOME=str(hub), BINDS=str(other))
    command = done.stdout
    assert command.startswith(f"{tmp_path}/bin/apptainer exec --nv --contain --writable-tmpfs --env HF_HOME={hub} ")
    assert command.endswith(" ouro.sif python\n") and f"--pwd {tmp_path} " in command
    for place in (tmp_path, hub, "/tmp:/tmp", "/dev/shm", other):
        assert f"--bind {place} " in command


def planned(folder: Path, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        ["make", "cluster-sweep", "DRY=1", *(f"{name}={value}" for name, value in environment.items())],
        capture_output=True, text=True, cwd=folder, env={"PATH": os.environ["PATH"], "HOME": str(folder)},
    )  # fmt: skip
    assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_plan_shows_what_would_be_submitted_without_slurm(tmp_path):
    copy_of_the_repository(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    printed = planned(tmp_path, SEEDS="0 1", EXPS="exp2-wangchan-ut1 exp1-wangchan-ut4", TIME="12:00:00")
    names = [f"{exp}-seed{seed}" for exp in ("exp2-wangchan-ut1", "exp1-wangchan-ut4") for seed in (0, 1)]
    assert list(table(printed)) == [f"{name}{what}" for name in names for what in ("", " evaluation")]
    assert table(printed)[names[0]] == ("new", "- 4 12:00:00 at most 1.2 new")
    assert "DRY: nothing was submitted" in printed.splitlines()
    assert ("new report" in " ".join(printed.split())) is (tmp_path / "report.py").exists()
    assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"EXPS": "exp2-wangchan-ut1 exp9"}, "unknown experiment 'exp9'"),
        ({"CONFIG": "configs/a10.yaml"}, "cannot read configs/a10.yaml"),
        ({"NODES": "2"}, "gradient_accumulation_steps = 4 forward passes a step cannot be shared by 8 processes"),
        ({"ARGS": "--optm adamw_torch"}, "unknown argument '--optm'; did you mean 'optim'?"),
        ({"SEEDS": "0 x"}, "seed must be a whole number, got 'x'"),
        ({"SEEDS": "0 1 0"}, "seed 0 is named twice"),
        ({"EXP": "exp2-wangchan-ut1"}, 'cluster-sweep submits several: make cluster-sweep EXPS="exp2-wangchan-ut1"'),
        ({"GPUS": "x"}, "NODES = 1 and GPUS = x must be whole numbers"),
        ({"TIME": "12h"}, "TIME = 12h or GRACE = 300 is no time"),
        ({"GPU_TYPE": "B1000"}, "no figures of a GPU 'B1000'"),
        ({"GPU_TYPE": "RTX3080"}, "RTX3080, 10 GiB: about 32.8 GiB of GPU memory are needed"),
    ],
)
def test_a_mistake_in_a_sweep_is_refused_before_anything_is_submitted(tmp_path, change, told):
    copy_of_the_repository(tmp_path)
    printed = planned(tmp_path, code=2, **change)
    assert told in printed and not table(printed)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["cancel", "EXPS=exp2-wangchan-ut1"], "cancel takes one: make cancel EXP="),
        (["logs", "EXP=exp2-wangchan-ut1"], "error: no log of exp2-wangchan-ut1 in slurm/logs"),
    ],
)
def test_a_mistake_about_what_was_submitted_is_refused(tmp_path, command, told):
    copy_of_the_repository(tmp_path)
    done = subprocess.run(["make", *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "cannot access" not in done.stderr


def test_a_plan_needs_to_know_the_gpu(monkeypatch):
    monkeypatch.delenv("GPU_TYPE", raising=False)
    with pytest.raises(UserError, match="GPU_TYPE is not set"):
        sweep.plan(["exp2-wangchan-ut1"], [], 1, [])


def test_each_seed_and_each_state_of_a_run_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in (("GPU_TYPE", "H100"), ("TIME", "1:00:00"), ("GRACE", "300")):
        monkeypatch.setenv(name, value)
    argv = ["--config", str(ROOT / "tests/smoke.yaml"), "--output_dir", "runs"]
    argv += ["--paths", f"wangchan={ROOT / 'sample/wangchan'}", "--max_steps", "200"]
    exps, seeds = ["exp2-wangchan-ut1"], ["1", "2", "3", "4"]
    rows = sweep.plan(exps, seeds, 1, argv)
    assert [row[3] for row in rows] == [f"runs/seed{seed}" for seed in seeds]
    assert {row[7] for row in rows} == {"new"} and {row[8] for row in rows} == {"no"}
    for seed in seeds:
        run = resolve("", [*argv, "--exp", exps[0], "--seed", seed, "--output_dir", f"runs/seed{seed}",
                           "--results_dir", f"results/smoke/seed{seed}"])  # fmt: skip
        files.write_atomic(f"runs/seed{seed}/{exps[0]}/config.yaml", run.as_yaml())
    for seed, name in (("1", "completed"), ("2", "checkpoint-9/x"), ("2", "checkpoint-100/x")):
        files.write_atomic(f"runs/seed{seed}/{exps[0]}/{name}", "")
    files.write_atomic(f"results/smoke/seed1/{exps[0]}/evaluated", "")
    files.write_atomic(f"runs/seed4/{exps[0]}/metrics.jsonl", "")
    other = Path(f"runs/seed4/{exps[0]}/config.yaml")
    other.write_text(other.read_text().replace("learning_rate: 0.002", "learning_rate: 0.1"))
    rows = sweep.plan(exps, seeds, 1, argv)
    assert [row[7] for row in rows[:3]] == ["complete", "resumes at step 100", "new"]
    assert rows[3][7].startswith("refused: ") and "a run with other learning_rate;" in rows[3][7]
    assert [row[8] for row in rows] == ["yes", "no", "no", "no"]
    assert [row[9] == "-" for row in rows] == [True, False, False, True]
    (other.parent / "metrics.jsonl").unlink()
    assert sweep.plan(exps, ["4"], 1, argv)[0][7] == "new", "nothing has begun there"
    monkeypatch.setattr(plan, "predict", lambda *_: plan.Prediction(0, 0, 0, 200, 20, False))
    told = [row[9] for row in sweep.plan(exps, seeds, 1, argv)]
    assert told == ["-", "10.0, 10 requeues", "20.0, 21 requeues", "20.0, 21 requeues"]
    os.utime(f"runs/seed1/{exps[0]}/completed", (time.time() + 9, time.time() + 9))  # trained again
    assert sweep.plan(exps, ["1"], 1, argv)[0][8] == "no"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200), ("2-00:00:00", 172800)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(text, seconds):
    assert time_limit.seconds(text) == seconds


def test_preflight_compares_the_limits_with_the_predicted_hours(in_the_repository, monkeypatch, tmp_path):
    limits = {"TIME": "12:00:00", "GRACE": "600", "NODES": "1", "GPUS": "1", "GPU_TYPE": "RTX3080", "PARTITION": "defq"}
    says = "sbatch: Job 1 to start at 2026-01-01T00:00:00\nPartitionName=defq MaxTime=UNLIMITED"
    for name, value in (limits | {"SLURM_SAYS": says}).items():
        monkeypatch.setenv(name, value)
    run = resolve("", ["--config", str(ROOT / "configs/default.yaml"), "--cache_dir", str(tmp_path)])
    told = "partition defq takes 12:00:00 on 1 x 1 RTX3080; at most 393.7 hours predicted, 33 requeues"
    assert preflight.check_slurm(run) == told
    monkeypatch.setenv("GRACE", "300")
    with pytest.raises(UserError, match="a step is predicted to take at most 469 s, more than GRACE = 300 s: raise GR"):
        preflight.check_slurm(run)


@pytest.mark.parametrize(
    ("hours", "told"), [(0, ""), (11, ""), (11.1, ", 1 requeue"), (22, ", 1 requeue"), (27, ", 2 requeues")]
)
def test_requeues_are_counted_without_the_seconds_for_saving(monkeypatch, hours, told):
    monkeypatch.setenv("TIME", "12:00:00")
    monkeypatch.setenv("GRACE", "3600")
    assert plan.requeues(hours) == told


def test_the_shell_scripts_are_clean():
    need("shellcheck", "shellcheck")
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("slurm/*.s*"), *ROOT.glob("tests/*.sh"), ROOT / ".ci/run"]
    names = [str(path.relative_to(ROOT)) for path in scripts if path.name != "site.env"]
    done = subprocess.run(["shellcheck", "-x", *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_make_can_plan_every_target():
    targets = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 15
    for target in targets:
        names = ["HOST=h"] + ["EXP=e"] * (target != "cluster-sweep")
        done = subprocess.run(["make", "-n", target, *names], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout, done.stderr
