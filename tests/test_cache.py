"""The cache of token rows: what makes a new one, and that no kill, race, full disk or bad row leaves a wrong one."""

import errno
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from ouro import settings
from ouro.data import cache, chats, formats, sources
from ouro.data.batches import Rows
from ouro.data.cache import CHUNK, CODE, prepare, rows_sha256
from ouro.files import UserError, read_yaml
from ouro.model.loading import load_tokenizer
from ouro.settings import Settings

import pytest
import yaml
from conftest import PATIENCE
from helpers import read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(ROOT / "sample/ouro-tiny")
LONG = "ช่วยสรุปข้อความต่อไปนี้ให้สั้นลงด้วยค่ะ ร้านของเราเปิดทุกวันตั้งแต่เช้าถึงเย็น มีกาแฟ ขนมปัง และน้ำผลไม้สดให้เลือกมากมาย " * 4
ASKED = "หากลูกค้าต้องการเปลี่ยนสินค้าที่ซื้อไปเมื่อวานเพราะขนาดไม่พอดี พนักงานควรทำอย่างไรจึงจะเหมาะสมที่สุด"
TRAIN = [
    ("เมืองหลวงของไทยชื่ออะไร", "", "กรุงเทพมหานคร มี 50 เขต", "CC-BY-SA-4.0"),
    ("น้\u200bำแข็งทำจากอะไร", "", "ทำจากน้ำ", "CC-BY-SA-4.0"),
    ("แปลเป็นภาษาอังกฤษ", "สวัสดีตอนเช้า", "Good morning", "CC-BY-SA-4.0"),
    ("กาแฟกับชาต่างกันอย่างไร", "", "กาแฟทำจากเมล็ด ชาทำจากใบ", "CC-BY-NC-4.0"),
    (LONG, "", "ร้านเปิดทุกวัน มีของให้เลือกมาก", "CC-BY-SA-4.0"),
    (ASKED, "", "ควรตรวจใบเสร็จแล้วเปลี่ยนให้", "CC-BY-SA-4.0"),
    ("", "", "ไม่มีคำถาม", "CC-BY-SA-4.0"),
    ("พรุ่งนี้วันอะไร", "", "ขึ้นอยู่กับวันนี้", "CC-BY-SA-4.0"),
]
TEST = [("ใครแต่งเรื่องนี้", "", "ไม่ทราบค่ะ", "CC-BY-SA-4.0")]
SECOND = multiprocessing.get_context("forkserver")  # forking this process would copy the tokenizers' threads' locks


# ----------------------------------------------------------------------------------------------------------------------
# data, settings, and what is compared


def write_set(path: Path, rows: list[tuple[str, str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, *(dict(zip(("Instruction", "Input", "Output", "License"), row, strict=True)) for row in rows))


def plain(data: Path, cache: Path) -> Settings:
    """Settings for a file of any rows, without benchmarks and without floors."""
    return Settings(
        dataset="sample", dataset_path=str(data), overlap="none", cache_dir=str(cache), max_empty_share=1,
        max_too_long_share=1, min_trained_share=0, min_end_survival=0,
    )  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """A small data set, of which every row stands for a check, its settings, tokenizer and benchmark."""
    write_set(tmp_path / "data/train.jsonl", TRAIN)
    write_set(tmp_path / "data/test.jsonl", TEST)
    shutil.copytree(ROOT / "sample/thai_exam", tmp_path / "exam")
    s = plain(tmp_path / "data", tmp_path / "cache")
    s = replace(
        s, max_length=120, length_policy="drop", overlap="thai_exam", paths={"thai_exam": str(tmp_path / "exam")}
    )
    return SimpleNamespace(folder=tmp_path, s=s, tokenizer=load_tokenizer(MODEL))


def contents(rows: Rows) -> list[tuple[list[int], list[int]]]:
    return [tuple(part.tolist() for part in rows.row(i)) for i in range(len(rows.lengths))]


def prepared(world, **changes) -> tuple[list, dict]:
    rows, report = prepare(replace(world.s, **changes), world.tokenizer, quiet=True)
    return contents(rows), report


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ----------------------------------------------------------------------------------------------------------------------
# what makes a new cache


def change_benchmark(world, monkeypatch):
    path = world.folder / "exam/data/onet/onet_test.jsonl"
    *others, last = read_jsonl(path)
    write_jsonl(path, *others, last | {"question": ASKED})


def change_one_byte(world, monkeypatch):
    path = world.folder / "data/train.jsonl"
    before = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("มี 50 เขต", "มี 51 เขต"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def change_held_out_split(world, monkeypatch):
    write_set(world.folder / "data/test.jsonl", [TRAIN[0]])


def change_tokenizer(world, monkeypatch):
    folder = shutil.copytree(MODEL, world.folder / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop(2)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    world.tokenizer = load_tokenizer(str(folder))


def change_special_tokens(world, monkeypatch):
    """Which rows are dropped for. They are also in special_tokens_map.json, not in tokenizer.json alone."""
    before = world.tokenizer.backend_tokenizer.to_str()
    world.tokenizer.additional_special_tokens = ["<|im_start|>", "<|im_end|>", "สวัสดี"]
    assert world.tokenizer.backend_tokenizer.to_str() == before


def change_template(world, monkeypatch):
    template = world.tokenizer.chat_template
    world.tokenizer.chat_template = template.replace("You are a helpful assistant.", "You speak Thai.")
    assert world.tokenizer.chat_template != template


def change_entry(world, monkeypatch):
    table = world.folder / "datasets.yaml"
    entry = read_yaml(settings.DATASETS)["sample"] | {"prompt": ["Instruction"]}
    table.write_text(yaml.safe_dump({"sample": entry}), encoding="utf-8")
    monkeypatch.setattr(sources, "DATASETS", table)


NEW_ROWS = {
    "one byte, same size and time": change_one_byte,
    "held-out split": change_held_out_split,
    "tokenizer": change_tokenizer,
    "special tokens": change_special_tokens,
    "chat template": change_template,
    "benchmark": change_benchmark,
    "datasets.yaml": change_entry,
    "max_length": {"max_length": 1024},
    "length_policy": {"length_policy": "truncate_prompt"},
    "licence": {"licence": "permissive"},
    "normalise_thai": {"normalise_thai": False},
    "system_prompt": {"system_prompt": "ตอบสั้น ๆ"},
}


@pytest.mark.parametrize("change", NEW_ROWS.values(), ids=NEW_ROWS)
def test_a_change_of_what_rows_are_made_of_gives_new_rows(world, monkeypatch, change):
    rows, report = prepared(world)
    assert len(rows) == 6 and report["rows_dropped"] == {"empty (Instruction)": 1, "longer than 120 tokens": 1}
    if callable(change):
        change(world, monkeypatch)
    new_rows, new_report = prepared(world, **({} if callable(change) else change))
    assert new_report["cache"] != report["cache"] and not new_report["from_cache"]
    assert new_rows != rows
    if change is change_benchmark:
        assert prepared(world, drop_overlap=False)[0] == rows


def test_a_change_of_any_file_of_the_code_makes_the_rows_anew(world, monkeypatch):
    copies = [Path(shutil.copy(file, world.folder)) for file in CODE]
    assert {path.name for path in copies} == {path.name for path in (ROOT / "ouro/data").glob("*.py")}
    rows, report = prepared(world)
    monkeypatch.setattr(cache, "CODE", copies)
    assert prepared(world)[1] == report | {"from_cache": True}
    copies[-1].write_text(copies[-1].read_text(encoding="utf-8") + "\n", encoding="utf-8")
    new_rows, new_report = prepared(world)
    assert new_report["cache"] != report["cache"] and not new_report["from_cache"] and new_rows == rows


def test_a_change_of_anything_else_reads_the_cache(world):
    rows, report = prepared(world)
    for changes in (
        {"learning_rate": 1.0, "rows_per_step": 7, "pass_tokens": 512, "seed": 1, "total_ut_steps": 2},
        {"max_empty_share": 0.5, "max_too_long_share": 0.5, "min_trained_share": 0.001, "min_end_survival": 0.1},
        {"output_dir": "elsewhere"},
    ):
        again, other = prepared(world, **changes)
        assert (again, other["cache"], other["from_cache"]) == (rows, report["cache"], True), changes


def test_an_identical_copy_elsewhere_reads_the_cache_and_names_rows_of_its_own(world):
    """A message must not send its reader to the folder of whoever filled the cache, which may be gone."""
    rows, report = prepared(world)
    copy = shutil.copytree(world.folder / "data", world.folder / "copy")
    shutil.rmtree(world.folder / "data")
    read, other = prepare(replace(world.s, dataset_path=str(copy)), world.tokenizer, quiet=True)
    assert (contents(read), other["cache"], other["from_cache"]) == (rows, report["cache"], True)
    assert other["source"] == str(copy) and report["first_dropped"]
    assert str(world.folder / "data") not in json.dumps(other)
    assert [read.place(i) for i in range(len(read))] == [f"train.jsonl, line {line}" for line in (1, 2, 3, 4, 6, 8)]
    with pytest.raises(UserError, match=str(copy)):
        prepared(world, dataset_path=str(copy), max_empty_share=0)


def test_a_second_run_reads_the_cache_and_tokenises_nothing(world, monkeypatch):
    rows, report = prepared(world)

    def never(*args):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(chats, "encode_texts", never)
    monkeypatch.setattr(cache, "Overlap", never)
    again, other = prepared(world)
    assert not report["from_cache"] and other == report | {"from_cache": True}
    assert again == rows
    with pytest.raises(AssertionError, match="tokenised again"):
        prepared(world, max_length=64)


# ----------------------------------------------------------------------------------------------------------------------
# several processes, killed ones


@pytest.fixture(scope="module", autouse=True)
def second_processes():
    """Second processes are forked from one that has imported the project but not yet run a thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("PYTHONHASHSEED", "7")  # other sets' orders than here
        SECOND.set_forkserver_preload(["data_config"])
        multiprocessing.forkserver.ensure_running()


def in_second_process(connection, s: Settings, builder: bool, pid: int | None, at_once: int, kill: bool) -> None:
    """Sends "ready", and after the answer the rows' digest and the report, or the error. at_once: processes that must
    have begun to build before this one writes rows; kill: it kills itself when these are written."""
    write_rows = cache.write_rows

    def writing(path: Path, *rest) -> None:
        while len([*path.parents[1].glob(".*.tmp.d")]) < at_once:
            time.sleep(0.01)
        write_rows(path, *rest)
        if kill:
            signal.raise_signal(signal.SIGKILL)

    cache.write_rows = writing
    if pid:
        os.getpid = lambda: pid
    tokenizer = load_tokenizer(MODEL)
    if not builder:
        chats.encode_texts = None  # calling it is an error
    connection.send("ready")
    connection.recv()
    try:
        rows, report = prepare(s, tokenizer, builder=builder, quiet=True, wait=partial(time.sleep, 0.2))
        connection.send((rows_sha256(rows), report))
    except Exception as error:  # noqa: BLE001
        connection.send(repr(error))


def start(s: Settings, builder: bool = True, pid: int | None = None, at_once: int = 1, kill: bool = False):
    """A second process that is about to prepare, as a SimpleNamespace; arguments as of `in_second_process`."""
    here, there = SECOND.Pipe()
    process = SECOND.Process(target=in_second_process, args=(there, s, builder, pid, at_once, kill), daemon=True)
    process.start()
    there.close()
    assert here.poll(PATIENCE) and here.recv() == "ready"
    return SimpleNamespace(process=process, connection=here)


def result(child: SimpleNamespace) -> tuple[str, dict]:
    assert child.connection.poll(PATIENCE)
    got = child.connection.recv()
    child.process.join(PATIENCE)
    assert isinstance(got, tuple), got
    return got


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A data set that takes a second to tokenise, and its cache as one undisturbed process makes it."""
    folder = tmp_path_factory.mktemp("large")
    data = folder / "train.jsonl"
    write_set(data, [(f"คำถามที่ {i}", "", f"{i} {TRAIN[i % 6][2]} " * 12, "MIT") for i in range(4 * CHUNK)])
    rows, report = prepare(plain(data, folder / "cache"), load_tokenizer(MODEL), quiet=True)
    return SimpleNamespace(
        data=data, digest=rows_sha256(rows), name=Path(report["cache"]).name, files=files(report["cache"])
    )


def test_a_killed_build_leaves_no_cache_and_does_not_disturb_the_next(large, tmp_path):
    s = plain(large.data, tmp_path)
    child = start(s, kill=True)
    child.connection.send("go")
    child.process.join(PATIENCE)
    assert child.process.exitcode == -signal.SIGKILL
    assert not (tmp_path / large.name).exists()
    assert any("rows.arrow" in name for name in listing(tmp_path))
    rows, report = prepare(s, load_tokenizer(MODEL), quiet=True)
    assert not report["from_cache"] and rows_sha256(rows) == large.digest
    assert files(tmp_path / large.name) == large.files
    assert [path.name for path in tmp_path.iterdir()] == [large.name], "what was left of killed processes is gone"


def test_processes_that_build_or_wait_for_the_same_at_once_all_succeed(large, tmp_path):
    """The builders have one process number, as in two containers that share a file system; who waits tokenises
    nothing."""
    s = plain(large.data, tmp_path)
    waiting, *builders = start(s, builder=False), *(start(s, pid=1, at_once=2) for _ in range(2))
    waiting.connection.send("go")
    assert not waiting.connection.poll(0.5) and listing(tmp_path) == []
    for builder in builders:
        builder.connection.send("go")
    for rows, report in map(result, builders):
        assert rows == large.digest and not report["from_cache"]
    assert result(waiting)[0] == large.digest
    names = ("SHA256SUMS", "report.json", "rows.arrow")
    assert listing(tmp_path) == [large.name, *(f"{large.name}/{name}" for name in names)]
    assert files(tmp_path / large.name) == large.files


# ----------------------------------------------------------------------------------------------------------------------
# full disks, damaged files, bad rows


def test_wherever_the_disk_fills_up_nothing_is_left_until_it_fits(world, tmp_path):
    """As on a full disk a file can grow no further: among the rows, at their end, in the report."""
    place, full = tmp_path / "cache", 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(1, 2**20, 1000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            rows, _ = prepared(world)
            break
        except OSError as error:
            assert error.errno == errno.EFBIG and str(error.filename).startswith(str(place)), "which disk?"
            assert listing(place) == []
            full += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full >= 4 and rows == prepared(world, cache_dir=str(world.folder / "other"))[0]


DAMAGE = {
    "empty": lambda data: b"",
    "without its end": lambda data: data[:-3],
    "a bit flipped": lambda data: data[:700] + bytes([data[700] ^ 4]) + data[701:],
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["rows.arrow", "report.json"])
def test_a_damaged_cache_is_refused_by_name(world, name, damage):
    folder = Path(prepared(world)[1]["cache"])
    path = folder / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"^the cache {re.escape(str(folder))} is damaged \(.*\): delete it and run"):
        prepared(world)


def test_a_bad_row_late_in_the_file_leaves_nothing_in_the_cache(tmp_path, tokenizer):
    write_set(tmp_path / "train.jsonl", [*[("ถาม", "", "ตอบ", "MIT")] * (2 * CHUNK + 88), ("ถาม", "", 7, "MIT")])
    with pytest.raises(UserError, match="train.jsonl, line 601, column Output: expected text, found int"):
        prepare(plain(tmp_path / "train.jsonl", tmp_path / "cache"), tokenizer, quiet=True)
    assert listing(tmp_path / "cache") == []


# ----------------------------------------------------------------------------------------------------------------------
# memory


def test_of_all_rows_some_hundreds_are_in_memory_at_a_time(large, tmp_path, tokenizer, monkeypatch):
    class Row(dict):
        __hash__ = object.__hash__

    def counted(*args):
        for where, row in read_file(*args):
            alive.add(row := Row(row))
            most.append(len(alive))
            yield where, row

    alive, most, read_file = weakref.WeakSet(), [], formats.read_file
    monkeypatch.setattr(formats, "read_file", counted)
    prepare(plain(large.data, tmp_path), tokenizer, quiet=True)
    assert len(most) > 4 * CHUNK and max(most) <= 2 * CHUNK + 1
