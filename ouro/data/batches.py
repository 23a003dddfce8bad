"""Token rows on disk -> batches: memory-mapped rows, packs of them, the order of an epoch, what is padding."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

IGNORE = -100  # label of a position that is not trained, as of torch's cross_entropy


def trained_mask(length: int, trained: Sequence[int]) -> np.ndarray:
    mask = np.zeros(length, bool)
    for start, stop in zip(trained[::2], trained[1::2], strict=True):
        mask[start:stop] = True
    return mask


class Rows:
    """Tokenised rows in a memory-mapped file; an item is a list of documents: (input_ids, labels), int64 (tokens,).

    A document is a row. An item has one, or, once `packs` is set to lists of row numbers, those of one list. Item -1
    has none: it fills the last step of an epoch.
    """

    def __init__(self, file: Path):
        with pa.memory_map(str(file)) as source:
            table = pa.ipc.open_file(source).read_all()
        self._places = table["place"]
        self._columns = [  # of each column, by batch of the file: the rows' values end to end, where each row begins
            [(c.flatten().to_numpy(), c.offsets.to_numpy() - c.offsets[0].as_py()) for c in table[name].chunks]
            for name in ("input_ids", "trained")
        ]
        ids = self._columns[0]
        self.lengths = np.concatenate([np.diff(offsets) for _, offsets in ids] or [np.zeros(0, int)])  # tokens per row
        self._starts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in ids)])
        self.packs: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.lengths) if self.packs is None else len(self.packs)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens per item."""
        return self.lengths if self.packs is None else np.array([self.lengths[pack].sum() for pack in self.packs])

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        batch = int(np.searchsorted(self._starts, index, "right")) - 1
        at = index - self._starts[batch]
        ids, trained = (v[o[at] : o[at + 1]] for v, o in (column[batch] for column in self._columns))
        ids = ids.astype(np.int64)
        return ids, np.where(trained_mask(len(ids), trained), ids, IGNORE)

    def _rows(self, index: int) -> list[int]:
        if not -1 <= index < len(self):
            raise IndexError(index)
        return [] if index < 0 else [index] if self.packs is None else self.packs[index]

    def __getitem__(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.row(i) for i in self._rows(index)]

    def places(self, index: int) -> list[str]:
        """Where the rows of an item stand in the training set."""
        return [self._places[i].as_py() for i in self._rows(index)]


def pack(lengths: np.ndarray, limit: int) -> list[list[int]]:
    """Rows put together so that each pack has at most `limit` tokens: best-fit decreasing, the same each time.

    At most 11/9 of the fewest packs possible, plus one (Johnson 1973); with rows far shorter than `limit`, nearly none
    too many.
    """
    packs: list[list[int]] = []
    spaces: list[int] = []  # distinct free spaces, sorted
    having: dict[int, list[int]] = defaultdict(list)  # free space -> packs that have it
    for row in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[row])
        at = bisect_left(spaces, n)
        if at == len(spaces):
            packs.append([])
            chosen, left = len(packs) - 1, limit - n
        else:
            chosen, left = having[spaces[at]].pop(), spaces[at] - n
            if not having[spaces[at]]:
                del spaces[at]
        packs[chosen].append(row)
        if left > 0:
            if not having[left]:
                insort(spaces, left)
            having[left].append(chosen)
    return packs


class EpochOrder:
    """The order of items in each epoch: a pure function of (seed, epoch), the same for any number of processes.

    Shuffled; then, unless they are packs, in spans of 16 steps sorted by length and cut into steps, which are shuffled:
    a step's rows are of like length, so little of a batch is padding and no process waits long for another. The step
    with the longest row comes first: memory runs out at once or not at all. The last step is filled with empty items
    (-1): no row is dropped or repeated, all processes have as many batches, and every step is whole.
    """

    def __init__(self, sizes: np.ndarray, rows_per_step: int, seed: int, grouped: bool):
        self.sizes, self.step, self.seed, self.grouped, self.epoch = sizes, rows_per_step, seed, grouped, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.sizes) // self.step) * self.step

    def __iter__(self) -> Iterator[int]:
        chance = np.random.default_rng([self.seed, self.epoch])
        order = chance.permutation(len(self.sizes))
        whole = len(order) // self.step * self.step
        if self.grouped and whole:
            longest = int(np.argmax(self.sizes[order]))
            if longest >= whole:  # it would be in the last step, which is not full
                order[[0, longest]] = order[[longest, 0]]
            spans = np.split(order[:whole], range(16 * self.step, whole, 16 * self.step))
            spans = [part[np.argsort(-self.sizes[part], kind="stable")] for part in spans]
            steps = np.concatenate(spans).reshape(-1, self.step)
            steps = steps[chance.permutation(len(steps))]
            longest = int(self.sizes[steps].max(1).argmax())
            steps[[0, longest]] = steps[[longest, 0]]
            order = np.concatenate([steps.reshape(-1), order[whole:]])
        return iter(order.tolist() + [-1] * (len(self) - len(order)))


def padding(sizes: np.ndarray, order: Iterable[int], batch: int) -> float:
    """The share of padding in batches of `batch` items taken in this order."""
    ordered = np.array([0 if i < 0 else sizes[i] for i in order])
    width = np.maximum.reduceat(ordered, np.arange(0, len(ordered), batch)).clip(min=1)
    rows = np.full(len(width), batch)
    rows[-1] = len(ordered) - batch * (len(width) - 1)
    return 1 - float(ordered.sum() / (width * rows).sum())
