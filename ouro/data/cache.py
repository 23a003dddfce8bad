"""Checked, masked token rows of a training set: built once, kept memory-mapped, read from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ouro.data import chats, formats, marks, sources
from ouro.data.batches import Rows
from ouro.data.chats import Chat, Tokens, chat_digest, question_of
from ouro.data.report import BEYOND, Tally, data_report, print_report, refusals
from ouro.data.sources import Source
from ouro.data.thai import Overlap, trim
from ouro.data.thoughts import tags
from ouro.files import Progress, UserError, check_writable, damage, remove_left, seal, unfinished, write_json
from ouro.settings import Settings

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERMISSIVE = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
CODE = sorted(Path(__file__).parent.glob("*.py"))  # what the cached rows depend on; a change makes them anew
CHUNK = 256  # rows tokenised, and written, at a time
SHAPING = ("max_length", "length_policy", "licence", "drop_overlap", "normalise_thai", "system_prompt", "max_tokens",
           "shuffle_answers", "development")  # as CODE  # fmt: skip
DEVELOPMENT = 0.02  # share of the training rows that `development` holds out, by a hash of their question


class NoSplit(UserError):
    """The held-out part of a training set is not there, as when a single file was named."""


def read_chats(source: Source, split: str, s: Settings) -> Iterator[tuple[str, dict, Chat | None, str]]:
    """Each row of a part: where it stands, the row, its chat or None, and why not."""
    folder = f"{(source.place if source.place.is_dir() else source.place.parent).absolute()}/"
    for where, row in source.rows(split):
        chat, why = chats.to_chat(row, source.entry, s, where)
        yield where.removeprefix(folder), row, chat, why  # cached places also serve a copy in another folder


def checked_rows(
    source: Source, split: str, s: Settings, special_tokens: list[str], overlap: Overlap, tally: Tally
) -> Iterator[tuple[str, dict, Chat]]:
    """The rows that pass every check that needs no tokens; the others are counted in `tally`. A split "development" has
    the rows of "train" that are held out of it."""
    entry, rule = source.entry, source.entry["held_out"]
    special = re.compile("|".join(re.escape(token) for token in special_tokens if token))
    held_out, rows_seen, questions_seen, read = set(), set(), set(), formats.columns_of(entry)
    if split != "held_out" and "split" in rule:
        held_out = {chat_digest(question_of(chat)) for *_, chat, _ in read_chats(source, "held_out", s) if chat}
    for where, row, chat, why in read_chats(source, split, s):
        tally.rows_in += 1
        if chat is None:
            tally.drop(why, where)
            continue
        unread = (key for key in row if marks.like_mark(key) and key not in read)
        tally.unread_keys.update(key for key in unread if row[key] is not None)
        for turn in row[entry["messages"]] if "messages" in entry else ():
            known = chats.turn_keys(turn)
            unread = (key for key in turn if key not in known and not marks.speaks_of_training(key))
            tally.unread_keys.update(key for key in unread if turn[key] is not None)
        licence, text = licence_of(row, entry), "\n".join(turn["content"] for turn in chat)
        whole, asked = chat_digest(chat), chat_digest(question_of(chat))
        for_development, hit = int.from_bytes(asked[:8]) < DEVELOPMENT * 2**64, None
        if special.search(text):  # it would end the turn or the document in the middle
            why = "special token in the text"
        elif "hash" in rule and chats.in_hash_share(row, chat, rule) != (split == "held_out"):
            why = "held out" if split == "train" else "in training"
        elif s.licence == "permissive" and re.sub(r"[\s_]+", "-", trim(licence).lower()) not in PERMISSIVE:
            tally.licences_left_out[licence] += 1
            why = "licence not permissive"
        elif asked in held_out:
            why = "question is in the held-out split too"
        elif split != "held_out" and s.development and for_development != (split == "development"):
            why = "held out for development" if split == "train" else "in training"
        elif split == "train" and (hit := overlap.find(text)):
            tally.overlap.append({"row": where, "item": hit[0], "shared": hit[1]})
            why = "repeats a benchmark item" if s.drop_overlap else ""
        if why:
            tally.drop(why, where)
            continue
        tally.duplicates["rows"] += whole in rows_seen
        tally.duplicates["questions"] += asked in questions_seen
        if entry.get("think") and len([*tags(chat[-1]["content"])]) > len([*tags(row[entry["completion"]])]):
            tally.rows_touched["<think> tags completed"] += 1
        rows_seen.add(whole)
        questions_seen.add(asked)
        yield where, row, chat


def shuffled(rows: Iterator[tuple[str, dict, Chat, int]]) -> Iterator[tuple[str, dict, Chat, int]]:
    """The rows, each with the answer of another, which is the same one each time. All are in memory meanwhile.
    Raises UserError: a row has several answers."""
    found = list(rows)
    if several := [where for where, _, chat, _ in found if sum(turn["role"] == "assistant" for turn in chat) > 1]:
        raise UserError(f"{several[0]}: shuffle_answers is for sets of one question and one answer a row")
    cycle = np.random.default_rng(0).permutation(len(found))
    giver = dict(zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True))
    for number, (where, row, chat, read) in enumerate(found):
        yield where, row, [*chat[:-1], found[giver[number]][2][-1]], read


def licence_of(row: dict, entry: dict) -> str:
    licence = row[entry["licence"]["column"]] if isinstance(entry["licence"], dict) else entry["licence"]
    return str(licence or "not stated")


def apply_length_policy(
    where: str, chat: Chat, tokens: Tokens, s: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tokens], str]:
    """The row as the length policy lets it be trained (nothing, itself, a shorter one or several), and what was done.
    Raises UserError: it is too long and the policy is `error`."""
    n = len(tokens.ids)
    if n <= s.max_length:
        return [tokens], ""
    match s.length_policy:
        case "truncate_prompt":
            cut = chats.cut_question(chat, tokens, s.max_length, tokenizer)
            return ([cut], "question cut") if cut else ([], "")
        case "split":
            return chats.split_row(tokens, s.max_length), "split"
        case "truncate":
            return chats.first_tokens(tokens, s.max_length), "answer cut" if tokens.trained[-1] > s.max_length else ""
        case "drop":
            return [], ""
    raise UserError(
        f"{where}: {n} tokens, more than max_length = {s.max_length}; raise --max_length, or choose another "
        "--length_policy (the data report shows what each would do)"
    )


def build_cache(
    folder: Path, source: Source, split: str, s: Settings, tokenizer: PreTrainedTokenizerBase, items: list,
    budget: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Tokenises a training set into `folder`, which appears whole or not at all.
    Raises UserError: bad data, or a template that cannot be masked, as the functions that are called here raise it;
    OSError: the disk is full; nothing is left behind."""
    tally, overlap = Tally(), Overlap(items)
    try:
        with unfinished(folder) as mark:
            partial = Path(f"{mark.name}.d")
            partial.mkdir()
            write_rows(partial / "rows.arrow", source, split, s, tokenizer, overlap, tally, budget, quiet)
            rows = Rows(partial / "rows.arrow")
            report = data_report(tally, rows, tokenizer, s.max_length) | {"rows_sha256": rows_sha256(rows)}
            checked = ",".join(sources.overlap_names(s)) or "none"
            report["overlap"] = {"benchmarks": checked, "items": len(items), "too_short": overlap.short,
                                 "rows": tally.overlap}  # fmt: skip
            write_json(partial / "report.json", report)
            seal(partial)
            try:
                os.rename(partial, folder)
            except OSError:
                if not folder.exists():  # else another process has built the same meanwhile
                    raise
    except OSError as error:  # a full disk does not say which
        error.filename = error.filename or str(folder.parent)
        raise


def rows_sha256(rows: Rows) -> str:
    """Of all tokens and labels, in their order: what is learned from, whatever it was made of."""
    digest = hashlib.sha256()
    for ids, labels in map(rows.row, range(len(rows))):
        digest.update(len(ids).to_bytes(8))
        digest.update(ids)
        digest.update(labels)
    return digest.hexdigest()


def write_rows(
    path: Path, source: Source, split: str, s: Settings, tokenizer: PreTrainedTokenizerBase, overlap: Overlap,
    tally: Tally, budget: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Writes the rows that are trained, CHUNK at a time, and counts all of them in `tally`.

    budget: tokens that all of them may have; a row is left out where the share of the budget that is used up would be
    larger than the share of the rows that was read, so that what is kept stands evenly spaced."""
    ids_type = pa.uint16() if len(tokenizer) <= 1 << 16 else pa.uint32()
    schema = pa.schema({"input_ids": pa.list_(ids_type), "trained": pa.list_(pa.int32()), "place": pa.string()})
    checked = checked_rows(source, split, s, tokenizer.all_special_tokens, overlap, tally)
    rows = ((*row, tally.rows_in) for row in checked)  # with how many were read up to each
    rows = shuffled(rows) if s.shuffle_answers and split == "train" else rows
    total, tokens_kept = formats.count_rows(source.files[split]), 0
    progress = Progress(f"tokenise {source.place}", total, "rows", quiet)
    with progress, open(path, "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while chunk := list(islice(rows, CHUNK)):
            pieces = []  # (input_ids, trained, place), as in the schema
            places, _, said, _ = zip(*chunk, strict=True)
            encoded = chats.encode_chats(said, tokenizer, places)
            for (where, row, chat, read), tokens in zip(chunk, encoded, strict=True):
                fitted, what = apply_length_policy(where, chat, tokens, s, tokenizer)
                size = sum(len(piece.ids) for piece in fitted)
                if budget is not None and fitted and tokens_kept + size > budget * read / total:
                    tally.drop(BEYOND, where)
                    continue
                tokens_kept += size
                tally.measure(len(tokens.ids), chats.cuttable(chat, tokens, tokenizer), tokens.trained)
                if fitted:
                    pieces += [(piece.ids, piece.trained, where) for piece in fitted]
                    tally.keep(where, chat, fitted, what, licence_of(row, source.entry))
                else:
                    tally.drop(f"longer than {s.max_length} tokens", where)
            if pieces:
                columns = zip(zip(*pieces, strict=True), schema.types, strict=True)
                arrays = [pa.array(column, kind) for column, kind in columns]
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            progress.update(tally.rows_in - progress.n)


def cache_key(
    source: Source, split: str, s: Settings, tokenizer: PreTrainedTokenizerBase, items: list, budget: int | None
) -> dict:
    """All that the cached rows and their report depend on."""
    return {
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in CODE)).hexdigest(),
        "packages": {name: version(name) for name in ("transformers", "tokenizers", "pythainlp", "python-calamine")},
        "data": source.fingerprint(),
        "entry": source.entry,
        "split": split,
        "budget": budget,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": tokenizer.all_special_tokens,
        "positions": tokenizer.model_max_length,
        "settings": {name: getattr(s, name) for name in SHAPING},
        "benchmarks": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
    }


def prepare(
    s: Settings, tokenizer: PreTrainedTokenizerBase, split: str = "train", builder: bool = True, quiet: bool = False,
    wait: Callable[[], None] | None = None,
) -> tuple[Rows, dict]:  # fmt: skip
    """The token rows of the training set (or of the part held out of it), from the cache where it has them, and the
    report on them. builder: this process tokenises what the cache lacks; another calls `wait` until the rows are there,
    or, where no `wait` is given, raises UserError. quiet: no progress bar, and no report before a refusal.
    Raises UserError: bad data, see above; or good data that is not worth training on: `refusals` says why, after the
    report was printed."""
    source, items = sources.find_source(s), sources.benchmark_items(s) if split == "train" else []
    rule = source.entry["held_out"]
    budget = token_budget(s, tokenizer, builder, quiet, wait) if split == "train" else None
    if not source.files[split]:
        raise NoSplit(f"{source.place} has no split {rule['split']!r}, which dataset {s.dataset} holds out")
    key = cache_key(source, split, s, tokenizer, items, budget)
    short = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(s.cache_dir) / f"{s.dataset}-{split}-{short}"
    cached = folder.exists()
    if builder and cached:
        remove_left(folder)
    elif builder:
        check_writable("cache_dir", s.cache_dir)
        build_cache(folder, source, split, s, tokenizer, items, budget, quiet)
    while not folder.exists():
        if not wait:
            raise UserError(f"{s.dataset} is not tokenised yet: no {folder}")
        wait()
    if why := damage(folder):  # of the tokens, too: a run would learn from flipped ones without a word
        raise UserError(f"the cache {folder} is damaged ({why}): delete it and run again")
    rows, report = Rows(folder / "rows.arrow"), json.loads((folder / "report.json").read_text(encoding="utf-8"))
    described = source.entry.get("rows", {}).get(split if split == "train" else rule.get("split"))
    report = {"dataset": s.dataset, "language": source.entry["language"], "split": split,
              "source": str(source.place), "data_revision": key["data"],
              "tokenizer_sha256": key["tokenizer"], "rows_when_described": described,
              "settings": key["settings"], "max_tokens": budget, "note": source.entry.get("note"),
              "layout": source.entry.get("layout"), "cache": str(folder), "from_cache": cached} | report  # fmt: skip
    if split == "train" and (reasons := refusals(report, s)):
        if not quiet:
            print_report(report)
        raise UserError(*reasons)
    return rows, report


def token_budget(
    s: Settings, tokenizer: PreTrainedTokenizerBase, builder: bool, quiet: bool, wait: Callable[[], None] | None
) -> int | None:
    """How many tokens `max_tokens` lets the training set have, which may be those of another; None: all. Errors as
    `prepare`, of that other."""
    if s.max_tokens is None or s.max_tokens.isdecimal():
        return s.max_tokens and int(s.max_tokens)
    if s.max_tokens == s.dataset:
        raise UserError(f"max_tokens: {s.dataset} is the training set itself")
    other = replace(s, dataset=s.max_tokens, dataset_path=None, max_tokens=None, shuffle_answers=False)
    _, report = prepare(other, tokenizer, "train", builder, quiet, wait)
    return report["tokens"]
