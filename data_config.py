"""Training sets by name -> checked, masked token rows, and the data report.

    python data_config.py --config configs/smoke.yaml --dataset wangchan            # the report of the embedded default
    python data_config.py --config configs/default.yaml --dataset wangchan --dataset_path FOLDER_OR_FILE

configs/datasets.yaml names the training sets; a Hub id and a local copy of the same layout are read by the same code.
A row becomes a chat in the model's own template, of which the assistant's turns and their end-of-turn tokens are
trained. The rows are kept, memory-mapped, in CACHE_DIR/<dataset>-<key>/; the key covers data, tokenizer, template,
settings and code, so that no change to any of them can serve old rows. This command also writes the report to
OUTPUT_DIR/data-report/<dataset>.json and its histogram to <dataset>.png.
"""

import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import sys
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from settings import Resolved, Settings, UserError, call, resolve, write_atomic, write_json

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from pythainlp.tokenize import word_tokenize
from tokenizers import Encoding
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from batches import EpochOrder, Rows, pack, padding, trained_mask
from modeling_ouro import IGNORE, REVISIONS, OuroConfig
from sources import ROOT, Source, benchmark_items, count_rows, entry_of, find_source, read_file
from thai import GARBLED, Overlap, count_letters, normalise

END_OF_TURN = "<|im_end|>"  # the published tokenizer's eos is <|endoftext|>, but this is what ends an answer
PERMISSIVE = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
LENGTHS = (1024, 2048, 4096, 8192)
CODE = ("data_config.py", "sources.py", "thai.py", "batches.py")  # what the cached rows depend on
CHUNK = 256  # rows tokenised, and written, at a time
KEPT_QUESTION = 32  # tokens of a question that truncate_prompt leaves at least
Chat = list[dict[str, str]]


# ----------------------------------------------------------------------------------------------------------------------
# reading


def load_tokenizer(path: str, revision: str | None = None, max_length: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint (folder or Hub id), at the pinned revision, checked against the model's config.

    Raises:
        UserError: it cannot be read, has no chat template, its vocabulary lacks <|im_end|> or is larger than the
            model's, or `max_length` is more than the model's positions.
    """
    place = Path(path)
    if not place.exists() and (place.is_absolute() or (place.parent.is_dir() and place.parent != Path())):
        raise UserError(f"no folder {path} (and it does not look like a Hub id, org/name)")
    revision = revision or REVISIONS.get(path)
    try:
        config = OuroConfig.from_pretrained(path, revision=revision)  # first: without a network it fails sooner
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the tokenizer of {path}: {' '.join(str(error).split())}\n"
            "without a network: HF_HUB_OFFLINE=1 reads what was downloaded before (make fetch)"
        ) from None
    except (KeyError, ImportError):  # what transformers makes of a missing tokenizer.json
        raise UserError(f"cannot load the tokenizer of {path}: tokenizer.json is missing or damaged") from None
    except Exception as error:  # what the tokenizers library makes of an unreadable one, and nothing more special
        if type(error) is not Exception:
            raise
        raise UserError(f"cannot load the tokenizer of {path}: tokenizer.json is damaged: {error}") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template (tokenizer_config.json: chat_template)")
    if END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {path} has no token {END_OF_TURN}: it is not Ouro's")
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer of {path} has {len(tokenizer)} tokens, its model only {config.vocab_size}")
    if max_length and max_length > config.max_position_embeddings:
        raise UserError(
            f"max_length = {max_length} is more than the {config.max_position_embeddings} positions of {path}"
        )
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# a row -> a chat


THINK = ("<think>", "</think>")


def close_think(text: str, answer: str | None) -> str | None:
    """A completion whose <think> and </think> pair, or None where they cannot be made to.

    None of the two is right as it is. A lone </think> gets its opening (templates often write that in the prompt); a
    lone <think> is a thought without its answer, which is added where the row has one in another column.
    """
    opening, closing = (text.count(tag) for tag in THINK)
    if (opening, closing) == (0, 1):
        return f"<think>\n{text}"
    if (opening, closing) == (1, 0) and answer and answer.strip():
        return f"{text}\n</think>\n\n{answer.strip()}"
    if (opening, closing) == (0, 0) or (
        (opening, closing) == (1, 1) and text.index("<think>") < text.index("</think>")
    ):
        return text
    return None


def to_chat(row: dict, entry: dict, settings: Settings, where: str = "row") -> tuple[Chat | None, str]:
    """One row as a chat that ends with an assistant turn, or None and why not.

    Raises:
        UserError: a column holds something other than text, or `messages` is not a list of turns.
    """

    def text(column: str) -> str:
        value = row[column]
        if not isinstance(value, str | None):
            raise UserError(f"{where}, column {column}: expected text, found {type(value).__name__}")
        value = value or ""
        return (normalise(value) if settings.normalise_thai else value).strip()

    if column := entry.get("messages"):
        chat = []
        turns = row[column] or []
        if not isinstance(turns, list):
            raise UserError(f"{where}, column {column}: expected a list of turns, found {type(turns).__name__}")
        for number, turn in enumerate(turns, 1):
            place = f"{where}, column {column}, turn {number}"
            if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
                raise UserError(f"{place}: expected {{role: system, user or assistant, content: text}}, found {turn!r}")
            content = turn.get("content")
            if not isinstance(content, str | None):
                raise UserError(f"{place}: expected text in content, found {type(content).__name__}")
            content = content or ""
            content = (normalise(content) if settings.normalise_thai else content).strip()
            if turn["role"] != "system" or content:
                chat.append({"role": turn["role"], "content": content})
        while chat and chat[-1]["role"] != "assistant":
            chat.pop()  # nothing in them to train
        spoken = chat[1:] if chat and chat[0]["role"] == "system" else chat
        if not spoken or any(not turn["content"] for turn in spoken):
            return None, f"empty ({column})"
        if [turn["role"] for turn in spoken] != ["user", "assistant"] * (len(spoken) // 2):
            return None, "turns of user and assistant do not alternate"
    else:
        parts, answer = [text(column) for column in entry["prompt"]], text(entry["completion"])
        if not parts[0] or not answer:
            return None, f"empty ({entry['completion'] if parts[0] else entry['prompt'][0]})"
        if entry.get("think"):
            answer = close_think(answer, text(entry["answer"]) if "answer" in entry else None)
            if answer is None:
                return None, f"unbalanced <think> ({entry['completion']})"
        chat = [
            {"role": "user", "content": "\n\n".join(part for part in parts if part)},
            {"role": "assistant", "content": answer},
        ]
    if settings.system_prompt and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": settings.system_prompt})
    if any(GARBLED.search(turn["content"]) for turn in chat):
        return None, "garbled (U+FFFD or mojibake)"
    return chat, ""


def digest(chat: Chat) -> bytes:
    return hashlib.blake2b(json.dumps(chat, ensure_ascii=False).encode(), digest_size=16).digest()


def question(chat: Chat) -> Chat:
    """All that comes before the last answer, without the system turn."""
    return [turn for turn in chat[:-1] if turn["role"] != "system"]


def in_hash_share(row: dict, chat: Chat, rule: dict) -> bool:
    """Whether a hash split holds this row out: by the column it names, or the question where that is empty."""
    value = row[rule["hash"]]
    text = normalise(value if isinstance(value, str) and value.strip() else question(chat)[0]["content"]).strip()
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < rule["share"] * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# a chat -> masked tokens


@dataclass
class Tokens:
    """A tokenised chat: ids, the trained stretches [start, stop, start, stop, …], where the first answer begins."""

    ids: np.ndarray
    trained: list[int]
    boundary: int


def generation_prompt(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], int]:
    """What the template puts before an answer, as text and tokens; and the tokens of this chat's prompt if it asked
    nothing."""
    system = chat[0]["content"] if chat[0]["role"] == "system" else None
    return _generation_prompt(tokenizer, tokenizer.chat_template, system)


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, generation: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a chat: {error}") from None


@lru_cache(maxsize=64)
def _generation_prompt(tokenizer, template: str, system: str | None) -> tuple[str, list[int], int]:
    chat = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": ""}]
    without, whole = (render(chat, tokenizer, g) for g in (False, True))
    if not whole.startswith(without):
        raise UserError("the chat template's generation prompt changes what stands before it: no boundary to mask at")
    header = whole[len(without) :]
    ids = tokenizer(header, add_special_tokens=False).input_ids
    if not ids or ids[0] not in tokenizer.all_special_ids:
        raise UserError(f"the chat template's generation prompt {header!r} does not begin with a special token")
    return header, ids, len(tokenizer(whole, add_special_tokens=False).input_ids)


def encode(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, places: Sequence[str] | None = None
) -> list[Tokens]:
    """Tokens of chats, of which every assistant turn's text and end-of-turn token are trained.

    A boundary is where the template's own generation prompt ends, so that training starts exactly where generation
    will; what the template puts after the end-of-turn token is not trained. One tokenisation serves all turns: special
    tokens part a text, so what precedes a generation prompt is tokenised as it would be alone, and the prompt's own
    tokens are compared.

    Raises:
        UserError: the template does not continue its own generation prompt, changes an answer, or ends no turn with
            <|im_end|>.
    """

    def wrong(place: str, what: str) -> UserError:
        return UserError(f"{place}{': ' if place else ''}the chat template {what}")

    texts = [render(chat, tokenizer) for chat in chats]
    end, special = tokenizer.convert_tokens_to_ids(END_OF_TURN), set(tokenizer.all_special_ids)
    result = []
    for chat, text, encoding, place in zip(
        chats, texts, _encode_batch(texts, tokenizer), places or [""] * len(chats), strict=True
    ):
        ids, trained = encoding.ids, []
        header, header_ids, _ = generation_prompt(chat, tokenizer)
        for i, turn in enumerate(chat):
            if turn["role"] != "assistant":
                continue
            prompt = render(chat[:i], tokenizer, True)
            if not (text.startswith(prompt) and prompt.endswith(header)):
                raise wrong(place, "does not continue its own generation prompt: no boundary to mask at")
            if not text.startswith(turn["content"], len(prompt)):
                raise wrong(place, "changes the answer it is given")
            start = encoding.char_to_token(len(prompt))
            if start is None or ids[start - len(header_ids) : start] != header_ids:
                raise wrong(place, "lets a token reach from its generation prompt into the answer: no boundary")
            try:
                stop = ids.index(end, start) + 1
            except ValueError:
                raise wrong(place, f"does not end the answer with {END_OF_TURN}") from None
            if not special.isdisjoint(ids[start : stop - 1]):
                raise wrong(place, f"does not end the answer with {END_OF_TURN}")
            trained += [start, stop]
        result.append(Tokens(np.array(ids, np.uint32), trained, trained[0]))
    return result


def _encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoding]:
    """On all cores; the switch is put back, for the library warns of every later fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if before is None else before


def cuttable(chat: Chat, tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens `truncate_prompt` may take from the first question."""
    return max(0, tokens.boundary - generation_prompt(chat, tokenizer)[2] - KEPT_QUESTION)


def cut_question(chat: Chat, tokens: Tokens, limit: int, tokenizer: PreTrainedTokenizerBase) -> Tokens | None:
    """The chat with the end of its first question cut off so that it has at most `limit` tokens; None if it cannot.

    The end, because the instruction comes first and its material after it. Not inside a character (a token may be a
    piece of one) nor between a letter and its marks.
    """
    first = next(i for i, turn in enumerate(chat) if turn["role"] == "user")
    text = chat[first]["content"]
    whole = _encode_batch([text], tokenizer)[0]
    excess = len(tokens.ids) - limit
    if excess > cuttable(chat, tokens, tokenizer):
        return None
    while True:
        stop = whole.token_to_chars(len(whole.ids) - excess)[0]
        while stop and unicodedata.category(text[stop])[0] == "M":
            stop -= 1
        short = [*chat[:first], chat[first] | {"content": text[:stop].rstrip()}, *chat[first + 1 :]]
        cut = encode([short], tokenizer)[0]
        if len(cut.ids) <= limit:
            return cut
        excess += len(cut.ids) - limit  # the cut fell inside a merged token


def split_row(tokens: Tokens, limit: int) -> list[Tokens]:
    """The row as stretches of `limit` tokens, each after half a stretch of what precedes it; every trained token is
    trained in one of them, and an answer's end in the last."""
    mask, pieces = trained_mask(len(tokens.ids), tokens.trained), []
    for start, fresh, stop in stretches(len(tokens.ids), limit):
        trained = mask[start:stop].copy()
        trained[: fresh - start] = False
        if trained.any():
            edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).tolist()
            pieces.append(Tokens(tokens.ids[start:stop], edges, edges[0]))
    return pieces


def stretches(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Where each stretch starts, where what no earlier one has begins, and where it stops."""
    fresh = 0
    while fresh < length:
        start = max(0, min(fresh - limit // 2, length - limit)) if fresh else 0
        yield start, fresh, (fresh := min(start + limit, length))


def truncate(tokens: Tokens, limit: int) -> list[Tokens]:
    """The first `limit` tokens; nothing if none of them is trained."""
    trained = [min(edge, limit) for edge in tokens.trained]
    pairs = [p for p in zip(trained[::2], trained[1::2], strict=True) if p[0] < p[1]]
    return [Tokens(tokens.ids[:limit], [edge for p in pairs for edge in p], tokens.boundary)] if pairs else []


# ----------------------------------------------------------------------------------------------------------------------
# the cache: built once, read memory-mapped


@dataclass
class Tally:
    """What a data report is made of, counted row by row."""

    rows_in: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    examples: dict = field(default_factory=dict)  # reason -> the first rows dropped for it
    licences: Counter = field(default_factory=Counter)
    filtered: Counter = field(default_factory=Counter)
    overlap: list = field(default_factory=list)
    touched: Counter = field(default_factory=Counter)  # kept rows that the length policy changed
    duplicates: Counter = field(default_factory=Counter)
    thai: int = 0
    letters: int = 0
    ended: int = 0
    trained_tokens: int = 0
    lengths: list = field(default_factory=list)  # of rows before the length policy: (tokens, cuttable, trained)
    answers: list = field(default_factory=list)  # a random sample of them

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        if len(examples := self.examples.setdefault(reason, [])) < 5:
            examples.append(where)

    def count(
        self, where: str, chat: Chat, pieces: list[Tokens], what: str, licence: str, chance: random.Random
    ) -> None:
        """A row that is trained, as `pieces`; `what` the length policy did to it."""
        self.kept += 1
        self.licences[licence] += 1
        if what:
            self.touched[what] += 1
            if len(examples := self.examples.setdefault(what, [])) < 5:
                examples.append(where)
        self.trained_tokens += sum(sum(p.trained[1::2]) - sum(p.trained[::2]) for p in pieces)
        self.ended += what != "answer cut"
        answer = chat[-1]["content"]
        thai, letters = count_letters(answer)
        self.thai += thai
        self.letters += letters
        if len(self.answers) < SAMPLE:  # Vitter's algorithm R: each row is as likely to be in the sample
            self.answers.append(answer)
        elif (at := chance.randrange(self.kept)) < SAMPLE:
            self.answers[at] = answer


SAMPLE = 200  # answers whose tokens per character and word are measured
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


def describe(tally: Tally, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The data report, but for what the cache does not depend on."""
    lengths, before = rows.lengths, np.array([r[:2] for r in tally.lengths] or np.zeros((0, 2)), int)
    tokens = int(lengths.sum())
    counts, edges = np.histogram(before[:, 0], bins=40, range=(0, max(before[:, 0].max(initial=1), 1)))
    order = np.argsort(lengths, kind="stable")
    shown = dict.fromkeys([0, int(order[len(order) // 2]), int(order[-1])]) if len(order) else ()
    english = [row["text"] for _, row in read_file(ROOT / "sample/texts/english.jsonl")]
    return {
        "rows_in": tally.rows_in,
        "rows_kept": tally.kept,
        "rows_dropped": dict(tally.dropped),
        "first_dropped": tally.examples,
        "rows_touched": dict(tally.touched),
        "rows_written": len(lengths),
        "tokens": tokens,
        "trained_tokens": tally.trained_tokens,
        "trained_share": tally.trained_tokens / max(tokens, 1),
        "end_token_survival": tally.ended / max(tally.kept, 1),
        "tokens_per_row": {
            f"p{q}": int(np.percentile(before[:, 0], q)) if len(before) else 0 for q in (5, 50, 95, 100)
        },
        "histogram": {"edges": edges.round().astype(int).tolist(), "rows": counts.tolist()},
        "too_long": {str(limit): policies(tally.lengths, limit) for limit in LENGTHS},
        "thai_share_of_letters": round(tally.thai / max(tally.letters, 1), 3),
        "tokens_per_unit": {
            "Thai": density(tally.answers, tokenizer, lambda text: [w for w in word_tokenize(text) if w.strip()]),
            "English": density(english, tokenizer, str.split),
        },
        "licences": dict(tally.licences.most_common()),
        "licences_left_out": dict(tally.filtered.most_common()),
        "duplicates": dict(tally.duplicates),
        "examples": [marked(*rows.row(i), tokenizer, 600) for i in shown],
    }


POLICIES = {  # as the report shows them
    "drop": "drop: rows left out",
    "truncate_prompt_cut": "truncate_prompt: shortened",
    "truncate_prompt_dropped": "truncate_prompt: left out",
    "split_pieces": "split: pieces made of them",
    "truncate_ends_lost": "truncate: ends lost",
}


def policies(lengths: list[tuple], limit: int) -> dict[str, int]:
    """How many rows each length policy would touch at `limit` tokens; lengths: see Tally."""
    long = [row for row in lengths if row[0] > limit]
    savable = sum(n - limit <= most for n, most, _ in long)
    pieces = 0
    for n, _, trained in long:
        mask = trained_mask(n, trained)
        pieces += sum(bool(mask[fresh:stop].any()) for _, fresh, stop in stretches(n, limit))
    return {
        "drop": len(long),
        "truncate_prompt_cut": savable,
        "truncate_prompt_dropped": len(long) - savable,
        "split_pieces": pieces,
        "truncate_ends_lost": sum(trained[-1] > limit for *_, trained in long),
    }


def density(texts: list[str], tokenizer: PreTrainedTokenizerBase, words) -> dict[str, float]:
    """Tokens a character and a word; words by PyThaiNLP's newmm for Thai, by spaces for English."""
    tokens = sum(len(e.ids) for e in _encode_batch(texts, tokenizer)) if texts else 0
    characters, count = sum(map(len, texts)), sum(len(words(text)) for text in texts)
    return {
        "tokens_per_character": round(tokens / max(characters, 1), 3),
        "tokens_per_word": round(tokens / max(count, 1), 2),
        "texts": len(texts),
    }


# ----------------------------------------------------------------------------------------------------------------------
# all of it, and the report


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
        "code": hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in CODE)).hexdigest(),
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


def refusals(report: dict, s: Settings) -> list[str]:
    """Why this data would waste a training run: each floor of the settings that it falls through."""

    def share(prefix: str) -> tuple[int, float, str]:
        count = sum(n for reason, n in report["rows_dropped"].items() if reason.startswith(prefix))
        first = [f"{where}: {r}" for r, places in report["first_dropped"].items() if r.startswith(prefix)
                 for where in places[:2]]  # fmt: skip
        return count, count / max(report["rows_in"], 1), "".join(f"\n  {line}" for line in first[:3])

    rows, place, reasons = report["rows_in"], report["source"], []
    for prefix, floor, what, advice in (
        ("empty", "max_empty_share", "have an empty question or answer", "are the columns right?"),
        ("garbled", "max_garbled_share", "hold U+FFFD or mojibake", "was the file written in another encoding?"),
        ("unbalanced", "max_unbalanced_share", "have <think> tags that do not pair", "is it another format?"),
    ):
        count, fraction, first = share(prefix)
        if fraction > getattr(s, floor):
            reasons.append(f"{count} of {rows} rows of {place} {what}, more than {floor} = {getattr(s, floor):g}; "
                           f"{advice}{first}")  # fmt: skip
    dropped, _, _ = share("longer")
    touched = dropped + sum(report["rows_touched"].get(what, 0) for what in ("question cut", "answer cut"))
    if touched > s.max_too_long_share * (report["rows_kept"] + dropped):
        reasons.append(
            f"{touched} of {rows} rows of {place} are longer than max_length = {s.max_length} tokens and would be "
            f"dropped or cut, more than max_too_long_share = {s.max_too_long_share:g}; raise --max_length, choose "
            "another --length_policy, or raise --max_too_long_share to train so"
            + "".join(f"\n  {p}" for p in report["first_dropped"].get(f"longer than {s.max_length} tokens", [])[:2])
        )
    if not rows:
        reasons.append(f"{place} has no rows")
    elif not report["trained_tokens"]:
        reasons.append(f"no row of {place} is left to train on: {json.dumps(report['rows_dropped'])}")
    elif report["trained_share"] < s.min_trained_share:
        reasons.append(
            f"only {report['trained_share']:.2%} of the tokens of {place} are trained, less than min_trained_share = "
            f"{s.min_trained_share:g}; are question and answer swapped?"
        )
    if report["trained_tokens"] and report["end_token_survival"] < s.min_end_survival:
        reasons.append(
            f"only {report['end_token_survival']:.1%} of the answers of {place} are trained up to their {END_OF_TURN}, "
            f"less than min_end_survival = {s.min_end_survival:g}: the model would not learn to stop"
            + "".join(f"\n  {p}" for p in report["first_dropped"].get("answer cut", [])[:2])
        )
    return reasons


def save_report(path: Path, report: dict) -> None:
    """Without what differs when the same is done again."""
    write_json(path, {name: value for name, value in report.items() if name != "from_cache"})


def marked(ids: np.ndarray, labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, limit: int = sys.maxsize) -> str:
    """A row as text with its trained tokens between ⟦ and ⟧; each stretch at most about `limit` characters."""
    trained = np.asarray(labels) != IGNORE
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1), len(trained)]
    pieces = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        text = abridge(tokenizer.decode(ids[start:stop]), limit)
        pieces.append(f"⟦{text}⟧" if trained[start] else text)
    return "".join(pieces)


def abridge(text: str, limit: int) -> str:
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} … {len(text) - limit:,} characters … {text[-half:]}"


def bars(counts: list[int]) -> str:
    return "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * count / max(*counts, 1))] for count in counts)


def print_report(report: dict, rows: int = 3) -> None:
    """The report for people, with the first of the decoded rows."""
    r, survival = report, report["end_token_survival"]
    print(f"data: {r['dataset']} from {r['source']}, {r['data_revision'][:19]}{', cached' * r['from_cache']}")
    if r["rows_when_described"] not in (None, r["rows_in"]):
        print(f"  note             {r['rows_when_described']:,} rows when configs/datasets.yaml was written")
    print(f"  licence          {', '.join(f'{name} ({count:,} rows)' for name, count in r['licences'].items())}")
    if r["note"]:
        print(f"                   {r['note']}")
    print(f"  rows             {r['rows_in']:,} in, {r['rows_kept']:,} kept")
    for why, count in (r["rows_dropped"] | r["rows_touched"]).items():
        print(f"    {count:>12,}   {'' if why in r['rows_touched'] else 'dropped: '}{why}")
    print(
        f"  tokens           {r['tokens']:,}; trained {r['trained_share']:.1%}; answers with their end {survival:.1%}"
    )
    print(f"  tokens a row     {'  '.join(f'{q} {n:,}' for q, n in r['tokens_per_row'].items())}")
    print(f"                   0 |{bars(r['histogram']['rows'])}| {r['histogram']['edges'][-1]:,}")
    for language, unit in r["tokens_per_unit"].items():
        character, word = unit["tokens_per_character"], unit["tokens_per_word"]
        print(f"  {language:<17}{character:.2f} tokens a character, {word:.1f} a word")
    print(f"  letters          {r['thai_share_of_letters']:.0%} Thai")
    duplicates = r["duplicates"]
    print(f"  duplicates       {duplicates.get('rows', 0):,} rows, {duplicates.get('questions', 0):,} questions")
    if r["split"] == "train":
        overlap = r["overlap"]
        print(f"  overlap          {len(overlap['rows']):,} rows repeat one of {overlap['items']:,} benchmark items "
              f"({overlap['benchmarks']})")  # fmt: skip
        for hit in overlap["rows"][:5]:
            print(f"                   {hit['row']} and {hit['item']}: {hit['shared'][:40]}…")
    print(f"  rows longer than             {''.join(f'{int(limit):>9,}' for limit in r['too_long'])}  tokens")
    for name, label in POLICIES.items():
        print(f"    {label:<27}" + "".join(f"{limit[name]:>9,}" for limit in r["too_long"].values()))
    if "padding" in r:
        shares = {k.replace("_", " "): v for k, v in r["padding"].items() if k not in ("packs", "used")}
        used = r["padding"]["used"].replace("_", " ")
        print(f"  padding          {', '.join(f'{k} {v:.1%}{chr(42) * (k == used)}' for k, v in shares.items())}"
              "  (* used)")  # fmt: skip
    colour = sys.stdout.isatty()
    for text in r["examples"][:rows]:
        print(f"  a row, what is trained {'in green' if colour else 'between ⟦ and ⟧'}:")
        text = text.replace("⟦", "\033[32m").replace("⟧", "\033[0m") if colour else text
        print("    " + text.replace("\n", "\n    "), flush=True)


def plot(report: dict, path: Path) -> None:
    """The histogram of tokens per row, as a picture."""
    import matplotlib  # here: it takes a second, and training does not need it

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    edges, rows = report["histogram"]["edges"], report["histogram"]["rows"]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.stairs(rows, edges, fill=True, color="#4477aa")
    limit = report["settings"]["max_length"]
    if limit < edges[-1]:
        axes.axvline(limit, color="#cc3311")
        axes.annotate(f"max_length {limit:,}", (limit, max(rows)), (4, -4), textcoords="offset points", va="top")
    axes.set(
        xlabel="tokens per row", ylabel="rows", xlim=(0, edges[-1]), title=f"{report['dataset']}: {sum(rows):,} rows"
    )
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    write_atomic(path, picture.getvalue())


def main() -> None:
    run: Resolved = resolve(__doc__)
    s = run.settings
    entry_of(s.dataset)  # a wrong name is said before the model is asked for
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    _, report = prepare(s, tokenizer)
    print_report(report)
    path = Path(s.output_dir) / "data-report" / f"{s.dataset}.json"
    save_report(path, report)
    plot(report, path.with_suffix(".png"))
    print(f"files: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    call(main)
