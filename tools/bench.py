"""Speed and memory, measured, as the tables of docs/speed.md; each says what it was measured on.

    python tools/bench.py train [--only "nf4, 10 GB"] [--count 2]         # train_qlora.py itself, rows of real lengths
    python tools/bench.py generate --config configs/a100.yaml             # tokens/s of generation
    python tools/bench.py score --config configs/a100.yaml                # questions/s of evaluate.py, all depths

The weights are random, of the sizes of model_name_or_path. All settings of the config can be given: --max_length 2048.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.evaluate.scoring import score
from ouro.files import ROOT, UserError, call, code_version
from ouro.model import generate as generation
from ouro.model.cost import layer_weights, matrix_rate, sizes
from ouro.model.generate import Decoder, generate
from ouro.model.loading import load_tokenizer
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Resolved, Settings, resolve

import numpy as np
import torch


def seconds(work: Callable[[], object]) -> float:
    """Of work on the CPU or the GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def title(what: str, *columns: str, count: int = 1) -> None:
    """What is measured, on what, and the names of a table's columns; the first of a row's name is left blank."""
    cuda = torch.cuda.is_available()
    machine = f"{count} x {torch.cuda.get_device_name()}" if cuda else f"{os.cpu_count()} CPU cores"
    code = code_version()
    commit = f"{code['git_commit'][:7]}{' and changes' if code['git_dirty'] else ''}"
    print(f"{machine}, torch {torch.__version__}, commit {commit}, {datetime.now(UTC):%Y-%m-%d}")
    print(what)
    line("", *columns)


def line(name: str, *cells: object) -> None:
    print(f"  {name:<26}" + "".join(f" {cell:>12}" for cell in cells), flush=True)


def random_model(s: Settings) -> OuroForCausalLM:
    config = sizes(s)
    config.architectures, config.init_seed = ["OuroForCausalLM"], None
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if s.bf16 else torch.float32)
        model = OuroForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def save_random(s: Settings, folder: Path) -> None:
    """A checkpoint of random weights."""
    random_model(s).save_pretrained(folder)
    load_tokenizer(str(ROOT / "sample/ouro-tiny"), None).save_pretrained(folder)


def need_gpus(count: int) -> None:
    if count > torch.cuda.device_count():
        raise UserError(f"--count {count}: this machine has {torch.cuda.device_count()} GPUs")


# ----------------------------------------------------------------------------------------------------------------------
# train

BF16 = {"use_qlora": False, "optim": "adamw_torch_fused"}
NF4 = {"use_qlora": True, "optim": "paged_adamw_8bit"}
FP8 = BF16 | {"frozen_weights": "fp8"}
REAL = 16384  # max_length where rows are as long as the real ones
TRAIN = {  # row: settings, GiB of the GPU that the process may use (None: all), tokens a row (or REAL), depths
    "bf16, 80 GB": (BF16, 78.6, REAL, (4, 1)),
    "bf16, 80 GB, rows to 8,192": (BF16 | {"max_length": 8192, "length_policy": "drop"}, 78.6, REAL, (4,)),
    "bf16": (BF16, None, REAL, (4,)),
    "bf16, no dropout": (BF16 | {"lora_dropout": 0}, None, REAL, (4,)),
    "fp8, 80 GB": (FP8, 78.6, REAL, (4,)),
    "nf4, 10 GB": (NF4, 9.3, REAL, (4, 1)),
    "bf16, rows of 2,048": (BF16 | {"lora_dropout": 0}, None, 2048, (4, 1)),
    "fp8, rows of 2,048": (FP8 | {"lora_dropout": 0}, None, 2048, (4,)),
}


def real_length(chance: random.Random) -> int:
    """Tokens of a row of WangchanThaiInstruct: a mixture of short answers, open questions (half of the rows) and rows
    with an input, fitted to the predecessor's logs, the cards' bytes and ten real rows."""
    kind = chance.random()
    if kind < 0.03:
        return int(100 + 1500 * chance.random())
    middle, spread = (2700, 0.17) if kind < 0.515 else (8032, 0.5)
    return int(middle * math.exp(spread * chance.gauss(0, 1)))


def write_rows(path: Path, count: int, length: int, tokenizer) -> None:
    """Rows of exactly `length` tokens, or REAL: of real lengths; no two alike."""
    chance = random.Random(0)
    words = [word for word in (f" {chr(c)}" for c in range(97, 123)) if len(tokenizer(word).input_ids) == 1]

    def row(number: int) -> dict:
        wanted = min(REAL, real_length(chance)) if length == REAL else length
        chat = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "a"}]
        more = wanted - len(tokenizer.apply_chat_template(chat))
        question = more // 2 if length == REAL else 0
        asked = str(number) + "".join(chance.choices(words, k=question))
        return {"prompt": asked, "completion": "a" + "".join(chance.choices(words, k=more - question))}

    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")


def train_beside(run: Resolved, folder: Path, processes: int, gib: float | None, gpu: int | None = None, **changes):
    """Runs train_qlora.py with these settings (on that GPU alone, of which it may use so many GiB) and gives its
    metrics, line by line, and its manifest; its output goes to `folder`.
    Raises UserError: it failed."""
    output = Path(tempfile.mkdtemp(dir=folder))
    values = {"model_name_or_path": folder / "model", "output_dir": output, "report_to": "none"}
    values |= {"overlap": "none", "eval_steps": 0, "save_steps": 10**6, "logging_steps": 1, "min_loss": 0} | changes
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    script = ["tools/capped.py", str(gib), "train_qlora.py"] if gib else ["train_qlora.py"]
    config = ["--config", run.config] if run.config else []
    settings = [f"--{key}={value}" for key, value in values.items()]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    one = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible[gpu] if visible else str(gpu)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *start, *script, *config, *settings]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | one, **pipes)
    if done.returncode:
        raise UserError(f"train_qlora.py failed:\n{done.stdout[-3000:]}")
    (metrics,) = output.glob("*/metrics.jsonl")
    lines = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
    return lines, json.loads(metrics.with_name("manifest.json").read_text(encoding="utf-8"))


def bench_train(run: Resolved) -> None:
    """train_qlora.py's own tokens/s, of rows and not of padding, everything it does included; after the first steps."""
    s, count, only = run.settings, run.options.count, run.options.only or TRAIN
    need_gpus(count)
    title(f"train_qlora.py, steps of {s.rows_per_step} rows", "loops", "GPUs", "tok/s", "x one GPU", "FLOP use",
          "padding", "GiB", "estimate", count=count)  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_random(s, folder / "model")
        tokenizer = load_tokenizer(str(folder / "model"), None)
        for length in (REAL, 2048):
            write_rows(folder / f"{length}.jsonl", s.rows_per_step * 9, length, tokenizer)
        for name, (changes, gib, length, depths) in TRAIN.items():
            for loops in (depth for depth in depths if name in only and depth in run.options.loops):
                both = {"max_length": length} | changes | {"total_ut_steps": loops, "dataset": "pairs"}
                both |= {"dataset_path": folder / f"{length}.jsonl", "cache_dir": s.cache_dir, "max_steps": 7}
                bench_row(run, folder, name, loops, gib, both)


def bench_row(run: Resolved, folder: Path, name: str, loops: int, gib: float | None, settings: dict) -> None:
    """A line for each GPU by itself, all at once, as cards differ by a few percent, and one for all together."""
    count = run.options.count

    def trained(processes: int, gpu: int | None = None) -> tuple[float, tuple]:
        lines, manifest = train_beside(run, folder, processes, gib, gpu, **settings)
        lines = lines[2:]  # without the first two steps
        spent = [row["seconds"] for row in lines]
        measured = ("tokens_per_second", "model_flop_use", "padding")
        speed, use, padding = (np.average([row.get(x, 0) for row in lines], weights=spent) for x in measured)
        memory = max(row["memory_gib"] for row in lines)
        estimate = max((plan["estimated_gib"] for plan in manifest.get("plans", ())), default=0)
        return speed, (f"{use:.1%}", f"{padding:.1%}", f"{memory:.1f}", f"{estimate:.1f}")

    try:
        with ThreadPoolExecutor(count) as pool:
            alone = list(pool.map(partial(trained, 1), range(count)))
    except UserError as error:
        return line(name, loops, str(error).strip().splitlines()[-1])
    for gpu, (speed, rest) in enumerate(alone):
        line(name, loops, f"GPU {gpu}", f"{speed:,.0f}", "", *rest)
    if count > 1:
        speed, rest = trained(count)
        line(name, loops, count, f"{speed:,.0f}", f"{speed / np.mean([one for one, _ in alone]):.3f}", *rest)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# generate, score


PROMPT, NEW = 128, 256  # tokens of `bench.py generate`


def copy_rate(device: str) -> float:
    """Bytes/s read and written by a copy: the rate that a product of few rows is bounded by."""
    a = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds(lambda: b.copy_(a))
    return 2 * 5 * a.numel() / seconds(lambda: [b.copy_(a) for _ in range(5)])


@torch.no_grad()
def bench_generate(run: Resolved) -> None:
    model = random_model(run.settings)
    config, device, size = model.config, model.device, 2 if run.settings.bf16 else 4
    rate = copy_rate(device.type)
    layers = size * layer_weights(config) * config.num_hidden_layers
    head = size * config.hidden_size * config.vocab_size
    title(f"{config.num_hidden_layers} layers, hidden {config.hidden_size}; {PROMPT} + {NEW} tokens; a copy moves "
          f"{rate / 1e12:.2f} TB/s", "loops", "batch", "tok/s", "ms a step", "of the limit", "whole call", "first call",
          "cache GiB")  # fmt: skip
    model.decoder = decoder = Decoder(model)
    generation.KEPT = math.inf
    for loops in run.options.loops:
        for batch in (1, run.options.batch or 64):
            prompts = torch.randint(3, config.vocab_size, (batch, PROMPT)).tolist()
            call = partial(generate, model, prompts, depth=loops, max_new_tokens=NEW, stop=[], batch_size=batch)
            try:
                first, whole = seconds(call), seconds(call)
                decoder.position.fill_(PROMPT)
                decoder.active.fill_(1)
                step = seconds(lambda: [decoder.run() for _ in range(NEW - 1)]) / (NEW - 1)
                read = loops * layers + head + batch * decoder.row_bytes(loops, PROMPT + NEW // 2)  # at its mean length
                line("generate", loops, batch, f"{batch / step:,.1f}", f"{step * 1e3:.2f}", f"{read / rate / step:.0%}",
                     f"{batch * NEW / whole:,.0f}", f"{first:.1f} s",
                     f"{decoder.slots.numel() * decoder.slots.itemsize / 2**30:.1f}")  # fmt: skip
            except RuntimeError as error:  # one row's failure, out of memory too, must not cost the others
                line("generate", loops, batch, f"  {type(error).__name__}: {error}"[:2000])
            decoder.release()
        ids = torch.randint(3, config.vocab_size, (1, PROMPT + NEW // 2), device=device)
        options = {"use_cache": False, "do_sample": False, "pad_token_id": 0, "total_ut_steps": loops}
        usual = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **options)
        usual(max_new_tokens=1)
        step = seconds(partial(usual, min_new_tokens=4, max_new_tokens=4)) / 4
        line("stock", loops, 1, f"{1 / step:,.1f}", f"{step * 1e3:.2f}")


@torch.no_grad()
def bench_score(run: Resolved) -> None:
    s, depths, count = run.settings, [1, 2, 3, 4], 512
    model, budget = random_model(s), s.eval_batch_tokens
    config, cuda = model.config, torch.cuda.is_available()
    rate = matrix_rate("cuda") if cuda else None
    if cuda and s.torch_compile:
        model.compile_layers()
    chance = random.Random(0)

    def draw(length: int) -> list[int]:
        return [chance.randrange(3, config.vocab_size) for _ in range(length)]

    def letters() -> list[tuple[list[int], int]]:
        question = draw(count)
        return [(question + [letter], count) for letter in range(3, 8)]

    def texts() -> list[tuple[list[int], int]]:
        question, options = draw(count // 2), [draw(count // 10) for _ in range(5)]
        prompts = [question + sum(options[turn:] + options[:turn], []) for turn in range(5)]
        return [(prompt + option, len(prompt)) for prompt in prompts for option in options]

    flops = max(depths) * config.num_hidden_layers * 2 * layer_weights(config)  # of a token
    title(f"questions of {count} tokens, 5 options, depths {depths} from one pass, {budget:,} tokens a batch"
          + (f"; products of bf16: {rate / 1e12:.0f} TFLOP/s" if rate else ""),
          "questions/s", "tokens/s", "of that", "first s")  # fmt: skip
    for kind, make, tokens in (("letters, one prompt", letters, count), ("texts, five rotations", texts, 4 * count)):

        def scored(number: int, make=make) -> tuple[float, int]:
            asked = [sequence for _ in range(number) for sequence in make()]
            read = []
            return seconds(lambda: read.append(score(model, asked, depths, budget).tokens)), read[0]

        number = max(1, 4 * budget // tokens)
        first, _ = scored(number)
        spent, read = scored(2 * number)
        share = f"{flops * read / spent / rate:.0%}" if rate else ""
        line(kind, f"{2 * number / spent:.1f}", f"{read / spent:,.0f}", share, f"{first:.1f}")


WHAT = {"train": bench_train, "generate": bench_generate, "score": bench_score}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="what to measure")
    parser.add_argument("--count", type=int, default=1, help="train: how many GPUs")
    parser.add_argument("--only", nargs="+", choices=TRAIN, help="train: these rows of the table")
    parser.add_argument("--batch", type=int, help="generate: instead of 64")
    parser.add_argument("--loops", type=int, nargs="+", default=(4, 1), help="train, generate: these depths")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    if run.options.count < 1:
        raise UserError(f"--count must be at least 1, got {run.options.count}")
    WHAT[run.options.what](run)


if __name__ == "__main__":
    call(main)
