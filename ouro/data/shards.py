"""Whether the files of a training set are all there, and each of its rows once, by their names and contents."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ouro.files import UserError, file_sha256

KINDS = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz", ".xlsx")
SHARD = re.compile(r"(.*?)[-_. ]*(\d+)[-_. ]?of[-_. ]?(\d+)(?!\d)")  # "train", "00001", "00003"
TOTAL = re.compile(r"_(\d{1,3}|0\d+)")  # what follows the number in "train-1_3"
COPY = re.compile(r"^copy of |[-_ ]+(?:copy|สำเนา)(?: ?\(?\d+\)?)?$| ?\(\d+\)$|[-_.](?:old|bak|backup)$")


def kind_of(file: Path) -> str:
    """The one of KINDS with which a file's name ends, in small letters or large ones; "" if there is none."""
    return next((kind for kind in KINDS if file.name.lower().endswith(kind)), "")


def stem(file: Path) -> str:
    """A file's name in small letters, without what says its format or that it is a copy."""
    return COPY.sub("", file.name.lower().removesuffix(kind_of(file)))


def group_of(file: Path) -> str:
    """What files of the same rows have in common: a stem, without a shard's numbers."""
    shard = SHARD.match(stem(file))
    return shard[1] if shard else stem(file)


def check_unread(where: str, folder: Path, files: list[Path]) -> None:
    """Raises UserError where a folder, or its data folder, also has rows of the same name that are not read, as in
    another format: which are those that are meant?"""
    # Where the folder is a link, `datasets` names the files by where it leads; files of the Hub's cache are links, too.
    folder, files = folder.resolve(), [file.parent.resolve() / file.name for file in files]
    names = {group_of(file): file for file in files}
    for other in (*sorted(folder.glob("*")), *sorted(folder.glob("data/*"))):
        if (read := names.get(group_of(other))) and kind_of(other) and other not in files:
            one, two = read.relative_to(folder), other.relative_to(folder)
            raise UserError(f"{where}: {one} would be read, and {two} not: leave the one there that is meant")


def check_files(where: str, files: list[Path]) -> None:
    """Raises UserError where rows of a split are missing, as after a download that was cut, or there twice, as beside a
    copy, another format or another export of them: a run would train on other rows than are meant, without a word."""
    groups: dict[tuple, list[Path]] = defaultdict(list)
    for file in files:
        groups[file.parent, group_of(file)].append(file)
    alone = []
    for group in groups.values():
        shards = [shard for file in group if (shard := SHARD.match(stem(file)))]
        if len({int(shard[3]) for shard in shards}) > 1 or len(shards) < len(group) > 1:
            refuse_twice(where, group)
        if shards:
            numbers = [(shard[0], *shard.span(2)) for shard in shards]
            check_numbers(where, dict(zip(group, numbers, strict=True)), int(shards[0][3]))
        else:
            alone += group
    sizes, contents = Counter(file.stat().st_size for file in alone), defaultdict(list)
    for file in alone:
        if sizes[file.stat().st_size] > 1 and file.stat().st_size:
            contents[file_sha256(file)].append(file)
    for same in contents.values():
        if len(same) > 1:
            refuse_twice(where, same)
    for series in numbered(alone):
        if count := count_of([*series.values()]):
            check_numbers(where, series, count)


def numbered(files: list[Path]) -> Iterable[dict[Path, tuple[str, int, int]]]:
    """Those whose names are equal but for one number: name, start and end of it."""
    series: dict[tuple, dict] = defaultdict(dict)
    for file in files:
        name = stem(file)
        for number in re.finditer(r"\d+", name):
            rest = (file.parent, name[: number.start()], name[number.end() :])
            series[rest][file] = (name, *number.span())
    return series.values()


def count_of(series: list[tuple[str, int, int]]) -> int:
    """How many files a series should have, by its names; 0 if they do not tell: years and sizes are no series."""
    if len(series) < 2:
        return 0
    numbers = [name[start:end] for name, start, end in series]
    found = {int(number) for number in numbers}
    count, total = max(found) + (0 in found), TOTAL.fullmatch(series[0][0], series[0][2])
    if total and int(total[1]) >= count:
        return int(total[1])
    padded = any(len(number) > 2 and number[0] == "0" for number in numbers)
    begun = len(found) > 2 and min(found) < 2 and 2 * len(found) >= count
    return count if padded or begun else 0


def refuse_twice(where: str, files: Iterable[Path]) -> None:
    names = sorted(file.name for file in files)
    text = ", ".join(names[:6]) + " …" * (len(names) > 6)
    raise UserError(f"{where}: {text} seem to hold the same rows, which would be read twice: leave one of each there, "
                    "or give files of other rows other names")  # fmt: skip


def check_numbers(where: str, shards: dict[Path, tuple[str, int, int]], count: int) -> None:
    """That of `count` shards, each with its name and where in it the number starts and ends, every one is there once.
    Some count from 1."""
    found = {file: int(name[start:end]) for file, (name, start, end) in shards.items()}
    first = int(count in found.values() and 0 not in found.values())
    wanted, there = range(first, count + first), {*found.values()}
    if missing := [*islice((n for n in wanted if n not in there), 6)]:  # a name may speak of a billion
        name, start, end = min(shards.values(), key=lambda shard: shard[2] - shard[1])
        names = [f"{name[:start]}{n:0{end - start}}{name[end:]}" for n in (*missing[:5], count)]
        told = ", ".join(names[:-1]) + " …" * (len(missing) > 5) + f" or {names[-1]}" * (missing == [0])
        raise UserError(f"{where}: {sum(n in wanted for n in there)} of the {count} files are there, without {told}")
    if twice := [file for file, n in found.items() if [*found.values()].count(n) > 1]:
        refuse_twice(where, twice)
    if beyond := [file.name for file, n in found.items() if n not in wanted]:
        raise UserError(f"{where}: {', '.join(beyond[:5])} is beyond the {count} files that its name speaks of")
