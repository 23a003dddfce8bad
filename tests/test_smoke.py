"""The main job end to end on the embedded default: train, score, repeat, refuse."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import train_qlora
from ouro import files
from ouro.files import UserError, read_yaml
from ouro.model.loading import load_ouro
from ouro.settings import resolve
from ouro.train import run_folder

import pytest
import torch
from conftest import PATIENCE
from packaging.requirements import Requirement
from safetensors.torch import load_file
from test_resume import port

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["--config", "tests/smoke.yaml", "--report_to", "none", "--logging_steps", "1"]


pytestmark = pytest.mark.usefixtures("in_the_repository")


def trained(folder: Path, *argv: str) -> Path:
    """Trains in this process; the run's folder."""
    run = resolve("", [*SMOKE, "--output_dir", str(folder), *argv], add_options=train_qlora.options)
    return train_qlora.train(run)


def scored(folder: Path, *argv: str) -> Path:
    places = ["--output_dir", str(folder), "--results_dir", str(folder / "results")]
    evaluate.evaluate(resolve("", [*SMOKE[:2], *places, *argv], add_options=evaluate.options, several=True))
    return folder / "results"


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`make smoke`, once, as a user types it; the folder that holds output/ and results/, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    scripts = [path.name for path in ROOT.glob("*.py")]
    for name in ("Makefile", "requirements.txt", "configs", "ouro", "sample", "tools", *scripts):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    done = subprocess.run(["make", "smoke"], capture_output=True, text=True, cwd=folder, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_smoke_trains_scores_and_closes_with_a_table(smoke):
    folder, printed = smoke
    run = folder / "output/smoke/smoke"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "manifest.json", "data_report.json", "metrics.jsonl", "final_adapter", "completed"
    }  # fmt: skip
    steps = losses(run)
    assert len(steps) == 10 and sum(steps[-3:]) < sum(steps[:3]) - 0.5
    assert f"first {steps[0]:.4f}   last {steps[-1]:.4f}" in printed
    assert re.search(r"thai_exam \(ours\): 15 items, chance 2\d\.\d%", printed)
    assert len(re.findall(r"^  smoke +[1-4] +\d+\.\d% +\d+\.\d% – \d+\.\d%", printed, re.MULTILINE)) == 4
    assert len(re.findall(r"^  smoke +[1-4] +\d+\.\d{4} +\d+\.\d{4} – \d+\.\d{4}", printed, re.MULTILINE)) == 8
    assert "output/smoke/smoke/" in printed and "results/make-smoke/smoke/" in printed


def test_the_manifest_says_what_is_needed_to_repeat_the_run(smoke):
    manifest = json.loads((smoke[0] / "output/smoke/smoke/manifest.json").read_text())
    assert manifest["packages"]["transformers"] == "4.54.1" and manifest["packages"]["trl"] == "0.20.0"
    assert (manifest["seed"], manifest["processes"], manifest["model"]) == (42, 1, "sample/ouro-nano")
    assert "--max_steps" in manifest["command"]
    if shutil.which("git") and (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        assert manifest["git_commit"] == head and len(head) == 40
    else:
        assert (manifest["git_commit"], manifest["git_dirty"]) == ("unknown", None)


@pytest.mark.parametrize("git", [True, False])
def test_without_a_repository_the_commit_is_what_the_image_or_the_login_node_said(tmp_path, git):
    (tmp_path / "ouro").mkdir()
    for name in ("__init__.py", "files.py"):
        shutil.copy(ROOT / "ouro" / name, tmp_path / "ouro")
    path = str(Path(shutil.which("git")).parent) if git else str(tmp_path)

    def version(**environment: str) -> tuple[str, bool | None]:
        done = subprocess.run(
            [sys.executable, "-c", "import json; from ouro import files; print(json.dumps(files.code_version()))"],
            capture_output=True, text=True, cwd=tmp_path, env={"PATH": path} | environment,
        )  # fmt: skip
        return tuple(json.loads(done.stdout).values())

    assert version() == version(OURO_THAI_COMMIT="unknown") == ("unknown", None)
    assert version(OURO_THAI_COMMIT="12ab") == ("12ab", False)
    assert version(OURO_THAI_COMMIT="12ab-dirty") == ("12ab", True)
    (tmp_path / "COMMIT").write_text("34cd\n")
    assert version(OURO_THAI_COMMIT="12ab-dirty") == ("34cd", False), "the code's own"


def test_the_decoded_row_is_printed_before_the_first_step(smoke):
    printed = smoke[1]
    assert printed.index("⟦") < printed.index("⟧") < printed.index("step     1/10")
    assert "<|im_end|>⟧" in printed


def test_the_settings_are_printed_with_their_origin(smoke):
    printed = smoke[1]
    assert re.search(r"learning_rate +0\.002 +configs/smoke\.yaml", printed)
    assert re.search(r"max_steps +10 +command line", printed)
    assert re.search(r"lora_alpha +32 +default", printed)


def test_only_the_seven_projections_are_adapted(smoke):
    weights = load_file(smoke[0] / "output/smoke/smoke/final_adapter/adapter_model.safetensors")
    adapted = {re.search(r"(\w+)\.lora_[AB]", name)[1] for name in weights}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(weights) == 2 * 7 * 2 and all(w.abs().max() > 0 for w in weights.values())


def test_the_adapter_folder_holds_a_card_and_the_tokenizer(smoke):
    adapter = smoke[0] / "output/smoke/smoke/final_adapter"
    card = (adapter / "README.md").read_text()
    assert "total_ut_steps = 4" in card and "base_model: sample/ouro-nano" in card and "Apache-2.0" in card
    assert (adapter / "tokenizer.json").exists() and (adapter / "adapter_config.json").exists()


def test_scores_are_written_for_base_and_run_at_every_depth(smoke):
    for name in ("smoke", "base-nf4"):
        for depth in (1, 2, 3, 4):
            folder = smoke[0] / "results/make-smoke" / name
            study = json.loads((folder / f"thai_exam-ut{depth}.json").read_text())["study"]
            items = [json.loads(x) for x in (folder / f"thai_exam-ut{depth}.items.jsonl").read_text().splitlines()]
            assert len(items) == study["items"] == sum(study["predicted"].values()) == 15
            assert study["value"] == sum(item["prediction"] == item["gold"] for item in items) / len(items)
            low, high = study["ci95"]
            assert low < study["value"] < high
            assert (folder / f"thai_text-ut{depth}.json").exists() and (
                folder / f"english_text-ut{depth}.json"
            ).exists()


def test_the_same_command_twice_gives_the_same_bytes(tmp_path):
    first, second = (trained(tmp_path / name, "--max_steps", "2") for name in "ab")
    for name in ("final_adapter/adapter_model.safetensors", "data_report.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert losses(first) == losses(second)
    other = trained(tmp_path / "c", "--max_steps", "2", "--seed", "43")
    assert losses(other) != losses(first)


def test_an_experiment_trains_and_scores_under_its_name(tmp_path, capsys):
    exp = ["--exp", "exp2-wangchan-ut1"]
    run = trained(tmp_path, *exp, "--max_steps", "1")
    assert run == tmp_path / "exp2-wangchan-ut1" and read_yaml(run / "config.yaml")["total_ut_steps"] == 1
    results = scored(tmp_path, *exp, "--ut_steps", "1,2", "--limit", "2", "--tasks", "thai_exam")
    assert sorted(p.name for p in results.iterdir()) == ["base-nf4", "exp2-wangchan-ut1"]
    assert json.loads((results / exp[1] / "thai_exam-ut2.json").read_text())["study"]["items"] == 10
    capsys.readouterr()
    assert trained(tmp_path, *exp, "--max_steps", "1") == run  # complete: not repeated
    assert "is complete already" in capsys.readouterr().out


def test_the_last_step_is_logged_whatever_the_interval(tmp_path):
    run = trained(tmp_path, "--max_steps", "3", "--logging_steps", "2", "--max_grad_norm", "0", "--total_ut_steps", "1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert json.loads((run / "completed").read_text()) == {"steps": 3, "loss": lines[-1]["loss"]}
    assert lines[0]["num_tokens"] < lines[1]["num_tokens"] < lines[2]["num_tokens"]


@pytest.mark.parametrize("exp", ["exp4-synthetic-ut4", "exp5a-r1-ut1"])
def test_the_other_training_sets_work_on_the_embedded_default(tmp_path, exp):
    assert (trained(tmp_path, "--exp", exp, "--max_steps", "1") / "completed").exists()


def test_a_run_with_other_settings_is_neither_continued_nor_counted(tmp_path):
    argv = ["--max_steps", "1", "--per_device_train_batch_size", "1"]
    run = trained(tmp_path, *argv)
    before = (run / "completed").read_bytes()
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  learning_rate: 0.002 there, 0.001 asked"):
        trained(tmp_path, *argv, "--learning_rate", "1e-3")
    assert (run / "completed").read_bytes() == before
    trained(tmp_path, *argv, "--learning_rate", "1e-3", "--overwrite")
    assert read_yaml(run / "config.yaml")["learning_rate"] == 1e-3


def test_a_run_refused_before_its_manifest_has_not_begun(tmp_path):
    """Its corrected command needs no --overwrite; once there is more, it does."""
    with pytest.raises(UserError, match="activation_checkpointing = 99, and the model has 4 layers"):
        trained(tmp_path, "--max_steps", "1", "--activation_checkpointing", "99")
    run = tmp_path / "smoke"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "data_report.json"}
    (run / "wandb").mkdir()
    assert trained(tmp_path, "--max_steps", "1") == run and (run / "completed").exists()
    assert not (run / "wandb").exists(), "else W&B would go on with the refused run"
    for name in ("manifest.json", "metrics.jsonl", "checkpoint-1", "final_adapter"):
        place = tmp_path / name / "smoke"
        place.mkdir(parents=True)
        shutil.copy(run / "config.yaml", place)
        (place / name).touch()
        with pytest.raises(UserError, match="holds a run with other settings:\n  max_steps: 1 there, 2 asked"):
            run_folder.claim(place, resolve("", [*SMOKE, "--output_dir", str(tmp_path), "--max_steps", "2"]), False)


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        trained(tmp_path, "--max_steps", "1", "--overwrite")
    assert (tmp_path / "smoke" / "thesis.tex").exists()


def test_scoring_an_untrained_experiment_gives_the_command_that_trains_it(tmp_path):
    with pytest.raises(UserError) as error:
        scored(tmp_path, "--exp", "exp2-wangchan-ut1")
    assert "has not been trained" in str(error.value)
    assert "python train_qlora.py --config tests/smoke.yaml --exp exp2-wangchan-ut1" in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ut_steps", "1,5x"], "--ut_steps must be different loop counts"),
        (["--tasks", "thai_exm"], r"unknown task 'thai_exm'; did you mean 'thai_exam'\?"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "x"], "command line: argument --limit: invalid int value: 'x'"),
    ],
)
def test_a_mistake_in_the_command_is_named_before_the_missing_run(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        scored(tmp_path, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_bf16_without_a_gpu_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"no CUDA GPU found.*on a CPU use --config configs/smoke.yaml"):
        train_qlora.train(
            resolve("", ["--config", "configs/default.yaml", "--output_dir", str(tmp_path)], train_qlora.options)
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "adamx"], "adamx is not a valid OptimizerNames, please select one of"),
        (["--lr_scheduler_type", "cosin"], "cosin is not a valid SchedulerType, please select one of"),
        (
            ["--activation_checkpointing", "some"],
            "activation_checkpointing must be one of auto, none, full, a number, got 'some'",
        ),
        (["--frozen_weights", "fp8"], "frozen_weights: fp8 is for bf16 LoRA: it needs use_qlora"),
        (["--model_name_or_path", "sample/nope"], "no folder sample/nope"),
        (["--paths", "wangchan=sample/nope"], "dataset wangchan: no such file or folder: sample/nope"),
        (["--max_length", "100"], "204 of 204 rows of .* longer than max_length = 100 tokens .*; raise --max_length"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, "--paths", "wangchan=sample/wangchan", "--overlap", "none", *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "/deep"])
def test_an_output_folder_that_is_a_file_is_refused_with_one_message(tmp_path, monkeypatch, capsys, below):
    (tmp_path / "file").touch()
    argv = ["--output_dir", f"{tmp_path}/file{below}", "--cache_dir", str(tmp_path / "cache"), "--overlap", "none"]
    monkeypatch.setattr(sys, "argv", ["train_qlora.py", *SMOKE, *argv])
    with pytest.raises(SystemExit) as ended:
        files.call(train_qlora.main)
    told = f"error: a file is where a folder is wanted: {tmp_path}/file"
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(told)


def test_accumulated_batches_take_the_step_of_one_big_batch(tmp_path):
    steps = ["--max_steps", "2", "--lora_dropout", "0", "--use_qlora", "false", "--optim", "adamw_torch"]
    split = trained(tmp_path / "a", *steps, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    whole = trained(tmp_path / "b", *steps, "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
    assert losses(split) == pytest.approx(losses(whole), abs=1e-4)
    a, b = (load_file(run / "final_adapter/adapter_model.safetensors") for run in (split, whole))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


def test_two_processes_take_the_steps_of_one(tmp_path):
    argv = [*SMOKE, "--max_steps", "2", "--lora_dropout", "0", "--use_qlora", "false", "--optim", "adamw_torch",
            "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port()]
    command += ["train_qlora.py", *argv, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step     2/2") == 1, "one process logs"
    one = trained(tmp_path / "one", *argv[4:])
    assert losses(tmp_path / "two/smoke") == pytest.approx(losses(one), abs=1e-3)
    a, b = (load_file(p / "final_adapter/adapter_model.safetensors") for p in (tmp_path / "two/smoke", one))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)


def test_the_nf4_model_is_the_same_in_training_and_scoring():
    # On a CPU with bf16 instructions bitsandbytes repacks the weights, rounded, at the first forward in eval mode.
    model = load_ouro("sample/ouro-tiny", dtype=torch.float32, nf4=True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        training, scoring, again = model.train()(ids).logits, model.eval()(ids).logits, model.train()(ids).logits
    assert torch.equal(training, scoring) and torch.equal(training, again)


def test_no_dependency_imports_our_evaluate_in_place_of_the_package():
    """There is a package named evaluate. The script of that name wins in this folder, so nothing may want the other."""
    program = (
        "import sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name != 'evaluate', 'something imports evaluate'\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import accelerate, bitsandbytes, datasets, peft, transformers, trl\n"
        "from transformers import Trainer\n"
        "from trl import SFTConfig, SFTTrainer\n"
        "import train_qlora\n"
        "assert 'evaluate' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for package in importlib.metadata.distributions():
        for line in package.requires or []:
            requirement = Requirement(line)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            assert not (wanted and requirement.name == "evaluate"), f"{package.name} requires evaluate"


def test_importing_our_evaluate_does_nothing():
    done = subprocess.run([sys.executable, "-c", "import evaluate"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_make_alone_prints_every_target_with_its_help():
    done = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT)
    rules = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert done.returncode == 0 and len(rules) >= 8
    for rule in rules:
        assert re.search(rf"^  make {rule} +\S", done.stdout, re.MULTILINE), rule


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.7", "Python 2.7 is too old or too new"), ("3.14", "Python 3.14 is too old or too new")],
)
def test_another_python_gets_a_clear_error(tmp_path, version, message):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/env.sh", tmp_path / "tools")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit 0\nexit 1\n')
    fake.chmod(0o755)
    done = subprocess.run([tmp_path / "tools/env.sh", fake], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and "make env PYTHON=python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_requirements_are_exact_and_hashed():
    text = (ROOT / "requirements.txt").read_text()
    pins = re.findall(r"^([\w.-]+)==(\S+) ", text, re.MULTILINE)
    assert {"torch": "2.7.1", "transformers": "4.54.1", "trl": "0.20.0"}.items() <= dict(pins).items()
    blocks = re.split(r"^(?=[\w-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pins) and all("--hash=sha256:" in block for block in blocks)
    for name, pin in pins:
        assert importlib.metadata.version(name) == pin, name
    assert "://" not in text
