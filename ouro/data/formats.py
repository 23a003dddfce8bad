"""The rows of JSON Lines, JSON, CSV, Excel, Parquet and Arrow files, each with where it stands."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, NoReturn

from ouro.data.marks import like_mark, speaks_of_training
from ouro.data.shards import kind_of
from ouro.data.thai import trim
from ouro.files import UserError, from_json, nearest, read_yaml, regular
from ouro.settings import DATASETS

import openpyxl
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from openpyxl.worksheet._read_only import ReadOnlyWorksheet

ROWS = 256  # read from a Parquet file at a time; the layout of one's own data is recognised by so many
LONGEST = 1 << 26  # bytes of a line
WHOLE = 1 << 29  # bytes of what is read whole, unpacked: an archive, a JSON list
PACKED = 1 << 15  # bytes of a compressed file that may unpack to RATIO times as many
NULL = 64  # bytes in memory of a null, which may take none in a file
RATIO = 256  # JSON Lines unpack 3 to 20 times, and 130 where all begin with the same 7 kB


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
    memory, but for JSON that is one list. columns: must be there, and with the `optional` ones are all that
    is wanted; or none. Raises UserError: naming file and line (or row): not UTF-8, not JSON, not an object, a column
    missing."""
    regular(file)
    if (kind := kind_of(file)) in (".parquet", ".arrow"):
        yield from read_table(file, columns, optional)
    elif kind == ".xlsx":
        yield from read_workbook(file, columns)
    else:
        with unpacked(file) as opened:
            read = read_csv if kind in (".csv", ".csv.gz") else read_lines
            yield from read(f"{file}", opened, columns)


def count_rows(file: Path) -> int:
    if kind_of(file) == ".parquet":
        with table_file(file) as parquet:
            return parquet.metadata.num_rows
    return sum(1 for _ in read_file(file))


@contextmanager
def table_file(file: Path) -> Iterator[pa.parquet.ParquetFile | pa.RecordBatchStreamReader]:
    """A Parquet file; or an Arrow stream, as save_to_disk writes it."""
    try:
        if kind_of(file) == ".arrow":
            with pa.memory_map(f"{file}") as mapped:
                if any(map(is_packed, pa.ipc.MessageReader.open_stream(mapped))):  # nothing tells their size in memory
                    raise UserError(f"{file}: its columns are compressed, as save_to_disk has none: save it as Parquet")
                mapped.seek(0)
                yield pa.ipc.open_stream(mapped)
        else:
            with pa.parquet.ParquetFile(file) as parquet:
                yield parquet
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: of a column's name
        kind = kind_of(file)[1:].capitalize()
        raise UserError(f"{file} is not a readable {kind} file: {in_one_line(error)}") from None


def is_packed(part: pa.ipc.Message) -> bool:
    """Whether buffers in a part of an Arrow file are compressed: in its FlatBuffer a RecordBatch has a fourth field."""
    data = part.metadata.to_pybytes()

    def number(at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "little", signed=size == 4)

    def field(table: int, which: int) -> int:
        known = table - number(table)
        place = number(known + 4 + 2 * which, 2) if 4 + 2 * which < number(known, 2) else 0
        return place and table + place + number(table + place)

    header = field(number(0), 2)
    return part.type != "schema" and field(field(header, 1) if part.type == "dictionary" else header, 3) > 0


def read_table(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet or Arrow file, ROWS of them in memory at a time. Errors as `read_file`."""
    with table_file(file) as table:
        parquet, number = kind_of(file) == ".parquet", 0
        names = (table.schema_arrow if parquet else table.schema).names
        check_columns(f"{file}", names, columns)
        check_once(f"{file}", names)
        read = {*columns, *optional}
        wanted = [n for n in names if not columns or n in read or speaks_of_training(n) or like_mark(n)]
        rows = rows_at_once(file, table, wanted) if parquet else ROWS
        for batch in table.iter_batches(rows, columns=wanted) if parquet else record_batches(file, table, wanted):
            if batch.nbytes > LONGEST and max(batch.slice(n, 1).nbytes for n in range(len(batch))) > LONGEST:
                raise UserError(f"{file}: a row of more than {LONGEST >> 20} MiB: this is no file of rows")
            batch.validate(full=True)  # places of texts beyond the file would end the process; and that they are UTF-8
            for row in batch.to_pylist():
                yield f"{file}, row {(number := number + 1)}", row


def record_batches(file: Path, table: pa.RecordBatchStreamReader, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    """Those of an Arrow file, in pieces. Errors as `rows_at_once`."""
    count = 0
    for part in table:
        longest, count = max([1, *(longest_of(part.column(name)) for name in wanted)]), count + len(part)
        if max(longest * len(part), NULL * count) > unpacked_most(file):
            refuse_repeated(file)
        rows = max(1, min(ROWS, LONGEST // longest))
        yield from (part.select(wanted).slice(start, rows) for start in range(0, len(part), rows))


def rows_at_once(file: Path, parquet: pa.parquet.ParquetFile, wanted: list[str]) -> int:
    """How many rows of a Parquet file are read at a time: fewer where their texts are long.
    Raises UserError: a small file stands for far more than it holds, as a text of a dictionary in a million rows."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    every = ((number, group.column(n)) for number, group in enumerate(groups) for n in range(group.num_columns))
    starts = tuple(f"{name}." for name in wanted)
    chunks = [(number, chunk) for number, chunk in every if f"{chunk.path_in_schema}.".startswith(starts)]
    most, longest = unpacked_most(file), 1
    if sum(max(chunk.total_uncompressed_size, NULL * chunk.num_values) for _, chunk in chunks) > most:
        refuse_repeated(file)
    for number, chunk in ((number, chunk) for number, chunk in chunks if chunk.physical_type == "BYTE_ARRAY"):
        path = chunk.path_in_schema
        longest = max(longest, chunk.total_uncompressed_size // max(groups[number].num_rows, 1))
        if chunk.has_dictionary_page:
            with pa.parquet.ParquetFile(file, read_dictionary=[path]) as coded:  # whole, with the first batch of texts
                texts = (longest_of(batch.column(0)) for batch in coded.iter_batches(ROWS, [number], [path]))
                longest = max(longest, text := next(filter(None, texts), 0))
            if text >= 1 << 20 and text * chunk.num_values > most:
                refuse_repeated(file)
    return max(1, min(ROWS, LONGEST // longest))


def longest_of(column: pa.Array) -> int:
    """The bytes of the longest text in the dictionaries of a column, however deep in it they are."""
    if hasattr(column, "flatten"):  # a struct into its columns, a list into what is in it
        parts = column.flatten()
        return max(map(longest_of, parts if isinstance(parts, list) else [parts]), default=0)
    if not pa.types.is_dictionary(column.type) or not f"{column.type.value_type}".endswith(("string", "binary")):
        return 0
    return pa.compute.max(pa.compute.binary_length(column.dictionary)).as_py() or 0


def unpacked_most(file: Path) -> int:
    """The bytes that a file of rows may take unpacked."""
    return max(WHOLE // 2, RATIO * file.stat().st_size)


def refuse_repeated(file: Path | str) -> NoReturn:
    raise UserError(f"{file} unpacks to more than {RATIO} times its size, as rows of text do not: look what is in it; "
                    "if it is meant, write it as JSON Lines that are not packed")  # fmt: skip


def read_csv(name: str, file: IO[bytes], columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of a CSV file with a header, each a text for each column that has a name, and where it begins. Errors as
    `read_file`."""
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    lines = iter(partial(text.readline, LONGEST + 1), "")  # a longer one is cut, and its cell is over the limit
    reader = csv.reader(lines, strict=True)
    end = 0  # the last line that was read
    try:
        header = next(filter(any, reader), [])
        if len(header) == 1 and (mark := re.search(r"[;\t|]", header[0])):
            raise UserError(f"{name}: its cells are separated by {mark[0]!r}: save it with commas")
        check_once(name, named := [column for column in header if column])
        check_columns(name, named, columns)
        end = reader.line_num
        for cells in reader:
            where, end = f"{name}, line {end + 1}", reader.line_num
            if cells and len(cells) != len(header):
                raise UserError(f"{where}: {len(cells)} cells, the header has {len(header)}")
            if any(cells):  # of an empty line there are none, and of a sheet's unused row empty ones
                yield where, {column: cell for column, cell in zip(header, cells, strict=True) if column}
    except UnicodeDecodeError as error:
        seems = "UTF-16" if b"\0" in error.object else "CP874" if re.search(rb"[\xa1-\xfb]{3}", error.object) else ""
        how = f" (it seems to be {seems}: iconv -f {seems} -t UTF-8 OLD.csv > NEW.csv)" if seems else ""
        raise UserError(f"{name}, after line {end}: not valid UTF-8: save it as CSV UTF-8{how}") from None
    except csv.Error as error:
        raise UserError(f"{name}, line {end + 1}: not valid CSV ({error})") from None


def read_workbook(file: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of the only sheet of an Excel workbook that is not empty, like those of `read_csv`."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > WHOLE:
            raise UserError(f"{file} unpacks to more than {WHOLE >> 20} MiB: save it as CSV UTF-8")
        if size > max(LONGEST, RATIO * file.stat().st_size):
            refuse_repeated(file)
        with closing(openpyxl.load_workbook(file, read_only=True, data_only=True, keep_links=False)) as book:
            rows = {sheet.title: sheet_rows(file, sheet) for sheet in book.worksheets}
            full = {name: (first, rows[name]) for name in rows if (first := next(rows[name], None))}
            if len(full) != 1:
                told = f"{len(full)} sheets hold rows ({', '.join(full)}), one must"
                raise UserError(f"{file}: {told}: save it as CSV UTF-8")
            [((_, header), following)] = full.values()
            named = [column for column, name in enumerate(header) if name]
            check_once(f"{file}", names := [header[column] for column in named])
            check_columns(f"{file}", names, columns)
            for number, cells in following:
                cells += [""] * (len(header) - len(cells))
                yield f"{file}, row {number}", {header[column]: cells[column] for column in named}
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, SyntaxError, NotImplementedError,
            zlib.error, zipfile.BadZipFile) as error:  # SyntaxError: its XML  # fmt: skip
        raise UserError(f"{file} is not a readable Excel workbook: {in_one_line(error)}") from None


def sheet_rows(file: Path, sheet: ReadOnlyWorksheet) -> Iterator[tuple[int, list]]:
    """The number and the texts of each row of a sheet that has any; NaN where Excel shows an error."""
    sheet.reset_dimensions()  # what the file says of them may be wrong
    for number, row in enumerate(sheet.rows, 1):
        if number > 1 << 20:
            raise UserError(f"{file}: more than {1 << 20:,} rows, which no workbook of Excel has")
        cells = []
        for cell in row:
            value = cell.value
            whole = isinstance(value, float) and value.is_integer()
            text = "" if value is None else str(int(value) if whole else value)
            cells.append(math.nan if cell.data_type == "e" else text)
        if any(cells):
            yield number, cells


class Unpacked(io.RawIOBase):
    """What is in a compressed file. Raises UserError where a stretch of it unpacks to what no rows do, as blank lines
    without end: reading on would take minutes, and tell nothing."""

    def __init__(self, opened: IO[bytes]):
        self.opened, self.stretch, self.size, self.zeros = opened, 0, 0, 0
        self.gzip = gzip.GzipFile(fileobj=self)  # which asks no more of it than `read`

    def readable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        """Packed bytes, fewer than newer Pythons ask for at a time: what they unpack to is compared with them."""
        if (at := self.opened.tell()) - self.stretch >= PACKED:
            self.stretch, self.size = at, 0
        part = self.opened.read(min(size, PACKED // 4))
        self.zeros = self.zeros + 1 if part == b"\0" else 0  # after the end gzip reads them one by one
        if self.zeros > 1 << 20:
            raise EOFError("more than a MiB of zeros after its end")
        return part

    def readinto(self, buffer: memoryview) -> int:
        self.size += (size := self.gzip.readinto(buffer))
        if self.size > RATIO * PACKED:
            refuse_repeated(self.opened.name)
        return size


@contextmanager
def unpacked(file: Path) -> Iterator[IO[bytes]]:
    """A file, opened; of a compressed one what is in it."""
    try:
        with open(file, "rb") as opened:
            packed = opened.peek(2)[:2] == b"\x1f\x8b"
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
        if sum(map(text.count, (b",", b"[", b"{"))) > WHOLE >> 6:  # a value takes 64 bytes or more in memory
            raise UserError(f"{name}: a JSON list of millions of small values: write a row a line (JSON Lines)")
        rows = ((f"{name}, item {n}", item) for n, item in enumerate(parse_json(name, text), 1))
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


def parse_json(where: str, text: bytes | bytearray) -> object:
    try:
        return from_json(text.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not valid UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        where += f", line {error.lineno}" * (b"\n" in text.strip())
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
