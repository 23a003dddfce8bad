"""The main job end to end on the embedded default: train, score, repeat, refuse."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import train_qlora
from ouro.files import UserError, latest, read_yaml
from ouro.model.loading import load_ouro
from ouro.train import run_folder

import pytest
import torch
from conftest import PATIENCE
from helpers import ROOT, SMALL, metrics, resolved, trained
from packaging.requirements import Requirement
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("in_the_repository")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, in_the_repository):
    """`make smoke` in this process and on a smaller model; the folder of run and scores, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("smoke"), io.StringIO()
    argv = ["--overlap", "thai_exam", "--activation_checkpointing", "none", "--output_dir", str(folder)]
    argv += ["--total_ut_steps", "2"]
    argv = latest([*SMALL, *argv])
    commands = {
        train_qlora: [*argv, "--max_steps", "10", "--rows_per_step", "2", "--overwrite"],
        evaluate: [*argv, "--results_dir", str(folder / "results"), "--limit", "2", "--tasks", "thai_exam,thai_text"],
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for program, options in commands.items():
            patch.setattr(sys, "argv", [f"{program.__name__}.py", *options])
            program.main()
    return folder, printed.getvalue()


def test_smoke_trains_scores_and_closes_with_a_table(smoke):
    folder, printed = smoke
    run = folder / "smoke"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "manifest.json", "data_report.json", "metrics.jsonl", "final_adapter", "completed"
    }  # fmt: skip
    steps = losses(run)
    assert len(steps) == 10 and sum(steps[-3:]) < sum(steps[:3])
    assert f"first {steps[0]:.4f}   last {steps[-1]:.4f}" in printed
    assert re.search(r"thai_exam \(ours\): 10 items, chance 2\d\.\d%.*\n  model +loops .* gain  answers\n", printed)
    assert re.search(r"thai_text \(text\): 2 items.*\n  model +loops .* gain\n", printed), "texts have no letters"
    assert len(re.findall(r"^  smoke +[1-4] +\d+\.\d% +\d+\.\d% – \d+\.\d%", printed, re.MULTILINE)) == 4
    assert len(re.findall(r"^  smoke +[1-4] +\d+\.\d{4} +\d+\.\d{4} – \d+\.\d{4}", printed, re.MULTILINE)) == 4
    for name in ("smoke", "base-nf4"):
        for depth in (1, 2, 3, 4):
            place = folder / "results" / name
            study = json.loads((place / f"thai_exam-ut{depth}.json").read_text())["study"]
            items = [json.loads(x) for x in (place / f"thai_exam-ut{depth}.items.jsonl").read_text().splitlines()]
            assert len(items) == study["items"] == sum(study["predicted"].values()) == 10
            assert study["value"] == sum(item["prediction"] == item["gold"] for item in items) / len(items)
            assert {item["stratum"] for item in items} == set(study["subsets"])
            known = (study["arm"], study["language"])
            assert known == (("equal-tokens", "th") if name == "smoke" else (None, None))
            low, high = study["ci95"]
            assert low <= study["value"] <= high
            assert (place / f"thai_text-ut{depth}.json").exists()


def test_the_settings_and_a_decoded_row_are_printed_before_the_first_step(smoke):
    printed = smoke[1]
    assert re.search(r"learning_rate +0\.002 +tests/smoke\.yaml", printed)
    assert re.search(r"max_steps +10 +command line", printed)
    assert re.search(r"paths +of wangchan, synthetic, .*english_text +tests/smoke\.yaml", printed)
    assert "lora_alpha" not in printed and re.search(r"the other \d+ settings are defaults", printed)
    assert printed.index("⟦") < printed.index("<|im_end|>⟧") < printed.index("step     1/10")


def test_the_manifest_says_what_is_needed_to_repeat_the_run(smoke):
    manifest = json.loads((smoke[0] / "smoke/manifest.json").read_text())
    assert manifest["packages"]["transformers"] == "4.54.1" and manifest["packages"]["trl"] == "0.20.0"
    assert (manifest["seed"], manifest["processes"], manifest["model"]) == (42, 1, "sample/ouro-tiny")
    assert "--max_steps" in manifest["command"]
    assert (manifest["arm"], manifest["language"]) == ("equal-tokens", "th")
    if shutil.which("git") and (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
        assert manifest["git_commit"] == head and len(head) == 40
    else:
        assert (manifest["git_commit"], manifest["git_dirty"]) == ("unknown", None)


def test_the_adapter_is_of_the_seven_projections_with_a_card_and_the_tokenizer(smoke):
    adapter = smoke[0] / "smoke/final_adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    adapted = {re.search(r"(\w+)\.lora_[AB]", name)[1] for name in weights}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(weights) == 4 * 7 * 2 and all(w.abs().max() > 0 for w in weights.values())
    card = (adapter / "README.md").read_text()
    assert "total_ut_steps = 2" in card and 'base_model: "sample/ouro-tiny"' in card and "Apache-2.0" in card
    assert (adapter / "tokenizer.json").exists() and (adapter / "adapter_config.json").exists()


@pytest.mark.slow
def test_make_smoke_as_a_user_types_it(tmp_path):
    for name in ("Makefile", "requirements.txt", "configs", "ouro", "sample", "tools", *ROOT.glob("*.py")):
        (tmp_path / Path(name).name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parent.parent)
    done = subprocess.run(["make", "smoke"], capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = losses(tmp_path / "output/smoke/smoke")
    assert len(steps) == 10 and sum(steps[-3:]) < sum(steps[:3]) - 0.5
    assert re.search(r"learning_rate +0\.002 +configs/smoke\.yaml", done.stdout)
    assert re.search(r"thai_exam \(ours\): 15 items, chance 2\d\.\d%", done.stdout)
    assert "next: make report EXP=smoke" in done.stdout and "output/smoke/smoke/" in done.stdout
    assert "results/make-smoke/smoke/" in done.stdout


def test_without_a_repository_the_commit_is_what_the_image_or_the_login_node_said(tmp_path):
    (tmp_path / "ouro").mkdir()
    for name in ("__init__.py", "files.py"):
        shutil.copy(ROOT / "ouro" / name, tmp_path / "ouro")

    def version(path: Path, **environment: str) -> tuple[str, bool | None]:
        done = subprocess.run(
            [sys.executable, "-c", "import json; from ouro import files; print(json.dumps(files.code_version()))"],
            capture_output=True, text=True, cwd=tmp_path, env={"PATH": str(path)} | environment,
        )  # fmt: skip
        code = json.loads(done.stdout)
        return code["git_commit"], code["git_dirty"]

    with_git = Path(shutil.which("git")).parent
    assert version(tmp_path) == version(with_git, OURO_THAI_COMMIT="unknown") == ("unknown", None)
    assert version(with_git, OURO_THAI_COMMIT="12ab") == ("12ab", False)
    assert version(tmp_path, OURO_THAI_COMMIT="12ab-dirty") == ("12ab", True)
    (tmp_path / "COMMIT").write_text("34cd\n")
    assert version(tmp_path, OURO_THAI_COMMIT="12ab-dirty") == ("34cd", False), "the code's own"


def test_a_run_with_other_settings_is_neither_continued_nor_counted_and_one_refused_early_has_not_begun(tmp_path):
    """What was refused before its manifest needs no --overwrite when its command is corrected; once there is more, it
    does."""
    argv = ["--max_steps", "1", "--eval_steps", "0"]
    with pytest.raises(UserError, match="activation_checkpointing = 99, and the model has 4 layers"):
        trained(tmp_path, *argv, "--activation_checkpointing", "99")
    run = tmp_path / "smoke"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "data_report.json"}
    (run / "wandb").mkdir()
    assert trained(tmp_path, *argv) == run
    assert not (run / "wandb").exists(), "else W&B would go on with the refused run"
    before = (run / "completed").read_bytes()
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  learning_rate: 0.002 there, 0.001 asked"):
        trained(tmp_path, *argv, "--learning_rate", "1e-3")
    assert (run / "completed").read_bytes() == before
    other = resolved(*argv, "--output_dir", str(tmp_path), "--learning_rate", "1e-3", "--overwrite")
    assert run_folder.claim(run, other) == "new"
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert read_yaml(run / "config.yaml")["learning_rate"] == 1e-3
    assert not run_folder.has_begun(run)
    for name in ("manifest.json", "metrics.jsonl", "checkpoint-1", "final_adapter"):
        (run / name).touch()
        with pytest.raises(UserError, match="holds a run with other settings"):
            run_folder.claim(run, resolved(*argv, "--output_dir", str(tmp_path)))
        (run / name).unlink()


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds files but no run"):
        trained(tmp_path, "--max_steps", "1", "--overwrite")
    assert (tmp_path / "smoke" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--frozen_weights", "fp8"], "frozen_weights: fp8 is for bf16 LoRA: it needs use_qlora"),
        (["--model_name_or_path", "sample/nope"], "no folder sample/nope"),
        (["--paths", "wangchan=sample/nope"], "no such .*; correct wangchan in `paths`: .*; without it"),
        (["--max_length", "100"], r"204 of 204 rows of .* longer than max_length = 100 [\s\S]*--max_length 512 keeps"),
        (["--tasks", "thai_exm"], "unknown task 'thai_exm'"),
        (["--dataset", "thai_exm"], "unknown dataset 'thai_exm'"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(tmp_path, argv, told):
    with pytest.raises(UserError, match=told):
        trained(tmp_path / "runs", *argv)
    assert not (tmp_path / "runs").exists()


def test_clean_leaves_runs_and_results(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("cache", "output/smoke/smoke", "output/smoke/own-ut4", "results/make-smoke", "results/smoke"):
        (tmp_path / folder).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not any(path.glob("*"))}
    assert left == {"Makefile", "output/smoke/own-ut4", "results/smoke"}


@pytest.mark.parametrize(("given", "kept"), [([], False), (["RESULTS_DIR=x"], True), (["ARGS=--results_dir x"], True)])
def test_smoke_deletes_its_own_results_only_where_it_will_write_them(tmp_path, given, kept):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in ("results/make-smoke", "x"):
        (tmp_path / folder).mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "RESULTS_DIR"}
    subprocess.run(["make", "smoke", "ENV=:", "PY=true", *given], cwd=tmp_path, check=True, env=environment)
    assert (tmp_path / "results/make-smoke").exists() == kept and (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("program", "work", "argv", "told"),
    [
        (train_qlora, "train", [], "continues from its last checkpoint, if it has one"),
        (train_qlora, "train", ["--overwrite"], "begins anew"),
        (evaluate, "evaluate", ["--base"], "scores what is not there yet"),
    ],
)
def test_ctrl_c_says_what_the_same_command_does(monkeypatch, capsys, program, work, argv, told):
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", [program.__name__, *argv])
    monkeypatch.setattr(program, work, interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main()
    assert capsys.readouterr().err == f"\ninterrupted; the same command {told}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_bf16_without_a_gpu_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"no CUDA GPU found.*on a CPU use --config configs/smoke.yaml"):
        trained(tmp_path / "runs", "--config", "configs/default.yaml")
    assert not (tmp_path / "runs").exists()


def test_the_nf4_model_is_the_same_in_training_and_scoring():
    # On a CPU with bf16 instructions bitsandbytes repacks the weights, rounded, at the first forward in eval mode.
    model = load_ouro("sample/ouro-tiny", dtype=torch.float32, nf4=True)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        training, scoring, again = model.train()(ids).logits, model.eval()(ids).logits, model.train()(ids).logits
    assert torch.equal(training, scoring) and torch.equal(training, again)


def test_no_dependency_wants_the_package_that_our_evaluate_hides():
    """There is a package named evaluate. The script of that name wins in this folder, so nothing may want the other."""
    for package in importlib.metadata.distributions():
        for line in package.requires or []:
            requirement = Requirement(line)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            assert not (wanted and requirement.name == "evaluate"), f"{package.name} requires evaluate"


def test_make_alone_prints_every_target_with_its_help():
    done = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT)
    rules = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert done.returncode == 0 and len(rules) >= 8
    for rule in rules:
        assert re.search(rf"^  make {rule} +\S", done.stdout, re.MULTILINE), rule


@pytest.mark.parametrize("version", ["2.7", "3.14"])
def test_another_python_gets_a_clear_error(tmp_path, version):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/env.sh", tmp_path / "tools")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version} && exit 0\nexit 1\n')
    fake.chmod(0o755)
    done = subprocess.run([tmp_path / "tools/env.sh", fake], capture_output=True, text=True)
    assert done.returncode == 1 and f"Python {version} is too old or too new" in done.stderr
    assert "make env PYTHON=python3.12" in done.stderr and not (tmp_path / ".venv").exists()
