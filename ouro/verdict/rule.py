"""The verdict: which word the numbers allow."""

import dataclasses
from collections import Counter

from ouro.verdict import stats
from ouro.verdict.stats import Estimate
from ouro.verdict.study import ASPECTS, BASE, SEEDS, TEXTS, Panel, depth_text

import numpy as np


@dataclasses.dataclass
class Verdict:
    """label: helps, hurts, mixed, no evidence, or no comparison; headline: that in words; sentence: why, in numbers."""

    aspect: str
    dataset: str
    label: str
    headline: str
    sentence: str
    missing: list[str]

    @property
    def text(self) -> str:
        return f"{self.headline}. {self.sentence}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def listed(names: list) -> str:
    names = [str(name) for name in names]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


class Differences:
    """Depths above one against one, each estimate with Holm's p over the depths: of the gains (the interaction), of the
    adapted models (the level), of the base."""

    def __init__(self, panel: Panel):
        self.gains = {k: e for k in panel.trained if (e := panel.gain(k, k))}
        depths = [k for k in self.gains if k > 1] if 1 in self.gains else []
        self.interaction = {k: panel.interaction(k) for k in depths}
        self.level = {k: panel.between(panel.adapted[k, k], panel.adapted[1, 1]) for k in depths}
        self.base = {k: panel.between(panel.base[k], panel.base[1]) for k in depths}
        self.interaction_p, self.level_p, self.base_p = (
            dict(zip(depths, stats.holm([float(e.p) for e in family.values()]), strict=True))
            for family in (self.interaction, self.level, self.base)
        )
        self.labels = {k: self.label(k) for k in depths}

    def label(self, k: int) -> str:
        direction = sign(self.interaction[k], self.interaction_p[k])
        if direction and direction == sign(self.level[k], self.level_p[k]):
            return "helps" if direction > 0 else "hurts"
        return "mixed" if direction else "no evidence"

    def summary(self) -> tuple[str, int]:
        """The label of all depths, and the depth that decides it: the largest interaction under that label."""
        kinds = set(self.labels.values()) - {"no evidence"}
        if not kinds:
            return "no evidence", max(self.labels)
        label = kinds.pop() if len(kinds) == 1 else "mixed"
        deciding = [k for k in self.labels if self.labels[k] == label] or [
            k for k in self.labels if self.labels[k] != "no evidence"
        ]
        return label, max(deciding, key=lambda k: (abs(self.interaction[k].value), k))


def sign(e: Estimate, p: float) -> int:
    """Of a difference that is significant; else 0."""
    return int(np.sign(e.value)) if p < stats.ALPHA else 0


def what_is_missing(panel: Panel) -> list[str]:
    missing = [
        f"a model trained at {depth_text(k)}" for k in range(1, max(4, *panel.trained) + 1) if k not in panel.trained
    ]
    missing += [
        f"the model trained at {depth_text(k)}, read there" for k in panel.trained if (k, k) not in panel.adapted
    ]
    missing += [f"the base at {depth_text(k)}" for k in panel.trained if k not in panel.base]
    seeds = {k: len(panel.seeds[k, k]) for k in panel.trained if (k, k) in panel.seeds}
    if few := [f"{n} at {depth_text(k)}" for k, n in seeds.items() if n < SEEDS]:
        missing.append(f"at least {SEEDS} seeds: now {listed(few)}")
    return missing


def decide(aspect: str, dataset: str, panel: Panel | None) -> Verdict:
    """By rule, from the interactions (do the gains differ?) and the levels (do the adapted models?), depth k against 1.

    helps, hurts: both significant, in one direction. mixed: the gains differ, and the level does not follow. A base
    that is worse at one loop and gains as much there moves the levels alone: no evidence about adaptation.
    """
    english = aspect == "english"
    headlines = TEXTS["headlines"]["english" if english else "thai"]
    if panel is None or not panel.adapted:
        why = "No adapted model was scored on its benchmark." if panel is None else "Only the base model was scored."
        return Verdict(aspect, dataset, "no comparison", headlines["no comparison"], why, ["adapted models"])
    missing, found = what_is_missing(panel), Differences(panel)
    change = "change on English" if english else "gain over the base at the same depth"

    def gained(k: int) -> str:
        return f"{panel.signed(found.gains[k])} at {depth_text(k)}"

    if not found.interaction:
        why = "A gain at 1 loop and one at more loops are needed"
        if found.gains:
            why += f"; the {change} is {listed([gained(k) for k in found.gains])} ({panel.unit})"
        return Verdict(aspect, dataset, "no comparison", headlines["no comparison"], f"{why}.", missing)

    label, k = found.summary()
    e, after, before = found.interaction[k], found.level[k], found.base[k]
    after_sign, before_sign = sign(after, found.level_p[k]), sign(before, found.base_p[k])
    facts = (
        f"the {change} is {gained(k)} and {gained(1)}; difference {panel.signed(e)} {panel.unit}, "
        f"Holm {p_text(found.interaction_p[k])}"
    )
    better = f"{depth_text(k)} are" if after.value > 0 else "1 loop is"
    if not after_sign:
        ends = f"after training, {depth_text(k)} and 1 loop do not differ measurably ({panel.signed(after)})"
    elif label == "mixed" and after.value * e.value < 0:
        ends = f"after training, {better} still better by {panel.size(after.value)}"
    else:
        ends = f"after training, {better} better by {panel.size(after.value)}"

    if label == "mixed":
        ahead = depth_text(k) if e.value > 0 else "1 loop"
        starts = (
            f"the base starts from {panel.show(panel.base[1].values[0])} at 1 loop and "
            f"{panel.show(panel.base[k].values[0])} at {depth_text(k)} ({panel.axis})"
        )
        because = "because " if before_sign == -np.sign(e.value) and not english else ""
        what = "less is lost" if english else "the gain is larger"
        sentence = f"{what} at {ahead}, {because}{starts}: {facts}; {ends}"
        if len(set(found.labels.values())) > 1:
            sentence += "; by depth: " + ", ".join(f"{depth_text(d)} {name}" for d, name in found.labels.items())
    elif label == "no evidence":
        least = panel.size(float(e.detectable(len(found.interaction))))
        sentence = f"{facts}; the smallest difference it would find four times in five is {least}"
        if after_sign and after_sign == before_sign:
            sentence += f"; {ends}, but so was the base, by {panel.size(before.value)}: that is depth, not adaptation"
    else:
        sentence = f"{facts}; {ends}"
        if also := [d for d in found.labels if found.labels[d] == label and d != k]:
            sentence += f"; the same at {listed(also)} loops"
    if english:
        lost = [d for d, gain in found.gains.items() if sign(gain, float(gain.p)) < 0]
        at = depth_text(1) if lost == [1] else f"{listed(lost)} loops"
        sentence += f"; English is measurably forgotten at {at}" if lost else "; no measurable loss of English"
    headline = headlines[label]
    if min(e.seeds, after.seeds) == 1:
        headline += ", in these runs (one seed)" if label in ("helps", "hurts") else ""
        sentence += "; one seed: true of these runs, how other seeds would do is unknown"
    return Verdict(aspect, dataset, label, headline, f"{sentence[0].upper()}{sentence[1:]}.", missing)


def verdicts(found: dict[tuple[str, str], Panel], answers: list | None = None) -> list[Verdict]:
    """For the training set with most runs all four aspects; for the others those that compare depths."""
    counts = Counter()
    for (_, dataset), panel in found.items():
        counts[dataset] += sum(len(panel.seeds[k, k]) for k in panel.trained if (k, k) in panel.seeds)
    datasets = sorted(counts, key=lambda name: (-counts[name], name)) or [BASE]
    result = []
    for dataset in datasets:
        mine = {p.study["aspect"]: p for (_, name), p in found.items() if name == dataset and p.study.get("primary")}
        for aspect in ASPECTS:
            verdict = decide(aspect, dataset, mine.get(aspect))
            if aspect == "thai_conversation" and aspect not in mine and answers:
                verdict.sentence = "There are answers, and no ratings of them."
                verdict.missing = ["ratings (tools/judge.py)"]
            if dataset == datasets[0] or verdict.label != "no comparison":
                result.append(verdict)
    return result
