"""Training sets by name -> checked, masked token rows, and the data report.

    python data_config.py --config configs/smoke.yaml --dataset wangchan      # the report, without training

A row becomes a chat in the model's own template, of which only the last answer and its end-of-turn token are trained.
Nothing is cut: a row longer than `max_length` is dropped and counted, and past a set share the program refuses.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from settings import Resolved, Settings, UserError, call, nearest, resolve

import numpy as np
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_ouro import IGNORE, REVISIONS

END_OF_TURN = "<|im_end|>"  # the published tokenizer's eos is <|endoftext|>, but this is what ends an answer


@dataclass(frozen=True)
class Source:
    """A training set: where it is, and which columns (case-sensitive) make the question and the answer."""

    hub_id: str
    prompt: tuple[str, ...]  # joined by an empty line; the first must have text
    completion: str
    licence: str
    licence_column: str | None = None
    revision: str | None = None


DATASETS = {
    "wangchan": Source(
        "airesearch/WangchanThaiInstruct",
        prompt=("Instruction", "Input"),
        completion="Output",
        licence="per row",
        licence_column="License",
    ),
    "synthetic": Source(
        "airesearch/wangchanx-seed-free-synthetic-instruct-thai-120k",
        prompt=("instruction", "context"),
        completion="output",
        licence="MIT by its card; written by Qwen2-72B-Instruct",
    ),
    "r1": Source(
        "iapp/Thai-R1-Distill-SFT",
        prompt=("problem",),
        completion="reannotated_assistant_content",
        licence="none stated; upstream CC-BY-NC-SA-4.0",
    ),
}


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint (folder or Hub id), at the pinned revision.

    Raises:
        UserError: it cannot be read, has no chat template, or its vocabulary lacks <|im_end|>.
    """
    place = Path(path)
    if not place.exists() and (place.is_absolute() or (place.parent.is_dir() and place.parent != Path())):
        raise UserError(f"no folder {path} (and it does not look like a Hub id, org/name)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or REVISIONS.get(path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load the tokenizer of {path}: {' '.join(str(error).split())}\n"
            "without a network: HF_HUB_OFFLINE=1 reads what was downloaded before"
        ) from None
    except (KeyError, ImportError):  # what transformers makes of a missing and of an unreadable tokenizer.json
        raise UserError(f"cannot load the tokenizer of {path}: tokenizer.json is missing or damaged") from None
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template (tokenizer_config.json: chat_template)")
    if END_OF_TURN not in tokenizer.get_vocab():
        raise UserError(f"the tokenizer of {path} has no token {END_OF_TURN}: it is not Ouro's")
    return tokenizer


def read_jsonl(path: Path, text: str | None = None) -> Iterator[dict]:
    """The objects of a JSON Lines file (or of `text`, for a file inside an archive).

    Raises:
        UserError: naming the file and the line that is not a JSON object or not UTF-8.
    """
    if text is None:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise UserError(f"{path}, line {line}: not valid UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        yield row


def hub_error(name: str, hub_id: str, error: Exception) -> UserError:
    return UserError(
        f"cannot load {hub_id} from the Hub: {' '.join(str(error).split())}\n"
        "without a network: HF_HUB_OFFLINE=1 reads what was downloaded before, "
        f"--paths {name}=FOLDER a copy of your own"
    )


def read_rows(name: str, settings: Settings, split: str = "train") -> tuple[list[dict], str]:
    """The raw rows of a training set and the place they came from: a local folder or file if `paths` names one, else
    the Hub (or its cache).

    Raises:
        UserError: an unknown name, nothing readable in the folder, no network and no cached copy.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}{nearest(name, DATASETS)}")
    local = settings.paths.get(name)
    if local is None:
        source = DATASETS[name]
        try:
            rows = load_dataset(source.hub_id, revision=source.revision, split=split)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            raise hub_error(name, source.hub_id, error) from None
        return rows.to_list(), source.hub_id
    path = Path(local)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for folder in (path, path / "data") for f in folder.glob(f"{split}*") if f.is_file())
        files = [f for f in files if f.suffix in (".jsonl", ".parquet")]
    else:
        raise UserError(f"paths: {name}={local}: no such file or folder")
    if not files:
        raise UserError(f"{local} holds neither {split}*.jsonl nor {split}*.parquet, nor does {local}/data")
    rows = []
    for file in files:
        rows += Dataset.from_parquet(str(file)).to_list() if file.suffix == ".parquet" else read_jsonl(file)
    if not rows:
        raise UserError(f"{local}: no rows in {', '.join(f.name for f in files)}")
    return rows, str(local)


def to_messages(row: dict, source: Source, where: str) -> list[dict] | None:
    """One row as a chat of two turns; None if question or answer is empty.

    Raises:
        UserError: a column is missing or holds something other than text.
    """
    for column in (*source.prompt, source.completion):
        if column not in row:
            raise UserError(f"{where}: no column {column!r}{nearest(column, row)}")
        if not isinstance(row[column], str | None):
            raise UserError(f"{where}, column {column}: expected text, found {type(row[column]).__name__}")
    parts = [(row[column] or "").strip() for column in source.prompt]
    answer = (row[source.completion] or "").strip()
    if not parts[0] or not answer:
        return None
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": answer},
    ]


def tokenize(messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat whose last turn is the answer to train: its text and its end-of-turn token.

    The boundary is where the template's own generation prompt ends, so that training starts exactly where generation
    will; what the template puts after the end-of-turn token is not trained.

    Raises:
        UserError: the template does not continue its own generation prompt, or ends no turn with <|im_end|>.
    """
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(messages)
    if ids[: len(prompt)] != prompt:
        raise UserError("the chat template does not continue its own generation prompt: no boundary to mask at")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    if end not in ids[len(prompt) :]:
        raise UserError(f"the chat template does not end the answer with {END_OF_TURN}")
    stop = len(prompt) + ids[len(prompt) :].index(end) + 1
    return ids, [IGNORE] * len(prompt) + ids[len(prompt) : stop] + [IGNORE] * (len(ids) - stop)


def prepare(name: str, settings: Settings, tokenizer: PreTrainedTokenizerBase, quiet: bool = False):
    """The training rows {input_ids, labels} of a dataset, and the report on them; refuses data not worth training on.

    Raises:
        UserError: as `read_rows` and `to_messages`; or no row is left; or more rows than allowed are empty or too long.
    """
    rows, place = read_rows(name, settings)
    source = DATASETS[name]
    special = [token for token in tokenizer.all_special_tokens if token]
    kept, dropped, licences, characters = [], Counter(), Counter(), 0
    for number, row in enumerate(tqdm(rows, desc="tokenise", unit=" rows", disable=quiet or None, leave=False), 1):
        messages = to_messages(row, source, f"{place}, row {number}")
        if messages is None:
            dropped["empty"] += 1
        elif any(token in message["content"] for message in messages for token in special):
            dropped["special token in the text"] += 1  # it would end the turn or the document in the middle
        else:
            ids, labels = tokenize(messages, tokenizer)
            if len(ids) > settings.max_length:
                dropped["longer than max_length"] += 1
            else:
                kept.append({"input_ids": ids, "labels": labels})
                licences[row.get(source.licence_column, source.licence)] += 1
                characters += sum(len(message["content"]) for message in messages)
    report = describe(kept, dropped, characters, tokenizer) | {
        "dataset": name,
        "source": place,
        "licences": dict(licences),
        "max_length": settings.max_length,
    }
    refuse(report, settings)
    return Dataset.from_list(kept), report


def describe(kept: list[dict], dropped: Counter, characters: int, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The data report: how many rows came in and stayed, how long they are, what share of them is trained."""
    lengths = np.array([len(row["input_ids"]) for row in kept] or [0])
    labels = [np.array(row["labels"]) for row in kept]
    trained = sum(int((x != IGNORE).sum()) for x in labels)
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    ended = sum(bool(len(t := x[x != IGNORE]) and t[-1] == end) for x in labels)
    return {
        "rows_in": len(kept) + dropped.total(),
        "rows_kept": len(kept),
        "rows_dropped": dict(dropped),
        "tokens": int(lengths.sum()),
        "tokens_per_row": {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95, 100)},
        "tokens_per_character": round(int(lengths.sum()) / max(characters, 1), 3),
        "trained_tokens": trained,
        "trained_share": round(trained / max(int(lengths.sum()), 1), 3),
        "end_token_survival": round(ended / max(len(kept), 1), 3),
    }


def refuse(report: dict, settings: Settings) -> None:
    """Raises UserError for data that would waste a training run."""
    rows, dropped = report["rows_in"], report["rows_dropped"]
    empty, long = dropped.get("empty", 0), dropped.get("longer than max_length", 0)
    if empty > settings.max_empty_share * rows:
        raise UserError(
            f"{empty} of {rows} rows of {report['source']} have an empty question or answer; more than "
            f"max_empty_share = {settings.max_empty_share:g} usually means wrong columns"
        )
    if long > settings.max_dropped_share * rows:
        raise UserError(
            f"{long} of {rows} rows of {report['source']} are longer than max_length = {settings.max_length} tokens; "
            f"raise --max_length, or --max_dropped_share (now {settings.max_dropped_share:g}) to train without them"
        )
    if not report["trained_tokens"]:
        raise UserError(f"no row of {report['source']} is left to train on: {json.dumps(dropped)}")
    if report["end_token_survival"] < 1:
        raise UserError(f"only {report['end_token_survival']:.1%} of the rows end with {END_OF_TURN}")


def marked(row: dict, tokenizer: PreTrainedTokenizerBase, colour: bool = False) -> str:
    """A row as text with its trained tokens between ⟦ and ⟧ (in green on a terminal)."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    trained = np.array(row["labels"]) != IGNORE
    edges = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1), len(trained)]
    pieces = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        text = tokenizer.decode(row["input_ids"][start:stop])
        pieces.append(f"{opening}{text}{closing}" if trained[start] else text)
    return "".join(pieces)


def print_report(rows: Dataset, report: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    licences = ", ".join(f"{name} ({count} rows)" for name, count in report["licences"].items())
    print(f"data: {report['source']} ({report['dataset']}), licence {licences}")
    dropped = "".join(f", {count} dropped: {why}" for why, count in report["rows_dropped"].items())
    print(f"  rows {report['rows_in']}, kept {report['rows_kept']}{dropped}")
    lengths = " ".join(f"{name} {n}" for name, n in report["tokens_per_row"].items())
    print(f"  tokens {report['tokens']:,} ({lengths} per row, {report['tokens_per_character']:.2f} per character)")
    print(f"  trained tokens {report['trained_share']:.1%}, rows that end with {END_OF_TURN} "
          f"{report['end_token_survival']:.0%}")
    colour = sys.stdout.isatty()
    print(f"  the first row, trained tokens {'in green' if colour else 'between ⟦ and ⟧'}:")
    print("    " + marked(rows[0], tokenizer, colour).replace("\n", "\n    "), flush=True)


def main() -> None:
    run: Resolved = resolve(__doc__)
    tokenizer = load_tokenizer(run.settings.model_name_or_path, run.settings.model_revision)
    rows, report = prepare(run.settings.dataset, run.settings, tokenizer)
    print_report(rows, report, tokenizer)


if __name__ == "__main__":
    call(main)
