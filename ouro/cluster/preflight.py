"""What a job needs, checked before it is queued for hours: one line a check, and what to do where one fails.

    python -m ouro.cluster.preflight --config configs/a100.yaml --exp exp1-wangchan-ut4     # each job begins so
    python -m ouro.cluster.preflight --config configs/default.yaml --gpu     # and one real step, and one exam item

Any setting can follow, as for train_qlora.py. Exit code 0, or 2 when a check failed. Downloads nothing but the model's
tokenizer: `make fetch` does. torch and its relatives are imported by the checks that need them, after `versions` and
`imports`, which say what is wrong with a broken environment; an import up here would end in a traceback.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ouro.files import ROOT, UserError, call, latest, message, one_line
from ouro.settings import Resolved, Settings, resolve

ROWS = 200  # of a training set that are looked at
DISK = 3e9  # free bytes that checkpoints (0.4 GB each with r = 16) and the cache of rows need
MEMORY = 2e9  # bytes that a process needs beside the weights


def check_versions(run: Resolved) -> str:
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    wrong = []
    for name, wanted in pins:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            wrong.append(f"{name} {found}, locked {wanted}")
    if wrong:
        raise UserError(f"{'; '.join(wrong[:4])} ({len(wrong)} of {len(pins)} packages): make env, or build the image")
    return f"Python {platform.python_version()}, {len(pins)} packages as in requirements.txt"


def check_imports(run: Resolved) -> str:
    try:
        import bitsandbytes  # noqa: F401
        from peft import LoraConfig  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401
        from trl import SFTConfig, SFTTrainer  # noqa: F401
    except (ImportError, RuntimeError) as error:  # transformers' lazy modules raise RuntimeError
        what = " ".join(str(error).split())
        raise UserError(f"{what}; does PYTHONPATH or ~/.local shadow a package? else: make env") from None
    return "torch, transformers, trl, peft, bitsandbytes"


def check_gpu(run: Resolved) -> str:
    from ouro.train.machine import check_device

    import torch

    if os.environ.get("SLURM_SAYS") and not torch.cuda.is_available():  # the Makefile sets it where sbatch is
        return "none on this login node: each job looks at its own"
    device = check_device(run.settings)
    if device == "cpu":
        return f"none; {run.config} computes on the CPU"
    count, wanted = torch.cuda.device_count(), int(os.environ.get("SLURM_GPUS_ON_NODE", 1))
    if count < wanted:
        raise UserError(f"{count} of the job's {wanted} GPUs seen on {platform.node()}: is one broken (nvidia-smi)?")
    major, minor = torch.cuda.get_device_capability()
    built = [int(arch.removeprefix("sm_")) // 10 for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()]
    if major not in built:
        name = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        raise UserError(f"{name} is not one that torch {torch.__version__} was built for: use another partition")
    for index in range(count):
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(2, 2, device=index).mm(torch.ones(2, 2, device=index)).sum().item()
        except RuntimeError as error:
            raise UserError(f"GPU {index}: {str(error).splitlines()[0]}") from None
        if free < 0.8 * total:  # a desktop's windows take a tenth of a small GPU's
            raise UserError(f"GPU {index}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB are free: what else uses it?")
    return f"{count} x {torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def check_memory(run: Resolved) -> str:
    from ouro.train.machine import PINNED, free_memory

    free, processes = free_memory(), int(os.environ.get("SLURM_GPUS_ON_NODE", 1))
    waiting, said, remedy = waiting_states(run.settings, free / processes - MEMORY)
    least = processes * (MEMORY + waiting / PINNED)
    needed = f"{least / 1e9:.0f} GB"
    if free < least:
        has = f"{free / 1e9:.1f} GB for {processes} process{'es' * (processes > 1)}"
        more = "raise MEM" if "SLURM_MEM_PER_NODE" in os.environ else "end what else uses it"
        raise UserError(f"{has}, {needed} are needed{said}: {more}{remedy}")
    return f"{free / 1e9:.0f} GB free, {needed} needed{said}"


def waiting_states(s: Settings, free: float) -> tuple[float, str, str]:
    """Of the CPU's memory the bytes in which states of layers wait while the longest row is trained on this GPU; words
    on that, and what fits into as many bytes as are `free`.
    Raises UserError: that row fits into no memory."""
    from ouro.cluster.plan import epoch_of, memory_for
    from ouro.model.cost import fitting, passes_for
    from ouro.train.build import is_compiled
    from ouro.train.machine import PINNED

    import numpy as np
    import torch

    if not torch.cuda.is_available():
        return 0.0, "", ""
    lengths, known = np.array([s.max_length]), "at most "
    with suppress(UserError):  # which check_data tells
        lengths, _, known = epoch_of(s, "cached")
    memory = memory_for(s, lengths, torch.cuda.mem_get_info()[0], math.inf, is_compiled(s, torch.cuda.current_device()))
    here = replace(memory, host=PINNED * max(free, 0))
    if not (plan := memory.plan(memory.largest)):
        passes_for(here)  # which refuses it
    if not plan or not plan.waiting:
        return 0.0, "", ""
    waiting = plan.waiting * memory.slot
    rows = f"rows of {memory.largest:,} tokens at {s.total_ut_steps} loops"
    told = f"twice the {waiting / 1e9:.0f} GB in which states of layers wait, for {rows}"
    if known == "at most ":  # the rows are not tokenised yet, and may all be short
        return 0.0, f"; were there {rows}: {told}", ""
    return waiting, f" ({told})", f", or set max_length to {fitting(here)}"


def check_disk(run: Resolved) -> str:
    s, room = run.settings, {}  # free bytes -> folders on that disk
    for name in ("output_dir", "results_dir", "cache_dir"):
        folder = Path(getattr(s, name)).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"0")
        except OSError as error:
            raise UserError(f"{name} = {folder}: {error.strerror} in {there}: choose another --{name}") from None
        free = shutil.disk_usage(there).free
        if free < DISK:
            raise UserError(f"{name} = {folder}: {free / 1e9:.1f} GB free, {DISK / 1e9:.0f} GB are needed")
        room.setdefault(f"{free / 1e9:.0f} GB free", []).append(getattr(s, name))
    needed = f"{DISK / 1e9:.0f} GB needed beside model and data"
    return "; ".join(f"{', '.join(folders)}: {free}, {needed}" for free, folders in room.items())


def on_hub(name: str, settings: Settings) -> Path | None:
    """The cached snapshot of what the settings name so; None where it is not in the cache, but can be had.
    Raises UserError: neither cached nor to be had."""
    from ouro.data.fetch import wanted

    from huggingface_hub import HfApi, constants, snapshot_download

    found = next(download for download in wanted(settings) if download.name == name)
    place = {"revision": found.revision, "repo_type": found.repo_type}
    try:
        return Path(snapshot_download(found.hub_id, allow_patterns=found.patterns, local_files_only=True, **place))
    except (OSError, ValueError):
        reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().repo_info(found.hub_id, timeout=20, **place)
            return None
        except (OSError, ValueError) as error:
            proxies = {os.environ[name] for name in ("https_proxy", "HTTPS_PROXY") if os.environ.get(name)}
            through = [f" through the proxy {message(proxy)}" for proxy in sorted(proxies)]
            reason = f"it cannot be reached{','.join(through)} ({type(error.__cause__ or error).__name__})"
    raise UserError(
        f"{found.hub_id} is not in {constants.HF_HUB_CACHE}, and {reason}: make fetch where there is a network, as on "
        "the login node, with the same HF_HOME, and HF_HUB_OFFLINE=1 in the jobs (slurm/site.env)"
    )


def check_model(run: Resolved) -> str:
    from ouro.model.loading import check_folder, load_tokenizer

    s = run.settings
    check_folder(s.model_name_or_path)
    folder = Path(s.model_name_or_path)
    if not folder.exists():
        folder = on_hub("model", s)
    load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    if folder is None:
        return f"{s.model_name_or_path}: to be downloaded (make fetch), tokenizer and chat template found"
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).exists())
    # sample/ouro-tiny is made from its init_seed and has no weights.
    if missing and "init_seed" not in json.loads((folder / "config.json").read_bytes()):
        raise UserError(f"{folder} lacks {', '.join(missing)}: make fetch downloads it")
    weights = sum((folder / name).stat().st_size for name in names if name not in missing)
    return f"{s.model_name_or_path}, {weights / 1e9:.1f} GB of weights, chat template found"


def check_data(run: Resolved) -> str:
    from ouro.data.chats import to_chat
    from ouro.data.report import FLOORS
    from ouro.data.sources import entry_of, find_source, place_of

    s = run.settings
    entry = entry_of(s.dataset)
    if "hub_id" in entry and place_of(s, entry) is None and on_hub(s.dataset, s) is None:
        return f"{entry['hub_id']}: to be downloaded; its columns cannot be looked at before (make fetch)"
    source = find_source(s)
    rows = islice(source.rows("train"), ROWS)
    looked = [(where, *to_chat(row, source.entry, s, where)) for where, row in rows]
    refused = tuple(prefix for prefix, *_ in FLOORS)  # rows that are left out for other reasons refuse no training
    bad = [f"{where}: {reason}" for where, chat, reason in looked if chat is None and reason.startswith(refused)]
    if not looked:
        raise UserError(f"{source.place} has no rows: set dataset_path to a file that has some")
    if len(bad) > max(s.max_empty_share, s.max_garbled_share, s.max_unbalanced_share) * len(looked):
        many = f"{len(bad)} of the first {len(looked)} rows"
        raise UserError(f"{many} cannot be trained on, the first: {bad[0]}; are its columns in datasets.yaml right?")
    return f"{s.dataset} from {source.place}, columns {', '.join(source.columns)}, {len(looked)} rows read"


def check_benchmarks(run: Resolved) -> str:
    from ouro.data.sources import benchmark_items, overlap_names, overlap_place
    from ouro.evaluate.benchmarks import load, named, table

    s, specs, said = run.settings, table(), {}
    absent = functools.cache(lambda name: on_hub(name, s) is None)  # several tasks may share a benchmark
    for name in overlap_names(s):
        place = overlap_place(name)
        if not {name, place} & s.paths.keys() and absent(place):
            said[name] = "to be downloaded"
        else:
            said[name] = f"{len(benchmark_items(replace(s, overlap=name)))} items"
    for task in named(s.tasks, specs["tasks"], "task"):
        spec = specs["tasks"][task]
        name = specs["benchmarks"][spec["benchmark"]].get("dataset", spec["benchmark"])
        try:
            if not {task, name} & s.paths.keys() and absent(name):
                said[task] = "to be downloaded"
            elif spec["protocol"] != "mt_bench":  # whose questions judge.py reads
                said[task] = f"{len(load(task, s))} items"
        except UserError:
            if not spec.get("optional") or run.origins["tasks"] != "default":
                raise
            said[task] = "left out, as it is not to be had"  # by evaluate.py, too
    return ", ".join(f"{name} {count}" for name, count in said.items())


def check_logger(run: Resolved) -> str:
    from ouro.train.loggers import check_logger

    check_logger(run.settings)
    return "metrics.jsonl" + (f" and {run.settings.report_to}" if run.settings.report_to != "none" else "")


def check_slurm(run: Resolved) -> str:
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"job {job} on {platform.node()}"
    says = os.environ.get("SLURM_SAYS")
    if not says:
        return "none here, or none that answers"
    if "to start at" not in says:
        reason = " ".join(says.partition("PartitionName")[0].split())
        raise UserError(f"a training job would be refused: {reason}; correct slurm/site.env")
    from ouro.cluster.plan import limits, predict
    from ouro.train.time_limit import seconds

    wanted, nodes, gpus, gpu = (os.environ[name] for name in ("TIME", "NODES", "GPUS", "GPU_TYPE"))
    limit, grace = limits()
    most = re.search(r"MaxTime=(\S+)", says)
    if most and seconds(most[1]) < limit:
        raise UserError(f"TIME = {wanted} is more than the partition's {most[1]}: such a job waits for ever; set TIME")
    if limit <= grace:
        raise UserError(f"TIME = {wanted} leaves nothing after the GRACE = {grace} s for saving: raise TIME")
    p = predict(run.settings, gpu, int(nodes) * int(gpus))
    step = p.hours * 3600 / max(p.steps, 1)
    if step > grace:
        raise UserError(f"a step is predicted to take {p.said}{step:.0f} s, more than GRACE = {grace} s: raise GRACE")
    return f"{os.environ['PARTITION']} takes {wanted} on {nodes} x {gpus} {gpu}; predicted hours: {p.told()}"


def check_step(run: Resolved) -> str:
    argv = [word for word in sys.argv[1:] if word != "--gpu"]
    with tempfile.TemporaryDirectory() as folder:
        argv += ["--output_dir", folder, "--results_dir", folder, "--report_to", "none"]
        few = {"train_qlora.py": ["--max_steps", "1"], "evaluate.py": ["--limit", "1", "--tasks", "thai_exam"]}
        for script, more in few.items():
            command = [sys.executable, script, *latest([*argv, *more])]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "rror" in line]
                raise UserError(f"{script}: {[f'exit code {done.returncode}', *lines][-1]}")
        log = json.loads((Path(folder) / run.run / "metrics.jsonl").read_bytes().splitlines()[0])
    return f"loss {log['loss']:.4f}, {log['tokens_per_second']:,.0f} tokens/s, {log['memory_gib']} GiB; one item scored"


CHECKS = (
    check_versions, check_imports, check_gpu, check_memory, check_disk, check_model, check_data,
    check_benchmarks, check_logger, check_slurm,
)  # fmt: skip


def say(mark: str, name: str, *lines: str) -> None:
    print(one_line(f"{mark:<5} {name:<11} {message('; '.join(lines))}"), flush=True)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", action="store_true", help="also train one step and score one item")


def main() -> None:
    try:
        run = resolve(__doc__, add_options=options, several=True)
    except UserError as error:
        say("FAIL", "settings", *error.args)
        raise UserError(f"preflight: settings: {error.args[0]}") from None
    image = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER") or "none"
    say("ok", "settings", f"{run.config or 'defaults'}, {run.run}; code in {ROOT}, image: {image}")
    failed = []
    checks = (*CHECKS, check_step) if run.options.gpu else CHECKS
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            say("ok", name, check(run))
        except UserError as error:
            say("FAIL", name, *error.args)
            failed.append(f"{name}: {error.args[0]}")
            if name in ("versions", "imports"):
                break  # what comes after would fail of the same
    if failed:
        raise UserError(f"preflight: {len(failed)} of {len(checks)} checks failed, the first: {failed[0]}")


if __name__ == "__main__":
    call(main)
