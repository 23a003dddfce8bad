"""make fetch: all that a run needs comes from the Hub once, whole, and nothing else does; jobs then need no network.

Fetching runs in real processes against a local Hub (local_hub.py) whose repositories are laid out like the published
ones, and hold code and pickles besides.
"""

import contextlib
import json
import os
import random
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

from ouro import files
from ouro.model.loading import load_ouro
from ouro.settings import DATASETS, EVALS, REVISIONS

import pytest
import torch
from conftest import PATIENCE
from local_hub import LocalHub, Scripts, copy_project, parquet, shards, write
from safetensors.torch import load_file, save

SAMPLE = Path(__file__).resolve().parents[1] / "sample"
TINY = SAMPLE / "ouro-tiny"
MODEL = "ByteDance/Ouro-2.6B"
ENTRIES, BENCHMARKS = files.read_yaml(DATASETS), files.read_yaml(EVALS)["benchmarks"]
BENCHMARKS = {name: entry for name, entry in BENCHMARKS.items() if "hub_id" in entry}
TRAINING = ["wangchan", "synthetic", "r1"]
REPO = {name: f"datasets/{(ENTRIES | BENCHMARKS)[name]['hub_id']}" for name in (*TRAINING, *BENCHMARKS)}
REPO["model"] = MODEL
PINNED = {"model": REVISIONS[MODEL], "thai_exam": BENCHMARKS["thai_exam"]["revision"]}
TOKEN = "hf_" + "SecretOfTheUser" * 2
UNWANTED = (".py", ".bin", ".pt", ".pkl")
FETCH = "tools/fetch.py"
ROWS = ["data_config.py", "--model_name_or_path", "sample/ouro-tiny", "--overlap", "none"]  # the training set alone
CHUNK = 10 * 2**20  # bytes that huggingface_hub writes at a time
pytestmark = pytest.mark.slow  # test_hub.py downloads, and reads without a network, in less time


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def repositories(folder: Path) -> dict[str, Path]:
    """All that the study needs, laid out as it was published, and in every repository code and pickles."""
    config = {k: v for k, v in json.loads((TINY / "config.json").read_text()).items() if k != "init_seed"}
    model = {file.name: file.read_bytes() for file in TINY.iterdir()} | {"config.json": json.dumps(config)}
    model["model.safetensors"] = save(load_ouro(str(TINY), dtype=torch.float32).state_dict(), {"format": "pt"})
    model["other/weights.safetensors"] = bytes(6_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        exam = shutil.make_archive(f"{scratch}/exam", "gztar", SAMPLE / "thai_exam", "data")
        archive = Path(exam).read_bytes()
    item = {"instruction": "เลือกข้อที่ถูก", "input": "(1) ก (2) ข", "result": "(1)"}
    wangchan = shards("data/train", lines("wangchan/train.jsonl"), 3)
    files = {
        "model": model,
        "wangchan": wangchan | shards("data/test", lines("wangchan/test.jsonl"), 1),
        "synthetic": shards("data/train", lines("synthetic/train.jsonl"), 2),
        "r1": {"train.jsonl": (SAMPLE / "r1/train.jsonl").read_bytes()},
        "thai_exam": {"thai_exam.tar.gz": archive},
        "openthaieval": {"data/test.parquet": parquet([item])},
        "belebele": {f"data/{name}.jsonl": json.dumps(name) for name in ("tha_Thai", "eng_Latn")},
        "wikipedia": shards("20231101.th/train", [{"text": "ก"}], 1)
        | shards("20231101.simple/train", [{"text": "a"}], 1),
        "mt_bench_thai": {"mt_bench_thai_full.json": json.dumps([{"turns": ["แต่งกลอน", "แปลกลอน"]}])},
    }
    unwanted = {f"{place}x{suffix}": "raise SystemExit(3)" for suffix in UNWANTED for place in ("", "data/")}
    return {name: write(folder / name, files[name] | unwanted | {"README.md": f"# {name}\n"}) for name in REPO}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The Hub, the scripts with and without a network, which share a cache, and the repositories' folders."""
    folder = tmp_path_factory.mktemp("fetch")
    copy_project(folder / "project")
    hub = LocalHub()
    scripts = [Scripts(hub, folder, offline) for offline in (False, True)]
    yield hub, *scripts, repositories(folder / "hub")
    for each in scripts:
        each.close()
    hub.close()


@pytest.fixture
def fresh(world):
    """The same, with everything on the Hub and nothing in the cache."""
    hub, online, _, folders = world
    shutil.rmtree(online.folder / "cache", ignore_errors=True)
    hub.repositories.clear()
    hub.cuts.clear()
    hub.requests.clear()
    for name, folder in folders.items():
        hub.add(REPO[name], folder, PINNED.get(name), branch=None if name in PINNED else "main")
    return world


def wanted(folders: dict[str, Path], name: str) -> list[Path]:
    """The files of a repository that a run reads: a training set's README.md says which file is what."""
    files = [file for file in folders[name].rglob("*") if file.is_file() and file.suffix not in UNWANTED]
    return [file for file in files if name in TRAINING or file.name != "README.md"]


def size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def cached(scripts: Scripts, name: str) -> Path:
    """A repository's folder in the cache."""
    repo = REPO[name] if name != "model" else f"models/{MODEL}"
    return scripts.folder / "cache/hub" / repo.replace("/", "--")


def snapshot(scripts: Scripts, name: str) -> Path:
    """The only commit of a repository that the cache has."""
    (found,) = (cached(scripts, name) / "snapshots").iterdir()
    return found


def complete(scripts: Scripts, folders: dict[str, Path], name: str) -> bool:
    """Whether the cache has what a run reads of a repository, with the right contents, and nothing else."""
    place = snapshot(scripts, name)
    there = {file.relative_to(place): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    return there == {file.relative_to(folders[name]): file.read_bytes() for file in wanted(folders, name)}


# ------------------------------------------------------------------------------------------------ everything, once


def test_everything_is_fetched_once_and_jobs_then_need_no_network(fresh, tmp_path):
    """Nor do they write into the cache of downloads: on a cluster it is often shared, and read-only where jobs run."""
    hub, online, offline, folders = fresh
    out = online.output(FETCH)
    assert all(complete(online, folders, name) for name in REPO)
    expected = {f"{REPO[name]}/{file.relative_to(folders[name])}" for name in REPO for file in wanted(folders, name)}
    assert sorted(hub.contents()) == sorted(expected), "each file once"
    assert all({file.suffix for file in folder.rglob("*")} >= set(UNWANTED) for folder in folders.values())
    assert [r.path for r in hub.requests if r.path.endswith(UNWANTED)] == [], "code and pickles are not even asked for"
    assert "all there" in out.splitlines()[-1]
    before = sorted((online.folder / "cache").rglob("*"))
    write(tmp_path, {"load.py": LOAD})

    hub.close()
    try:
        offline.output("data_config.py", "--dataset", "wangchan", "--cache_dir", tmp_path, "--output_dir", tmp_path)
        offline.output(tmp_path / "load.py", MODEL, tmp_path / "weights")
    finally:
        hub.open()
    report = json.loads((tmp_path / "data-report/wangchan.json").read_text(encoding="utf-8"))
    assert (report["rows_in"], report["overlap"]["items"]) == (204, 100 + 1 + 1)
    assert report["data_revision"] == snapshot(online, "wangchan").name
    published, loaded = load_file(folders["model"] / "model.safetensors"), torch.load(tmp_path / "weights")
    assert loaded.keys() == published.keys()
    assert all(torch.equal(weight, published[name]) for name, weight in loaded.items())
    assert sorted((online.folder / "cache").rglob("*")) == before


LOAD = """
import sys, torch
from ouro.model.loading import load_ouro
torch.save(load_ouro(sys.argv[1], dtype=torch.float32).state_dict(), sys.argv[2])
"""


def test_sizes_revisions_and_free_disk_are_told_before_and_a_second_run_downloads_nothing(fresh):
    hub, online, _, folders = fresh
    online.folder.joinpath("cache").mkdir()
    free = shutil.disk_usage(online.folder).free
    out = online.output(FETCH)
    for name in REPO:
        files, commit = size(wanted(folders, name)), snapshot(online, name).name[:12]
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert f" {REPO[name].removeprefix('datasets/')} " in line
        assert f" {commit} " in line and (" (main) " in line) is (name not in PINNED)
        assert line.endswith(f" {files / 1e6:.1f} MB, {files / 1e6:.1f} MB to download")
    total, told = re.search(r"to download: ([\d.]+) MB, free in the cache's file system: ([\d.]+) GB", out).groups()
    assert float(total) == round(sum(size(wanted(folders, name)) for name in REPO) / 1e6, 1) > 0
    assert abs(float(told) - free / 1e9) < 2
    revisions = dict(re.findall(r"^(\w+): to stay with these rows, set revision: ([0-9a-f]{40}) in", out, re.MULTILINE))
    assert revisions == {name: snapshot(online, name).name for name in REPO if name not in PINNED}
    hub.requests.clear()
    out = online.output(FETCH)
    assert len(re.findall(r" MB, in the cache$", out, re.MULTILINE)) == len(REPO)
    assert "to download: 0.0 MB" in out and hub.contents() == []


# ------------------------------------------------------------------------------------------------ a part, or elsewhere


def test_only_what_is_named_is_fetched(fresh):
    hub, online, _, folders = fresh
    online.output(FETCH, "--only", "r1,thai_exam")
    assert {request.repo for request in hub.requests} == {REPO["r1"], REPO["thai_exam"]}
    assert complete(online, folders, "r1") and complete(online, folders, "thai_exam")


def test_a_wrong_name_is_answered_with_the_nearest(fresh):
    hub, online, _, _ = fresh
    for name, message in (
        ("model,wangchn", r"--only: nothing called 'wangchn' to download; did you mean 'wangchan'\?"),
        ("sample", "nothing called 'sample' to download; known: .*wangchan"),
    ):
        assert re.search(message, online.refusal(FETCH, "--only", name))
    assert hub.requests == []


def test_what_is_a_local_folder_is_not_fetched(fresh):
    hub, online, _, _ = fresh
    out = online.output(FETCH, "--config", "tests/smoke.yaml")
    assert {request.repo for request in hub.requests} == {REPO["wikipedia"]}
    assert "sample" not in out
    assert "nothing called 'model'" in online.refusal(FETCH, "--config", "tests/smoke.yaml", "--only", "model")


def test_a_pinned_commit_is_fetched_in_place_of_main(fresh, tmp_path):
    hub, online, _, folders = fresh
    pinned = hub.repositories[REPO["r1"]]["main"][0]
    hub.add(REPO["r1"], write(tmp_path / "later", {"train.jsonl": "{}\n"}), branch="main")
    configs = online.folder / "project/configs/datasets.yaml"
    published = configs.read_text(encoding="utf-8")
    configs.write_text(json.dumps(ENTRIES | {"r1": ENTRIES["r1"] | {"revision": pinned}}), encoding="utf-8")
    try:
        out = online.output(FETCH, "--only", "r1")
    finally:
        configs.write_text(published, encoding="utf-8")
    assert "to stay with these rows" not in out and "(main)" not in out
    assert complete(online, folders, "r1") and snapshot(online, "r1").name == pinned
    assert {request.revision for request in hub.requests} == {pinned}


# ------------------------------------------------------------------------------------------------ interrupted


@pytest.fixture
def big(fresh, tmp_path):
    """The same, with a model whose weights are more than huggingface_hub writes at a time."""
    hub, online, offline, folders = fresh
    model = shutil.copytree(folders["model"], tmp_path / "model")
    (model / "model.safetensors").write_bytes(random.Random(0).randbytes(CHUNK + 2_000_000))
    hub.add(MODEL, model, PINNED["model"])
    return hub, online, offline, folders | {"model": model}


def partial(online: Scripts) -> int:
    """Bytes on disk of the file whose download has begun."""
    return max((size([file]) for file in cached(online, "model").glob("blobs/*.incomplete")), default=0)


def finishes(big) -> None:
    """The next run asks for the rest of the file and ends with the right contents."""
    hub, online, _, folders = big
    assert partial(online) == CHUNK
    hub.cuts.clear()
    hub.requests.clear()
    out = online.output(FETCH, "--only", "model")
    assert "all there" in out and partial(online) == 0
    assert complete(online, folders, "model")
    (rest,) = [r for r in hub.requests if r.call == "storage" and r.path == "model.safetensors"]
    assert rest.status == 206, "from where it stopped"


def test_a_killed_download_is_continued_by_the_next_run(big):
    hub, online, _, _ = big
    killed = threading.Event()
    hub.cuts["model.safetensors"] = CHUNK + 1_000_000, killed
    process = online.start(FETCH, "--only", "model")
    until = time.monotonic() + PATIENCE
    while partial(online) < CHUNK and Path(f"/proc/{process}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself: told below
        os.kill(process, 9)
    code, _, _ = online.wait()
    killed.set()
    assert code == "-9"
    finishes(big)


def test_half_a_training_set_is_not_trained_offline(fresh, tmp_path):
    hub, online, offline, folders = fresh
    shard = "data/train-00001-of-00003.parquet"
    hub.cuts[shard] = 100, threading.Event()
    hub.cuts[shard][1].set()
    assert "cannot load airesearch/WangchanThaiInstruct" in online.refusal(FETCH, "--only", "wangchan")
    assert "2 of the 3 files of split train" in offline.refusal(*ROWS, "--cache_dir", tmp_path)
    hub.cuts.clear()
    online.output(FETCH, "--only", "wangchan")
    assert complete(online, folders, "wangchan")


# ------------------------------------------------------------------------------------------------ refused


def test_with_hf_hub_offline_set_fetch_says_so(fresh):
    hub, _, offline, _ = fresh
    assert "HF_HUB_OFFLINE is set" in offline.refusal(FETCH)
    assert hub.requests == []


def test_without_a_network_fetch_ends_with_one_message_soon(fresh):
    hub, online, _, _ = fresh
    hub.close()
    try:
        for only in ("model", "wangchan", "thai_exam"):
            assert f"cannot load {REPO[only].removeprefix('datasets/')}" in online.refusal(FETCH, "--only", only)
            assert online.slept <= 30
    finally:
        hub.open()


def test_a_repository_or_revision_that_is_not_there_is_named_before_anything_is_downloaded(fresh):
    hub, online, _, _ = fresh
    message = online.refusal(FETCH, "--model_revision", "v7", "--only", "model")
    assert f"cannot load {MODEL} from the Hub" in message and "v7" in message
    for name, remedy in (("openthaieval", "--paths openthaieval=FOLDER"), ("model", "--model_name_or_path FOLDER")):
        del hub.repositories[REPO[name]]
        message = online.refusal(FETCH)
        assert f"cannot load {REPO[name].removeprefix('datasets/')} from the Hub" in message and remedy in message
    assert hub.contents() == []


def test_a_repository_without_any_wanted_file_is_refused(fresh, tmp_path):
    hub, online, _, _ = fresh
    hub.add(REPO["thai_exam"], write(tmp_path / "moved", {"data/onet_test.csv": "a"}), PINNED["thai_exam"])
    assert "holds none of thai_exam.tar.gz" in online.refusal(FETCH, "--only", "thai_exam")


def test_the_users_token_is_sent_and_never_shown(fresh, tmp_path):
    hub, online, _, _ = fresh
    said = [online.play(FETCH, HF_TOKEN=TOKEN)]
    read = ["data_config.py", "--dataset", "r1", "--cache_dir", tmp_path, "--output_dir", tmp_path]
    said.append(online.play(*read, HF_TOKEN=TOKEN))
    assert TOKEN in hub.tokens
    assert [code for code, _, _ in said] == ["0", "0"]
    hub.repositories.clear()
    said += [online.play(FETCH, HF_TOKEN=TOKEN), online.play(*read, "--model_revision", "v7", HF_TOKEN=TOKEN)]
    assert [code for code, _, _ in said[2:]] == ["2", "2"]
    assert TOKEN not in "".join(out + err for _, out, err in said)
    written = [file for folder in (tmp_path, online.folder / "cache") for file in folder.rglob("*") if file.is_file()]
    assert len(written) > 10 and not any(TOKEN.encode() in file.read_bytes() for file in written)
