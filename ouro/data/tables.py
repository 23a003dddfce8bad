"""The rows of Parquet, Arrow and Excel files. A process of its own reads a file through before it is read: a length, a
type or a text in it that stands for more than any memory holds ends that process, and not the run."""

import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ouro.data.marks import like_mark, speaks_of_training
from ouro.data.shards import kind_of
from ouro.files import ROOT, UserError

import pyarrow as pa
import pyarrow.parquet

if TYPE_CHECKING:
    from python_calamine import CalamineWorkbook

ROWS = 256  # read at a time, or fewer where they are long; the layout of one's own data is recognised by so many
MEMORY = 1 << 30  # bytes of the process that tries a file
SECONDS = 4  # of the processor, for it, and one for each so many bytes of the file; honest ones take at most half
A_SECOND = {".parquet": 1 << 21, ".arrow": 1 << 21, ".xlsx": 1 << 19}
NAMES = {".parquet": "Parquet file", ".arrow": "Arrow file", ".xlsx": "Excel workbook"}
VALUE = 64  # bytes in memory of a value, which may take none in a file
RATIO = 256  # times its size a file may unpack to; JSON Lines 3 to 20 times, 130 where all begin with the same 7 kB
ERROR = re.compile(rb"""<(?:\w+:)?c\s[^<>]*\bt=["']e["'][^<>]*""")  # a cell of a sheet
FOUND: dict[str, dict] = {}  # what `try_all` has found, or the error, by what was asked


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def open_table(file: Path) -> Iterator[pa.parquet.ParquetFile | pa.RecordBatchReader]:
    """A Parquet file; or an Arrow stream, as save_to_disk writes it, or Arrow's IPC file, as to_feather and Polars do.
    Raises UserError: it is neither."""
    try:
        if kind_of(file) == ".arrow":
            with pa.memory_map(f"{file}") as mapped:
                random = mapped.read(6) == b"ARROW1"
                mapped.seek(0)
                yield as_stream(pa.ipc.open_file(mapped)) if random else pa.ipc.open_stream(mapped)
        else:
            with pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
                yield parquet
    except MemoryError:  # Arrow's own is an ArrowException, too
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
    ) as error:  # a name, date or zone in it
        raise UserError(f"{file} is not a readable {NAMES[kind_of(file)]}: {in_one_line(error)}") from None


def as_stream(table: pa.ipc.RecordBatchFileReader) -> pa.RecordBatchReader:
    parts = (table.get_batch(number) for number in range(table.num_record_batches))
    return pa.RecordBatchReader.from_batches(table.schema, parts)


def batches(
    table: pa.parquet.ParquetFile | pa.RecordBatchReader, columns: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, in parts of at most ROWS rows. rows: of a Parquet file that are read at a time."""
    parquet, most = isinstance(table, pa.parquet.ParquetFile), min(rows, ROWS)
    for part in table.iter_batches(rows, columns=columns, use_threads=False) if parquet else table:
        part = part.select(columns)
        if not parquet:
            part.validate(full=True)  # an Arrow file says where in it a text is: beyond its end would end the process
        yield from (part.slice(start, most) for start in range(0, len(part), most))


def rows_at_once(file: Path, columns: list[str]) -> int:
    """How many rows of a Parquet file to read at a time: so many that they take as much memory as the dictionaries of
    their columns, as pandas' categories are. Each batch has these whole, be there 200,000 texts in them."""
    with suppress(MemoryError), open_table(file) as table:
        for first in batches(table, columns, ROWS):
            return ROWS * max(1, first.nbytes // max(1, weight(first)))
    return ROWS


def read_rows(file: Path, columns: list[str], rows: int) -> Iterator[dict]:
    """Those of a file that was tried, so many of them read at a time. Errors as `open_table`."""
    with open_table(file) as table:
        for batch in batches(table, columns, rows):
            yield from batch.to_pylist()


def workbook_rows(file: Path) -> Iterator[tuple[int, list]]:
    """The number of each row that has any text, and its cells as `as_text`, of the only sheet of an Excel workbook that
    has such rows.
    Raises UserError: several sheets have rows, or none; a cell shows an error; it is no workbook; it unpacks to what no
    rows do."""
    from python_calamine import CalamineError, CalamineWorkbook, SheetTypeEnum

    try:
        with open(file, "rb") as opened:
            if opened.read(4) == b"\xd0\xcf\x11\xe0":
                raise UserError(f"{file} is locked with a password, or an old .xls: save it as CSV UTF-8")
        with zipfile.ZipFile(file) as packed:
            parts = packed.infolist()  # no more is read of a part than this says
            if sum(part.file_size for part in parts) > RATIO * max(file.stat().st_size, 1 << 16):
                refuse_repeated(file)
            for part in parts:  # zipfile compares each part's checksum, too
                if where := first_error(packed, part):
                    raise UserError(f"{file}: {where} shows an error of Excel's: mend it, or save it as CSV UTF-8")
        with CalamineWorkbook.from_path(file) as book:
            sheets = [sheet.name for sheet in book.sheets_metadata if sheet.typ == SheetTypeEnum.WorkSheet]
            rows = {name: sheet_rows(book, name) for name in sheets}
            full = {name: (first, rows[name]) for name in rows if (first := next(rows[name], None))}
            if len(full) != 1:
                told = f"{len(full)} sheets hold rows ({', '.join(full)}), one must"
                raise UserError(f"{file}: {told}: save it as CSV UTF-8")
            [(first, following)] = full.values()
            yield first
            yield from following
    except (CalamineError, OSError, EOFError, LookupError, ValueError, RuntimeError,
            zlib.error, zipfile.BadZipFile) as error:  # RuntimeError: encrypted  # fmt: skip
        raise UserError(f"{file} is not a readable Excel workbook: {in_one_line(error)}") from None


def first_error(packed: zipfile.ZipFile, part: zipfile.ZipInfo) -> str:
    """Which cell of a part shows an error, as #N/A, which python_calamine gives as no text; "" if none does."""
    before = b""
    with packed.open(part) as opened:
        for piece in iter(partial(opened.read, 1 << 20), b""):
            if found := ERROR.search(before + piece):
                name = re.search(rb'\br="(\w+)"', found[0])
                return f"cell {name[1].decode()}" if name else f"a cell of {part.filename}"
            before = piece[-200:]  # longer than a cell's tag
    return ""


def sheet_rows(book: "CalamineWorkbook", name: str) -> Iterator[tuple[int, list]]:
    sheet = book.get_sheet_by_name(name)
    left = sheet.start[1] if sheet.start else 0  # the rows are from row 1, their cells from the first column in use
    for number, row in enumerate(sheet.iter_rows(), 1):
        if any(cell != "" for cell in row):
            yield number, [""] * left + [as_text(cell) for cell in row]


def as_text(cell) -> str | float:
    """A cell's text; NaN where it is a number of more digits than Excel keeps, as those it had are not known."""
    if not isinstance(cell, float) or not cell.is_integer():
        return str(cell)
    return str(int(cell)) if abs(cell) < 1 << 53 else math.nan


def count_workbook(file: Path, most: int, longest: int) -> int:
    """How many rows follow the first. Errors as `try_through`: a text that is there once may stand in all cells."""
    size = count = 0
    for number, cells in workbook_rows(file):
        size += (row := sum(len(str(cell).encode(errors="replace")) for cell in cells))
        count += 1
        if row > longest:
            raise UserError(f"{file}, row {number}: more than {longest >> 20} MiB: this is no file of rows")
        if size > most:
            refuse_repeated(file)
    return count - 1


def is_view(kind: pa.DataType) -> bool:
    return pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)


def weight(values: pa.RecordBatch | pa.Array) -> int:
    """About how many bytes a column, or all of a batch, takes as Python's values."""
    if isinstance(values, pa.RecordBatch):
        return sum(map(weight, values.columns))
    if isinstance(values, pa.ExtensionArray):
        return weight(values.storage)
    if isinstance(values, pa.DictionaryArray):
        return weight(values.dictionary_decode())
    if isinstance(values, pa.MapArray):
        return weight(values.cast(pa.list_(values.type.field(0).type)))
    if is_view(values.type):
        return weight(values.cast(pa.large_binary()))
    if not values.type.num_fields:
        return values.nbytes + VALUE * len(values)
    parts = values.flatten()  # a struct into its columns, a list into what is in it
    return VALUE * len(values) + sum(map(weight, parts if isinstance(parts, list) else [parts]))


def stored_size(footer: pa.parquet.FileMetaData) -> int:
    """How many bytes of a Parquet file its columns take; more than there are, where several are in the same place."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    return sum(group.column(n).total_compressed_size for group in groups for n in range(group.num_columns))


def shares(kind: pa.DataType) -> bool:
    """Whether values of a type, or parts of them, may share bytes, so that a small file stands for much. Texts of a
    dictionary and views of texts, which Polars writes, do, too, but `weight` counts them one by one."""
    types = pa.types
    odd = (types.is_list_view, types.is_large_list_view, types.is_run_end_encoded, types.is_union)
    if isinstance(kind, pa.BaseExtensionType):
        return shares(kind.storage_type)
    if types.is_dictionary(kind):
        return kind.value_type.num_fields > 0 or is_view(kind.value_type) or shares(kind.value_type)
    return any(is_odd(kind) for is_odd in odd) or any(shares(kind.field(n).type) for n in range(kind.num_fields))


def try_through(file: str, columns: Sequence[str] | None, optional: Sequence[str], most: int, longest: int) -> dict:
    """The `names` of a file's columns and the `count` of its rows. Unless `columns` is None the file is read through,
    and `wanted` are the columns that are read, `rows` how many rows at a time; but not where a column is missing or
    stands twice, which the caller refuses.
    Raises UserError: it is no such file; a row is longer than `longest`; it unpacks to more than `most` bytes."""
    path = Path(file)
    if kind_of(path) == ".xlsx":
        return {"count": count_workbook(path, most, longest)}
    with open_table(path) as table:
        parquet = isinstance(table, pa.parquet.ParquetFile)
        schema = table.schema_arrow if parquet else table.schema
        names, count = schema.names, table.metadata.num_rows if parquet else sum(map(len, table))
        stored = stored_size(table.metadata) if parquet and table.num_row_groups > 1 else 0
    if count * VALUE > most:
        refuse_repeated(file)
    if stored > (size := path.stat().st_size):
        raise UserError(f"{file} is damaged: its columns take {stored} bytes, it has {size}")
    found = {"names": names, "count": count}
    if columns is None or not {*names} >= {*columns} or len({*names}) < len(names):
        return found
    read = {*columns, *optional}
    wanted = [n for n in names if not columns or n in read or speaks_of_training(n) or like_mark(n)]
    if odd := [name for name in wanted if shares(schema.field(name).type)]:
        told = f"column {odd[0]!r} is of type {schema.field(odd[0]).type}"
        raise UserError(f"{file}: {told}, which is not read: save it as Parquet, as plain texts, lists and structs")
    for rows in dict.fromkeys((rows_at_once(path, wanted), ROWS, ROWS // 16, 1)):
        with suppress(MemoryError), open_table(path) as table:
            size = seen = 0
            for batch in batches(table, wanted, rows):
                size += (part := weight(batch))
                seen += len(batch)
                if size > most:
                    refuse_repeated(file)
                if part > longest and max(weight(batch.slice(n, 1)) for n in range(len(batch))) > longest:
                    raise UserError(f"{file}: a row of more than {longest >> 20} MiB: this is no file of rows")
            if seen != count:
                raise UserError(f"{file} is damaged: it says that it has {count} rows, and has {seen}")
            return found | {"wanted": wanted, "rows": rows}
    raise MemoryError


def refuse_repeated(file: Path | str, what: str = f"unpacks to more than {RATIO} times its size") -> NoReturn:
    remedy = "look what is in it; if it is meant, write it as JSON Lines that are not packed"
    raise UserError(f"{file} {what}, as rows of text do not: {remedy}")


def try_all(asked: Sequence[str]) -> None:
    """Puts into FOUND what `try_through` finds of files, or of the first why it cannot be read. One process tries them;
    where one of the others ends it, that and what follows are left to be asked for again.
    asked: of each file the arguments as JSON, and the time when it was changed."""
    if not (asked := [one for one in asked if one not in FOUND]):
        return
    # NumPy's library starts a thread for each processor, 40 MB each: with 24 of them nothing would be left of MEMORY.
    done = subprocess.run([sys.executable, "-m", "ouro.data.tables"], input="\n".join(asked).encode(), cwd=ROOT,
                          capture_output=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})  # fmt: skip
    answers = [*map(json.loads, done.stdout.splitlines())]
    FOUND.update(zip(asked, answers, strict=False))
    if not answers:
        said = done.stderr.decode(errors="replace").strip()
        last = said.rpartition("\n")[2]
        how = last if done.returncode > 0 else f"reading it ends in {signal.Signals(-done.returncode).name}"
        if done.returncode == -signal.SIGXCPU:
            how = "reading it takes much longer than a file of its size should; if it is meant, save it as JSON Lines"
        elif last.startswith("ModuleNotFoundError"):
            how = f"{last}: the packages are not those of requirements.txt: make env"
        elif any(word in said for word in ("MemoryError", "memory allocation of", "lost sys.stderr")):
            how = f"reading it takes more than {MEMORY >> 20} MiB; if it is meant, save it as JSON Lines"
        file = json.loads(asked[0])[0]
        FOUND[asked[0]] = {"error": f"{file} is not a readable {NAMES[kind_of(Path(file))]}: {how}"}


def limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    limit(resource.RLIMIT_DATA, MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own reserves more than it gives out
    for line in sys.stdin:
        *told, _ = json.loads(line)
        file = Path(told[0])
        seconds = SECONDS + file.stat().st_size // A_SECOND[kind_of(file)]
        limit(resource.RLIMIT_CPU, int(time.process_time()) + seconds)
        try:
            found = try_through(*told)
        except UserError as error:
            found = {"error": f"{error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
