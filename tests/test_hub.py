"""The Hub: pinned revisions, the published layouts, `make fetch`, the cache without a network, and clear messages.

The project's own scripts run against a local Hub (local_hub.py), each in a process, with and without HF_HUB_OFFLINE.
Its repositories are laid out like the published ones, and hold code and pickles besides.
"""

import contextlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

from ouro import files
from ouro.data import fetch
from ouro.evaluate.benchmarks import load_items
from ouro.model.loading import load_tokenizer
from ouro.settings import DATASETS, EVALS, REVISIONS, Settings

import pytest
import torch
from helpers import ROOT, read_jsonl
from huggingface_hub.hf_api import RepoSibling
from local_hub import LocalHub, Scripts, copy_project, shards, write
from safetensors.torch import save_file
from tiny_ouro import tiny

SAMPLE = ROOT / "sample"
TINY = {file.name: file.read_bytes() for file in (SAMPLE / "ouro-tiny").iterdir()}
MODEL = "ByteDance/Ouro-2.6B"
WANGCHAN, EXAM = "datasets/airesearch/WangchanThaiInstruct", "datasets/scb10x/thai_exam"
OPEN = "datasets/iapp/openthaieval"
OTHER_COMMIT = "0" * 40
BENCHMARKS = {name: entry for name, entry in files.read_yaml(EVALS)["benchmarks"].items() if "hub_id" in entry}
SPEC, TRAINING = BENCHMARKS["thai_exam"], ("wangchan", "synthetic", "r1", "smol-smoltalk", "r1-english")
PINNED = REVISIONS | {EXAM: SPEC["revision"]}
REPO = {
    name: f"datasets/{(files.read_yaml(DATASETS) | BENCHMARKS)[name]['hub_id']}" for name in (*TRAINING, *BENCHMARKS)
}
REPO["model"] = MODEL
FETCH = "ouro/data/fetch.py"
UNWANTED = (".py", ".bin", ".pt", ".pkl")
CHAT = [{"role": "user", "content": "สวัสดี"}, {"role": "assistant", "content": "ค่ะ"}]
LOCAL_MODEL = ["--model_name_or_path", "sample/ouro-tiny", "--max_length", "4096", "--length_policy", "drop"]
REPORT = ["data_config.py", *LOCAL_MODEL, "--overlap", "none"]  # reads the training set and nothing else
ROWS, TEST = read_jsonl(SAMPLE / "wangchan/train.jsonl"), read_jsonl(SAMPLE / "wangchan/test.jsonl")

LOAD = f"""
import sys, torch
from ouro.data.formats import read_file
from ouro.data.sources import find_source
from ouro.evaluate.benchmarks import load_items
from ouro.files import read_yaml
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.settings import EVALS, Settings
model, source = load_ouro("{MODEL}"), find_source(Settings())
torch.save({{
    "weights": model.state_dict(),
    "logits": model(torch.arange(1, 25).reshape(2, 12)).logits,
    "commit": model.config._commit_hash,
    "chat": load_tokenizer("{MODEL}").apply_chat_template({CHAT}),
    "rows": [row for part in source.files["train"] for _, row in read_file(part)],
    "held out": [row for part in source.files["held_out"] for _, row in read_file(part)],
    "items": load_items("thai_exam", read_yaml(EVALS)["benchmarks"]["thai_exam"], None),
}}, sys.argv[1])
"""


def load(scripts: Scripts) -> dict:
    """What the script LOAD gives."""
    write(scripts.folder, {"load.py": LOAD})
    scripts.output(scripts.folder / "load.py", scripts.folder / "result")
    return torch.load(scripts.folder / "result")


def report(scripts: Scripts, *command: object) -> dict:
    """The data report that a command writes, tokenised afresh unless it names a --cache_dir."""
    folder = scripts.folder
    for old in ("rows", "output"):
        shutil.rmtree(folder / old, ignore_errors=True)
    cache = [] if "--cache_dir" in command else ["--cache_dir", folder / "rows"]
    scripts.output(*command, *cache, "--output_dir", folder / "output")
    (written,) = (folder / "output/data-report").glob("*.json")
    return json.loads(written.read_text(encoding="utf-8"))


def tokens(report: dict) -> bytes:
    return (Path(report["cache"]) / "rows.arrow").read_bytes()


def configure(scripts: Scripts, **revisions: str) -> None:
    """Pins training sets in the project's configs/datasets.yaml, as a user would; all others are as published."""
    entries = files.read_yaml(DATASETS)
    for name, revision in revisions.items():
        entries[name]["revision"] = revision
    (scripts.folder / "project/configs/datasets.yaml").write_text(json.dumps(entries), encoding="utf-8")


@contextlib.contextmanager
def closed(hub: LocalHub):
    hub.close()
    try:
        yield
    finally:
        hub.open()


def archive(subset: str = "") -> bytes:
    """thai_exam.tar.gz as published: data/onet/onet_test.jsonl and so on."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(SAMPLE / "thai_exam/data" / subset, Path("data") / subset)
    return buffer.getvalue()


CARD = """---
license: cc-by-sa-4.0
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: paper
  data_files:
  - {split: train, path: paper/train-*}
  - {split: test, path: paper/test-*}
---
# WangchanThaiInstruct
"""
R1_CARD = """---
configs:
- {config_name: v0, data_files: [{split: train, path: v0/train-*}]}
- {config_name: v1, data_files: [{split: train, path: v1/train-*}]}
---
"""
PUBLISHED = {"README.md": CARD} | shards("data/train", ROWS, 3) | shards("data/test", TEST, 1)
PUBLISHED |= shards("paper/train", ROWS[10:], 2) | shards("paper/test", TEST[5:], 1)  # the same rows again
CODE = "raise RuntimeError('the remote code ran')\n"
PUBLISHED |= {"WangchanThaiInstruct.py": CODE, "data/index.pkl": b"pickle", ".gitattributes": "*.parquet lfs"}
OLD = {"README.md": CARD} | shards("data/train", ROWS[:40], 2) | shards("data/test", TEST, 1)  # an earlier commit
TRAIN = {name: content for name, content in PUBLISHED.items() if "test" not in name}


def checkpoint(model, marker: Path) -> dict[str, bytes | str]:
    """A repository like ByteDance/Ouro-2.6B, whose code leaves a mark and fails if it is ever run."""
    config = model.config.to_dict() | {"torch_dtype": "bfloat16", "transformers_version": "4.55.0"}
    config |= {"architectures": ["OuroForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "early_exit_threshold": 1.0}
    classes = {"AutoModel": "OuroModel", "AutoModelForCausalLM": "OuroForCausalLM"}
    config["auto_map"] = {name: f"modeling_ouro.{cls}" for name, cls in classes.items()}
    config["auto_map"]["AutoConfig"] = "configuration_ouro.OuroConfig"
    code = f"open({str(marker)!r}, 'w').close()\n{CODE}"
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
    """The Hub, and the scripts with and without a network, which share a cache."""
    folder = tmp_path_factory.mktemp("hub")
    copy_project(folder / "project")
    hub = LocalHub()
    scripts = [Scripts(hub, folder, offline) for offline in (False, True)]
    yield hub, *scripts
    for each in scripts:
        each.close()
    hub.close()


@pytest.fixture(scope="module")
def loaded(world, source):
    """What LOAD and the data report give online and then offline, each with the requests it made; and whether remote
    code ran."""
    hub, online, offline = world
    folder = online.folder
    hub.repositories.clear()
    shutil.rmtree(folder / "cache", ignore_errors=True)
    marker = folder / "marker"
    hub.add(MODEL, write(folder / "model", checkpoint(source, marker)), PINNED[MODEL])
    hub.add(MODEL, write(folder / "newer", {"README.md": "a later commit"}), branch="main")
    commit = hub.add(WANGCHAN, write(folder / "wangchan", PUBLISHED), branch="main")
    hub.add(EXAM, write(folder / "exam", {"thai_exam.tar.gz": archive()}), PINNED[EXAM])
    found = {}
    for name, scripts, network in (("online", online, contextlib.nullcontext()), ("offline", offline, closed(hub))):
        hub.requests.clear()
        with network:
            found[name] = load(scripts) | {"report": report(scripts, *REPORT)}
        found[name] |= {"tokens": tokens(found[name]["report"]), "requests": hub.requests[:], "sent": hub.contents()}
    return found | {"remote code ran": marker.exists(), "main": commit}


@pytest.fixture
def empty(world):
    """The same, with no repository on the Hub, nothing in the cache, and nothing pinned in configs/datasets.yaml."""
    hub, online, _ = world
    hub.repositories.clear()
    hub.requests.clear()
    shutil.rmtree(online.folder / "cache", ignore_errors=True)
    configure(online)
    return world


# ------------------------------------------------------------------------------------------------ what is published


def test_the_published_checkpoint_loads_bit_equal_without_its_code(loaded, source):
    online = loaded["online"]
    assert all(torch.equal(online["weights"][name], weight) for name, weight in source.state_dict().items())
    assert torch.equal(online["logits"], source(torch.arange(1, 25).reshape(2, 12)).logits)
    assert online["logits"].dtype == torch.bfloat16
    assert online["commit"] == REVISIONS[MODEL], "what manifest.json records"
    assert online["chat"] == load_tokenizer(str(SAMPLE / "ouro-tiny")).apply_chat_template(CHAT)
    assert not loaded["remote code ran"]
    assert [r for r in online["requests"] if r.path.endswith((".py", ".pkl")) and r.status < 400] == []
    asked = {request.revision for request in online["requests"] if request.repo == MODEL}
    assert asked == {PINNED[MODEL]}, "and no other revision is asked for"


def test_the_hub_and_a_local_folder_of_the_same_layout_give_the_same_bytes(loaded, world, tmp_path):
    _, _, offline = world
    local = report(offline, *REPORT, "--dataset_path", write(tmp_path / "copy", PUBLISHED))
    assert tokens(local) == loaded["online"]["tokens"]
    assert local["data_revision"].startswith("sha256:")


def test_a_benchmark_on_the_hub_gives_the_items_of_its_local_folder(loaded):
    assert loaded["online"]["items"] == load_items("thai_exam", SPEC, str(SAMPLE / "thai_exam"))
    asked = {(request.revision, request.path) for request in loaded["online"]["requests"] if request.repo == EXAM}
    assert asked == {(PINNED[EXAM], "thai_exam.tar.gz")}


def test_once_downloaded_everything_loads_without_a_network(loaded):
    """The training set in the order of its shards, and nothing of its other config."""
    online, offline = loaded["online"], loaded["offline"]
    assert (online["rows"], online["held out"], online["report"]["rows_in"]) == (ROWS, TEST, len(ROWS))
    assert online["report"]["data_revision"] == offline["report"]["data_revision"] == loaded["main"]
    assert offline["requests"] == [] and online["requests"] != []
    assert torch.equal(offline["logits"], online["logits"])
    assert all(offline[key] == online[key] for key in ("chat", "rows", "held out", "items", "tokens"))
    sent = [file for file in online["sent"] if file.startswith("datasets/")]
    assert len(sent) == len(set(sent)) > 5, "each file once"


# ------------------------------------------------------------------------------------------------ revisions


def test_a_pinned_training_set_is_read_at_that_commit_and_no_other_is_served_in_its_place(empty, tmp_path):
    hub, online, offline = empty
    pinned = hub.add(WANGCHAN, write(tmp_path / "old", OLD))
    hub.add(WANGCHAN, write(tmp_path / "new", PUBLISHED), branch="main")
    configure(online, wangchan=pinned)
    read = report(online, *REPORT)
    assert (read["rows_in"], read["data_revision"]) == (40, pinned)
    assert {request.revision for request in hub.requests} == {pinned}
    with closed(hub):
        again = report(offline, *REPORT)
    assert (again["rows_in"], again["data_revision"]) == (40, pinned)
    configure(online, wangchan=OTHER_COMMIT)
    hub.requests.clear()
    message = online.refusal(*REPORT)
    assert re.search(f"airesearch/WangchanThaiInstruct .*Revision Not Found .*{OTHER_COMMIT}", message)
    assert hub.contents() == []
    assert "cannot load airesearch/WangchanThaiInstruct" in offline.refusal(*REPORT)


def test_a_main_branch_that_moved_gets_a_cache_of_its_own(empty, tmp_path):
    hub, online, _ = empty
    cache = ["--cache_dir", tmp_path / "cache"]
    first = hub.add(WANGCHAN, write(tmp_path / "1", PUBLISHED), branch="main")
    one, same = report(online, *REPORT, *cache), report(online, *REPORT, *cache)
    assert same == one and len(list((tmp_path / "cache").iterdir())) == 1
    second = hub.add(WANGCHAN, write(tmp_path / "2", PUBLISHED | {".gitattributes": "a comment"}), branch="main")
    other = report(online, *REPORT, *cache)
    assert (one["data_revision"], other["data_revision"]) == (first, second)
    assert other["cache"] != one["cache"] and len(list((tmp_path / "cache").iterdir())) == 2
    assert tokens(other) == tokens(one)


# ------------------------------------------------------------------------------------------------ what is missing

CHECKED = ["data_config.py", *LOCAL_MODEL, "--dataset", "sample", "--overlap"]


TOKENIZER = ["data_config.py"]  # reads the tokenizer from the Hub first
ITEMS = [*CHECKED, "thai_exam"]  # the benchmark alone
OPEN_ITEMS = [*CHECKED, "openthaieval"]
EXAM_FILES = {"thai_exam.tar.gz": archive()}
LACKS = {  # the command, what the Hub has, what the message says
    "no model": (TOKENIZER, None, {}, "ByteDance/Ouro-2.6B is not a local folder and is not a valid model identifier"),
    "no dataset": (REPORT, None, {}, "airesearch/WangchanThaiInstruct from the Hub: .*Repository Not Found"),
    "no pinned revision": (TOKENIZER, f"{MODEL}@{OTHER_COMMIT}", TINY, f"{PINNED[MODEL]} is not a valid git id"),
    "no open benchmark": (
        OPEN_ITEMS,
        None,
        {},
        "iapp/openthaieval .*--paths openthaieval=FOLDER.*no check: --overlap n",
    ),
    "nothing wanted": ([FETCH, "--only", "thai_exam"], EXAM, {"data/x.csv": "a"}, "holds none of thai_exam.tar.gz"),
    "no main branch": (REPORT, f"{WANGCHAN}@{OTHER_COMMIT}", PUBLISHED, "Revision Not Found .*Instruct/revision/main"),
    "no file in it": (ITEMS, EXAM, {"thai_exam.tar.gz": archive("onet")}, "thai_exam.tar.gz holds no ic/ic_test.jsonl"),
    "no gzip archive": (ITEMS, EXAM, {"thai_exam.tar.gz": b"<html>sign in</html>"}, "thai_exam.tar.gz is damaged"),
    "no test split": (REPORT, WANGCHAN, TRAIN, "README.*test|test.*README"),
    "damaged benchmark": (OPEN_ITEMS, OPEN, {"data/test.parquet": b"PAR1"}, "not a readable Parquet file.*--overlap"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_the_hub_lacks_is_named_in_one_message(empty, tmp_path, lack):
    hub, online, _ = empty
    command, repository, files, message = LACKS[lack]
    if repository:
        repo, _, commit = repository.partition("@")
        hub.add(repo, write(tmp_path / "repo", files), commit or PINNED.get(repo), branch=None if commit else "main")
    assert re.search(message, online.refusal(*command))


@pytest.mark.parametrize(
    ("command", "message", "offline"),
    [
        (TOKENIZER, "model ByteDance/Ouro-2.6B: .*couldn't connect to", False),
        (REPORT, "cannot load airesearch/WangchanThaiInstruct .*make fetch.* --paths wangchan=FOLDER", False),
        (ITEMS, "scb10x/thai_exam .*make fetch.* --paths thai_exam=FOLDER", True),
    ],
    ids=["tokenizer", "dataset", "benchmark, HF_HUB_OFFLINE"],
)
def test_without_a_network_and_a_cached_copy_the_message_says_so_soon(empty, command, message, offline):
    hub, *scripts = empty
    with closed(hub):
        assert re.search(message, scripts[offline].refusal(*command))
    assert not scripts[offline].slept, "seconds that huggingface_hub waits between its attempts"


# ------------------------------------------------------------------------------------------------ make fetch


@pytest.fixture(scope="module")
def published(tmp_path_factory, source) -> dict[str, Path]:
    """All that the study needs, laid out as it was published, and in every repository code and pickles."""
    folder = tmp_path_factory.mktemp("published")
    item = {"instruction": "เลือกข้อที่ถูก", "input": "(1) ก (2) ข", "result": "(1)"}
    contents = {
        "model": checkpoint(source, folder / "marker"),
        "wangchan": PUBLISHED,
        "synthetic": shards("data/train", read_jsonl(SAMPLE / "synthetic/train.jsonl"), 2),
        "r1": {"train.jsonl": (SAMPLE / "r1/train.jsonl").read_bytes()},
        "smol-smoltalk": shards("data/train", read_jsonl(SAMPLE / "english/train.jsonl"), 4)
        | shards("data/test", read_jsonl(SAMPLE / "english/test.jsonl"), 1),
        "r1-english": {"README.md": R1_CARD}
        | shards("v0/train", read_jsonl(SAMPLE / "r1-english/train.jsonl"), 3)
        | shards("v1/train", read_jsonl(SAMPLE / "r1-english/train.jsonl"), 2),
        "thai_exam": EXAM_FILES,
        "m3exam": {BENCHMARKS["m3exam"]["file"]: [item]},
        "openthaieval": {"data/test.parquet": [item]},
        "belebele": {f"data/{name}.jsonl": json.dumps({"question": name}) for name in ("tha_Thai", "eng_Latn")},
        "wikipedia": shards("20231101.th/train", [{"text": "ก"}], 1)
        | shards("20231101.simple/train", [{"text": "a"}], 1),
        "mt_bench_thai": {"mt_bench_thai_full.json": json.dumps([{"turns": ["แต่งกลอน", "แปลกลอน"]}])},
    }
    unwanted = {f"{place}x{suffix}": CODE for suffix in UNWANTED for place in ("", "data/")}
    return {name: write(folder / name, {"README.md": "#"} | contents[name] | unwanted) for name in REPO}


@pytest.fixture
def full(empty, published):
    """The same, with everything on the Hub."""
    for name, folder in published.items():
        commit = PINNED.get(REPO[name])
        empty[0].add(REPO[name], folder, commit, branch=None if commit else "main")
    return empty


def wanted(folder: Path, name: str) -> dict[Path, bytes]:
    """What a run reads of a repository: a training set's README.md says which file is what."""
    paths = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in UNWANTED]
    others = (".gitattributes",) if name in TRAINING else (".gitattributes", "README.md")
    return {
        file.relative_to(folder): file.read_bytes()
        for file in paths
        if file.name not in others and file.parent.name != "v1"  # beside the folder that datasets.yaml names
    }


def cached(scripts: Scripts, name: str) -> Path:
    """A repository's folder in the cache."""
    repo = REPO[name] if name != "model" else f"models/{MODEL}"
    return scripts.folder / "cache/hub" / repo.replace("/", "--")


def complete(scripts: Scripts, folder: Path, name: str) -> bool:
    """Whether the cache has one commit of a repository, with what a run reads of it and nothing else."""
    (place,) = (cached(scripts, name) / "snapshots").iterdir()
    return wanted(place, name) == wanted(folder, name) and len(wanted(place, name)) == len(
        [file for file in place.rglob("*") if file.is_file()]
    )


def test_everything_is_fetched_once_and_jobs_then_need_no_network(full, published, source):
    """Nor do they write into the cache of downloads: on a cluster it is often shared, and read-only where jobs run."""
    hub, online, offline = full
    out = online.output(FETCH)
    assert "all there" in out.splitlines()[-1]
    assert all(complete(online, published[name], name) for name in REPO)
    expected = [f"{REPO[name]}/{file}" for name in REPO for file in wanted(published[name], name)]
    assert sorted(hub.contents()) == sorted(expected), "each file once"
    assert [r.path for r in hub.requests if r.path.endswith(UNWANTED)] == [], "code and pickles are not even asked for"
    sizes = {name: sum(map(len, wanted(published[name], name).values())) / 1e6 for name in REPO}
    for name in REPO:
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert f"{sizes[name]:.1f} MB to download" in line and (" (main) " in line) == (REPO[name] not in PINNED)
        (commit,) = (path.name for path in (cached(online, name) / "snapshots").iterdir())
        assert (f"{name}: to stay with this commit, set revision: {commit} in" in out) == (REPO[name] not in PINNED)
    assert f"to download: {sum(sizes.values()):.1f} MB, free in the cache's file system: " in out

    hub.requests.clear()
    assert "to download: 0.0 MB" in online.output(FETCH) and hub.contents() == []
    before = sorted((online.folder / "cache").rglob("*"))
    with closed(hub):
        result, checked = load(offline), report(offline, "data_config.py", *LOCAL_MODEL)
        texts = report(offline, *CHECKED, "thai_text,thai_wikipedia,english_text")
    assert all(torch.equal(result["weights"][name], weight) for name, weight in source.state_dict().items())
    assert (checked["rows_in"], checked["overlap"]["items"]) == (len(ROWS), 100 + 1 + 1 + 1 + 2)
    assert texts["overlap"]["items"] == len(TEST) + 1 + 1
    assert sorted((online.folder / "cache").rglob("*")) == before


def test_half_a_training_set_is_not_trained_offline(full, published):
    hub, online, offline = full
    online.output(FETCH, "--only", "wangchan")
    (shard,) = cached(online, "wangchan").rglob("data/train-00001-of-00003.parquet")
    shard.resolve().unlink()
    shard.unlink()
    assert "split train: 2 of the 3 files are there" in offline.refusal(*REPORT)
    online.output(FETCH, "--only", "wangchan")
    assert complete(online, published["wangchan"], "wangchan")
    assert {request.repo for request in hub.requests} == {WANGCHAN}, "nothing but what is named"


def test_the_users_token_is_sent_and_never_shown(full, tmp_path):
    hub, online, _ = full
    token = "hf_" + "SecretOfTheUser" * 2
    read = ["data_config.py", "--dataset", "r1", "--cache_dir", tmp_path, "--output_dir", tmp_path]
    said = [online.play(*command, HF_TOKEN=token) for command in ([FETCH], read)]
    hub.repositories.clear()
    said += [online.play(*command, HF_TOKEN=token) for command in ([FETCH], [*read, "--model_revision", "v7"])]
    assert [code for code, _, _ in said] == ["0", "0", "2", "2"]
    assert token in hub.tokens and token not in "".join(out + err for _, out, err in said)
    written = [file for folder in (tmp_path, online.folder / "cache") for file in folder.rglob("*") if file.is_file()]
    assert len(written) > 10 and not any(token.encode() in file.read_bytes() for file in written)


def test_a_new_row_of_the_training_sets_needs_no_revision(monkeypatch):
    mine = {"mine": {"language": "th", "hub_id": "me/rows", "prompt": ["q"], "completion": "a"}}
    monkeypatch.setattr(fetch, "read_yaml", lambda file: files.read_yaml(file) | (mine if file == DATASETS else {}))
    (found,) = (download for download in fetch.wanted(Settings()) if download.name == "mine")
    assert found.hub_id == "me/rows" and found.revision is None


def test_what_cannot_be_fetched_is_refused():
    with pytest.raises(files.UserError, match="nothing called 'wangchn' to download; did you mean 'wangchan'"):
        fetch.fetch(Settings(), "model,wangchn")
    with pytest.raises(files.UserError, match="nothing called 'model' to download"):  # it is a folder
        fetch.fetch(Settings(model_name_or_path=str(SAMPLE / "ouro-tiny")), "model")
    with pytest.raises(files.UserError, match="HF_HUB_OFFLINE is set"):
        fetch.fetch(Settings(), None)


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_downloaded(monkeypatch, capsys):
    siblings = [RepoSibling(rfilename=name, size=6_000_000) for name in ("model.safetensors", "config.json", "code.py")]
    monkeypatch.setattr(fetch.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha="0" * 40, siblings=siblings))
    monkeypatch.setattr(fetch.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=12_000_000))
    with pytest.raises(files.UserError, match="12.0 MB do not fit; set HF_HOME"):
        fetch.fetch(Settings(), "model")
    assert "free in the cache's file system: 12.0 MB" in capsys.readouterr().out


@pytest.mark.slow
def test_results_name_the_commits_that_were_read_and_another_commit_is_scored_anew(empty, tmp_path):
    """From a Hub, at main, in real processes."""
    hub, online, offline = empty
    items = {f"data/{file.name}": file.read_bytes() for file in (SAMPLE / "belebele/data").iterdir()}
    repositories = {"datasets/facebook/belebele": items, "a/tiny": TINY}
    wanted = [hub.add(name, write(tmp_path / f"first-{n}", content), branch="main")
              for n, (name, content) in enumerate(repositories.items())]  # fmt: skip
    argv = ["evaluate.py", "--base", "--model_name_or_path", "a/tiny", "--use_qlora", "false", "--bf16", "false",
            "--tasks", "belebele_english", "--ut_steps", "1"]  # fmt: skip
    folder = online.folder / "project/results/base-fp32"

    def revisions() -> list[str]:
        study = json.loads((folder / "belebele_english-ut1.json").read_text())["study"]
        noted = json.loads((folder / "manifest.json").read_text())["tasks"]["belebele_english"]
        assert noted["benchmark_revision"] == study["benchmark_revision"]
        assert noted["model"]["revision"] == study["model_revision"]
        return [study["benchmark_revision"], study["model_revision"]]

    online.output(*argv)
    assert revisions() == wanted
    assert "1 of 1 tasks are complete already" in online.output(*argv)
    for n, (name, content) in enumerate(repositories.items()):
        wanted[n] = hub.add(name, write(tmp_path / f"newer-{n}", content), branch="main")
        assert "complete already" not in online.output(*argv), "the same content, but another commit"
        assert revisions() == wanted
    with closed(hub):
        assert "1 of 1 tasks are complete already" in offline.output(*argv)
