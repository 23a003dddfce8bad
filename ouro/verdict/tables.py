"""The report's tables, from runs and results."""

import csv
import dataclasses
import html
import io
import json
import math
import re
from collections import defaultdict
from pathlib import Path

from ouro.verdict import stats
from ouro.verdict.stats import Estimate
from ouro.verdict.study import BASE, METRICS, Panel, Reader, Run, gaps, loops, over_exams

import numpy as np


@dataclasses.dataclass
class Table:
    """Cells are text, or (number to sort by, text)."""

    name: str
    title: str
    columns: list[str]
    rows: list[list]
    note: str = ""
    folded: bool = False

    def texts(self) -> list[list[str]]:
        return [[cell[1] if isinstance(cell, tuple) else str(cell) for cell in row] for row in self.rows]

    def markdown(self) -> str:
        def line(cells) -> str:
            return "| " + " | ".join(markdown(cell) for cell in cells) + " |\n"

        note = f"{markdown(self.note)}\n\n" if self.note else ""
        rule = "|" + "---|" * len(self.columns) + "\n"
        return f"## {self.title}\n\n{note}{line(self.columns)}{rule}" + "".join(map(line, self.texts())) + "\n"

    def html(self) -> str:
        head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in self.columns)
        body = []
        for row in self.rows:
            cells = []
            for cell in row:
                if isinstance(cell, tuple):
                    cells.append(f'<td class="n" data-v="{cell[0]!r}">{html.escape(cell[1])}</td>')
                else:
                    number_missing = ' class="n"' if cell == "–" else ""
                    cells.append(f"<td{number_missing}>{html.escape(str(cell))}</td>")
            body.append(f"<tr>{''.join(cells)}</tr>\n")
        table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{''.join(body)}</tbody></table>"
        table = f'<div class="box" tabindex="0">{table}</div>'
        if self.folded:
            table = f"<details><summary>{len(self.rows)} rows</summary>{table}</details>"
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return f'<section id="{self.name}"><h2>{html.escape(self.title)}</h2>{note}{table}</section>\n'

    def csv(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.texts()])
        return file.getvalue()

    def latex(self) -> str:
        lines = [" & ".join(map(latex, row)) + r" \\" for row in (self.columns, *self.texts())]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        begin = f"% {self.title}; needs booktabs\n\\begin{{tabular}}{{{'l' * len(self.columns)}}}"
        return f"{begin}\n{body}\n\\end{{tabular}}\n"


def markdown(text: str) -> str:
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False)).replace("\\_", "_")


def latex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
    return "".join(({"\\": r"\textbackslash{}"} | special).get(c, c) for c in text)


def number(value: float | None, form: str = ",.0f", factor: float = 1) -> tuple | str:
    """A cell; nothing known: a dash."""
    if value is None or isinstance(value, str | list | dict) or not math.isfinite(value):
        return "–"
    return (float(value), f"{value * factor:{form}}")


def interval(panel: Panel, e: Estimate | None, signed: bool = True) -> tuple | str:
    if e is None:
        return "–"
    if signed:
        return (float(e.value), panel.signed(e))
    return (float(e.value), f"{panel.show(e.value)} [{panel.show(e.low)}, {panel.show(e.high)}]")


def nan_mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def last(values: np.ndarray) -> float:
    return float(values[-1]) if len(values) else math.nan


def runs_table(runs: list[Run]) -> Table:
    columns = (
        "run,training set,loops,seed,state,steps,final loss,average loss,final token accuracy,average token accuracy"
    )
    columns += ",tokens,hours,GPU-hours,tokens/s,model-FLOP use"
    rows = []
    for run in runs:
        log, seconds = run.log, run.seconds.sum()
        tokens, gpus = (
            last(log["num_tokens"]),
            (run.manifest.get("processes") or 1) if run.manifest.get("gpu") else None,
        )
        rows.append(
            [
                run.name,
                str(run.config.get("dataset", "–")),
                number(run.config.get("total_ut_steps"), "d"),
                number(run.config.get("seed"), "d"),
                run.state,
                number(last(log["step"])),
                number(last(log["loss"]), ".4f"),
                number(nan_mean(log["loss"]), ".4f"),
                number(last(log["mean_token_accuracy"]), ".3f"),
                number(nan_mean(log["mean_token_accuracy"]), ".3f"),
                number(tokens),
                number(seconds / 3600, ".2f"),
                number(gpus and seconds * gpus / 3600, ".2f"),
                number(tokens / seconds if seconds else None),
                number(nan_mean(log["model_flop_use"]), ".1%"),
            ]
        )
    note = "Averages are over the logged steps. Hours are the steps' own, without loading and saving."
    return Table("runs", "Training runs", columns.split(","), rows, note)


def training_flops(run: Run | None, study: dict) -> float | None:
    """As logged; else twice the forward pass of its tokens, for frozen weights have no gradient of their own."""
    if run is None:
        return None
    if run.flops:
        return run.flops
    forward, tokens = study.get("inference_flops_per_token"), last(run.log["num_tokens"])
    return 2 * forward * tokens if forward and math.isfinite(tokens) else None


def cost_table(reader: Reader, found: dict[tuple[str, str], Panel]) -> Table:
    forward = {}
    for panel in found.values():
        for (trained, depth), sources in panel.sources.items():
            if trained == depth:
                forward |= {study["run"]: study for study in sources if study.get("inference_flops_per_token")}
    groups = defaultdict(list)
    for run in reader.runs.values():
        if len(run.log["step"]):
            groups[run.experiment].append(run)
    rows = []
    for name, runs in sorted(groups.items()):
        final = np.array([last(run.log["loss"]) for run in runs])
        spread = f" ± {final.std(ddof=1):.4f}" if len(runs) > 1 else ""
        study = next((forward[run.name] for run in runs if run.name in forward), {})
        spent = [training_flops(run, study) for run in runs]
        hours = sum(float(r.seconds.sum()) * (r.manifest.get("processes") or 1) for r in runs if r.manifest.get("gpu"))
        rows.append(
            [
                name,
                ", ".join(str(run.config.get("seed", "–")) for run in runs),
                (nan_mean(final), f"{nan_mean(final):.4f}{spread}"),
                number(sum(last(run.log["num_tokens"]) for run in runs)),
                number(sum(float(run.seconds.sum()) for run in runs) / 3600, ".2f"),
                number(hours / 3600 or None, ".2f"),
                number(sum(spent) if all(spent) else None, ".3g"),
                number(study.get("inference_flops_per_token"), ".3g"),
                number(max(nan_mean(run.log["memory_gib"]) for run in runs) or None, ".1f"),
                ", ".join(sorted({str(run.manifest.get("gpu") or "CPU") for run in runs})),
            ]
        )
    columns = "experiment,seeds,final loss,tokens,hours,GPU-hours,training FLOPs,inference FLOPs/token,GiB,device"
    note = "Sums over the seeds. Training FLOPs as counted in training, else estimated as twice the forward pass."
    return Table("cost", "Cost", columns.split(","), rows, note)


def data_table(runs: list[Run]) -> Table:
    rows, seen = [], set()
    for run in runs:
        d, per_row = run.data, run.data.get("tokens_per_row") or {}
        key = json.dumps(
            [d.get("dataset"), d.get("data_revision"), d.get("settings"), d.get("rows_kept")], sort_keys=True
        )
        if not d or key in seen:
            continue
        seen.add(key)
        dropped = ", ".join(f"{k} {v}" for k, v in (d.get("rows_dropped") or {}).items()) or "0"
        thai = ((d.get("tokens_per_unit") or {}).get("Thai") or {}).get("tokens_per_character")
        licences = ", ".join(f"{name}: {count}" for name, count in (d.get("licences") or {}).items())
        rows.append(
            [
                str(d.get("dataset", "–")),
                str(d.get("data_revision"))[:20],
                number(d.get("rows_in")),
                number(d.get("rows_kept")),
                dropped,
                number(d.get("tokens")),
                number(d.get("trained_share"), ".1%"),
                number(d.get("end_token_survival"), ".1%"),
                " / ".join(f"{per_row.get(p, 0):,}" for p in ("p5", "p50", "p95", "p100")),
                number(thai, ".2f"),
                number(d.get("thai_share_of_letters"), ".1%"),
                licences,
            ]
        )
    columns = "training set,revision,rows,kept,dropped,tokens,trained,ends kept,tokens/row 5 / 50 / 95 / 100 %"
    columns += ",tokens/Thai character,Thai letters,licences"
    return Table("data", "Training data", columns.split(","), rows)


def gain_tables(found: dict[tuple[str, str], Panel]) -> list[Table]:
    gains, matrices = [], []
    for (task, dataset), panel in found.items():
        inter = {k: e for k in panel.trained if k > 1 and (e := panel.interaction(k))}
        p = dict(zip(inter, stats.holm([float(e.p) for e in inter.values()]), strict=True))
        for k in panel.trained:
            if (gain := panel.gain(k, k)) is None:
                continue
            many = inter.get(k)
            gains.append(
                [
                    task,
                    dataset,
                    (k, str(k)),
                    (gain.seeds, str(gain.seeds)),
                    number(panel.base[k].values[0], f".{panel.decimals}f", panel.factor),
                    number(panel.adapted[k, k].values.mean(), f".{panel.decimals}f", panel.factor),
                    interval(panel, gain),
                    number(gain.effect, ".2f"),
                    interval(panel, many),
                    number(p.get(k), ".3g"),
                    number(many and float(many.detectable(len(inter))), f".{panel.decimals}f", panel.factor),
                    panel.unit,
                ]
            )
        depths = sorted({depth for _, depth in panel.adapted})
        cells = [
            [(k, loops(k)), *(interval(panel, panel.gain(k, depth)) for depth in depths)]
            for k in panel.trained
            if depths
        ]
        if cells and panel.study.get("primary"):
            title = f"Gain by depth: {task}, {dataset}"
            note = (
                f"Rows: trained depth, columns: depth read. In {panel.unit}; positive: better than the base read there."
            )
            matrices.append(Table(f"matrix-{task}-{dataset}", title, ["trained at", *map(loops, depths)], cells, note))
    columns = (
        "benchmark,training set,loops,seeds,base,adapted,gain,effect,gain minus gain at 1 loop,Holm p,smallest found"
    )
    columns += ",unit"
    note = (
        "Trained and read at the same depth, against the base at that depth; positive is better. Intervals: 95 %, "
        "paired by item, over items and seeds. Effect: in standard deviations of an item's difference. "
        "Smallest found: the difference of gains that would be found four times in five."
    )
    return [Table("gains", "Gain over the base at the same depth", columns.split(","), gains, note), *matrices]


def benchmark_table(found: dict[tuple[str, str], Panel]) -> Table:
    rows, done = [], set()
    for (task, dataset), panel in found.items():
        cells = [(BASE, None, depth, cell, [panel.base_sources[depth]]) for depth, cell in panel.base.items()]
        cells += [(dataset, k, depth, cell, panel.sources[k, depth]) for (k, depth), cell in panel.adapted.items()]
        for name, trained, depth, cell, studies in cells:
            if (task, name, trained, depth, studies[0]["precision"]) in done:
                continue
            done.add((task, name, trained, depth, studies[0]["precision"]))
            e, study = panel.estimate(cell), studies[0]
            chance, right = study.get("chance"), round(float(e.value) * panel.items)
            scored = study["metric"] == "accuracy"
            above = stats.binomial_test(right, panel.items, chance) if scored and chance else None
            unread = nan_mean(np.array([s.get("unparsed", math.nan) for s in studies], float))
            macro = [s["macro"] for s in studies if s.get("macro") is not None]
            rows.append(
                [
                    task,
                    name,
                    number(trained, "d"),
                    (depth, str(depth)),
                    (len(studies), str(len(studies))),
                    (panel.items, f"{panel.items:,}"),
                    interval(panel, e, signed=False),
                    number(chance, ".1f", 100) if scored else "–",
                    number(above, ".2g"),
                    number(study.get("majority"), ".1f", 100) if scored else "–",
                    number(sum(macro) / len(macro) if macro else None, f".{panel.decimals}f", panel.factor),
                    number(over_exams(study, "chance"), ".1f", 100) if scored else "–",
                    number(over_exams(study, "majority"), ".1f", 100) if scored else "–",
                    number(unread, ".0f"),
                    panel.axis,
                ]
            )
    columns = "benchmark,model,trained at,read at,seeds,items,value,chance,p against chance,always the commonest"
    columns += ",macro,its chance,its commonest,no answer,unit"
    note = (
        "Value: all items alike (micro), with its 95 % interval over items (and seeds). p against chance: exact "
        "binomial, two-sided. Macro: the mean over exams (MT-Bench: categories), beside the same mean of chance and of "
        "each exam's commonest answer."
    )
    return Table("benchmarks", "Benchmarks", columns.split(","), rows, note)


def gap_table(reader: Reader, found: dict[tuple[str, str], Panel]) -> Table:
    rows, done = [], set()
    for dataset, (thai, english, gap) in gaps(found, reader.left_out).items():
        for trained, depth in [*((None, depth) for depth in gap.base), *gap.adapted]:
            name = dataset if trained else BASE
            if (name, trained, depth, gap.study["precision"]) in done:
                continue
            done.add((name, trained, depth, gap.study["precision"]))
            cells = [panel.adapted[trained, depth] if trained else panel.base[depth] for panel in (thai, english, gap)]
            levels = [interval(gap, gap.estimate(cell), signed=False) for cell in cells[:2]]
            e = gap.estimate(cells[2])
            rows.append([name, number(trained, "d"), number(depth, "d"), number(e.seeds, "d"), number(gap.items)])
            rows[-1] += [*levels, interval(gap, e), interval(gap, gap.gain(trained, depth))]
    columns = "model,trained at,read at,seeds,questions,Thai,English,English minus Thai,change by training"
    note = (
        "Belebele, accuracy in % on the same questions in both languages; the gap is positive where English is ahead. "
        "Change by training: the adapted models' gap minus the base's at the same depth; negative: the gap is smaller, "
        "be it because Thai rose or because English fell. Intervals: 95 %, paired by question, over questions and "
        "seeds. A description: no verdict rests on it."
    )
    return Table("gap", "From English to Thai: the same questions", columns.split(","), rows, note)


def published(study: dict) -> list[dict]:
    """The baseline's published scores on this benchmark."""
    told = study.get("published")
    named = [row for row in told if isinstance(row, dict)] if isinstance(told, list) else []
    return [row for row in named if row.get("benchmark", "") == study.get("benchmark")]


def baselines_table(reader: Reader) -> Table:
    rows = []
    for result in reader.results:
        study = result.study
        if study["kind"] != "baseline":
            continue
        _, factor, decimals, axis = METRICS[study["metric"]]
        low, high = study.get("ci95") or (math.nan, math.nan)
        shown = f"{study['value'] * factor:.{decimals}f} [{low * factor:.{decimals}f}, {high * factor:.{decimals}f}]"
        if isinstance(study.get("published"), dict):
            why = "its published score is in the older form, without benchmark and mean: not shown"
            reader.left_out.append((str(result.path.parent), why))
        for row in published(study) or [{}]:
            mean = str(row.get("mean") or "micro")
            macro = number(study.get("macro"), f".{decimals}f", factor)
            rows.append([study["run"], study["task"], str(study["protocol"]), number(study["items"]), mean])
            rows[-1] += [macro if mean == "macro" else (study["value"], shown), number(row.get("value"), ".4g", factor)]
            rows[-1] += [axis, str(row.get("protocol") or "–"), str(row.get("source") or "–")]
    columns = "model,benchmark,protocol,items,mean,measured here,published,unit,its protocol,source"
    note = (
        "Measured here: all items alike (micro), with its 95 % interval, or, where the published score is a mean over "
        "exams or categories, that mean (macro). Where the protocols differ, so may the scores."
    )
    return Table("baselines", "Baselines", columns.split(","), rows, note)


def scores_table(reader: Reader) -> Table:
    rows = []
    for result in reader.results:
        study = result.study
        _, factor, decimals, axis = METRICS[study["metric"]]
        low, high = study.get("ci95") or (math.nan, math.nan)
        rows.append([study["run"], study["task"], (study["total_ut_steps"], str(study["total_ut_steps"]))])
        rows[-1] += [number(x, f".{decimals}f", factor) for x in (study["value"], low, high)]
        rows[-1] += [
            axis,
            number(study["items"]),
            number(study.get("unparsed")),
            number(study.get("thai_share"), ".1%"),
        ]
    columns = "run,benchmark,read at,value,low,high,unit,items,no answer,replies in Thai"
    return Table("scores", "Every result", columns.split(","), rows, folded=True)


def tables(reader: Reader, found: dict[tuple[str, str], Panel]) -> list[Table]:
    runs = list(reader.runs.values())
    made = [*gain_tables(found), benchmark_table(found), gap_table(reader, found), baselines_table(reader)]
    made += [runs_table(runs), cost_table(reader, found), data_table(runs), scores_table(reader)]
    left = sorted(set(reader.left_out))
    made.append(Table("left-out", "What was left out, and why", ["file", "why"], [list(row) for row in left]))
    return [table for table in made if table.rows]


def replies(path: Path, count: int) -> list[dict]:
    """The first items of a file of conversations."""
    with open(path, "rb") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def samples(reader: Reader, count: int = 2) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(who, reply)]) of the first conversations: each model at the depth it was trained at, one seed."""
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    seen = set()
    for study, path in reader.answers:
        experiment, depth = study.get("experiment") or study.get("run"), study.get("total_ut_steps")
        if study.get("kind") == "adapter" and study.get("trained_ut_steps") != depth or (experiment, depth) in seen:
            continue
        seen.add((experiment, depth))
        try:
            for item in replies(path, count):
                turn = item["turns"][0]
                asked[str(turn["prompt"])].append((f"{experiment}, {loops(depth)}", str(turn["reply"])))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            reader.left_out.append((str(path), f"no sample: {type(error).__name__} {error}"))
    return list(asked.items())
