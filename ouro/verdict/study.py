"""What the study's files say: reads runs and results, and decides which of them may be compared.

    reader = Reader(Path("output"), Path("results"))
    for (task, dataset), panel in panels(reader).items():
        print(task, dataset, {depth: panel.gain(depth, depth) for depth in panel.trained})

What cannot be used is not an error but an entry of `Reader.left_out`: a file and why.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from ouro.evaluate.benchmarks import LANGUAGES
from ouro.files import UserError, read_yaml
from ouro.settings import LEARNING
from ouro.verdict import stats
from ouro.verdict.stats import Cell, Estimate

import numpy as np

FORMAT = 1
LARGEST = 512 << 20  # bytes of a file of JSON lines; a run of 3,000 log lines has one million
SEEDS = 3  # fewer are named as missing
BASE = "base model"
METRICS = {  # metric: unit, factor, decimals, name of an axis
    "bits_per_character": ("bits per character", 1, 3, "bits per character"),
    "accuracy": ("points", 100, 1, "accuracy, %"),
    "rating": ("rating points", 1, 2, "rating, 1 to 10"),
}
TEXTS = read_yaml(Path(__file__).with_name("texts.yaml"))
ASPECTS = TEXTS["aspects"]
# Results that differ in one of these were not measured alike, or their adapters not trained alike: they are never
# averaged and never subtracted. Trained depth and training set are what the study itself compares, or keeps apart.
MEASURED_ALIKE = ("model", "model_revision", "precision", "metric", "protocol", "benchmark_revision", "split")
MEASURED_ALIKE += ("limit", "prompt_sha256", "judge")
SETTINGS_ALIKE = tuple(name for name in LEARNING if name not in ("total_ut_steps", "dataset"))
TRAINED_ALIKE = ("data report", *(f"setting {name}" for name in SETTINGS_ALIKE), "rows per step")
LOGGED = ("step", "loss", "mean_token_accuracy", "num_tokens", "tokens_per_second", "model_flop_use", "memory_gib")


@dataclasses.dataclass
class Run:
    """A training run's folder. `log`: columns of metrics.jsonl."""

    name: str
    config: dict
    manifest: dict
    data: dict
    log: dict[str, np.ndarray]
    held_out: list[float]  # the last held-out losses, by depth
    completed: bool

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
    def tokens(self) -> float:
        return last(self.log["num_tokens"])

    @property
    def seconds(self) -> np.ndarray:
        """What each logged interval took."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.diff(self.log["num_tokens"], prepend=0) / self.log["tokens_per_second"], posinf=0)

    @property
    def gpu_hours(self) -> float | None:
        """None: trained on a CPU."""
        if not self.manifest.get("gpu"):
            return None
        return float(self.seconds.sum()) * (self.manifest.get("processes") or 1) / 3600

    def flops(self, study: dict) -> float | None:
        """Of forward and backward passes. As counted in training, where the GPU's rate is known; else twice the forward
        pass of its tokens, which `study` (of a result) tells, for frozen weights have no gradient of their own."""
        rate = (self.manifest.get("gpu_tflops") or 0) * 1e12 * (self.manifest.get("processes") or 1)
        use, seconds = self.log["model_flop_use"], self.seconds
        known = np.isfinite(use)
        if rate and known.any() and (counted := float((use * seconds)[known].sum() * rate)):
            return counted * seconds.sum() / seconds[known].sum()
        forward = study.get("inference_flops_per_token")
        return 2 * forward * self.tokens if forward and math.isfinite(self.tokens) else None


def last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


@dataclasses.dataclass
class Result:
    """A result file: its block "study"; ids, numerators, denominators and right answers of its items, in its order."""

    study: dict
    path: Path
    ids: list[str]
    numerators: np.ndarray
    denominators: np.ndarray
    golds: list = dataclasses.field(default_factory=list)
    signature: dict[str, str] = dataclasses.field(default_factory=dict)  # what must be equal, see `set_signatures`

    @property
    def trained(self) -> int | None:
        """The depth that an adapted model was trained at; None: the base."""
        return self.study["trained_ut_steps"] if self.study["kind"] == "adapter" else None


def read_config(path: Path) -> dict:
    config = read_yaml(path)
    if not isinstance(config.get("total_ut_steps", 1), int):
        raise ValueError("total_ut_steps is not a whole number")
    return config


def read_object(path: Path) -> dict:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


class Reader:
    """Reads what is there; what cannot be used goes to `left_out` as (what, why) and stops nothing."""

    def __init__(self, output: Path, results: Path):
        self.left_out: list[tuple[str, str]] = []
        self.runs = {run.name: run for run in (self.run(*named) for named in self.folders(output)) if run}
        self.answers: list[tuple[dict, Path]] = []  # of generated conversations, rated or not
        files = [path for _, folder in self.folders(results) for path in sorted(folder.glob("*-ut*.json"))]
        self.results: list[Result] = [r for r in (self.attempt(path, self.result, None) for path in files) if r]

    def folders(self, root: Path) -> list[tuple[str, Path]]:
        return sorted((path.relative_to(root).as_posix(), path) for path in [*root.glob("*/"), *root.glob("seed*/*/")])

    def attempt(self, path: Path, read: Callable[[Path], Any], otherwise: Any) -> Any:
        """What `read` makes of a file; `otherwise` if there is none, or one that cannot be used, which is noted."""
        if not path.exists():
            return otherwise
        try:
            return read(path)
        except KeyError as error:
            self.left_out.append((str(path), f"has no {error}"))
        except (OSError, UserError, ValueError, TypeError, AttributeError) as error:
            self.left_out.append((str(path), f"cannot be used: {error}"))
        return otherwise

    def lines(self, path: Path) -> list[dict]:
        """JSON lines; broken ones, as a stopped run may leave at its log's end, are left out.

        Raises:
            ValueError: a file of more than LARGEST bytes."""
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{size / 2**20:,.0f} MiB, and at most {LARGEST >> 20} are read")
        rows, lines = [], path.read_bytes().splitlines()
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        if len(rows) < len(lines):
            self.left_out.append((str(path), f"{len(lines) - len(rows)} of {len(lines)} lines are not JSON"))
        return rows

    def log(self, path: Path) -> tuple[dict[str, np.ndarray], list[float]]:
        """Columns of metrics.jsonl, and its last held-out losses."""
        rows = self.lines(path)
        log = {key: np.array([row.get(key, math.nan) for row in rows], float) for key in LOGGED}
        if not np.isfinite(log["loss"]).all():
            self.left_out.append((str(path), "loss is not a number in some lines"))
        held_out = next((row["held_out_loss"] for row in reversed(rows) if "held_out_loss" in row), [])
        return log, [float(loss) for loss in held_out]

    def run(self, name: str, folder: Path) -> Run | None:
        config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not config.exists() and not metrics.exists():
            return None
        log, held_out = self.attempt(metrics, self.log, ({key: np.array([]) for key in LOGGED}, []))
        settings = self.attempt(config, read_config, {})
        manifest, data = (
            self.attempt(folder / f"{file}.json", read_object, {}) for file in ("manifest", "data_report")
        )
        return Run(name, settings, manifest, data, log, held_out, (folder / "completed").exists())

    def result(self, path: Path) -> Result | None:
        study = read_object(path)["study"]
        if study.get("format") != FORMAT:
            raise ValueError(f"format {study.get('format')!r}, and this program reads {FORMAT}; evaluate again")
        for key in (*MEASURED_ALIKE, "run", "kind", "task", "aspect", "total_ut_steps", "higher_is_better"):
            study[key]  # a missing one is named by the KeyError
        if study["metric"] not in METRICS or study["aspect"] not in ASPECTS:
            raise ValueError(f"metric {study['metric']!r} or aspect {study['aspect']!r} is unknown")
        items_file = path.with_suffix(".items.jsonl")
        if study["metric"] == "rating":
            self.answers.append((study, items_file))
            if study["value"] is None:  # one note for all of them
                self.left_out.append((f"{study['task']}-ut*.json", "answers that tools/judge.py has not rated (yet)"))
                return None
        rows = self.lines(items_file)
        ids = [row["id"] for row in rows]
        if not len(set(ids)) == len(ids) == study["items"]:
            raise ValueError(f"{len(set(ids))} different items in {len(ids)} lines, and {study['items']} were scored")
        if study["metric"] == "bits_per_character":
            pairs = [(row["bits"], row["characters"]) for row in rows]
        else:  # an item without a rating weighs nothing
            pairs = [(0.0, 0.0) if row["value"] is None else (row["value"], 1.0) for row in rows]
        above, below = np.array(pairs, float).reshape(-1, 2).T
        with np.errstate(invalid="ignore"):
            mean = above.sum() / below.sum()
        if not abs(mean - study["value"]) <= 1e-3 * max(1, abs(study["value"])):  # `not <=` also refuses nan
            raise ValueError(f"the items give {mean:.4f}, the file says {study['value']:.4f}")
        depths = ("total_ut_steps", "trained_ut_steps") if study["kind"] == "adapter" else ("total_ut_steps",)
        if not all(isinstance(study[key], int) for key in depths):
            raise ValueError("a depth is not a whole number")
        return Result(study, path, ids, above, below, [row.get("gold") for row in rows])


def trained_as(run: Run) -> dict[str, str]:
    """Data and settings of a run, as far as they must not differ between depths and seeds; less if its files lack."""
    found = {}
    if run.data:  # without the padding, which depends on the seed's order of rows, and without the cache's folder
        told = {key: value for key, value in run.data.items() if key not in ("padding", "cache")}
        found["data report"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    if run.config:
        found |= {f"setting {name}": str(run.config.get(name)) for name in SETTINGS_ALIKE}
        rows = run.config.get("per_device_train_batch_size", 1) * run.config.get("gradient_accumulation_steps", 1)
        found["rows per step"] = str(rows)
    return found


def set_signatures(reader: Reader) -> None:
    """Gives each result its signature: all that must be equal in results that are pooled or subtracted.

    Results whose training folder is elsewhere are taken to be trained as most others on that set, and listed.
    """
    trained = {name: trained_as(run) for name, run in reader.runs.items()}
    known = defaultdict(Counter)
    for result in reader.results:
        for key, value in trained.get(result.study["run"], {}).items():
            known[result.study.get("dataset"), key][value] += 1
    for result in reader.results:
        study = result.study
        result.signature = {key: str(study[key]) for key in MEASURED_ALIKE}
        result.signature["set of items"] = hashlib.sha256("\n".join(sorted(result.ids)).encode()).hexdigest()
        if study["kind"] != "adapter":
            continue
        mine = trained.get(study["run"], {})
        if len(mine) < len(TRAINED_ALIKE):
            why = "its training folder is not here, or not whole: data and settings could not be compared; counted"
            reader.left_out.append((str(result.path.parent), why))
        result.signature["loss"] = str(study.get("loss"))
        for key in TRAINED_ALIKE:
            usual = known[study.get("dataset"), key]
            result.signature[key] = mine.get(key) or max(sorted(usual), key=usual.get, default="unknown")


def differences(one: Result, other: Result) -> str:
    """In what the first's signature is not like the second's; empty if in nothing."""
    pairs = ((key, value, other.signature[key]) for key, value in one.signature.items())
    return "; ".join(f"{key} is {a[:80]}, not {b[:80]}" for key, a, b in pairs if a != b)


class Panel:
    """One benchmark and one training set: base and adapted models by depth, resampled together.

    cells and sources (blocks "study") are by (trained depth, depth read), the base's trained depth is None."""

    def __init__(self, results: list[Result]):
        self.results, self.study, self.ids = results, results[0].study, results[0].ids
        self.items = len(self.ids)
        self.sign = 1 if self.study["higher_is_better"] else -1
        self.metric = self.study["metric"]
        self.unit, self.factor, self.decimals, self.axis = METRICS[self.metric]
        groups = defaultdict(list)
        for result in sorted(results, key=lambda r: (r.trained or 0, r.study["total_ut_steps"])):
            groups[result.trained, result.study["total_ut_steps"]].append(result)
        self.cells = {key: self.cell(group) for key, group in groups.items()}
        self.sources = {key: [result.study for result in group] for key, group in groups.items()}
        self.seeds = {key: [study["seed"] for study in sources] for key, sources in self.sources.items()}
        self.base = {depth: cell for (trained, depth), cell in self.cells.items() if trained is None}
        self.adapted = {key: cell for key, cell in self.cells.items() if key[0] is not None}
        self.trained = sorted({trained for trained, _ in self.adapted})

    def cell(self, group: list[Result]) -> Cell:
        columns = []
        for result in group:
            place = {identity: i for i, identity in enumerate(result.ids)}
            order = [place[identity] for identity in self.ids]
            columns.append((result.numerators[order], result.denominators[order]))
        above, below = (np.stack(column, 1) for column in zip(*columns, strict=True))
        return stats.cell(stats.resample(self.items), above, below)

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


def largest_group(results: list[Result], left_out: list) -> list[Result]:
    """The most results that are alike; the others go to left_out, with the difference."""
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for result in results:
        groups[tuple(result.signature.values())].append(result)
    best = groups[max(sorted(groups), key=lambda group: len(groups[group]), default=())]
    for result in results:
        if why := differences(result, best[0]):
            left_out.append((str(result.path), f"not pooled with the others: {why}"))
    return best


def once(results: list[Result], left_out: list) -> list[Result]:
    """Without those that repeat another's seed, depths and training."""
    taken: dict[tuple, Result] = {}
    for result in results:
        key = tuple(str(result.study.get(k)) for k in ("trained_ut_steps", "total_ut_steps", "seed"))
        first = taken.setdefault((*key, *result.signature.values()), result)
        if first is not result:
            why = f"the same training set, depth and seed as {first.path}: counted once"
            left_out.append((str(result.path), why))
    return list(taken.values())


def zero_line(bases: list[Result], mine: list[Result], left_out: list) -> list[Result]:
    """The base's results that can be subtracted from these adapted models', one a depth."""
    found = {}
    for result in bases:
        if why := differences(result, (mine or bases)[0]):
            left_out.append((str(result.path), f"no zero line of the adapted models: {why}"))
        else:
            found.setdefault(result.study["total_ut_steps"], result)
    return list(found.values())


def panels(reader: Reader) -> dict[tuple[str, str], Panel]:
    """By (task, training set), in the verdict's order: what may be compared. The rest is added to what was left out."""
    set_signatures(reader)
    found = {}
    for task in dict.fromkeys(result.study["task"] for result in reader.results):
        adapted, bases = (
            [r for r in reader.results if (r.study["task"], r.study["kind"]) == (task, kind)]
            for kind in ("adapter", "base")
        )
        for dataset in sorted({str(r.study.get("dataset")) for r in adapted}) or [BASE] * bool(bases):
            mine = once([r for r in adapted if str(r.study.get("dataset")) == dataset], reader.left_out)
            mine = largest_group(mine, reader.left_out)
            found[task, dataset] = Panel(mine + zero_line(bases, mine, reader.left_out))

    def place(key: tuple[str, str]) -> tuple:
        study = found[key].study
        return list(ASPECTS).index(study["aspect"]), not study.get("primary"), *key

    return {key: found[key] for key in sorted(found, key=place)}


def gaps(found: dict[tuple[str, str], Panel], left_out: list) -> dict[str, tuple[Panel, Panel, Panel]]:
    """By training set: Belebele in Thai, in English, and English minus Thai question by question, of what has both."""
    made = {}
    for dataset in (dataset for task, dataset in found if task == LANGUAGES[0]):
        thai, english = (found.get((task, dataset)) for task in LANGUAGES)
        if english is None:
            continue
        if both := in_both(thai.results, english.results, left_out):
            made[dataset] = tuple(Panel(list(results)) for results in zip(*both, strict=True))
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
        # In files of different orders a quarter of the answers would agree by chance: all must, or none is compared.
        agree = sum(one.golds[a] == other.golds[b] is not None for a, b in zip(i, j, strict=True))
        if agree < len(same) or not same:
            why = f"not compared: {agree} of {len(same)} questions of one number have the same right answer"
            left_out.append((" and ".join(LANGUAGES), why))
            continue
        x, y, weight = one.numerators[i], other.numerators[j], np.ones(len(same))
        made.append(tuple(Result(one.study, one.path, same, values, weight) for values in (x, y, y - x)))
    return made


def depth_text(depth: int) -> str:
    return "1 loop" if depth == 1 else f"{depth} loops"


def conversations(reader: Reader, count: int = 2) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(who, reply)]) of the first conversations: each model at the depth it was trained at, one seed."""

    def first_turns(path: Path) -> list[dict]:
        with open(path, "rb") as file:
            return [json.loads(line)["turns"][0] for line in islice(file, count)]

    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = set()
    for study, path in reader.answers:
        model = study.get("experiment") or study["run"], study["total_ut_steps"]
        if study["kind"] == "adapter" and study["trained_ut_steps"] != study["total_ut_steps"] or model in seen:
            continue
        seen.add(model)
        for turn in reader.attempt(path, first_turns, []):
            asked[str(turn["prompt"])].append((f"{model[0]}, {depth_text(model[1])}", str(turn["reply"])))
    return list(asked.items())
