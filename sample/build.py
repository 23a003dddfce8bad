"""Builds sample/ouro-tiny: a tiny Ouro's config, and a tokenizer like the published one trained on the sample text;
and the Parquet files of sample/openthaieval and sample/m3exam, as the Hub has them, from the items.jsonl beside them.
Also, only where they are named, the English training sets: sample/english from three novels of Jane Austen's, which are
in the public domain (Debian's package r-cran-janeaustenr 1.0.0), and sample/r1-english, made-up sums and their working.

    python sample/build.py                 # writes the same bytes every time, for it reads the first rows alone
    python sample/build.py FOLDER          # the English sets too; FOLDER: where the package's Rdata.rdb is

The weights are not stored: `init_seed` in config.json makes `load_ouro` draw them. Like the published tokenizer
(SmolLM2's) this one is a byte-level BPE with single digits, <|endoftext|> = 0 as bos, eos and pad, and ChatML turns
that end with <|im_end|> = 2.
"""

import json
import random
import re
import struct
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.evaluate import benchmarks
from ouro.model.modeling_ouro import OuroConfig

SAMPLE = Path(__file__).resolve().parent

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 1024
PASSAGE = 2000  # characters at least, up to the end of a paragraph
PASSAGES = 220  # and as many that follow them
ASK = "Go on with the story from here."
NAMES = ("Anong", "Boon", "Chai", "Dara", "Kamol", "Lek", "Malee", "Nok", "Ploy", "Somchai", "Tida", "Wichai")
THINGS = ("pen", "mango", "candle", "basket", "hat", "lamp", "melon", "notebook", "rope", "spoon", "stool", "towel")
SUMS = 96
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> list[str]:
    """Every string of these first rows of the sample; the rows that came later and the exam items stay unseen."""
    first = {"wangchan/train": 72, "synthetic/train": 24, "r1/train": 24, "texts/english": 12, "texts/thai": 12}
    rows = [
        json.loads(line)
        for name, count in first.items()
        for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ]
    return [value for row in rows for value in row.values() if isinstance(value, str)]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[0],
        unk_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build(folder: Path) -> None:
    train_tokenizer(corpus(), VOCABULARY).save_pretrained(folder, save_jinja_files=False)
    OuroConfig(
        architectures=["OuroForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.1,  # five times the published one: a frozen random head must be able to tell tokens apart
        init_seed=0,
        torch_dtype="bfloat16",
    ).save_pretrained(folder)


def parquet(items: Path, file: Path) -> None:
    lines = items.read_text(encoding="utf-8").splitlines()
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), file, compression="none")


def novels(database: bytes) -> list[str]:
    """The novels of janeaustenr as R keeps them: each a compressed vector of lines; an empty one ends a paragraph."""
    found = []
    while database:
        unpacker = zlib.decompressobj()
        vector, lines = unpacker.decompress(database[4:]), []  # its length comes first
        database = unpacker.unused_data
        at = vector.index(b"\0\0\0\x10") + 8  # a vector of texts, and how many
        while vector[at : at + 4] in (b"\0\4\0\x09", b"\0\0\x80\x09"):  # a text in ASCII or UTF-8
            (length,) = struct.unpack(">i", vector[at + 4 : at + 8])
            lines.append(vector[at + 8 : at + 8 + length].decode())
            at += 8 + length
        found.append("\n".join(lines))
    return found


def write_rows(file: Path, rows: Iterable[dict]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def english(database: bytes) -> None:
    """Passages of Northanger Abbey, Persuasion and the beginning of Pride and Prejudice, each with how it goes on: a
    few more tokens than sample/wangchan has. Every tenth row is the test split's."""
    rows, passages = [], [""]
    for novel in novels(database)[2:5]:
        for paragraph in re.split(r"\n\n+", novel[re.search("(?i)^chapter 1$", novel, re.MULTILINE).start() :]):
            if len(passages[-1]) >= PASSAGE:
                passages.append("")
            passages[-1] = f"{passages[-1]}\n\n{' '.join(paragraph.replace('_', '').split())}".strip()
    for asked, answer in list(zip(passages[::2], passages[1::2], strict=False))[:PASSAGES]:
        turns = [("user", f"{ASK}\n\n{asked}"), ("assistant", answer)]
        messages = [{"content": content, "role": role} for role, content in turns]
        rows.append({"messages": messages, "source": "novels"})
    write_rows(SAMPLE / "english/test.jsonl", rows[9::10])
    write_rows(SAMPLE / "english/train.jsonl", [row for number, row in enumerate(rows) if number % 10 != 9])


def sums() -> None:
    """Shopping sums in the columns of R1-Distill-SFT."""
    draw, rows = random.Random(0), []
    for number in range(SUMS):
        (a, b), (x, y) = draw.sample(NAMES, 2), draw.sample(THINGS, 2)
        p, m, q, n = (draw.randint(3, 90) for _ in range(4))
        first, second = p * m, q * n
        total = first + second
        paid = -(-total // 100) * 100
        problem = (
            f"{a} keeps a shop. One day {b} buys {m} {x}s at {p} baht each and {n} {y}s at {q} baht each, and pays "
            f"with {paid} baht. How much money does {a} give back?"
        )
        solution = (
            f"The {x}s cost {m} × {p} = {first} baht and the {y}s {n} × {q} = {second} baht, together {total} baht. "
            f"{a} gives back {paid} - {total} = {paid - total} baht."
        )
        thought = (
            f"I need what {b} has to pay. There are two kinds of things, {x}s and {y}s, so I find what each kind costs "
            f"and add the two. For the {x}s: {m} at {p} baht. {p} times {m // 10 * 10} is {p * (m // 10 * 10)}, {p} "
            f"times {m % 10} is {p * (m % 10)}, and the sum is {first}. For the {y}s: {n} at {q} baht, "
            f"which is {second}. Together that is {total}. {b} pays with {paid} baht, and {paid} less "
            f"{total} leaves {paid - total}. Let me check: {total} and {paid - total} make {paid}. That is right."
        )
        rows.append({"id": f"sum_{number}", "problem": problem, "source": "sums", "solution": solution,
                     "reannotated_assistant_content": f"<think>\n{thought}\n</think>\n\n{solution}",
                     "verified": None, "quality_metrics": None})  # fmt: skip
    write_rows(SAMPLE / "r1-english/train.jsonl", rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        english((Path(sys.argv[1]) / "Rdata.rdb").read_bytes())
        sums()
    build(SAMPLE / "ouro-tiny")
    parquet(SAMPLE / "openthaieval/items.jsonl", SAMPLE / "openthaieval/data/test.parquet")
    parquet(SAMPLE / "m3exam/items.jsonl", SAMPLE / "m3exam" / benchmarks.table()["benchmarks"]["m3exam"]["file"])
