"""The report's statistics in plain numpy: paired bootstrap over items, seeds, Holm's correction, exact binomial, power.

A *cell* is a model read at one depth on one benchmark: per item a numerator and a denominator (bits and characters;
correct and 1), whose sums' ratio is the value. All cells of a benchmark are resampled with the same weights, so every
difference between them is paired by item. Training runs add a second source of chance, the seed: `estimate` treats
items and seeds as crossed random effects, the item part from the bootstrap, the seed part from the spread of the runs.
"""

import dataclasses
import math
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000  # the standard error's own error is then 1 / sqrt(2 * 2000) = 1.6 %
ALPHA, POWER = 0.05, 0.8
MANY = 1e4  # degrees of freedom from which on t is as good as normal


@dataclasses.dataclass
class Cell:
    """values: (seeds, …); boots: (resamples, seeds, …), the same under resampled items."""

    values: np.ndarray
    boots: np.ndarray

    def __sub__(self, other: "Cell") -> "Cell":  # of the same runs; a base (one "seed") is broadcast
        return Cell(self.values - other.values, self.boots - other.boots)

    def __neg__(self) -> "Cell":
        return Cell(-self.values, -self.boots)


@dataclasses.dataclass
class Estimate:
    """A difference with its 95 % interval and two-sided p; `effect`: in standard deviations of an item's difference."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    stderr: np.ndarray
    df: np.ndarray
    effect: np.ndarray
    items: int
    seeds: int  # of the group that has fewest

    def detectable(self, tests: int = 1) -> np.ndarray:
        """The smallest effect found with a chance of 80 % at 5 %, shared by so many tests.

        Bloom (1995), Minimum detectable effects: (t of the level + t of the power) * standard error."""
        return (t_quantile(1 - ALPHA / tests / 2, self.df) + t_quantile(POWER, self.df)) * self.stderr


def resample(items: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """(resamples, items): how often each item was drawn; the same in every call, so that reports repeat."""
    counts = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples)
    return counts.astype(np.float32)


def cell(weights: np.ndarray, numerators: np.ndarray, denominators: np.ndarray) -> Cell:
    """numerators: (items, seeds, …); denominators: (items,) or like the numerators."""
    shape = numerators.shape[1:]
    flat = numerators.reshape(len(numerators), -1)
    below = denominators.reshape(len(denominators), -1)
    # Centred, a bootstrap mean loses nothing to float32; the ratio's own centre is added back.
    centre = flat.sum(0) / below.sum(0)
    drawn = weights @ (flat - centre * below).astype(np.float32) / (weights @ below.astype(np.float32)) + centre
    return Cell(centre.reshape(shape), drawn.reshape(len(weights), *shape))


def estimate(groups: list[Cell], items: int) -> Estimate:
    """The sum of the groups' means over their seeds, each group a set of runs trained apart from the others'.

    Variance: items and seeds are crossed (Cornfield & Tukey 1956). The bootstrap over items of the seeds' mean holds
    the item effect and a share of the item-by-seed residual; the spread between seeds holds the seed effect and the
    same residual, which is therefore taken off once. Few seeds: Student's t with Satterthwaite's (1946) degrees of
    freedom, as in Welch's test, because resampling three seeds alone would cover far less than 95 %. Simulated
    coverage, for any share of the seeds in the variance: 3 seeds 94.8 to 96.5 %, 2 seeds 93.7 to 97.7 %; where the
    runs of one depth spread three times as much as the other's, at worst 93.2 and 91.1 %. With one seed in a group its
    part is unknown, and the interval speaks of these runs only.
    """
    value = sum(group.values.mean(0) for group in groups)
    small = items / (items - 1) if items > 1 else np.inf
    whole = small * sum(group.boots.mean(1) for group in groups).var(0)
    item, parts = whole, []
    for group in groups:
        seeds = len(group.values)
        if seeds > 1:
            residual = small * (group.boots - group.boots.mean(1, keepdims=True)).var(0).sum(0) / (seeds - 1)
            item = item - residual / seeds
            parts.append((group.values.var(0, ddof=1) / seeds, seeds - 1))
    parts.insert(0, (np.maximum(item, 0), max(items - 1, 1)))
    variance = sum(part for part, _ in parts)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.nan_to_num(variance**2 / sum(part**2 / free for part, free in parts), nan=MANY)
        stderr = np.sqrt(variance)
        ratio = np.where(value == 0, 0.0, value / stderr)
        effect = np.where(value == 0, 0.0, value / np.sqrt(whole * items))
    half = t_quantile(1 - ALPHA / 2, df) * stderr
    seeds = min(len(group.values) for group in groups)
    return Estimate(value, value - half, value + half, t_test(ratio, df), stderr, df, effect, items, seeds)


def log_gamma(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.lgamma, otypes=[float])(x)


def incomplete_beta(a: np.ndarray, b: float, x: np.ndarray) -> np.ndarray:
    """Regularised, by its continued fraction (DLMF 8.17.22) with Lentz's method."""
    a, x = np.broadcast_arrays(np.asarray(a, float), np.asarray(x, float))
    mirrored = x > (a + 1) / (a + b + 2)
    p, q, y = np.where(mirrored, b, a), np.where(mirrored, a, b), np.where(mirrored, 1 - x, x)
    with np.errstate(divide="ignore"):
        log_front = log_gamma(p + q) - log_gamma(p) - log_gamma(q) + p * np.log(y) + q * np.log1p(-y) - np.log(p)
    tiny = 1e-300
    c, d = np.ones_like(y), 1 / np.where(np.abs(1 - (p + q) * y / (p + 1)) < tiny, tiny, 1 - (p + q) * y / (p + 1))
    total = d.copy()
    for m in range(1, 300):
        for step in (
            m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m)),
            -(p + m) * (p + q + m) * y / ((p + 2 * m) * (p + 2 * m + 1)),
        ):
            d = 1 / np.where(np.abs(1 + step * d) < tiny, tiny, 1 + step * d)
            c = np.where(np.abs(1 + step / c) < tiny, tiny, 1 + step / c)
            total = total * c * d
        if np.all(np.abs(c * d - 1) < 1e-13):
            break
    result = np.exp(log_front) * total
    return np.where(mirrored, 1 - result, result)


def t_test(t: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Two-sided p of Student's t."""
    df = np.minimum(df, MANY)
    t = np.asarray(t, float)
    with np.errstate(over="ignore"):
        return incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(q: float, df: np.ndarray) -> np.ndarray:
    """For q above one half. Newton's method from the normal quantile, which lies left of it: the distribution function
    is concave there, so that no step goes too far."""
    df = np.minimum(np.asarray(df, float), MANY)
    log_scale = log_gamma((df + 1) / 2) - log_gamma(df / 2) - np.log(df * math.pi) / 2
    t = np.full_like(df, NormalDist().inv_cdf(q))
    for _ in range(100):
        density = np.exp(log_scale - (df + 1) / 2 * np.log1p(t * t / df))
        step = (t_test(t, df) / 2 - (1 - q)) / density
        t = t + step
        if np.all(np.abs(step) < 1e-9 * t):
            break
    return t


def holm(p: list[float]) -> list[float]:
    """Adjusted p of a family of tests (Holm 1979)."""
    adjusted, running = [0.0] * len(p), 0.0
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        running = max(running, min(1.0, float(p[index]) * (len(p) - rank)))
        adjusted[index] = running
    return adjusted


def binomial_test(successes: int, trials: int, chance: float) -> float:
    """Exact and two-sided: the probability of all outcomes that are no likelier than this one."""
    if not 0 < chance < 1:
        return 1.0 if successes == trials * chance else 0.0
    k = np.arange(trials + 1)
    log_p = log_gamma(trials + 1.0) - log_gamma(k + 1.0) - log_gamma(trials - k + 1.0)
    log_p = log_p + k * math.log(chance) + (trials - k) * math.log1p(-chance)
    return float(min(1.0, np.exp(log_p[log_p <= log_p[successes] + 1e-7]).sum()))
