"""The report's figures: a function each, of the panels that the verdict rests on, the runs and the training set.

It returns None where there is no data; `save` writes PNG and SVG. FIGURES, at the end, has their order and captions.

Colour and marker say the depth, from one loop to four; grey dashes are the base model, the zero line of the study.
"""

import io
import re
from pathlib import Path

from ouro.files import write_atomic
from ouro.verdict import stats
from ouro.verdict.rule import Differences
from ouro.verdict.study import ASPECTS, Panel, Run, depth_text

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

matplotlib.use("Agg")
INK = "#1a1a1b"  # becomes currentColor in the page, so that it can be dark
GREY = "#8a8a8a"
COLOURS = ["#4477aa", "#228833", "#b8860b", "#d1495b", "#aa3377", "#66ccee"]
MARKERS = "os^Dv*"
LETTERS = ["#4477aa", "#66ccee", "#228833", "#b8860b", "#d1495b", "#aa3377"]
POINTS = 300, 12000  # of a learning curve, and of all at most
STYLE = {
    "figure.figsize": (6.8, 2.6),
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a run may be called $x$
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
    ),
}


def look(depth: int) -> dict:
    return {"color": COLOURS[(depth - 1) % len(COLOURS)], "marker": MARKERS[(depth - 1) % len(MARKERS)]}


def named(panel: Panel) -> str:
    return f"{ASPECTS[panel.study['aspect']]}: {panel.study['task']}"


def grid_of(count: int, height: float = 2.3) -> tuple[Figure, list]:
    """A figure with so many axes, two a row, each `height` inches high."""
    columns = min(count, 2)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6.8 if columns > 1 else 4.2, height * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_axis_off()
    return figure, list(axes.flat[:count])


def whole_depths(axis, depths, label: str = "loops") -> None:
    axis.set_xticks(sorted(depths))
    axis.set_xlabel(label)


def bars(axis, panel: Panel, x, estimates, **style) -> None:
    """Points with their 95 % intervals."""
    value, low, high = (np.array([getattr(e, name) for e in estimates], float) for name in ("value", "low", "high"))
    scaled = value * panel.factor
    axis.errorbar(x, scaled, (value - low, high - value) * np.array(panel.factor), capsize=2.5, elinewidth=1, **style)


def learning(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Loss and token accuracy of every run by the tokens seen, in means of so many log lines as can be told apart."""
    drawn = [run for run in runs.values() if np.isfinite(run.log["loss"]).sum() > 1]
    if not drawn:
        return None
    figure, axes = grid_of(2, 2.5)
    depths = set()
    for run in drawn:
        depth = run.config.get("total_ut_steps") or 1
        depths.add(depth)
        size = -(-len(run.log["loss"]) // max(20, min(POINTS[0], POINTS[1] // len(drawn))))
        starts = np.arange(0, len(run.log["loss"]), size)
        colour = look(depth)["color"]
        for axis, key in zip(axes, ("loss", "mean_token_accuracy"), strict=True):
            ends = np.minimum(starts + size, len(run.log[key]))
            values = np.add.reduceat(run.log[key], starts) / (ends - starts)
            axis.plot(run.log["num_tokens"][ends - 1] / 1e6, values, color=colour, lw=0.8, alpha=0.8)
    axes[0].set_ylabel("training loss")
    axes[1].set_ylabel("token accuracy")
    axes[0].legend(
        [Line2D([], [], color=look(d)["color"]) for d in sorted(depths)], [depth_text(d) for d in sorted(depths)]
    )
    for axis in axes:
        axis.set_xlabel("million tokens")
    return figure


def gain(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """The main figure: what training gained over the base at the same depth."""
    chosen = [panel for panel in panels if any(panel.gain(k, k) for k in panel.trained)]
    if not chosen:
        return None
    figure, axes = grid_of(len(chosen))
    for axis, panel in zip(axes, chosen, strict=True):
        estimates = {k: e for k in panel.trained if (e := panel.gain(k, k))}
        for k, e in estimates.items():
            bars(axis, panel, [k], [e], **look(k), ls="none")
        if len(estimates) > 1:
            values = [e.value * panel.factor for e in estimates.values()]
            axis.plot(list(estimates), values, color=GREY, lw=0.8, zorder=0)
        for k, p in Differences(panel).interaction_p.items():
            if p < stats.ALPHA:
                top = estimates[k].high * panel.factor
                axis.annotate("*", (k, top), (0, 1), textcoords="offset points", ha="center", fontsize=11)
        axis.margins(y=0.12)
        axis.axhline(0, color=GREY, ls="--", lw=1)
        axis.set_title(named(panel))
        axis.set_ylabel(f"{'change' if panel.study['aspect'] == 'english' else 'gain'}, {panel.unit}")
        whole_depths(axis, estimates, "loops, in training and read")
    return figure


def levels(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Base and adapted against the depth read: marks where it was trained, thin lines for it elsewhere."""
    by_depth: dict[int, list[list[float]]] = {}
    before: list[float] = []  # of the base: the same in each run, as far as its loops go
    for run in runs.values():
        if run.held_out and run.config.get("dataset") == dataset:
            by_depth.setdefault(len(run.held_out), []).append(run.held_out)
            before = max(before, run.base_held_out, key=len)
    held_out = {k: np.mean(losses, 0) for k, losses in by_depth.items()}
    if not panels:
        return None
    figure, axes = grid_of(len(panels) + bool(held_out))
    for axis, panel in zip(axes, panels, strict=False):
        if panel.base:
            bars(axis, panel, list(panel.base), [panel.estimate(c) for c in panel.base.values()], color=GREY, ls="--")
        for k in panel.trained:
            reads = {depth: cell for (trained, depth), cell in panel.adapted.items() if trained == k}
            values = [cell.values.mean() * panel.factor for cell in reads.values()]
            axis.plot(list(reads), values, color=look(k)["color"], lw=0.7, alpha=0.8)
            if k in reads:
                bars(axis, panel, [k], [panel.estimate(reads[k])], **look(k), ls="none")
        if chance := panel.study.get("chance"):
            axis.axhline(chance * panel.factor, color=GREY, ls=":", lw=1)
            axis.annotate("chance", (1, chance * panel.factor), color=GREY, va="bottom", fontsize=7)
        axis.set_title(named(panel))
        axis.set_ylabel(panel.axis)
        whole_depths(axis, {depth for _, depth in panel.adapted} | set(panel.base), "loops, read")
    if held_out:
        axis = axes[-1]
        axis.plot(range(1, len(before) + 1), before, color=GREY, ls="--", marker="x")
        for k, losses in sorted(held_out.items()):
            axis.plot(range(1, len(losses) + 1), losses, **look(k))
        axis.set_title("held-out training rows")
        axis.set_ylabel("loss")
        whole_depths(axis, range(1, max(map(len, held_out.values())) + 1))
    trained = sorted({k for panel in panels for k in panel.trained})
    handles = [Line2D([], [], color=GREY, ls="--")] + [Line2D([], [], **look(k)) for k in trained]
    figure.legend(
        handles, ["base", *(f"trained at {depth_text(k)}" for k in trained)], loc="outside lower center", ncols=5
    )
    return figure


def heat(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Gain by trained depth and depth read."""
    chosen = [panel for panel in panels if len(panel.adapted) > 1 and panel.base]
    if not chosen:
        return None
    figure, axes = grid_of(len(chosen), 2.6)
    for axis, panel in zip(axes, chosen, strict=True):
        depths = sorted({depth for _, depth in panel.adapted})
        values = np.full((len(panel.trained), len(depths)), np.nan)
        for i, k in enumerate(panel.trained):
            for j, depth in enumerate(depths):
                if (cell := panel.gain_cell(k, depth)) is not None:
                    values[i, j] = cell.values.mean() * panel.factor
        bound = max(np.nanmax(np.abs(values)), 1e-9) if np.isfinite(values).any() else 1
        edges = [np.arange(n + 1) - 0.5 for n in (len(depths), len(panel.trained))]
        axis.pcolormesh(*edges, values, cmap="RdBu", vmin=-1.6 * bound, vmax=1.6 * bound, edgecolor="white", lw=1.5)
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                bold = "bold" if panel.trained[i] == depths[j] else "normal"
                text = f"{value:+.{panel.decimals}f}"
                axis.text(j, i, text, ha="center", va="center", color="black", fontsize=7.5, weight=bold)
        axis.set_xticks(range(len(depths)), depths)
        axis.set_yticks(range(len(panel.trained)), panel.trained)
        axis.set_xlabel("loops, read")
        axis.set_ylabel("loops, trained")
        axis.set_title(f"{named(panel)}\ngain, {panel.unit}")
        axis.grid(False)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure


def compute(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Quality against what it costs to train, and to use."""
    chosen = [p for p in panels if p.study["aspect"] in ("thai_text", "thai_exams") and p.trained]
    points = []
    for panel in chosen:
        for k in panel.trained:
            sources = panel.sources.get((k, k), [])
            spent = [runs[s["run"]].flops(s) if s["run"] in runs else None for s in sources]
            if sources:
                mean = sum(spent) / len(spent) if all(spent) else None
                points.append((panel, k, mean, sources[0].get("inference_flops_per_token")))
    if not any(spent or forward for _, _, spent, forward in points):
        return None
    figure, axes = grid_of(2 * len(chosen))
    for i, panel in enumerate(chosen):
        for j, name in enumerate(("training FLOPs", "inference FLOPs per token")):
            axis = axes[2 * i + j]
            reads = [(k, (spent, forward)[j]) for p, k, spent, forward in points if p is panel and (spent, forward)[j]]
            for k, x in reads:
                bars(axis, panel, [x], [panel.estimate(panel.adapted[k, k])], **look(k), ls="none")
            if j and (base := {d: s.get("inference_flops_per_token") for d, s in panel.base_sources.items()}):
                known = [d for d in base if base[d]]
                values = [panel.base[d].values[0] * panel.factor for d in known]
                axis.plot([base[d] for d in known], values, color=GREY, ls="--", marker="x", label="base")
                axis.legend()
            if reads:
                axis.set_xscale("log")
                axis.set_xticks([x for _, x in reads], [f"{x:.1e}".replace("e+", "e") for _, x in reads])
                axis.set_xticks([], minor=True)
            axis.set_xlabel(name)
            axis.set_ylabel(panel.axis)
            axis.set_title(named(panel))
    return figure


def inside(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """How far a loop moves the state, and at which loop the exit gate would stop, before and after training."""
    for panel in panels:
        if not panel.base_sources or max(panel.base_sources) < 2:
            continue
        deepest = max(panel.base_sources)
        rows = [(None, [panel.base_sources[deepest]])]
        rows += [(k, panel.sources[k, deepest]) for k in panel.trained if (k, deepest) in panel.sources]
        if not all(s.get("exit_distribution") and s.get("state_distance") for _, group in rows for s in group):
            continue
        figure, axes = grid_of(2, 2.5)
        for i, (k, group) in enumerate(rows):
            style = look(k) if k else {"color": GREY, "ls": "--", "marker": "x"}
            distance = np.mean([s["state_distance"] for s in group], 0)
            axes[0].plot(range(2, deepest + 1), distance, label=f"trained at {depth_text(k)}" if k else "base", **style)
            width = 0.8 / len(rows)
            x = np.arange(1, deepest + 1) - 0.4 + (i + 0.5) * width
            exits = np.mean([s["exit_distribution"] for s in group], 0)
            axes[1].bar(x, exits, width, color=style["color"])
        axes[0].set_ylabel("relative change of the state")
        axes[1].set_ylabel("mean exit probability")
        axes[0].set_title(f"{panel.study['task']}, read at {depth_text(deepest)}")
        for axis, first in zip(axes, (2, 1), strict=True):
            whole_depths(axis, range(first, deepest + 1), "loop")
        axes[0].legend()
        return figure
    return None


def letters(panels: list[Panel], runs: dict[str, Run], dataset: str) -> Figure | None:
    """Which letters were answered: a model that answers one letter knows nothing."""
    for panel in panels:
        rows = [(f"base, {depth_text(d)}", [s]) for d, s in panel.base_sources.items()]
        rows += [(f"trained, {depth_text(k)}", panel.sources[k, k]) for k in panel.trained if (k, k) in panel.sources]
        rows = [(name, group) for name, group in rows if all(s.get("predicted") for s in group)]
        if not rows:
            continue
        names = sorted({letter for _, group in rows for s in group for letter in s["predicted"]})
        figure, (axis,) = grid_of(1, 0.9 + 0.28 * len(rows))
        left = np.zeros(len(rows))
        for letter, colour in zip(names, LETTERS * 3, strict=False):
            share = np.zeros(len(rows))
            for i, (_, group) in enumerate(rows):
                predicted = [s["predicted"] for s in group]
                share[i] = 100 * np.mean([p.get(letter, 0) / max(1, sum(p.values())) for p in predicted])
            axis.barh(range(len(rows)), share, left=left, color=colour, label=letter, height=0.75)
            left += share
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel(f"answers by letter, %: {panel.study['task']}")
        axis.grid(False)
        axis.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1, columnspacing=1)
        return figure
    return None


FIGURES = {  # name: (function, caption), in the report's order
    "gain": (
        gain,
        "Gain over the base at the same depth, trained and read at that depth, with 95 % intervals. A star: it differs "
        "from the gain at 1 loop (paired by item, Holm, 5 %), which the bars alone do not show. For English, below "
        "zero is forgetting.",
    ),
    "levels": (
        levels,
        "Base and adapted models by the depth they are read at. Thin lines: one adapter at all depths; marks with 95 % "
        "intervals: read at the depth it was trained at.",
    ),
    "heat": (heat, "Gain over the base at the depth read, by trained depth (rows) and depth read (columns)."),
    "compute": (compute, "Quality against training FLOPs and against inference FLOPs per token."),
    "learning": (learning, "Training loss and token accuracy by tokens seen, a line a run."),
    "inside": (
        inside,
        "How far each loop moves the state, and where the exit gate would stop, before and after training.",
    ),
    "letters": (
        letters,
        "Letters answered. A model that answers one letter is at chance, whatever its accuracy.",
    ),
}
CAPTIONS = {name: caption for name, (_, caption) in FIGURES.items()}


def draw(runs: dict[str, Run], found: dict[tuple[str, str], Panel], dataset: str) -> dict[str, Figure]:
    """The figures for which there is data, by name."""
    primary = {p.study["aspect"]: p for (_, name), p in found.items() if name == dataset and p.study.get("primary")}
    panels = [primary[aspect] for aspect in ASPECTS if aspect in primary]
    with matplotlib.rc_context(STYLE):
        made = {name: function(panels, runs, dataset) for name, (function, _) in FIGURES.items()}
    return {name: figure for name, figure in made.items() if figure}


def save(name: str, figure: Figure, folder: Path) -> str:
    """Writes folder/name.png and .svg; returns the SVG for a page. No dates, ids by name: the same bytes each time."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # once is enough, and half of the time
        image, vector = io.BytesIO(), io.BytesIO()
        figure.savefig(image, format="png", dpi=200, facecolor="white", metadata={"Software": None})
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    write_atomic(folder / f"{name}.png", image.getvalue())
    write_atomic(folder / f"{name}.svg", vector.getvalue())
    svg = vector.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # unique in the page
    svg = svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "inherit")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{CAPTIONS[name]}" ', 1)
