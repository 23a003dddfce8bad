"""Which results may be compared: those that were trained and measured alike, but for what the study compares.

    for key, panel in panels(reader, declared={}).items():
        print(*key, {depth: panel.worth(depth).value for depth in panel.trained if depth > 1})

Nothing is chosen by majority. What does not count is left out with a reason (`Reader.left_out`); where two groups of
runs were trained or measured unlike, neither counts until the settings that do are named.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ouro.evaluate.benchmarks import LANGUAGES, digest
from ouro.files import read_yaml
from ouro.settings import DATASETS, EXPERIMENTS, LEARNING
from ouro.verdict import stats
from ouro.verdict.stats import ALPHA, Cell, Estimate
from ouro.verdict.study import ASPECTS, BASE, BY_ITEM, METRICS, Metric, Reader, Result, Run

import numpy as np
from scipy.special import stdtrit

MEASURED_ALIKE = ("model", "model_revision", "precision", "weights", "metric", "protocol", "benchmark_revision",
                  "split", "limit", "prompt_sha256", "judge", "judge_identity", "replies")  # fmt: skip
SETTINGS_ALIKE = tuple(name for name in LEARNING if name not in ("total_ut_steps", "dataset"))
ARMS = {  # arm: settings that may differ between depths; settings whose values are studies of their own
    "equal-tokens": ((), ()),
    "equal-flops": (("num_train_epochs", "max_steps"), ()),
    "tuned": (("learning_rate",), ()),
    "quantised": ((), ("use_qlora", "frozen_weights", "bnb_4bit_use_double_quant")),
    "rates": ((), ("learning_rate",)),
    "rank": ((), ("r", "lora_alpha")),
    "control": ((), ()),
}
STUDY = "equal-tokens"  # the arm that the verdict rests on
# What a result says of its run: the setting that it repeats.
HEADER = {"trained_ut_steps": "total_ut_steps", "dataset": "dataset", "seed": "seed"}
EXAMS = ("thai_exam", "m3exam")  # one verdict rests on both, each exam a stratum


class Key(NamedTuple):
    """Which results are in a panel: those of a task, of adapters of one training set, in one arm."""

    task: str
    dataset: str
    arm: str = STUDY
    condition: str = ""  # the values of the arm's own settings, where they make studies of their own


class Panel:
    """The results on one benchmark of the adapters of one training set, and of the base.

    cells: a `stats.Cell` for each (trained depth, depth read); the base's trained depth is None. A higher value is a
    better one: minus the logarithm of bits per character, the share of right answers, or the rating. Items, passages
    and exams are those of the first result."""

    def __init__(self, results: list[Result]):
        first = results[0]
        self.results, self.study, self.ids = [result.take(first.ids) for result in results], first.study, first.ids
        self.metric: Metric = METRICS[self.study["metric"]]
        self.language = self.study.get("language") or "th"  # of the training set
        groups = defaultdict(list)
        for result in sorted(self.results, key=lambda r: (r.trained or 0, r.study["total_ut_steps"], r.study["run"])):
            groups[result.trained, result.study["total_ut_steps"]].append(result)
        self.cells = {key: self.cell(group) for key, group in groups.items()}
        self.sources = {key: [result.study for result in group] for key, group in groups.items()}
        self.seeds = {key: [study["seed"] for study in sources] for key, sources in self.sources.items()}
        self.base = {depth: cell for (trained, depth), cell in self.cells.items() if trained is None}
        self.adapted = {key: cell for key, cell in self.cells.items() if key[0] is not None}
        self.trained = sorted({trained for trained, _ in self.adapted})

    @property
    def items(self) -> int:
        return len(self.ids)

    def cell(self, group: list[Result]) -> Cell:
        above = np.stack([result.numerators for result in group], 1)  # (items, seeds)
        below = np.stack([result.denominators for result in group], 1)
        first = self.results[0]
        made = stats.cell(above, below, first.clusters, first.strata, self.metric.log)
        made.trained = group[0].trained is not None
        return made if self.study["higher_is_better"] else -made

    def gain_cell(self, trained: int, depth: int) -> Cell | None:
        """By how much an adapter is better than the base at the same depth; None without both."""
        if (trained, depth) not in self.adapted or depth not in self.base:
            return None
        return self.adapted[trained, depth] - self.base[depth]

    def gain(self, trained: int, depth: int) -> Estimate | None:
        gained = self.gain_cell(trained, depth)
        return gained and stats.estimate([gained])

    def depths(self) -> list[int]:
        """The depths k > 1 at which adapters were trained and read, if others were trained and read at one loop."""
        return [k for k in self.trained if k > 1 and {(k, k), (1, 1)} <= self.adapted.keys()]

    def worth_cells(self, depth: int) -> list[Cell]:
        """The cells whose sum is U at a depth."""
        return [self.adapted[depth, depth], -self.adapted[1, 1]]

    def worth(self, depth: int) -> Estimate:
        """U: what `depth` loops are worth against one, each trained and read at its depth. The base is not in it."""
        return stats.estimate(self.worth_cells(depth))

    def level(self, cell: Cell) -> tuple[float, float, float]:
        """A level and its 95 % interval as measured (bits, share or rating); nan for an interval that is not known.

        Of shares Wilson's, with as many items as would have this variance, so that it lies between 0 and 1."""
        e = stats.estimate([cell])
        value, half = float(e.value), float(e.half())
        if not np.isfinite(half):
            low, high = np.nan, np.nan
        elif self.study["metric"] == "accuracy":
            spread = value * (1 - value)
            ratio = half**2 / spread if half > 0 and spread > 0 else stdtrit(cell.free, ALPHA / 2) ** 2 / self.items
            root = np.sqrt(ratio * spread + ratio**2 / 4)
            low, high = (value + ratio / 2 - root) / (1 + ratio), (value + ratio / 2 + root) / (1 + ratio)
        else:
            low, high = value - half, value + half
        if self.study["higher_is_better"]:
            return value, low, high
        return tuple(float(np.exp(-x)) if self.metric.log else -x for x in (value, high, low))


def gain_or_change(aspect: str) -> str:
    """The word for a difference from the base: "change" for English, which is not trained, else "gain"."""
    return "change" if aspect == "english" else "gain"


def signed(metric: Metric, e: Estimate, level: float = ALPHA) -> str:
    """A difference with its unit and its interval; without the interval where none is known."""
    value, half = float(e.value), float(e.half(level))
    told = f"{metric.shown(value):+z.{metric.places}f} {metric.unit}"
    if not np.isfinite(half):
        return told
    most = metric.factor if metric.unit == "points" else np.inf  # no exam is better by more than all of it
    low, high = (np.clip(metric.shown(x), -most, most) for x in (value - half, value + half))
    return f"{told} [{low:+z.{metric.places}f}, {high:+z.{metric.places}f}]"


def not_here(result: Result, runs: dict[str, Run]) -> str:
    """Why a result whose run has no folder of that name does not count, and which folder has its adapter."""
    why, adapter = "how it was trained is not known: its folder in OUTPUT_DIR is not here", "adapter_sha256"
    same = [run.folder for run in runs.values() if run.hashes.get(adapter, "") == result.study.get(adapter)]
    return why + (f", but {same[0]} has its adapter: name it {result.study['run']} again" if same else "")


def why_not(result: Result, runs: dict[str, Run], declared: dict[str, object], rows: dict[str, dict]) -> str:
    """Why an adapter's result does not count; empty if it does. declared: settings that the runs must have; rows: of
    experiments.yaml, whose own settings an experiment may have instead."""
    run = runs.get(result.study["run"])
    if run is None:
        return not_here(result, runs)
    if not run.completed:
        return f"its run is not complete ({run.state})"
    if not run.config or not run.data:
        return "how it was trained is not known: its folder has no config.yaml or no data_report.json that can be read"
    if why := run.disowns(result.study):
        return why
    for name, setting in HEADER.items():
        if str(said := result.study.get(name)) != str(true := run.config.get(setting)):
            return f"its {name} is {said}, and its run's config.yaml says {setting}: {true}: evaluate again"
    own = rows.get(run.name.rpartition("/")[2], {})
    for name, value in declared.items():
        if name not in own and str(run.config.get(name)) != str(value):
            return f"setting {name} is {run.config.get(name)}, and {value} was asked for"
    return ""


def trained_as(run: Run) -> dict[str, str]:
    """Data and settings of a run, as far as they must not differ between depths and seeds."""
    report = {key: value for key, value in run.data.items() if key != "cache"}
    found = {"data report": digest(report)[:12], "model's files": digest(run.manifest.get("model_files"))[:12]}
    return found | {name: str(run.config.get(name)) for name in SETTINGS_ALIKE}


def measured_as(result: Result) -> dict[str, str]:
    """How a result was measured, as far as that must not differ in a panel."""
    told = {key: str(result.study.get(key))[:80] for key in MEASURED_ALIKE}
    return told | {"set of items": digest(sorted(result.ids))[:12]}


def unlike(signatures: dict[str, dict[str, str]]) -> list[str]:
    """The keys in which runs differ, each as a text, "key is a (runs) or b (runs)". signatures: of each run, by
    name."""
    told = []
    for key in dict.fromkeys(key for signature in signatures.values() for key in signature):
        runs = defaultdict(list)
        for name, signature in signatures.items():
            runs[signature.get(key)].append(name)
        if len(runs) > 1:
            told.append(f"{key} is " + " or ".join(f"{value} ({', '.join(names)})" for value, names in runs.items()))
    return told


def once(results: list[Result], left_out: list) -> list[Result]:
    """The results, without those that repeat another one's seed or adapter, and depths, which `left_out` then names."""
    taken: dict[tuple, Result] = {}
    kept = []
    for result in results:
        study, read = result.study, (result.trained, result.study["total_ut_steps"])
        same = {"depth and seed": (*read, study["seed"])}
        if adapter := study.get("adapter_sha256"):
            same["depth and adapter"] = (*read, str(adapter))
        if found := next((what for what, key in same.items() if key in taken), None):
            why = f"the same training set, {found} as {taken[same[found]].path}: counted once"
            left_out.append((str(result.path), why))
        else:
            kept.append(result)
            taken |= dict.fromkeys(same.values(), result)
    return kept


def made_otherwise(manifests: list[tuple[str, dict]]) -> str:
    """In words, which runs were trained, or their results made, by other code, or with other packages, than most: that
    may change numbers. manifests: (run, what is recorded), several of a run for results at several depths."""
    made, told = [], []
    for name, manifest in manifests:
        packages = manifest.get("packages")
        code = str(manifest.get("code_sha256") or manifest.get("git_commit") or "not recorded")[:12]
        made.append((name, {"code": code} | (packages if isinstance(packages, dict) else {})))
    for key in dict.fromkeys(key for _, parts in made for key in parts):
        groups = defaultdict(list)
        for name, parts in made:
            if key in parts:
                groups[str(parts[key])].append(name)
        most = max(groups, key=lambda value: len(groups[value]))
        others = [f"{value} ({', '.join(dict.fromkeys(runs))})" for value, runs in groups.items() if value != most]
        told += [f"{key} {most}, but {', '.join(others)}"] if others else []
    return "; ".join(told)


def measured_otherwise(results: Iterable[Result], reader: Reader) -> dict[str, list[str]]:
    """What `made_otherwise` says of the results of each task, and of which tasks it does."""
    by_task, told = defaultdict(list), defaultdict(list)
    for result in results:
        task, made = result.study["task"], reader.made[result.path.parent]
        depth = str(result.study["total_ut_steps"])
        by_task[task].append((result.study["run"], made.get((task, depth), made.get((task, ""), {}))))
    for task, manifests in by_task.items():
        if why := made_otherwise(manifests):
            told[why].append(task)
    return told


def why_unlike(key: Key, results: list[Result], runs: dict[str, Run]) -> list[str]:
    """In words, where results for one panel differ and must not: in how they were measured, in their data, in settings.
    Of the settings those are excepted that the arm lets differ between depths."""
    free, _ = ARMS[key.arm]
    measured = {f"{r.study['run']} read at {r.study['total_ut_steps']}": measured_as(r) for r in results}
    trained = {r.study["run"]: trained_as(runs[r.study["run"]]) for r in results}
    kept = {name: {k: v for k, v in told.items() if k not in free} for name, told in trained.items()}
    why = unlike(measured) + unlike(kept)
    for depth in sorted({r.trained for r in results}):
        here = {r.study["run"]: trained[r.study["run"]] for r in results if r.trained == depth}
        why += unlike({name: {k: told[k] for k in free} for name, told in here.items()})
    return why


def zero_line(bases: list[Result], mine: list[Result], left_out: list) -> list[Result]:
    """The base's results that were measured like those of these adapters, one for each depth: gains are measured from
    them."""
    found = {}
    for result in bases:
        if mine and (why := unlike({"the base": measured_as(result), "the adapted": measured_as(mine[0])})):
            left_out.append((str(result.path), f"no zero line of the adapted models: {'; '.join(why)}"))
        else:
            found.setdefault(result.study["total_ut_steps"], result)
    return list(found.values())


def panels(reader: Reader, declared: dict[str, object]) -> dict[Key, Panel]:
    """The panels of results that may be compared, in the order of the report. The other results are added to
    `reader.left_out`, with the reason.

    declared: settings, by name, that a run must have to count; {} for any."""
    rows = read_yaml(EXPERIMENTS)
    groups, bases = defaultdict(list), defaultdict(list)
    for result in reader.results:
        study = result.study
        if study["kind"] == "base":
            bases[study["task"]].append(result)
        elif study["kind"] == "adapter":
            if why := why_not(result, reader.runs, declared, rows):
                reader.left_out.append((str(result.path), why))
                continue
            run = reader.runs[study["run"]]
            arm = run.config.get("arm", STUDY)
            condition = ", ".join(f"{name} {run.config.get(name)}" for name in ARMS[arm][1])
            groups[Key(study["task"], str(study["dataset"]), arm, condition)].append(result)
    counted = {result.study["run"]: reader.runs[result.study["run"]] for group in groups.values() for result in group}
    if told := made_otherwise([(name, run.manifest) for name, run in counted.items()]):
        reader.left_out.append(("runs", f"counted, but trained unlike: {told}"))
    found = {}
    for key, results in groups.items():
        mine = once(results, reader.left_out)
        if why := why_unlike(key, mine, reader.runs):
            how = "neither counts until one is chosen: name its settings (python report.py --NAME VALUE, or --config "
            how += "FILE), or move the other's folder away"
            reader.left_out.append((" ".join(key).strip(), f"not compared: {'; '.join(why)}; {how}"))
        else:
            found[key] = Panel(mine + zero_line(bases[key.task], mine, reader.left_out))
    shown = {result.path: result for panel in found.values() for result in panel.results}.values()
    for told, tasks in measured_otherwise(shown, reader).items():
        reader.left_out.append((f"results of {', '.join(tasks)}", f"counted, but measured unlike: {told}"))
    for key in [key for key in found if key.task == EXAMS[0] and key._replace(task=EXAMS[1]) in found]:
        if exams := pool(found[key], found[key._replace(task=EXAMS[1])], reader.left_out):
            found[key._replace(task=exams.study["task"])] = exams
            found[key].study = found[key].study | {"primary": False}
    for task in bases.keys() - {key.task for key in found}:
        found[Key(task, BASE)] = Panel(zero_line(bases[task], [], reader.left_out))

    aspects, datasets = list(ASPECTS), list(read_yaml(DATASETS))

    def place(key: Key) -> tuple:
        study = found[key].study
        known = datasets.index(key.dataset) if key.dataset in datasets else len(datasets)
        return aspects.index(study["aspect"]), not study.get("primary"), key.task, known, key.dataset, key[2:]

    return {key: found[key] for key in sorted(found, key=place)}


def pool(one: Panel, other: Panel, left_out: list) -> Panel | None:
    """A panel of the items of two benchmarks together. None, with a note in `left_out`, where some run was not scored
    on both."""
    there = {result.place: result for result in other.results}
    scored = [{result.place for result in panel.results if result.trained is not None} for panel in (one, other)]
    if scored[0] != scored[1]:
        odd = ", ".join(sorted({run for run, _ in scored[0] ^ scored[1]}))
        left_out.append((" and ".join(EXAMS), f"not pooled: {odd}: scored on one of them, or not at the same depths"))
        return None
    return Panel([pool_results(result, there[result.place]) for result in one.results if result.place in there])


def pool_results(*both: Result) -> Result:
    """One result with the items of two, whose ids and labels begin with their task."""
    studies, count = [result.study for result in both], sum(len(result.ids) for result in both)
    unknown = dict.fromkeys(("majority", "macro", "macro_chance", "macro_majority", "predicted", "ci95"))
    study = studies[0] | unknown | {"task": " and ".join(s["task"] for s in studies), "items": count}
    study["unparsed"] = sum(s.get("unparsed") or 0 for s in studies)
    if all(s.get("chance") for s in studies):
        study["chance"] = sum(s["chance"] * len(r.ids) for s, r in zip(studies, both, strict=True)) / count
    tasks = [f"{study['task']} " for study in studies]  # before each label: both may have a passage 1
    joined = {name: np.concatenate([getattr(r, name) for r in both]) for name in BY_ITEM}
    for name in ("clusters", "strata"):
        joined[name] = np.concatenate([task + getattr(r, name) for task, r in zip(tasks, both, strict=True)])
    ids = [task + identity for task, r in zip(tasks, both, strict=True) for identity in r.ids]
    return Result(study, both[0].path, ids, **joined)


def numbers(panel: Panel) -> dict[str, str]:
    """{number: id} of a panel's items; the number after the last dash is the same in both languages."""
    return {identity.rpartition("-")[2]: identity for identity in panel.ids}


def paired(thai: Panel, english: Panel, left_out: list) -> tuple[Panel, Panel] | None:
    """Both panels on the items that they have in common, in one order, with the Thai items' clusters. None, with a note
    in `left_out`, where items of the same number have different right answers: then the files' orders differ."""
    here, there = numbers(thai), numbers(english)
    same = [number for number in here if number in there]
    of_thai, of_english = (
        [result.take([ids[number] for number in same]) for result in panel.results]
        for panel, ids in ((thai, here), (english, there))
    )
    choices = thai.study["metric"] == "accuracy"  # texts have no right answer
    golds = zip(of_thai[0].golds, of_english[0].golds, strict=True)
    agree = sum(a == b and (a is not None or not choices) for a, b in golds)
    if agree < len(same) or not same:
        why = f"not compared: {agree} of {len(same)} items of one number have the same right answer"
        left_out.append((f"{thai.study['task']} and {english.study['task']}", why))
        return None
    passages = of_thai[0].clusters
    return Panel(of_thai), Panel([dataclasses.replace(result, clusters=passages) for result in of_english])


def gaps(found: dict[Key, Panel], left_out: list) -> dict[Key, tuple[Panel, Panel]]:
    """Belebele in Thai and in English, question by question, of the models and depths that were asked both."""
    made = {}
    for key, thai in found.items():
        english = found.get(key._replace(task=LANGUAGES[1]))
        if key.task != LANGUAGES[0] or english is None:
            continue
        both = {result.place for result in thai.results} & {result.place for result in english.results}
        kept = [[result for result in panel.results if result.place in both] for panel in (thai, english)]
        if both and (pair := paired(Panel(kept[0]), Panel(kept[1]), left_out)):
            made[key] = pair
    return made
