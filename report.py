"""The answer: every run and result there is -> RESULTS.md, report.html, plots and tables for a paper, and a verdict.

    python report.py                                        # reads output/ and results/, whatever is there
    python report.py --out site --csv --latex               # report elsewhere; tables as files too
    python report.py --compare exp2-wangchan-ut1:1 exp1-wangchan-ut4:4 > appendix.md      # two runs, item by item

Reads OUTPUT_DIR/<run> and RESULTS_DIR/<run> (with seeds: seed<n>/<run>). Writes OUT/RESULTS.md, OUT/report.html (one
file, no network) and RESULTS_DIR/report/: each plot as PNG and SVG, verdict.json, and the tables that were asked for.
The same inputs give the same bytes. What could not be used is listed in the report, with the reason.
"""

import argparse
import base64
import csv
import dataclasses
import gc
import hashlib
import html
import io
import json
import math
import os
import re
import textwrap
from collections import defaultdict
from pathlib import Path

from settings import UserError, call, resolve, write_atomic, write_json

import numpy as np

import stats
from plots import CAPTIONS, draw, render
from stats import Estimate
from study import (
    ASPECTS,
    BASE,
    MAX_ITEMS,
    METRICS,
    Panel,
    Reader,
    Run,
    Verdict,
    gaps,
    loops,
    over_exams,
    panels,
    verdicts,
)

TITLE = "Does looping help a language model learn Thai?"

# ----------------------------------------------------------------------------------------------------------- tables


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
        "paired by item, over items and seeds (stats.py). Effect: in standard deviations of an item's difference. "
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


# ------------------------------------------------------------------------------------------- answers, and two runs


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


def said(item: dict) -> str:
    """What a model answered to an item, for people."""
    if turns := item.get("turns"):
        return "\n\n".join(str(turn.get("reply")) for turn in turns)
    if "bits" in item:
        return f"{item['value']:.3f} bits per character"
    return f"{item.get('prediction')} (right: {item.get('gold')})"


def compare(reader: Reader, first: str, second: str, examples: int = 5) -> str:
    """Two models item by item, as Markdown: `run` or `run:depth`, without it the depth that the run was trained at.

    Raises:
        UserError: no such run or depth, or no benchmark in common."""

    def chosen(name: str) -> dict[str, object]:
        run, colon, depth = name.rpartition(":") if re.search(r":\d+$", name) else (name, "", "")
        mine = [r for r in reader.results if r.study["run"] == run]
        if not mine:
            known = ", ".join(sorted({r.study["run"] for r in reader.results})) or "none"
            raise UserError(f"no results of {run!r}; runs with results: {known}")
        deepest = max(r.study["total_ut_steps"] for r in mine)
        want = int(depth) if colon else mine[0].study.get("trained_ut_steps") or deepest
        return {r.study["task"]: r for r in mine if r.study["total_ut_steps"] == want}

    a, b = chosen(first), chosen(second)
    tasks = sorted(a.keys() & b.keys())
    if not tasks:
        raise UserError(f"{first} and {second} have no benchmark in common, or were not read at these depths")
    text = f"# {markdown(first)} and {markdown(second)}, item by item\n"
    for task in tasks:
        one, two = a[task], b[task]
        place = {identity: i for i, identity in enumerate(two.ids)}
        both = [i for i, identity in enumerate(one.ids) if identity in place]
        other = [place[one.ids[i]] for i in both]
        if not both:
            text += f"\n## {task}\n\nNo item in common.\n"
            continue
        weights = stats.resample(len(both))
        cells = [
            stats.cell(weights, r.numerators[rows][:, None], r.denominators[rows])
            for r, rows in ((one, both), (two, other))
        ]
        e = stats.estimate([cells[1] - cells[0]], len(both))
        _, factor, decimals, axis = METRICS[one.study["metric"]]
        low, value, high = (f"{x * factor:+.{decimals}f}" for x in (e.low, e.value, e.high))
        text += f"\n## {task}\n\n{len(both)} items in common. Second minus first: {value} [{low}, {high}] ({axis})"
        text += f", p = {e.p:.2g}.\n"
        if one.study["prompt_sha256"] != two.study["prompt_sha256"]:
            text += "\nThe prompts differ: this is not a comparison of the models alone.\n"
        x, y = one.numerators[both] / np.maximum(one.denominators[both], 1e-9), two.numerators[other]
        y = y / np.maximum(two.denominators[other], 1e-9)
        if one.study["metric"] == "accuracy":
            only_a, only_b = int(((x > 0.5) & (y < 0.5)).sum()), int(((x < 0.5) & (y > 0.5)).sum())
            p = stats.binomial_test(only_a, only_a + only_b, 0.5) if only_a + only_b else 1.0
            text += f"\nBoth right {int(((x > 0.5) & (y > 0.5)).sum())}, only the first {only_a}, only the second "
            text += f"{only_b}, neither {int(((x < 0.5) & (y < 0.5)).sum())}; exact McNemar p = {p:.2g}.\n"
        rows = [
            {item["id"]: item for item in reader.lines(r.path.with_suffix(".items.jsonl"), MAX_ITEMS)}
            for r in (one, two)
        ]
        order = sorted(range(len(both)), key=lambda i, x=x, y=y: (-abs(y[i] - x[i]), i))
        for i in order[:examples]:
            left, right = (source[one.ids[both[i]]] for source in rows)
            doc = left.get("doc") or {}
            question = (
                doc.get("question") or doc.get("text") or (left.get("turns") or [{}])[0].get("prompt") or left["id"]
            )
            text += (
                f"\n### {markdown(left['id'])}\n\n{markdown(str(question)[:600])}\n\n| first | second |\n|---|---|\n"
            )
            text += f"| {markdown(said(left)[:1500])} | {markdown(said(right)[:1500])} |\n"
    runs = {r.study["run"] for results in (a, b) for r in results.values()}
    for what, why in reader.left_out:
        if any(f"/{run}/" in Path(what).as_posix() for run in runs):
            text += f"\nleft out: {markdown(what)}: {markdown(why)}\n"
    return text


# ----------------------------------------------------------------------------------------------------------- writing


def about(verdict: Verdict, made: list[Verdict]) -> str:
    """The aspect, with the training set where there are several."""
    several = len({other.dataset for other in made}) > 1
    return ASPECTS[verdict.aspect] + (f" ({verdict.dataset})" if several else "")


def verdict_lines(made: list[Verdict]) -> list[tuple[str, str]]:
    """(aspect and headline, sentence)."""
    return [(f"{about(verdict, made)}: {verdict.headline}", verdict.sentence) for verdict in made]


def basis(reader: Reader, found: dict[tuple[str, str], Panel], made: list[Verdict]) -> str:
    """What the verdict rests on, in a line."""
    counts = ((len(reader.runs), "training run"), (len(reader.results), "result"))
    told = ", ".join(f"{n:,} {what}{'s' * (n != 1)}" for n, what in counts)
    if reader.left_out:
        count = len(set(reader.left_out))
        told += f", {count:,} thing{'s' * (count != 1)} left out or noted (at the end)"
    datasets = list(dict.fromkeys(verdict.dataset for verdict in made))
    for panel in (panel for (_, dataset), panel in found.items() if dataset == datasets[0]):
        study = panel.study
        revision = f" at {study['model_revision'][:12]}" if study["model_revision"] else ""
        return f"{study['model']}{revision}, {study['precision']}, trained on {' and on '.join(datasets)}; {told}."
    return f"{told[0].upper()}{told[1:]}."


def missing_lines(made: list[Verdict]) -> list[str]:
    """What would make the answer firmer; said once where it is missing everywhere."""
    aspects = defaultdict(list)
    for verdict in made:
        for what in verdict.missing:
            aspects[what].append(about(verdict, made))
    return [what if len(of) == len(made) else f"{what}, for {', '.join(of)}" for what, of in aspects.items()]


STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1b;--paper:#fff;--soft:#f3f4f6;--line:#d5d8dd;--accent:#2f6f9f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#15171a;--soft:#202429;--line:#3a4048;--accent:#7db7e0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem 1.2rem 4rem;color:var(--ink);background:var(--paper);line-height:1.55;
 font-family:system-ui,"Segoe UI",Roboto,"Noto Sans","Noto Sans Thai","Noto Sans Thai Looped","Leelawadee UI",Thonburi,
 Sarabun,Loma,"TH Sarabun New",Garuda,Tahoma,sans-serif}
h1{font-size:1.6rem;line-height:1.25}h2{font-size:1.15rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
a{color:var(--accent)}nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.9rem}
p,li,figcaption{max-width:50rem}figcaption,section>p{font-size:.9rem;opacity:.85}
.verdict{background:var(--soft);border-left:4px solid var(--accent);border-radius:4px;padding:.2rem 1.2rem}
.verdict dt{font-weight:600;margin-top:.8rem}.verdict dd{margin:0 0 .8rem;overflow-wrap:anywhere}
figure{margin:1rem 0}figure .box{max-width:52rem}figure svg{display:block;width:100%;min-width:34rem;height:auto}
figure.narrow .box{max-width:34rem}figure.narrow svg{min-width:20rem}
svg text{font-family:system-ui,"Noto Sans",sans-serif}
.box{overflow-x:auto;max-width:100%}table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}td.n{text-align:right}
#left-out td,#data td{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
blockquote{margin:.3rem 0;padding:.4rem .9rem;background:var(--soft);border-radius:4px;white-space:pre-wrap;
 overflow-wrap:anywhere;line-height:1.8}
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentNode, row = head.parentNode, body = head.closest("table").tBodies[0];
  const column = [...row.cells].indexOf(head), down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of row.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down > 0 ? "ascending" : "descending");
  const number = (c) => (c.dataset.v === undefined ? c.textContent : Number(c.dataset.v));
  const key = (r) => number(r.cells[column]);
  const rank = (x) => (typeof x === "number" ? 0 : 1);
  const order = (a, b) => rank(a) - rank(b) || down * (rank(a) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
});
"""


def page(made: list[Verdict], rests_on: str, shown: list[Table], figures: dict[str, str], talks: list) -> str:
    """report.html: one file; its policy allows no network and no script but the one above, by its hash."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    e = html.escape
    dl = "".join(f"<dt>{e(name)}</dt><dd>{e(sentence)}</dd>" for name, sentence in verdict_lines(made))
    missing = "".join(f"<li>{e(what)}</li>" for what in missing_lines(made))
    missing = f"<h2>What is missing</h2><ul>{missing}</ul>" if missing else ""
    plots = ""
    for name, svg in figures.items():
        narrow = ' class="narrow"' if float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1]) < 400 else ""
        caption = e(CAPTIONS[name])
        plots += f'<figure id="plot-{name}"{narrow}><div class="box">{svg}</div>'
        plots += f"<figcaption>{caption}</figcaption></figure>\n"
    spoken = "".join(
        f'<h3 lang="th">{e(prompt)}</h3>'
        + "".join(f'{e(who)}<blockquote lang="th">{e(reply)}</blockquote>' for who, reply in all)
        for prompt, all in talks
    )
    spoken = f'<section id="answers"><h2>Answers</h2>{spoken}</section>' if spoken else ""
    links = "".join(f'<a href="#{e(table.name)}">{e(table.title)}</a>' for table in shown)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><title>{TITLE}</title><style>{STYLE}</style></head><body>
<h1>{TITLE}</h1><p>{e(rests_on)}</p><div class="verdict"><dl>{dl}</dl></div>
<nav>{links}</nav>
{missing}
{plots}{"".join(table.html() for table in shown)}{spoken}
<script>{SCRIPT}</script></body></html>
"""


def document(
    made: list[Verdict], rests_on: str, shown: list[Table], figures: dict[str, str], talks: list, place: str
) -> str:
    """RESULTS.md; `place`: the plots' folder as seen from it."""
    text = f"# {TITLE}\n\n{markdown(rests_on)}\n\n"
    text += "".join(f"- **{markdown(name)}.** {markdown(sentence)}\n" for name, sentence in verdict_lines(made))
    if missing := missing_lines(made):
        text += "\n## What is missing\n\n" + "".join(f"- {markdown(what)}\n" for what in missing)
    text += "\n" + "".join(f"![{name}]({place}/{name}.png)\n\n{CAPTIONS[name]}\n\n" for name in figures)
    text += "".join(table.markdown() for table in shown if not table.folded)
    if talks:
        text += "## Answers\n\n"
    for prompt, all in talks:
        text += (
            f"**{markdown(prompt)}**\n\n"
            + "".join(f"- {markdown(who)}: {markdown(reply[:600])}\n" for who, reply in all)
            + "\n"
        )
    return text


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default=".", help="folder of RESULTS.md and report.html (default: this one)")
    parser.add_argument("--csv", action="store_true", help="tables as RESULTS_DIR/report/<table>.csv too")
    parser.add_argument("--latex", action="store_true", help="the same as .tex, for booktabs")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two runs item by item to stdout; run or run:depth"
    )


def main() -> None:
    gc.disable()  # a fifth of the time goes to looking for garbage among millions of numbers that are read once
    run = resolve(__doc__, add_options=options)
    places = [Path(run.settings.output_dir), Path(run.settings.results_dir)]
    read = " and ".join(f"{place}{' (which is not there)' * (not place.is_dir())}" for place in places)
    if not any(place.is_dir() for place in places):
        raise UserError(f"nothing to report on: {read}; OUTPUT_DIR and RESULTS_DIR name other folders")
    reader = Reader(*places)
    if run.options.compare:
        print(compare(reader, *run.options.compare), end="")
        return
    found = panels(reader)
    made, talks = verdicts(found, reader.answers), samples(reader)
    out, folder = Path(run.options.out), Path(run.settings.results_dir) / "report"
    figures = draw(reader, found, made[0].dataset, training_flops)
    drawn = {name: render(name, figure, folder, write_atomic) for name, figure in figures.items()}
    shown = tables(reader, found)
    for table in shown:
        if run.options.csv:
            write_atomic(folder / f"{table.name}.csv", table.csv())
        if run.options.latex:
            write_atomic(folder / f"{table.name}.tex", table.latex())
    write_json(folder / "verdict.json", [dataclasses.asdict(verdict) for verdict in made])
    for name in CAPTIONS.keys() - drawn.keys():  # of an earlier report, no longer true
        for suffix in (".png", ".svg"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    place, rests_on = Path(os.path.relpath(folder, out)).as_posix(), basis(reader, found, made)
    write_atomic(out / "RESULTS.md", document(made, rests_on, shown, drawn, talks, place))
    write_atomic(out / "report.html", page(made, rests_on, shown, drawn, talks))
    print(f"{rests_on}\n")
    for name, sentence in verdict_lines(made):
        print(textwrap.fill(f"{name}. {sentence}", 100, subsequent_indent="  "))
    for what in missing_lines(made):
        print(f"missing: {what}")
    print(f"\nread: {read}")
    print(f"{out / 'report.html'}, {out / 'RESULTS.md'}; plots in {folder}")


if __name__ == "__main__":
    call(main)
