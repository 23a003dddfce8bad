"""What every room shares: the repository's folder, errors meant for people, files that are written whole."""

import argparse
import copy
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import html
import io
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO

from ouro import COLLECT_AT, REMOVED

import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # the repository

# The OSErrors that a user can mend: a full, broken or read-only disk; a path that is missing, too long or a circle, or
# that leads through a file; a folder where a file belongs.
THEIRS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
          errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EFBIG)  # fmt: skip

SUMS = "SHA256SUMS"  # of the files of a checkpoint, an adapter or cached rows, as `sha256sum -c` reads it

# Control characters (but tab and newline), what turns the direction of a line or breaks it, halves of surrogate pairs,
# and ⟦⟧, between which the data report shows what is trained.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff⟦⟧]")


YAML_LETTERS = 1 << 18  # PyYAML takes ten seconds for four times as many


VALUES = 1 << 20  # that a JSON text may have; a row has fewer
# What begins a value or divides two; or a text in quotes, in which it does neither, also one that does not end.
VALUE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|([,\[{])', re.DOTALL)

MINUTE = 60.0  # seconds between two lines of a Progress where there is no terminal
BEGUN = "{desc}: {percentage:.0f} %|{bar:20}| {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"
BEGINNING = "{desc}: {elapsed} gone{postfix}"


class Progress(tqdm):
    """What is being done and how far it is: on a terminal a line that moves every second, elsewhere, as in a job's log,
    one line a minute. Until the first part is done, or if their number is not known, it tells the time that is gone.

    count: says how many parts are done, where nothing calls `update`."""

    def __init__(self, what: str, total: float | None = None, unit: str = "", quiet: bool = False,
                 count: Callable[[], float] | None = None):  # fmt: skip
        self.live, self.count, self.ended = sys.stderr.isatty(), count, threading.Event()
        quiet = quiet or os.environ.get("RANK", "0") != "0"
        big = (total or 0) > 9999  # told as 12.3k
        what = one_line(what)
        super().__init__(desc=what, total=total, unit=unit, unit_scale=big, leave=False, disable=quiet, delay=1)
        if not quiet:
            threading.Thread(target=self._tell, daemon=True).start()

    def _tell(self) -> None:
        while not self.ended.wait(1 if self.live else MINUTE):
            self.n = self.count() if self.count else self.n
            if self.live:
                self.refresh()
            else:
                print(self, file=sys.stderr, flush=True)

    @property
    def format_dict(self) -> dict:
        return super().format_dict | {"bar_format": BEGUN if self.n and self.total else BEGINNING}

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.live:
            super().display(msg, pos)

    def close(self) -> None:
        self.ended.set()
        super().close()


class UserError(Exception):
    """A mistake of the user's: shown as one message without a traceback, exit code 2. Each argument is a line of it,
    and stays one, whatever names and values are in it."""

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))


def printable(text: object) -> str:
    """Text of data, models and servers as it can be shown: a terminal obeys nothing in it."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """As `printable`, for a name, path or value: a line feed in it begins no line of its own."""
    return printable(text).replace("\n", "\\n")


def quoted(text: object) -> str:
    """A word of a command for bash, on one line: `shlex.quote`'s, but where a terminal would obey something in it."""
    if one_line(text) == str(text):
        return shlex.quote(str(text))
    plain = str(text).replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return "$'{}'".format(UNSAFE.sub(lambda found: "".join(map(r"\x{:02x}".format, os.fsencode(found[0]))), plain))


LOGIN = re.compile(r"(?<=://)[^\s/]*@")  # user and password before the host of an address
HIDDEN = 8  # characters that a secret has at least: a shorter one ("none", "x") is a placeholder, and may be a word


def message(text: object) -> str:
    """As `printable`, for errors and warnings: without the passwords in addresses and the environment's secrets."""
    text = LOGIN.sub("…@", str(text))
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy"):
            value = value.rpartition("@")[0].rpartition("//")[2]  # one without http:// before it
        elif not name.endswith(("_API_KEY", "_TOKEN")):
            continue
        for part in (value, re.split("[#?/]", value)[0]):  # at which an address is cut where a password is not quoted
            if len(part) >= HIDDEN:
                text = text.replace(part, "…")
    return printable(text)


def markdown(text: str) -> str:
    """Text on one line, with nothing in it that Markdown, HTML or a terminal would obey."""
    escaped = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", escaped).replace("\\_", "_")


def spreadsheet(text: str) -> str:
    """A text as a cell that no spreadsheet takes for a formula; numbers of one's own need none of it."""
    return f"'{printable(text)}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") else printable(text)


def nearest(name: str, known) -> str:
    """ "; did you mean 'x'?" for a typing error, or for initials (lr); else the names there are."""
    close = [x for x in known if len(name) > 1 and name == "".join(word[:1] for word in x.split("_"))]
    close += difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def place(text: str) -> str:
    """A path as it was typed, in a file too, with `~` and `$VARIABLE` filled in.
    Raises UserError: no such user or variable, an empty variable, or bytes that are no text."""
    path = os.path.expanduser(re.sub(r"\$(\w+|\{\w+\})", lambda m: os.environ.get(m[1].strip("{}")) or m[0], text))
    if (path.startswith("~") or re.search(r"\$(\w|\{)", path)) and not os.path.lexists(path):
        raise UserError(f"path {text!r}: {'no such user' if path[0] == '~' else 'a variable in it is not set'}")
    return path


# What YAML takes for the end of a line, or refuses: it is written as an escape.
NOT_YAML = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def yaml_line(text: str) -> str:
    """A line of YAML whose values are JSON (which YAML is), in the letters that every YAML reader takes."""
    return NOT_YAML.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def from_json(text: str, values: int = VALUES) -> object:
    """A JSON text's value. Raises ValueError also for a key that stands twice, for the first value would be lost; and
    for more than so many values, which take up to 100 times the memory of the text."""
    if len(text) > values and sum(map(text.count, ",[{")) > values:  # so many commas may stand in texts: count exactly
        found = (match for match in VALUE.finditer(text) if match[1])
        if next(islice(found, values, None), None):
            raise ValueError(f"more than {values:,} values: write each row in a line of its own")

    def once(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


class Loader(yaml.SafeLoader):
    """PyYAML's, that refuses a key which stands twice, for of two values the first would be lost without a word; and
    aliases, by which a short file can stand for more than any memory holds. Numbers, true and false are those of YAML
    1.2: in 1.1, 010 is eight, 1:30 is ninety and `no` is false. All else is text."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"*{alias.anchor}: write the value out", alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                first = f"stands twice, first in line {lines[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} {first}", key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
              "-+.0123456789"),
}  # fmt: skip
Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].endswith(":null")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_pattern, _first) in SCALARS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))


WHOLE = 64 << 20  # bytes of a file of JSON that is read at once; Ouro's tokenizer.json, the largest, has 3.5 million


def regular(path: Path, most: int | None = None) -> Path:
    """`path`, of a file that stands in a folder: what is no file there is not opened, for a named pipe would be waited
    for, and a device never ends. Raises UserError: it is such a thing, or has more than `most` bytes; a missing file or
    a folder is left to open()."""
    try:
        about = path.stat()  # asked once: another process may replace the file meanwhile
    except (OSError, ValueError):
        return path
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        raise UserError(f"cannot read {path}: a named pipe or a device, and no file")
    if most is not None and stat.S_ISREG(about.st_mode) and about.st_size > most:
        raise UserError(f"{path} has {about.st_size / 2**20:,.0f} MiB, and at most {most >> 20:,} are read")
    return path


@functools.lru_cache(maxsize=32)  # a program asks for the same tables again and again
def parsed(text: str) -> object:
    return yaml.load(text, Loader)


def check_writable(setting: str, folder: str | Path) -> None:
    """Raises UserError: a folder that a setting names cannot be written, or not be made. Writes nothing."""
    path = Path(folder).absolute()
    there = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{setting} = {folder}: nothing can be written to {there}: name another folder by --{setting}")


def read_yaml(path: str | Path, typed: bool = False) -> dict:
    """A YAML file that holds a mapping. typed: by the user, who may name a pipe, as in `--config <(…)`.
    Raises UserError: no such file, a larger one than anybody writes, broken YAML (with the line), a key that stands
    twice, an alias, or something other than a mapping."""
    try:
        with open(path if typed else regular(Path(path)), encoding="utf-8-sig") as file:
            text = file.read(YAML_LETTERS + 1)
        if len(text) > YAML_LETTERS:
            raise UserError(f"{path} is no file of settings: it has more than {YAML_LETTERS:,} letters")
        content = copy.deepcopy(parsed(text))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{path} must hold 'setting: value' lines, found a {type(content).__name__}")
    return content or {}


def latest(words: Sequence[str]) -> list[str]:
    """A command's words without the options that a later one replaces, for what calls a program with its own options
    behind a user's."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            found.pop(name, None)
        found.setdefault(name, []).append(word)
    return [word for option in found.values() for word in option]


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are the user's. --args=TEXT stands for the arguments in TEXT, quoted as in a shell; they
    may repeat an option that make wrote, but neither of the two may have one twice: the first value would be lost."""

    def parse_known_args(self, args=None, namespace=None):
        typed, words = [], []
        for word in sys.argv[1:] if args is None else args:
            text = word.removeprefix("--args=")  # ARGS of make
            if text == word:
                typed.append(word)
                words.append(word)
                continue
            try:
                more = shlex.split(text.replace("\\\n", ""))
            except ValueError as error:
                raise UserError(f"ARGS: {str(error).lower()}: {text}") from None
            self.refuse_twice(more, "ARGS")
            words += more
        self.refuse_twice(typed, "command line")
        return super().parse_known_args(words, namespace)

    def refuse_twice(self, words: list[str], where: str) -> None:
        names = [word.partition("=")[0] for word in words if word.startswith("--")]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{where}: {twice[0]} is given twice; give it once, with the one value that is meant")

    def error(self, message: str):  # argparse would print all options before the one line that matters
        raise UserError(f"command line: {message}")


def lock(file: IO) -> bool:
    """Takes the lock of an open file, which ends with this process at the latest; False: another process has it.

    Not flock, which the library filelock uses: on GPFS two nodes hold one such lock at the same time.
    Raises OSError: no locks on this file system."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def remove_left(path: Path) -> None:
    """Removes what processes that were killed left beside `path` while they made it."""
    for left in [p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.") and p.suffix == ".tmp"]:
        with suppress(OSError), open(left, "r+b") as opened:  # an error: no locks here, or it is gone
            if lock(opened):  # its process is gone
                shutil.rmtree(f"{left}.d", ignore_errors=True)
                left.unlink()


@contextmanager
def unfinished(path: Path) -> Iterator[IO]:
    """A new file beside `path`, open, to be renamed to it; a folder can be made under its name and ".d". Neither is
    left. No other process has this name, be it in another container, and what one that was killed left there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_left(path)
    while True:
        with open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), "xb") as file:
            with suppress(OSError):
                lock(file)
            if not os.fstat(file.fileno()).st_nlink:  # another process met it before it was locked
                continue
            try:
                yield file
            finally:
                shutil.rmtree(f"{file.name}.d", ignore_errors=True)
                Path(file.name).unlink(missing_ok=True)
            return


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a file that is either there whole or not at all, also across a power cut."""
    path = Path(path)
    with unfinished(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was created, renamed or deleted in a folder last across a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: object) -> None:
    write_atomic(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that this program wrote.
    Raises UserError: it is not there, is damaged, or lacks one of `keys`, as one of another version may."""
    try:
        content = json.loads(regular(path, WHOLE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or f'damaged ({error})'}") from None
    if not isinstance(content, dict) or (missing := [key for key in keys if key not in content]):
        what = f"no {', '.join(missing)}" if isinstance(content, dict) else "no object"
        raise UserError(f"{path} has {what}: it is damaged, or of another version of this program")
    return content


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        with open(regular(path), "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def seal(folder: Path) -> None:
    """Writes all of a folder to the disk, and the checksums of its files beside them; hidden files are not ours."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != "." and path.name != SUMS)
    for path in files:
        sync_file(path)
    sums = [f"# {len(files)} files", *(f"{file_sha256(path)}  {path.name}" for path in files)]
    write_atomic(folder / SUMS, "\n".join(sums) + "\n")  # which syncs the folder too
    mode = (folder / SUMS).stat().st_mode
    for path in files:  # safetensors writes files that only their owner can read, whatever the umask
        if path.stat().st_mode != mode:
            path.chmod(mode)


def sealed_files(folder: Path) -> dict[str, str]:
    """SHA-256 by name of what was written into a sealed folder. Raises UserError where that cannot be read."""
    try:
        lines = regular(folder / SUMS).read_text(encoding="utf-8").splitlines()
        count = lines.pop(0) if lines and lines[0].startswith("#") else f"# {len(lines)} files"
        if count != f"# {len(lines)} files":
            raise ValueError  # cut at the end of a line
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, or other text
        raise UserError(f"its {SUMS} cannot be read: {getattr(error, 'strerror', None) or 'no checksums'}") from None


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder; None where each file that was written is there as it was. Others do not
    matter: file browsers and file servers leave theirs (.DS_Store, ._x, .nfs…, .ipynb_checkpoints)."""
    try:
        sums = sealed_files(folder)
        wrong = [name for name, digest in sums.items() if file_sha256(folder / name) != digest]
    except UserError as error:
        return str(error)
    if not sums:
        return f"its {SUMS} is empty"
    return f"its files are not those of its {SUMS}: {', '.join(wrong)}" if wrong else None


def code_version() -> dict[str, str | bool | None]:
    """Of this code, for manifests: code_sha256, of all its Python files; git_commit and git_dirty: by git; else by the
    file COMMIT that an image has beside the code; else by what slurm/site.sh found where the job was submitted; else
    "unknown"."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("ouro/**/*.py")])
    content = "".join(f"{file_sha256(file)} {file.relative_to(ROOT)}\n" for file in files)
    code = {"code_sha256": hashlib.sha256(content.encode()).hexdigest()}

    def git(*args: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    reports = (":(exclude)RESULTS.md", ":(exclude)report.html")  # which `make report` writes
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ".", *reports)
    if commit and changes is not None:
        return code | {"git_commit": commit, "git_dirty": bool(changes)}
    file = ROOT / "COMMIT"
    said = file.read_text(encoding="utf-8").strip() if file.exists() else os.environ.get("OURO_THAI_COMMIT")
    if said in (None, "", "unknown"):
        return code | {"git_commit": "unknown", "git_dirty": None}
    return code | {"git_commit": said.removesuffix("-dirty"), "git_dirty": said.endswith("-dirty")}


def explain(error: BaseException) -> int | None:
    """Prints what a user can do something about as one message; the exit code, None for any other exception."""
    match error:
        case UserError():
            print(f"error: {message(error)}", file=sys.stderr)
            return 2
        case BrokenPipeError():  # as in `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        case OSError() if error.errno in THEIRS:
            blocked = error.errno in (errno.ENOTDIR, errno.EEXIST)
            reason = "a file is where a folder is wanted" if blocked else error.strerror
            print(f"error: {reason}: {one_line(error.filename or 'writing a file')}", file=sys.stderr)
            return 2
        case KeyboardInterrupt():
            return 130
    return None


def call(main: Callable[[], None], last: bool = True) -> None:
    """Runs a script's main, or what comes before its other imports and so is not the `last` thing; a UserError, a full
    disk or a path that cannot be becomes one message and exit code 2."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed by what started this, as some cron jobs do
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Thai letters shows \u0e01 for them
            stream.reconfigure(errors="backslashreplace")
    if REMOVED and (os.environ.get("RANK") or "0") == "0":
        print(f"not used, as settings alone decide what is computed: {', '.join(REMOVED)}", file=sys.stderr)
        REMOVED.clear()  # it is said once
    if last:
        gc.freeze()  # else each full collection would go through all that was imported, for 0.3 s
        gc.set_threshold(*COLLECT_AT)
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        code = explain(error)
        if code is None:
            raise
        sys.exit(code)
