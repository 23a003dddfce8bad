"""What leaves a run: the merged model is the adapted one, the Hub gets what it should, vLLM's command is one.

One run is trained, with NF4 weights, and others are made from it. The scripts run as processes and upload over HTTP to
a local Hub.
"""

import base64
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

from ouro import files
from ouro.files import UserError
from ouro.model.loading import load_ouro, load_run_model
from ouro.model.modeling_ouro import PROJECTIONS
from ouro.settings import REVISIONS, Settings
from ouro.train.run_folder import is_good, seal
from tools.export import merge_adapter, merged_model

import pytest
import torch
from helpers import trained
from local_hub import Handler, LocalHub, Scripts, copy_project
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = "sample/ouro-tiny"
BASE, BASE_COMMIT = "ByteDance/Ouro-2.6B", REVISIONS["ByteDance/Ouro-2.6B"]
IDS = torch.arange(1, 49).reshape(2, 24) * 17 % 1024
NF4, DORA, RSLORA = "exp2-wangchan-ut1", "exp3a-wangchan-ut2", "exp3b-wangchan-ut3"
VARIANTS = {
    NF4: {},  # as trained
    DORA: {"total_ut_steps": 2, "use_qlora": False, "use_dora": True},
    RSLORA: {"total_ut_steps": 3, "use_qlora": False, "use_rslora": True, "r": 12},
}
pytestmark = pytest.mark.usefixtures("in_the_repository")


class WritableHandler(Handler):
    """What an upload asks: who am I, a new repository, is the card valid, which files are large, storage, a commit."""

    def do_POST(self) -> None:
        if self.path.endswith(("/revision/main", "/paths-info/main")):
            return self.do_GET()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.write(self.path.strip("/").split("/"), content)
        self.hub.asked.append((self.command, self.path, status))
        self.send(self.path, status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    do_PUT = do_POST

    def do_GET(self) -> None:
        if self.path != "/api/whoami-v2":
            return super().do_GET()
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        answer = {"name": "somchai", "type": "user"} if known else {"error": "Invalid username or password."}
        self.send(self.path, 200 if known else 401, json.dumps(answer).encode(), {})

    do_HEAD = do_GET

    def answer(self, repo, call, revision, path, form):
        if repo not in self.hub.private:
            return super().answer(repo, call, revision, path, form)
        info = {"id": repo, "sha": "1" * 40, "private": self.hub.private[repo], "siblings": []}
        return 200, json.dumps(info).encode(), {}

    def write(self, parts: list[str], content: bytes) -> tuple[int, dict]:
        hub = self.hub
        if parts[0] == "storage":
            hub.stored[parts[1]] = content
            return 200, {}
        if parts[-1] == "batch":  # of <owner>/<name>.git/info/lfs/objects/batch
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}}
                for o in json.loads(content)["objects"]
            ]
            return (hub.fails, {}) if hub.fails else (200, {"transfer": "basic", "objects": objects})
        if parts[1] == "validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked.get('organization', 'somchai')}/{asked['name']}"
            if not repo.startswith("somchai/"):
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            if repo in hub.private:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}
            hub.private[repo] = asked["private"]
            return 200, {"url": f"{hub.url}/{repo}"}
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [file["path"] for file in json.loads(content)["files"]]
            modes = {file: "lfs" if file.endswith(".safetensors") else "regular" for file in files}
            return 200, {"files": [{"path": f, "uploadMode": m, "shouldIgnore": False} for f, m in modes.items()]}
        files = {}
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
        hub.committed[repo] = files
        return 200, {"commitUrl": f"{hub.url}/{repo}/commit/{'2' * 40}", "commitOid": "2" * 40, "success": True}


class WritableHub(LocalHub):
    """A LocalHub that somchai, with the right token, may also upload to."""

    def __init__(self):
        self.token = "hf_" + "s3cret" * 5
        self.private: dict[str, bool] = {}
        self.committed: dict[str, dict[str, bytes]] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.fails = 0  # the status that storage answers with
        super().__init__()

    def open(self) -> None:
        handler = type("Bound", (WritableHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, in_the_repository):
    hub = WritableHub()
    hub.add(BASE, shutil.copytree(TINY, tmp_path_factory.mktemp("base") / "base"), BASE_COMMIT)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def scripts(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    copy_project(folder / "project")
    scripts = Scripts(hub, folder, modules=("tools.export",))
    few = ["--max_steps", "2", "--eval_steps", "0", "--learning_rate", "0.05", "--activation_checkpointing", "none"]
    trained(folder / "output", "--exp", NF4, *few)
    for name in (DORA, RSLORA):
        another(folder / "output" / NF4, folder / "output" / name, **VARIANTS[name])
    yield scripts
    scripts.close()


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
    """The run's settings, with these changes, which are written."""
    config = files.read_yaml(folder / "config.yaml") | changes
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    return config


def where(folder: Path, name: str) -> list:
    return ["--config", "tests/smoke.yaml", "--exp", name, "--output_dir", folder / "output"]


@pytest.fixture
def run(scripts, tmp_path):
    """Gives a copy of a trained run, in tmp_path."""

    def copy(name: str, **changes) -> Path:
        folder = shutil.copytree(scripts.folder / "output" / name, tmp_path / "output" / name)
        changed(folder, **changes)
        return folder

    return copy


@pytest.fixture
def export(scripts, tmp_path):
    """Does an action with a run of tmp_path; gives what is printed."""
    return lambda action, name, *more, **environment: scripts.output(
        "tools/export.py", action, *where(tmp_path, name), *more, **environment
    )


@pytest.fixture
def refused(scripts, tmp_path):
    """The message with which an action on a run of tmp_path is refused."""
    return lambda name, action="merge": scripts.refusal("tools/export.py", action, *where(tmp_path, name))


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
    assert config == published | {"total_ut_steps": 3, "early_exit_threshold": None}
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2] and "_from_model_config" not in generation
    chat = [{"role": "user", "content": "สวัสดี"}]
    texts = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat, tokenize=False) for f in (merged, TINY)]
    assert texts[0] == texts[1]
    model = AutoModelForCausalLM.from_pretrained(merged, torch_dtype="auto")
    assert model.config.total_ut_steps == 3 and model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [0, 2] and is_good(merged)
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
    assert "is there already" in export("merge", RSLORA, TOTAL_UT_STEPS="2")
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


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_that_looks_whole(scripts, export, run, tmp_path):
    folder = run(RSLORA)
    killed = 0
    for moment in (".", "model.safetensors", "tokenizer.json", "merge.json"):
        process = scripts.start("tools/export.py", "merge", *where(tmp_path, RSLORA))
        while not (folder / ".merged" / moment).exists() and not (folder / "merged").exists():
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)
        code, _, err = scripts.wait()
        if (folder / "merged").exists():  # it was quicker
            assert is_good(folder / "merged")
            shutil.rmtree(folder / "merged")
        else:
            assert code == "-9", err
            killed += 1
    assert killed
    export("merge", RSLORA)
    assert is_good(folder / "merged") and not (folder / ".merged").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_leaves_nothing(scripts, run, tmp_path):
    folder = run(RSLORA)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        shutil.copytree(scripts.folder / "output" / RSLORA, folder, dirs_exist_ok=True)
        code, _, said = scripts.play("tools/export.py", "merge", *where(tmp_path, RSLORA))
        assert code == "2" and said.startswith("error: ") and said.count("\n") == 1
        assert "No space left on device" in said and "2 MB are needed" in said
        assert not list(folder.glob("*merged"))
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_adapter_that_is_not_finite_is_refused(run):
    adapter = run(RSLORA) / "final_adapter"
    weights = load_file(adapter / "adapter_model.safetensors")
    next(p for n, p in weights.items() if "lora_B" in n)[0, 0] = torch.inf
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="cannot be merged: NaN"):
        merged_model(plain(adapter.parent), adapter, None, 4)


@pytest.mark.parametrize("action", ["merge", "push", "serve"])
def test_unknown_and_unfinished_experiments_are_refused(refused, run, action):
    assert "unknown experiment 'exp9'" in refused("exp9", action)
    (run(NF4) / "completed").unlink()
    assert "started but not finished" in refused(NF4, action)


def test_a_run_whose_manifest_is_gone_is_refused(refused, run):
    (run(RSLORA) / "manifest.json").unlink()
    assert f"{RSLORA}/manifest.json does not say which base the run was trained on" in refused(RSLORA)


# -------------------------------------------------------------------------------------------------------------- push


@pytest.fixture
def push(scripts, hub, tmp_path):
    """Pushes a run of tmp_path; gives what is printed, or the refusal, after which nothing is uploaded."""

    def play(repo: str | None, *options: str, refused: bool = False, token: str = hub.token) -> str:
        before, named = dict(hub.committed), ["--repo", repo] if repo else []
        command = ["tools/export.py", "push", *where(tmp_path, RSLORA), *named, *options]
        printed = (scripts.refusal if refused else scripts.output)(*command, HF_TOKEN=token)
        assert hub.token not in printed and (hub.committed == before or not refused)
        return printed

    return play


def test_the_adapter_is_uploaded_with_tokenizer_and_card_to_a_private_repository(push, hub, run):
    adapter = run(RSLORA, model_name_or_path=BASE) / "final_adapter"
    printed = push("somchai/ouro-thai")
    files = {file.name: file.read_bytes() for file in adapter.iterdir() if file.name != "SHA256SUMS"}
    assert hub.committed["somchai/ouro-thai"] == files
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert hub.private["somchai/ouro-thai"] is True
    assert "as somchai to somchai/ouro-thai (private)" in printed and "/somchai/ouro-thai/commit/222" in printed
    push("somchai/ouro-thai")  # again
    hub.private["somchai/known"] = False
    assert "exists and is public" in push("somchai/known", refused=True)
    assert "(public)" in push("somchai/known", "--public")


def test_the_merged_model_is_uploaded_on_request(push, export, hub, run):
    merged = run(RSLORA) / "merged"
    assert f"{TINY}, which nobody else has" in push("somchai/all", refused=True)
    assert f"make merge EXP={RSLORA}" in push("somchai/all", "--merged", refused=True)
    export("merge", RSLORA)
    push("somchai/all", "--merged", "--public")
    files = hub.committed["somchai/all"]
    assert files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert not {"SHA256SUMS", "merge.json"} & files.keys() and hub.private["somchai/all"] is False


def test_what_the_hub_refuses_is_one_message(push, hub, run, monkeypatch):
    run(RSLORA, model_name_or_path=BASE)
    assert "no token for the Hub" in push("somchai/new", refused=True, token="")
    assert "does not know the token (401)" in push("somchai/new", refused=True, token="hf_wrong")
    assert "(403): it needs write access, and another must be you" in push("another/new", refused=True)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "fails", 507)
        assert "the Hub answered 507" in push("somchai/new", refused=True)
    hub.close()
    try:
        assert f"no connection to {hub.url}" in push("somchai/new", refused=True)
    finally:
        hub.open()


@pytest.mark.parametrize("repo", [None, "ouro-thai", "a/b/c", "somchai/../x", "somchai/what?"])
def test_a_repository_without_a_good_name_is_refused(push, run, repo):
    run(RSLORA, model_name_or_path=BASE)
    assert f"name the repository as USER/NAME, got {repo!r}" in push(repo, refused=True)


# ------------------------------------------------------------------------------------------------------------- serve


def commands(printed: str) -> list[list[str]]:
    """The arguments of each vllm command, as a shell passes them."""
    script = 'vllm() { printf "%s\\0" "$@"; printf "\\1"; }\n' + printed
    out = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    found = [part.split("\0")[:-1] for part in out.split("\1")[:-1]]
    joined = printed.replace("\\\n", "").splitlines()
    assert found == [shlex.split(line)[1:] for line in joined if not line.startswith("#")]
    return found


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_vllm_is_told_adapter_depth_rank_and_pinned_base(export, run, tmp_path):
    folder = run(RSLORA, model_name_or_path=BASE, max_length=4096)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"model_commit": BASE_COMMIT}))
    printed = export("serve", RSLORA)
    (arguments,) = commands(printed)
    assert arguments[:2] == ["serve", BASE]
    assert option(arguments, "--revision") == option(arguments, "--code-revision") == BASE_COMMIT
    assert json.loads(option(arguments, "--hf-overrides")) == {"total_ut_steps": 3}
    assert option(arguments, "--dtype") == "bfloat16" and option(arguments, "--max-model-len") == "4096"
    assert "--enable-lora" in arguments and option(arguments, "--max-lora-rank") == "16", "12 is no rank of vLLM's"
    assert option(arguments, "--lora-modules") == f"{RSLORA}={folder / 'final_adapter'}"
    generation = json.loads((Path(option(arguments, "--generation-config")) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    # K and V of 4 layers, 2 heads of 64, 2 bytes: 2048 bytes a loop
    assert "0.00586 MiB a token at depth 3, 0.00195 a loop; 0.0234 GiB for 4096 tokens" in printed
    deeper = export("serve", RSLORA, "--total_ut_steps", 4)
    assert json.loads(option(commands(deeper)[0], "--hf-overrides")) == {"total_ut_steps": 4}
    (tmp_path / "output/seed1").mkdir()
    moved = folder.rename(tmp_path / "output/seed1" / RSLORA)  # as a sweep with SEEDS has it
    (arguments,) = commands(export("serve", f"seed1/{RSLORA}"))
    assert option(arguments, "--lora-modules") == f"seed1/{RSLORA}={moved / 'final_adapter'}"


def test_vllm_serves_the_merged_model_too(export, run):
    folder = run(NF4)
    export("merge", NF4)
    printed = export("serve", NF4)
    adapter, merged = commands(printed)
    assert "trained beside nf4 weights" in printed
    assert "--revision" not in adapter and option(adapter, "--lora-modules").startswith(f"{NF4}=/")
    assert merged[:2] == ["serve", str(folder / "merged")] and option(merged, "--served-model-name") == NF4
    assert "--enable-lora" not in merged and option(merged, "--code-revision") == BASE_COMMIT
    assert json.loads(option(merged, "--hf-overrides")) == {"total_ut_steps": 1}


def test_a_dora_adapter_is_served_merged_or_not_at_all(export, refused, run):
    run(DORA)
    assert f"vLLM cannot serve adapters with DoRA: make merge EXP={DORA}" in refused(DORA, "serve")
    export("merge", DORA)
    (merged,) = commands(export("serve", DORA))
    assert merged[1].endswith("/merged")
