"""Token rows on disk -> the rows of a step -> passes -> each process's share of the passes.

A *pass* is what goes through the model at once: rows side by side as a batch, or end to end in one row. The rows of a
step follow from the seed and the step's number alone. Into which passes they are put depends on the machine, and
changes only the rounding of sums.
"""

import dataclasses
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

IGNORE = -100  # label of a position that is not trained, as of torch's cross_entropy


def trained_mask(length: int, trained: Sequence[int]) -> np.ndarray:
    """bool (length,), True in the stretches [start, stop, start, stop, …]."""
    mask = np.zeros(length, bool)
    for start, stop in zip(trained[::2], trained[1::2], strict=True):
        mask[start:stop] = True
    return mask


class Rows:
    """The tokenised rows in a memory-mapped file of the cache.

    lengths: tokens of each row. trained: how many of them are trained, which are the answers'.
    """

    def __init__(self, file: Path):
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._places = table["place"]
        self._columns = [  # column -> batch of the file -> (the rows' values end to end, where each row begins)
            [(c.flatten().to_numpy(), c.offsets.to_numpy() - c.offsets[0].as_py()) for c in table[name].chunks]
            for name in ("input_ids", "trained")
        ]
        ids = self._columns[0]
        self.lengths = np.concatenate([np.diff(offsets) for _, offsets in ids] or [np.zeros(0, int)])
        self._starts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in ids)])

    def __len__(self) -> int:
        return len(self.lengths)

    def _values(self, index: int) -> tuple[np.ndarray, ...]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = int(np.searchsorted(self._starts, index, "right")) - 1
        at = index - self._starts[batch]
        return tuple(v[o[at] : o[at + 1]] for v, o in (column[batch] for column in self._columns))

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, labels), int64 (tokens,)."""
        ids, trained = self._values(index)
        ids = ids.astype(np.int64)
        return ids, np.where(trained_mask(len(ids), trained), ids, IGNORE)

    @cached_property
    def trained(self) -> np.ndarray:
        bounds = (self._values(index)[1] for index in range(len(self)))
        return np.array([int((stretch[1::2] - stretch[::2]).sum()) for stretch in bounds], np.int64)

    def place(self, index: int) -> str:
        """Where a row stands in the training set."""
        return self._places[index].as_py()


@dataclasses.dataclass(frozen=True)
class Passes:
    """How a machine puts rows together into passes.

    tokens: of a pass; a longer row is a pass by itself. alone: rows longer than this are not put end to end with
    others. Those of one width are side by side in a batch, with plain causal attention, which is the fastest. None: all
    rows stand end to end, even in passes of a single row, so that there are fewer kinds of passes. grain: widths are
    rounded up to a multiple of it, and of 1/16 of the power of two below them; with 1 they are not rounded."""

    tokens: int
    alone: int | None = 1024
    grain: int = 256

    def width(self, n: int) -> int:
        """The width of a pass for rows of n tokens, rounded up."""
        if self.grain == 1:
            return n
        step = max(self.grain, 1 << max(0, (n - 1).bit_length() - 5))
        return -(-n // step) * step

    def of(self, lengths: dict[int, int], processes: int = 1) -> "list[Pass]":
        """The passes of these rows (number -> tokens), the longest first. With several processes a pass takes no more
        than an equal share of the tokens, so that all have something to do."""
        tokens = min(self.tokens, max(-(-sum(lengths.values()) // processes), 1))
        widths: dict[int, list[int]] = defaultdict(list)
        short = {row: n for row, n in lengths.items() if self.alone is None or n <= min(self.alone, tokens)}
        for row, n in lengths.items():
            if row not in short:
                widths[self.width(n)].append(row)
        passes = []
        for width, rows in widths.items():
            count = max(1, tokens // width)
            passes += [Pass(tuple(rows[at : at + count]), width, False) for at in range(0, len(rows), count)]
        for rows in pack(short, tokens):
            packed = len(rows) > 1 or self.alone is None
            passes.append(Pass(tuple(rows), self.width(sum(short[row] for row in rows)), packed))
        return sorted(passes, key=lambda p: (-p.tokens, p.rows))


@dataclasses.dataclass(frozen=True)
class Pass:
    """Rows, by number, that go through the model at once: as a batch, each padded to `width`; or, if `packed`, end to
    end in one row, which is padded to `width`."""

    rows: tuple[int, ...]
    width: int
    packed: bool

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.width if self.packed else self.width * len(self.rows)


def pack(lengths: dict[int, int], limit: int) -> list[list[int]]:
    """Rows put together so that each pack has at most `limit` tokens, a longer row by itself: best-fit decreasing, the
    same each time; at most 11/9 of the fewest packs possible, plus one (Johnson 1973)."""
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens that still fit, number of the pack), sorted
    for row, n in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        at = bisect_left(spaces, (n, -1))
        if at == len(spaces):
            packs.append([])
            left, chosen = limit - n, len(packs) - 1
        else:
            space, chosen = spaces.pop(at)
            left = space - n
        packs[chosen].append(row)
        if left > 0:
            insort(spaces, (left, chosen))
    return packs


def shares(passes: list[Pass], processes: int, cost: Callable[[Pass], float]) -> list[list[Pass]]:
    """The passes of each process: the costliest first, each goes to the process with the least to do (Graham 1969,
    LPT).

    cost: what a pass costs, in any unit."""
    given: list[list[Pass]] = [[] for _ in range(processes)]
    load = [0.0] * processes
    for each in sorted(passes, key=lambda p: (-cost(p), p.rows)):
        least = load.index(min(load))
        given[least].append(each)
        load[least] += cost(each)
    return given


@lru_cache(maxsize=2)
def order_of(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch takes so many rows, int64 (count,)."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class Steps:
    """The steps of an epoch, each with its share for this process: what `DataLoader` reads.

    The rows of step n, counted over all epochs, are a function of (seed, n) alone, on any hardware; each row comes
    once an epoch, and an epoch's last step may have fewer. An item is {"passes": batches of `collate`, "trained":
    tokens that the whole step trains, in all processes, "seen", "pairs", "padded": tokens of this share, pairs of a
    token and one it attends to, tokens and padding}.

    even: all processes are given equally many passes, by repeating one without its trained tokens; fsdp needs that.
    """

    def __init__(
        self, rows: Rows, per_step: int, seed: int, passes: Passes, collate: Callable[[list, Pass, int], dict],
        cost: Callable[[Pass], float], processes: int = 1, rank: int = 0, even: bool = False,
    ):  # fmt: skip
        self.rows, self.per_step, self.seed, self.epoch = rows, per_step, seed, 0
        self.passes, self.collate, self.cost = passes, collate, cost
        self.processes, self.rank, self.even = processes, rank, even

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.per_step)

    def rows_of(self, step: int) -> list[int]:
        """Numbers of the rows of a step. Steps are counted from 0 over all epochs, as everywhere in this class."""
        epoch, at = divmod(step, len(self))
        order = order_of(self.seed, epoch, len(self.rows))
        return order[at * self.per_step : (at + 1) * self.per_step].tolist()

    def shares_of(self, step: int) -> list[list[Pass]]:
        """The passes of each process in a step."""
        lengths = {row: int(self.rows.lengths[row]) for row in self.rows_of(step)}
        return shares(self.passes.of(lengths, self.processes), self.processes, self.cost)

    def __getitem__(self, at: int) -> dict:
        step = self.epoch * len(self) + at
        given = self.shares_of(step)
        mine, most = given[self.rank], max(map(len, given))
        batches = [self._batch(each, step) for each in mine]
        if self.even and len(mine) < most:
            batch = self._batch(min(sum(given, []), key=lambda each: each.tokens), step)
            batches += [batch | {"trained": batch["trained"][:0]}] * (most - len(mine))
        lengths = np.array([self.rows.lengths[row] for each in mine for row in each.rows], np.int64)
        return {
            "passes": batches,
            "trained": int(self.rows.trained[self.rows_of(step)].sum()),
            "seen": int(lengths.sum()),
            "pairs": int((lengths * (lengths + 1) // 2).sum()),
            "padded": sum(each.tokens for each in mine),
        }

    def _batch(self, each: Pass, step: int) -> dict:
        return self.collate([(row, *self.rows.row(row)) for row in each.rows], each, step)

    def shapes(self, first: int, last: int) -> tuple[list[tuple[int, int, int]], float]:
        """The shapes of all passes in steps first..last - 1, the largest first, and the share of padding in them. A
        shape is (rows of the batch, width, places for documents), the last 0 where rows do not stand end to end; graphs
        are captured for each."""
        found, real, padded = set(), 0, 0
        for step in range(first, last):
            lengths = {row: int(self.rows.lengths[row]) for row in self.rows_of(step)}
            for each in self.passes.of(lengths, self.processes):
                padding = each.packed and each.width > sum(lengths[row] for row in each.rows)  # is a document, too
                places = room(len(each.rows) + padding) if each.packed else 0
                found.add((1 if each.packed else len(each.rows), each.width, places))
                padded += each.tokens
            real += sum(lengths.values())
        return sorted(found, key=lambda shape: (-shape[0] * shape[1], shape)), 1 - real / max(padded, 1)


def room(documents: int) -> int:
    """How many places for documents the graphs of a pass have, for one of so many documents: 16, 32, 64, …"""
    return 1 << max(4, (documents - 1).bit_length())


def noise(seed: int, step: int, row: int, length: int) -> np.ndarray:
    """A random number for each token of a row in a step, int32 (length,): dropout is drawn from it (lora.py).

    SplitMix64's mixing (Steele et al. 2014) of seed, step, row and position, one after the other.
    """
    with np.errstate(over="ignore"):
        x = np.uint64(0)
        for number in (seed, step, row):
            x = _mixed(x + np.uint64(number) + np.uint64(0x9E3779B97F4A7C15))
        x = _mixed(x + np.arange(length, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
