"""What the study's files say: reads runs and results, decides which may be compared, and draws the verdict by rule.

report.py shows it. What cannot be used is not an error but an entry of `Reader.left_out`: a file and why.
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from ouro.evaluate.benchmarks import LANGUAGES
from ouro.files import UserError, read_yaml
from ouro.verdict import stats
from ouro.verdict.stats import Cell, Estimate

import numpy as np

FORMAT = 1
MAX_METRICS, MAX_ITEMS = 64 << 20, 512 << 20  # bytes; a run of 3,000 log lines has one million
SEEDS = 3  # fewer are named as missing
BASE = "base model"
METRICS = {  # metric: unit, factor, decimals, name of an axis
    "bits_per_character": ("bits per character", 1, 3, "bits per character"),
    "accuracy": ("points", 100, 1, "accuracy, %"),
    "rating": ("rating points", 1, 2, "rating, 1 to 10"),
}
ASPECTS = {
    "thai_text": "Thai text",
    "thai_exams": "Thai exams",
    "thai_conversation": "Thai conversation",
    "english": "English retention",
}
# Runs that differ in one of these were not trained, or not measured, alike: never averaged, never subtracted.
ALIKE = ("model", "model_revision", "precision")
TRAINED_ALIKE = (*ALIKE, "loss", "data report", "settings")
MEASURED_ALIKE = ("metric", "protocol", "benchmark_revision", "split", "limit", "prompt_sha256", "judge")
LEARNING = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "loraplus_lr_ratio", "learning_rate")
LEARNING += ("lr_scheduler_type", "warmup_ratio", "weight_decay", "optim", "num_train_epochs", "max_steps")


@dataclasses.dataclass
class Run:
    """A training run's folder. `log`: columns of metrics.jsonl."""

    name: str
    config: dict
    manifest: dict
    data: dict
    log: dict[str, np.ndarray]
    held_out: list[float]  # losses by loop, last and before training
    base_held_out: list[float]
    completed: bool

    @property
    def experiment(self) -> str:
        return self.name.rpartition("/")[2]

    @property
    def state(self) -> str:
        if self.completed:
            return "complete"
        if not len(self.log["step"]):
            return "no step logged"
        if not math.isfinite(self.log["loss"][-1]):
            return f"failed: loss is not a number at step {self.log['step'][-1]:.0f}"
        total = self.config.get("max_steps", -1)
        return f"not finished: step {self.log['step'][-1]:.0f}" + (f" of {total}" if total > 0 else "")

    @property
    def seconds(self) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.diff(self.log["num_tokens"], prepend=0) / self.log["tokens_per_second"], posinf=0)

    @property
    def flops(self) -> float | None:
        """Of forward and backward pass, as counted in training; it is logged where the GPU's rate is known."""
        rate = (self.manifest.get("gpu_tflops") or 0) * 1e12 * (self.manifest.get("processes") or 1)
        use = self.log["model_flop_use"]
        known = np.isfinite(use)
        if not rate or not known.any():
            return None
        return float((use * self.seconds)[known].sum() * rate * self.seconds.sum() / self.seconds[known].sum())


@dataclasses.dataclass
class Result:
    """A result file; ids, numerators, denominators and right answers of its items in the file's order."""

    study: dict
    path: Path
    ids: list[str]
    numerators: np.ndarray
    denominators: np.ndarray
    golds: list = dataclasses.field(default_factory=list)


DEPTHS = ("total_ut_steps", "trained_ut_steps")
LOGGED = ("step", "loss", "mean_token_accuracy", "num_tokens", "tokens_per_second", "model_flop_use", "memory_gib")


class Reader:
    """Reads what is there; what cannot be used goes to `left_out` as (what, why) and stops nothing."""

    def __init__(self, output: Path, results: Path):
        self.left_out: list[tuple[str, str]] = []
        self.runs = {run.name: run for run in map(self.run, self.folders(output)) if run}
        self.results: list[Result] = []
        self.answers: list[tuple[dict, Path]] = []  # of generated conversations, rated or not
        for path in (path for _, folder in self.folders(results) for path in sorted(folder.glob("*-ut*.json"))):
            if result := self.result(path):
                self.results.append(result)

    def folders(self, root: Path) -> list[tuple[str, Path]]:
        if not root.is_dir():
            return []
        found = [*root.glob("*/"), *root.glob("seed*/*/")]
        return sorted((path.relative_to(root).as_posix(), path) for path in found)

    def lines(self, path: Path, limit: int) -> list[dict]:
        """JSON lines; those that are broken are left out.

        Raises:
            ValueError: a file larger than `limit` bytes."""
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"{size / 2**20:,.0f} MiB, and at most {limit >> 20} are read")
        lines = path.read_bytes().splitlines()
        try:
            rows = json.loads(b"[" + b",".join(lines) + b"]")
        except ValueError:
            rows = []
            for line in lines:
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        good = [row for row in rows if isinstance(row, dict)]
        if len(good) < len(lines):
            self.left_out.append((str(path), f"{len(lines) - len(good)} of {len(lines)} lines are not JSON objects"))
        return good

    def json(self, path: Path) -> dict:
        try:
            content = json.loads(path.read_bytes())
            if isinstance(content, dict):
                return content
            self.left_out.append((str(path), "is not a JSON object"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.left_out.append((str(path), f"cannot be read: {error}"))
        return {}

    def run(self, named: tuple[str, Path]) -> Run | None:
        name, folder = named
        if not (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists():
            return None
        try:
            config = read_yaml(folder / "config.yaml")
            if not isinstance(config.get("total_ut_steps", 1), int):
                raise UserError(f"{folder / 'config.yaml'}: total_ut_steps is not a whole number")
        except UserError as error:
            self.left_out.append((str(folder), str(error)))
            config = {}
        try:
            rows = self.lines(folder / "metrics.jsonl", MAX_METRICS)
        except FileNotFoundError:
            rows = []
        except (OSError, ValueError) as error:
            self.left_out.append((str(folder / "metrics.jsonl"), str(error)))
            rows = []
        try:
            log = {key: np.array([row.get(key, math.nan) for row in rows], float) for key in LOGGED}
            held_out = [float(x) for x in next((r["held_out_loss"] for r in rows[::-1] if "held_out_loss" in r), [])]
        except (TypeError, ValueError) as error:
            self.left_out.append((str(folder / "metrics.jsonl"), f"holds something other than numbers: {error}"))
            log, held_out = {key: np.array([]) for key in LOGGED}, []
        if not np.isfinite(log["loss"]).all():
            self.left_out.append((str(folder / "metrics.jsonl"), "loss is not a number in some lines"))
        manifest, data = self.json(folder / "manifest.json"), self.json(folder / "data_report.json")
        try:
            before = [float(x) for x in manifest.get("base_held_out_loss", [])]
        except (TypeError, ValueError) as error:
            self.left_out.append((str(folder / "manifest.json"), f"base_held_out_loss are no numbers: {error}"))
            before = []
        return Run(name, config, manifest, data, log, held_out, before, (folder / "completed").exists())

    def result(self, path: Path) -> Result | None:
        try:
            study = json.loads(path.read_bytes()).get("study")
            if not isinstance(study, dict) or study.get("format") != FORMAT:
                version = study.get("format") if isinstance(study, dict) else None
                raise ValueError(f"format {version!r}, and this program reads {FORMAT}; evaluate again")
            if study["metric"] not in METRICS:
                raise ValueError(f"metric {study['metric']!r} is unknown")
            if study["metric"] == "rating":
                self.answers.append((study, path.with_suffix(".items.jsonl")))
            if study["value"] is None and study["metric"] == "rating":  # one note for all of them
                self.left_out.append((f"{study['task']}-ut*.json", "answers that tools/judge.py has not rated (yet)"))
                return None
            if not study["items"] or not math.isfinite(study["value"]):
                raise ValueError(f"{study['items']} items, value {study['value']}")
            rows = self.lines(path.with_suffix(".items.jsonl"), MAX_ITEMS)
            ids = [row["id"] for row in rows]
            if study["metric"] == "bits_per_character":
                pairs = [(row["bits"], row["characters"]) for row in rows]
            else:  # an item without a rating weighs nothing
                pairs = [(0.0, 0.0) if row["value"] is None else (row["value"], 1.0) for row in rows]
            above, below = np.array(pairs, float).reshape(-1, 2).T
            if len(ids) != study["items"] or len(set(ids)) != len(ids):
                raise ValueError(
                    f"{len(set(ids))} different items in {len(ids)} lines, and {study['items']} were scored"
                )
            if not np.isfinite(above).all() or not below.sum() > 0:
                raise ValueError("an item's value is not a number")
            mean = above.sum() / below.sum()
            if abs(mean - study["value"]) > 1e-3 * max(1, abs(study["value"])):
                raise ValueError(f"the items give {mean:.4f}, the file says {study['value']:.4f}")
            if not all(isinstance(study[key], int) for key in DEPTHS[: 1 + (study["kind"] == "adapter")]):
                raise ValueError("a depth is not a whole number")
            for key in (*ALIKE, *MEASURED_ALIKE, "run", "kind", "task", "aspect", "total_ut_steps", "higher_is_better"):
                study[key]  # a missing one is named by the KeyError
            return Result(study, path, ids, above, below, [row.get("gold") for row in rows])
        except KeyError as error:
            self.left_out.append((str(path), f"has no {error}"))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            self.left_out.append((str(path), f"cannot be used: {error}"))
        return None


def over_exams(study: dict, key: str) -> float | None:
    """The chance or majority that belongs to `macro`; of older results from the subsets, by benchmarks.macro's rule
    (which is not imported: torch comes with it)."""
    if (told := study.get(f"macro_{key}")) is not None:
        return told
    groups = defaultdict(list)
    try:
        for subset, row in study["subsets"].items():
            groups[subset[:7] if subset.startswith("onet_m") else subset].append(row[key])
        return statistics.fmean(map(statistics.fmean, groups.values()))
    except (AttributeError, KeyError, TypeError, ValueError):  # a subset does not say
        return None


def trained_as(run: Run) -> dict[str, str]:
    """Data and settings of a run, as far as they must not differ between depths and seeds."""
    told = {key: value for key, value in run.data.items() if key not in ("padding", "cache")}  # the seed's, the place's
    found = {"data report": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()} if told else {}
    if run.config:
        rows = run.config.get("per_device_train_batch_size", 1) * run.config.get("gradient_accumulation_steps", 1)
        settings = {key: run.config[key] for key in LEARNING if key in run.config} | {"rows a step": rows}
        found["settings"] = ", ".join(f"{key} {value}" for key, value in settings.items())
    return found


def signatures(reader: Reader) -> dict[Path, dict]:
    """By result file: all that must be equal in results that are pooled or subtracted.

    Results whose training folder is elsewhere are taken to be trained as most others on that set, and listed.
    """
    trained = {name: trained_as(run) for name, run in reader.runs.items()}
    known = defaultdict(Counter)
    for result in reader.results:
        for key, value in trained.get(result.study["run"], {}).items():
            known[str(result.study.get("dataset")), key][value] += 1
    found = {}
    for result in reader.results:
        study = result.study
        found[result.path] = {key: study.get(key) for key in (*ALIKE, *MEASURED_ALIKE)}
        if study["kind"] != "adapter":
            continue
        mine = trained.get(study["run"], {})
        if len(mine) < 2:
            why = "its training folder is not here, or not whole: data and settings could not be compared; counted"
            reader.left_out.append((str(result.path.parent), why))
        found[result.path]["loss"] = study.get("loss")
        for key in ("data report", "settings"):
            usual = known[str(study.get("dataset")), key]
            found[result.path][key] = mine.get(key) or max(sorted(usual), key=usual.get, default="unknown")
    return found


class Panel:
    """One benchmark and one training set: base and adapted models by depth, resampled together."""

    def __init__(self, results: list[Result], bases: list[Result], weights: np.ndarray):
        first = (results or bases)[0]
        self.study, self.items, self.ids = first.study, len(first.ids), first.ids
        self.results, self.bases = results, bases
        self.sign = 1 if self.study["higher_is_better"] else -1
        self.unit, self.factor, self.decimals, self.axis = METRICS[self.study["metric"]]
        groups = defaultdict(list)
        for result in results:
            groups[result.study["trained_ut_steps"], result.study["total_ut_steps"]].append(result)
        self.adapted = {key: self.cell(group, weights) for key, group in sorted(groups.items())}
        self.sources = {key: [result.study for result in group] for key, group in groups.items()}
        self.seeds = {key: [result.study["seed"] for result in group] for key, group in groups.items()}
        self.base = {result.study["total_ut_steps"]: self.cell([result], weights) for result in bases}
        self.base_sources = {result.study["total_ut_steps"]: result.study for result in bases}
        self.trained = sorted({trained for trained, _ in self.adapted})

    def cell(self, group: list[Result], weights: np.ndarray) -> Cell:
        columns = []
        for result in group:
            place = {identity: i for i, identity in enumerate(result.ids)}
            order = [place[identity] for identity in self.ids]
            columns.append((result.numerators[order], result.denominators[order]))
        above, below = (np.stack([column[i] for column in columns], 1) for i in (0, 1))
        return stats.cell(weights, above, below)

    def estimate(self, *cells: Cell) -> Estimate:
        return stats.estimate(list(cells), self.items)

    def gain_cell(self, trained: int, depth: int) -> Cell | None:
        """Better than the base at the same depth by so much; None without both."""
        if (trained, depth) not in self.adapted or depth not in self.base:
            return None
        better = self.adapted[trained, depth] - self.base[depth]
        return better if self.sign > 0 else -better

    def gain(self, trained: int, depth: int) -> Estimate | None:
        gained = self.gain_cell(trained, depth)
        return gained and self.estimate(gained)

    def between(self, one: Cell | None, other: Cell | None) -> Estimate | None:
        """How much better `one` is than `other`, of runs trained apart."""
        if one is None or other is None:
            return None
        return self.estimate(one, -other) if self.sign > 0 else self.estimate(other, -one)

    def interaction(self, depth: int) -> Estimate | None:
        """The research question: the gain at `depth` loops minus that at one, each trained and read at its depth."""
        many, one = self.gain_cell(depth, depth), self.gain_cell(1, 1)
        return None if many is None or one is None else self.estimate(many, -one)

    def show(self, value: float) -> str:
        return f"{value * self.factor:.{self.decimals}f}"

    def size(self, value: float) -> str:
        return f"{self.show(abs(value))} {self.unit}"

    def signed(self, e: Estimate) -> str:
        low, value, high = (f"{x * self.factor:+.{self.decimals}f}" for x in (e.low, e.value, e.high))
        return f"{value} [{low}, {high}]"


def majority(results: list[Result], signatures: list[dict], keys: tuple[str, ...], left_out: list) -> list[Result]:
    """The largest group of results that agree in `keys`; the others go to left_out, with the difference."""
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result, found in zip(results, signatures, strict=True):
        groups[tuple(str(found.get(key)) for key in keys)].append(result)
    if not groups:
        return []
    best = max(sorted(groups), key=lambda group: len(groups[group]))
    for group, members in groups.items():
        if group != best:
            differing = [(k, a, b) for k, a, b in zip(keys, group, best, strict=True) if a != b]
            why = "; ".join(f"{key} is {a[:80]}, that of the others {b[:80]}" for key, a, b in differing)
            left_out += [(str(result.path), f"not pooled: {why}") for result in members]
    return groups[best]


def once(results: list[Result], signs: dict[Path, dict], left_out: list) -> list[Result]:
    """Without those that repeat another's seed, depths and training."""
    taken: dict[tuple, Path] = {}
    for result in results:
        key = tuple(str(result.study.get(k)) for k in ("trained_ut_steps", "total_ut_steps", "seed"))
        key += tuple(str(value) for value in signs[result.path].values())
        if taken.setdefault(key, result.path) is not result.path:
            why = f"the same training set, depth and seed as {taken[key]}: counted once"
            left_out.append((str(result.path), why))
    return [result for result in results if result.path in taken.values()]


def zero_line(bases: list[Result], mine: list[Result], signs: dict[Path, dict], left_out: list) -> list[Result]:
    """The base's results that these adapted models' can be subtracted from, one a depth."""
    reference = (mine or bases)[0]
    found = {}
    for result in bases:
        here, there = signs[result.path], signs[reference.path]
        other = [
            f"{key} {here[key]} instead of {there[key]}" for key in (*ALIKE, *MEASURED_ALIKE) if here[key] != there[key]
        ]
        if not other and sorted(result.ids) != sorted(reference.ids):
            other = ["other items"]
        if other:
            left_out.append((str(result.path), f"no zero line of the adapted models: {', '.join(other)}"))
        else:
            found.setdefault(result.study["total_ut_steps"], result)
    return list(found.values())


def panels(reader: Reader) -> dict[tuple[str, str], Panel]:
    """By (task, training set), in the verdict's order: what may be compared. The rest is added to what was left out."""
    found, weights, signs = {}, {}, signatures(reader)
    by_task = defaultdict(list)
    for result in reader.results:
        if result.study["kind"] != "baseline":
            by_task[result.study["task"]].append(result)
    for task, results in by_task.items():
        adapted = [result for result in results if result.study["kind"] == "adapter"]
        bases = [result for result in results if result.study["kind"] == "base"]
        for dataset in sorted({str(result.study.get("dataset")) for result in adapted}) or [BASE]:
            mine = [result for result in adapted if str(result.study.get("dataset")) == dataset]
            mine = once(mine, signs, reader.left_out)
            keys = (*TRAINED_ALIKE, *MEASURED_ALIKE)
            mine = majority(mine, [signs[result.path] for result in mine], keys, reader.left_out)
            mine = same_items(mine, reader.left_out)
            ours = zero_line(bases, mine, signs, reader.left_out)
            items = len((mine or ours)[0].ids)
            if items not in weights:
                weights[items] = stats.resample(items)
            found[task, dataset] = Panel(mine, ours, weights[items])
    order = [*ASPECTS, "other"]

    def place(key: tuple[str, str]) -> tuple:
        told = found[key].study
        aspect = told["aspect"] if told["aspect"] in order else "other"
        return order.index(aspect), not told.get("primary"), *key

    return {key: found[key] for key in sorted(found, key=place)}


def same_items(results: list[Result], left_out: list) -> list[Result]:
    ids = [hashlib.sha256("\n".join(sorted(result.ids)).encode()).hexdigest() for result in results]
    return majority(results, [{"set of items": x} for x in ids], ("set of items",), left_out)


def gaps(found: dict[tuple[str, str], Panel], left_out: list) -> dict[str, tuple[Panel, Panel, Panel]]:
    """By training set: Belebele in Thai, in English, and English minus Thai question by question, of what has both."""
    made = {}
    for dataset in (dataset for task, dataset in found if task == LANGUAGES[0]):
        thai, english = (found.get((task, dataset)) for task in LANGUAGES)
        if english is None:
            continue
        adapted = in_both(thai.results, english.results, left_out)
        bases = in_both(thai.bases, english.bases, left_out)
        if adapted or bases:
            weights = stats.resample(len((adapted or bases)[0][0].ids))
            made[dataset] = tuple(Panel([r[i] for r in adapted], [r[i] for r in bases], weights) for i in range(3))
    return made


def in_both(thai: list[Result], english: list[Result], left_out: list) -> list[tuple[Result, Result, Result]]:
    """(Thai, English, English minus Thai) of each model and depth, on the questions that both files have by number."""

    def numbers(result: Result) -> dict[str, int]:
        return {identity.rpartition("-")[2]: i for i, identity in enumerate(result.ids)}

    made, others = [], {(r.study["run"], r.study["total_ut_steps"]): r for r in english}
    for one in thai:
        if (other := others.get((one.study["run"], one.study["total_ut_steps"]))) is None:
            continue
        here, there = numbers(one), numbers(other)
        same = [number for number in here if number in there]
        i, j = [here[number] for number in same], [there[number] for number in same]
        # In another order a quarter of the golds would agree by chance: one that does not is no pair, nor are the rest.
        agree = sum(one.golds[a] == other.golds[b] is not None for a, b in zip(i, j, strict=True))
        if agree < len(same) or not same:
            why = f"not compared: {agree} of {len(same)} questions of one number have the same right answer"
            left_out.append((" and ".join(LANGUAGES), why))
            continue
        x, y, weight = one.numerators[i], other.numerators[j], np.ones(len(same))
        made.append(tuple(Result(one.study, one.path, same, values, weight) for values in (x, y, y - x)))
    return made


def loops(depth: int) -> str:
    return "1 loop" if depth == 1 else f"{depth} loops"
