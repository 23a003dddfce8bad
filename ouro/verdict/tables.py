"""The report's tables, from runs and results: rows of {column: cell}, for the report, as CSV and as LaTeX."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from ouro.files import printable, spreadsheet
from ouro.verdict.panels import STUDY, Key, Panel, gain_or_change, gaps, signed
from ouro.verdict.rule import Test, Verdict
from ouro.verdict.stats import Estimate, estimate
from ouro.verdict.study import ASPECTS, BASE, METRICS, TEXTS, Reader, Result, Run, depth_text, last

import numpy as np
import pandas as pd
from scipy.stats import binomtest

Cell = str | tuple[float, str]  # text, or (number to sort by, text)
Rows = Iterable[dict[str, Cell]]


class Table:
    """Rows of one table; name, title, note and whether it is folded from texts.yaml, where `values` are filled in."""

    def __init__(self, name: str, rows: Rows, **values: str):
        texts = {"name": name, "note": "", "folded": False} | TEXTS["tables"][name]
        self.name, self.title, self.note = (texts[key].format(**values) for key in ("name", "title", "note"))
        self.folded = texts["folded"]
        # Rows that are the same in all columns, as the base's are for every training set, stand once.
        self.rows = [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """Columns that say the same in all rows, and what; of a single row those that say nothing."""
        cells = {name: {row[name] for row in self.rows} for name in self.columns}
        told = {name: cell if isinstance(cell, str) else cell[1] for name, (cell, *more) in cells.items() if not more}
        return {name: text for name, text in told.items() if len(self.rows) > 1 or text in ("–", "")}

    def texts(self, told: Callable[[str], str] = printable) -> list[list[str]]:
        """The cells; told: how those that are no numbers, and may be of data or models, are written."""
        return [[cell[1] if isinstance(cell, tuple) else told(cell) for cell in row.values()] for row in self.rows]

    def frame(self, told: Callable[[str], str] = printable) -> pd.DataFrame:
        return pd.DataFrame(self.texts(told), columns=self.columns)

    def csv(self) -> str:
        return self.frame(spreadsheet).to_csv(index=False)

    def latex(self) -> str:
        style = self.frame().style.hide(axis="index").format(escape="latex").format_index(axis=1, escape="latex")
        table = style.to_latex(hrules=True, column_format="l" * len(self.columns))
        return f"% {' '.join(printable(self.title).split())}; needs booktabs\n{table.replace('–', '--')}"


def number_cell(value: float | None, form: str = ",.0f", factor: float = 1) -> Cell:
    """What is not known is a dash."""
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return "–"
    return (float(value), f"{value * factor:{form}}")


def value_cell(metric: str, value: float | None) -> Cell:
    """A number in the metric's unit."""
    return number_cell(value, f".{METRICS[metric].decimals}f", METRICS[metric].factor)


def level_cell(metric: str, value: float, low: float, high: float) -> Cell:
    """A number with its interval, in the metric's unit; alone where the interval is not known."""
    told = METRICS[metric].level
    known = math.isfinite(low) and math.isfinite(high)
    return (float(value), told(value) + (f" [{told(low)}, {told(high)}]" if known else ""))


def difference_cell(panel: Panel, e: Estimate | None) -> Cell:
    return "–" if e is None else (float(e.value), signed(panel.metric, e))


def nan_mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def run_rows(runs: Iterable[Run]) -> Rows:
    for run in runs:
        log, seconds = run.log, run.seconds.sum()
        yield {
            "run": run.name,
            "training set": str(run.config.get("dataset", "–")),
            "loops": number_cell(run.config.get("total_ut_steps"), "d"),
            "seed": number_cell(run.config.get("seed"), "d"),
            "state": run.state,
            "steps": number_cell(last(log["step"])),
            "final loss": number_cell(last(log["loss"]), ".4f"),
            "average loss": number_cell(nan_mean(log["loss"]), ".4f"),
            "final token accuracy": number_cell(last(log["mean_token_accuracy"]), ".3f"),
            "average token accuracy": number_cell(nan_mean(log["mean_token_accuracy"]), ".3f"),
            "tokens": number_cell(run.tokens),
            "hours": number_cell(seconds / 3600, ".2f"),
            "GPU-hours": number_cell(run.gpu_hours, ".2f"),
            "tokens/s": number_cell(run.tokens / seconds if seconds else None),
            "model-FLOP use": number_cell(nan_mean(log["model_flop_use"]), ".1%"),
        }


def cost_rows(runs: Iterable[Run], results: Iterable[Result]) -> Rows:
    own = [r.study for r in results if r.trained == r.study["total_ut_steps"]]  # read at the depth trained at
    forward = {study["run"]: study for study in own if study.get("inference_flops_per_token")}
    experiments = defaultdict(list)
    for run in runs:
        if len(run.log["step"]):
            experiments[run.name.rpartition("/")[2]].append(run)
    for name, seeds in sorted(experiments.items()):
        final = np.array([last(run.log["loss"]) for run in seeds])
        spread = f" ± {final.std(ddof=1):.4f}" if len(seeds) > 1 else ""
        study = next((forward[run.name] for run in seeds if run.name in forward), {})
        spent = [run.flops(study) for run in seeds]
        yield {
            "experiment": name,
            "seeds": ", ".join(str(run.config.get("seed", "–")) for run in seeds),
            "final loss": (nan_mean(final), f"{nan_mean(final):.4f}{spread}"),
            "tokens": number_cell(sum(run.tokens for run in seeds)),
            "hours": number_cell(sum(float(run.seconds.sum()) for run in seeds) / 3600, ".2f"),
            "GPU-hours": number_cell(sum(run.gpu_hours or 0 for run in seeds) or None, ".2f"),
            "training FLOPs": number_cell(sum(spent) if all(spent) else None, ".3g"),
            "inference FLOPs/token": number_cell(study.get("inference_flops_per_token"), ".3g"),
            "GiB": number_cell(max(nan_mean(run.log["memory_gib"]) for run in seeds) or None, ".1f"),
            "device": ", ".join(sorted({str(at.get("gpu") or "CPU") for run in seeds for at in run.machines})),
        }


def data_rows(runs: Iterable[Run]) -> Rows:
    for run in runs:
        if not (d := run.data):
            continue
        dropped, licences, per_row = (d.get(k) or {} for k in ("rows_dropped", "licences", "tokens_per_row"))
        thai = ((d.get("tokens_per_unit") or {}).get("Thai") or {}).get("tokens_per_character")
        yield {
            "training set": str(d.get("dataset", "–")),
            "revision": str(d.get("data_revision"))[:20],
            "rows": number_cell(d.get("rows_in")),
            "kept": number_cell(d.get("rows_kept")),
            "dropped": ", ".join(f"{k} {v}" for k, v in dropped.items()) or "0",
            "tokens": number_cell(d.get("tokens")),
            "trained": number_cell(d.get("trained_share"), ".1%"),
            "ends kept": number_cell(d.get("end_token_survival"), ".1%"),
            "tokens/row 5 / 50 / 95 / 100 %": " / ".join(
                f"{per_row.get(p, 0):,}" for p in ("p5", "p50", "p95", "p100")
            ),
            "tokens/Thai character": number_cell(thai, ".2f"),
            "Thai letters": number_cell(d.get("thai_share_of_letters"), ".1%"),
            "licences": ", ".join(f"{name}: {count}" for name, count in licences.items()),
        }


def test_rows(tests: Iterable[Test]) -> Rows:
    """The chain of numbers behind each word: `report.py --explain` prints it."""
    names = {"U": "worth (U)", "X": "beside English (X)", "F": "English kept (F)"}
    tests = list(tests)
    family = sum(test.tested for test in tests)
    for test in tests:
        metric = test.metric
        yield {
            "aspect": ASPECTS[test.aspect],
            "training set": test.dataset,
            "loops": number_cell(test.depth, "d"),
            "quantity": names[test.quantity],
            "word": test.word,
            "value [interval]": (float(test.estimate.value), test.text()),
            "interval of, %": number_cell(100 * (1 - test.level), ".2f") if test.tested else "–",
            "p": number_cell(test.p, ".2g"),
            "p in the family": number_cell(test.adjusted, ".2g"),
            "tests in it": number_cell(family if test.tested else None, "d"),
            "margin": (metric.margin, metric.size(metric.margin)),
            "found 4 times in 5": metric.size(test.smallest) if math.isfinite(test.smallest) else "–",
            "benchmark": test.task,
            "items": number_cell(test.items),
            "clusters": number_cell(test.clusters),
            "seeds": ", ".join(map(str, test.estimate.seeds)),
        }


def arm_rows(found: dict[Key, Panel]) -> Rows:
    for key, panel in found.items():
        for k in panel.depths() if key.arm != STUDY else ():
            worth = panel.worth(k)
            yield {
                "arm": key.arm,
                "condition": key.condition or "–",
                "training set": key.dataset,
                "benchmark": key.task,
                "loops": number_cell(k, "d"),
                "worth against 1 loop": difference_cell(panel, worth),
                "items": number_cell(panel.items),
                "seeds": ", ".join(map(str, worth.seeds)),
            }


def gain_rows(found: dict[Key, Panel]) -> Rows:
    for key, panel in found.items():
        for k in panel.trained if key.arm == STUDY else ():
            if gain := panel.gain(k, k):
                yield {
                    "benchmark": key.task,
                    "training set": key.dataset,
                    "loops": number_cell(k, "d"),
                    "seeds": number_cell(gain.seeds[0], "d"),
                    "base": value_cell(panel.study["metric"], panel.level(panel.base[k])[0]),
                    "adapted": value_cell(panel.study["metric"], panel.level(panel.adapted[k, k])[0]),
                    "gain": difference_cell(panel, gain),
                    "items": number_cell(panel.items),
                }


def gain_matrices(found: dict[Key, Panel]) -> Iterator[Table]:
    """Of each task that a verdict rests on: every adapter at every depth."""
    for key, panel in found.items():
        if panel.study.get("primary") and key.arm == STUDY:
            depths = sorted({depth for _, depth in panel.adapted})
            rows = [
                {"trained at": (k, depth_text(k))}
                | {depth_text(depth): difference_cell(panel, panel.gain(k, depth)) for depth in depths}
                for k in panel.trained
            ]
            what = gain_or_change(panel.study["aspect"]).capitalize()
            yield Table("matrix", rows, what=what, task=key.task, dataset=key.dataset, unit=panel.metric.what)


def ending_cells(studies: list[dict]) -> dict[str, Cell]:
    """How many items had no answer, replies were cut, requests were refused by a server; the mean over seeds."""
    counts = {"no answer": "unparsed", "cut": "cut", "refused": "refused"}
    means = {name: nan_mean(np.array([s.get(key, math.nan) for s in studies], float)) for name, key in counts.items()}
    return {name: number_cell(mean) for name, mean in means.items()}


def benchmark_rows(found: dict[Key, Panel]) -> Rows:
    for (task, dataset, arm, condition), panel in found.items():
        for (trained, depth), cell in panel.cells.items():
            studies, level, metric = panel.sources[trained, depth], panel.level(cell), panel.study["metric"]
            macro = [s["macro"] for s in studies if s.get("macro") is not None]
            told = studies[0] if metric == "accuracy" else {}
            above = None
            if told.get("chance"):
                above = binomtest(round(level[0] * panel.items), panel.items, told["chance"]).pvalue
            yield {
                "benchmark": task,
                "model": dataset if trained else BASE,
                "arm": " ".join((arm, condition)).strip() if trained else "–",
                "trained at": number_cell(trained, "d"),
                "read at": number_cell(depth, "d"),
                "seeds": number_cell(len(studies), "d"),
                "items": number_cell(panel.items),
                "value": level_cell(metric, *level),
                "chance": number_cell(told.get("chance"), ".1f", 100),
                "p against chance": number_cell(above, ".2g"),
                "always the commonest": number_cell(told.get("majority"), ".1f", 100),
                "macro": value_cell(metric, sum(macro) / len(macro) if macro else None),
                "its chance": number_cell(told.get("macro_chance"), ".1f", 100),
                "its commonest": number_cell(told.get("macro_majority"), ".1f", 100),
                **ending_cells(studies),
                "unit": panel.metric.axis,
            }


def gap_rows(found: dict[Key, Panel], left_out: list) -> Rows:
    for key, (thai, english) in gaps(found, left_out).items():
        gap = {where: english.cells[where] - thai.cells[where] for where in thai.cells if key.arm == STUDY}
        for (trained, depth), cell in gap.items():
            base = gap.get((None, depth))
            change = estimate([cell - base]) if trained and base else None
            yield {
                "model": key.dataset if trained else BASE,
                "trained at": number_cell(trained, "d"),
                "read at": number_cell(depth, "d"),
                "seeds": number_cell(len(cell.values), "d"),
                "questions": number_cell(thai.items),
                "Thai": level_cell("accuracy", *thai.level(thai.cells[trained, depth])),
                "English": level_cell("accuracy", *english.level(english.cells[trained, depth])),
                "English minus Thai": difference_cell(thai, estimate([cell])),
                "change by training": difference_cell(thai, change),
            }


def baseline_rows(results: Iterable[Result]) -> Rows:
    for study in (result.study for result in results if result.study["kind"] == "baseline"):
        metric, unknown = study["metric"], (math.nan, math.nan)
        micro = level_cell(metric, study["value"], *(study.get("ci95") or unknown))
        published = [row for row in study.get("published") or () if row["benchmark"] == study["benchmark"]]
        published = [] if study.get("part") else published  # a score of some items is not set beside one of all
        for row in published or [{}]:
            mean = row.get("mean", study.get("mean", "micro"))
            yield {
                "model": study["run"],
                "read at": number_cell(study["total_ut_steps"], "d"),
                "benchmark": study["task"],
                "protocol": str(study["protocol"]),
                "items": number_cell(study["items"]),
                "mean": mean,
                "measured here": value_cell(metric, study.get("macro")) if mean == "macro" else micro,
                "published": number_cell(row.get("value"), ".4g", METRICS[metric].factor),
                "unit": METRICS[metric].axis,
                "its protocol": row.get("protocol", "–"),
                "source": row.get("source", "–"),
            }


def score_rows(results: Iterable[Result]) -> Rows:
    for study in (result.study for result in results):
        low, high = study.get("ci95") or (None, None)
        yield {
            "run": study["run"],
            "benchmark": study["task"],
            "read at": number_cell(study["total_ut_steps"], "d"),
            "value": value_cell(study["metric"], study["value"]),
            "low": value_cell(study["metric"], low),
            "high": value_cell(study["metric"], high),
            "unit": METRICS[study["metric"]].axis,
            "items": number_cell(study["items"]),
            **ending_cells([study]),
            "replies in Thai": number_cell(study.get("thai_share"), ".1%"),
        }


def tables(reader: Reader, found: dict[Key, Panel], made: list[Verdict]) -> list[Table]:
    """Those for which there is something, in the report's order."""
    runs, results = reader.runs.values(), reader.results
    rows = {
        "benchmarks": benchmark_rows(found),
        "gap": gap_rows(found, reader.left_out),
        "baselines": baseline_rows(results),
        "runs": run_rows(runs),
        "cost": cost_rows(runs, results),
        "data": data_rows(runs),
        "scores": score_rows(results),
    }
    shown = [Table("tests", test_rows(test for verdict in made for test in verdict.tests))]
    shown += [Table("arms", arm_rows(found)), Table("gains", gain_rows(found)), *gain_matrices(found)]
    shown += [Table(name, some) for name, some in rows.items()]
    left_out = [{"file": file, "why": why} for file, why in sorted(reader.left_out)]  # the gap's pairs are among them
    shown.append(Table("left-out", left_out))
    return [table for table in shown if table.rows]
