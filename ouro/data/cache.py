"""Checked, masked token rows of a training set: built once, kept memory-mapped, read from the cache."""

import hashlib
import json
import os
import random
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from ouro.data.batches import EpochOrder, Rows, pack, padding
from ouro.data.chats import (
    THINK,
    Chat,
    Tokens,
    cut_question,
    cuttable,
    digest,
    encode,
    in_hash_share,
    question,
    split_row,
    to_chat,
    truncate,
)
from ouro.data.report import Tally, describe, print_report, refusals
from ouro.data.sources import Source, benchmark_items, count_rows, find_source, read_file
from ouro.data.thai import Overlap
from ouro.files import UserError, write_json
from ouro.settings import Settings

import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

PERMISSIVE = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
CODE = sorted(Path(__file__).parent.glob("*.py"))  # what the cached rows depend on
CHUNK = 256  # rows tokenised, and written, at a time
Item = tuple[str, dict, Chat]


def checked_rows(
    source: Source, split: str, settings: Settings, tokenizer: PreTrainedTokenizerBase, overlap: Overlap, tally: Tally
) -> Iterator[Item]:
    """The rows that pass every check that needs no tokens; the others are counted in `tally`."""
    entry, rule = source.entry, source.entry["held_out"]
    special = re.compile("|".join(re.escape(token) for token in tokenizer.all_special_tokens if token))
    held_out = {digest(question(chat)) for chat in _held_out_chats(source, settings)} if split == "train" else set()
    rows_seen, questions_seen = set(), set()
    folder = f"{(source.place if source.place.is_dir() else source.place.parent).absolute()}/"
    for file in source.part(split):
        for where, row in read_file(file, source.columns):
            tally.rows_in += 1
            chat, why = to_chat(row, entry, settings, where)
            where = where.removeprefix(folder)  # the report may be of a copy elsewhere
            if chat is None:
                tally.drop(why, where)
                continue
            licence = licence_of(row, entry)
            text = "\n".join(turn["content"] for turn in chat)
            if special.search(text):  # it would end the turn or the document in the middle
                tally.drop("special token in the text", where)
            elif "hash" in rule and in_hash_share(row, chat, rule) != (split == "held_out"):
                tally.drop("held out" if split == "train" else "in training", where)
            elif settings.licence == "permissive" and canonical(licence) not in PERMISSIVE:
                tally.filtered[licence] += 1
                tally.drop("licence not permissive", where)
            elif digest(question(chat)) in held_out:
                tally.drop("question is in the held-out split too", where)
            else:
                if split == "train" and (hit := overlap.find(text)):
                    tally.overlap.append({"row": where, "item": hit[0], "shared": hit[1]})
                    if settings.drop_overlap:
                        tally.drop("repeats a benchmark item", where)
                        continue
                tally.duplicates["rows"] += (whole := digest(chat)) in rows_seen
                tally.duplicates["questions"] += (asked := digest(question(chat))) in questions_seen
                if entry.get("think") and any(tag in text and tag not in row[entry["completion"]] for tag in THINK):
                    tally.touched["<think> tags completed"] += 1
                rows_seen.add(whole)
                questions_seen.add(asked)
                yield where, row, chat


def _held_out_chats(source: Source, settings: Settings) -> Iterator[Chat]:
    for file in source.files["held_out"]:
        for where, row in read_file(file, source.columns):
            chat, _ = to_chat(row, source.entry, settings, where)
            if chat is not None:
                yield chat


def licence_of(row: dict, entry: dict) -> str:
    licence = entry["licence"]
    return str(row[licence["column"]] or "not stated") if isinstance(licence, dict) else licence


def canonical(licence: str) -> str:
    return re.sub(r"[\s_]+", "-", licence.strip().lower())


def fit(where: str, chat: Chat, tokens: Tokens, s: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[list, str]:
    """The row as the length policy lets it be trained (nothing, itself, a shorter one or several), and what was done.

    Raises:
        UserError: it is too long and the policy is `error`.
    """
    n = len(tokens.ids)
    if n <= s.max_length:
        return [tokens], ""
    if s.length_policy == "error":
        raise UserError(
            f"{where}: {n} tokens, more than max_length = {s.max_length}; raise --max_length, or choose another "
            "--length_policy (the data report shows what each would do)"
        )
    if s.length_policy == "truncate_prompt":
        cut = cut_question(chat, tokens, s.max_length, tokenizer)
        return ([cut], "question cut") if cut else ([], "")
    if s.length_policy == "split":
        return split_row(tokens, s.max_length), "split"
    if s.length_policy == "truncate":
        return truncate(tokens, s.max_length), "answer cut" if tokens.trained[-1] > s.max_length else ""
    return [], ""


def build(
    folder: Path, source: Source, split: str, s: Settings, tokenizer: PreTrainedTokenizerBase, items: list, quiet: bool
) -> None:
    """Tokenises a training set into `folder`, which appears whole or not at all.

    Raises:
        UserError: as all of the above.
        OSError: the disk is full; nothing is left behind.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")  # two containers may share a pid
    partial.mkdir(parents=True)
    ids_type = pa.uint16() if len(tokenizer) <= 1 << 16 else pa.uint32()
    schema = pa.schema({"input_ids": pa.list_(ids_type), "trained": pa.list_(pa.int32()), "place": pa.string()})
    tally, chance = Tally(), random.Random(0)
    overlap = Overlap(items)
    rows = checked_rows(source, split, s, tokenizer, overlap, tally)
    progress = tqdm(desc="tokenise", unit=" rows", disable=quiet or None, leave=False)
    try:
        progress.reset(sum(map(count_rows, source.part(split))))
        with open(partial / "rows.arrow", "wb") as file, pa.ipc.new_file(file, schema) as writer:
            while chunk := list(islice(rows, CHUNK)):
                columns = [], [], []  # as in the schema
                places, _, chats = zip(*chunk, strict=True)
                for (where, row, chat), tokens in zip(chunk, encode(chats, tokenizer, places), strict=True):
                    tally.lengths.append((len(tokens.ids), cuttable(chat, tokens, tokenizer), tokens.trained))
                    fitted, what = fit(where, chat, tokens, s, tokenizer)
                    if not fitted:
                        tally.drop(f"longer than {s.max_length} tokens", where)
                        continue
                    for piece in fitted:
                        for column, value in zip(columns, (piece.ids, piece.trained, where), strict=True):
                            column.append(value)
                    tally.count(where, chat, fitted, what, licence_of(row, source.entry), chance)
                if columns[0]:
                    arrays = [pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
                progress.update(tally.rows_in - progress.n)
        with open(partial / "rows.arrow", "rb") as file:
            os.fsync(file.fileno())
        report = describe(tally, Rows(partial / "rows.arrow"), tokenizer)
        report["overlap"] = {
            "benchmarks": s.overlap,
            "items": len(items),
            "too_short": overlap.short,
            "rows": tally.overlap,
        }
        write_json(partial / "report.json", report)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # else another process has built the same meanwhile
                raise
    except OSError as error:  # a full disk does not say which
        error.filename = error.filename or str(folder.parent)
        raise
    finally:
        progress.close()
        shutil.rmtree(partial, ignore_errors=True)


class NoSplit(UserError):
    """The held-out part of a training set is not there, as when a single file was named."""


def prepare(
    s: Settings,
    tokenizer: PreTrainedTokenizerBase,
    split: str = "train",
    builder: bool = True,
    quiet: bool = False,
    wait: Callable[[], None] | None = None,
) -> tuple[Rows, dict]:
    """The token rows of the training set (or of the part held out of it), from the cache where it has them, and the
    report on them. Only the `builder` of several processes tokenises; the others call `wait` until that is done, and
    without it raise UserError.

    Raises:
        UserError: bad data, see above; or good data that is not worth training on: `refusals` says why, after the
            report was printed.
    """
    source, items = find_source(s), benchmark_items(s) if split == "train" else []
    rule = source.entry["held_out"]
    if split == "held_out" and "split" in rule and not source.files.get("held_out"):
        raise NoSplit(f"{source.place} has no split {rule['split']!r}, which dataset {s.dataset} holds out")
    names = ("max_length", "length_policy", "licence", "drop_overlap", "normalise_thai", "system_prompt")
    key = {
        "code": hashlib.sha256(b"".join(file.read_bytes() for file in CODE)).hexdigest(),
        "packages": {name: version(name) for name in ("transformers", "tokenizers", "pythainlp")},
        "data": source.fingerprint(),
        "entry": source.entry,
        "split": split,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "special": tokenizer.all_special_tokens,
        "settings": {name: getattr(s, name) for name in names},
        "benchmarks": hashlib.sha256(json.dumps(items).encode()).hexdigest(),
    }
    short = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(s.cache_dir) / f"{s.dataset}-{split}-{short}"
    cached = folder.exists()
    if builder and not cached:
        build(folder, source, split, s, tokenizer, items, quiet)
    while not folder.exists():
        if not wait:
            raise UserError(f"{s.dataset} is not tokenised yet: no {folder}")
        wait()
    try:
        rows = Rows(folder / "rows.arrow")
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise UserError(f"the cache {folder} is damaged ({error}): delete it and run again") from None
    known = source.entry.get("rows", {}).get(split if split == "train" else rule.get("split"))
    report = {"dataset": s.dataset, "split": split, "source": str(source.place), "data_revision": key["data"],
              "tokenizer_sha256": key["tokenizer"], "rows_when_described": known,
              "settings": key["settings"], "note": source.entry.get("note"), "cache": str(folder),
              "from_cache": cached} | report  # fmt: skip
    if split == "train":
        reasons = refusals(report, s)
        if reasons:
            if not quiet:
                print_report(report)
            raise UserError("\n".join(reasons))
        batch, step = s.per_device_train_batch_size, s.per_device_train_batch_size * s.gradient_accumulation_steps
        shuffled, grouped = (EpochOrder(rows.lengths, step, s.seed, grouped) for grouped in (False, True))
        packs = pack(rows.lengths, s.max_length)
        report["padding"] = {
            "in_order_of_chance": round(padding(rows.lengths, shuffled, batch), 4),
            "batches_of_like_length": round(padding(rows.lengths, grouped, batch), 4),
            "packed": round(1 - int(rows.lengths.sum()) / (len(packs) * s.max_length), 4),
            "packs": len(packs),
            "used": "packed" if s.packing else "batches_of_like_length",
        }
        if s.packing:
            rows.packs = packs
    return rows, report
