"""Reads the runs in OUTPUT_DIR and the results in RESULTS_DIR. Which of them may be compared, panels.py says.

    reader = Reader(Path("output"), Path("results"))
    print({result.study["run"] for result in reader.results})

A file that cannot be used is no error: it is named in `Reader.left_out`, with the reason.
"""

import dataclasses
import functools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from ouro.evaluate.results import FORMAT
from ouro.files import WHOLE, UserError, file_sha256, read_json, read_yaml, regular
from ouro.settings import ARMS, recorded_settings

import numpy as np

ITEMS = 512 << 20  # the most bytes that are read of a file of items
BASE = "base model"
SMALL = 1e8  # FLOPs a token below which a model is a miniature; Ouro-2.6B has 5e9 in one loop
TEXTS = read_yaml(Path(__file__).with_name("texts.yaml"))
ASPECTS = TEXTS["aspects"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a level is shown (axis, factor, decimals) and a difference (unit, places), and the margin, set beforehand,
    inside which a difference does not matter. log: levels are compared by their logarithms, as bits a character are,
    and a difference is shown as how many per cent fewer bits that is."""

    axis: str
    factor: float
    decimals: int
    unit: str
    places: int
    margin: float
    log: bool = False

    def shown(self, difference: float) -> float:
        """A difference in its unit; one of logarithms in per cent."""
        return 100 * (1 - math.exp(-difference)) if self.log else self.factor * difference

    def level(self, value: float) -> str:
        return f"{value * self.factor:.{self.decimals}f}"

    def size(self, difference: float) -> str:
        return f"{self.shown(difference):.{self.places}f} {self.unit}"

    @property
    def what(self) -> str:
        """Name of an axis of differences."""
        return "% fewer bits per character" if self.log else self.unit


METRICS = {
    "bits_per_character": Metric("bits per character", 1, 3, "%", 2, -math.log(0.98), log=True),
    "accuracy": Metric("accuracy, %", 100, 1, "points", 1, 0.03),
    "rating": Metric("rating, 1 to 10", 1, 2, "rating points", 2, 0.3),
}
# Of the block "study" of a result: NEEDED, the keys that must be there, and their types; NULLABLE, those that must be
# there, and may be null; IF_THERE, the types of others and of these, where they are not null.
NEEDED = dict.fromkeys(("model", "precision", "metric", "protocol", "prompt_sha256", "run", "kind", "task",
                        "aspect"), str) | {"total_ut_steps": int, "higher_is_better": bool}  # fmt: skip
NULLABLE = ("model_revision", "benchmark_revision", "split", "limit", "judge")
TEXT = ("model_revision", "split", "experiment", "arm", "dataset", "language", "loss", "mean", "benchmark", "part")
IF_THERE = {
    **dict.fromkeys(TEXT, str),
    **dict.fromkeys(("chance", "macro", "majority", "thai_share", "inference_flops_per_token"), int | float),
    **dict.fromkeys(("seed", "trained_ut_steps", "unparsed", "items"), int),
    **dict.fromkeys(("published", "ci95"), list),
}
BY_ITEM = ("numerators", "denominators", "golds", "clusters", "strata")  # arrays of a Result
LOGGED = ("step", "loss", "mean_token_accuracy", "num_tokens", "tokens_per_second", "model_flop_use", "memory_gib")
SCORED = ("id", "bits", "characters", "value", "cluster", "stratum", "gold")  # keys that are read of an item's line


@dataclasses.dataclass
class Run:
    """A training run, as its folder tells it. config, manifest, data: config.yaml, manifest.json, data_report.json, {}
    where they are not there; log: metrics.jsonl by column, each of LOGGED as an array over the logged steps."""

    name: str
    folder: Path
    config: dict
    manifest: dict
    data: dict
    log: dict[str, np.ndarray]
    held_out: list[float]  # the last held-out losses, by depth
    completed: bool

    @property
    def state(self) -> str:
        if self.completed:
            return "complete" if len(self.log["step"]) else "complete, but without its log"
        if not len(self.log["step"]):
            return "no step logged"
        if not math.isfinite(self.log["loss"][-1]):
            return f"failed: loss is not a number at step {self.log['step'][-1]:.0f}"
        total = self.config.get("max_steps", -1)
        return f"not finished: step {self.log['step'][-1]:.0f}" + (f" of {total}" if total > 0 else "")

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of its adapter and its data report, of what is there, by the keys under which results have them."""
        files = {"adapter_sha256": "final_adapter/adapter_model.safetensors", "data_report_sha256": "data_report.json"}
        return {key: file_sha256(self.folder / file) for key, file in files.items() if (self.folder / file).is_file()}

    def disowns(self, study: dict) -> str:
        """Why a result that names this run was made from another adapter or data report than its folder holds; "" if
        it was not."""
        for key, mine in self.hashes.items():
            if (other := study.get(key)) != mine:
                what = "adapter" if key.startswith("adapter") else "data report"
                return f"of another {what} than its run's ({str(other)[:12]}, not {mine[:12]}): evaluate again"
        return ""

    @property
    def tokens(self) -> float:
        """Tokens that it has been trained on; nan without a log."""
        return last(self.log["num_tokens"])

    @property
    def seconds(self) -> np.ndarray:
        """Seconds of training before each line of the log, since the line before it."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(np.diff(self.log["num_tokens"], prepend=0) / self.log["tokens_per_second"], posinf=0)

    @functools.cached_property
    def machines(self) -> list[dict]:
        """Of each line of the log, the record of the start or of the continuation that wrote it: GPU, its rate, and how
        many. A continuation has cut off the lines after its step; the line in which it lies counts as its own."""
        same = {key: self.manifest.get(key) for key in ("gpu", "gpu_tflops")}  # of one that did not record its rate
        later = [(same if at.get("gpu") == same["gpu"] else {}) | at for at in self.manifest.get("continued", [])]
        return [next((at for at in reversed(later) if at["step"] < step), self.manifest) for step in self.log["step"]]

    @property
    def gpu_hours(self) -> float | None:
        """None for a run on a CPU."""
        gpus = np.array([(at.get("processes") or 1) * bool(at.get("gpu")) for at in self.machines], int)
        return float(self.seconds @ gpus) / 3600 if gpus.any() else None

    def flops(self, study: dict) -> float | None:
        """Operations of all its forward and backward passes: as the trainer has counted them, where the log has the
        GPU's FLOP use; else twice those of reading its tokens, which `study`, of a result, has. (A backward pass costs
        as much as the forward one, since frozen weights have no gradient.) None where neither is known."""
        rates = [(at.get("gpu_tflops") or math.nan) * 1e12 * (at.get("processes") or 1) for at in self.machines]
        counted = self.log["model_flop_use"] * self.seconds * np.array(rates, float)
        known, tokens = np.isfinite(counted), np.diff(self.log["num_tokens"], prepend=0)
        if total := float(counted[known].sum()):
            return total * tokens.sum() / tokens[known].sum()
        forward = study.get("inference_flops_per_token")
        return 2 * forward * self.tokens if forward and math.isfinite(self.tokens) else None


def last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


@dataclasses.dataclass
class Result:
    """A result: the block "study" of its file, and of its items, in the file's order: ids; numerators and denominators,
    whose sums' ratio is the score (bits and characters; 1 or 0 and 1); right answers; clusters, the labels that items
    of one passage share; strata, the exams."""

    study: dict
    path: Path
    ids: list[str]
    numerators: np.ndarray
    denominators: np.ndarray
    golds: np.ndarray
    clusters: np.ndarray
    strata: np.ndarray

    @property
    def trained(self) -> int | None:
        """The depth that an adapted model was trained at; None: the base."""
        return self.study["trained_ut_steps"] if self.study["kind"] == "adapter" else None

    @property
    def place(self) -> tuple[str, int]:
        """The model, and the depth it was read at."""
        return self.study["run"], self.study["total_ut_steps"]

    def take(self, ids: list[str]) -> "Result":
        """The result on these items alone, in this order."""
        if ids == self.ids:
            return self
        place = {identity: i for i, identity in enumerate(self.ids)}
        rows = [place[identity] for identity in ids]
        return dataclasses.replace(self, ids=ids, **{name: getattr(self, name)[rows] for name in BY_ITEM})


def check_kinds(study: dict) -> None:
    """Raises ValueError or KeyError: the block "study" of a result lacks a key, or has one that nobody could show."""
    for key in (*NEEDED, *NULLABLE):
        study[key]  # a missing one is named by the KeyError
    present = {key: kind for key, kind in IF_THERE.items() if study.get(key) is not None}
    for key, kind in (NEEDED | present).items():
        if not isinstance(study[key], kind):
            raise ValueError(f"{key} is {str(study[key])[:80]!r}")
    low, high = study.get("ci95") or (0.0, 0.0)
    numbers = [low, high, *(row["value"] for row in study.get("published") or ())]
    texts = [row["benchmark"] for row in study.get("published") or ()]
    texts += [row.get(key, "") for row in study.get("published") or () for key in ("protocol", "source", "mean")]
    if not all(isinstance(number, int | float) for number in numbers) or not all(isinstance(t, str) for t in texts):
        raise ValueError("ci95 or published holds what is no number, or no text")


def read_config(path: Path) -> dict:
    """config.yaml of a run. Raises ValueError: a depth or an arm that no run has."""
    config = read_yaml(path)
    if not isinstance(config.get("total_ut_steps", 1), int):
        raise ValueError("total_ut_steps is not a whole number")
    if config.get("arm", ARMS[0]) not in ARMS:
        raise ValueError(f"arm {config['arm']!r} is unknown")
    return config


def made_with(path: Path) -> dict[tuple[str, str], dict]:
    """With what code and packages results were made, by task and depth; depth "": all of a task. path: manifest.json of
    their folder."""
    tasks = read_json(path, "tasks")["tasks"].items()
    by_depth = ((task, (entry.get("depths") or {"": entry}).items()) for task, entry in tasks)
    return {(task, depth): dict(made) for task, depths in by_depth for depth, made in depths}


def folders(root: Path) -> list[tuple[str, Path]]:
    """(name, folder) of each run in OUTPUT_DIR or RESULTS_DIR; a name is <experiment> or seed<n>/<experiment>."""
    return sorted((path.relative_to(root).as_posix(), path) for path in [*root.glob("*/"), *root.glob("seed*/*/")])


class Reader:
    """The runs and results that are there. left_out: (file, reason) of those that cannot be used; made: `made_with` of
    each folder of results."""

    def __init__(self, output: Path, results: Path):
        self.root = results
        self.left_out: list[tuple[str, str]] = []
        self.runs = {run.name: run for run in (self.run(*named) for named in folders(output)) if run}
        self.answers: list[tuple[dict, Path]] = []  # of generated conversations, rated or not
        files = [path for _, folder in folders(results) for path in sorted(folder.glob("*-ut*.json"))]
        self.made = {there: self.attempt(there / "manifest.json", made_with, {}) for _, there in folders(results)}
        self.results: list[Result] = [r for r in (self.attempt(path, self.result, None) for path in files) if r]

    def attempt(self, path: Path, read: Callable[[Path], Any], otherwise: Any) -> Any:
        """What `read` makes of a file; `otherwise` if it is not there, or cannot be used, which `left_out` then
        says."""
        if not path.exists():
            return otherwise
        try:
            return read(path)
        except KeyError as error:
            self.left_out.append((str(path), f"has no {error}"))
        except (OSError, UserError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            self.left_out.append((str(path), f"cannot be used: {error}"))
        return otherwise

    def lines(self, path: Path, keys: Sequence[str], most: int) -> list[dict]:
        """The lines of a JSONL file, each as a dict of those of `keys` that it has. Equal texts are one object, to save
        memory. Broken lines, as a killed run may leave at its log's end, are counted in `left_out`.
        Raises UserError: a file of more than `most` bytes."""
        rows, broken = [], 0
        with open(regular(path, most), "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    broken += 1
                    continue
                kept = ((key, value) for key, value in row.items() if key in keys)
                rows.append({key: sys.intern(value) if isinstance(value, str) else value for key, value in kept})
        if broken:
            self.left_out.append((str(path), f"{broken} of {broken + len(rows)} lines are not JSON"))
        return rows

    def log(self, path: Path) -> tuple[dict[str, np.ndarray], list[float]]:
        """Columns of metrics.jsonl, and its last held-out losses."""
        rows = self.lines(path, (*LOGGED, "held_out_loss"), WHOLE)
        log = {key: np.array([row.get(key, math.nan) for row in rows], float) for key in LOGGED}
        if not np.isfinite(log["loss"]).all():
            self.left_out.append((str(path), "loss is not a number in some lines"))
        held_out = next((row["held_out_loss"] for row in reversed(rows) if "held_out_loss" in row), [])
        return log, [float(loss) for loss in held_out]

    def run(self, name: str, folder: Path) -> Run | None:
        """The run in a folder; None if it is no run's."""
        config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
        if not config.exists() and not metrics.exists():
            return None
        nothing = {key: np.array([]) for key in LOGGED}, []
        log, held_out = self.attempt(metrics, self.log, nothing)
        done = folder / "completed"
        steps = self.attempt(done, lambda path: read_json(path, "steps")["steps"], None)
        if steps is not None and steps != last(log["step"]):  # a part's numbers would be taken for the run's
            ends = f"ends at step {last(log['step']):.0f}" if len(log["step"]) else "no step can be read there"
            why = f"{ends}, and `completed` says {str(steps)[:20]}: its loss, tokens and cost are not known"
            self.left_out.append((str(metrics), why))
            log, held_out = nothing
        settings = self.attempt(config, read_config, {})
        manifest, data = (self.attempt(folder / f"{file}.json", read_json, {}) for file in ("manifest", "data_report"))
        if settings and "settings" in manifest and not self.attempt(config, lambda _: recorded_settings(folder), None):
            settings = {}  # edited since
        return Run(name, folder, settings, manifest, data, log, held_out, done.exists())

    def result(self, path: Path) -> Result | None:
        """The result in a file and in the file of its items; None if it is of replies that are not rated yet.
        Raises ValueError, KeyError: it is of another format, or its items do not give the score that it states."""
        study = json.loads(regular(path, WHOLE).read_bytes())["study"]
        if study.get("format") != FORMAT:
            raise ValueError(f"format {study.get('format')!r}, and this program reads {FORMAT}; evaluate again")
        check_kinds(study)
        there = path.parent.relative_to(self.root).as_posix()
        if study["run"] != there:  # a copied folder, or one renamed before the run was trained again
            raise ValueError(f"its scores are of the run {study['run']!r}, and it stands in the folder of {there!r}: "
                             "rename the folder back, or evaluate with --again")  # fmt: skip
        if study["metric"] not in METRICS or study["aspect"] not in ASPECTS:
            raise ValueError(f"metric {study['metric']!r} or aspect {study['aspect']!r} is unknown")
        items_file = path.with_suffix(".items.jsonl")
        if study["metric"] == "rating":
            self.answers.append((study, items_file))
            if study["value"] is None:  # one note for all of them
                self.left_out.append((f"{study['task']}-ut*.json", "answers that tools/judge.py has not rated (yet)"))
                return None
        rows = self.lines(items_file, SCORED, ITEMS)
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
        value = study["value"]
        if not math.isfinite(mean) or not abs(mean - value) <= 1e-3 * max(1, abs(value)):  # `not <=` also refuses nan
            raise ValueError(f"the items give {mean:.4f}, the file says {study['value']:.4f}")
        if study["kind"] == "adapter" and not isinstance(study["trained_ut_steps"], int):
            raise ValueError("the depth that it was trained at is not a whole number")
        golds = [row.get("gold") for row in rows]
        clusters = [str(row.get("cluster", row["id"])) for row in rows]
        strata = [sys.intern(str(row.get("stratum"))) for row in rows]
        return Result(study, path, ids, above, below, *(np.array(x, object) for x in (golds, clusters, strata)))


def logged(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole: the last may just be written, or be a stopped run's."""
    found = []
    for line in regular(folder / "metrics.jsonl", WHOLE).read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return found


def progress(folder: Path) -> tuple[str, str, str, str]:
    """What `make status` shows of a run: "step/steps", loss, tokens/s, time left; by the last lines of its log."""
    try:
        *before, last = logged(folder)
        settings = read_yaml(folder / "config.yaml")
    except (OSError, ValueError, UserError):  # not started
        return "-", "-", "-", "-"
    step, rate = last["step"], last["tokens_per_second"]
    total = settings["max_steps"]
    if total < 0:
        total = math.ceil(round(step / last["epoch"]) * settings["num_train_epochs"])
    earlier = before[-1] if before else {"step": 0, "num_tokens": 0}
    pace = (last["num_tokens"] - earlier["num_tokens"]) / rate / (step - earlier["step"])  # seconds a step
    left = timedelta(seconds=round(pace * (total - step)))
    return f"{step}/{total}", f"{last['loss']:.4f}", f"{rate:,.0f}", str(left)


def depth_text(depth: int) -> str:
    return "1 loop" if depth == 1 else f"{depth} loops"


def conversations(reader: Reader) -> list[tuple[str, list[tuple[str, str]]]]:
    """The first two conversations for the report, (prompt, [(model and depth, its first reply)]): of each model at the
    depth it was trained at, with one seed."""

    def first_turns(path: Path) -> list[dict]:
        with open(regular(path), "rb") as file:
            return [json.loads(line)["turns"][0] for line in islice(file, 2)]

    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = set()
    for study, path in reader.answers:
        model = study.get("experiment") or study["run"], study["total_ut_steps"]
        if study["kind"] == "adapter" and study["trained_ut_steps"] != study["total_ut_steps"] or model in seen:
            continue
        seen.add(model)
        for turn in reader.attempt(path, first_turns, []):
            reply = str(turn["reply"]).strip() or TEXTS["answers"]["empty"]
            asked[str(turn["prompt"])].append((f"{model[0]}, {depth_text(model[1])}", reply))
    return list(asked.items())


def about_answers(reader: Reader) -> str:
    """The note under the conversations; for a miniature model also why its replies make no sense."""
    known = [study.get("inference_flops_per_token") or math.inf for study, _ in reader.answers]
    return " ".join(filter(None, (TEXTS["answers"]["note"], why_it_babbles(min(known, default=math.inf)))))


def why_it_babbles(flops: float) -> str:
    """For people who read a miniature model's replies: why they make no sense. "" for a larger model. flops: a
    token."""
    return TEXTS["answers"]["small"].format(millions=f"{flops / 1e6:,.0f}") if flops < SMALL else ""
