"""Speed and memory, measured, as tables that name what they were measured on.

python bench.py data --config configs/smoke.yaml [--rows 4000]      # tokenise, cache, pack, batch; beside TRL
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from settings import Resolved, call, resolve

import torch
from torch.utils.data import DataLoader
from trl.trainer.utils import DataCollatorForChatML

from batches import EpochOrder, collate, pack
from data_config import load_tokenizer, prepare
from sources import ROOT, read_file

CHARACTERS = 3000  # of a row of WangchanThaiInstruct, about


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """Rows of about CHARACTERS characters in WangchanThaiInstruct's columns, from the sample's text, no two alike."""
    rows = [row for _, row in read_file(ROOT / "sample/wangchan/train.jsonl")]
    pieces = [piece for row in rows for piece in f"{row['Input']} {row['Output']}".split() if len(piece) > 8]
    chance = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            half = []
            while sum(map(len, half)) < CHARACTERS // 2:
                half.append(chance.choice(pieces))
            other = chance.sample(half, len(half))
            row = rows[number % len(rows)] | {"ID": str(number), "Input": " ".join(half), "Output": " ".join(other)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def bench_data(run: Resolved) -> None:
    count, s = run.options.rows, run.settings
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision)
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "train.jsonl", Path(folder) / "cache"
        write_rows(path, count)
        s.dataset, s.dataset_path, s.cache_dir = "wangchan", str(path), str(cache)
        s.max_length, s.max_too_long_share = 8192, 1
        values = {name: getattr(s, name) for name in ("dataset", "dataset_path", "cache_dir", "max_length", "overlap")}
        values |= {"max_too_long_share": 1, "output_dir": folder, "model_name_or_path": s.model_name_or_path}
        values["paths"] = ",".join(f"{name}={place}" for name, place in s.paths.items())
        command = [sys.executable, "data_config.py", *(f"--{name}={value}" for name, value in values.items())]
        start = seconds(lambda: subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL))
        build = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        hit = seconds(lambda: prepare(s, tokenizer, quiet=True))
        rows, report = prepare(s, tokenizer, quiet=True)
        size = sum(file.stat().st_size for file in cache.rglob("*")) / 2**20

        order = EpochOrder(rows.lengths, 32, seed=0, grouped=True)
        loader = DataLoader(rows, batch_size=8, sampler=order, collate_fn=collate)
        read = seconds(lambda: sum(1 for _ in loader))
        packing = seconds(lambda: pack(rows.lengths, s.max_length))

        some = min(count, 400)  # TRL's collator is slow, and its rate does not depend on their number
        chats = [
            {"messages": [{"role": "user", "content": f"{row['Instruction']}\n\n{row['Input']}"},
                          {"role": "assistant", "content": row["Output"]}]}
            for _, (_, row) in zip(range(some), read_file(path), strict=False)
        ]  # fmt: skip
        collator = DataCollatorForChatML(tokenizer, max_length=s.max_length)
        theirs = seconds(lambda: [collator(chats[at : at + 8]) for at in range(0, some, 8)])

    tokens = report["tokens"]
    print(f"{count:,} rows of {CHARACTERS:,} characters, {tokens / count:,.0f} tokens each by {s.model_name_or_path}")
    print(f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}")
    print(f"  {'':<44}{'rows/s':>9}  {'tokens/s':>11}  {'s':>7}")
    for name, spent, number in (
        ("check, mask, tokenise, write (data_config.py)", build, count),
        ("read from the cache in batches of 8", read, count),
        ("TRL's DataCollatorForChatML, in the loop", theirs, some),
        ("pack (best fit)", packing, count),
    ):
        print(f"  {name:<44}{number / spent:>9,.0f}  {number / spent * tokens / count:>11,.0f}  {spent:>7.2f}")
    print(f"  cached batches / TRL's collator: {count / read / (some / theirs):.0f} times")
    print(f"  opening the cache {hit:.2f} s; cache {size:,.0f} MiB; peak memory of data_config.py {peak:.2f} GiB")
    print(f"  padding {json.dumps(report['padding'])}")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("data",), help="what to measure")
    parser.add_argument("--rows", type=int, default=4000, help="rows of the data measured (default: 4000)")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    bench_data(run)


if __name__ == "__main__":
    call(main)
