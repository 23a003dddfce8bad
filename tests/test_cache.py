"""The cache of token rows: what makes a new one, and that no kill, race, full disk or bad row leaves a wrong one."""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import data_config
from ouro import settings
from ouro.data import cache, chats, sources
from ouro.data.batches import Rows
from ouro.data.cache import CHUNK, CODE, prepare
from ouro.files import UserError, call, read_yaml
from ouro.model.loading import load_tokenizer
from ouro.settings import Settings

import numpy as np
import pytest
import yaml
from conftest import PATIENCE

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
    columns = ("Instruction", "Input", "Output", "License")
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def digest(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(contents(rows)).encode()).hexdigest()


def prepared(world, **changes) -> tuple[list, dict]:
    rows, report = prepare(replace(world.s, **changes), world.tokenizer, quiet=True)
    return contents(rows), report


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ----------------------------------------------------------------------------------------------------------------------
# what makes a new cache


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def change_one_byte(world, monkeypatch):
    path = world.folder / "data/train.jsonl"
    before = path.stat()
    edit(path, "มี 50 เขต", "มี 51 เขต")
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


def change_template(world, monkeypatch):
    template = world.tokenizer.chat_template
    world.tokenizer.chat_template = template.replace("You are a helpful assistant.", "You speak Thai.")
    assert world.tokenizer.chat_template != template


def change_benchmark(world, monkeypatch):
    path = world.folder / "exam/data/onet/onet_test.jsonl"
    *others, last = path.read_text(encoding="utf-8").splitlines()
    item = json.dumps(json.loads(last) | {"question": ASKED}, ensure_ascii=False)
    path.write_text("\n".join([*others, item]) + "\n", encoding="utf-8")


def change_entry(world, monkeypatch):
    table = world.folder / "datasets.yaml"
    entry = read_yaml(settings.DATASETS)["sample"] | {"prompt": ["Instruction"]}
    table.write_text(yaml.safe_dump({"sample": entry}), encoding="utf-8")
    monkeypatch.setattr(sources, "DATASETS", table)


def setting(**changes):
    def change(world, monkeypatch):
        world.s = replace(world.s, **changes)

    return change


NEW_ROWS = {
    "one byte, same size and time": change_one_byte,
    "held-out split": change_held_out_split,
    "tokenizer": change_tokenizer,
    "chat template": change_template,
    "benchmark": change_benchmark,
    "datasets.yaml": change_entry,
    "max_length": setting(max_length=1024),
    "length_policy": setting(length_policy="truncate_prompt"),
    "licence": setting(licence="permissive"),
    "normalise_thai": setting(normalise_thai=False),
    "system_prompt": setting(system_prompt="ตอบสั้น ๆ"),
}


@pytest.mark.parametrize("change", NEW_ROWS.values(), ids=NEW_ROWS)
def test_a_change_of_what_rows_are_made_of_gives_new_rows(world, monkeypatch, change):
    rows, report = prepared(world)
    assert len(rows) == 6 and report["rows_dropped"] == {"empty (Instruction)": 1, "longer than 120 tokens": 1}
    change(world, monkeypatch)
    new_rows, new_report = prepared(world)
    assert new_report["cache"] != report["cache"] and not new_report["from_cache"]
    assert new_rows != rows
    assert (
        files(report["cache"]).keys()
        == files(new_report["cache"]).keys()
        == {"rows.arrow", "report.json", "SHA256SUMS"}
    )


def test_rows_that_repeat_items_are_kept_only_where_that_is_asked(world, monkeypatch):
    change_benchmark(world, monkeypatch)
    dropped, report = prepared(world)
    kept, other = prepared(world, drop_overlap=False)
    assert len(kept) == len(dropped) + 1 and other["cache"] != report["cache"]


def test_a_special_token_that_only_the_tokenizers_settings_name_makes_a_new_cache(world):
    """Rows with a special token are dropped; which tokens are special is also in special_tokens_map.json."""
    rows, report = prepared(world)
    before = world.tokenizer.backend_tokenizer.to_str()
    world.tokenizer.additional_special_tokens = ["<|im_start|>", "<|im_end|>", "สวัสดี"]
    assert world.tokenizer.backend_tokenizer.to_str() == before
    new_rows, new_report = prepared(world)
    assert len(new_rows) == len(rows) - 1 and new_report["cache"] != report["cache"]


def test_a_change_of_any_file_of_the_code_makes_the_rows_anew(world, monkeypatch):
    copies = [Path(shutil.copy(file, world.folder)) for file in CODE]
    assert {path.name for path in copies} == {path.name for path in (ROOT / "ouro/data").glob("*.py")}
    rows, report = prepared(world)
    monkeypatch.setattr(cache, "CODE", copies)
    assert prepared(world)[1] == report | {"from_cache": True}
    seen = {report["cache"]}
    for path in copies:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        new_rows, new_report = prepared(world)
        assert new_report["cache"] not in seen and not new_report["from_cache"] and new_rows == rows, path.name
        seen.add(new_report["cache"])


SAME_ROWS = {
    "learning_rate": {"learning_rate": 1.0},
    "rows_per_step": {"rows_per_step": 7},
    "pass_tokens": {"pass_tokens": 512},
    "seed": {"seed": 1},
    "output_dir": {"output_dir": "elsewhere"},
    "total_ut_steps": {"total_ut_steps": 2},
    "floors": {"max_empty_share": 0.5, "max_too_long_share": 0.5, "min_trained_share": 0.001, "min_end_survival": 0.1},
}


@pytest.mark.parametrize("changes", SAME_ROWS.values(), ids=SAME_ROWS)
def test_a_change_of_anything_else_reads_the_cache(world, changes):
    rows, report = prepared(world)
    again, other = prepared(world, **changes)
    assert (again, other["cache"], other["from_cache"]) == (rows, report["cache"], True)


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


def in_second_process(connection, s: Settings, builder: bool, pid: int | None) -> None:
    """Sends "ready", and after the answer the rows' digest and the report, or the error."""
    if pid:
        os.getpid = lambda: pid
    tokenizer = load_tokenizer(MODEL)
    if not builder:
        chats.encode_texts = None  # calling it is an error
    connection.send("ready")
    connection.recv()
    try:
        rows, report = prepare(s, tokenizer, builder=builder, quiet=True, wait=partial(time.sleep, 0.2))
        connection.send((digest(rows), report))
    except Exception as error:  # noqa: BLE001
        connection.send(repr(error))


def start(s: Settings, builder: bool = True, pid: int | None = None) -> SimpleNamespace:
    """A second process that is about to prepare."""
    here, there = SECOND.Pipe()
    process = SECOND.Process(target=in_second_process, args=(there, s, builder, pid), daemon=True)
    process.start()
    there.close()
    assert here.poll(PATIENCE) and here.recv() == "ready"
    return SimpleNamespace(process=process, connection=here)


def go(*children: SimpleNamespace) -> None:
    for child in children:
        child.connection.send("go")


def result(child: SimpleNamespace) -> tuple[str, dict]:
    assert child.connection.poll(PATIENCE)
    got = child.connection.recv()
    child.process.join(PATIENCE)
    assert isinstance(got, tuple), got
    return got


def wait_for(found) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A data set that takes a second to tokenise, and its cache as one undisturbed process makes it."""
    folder = tmp_path_factory.mktemp("large")
    data = folder / "train.jsonl"
    write_set(data, [(f"คำถามที่ {i}", "", f"{i} {TRAIN[i % 6][2]} " * 12, "MIT") for i in range(4 * CHUNK)])
    rows, report = prepare(plain(data, folder / "cache"), load_tokenizer(MODEL), quiet=True)
    return SimpleNamespace(
        data=data, digest=digest(rows), name=Path(report["cache"]).name, files=files(report["cache"])
    )


def started_building(cache: Path) -> bool:
    return any(path.stat().st_size for path in cache.glob(".*/rows.arrow"))


def test_a_killed_build_leaves_no_cache_and_does_not_disturb_the_next(large, tmp_path):
    s = plain(large.data, tmp_path)
    for _ in range(2):
        child = start(s)
        go(child)
        wait_for(lambda: started_building(tmp_path))
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.join(PATIENCE)
        assert child.process.exitcode == -signal.SIGKILL
        assert not (tmp_path / large.name).exists()
    assert any("rows.arrow" in name for name in listing(tmp_path)), "killed too late"
    rows, report = prepare(s, load_tokenizer(MODEL), quiet=True)
    assert not report["from_cache"] and digest(rows) == large.digest
    assert files(tmp_path / large.name) == large.files
    assert [path.name for path in tmp_path.iterdir()] == [large.name], "what was left of killed processes is gone"


def test_two_processes_that_build_the_same_at_once_both_succeed(large, tmp_path):
    """With one process number, as in two containers that share a file system."""
    children = [start(plain(large.data, tmp_path), pid=1) for _ in range(2)]
    go(*children)
    for rows, report in map(result, children):
        assert rows == large.digest and not report["from_cache"]
    names = ("SHA256SUMS", "report.json", "rows.arrow")
    assert listing(tmp_path) == [large.name, *(f"{large.name}/{name}" for name in names)]
    assert files(tmp_path / large.name) == large.files


def test_a_process_that_is_not_the_builder_waits_and_does_not_tokenise(large, tmp_path):
    s = plain(large.data, tmp_path)
    waiting = start(s, builder=False)
    go(waiting)
    assert not waiting.connection.poll(0.5) and listing(tmp_path) == []
    rows, _ = prepare(s, load_tokenizer(MODEL), quiet=True)
    assert result(waiting)[0] == digest(rows) == large.digest


# ----------------------------------------------------------------------------------------------------------------------
# full disks, damaged files, bad rows


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and what sets its size in kB."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", *arguments, str(disk)], capture_output=True, text=True)

    done = mount("-t", "tmpfs", "-o", "size=64k", "tmpfs") if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount command'}")
    (disk / "mine.txt").write_text("years of work")

    def resize(size: int) -> None:
        assert mount("-o", f"remount,size={size}k").returncode == 0

    yield disk, resize
    subprocess.run(["umount", str(disk)], check=True)


def test_wherever_the_disk_fills_up_nothing_is_left_until_it_fits(small_disk, world):
    disk, resize = small_disk
    sample = {"dataset_path": str(ROOT / "sample/wangchan"), "max_length": 1024, "cache_dir": str(disk)}
    full = 0
    for size in (*range(8, 128, 24), *range(128, 176, 8)):  # full among the rows, at their end, in the report
        resize(size)
        try:
            rows, _ = prepared(world, **sample)
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC and str(error.filename).startswith(str(disk)), "which disk?"
            assert listing(disk) == ["mine.txt"]
            full += 1
    assert full >= 6 and rows == prepared(world, **sample | {"cache_dir": str(world.folder / "cache")})[0]


DAMAGE = {
    "empty": lambda data: b"",
    "first half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-3],
    "a bit flipped": lambda data: data[:700] + bytes([data[700] ^ 4]) + data[701:],
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["rows.arrow", "report.json"])
def test_a_damaged_cache_is_refused_by_name(world, monkeypatch, capsys, name, damage):
    cache = Path(prepared(world)[1]["cache"])
    path = cache / name
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    argv = ["--model_name_or_path", MODEL, "--paths", f"thai_exam={world.s.paths['thai_exam']}"]
    for key in ("dataset", "dataset_path", "overlap", "cache_dir", "max_length", "length_policy", "max_empty_share"):
        argv += [f"--{key}", str(getattr(world.s, key))]
    monkeypatch.setattr(sys, "argv", ["data_config.py", *argv, "--output_dir", str(world.folder / "out")])
    with pytest.raises(SystemExit) as end:
        call(data_config.main)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith(f"error: the cache {cache} is damaged (")
    assert message.endswith("): delete it and run again\n") and not (world.folder / "out").exists()


def test_a_bad_row_late_in_the_file_leaves_nothing_in_the_cache(tmp_path, tokenizer):
    write_set(tmp_path / "train.jsonl", [(f"ถาม {i}", "", "ตอบ", "MIT") for i in range(2 * CHUNK + 88)])
    with open(tmp_path / "train.jsonl", "a", encoding="utf-8") as file:
        file.write('{"Instruction": "ถาม", "Inp\n')
    with pytest.raises(UserError, match="train.jsonl, line 601: not valid JSON"):
        prepare(plain(tmp_path / "train.jsonl", tmp_path / "cache"), tokenizer, quiet=True)
    assert listing(tmp_path / "cache") == []


# ----------------------------------------------------------------------------------------------------------------------
# memory


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measured(connection, *all_settings: Settings) -> None:
    for s in all_settings:
        rows, _ = prepare(s, load_tokenizer(MODEL), quiet=True)
        connection.send((len(rows), peak_memory()))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set(tmp_path):
    """20,000 rows of 3,000 characters, one in twenty of which is tokenised, after 1,000 of which all are."""
    chance = np.random.default_rng(0)
    words = ["".join(map(chr, chance.integers(97, 123, n))) for n in chance.integers(2, 9, 2000)]
    texts = [" ".join(chance.choice(words, 700))[:3000].ljust(3000, "x") for _ in range(50)]
    sizes = (1000, 20_000)
    for size in sizes:
        licences = ("MIT" if i % 20 == 0 or size == sizes[0] else "CC-BY-NC-4.0" for i in range(size))
        rows = ((f"{i} {texts[i % 50]}", "", f"{i}", licence) for i, licence in enumerate(licences))
        write_set(tmp_path / f"{size}.jsonl", list(rows))
    here, there = SECOND.Pipe()
    common = {"licence": "permissive", "normalise_thai": False}
    s = [replace(plain(tmp_path / f"{size}.jsonl", tmp_path), **common) for size in sizes]
    process = SECOND.Process(target=measured, args=(there, *s), daemon=True)
    process.start()
    got = [here.recv() for _ in sizes if here.poll(PATIENCE)]
    process.join(PATIENCE)
    assert [rows for rows, _ in got] == [1000, 1000]
    small, big = (peak for _, peak in got)
    assert big - small < (tmp_path / "20000.jsonl").stat().st_size / 2
