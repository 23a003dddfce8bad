"""The settings layer: the order of its sources, and what a typing error gets."""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from ouro import FOREIGN, settings
from ouro.files import UserError, call, read_yaml, write_atomic
from ouro.settings import FIELDS, LIMITS, Settings, parse, resolve
from ouro.train import run_folder
from ouro.train.time_limit import seconds, time_limit

import pytest
import yaml
from helpers import ROOT
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("in_the_repository")


def config(tmp_path, text: str) -> str:
    path = tmp_path / "machine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_later_sources_win_and_origins_are_kept(tmp_path, monkeypatch):
    argv = ["--config", config(tmp_path, "r: 4\ntotal_ut_steps: 9\nseed: 7\nlogging_steps: 3")]
    assert resolve("", argv).settings.total_ut_steps == 9
    argv += ["--exp", "exp3a-wangchan-ut2"]
    assert resolve("", argv).settings.total_ut_steps == 2
    monkeypatch.setenv("TOTAL_UT_STEPS", "3")
    monkeypatch.setenv("RESULTS_DIR", "scores")
    run = resolve("", [*argv, "--logging_steps", "5"])
    assert (run.settings.total_ut_steps, run.settings.logging_steps, run.settings.r, run.settings.seed) == (3, 5, 4, 7)
    assert run.origins["total_ut_steps"] == "environment TOTAL_UT_STEPS" and run.settings.results_dir == "scores"
    assert run.origins["logging_steps"] == "command line"
    assert run.origins["r"] == argv[1]
    assert run.origins["dataset"] == "experiment exp3a-wangchan-ut2"
    assert run.origins["lora_alpha"] == "default"
    assert resolve("", [*argv, "--total_ut_steps", "1"]).settings.total_ut_steps == 1


def test_config_file_can_be_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CONFIG", config(tmp_path, "r: 4"))
    assert resolve("", []).settings.r == 4
    assert resolve("", ["--config", "configs/default.yaml"]).settings.r == 16


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    # YAML 1.1 reads 2e-4 as a string; the predecessor passed that string to the optimizer.
    assert yaml.safe_load("learning_rate: 2e-4") == {"learning_rate": "2e-4"}
    assert resolve("", ["--config", config(tmp_path, "learning_rate: 2e-4")]).settings.learning_rate == 2e-4


@pytest.mark.parametrize("name", ["default", "a100", "smoke"])
@pytest.mark.parametrize("exp", sorted(read_yaml(settings.EXPERIMENTS)))
def test_every_experiment_resolves_on_every_machine(name, exp):
    several = "tuned" in exp  # then no run of the arm `rates` is needed
    run = resolve("", ["--config", f"configs/{name}.yaml", "--exp", exp], several=several)
    assert run.run == exp
    s = run.settings
    assert s.total_ut_steps == int(exp[-1]) and s.lora_alpha == 2 * s.r
    assert (s.lora_dropout, s.lr_scheduler_type) == (0.05, "cosine")
    if s.arm == "equal-tokens":
        assert (s.r, s.num_train_epochs) == (16, 3) and (s.max_tokens is None) == (exp[:4] not in ("exp6", "exp7"))
    if name != "smoke":
        assert s.rows_per_step == 32 and s.max_length == 16384
        assert (s.learning_rate == 2e-4) == (s.arm != "rates" or "-x1-" in exp)


def test_smoke_reads_and_writes_nothing_outside_its_folders():
    s = resolve("", ["--config", "tests/smoke.yaml"]).settings
    names = {row["dataset"] for row in read_yaml(settings.EXPERIMENTS).values()} | set(s.overlap.split(","))
    assert names - {"own"} <= s.paths.keys()
    for path in (s.model_name_or_path, *s.paths.values()):
        assert path.startswith("sample/") and Path(path).exists()
    assert (s.output_dir, s.results_dir) == ("output/smoke", "results/smoke")


@given(text=st.text(), name=st.text(min_size=1))
@hypothesis_settings(derandomize=True, database=None, deadline=None, max_examples=40)
@example(
    text="จาก Word\u2028ทีละบรรทัด\u2029a\u0085b\x7f\ufeff\ufffe 🙏\t'\"\\#: \\u0e01", name="a\nseed: 1\u2028seed: 2.yaml"
)
def test_config_yaml_reads_back_as_what_was_written(text, name):
    changed = Settings(system_prompt=text, cache_dir=text, paths={"wangchan": text})
    run = settings.Resolved(changed, dict.fromkeys(FIELDS, name), name, None, argparse.Namespace())
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".yaml") as file:
        file.write(run.as_yaml())
        file.flush()
        assert read_yaml(file.name) == vars(changed)


def test_paths_are_filled_in_wherever_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home := tmp_path / "บ้าน ของ, เรา's"))
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv("OUTPUT_DIR", "~/runs")
    home.mkdir()
    (home / "m.yaml").write_text("cache_dir: $SCRATCH/c\npaths: {wangchan: ~/a$, thai_exam: '${HOME}/b,c=d'}\n")
    argv = ["--config", "~/m.yaml", "--results_dir", "$HOME/r", "--paths", "thai_text=~/x, y,wangchan=/z,"]
    run = resolve("", argv)
    s = run.settings
    assert (s.output_dir, s.results_dir, s.cache_dir) == (f"{home}/runs", f"{home}/r", "/scratch/c")
    assert s.paths == {"wangchan": "/z", "thai_exam": f"{home}/b,c=d", "thai_text": f"{home}/x, y"}
    monkeypatch.delenv("OUTPUT_DIR")
    assert resolve("", ["--config", config(tmp_path, run.as_yaml())]).settings == s
    with pytest.raises(UserError) as error:
        run_folder.run_settings(run)
    assert f"--config {shlex.quote(f'{home}/m.yaml')}" in str(error.value)


def test_the_environment_of_other_programs_and_a_terminal_without_thai_change_nothing():
    code = "from ouro.files import call; import os; call(lambda: print('ไทย', os.environ.get('NVIDIA_TF32_OVERRIDE')))"
    theirs = {"ACCELERATE_MIXED_PRECISION": "bf16", "NVIDIA_TF32_OVERRIDE": "1", "TORCHINDUCTOR_CACHE_DIR": "/c"}
    theirs |= {"OPENAI_CUSTOM_HEADERS": "Authorization: Bearer secret", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    removed = sorted(theirs.keys() - {"TORCHINDUCTOR_CACHE_DIR"})
    environment = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    for encoding in ("ascii", "latin-1"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=environment | theirs | {"PYTHONIOENCODING": encoding}
        )
        assert (done.returncode, done.stdout) == (0, rb"\u0e44\u0e17\u0e22 None" + b"\n"), done.stderr
        assert done.stderr.endswith(f": {', '.join(removed)}\n".encode())


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("learning_rat: 1", [], "machine.yaml: unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ("zzz: 1", [], "machine.yaml: unknown setting 'zzz'; known: activation_checkpointing, "),
        ("packing: true", [], f"machine.yaml: packing is not a setting here: {settings.REPLACED['packing']}"),
        ("", ["--per_device_train_batch_size=1"], "command line: per_device_train_batch_size is not a setting here: r"),
        ("r: many", [], "machine.yaml: r must be a whole number, got 'many'"),
        ("r: 1.5", [], "r must be a whole number, got 1.5"),
        ("r: true", [], "r must be a whole number, got True"),
        ("r: 0", [], "r must be at least 1, got 0"),
        ("r: 1e11", [], "r must be at most 2048, got 100000000000"),
        ("learning_rate: .nan", [], "learning_rate must be at least 0, got nan"),
        ("max_steps: 0", [], "max_steps must not be 0 (optimizer steps; -1: as num_train_epochs says)"),
        ("", ["--num_train_epochs", "inf"], "command line: num_train_epochs must be at most 1000000, got inf"),
        ("loss: lst", [], "loss must be one of last, mixture, all, got 'lst'"),
        ("activation_checkpointing: -3", [], "must be one of auto, none, full, a number, got '-3'"),
        ("paths: {thai_tex: x}", [], "machine.yaml: paths: unknown dataset or benchmark 'thai_tex'; did you mean"),
        ("paths: {wangchan: 5}", [], "paths must be name=folder, …, got {'wangchan': 5}"),
        ("", ["--paths", "wangchan=x,wangchan=y"], "paths must be name=folder, …, got 'wangchan=x,wangchan=y'"),
        ("output_dir: $NO_SUCH/x", [], "output_dir: path '$NO_SUCH/x': a variable in it is not set"),
        ("cache_dir: ~nobody-here/x", [], "cache_dir: path '~nobody-here/x': no such user"),
        ("", ["--output_dir", "a\udcff"], r"command line: output_dir must be text, got 'a\udcff'"),
        ('system_prompt: "\\ud800"', [], r"system_prompt must be text or null, got '\ud800'"),
        ("r: 16\nseed: 1\nr: 32", [], "machine.yaml is not valid YAML: 'r' stands twice, first in line 1 in \""),
        ("<<: {r: 8}\nr: 16", [], "machine.yaml: unknown setting '<<'"),
        ("max_grad_norm: .inf", [], "max_grad_norm must be at most "),
        ("paths: {wangchan: a, wangchan: b}", [], "'wangchan' stands twice, first in line 1 in"),
        ("seed: 2020-13-45", [], "seed must be a whole number, got '2020-13-45'"),
        ("bf16: no", [], "bf16 must be true or false, got 'no'"),
        ("model_revision: 1.10", [], "model_revision must be text or null, got 1.1"),
        ("", ["--paths", "thai_text=x", "--paths=wangchan=y"], "command line: --paths is given twice"),
        ("", ["--args=--seed 1 --r 8 --seed 1"], "ARGS: --seed is given twice"),
        ("r: 16\n  x: [", [], "machine.yaml is not valid YAML: "),
        ("- r", [], "machine.yaml must hold 'setting: value' lines, found a list"),
        ("", ["--learning_rat", "1"], "unknown argument '--learning_rat'; did you mean 'learning_rate'?"),
        ("", ["--lr", "1e-4"], "unknown argument '--lr'; did you mean 'learning_rate'?"),
        ("", ["--seed"], "command line: argument --seed: expected one argument"),
        ("", ["--config", "configs/nope.yaml"], "cannot read configs/nope.yaml: No such file"),
        ("", ["--exp", "exp2-wangchan-ut"], "unknown experiment 'exp2-wangchan-ut'; did you mean 'exp2-wangchan-ut1'?"),
        ("", ["--exp", "mine"], "configs/experiments.yaml holds: exp1-wangchan-ut4, exp2-wangchan-ut1, exp3a"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_cure(tmp_path, text, argv, expected):
    with pytest.raises(UserError) as error:
        resolve("", [*([] if "--config" in argv else ["--config", config(tmp_path, text)]), *argv])
    assert expected in str(error.value)


def test_a_run_that_is_there_can_be_named_and_is_listed(tmp_path):
    for name in ("mine", "seed0/exp1-wangchan-ut4"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    place = ["--output_dir", str(tmp_path)]
    assert resolve("", ["--exp", "mine", *place], several=True).run == "mine"
    for several in (True, False):  # a config's own run
        assert resolve("", ["--exp", "smoke", "--config", "configs/smoke.yaml"], several=several).run == "smoke"
    with pytest.raises(UserError, match=f"\n{tmp_path} holds: mine, seed0/exp1-wangchan-ut4$"):
        resolve("", ["--exp", "mein", *place], several=True)
    with pytest.raises(UserError, match="unknown experiment 'mine'"):  # training needs a row
        resolve("", ["--exp", "mine", *place])


def test_values_are_read_alike_from_yaml_and_command_line():
    assert parse("paths", "a=x,b=y=z", "here") == {"a": "x", "b": "y=z"} == parse("paths", {"a": "x", "b": "y=z"}, "")
    assert parse("bf16", "False", "") is False and parse("bf16", True, "") is True
    assert parse("model_revision", "null", "") is None and parse("model_revision", None, "") is None
    assert parse("max_steps", "1e3", "") == 1000 and parse("activation_checkpointing", 3, "") == "3"


def test_yaml_is_read_as_it_is_meant_and_make_may_be_overruled(tmp_path):
    text = "r: 010\nmodel_revision: 0123456\nsystem_prompt: no\nlearning_rate: 1.5e-4\nseed: 1_000\ndataset: on\n"
    s = resolve("", ["--config", config(tmp_path, text), "--max_steps", "9", "--args=--max_steps 7"]).settings
    read = s.r, s.model_revision, s.system_prompt, s.learning_rate, s.seed, s.dataset, s.max_steps
    assert read == (10, "0123456", "no", 1.5e-4, 1000, "on", 7)


def test_paths_of_the_command_line_add_to_the_configs():
    config = ["--config", str(ROOT / "tests/smoke.yaml")]
    before = resolve("", config).settings.paths
    added = resolve("", [*config, "--paths", "thai_text=x,wangchan=y"]).settings.paths
    assert added == before | {"thai_text": "x", "wangchan": "y"}


def test_every_default_is_legal_and_explained():
    for name, field in FIELDS.items():
        assert field.metadata["help"] and field.metadata["changes"] in ("learning", "run", "nothing")
        assert field.metadata.keys() == {"help", "changes", *LIMITS}
        assert parse(name, getattr(Settings(), name), "default") == getattr(Settings(), name)


def test_the_table_in_docs_is_the_one_that_is_printed():
    assert Path("docs/settings.md").read_text() == settings.table(), "python -m ouro.settings > docs/settings.md"


def test_help_tells_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        resolve("", ["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "hold 2 % of the training rows" in " ".join(shown.split())
    assert [name for name in FIELDS if f"--{name} " not in shown] == []


@pytest.mark.parametrize("below", ["", "/run/x"])
def test_a_file_where_a_folder_is_wanted_is_a_mistake(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        call(lambda: write_atomic(f"{tmp_path}/file{below}/config.yaml", ""))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: a file is where a folder is wanted: {tmp_path}/file")


def test_an_exception_that_is_no_mistake_of_the_users_stays_one():
    with pytest.raises(UnicodeDecodeError):
        call(lambda: b"\xff".decode())


@pytest.mark.parametrize("text", ["", "-1", "1:00:00:00", "1:002:03", "1-", "-1:00", "1.5", "nan", "1e3", "x"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError):
        seconds(text)
    with pytest.raises(argparse.ArgumentTypeError, match="is neither seconds nor HH:MM:SS"):
        time_limit(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("01:30", 90), ("36:00:05", 129605), ("1-00:00:00", 86400), ("2-12", 216000), ("1-00:30", 88200)],
)
def test_a_time_limit_is_read_as_slurm_writes_it_or_in_seconds(text, expected):
    assert time_limit(text) == expected
    assert seconds(text) == (5400 if text == "90" else expected), "Slurm's own numbers are minutes"
