"""Where training sets and benchmarks come from: the Hub's repositories or local copies of them, read row by row."""

import hashlib
import io
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from ouro.data.formats import (
    LONGEST,
    columns_by_row,
    columns_of,
    count_rows,
    read_files,
    read_lines,
    tried_table,
    unpacked,
    way_to_read,
)
from ouro.data.marks import speaks_of_training
from ouro.data.shards import KINDS, check_files, check_unread, kind_of
from ouro.data.tables import NAMES, ROWS, in_one_line
from ouro.files import ROOT, UserError, file_sha256, nearest, read_yaml, regular
from ouro.settings import DATASETS, EVALS, Settings

import requests
from datasets import load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub import configure_http_backend, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

LAYOUT = "name the file itself, or a folder with train.jsonl (or .csv, .parquet, …) in it"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
BY_QUESTION = {"hash": None, "share": 0.02}  # what is held out of a set whose row of datasets.yaml does not say


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


def hub_error(name: str, hub_id: str, error: Exception) -> UserError:
    copy = "--model_name_or_path FOLDER" if name == "model" else f"--paths {name}=FOLDER"
    return UserError(
        f"cannot load {hub_id} from the Hub: {in_one_line(error)}",
        f"without a network: HF_HUB_OFFLINE=1 reads what was downloaded before (make fetch), {copy} a copy of your own",
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
        return read_files(self.files[split], self.columns, self.entry.get("optional", ()))

    def fingerprint(self) -> str:
        """The commit, or for a local copy the SHA-256 of its files' contents."""
        if self.commit:
            return self.commit
        files = dict.fromkeys(self.files["train"] + self.files["held_out"])
        return f"sha256:{hashlib.sha256(b''.join(bytes.fromhex(file_sha256(file)) for file in files)).hexdigest()}"


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
    rows = islice(chain.from_iterable(map(columns_by_row, files)), ROWS)
    found = list(dict.fromkeys(chain.from_iterable(rows)))
    if not found:
        raise UserError(f"{place} has no rows: set dataset_path to a file that has some")
    fits = [layout for layout, known in layouts.items() if {*columns_of(known)} <= {*found}]
    if len(fits) > 1:
        raise UserError(f"{place}: its columns are those of {' and of '.join(texts[fit] for fit in fits)}: which is "
                        f"meant? Say {' or '.join(f'DATASET={fit}' for fit in fits)} (--dataset)")  # fmt: skip
    if not fits:
        raise UserError(f"{place}: its columns are {', '.join(found)}: not those of {', '.join(texts.values())}; "
                        f"{way_to_read(found)}")  # fmt: skip
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
    if own and HUB_ID.fullmatch(local) and not kind_of(Path(local)) and not Path(local).parent.is_dir():
        return None
    where = "" if Path(local).is_absolute() else f" in {Path.cwd()}"
    setting = "dataset_path" if settings.dataset_path else f"{name} in `paths`"
    remedy = f"correct {setting}: a file of rows or a folder of them, as data/mine.csv or data"
    published = "" if own else f"; without it {name} is read from where its row of configs/datasets.yaml says"
    raise UserError(f"dataset {name}: no such file or folder: {local}{where}; {remedy}{published}")


def check_places(settings: Settings, tasks: Iterable[str] = (), trained: bool = True) -> None:
    """Before the network is asked for anything: that what the settings name on this machine is there, of the training
    set (where one is `trained`; a table can be read, too), and of `paths` for the benchmarks in `overlap` and these
    tasks. Raises UserError: it is not, or a name is unknown."""
    names = set(tasks)
    if trained:
        names |= {*overlap_names(settings)}
        place = place_of(settings, entry_of(settings.dataset))
        if place and kind_of(place) in NAMES and not place.is_dir():  # Spark names a folder mine.parquet
            tried_table(place, None)
        if settings.max_tokens and not settings.max_tokens.isdecimal():
            entry_of(settings.max_tokens)
    evals = read_yaml(EVALS)["tasks"]
    names |= {evals[task]["benchmark"] for task in names & evals.keys()}
    for name in sorted(names & settings.paths.keys()):
        if not Path(settings.paths[name]).exists():
            raise UserError(f"paths: {name}={settings.paths[name]}: no such file or folder; correct it, or leave "
                            f"{name} out to read what the Hub has")  # fmt: skip


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
            if "hub_id" in entry:
                raise refusal from None
            said, *more = refusal.args
            raise UserError(f"no such folder: {hub_id}; as a Hub id: {said}", *more) from None
        commit = place.name  # a snapshot's folder is named by its commit
    train = held_out = split_files(place, entry.get("config"), "train")
    if "layouts" in entry:
        entry = recognised(entry, place, train)
    else:  # what cannot be read is refused before all of it is hashed
        next(chain.from_iterable(map(columns_by_row, train)), None)
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
            wanted = "is every file there that its README.md names?" if (place / "README.md").exists() else LAYOUT
            raise UserError(f"{place}: {in_one_line(error)}; {wanted}") from None
        found = builder.config.data_files or {}
        files = [Path(file) for key, names in found.items() if str(key) == split for file in names]
    if wrong := [file.name for file in files if not kind_of(file)]:
        raise UserError(f"{place}: a training set is JSONL, JSON, CSV (.gz too), Parquet, Excel's .xlsx or a folder of "
                        f"save_to_disk; found {', '.join(wrong[:5])}; save the rows as one of these")  # fmt: skip
    if not files and not may_lack:
        raise UserError(f"{place} holds no {split}*.jsonl or {split}*.parquet, nor does its data folder; {LAYOUT}")
    check_files(f"{place}, split {split}", files)
    if place.is_dir() and not (place / "README.md").exists():  # which may speak of several configurations
        check_unread(f"{place}, split {split}", place, files)
    return files


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
        yield from read_files([path])
        return
    try:
        with unpacked(path) as opened:
            if len(archive := opened.read(LONGEST + 1)) > LONGEST:
                raise UserError(f"{path} unpacks to more than {LONGEST >> 20} MiB: it is no benchmark's")
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


def text_rows(task: str, spec: dict, settings: Settings) -> Iterator[tuple[int, str, str]]:
    """The texts of a task of texts, each with its row's number and where it stands; "" for an empty one. They are all
    texts of the local file or folder that `paths` names for the task (JSONL, JSON, Parquet); else `take` texts of the
    held-out part of a training set, or of the benchmark's file, evenly spaced since files are often sorted.
    spec: its row of `benchmarks`, with `source` where that was found already.
    Raises UserError: no such file, no network and no copy, a row without that column."""
    local, key = settings.paths.get(task), spec["text"]
    if local is not None:
        if not Path(local).exists():
            raise UserError(f"paths: {task}={local}: no such file or folder")
        files = split_files(Path(local), None, "train")
    elif "dataset" in spec:
        source = spec.get("source") or find_source(replace(settings, dataset=spec["dataset"], dataset_path=None))
        files = source.files["held_out"]
    else:
        (file,) = benchmark_files(spec)
        files = [benchmark_path(spec["name"], spec, settings.paths.get(spec["name"]), file)]
    take, columns = (None, []) if local else (spec["take"], [key])
    # The distance of two texts in rows, mostly no whole number; of each such stretch the first row is taken.
    step = max(1, count_rows(files) / take) if take else 1
    rows = enumerate(read_files(files, columns), 1)
    for number, (where, row) in islice(((n, at) for n, at in rows if (n - 1) // step > (n - 2) // step), take):
        text = row.get("text", row.get(key))
        if not {"text", key} & row.keys() or not isinstance(text, str | None):
            raise UserError(f"{where}: no text in {key!r}; keys: {', '.join(row)}")
        yield number, where, text or ""


def overlap_row(name: str) -> dict:
    """The row of `benchmarks` that a name in `overlap` is about: a benchmark's, or that of a task of texts."""
    evals = read_yaml(EVALS)
    task = evals["tasks"].get(name, {"benchmark": name})
    row = evals["benchmarks"][task["benchmark"]] | {"name": task["benchmark"]}
    return row | ({"subsets": task["subsets"]} if "subsets" in task else {})


def overlap_place(name: str) -> str:
    """What is downloaded for a name in `overlap`: a benchmark, or the training set of which it is the held-out part."""
    row = overlap_row(name)
    return row.get("dataset", row["name"])


def overlap_names(settings: Settings) -> list[str]:
    """The benchmarks, and tasks of texts, in `overlap`, but for the held-out part of the training set itself, whose
    questions are left out of it. Raises UserError: an unknown one."""
    evals = read_yaml(EVALS)
    specs, tasks = evals["benchmarks"], evals["tasks"]
    known = {name for name, row in specs.items() if "text" not in row}  # a benchmark of texts is read as a task says
    known |= {name for name, task in tasks.items() if "text" in specs[task["benchmark"]]}
    names = [] if settings.overlap in ("", "none") else settings.overlap.split(",")
    for name in names:
        if name in tasks.keys() - known:
            raise UserError(f"overlap: the items of {name} are those of {tasks[name]['benchmark']}: name that")
        if name not in known:
            raise UserError(f"overlap: unknown benchmark {name!r}{nearest(name, known)}")
    return [name for name in names if name in settings.paths or overlap_place(name) != settings.dataset]


def benchmark_items(settings: Settings) -> list[tuple[str, list[str]]]:
    """Where each item of the benchmarks in `overlap` stands, and all its texts."""
    items = []
    for name in overlap_names(settings):
        spec = overlap_row(name)
        try:
            if "text" in spec:
                items += [(f"{name}, text {n}", [text]) for n, _, text in text_rows(name, spec, settings) if text]
                continue
            for file in benchmark_files(spec):
                rows = read_benchmark(name, spec, settings.paths.get(name), file)
                place = f"{name}, {Path(file).name}, item"
                items += [(f"{place} {n}", [*strings(row)]) for n, (_, row) in enumerate(rows, 1)]
        except UserError as error:
            needed = f"{name} is needed to find training rows that repeat its items"
            raise UserError(*error.args, f"{needed}; fewer: --overlap A,B; no check: --overlap none") from None
    return items
