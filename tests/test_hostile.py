"""Files of others: code in a model's folder never runs, and what no memory holds is refused before it is taken."""

import errno
import gzip
import io
import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from ouro import files
from ouro.data import chats, formats, sources, tables
from ouro.evaluate.models import find_baseline
from ouro.evaluate.replies import Cache
from ouro.evaluate.results import read_study
from ouro.files import UserError, check_writable, read_yaml
from ouro.model.loading import adapter_config, load_ouro, load_tokenizer
from ouro.settings import Settings

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PATIENCE
from helpers import ROOT

TINY = ROOT / "sample/ouro-tiny"
CODE = "open({!r}, 'w').close()\nfrom transformers import {} as Evil\n"
EVIL = {  # by what brings code: the file that names it, and what it then says
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil"] * 2}},
    ),
    "config": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    "model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}}),
    "generation": ("generation_config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}),
}  # fmt: skip


def folder_with(folder: Path, name: str, change: dict) -> Path:
    """A copy of the embedded model of which one JSON file says something else."""
    shutil.copytree(TINY, folder)
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | change))
    return folder


def attempts(folders: list[Path], stdin: int, told: multiprocessing.connection.Connection) -> None:
    """Loads what there is to load of each folder, and sends what became of it."""
    os.dup2(stdin, 0)
    sys.stdin = open(0)  # noqa: SIM115
    here = Settings(bf16=False)
    for folder, load in itertools.product(
        map(str, folders),
        (load_tokenizer, load_ouro, lambda f: baseline(f, here).tokenizer(), lambda f: baseline(f, here).load(here)),
    ):
        try:
            load(folder)
            told.send("loaded")
        except (UserError, ValueError) as error:
            told.send(str(error))
    told.send(None)


def baseline(folder: str, s: Settings):
    return find_baseline(folder, s)[0]


@pytest.mark.parametrize("stdin", ["terminal", "pipe", "nothing"])
def test_no_code_of_a_model_folder_runs_whoever_would_say_yes(tmp_path, stdin):
    folders = [folder_with(tmp_path / kind, *named) for kind, named in EVIL.items()]
    for folder in folders:
        code = CODE.format(str(tmp_path / "ran"), "PretrainedConfig")
        files.write_atomic(folder / "evil.py", code)
        files.write_atomic(folder / "custom_generate/generate.py", code)
    if stdin == "nothing":
        opened = [os.open(os.devnull, os.O_RDONLY)]
    else:
        opened = [*reversed(pty.openpty())] if stdin == "terminal" else [*os.pipe()]
        os.write(opened[1], b"y\n" * 50)
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=attempts, args=(folders, opened[0], there))
    child.start()
    said = []
    while here.poll(PATIENCE) and (became := here.recv()):
        said.append(became)
    child.join(PATIENCE)
    for descriptor in opened:
        os.close(descriptor)
    assert child.exitcode == 0 and len(said) == 4 * len(folders)
    assert not (tmp_path / "ran").exists(), said
    assert said.count("loaded") >= 8 and sum("code of a model's folder is never run" in text for text in said) >= 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 1,024, found 1000000000"),
        ({"vocab_size": -1}, "vocab_size must be"),
        ({"intermediate_size": None}, "intermediate_size must be .* found None"),
        ({"hidden_size": 10**400}, "hidden_size must be"),
        ({"head_dim": "64"}, "head_dim must be .* found '64'"),
        ({"total_ut_steps": 1.5}, "total_ut_steps must be"),
        ({"rope_theta": "x"}, "rope_theta"),
        ({"max_position_embeddings": [1]}, "max_position_embeddings must be"),
    ],
)
def test_absurd_numbers_of_a_config_are_refused_before_memory_is_taken(tmp_path, change, told):
    folder = folder_with(tmp_path / "model", "config.json", change)
    for load in (load_tokenizer, load_ouro):
        with pytest.raises(UserError, match=told):
            load(str(folder))


@pytest.mark.parametrize("name", ["weights.bin", "../model.safetensors"])
def test_weights_are_those_of_safetensors_files_in_the_folder(tmp_path, name):
    folder = folder_with(tmp_path / "model", "config.json", {})
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is no .safetensors file beside it"):
        load_ouro(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[]", "1" * 5000, "\x00", "\udcff"], ids=range(6))
def test_a_json_file_of_another_shape_is_one_message(tmp_path, name, text):
    folder = folder_with(tmp_path / "model", name, {})
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "TimeoutError: not done after",
        ),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ messages[99].role + 1 }}", "no element 99"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for", "unexpected|Expected|expected"),
    ],
)
def test_a_chat_template_that_fails_or_does_not_end_is_one_message(tmp_path, monkeypatch, template, told):
    monkeypatch.setattr(chats, "PATIENCE", 0.2 if "Timeout" in told else PATIENCE)
    tokenizer = load_tokenizer(str(TINY))
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"the chat template refuses a chat: .*({told})"):
        chats.chat_text([{"role": "user", "content": "x"}], tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in itertools.pairwise("abcdefghijklmn")),
        "a: " + "[" * 100_000,
        "a: " + "x" * (1 << 19),
        "a: !!python/object/apply:os.system [touch ran]",
    ],
    ids=["alias bomb", "deep", "long", "code"],
)
def test_a_yaml_file_that_stands_for_more_than_it_holds_is_one_message(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="a.yaml"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="/dev/zero"):
        read_yaml("/dev/zero")


def test_what_unpacks_to_more_than_a_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "WHOLE", 1 << 20)
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    (tmp_path / "line.jsonl.gz").write_bytes(gzip.compress(b" " * (2 << 20)))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(b"[\n" + b" \n" * (1 << 20)))
    (tmp_path / "line.json").write_text(json.dumps([{"a": "x" * 700_000}] * 2))
    monkeypatch.setattr(formats, "WHOLE", 1 << 21)
    assert formats.count_rows([tmp_path / "line.json"]) == 2, "json.dump writes a list in one line"
    monkeypatch.setattr(formats, "WHOLE", 1 << 20)
    (tmp_path / "values.json").write_bytes(b"[\n" + b"{},\n" * (1 << 14) + b"{}]")
    (tmp_path / "cells.csv").write_text('prompt,completion\n"\n",' + '"",' * (1 << 20))
    (tmp_path / "cell.csv.gz").write_bytes(gzip.compress(b'prompt,completion\n"' + b"x" * (4 << 20)))
    tried = (("line.jsonl.gz", "a line of more than 1 MiB"), ("list.json.gz", "a JSON list of more than 1"),
             ("values.json", "more than 16,384 values"), ("cell.csv.gz", "line 2: a row of more than 1 MiB"),
             ("cells.csv", "line 2: a row of .* or a million cells"))  # fmt: skip
    for name, told in tried:
        with pytest.raises(UserError, match=told):
            list(formats.read_file(tmp_path / name))
        with pytest.raises(UserError, match=told):
            formats.count_rows([tmp_path / name])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("x.jsonl")
        member.size = 2 << 20
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    (tmp_path / "a.tar.gz").write_bytes(packed.getvalue())
    monkeypatch.setattr(sources, "LONGEST", 1 << 20)
    with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
        list(sources.read_benchmark("a", {"archive": "a.tar.gz", "file": "x.jsonl"}, str(tmp_path), "x.jsonl"))


@pytest.mark.parametrize("level", [0, 9])
def test_a_gz_file_of_ten_mebibytes_of_rows_is_read(tmp_path, level):
    rows = [{"prompt": random.Random(n).randbytes(1 << 19).hex()} for n in range(10)]
    for name, text in (("a.json.gz", json.dumps(rows)), ("a.jsonl.gz", "\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_bytes(gzip.compress(text.encode(), level))
        assert [row for _, row in formats.read_file(tmp_path / name)] == rows


@pytest.mark.parametrize("part", [b"", b"\n"])
def test_a_gz_file_of_parts_without_contents_is_refused(tmp_path, part):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(part) * 99_999)
    with pytest.raises(UserError, match="a.jsonl.gz is damaged: 1024 KiB of it hold next to nothing"):
        list(formats.read_file(tmp_path / "a.jsonl.gz"))
    row = gzip.compress(b'{"prompt":"a","completion":"b"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(row * 40_000 + gzip.compress(b""))
    assert formats.count_rows([tmp_path / "a.jsonl.gz"]) == 40_000


def test_a_small_file_that_stands_for_a_huge_one_is_refused(tmp_path, monkeypatch):
    for name, most in (("WHOLE", 1 << 21), ("LONGEST", 1 << 20), ("PACKED", 1 << 10)):
        monkeypatch.setattr(formats, name, most)
    (tmp_path / "blank.jsonl.gz").write_bytes(gzip.compress(b"\n" * (2 << 20)))
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"prompt,completion\n" + b"a,b\n" * (1 << 18)))
    null, long = pa.nulls(300_000, pa.string()), "x" * (1 << 20)
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 9, pa.int32()), [long])
    turns = pa.ListArray.from_arrays([0, 9], pa.StructArray.from_arrays([once], ["content"]))
    for name, column in (("null", null), ("once", once), ("turns", turns), ("plain", pa.array([long * 4]))):
        table = pa.table({"messages": column})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd", store_schema=False)
    with pa.ipc.new_stream(tmp_path / "null.arrow", pa.schema({"messages": pa.null()})) as arrow:
        for _ in range(9):  # 10,000 rows each would pass
            arrow.write_batch(pa.record_batch({"messages": pa.nulls(10_000)}))
    for file in sorted({*tmp_path.iterdir()}):
        with pytest.raises(UserError, match=f"{file.name} unpacks to more than 256 times its size"):
            list(formats.read_file(file))


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("packed", ["zstd", "lz4", None])
def test_an_arrow_file_is_read_also_where_its_columns_are_compressed(tmp_path, dictionary, packed):
    texts = pa.array(["ก" * 50, "ข"])
    batch = pa.record_batch({"x": texts.dictionary_encode() if dictionary else texts})
    options = pa.ipc.IpcWriteOptions(compression=packed)
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema, options=options) as file:
        file.write_batch(batch)
    assert [row["x"] for _, row in formats.read_file(tmp_path / "a.arrow")] == ["ก" * 50, "ข"]
    assert formats.count_rows([tmp_path / "a.arrow"]) == 2


SHARED = {  # by what lets values share their bytes
    "list_view": pa.ListViewArray.from_arrays([0, 0], [1, 1], pa.array(["a"])),
    "run_end_encoded": pa.RunEndEncodedArray.from_arrays([2], ["a"]),
    "dense_union": pa.UnionArray.from_dense(
        pa.array([0, 0], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array(["a"])]
    ),
    "struct": pa.StructArray.from_arrays([pa.RunEndEncodedArray.from_arrays([2], ["a"])], ["x"]),
    "dictionary": pa.DictionaryArray.from_arrays([0, 0], pa.array([["a"]])),
    "dictionary<values=string_view": pa.DictionaryArray.from_arrays([0, 0], pa.array(["a"], pa.string_view())),
}


@pytest.mark.parametrize("kind", SHARED)
def test_columns_whose_values_share_their_bytes_are_refused_where_they_are_read(tmp_path, kind):
    batch = pa.record_batch({"x": SHARED[kind], "y": ["c", "d"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", batch.schema) as file:
        file.write_batch(batch)
    assert [row for _, row in formats.read_file(tmp_path / "a.arrow", ["y"])] == [{"y": "c"}, {"y": "d"}]
    with pytest.raises(UserError, match=f"a.arrow: column 'x' is of type {kind}<?.*, which is not read"):
        list(formats.read_file(tmp_path / "a.arrow"))


VIEW = pa.list_(pa.struct({"role": pa.string_view(), "content": pa.string_view()}))


@pytest.mark.parametrize("write", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("packed", ["zstd", None])
def test_an_arrow_file_as_polars_writes_it_is_read(tmp_path, write, packed):
    rows = [[{"role": "user", "content": "ถาม"}, {"role": "assistant", "content": f"ตอบ {n}" * 9}] for n in range(900)]
    batch = pa.record_batch({"messages": pa.array(rows, VIEW)})
    with write(tmp_path / "a.arrow", batch.schema, options=pa.ipc.IpcWriteOptions(compression=packed)) as file:
        for _ in range(2):
            file.write_batch(batch)
    assert [row["messages"] for _, row in formats.read_file(tmp_path / "a.arrow", ["messages"])] == rows * 2
    assert formats.count_rows([tmp_path / "a.arrow"]) == 1800


def test_texts_that_are_views_of_the_same_bytes_are_counted_one_by_one(tmp_path):
    view = np.array([1 << 20, 0x78787878, 0, 0], np.int32).tobytes()  # length, first letters, buffer, place
    buffers = [None, pa.py_buffer(view * 900), pa.py_buffer(b"x" * (1 << 20))]
    batch = pa.record_batch({"x": pa.Array.from_buffers(pa.string_view(), 900, buffers)})
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as file:
        file.write_batch(batch)
    with pytest.raises(UserError, match="a.arrow unpacks to more than 256 times its size"):
        list(formats.read_file(tmp_path / "a.arrow"))


def test_a_packed_file_under_another_name_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as packed:
        packed.writestr("a.csv", "prompt,completion\n")
    with pytest.raises(UserError, match=r"a.csv is a ZIP archive: unpack it"):
        list(formats.read_file(tmp_path / "a.csv"))


def test_one_long_text_of_a_dictionary_beside_short_rows_is_read(tmp_path):
    texts = ["ยาว" * (1 << 18), *(f"{n % 9}" for n in range(5000))]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "a.parquet", compression="zstd")
    assert [row["prompt"] for _, row in formats.read_file(tmp_path / "a.parquet")] == texts


def test_a_column_of_many_categories_is_read(tmp_path):
    count = 200_000  # each batch of a Parquet file has all of them
    texts = pa.array([f"คำถาม {n}" for n in range(count)]).dictionary_encode()
    pq.write_table(pa.table({"prompt": texts, "completion": ["x"] * count}), tmp_path / "a.parquet")
    assert (
        sum(row["prompt"] == f"คำถาม {n}" for n, (_, row) in enumerate(formats.read_file(tmp_path / "a.parquet")))
        == count
    )


def claim_gigabytes(file: Path) -> None:
    """A Parquet file whose end says that all of it describes its columns."""
    with open(file, "wb") as opened:
        opened.write(b"PAR1")
        opened.truncate(50 << 30)
        opened.seek(0, os.SEEK_END)
        opened.write((2**32 - 1).to_bytes(4, "little") + b"PAR1")


def test_small_files_are_tried_by_one_process_but_one_that_ends_it_by_its_own(tmp_path, monkeypatch):
    files, begun, run = [tmp_path / f"{name}.parquet" for name in "abcd"], [], tables.subprocess.run
    for file in files:
        pq.write_table(pa.table({"x": [file.stem]}), file)
    claim_gigabytes(files[2])
    monkeypatch.setattr(formats, "SMALL", 1 << 40)
    monkeypatch.setattr(tables.subprocess, "run", lambda *told, **kwargs: begun.append(kwargs) or run(*told, **kwargs))
    formats.try_together(files, ["x"])
    for file in (files[0], files[1]):
        assert [row["x"] for _, row in formats.read_file(file, ["x"])] == [file.stem]
    with pytest.raises(UserError, match="c.parquet is not a readable"):
        list(formats.read_file(files[2], ["x"]))
    assert len(begun) == 2
    assert [row["x"] for _, row in formats.read_file(files[3], ["x"])] == ["d"]
    assert len(begun) == 3
    code = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    threads = run([sys.executable, "-c", code], env=begun[0]["env"], capture_output=True).stdout
    assert int(threads) == 1, "each processor's would take memory of what the process may have"


def try_edited(file: Path) -> None:
    """Tries a Parquet file with each byte of its footer changed."""
    sound = file.read_bytes()
    for at in range(len(sound) - 8 - int.from_bytes(sound[-8:-4], "little"), len(sound)):
        for value in (0, sound[at] ^ 1):
            file.write_bytes(sound[:at] + bytes([value]) + sound[at + 1 :])
            with suppress(UserError, MemoryError):
                tables.try_through(str(file), [], [], 1 << 28, 1 << 26)


def test_no_byte_of_a_footer_ends_the_process(tmp_path):
    pq.write_table(pa.table({"x": ["a", "b"]}), tmp_path / "a.parquet")
    child = multiprocessing.get_context("fork").Process(target=try_edited, args=(tmp_path / "a.parquet",))
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("end", "said", "told"),
    [
        (-signal.SIGABRT, b"terminate called", "is not a readable Parquet file: reading it ends in SIGABRT"),
        (-signal.SIGXCPU, b"", "takes much longer"),
        (1, b"Traceback\npyarrow.lib.ArrowMemoryError: malloc of size 9", "takes more than 1024 MiB"),
        (1, b"lost sys.stderr\n", "takes more than 1024 MiB"),
        (1, b"MemoryError\nException ignored in sys.unraisablehook\n", "takes more than 1024 MiB"),
    ],
)
def test_a_file_that_ends_the_process_that_tries_it_is_one_message(tmp_path, monkeypatch, end, said, told):
    pq.write_table(pa.table({"x": ["a"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(
        tables.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=end, stdout=b"", stderr=said)
    )
    with pytest.raises(UserError, match=told):
        list(formats.read_file(tmp_path / "a.parquet"))


def test_a_footer_that_claims_gigabytes_is_one_message(tmp_path):
    claim_gigabytes(tmp_path / "a.parquet")
    for read in (lambda file: list(formats.read_file(file)), lambda file: formats.count_rows([file])):
        with pytest.raises(UserError, match="not a readable Parquet file: reading it takes more than 1024"):
            read(tmp_path / "a.parquet")


def test_a_parquet_file_whose_parts_are_in_one_place_is_refused(tmp_path):
    pq.write_table(pa.table({"x": [f"{n}" for n in range(2000)]}), tmp_path / "a.parquet")
    footer = pq.read_metadata(tmp_path / "a.parquet")
    repeated = pq.read_metadata(tmp_path / "a.parquet")
    for _ in range(3):
        repeated.append_row_groups(footer)
    repeated.write_metadata_file(tmp_path / "footer")
    sound = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(sound[: -8 - footer.serialized_size] + (tmp_path / "footer").read_bytes()[4:])
    assert pq.read_table(tmp_path / "b.parquet").num_rows == 8000
    with pytest.raises(UserError, match="b.parquet is damaged: its columns take"):
        list(formats.read_file(tmp_path / "b.parquet"))
    assert len(list(formats.read_file(tmp_path / "a.parquet"))) == 2000


def test_a_row_of_a_table_is_no_longer_than_a_line_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST", 1000)
    for size in (400, 2000):
        pq.write_table(pa.table({"x": ["k" * size] * 9}), tmp_path / f"{size}.parquet", use_dictionary=False)
    assert len(list(formats.read_file(tmp_path / "400.parquet"))) == 9
    with pytest.raises(UserError, match=r"2000.parquet: a row of more than"):
        list(formats.read_file(tmp_path / "2000.parquet"))


def test_a_row_has_no_million_values(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [' + "1," * (1 << 20) + "1]}")
    with pytest.raises(UserError, match="a.jsonl, line 1: not valid JSON .more than 1,048,576 values"):
        list(formats.read_file(tmp_path / "a.jsonl"))
    row = {"prompt": 'a, [b], {"c": "\\"}, ' * (1 << 17)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert [found for _, found in formats.read_file(tmp_path / "a.jsonl")] == [row], "commas in a text are no values"


@pytest.mark.parametrize("unit", [b"<c/>", b'</row><row><c r="XFD1"/>'])
def test_a_small_workbook_that_stands_for_a_huge_one_is_refused(tmp_path, unit):
    book = openpyxl.Workbook()
    book.active.append(["prompt"])
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.xlsx") as sound, zipfile.ZipFile(tmp_path / "b.xlsx", "w", 8) as huge:
        for part in sound.namelist():
            text = sound.read(part)
            huge.writestr(part, text.replace(b"</row>", unit * (1 << 23) + b"</row>") if "sheet1" in part else text)
    with pytest.raises(UserError, match="b.xlsx unpacks to more than 256 times"):
        list(formats.read_file(tmp_path / "b.xlsx"))


def test_a_text_that_stands_in_all_cells_of_a_workbook_counts_in_each(tmp_path, monkeypatch):
    book = openpyxl.Workbook()
    for _ in range(400):
        book.active.append(["ก" * 1000, "ข" * 1000])
    book.save(tmp_path / "a.xlsx")
    assert len(list(formats.read_file(tmp_path / "a.xlsx"))) == 399
    for name, most, told in ("WHOLE", 1 << 20, "a.xlsx unpacks to more than"), ("LONGEST", 5000, "row 1: more than"):
        with monkeypatch.context() as limits, pytest.raises(UserError, match=told):
            limits.setattr(formats, name, most)
            limits.setattr(formats, "RATIO", 1)
            list(formats.read_file(tmp_path / "a.xlsx"))


@pytest.mark.parametrize("kind", ["locked", "encrypted"])
def test_a_workbook_with_a_password_is_told_to_be_one(tmp_path, kind):
    file = tmp_path / "a.xlsx"
    openpyxl.Workbook().save(file)
    headers = re.compile(b"(PK\x01\x02....|PK\x03\x04..)..", re.DOTALL)
    text = headers.sub(lambda found: found[1] + b"\1\0", file.read_bytes())  # the flag that says so
    file.write_bytes(text if kind == "encrypted" else bytes.fromhex("d0cf11e0a1b11ae1") + bytes(512))
    told = "locked with a password" if kind == "locked" else r"not a readable Excel workbook: .* is encrypted"
    with pytest.raises(UserError, match=told):
        list(formats.read_file(file))


def test_reading_a_table_ends_after_some_seconds_of_the_processor(tmp_path, monkeypatch):
    endless = "t.SECONDS = 0; t.try_through = lambda *_: all(iter(lambda: 1, 0)); t.main()"
    code, run = ["-c", f"import ouro.data.tables as t; {endless}"], subprocess.run
    monkeypatch.setattr(tables.subprocess, "run", lambda command, **how: run([command[0], *code], **how))
    openpyxl.Workbook().save(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match=r"a.xlsx.* takes much longer than a file of its size should"):
        list(formats.read_file(tmp_path / "a.xlsx"))


def test_a_wrong_training_set_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"no workbook")
    asked = ["data_config.py", "--dataset", "own", "--dataset_path", f"{tmp_path / 'a.xlsx'}"]
    code = f"""
import sys, data_config
from ouro.files import UserError
sys.argv = {asked}
try:
    data_config.main()
except UserError as error:
    print(error, *{{"torch", "transformers"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("a.xlsx is not a readable Excel workbook: File is not a zip file\n"), done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train_qlora.py", "--exp", "nosuch"],
        ["train_qlora.py", "--tasks", "nosuch"],
        ["train_qlora.py", "--overlap", "belebele", "--paths", "belebele=/nosuch"],
        ["evaluate.py", "--exp", "nosuch"],
        ["evaluate.py", "--ut_steps", "nosuch"],
        ["evaluate.py", "--tasks", "thai_exam", "--paths", "thai_exam=/nosuch"],
        ["data_config.py", "--dataset_path", "nosuch.csv"],
    ],
)
def test_a_mistake_in_a_command_is_told_before_torch_is_imported(command):
    script, argv = command[0], [*command, "--config", "configs/smoke.yaml"]
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {argv}\n"
    code += f"runpy.run_path('{script}', None, '__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nosuch" in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["train_qlora.py", "evaluate.py"])
def test_settings_from_a_pipe_are_read_once(script):
    """A second reading would find nothing, and the defaults would be used."""
    text = "model_name_or_path: nosuch\nmax_loss_spike: 7\n"  # which ends it, but after all checks of the command
    code = f"""
import runpy, sys, ouro.settings as settings
real, seen = settings.resolve, []
settings.resolve = lambda *args, **more: seen.append(real(*args, **more)) or seen[-1]
sys.argv = ["{script}", "--config", "/dev/stdin"]
try:
    runpy.run_path("{script}", run_name="__main__")
finally:
    print(*(run.settings.max_loss_spike for run in seen))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.stdout.endswith("\n7.0\n") or done.stdout == "7.0\n", (done.stdout, done.stderr)
    assert "torch" not in done.stderr and done.returncode == 2


def test_a_carriage_return_in_a_workbook_is_no_text(tmp_path):
    book = openpyxl.Workbook()
    for cell in ("prompt", "ก_x000D_\nข_x000d_", "_x005F_x000D_ _x0E01_"):
        book.active.append([cell])
    book.save(tmp_path / "a.xlsx")
    assert [row["prompt"] for _, row in formats.read_file(tmp_path / "a.xlsx")] == ["ก\r\nข\r", "_x000D_ _x0E01_"]


def test_cells_far_out_are_read_or_take_too_much_memory(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["prompt", "completion"])
    book.active["A1048576"] = "last"
    book.save(tmp_path / "far.xlsx")
    rows = [row for _, row in formats.read_file(tmp_path / "far.xlsx")]
    assert rows == [{"prompt": "last", "completion": ""}]
    book.active["XFD2"] = 1
    book.save(tmp_path / "both.xlsx")
    with pytest.raises(UserError, match="both.xlsx is not a readable Excel workbook: .* takes more than 1024 MiB"):
        list(formats.read_file(tmp_path / "both.xlsx"))


def test_a_table_that_begins_in_the_middle_of_a_sheet_is_read(tmp_path):
    book = openpyxl.Workbook()
    for number, cells in (3, ["", "prompt", "completion"]), (5, ["", "ก", "ข"]):
        for column, cell in enumerate(cells, 1):
            book.active.cell(number, column, cell or None)
    book.save(tmp_path / "a.xlsx")
    [(where, row)] = formats.read_file(tmp_path / "a.xlsx")
    assert (where[-5:], row) == ("row 5", {"prompt": "ก", "completion": "ข"})


def test_rows_of_a_workbook_that_stand_out_of_order_are_all_read(tmp_path):
    book = openpyxl.Workbook()
    for number in ("prompt", 2, 3, 4):
        book.active.append([number])
    book.save(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "a.xlsx") as sound, zipfile.ZipFile(tmp_path / "b.xlsx", "w") as mixed:
        for part in sound.namelist():
            text = sound.read(part)
            rows = re.findall(b"<row .*?</row>", text, re.DOTALL)
            mixed.writestr(part, text.replace(b"".join(rows), b"".join(rows[::-1])) if rows else text)
    read = [(where[-1], row["prompt"]) for where, row in formats.read_file(tmp_path / "b.xlsx")]
    assert read == [("2", "2"), ("3", "3"), ("4", "4")]


def test_a_cell_of_a_workbook_that_would_be_read_as_something_else_is_no_text(tmp_path):
    book = openpyxl.Workbook()
    for row in (["prompt", "completion"], [1, -(1 << 52)], ["ก", 1 << 60]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    (_, whole), (_, cut) = formats.read_file(tmp_path / "a.xlsx")
    assert whole == {"prompt": "1", "completion": f"{-(1 << 52)}"}
    assert isinstance(cut["completion"], float), "its last digits are lost: no text, so refused where it is trained"
    book.active["B4"] = "#N/A"
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(UserError, match="b.xlsx: cell B4 shows an error of Excel's"):
        list(formats.read_file(tmp_path / "b.xlsx"))


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOENT])
def test_paths_that_cannot_be_are_one_message(tmp_path, number, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    name = {errno.ENAMETOOLONG: "x" * 300, errno.ELOOP: "loop", errno.EISDIR: ".", errno.ENOENT: "gone/x"}[number]
    with pytest.raises(SystemExit) as end:
        files.call(lambda: (tmp_path / name).read_text())
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {os.strerror(number)}")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.yaml", lambda f: files.read_yaml(f)),
        ("manifest.json", lambda f: files.read_json(f)),
        ("rows.arrow", lambda f: files.file_sha256(f)),
        ("SHA256SUMS", lambda f: files.sealed_files(f.parent)),
        ("train.jsonl", lambda f: sources.split_files(f.parent, None, "train")),
        ("data/train.parquet", lambda f: sources.split_files(f.parents[1], None, "train")),
        ("items.jsonl", lambda f: list(formats.read_file(f))),
        ("tokenizer.json", lambda f: load_tokenizer(str(f.parent))),
        ("adapter_config.json", lambda f: adapter_config(f.parent)),
        ("thai_exam-ut1.json", lambda f: read_study(f)),
        (".x.cache.jsonl", lambda f: Cache(f)),
    ],
)
def test_what_is_no_file_is_not_waited_for(tmp_path, name, read):
    pipe = folder_with(tmp_path / "model", "config.json", {}) / name
    pipe.parent.mkdir(exist_ok=True)
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"{re.escape(name)}: a named pipe or a device, and no file"):
        read(pipe)


def test_of_a_proxys_password_that_is_not_quoted_no_part_is_shown(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://user:first#last@host:1")
    assert (
        files.message("cannot parse 'user:first' of http://user:first#last@host:1")
        == "cannot parse '…' of http://…@host:1"
    )


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=rf"^output_dir = \S+: nothing can be written to {tmp_path}: name another"):
        check_writable("output_dir", tmp_path / "a/b")
    (tmp_path / "there").mkdir()
    check_writable("output_dir", tmp_path / "there/b")
    assert not (tmp_path / "there/b").exists()


def test_a_program_runs_with_its_output_closed():
    code = "import sys; from ouro.files import call; call(lambda: sys.stdout.isatty() or sys.stderr.isatty())"
    done = subprocess.run(["sh", "-c", f"{sys.executable} -c '{code}' >&- 2>&-; echo $?"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "0\n"


def test_a_python_without_the_packages_is_told_how_to_get_them(tmp_path):
    command = [sys.executable, "-S", "-I", "train_qlora.py"]  # without site-packages
    code = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path('train_qlora.py', run_name='__main__')"
    done = subprocess.run([*command[:3], "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {sys.executable} has none of the packages: `make env`, then `. .venv/bin/activate`\n"
