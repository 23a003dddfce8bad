"""Two models' answers beside each other, item by item."""

import re
from pathlib import Path

from ouro.files import UserError
from ouro.verdict import stats
from ouro.verdict.page import fill
from ouro.verdict.study import ITEMS, METRICS, Reader, Result

import numpy as np
from scipy.stats import binomtest

SHOWN = ("id", "doc", "turns", "bits", "value", "prediction", "gold")  # of an item
EXAMPLES = 5  # items of each benchmark that are shown


def chosen(reader: Reader, name: str) -> dict[str, Result]:
    """By task: a model's results at the depth named (run:depth), else at its own. Raises UserError: no such run, or
    they are not of what stands in its folder."""
    run, colon, depth = name.rpartition(":") if re.search(r":\d+$", name) else (name, "", "")
    mine = [r for r in reader.results if r.study["run"] == run]
    if not mine:
        known = ", ".join(sorted({r.study["run"] for r in reader.results})) or "none"
        left_out = [f"{file}: {why}" for file, why in reader.left_out if f"/{run}/" in Path(file).as_posix()]
        raise UserError(f"no results of {run!r}; runs with results: {known}", *left_out[:3])
    own = mine[0].trained or max(r.study["total_ut_steps"] for r in mine)
    found = {r.study["task"]: r for r in mine if r.study["total_ut_steps"] == (int(depth) if colon else own)}
    if run in reader.runs:
        why = {task: told for task, r in found.items() if (told := reader.runs[run].disowns(r.study))}
        reader.left_out += [(str(found[task].path), told) for task, told in why.items()]
        found = {task: r for task, r in found.items() if task not in why}
        if why and not found:
            raise UserError(f"results of {name!r} are {next(iter(why.values()))}")
    return found


def said(item: dict) -> str:
    """What a model answered to an item, for people."""
    if turns := item.get("turns"):
        return "\n\n".join(str(turn.get("reply")) for turn in turns)
    if "bits" in item:
        return f"{item['value']:.3f} bits per character"
    return f"{item.get('prediction')} (right: {item.get('gold')})"


def asked(item: dict) -> str:
    doc = item.get("doc") or {}
    return str(doc.get("question") or doc.get("text") or (item.get("turns") or [{}])[0].get("prompt") or item["id"])


def compare_task(reader: Reader, one: Result, two: Result) -> dict:
    """What compare.md.j2 shows of a task: the difference, and the items in which it is largest."""
    # An item that is not rated weighs nothing.
    first, second = ({i for i, weight in zip(r.ids, r.denominators, strict=True) if weight} for r in (one, two))
    both = first & second
    ids = [identity for identity in one.ids if identity in both]
    shown = {"name": one.study["task"], "count": len(ids)}
    if not ids:
        return shown
    one, two = one.take(ids), two.take(ids)
    first, second = (stats.cell(r.numerators[:, None], r.denominators, one.clusters, one.strata) for r in (one, two))
    difference = second - first
    difference.trained = False  # of these two runs, whatever other seeds would do
    e, metric = stats.estimate([difference]), METRICS[one.study["metric"]]
    shown["axis"] = metric.axis
    value, half = float(e.value), float(e.half())
    told = [f"{x * metric.factor:+.{metric.decimals}f}" for x in (value, value - half, value + half)]
    shown["difference"] = f"{told[0]} [{told[1]}, {told[2]}]" if np.isfinite(half) else told[0]
    shown["p"] = float(e.p)
    shown["other_prompts"] = one.study["prompt_sha256"] != two.study["prompt_sha256"]
    x, y = (r.numerators / r.denominators for r in (one, two))
    if one.study["metric"] == "accuracy":
        counts = [int(np.sum(((x > 0.5) == a) & ((y > 0.5) == b))) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))]
        p = binomtest(counts[1], counts[1] + counts[2]).pvalue if counts[1] + counts[2] else 1.0
        shown |= {"right": counts, "mcnemar": p}
    files = [result.path.with_suffix(".items.jsonl") for result in (one, two)]
    lines = [{item["id"]: item for item in reader.lines(file, SHOWN, ITEMS)} for file in files]
    largest = np.argsort(-np.abs(y - x), kind="stable")[:EXAMPLES]
    pairs = [[source[ids[i]] for source in lines] for i in largest]
    shown["examples"] = [(a["id"], asked(a), said(a), said(b)) for a, b in pairs]
    return shown


def compare(reader: Reader, first: str, second: str) -> str:
    """Two models item by item, as Markdown: `run` or `run:depth`, without it the depth that the run was trained at.
    Raises UserError: no such run or depth, or no benchmark in common."""
    one, two = chosen(reader, first), chosen(reader, second)
    tasks = sorted(one.keys() & two.keys())
    if not tasks:
        raise UserError(f"{first} and {second} have no benchmark in common, or were not read at these depths")
    compared = [compare_task(reader, one[task], two[task]) for task in tasks]
    runs = {r.study["run"] for r in (*one.values(), *two.values())}
    left_out = [entry for entry in reader.left_out if any(f"/{run}/" in Path(entry[0]).as_posix() for run in runs)]
    return fill("compare.md", first=first, second=second, tasks=compared, left_out=left_out)
