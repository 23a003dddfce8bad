"""The report's statistics: clustered standard errors over items, seeds by Student's t, one family by Holm.

A *cell* is a model read at one depth on one benchmark: per item a numerator and a denominator (bits and characters;
correct and 1), whose sums' ratio is the value, or its logarithm. Items that share a passage are a *cluster*, and exams
are *strata*. Training runs add a second source of chance, the seed; `estimate` treats items and seeds as crossed.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # the quantile of Student's t, ten times as fast as scipy.stats.t

ALPHA, POWER = 0.05, 0.8
SEEDS = 3  # with fewer at either depth nothing is tested


@dataclasses.dataclass
class Cell:
    """values: (seeds, …); parts: (clusters, seeds, …), what each cluster adds to the value's error, scaled so that the
    sum of their squares is the variance; free: its degrees of freedom, clusters minus strata; trained: False of a model
    that no seed made, as the base."""

    values: np.ndarray
    parts: np.ndarray
    free: int
    trained: bool = True

    def __sub__(self, other: "Cell") -> "Cell":  # of the same runs; a base (one "seed") is broadcast
        trained = self.trained or other.trained
        return Cell(self.values - other.values, self.parts - other.parts, min(self.free, other.free), trained)

    def __neg__(self) -> "Cell":
        return Cell(-self.values, -self.parts, self.free, self.trained)


def cell(
    above: np.ndarray,
    below: np.ndarray,
    clusters: np.ndarray | None = None,
    strata: np.ndarray | None = None,
    log: bool = False,
) -> Cell:
    """above: (items, seeds, …); below: (items,) or like above; clusters, strata: a label an item, (items,).

    The variance is that of the bootstrap which draws whole clusters in each stratum, in its linear form: it needs no
    draws, so that the same files give the same digits (clustered standard errors, Miller 2024, arXiv 2411.00640)."""
    items = len(above)
    below = below.reshape(items, *([1] * (above.ndim - 1))) if below.ndim == 1 else below
    value = above.sum(0) / below.sum(0)
    parts = (above - value * below) / below.sum(0)
    if log:
        value, parts = np.log(value), parts / value
    cluster = np.arange(items) if clusters is None else pd.factorize(clusters)[0]
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    stratum = np.zeros(len(starts), int) if strata is None else pd.factorize(strata)[0][order][starts]
    if len(starts) < items:
        parts = np.add.reduceat(parts[order], starts)
    counts = np.bincount(stratum)
    stratum[counts[stratum] == 1] = counts.argmax()  # one cluster alone has no spread of its own
    for number in np.unique(stratum):
        mine = stratum == number
        count = mine.sum()
        parts[mine] = (parts[mine] - parts[mine].mean(0)) * np.sqrt(count / max(count - 1, 1))
    return Cell(value, parts, len(starts) - len(np.unique(stratum)))


def half_width(level, items, items_free, spread, spread_free) -> np.ndarray:
    """Half of the interval that misses the truth in a share `level` of studies.

    Items and seeds each take their own quantile, and the squares are added: one quantile with Satterthwaite's degrees
    of freedom is too short where three seeds agree by chance (a false word in 10 to 14 % of studies in place of 5)."""
    over_items, over_seeds = (stdtrit(free, np.divide(level, 2)) for free in (items_free, spread_free))
    return np.sqrt(over_items**2 * items + over_seeds**2 * spread)


def p_value(value, *spreads) -> np.ndarray:
    """Two-sided: the level at which the interval, of `half_width`'s other arguments, just reaches zero; from 1e-60."""
    below, above = np.full(np.shape(value), -60.0), np.zeros(np.shape(value))
    for _ in range(40):
        middle = (below + above) / 2
        excluded = half_width(10**middle, *spreads) < np.abs(value)
        below, above = np.where(excluded, below, middle), np.where(excluded, middle, above)
    return 10**above


def pooled(parts: np.ndarray, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """parts: (groups, …), each group's variance over seeds -> their sum and its degrees of freedom: Welch's, and where
    the groups have unequal numbers of runs those of the smallest, as Welch's are too many if that one spreads most."""
    spread, fewest = parts.sum(0), max(min(seeds, default=2) - 1, 1)
    if len(set(seeds)) != 1:
        return spread, np.full(np.shape(spread), float(fewest))
    with np.errstate(divide="ignore", invalid="ignore"):
        return spread, np.nan_to_num(spread**2 / (parts**2 / fewest).sum(0), nan=fewest)


@dataclasses.dataclass
class Estimate:
    """A value; its variance over items, with the degrees of freedom; the variance over seeds (groups, …), of groups of
    so many seeds."""

    value: np.ndarray
    items: np.ndarray
    items_free: int
    parts: np.ndarray
    seeds: list[int]

    @property
    def known(self) -> bool:
        """Whether there is an interval: more than one cluster, and no group of one run."""
        return self.items_free > 0 and min(self.seeds, default=2) > 1

    @property
    def spreads(self) -> tuple:
        """Arguments of `half_width`."""
        return self.items, self.items_free, *pooled(self.parts, self.seeds)

    def half(self, level: float = ALPHA) -> np.ndarray:
        return half_width(level, *self.spreads) if self.known else np.full(np.shape(self.value), np.inf)

    @property
    def p(self) -> np.ndarray:
        return p_value(self.value, *self.spreads)

    def detectable(self, level: float, margin: float, draws: int = 4000) -> float:
        """The smallest true difference whose direction a study like this one finds four times in five: its interval at
        `level` excludes zero and does not lie inside the margin."""
        rng = np.random.default_rng(0)
        noise = np.sqrt(self.items + self.parts.sum()) * rng.normal(size=draws)
        free = np.array(self.seeds, float).reshape(-1, 1) - 1
        again = self.parts.reshape(-1, 1) * rng.chisquare(free, (len(free), draws)) / free
        half = half_width(level, self.items, self.items_free, *pooled(again, self.seeds))
        return float(np.quantile(np.maximum(half, margin - half) - noise, POWER))


def estimate(groups: list[Cell]) -> Estimate:
    """The sum of the groups' means over their seeds, each group a set of runs trained apart from the others'.

    Items and seeds are crossed (Cornfield & Tukey 1956): the variance over items of the seeds' mean holds the items'
    effect and a share of what each run does with each item; the spread between seeds holds the seeds' effect and the
    same share, which is therefore taken off once."""
    value = sum(group.values.mean(0) for group in groups)
    items = (sum(group.parts.mean(1) for group in groups) ** 2).sum(0)
    trained = [group for group in groups if group.trained]
    parts = np.zeros((len(trained), *np.shape(value)))
    for number, group in enumerate(trained):
        if (count := len(group.values)) > 1:
            own = group.parts - group.parts.mean(1, keepdims=True)
            items = items - (own**2).sum((0, 1)) / (count - 1) / count
            parts[number] = group.values.var(0, ddof=1) / count
    seeds = [len(group.values) for group in trained]
    return Estimate(value, np.maximum(items, 0), min(group.free for group in groups), parts, seeds)


def holm(p: np.ndarray, alpha: float = ALPHA) -> tuple[np.ndarray, np.ndarray]:
    """p: (tests, …) -> p adjusted for the family (Holm 1979), and the level that each test was held to: an interval at
    that level excludes zero just where the adjusted p is below alpha."""
    count = len(p)
    order = np.argsort(p, 0, kind="stable")
    factor = np.arange(count, 0, -1).reshape(-1, *([1] * (p.ndim - 1)))
    adjusted = np.minimum(np.maximum.accumulate(np.take_along_axis(p, order, 0) * factor, 0), 1)
    rejected = (adjusted <= alpha).sum(0)
    levels = alpha / np.maximum(factor, np.maximum(count - rejected, 1))
    back = np.argsort(order, 0)
    return np.take_along_axis(adjusted, back, 0), np.take_along_axis(levels, back, 0)


def reading(low: np.ndarray, high: np.ndarray, margin: float) -> np.ndarray:
    """What an interval says of a difference: same (it lies inside the margin), more, less, or undecided."""
    inside = (low > -margin) & (high < margin)
    return np.select([inside, low > 0, high < 0], ["same", "more", "less"], "undecided")
