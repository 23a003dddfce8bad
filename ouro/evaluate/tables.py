"""What evaluate.py prints of its results: values beside the base's at the same depth, exams, languages, a matrix."""

import math

from ouro.data.formats import read_file
from ouro.evaluate import benchmarks
from ouro.evaluate.benchmarks import Task
from ouro.evaluate.models import ModelUnderTest

BIASED = 0.8  # a share of answers with one letter that says more about the letter than about the items, of so many
FEWEST = 5
REFUSED = {"accuracy": "their items count as wrong", "rating": "their turns are in none of the means"}
Found = dict[tuple[str, int], dict]  # the study block of each run and depth


def shown(study: dict, value: float | None) -> str:
    if value is None:
        return "-"
    return format(value, {"accuracy": ".1%", "rating": ".2f"}.get(study["metric"], ".4f"))


def print_task(task: Task, models: list[ModelUnderTest], found: Found, depths: list[int]) -> None:
    base = models[0] if models[0].kind == "base" else None
    some = next(iter(found.values()))
    exams = len(some["subsets"]) > 1
    what = f"\n{task.name} ({some['protocol']}): {some['items']} items"
    if some["chance"] is not None:
        chance, most = (f" ({some[key]:.1%})" if exams else "" for key in ("macro_chance", "macro_majority"))
        what += f", chance {some['chance']:.1%}{chance}, always the commonest letter {some['majority']:.1%}{most}"
        what += "; in brackets: mean of exams" if exams else ""
    what += f"; a part: {some['part']}" if some.get("part") else ""
    print(what + ("; fewer bits a character are better" if some["metric"] == "bits_per_character" else ""))
    width = max(len("model"), *(len(model.run) for model in models))
    answers = "  answers" * any(row["predicted"] for row in found.values())  # letters, which texts have none of
    mean, first = (f" {'of exams':>9}", "") if exams else ("", "")
    if some.get("mean") == "macro":  # as published: this mean comes first
        mean, first = "", mean
    head = f"loops{first} {'value':>9} {'95 % interval':>17}{mean} {'base':>9} {'gain':>9}{answers}"
    print(f"  {'model':<{width}} {head}")
    for model in models:
        for depth in depths:
            row = found[model.run, depth]
            other = found.get((base.run, depth)) if base and model is not base else None
            ends = row["ci95"] if row["ci95"] and row["items"] > 1 else ()  # one item has no spread
            interval = " – ".join(shown(row, x) for x in ends) or "-"
            macro = f" {shown(row, row['macro']):>9}"
            gain, compared = "-", "-"
            if other and other["value"] is not None and row["value"] is not None:
                sign = 1 if row["higher_is_better"] else -1
                compared, difference = shown(row, other["value"]), sign * (row["value"] - other["value"])
                gain = f"{difference:+.1%}" if row["metric"] == "accuracy" else f"{difference:+.4f}"
            letters = " ".join(f"{letter}:{count}" for letter, count in (row["predicted"] or {}).items())
            print(f"  {model.run:<{width}} {depth:>5}{first and macro} {shown(row, row['value']):>9} "
                  f"{interval:>17}{mean and macro} "
                  f"{compared:>9} {gain:>9}  {letters}".rstrip())  # fmt: skip
            if cut := row.get("cut"):
                print(f"  warning: {cut} replies were cut: they need more tokens (--max_new_tokens)")
            if thoughts := row.get("unfinished_thoughts"):
                print(f"  warning: {thoughts} replies are thoughts without an answer, which is counted as empty")
            if refused := row.get("refused"):
                print(f"  warning: {refused} requests were refused by the server: {REFUSED[row['metric']]}")
            for letter, count in (row["predicted"] or {}).items():
                if row["items"] >= FEWEST and count > BIASED * row["items"]:
                    print(f"  warning: {count} of {row['items']} answers are {letter!r}: letter bias, not knowledge")
        for score in model.published:
            if score["benchmark"] == task.spec["benchmark"] and not task.part:
                of = {"macro": "mean of exams", "micro": "all items alike"}[score["mean"]]
                print(f"  published for {model.run}: {shown(row, score['value'])} ({of}; {score['protocol']}; "
                      f"{score['source']})")  # fmt: skip
    if exams and some["chance"] is not None:
        print_exams(models, found, depths)
    print_matrix(task, models, found, depths)


def print_exams(models: list[ModelUnderTest], found: Found, depths: list[int]) -> None:
    for model in models:
        rows = {depth: found[model.run, depth] for depth in depths}
        exams = rows[depths[0]]["subsets"]
        width = max(16, *(len(exam) for exam in exams))
        loops = "".join(f"{f'at {depth}':>9}" for depth in depths)
        print(f"  {model.run} by exam\n  {'':<{width}} items    chance commonest{loops}")
        for exam, first in exams.items():
            values = "".join(f"{shown(row, row['subsets'][exam]['value']):>9}" for row in rows.values())
            print(f"  {exam:<{width}} {first['items']:>5} {first['chance']:>9.1%} {first['majority']:>9.1%}{values}")


def print_matrix(task: Task, models: list[ModelUnderTest], found: Found, depths: list[int]) -> None:
    """Mean over seeds, by loops in training and in the test, where several depths were trained."""
    trained: dict[tuple[str, int], list[ModelUnderTest]] = {}
    for model in models:
        if model.trained:
            trained.setdefault((model.trained.dataset, model.trained.total_ut_steps), []).append(model)
    if len(trained) < 2:
        return
    print(f"  {task.name} by loops in training (rows) and in the test")
    print(f"  {'':<16}" + "".join(f"{depth:>9}" for depth in depths))
    rows = [("base", [models[0]])] if models[0].kind == "base" else []
    rows += [(f"{dataset} {loops}", trained[dataset, loops]) for dataset, loops in sorted(trained)]
    for name, group in rows:
        cells = []
        for depth in depths:
            studies = [found[model.run, depth] for model in group]
            values = [study["value"] for study in studies]
            mean = None if None in values else math.fsum(values) / len(values)  # not of fewer seeds than elsewhere
            cells.append(shown(studies[0], mean))
        print(f"  {name:<16}" + "".join(f"{cell:>9}" for cell in cells))


def print_gaps(rows: list[tuple[str, int, list[dict], list[dict]]]) -> None:
    """English - Thai on the same questions; rows: run, depth, and the lines of items.jsonl in Thai and in English."""
    width = max(len("model"), *(len(run) for run, *_ in rows))
    print("\nbelebele, English - Thai on the same questions: the cross-lingual gap")
    print(f"  {'model':<{width}} loops questions   English      Thai       gap     95 % interval")
    for run, depth, thai, english in rows:
        try:
            pairs = benchmarks.language_pairs(thai, english)
        except ValueError as error:
            print(f"  warning: {run} at {depth} loops: {error}")
            continue
        if pairs:
            gap, low, high = benchmarks.paired_gap(pairs)
            right = [sum(pair[i] for pair in pairs) / len(pairs) for i in (1, 0)]
            interval = f"{low:+.1%} – {high:+.1%}"
            print(f"  {run:<{width}} {depth:>5} {len(pairs):>9} {right[0]:>9.1%} {right[1]:>9.1%} {gap:>+9.1%} "
                  f"{interval:>17}")  # fmt: skip


def print_training(model: ModelUnderTest) -> None:
    log = [row for _, row in read_file(model.folder / "metrics.jsonl")]
    tokens, before, seconds = log[-1]["num_tokens"], 0, 0.0
    for row in log:
        seconds += (row["num_tokens"] - before) / row["tokens_per_second"]
        before = row["num_tokens"]
    what = f"{log[-1]['step']} steps, {tokens:,} tokens"
    print(f"\ntraining of {model.run} at {model.trained.total_ut_steps} loops, {what}")
    print(f"  loss            first {log[0]['loss']:.4f}   last {log[-1]['loss']:.4f}")
    print(f"  token accuracy  first {log[0]['mean_token_accuracy']:.3f}    last {log[-1]['mean_token_accuracy']:.3f}")
    print(f"  tokens/s        {tokens / seconds:,.0f}")
