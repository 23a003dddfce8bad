"""Speed and memory, measured, as tables that name what they were measured on; all take --config, as configs/a100.yaml.

python tools/bench.py data [--rows 4000]        # tokenise, cache, pack, batch; beside TRL
python tools/bench.py train [--only nf4]        # steps of training, on this GPU; beside stock PEFT
python tools/bench.py trainer [--count 2]       # train_qlora.py itself, on one GPU and on several
python tools/bench.py loss --dataset_path sample/wangchan       # the loss of fp8 beside that of bf16
python tools/bench.py plan --gpu H100 --count 4                 # hours and memory of every experiment
python tools/bench.py generate [--profile generate]             # tokens/s of generation, random weights
python tools/bench.py score                     # questions/s of evaluate.py, all depths, the same
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where ouro/ is

from ouro.cluster.plan import predict
from ouro.data.batches import EpochOrder, pack
from ouro.data.cache import prepare
from ouro.data.sources import read_file
from ouro.evaluate.scoring import score
from ouro.files import ROOT, UserError, call, read_yaml
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
from ouro.train.collate import collate

import bitsandbytes.optim
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from trl.trainer.utils import DataCollatorForChatML

CHARACTERS = 2500  # of a row; of WangchanThaiInstruct 3,000, about, but the samples' models have 8,192 positions


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
        try:
            build = seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) - start
        except subprocess.CalledProcessError:
            raise UserError("data_config.py failed, see above") from None
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


def random_model(s: Settings) -> OuroForCausalLM:
    config = sizes(s)
    config.architectures, config.init_seed = ["OuroForCausalLM"], None
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if s.bf16 else torch.float32)
        model = OuroForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model.eval()


def build_random(s: Settings, folder: Path) -> None:
    """A checkpoint of random weights."""
    random_model(s).save_pretrained(folder)
    load_tokenizer(str(ROOT / "sample/ouro-tiny"), None).save_pretrained(folder)


def stock(s: Settings) -> torch.nn.Module:
    """The usual recipe: PEFT's layers, each recomputed, nothing compiled, the published loss."""
    model = load_ouro(s.model_name_or_path, dtype=torch.bfloat16, nf4=s.use_qlora, device="cuda")
    model.gradient_checkpointing_enable()
    config = LoraConfig(r=s.r, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, target_modules=PROJECTIONS)
    return get_peft_model(model, config)


LORA = {"use_qlora": False, "optim": "adamw_torch_fused"}
PLAIN, FP8 = LORA | {"lora_dropout": 0}, {"frozen_weights": "fp8"}
NF4 = {"use_qlora": True, "optim": "paged_adamw_8bit"}
KEPT, RECOMPUTED = {"activation_checkpointing": "none"}, {"activation_checkpointing": "full"}
UNPACKED = {"packing": False}  # the layers compiled for all lengths of rows; for packs, which have one size, otherwise
TRAIN = (  # row, loops, batch, settings
    ("stock bf16", 4, 8, PLAIN | {"loss": "mixture"}),
    ("stock bf16", 1, 8, PLAIN | {"loss": "mixture"}),
    ("bf16", 4, 4, PLAIN | KEPT),
    ("bf16", 1, 8, PLAIN | KEPT),
    ("bf16 documents", 4, 4, PLAIN | KEPT),
    ("bf16 documents", 1, 8, PLAIN | KEPT),
    ("bf16 unpacked", 4, 4, PLAIN | KEPT | UNPACKED),
    ("bf16 unpacked", 1, 8, PLAIN | KEPT | UNPACKED),
    ("bf16, dropout", 4, 3, LORA | KEPT),
    ("bf16, dropout", 1, 8, LORA | KEPT),
    ("bf16 recomputed", 4, 8, LORA | RECOMPUTED),
    ("bf16 recomputed", 1, 8, LORA | RECOMPUTED),
    ("fp8", 4, 4, PLAIN | KEPT | FP8),
    ("fp8", 1, 8, PLAIN | KEPT | FP8),
    ("stock nf4", 4, 1, NF4 | {"loss": "mixture"}),
    ("stock nf4", 4, 2, NF4 | {"loss": "mixture"}),
    ("nf4", 4, 1, NF4 | RECOMPUTED),
    ("nf4", 4, 3, NF4 | RECOMPUTED),
    ("nf4", 4, 4, NF4 | RECOMPUTED),
)
DOCUMENTS = 4  # of a row, where it has several
SMALL_CARD = 9.3 * 2**30  # what a 10 GB card leaves a process; the rows with NF4 may use no more
SPELL = 15  # seconds of steps that are timed: a GPU that has just been idle is faster


def measure(
    s: Settings, usual: bool = False, profiled: bool = False, documents: int = 1, before: float = 0
) -> tuple[float, float, float]:
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
    names = {"adamw_torch_fused": torch.optim.AdamW, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    fused = {"fused": True} if s.optim == "adamw_torch_fused" else {}
    optimizer = names[s.optim]([p for p in model.parameters() if p.requires_grad], lr=1e-5, **fused)
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
        torch.cuda.synchronize()

    first = seconds(lambda: steps(2))
    one = seconds(lambda: steps(1))
    count = max(4, round(SPELL / one))
    steps(round(before / one))
    speed = count * ids.numel() / seconds(lambda: steps(count))
    if profiled:
        profile(lambda: steps(1))
    return speed, peak_memory(model) / 2**30, first


def times_stock(speed: float, loops: int, batch: int, known: dict[tuple[int, int], float]) -> str:
    """Beside stock at the same batch, else at its best; known: (loops, batch) -> tokens/s."""
    best = max((other for (depth, _), other in known.items() if depth == loops), default=None)
    compared = known.get((loops, batch), best)
    return f"{speed / compared:.2f}" if compared else ""


def need_gpus(run: Resolved, count: int = 1) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"bench.py {run.options.what} measures a GPU, and there is none here")
    if count > torch.cuda.device_count():
        raise UserError(f"--count {count}: this machine has {torch.cuda.device_count()} GPUs")


def bench_train(run: Resolved) -> None:
    s, only, depths = run.settings, run.options.only, run.options.loops
    wanted = [row for row in TRAIN if row[1] in depths and (not only or row[0] in only)]
    if not wanted:
        raise UserError(f"no such row has {' or '.join(map(str, depths))} loops: the table has 4 and 1, nf4 4 alone")
    need_gpus(run)
    seq, rate, config = s.max_length, matrix_rate("cuda"), sizes(s)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, products of bf16: {rate / 1e12:.0f} TFLOP/s")
    print(f"random weights of Ouro-2.6B's sizes; sequences of {seq:,}; LoRA r {s.r}")
    print(
        f"  {'':<18}{'loops':>5}{'batch':>6}{'tok/s':>9}{'x stock':>9}{'FLOP use':>10}{'GiB':>7}{'estimate':>10}"
        f"{'first steps':>13}"
    )
    usual: dict[bool, dict[tuple[int, int], float]] = {True: {}, False: {}}  # NF4 or not -> (loops, batch) -> tokens/s
    with tempfile.TemporaryDirectory() as folder:
        build_random(s, Path(folder))
        for name, loops, batch, changes in wanted:
            documents = DOCUMENTS if "documents" in name else 1
            is_usual, batch = name.startswith("stock"), run.options.batch or batch
            changes = {"packing": True} | changes | {"total_ut_steps": loops, "per_device_train_batch_size": batch}
            row = dataclasses.replace(s, **changes | {"model_name_or_path": folder})
            try:
                speed, peak, first = measure(row, is_usual, name in run.options.profile, documents)
            except torch.OutOfMemoryError:
                print(f"  {name:<18}{loops:>5}{batch:>6}  out of memory", flush=True)
                continue
            known = usual[row.use_qlora]
            if is_usual:
                known[loops, batch] = speed
            times = times_stock(speed, loops, batch, known)
            length = seq // documents
            use = speed * training_flops(config, loops, s.r, seq, seq * (length + 1) / 2, seq) / seq / rate
            recomputed = layers_to_recompute(row, config, None)
            estimate = "" if is_usual else f"{training_memory(row, config, recomputed) / 2**30:.1f}"
            print(
                f"  {name:<18}{loops:>5}{batch:>6}{speed:>9,.0f}{times:>9}{use:>10.1%}{peak:>7.1f}{estimate:>10}"
                f"{first:>11.1f} s",
                flush=True,
            )


def write_full_rows(path: Path, count: int, length: int, tokenizer) -> None:
    """Rows of exactly `length` tokens, no two alike."""
    chance = random.Random(0)
    words = [word for word in (f" {chr(c)}" for c in range(97, 123)) if len(tokenizer(word).input_ids) == 1]

    def row(number: int) -> dict:
        chat = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": "a"}]
        more = length - len(tokenizer.apply_chat_template(chat))
        return {"prompt": str(number), "completion": "a" + "".join(chance.choices(words, k=more))}

    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps(row(number)) + "\n")


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
    command = [
        sys.executable,
        *start,
        "train_qlora.py",
        *config,
        *(f"--{key}={value}" for key, value in values.items()),
    ]
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    one = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": visible[gpu] if visible else str(gpu)}
    environment = os.environ | one
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment).returncode
    if failed:
        raise UserError(f"train_qlora.py failed:\n{(folder / f'{name}.log').read_text(encoding='utf-8')[-3000:]}")
    (metrics,) = (folder / name).glob("*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def bench_trainer(run: Resolved) -> None:
    """train_qlora.py's own tokens/s, over steps of 32 rows of one length, without dropout; beside the bare loop."""
    s = run.settings
    need_gpus(run, run.options.count)
    print(f"{run.options.count} x {torch.cuda.get_device_name()}, torch {torch.__version__}; rows of {s.max_length:,}")
    print(
        f"  {'':<26}{'loops':>5}{'batch':>6}{'tok/s':>9}{'x bare loop':>13}{'x one GPU':>11}{'FLOP use':>10}{'GiB':>7}"
    )
    for loops in run.options.loops:
        batch, steps = run.options.batch or {4: 4}.get(loops, 8), 5 + 20 // loops
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            build_random(s, folder / "model")
            tokenizer = load_tokenizer(str(folder / "model"), None)
            # more than the steps take, as some are held out: an epoch's last step may be half empty, and looks slow
            write_full_rows(folder / "rows.jsonl", 40 * steps, s.max_length, tokenizer)
            common = {"total_ut_steps": loops, "per_device_train_batch_size": batch, "lora_dropout": 0, "packing": True}
            common |= {"frozen_weights": run.options.frozen}
            path = str(folder / "model")
            bare, peak, _ = measure(dataclasses.replace(s, **common, model_name_or_path=path), before=2 * SPELL)
            gc.collect()
            torch.cuda.empty_cache()
            data = {"dataset": "pairs", "dataset_path": folder / "rows.jsonl", "cache_dir": s.cache_dir}
            data |= {"max_length": s.max_length, "gradient_accumulation_steps": 32 // batch, "max_steps": steps}
            data |= {"logging_steps": 5}

            def row(name: str, speed: float, beside: str, use: str, peak: float, loops=loops, batch=batch) -> None:
                print(f"  {name:<26}{loops:>5}{batch:>6}{speed:>9,.0f}{beside:>24}{use:>10}{peak:>7.1f}", flush=True)

            def trained(count: int, gpu: int | None = None, folder=folder, both=common | data) -> tuple[float, ...]:
                lines = train_beside(run, folder, f"{count}-{gpu}", count, gpu, **both)[2:]  # after five steps
                speed = len(lines) / sum(1 / line["tokens_per_second"] for line in lines)
                return speed, lines[-1].get("model_flop_use", 0), max(line["memory_gib"] for line in lines)

            row("bare loop, GPU 0", bare, "", "", peak)
            count = run.options.count
            with ThreadPoolExecutor(count) as pool:  # each by itself, at once: cards differ by a few percent
                alone = list(pool.map(partial(trained, 1), range(count)))
            for gpu, (speed, use, peak) in enumerate(alone):
                beside = "" if gpu else f"{speed / bare:.3f}{'':>11}"
                row(f"train_qlora.py, GPU {gpu}", speed, beside, f"{use:.1%}", peak)
            if count > 1:
                speed, use, peak = trained(count)
                one = statistics.mean(speed for speed, _, _ in alone)
                row(f"train_qlora.py, {count} GPUs", speed, f"{speed / one:.3f}", f"{use:.1%}", peak)


def bench_loss(run: Resolved) -> None:
    """The loss of a run with frozen weights in fp8 beside that of the same run in bf16, on the settings' data."""
    need_gpus(run)
    s, steps = run.settings, run.options.steps
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if Path(s.model_name_or_path).is_dir():
            (folder / "model").symlink_to(Path(s.model_name_or_path).resolve())
        else:
            build_random(s, folder / "model")
        same = {name: getattr(s, name) for name in ("dataset", "total_ut_steps", "per_device_train_batch_size")}
        same |= {"dataset_path": s.dataset_path, "gradient_accumulation_steps": 1, "max_steps": steps}
        same |= {"max_length": s.max_length, "learning_rate": s.learning_rate, "packing": s.packing, "bf16": True}

        def curve(kind: str, gpu: int) -> list[float]:
            frozen = {"use_qlora": False, "frozen_weights": kind if kind == "fp8" else "auto"}
            lines = train_beside(run, folder, kind, 1, gpu, **same, **frozen, optim="adamw_torch_fused")
            return [line["loss"] for line in lines]

        kinds, gpus = ("bf16", "fp8"), torch.cuda.device_count()
        with ThreadPoolExecutor(min(2, gpus)) as pool:  # at once where there are two GPUs
            curves = dict(zip(kinds, pool.map(curve, kinds, (0, min(1, gpus - 1))), strict=True))
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {s.model_name_or_path}, {s.total_ut_steps} loops"
    )
    print(f"{steps} steps of {s.per_device_train_batch_size} rows of {s.dataset_path or s.dataset}")
    print(f"  {'steps':>9}{'bf16':>9}{'fp8':>9}{'difference':>12}{'largest of a step':>19}")
    each = -(-steps // 10)
    apart = [other / loss - 1 for loss, other in zip(curves["bf16"], curves["fp8"], strict=True)]
    for at in range(0, steps, each):
        part = slice(at, min(at + each, steps))
        one, other = (sum(curves[kind][part]) / len(curves[kind][part]) for kind in ("bf16", "fp8"))
        worst = max(apart[part], key=abs)
        print(f"  {f'{at + 1}-{part.stop}':>9}{one:>9.4f}{other:>9.4f}{other / one - 1:>+12.2%}{worst:>+19.2%}")
    print(f"  all: mean difference {sum(apart) / steps:+.3%}, largest of a step {max(apart, key=abs):+.2%}")
    if run.options.plot:
        plot_losses(curves, run.options.plot)


def plot_losses(curves: dict[str, list[float]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, len(curves["bf16"]) + 1)
    for kind, style in (("bf16", {"linewidth": 2.5, "alpha": 0.5}), ("fp8", {"linewidth": 1})):
        upper.plot(steps, curves[kind], label=f"frozen weights in {kind}", **style)
    apart = [100 * (other / loss - 1) for loss, other in zip(curves["bf16"], curves["fp8"], strict=True)]
    lower.plot(steps, apart, color="C1", linewidth=1)
    lower.axhspan(-0.5, 0.5, color="grey", alpha=0.2)
    upper.set(ylabel="loss (nats a token)")
    upper.legend(frameon=False)
    lower.set(xlabel="step", ylabel="fp8 − bf16, %")
    figure.savefig(path, dpi=120)


def bench_plan(run: Resolved) -> None:
    gpu, count = run.options.gpu, run.options.count
    check_share(run.settings, count)
    print(f"{count} x {gpu}, {run.config or 'the defaults'}: predicted, from counted operations")
    print(
        f"  {'':<22}{'loops':>5}{'recomputed':>12}{'GiB':>7}{'tokens/epoch':>15}{'steps':>8}{'hours':>8}"
        f"{'GPU-hours':>11}"
    )
    for name, changes in read_yaml(EXPERIMENTS).items():
        if run.options.exp not in (None, name):
            continue
        mine = {n: x for n, x in changes.items() if not run.origins[n].startswith(("command line", "environment"))}
        s = dataclasses.replace(run.settings, **mine)
        p = predict(s, gpu, count, tokenise=True)
        said = f"  at most: {s.dataset} is not here (make fetch)" if p.at_most else ""
        print(
            f"  {name:<22}{s.total_ut_steps:>5}{p.recomputed:>12}{p.memory / 2**30:>7.1f}{p.tokens:>15,.0f}"
            f"{p.steps:>8,}{p.hours:>8.1f}{p.hours * count:>11.1f}{said}"
        )


PROMPT, NEW = 128, 256  # tokens of `bench.py generate`


def copy_rate(device: str) -> float:
    """Bytes/s read and written by a copy: the rate that a product of few rows is bounded by."""
    a = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    synchronise()
    return 2 * 5 * a.numel() / seconds(lambda: ([b.copy_(a) for _ in range(5)], synchronise()))


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def bench_generate(run: Resolved) -> None:
    s, device = run.settings, "cuda" if torch.cuda.is_available() else "cpu"
    model, rate, prompt, new = random_model(s), copy_rate(device), PROMPT, NEW
    config, size = model.config, 2 if s.bf16 else 4
    layer = size * layer_weights(config) * config.num_hidden_layers
    head = size * config.hidden_size * config.vocab_size
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    print(f"{name}, torch {torch.__version__}; a copy moves {rate / 1e12:.2f} TB/s")
    print(f"random weights, {config.num_hidden_layers} layers, hidden {config.hidden_size}; {prompt} + {new} tokens")
    print(f"  {'':<12}{'loops':>5}{'batch':>6}{'tok/s':>9}{'ms a step':>11}{'of the byte limit':>19}", end="")
    print(f"{'whole call':>12}{'first call':>12}{'cache GiB':>11}", flush=True)

    def row(name: str, loops: int, batch: int, step: float, *others: str) -> None:
        read = loops * layer + head  # and the cache, at its mean length
        read += 0 if name == "stock" else batch * decoder.row_bytes(loops, prompt + new // 2)
        share = "" if name == "stock" else f"{read / rate / step:.0%}"
        print(f"  {name:<12}{loops:>5}{batch:>6}{batch / step:>9,.1f}{step * 1e3:>11.2f}{share:>19}", end="")
        print("".join(f"{text:>{width}}" for text, width in zip(others, (12, 12, 11), strict=False)), flush=True)

    model.decoder = decoder = Decoder(model)
    generation.KEPT = math.inf
    for loops in run.options.loops:
        for batch in (1, run.options.batch or 64):
            prompts = torch.randint(3, config.vocab_size, (batch, prompt)).tolist()

            def call(count: int, prompts=prompts, loops=loops, batch=batch) -> None:
                generate(model, prompts, depth=loops, max_new_tokens=count, stop=[], batch_size=batch)
                synchronise()

            try:
                first = seconds(lambda call=call: call(new))
                whole = seconds(lambda call=call: call(new))

                def steps() -> None:
                    for _ in range(new - 1):
                        decoder.run()
                    synchronise()

                decoder.position.fill_(prompt)
                decoder.active.fill_(1)
                spent = seconds(steps) / (new - 1)
                cache = f"{decoder.slots.numel() * decoder.slots.itemsize / 2**30:.1f}"
                row("generate", loops, batch, spent, f"{batch * new / whole:,.0f}", f"{first:.1f} s", cache)
                if "generate" in run.options.profile and device == "cuda":
                    decoder.position.fill_(prompt + new // 2)
                    profile(decoder.run)
            except RuntimeError as error:  # one row's failure, out of memory too, must not cost the others
                print(f"  generate    {loops:>5}{batch:>6}  {type(error).__name__}: {error}"[:2000], flush=True)
            decoder.release()
        ids = torch.randint(3, config.vocab_size, (1, prompt + new // 2), device=device)

        def stock(count: int, ids=ids, loops=loops) -> None:
            options = {"use_cache": False, "do_sample": False, "pad_token_id": 0, "max_new_tokens": count}
            options |= {"attention_mask": torch.ones_like(ids), "min_new_tokens": count, "total_ut_steps": loops}
            model.generate(ids, **options)
            synchronise()

        stock(1)
        row("stock", loops, 1, seconds(lambda stock=stock: stock(4)) / 4)


@torch.no_grad()
def bench_score(run: Resolved) -> None:
    s, depths = run.settings, [1, 2, 3, 4]
    model, budget, count = random_model(s), s.eval_batch_tokens, 512
    config, cuda, loops = model.config, torch.cuda.is_available(), max(depths)
    rate = matrix_rate("cuda") if cuda else None
    name = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} CPU cores"
    print(f"{name}, torch {torch.__version__}" + (f"; products of bf16: {rate / 1e12:.0f} TFLOP/s" if cuda else ""))
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

    layer = 2 * layer_weights(config)
    print(f"questions of {count} tokens, 5 options, depths {depths} from one pass, {budget:,} tokens a batch")
    for kind, make in (("letters after one prompt", letters), ("texts after five rotations", texts)):

        def scored(number: int, make=make) -> tuple[float, int]:
            asked = [sequence for _ in range(number) for sequence in make()]
            read = []
            return seconds(lambda: (read.append(score(model, asked, depths, budget).tokens), synchronise())), read[0]

        number = max(1, 4 * budget // (count if make is letters else 4 * count))
        first, _ = scored(number)
        spent, tokens = scored(2 * number)
        flops = loops * config.num_hidden_layers * layer * tokens
        share = f", {flops / spent / rate:.0%} of that" if cuda else ""
        print(f"  {kind:<28}{2 * number / spent:>8.1f} questions/s{tokens / spent:>10,.0f} tokens/s{share}; "
              f"first {number} in {first:.1f} s", flush=True)  # fmt: skip
    if "score" in run.options.profile and cuda:
        profile(lambda: scored(number // 4))


def profile(step: Callable[[], None]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total, e.count, e.key) for e in recorded.key_averages()), reverse=True)
    total = sum(spent for spent, _, _ in rows)
    print(f"    {total / 1e3:.1f} ms of kernels")
    for spent, count, name in rows[:30]:
        print(f"    {spent / total:6.1%}{spent / 1e3:>9.2f} ms{count:>7}  {name[:100]}")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=sorted(WHAT), help="what to measure, or predict")
    parser.add_argument("--gpu", choices=GPUS, default="H100", help="plan: the GPU")
    parser.add_argument("--count", type=int, default=1, help="plan, trainer: how many of them")
    parser.add_argument("--frozen", choices=("auto", "fp8"), default="auto", help="trainer: frozen_weights")
    parser.add_argument("--steps", type=int, default=200, help="loss: steps of each run")
    parser.add_argument("--plot", help="loss: a file for the curves")
    rows = sorted({row[0] for row in TRAIN})
    parser.add_argument("--only", nargs="+", choices=rows, help="train: these rows of the table")
    parser.add_argument("--batch", type=int, help="train: another batch size for all of them; generate: instead of 64")
    parser.add_argument(
        "--loops", type=int, nargs="+", default=(4, 1), help="train, generate: rows at these loop counts"
    )
    parser.add_argument(
        "--profile",
        nargs="+",
        choices=[*rows, "generate", "score"],
        default=(),
        help="also the kernels of a step of these rows",
    )
    parser.add_argument("--rows", type=int, default=4000, help="rows of the data measured (default: 4000)")


WHAT = {
    "data": bench_data,
    "train": bench_train,
    "trainer": bench_trainer,
    "loss": bench_loss,
    "plan": bench_plan,
    "generate": bench_generate,
    "score": bench_score,
}


def main() -> None:
    run = resolve(__doc__, add_options=options)
    if min(run.options.count, run.options.steps, run.options.rows) < 1:
        raise UserError("--count, --steps and --rows are at least 1")
    WHAT[run.options.what](run)


if __name__ == "__main__":
    call(main)
