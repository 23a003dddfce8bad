"""The report's figures: a function each, of the panels that the verdict rests on, the runs and the training set.

It returns None where there is no data; `save` writes PNG and SVG. texts.yaml has their captions, to which a figure's
label adds what it is of: benchmarks, items, units.

Colour and marker say the depth, from one loop to four; grey dashes are the base model, the zero line of the study.
"""

import html
import io
import re
from collections import defaultdict
from itertools import product
from pathlib import Path

from ouro.files import write_atomic
from ouro.verdict.panels import STUDY, Key, Panel, gain_or_change
from ouro.verdict.rule import Test, Verdict
from ouro.verdict.stats import ALPHA, Estimate
from ouro.verdict.study import ASPECTS, TEXTS, Metric, Run, depth_text

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

matplotlib.use("Agg")
INK = "#1a1a1b"  # of report.mplstyle; becomes currentColor in the page, so that it can be dark
GREY = "#8a8a8a"
COLOURS = ["#4477aa", "#228833", "#b8860b", "#d1495b", "#aa3377", "#66ccee"]
MARKERS = "os^Dv*"
STROKES = ["-", "--", ":", "-."]  # of training sets, in one plot
LETTERS = ["#4477aa", "#66ccee", "#228833", "#b8860b", "#d1495b", "#aa3377"]
FEWEST = 30  # items of an exam that is drawn: of fewer, an interval covers most of the scale
POINTS = 300, 12000  # at most: of a learning curve, and of all together
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("report.mplstyle"), use_default_template=False)


def look(depth: int | None) -> dict:
    """Of lines and marks: the depth's colour and marker; None: the base's."""
    if depth is None:
        return {"color": GREY, "ls": "--", "marker": "x"}
    return {"color": COLOURS[(depth - 1) % len(COLOURS)], "marker": MARKERS[(depth - 1) % len(MARKERS)]}


def enough(metric: Metric, items: int) -> bool:
    return items >= FEWEST or metric.unit != "points"


def named(panel: Panel) -> str:
    return f"{ASPECTS[panel.study['aspect']]}: {panel.study['task']}"


def measured(panels: list[Panel], differences: bool = False) -> str:
    """Of which benchmarks, how many items, in what unit."""
    return "; ".join(
        f"{panel.study['task']}, {panel.items:,} items, {panel.metric.what if differences else panel.metric.axis}"
        for panel in panels
    )


def titled(
    axis, title: str, depths: list[int], base: bool = True, strokes: dict[str, str] | None = None, **marks: str
) -> None:
    """A title, and under it the axis' own legend: each panel is complete where a narrow screen shows it alone.

    strokes: of training sets, where a plot has several; marks: how they differ from `look`."""
    looks = ({"base": look(None)} if base else {}) | {depth_text(k): look(k) for k in depths}
    looks |= {name: {"color": GREY, "ls": stroke} for name, stroke in (strokes or {}).items()}
    lines = [Line2D([], [], **style | marks) for style in looks.values()]
    axis.legend(lines, looks, title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3 if strokes else 5)


def grid_of(count: int, height: float = 2.3) -> tuple[Figure, list]:
    """A figure with so many axes, two a row, each `height` inches high."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.8 if columns > 1 else 4.2, height * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:count])


def bar(axis, metric: Metric, x: float, e: Estimate, level: float = ALPHA, **style) -> None:
    """A difference with its interval (of 95 %, or at this level); without, where none is known."""
    value, half = float(e.value), float(e.half(level))
    half = half if np.isfinite(half) else 0.0
    low, value, high = (metric.shown(value + side * half) for side in (-1, 0, 1))
    ends = [[max(value - low, 0)], [max(high - value, 0)]]
    axis.errorbar(x, value, ends, ls="none", capsize=2.5, elinewidth=1, **style)


def level_bars(axis, panel: Panel, x, cells: list, **style) -> None:
    """Levels with their 95 % intervals."""
    value, low, high = np.array([panel.level(cell) for cell in cells]).T * panel.metric.factor
    ends = np.nan_to_num(value - low), np.nan_to_num(high - value)
    axis.errorbar(x, value, np.maximum(ends, 0), capsize=2.5, elinewidth=1, **style)


def worth(tests: list[Test]) -> Figure | None:
    """The main figure: what more loops are worth against one, with the intervals that the words follow from."""
    tests = [test for test in tests if test.quantity in "UX" and enough(test.metric, test.items)]
    aspects = list(dict.fromkeys(test.aspect for test in tests if test.quantity == "U"))
    if not aspects:
        return None
    figure, axes = grid_of(len(aspects))
    of = {f"{test.task}, {test.items:,} items, {test.metric.what}": None for test in tests if test.aspect in aspects}
    figure.set_label("; ".join(of))
    for axis, aspect in zip(axes, aspects, strict=True):
        mine = [test for test in tests if test.aspect == aspect]
        metric = mine[0].metric
        axis.axhspan(metric.shown(-metric.margin), metric.shown(metric.margin), color=GREY, alpha=0.2, lw=0)
        axis.axhline(0, color=GREY, ls="--", lw=1)
        for test in mine:
            hollow = {"mfc": "none"} if test.quantity == "X" else {}
            place = test.depth + (0.15 if test.quantity == "X" else 0)
            bar(axis, metric, place, test.estimate, test.level, **look(test.depth) | hollow)
        depths = sorted({test.depth for test in mine})
        names = {"U": "on Thai", "X": "on Thai more than on English"}
        names = {name: "none" if q == "X" else GREY for q, name in names.items() if q in {t.quantity for t in mine}}
        marks = [Line2D([], [], color=GREY, marker="D", ls="none", mfc=mfc) for mfc in names.values()]
        title = f"{ASPECTS[aspect]}: {mine[0].task}, {mine[0].items} items"
        axis.legend(marks, names, title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        axis.set(ylabel=metric.what, xticks=depths, xlabel="loops, against 1")
        axis.set_xlim(depths[0] - 0.5, depths[-1] + 0.5)
    return figure


def gain(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """What training gained over the base at the same depth."""
    chosen = [(panel, {k: e for k in panel.trained if (e := panel.gain(k, k))}) for panel in panels]
    chosen = [(panel, gains) for panel, gains in chosen if gains]
    if not chosen:
        return None
    figure, axes = grid_of(len(chosen))
    for axis, (panel, gains) in zip(axes, chosen, strict=True):
        for k, e in gains.items():
            bar(axis, panel.metric, k, e, **look(k))
        if len(gains) > 1:
            values = [panel.metric.shown(float(e.value)) for e in gains.values()]
            axis.plot(list(gains), values, color=GREY, lw=0.8, zorder=0)
        axis.margins(y=0.12)
        axis.axhline(0, color=GREY, ls="--", lw=1)
        axis.set(title=named(panel), ylabel=panel.metric.what)
        axis.set(xticks=list(gains), xlabel="loops, in training and read")
    figure.set_label(measured([panel for panel, _ in chosen], differences=True))
    return figure


def levels(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Base and adapted against the depth read: marks where it was trained, thin lines for it elsewhere."""
    if not panels:
        return None
    held_out, before = defaultdict(list), []  # losses by depth, of runs by their depth; of the base, as deep as known
    counted = {study["run"] for panel in panels for studies in panel.sources.values() for study in studies}
    for run in (runs[name] for name in sorted(counted & runs.keys())):
        if run.held_out:
            held_out[len(run.held_out)].append(run.held_out)
            before = max(before, run.manifest.get("base_held_out_loss", []), key=len)
    figure, axes = grid_of(len(panels) + bool(held_out))
    for axis, panel in zip(axes, panels, strict=False):
        if panel.base:
            level_bars(axis, panel, list(panel.base), list(panel.base.values()), **look(None))
        for k in panel.trained:
            reads = {depth: cell for (trained, depth), cell in panel.adapted.items() if trained == k}
            values = [panel.level(cell)[0] * panel.metric.factor for cell in reads.values()]
            axis.plot(list(reads), values, color=look(k)["color"], lw=0.7, alpha=0.8)
            if k in reads:
                level_bars(axis, panel, [k], [reads[k]], **look(k), ls="none")
        if chance := panel.study.get("chance"):
            axis.axhline(chance * panel.metric.factor, color=GREY, ls=":", lw=1)
            where = {"xycoords": axis.get_yaxis_transform(), "ha": "left", "va": "center", "fontsize": 7}
            axis.annotate("chance", (1, chance * panel.metric.factor), color=GREY, **where)
        depths = sorted({depth for _, depth in panel.cells})
        axis.set(ylabel=panel.metric.axis, xticks=depths, xlabel="loops, read")
        titled(axis, named(panel), panel.trained, bool(panel.base))
    if held_out:
        axes[-1].plot(range(1, len(before) + 1), before, **look(None))
        for k, losses in sorted(held_out.items()):
            axes[-1].plot(range(1, k + 1), np.mean(losses, 0), **look(k))
        axes[-1].set(ylabel="loss, nats per token", xticks=range(1, max(held_out) + 1), xlabel="loops, read")
        titled(axes[-1], "held-out training rows", sorted(held_out), bool(before))
    figure.set_label(measured(panels))
    return figure


def heat(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Gain by trained depth and depth read; on English, which was not trained, it is called a change."""
    chosen = [panel for panel in panels if len(panel.adapted) > 1 and panel.base]
    if not chosen:
        return None
    figure, axes = grid_of(len(chosen), 1.1 + 0.375 * max(len(panel.trained) for panel in chosen))
    for axis, panel in zip(axes, chosen, strict=True):
        depths = sorted({depth for _, depth in panel.adapted})
        values = np.full((len(panel.trained), len(depths)), np.nan)
        for (i, k), (j, depth) in product(enumerate(panel.trained), enumerate(depths)):
            if (cell := panel.gain_cell(k, depth)) is not None:
                values[i, j] = panel.metric.shown(float(cell.values.mean()))
                text, weight = f"{values[i, j]:+z.{panel.metric.places}f}", "bold" if k == depth else "normal"
                axis.text(j, i, text, ha="center", va="center", color="black", fontsize=7.5, weight=weight)
        bound = max(np.nanmax(np.abs(values)), 1e-9) if np.isfinite(values).any() else 1
        edges = [np.arange(n + 1) - 0.5 for n in (len(depths), len(panel.trained))]
        axis.pcolormesh(*edges, values, cmap="RdBu", vmin=-1.6 * bound, vmax=1.6 * bound, edgecolor="white", lw=1.5)
        axis.set_xticks(range(len(depths)), depths)
        axis.set_yticks(range(len(panel.trained)), panel.trained)
        title = f"{named(panel)}\n{gain_or_change(panel.study['aspect'])}, {panel.metric.what}"
        axis.set(title=title, xlabel="loops, read", ylabel="loops, trained")
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.set_label(measured(chosen, differences=True))
    return figure


def compute(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Quality against what it costs to train, and to use."""
    chosen = []  # (panel, name of a cost, the cost by trained depth, that of the base by depth read)
    for panel in panels:
        sources = {k: panel.sources[k, k] for k in panel.trained if (k, k) in panel.sources}
        if panel.study["aspect"] in ("thai_text", "thai_exams") and sources:
            spent = {k: [runs[s["run"]].flops(s) if s["run"] in runs else None for s in sources[k]] for k in sources}
            training = {k: sum(each) / len(each) for k, each in spent.items() if all(each)}
            chosen.append((panel, "training FLOPs", training, {}))
            use = {place: cost for place, (study, *_) in panel.sources.items()
                   if (cost := study.get("inference_flops_per_token"))}  # fmt: skip
            adapted = {k: use[k, k] for k in sources if (k, k) in use}
            base = {depth: use[None, depth] for depth in panel.base if (None, depth) in use}
            chosen.append((panel, "inference FLOPs per token", adapted, base))
    if not any(adapted for _, _, adapted, _ in chosen):
        return None
    figure, axes = grid_of(len(chosen))
    for axis, (panel, name, adapted, base) in zip(axes, chosen, strict=True):
        for k, cost in adapted.items():
            level_bars(axis, panel, [cost], [panel.adapted[k, k]], **look(k), ls="none")
        if base:
            levels = [panel.level(panel.base[depth])[0] * panel.metric.factor for depth in base]
            axis.plot(list(base.values()), levels, **look(None))
        if ticks := sorted({*adapted.values(), *base.values()}):
            axis.set_xscale("log")
            axis.set_xticks(ticks, [f"{x:.1e}".replace("e+", "e") for x in ticks])
            axis.set_xticks([], minor=True)
        axis.set(xlabel=name, ylabel=panel.metric.axis)
        titled(axis, named(panel), list(adapted), bool(base))
    figure.set_label(measured([panel for panel, name, *_ in chosen if name == "training FLOPs"]))
    return figure


def learning(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Loss and token accuracy of every run by the tokens seen, each point the mean of so many lines of its log."""
    drawn = [run for run in runs.values() if np.isfinite(run.log["loss"]).sum() > 1]
    if not drawn:
        return None
    sets = sorted({str(run.config.get("dataset")) for run in drawn}, key=lambda name: (name != dataset, name))
    strokes = {name: STROKES[n % len(STROKES)] for n, name in enumerate(sets)}
    figure, axes = grid_of(2, 2.5)
    depths = set()
    for run in drawn:
        count = len(run.log["loss"])
        size = -(-count // max(20, min(POINTS[0], POINTS[1] // len(drawn))))
        starts = np.arange(0, count, size)
        ends = np.minimum(starts + size, count)
        depth = run.config.get("total_ut_steps") or 1
        depths.add(depth)
        how = {"color": look(depth)["color"], "ls": strokes[str(run.config.get("dataset"))], "lw": 0.8, "alpha": 0.8}
        for axis, key in zip(axes, ("loss", "mean_token_accuracy"), strict=True):
            values = np.add.reduceat(run.log[key], starts) / (ends - starts)
            axis.plot(run.log["num_tokens"][ends - 1] / 1e6, values, **how)
    for axis, title, unit in zip(axes, ("training loss", "token accuracy"), ("nats per token", "share"), strict=True):
        axis.set(xlabel="million tokens", ylabel=unit)
        titled(axis, title, sorted(depths), base=False, strokes=strokes if len(sets) > 1 else None, marker="")
    figure.set_label(f"{len(drawn)} run{'s' * (len(drawn) > 1)}")
    return figure


def inside(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """How far a loop moves the state, and at which loop the exit gate would stop, before and after training."""
    for panel in panels:
        deepest = max(panel.base, default=1)
        groups = {k: panel.sources[k, deepest] for k in (None, *panel.trained) if (k, deepest) in panel.sources}
        studies = [study for group in groups.values() for study in group]
        if deepest == 1 or not all(s.get("exit_distribution") and s.get("state_distance") for s in studies):
            continue
        figure, (left, right) = grid_of(2, 2.5)
        width = 0.8 / len(groups)
        for i, (k, group) in enumerate(groups.items()):
            distance = np.mean([s["state_distance"] for s in group], 0)
            left.plot(range(2, deepest + 1), distance, **look(k))
            exits = np.mean([s["exit_distribution"] for s in group], 0)
            x = np.arange(1, deepest + 1) - 0.4 + (i + 0.5) * width
            right.bar(x, exits, width, color=look(k)["color"])
        left.set(ylabel="share of the state", xlabel="loop", xticks=range(2, deepest + 1))
        right.set(ylabel="mean probability", xlabel="loop", xticks=range(1, deepest + 1))
        titled(left, "change of the state", panel.trained, None in groups)
        titled(right, "exit at the loop", panel.trained, None in groups, marker="s", ls="none")
        figure.set_label(f"{panel.study['task']}, {panel.items:,} items, read at {depth_text(deepest)}")
        return figure
    return None


def letters(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Which letters were answered: a model that answers one letter knows nothing."""
    for panel in panels:
        groups = {f"base, {depth_text(d)}": panel.sources[None, d] for d in panel.base}
        groups |= {f"trained, {depth_text(k)}": panel.sources.get((k, k), [{}]) for k in panel.trained}
        counts = {name: [s.get("predicted") for s in group] for name, group in groups.items()}
        counts = {name: group for name, group in counts.items() if all(group)}
        if not counts:
            continue
        figure, (axis,) = grid_of(1, 0.9 + 0.28 * len(counts))
        left = np.zeros(len(counts))
        names = sorted({letter for group in counts.values() for predicted in group for letter in predicted})
        for letter, colour in zip(names, LETTERS * 3, strict=False):
            shares = [[p.get(letter, 0) / max(1, sum(p.values())) for p in group] for group in counts.values()]
            share = 100 * np.array([np.mean(each) for each in shares])
            axis.barh(range(len(counts)), share, left=left, color=colour, label=letter, height=0.75)
            left += share
        axis.set_yticks(range(len(counts)), counts)
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel="% of the items")
        axis.grid(False)
        axis.legend(title=named(panel), ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1))
        figure.set_label(f"{panel.study['task']}, {panel.items:,} items")
        return figure
    return None


FIGURES = (gain, levels, heat, compute, learning, inside, letters)


def draw(runs: dict[str, Run], found: dict[Key, Panel], made: list[Verdict]) -> dict[str, Figure]:
    """The figures for which there is data, by name, of the first training set."""
    dataset = made[0].dataset
    own = [panel for key, panel in found.items() if (key.dataset, key.arm) == (dataset, STUDY)]
    panels = [panel for panel in own if panel.study.get("primary") and enough(panel.metric, panel.items)]
    with matplotlib.rc_context(STYLE):
        figures = {"worth": worth([test for verdict in made if verdict.dataset == dataset for test in verdict.tests])}
        figures |= {figure.__name__: figure(panels, runs, dataset) for figure in FIGURES}
    figures = {name: figure for name, figure in figures.items() if figure}
    for name, figure in figures.items():
        figure.set_label(f"{TEXTS['figures'][name]} Of: {figure.get_label()}.")
    return figures


def save(name: str, figure: Figure, folder: Path) -> list[str]:
    """Writes folder/name.png and .svg; returns an SVG of each of its axes for a page, which puts as many of them side
    by side as its width takes. No dates, ids by name: the same bytes each time."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # else each of the two formats would lay it out again: twice the time
        image, vector = io.BytesIO(), io.BytesIO()
        figure.savefig(image, format="png", dpi=200, facecolor="white", metadata={"Software": None})
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        write_atomic(folder / f"{name}.png", image.getvalue())
        write_atomic(folder / f"{name}.svg", vector.getvalue())
        shown = [axis for axis in figure.axes if axis.axison]
        parts = [axis.get_tightbbox().transformed(figure.dpi_scale_trans.inverted()).padded(0.04) for axis in shown]
        svgs = []
        for number, (axis, part) in enumerate(zip(shown, parts, strict=True)):
            for other in figure.axes:
                other.set_visible(other is axis)
            vector = io.BytesIO()
            figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None}, bbox_inches=part)
            legend = axis.get_legend()
            title = (axis.get_title() or (legend.get_title().get_text() if legend else name)).replace("\n", ", ")
            svgs.append(for_page(f"{name}-{number}", title, vector.getvalue().decode(), part.width))
        plt.close(figure)
    return svgs


def for_page(name: str, title: str, svg: str, width: float) -> str:
    """width: inches on paper. On a screen a fifth more, and never wider than it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # unique in the page
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    size = f'role="img" aria-label="{html.escape(title)}" style="width:{7.2 * width:.1f}rem" '
    return svg.replace("<svg ", f"<svg {size}", 1)
