"""Two models' answers beside each other, item by item."""

import re
from pathlib import Path

from ouro.files import UserError
from ouro.verdict import stats
from ouro.verdict.page import markdown
from ouro.verdict.study import METRICS, Reader

import numpy as np


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
        rows = [{item["id"]: item for item in reader.lines(r.path.with_suffix(".items.jsonl"))} for r in (one, two)]
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
