"""The Hub: pinned revisions, the published layouts, the cache without a network, and one clear message otherwise.

The project's own code runs against a local Hub (local_hub.py), in two processes that play all scripts of this file,
with and without HF_HUB_OFFLINE: the libraries read that and the Hub's address when they are imported.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import settings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from local_hub import LocalHub
from safetensors.torch import save_file
from tiny_ouro import tiny

from data_config import DATASETS, load_tokenizer
from evaluate import EVALS, load_items
from modeling_ouro import REVISIONS

ROOT = Path(settings.__file__).parent
SAMPLE = ROOT / "sample"
TINY = {file.name: file.read_bytes() for file in (SAMPLE / "ouro-tiny").iterdir()}
MODEL, OTHER_MODEL = "ByteDance/Ouro-2.6B", "ByteDance/Ouro-1.4B"
WANGCHAN, EXAM = "datasets/airesearch/WangchanThaiInstruct", "datasets/scb10x/thai_exam"
OTHER_COMMIT = "0" * 40
SPEC = settings.read_yaml(EVALS)["thai_exam"]
PINNED = REVISIONS | {EXAM: SPEC["revision"], WANGCHAN: DATASETS["wangchan"].revision}
CHAT = [{"role": "user", "content": "สวัสดี"}, {"role": "assistant", "content": "ค่ะ"}]

PLAYER = """
import json, os, runpy, sys, time, traceback
import evaluate, torch
torch.set_num_threads(2)
time.sleep = lambda seconds: None  # huggingface_hub waits 23 s for a server that is not there
commands, sys.stdin = sys.stdin, open(os.devnull)
for line in commands:
    script, *sys.argv[1:] = json.loads(line)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    print(f"\\nexit {code}", flush=True)
"""
LOAD = f"""
import sys, torch
from data_config import load_tokenizer, read_rows
from evaluate import EVALS, load_items
from modeling_ouro import load_ouro
from settings import Settings, read_yaml
name, file = sys.argv[1:]
model = load_ouro(name)
result = {{"weights": model.state_dict(), "logits": model(torch.arange(1, 25).reshape(2, 12)).logits}}
result["commit"] = model.config._commit_hash
if name == "{MODEL}":
    result["chat"] = load_tokenizer(name).apply_chat_template({CHAT})
    result["rows"], result["place"] = read_rows("wangchan", Settings())
    result["items"] = load_items("thai_exam", read_yaml(EVALS)["thai_exam"], None)
torch.save(result, file)
"""


class Player:
    """A process with the project's modules loaded, in which scripts run as by `python script ...`, one at a time."""

    def __init__(self, hub: LocalHub, folder: Path, offline: bool):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "PROXY" not in name.upper()
        }
        hub_settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1"}
        hub_settings |= {"HF_HUB_OFFLINE": str(int(offline)), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        ours = {"CONFIG": "", "REPORT_TO": "", "TOTAL_UT_STEPS": "", "OUTPUT_DIR": str(folder / "output")}
        self.log = folder / f"stderr-{offline}"
        with self.log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PLAYER], env=kept | hub_settings | ours, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip

    def play(self, *command: object) -> tuple[str, str, str]:
        """The exit code, stdout and stderr of one command."""
        os.truncate(self.log, 0)
        self.process.stdin.write(json.dumps([str(part) for part in command]) + "\n")
        self.process.stdin.flush()
        out = ""
        for line in self.process.stdout:
            if line.startswith("exit "):
                return line.split()[1], out.strip(), self.log.read_text()
            out += line
        raise AssertionError(f"the process has ended: {self.log.read_text()}")

    def load(self, model: str, folder: Path) -> dict:
        """What the script LOAD gives."""
        (folder / "load.py").write_text(LOAD, encoding="utf-8")
        code, _, err = self.play(folder / "load.py", model, folder / "result")
        assert code == "0", err
        return torch.load(folder / "result")

    def refusal(self, *command: object) -> str:
        """The message of a command that must end with one: exit code 2, no output, no traceback."""
        code, out, err = self.play(*command)
        assert "Traceback" not in err, err
        assert (code, out, err.count("error: ")) == ("2", "", 1), (code, out, err)
        return err[err.index("error: ") :]


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def archive(subset: str = "") -> bytes:
    """thai_exam.tar.gz as published: data/onet/onet_test.jsonl and so on."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(SAMPLE / "thai_exam/data" / subset, Path("data") / subset)
    return buffer.getvalue()


def parquet(split: str) -> dict[str, bytes]:
    lines = (SAMPLE / f"wangchan/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), buffer)
    return {f"data/{split}-00000-of-00001.parquet": buffer.getvalue()}


def card(rows: int) -> str:
    """The start of a dataset's README.md, from which `datasets` takes splits and files."""
    split = f"- name: train\n    num_bytes: 0\n    num_examples: {rows}"
    return f"---\nlicense: cc-by-sa-4.0\ndataset_info:\n  splits:\n  {split}\n---\n# WangchanThaiInstruct\n"


def checkpoint(model, marker: Path) -> dict[str, bytes | str]:
    """A repository like ByteDance/Ouro-2.6B, whose code leaves a mark and fails if it is ever run."""
    config = model.config.to_dict() | {"torch_dtype": "bfloat16", "transformers_version": "4.55.0"}
    config |= {"architectures": ["OuroForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "early_exit_threshold": 1.0}
    classes = {"AutoModel": "OuroModel", "AutoModelForCausalLM": "OuroForCausalLM"}
    config["auto_map"] = {name: f"modeling_ouro.{cls}" for name, cls in classes.items()}
    config["auto_map"]["AutoConfig"] = "configuration_ouro.OuroConfig"
    code = f"open({str(marker)!r}, 'w').close()\nraise RuntimeError('the remote code ran')\n"
    weights = marker.with_suffix(".safetensors")
    save_file(model.state_dict(), weights, metadata={"format": "pt"})
    return TINY | {
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"bos_token_id": 0, "eos_token_id": 0}),
        "modeling_ouro.py": code,
        "configuration_ouro.py": code,
        "model.safetensors": weights.read_bytes(),
    }


@pytest.fixture(scope="module")
def source():
    return tiny(vocab_size=1024).bfloat16()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub, the processes with and without a network (both use folder/cache), and the folder."""
    folder = tmp_path_factory.mktemp("hub")
    trained = {"model_name_or_path": "a/unfinished", "use_qlora": False, "bf16": False}
    write(folder / "output/run", {"completed": "", "config.yaml": json.dumps(trained)})
    hub = LocalHub()
    players = [Player(hub, folder, offline) for offline in (False, True)]
    yield hub, *players, folder
    for player in players:
        player.process.kill()
        player.process.communicate()
    hub.close()


@pytest.fixture(scope="module")
def loaded(world, source):
    """What LOAD gives online and then offline, each with the requests it made; and whether remote code ran."""
    hub, online, offline, folder = world
    hub.repositories.clear()
    shutil.rmtree(folder / "cache", ignore_errors=True)
    marker = folder / "marker"
    hub.add(MODEL, write(folder / "model", checkpoint(source, marker)), PINNED[MODEL])
    hub.add(MODEL, write(folder / "newer", {"README.md": "a later commit"}), branch="main")
    wangchan = parquet("train") | parquet("test") | {"README.md": "---\nlicense: cc-by-sa-4.0\n---\n"}
    revision = PINNED[WANGCHAN]
    hub.add(WANGCHAN, write(folder / "wangchan", wangchan), revision, branch=None if revision else "main")
    hub.add(EXAM, write(folder / "exam", {"thai_exam.tar.gz": archive()}), PINNED[EXAM])
    found = {}
    for name, player in (("online", online), ("offline", offline)):
        hub.requests.clear()
        found[name] = player.load(MODEL, folder) | {"requests": hub.requests[:]}
    return found | {"remote code ran": marker.exists()}


@pytest.fixture
def empty(world):
    """The same, with no repository on the Hub and nothing in the cache."""
    hub, _, _, folder = world
    hub.repositories.clear()
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return world


# ------------------------------------------------------------------------------------------------ what is published


def test_the_published_checkpoint_loads_bit_equal_without_its_code(loaded, source):
    for name, weight in source.state_dict().items():
        assert torch.equal(loaded["online"]["weights"][name], weight), name
    assert torch.equal(loaded["online"]["logits"], source(torch.arange(1, 25).reshape(2, 12)).logits)
    assert loaded["online"]["logits"].dtype == torch.bfloat16
    assert loaded["online"]["commit"] == REVISIONS[MODEL], "what manifest.json records"
    assert not loaded["remote code ran"]
    assert [r for r in loaded["online"]["requests"] if r.path.endswith(".py") and r.status < 400] == []


def test_model_and_tokenizer_are_asked_for_at_the_pinned_revision_only(loaded):
    asked = [request for request in loaded["online"]["requests"] if request.repo == MODEL]
    sent = {request.path for request in asked if request.status < 400}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sent
    assert [request for request in asked if request.revision != PINNED[MODEL]] == []


def test_a_later_commit_cannot_change_what_is_loaded(empty, source):
    hub, online, _, folder = empty
    marker = folder / "later"
    files = checkpoint(source, marker)
    hub.add(OTHER_MODEL, write(folder / "1.4B", files), PINNED[OTHER_MODEL])
    later = {"custom_generate/generate.py": files["modeling_ouro.py"], "config.json": "{}"}
    later["adapter_config.json"] = json.dumps({"base_model_name_or_path": "a/different-model", "peft_type": "LORA"})
    hub.add(OTHER_MODEL, write(folder / "1.4B-later", later), branch="main")
    assert torch.equal(online.load(OTHER_MODEL, folder)["weights"]["lm_head.weight"], source.lm_head.weight)
    assert not marker.exists()


def test_the_tokenizer_on_the_hub_is_the_local_one(loaded):
    assert loaded["online"]["chat"] == load_tokenizer(str(SAMPLE / "ouro-tiny")).apply_chat_template(CHAT)


def test_a_training_set_on_the_hub_gives_its_train_rows(loaded):
    lines = (SAMPLE / "wangchan/train.jsonl").read_text(encoding="utf-8").splitlines()
    assert loaded["online"]["rows"] == [json.loads(line) for line in lines]
    assert loaded["online"]["place"] == "airesearch/WangchanThaiInstruct"


def test_a_benchmark_on_the_hub_gives_the_items_of_its_local_folder(loaded):
    assert loaded["online"]["items"] == load_items("thai_exam", SPEC, str(SAMPLE / "thai_exam"))
    asked = {(request.revision, request.path) for request in loaded["online"]["requests"] if request.repo == EXAM}
    assert asked == {(PINNED[EXAM], "thai_exam.tar.gz")}


def test_once_downloaded_everything_loads_without_a_network(loaded):
    online, offline = loaded["online"], loaded["offline"]
    assert offline["requests"] == []
    assert torch.equal(offline["logits"], online["logits"])
    assert all(offline[key] == online[key] for key in ("chat", "rows", "items"))


# ------------------------------------------------------------------------------------------------ what is missing

TOKENIZER = ["data_config.py"]  # reads the tokenizer from the Hub first
ROWS = ["data_config.py", "--model_name_or_path", "sample/ouro-tiny"]  # the training set
ITEMS = ["evaluate.py"]  # the benchmark
MINE = ["data_config.py", "--model_name_or_path", "my/model"]
NO_TEMPLATE = {"tokenizer_config.json": TINY["tokenizer_config.json"].replace(b"chat_template", b"other")}
NO_END = {name: content.replace(b"<|im_end|>", b"<|end|>") for name, content in TINY.items()}


@pytest.mark.parametrize(
    ("command", "repository", "files", "message"),
    [
        (TOKENIZER, None, {}, "ByteDance/Ouro-2.6B is not a local folder and is not a valid model identifier"),
        (ROWS, None, {}, "'airesearch/WangchanThaiInstruct' doesn't exist on the Hub or cannot be accessed"),
        (ITEMS, None, {}, "scb10x/thai_exam from the Hub: .*Repository Not Found"),
        (TOKENIZER, f"{MODEL}@{OTHER_COMMIT}", TINY, f"{PINNED[MODEL]} is not a valid git identifier"),
        ([*TOKENIZER, "--model_revision", "v2"], f"{MODEL}@{PINNED[MODEL]}", TINY, "v2 is not a valid git identif"),
        (ROWS, f"{WANGCHAN}@{OTHER_COMMIT}", parquet("train"), r"Revision '\w+' doesn't exist for dataset 'airesea"),
        (ITEMS, f"{EXAM}@{OTHER_COMMIT}", {"thai_exam.tar.gz": archive()}, "Revision Not Found .*thai_exam.tar.gz"),
        (ITEMS, EXAM, {"README.md": ""}, "Entry Not Found .*thai_exam.tar.gz"),
        (ITEMS, EXAM, {"thai_exam.tar.gz": archive("onet")}, "thai_exam.tar.gz holds no ic/ic_test.jsonl"),
        (ITEMS, EXAM, {"thai_exam.tar.gz": b"<html>sign in</html>"}, "thai_exam.tar.gz"),
        (ROWS, WANGCHAN, parquet("test"), "airesearch/WangchanThaiInstruct .* split \"train\""),
        (ROWS, WANGCHAN, parquet("train") | {"README.md": card(rows=5)}, "airesearch/WangchanThaiInstruct"),
        (MINE, "my/model", TINY | NO_TEMPLATE, "the tokenizer of my/model has no chat template"),
        (MINE, "my/model", NO_END, r"the tokenizer of my/model has no token <\|im_end\|>"),
        (MINE, "my/model", {"config.json": TINY["config.json"]}, "the tokenizer of my/model"),
        (MINE, "my/model", TINY | {"tokenizer.json": "<html>sign in</html>"}, "the tokenizer of my/model"),
    ],
    ids=["no model", "no dataset", "no benchmark", "no pinned model revision", "no such model revision"]
    + ["no dataset revision", "no benchmark revision", "no archive", "no file in the archive", "broken archive"]
    + ["no train split", "wrong card", "no chat template", "no end of turn", "no tokenizer", "broken tokenizer"],
)
def test_what_the_hub_lacks_is_named_in_one_message(empty, tmp_path, command, repository, files, message):
    hub, online, *_ = empty
    if repository:
        repo, _, commit = repository.partition("@")
        hub.add(repo, write(tmp_path / "repo", files), commit or PINNED.get(repo), branch=None if commit else "main")
    assert re.search(message, " ".join(online.refusal(*command).split()))


@pytest.mark.parametrize("offline", [False, True], ids=["no server", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (TOKENIZER, "tokenizer of ByteDance/Ouro-2.6B: .*couldn't connect to"),
        (ROWS, "reach 'airesearch/WangchanThaiInstruct' .* --paths wangchan=FOLDER"),
        (ITEMS, "scb10x/thai_exam .* check your connection .* --paths thai_exam=FOLDER"),
    ],
    ids=["tokenizer", "dataset", "benchmark"],
)
def test_without_a_network_and_a_cached_copy_the_message_says_so(empty, command, message, offline):
    hub, *players, _ = empty
    hub.close()
    try:
        assert re.search(message, " ".join(players[offline].refusal(*command).split()))
    finally:
        hub.open()


def test_a_checkpoint_without_weights_is_named_with_and_without_a_network(empty):
    hub, online, offline, folder = empty
    config = {key: value for key, value in json.loads(TINY["config.json"]).items() if key != "init_seed"}
    hub.add("a/unfinished", write(folder / "unfinished", TINY | {"config.json": json.dumps(config)}), branch="main")
    command = [*ITEMS, "--paths", f"thai_exam={SAMPLE / 'thai_exam'}", "--limit", "1"]
    for player in (online, offline):
        message = " ".join(player.refusal(*command).split())
        assert re.search("a/unfinished does not appear to have a file named .*safetensors", message)
