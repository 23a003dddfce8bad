"""The data report: what was read, kept, dropped and trained of a training set, and why that is refused."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ouro.data.batches import IGNORE, Rows
from ouro.data.chats import END_OF_TURN, Chat, Tokens, encode_texts
from ouro.data.formats import read_file
from ouro.data.thai import count_letters
from ouro.files import ROOT, one_line, printable, write_json
from ouro.settings import Settings

import numpy as np
from pythainlp.tokenize import word_tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POLICIES = {  # as the report shows them
    "drop": "drop: rows left out",
    "truncate_prompt_cut": "truncate_prompt: shortened",
    "truncate_prompt_dropped": "truncate_prompt: left out",
    "split_pieces": "split: pieces made of them",
    "truncate_ends_lost": "truncate: ends lost",
}
KEPT = 0.95  # of the rows: the report says which max_length keeps so many whole
ROUND = 512  # tokens that it is a multiple of
SAMPLE = 200  # answers whose tokens per character and word are measured
BEYOND = "beyond max_tokens"
PLACES = 5  # of rows that the report names for each reason


@dataclass
class Tally:
    """What is counted row by row; all but the last six stand in the report under the same names."""

    rows_in: int = 0
    rows_kept: int = 0
    rows_dropped: Counter = field(default_factory=Counter)  # why -> rows
    rows_touched: Counter = field(default_factory=Counter)  # kept rows that were changed: how -> rows
    first_dropped: dict = field(default_factory=dict)  # why or how -> the places of the first such rows
    trained_tokens: int = 0
    licences: Counter = field(default_factory=Counter)
    licences_left_out: Counter = field(default_factory=Counter)
    unread_keys: Counter = field(default_factory=Counter)  # of turns, and of rows what sounds like a mark
    duplicates: Counter = field(default_factory=Counter)
    overlap: list = field(default_factory=list)
    lengths: array = field(default_factory=lambda: array("q"))  # of rows before the length policy, see measure()
    bounds: array = field(default_factory=lambda: array("q"))  # of all of them, end to end
    answers: list = field(default_factory=list)  # a random sample of them
    letters: Counter = field(default_factory=Counter)  # Thai ones, all
    ended: int = 0  # rows whose answer is trained up to its end
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def place(self, reason: str, where: str) -> None:
        places = self.first_dropped.setdefault(reason, [])
        if len(places) < PLACES:
            places.append(where)

    def measure(self, tokens: int, cuttable: int, trained: list[int]) -> None:
        """A row before the length policy, as numbers end to end: as tuples a million rows would have 300 MB."""
        self.bounds.extend(trained)
        self.lengths.extend((tokens, cuttable, len(self.bounds)))

    def drop(self, reason: str, where: str) -> None:
        self.rows_dropped[reason] += 1
        self.place(reason, where)

    def keep(self, where: str, chat: Chat, pieces: list[Tokens], what: str, licence: str) -> None:
        """A row that is trained, as `pieces`; `what` the length policy did to it."""
        self.rows_kept += 1
        self.licences[licence] += 1
        if what:
            self.rows_touched[what] += 1
            self.place(what, where)
        self.trained_tokens += sum(sum(p.trained[1::2]) - sum(p.trained[::2]) for p in pieces)
        self.ended += what != "answer cut"
        answer = chat[-1]["content"]
        thai, letters = count_letters(answer)
        self.letters.update(thai=thai, all=letters)
        if len(self.answers) < SAMPLE:  # Vitter's algorithm R: each row is as likely to be in the sample
            self.answers.append(answer)
        elif (at := self.chance.randrange(self.rows_kept)) < SAMPLE:
            self.answers[at] = answer


def data_report(tally: Tally, rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict:
    """The part of the data report that is kept in the cache beside the rows."""
    longest = tokenizer.model_max_length
    limits = {max_length} | {1024 << n for n in range(7) if 1024 << n <= longest}
    lengths, bounds = rows.lengths, np.array(tally.bounds, int)
    measured = np.array(tally.lengths, int).reshape(-1, 3)
    before = measured[:, 0]
    tokens = int(lengths.sum())
    counts, edges = np.histogram(before, bins=40, range=(0, max(before.max(initial=1), 1)))
    order = np.argsort(lengths, kind="stable")
    shown = dict.fromkeys([0, int(order[len(order) // 2]), int(order[-1])]) if len(order) else ()
    english = [row["text"] for _, row in read_file(ROOT / "sample/texts/english.jsonl")]
    inner = ("lengths", "bounds", "answers", "letters", "ended", "chance")
    return {name: value for name, value in vars(tally).items() if name not in inner} | {
        "licences": dict(tally.licences.most_common()),
        "licences_left_out": dict(tally.licences_left_out.most_common()),
        "rows_written": len(lengths),
        "tokens": tokens,
        "trained_share": tally.trained_tokens / max(tokens, 1),
        "end_token_survival": tally.ended / max(tally.rows_kept, 1),
        "tokens_per_row": {f"p{q}": int(np.percentile(before, q)) if len(before) else 0 for q in (5, 50, 95, 100)},
        "histogram": {"edges": edges.round().astype(int).tolist(), "rows": counts.tolist()},
        "longest_possible": longest,
        "too_long": {str(limit): policies_at(limit, measured, bounds) for limit in sorted(limits)},
        "max_length_needed": lengths_needed(measured, bounds),
        "thai_share_of_letters": round(tally.letters["thai"] / max(tally.letters["all"], 1), 3),
        "tokens_per_unit": {
            "Thai": density(tally.answers, tokenizer, lambda text: [w for w in word_tokenize(text) if w.strip()]),
            "English": density(english, tokenizer, str.split),
        },
        "examples": [marked(*rows.row(i), tokenizer, 600) for i in shown],
    }


def policies_at(limit: int, measured: np.ndarray, bounds: np.ndarray) -> dict[str, int]:
    """How many rows each length policy would touch at `limit` tokens; measured (rows, 3), bounds: see Tally."""
    long = measured[:, 0] > limit
    n, most, ends = measured[long].T
    savable = int((n - limit <= most).sum())
    # The pieces that split_row makes of a row begin to have new tokens at 0, limit, limit + step, limit + 2 step, …
    start, stop = bounds.reshape(-1, 2).T
    row = np.repeat(np.arange(len(long)), np.diff(measured[:, 2], prepend=0) // 2)
    trained = (start < stop) & long[row]
    row, step = row[trained], limit - limit // 2
    first, last = (np.maximum(0, 1 + (at - limit) // step) for at in (start[trained], stop[trained] - 1))
    shared = (row[1:] == row[:-1]) & (first[1:] == last[:-1])  # by two answers
    return {
        "drop": len(n),
        "truncate_prompt_cut": savable,
        "truncate_prompt_dropped": len(n) - savable,
        "split_pieces": int((last - first + 1).sum() - shared.sum()),
        "truncate_ends_lost": int((bounds[ends - 1] > limit).sum()),
    }


def lengths_needed(measured: np.ndarray, bounds: np.ndarray) -> dict[str, int]:
    """The max_length at which a policy leaves out, or takes the end of, at most 1 - KEPT of the rows."""
    n, most, ends = measured.T
    needed = {"drop": n, "truncate_prompt": n - most, "truncate": bounds[ends - 1]}
    if not len(n):
        return dict.fromkeys(needed, 0)
    kept = {policy: np.quantile(counts, KEPT, method="inverted_cdf") for policy, counts in needed.items()}
    return {policy: math.ceil(length / ROUND) * ROUND for policy, length in kept.items()}


def density(texts: list[str], tokenizer: PreTrainedTokenizerBase, words: Callable) -> dict[str, float]:
    """Tokens a character and a word; words by PyThaiNLP's newmm for Thai, by spaces for English."""
    tokens = sum(len(e.ids) for e in encode_texts(texts, tokenizer)) if texts else 0
    characters, count = sum(map(len, texts)), sum(len(words(text)) for text in texts)
    a_character, a_word = round(tokens / max(characters, 1), 3), round(tokens / max(count, 1), 2)
    return {"tokens_per_character": a_character, "tokens_per_word": a_word, "texts": len(texts)}


FLOORS = (  # how the reason in rows_dropped begins, the setting, the message, what the user should look at
    ("empty", "max_empty_share", "have an empty question or answer", "are the columns right?"),
    ("garbled", "max_garbled_share", "hold U+FFFD or mojibake", "was the file written in another encoding?"),
    ("unbalanced", "max_unbalanced_share", "have <think> tags that do not pair", "is it another format?"),
)


def refusals(report: dict, s: Settings) -> list[str]:
    """Why this data would waste a training run: each floor of the settings that it falls through, in lines."""
    rows, place, reasons = report["rows_in"], report["source"], []

    def dropped(prefix: str) -> int:
        return sum(count for reason, count in report["rows_dropped"].items() if reason.startswith(prefix))

    def first(prefix: str) -> list[str]:
        found = [f"  {where}: {reason}" for reason, places in report["first_dropped"].items()
                 if reason.startswith(prefix) for where in places[:2]]  # fmt: skip
        return found[:3]

    for prefix, floor, what, advice in FLOORS:
        if dropped(prefix) / max(rows, 1) > getattr(s, floor):
            many = f"{dropped(prefix)} of {rows} rows of {place} {what}"
            reasons += [f"{many}, more than {floor} = {getattr(s, floor):g}; {advice}", *first(prefix)]
    lost = dropped("longer") + report["rows_touched"].get("answer cut", 0)
    share = lost / max(report["rows_kept"] + dropped("longer"), 1)
    if share > s.max_too_long_share:
        many = f"{lost} of {rows} rows of {place} are longer than max_length = {s.max_length} tokens"
        floor = f"max_too_long_share = {s.max_too_long_share:g}"
        what = f"{many} and would be left out or lose their answer's end, more than {floor}"
        reasons += [what, *ways_out(report, s, share), *(first("longer") or first("answer cut"))]
    tokens, budget = report["tokens"], report["max_tokens"] or 0
    if budget - tokens > max(0.01 * budget, min(report["tokens_per_row"]["p100"], s.max_length)):
        asked = f"max_tokens = {s.max_tokens} asks for {budget:,}: name a larger set, or fewer tokens"
        reasons.append(f"{place} has {tokens:,} tokens to train on, and {asked}")
    if not rows:
        reasons.append(f"{place} has no rows: set dataset_path to a file that has some")
    elif not report["trained_tokens"]:
        reasons.append(f"no row of {place} is left to train on: {json.dumps(report['rows_dropped'])}")
    elif report["trained_share"] < s.min_trained_share:
        few = f"only {report['trained_share']:.2%} of the tokens of {place} are trained"
        floor = f"min_trained_share = {s.min_trained_share:g}"
        reasons.append(f"{few}, less than {floor}; are question and answer swapped?")
    if report["trained_tokens"] and report["end_token_survival"] < s.min_end_survival:
        few = f"only {report['end_token_survival']:.1%} of the answers of {place} are trained up to their {END_OF_TURN}"
        floor = f"min_end_survival = {s.min_end_survival:g}"
        reasons += [f"{few}, less than {floor}: the model would not learn to stop", *first("answer cut")]
    return reasons


def ways_out(report: dict, s: Settings, lost: float) -> list[str]:
    """What keeps more of the rows that are too long: a max_length, or another policy at this one. A line each."""
    at, wanted = report["too_long"][str(s.max_length)], report["max_length_needed"].get(s.length_policy, 0)
    possible = s.max_length < wanted <= report["longest_possible"]
    ways = [f"--max_length {wanted} keeps {KEPT:.0%} of the rows"] if possible else []
    policies = {
        "truncate_prompt": f"shortens the question of {at['truncate_prompt_cut']}, leaves out "
        f"{at['truncate_prompt_dropped']}",
        "drop": f"leaves out {at['drop']}",
        "split": f"makes {at['split_pieces']} pieces of {at['drop']}, only the first of each with its question",
        "truncate": f"takes the answer's end from {at['truncate_ends_lost']}",
    }
    ways += [f"--length_policy {policy} {does}" for policy, does in policies.items() if policy != s.length_policy]
    ways.append(f"--max_too_long_share {math.ceil(100 * lost) / 100:g} trains on what is left")
    return [f"  {way}" for way in ways]


def save_report(path: Path, report: dict) -> None:
    """Writes the report without `from_cache`, so that the same data give the same bytes."""
    write_json(path, {name: value for name, value in report.items() if name != "from_cache"})


def marked(ids: np.ndarray, labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, limit: int = sys.maxsize) -> str:
    """A row as printable text with its trained tokens between ⟦ and ⟧; a stretch at most about `limit` characters."""
    trained = np.asarray(labels) != IGNORE
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1), len(trained)]
    pieces = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        text = printable(abridge(tokenizer.decode(ids[start:stop]), limit))
        pieces.append(f"⟦{text}⟧" if trained[start] else text)
    return "".join(pieces)


def abridge(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {len(text) - limit:,} characters … {text[-half:]}"


def bars(counts: list[int]) -> str:
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * count / max(*counts, 1))] for count in counts)


def print_report(report: dict, rows: int = 3) -> None:
    """The report for people, with the first of the decoded rows."""
    r = report

    def line(label: str, text: str) -> None:
        print(one_line(f"  {label:<17}{text}"))

    commit = r["data_revision"][:19]
    print(one_line(f"data: {r['dataset']} from {r['source']}, {commit}{', cached' * r['from_cache']}"))
    if r["rows_when_described"] not in (None, r["rows_in"]):
        line("note", f"{r['rows_when_described']:,} rows when configs/datasets.yaml was written")
    if r["layout"]:
        line("read as", r["layout"])
    line("licence", ", ".join(f"{name} ({count:,} rows)" for name, count in r["licences"].items()))
    if r["note"]:
        line("", r["note"])
    if r["settings"]["shuffle_answers"]:
        line("control", "each question has the answer of another row (shuffle_answers)")
    if r["max_tokens"]:
        line("cut", f"to {r['max_tokens']:,} tokens (max_tokens = {r['settings']['max_tokens']}), rows evenly spaced")
    line("rows", f"{r['rows_in']:,} in, {r['rows_kept']:,} kept")
    for why, count in (r["rows_dropped"] | r["rows_touched"]).items():
        print(f"    {count:>12,}   {'' if why in r['rows_touched'] else 'dropped: '}{why}")
    ended = f"answers with their end {r['end_token_survival']:.1%}"
    if r["unread_keys"]:
        keys = ", ".join(f"{key} ({count:,} times)" for key, count in r["unread_keys"].items())
        line("not read", f"what turns hold beside role and content, or what sounds like a mark: {keys}")
    line("tokens", f"{r['tokens']:,}; trained {r['trained_share']:.1%}; {ended}")
    line("tokens a row", "  ".join(f"{q} {n:,}" for q, n in r["tokens_per_row"].items()))
    line("", f"0 |{bars(r['histogram']['rows'])}| {r['histogram']['edges'][-1]:,}")
    for language, unit in r["tokens_per_unit"].items():
        answers = language == "Thai" and r["language"] != "th"  # what was measured are answers of another language
        told = f"{unit['tokens_per_character']:.2f} tokens a character, {unit['tokens_per_word']:.1f} a word"
        line("answers" if answers else language, told)
    line("letters", f"{r['thai_share_of_letters']:.0%} Thai")
    line("duplicates", f"{r['duplicates'].get('rows', 0):,} rows, {r['duplicates'].get('questions', 0):,} questions")
    if r["split"] == "train":
        overlap = r["overlap"]
        found, items = f"{len(overlap['rows']):,} rows repeat", f"{overlap['items']:,} benchmark items"
        line("overlap", f"{found} one of {items} ({overlap['benchmarks']})")
        for item, count in Counter(hit["item"] for hit in overlap["rows"]).most_common(5):
            hit = next(hit for hit in overlap["rows"] if hit["item"] == item)
            line("", f"{item}: {count:,} rows, the first {hit['row']}: {abridge(hit['shared'], 60)}")
    print(f"  {'rows longer than':<29}" + "".join(f"{int(limit):>9,}" for limit in r["too_long"]) + "  tokens")
    for name, label in POLICIES.items():
        print(f"    {label:<27}" + "".join(f"{limit[name]:>9,}" for limit in r["too_long"].values()))
    needed = (f"{length:,} ({policy})" for policy, length in r["max_length_needed"].items())
    line(f"{KEPT:.0%} are kept", f"from max_length {', '.join(needed)}")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    for text in r["examples"][:rows]:
        print(f"  a row, what is trained {'in green' if colour else 'between ⟦ and ⟧'}:")
        text = text.replace("⟦", "\033[32m").replace("⟧", "\033[0m") if colour else text
        print("    " + text.replace("\n", "\n    "), flush=True)
