"""What leaves a run: the merged model is the adapted one, the Hub gets what it should, vLLM's command is one.

One run is trained, with NF4 weights, and others are made from it. The Hub is a local one, asked by its own client.
"""

import errno
import json
import math
import re
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from ouro import files
from ouro.files import UserError, damage, file_sha256, seal
from ouro.model.loading import load_ouro, load_run_model, read_config
from ouro.model.modeling_ouro import PROJECTIONS
from ouro.settings import REVISIONS, Settings, begun_with
from tools import export as exporting
from tools.card import TRIED, WHEEL, metadata
from tools.export import merge_adapter, merged_model

import pytest
import torch
import yaml
from helpers import trained
from huggingface_hub import HfApi, ModelCard, constants
from local_hub import LocalHub
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = "sample/ouro-tiny"
MODEL = Path("ouro/model/modeling_ouro.py")
BASE, BASE_COMMIT = "ByteDance/Ouro-2.6B", REVISIONS["ByteDance/Ouro-2.6B"]
IDS = torch.arange(1, 49).reshape(2, 24) * 17 % 1024
NF4, DORA, RSLORA = "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "exp3b-wangchan-ut3"
VARIANTS = {
    NF4: {},  # as trained
    DORA: {"total_ut_steps": 2, "use_qlora": False, "use_dora": True},
    RSLORA: {"total_ut_steps": 3, "use_qlora": False, "use_rslora": True, "r": 12},
}
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, in_the_repository):
    """The folder of one run of each variant."""
    folder = tmp_path_factory.mktemp("export")
    few = ["--max_steps", "2", "--eval_steps", "0", "--learning_rate", "0.05", "--activation_checkpointing", "none"]
    trained(folder, "--exp", NF4, *few)
    for name in (DORA, RSLORA):
        another(folder / NF4, folder / name, **VARIANTS[name])
    return folder


def another(run: Path, folder: Path, **changes) -> None:
    """A run as another, but for these settings and an adapter that is drawn, not trained."""
    shutil.copytree(run, folder)
    config = changed(folder, **changes)
    names = ("r", "lora_alpha", "use_rslora", "use_dora")
    lora = LoraConfig(**{name: config[name] for name in names}, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(load_ouro(TINY, dtype=torch.float32), lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
        elif "magnitude" in name:
            p.data *= 0.5 + torch.rand(p.shape)
    model.save_pretrained(folder / "final_adapter")
    reseal(folder / "final_adapter")


def changed(folder: Path, **changes) -> dict:
    """The run's settings, with these changes, which are written, as if it had begun with them."""
    config = files.read_yaml(folder / "config.yaml") | changes
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"settings": begun_with(Settings(**config))}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return config


@pytest.fixture
def run(runs, tmp_path):
    """Gives a copy of a trained run, in tmp_path."""

    def copy(name: str, **changes) -> Path:
        folder = shutil.copytree(runs / name, tmp_path / name)
        changed(folder, **changes)
        return folder

    return copy


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Does an action with a run of tmp_path, in this process; gives what is printed."""

    def do(action: str, name: str, *more: object) -> str:
        where = ["--config", "tests/smoke.yaml", "--exp", name, "--output_dir", tmp_path]
        monkeypatch.setattr(sys, "argv", ["export.py", action, *map(str, [*where, *more])])
        capsys.readouterr()
        exporting.main()
        return capsys.readouterr().out

    return do


@pytest.fixture
def refused(export):
    """The message with which an action is refused."""

    def do(name: str, action: str = "merge", *more: object) -> str:
        with pytest.raises(UserError) as error:
            export(action, name, *more)
        return str(error.value)

    return do


def reseal(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    seal(folder)


def plain(folder: Path) -> Settings:
    """The run's settings, but for the weights that it is merged into."""
    return replace(Settings(**files.read_yaml(folder / "config.yaml")), use_qlora=False)


# ------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("name", VARIANTS)
def test_the_merged_model_is_the_adapted_one_at_every_depth(export, run, name):
    folder = run(name)
    printed = export("merge", name)
    assert ("unquantised" in printed) == (name == NF4) and f"{folder / 'merged'}, 2 MB" in printed
    card = (folder / "merged/README.md").read_text()
    assert ("trained beside weights in nf4 and is merged into the unquantised ones" in card) == (name == NF4)
    base = load_ouro(TINY, dtype=torch.float32)
    adapted = load_run_model(plain(folder), folder / "final_adapter", fused=False)
    expected = {k: adapted(input_ids=IDS, total_ut_steps=k).logits for k in (1, 2, 3, 4)}
    exact, saved = merge_adapter(adapted), load_ouro(str(folder / "merged"), dtype=torch.float32)
    for k, logits in expected.items():
        scale = logits.abs().max()
        assert (logits - base(IDS, total_ut_steps=k).logits).abs().max() > 0.1 * scale, "the adapter must matter"
        assert (exact(IDS, total_ut_steps=k).logits - logits).abs().max() < 1e-4 * scale
        assert (saved(IDS, total_ut_steps=k).logits - logits).abs().max() < 0.05 * scale
    for tensor, rounded in zip(exact.state_dict().values(), saved.state_dict().values(), strict=True):
        assert torch.equal(tensor.bfloat16().float(), rounded)


def test_bf16_weights_are_summed_in_fp32_and_rounded_once(run):
    adapter = run(RSLORA, bf16=True) / "final_adapter"
    merged = merged_model(plain(adapter.parent), adapter, None, 4).state_dict()
    factors, base = load_file(adapter / "adapter_model.safetensors"), load_ouro(TINY).state_dict()
    changes = 0
    for name, weight in base.items():
        a, b = (factors.get(f"base_model.model.{name[:-7]}.lora_{x}.weight") for x in "AB")
        delta = 0 if a is None else (b.double() @ a.double()) * 32 / math.sqrt(12)
        assert merged[name].dtype == torch.bfloat16
        different = merged[name] != (weight.double() + delta).bfloat16()
        assert different.double().mean() < 1e-3  # sums so near a tie that fp32 is not enough
        changes += a is not None
    assert changes == 7 * 4


def test_the_merged_folder_is_a_model_folder_like_the_published_one(export, run):
    merged = run(RSLORA) / "merged"
    export("merge", RSLORA)
    weights, base = load_file(merged / "model.safetensors"), load_ouro(TINY).state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in base.items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    config, published = (json.loads((place / "config.json").read_text()) for place in (merged, Path(TINY)))
    del published["init_seed"]  # with it, missing weights would be random ones
    elsewhere = published.pop("auto_map")  # in the published folders' own files
    assert config.pop("auto_map") == {auto: f"modeling_ouro.{x.rpartition('.')[2]}" for auto, x in elsewhere.items()}
    assert config == published | {"total_ut_steps": 3, "early_exit_threshold": None}
    assert (merged / "modeling_ouro.py").read_bytes() == MODEL.read_bytes()
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2] and "_from_model_config" not in generation
    chat = [{"role": "user", "content": "สวัสดี"}]
    texts = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat, tokenize=False) for f in (merged, TINY)]
    assert texts[0] == texts[1]
    model = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="auto")
    assert model.config.total_ut_steps == 3 and model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [0, 2] and damage(merged) is None
    card = (merged / "README.md").read_text()
    assert "Apache-2.0: 204 rows" in card and "base_model:" not in card and "ouro-tiny (a local folder)" in card


def test_a_folder_merged_at_another_depth_is_left_alone_or_refused(export, refused, run):
    folder = run(RSLORA)
    merged, weights = folder / "merged", folder / "final_adapter/adapter_model.safetensors"
    export("merge", RSLORA, "--total_ut_steps", 2)
    assert load_ouro(str(merged)).config.total_ut_steps == 2
    assert "trained at `total_ut_steps = 3`" in " ".join((merged / "README.md").read_text().split())
    assert f"total_ut_steps 2, not 3): rm -r {merged}" in refused(RSLORA)
    before = (merged / "model.safetensors").stat().st_mtime_ns
    assert "is there already" in export("merge", RSLORA, "--total_ut_steps", 2)
    assert (merged / "model.safetensors").stat().st_mtime_ns == before
    original = weights.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    assert "final_adapter is damaged or was changed" in refused(RSLORA)
    reseal(weights.parent)
    assert "merged holds another model (adapter_sha256 " in refused(RSLORA)
    weights.write_bytes(original)
    reseal(weights.parent)
    (merged / "merge.json").write_text("{")
    assert "merged is damaged or was changed" in refused(RSLORA)
    shutil.rmtree(merged)
    merged.mkdir()
    assert "merged is damaged or was changed" in refused(RSLORA)


def test_cards_name_the_versions_that_were_tried():
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", Path("docs/clients.md").read_text(encoding="utf-8"), re.MULTILINE)
    tried = {"lm-eval": "lm-evaluation-harness", "vLLM": "vLLM (CPU), with the plugin"}
    for name, versions in TRIED.items():
        assert versions.split(", ") == [version for row, version in rows if row == tried.get(name, name)]


@pytest.mark.parametrize("last", ["write_atomic", "seal"])
def test_an_interrupted_merge_leaves_nothing(export, run, monkeypatch, last):
    folder = run(RSLORA)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, last, raising(KeyboardInterrupt()))
        export("merge", RSLORA)
    assert not list(folder.glob("*merged*"))
    export("merge", RSLORA)
    assert damage(folder / "merged") is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), SafetensorError("No space left")], ids=repr)
def test_a_full_disk_is_one_message_and_leaves_nothing(refused, run, monkeypatch, error):
    folder = run(RSLORA)
    monkeypatch.setattr(exporting, "write_json", raising(error))
    message = refused(RSLORA)
    assert "No space left" in message and "2 MB are needed" in message and "\n" not in message
    assert not list(folder.glob("*merged"))


def raising(error: BaseException):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("action", ["merge", "push", "serve"])
def test_unknown_and_unfinished_experiments_and_a_run_without_a_manifest_are_refused(refused, run, action):
    assert "unknown experiment 'exp9'" in refused("exp9", action)
    folder = run(NF4, model_name_or_path=BASE)
    if action != "push":
        (folder / "manifest.json").unlink()
        assert "manifest.json: No such file" in refused(NF4, action)
    (folder / "completed").unlink()
    assert "started but not finished" in refused(NF4, action)


# -------------------------------------------------------------------------------------------------------------- push


TOKEN = "hf_" + "s3cret" * 5


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on which TOKEN is somchai, who may write under that name alone."""
    hub = LocalHub()
    hub.writers[TOKEN] = ("somchai", tmp_path / "hub")
    monkeypatch.setattr(exporting, "HfApi", lambda: HfApi(hub.url, token=TOKEN))
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("ENDPOINT", hub.url)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(exporting, "get_token", lambda: TOKEN)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits between attempts
    yield hub
    hub.close()


@pytest.fixture
def push(hub, export, refused):
    """Pushes the run RSLORA; gives what is printed, or the refusal, after which nothing is committed."""

    def play(repo: str, *options: str, refusal: bool = False) -> str:
        before = {name: revisions["main"] for name, revisions in hub.repositories.items()}
        options = ("--repo", repo, *options)
        printed = refused(RSLORA, "push", *options) if refusal else export("push", RSLORA, *options)
        assert "s3cret" not in printed
        assert not refusal or all(hub.repositories[name]["main"] == commit for name, commit in before.items())
        return printed

    return play


def committed(hub: LocalHub, repo: str) -> dict[str, bytes]:
    """The files of a repository's main branch."""
    _, folder = hub.repositories[repo]["main"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files.pop(".gitattributes")
    return files


def front_matter(card: bytes) -> dict:
    return ModelCard(card.decode()).data.to_dict()


def test_the_adapter_is_uploaded_with_tokenizer_code_and_card_to_a_private_repository(push, hub, run):
    adapter = run(RSLORA, model_name_or_path=BASE) / "final_adapter"
    files = {file.name: file.read_bytes() for file in (*adapter.iterdir(), MODEL) if file.name != "SHA256SUMS"}
    (adapter / ".DS_Store").touch()  # a file browser's
    printed = push("somchai/ouro-thai")
    there = committed(hub, "somchai/ouro-thai")
    about = front_matter(there.pop("README.md"))
    assert there == {name: content for name, content in files.items() if name != "README.md"}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    told = {"base_model": BASE, "base_model_relation": "adapter", "library_name": "peft", "license": "apache-2.0",
            "language": "th", "pipeline_tag": "text-generation"}  # fmt: skip
    assert about.items() >= told.items() and hub.private["somchai/ouro-thai"] is True
    assert "to somchai/ouro-thai (private)" in printed and "/somchai/ouro-thai/commit/" in printed
    hub.private["somchai/ouro-thai"] = False
    assert "exists and is public" in push("somchai/ouro-thai", refusal=True)
    assert "(public)" in push("somchai/ouro-thai", "--public")


def test_a_push_that_is_repeated_changes_nothing_and_one_that_was_cut_off_is_made_whole(push, hub, run):
    adapter = run(RSLORA, model_name_or_path=BASE) / "final_adapter"
    hub.cut_uploads = True
    assert f"no connection to {hub.url}, or it broke" in push("somchai/new", refusal=True)
    assert committed(hub, "somchai/new") == {} and hub.large == {}
    hub.cut_uploads = False
    push("somchai/new")
    commit = hub.repositories["somchai/new"]["main"]
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert committed(hub, "somchai/new")["adapter_model.safetensors"] == weights
    push("somchai/new")
    assert hub.repositories["somchai/new"]["main"] == commit


def test_the_merged_model_is_uploaded_on_request(push, export, hub, run):
    merged = run(RSLORA) / "merged"
    assert f"{TINY}, which nobody else has" in push("somchai/all", refusal=True)
    assert f"make merge EXP={RSLORA}" in push("somchai/all", "--merged", refusal=True)
    export("merge", RSLORA)
    push("somchai/all", "--merged", "--public")
    files = committed(hub, "somchai/all")
    assert files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json", WHEEL} <= files.keys()
    assert files["modeling_ouro.py"] == MODEL.read_bytes() and b'from_pretrained("somchai/all"' in files["README.md"]
    assert not {"SHA256SUMS", "merge.json"} & files.keys() and hub.private["somchai/all"] is False
    changed(merged.parent, model_name_or_path=BASE)
    assert "holds another kind of model (config.json)" in push("somchai/all", "--public", refusal=True)


def test_the_card_holds_the_scores_of_this_adapter_at_its_depth_and_where_the_rows_are_from(push, hub, run, tmp_path):
    adapter = run(RSLORA, model_name_or_path=BASE) / "final_adapter"
    report = adapter.parent / "data_report.json"
    licences = {"CC-BY-NC-4.0": 3, "CC-BY-SA-4.0": 1}
    report.write_text(json.dumps(json.loads(report.read_text()) | {"data_revision": "d" * 40, "licences": licences}))
    sha256 = file_sha256(adapter / "adapter_model.safetensors")
    study = {"task": "thai_exam", "benchmark": "thai_exam", "metric": "accuracy", "protocol": "ours", "split": "test",
             "precision": "bf16", "total_ut_steps": 3, "limit": None, "part": None, "value": 0.25,
             "benchmark_revision": "e" * 40, "adapter_sha256": sha256}  # fmt: skip
    others = {"limit": 5, "part": "5 of 9 items", "adapter_sha256": "0", "benchmark_revision": None, "value": None}
    results = {"thai_exam-ut3": study, "thai_exam-ut1": study | {"total_ut_steps": 1}}
    results |= {f"{name}-ut3": study | {name: value} for name, value in others.items()}
    for name, content in results.items():
        files.write_json(tmp_path / "results" / RSLORA / f"{name}.json", {"study": content})
    push("somchai/scored", "--results_dir", str(tmp_path / "results"))
    there = committed(hub, "somchai/scored")
    about = front_matter(there["README.md"])
    assert about["license_name"] == "apache-2.0-and-cc-by-nc-4.0-and-cc-by-sa-4.0" and about["license"] == "other"
    assert about["datasets"] == ["airesearch/WangchanThaiInstruct"]
    ((result,),) = (model["results"] for model in about["model-index"])
    dataset = {"name": "thai_exam", "type": "scb10x/thai_exam", "split": "test", "revision": "e" * 40}
    assert result["dataset"] == dataset and result["metrics"][0]["value"] == 0.25
    score_file, result_file = ".eval_results/thai_exam.yaml", "results/results_thai_exam_ut3.json"
    assert sorted(name for name in there if "/" in name) == [score_file, result_file]
    (score,) = yaml.safe_load(there[score_file])
    assert score["dataset"] == {"id": "scb10x/thai_exam", "task_id": "thai_exam", "revision": "e" * 40}
    assert score["value"] == 0.25 and score["source"]["url"] == f"{hub.url}/somchai/scored/blob/main/{result_file}"


def test_the_card_names_rows_of_ones_own_that_came_from_the_hub():
    report = {"data_revision": "d" * 40, "dataset": "own", "licences": {}}
    for settings in (Settings(dataset_path="me/rows"), Settings(paths={"own": "me/rows"})):
        assert metadata("x", settings, report, {}, None, merged=False).datasets == ["me/rows"]


def test_what_the_hub_refuses_is_one_message(push, hub, run, monkeypatch):
    run(RSLORA, model_name_or_path=BASE)
    assert "(403): it needs write access, and another must be you" in push("another/new", refusal=True)
    hub.writers.clear()
    assert "does not know the token (401)" in push("somchai/new", refusal=True)
    hub.close()
    assert f"no connection to {hub.url}" in push("somchai/new", refusal=True)
    hub.open()
    monkeypatch.setattr(exporting, "get_token", lambda: None)
    assert "no token for the Hub" in push("somchai/new", refusal=True)
    for repo in ("", "ouro-thai", "somchai/../x"):
        assert f"name the repository as USER/NAME, got {repo!r}" in push(repo, refusal=True)


# ------------------------------------------------------------------------------------------------------------- serve


def commands(printed: str) -> list[list[str]]:
    """The arguments of each vllm command, as a shell passes them."""
    lines = [line for line in printed.replace("\\\n", "").splitlines() if not line.startswith("#")]
    found = [shlex.split(line) for line in lines]
    found = [words[words[0] == "VLLM_USE_V2_MODEL_RUNNER=0" :] for words in found]
    assert all(words[0] == f"PYTHONPATH={exporting.PLUGIN}" and words[1] == "vllm" for words in found)
    return [arguments for _, _, *arguments in found]


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_vllm_is_told_adapter_depth_rank_and_pinned_base(export, run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "read_config", lambda *_: read_config(TINY, None))  # as of the base, which is away
    folder = run(RSLORA, model_name_or_path=BASE, max_length=4096)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"model_commit": BASE_COMMIT}))
    printed = export("serve", RSLORA)
    (arguments,) = commands(printed)
    assert arguments[:2] == ["serve", BASE]
    assert option(arguments, "--revision") == BASE_COMMIT and "--trust-remote-code" not in arguments
    assert json.loads(option(arguments, "--hf-overrides")) == {"total_ut_steps": 3}
    assert option(arguments, "--dtype") == "bfloat16" and option(arguments, "--max-model-len") == "8192"
    assert "--enable-lora" in arguments and option(arguments, "--max-lora-rank") == "16", "12 is no rank of vLLM's"
    assert option(arguments, "--lora-modules") == f"{RSLORA}:3={folder / 'final_adapter'}"
    assert option(arguments, "--served-model-name") == f"{BASE}:3"
    generation = json.loads((Path(option(arguments, "--generation-config")) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    # K and V of 4 layers, 2 heads of 64, 2 bytes: 2048 bytes a loop
    assert "0.00586 MiB a token at depth 3, 0.0469 GiB for 8192 tokens" in printed
    deeper = export("serve", RSLORA, "--total_ut_steps", 4)
    assert json.loads(option(commands(deeper)[0], "--hf-overrides")) == {"total_ut_steps": 4}
    assert f"clients ask for model '{RSLORA}:4'" in deeper
    any_depth = export("serve", RSLORA, "--by_request")
    assert f"clients ask for model '{RSLORA}:1-3'" in any_depth and "\nVLLM_USE_V2_MODEL_RUNNER=0 " in any_depth
    overrides = json.loads(option(commands(any_depth)[0], "--hf-overrides"))
    assert overrides == {"total_ut_steps": 3, "depth_by_request": True}
    (tmp_path / "seed1").mkdir()
    moved = folder.rename(tmp_path / "seed1" / RSLORA)  # as a sweep with SEEDS has it
    (arguments,) = commands(export("serve", f"seed1/{RSLORA}"))
    assert option(arguments, "--lora-modules") == f"seed1/{RSLORA}:3={moved / 'final_adapter'}"


def test_vllm_serves_the_merged_model_too(export, run):
    folder = run(NF4)
    export("merge", NF4)
    printed = export("serve", NF4)
    adapter, merged = commands(printed)
    assert "trained beside nf4 weights" in printed
    assert "--revision" not in adapter and option(adapter, "--lora-modules").startswith(f"{NF4}:1=/")
    assert merged[:2] == ["serve", str(folder / "merged")] and option(merged, "--served-model-name") == f"{NF4}:1"
    assert "--enable-lora" not in merged
    assert json.loads(option(merged, "--hf-overrides")) == {"total_ut_steps": 1}


def test_what_is_printed_last_is_run_as_it_stands_where_vllm_is(export, refused, run, monkeypatch):
    run(NF4)
    ran = []
    monkeypatch.setattr(exporting.os, "execvp", lambda *command: ran.append(command))
    monkeypatch.setattr(exporting.shutil, "which", lambda _: None)
    assert "there is no vllm in PATH" in refused(NF4, "serve", "--run") and not ran
    monkeypatch.setattr(exporting.shutil, "which", lambda name: name)
    printed = export("serve", NF4, "--run")
    ((_, (*_, command)),) = ran
    assert command.startswith("PYTHONPATH=") and printed.endswith(f"{command}\n")


def test_a_dora_adapter_is_served_merged_or_not_at_all(export, refused, run):
    run(DORA)
    assert f"vLLM cannot serve adapters with DoRA: make merge EXP={DORA}" in refused(DORA, "serve")
    export("merge", DORA)
    (merged,) = commands(export("serve", DORA))
    assert merged[1].endswith("/merged")
