"""The verdict: which words the numbers allow.

Three quantities are tested, each at every depth k above one (F: also at one). U: how much better adapters trained and
read at k loops are on Thai than those trained and read at one; both were trained on Thai. X: U minus the same
difference in English, of adapters that were trained on as much English, on items that stand in both languages. F: how
much better or worse than the base at the same depth the adapters trained on Thai are in English.

All tests of a report are corrected together, as one family (Holm). Of each test the interval at its corrected level
decides the word, by `stats.reading`.
"""

import dataclasses
import math
from collections import defaultdict

from ouro.evaluate.benchmarks import LANGUAGES
from ouro.verdict import stats
from ouro.verdict.panels import (
    MEASURED_ALIKE,
    STUDY,
    Key,
    Panel,
    paired,
    signed,
    trained_as,
    unlike,
    why_unlike,
)
from ouro.verdict.stats import ALPHA, SEEDS, Estimate
from ouro.verdict.study import ASPECTS, BASE, TEXTS, Metric, Reader, Run, depth_text

import numpy as np

PARALLEL = {"thai_text": ("parallel_text_thai", "parallel_text_english"), "thai_exams": LANGUAGES}
WORDS = TEXTS["words"]
AS_MANY = 0.05  # two groups of runs have "equal FLOPs" if their means differ by at most this share


@dataclasses.dataclass
class Test:
    """A quantity at a depth. word: more, same, less or undecided; provisional where seeds are too few for a test."""

    quantity: str  # U, X or F
    aspect: str
    dataset: str
    depth: int
    metric: Metric
    estimate: Estimate
    items: int
    clusters: int
    task: str
    rests: str  # the training behind it, as `spent` tells it: seeds, tokens, FLOPs
    word: str = "provisional"
    p: float = math.nan
    adjusted: float = math.nan  # p, corrected for the family
    level: float = ALPHA  # of the interval, by Holm: so that it excludes zero just where `adjusted` is below ALPHA
    smallest: float = math.nan  # the smallest true difference that such a study finds four times in five

    @property
    def tested(self) -> bool:
        return self.estimate.known and min(self.estimate.seeds) >= SEEDS

    def text(self) -> str:
        """The value with its interval and unit."""
        return signed(self.metric, self.estimate, self.level)

    def remark(self) -> str:
        """What is added in brackets to the number: why there is no word, or what "same" and "undecided" mean here."""
        if self.word == "provisional":
            few = min(self.estimate.seeds) < SEEDS
            return f" (provisional: {f'fewer than {SEEDS} seeds' if few else 'one cluster of items'})"
        if self.word == "undecided":
            return f" ({self.metric.size(self.smallest)} would be found four times in five)"
        if self.word == "same" and self.adjusted < ALPHA:
            return f" (measurable, and inside the margin of {self.metric.size(self.metric.margin)})"
        return ""


@dataclasses.dataclass
class Verdict:
    """What the report says of one aspect (Thai text, Thai exams, …) and one training set.

    words: of each depth; headline: the same as a line, in which depths with the same words stand together; numbers: a
    line a depth; rests: on which items and runs, or ""; missing: what would have to be trained or scored for more;
    tests: from which all of this was made."""

    aspect: str
    dataset: str
    words: dict[int, str]
    headline: str
    numbers: list[str]
    rests: str
    missing: list[str]
    tests: list[Test] = dataclasses.field(default_factory=list)


def listed(names: list) -> str:
    """ "a, b and c"."""
    names = [str(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def at_depths(depths: list[int]) -> str:
    return depth_text(depths[0]) if len(depths) == 1 else f"{listed(depths)} loops"


def make_test(quantity: str, panel: Panel, depth: int, cells: list[stats.Cell], rests: str) -> Test:
    """The test of a quantity, without its word. panel: of the adapters trained on Thai; cells: whose sum the quantity
    is."""
    study, found, clusters = panel.study, stats.estimate(cells), len(cells[0].parts)
    if not panel.metric.log:
        # Where the models answer a few items alike, the spread over items is zero, and would make any difference
        # certain. It is at least that of no difference at all and half an observation of +1 and half of -1 beside it
        # (Agresti & Min 2005): a variance of 1 / (clusters + 2)^2.
        found.items = np.maximum(found.items, 1 / (clusters + 2) ** 2)
    whose = quantity, study["aspect"], str(study["dataset"]), depth, panel.metric
    return Test(*whose, found, panel.items, clusters, study["task"], rests)


def english_panel(found: dict[Key, Panel], key: Key, task: str, runs: dict[str, Run]) -> tuple[Panel | None, str]:
    """The panel of adapters trained on English with which those of a Thai training set are compared, read on `task`; or
    None and what is missing.

    key: of the Thai panel. The English training set is the one that was cut to as many tokens as the Thai one
    (`max_tokens`: its name). If there is none, it is the only one that was not cut to some Thai set's tokens."""
    there = [p for k, p in found.items() if k.task == task and k[2:] == key[2:] and p.adapted and p.language == "en"]
    cuts = [(p, str(runs[p.study["run"]].config.get("max_tokens"))) for p in there]
    there = [p for p, cut in cuts if cut == key.dataset] or [p for p, cut in cuts if cut == "None" or cut.isdecimal()]
    if len(there) != 1:
        return None, "adapters trained on as much English"
    thai, (english,) = found[key], there
    settings = {}
    for study in (thai.study, english.study):
        told = trained_as(runs[study["run"]]) | {name: str(study.get(name)) for name in MEASURED_ALIKE[:4]}
        settings[study["run"]] = {k: v for k, v in told.items() if k not in ("data report", "max_tokens")}
    if why := unlike(settings):
        return None, f"English adapters trained alike ({'; '.join(why)})"
    return english, ""


def beside_english(reader: Reader, found: dict[Key, Panel], key: Key, aspect: str) -> tuple[list[Test], str]:
    """The tests of X for an aspect of a Thai training set, and "" or what is missing for them."""
    tasks = PARALLEL[aspect]
    there = found.get(key._replace(task=tasks[0]))
    if there is None:
        return [], f"{tasks[0]} and {tasks[1]}, which compare Thai with English"
    english, missing = english_panel(found, key._replace(task=tasks[0]), tasks[1], reader.runs)
    if english is None:
        return [], missing
    pair = paired(there, english, reader.left_out)
    if pair is None:
        return [], "items in both languages"
    both = [k for k in pair[0].depths() if k in pair[1].depths()]
    cells = {k: pair[0].worth_cells(k) + [-cell for cell in pair[1].worth_cells(k)] for k in both}
    rests = spent(english, [1, *both], reader.runs)
    return [make_test("X", pair[0], k, cells[k], rests) for k in both], ""


def give_words(tests: list[Test]) -> None:
    """Gives each test its word. Those with enough seeds are one family, and the others stay provisional."""
    family = [test for test in tests if test.tested]
    if not family:
        return
    columns = zip(*((test.estimate.value, *test.estimate.spreads) for test in family), strict=True)
    p = stats.p_value(*(np.array(column, float) for column in columns))
    for test, own, adjusted, level in zip(family, p, *stats.holm(p), strict=True):
        test.p, test.adjusted, test.level = float(own), float(adjusted), float(level)
        value, half = test.estimate.value, test.estimate.half(level)
        test.word = str(stats.reading(value - half, value + half, test.metric.margin))
        if test.word == "undecided":
            test.smallest = test.estimate.detectable(level, test.metric.margin)


def word_of(test: Test, beside: Test | None) -> str:
    """What is said of a depth: the words of F; or those of U, followed by those of X, `beside`, where it adds
    something."""
    if test.quantity == "F":
        return WORDS["english"][test.word]
    word = WORDS["thai"][test.word]
    if test.word == "more":
        return word + WORDS["beside"][beside.word if beside else "not measured"]
    return word + (WORDS["apart"][beside.word] if beside and beside.word in WORDS["apart"] else "")


def grouped(words: dict[int, str]) -> str:
    """Words with their depths: "2 and 4 loops: helps Thai as it helps English. 3 loops: undecided"."""
    depths = defaultdict(list)
    for depth, word in words.items():
        depths[word].append(depth)
    return ". ".join(f"{at_depths(at)}: {word}" for word, at in depths.items())


def spent(panel: Panel, depths: list[int], runs: dict[str, Run]) -> str:
    """How many runs there are of each depth, and their tokens and training FLOPs; by depth where these differ."""
    made = {k: [(runs[study["run"]], study) for study in panel.sources[k, k] if study["run"] in runs] for k in depths}
    tokens = known_means({k: [run.tokens for run, _ in mine] for k, mine in made.items()})
    flops = known_means({k: [run.flops(study) for run, study in mine] for k, mine in made.items()})
    told = {
        "training runs (seeds)": {k: str(len(panel.sources[k, k])) for k in depths},
        "tokens a run": {k: f"{x / 1e6:{',.1f' if x > 1e6 else '.2g'}} million" for k, x in tokens.items()},
        "FLOPs a run": {k: f"{x:.3g}".replace("e+", "e") for k, x in flops.items()},
    }
    unknown = dict.fromkeys(depths, "not known")
    return "; ".join(f"{name} {by_depth(unknown | texts)}" for name, texts in told.items() if texts)


def known_means(values: dict[int, list[float | None]]) -> dict[int, float]:
    """The mean at each depth, without the depths at which the value of some run is not known."""
    return {k: float(np.mean(x)) for k, x in values.items() if x and all(v and math.isfinite(v) for v in x)}


def by_depth(texts: dict[int, str]) -> str:
    """The texts with their depths, or one text where all are the same."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({depth_text(k)})" for k, text in texts.items())


def equal_flops(found: dict[Key, Panel], key: Key, runs: dict[str, Run]) -> list[str]:
    """U between runs of two depths that took equally many operations, a line each. At least one of the two groups is of
    the arm equal-flops, the other may be of the study's own. It has no word; nothing without that arm."""
    arm = key._replace(arm="equal-flops")
    if arm not in found:
        return []
    told = []
    for many, one in ((found[arm], found[key]), (found[key], found[arm]), (found[arm], found[arm])):
        for k in (depth for depth in many.trained if depth > 1):
            mine = [r for r in many.results if r.trained == k] + [r for r in one.results if r.trained == 1]
            if why_unlike(arm, mine, runs) or not (panel := Panel(mine)).depths():
                continue
            costs = [[runs[s["run"]].flops(s) or np.nan for s in panel.sources[depth, depth]] for depth in (1, k)]
            if abs(np.mean(costs[1]) / np.mean(costs[0]) - 1) <= AS_MANY:
                worth = signed(panel.metric, panel.worth(k))
                cost = spent(panel, [1, k], runs)
                told.append(f"at equal FLOPs, {depth_text(k)} against 1: {worth} (95 % interval; {cost})")
    return told or ["at equal FLOPs: no runs of two depths took as many operations"]


def what_is_missing(panel: Panel) -> list[str]:
    """Depths and seeds that the study wants and the panel lacks."""
    missing = [
        f"a model trained at {depth_text(k)}" for k in range(1, max(4, *panel.trained) + 1) if k not in panel.trained
    ]
    missing += [
        f"the model trained at {depth_text(k)}, read there" for k in panel.trained if (k, k) not in panel.adapted
    ]
    seeds = {k: len(panel.seeds[k, k]) for k in panel.trained if (k, k) in panel.seeds}
    if few := [f"{n} at {depth_text(k)}" for k, n in seeds.items() if n < SEEDS]:
        missing.append(f"at least {SEEDS} seeds: now {listed(few)}")
    return missing


def no_comparison(aspect: str, dataset: str, why: str, missing: list[str]) -> Verdict:
    return Verdict(aspect, dataset, {}, WORDS["no comparison"], [why], "", missing)


def verdict_of(key: Key, panel: Panel, tests: list[Test], found: dict, reader: Reader, lacks: str) -> Verdict:
    """The verdict on an aspect, from its tests with their words. Thai is compared with one loop, English with the base.

    lacks: what is missing for the tests of X, or ""."""
    aspect, english = panel.study["aspect"], panel.study["aspect"] == "english"
    missing = what_is_missing(panel) + ([lacks] if lacks else [])
    if english:
        without = [k for k in panel.trained if k not in panel.base and (k, k) in panel.adapted]
        missing += [f"the base at {depth_text(k)}" for k in without]
    own, beside = ({t.depth: t for t in tests if (t.quantity == "X") == x} for x in (False, True))
    if not own:
        needed = "The base at the adapters' depths is" if english else "Adapters trained at 1 loop and at more are"
        return no_comparison(aspect, key.dataset, f"{needed} needed.", missing)
    words = {k: word_of(test, beside.get(k)) for k, test in own.items()}
    numbers, against = [], "the base" if english else "1"
    for k, test in own.items():
        numbers.append(f"{depth_text(k)} against {against}: {test.text()}{test.remark()}")
        if k in beside:
            numbers[-1] += f", beside English {beside[k].text()}{beside[k].remark()}"
    first = next(iter(own.values()))
    rests = f"rests on {first.task}, {first.items} items in {first.clusters} clusters (passages or articles)"
    rests += f"; {first.rests}"
    if beside:
        also = next(iter(beside.values()))
        rests += f"; in both languages: {also.task}, {also.items} items in {also.clusters} clusters"
        rests += f"; trained on English: {also.rests}"
    numbers += [] if english else equal_flops(found, key, reader.runs)
    return Verdict(aspect, key.dataset, words, grouped(words), numbers, rests, missing, tests)


def verdicts(reader: Reader, found: dict[Key, Panel]) -> list[Verdict]:
    """The verdicts on each Thai training set of the study's own arm: on the aspects that were scored, and for the first
    set also on those that were not, with the reason."""
    study = {
        key: panel for key, panel in found.items() if key.arm == STUDY and panel.adapted and panel.language == "th"
    }
    datasets = list(dict.fromkeys(key.dataset for key in study)) or [BASE]
    asked = {(k.dataset, p.study["aspect"]): (k, p) for k, p in study.items() if p.study.get("primary")}
    tests, lacks = {}, dict.fromkeys(asked, "")
    for place, (key, panel) in asked.items():
        english = (aspect := place[1]) == "english"
        if english:
            cells = {k: [gain] for k in panel.trained if (gain := panel.gain_cell(k, k))}
        else:
            cells = {k: panel.worth_cells(k) for k in panel.depths()}
        rests = spent(panel, [*cells] if english else [1, *cells], reader.runs) if cells else ""
        tests[place] = [make_test("F" if english else "U", panel, k, mine, rests) for k, mine in cells.items()]
        if aspect in PARALLEL:
            more, lacks[place] = beside_english(reader, found, key, aspect)
            tests[place] += more
    give_words([test for some in tests.values() for test in some])
    made = []
    for place in ((dataset, aspect) for dataset in datasets for aspect in ASPECTS):
        dataset, aspect = place
        if place in asked:
            made.append(verdict_of(*asked[place], tests[place], found, reader, lacks[place]))
        elif dataset == datasets[0]:
            why, lack = "No adapted model that counts was scored on its benchmark.", "scores of runs (make eval)"
            if aspect == "thai_conversation" and reader.answers:
                why, lack = "There are answers, and no ratings of them.", "ratings (tools/judge.py)"
            made.append(no_comparison(aspect, dataset, why, [lack]))
    return made
