"""What a study can find: the smallest difference that the whole rule finds four times in five, by seeds and items.

Studies are simulated with the spreads that the results at hand have, or, before anything is trained, with assumed ones:
two aspects at four depths, Thai- and English-trained adapters, what English is kept; all tests one family.
"""

import dataclasses
from collections.abc import Iterator
from itertools import product

from ouro.verdict import stats
from ouro.verdict.panels import STUDY, Key, Panel
from ouro.verdict.plots import STYLE, grid_of, look
from ouro.verdict.stats import POWER, SEEDS, Cell, Estimate
from ouro.verdict.study import ASPECTS, METRICS, Metric

import matplotlib
import numpy as np
from matplotlib.figure import Figure

STUDIES, DEPTHS = 400, (1, 2, 3, 4)
PLANS = {"thai_text": (500, 1000), "thai_exams": (565, 2733)}  # items of U: thai_text; ThaiExam, with M3Exam
# Items of X, and the passages that they are about: the parallel text; Belebele's questions, of which a passage has two
# or one. Of the spread over items this share is their passages' (the intra-class correlation).
PAIRED, SHARED = {"thai_text": (488, 488), "thai_exams": (900, 488)}, 0.3


@dataclasses.dataclass(frozen=True)
class Spreads:
    """Standard deviations of what a study's values vary by: item, how an item suits a depth; run, how it suits a single
    run; seed, the mean of a run over all items."""

    item: float
    run: float
    seed: float
    source: str = "assumed"


ASSUMED = {
    "thai_text": (Spreads(0.05, 0.03, 0.002), Spreads(0.05, 0.03, 0.01)),  # in logarithms of bits, 0.01 about 1 %
    "thai_exams": (Spreads(0.25, 0.3, 0.01),),  # in shares of right answers
}


def measured(panel: Panel) -> Spreads | None:
    """The spreads of a panel's results, averaged over depths; None where they have too few seeds."""
    groups = [panel.adapted[k, k] for k in panel.trained if (k, k) in panel.adapted]
    worth = [panel.worth(k) for k in panel.depths()]
    if not worth or min(len(group.values) for group in groups) < SEEDS:
        return None
    clusters = len(groups[0].parts)
    own = np.mean([(group.parts.var(1, ddof=1)).sum(0) for group in groups])  # of a run's mean over the items
    between = np.mean([group.values.var(0, ddof=1) for group in groups])
    item = np.mean([e.items for e in worth]) / 2
    return Spreads(*np.sqrt([item * clusters, own * clusters, max(between - own, 0)]), source="measured")


def simulate(spreads: dict[str, Spreads], seeds: int, items: dict[str, int], studies: int = STUDIES) -> dict:
    """{(quantity, aspect, depth): Estimate of (studies,)} where nothing differs. items: of U, by aspect; X is read on
    other items, those of PAIRED."""
    rng, found = np.random.default_rng(0), {}

    def adapters(aspect: str, count: int, passages: int) -> Cell:
        s, passage = spreads[aspect], np.arange(count) % passages

        def noise(runs: int) -> np.ndarray:
            own, shared = (rng.normal(size=(n, runs, studies)) for n in (count, passages))
            return np.sqrt(1 - SHARED) * own + np.sqrt(SHARED) * shared[passage]

        values = s.item * noise(1) + s.run * noise(seeds) + s.seed * rng.normal(size=(1, seeds, studies))
        return stats.cell(values, np.ones(count), passage)

    for aspect in spreads:
        alone = {k: adapters(aspect, items[aspect], items[aspect]) for k in DEPTHS}
        thai, english = ({k: adapters(aspect, *PAIRED[aspect]) for k in DEPTHS} for _ in range(2))
        for k in DEPTHS[1:]:
            found["U", aspect, k] = stats.estimate([alone[k], -alone[1]])
            found["X", aspect, k] = stats.estimate([thai[k], -thai[1], -english[k], english[1]])
    for k in DEPTHS:
        found["F", "english", k] = stats.estimate([adapters("thai_text", *[items["thai_text"]] * 2)])
    return found


class Family:
    """The tests of simulated studies in which nothing differs, to one of which a true difference is then added."""

    def __init__(self, found: dict[tuple, Estimate]):
        self.found, self.places = found, list(found)
        self.p = np.array([e.p for e in found.values()])  # (tests, studies)

    def power(self, place: tuple, effect: float, margin: float) -> float:
        """The share of studies in which the rule says "more" of the quantity at `place`, if `effect` is its true
        value."""
        e, number, p = self.found[place], self.places.index(place), self.p.copy()
        value = e.value + effect
        p[number] = stats.p_value(value, *e.spreads)
        half = stats.half_width(stats.holm(p)[1][number], *e.spreads)
        return float((stats.reading(value - half, value + half, margin) == "more").mean())

    def smallest(self, place: tuple, metric: Metric) -> float:
        """The smallest true value that is found in four of five studies."""
        low, high = 0.0, 30 * metric.margin
        for _ in range(10):
            middle = (low + high) / 2
            low, high = (low, middle) if self.power(place, middle, metric.margin) >= POWER else (middle, high)
        return high


def plans(found: dict[Key, Panel]) -> Iterator[dict[str, str]]:
    """A row for each number of seeds and items, and each spread of the seeds where nothing is measured."""
    known = {
        panel.study["aspect"]: spreads
        for key, panel in found.items()
        if key.arm == STUDY and panel.study.get("primary") and panel.language == "th" and (spreads := measured(panel))
    }
    choices = {aspect: (known[aspect],) if aspect in known else some for aspect, some in ASSUMED.items()}
    for aspect, some in choices.items():
        metric = METRICS["accuracy" if aspect == "thai_exams" else "bits_per_character"]
        rounded = dataclasses.replace(metric, places=1)  # STUDIES studies tell no more
        questions, passages = PAIRED[aspect]
        beside = f"{passages} passages" if questions == passages else f"{questions} on {passages} passages"
        for s, items, seeds in product(some, PLANS[aspect], (3, 5)):
            spreads = {other: each[0] for other, each in choices.items()} | {aspect: s}
            counts = {other: count[0] for other, count in PLANS.items()} | {aspect: items}
            family = Family(simulate(spreads, seeds, counts))
            yield {
                "aspect": ASPECTS[aspect],
                "spread of runs": f"{metric.size(s.seed)} ({s.source})",
                "items": f"{items:,} (U), {beside} (X)",
                "seeds": str(seeds),
                "worth (U)": rounded.size(family.smallest(("U", aspect, 4), metric)),
                "beside English (X)": rounded.size(family.smallest(("X", aspect, 4), metric)),
            }


def curves() -> Figure:
    """How often U and X of Thai text are found at four loops, by their true size, under the assumed spreads."""
    metric = METRICS["bits_per_character"]
    effects = np.linspace(0, 0.12, 25)
    with matplotlib.rc_context(STYLE):
        figure, axes = grid_of(2)
        for s, seeds in product(ASSUMED["thai_text"], (3, 5)):
            spreads = {"thai_text": s, "thai_exams": ASSUMED["thai_exams"][0]}
            family = Family(simulate(spreads, seeds, {aspect: counts[0] for aspect, counts in PLANS.items()}))
            for axis, quantity in zip(axes, "UX", strict=True):
                shares = [family.power((quantity, "thai_text", 4), effect, metric.margin) for effect in effects]
                label = f"{seeds} seeds, runs spread by {metric.size(s.seed)}"
                style = look(seeds) | {"marker": "", "ls": "-" if s.seed < 0.005 else "--"}
                axis.plot([metric.shown(x) for x in effects], 100 * np.array(shares), label=label, **style)
        for axis, name in zip(axes, ("worth (U)", "beside English (X)"), strict=True):
            axis.axhline(100 * POWER, color="grey", lw=0.8)
            axis.axvline(metric.shown(metric.margin), color="grey", lw=0.8, ls=":")
            axis.set(xlabel=f"true {name}, {metric.what}", ylabel="studies that find it, %", ylim=(0, 101))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
