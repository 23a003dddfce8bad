"""Whether the files of a training set are all there, and each of its rows once, by their names and contents."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ouro.files import UserError, file_sha256

KINDS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")  # files of rows
SHARD = re.compile(r"(.*?)[-_. ]*(\d+)[-_. ]?of[-_. ]?(\d+)(?!\d)")  # "train", "00001", "00003"
NUMBERED = re.compile(r"(.*?)(\d{3,})(\D*)")  # a shard whose name does not say how many there are
COPY = re.compile(r"^copy of |[-_ ]+(?:copy|สำเนา)(?: ?\(?\d+\)?)?$| ?\(\d+\)$|[-_.](?:old|bak|backup)$")


def stem(file: Path) -> str:
    """A file's name in small letters, without what says its format or that it is a copy."""
    name = file.name.lower()
    return COPY.sub("", name[: min(len(name.removesuffix(kind)) for kind in KINDS)])


def group_of(file: Path) -> str:
    """What files of the same rows have in common: a stem, without a shard's numbers."""
    shard = SHARD.match(stem(file))
    return shard[1] if shard else stem(file)


def check_unread(where: str, folder: Path, files: list[Path]) -> None:
    """Raises UserError where a folder, or its data folder, also has rows of the same name that are not read, as in
    another format: which are those that are meant?"""
    folder, names = folder.absolute(), {group_of(file): file for file in files}
    for other in (*sorted(folder.glob("*")), *sorted(folder.glob("data/*"))):
        if (read := names.get(group_of(other))) and other.name.endswith(KINDS) and other not in files:
            one, two = read.relative_to(folder), other.relative_to(folder)
            raise UserError(f"{where}: {one} would be read, and {two} not: leave the one there that is meant")


def check_files(where: str, files: list[Path]) -> None:
    """Raises UserError where rows of a split are missing, as after a download that was cut, or there twice, as beside a
    copy, another format or another export of them: a run would train on other rows than are meant, without a word."""
    groups: dict[tuple, list[Path]] = {}
    for file in files:
        groups.setdefault((file.parent, group_of(file)), []).append(file)
    alone, numbered, contents = [], {}, {}
    for group in groups.values():
        shards = [shard for file in group if (shard := SHARD.match(stem(file)))]
        if len({int(shard[3]) for shard in shards}) > 1 or len(shards) < len(group) > 1:
            refuse_twice(where, group)
        if shards:
            check_numbers(where, dict(zip(group, shards, strict=True)), int(shards[0][3]))
        else:
            alone += group
    sizes = Counter(file.stat().st_size for file in alone)
    for file in alone:
        if sizes[file.stat().st_size] > 1 and file.stat().st_size:
            contents.setdefault(file_sha256(file), []).append(file)
        if number := NUMBERED.fullmatch(stem(file)):
            numbered.setdefault((file.parent, number[1], len(number[2]), number[3]), {})[file] = number
    for same in contents.values():
        if len(same) > 1:
            refuse_twice(where, same)
    for series in numbered.values():
        found = [int(number[2]) for number in series.values()]
        if len(found) > 1 and any(number[2][0] == "0" for number in series.values()):  # 0007, and not a year
            check_numbers(where, series, max(found) + (0 in found))


def refuse_twice(where: str, files: Iterable[Path]) -> None:
    names = sorted(file.name for file in files)
    text = ", ".join(names[:6]) + " …" * (len(names) > 6)
    raise UserError(f"{where}: {text} seem to hold the same rows, which would be read twice: leave one of each there, "
                    "or give files of other rows other names")  # fmt: skip


def check_numbers(where: str, shards: dict[Path, re.Match], count: int) -> None:
    """That of `count` shards, whose number is group 2 of its match, every one is there once. Some count from 1."""
    found = {file: int(shard[2]) for file, shard in shards.items()}
    first = int(count in found.values() and 0 not in found.values())
    wanted = range(first, count + first)
    if missing := [n for n in wanted if n not in found.values()]:
        shard = min(shards.values(), key=lambda shard: len(shard[2]))
        name, (start, end) = shard[0], shard.span(2)
        names = [f"{name[:start]}{n:0{end - start}}{name[end:]}" for n in missing[:5]]
        told = ", ".join(names) + " …" * (len(missing) > 5)
        raise UserError(f"{where}: {count - len(missing)} of the {count} files are there, without {told}")
    if twice := [file for file, n in found.items() if [*found.values()].count(n) > 1]:
        refuse_twice(where, twice)
    if beyond := [file.name for file, n in found.items() if n not in wanted]:
        raise UserError(f"{where}: {', '.join(beyond[:5])} is beyond the {count} files that its name speaks of")
