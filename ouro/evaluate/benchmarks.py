"""What is asked and how answers are read: items of the benchmarks, prompts, parsers, accuracies. No model in here.

    python -c "from ouro.evaluate import benchmarks; print(benchmarks.load('thai_exam')[0])"

configs/evals.yaml says what there is. An item is asked by a list of (prompt, continuations), whose log-probabilities
scoring.py finds; `choose` makes them into one score a letter and one prediction.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ouro.data import sources
from ouro.data.sources import benchmark_place, cell_text, check_columns, count_rows, read_benchmark, read_file
from ouro.data.thai import UNSEEN, as_seen, normalise, trim
from ouro.files import UserError, nearest, read_yaml
from ouro.settings import EVALS, Settings

LETTERS = "abcde"
REPLIES = ("generate", "mt_bench")  # protocols of tasks that a model answers in words
LANGUAGES = ("belebele_thai", "belebele_english")  # tasks of the same questions
FLAGS = ("isAnswerable", "isMultipleChoice", "isSingleChoiceSolution")  # of an exam's item that one choice answers
ANSWER = r"\(([1-5])\)"
# An option of M3Exam: "1. text", "๑. text", "(1) text", or no number
MARKED = rf"(?:\(?[{UNSEEN}]*([1-5๑-๕])[{UNSEEN}]*[.)]\s*)?(.*)"
ANOTHER = re.compile(  # behind a choice: the reply does not choose
    rf"[^\w()\n]*(?:(?:หรือ|\bor\b)[^()\n]{{0,15}}|(?:และ|กับ|ถึง|\band\b|[/,&+–-])\s*(?:ข้อ\s*)?){ANSWER}", re.IGNORECASE
)
Spell = Callable[[str], str]  # `normalise`, or `str`, which leaves a text as it is
Z = 1.959964  # standard errors on either side of an estimate in a 95 % interval


@dataclass
class Task:
    """A row of `tasks` in evals.yaml with its items and the prompts that are made of them."""

    name: str
    spec: dict
    items: list[dict]
    prompts: list[list[tuple[str, list[str]]]]  # of each item, as `item_prompts` makes them; none for texts
    benchmark: dict  # its row of `benchmarks`, at the commit that it was read at
    skipped: int = 0  # empty texts
    part: str | None = None  # "959 of 1,169 items" where they are not those that the benchmark is known by

    @property
    def sha256(self) -> str:
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
    """The row of `benchmarks` that a task is about. Its revision is the commit that is there now, so that all its files
    are read at that one; None for a local copy.
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
    """As `load`, of the row that `row_of` gives; and how many texts were passed over because they are empty."""
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
    """What brings a task's texts to one spelling: a protocol that others published reads them as they are."""
    return normalise if settings.normalise_thai and spec.get("normalise", True) else str


def stripped(texts: Iterable[str]) -> dict[str, bool]:
    """The mark of an item that has unseen characters at an end of a text: `trim` takes them off, for before an option
    they would decide its score."""
    return {"stripped": True} if any(trim(text) not in (text, "") for text in texts) else {}


def miscounted(items: list[dict], benchmark: dict) -> str:
    """Where a whole benchmark has other numbers of items than evals.yaml says; empty if nowhere."""
    # M3Exam's is counted as one: m3exam-low, m3exam-mid, m3exam-high
    found = Counter(item.get("subset", item.get("category", "")).partition("-")[0] for item in items)
    wanted = {name: n for name, n in benchmark.get("items", {}).items() if name in benchmark.get("subsets", (name,))}
    names = dict.fromkeys((*wanted, *found)) if wanted else ()
    wrong = [name for name in names if found[name] != wanted.get(name, 0)]
    return ", ".join(f"{name} {found[name]} items ({wanted.get(name, 0)} expected)" for name in wrong)


def benchmark_rows(name: str, spec: dict, local: str | None) -> Iterator[tuple[str, str, dict]]:
    """Of each row of a benchmark its subset, where it stands, and the row. Where `item` has an `order`, the rows of a
    subset stand by these columns, so that files of the same questions have them at the same numbers."""
    for subset, file in zip(spec.get("subsets", [""]), sources.benchmark_files(spec), strict=True):
        rows = read_benchmark(name, spec, local, file)
        if order := spec.get("item", {}).get("order"):
            rows = sorted(rows, key=lambda pair: [cell_text(pair[1], column, pair[0]) for column in order])
        yield from ((subset, where, row) for where, row in rows)


def load_items(name: str, spec: dict, local: str | None, spell: Spell = normalise) -> list[dict]:
    """The items of a benchmark of choices, each {id, subset, question, options: {letter: text}, gold}, perhaps with the
    `passage` that it is about, and `stripped`.

    Items of one passage have the same `cluster`; `stratum` is the exam that an item is of, unless its file is no exam.
    Options keep their letters; an empty one is left out, so that no letter moves and no row is dropped.
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


def first_of_each(items: list[dict], limit: int | None, group: str = "subset") -> list[dict]:
    """The first `limit` items of each group; None: all."""
    kept, count = [], Counter()
    for item in items:
        count[item[group]] += 1
        if limit is None or count[item[group]] <= limit:
            kept.append(item)
    return kept


def letter_of(key: str) -> str:
    """The letter of a key that is a number, counted from 1; else the key."""
    return dict(enumerate(LETTERS, 1)).get(int(key), key) if re.fullmatch(r"\d", key) else key  # \d: Thai digits too


def choice_item(question: str, options: Iterable[str], gold: str, where: str) -> dict:
    """An item of one question; empty options are left out."""
    by_letter = {letter: text for letter, text in zip(LETTERS, options, strict=False) if text}
    if len(by_letter) < 2 or gold not in by_letter:
        raise UserError(f"{where}: answer {gold!r} is not among the options {', '.join(by_letter)}, or is the only one")
    return {"passage": "", "question": question, "options": by_letter, "gold": gold}


def column_item(row: dict, spec: dict, where: str, spell: Spell) -> dict:
    """An item of a row with a column for each option."""
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
    """An item of M3Exam, whose options are one list and say their numbers; the exam is the subset."""
    columns = spec["m3exam"]
    shared = next((column for column in columns["passage"] if column in row), columns["passage"][0])
    check_columns(where, row, [columns[key] for key in ("question", "options", "answer", "exam")] + [shared])

    def text_of(value: object) -> str:
        """A text, or several of them as lines."""
        lines = value if isinstance(value, list) else [value]
        return "\n".join(cell_text({"text": line}, "text", where) for line in lines)

    exam = f"m3exam-{trim(cell_text(row, columns['exam'], where, needed=True))}"
    raw = [text_of(row[column]) for column in (columns["question"], columns["answer"], shared)]
    question, key, passage = (trim(spell(text)) for text in raw)
    listed = [text_of(option) for option in row[columns["options"]] or ()]
    marked = [re.match(MARKED, trim(option), re.DOTALL) for option in listed]
    numbers = [found[1] and int(found[1]) for found in marked]  # int() reads Thai digits too
    labelled = all(number for number, found in zip(numbers, marked, strict=True) if found[0])
    texts = [found[2 if labelled else 0] for found in marked]
    if key.isdecimal() and numbers.count(int(key)) == 1:  # the option that says so, else the one in that place
        key = str(numbers.index(int(key)) + 1)
    item = choice_item(question, [trim(spell(text)) for text in texts], letter_of(key), where) | {"subset": exam}
    if passage:
        item |= {"passage": f"{passage}\n", "cluster": digest(passage)[:16]}
    return item | stripped([*raw, *listed, *texts])


def exam_item(row: dict, spec: dict, where: str, spell: Spell) -> dict | None:
    """An item of OpenThaiEval, whose `options` are the text that lists them, and gold "1" … "5"; None if it is not
    answered by one choice.
    Raises UserError: a column or exam that there is none of, or an answer without a number."""
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


LAYOUTS = {"item": column_item, "m3exam": m3exam_item, "exams": exam_item}


def load_passages(name: str, spec: dict, local: str | None, spell: Spell) -> list[dict]:
    """The passages of a benchmark of questions on them, each once: {id, subset, cluster, text}. The id is made of the
    article and the passage's place in it, so that a passage has the same one in each language."""
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
    """The examples before each item, by subset: the first `shots` items of the train split, in the `order` of the task.
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
    """Texts, each {id, subset, text}, and how many were empty and passed over: all of a local file or folder that is
    named for the task (JSONL, JSON, Parquet), else `take` of the held-out part of a training set or of the benchmark's
    file, evenly spaced: files are often sorted. The number in an id is the row's.
    Raises UserError: no such file, a row without that column, or more empty ones than `max_empty_share`."""
    spell, local, key = spelling({}, settings), settings.paths.get(task), spec["text"]
    if local is not None:
        if not Path(local).exists():
            raise UserError(f"paths: {task}={local}: no such file or folder")
        files = sources.split_files(Path(local), None, "train")
    elif "source" in spec:
        files = spec["source"].files["held_out"]
    else:
        (file,) = sources.benchmark_files(spec)
        files = [sources.benchmark_path(spec["name"], spec, settings.paths.get(spec["name"]), file)]
    take, columns = (None, []) if local else (spec["take"], [key])
    step = max(1, sum(map(count_rows, files)) / take) if take else 1  # rows from one text to the next, a fraction
    rows = enumerate((row for file in files for row in read_file(file, columns)), 1)
    sample = islice(((n, *row) for n, row in rows if (n - 1) // step > (n - 2) // step), take)  # one a step
    items, empty = [], []
    for number, where, row in islice(sample, limit):
        text = row.get("text", row.get(key))
        if not {"text", key} & row.keys() or not isinstance(text, str | None):
            raise UserError(f"{where}: no text in {key!r}; keys: {', '.join(row)}")
        if text and trim(text):
            items.append({"id": f"{task}-{number}", "subset": task, "text": spell(text)})
        else:
            empty.append(where)
    if len(empty) > settings.max_empty_share * (len(items) + len(empty)):
        like = f"like {len(empty)} of {len(items) + len(empty)} rows"
        floor = f"more than max_empty_share = {settings.max_empty_share:g}"
        raise UserError(f"{empty[0]}: no text in {key!r}, {like}; {floor}")
    return items, len(empty)


def windows(tokens: list[int], prefix: list[int], window: int, stride: int) -> list[tuple[list[int], int]]:
    """A text as (tokens, where the scored ones begin): each is scored once, after at least window - stride others where
    there are so many; the first ones after `prefix`."""
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
    """What is asked about an item: for each prompt, the continuations that stand for its letters, in their order.

    ours: a prompt for each rotation of the options, and the options' texts after each. labels: one, and the letters.
    generate: one, and nothing."""

    def shown(item: dict, letter: str) -> str:  # HELM's letters are capitals, and none is left out
        return spec["letters"][list(item["options"]).index(letter)] if "letters" in spec else letter

    def question(item: dict, turn: int = 0) -> str:
        """The prompt of an item, the options' texts moved on by `turn` places below the letters that stay."""
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
    """The letters whose scores are compared: the options', or those that the task names."""
    return list(spec.get("labels", item["options"]))


def choose(item: dict, spec: dict, scores: list[list[float]]) -> tuple[dict[str, float], str]:
    """One score a letter from the log-probabilities [prompt][letter], and the letter with the highest, or the key's
    where that one's option has the same text.

    Ties go by a hash of item and letter: by their order, a model without an opinion would have a favourite letter."""
    letters = scored_letters(item, spec)
    if spec["protocol"] == "ours":
        texts = list(item["options"].values())
        scores = [[value / len(text) for value, text in zip(row, texts, strict=True)] for row in scores]
    by_letter = {letter: math.fsum(row[i] for row in scores) / len(scores) for i, letter in enumerate(letters)}

    def rank(letter: str) -> tuple[float, str]:
        return by_letter[letter], hashlib.sha256(f"{item['id']} {letter}".encode()).hexdigest()

    return by_letter, settle(item, max(letters, key=rank))


def right_answers(item: dict) -> set[str]:
    """The key, and the letters or numbers of options that read the same (ThaiExam's ONET has such an item)."""
    options = item["options"]
    if isinstance(options, str):  # "(1) … (2) …"
        # An option begins at the next number; another one is part of its text, as in "(4) only (1) and (2)".
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
    """The prediction, or the key where its option has the key's text."""
    return item["gold"] if prediction and prediction in right_answers(item) else prediction


def parse_choice(reply: str) -> str | None:
    """The number of the choice that a reply names, by the official rules of OpenThaiEval; None if there is none, or
    where these would take the first of several, as of "(1) หรือ (2)"."""
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
    """Accuracy with Wilson's interval, which Brown, Cai and DasGupta (2001) recommend for few trials, beside what
    guessing and always answering the commonest letter would reach. predictions: settled ones."""
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
    """Of (item, prediction): the share of right ones, of guesses that would be, and of the commonest right answer."""
    n = len(pairs)
    options = {"options": lambda item: len(item["options"]), "labels": lambda item: len(spec["labels"]),
               "exams": lambda item: item["choices"]}[spec["chance"]]  # fmt: skip

    def right(item: dict) -> int:
        """How many right answers a guess can meet: a task that names its labels may lack the key's."""
        return sum(answer in spec.get("labels", answer) for answer in right_answers(item))

    return {
        "value": math.fsum(item["gold"] == prediction for item, prediction in pairs) / n,
        "items": n,
        "chance": math.fsum(right(item) / options(item) for item, _ in pairs) / n,
        "majority": Counter(right for item, _ in pairs for right in right_answers(item)).most_common(1)[0][1] / n,
    }


def macro(by_subset: dict[str, float]) -> float:
    """The mean over exams; OpenThaiEval's ten ONET ones count as two, M3 and M6, as in its tables of 2024."""
    groups: dict[str, list[float]] = {}
    for subset, value in by_subset.items():
        groups.setdefault(subset[:7] if subset.startswith("onet_m") else subset, []).append(value)
    return math.fsum(math.fsum(group) / len(group) for group in groups.values()) / len(groups)


def language_pairs(thai: Iterable[dict], english: Iterable[dict]) -> list[tuple[bool, bool]]:
    """Whether each question that both have was answered rightly (in Thai, in English), from the lines of items.jsonl.
    The number after the "-" of an id is the question's.
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
    """English - Thai accuracy with its 95 % interval, of what `language_pairs` gives.

    Bonett and Price (2012): Wald's interval after one more disagreement of either kind, which covers in small samples.
    """
    n = len(pairs)
    gained, lost = (sum(pair == kind for pair in pairs) for kind in ((False, True), (True, False)))
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half)


def bits_per_character(bits: list[float], characters: list[int]) -> dict:
    """The ratio of the sums, with the interval of a ratio estimator (Cochran 1977, 6.4) over texts."""
    n, total = len(bits), sum(characters)
    value = math.fsum(bits) / total
    rest = math.fsum((b - value * c) ** 2 for b, c in zip(bits, characters, strict=True))
    stderr = math.sqrt(rest * n / (n - 1)) / total if n > 1 else None
    interval = [value - Z * stderr, value + Z * stderr] if n > 1 else [value, value]
    of_choices = dict.fromkeys(("chance", "majority", "macro", "macro_chance", "macro_majority", "predicted"))
    return {"items": n, "value": value, "ci95": interval, "stderr": stderr, "subsets": {}, "unparsed": 0} | of_choices
