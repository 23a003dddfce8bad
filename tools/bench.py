"""Speed and memory, measured, as the tables of docs/speed.md; each says what it was measured on.

    python tools/bench.py train --config configs/a100.yaml [--only nf4]   # steps of training, beside stock PEFT
    python tools/bench.py trainer --config configs/a100.yaml [--count 2]  # train_qlora.py itself, on 1 GPU and on all
    python tools/bench.py generate --config configs/a100.yaml             # tokens/s of generation
    python tools/bench.py score --config configs/a100.yaml                # questions/s of evaluate.py, all depths
    python tools/bench.py plan --config configs/a100.yaml --gpu H100 --count 4    # predicted: needs no GPU

The weights are random, of the sizes of model_name_or_path. All settings of the config can be given: --max_length 2048.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import random
import statistics
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

from ouro.cluster.plan import predict
from ouro.evaluate.scoring import score
from ouro.files import ROOT, UserError, call, code_version, read_yaml
from ouro.model import generate as generation
from ouro.model.cost import (
    GPUS,
    check_share,
    layer_weights,
    layers_to_recompute,
    matrix_rate,
    sizes,
    training_flops,
    training_memory,
)
from ouro.model.generate import Decoder, generate
from ouro.model.graphs import peak_memory
from ouro.model.loading import load_ouro, load_tokenizer
from ouro.model.lora import refresh
from ouro.model.modeling_ouro import PROJECTIONS, OuroForCausalLM
from ouro.settings import EXPERIMENTS, Resolved, Settings, resolve
from ouro.train.build import build

import bitsandbytes.optim
import torch
from peft import LoraConfig, get_peft_model


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


def need_gpus(run: Resolved, count: int = 1) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"bench.py {run.options.what} measures a GPU, and there is none here")
    if count > torch.cuda.device_count():
        raise UserError(f"--count {count}: this machine has {torch.cuda.device_count()} GPUs")


# ----------------------------------------------------------------------------------------------------------------------
# train, trainer

BF16 = {"use_qlora": False, "optim": "adamw_torch_fused", "activation_checkpointing": "none"}
NF4 = {"use_qlora": True, "optim": "paged_adamw_8bit", "activation_checkpointing": "full"}
TRAIN = {  # row: settings, and the batch by loops
    "stock bf16": (BF16 | {"lora_dropout": 0, "loss": "mixture"}, {4: (8,), 1: (8,)}),
    "bf16": (BF16 | {"lora_dropout": 0}, {4: (4,), 1: (8,)}),
    "bf16 documents": (BF16 | {"lora_dropout": 0}, {4: (4,), 1: (8,)}),
    "bf16 unpacked": (BF16 | {"lora_dropout": 0, "packing": False}, {4: (4,), 1: (8,)}),
    "bf16, dropout": (BF16, {4: (3,), 1: (8,)}),
    "bf16 recomputed": (BF16 | {"activation_checkpointing": "full"}, {4: (8,), 1: (8,)}),
    "fp8": (BF16 | {"lora_dropout": 0, "frozen_weights": "fp8"}, {4: (4,), 1: (8,)}),
    "stock nf4": (NF4 | {"loss": "mixture"}, {4: (1, 2)}),
    "nf4": (NF4, {4: (1, 3, 4)}),
}
DOCUMENTS = 4  # of a row, where it has several
SMALL_CARD = 9.3 * 2**30  # what a 10 GB card leaves a process; the rows with NF4 may use no more
SPELL = 15  # seconds of steps that are timed: a GPU that has just been idle is faster


def stock(s: Settings) -> torch.nn.Module:
    """The usual recipe: PEFT's layers, each recomputed, nothing compiled, the published loss."""
    model = load_ouro(s.model_name_or_path, dtype=torch.bfloat16, nf4=s.use_qlora, device="cuda")
    model.gradient_checkpointing_enable()
    config = LoraConfig(r=s.r, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, target_modules=PROJECTIONS)
    return get_peft_model(model, config)


def measure(s: Settings, usual: bool = False, documents: int = 1, before: float = 0) -> tuple[float, float, float]:
    """Tokens/s, peak GiB and seconds of the first two steps of the bare loop: `s` on sequences of max_length, each of
    so many documents; after so many seconds of steps that are not timed."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1, SMALL_CARD / whole) if s.use_qlora else 1.0)
    model = stock(s) if usual else build(s, 0)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if s.optim == "paged_adamw_8bit":
        optimizer = bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-5)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    ids = torch.randint(3, model.config.vocab_size, (s.per_device_train_batch_size, s.max_length), device="cuda")
    batch = {"input_ids": ids, "labels": ids, "objective": s.loss, "total_ut_steps": s.total_ut_steps}
    if documents > 1:
        batch["position_ids"] = (torch.arange(s.max_length, device="cuda") % (s.max_length // documents)).expand_as(ids)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            refresh(model)

    first = seconds(lambda: steps(2))
    one = seconds(lambda: steps(1))
    count = max(4, round(SPELL / one))
    steps(round(before / one))
    torch.cuda.synchronize()
    speed = count * ids.numel() / seconds(lambda: steps(count))
    return speed, peak_memory(model) / 2**30, first


def times_stock(speed: float, loops: int, batch: int, known: dict[tuple[int, int], float]) -> str:
    """Beside stock at the same batch, else at its best; known: (loops, batch) -> tokens/s."""
    best = max((other for (depth, _), other in known.items() if depth == loops), default=None)
    compared = known.get((loops, batch), best)
    return f"{speed / compared:.2f}" if compared else ""


def bench_train(run: Resolved) -> None:
    s, only, depths = run.settings, run.options.only or TRAIN, run.options.loops
    wanted = [
        (name, loops, batch)
        for name, (_, batches) in TRAIN.items()
        for loops in batches
        for batch in batches[loops]
        if name in only and loops in depths
    ]
    if not wanted:
        raise UserError(f"no such row has {' or '.join(map(str, depths))} loops: the table has 4 and 1, nf4 4 alone")
    need_gpus(run)
    seq, rate, config = s.max_length, matrix_rate("cuda"), sizes(s)
    title(f"products of bf16: {rate / 1e12:.0f} TFLOP/s; sequences of {seq:,}; LoRA r {s.r}",
          "loops", "batch", "tok/s", "x stock", "FLOP use", "GiB", "estimate", "first steps")  # fmt: skip
    known: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}  # stock, NF4 or not: times_stock's
    with tempfile.TemporaryDirectory() as folder:
        save_random(s, Path(folder))
        for name, loops, batch in wanted:
            documents, usual = DOCUMENTS if "documents" in name else 1, name.startswith("stock")
            batch = run.options.batch or batch
            changes = {"packing": True} | TRAIN[name][0] | {"total_ut_steps": loops, "model_name_or_path": folder}
            row = dataclasses.replace(s, **changes, per_device_train_batch_size=batch)
            try:
                speed, peak, first = measure(row, usual, documents)
            except torch.OutOfMemoryError:
                line(name, loops, batch, "out of memory")
                continue
            if usual:
                known[row.use_qlora][loops, batch] = speed
            times = times_stock(speed, loops, batch, known[row.use_qlora])
            pairs = seq * (seq // documents + 1) / 2
            use = speed * training_flops(config, loops, s.r, seq, pairs, seq) / seq / rate
            estimate = ""
            if not usual:
                estimate = f"{training_memory(row, config, layers_to_recompute(row, config, None)) / 2**30:.1f}"
            line(name, loops, batch, f"{speed:,.0f}", times, f"{use:.1%}", f"{peak:.1f}",
                 estimate, f"{first:.1f} s")  # fmt: skip


def write_full_rows(path: Path, count: int, length: int, tokenizer) -> None:
    """Rows of exactly `length` tokens, no two alike."""
    chance = random.Random(0)
    words = [word for word in (f" {chr(c)}" for c in range(97, 123)) if len(tokenizer(word).input_ids) == 1]

    def row(number: int) -> dict:
        chat = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "a"}]
        more = length - len(tokenizer.apply_chat_template(chat))
        return {"prompt": str(number), "completion": "a" + "".join(chance.choices(words, k=more))}

    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(count)), encoding="utf-8")


def train_beside(run: Resolved, folder: Path, name: str, processes: int, gpu: int | None = None, **changes) -> list:
    """Runs train_qlora.py with these settings (on that GPU alone) and gives its metrics, line by line; its output goes
    to `folder`.

    Raises:
        UserError: it failed.
    """
    values = {"model_name_or_path": folder / "model", "output_dir": folder / name, "report_to": "none"}
    values |= {"overlap": "none", "eval_steps": 0, "save_steps": 10**6, "logging_steps": 1, "min_loss": 0} | changes
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    config = ["--config", run.config] if run.config else []
    settings = [f"--{key}={value}" for key, value in values.items()]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    one = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible[gpu] if visible else str(gpu)}
    done = subprocess.run(
        [sys.executable, *start, "train_qlora.py", *config, *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=os.environ | one,
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"train_qlora.py failed:\n{done.stdout[-3000:]}")
    (metrics,) = (folder / name).glob("*/metrics.jsonl")
    return [json.loads(text) for text in metrics.read_text(encoding="utf-8").splitlines()]


def bench_trainer(run: Resolved) -> None:
    """train_qlora.py's own tokens/s, over steps of 32 rows of one length, without dropout; beside the bare loop."""
    s, count = run.settings, run.options.count
    need_gpus(run, count)
    title(f"rows of {s.max_length:,}", "loops", "batch", "tok/s", "x bare loop", "x one GPU", "FLOP use", "GiB",
          count=count)  # fmt: skip
    for loops in run.options.loops:
        batch, steps = run.options.batch or {4: 4}.get(loops, 8), 5 + 20 // loops
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            save_random(s, folder / "model")
            tokenizer = load_tokenizer(str(folder / "model"), None)
            # more than the steps take, as some are held out: an epoch's last step may be half empty, and looks slow
            write_full_rows(folder / "rows.jsonl", 40 * steps, s.max_length, tokenizer)
            both = {"total_ut_steps": loops, "per_device_train_batch_size": batch, "lora_dropout": 0, "packing": True}
            both |= {"frozen_weights": run.options.frozen}
            path = str(folder / "model")
            bare, peak, _ = measure(dataclasses.replace(s, **both, model_name_or_path=path), before=2 * SPELL)
            gc.collect()
            torch.cuda.empty_cache()
            both |= {"dataset": "pairs", "dataset_path": folder / "rows.jsonl", "cache_dir": s.cache_dir}
            both |= {"max_length": s.max_length, "gradient_accumulation_steps": 32 // batch, "max_steps": steps}
            both |= {"logging_steps": 5}

            def trained(processes: int, gpu: int | None = None, folder=folder, both=both) -> tuple[float, str, str]:
                name = f"{processes}-{gpu}"
                lines = train_beside(run, folder, name, processes, gpu, **both)[2:]  # after five steps
                speed = len(lines) / sum(1 / row["tokens_per_second"] for row in lines)
                memory = max(row["memory_gib"] for row in lines)
                return speed, f"{lines[-1].get('model_flop_use', 0):.1%}", f"{memory:.1f}"

            line("bare loop, GPU 0", loops, batch, f"{bare:,.0f}", "", "", "", f"{peak:.1f}")
            with ThreadPoolExecutor(count) as pool:  # each by itself, at once: cards differ by a few percent
                alone = list(pool.map(partial(trained, 1), range(count)))
            for gpu, (speed, *rest) in enumerate(alone):
                beside = "" if gpu else f"{speed / bare:.3f}"
                line(f"train_qlora.py, GPU {gpu}", loops, batch, f"{speed:,.0f}", beside, "", *rest)
            if count > 1:
                speed, *rest = trained(count)
                beside = f"{speed / statistics.mean(one for one, *_ in alone):.3f}"
                line(f"train_qlora.py, {count} GPUs", loops, batch, f"{speed:,.0f}", "", beside, *rest)


# ----------------------------------------------------------------------------------------------------------------------
# plan, generate, score


def bench_plan(run: Resolved) -> None:
    gpu, count = run.options.gpu, run.options.count
    check_share(run.settings, count)
    print(f"{count} x {gpu}, {run.config or 'the defaults'}: predicted, from counted operations")
    line("", "loops", "recomputed", "GiB", "tokens/epoch", "steps", "hours", "GPU-hours")
    for name, changes in read_yaml(EXPERIMENTS).items():
        if run.options.exp not in (None, name):
            continue
        mine = {n: x for n, x in changes.items() if not run.origins[n].startswith(("command line", "environment"))}
        s = dataclasses.replace(run.settings, **mine)
        p = predict(s, gpu, count, tokenise=True)
        said = f"  at most: {s.dataset} is not here (make fetch)" if p.at_most else ""
        line(name, s.total_ut_steps, p.recomputed, f"{p.memory / 2**30:.1f}", f"{p.tokens:,.0f}", f"{p.steps:,}",
             f"{p.hours:.1f}", f"{p.hours * count:.1f}{said}")  # fmt: skip


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


WHAT = {"train": bench_train, "trainer": bench_trainer, "plan": bench_plan, "generate": bench_generate,
        "score": bench_score}  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="what to measure, or predict")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="plan: the GPU")
    parser.add_argument("--count", type=int, default=1, help="plan, trainer: how many of them")
    parser.add_argument("--frozen", choices=("auto", "fp8"), default="auto", help="trainer: frozen_weights")
    parser.add_argument("--only", nargs="+", choices=TRAIN, help="train: these rows of the table")
    parser.add_argument("--batch", type=int, help="train, trainer: the batch of all rows; generate: instead of 64")
    parser.add_argument("--loops", type=int, nargs="+", default=(4, 1), help="train, trainer, generate: these depths")


def main() -> None:
    run = resolve(__doc__, add_options=options)
    if run.options.count < 1:
        raise UserError(f"--count must be at least 1, got {run.options.count}")
    WHAT[run.options.what](run)


if __name__ == "__main__":
    call(main)
