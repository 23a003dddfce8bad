"""Speed and memory, measured, as the tables of docs/speed.md; each says what it was measured on.

    python tools/bench.py train [--only "nf4, 10 GB"] [--count 2]         # train_qlora.py itself, rows of real lengths
    python tools/bench.py generate --config configs/a100.yaml             # tokens/s of generation
    python tools/bench.py score --config configs/a100.yaml                # questions/s of evaluate.py, all depths

The weights are random, of the sizes of model_name_or_path. All settings of the config can be given: --rows_per_step 8.
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
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.evaluate.scoring import score
from ouro.files import ROOT, UserError, call, code_version, read_json
from ouro.model import generate as generation
from ouro.model.cost import layer_weights, matrix_rate
from ouro.model.generate import Decoder, generate
from ouro.model.loading import load_tokenizer, sizes
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Resolved, Settings, resolve
from ouro.train.machine import check_device

import numpy as np
import torch

CUDA = torch.cuda.is_available()


def seconds(work: Callable[[], object]) -> float:
    """Of work on the CPU or the GPU."""
    started = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def title(what: str, *columns: str, count: int = 1) -> None:
    """What is measured, on what, and the names of a table's columns; the first of a row's name is left blank."""
    machine = f"{count} x {torch.cuda.get_device_name()}" if CUDA else f"{os.cpu_count()} CPU cores"
    code = code_version()
    commit = f"{code['git_commit'][:7]}{' and changes' if code['git_dirty'] else ''}"
    print(f"{machine}, torch {torch.__version__}, commit {commit}, {datetime.now(UTC):%Y-%m-%d}\n{what}")
    line("", *columns)


def line(name: str, *cells: object) -> None:
    print(f"  {name:<26}" + "".join(f" {cell:>12}" for cell in cells), flush=True)


def random_model(s: Settings) -> OuroForCausalLM:
    config = sizes(s)
    config.architectures, config.init_seed = ["OuroForCausalLM"], None
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if s.bf16 else torch.float32)
        model = OuroForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------------
# train

BF16 = {"use_qlora": False, "optim": "adamw_torch_fused"}
NF4 = {"use_qlora": True, "optim": "paged_adamw_8bit"}
FP8 = BF16 | {"frozen_weights": "fp8"}
REAL = 16384  # max_length where rows are as long as the real ones
TRAIN = {  # row: settings, GiB of the GPU that the process may use (None: all), tokens a row (or REAL), depths
    "bf16, 80 GB": (BF16, 78.6, REAL, (4, 1)),
    "bf16, 80 GB, rows to 8,192": (
        BF16 | {"max_length": 8192, "length_policy": "drop", "max_too_long_share": 1},
        78.6,
        REAL,
        (4,),
    ),
    "bf16": (BF16, None, REAL, (4,)),
    "fp8, 80 GB": (FP8, 78.6, REAL, (4,)),
    "nf4, 10 GB": (NF4, 9.3, REAL, (4,)),
    "bf16, rows of 2,048": (BF16 | {"lora_dropout": 0}, None, 2048, (4, 1)),
    "bf16, rows of 2,048, dropout": (BF16, None, 2048, (1,)),
    "fp8, rows of 2,048": (FP8 | {"lora_dropout": 0}, None, 2048, (1,)),
}
# Two steps are measured, after two: all rows of the table in half an hour of an H200.
STEPS = {"max_steps": 4, "eval_steps": 0, "save_steps": 10**6, "overlap": "none", "min_loss": 0}


def real_length(chance: random.Random) -> int:
    """Tokens of a row of WangchanThaiInstruct: a mixture of short answers, open questions (half of the rows) and rows
    with an input, fitted to the predecessor's logs, the cards' bytes and ten real rows."""
    kind = chance.random()
    if kind < 0.03:
        return int(100 + 1500 * chance.random())
    middle, spread = (2700, 0.17) if kind < 0.515 else (8032, 0.5)
    return min(REAL, int(middle * math.exp(spread * chance.gauss(0, 1))))


def write_rows(path: Path, count: int, length: int, tokenizer) -> None:
    """Rows of exactly `length` tokens, or REAL: of real lengths; no two alike."""
    chance, words = random.Random(0), [" a", " b", " c", " d"]  # a token each

    def row(number: int) -> dict:
        wanted = real_length(chance) if length == REAL else length
        chat = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "a"}]
        more = wanted - len(tokenizer.apply_chat_template(chat))
        question = more // 2 if length == REAL else 0
        asked = str(number) + "".join(chance.choices(words, k=question))
        return {"prompt": asked, "completion": "a" + "".join(chance.choices(words, k=more - question))}

    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")


def trained(run: Resolved, folder: Path, gpus: int, gib: float | None, **settings) -> tuple[float, list[str]]:
    """Runs train_qlora.py on so many GPUs, of each of which it may use so many GiB. Of its steps after the second:
    tokens/s, of rows and not of padding, and the row's other cells.
    Raises UserError: it failed."""
    output = Path(tempfile.mkdtemp(dir=folder))
    needed = {"model_name_or_path": folder / "model", "output_dir": output, "report_to": "none", "logging_steps": 1}
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
    script = ["tools/capped.py", str(gib), "train_qlora.py"] if gib else ["train_qlora.py"]
    config = ["--config", run.config] if run.config else []
    command = [sys.executable, *start, *script, *config, *typed(settings | given(run) | needed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise UserError("train_qlora.py failed:", *done.stdout[-3000:].splitlines())
    (metrics,) = output.glob("*/metrics.jsonl")
    steps = [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()][2:]
    measured = ("tokens_per_second", "model_flop_use", "padding")
    spent = [step["seconds"] for step in steps]
    speed, use, padding = (np.average([step.get(name, 0) for step in steps], weights=spent) for name in measured)
    memory = max(step["memory_gib"] for step in steps)
    plans = read_json(metrics.with_name("manifest.json")).get("plans", ())
    estimate = max((plan["estimated_gib"] for plan in plans), default=0)
    return speed, [f"{use:.1%}", f"{padding:.1%}", f"{memory:.1f}", f"{estimate:.1f}"]


def given(run: Resolved) -> dict[str, object]:
    """The settings of the command line."""
    return {name: getattr(run.settings, name) for name, origin in run.origins.items() if origin == "command line"}


def typed(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def bench_train(run: Resolved) -> None:
    """train_qlora.py's own tokens/s, everything it does included: on one GPU and, with --count, on several."""
    s, count, only = run.settings, run.options.count, run.options.only or TRAIN
    if not 1 <= count <= torch.cuda.device_count():
        raise UserError(f"--count {count}: this machine has {torch.cuda.device_count()} GPUs")
    title(" ".join([f"steps of {s.rows_per_step} rows, train_qlora.py", *typed(given(run))]), "loops", "GPUs", "tok/s",
          "x one GPU", "FLOP use", "padding", "GiB", "estimate", count=count)  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        random_model(s).save_pretrained(folder / "model")
        tokenizer = load_tokenizer(str(ROOT / "sample/ouro-tiny"))
        tokenizer.save_pretrained(folder / "model")
        for length in {length for _, _, length, _ in TRAIN.values()}:
            write_rows(folder / f"{length}.jsonl", s.rows_per_step * 6, length, tokenizer)
        for name, (changes, gib, length, depths) in TRAIN.items():
            rows = {"dataset": "pairs", "dataset_path": folder / f"{length}.jsonl", "max_length": length}
            for loops in (depth for depth in depths if name in only and depth in run.options.loops):
                try:
                    one, cells = trained(run, folder, 1, gib, **STEPS | rows | changes, total_ut_steps=loops)
                    line(name, loops, 1, f"{one:,.0f}", "", *cells)
                    if count > 1:
                        speed, cells = trained(run, folder, count, gib, **STEPS | rows | changes, total_ut_steps=loops)
                        line(name, loops, count, f"{speed:,.0f}", f"{speed / one:.3f}", *cells)
                except UserError as error:  # the other rows are measured all the same
                    line(name, loops, str(error).strip().splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# generate

PROMPT, NEW, TOGETHER = 128, 256, 64  # tokens of each prompt and each reply, and sequences at once, where they fit


def copy_rate(device: str) -> float:
    """Bytes/s read and written by a copy: the rate that a product of few rows is bounded by."""
    a = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds(lambda: b.copy_(a))
    return 2 * 5 * a.numel() / seconds(lambda: [b.copy_(a) for _ in range(5)])


@torch.no_grad()
def bench_generate(run: Resolved) -> None:
    """tokens/s between two tokens and of a whole call, beside transformers' loop without a cache."""
    model = random_model(run.settings)
    config, device, number = model.config, model.device, model.dtype.itemsize
    rate = copy_rate(device.type)
    title(f"{config.num_hidden_layers} layers, hidden {config.hidden_size}; {PROMPT} + {NEW} tokens; a copy moves "
          f"{rate / 1e12:.2f} TB/s", "loops", "batch", "tok/s", "ms a step", "of the limit", "whole call", "first call",
          "cache GiB")  # fmt: skip
    model.decoder = decoder = Decoder(model)
    generation.KEPT = math.inf  # the cache is still there after a call
    for loops in run.options.loops:
        weights = loops * layer_weights(config) * config.num_hidden_layers + config.hidden_size * config.vocab_size
        for wanted in (1, TOGETHER):
            prompts = torch.randint(3, config.vocab_size, (wanted, PROMPT)).tolist()
            reply = partial(generate, model, prompts, depth=loops, max_new_tokens=NEW, stop=[])
            first, whole = seconds(reply), seconds(reply)
            batch = len(decoder.token)
            decoder.position.fill_(PROMPT)
            decoder.active.fill_(1)
            step = seconds(lambda: [decoder.run() for _ in range(NEW - 1)]) / (NEW - 1)
            read = number * weights + batch * decoder.row_bytes(loops, PROMPT + NEW // 2)  # of the cache at its mean
            line("generate", loops, batch, f"{batch / step:,.1f}", f"{step * 1e3:.2f}", f"{read / rate / step:.0%}",
                 f"{wanted * NEW / whole:,.0f}", f"{first:.1f} s", f"{decoder.slots.nbytes / 2**30:.1f}")  # fmt: skip
            decoder.release()
        ids = torch.randint(3, config.vocab_size, (1, PROMPT + NEW // 2), device=device)
        options = {"use_cache": False, "do_sample": False, "pad_token_id": 0, "total_ut_steps": loops}
        usual = partial(model.generate, ids, attention_mask=torch.ones_like(ids), **options)
        usual(max_new_tokens=1)
        step = seconds(partial(usual, min_new_tokens=4, max_new_tokens=4)) / 4
        line("stock", loops, 1, f"{1 / step:,.1f}", f"{step * 1e3:.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# score

QUESTION, DEPTHS = 512, [1, 2, 3, 4]  # tokens, and what is read of them in one pass, by `bench.py score`


def letters(draw: Callable[[int], list[int]]) -> list[tuple[list[int], int]]:
    """A question whose five answers are a token each."""
    question = draw(QUESTION)
    return [(question + [letter], QUESTION) for letter in range(3, 8)]


def texts(draw: Callable[[int], list[int]]) -> list[tuple[list[int], int]]:
    """A question whose five answers are texts, in five rotations."""
    question, options = draw(QUESTION // 2), [draw(QUESTION // 10) for _ in range(5)]
    prompts = [question + sum(options[turn:] + options[:turn], []) for turn in range(5)]
    return [(prompt + option, len(prompt)) for prompt in prompts for option in options]


@torch.no_grad()
def bench_score(run: Resolved) -> None:
    """Questions/s of both kinds, all depths from one pass."""
    s, model, chance = run.settings, random_model(run.settings), random.Random(0)
    rate = matrix_rate("cuda") if CUDA else None
    if CUDA and s.torch_compile:
        model.compile_layers()
    flops = max(DEPTHS) * model.config.num_hidden_layers * 2 * layer_weights(model.config)  # of a token
    title(f"questions of {QUESTION} tokens, 5 options, depths {DEPTHS} from one pass, {s.eval_batch_tokens:,} tokens a "
          "batch" + (f"; products of bf16: {rate / 1e12:.0f} TFLOP/s" if rate else ""),
          "questions/s", "of that")  # fmt: skip

    def draw(length: int) -> list[int]:
        return [chance.randrange(3, model.config.vocab_size) for _ in range(length)]

    for kind, make, tokens in (("letters, one prompt", letters, 512), ("texts, five rotations", texts, 2048)):
        number = max(1, 8 * s.eval_batch_tokens // tokens)
        asked = [sequence for _ in range(number) for sequence in make(draw)]
        read = score(model, asked, DEPTHS, s.eval_batch_tokens).tokens  # compiles, too
        spent = seconds(partial(score, model, asked, DEPTHS, s.eval_batch_tokens))
        line(kind, f"{number / spent:.1f}", f"{flops * read / spent / rate:.0%}" if rate else "")


WHAT = {"train": bench_train, "generate": bench_generate, "score": bench_score}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="what to measure")
    parser.add_argument("--count", type=int, default=1, help="train: how many GPUs")
    parser.add_argument("--only", nargs="+", choices=TRAIN, help="train: these rows of the table")
    parser.add_argument("--loops", type=int, nargs="+", default=(4, 1), help="train, generate: these depths")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    check_device(run.settings)  # a CPU would take hours to draw the weights of a large model in bf16
    WHAT[run.options.what](run)


if __name__ == "__main__":
    call(main)
