"""The rows of JSON Lines, JSON, CSV, Excel, Parquet and Arrow files, each with where it stands."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from ouro.data.shards import kind_of
from ouro.data.tables import FOUND, NAMES, RATIO, in_one_line, read_rows, refuse_repeated, try_all, workbook_rows
from ouro.data.thai import trim
from ouro.files import VALUES, UserError, from_json, nearest, read_yaml, regular
from ouro.settings import DATASETS

LONGEST = 1 << 26  # bytes of a line
WHOLE = 1 << 29  # bytes of what is read whole, unpacked: an archive, a JSON list
PACKED = 1 << 15  # bytes of a compressed file that may unpack to RATIO times as many
EMPTY = 1 << 20  # bytes of one that may unpack to less than a quarter of them
SMALL = 1 << 22  # bytes of a Parquet, Arrow or Excel file that is tried together with others


def columns_of(entry: dict) -> list[str]:
    """The columns that rows of a training set must have, by its row of datasets.yaml."""
    named = [*entry.get("prompt", ()), entry.get("completion"), entry.get("messages"), entry.get("answer")]
    licence = entry.get("licence")
    named += [entry.get("held_out", {}).get("hash"), licence.get("column") if isinstance(licence, dict) else None]
    return list(dict.fromkeys(name for name in named if name and name not in entry.get("optional", ())))


def check_columns(where: str, found: Iterable[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            close = nearest(column, found).partition("; known")[0]
            trained = list(columns) in map(columns_of, read_yaml(DATASETS).values())  # and no benchmark
            other = f"; {way_to_read(found)}" if trained else ""
            both = f"wanted are {', '.join(columns)}; columns found: {', '.join(found)}"
            raise UserError(f"{where}: no column {column!r}{close}; {both}{other}")


def way_to_read(found: Iterable[str]) -> str:
    """How to train on rows with such columns: by the training set that has them, or where none has."""
    # one's own data first, the embedded sample last: it has a published set's columns
    entries = sorted(read_yaml(DATASETS).items(), key=lambda item: ("path" in item[1], "hub_id" in item[1]))
    fits = [name for name, entry in entries if (layout := columns_of(entry)) and {*layout} <= {*found}]
    if fits:
        return f"rows with these are read by DATASET={fits[0]} (--dataset {fits[0]})"
    return ("rename them, or name them in a row of configs/datasets.yaml, as `mine: {language: th, prompt: [QUESTION], "
            "completion: ANSWER}`, and say DATASET=mine (--dataset mine)")  # fmt: skip


def check_once(where: str, names: list[str]) -> None:
    if len({*names}) < len(names):  # of a million names each is not counted among all
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: column {twice!r} stands twice")


def read_file(file: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of a JSONL, JSON, CSV, Excel, Parquet or Arrow file, each with where it stands; never the whole file in
    memory, but for JSON that is one list. columns: must be there; of a Parquet or Arrow file no others are read, but
    for the `optional` ones and marks of training; none are named: all are read. Raises UserError: naming file and line
    (or row): not UTF-8, not JSON, not an object, a column missing."""
    regular(file)
    if (kind := kind_of(file)) in (".parquet", ".arrow"):
        yield from read_table(file, columns, optional)
    elif kind == ".xlsx":
        yield from read_workbook(file, columns)
    else:
        with unpacked(file) as opened:
            read = read_csv if kind in (".csv", ".csv.gz") else read_lines
            yield from read(f"{file}", opened, columns)


def read_files(files: Sequence[Path], columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[tuple]:
    """As `read_file`, of one file after the other."""
    try_together(files, columns, optional)
    for file in files:
        yield from read_file(file, columns, optional)


def columns_by_row(file: Path) -> Iterator[Iterable[str]]:
    """The columns that each row has, which of a Parquet or Arrow file are known without reading it. Errors as
    `read_file`."""
    if kind_of(file) in (".parquet", ".arrow"):
        found = tried_table(file, None)
        yield from repeat(found["names"], found["count"])
    else:
        yield from (row for _, row in read_file(file))


def count_rows(files: Sequence[Path]) -> int:
    try_together(files, None)
    return sum(tried_table(f, None)["count"] if kind_of(f) in NAMES else sum(1 for _ in read_file(f)) for f in files)


def question(file: Path, columns: Sequence[str] | None, optional: Sequence[str]) -> str:
    """What `try_all` is asked of a Parquet, Arrow or Excel file."""
    about = regular(file).stat()
    if kind_of(file) == ".xlsx":  # of which all is read
        columns, optional = None, ()
    limits = max(WHOLE // 2, RATIO * about.st_size), LONGEST
    return json.dumps([f"{file.absolute()}", columns, optional, *limits, about.st_mtime_ns])


def try_together(files: Iterable[Path], columns: Sequence[str] | None, optional: Sequence[str] = ()) -> None:
    """Tries in one process the files that take less time than the start of a process: small ones; and all of which only
    the columns' names and the number of rows are asked."""
    tables = (f for f in files if kind_of(f) in NAMES and (columns is None or f.stat().st_size < SMALL))
    try_all([question(file, columns, optional) for file in tables])


def tried_table(file: Path, columns: Sequence[str] | None, optional: Sequence[str] = ()) -> dict:
    """What `try_through` finds of a Parquet, Arrow or Excel file. Raises UserError: as it does; the file ended it."""
    try_all([asked := question(file, columns, optional)])
    if "error" in FOUND[asked]:
        raise UserError(FOUND[asked]["error"])
    return FOUND[asked]


def read_table(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet or Arrow file, ROWS of them in memory at a time. Errors as `read_file`."""
    found = tried_table(file, columns, optional)
    check_columns(f"{file}", found["names"], columns)
    check_once(f"{file}", found["names"])
    for number, row in enumerate(read_rows(file, found["wanted"], found["rows"]), 1):
        yield f"{file}, row {number}", row


def read_csv(name: str, file: IO[bytes], columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of a CSV file with a header, each a text for each column that has a name, and where it begins. Errors as
    `read_file`."""
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    size = cells = end = 0  # of the row that is read; the last line before it

    def lines() -> Iterator[str]:
        nonlocal size, cells
        for line in iter(partial(text.readline, LONGEST + 1), ""):
            size, cells = size + len(line), cells + line.count(",")
            if size > LONGEST or cells > VALUES:
                raise UserError(f"{name}, line {end + 1}: a row of more than {LONGEST >> 20} MiB or a million cells")
            yield line

    reader = csv.reader(lines(), strict=True)
    try:
        header = next(filter(any, reader), [])
        if header == ["sep=", ""]:  # tells Excel what stands between cells
            header = next(filter(any, reader), [])
        if len(header) == 1 and (mark := re.search(r"[;\t|]", header[0])):
            raise UserError(f"{name}: its cells are separated by {mark[0]!r}: save it with commas")
        check_once(name, named := [column for column in header if column])
        check_columns(name, named, columns)
        end = reader.line_num
        for row in reader:
            where, end, size, cells = f"{name}, line {end + 1}", reader.line_num, 0, 0
            if row and len(row) != len(header):
                raise UserError(f"{where}: {len(row)} cells, the header has {len(header)}")
            if any(row):  # of an empty line there are none, and of a sheet's unused row empty ones
                yield where, {column: cell for column, cell in zip(header, row, strict=True) if column}
    except UnicodeDecodeError as error:
        seems = "UTF-16" if b"\0" in error.object else "CP874" if re.search(rb"[\xa1-\xfb]{3}", error.object) else ""
        how = f" (it seems to be {seems}: iconv -f {seems} -t UTF-8 OLD.csv > NEW.csv)" if seems else ""
        raise UserError(f"{name}, after line {end}: not valid UTF-8: save it as CSV UTF-8{how}") from None
    except csv.Error as error:
        raise UserError(f"{name}, line {end + 1}: not valid CSV ({error})") from None


def read_workbook(file: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of the only sheet of an Excel workbook that is not empty, like those of `read_csv`."""
    tried_table(file, None)
    rows = workbook_rows(file)
    _, header = next(rows)
    named = [column for column, name in enumerate(header) if name]
    check_once(f"{file}", names := [header[column] for column in named])
    check_columns(f"{file}", names, columns)
    for number, cells in rows:
        cells += [""] * (len(header) - len(cells))
        yield f"{file}, row {number}", {header[column]: cells[column] for column in named}


class Unpacked(io.RawIOBase):
    """What is in a compressed file. Raises UserError or EOFError where some of it unpacks to what no rows do, as blank
    lines without end: reading on would take minutes, and tell nothing."""

    def __init__(self, opened: IO[bytes]):
        self.opened, self.empty, self.beyond = opened, 0, 0
        self.gzip = gzip.GzipFile(fileobj=SimpleNamespace(read=self.read_packed), mode="rb")

    def readable(self) -> bool:
        return True

    def read_packed(self, size: int) -> bytes:
        packed = self.opened.read(min(size, PACKED // 4))  # newer Pythons ask for more
        self.empty += len(packed)
        self.beyond = max(0, self.beyond - RATIO * len(packed))
        if self.empty > EMPTY:  # parts of a few bytes each; zeros after the end, which gzip reads one by one
            raise EOFError(f"{EMPTY >> 10} KiB of it hold next to nothing")
        return packed

    def readinto(self, buffer: memoryview) -> int:
        size = self.gzip.readinto(memoryview(buffer)[:PACKED])
        self.empty = max(0, self.empty - 4 * size)
        self.beyond += size
        if self.beyond > RATIO * PACKED:
            refuse_repeated(self.opened.name)
        return size


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """A file, opened; of a compressed one what is in it."""
    try:
        with open(file, "rb") as opened:
            begun = opened.peek(4)
            if begun.startswith(b"PK\3\4"):
                raise UserError(f"{file} is a ZIP archive: unpack it; or a workbook, if its name ended in .xlsx")
            packed = begun.startswith(b"\x1f\x8b")
            yield io.BufferedReader(Unpacked(opened), PACKED) if packed else opened
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is damaged: {in_one_line(error)}") from None


def numbered_lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, without a byte-order mark. They end at \\n alone: U+2028 may stand inside
    a string."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), b""), 1):
        # A small compressed file may hold a line that no memory does; json.dump writes a list in one.
        if len(line) > LONGEST and line.lstrip(codecs.BOM_UTF8 + b" ")[:1] != b"[":
            raise UserError(f"{name}: a line of more than {LONGEST >> 20} MiB: this is no file of rows")
        yield number, line.removeprefix(codecs.BOM_UTF8)


def read_lines(name: str, file: IO[bytes], columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The objects of JSON Lines, of which blank ones are passed over, or of a JSON list, which begins with "[". Errors
    as `read_file`."""
    numbered = numbered_lines(name, file)
    number, first = next(((n, line) for n, line in numbered if line.strip()), (1, b""))
    if first.lstrip().startswith(b"["):
        text = bytearray(b"\n" * (number - 1) + first)
        for more in iter(partial(file.read, 1 << 20), b""):
            text += more
            if len(text) > WHOLE:
                raise UserError(f"{name}: a JSON list of more than {WHOLE >> 20} MiB: write a row a line (JSON Lines)")
        rows = ((f"{name}, item {n}", item) for n, item in enumerate(parse_json(name, text, WHOLE >> 6), 1))
    elif first.strip() == b"{":
        raise UserError(f"{name}, line {number}: an object over several lines; rows are one a line, or one JSON list")
    else:
        lines = ((f"{name}, line {n}", line) for n, line in chain([(number, first)], numbered) if line.strip())
        rows = ((where, parse_json(where, line)) for where, line in lines)
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        check_columns(where, row, columns)
        yield where, row


def parse_json(where: str, text: bytes | bytearray, values: int = VALUES) -> object:
    try:
        decoded = text.decode("utf-8")
        if isinstance(text, bytearray):
            text.clear()  # of half a GiB, which the rows need
        else:
            decoded = decoded.rstrip()
        return from_json(decoded, values)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        where += f", line {error.lineno}" * ("\n" in error.doc.strip())
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of too many digits, brackets nested too deep
        raise UserError(f"{where}: not valid JSON ({error})") from None


def cell_text(row: dict, column: str, where: str, needed: bool = False) -> str:
    """A row's text or number as text; null and what is not there are "". Raises UserError for anything else, and for
    none where it is `needed`."""
    value = row.get(column)
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | None) or not finite:
        raise UserError(f"{where}: {column!r} must be a text, a number or null, found {value!r}")
    text = "" if value is None else str(value)
    if needed and not trim(text):
        raise UserError(f"{where}: no text in {column!r}; keys: {', '.join(row)}")
    return text
