"""The report's tables, from runs and results: rows of {column: cell}, for the report, as CSV and as LaTeX."""

import dataclasses
import json
import math
from collections import defaultdict

from ouro.verdict.rule import Differences
from ouro.verdict.stats import Estimate
from ouro.verdict.study import BASE, METRICS, Panel, Reader, Run, depth_text, gaps, last

import numpy as np
import pandas as pd
from scipy.stats import binomtest

Cell = str | tuple[float, str]  # text, or (number to sort by, text)


@dataclasses.dataclass
class Table:
    """`folded`: closed in report.html, and not in RESULTS.md."""

    name: str
    title: str
    rows: list[dict[str, Cell]]
    note: str = ""
    folded: bool = False

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])

    def texts(self) -> list[list[str]]:
        return [[cell[1] if isinstance(cell, tuple) else cell for cell in row.values()] for row in self.rows]

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame(self.texts(), columns=self.columns)

    def csv(self) -> str:
        return self.frame().to_csv(index=False)

    def latex(self) -> str:
        style = self.frame().style.hide(axis="index").format(escape="latex").format_index(axis=1, escape="latex")
        table = style.to_latex(hrules=True, column_format="l" * len(self.columns))
        return f"% {self.title}; needs booktabs\n{table.replace('–', '--')}"


def number_cell(value: float | None, form: str = ",.0f", factor: float = 1) -> Cell:
    """What is not known is a dash."""
    if not isinstance(value, int | float | np.number) or not math.isfinite(value):
        return "–"
    return (float(value), f"{value * factor:{form}}")


def value_cell(panel: Panel, value: float | None) -> Cell:
    """A number in the panel's unit."""
    return number_cell(value, f".{panel.decimals}f", panel.factor)


def level_cell(panel: Panel, e: Estimate) -> Cell:
    return (float(e.value), f"{panel.show(e.value)} [{panel.show(e.low)}, {panel.show(e.high)}]")


def difference_cell(panel: Panel, e: Estimate | None) -> Cell:
    return "–" if e is None else (float(e.value), panel.signed(e))


def nan_mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def runs_table(runs: list[Run]) -> Table:
    rows = []
    for run in runs:
        log, seconds = run.log, run.seconds.sum()
        rows.append(
            {
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
        )
    note = "Averages are over the logged steps. Hours are the steps' own, without loading and saving."
    return Table("runs", "Training runs", rows, note)


def cost_table(reader: Reader, found: dict[tuple[str, str], Panel]) -> Table:
    forward = {}  # by run, a result's block that says what a token costs at the depth that the run was trained at
    for panel in found.values():
        for (trained, depth), sources in panel.sources.items():
            if trained == depth:
                forward |= {study["run"]: study for study in sources if study.get("inference_flops_per_token")}
    experiments = defaultdict(list)
    for run in reader.runs.values():
        if len(run.log["step"]):
            experiments[run.experiment].append(run)
    rows = []
    for name, runs in sorted(experiments.items()):
        final = np.array([last(run.log["loss"]) for run in runs])
        spread = f" ± {final.std(ddof=1):.4f}" if len(runs) > 1 else ""
        study = next((forward[run.name] for run in runs if run.name in forward), {})
        spent = [run.flops(study) for run in runs]
        rows.append(
            {
                "experiment": name,
                "seeds": ", ".join(str(run.config.get("seed", "–")) for run in runs),
                "final loss": (nan_mean(final), f"{nan_mean(final):.4f}{spread}"),
                "tokens": number_cell(sum(run.tokens for run in runs)),
                "hours": number_cell(sum(float(run.seconds.sum()) for run in runs) / 3600, ".2f"),
                "GPU-hours": number_cell(sum(run.gpu_hours or 0 for run in runs) or None, ".2f"),
                "training FLOPs": number_cell(sum(spent) if all(spent) else None, ".3g"),
                "inference FLOPs/token": number_cell(study.get("inference_flops_per_token"), ".3g"),
                "GiB": number_cell(max(nan_mean(run.log["memory_gib"]) for run in runs) or None, ".1f"),
                "device": ", ".join(sorted({str(run.manifest.get("gpu") or "CPU") for run in runs})),
            }
        )
    note = "Sums over the seeds. Training FLOPs as counted in training, else estimated as twice the forward pass."
    return Table("cost", "Cost", rows, note)


def data_table(runs: list[Run]) -> Table:
    rows = {}  # one for all runs on the same rows
    for run in runs:
        if not (d := run.data):
            continue
        key = json.dumps([d.get(k) for k in ("dataset", "data_revision", "settings", "rows_kept")], sort_keys=True)
        dropped, licences, per_row = (d.get(k) or {} for k in ("rows_dropped", "licences", "tokens_per_row"))
        thai = ((d.get("tokens_per_unit") or {}).get("Thai") or {}).get("tokens_per_character")
        rows[key] = rows.get(key) or {
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
    return Table("data", "Training data", list(rows.values()))


def gains_table(found: dict[tuple[str, str], Panel]) -> Table:
    rows = []
    for (task, dataset), panel in found.items():
        differences = Differences(panel)
        for k, gain in differences.gains.items():
            more = differences.interaction.get(k)
            rows.append(
                {
                    "benchmark": task,
                    "training set": dataset,
                    "loops": number_cell(k, "d"),
                    "seeds": number_cell(gain.seeds, "d"),
                    "base": value_cell(panel, panel.base[k].values[0]),
                    "adapted": value_cell(panel, panel.adapted[k, k].values.mean()),
                    "gain": difference_cell(panel, gain),
                    "effect": number_cell(float(gain.effect), ".2f"),
                    "gain minus gain at 1 loop": difference_cell(panel, more),
                    "Holm p": number_cell(differences.interaction_p.get(k), ".3g"),
                    "smallest found": value_cell(panel, more and float(more.detectable(len(differences.interaction)))),
                    "unit": panel.unit,
                }
            )
    note = (
        "Trained and read at the same depth, against the base at that depth; positive is better. Intervals: 95 %, "
        "paired by item, over items and seeds. Effect: in standard deviations of an item's difference. "
        "Smallest found: the difference of gains that would be found four times in five."
    )
    return Table("gains", "Gain over the base at the same depth", rows, note)


def gain_matrices(found: dict[tuple[str, str], Panel]) -> list[Table]:
    """Of each task that a verdict rests on: every adapter at every depth."""
    matrices = []
    for (task, dataset), panel in found.items():
        if not panel.study.get("primary"):
            continue
        depths = sorted({depth for _, depth in panel.adapted})
        rows = [
            {"trained at": (k, depth_text(k))}
            | {depth_text(depth): difference_cell(panel, panel.gain(k, depth)) for depth in depths}
            for k in panel.trained
        ]
        note = f"Rows: trained depth, columns: depth read. In {panel.unit}; positive: better than the base read there."
        matrices.append(Table(f"matrix-{task}-{dataset}", f"Gain by depth: {task}, {dataset}", rows, note))
    return matrices


def models(dataset: str, panel: Panel) -> list[tuple[str, int | None, int]]:
    """(model, trained depth, depth read): the base, which has no trained depth, and the adapted models."""
    return [(BASE, None, depth) for depth in panel.base] + [(dataset, *depths) for depths in panel.adapted]


def benchmark_table(found: dict[tuple[str, str], Panel]) -> Table:
    rows = {}  # the base has one for all training sets
    for (task, dataset), panel in found.items():
        for name, trained, depth in models(dataset, panel):
            cell = panel.adapted[trained, depth] if trained else panel.base[depth]
            studies = panel.sources[trained, depth] if trained else [panel.base_sources[depth]]
            study, e = studies[0], panel.estimate(cell)
            macro = [s["macro"] for s in studies if s.get("macro") is not None]
            told = study if study["metric"] == "accuracy" else {}
            above = None
            if told.get("chance"):
                above = binomtest(round(float(e.value) * panel.items), panel.items, told["chance"]).pvalue
            row = {
                "benchmark": task,
                "model": name,
                "trained at": number_cell(trained, "d"),
                "read at": number_cell(depth, "d"),
                "seeds": number_cell(len(studies), "d"),
                "items": number_cell(panel.items),
                "value": level_cell(panel, e),
                "chance": number_cell(told.get("chance"), ".1f", 100),
                "p against chance": number_cell(above, ".2g"),
                "always the commonest": number_cell(told.get("majority"), ".1f", 100),
                "macro": value_cell(panel, sum(macro) / len(macro) if macro else None),
                "its chance": number_cell(told.get("macro_chance"), ".1f", 100),
                "its commonest": number_cell(told.get("macro_majority"), ".1f", 100),
                "no answer": number_cell(nan_mean(np.array([s.get("unparsed", math.nan) for s in studies], float))),
                "unit": panel.axis,
            }
            rows.setdefault((task, name, trained, depth, study["precision"]), row)
    note = (
        "Value: all items alike (micro), with its 95 % interval over items (and seeds). p against chance: exact "
        "binomial, two-sided. Macro: the mean over exams (MT-Bench: categories), beside the same mean of chance and of "
        "each exam's commonest answer."
    )
    return Table("benchmarks", "Benchmarks", list(rows.values()), note)


def gap_table(reader: Reader, found: dict[tuple[str, str], Panel]) -> Table:
    rows = {}
    for dataset, panels in gaps(found, reader.left_out).items():
        gap = panels[-1]
        for name, trained, depth in models(dataset, gap):
            cells = [panel.adapted[trained, depth] if trained else panel.base[depth] for panel in panels]
            thai, english, e = map(gap.estimate, cells)
            row = {
                "model": name,
                "trained at": number_cell(trained, "d"),
                "read at": number_cell(depth, "d"),
                "seeds": number_cell(e.seeds, "d"),
                "questions": number_cell(gap.items),
                "Thai": level_cell(gap, thai),
                "English": level_cell(gap, english),
                "English minus Thai": difference_cell(gap, e),
                "change by training": difference_cell(gap, gap.gain(trained, depth)),
            }
            rows.setdefault((name, trained, depth, gap.study["precision"]), row)
    note = (
        "Belebele, accuracy in % on the same questions in both languages; the gap is positive where English is ahead. "
        "Change by training: the adapted models' gap minus the base's at the same depth; negative: the gap is smaller, "
        "be it because Thai rose or because English fell. Intervals: 95 %, paired by question, over questions and "
        "seeds. A description: no verdict rests on it."
    )
    return Table("gap", "From English to Thai: the same questions", list(rows.values()), note)


def baselines_table(reader: Reader) -> Table:
    rows = []
    for study in (result.study for result in reader.results if result.study["kind"] == "baseline"):
        _, factor, decimals, axis = METRICS[study["metric"]]
        low, high = study.get("ci95") or (math.nan, math.nan)
        micro = f"{study['value'] * factor:.{decimals}f} [{low * factor:.{decimals}f}, {high * factor:.{decimals}f}]"
        macro = number_cell(study.get("macro"), f".{decimals}f", factor)
        published = [row for row in study.get("published") or [] if row["benchmark"] == study["benchmark"]]
        for row in published or [{}]:
            mean = row.get("mean", "micro")
            rows.append(
                {
                    "model": study["run"],
                    "benchmark": study["task"],
                    "protocol": str(study["protocol"]),
                    "items": number_cell(study["items"]),
                    "mean": mean,
                    "measured here": macro if mean == "macro" else (study["value"], micro),
                    "published": number_cell(row.get("value"), ".4g", factor),
                    "unit": axis,
                    "its protocol": row.get("protocol", "–"),
                    "source": row.get("source", "–"),
                }
            )
    note = (
        "Measured here: all items alike (micro), with its 95 % interval, or, where the published score is a mean over "
        "exams or categories, that mean (macro). Where the protocols differ, so may the scores."
    )
    return Table("baselines", "Baselines", rows, note)


def scores_table(reader: Reader) -> Table:
    rows = []
    for study in (result.study for result in reader.results):
        _, factor, decimals, axis = METRICS[study["metric"]]
        low, high = study.get("ci95") or (math.nan, math.nan)
        rows.append(
            {
                "run": study["run"],
                "benchmark": study["task"],
                "read at": number_cell(study["total_ut_steps"], "d"),
                "value": number_cell(study["value"], f".{decimals}f", factor),
                "low": number_cell(low, f".{decimals}f", factor),
                "high": number_cell(high, f".{decimals}f", factor),
                "unit": axis,
                "items": number_cell(study["items"]),
                "no answer": number_cell(study.get("unparsed")),
                "replies in Thai": number_cell(study.get("thai_share"), ".1%"),
            }
        )
    return Table("scores", "Every result", rows, folded=True)


def tables(reader: Reader, found: dict[tuple[str, str], Panel]) -> list[Table]:
    """Those for which there is something, in the report's order."""
    runs = list(reader.runs.values())
    made = [gains_table(found), *gain_matrices(found), benchmark_table(found), gap_table(reader, found)]
    made += [baselines_table(reader), runs_table(runs), cost_table(reader, found), data_table(runs)]
    made.append(scores_table(reader))
    left = [{"file": file, "why": why} for file, why in sorted(set(reader.left_out))]
    made.append(Table("left-out", "What was left out, and why", left))
    return [table for table in made if table.rows]
