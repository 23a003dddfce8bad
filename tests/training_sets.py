"""Training sets for tests: rows in the published layouts, files of them, and what the prepared rows say.

rows, report = prepare_set(tmp_path, "wangchan", [ROW] * 9, tokenizer=tokenizer, max_length=64)
texts(rows, tokenizer), trained_texts(rows, tokenizer)
"""

import gzip
import hashlib
import itertools
import json
import random
import tempfile
from pathlib import Path

from ouro.data.batches import Rows
from ouro.data.cache import prepare
from ouro.data.formats import read_file
from ouro.files import ROOT
from ouro.model.modeling_ouro import IGNORE
from ouro.settings import Settings

import numpy as np
import pyarrow as pa
import pyarrow.parquet

END = "<|im_end|>"
ROW = {"ID": "1", "Domain": "Legal", "Instruction": "ถามว่าอะไร", "Input": "", "Output": "ตอบว่าอย่างนี้", "Tags": "",
       "Task_type": "open_qa", "License": "Apache-2.0"}  # fmt: skip
THOUGHT = {"problem": "โจทย์", "solution": "เฉลย", "reannotated_assistant_content": "<think>\nคิด\n</think>\n\nตอบ",
           "id": 1, "source": "olympiads", "verified": None, "quality_metrics": None}  # fmt: skip
UNBOUNDED = {"max_too_long_share": 1, "min_end_survival": 0, "min_trained_share": 0}


class Lengths:
    """Rows of which only the lengths are known, all their tokens trained."""

    def __init__(self, lengths):
        self.lengths = self.trained = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)


def write(path: Path, rows: list | str | bytes | pa.Table) -> None:
    """JSONL (of objects, or lines as they are; compressed), a JSON list or Parquet, by the name; text and bytes as they
    are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes | str):
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    elif path.suffix == ".parquet":
        pa.parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def prepare_set(
    folder: Path, dataset: str, files: dict | list, path: str = "", split: str = "train", *, tokenizer, **changes
) -> tuple[Rows, dict]:
    """Writes files {name: rows} (or the rows of train.jsonl) as a training set into `folder`, and prepares it."""
    place = Path(tempfile.mkdtemp(dir=folder, prefix="set"))
    for name, rows in (files if isinstance(files, dict) else {"train.jsonl": files}).items():
        write(place / name, rows)
    settings = Settings(dataset=dataset, dataset_path=str(place / path), overlap="none",
                        cache_dir=str(folder / "cache"), **changes)  # fmt: skip
    return prepare(settings, tokenizer, split, quiet=True)


def chatml(*turns: str, system: str = "You are a helpful assistant.") -> str:
    """Turns of user and assistant as Ouro's template writes them, here without the template."""
    named = [("system", system), *zip(itertools.cycle(("user", "assistant")), turns, strict=False)]
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in named)


def texts(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(rows.row(i)[0]) for i in range(len(rows))]


def trained_texts(rows, tokenizer) -> list[str]:
    pairs = [rows.row(i) for i in range(len(rows))]
    assert all(((labels == ids) | (labels == IGNORE)).all() for ids, labels in pairs)
    return [tokenizer.decode(ids[labels != IGNORE]) for ids, labels in pairs]


def count(text: str, tokenizer) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def hashed(text: str) -> float:
    """Where in [0, 1) the SHA-256 puts a text: below 0.02 it is held out of the sets that have no test split."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16


def questions(count: int, held_out: bool = False, suffix: str = "") -> list[str]:
    endless = (f"คำถามข้อที่ {i} คืออะไร{suffix}" for i in itertools.count())
    return list(itertools.islice((q for q in endless if (hashed(q) < 0.02) == held_out), count))


def sample_text(count: int, length: int, seed: int = 0) -> list[str]:
    """Stretches of the sample's Thai texts, of up to `length` characters."""
    chance = random.Random(seed)
    whole = "\n".join(row["text"] for _, row in read_file(ROOT / "sample/texts/thai.jsonl"))
    found = (whole[at : at + chance.randrange(8, length)].strip() for at in
             (chance.randrange(len(whole) - length) for _ in itertools.count()))  # fmt: skip
    return list(itertools.islice((text for text in found if text), count))


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    told = [{"role": "system", "content": system}] if system else []
    return told + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
