"""Where training sets and benchmarks come from: the Hub's repositories or local copies of them, read row by row."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import math
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, NoReturn

from ouro.data.shards import KINDS, check_files, check_unread
from ouro.data.thai import trim
from ouro.files import ROOT, UserError, file_sha256, from_json, nearest, read_yaml, regular
from ouro.settings import DATASETS, EVALS, Settings

import openpyxl
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import requests
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import configure_http_backend, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from openpyxl.worksheet._read_only import ReadOnlyWorksheet

MARKS = ("weight", "train", "trainable", "used_in_training", "loss", "need_loss", "loss_weight", "loss_mask")
MARK = re.compile(r"(?:is|do|to|should|needs?|used?(?:in|for))?(?:weight|train(?:ing|able|ed)?|loss(?:weight|mask)?)")
INVERSE_MARKS = ("mask", "ignore_loss")  # where they are true a row or turn is not trained
INVERSE = re.compile(r"(?:is)?mask(?:ed|loss)?|(?:ignore|skip|no|donot|dont|not|excludefrom)(?:loss|train(?:ing|ed)?)")
LIKE_MARK = re.compile(r"train|loss|mask|weight|ignore|exclude|skip|supervis")
ROWS = 256  # read from a Parquet file at a time; the layout of one's own data is recognised by so many
LONGEST = 1 << 26  # bytes of a line
WHOLE = 1 << 29  # bytes of what is read whole, unpacked: an archive, a JSON list
PACKED = 1 << 15  # bytes of a compressed file that may unpack to RATIO times as many
RATIO = 256  # JSON Lines unpack 3 to 20 times, and 130 where all begin with the same 7 kB
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BY_QUESTION = {"hash": None, "share": 0.02}  # what is held out of a set whose row of datasets.yaml does not say


@lru_cache(maxsize=4096)
def speaks_of_training(key: str) -> str:
    """What a key says of training: "mark", whether a row or turn is trained; "inverse", whether it is not; "facts", it
    may hold such keys; or "". In any case, with and without underscores."""
    plain = re.sub("[^a-z]", "", key.lower())
    if MARK.fullmatch(plain):
        return "mark"
    if INVERSE.fullmatch(plain):
        return "inverse"
    return "facts" if plain.startswith(("meta", "extra", "info", "annotation", "flag")) else ""


@lru_cache(maxsize=4096)
def like_mark(key: str) -> bool:
    """Whether a key that is not read sounds as if it said what is trained."""
    return not speaks_of_training(key) and bool(LIKE_MARK.search(key.lower()))


class HubSession(requests.Session):
    """Connections to the Hub, each with a timeout; none while HF_HUB_OFFLINE is set, nor after the first has failed.

    huggingface_hub asks for a repository's commit without a timeout: a network that drops packets would hang. And it
    asks for each file six times within 23 s, which helps where a connection is lost, and not where there is none. Where
    OfflineModeIsEnabled is raised it reads its cache at once."""

    answered = False  # the Hub has, to any session
    failure: requests.RequestException | None = None  # of the first request, if it did not

    def request(self, method, url, *args, timeout=None, **kwargs):
        if constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled(f"cannot reach {url}: HF_HUB_OFFLINE is set")
        if HubSession.failure is None:
            timeout = timeout or constants.HF_HUB_ETAG_TIMEOUT
            try:
                response = super().request(method, url, *args, timeout=timeout, **kwargs)
                HubSession.answered = True
                return response
            except (requests.ConnectionError, requests.Timeout) as error:
                if HubSession.answered:
                    raise
                HubSession.failure = error
        host = "/".join(url.split("/")[:3])
        cause = next(iter(HubSession.failure.args), None)  # urllib3's error, of which `reason` is the one that matters
        reason = getattr(cause, "reason", None) or HubSession.failure
        raise OfflineModeIsEnabled(f"cannot reach {host}: {in_one_line(reason)}") from HubSession.failure


configure_http_backend(HubSession)


@contextmanager
def cache_only() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def hub_error(name: str, hub_id: str, error: Exception) -> UserError:
    copy = "--model_name_or_path FOLDER" if name == "model" else f"--paths {name}=FOLDER"
    return UserError(
        f"cannot load {hub_id} from the Hub: {in_one_line(error)}\n"
        f"without a network: HF_HUB_OFFLINE=1 reads what was downloaded before (make fetch), {copy} a copy of your own"
    )


@dataclass
class Source:
    """A training set as found: its row of datasets.yaml, where it is, and the files of its two parts."""

    name: str
    entry: dict
    place: Path
    commit: str | None  # of a Hub repository
    files: dict[str, list[Path]]  # that "train", "held_out" and "development" are read from; may be the same ones

    @property
    def columns(self) -> list[str]:
        return columns_of(self.entry)

    def rows(self, split: str) -> Iterator[tuple[str, dict]]:
        """Where each row of a part stands, and the row. Errors as `read_file`."""
        for file in self.files[split]:
            yield from read_file(file, self.columns, self.entry.get("optional", ()))

    def fingerprint(self) -> str:
        """The commit, or for a local copy the SHA-256 of its files' contents."""
        if self.commit:
            return self.commit
        files = dict.fromkeys(self.files["train"] + self.files["held_out"])
        return f"sha256:{hashlib.sha256(b''.join(bytes.fromhex(file_sha256(file)) for file in files)).hexdigest()}"


def columns_of(entry: dict) -> list[str]:
    """The columns that rows of a training set must have, by its row of datasets.yaml."""
    named = [*entry.get("prompt", ()), entry.get("completion"), entry.get("messages"), entry.get("answer")]
    licence = entry.get("licence")
    named += [entry.get("held_out", {}).get("hash"), licence.get("column") if isinstance(licence, dict) else None]
    return list(dict.fromkeys(name for name in named if name and name not in entry.get("optional", ())))


KEYS = {
    "language", "hub_id", "revision", "config", "folder", "path", "rows", "tokens", "prompt", "completion",
    "messages", "held_out", "think", "answer", "licence", "note", "optional", "layouts",
}  # fmt: skip


def patterns_of(entry: dict) -> list[str]:
    """Of a training set's repository the files that are downloaded: rows, of its `folder` if it names one, and cards,
    but no code and no pickles."""
    folder = f"{entry['folder']}/" if "folder" in entry else ""
    return [*(f"{folder}*{kind}" for kind in KINDS), "*.md"]


def entry_of(name: str) -> dict:
    """A training set's row of datasets.yaml, with what is held out and the licence where it does not say.
    Raises UserError: an unknown name, a key of its row that means nothing, or one missing."""
    entries = read_yaml(DATASETS)
    if name not in entries:
        raise UserError(f"unknown dataset {name!r}{nearest(name, entries)}")
    for key in entries[name].keys() - KEYS:
        raise UserError(f"{DATASETS.name}, {name}: unknown key {key!r}{nearest(key, KEYS)}")
    entry = {"held_out": BY_QUESTION, "licence": "not stated"} | entries[name]
    if "language" not in entry or not ({"messages", "layouts"} & {*entry} or {"prompt", "completion"} <= {*entry}):
        raise UserError(f"{DATASETS.name}, {name}: language, and prompt and completion, or messages, must be there")
    return entry


def recognised(entry: dict, place: Path, files: list[Path]) -> dict:
    """Of data of one's own the layout that its columns are of, as a row of datasets.yaml; `layout` says which it is.
    Raises UserError: no layout has such columns, or several have."""
    layouts = {layout: entry_of(layout) for layout in entry["layouts"]}
    texts = {layout: f"{layout} ({', '.join(columns_of(known))})" for layout, known in layouts.items()}
    rows = islice(chain.from_iterable(map(read_file, files)), ROWS)
    found = list(dict.fromkeys(column for _, row in rows for column in row))
    if not found:
        raise UserError(f"{place} has no rows")
    fits = [layout for layout, known in layouts.items() if {*columns_of(known)} <= {*found}]
    if len(fits) > 1:
        raise UserError(f"{place}: its columns are those of {' and of '.join(texts[fit] for fit in fits)}: which is "
                        f"meant? Say {' or '.join(f'DATASET={fit}' for fit in fits)} (--dataset)")  # fmt: skip
    if not fits:
        what = read_by(found) or "; rename them, or name them in a row of configs/datasets.yaml"
        raise UserError(f"{place}: its columns are {', '.join(found)}: not those of {', '.join(texts.values())}{what}")
    known = layouts[fits[0]]
    optional = [column for column in known.get("optional", ()) if column in found]
    read = columns_of(known) + optional
    unread = [column for column in found if column not in read and not speaks_of_training(column)]
    told = f"{fits[0]}: columns {', '.join(read)}" + (f"; not read: {', '.join(unread)}" if unread else "")
    for split in ("test", "validation"):
        if place.is_dir() and split_files(place, None, split, may_lack=True):
            return known | {"held_out": {"split": split}, "layout": f"{told}; held out: the split {split}"}
    return known | {"layout": f"{told}; held out: 2 % of the questions, by a hash"}


def place_of(settings: Settings, entry: dict) -> Path | None:
    """The folder or file that a training set is read from; None: the Hub's repository of its row, or, where that names
    none, of `dataset_path`.
    Raises UserError: it is not there, or it is for data of one's own and none is named."""
    name, own = settings.dataset, not {"hub_id", "path"} & entry.keys()
    local = settings.dataset_path or settings.paths.get(name)
    if local is None and own:
        raise UserError(f"dataset {name} is for data of your own: name its folder or file with --dataset_path "
                        "(make … DATASET_PATH=mine.csv)")  # fmt: skip
    if local is None:
        return ROOT / entry["path"] if "path" in entry else None
    if Path(local).exists():
        return Path(local)
    if own and HUB_ID.fullmatch(local) and not local.endswith(KINDS) and not Path(local).parent.is_dir():
        return None
    where = "" if Path(local).is_absolute() else f" in {Path.cwd()}"
    raise UserError(f"dataset {name}: no such file or folder: {local}{where}")


def check_places(settings: Settings, tasks: Iterable[str] = (), trained: bool = True) -> None:
    """Before the network is asked for anything: that what the settings name on this machine is there, of the training
    set (where one is `trained`), and of `paths` for the benchmarks in `overlap` and these tasks.
    Raises UserError: it is not, or a name is unknown."""
    names = set(tasks)
    if trained:
        names |= {*overlap_names(settings)}
        place_of(settings, entry_of(settings.dataset))
        if settings.max_tokens and not settings.max_tokens.isdecimal():
            entry_of(settings.max_tokens)
    evals = read_yaml(EVALS)["tasks"]
    names |= {evals[task]["benchmark"] for task in names & evals.keys()}
    for name in sorted(names & settings.paths.keys()):
        if not Path(settings.paths[name]).exists():
            raise UserError(f"paths: {name}={settings.paths[name]}: no such file or folder")


def find_source(settings: Settings) -> Source:
    """The training set that the settings name: a local folder or file, else the Hub's (or its cache's) snapshot.
    Raises UserError: an unknown name, nothing readable at the path, no network and no cached copy, a revision or a
    configuration that does not exist, a missing shard."""
    name, entry = settings.dataset, entry_of(settings.dataset)
    place, commit = place_of(settings, entry), None
    if place is None:
        hub_id = entry.get("hub_id") or settings.dataset_path or settings.paths[name]
        try:  # downloads what the cache lacks
            place = Path(snapshot_download(hub_id, repo_type="dataset", revision=entry.get("revision"),
                                           allow_patterns=patterns_of(entry)))  # fmt: skip
        except (OSError, ValueError) as error:
            refusal = hub_error(name, hub_id, error)
            own = "hub_id" not in entry
            raise UserError(f"no such folder: {hub_id}; as a Hub id: {refusal}") if own else refusal from None
        commit = place.name  # a snapshot's folder is named by its commit
    train = held_out = split_files(place, entry.get("config"), "train")
    if "layouts" in entry:
        entry = recognised(entry, place, train)
    if "split" in entry["held_out"]:
        held_out = split_files(place, entry.get("config"), entry["held_out"]["split"], may_lack=True)
    return Source(name, entry, place, commit, {"train": train, "held_out": held_out, "development": train})


def split_files(place: Path, config: str | None, split: str, may_lack: bool = False) -> list[Path]:
    """The files of a split, by the folder's README.md or by their names, as the datasets library has it; a file is
    all of the training split, and so is a data set that `save_to_disk` of that library wrote without splits."""
    for file in (*place.glob("*"), *place.glob("data/*")):  # the library datasets would open it
        regular(file)
    splits = (place / "dataset_dict.json").exists()  # save_to_disk wrote a folder for each
    if place.is_file():
        files = [place.absolute()] if split == "train" else []
    elif splits or (place / "state.json").exists():
        folder = place / split if splits else place
        files = sorted(folder.absolute().glob("data-*.arrow")) if splits or split == "train" else []
    else:
        try:
            with tempfile.TemporaryDirectory() as nowhere:  # for its cache: the user's may be read-only
                builder = load_dataset_builder(str(place.absolute()), name=config, cache_dir=nowhere)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a script of that name
            raise UserError(f"{place}: {in_one_line(error)} (is every file there that its README.md names?)") from None
        found = builder.config.data_files or {}
        files = [Path(file) for key, names in found.items() if str(key) == split for file in names]
    if wrong := [file.name for file in files if not file.name.endswith(KINDS)]:
        raise UserError(f"{place}: a training set is JSONL, JSON, CSV (.gz too), Parquet, Excel's .xlsx or a folder of "
                        f"save_to_disk; found {', '.join(wrong[:5])}")  # fmt: skip
    if not files and not may_lack:
        raise UserError(f"{place} holds no {split}*.jsonl or {split}*.parquet, nor does its data folder")
    check_files(f"{place}, split {split}", files)
    if place.is_dir() and not (place / "README.md").exists():  # which may speak of several configurations
        check_unread(f"{place}, split {split}", place, files)
    return files


@contextmanager
def table_file(file: Path) -> Iterator[pa.parquet.ParquetFile | pa.RecordBatchStreamReader]:
    """A Parquet file; or an Arrow stream, as save_to_disk writes it."""
    try:
        if file.suffix == ".arrow":
            with pa.memory_map(f"{file}") as mapped:
                yield pa.ipc.open_stream(mapped)
        else:
            with pa.parquet.ParquetFile(file) as parquet:
                yield parquet
    except (pa.ArrowException, OSError) as error:
        kind = file.suffix[1:].capitalize()
        raise UserError(f"{file} is not a readable {kind} file: {in_one_line(error)}") from None


def read_file(file: Path, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[tuple[str, dict]]:
    """The rows of a JSONL, JSON, CSV, Excel, Parquet or Arrow file, each with where it stands; never the whole file in
    memory, but for JSON that is one list. columns: must be there, and with the `optional` ones are all that
    is wanted; or none. Raises UserError: naming file and line (or row): not UTF-8, not JSON, not an object, a column
    missing."""
    regular(file)
    if file.suffix in (".parquet", ".arrow"):
        yield from read_table(file, columns, optional)
    elif file.suffix == ".xlsx":
        yield from read_workbook(file, columns)
    else:
        with unpacked(file) as opened:
            read = read_csv if file.name.endswith((".csv", ".csv.gz")) else read_lines
            yield from read(f"{file}", opened, columns)


def read_table(file: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """The rows of a Parquet or Arrow file, ROWS of them in memory at a time. Errors as `read_file`."""
    with table_file(file) as table:
        parquet, number = file.suffix == ".parquet", 0
        names = (table.schema_arrow if parquet else table.schema).names
        check_columns(f"{file}", names, columns)
        check_once(f"{file}", names)
        read = {*columns, *optional}
        wanted = [n for n in names if not columns or n in read or speaks_of_training(n) or like_mark(n)]
        rows = rows_at_once(file, table, wanted) if parquet else ROWS
        for batch in table.iter_batches(rows, columns=wanted) if parquet else record_batches(file, table, wanted):
            batch.validate(full=True)  # places of texts beyond the file would end the process; and that they are UTF-8
            for row in batch.to_pylist():
                yield f"{file}, row {(number := number + 1)}", row


def record_batches(file: Path, table: pa.RecordBatchStreamReader, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    """Those of an Arrow file, in pieces. Errors as `rows_at_once`."""
    for part in table:
        longest = max([4, *(longest_of(part.column(name)) for name in wanted)])
        if longest * len(part) > unpacked_most(file):
            refuse_repeated(file)
        rows = max(1, min(ROWS, LONGEST // longest))
        yield from (part.select(wanted).slice(start, rows) for start in range(0, len(part), rows))


def rows_at_once(file: Path, parquet: pa.parquet.ParquetFile, wanted: list[str]) -> int:
    """How many rows of a Parquet file are read at a time: fewer where their texts are long.
    Raises UserError: a small file stands for far more than it holds, as a text of a dictionary in a million rows."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
    chunks = [(number, group.column(n)) for number, group in enumerate(groups) for n in range(group.num_columns)]
    most, longest = unpacked_most(file), 1
    # A null takes no byte in the file, and 4 in memory.
    if sum(max(chunk.total_uncompressed_size, 4 * chunk.num_values) for _, chunk in chunks) > most:
        refuse_repeated(file)
    for number, chunk in chunks:
        path = chunk.path_in_schema
        if chunk.physical_type != "BYTE_ARRAY" or not any(f"{path}.".startswith(f"{name}.") for name in wanted):
            continue
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


def check_once(where: str, names: list[str]) -> None:
    if len({*names}) < len(names):  # of a million names each is not counted among all
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: column {twice!r} stands twice")


class Unpacked(io.RawIOBase):
    """What is in a compressed file. Raises UserError where a stretch of it unpacks to what no rows do, as blank lines
    without end: reading on would take minutes, and tell nothing."""

    def __init__(self, opened: IO[bytes]):
        self.opened, self.stretch, self.size = opened, 0, 0
        self.gzip = gzip.GzipFile(fileobj=self)  # which asks no more of it than `read`

    def readable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        """Packed bytes, fewer than newer Pythons ask for at a time: what they unpack to is compared with them."""
        if (at := self.opened.tell()) - self.stretch >= PACKED:
            self.stretch, self.size = at, 0
        return self.opened.read(min(size, PACKED // 4))

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


def check_columns(where: str, found: Iterable[str], columns: Sequence[str]) -> None:
    for column in columns:
        if column not in found:
            close = nearest(column, found).partition("; known")[0]
            trained = list(columns) in map(columns_of, read_yaml(DATASETS).values())  # and no benchmark
            other = read_by(found) if trained else ""
            raise UserError(f"{where}: no column {column!r}{close}; columns found: {', '.join(found)}{other}")


def read_by(found: Iterable[str]) -> str:
    """Which training set has such columns, as the end of a sentence; "" if none has."""
    # one's own data first, the embedded sample last: it has a published set's columns
    entries = sorted(read_yaml(DATASETS).items(), key=lambda item: ("path" in item[1], "hub_id" in item[1]))
    fits = [name for name, entry in entries if (layout := columns_of(entry)) and {*layout} <= {*found}]
    return f"; rows with these are read by DATASET={fits[0]} (--dataset {fits[0]})" if fits else ""


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


def count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        with table_file(file) as parquet:
            return parquet.metadata.num_rows
    return sum(1 for _ in read_file(file))


def benchmark_files(spec: dict) -> list[str]:
    """The files of a benchmark in its repository, archive or folder."""
    return [spec["file"].format(subset=subset, split=spec.get("split")) for subset in spec.get("subsets", [""])]


def benchmark_place(spec: dict, local: str) -> Path | None:
    """The first of a benchmark's files in a local folder, or the archive that holds it; None if neither is there."""
    file = benchmark_files(spec)[0]
    places = [Path(local) / place for place in (file, f"data/{file}", spec.get("archive", file))]
    return next((place for place in places if place.is_file()), None)


def benchmark_path(name: str, spec: dict, local: str | None, file: str) -> Path:
    """One of a benchmark's files, or the archive that holds it: in `local`, else from the Hub.
    Raises UserError: no network and no copy, or the file is missing."""
    if local is not None:
        if found := benchmark_place(spec | {"file": file}, local):
            return found
        archive = f", nor {spec['archive']}" if "archive" in spec else ""
        raise UserError(f"paths: {name}={local}: no {file} in it, nor data/{file}{archive}")
    file = spec.get("archive", file)
    try:
        return Path(hf_hub_download(spec["hub_id"], file, revision=spec["revision"], repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise hub_error(name, spec["hub_id"], error) from None


def benchmark_commit(name: str, spec: dict) -> str:
    """The commit at which the Hub has a benchmark now, by its first file's snapshot. Errors as `benchmark_path`."""
    file = benchmark_files(spec)[0]
    return Path(str(benchmark_path(name, spec, None, file)).removesuffix(spec.get("archive", file))).name


def read_benchmark(name: str, spec: dict, local: str | None, file: str) -> Iterator[tuple[str, dict]]:
    """The rows of one of a benchmark's files, each with where it stands: from `local`, else from the Hub.
    Raises UserError: no network and no copy, the file is missing or damaged."""
    path = benchmark_path(name, spec, local, file)
    if path.name != spec.get("archive"):
        yield from read_file(path)
        return
    try:
        with unpacked(path) as opened:
            if len(archive := opened.read(WHOLE + 1)) > WHOLE:
                raise UserError(f"{path} unpacks to more than {WHOLE >> 20} MiB: it is no benchmark's")
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:  # nothing is unpacked to disk
            # in a folder of the archive or in none; or all of its files in one place
            named = [m for m in tar.getmembers() if m.isfile() and f"/{m.name}".endswith(f"/{file}")]
            named += [m for m in tar.getmembers() if m.isfile() and m.name.removeprefix("./") == Path(file).name]
            if not named:
                raise UserError(f"{path} holds no {file}")
            lines = io.BytesIO(tar.extractfile(named[0]).read())
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path} is damaged: {in_one_line(error)}") from None
    yield from read_lines(f"{spec['archive']}, {named[0].name}", lines)


def strings(value: object) -> Iterator[str]:
    """Every text inside a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def overlap_names(settings: Settings) -> list[str]:
    """The benchmarks in `overlap`. Raises UserError: an unknown one, or one that is a part of a training set."""
    specs = read_yaml(EVALS)["benchmarks"]
    names = [] if settings.overlap in ("", "none") else settings.overlap.split(",")
    for name in names:
        if name not in specs:
            raise UserError(f"overlap: unknown benchmark {name!r}{nearest(name, specs)}")
        if "file" not in specs[name]:
            raise UserError(f"overlap: {name} is a part of a training set, which is held out already")
    return names


def benchmark_items(settings: Settings) -> list[tuple[str, list[str]]]:
    """Where each item of the benchmarks in `overlap` stands, and all its texts."""
    specs, items = read_yaml(EVALS)["benchmarks"], []
    for name in overlap_names(settings):
        try:
            for file in benchmark_files(specs[name]):
                rows = read_benchmark(name, specs[name], settings.paths.get(name), file)
                place = f"{name}, {Path(file).name}, item"
                items += [(f"{place} {n}", [*strings(row)]) for n, (_, row) in enumerate(rows, 1)]
        except UserError as error:
            needed = f"{name} is needed to find training rows that repeat its items"
            raise UserError(f"{error}\n{needed}; fewer: --overlap A,B; no check: --overlap none") from None
    return items
