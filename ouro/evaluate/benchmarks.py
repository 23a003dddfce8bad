"""Benchmarks without a model: their items, the prompts made of them, what an answer means, and accuracies.

    python -c "from ouro.evaluate import benchmarks; print(benchmarks.load('thai_exam')[0])"

configs/evals.yaml lists benchmarks and tasks. An item becomes a list of (prompt, continuations) by `item_prompts`;
scoring.py finds the continuations' log-probabilities; `choose` makes of these a score for each letter and a prediction.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from ouro.data import sources
from ouro.data.formats import cell_text, check_columns
from ouro.data.sources import benchmark_place, read_benchmark
from ouro.data.thai import UNSEEN, as_seen, normalise, trim
from ouro.files import UserError, nearest, read_yaml
from ouro.settings import EVALS, Settings

LETTERS = "abcde"
REPLIES = ("generate", "mt_bench")  # protocols of tasks that a model answers in words
LANGUAGES = ("belebele_thai", "belebele_english")  # tasks of the same questions
# Columns of OpenThaiEval, true in an item that is answered by one choice.
FLAGS = ("isAnswerable", "isMultipleChoice", "isSingleChoiceSolution")
ANSWER = r"\(([1-5])\)"  # how OpenThaiEval writes a choice, in items and in replies
# An option of M3Exam, as (number or None, text): "1. text", "๑. text", "(1) text", or a text without a number.
MARKED = rf"(?:\(?[{UNSEEN}]*([1-5๑-๕])[{UNSEEN}]*[.)]\s*)?(.*)"
ANOTHER = re.compile(  # what follows a choice in a reply that names two, as "(1) or (2)", and so does not choose
    rf"[^\w()\n]*(?:(?:หรือ|\bor\b)[^()\n]{{0,15}}|(?:และ|กับ|ถึง|\band\b|[/,&+–-])\s*(?:ข้อ\s*)?){ANSWER}", re.IGNORECASE
)
Spell = Callable[[str], str]  # brings a text to one spelling: `normalise`, or `str`, which leaves it as it is
Z = 1.959964  # standard errors on either side of an estimate in a 95 % interval


@dataclass
class Task:
    """A row of `tasks` in evals.yaml with its items and the prompts that are made of them."""

    name: str
    spec: dict
    items: list[dict]
    prompts: list[list[tuple[str, list[str]]]]  # of each item, as `item_prompts` makes them; [] for a task of texts
    benchmark: dict  # its row of `benchmarks`, with the commit that was read as `revision`
    skipped: int = 0  # texts that were empty and are not among the items
    part: str | None = None  # "959 of 1,169 items" where these are not all items of the benchmark

    @property
    def sha256(self) -> str:
        """A hash of all that a model is asked, and of the right answers."""
        asked = self.prompts or self.items
        return digest([[what, item.get("gold")] for what, item in zip(asked, self.items, strict=True)])


def digest(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def table() -> dict[str, dict]:
    """configs/evals.yaml: benchmarks, tasks, baselines."""
    return read_yaml(EVALS)


def named(text: str, known: Iterable[str], what: str) -> list[str]:
    """The names in a comma-separated list, each once. what: "task", "subset". Raises UserError: an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} {name!r}{nearest(name, known)}")
    return names


def row_of(task: str, settings: Settings) -> dict:
    """The row of `benchmarks` that a task is about. A branch as its revision is replaced by the commit that it names
    now, so that all files are read at one commit; None for a local copy.
    Raises UserError: no network and no copy."""
    spec = table()["tasks"][task]
    name = spec["benchmark"]
    row = table()["benchmarks"][name] | {"name": name}
    if "subsets" in spec:
        row["subsets"] = spec["subsets"]
    if spec["protocol"] == "text" and "passages" in row:
        row["items"] = row["passages"]
    if {task, name} & settings.paths.keys():
        return row | {"revision": None}
    if "dataset" in row:
        source = sources.find_source(replace(settings, dataset=row["dataset"], dataset_path=None))
        return row | {"source": source, "revision": source.commit}
    return row | {"revision": sources.benchmark_commit(name, row)}


def load(
    task: str, settings: Settings | None = None, limit: int | None = None, subsets: Iterable[str] = ()
) -> list[dict]:
    """The items of a task: {id, subset, …}, in the spelling that the settings say. `limit`: the first of each subset.
    Raises UserError: no such file or folder, an item that is not one of this benchmark."""
    settings = settings or Settings()
    return read(task, row_of(task, settings), settings, limit, subsets)[0]


def read(
    task: str, benchmark: dict, settings: Settings, limit: int | None = None, subsets: Iterable[str] = ()
) -> tuple[list[dict], int]:
    """The items as of `load`, and the number of texts left out because they are empty. benchmark: as of `row_of`."""
    name, skipped = benchmark["name"], 0
    local, spec = settings.paths.get(name), table()["tasks"][task]
    if "item" in benchmark:
        chosen = [subset for subset in benchmark["subsets"] if subset in subsets] or benchmark["subsets"]
        there = [subset for subset in chosen if local and benchmark_place(benchmark | {"subsets": [subset]}, local)]
        if local and 0 < len(there) < len(chosen):
            absent = ", ".join(subset for subset in chosen if subset not in there)
            remedy = f"--subsets {','.join(there)} scores what is there, and the results say so"
            raise UserError(f"paths: {name}={local}: no {absent} in it; {remedy}")
        benchmark = benchmark | {"subsets": chosen}
    if "text" in benchmark:
        items, skipped = load_texts(task, benchmark, settings, limit)
    else:
        load_all = load_passages if spec["protocol"] == "text" else load_items
        items = first_of_each(load_all(name, benchmark, local, spelling(spec, settings)), limit)
    if not items:
        raise UserError(f"{settings.paths.get(task) or local or benchmark.get('hub_id', name)}: no items of {task}")
    return items, skipped


def spelling(spec: dict, settings: Settings) -> Spell:
    """The function that brings a task's texts to one spelling. Tasks that follow a published protocol (`normalise:
    false` in evals.yaml) leave them as they are."""
    return normalise if settings.normalise_thai and spec.get("normalise", True) else str


def stripped(texts: Iterable[str]) -> dict[str, bool]:
    """{"stripped": True} for an item whose texts begin or end with white space or unseen characters, else {}. `trim`
    takes these off: before an option they would decide its score."""
    return {"stripped": True} if any(trim(text) not in (text, "") for text in texts) else {}


def miscounted(items: list[dict], benchmark: dict) -> str:
    """In words, the subsets that have another number of items than evals.yaml says; "" if none has."""
    # m3exam-low, m3exam-mid and m3exam-high are counted together, as m3exam.
    found = Counter(item.get("subset", item.get("category", "")).partition("-")[0] for item in items)
    wanted = {name: n for name, n in benchmark.get("items", {}).items() if name in benchmark.get("subsets", (name,))}
    names = dict.fromkeys((*wanted, *found)) if wanted else ()
    wrong = [name for name in names if found[name] != wanted.get(name, 0)]
    return ", ".join(f"{name} {found[name]} items ({wanted.get(name, 0)} expected)" for name in wrong)


def benchmark_rows(name: str, spec: dict, local: str | None) -> Iterator[tuple[str, str, dict]]:
    """(subset, "FILE, line 7", row) for each row of a benchmark. Where `item` in evals.yaml has an `order`, the rows of
    each subset are sorted by these columns, so that a question has the same number in files of several languages."""
    for subset, file in zip(spec.get("subsets", [""]), sources.benchmark_files(spec), strict=True):
        rows = read_benchmark(name, spec, local, file)
        if order := spec.get("item", {}).get("order"):
            rows = sorted(rows, key=lambda pair: [cell_text(pair[1], column, pair[0]) for column in order])
        yield from ((subset, where, row) for where, row in rows)


def load_items(name: str, spec: dict, local: str | None, spell: Spell = normalise) -> list[dict]:
    """The items of a benchmark of choices, each {id, subset, question, options: {letter: text}, gold}, perhaps with the
    `passage` that it is about, and `stripped`.

    Items of one passage have the same `cluster`. `stratum` is the exam that an item belongs to; items of a benchmark
    with passages for all questions have none. An empty option is left out, and the others keep their letters.
    Raises UserError: a file is missing, or an item has no question, fewer than two options, something that is no text,
    or a gold letter that is not among them."""
    to_item = next(function for layout, function in LAYOUTS.items() if layout in spec)
    items, count = [], Counter()
    for subset, where, row in benchmark_rows(name, spec, local):
        if item := to_item(row, spec, where, spell):
            subset = item.get("subset", subset)
            count[subset] += 1
            stratum = {} if "cluster" in spec.get("item", ()) else {"stratum": subset}
            items.append({"id": f"{subset}-{count[subset]}", "subset": subset} | stratum | item)
    return items


def first_of_each(items: list[dict], limit: int | None) -> list[dict]:
    """The first `limit` items of each subset; None: all."""
    kept, count = [], Counter()
    for item in items:
        count[item["subset"]] += 1
        if limit is None or count[item["subset"]] <= limit:
            kept.append(item)
    return kept


def letter_of(key: str) -> str:
    """The letter of a right answer that is given as a number ("1" -> "a"); else what is given."""
    return dict(enumerate(LETTERS, 1)).get(int(key), key) if re.fullmatch(r"\d", key) else key  # \d: Thai digits too


def choice_item(question: str, options: Iterable[str], gold: str, where: str) -> dict:
    """An item: question, options by letter, without the empty ones, and the right letter.
    Raises UserError: fewer than two options, or the right letter is not among them."""
    by_letter = {letter: text for letter, text in zip(LETTERS, options, strict=False) if text}
    if len(by_letter) < 2 or gold not in by_letter:
        raise UserError(f"{where}: answer {gold!r} is not among the options {', '.join(by_letter)}, or is the only one")
    return {"passage": "", "question": question, "options": by_letter, "gold": gold}


def column_item(row: dict, spec: dict, where: str, spell: Spell) -> dict:
    """An item from a row that has a column for each option (`item` in evals.yaml)."""
    columns = spec["item"]
    used = [columns[key] for key in ("passage", "question", "answer") if key in columns]
    raw = {column: cell_text(row, column, where, column in used) for column in (*used, *columns["options"])}
    texts = {column: trim(spell(text)) for column, text in raw.items()}
    options = [texts[column] for column in columns["options"]]
    item = choice_item(texts[columns["question"]], options, letter_of(texts[columns["answer"]]), where)
    if "passage" in columns:
        item |= {"passage": texts[columns["passage"]], "cluster": cell_text(row, columns["cluster"], where)}
    return item | stripped(raw.values())


def m3exam_item(row: dict, spec: dict, where: str, spell: Spell) -> dict:
    """An item from a row of M3Exam, in which one column lists the options, mostly with their numbers. Its subset is the
    exam."""
    columns = spec["m3exam"]
    shared = next((column for column in columns["passage"] if column in row), columns["passage"][0])
    check_columns(where, row, [columns[key] for key in ("question", "options", "answer", "exam")] + [shared])

    def text_of(value: object) -> str:
        """A text, or several of them as lines."""
        lines = value if isinstance(value, list) else [value]
        return "\n".join(cell_text({"text": line}, "text", where) for line in lines)

    if not isinstance(row[columns["options"]], list):  # of a text each letter would be an option
        raise UserError(f"{where}: {columns['options']!r} must be a list, found {row[columns['options']]!r:.99}")
    exam = f"m3exam-{trim(cell_text(row, columns['exam'], where, needed=True))}"
    raw = [text_of(row[column]) for column in (columns["question"], columns["answer"], shared)]
    question, key, passage = (trim(spell(text)) for text in raw)
    listed = [text_of(option) for option in row[columns["options"]]]
    marked = [re.match(MARKED, trim(option), re.DOTALL) for option in listed]
    numbers = [found[1] and int(found[1]) for found in marked]  # int() reads Thai digits too
    labelled = all(number for number, found in zip(numbers, marked, strict=True) if found[0])
    texts = [found[2 if labelled else 0] for found in marked]
    if key.isdecimal() and numbers.count(int(key)) == 1:  # the option of that number, else the one in that place
        key = str(numbers.index(int(key)) + 1)
    item = choice_item(question, [trim(spell(text)) for text in texts], letter_of(key), where) | {"subset": exam}
    if passage:
        item |= {"passage": f"{passage}\n", "cluster": digest(passage)[:16]}
    return item | stripped([*raw, *listed, *texts])


def exam_item(row: dict, spec: dict, where: str, spell: Spell) -> dict | None:
    """An item from a row of OpenThaiEval; None if it is not answered by one choice. Its `options` are one text that
    lists them all, gold is "1" … "5", and `choices` is how many options there are.
    Raises UserError: a column is missing, the exam is unknown, or the answer has no number."""
    check_columns(where, row, ("exam_type", "instruction", "input", "result", *FLAGS))
    exam = trim(str(row["exam_type"]))
    if exam not in spec["exams"]:
        raise UserError(f"{where}: exam_type {exam!r} is none of {', '.join(spec['exams'])}")
    if not all(trim(str(row[flag])).lower() in ("true", "1", "1.0") for flag in FLAGS):
        return None
    gold = re.search(ANSWER, cell_text(row, "result", where))
    if gold is None:
        raise UserError(f"{where}: no (1) … (5) in result {row['result']!r}")
    raw = [cell_text(row, key, where, needed=True) for key in ("instruction", "input")]
    question, options = (trim(spell(text.replace("\t", " "))) for text in raw)
    item = {"subset": exam, "question": question, "options": options, "gold": gold[1], "choices": spec["exams"][exam]}
    return item | stripped(raw)


# By the key that a row of `benchmarks` in evals.yaml has: how a row of its files is read.
LAYOUTS = {"item": column_item, "m3exam": m3exam_item, "exams": exam_item}


def load_passages(name: str, spec: dict, local: str | None, spell: Spell) -> list[dict]:
    """The passages that a benchmark asks about, each once: {id, subset, cluster, text}. cluster: the article. The id is
    made of the article and the passage's number in it, so that it is the same in each language."""
    columns, articles = spec["item"], {}
    for subset, where, row in benchmark_rows(name, spec, local):
        passages = articles.setdefault((subset, cell_text(row, columns["cluster"], where, needed=True)), [])
        text = trim(spell(cell_text(row, columns["passage"], where, needed=True)))
        if text not in passages:
            passages.append(text)
    return [
        {"id": f"passage-{digest([article, n])[:12]}", "subset": subset, "cluster": article, "text": text}
        for (subset, article), passages in articles.items()
        for n, text in enumerate(passages)
    ]


def load_shots(spec: dict, benchmark: dict, settings: Settings, subsets: Iterable[str]) -> dict[str, list[dict]]:
    """By subset, the solved examples that stand before each question: the first `shots` items of the train split, in
    the task's `order`; {} for a task without examples.
    Raises UserError: no train split, or fewer items in it."""
    if "shots" not in spec:
        return {}
    name = spec["benchmark"]
    train = benchmark | {"split": "train", "subsets": list(subsets)}
    items = load_items(name, train, settings.paths.get(name), spelling(spec, settings))
    items = first_of_each(items, spec["shots"])
    shots = {subset: [item for item in items if item["subset"] == subset] for subset in subsets}
    if few := [subset for subset, found in shots.items() if len(found) < spec["shots"]]:
        raise UserError(f"{name}: {spec['shots']} examples are asked for, the train split has fewer of {few[0]}")
    order = spec.get("order", {})
    return {subset: [found[n] for n in order.get(subset, range(len(found)))] for subset, found in shots.items()}


def load_texts(task: str, spec: dict, settings: Settings, limit: int | None) -> tuple[list[dict], int]:
    """The texts of `text_rows`, each {id, subset, text}, and how many were left out because they are empty. An id has
    the row's number.
    Raises UserError: as `text_rows`, or more empty ones than `max_empty_share`."""
    spell, key, items, empty = spelling({}, settings), spec["text"], [], []
    for number, where, text in islice(sources.text_rows(task, spec, settings), limit):
        if trim(text):
            items.append({"id": f"{task}-{number}", "subset": task, "text": spell(text)})
        else:
            empty.append(where)
    if len(empty) > settings.max_empty_share * (len(items) + len(empty)):
        like = f"like {len(empty)} of {len(items) + len(empty)} rows"
        floor = f"more than max_empty_share = {settings.max_empty_share:g}"
        raise UserError(f"{empty[0]}: no text in {key!r}, {like}; {floor}")
    return items, len(empty)


def windows(tokens: list[int], prefix: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
    """A long text in overlapping windows, each (tokens, where the scored ones begin). Each token of the text is scored
    in one window, after at least window - stride tokens where there are so many before it. `prefix` stands before the
    text, and is not scored."""
    ids = prefix + tokens
    if len(ids) <= window:
        return [(ids, len(prefix))]
    pieces, done = [(ids[:window], len(prefix))], window
    while done < len(ids):
        end = min(done + stride, len(ids))
        start = max(end - window, 0)
        pieces.append((ids[start:end], done - start))
        done = end
    return pieces


def item_prompts(item: dict, spec: dict, shots: list[dict] = ()) -> list[tuple[str, list[str]]]:
    """What a model is asked about an item: a list of (prompt, continuations that are scored after it).

    Protocol ours: a prompt for each rotation of the options, each with all options' texts as continuations. labels: one
    prompt, with the letters as continuations. generate: one prompt without continuations, to which the model replies.
    shots: solved examples before the question, for labels."""

    def shown(item: dict, letter: str) -> str:  # HELM writes capitals, and no gap where an option was left out
        return spec["letters"][list(item["options"]).index(letter)] if "letters" in spec else letter

    def question(item: dict, turn: int = 0) -> str:
        """The prompt of an item. The options' texts are rotated by `turn` places; the letters stay where they are."""
        letters, texts = list(item["options"]), list(item["options"].values())
        pairs = zip(letters, texts[turn:] + texts[:turn], strict=True)
        options = "\n".join(spec["option"].format(letter=shown(item, letter), text=text) for letter, text in pairs)
        return spec["prompt"].format(passage=item.get("passage"), question=item["question"], options=options)

    if spec["protocol"] == "ours":
        texts = [f" {text}" for text in item["options"].values()]
        return [(question(item, turn), texts) for turn in range(len(texts))]
    if spec["protocol"] == "generate":
        return [(spec["prompt"].format(question=item["question"], options=item["options"]), [])]
    examples = [f"{question(shot)} {shown(shot, shot['gold'])}\n\n" for shot in shots]
    text = spec.get("instructions", "") + "".join(examples) + question(item)
    return [(text, [f" {shown(item, letter)}" for letter in scored_letters(item, spec)])]


def scored_letters(item: dict, spec: dict) -> list[str]:
    """The letters whose scores are compared: the task's `labels`, else those of the item's options."""
    return list(spec.get("labels", item["options"]))


def choose(item: dict, spec: dict, scores: list[list[float]]) -> tuple[dict[str, float], str]:
    """({letter: score}, predicted letter) from an item's log-probabilities [prompt][letter], as `item_prompts` orders
    them.

    The score is the mean over prompts; for protocol ours, of log-probabilities per character of the option. The
    prediction is the letter with the highest score, see also `settle`. Equal scores are decided by a hash of item and
    letter: by the letters' order, a model without an opinion would seem to prefer the first one."""
    letters = scored_letters(item, spec)
    if spec["protocol"] == "ours":
        texts = list(item["options"].values())
        scores = [[value / len(text) for value, text in zip(row, texts, strict=True)] for row in scores]
    by_letter = {letter: math.fsum(row[i] for row in scores) / len(scores) for i, letter in enumerate(letters)}

    def rank(letter: str) -> tuple[float, str]:
        return by_letter[letter], hashlib.sha256(f"{item['id']} {letter}".encode()).hexdigest()

    return by_letter, settle(item, max(letters, key=rank))


def right_answers(item: dict) -> set[str]:
    """The right letter or number, and those of options with the same text (ThaiExam's ONET has such an item)."""
    options = item["options"]
    if isinstance(options, str):  # "(1) … (2) …"
        # An option begins where the number after the last option's stands. Another number is part of an option's text,
        # as in "(4) only (1) and (2)".
        starts = []
        for mark in re.finditer(ANSWER, options):
            if int(mark[1]) == len(starts) + 1:
                starts.append(mark)
        ends = [mark.start() for mark in starts[1:]] + [len(options)]
        options = {mark[1]: options[mark.end() : end] for mark, end in zip(starts, ends, strict=True)}
    texts = {letter: as_seen(text) for letter, text in options.items()}
    between = {text[-1:] for text in [*texts.values()][:-1]}
    if isinstance(item["options"], str) and len(between) == 1 and between <= {",", ";"}:  # "(1) 5, (2) 7"
        texts = {letter: text.rstrip(" ,;") for letter, text in texts.items()}
    gold = item.get("gold")
    return {gold, *(letter for letter, text in texts.items() if text and text == texts.get(gold))}


def settle(item: dict, prediction: str | None) -> str | None:
    """The prediction; but the right letter where the predicted option has the same text."""
    return item["gold"] if prediction and prediction in right_answers(item) else prediction


def parse_choice(reply: str) -> str | None:
    """The number of the choice that a reply names, by the official rules of OpenThaiEval; None if it names none, or
    names several, as "(1) หรือ (2)" does, of which those rules would take the first."""
    reply = reply.strip()
    reply = {"entailment": "(1)", "neutral": "(2)", "contradiction": "(3)"}.get(reply, reply)
    for phrase in ("คำตอบที่ถูกต้องคือ", "คำตอบคือ", "ตอบว่า:"):
        if phrase in reply:
            reply = reply.split(phrase)[-1]
            break
    found = re.search(ANSWER, reply)
    another = found and ANOTHER.match(reply, found.end())
    return found[1] if found and (not another or another[1] == found[1]) else None


def accuracy(items: list[dict], predictions: list[str | None], spec: dict) -> dict:
    """The accuracy, over all items and by subset, with Wilson's interval, which Brown, Cai and DasGupta (2001)
    recommend for few trials; beside it what guessing reaches (`chance`) and what always giving the commonest letter
    does (`majority`). predictions: as of `choose` or `settle`; None counts as wrong."""
    from scipy.stats import binomtest  # takes a second to import, which training's start would have to wait for

    pairs = list(zip(items, predictions, strict=True))
    whole = shares(pairs, spec)
    subsets = {
        subset: shares([pair for pair in pairs if pair[0]["subset"] == subset], spec)
        for subset in dict.fromkeys(item["subset"] for item in items)
    }
    n, value = whole["items"], whole["value"]
    return whole | {
        "ci95": [float(end) for end in binomtest(round(value * n), n).proportion_ci(0.95, "wilson")],
        "stderr": math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None,
        **{
            name: macro({subset: row[key] for subset, row in subsets.items()})
            for name, key in (("macro", "value"), ("macro_chance", "chance"), ("macro_majority", "majority"))
        },
        "subsets": subsets,
        "predicted": dict(sorted(Counter(p for p in predictions if p is not None).items())),
        "unparsed": predictions.count(None),
    }


def shares(pairs: list[tuple[dict, str | None]], spec: dict) -> dict:
    """For pairs (item, prediction): the share of right predictions, and what guessing and the commonest letter
    reach."""
    n = len(pairs)
    options = {"options": lambda item: len(item["options"]), "labels": lambda item: len(spec["labels"]),
               "exams": lambda item: item["choices"]}[spec["chance"]]  # fmt: skip

    def right(item: dict) -> int:
        """How many of the right letters a guess can name: the task's `labels` may lack some."""
        return sum(answer in spec.get("labels", answer) for answer in right_answers(item))

    return {
        "value": math.fsum(item["gold"] == prediction for item, prediction in pairs) / n,
        "items": n,
        "chance": math.fsum(right(item) / options(item) for item, _ in pairs) / n,
        "majority": Counter(right for item, _ in pairs for right in right_answers(item)).most_common(1)[0][1] / n,
    }


def macro(by_subset: dict[str, float]) -> float:
    """The mean over subsets. OpenThaiEval's ten ONET exams count as two, M3 and M6, as in its tables of 2024."""
    groups: dict[str, list[float]] = {}
    for subset, value in by_subset.items():
        groups.setdefault(subset[:7] if subset.startswith("onet_m") else subset, []).append(value)
    return math.fsum(math.fsum(group) / len(group) for group in groups.values()) / len(groups)


def language_pairs(thai: Iterable[dict], english: Iterable[dict]) -> list[tuple[bool, bool]]:
    """(right in Thai, right in English) for each question that both have, from lines of items.jsonl. The two lines of a
    question have the same number after the last "-" of their ids.
    Raises ValueError: two of a number have different answers, so they are not the same question."""
    other, found = {line["id"].rpartition("-")[2]: line for line in english}, []
    for line in thai:
        twin = other.get(line["id"].rpartition("-")[2])
        if twin and twin["gold"] != line["gold"]:
            raise ValueError(f"{line['id']} and {twin['id']} have different answers: they are not the same question")
        if twin:
            found.append((line["value"] == 1, twin["value"] == 1))
    return found


def paired_gap(pairs: list[tuple[bool, bool]]) -> tuple[float, float, float]:
    """(difference, lower end, upper end) of English minus Thai accuracy, with a 95 % interval, from `language_pairs`.

    Bonett and Price (2012): Wald's interval with one disagreement of either kind added, which is wide enough for small
    samples, too."""
    n = len(pairs)
    gained, lost = (sum(pair == kind for pair in pairs) for kind in ((False, True), (True, False)))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half)


def bits_per_character(bits: list[float], characters: list[int]) -> dict:
    """Bits of all texts / characters of all texts, with the interval of a ratio estimator (Cochran 1977, 6.4); and None
    for what only choices have."""
    n, total = len(bits), sum(characters)
    value = math.fsum(bits) / total
    rest = math.fsum((b - value * c) ** 2 for b, c in zip(bits, characters, strict=True))
    stderr = math.sqrt(rest * n / (n - 1)) / total if n > 1 else None
    interval = [value - Z * stderr, value + Z * stderr] if n > 1 else [value, value]
    of_choices = dict.fromkeys(("chance", "majority", "macro", "macro_chance", "macro_majority", "predicted"))
    return {"items": n, "value": value, "ci95": interval, "stderr": stderr, "subsets": {}, "unparsed": 0} | of_choices
