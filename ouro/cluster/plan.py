"""What a run will take on a kind of GPU: layers recomputed, memory, steps, hours, and how often it is requeued.

p = predict(settings, "H100", 4)       # from counted operations, as sweep.py and hours.py print them
p.told(done=120)                       # "at most 11.2, 1 requeue": of the steps after the 120th
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace

from ouro.data.batches import Passes
from ouro.data.cache import prepare
from ouro.data.formats import count_rows
from ouro.data.sources import cache_only, find_source
from ouro.files import UserError, nearest, read_yaml
from ouro.model.cost import GPUS, HOPPER, REACHED, Memory, passes_for, training_flops
from ouro.model.loading import load_tokenizer, sizes
from ouro.settings import DATASETS, Settings
from ouro.train.time_limit import seconds

import numpy as np

HOST = 16 * 2**30  # bytes of the CPU's memory that a run may pin: half of 32 GB


@dataclass
class Prediction:
    """Of a whole run."""

    recomputed: float  # the share of layer calls that are computed twice
    memory: float  # bytes on each GPU, at the peak
    tokens: float  # of an epoch
    steps: int
    hours: float
    said: str  # before the hours: "", or what they rest on where the rows are not tokenised here, see `epoch_of`

    def left(self, done: int = 0) -> float:
        """The hours of the steps after `done`."""
        return self.hours * (1 - done / max(self.steps, 1))

    def told(self, done: int = 0) -> str:
        """`left`, and in how many further pieces the time limit cuts it."""
        hours = self.left(done)
        limit, grace = limits()
        requeues = max(0, math.ceil(hours * 3600 / max(limit - grace, 1)) - 1)
        said = f", {requeues} requeue{'s' * (requeues > 1)}" if requeues else ""
        return f"{self.said}{hours:.1f}{said}"


def predict(s: Settings, gpu: str, count: int, rows: str = "cached") -> Prediction:
    """What a run takes on `count` GPUs of a kind in GPUS, from counted operations and the share of its peak REACHED.

    rows: "cached": those of the cache, where it has them, and nothing is downloaded or tokenised; "typical", "longest":
    of the lengths that are told without the cache.
    Raises UserError: an unknown GPU, one that is too small or has no fp8, or data of which not even the rows are known.
    """
    if gpu not in GPUS:
        raise UserError(f"no figures of a GPU {gpu!r}{nearest(gpu, GPUS)} (GPU_TYPE in slurm/site.env)")
    if s.frozen_weights == "fp8" and gpu not in HOPPER:
        raise UserError(f"frozen_weights: fp8 needs a Hopper GPU ({' or '.join(HOPPER)}), not {gpu}; set it to auto")
    peak, memory = GPUS[gpu]
    lengths, share, said = epoch_of(s, rows)
    plans, width = memory_for(s, lengths, (0.99 * memory - 0.6) * 2**30, HOST), Passes(1).width
    config = plans.config
    try:
        if s.activation_checkpointing.isdecimal() or not plans.plan(plans.largest):
            passes_for(plans)  # which refuses what does not fit; slow, and "auto" has a plan only for what fits
    except UserError as error:
        raise UserError(f"{gpu}, {memory} GiB: {error}") from None
    tokens, heads = float(lengths.sum()), s.total_ut_steps if s.loss == "all" else 1
    per_epoch = max(1, -(-len(lengths) // s.rows_per_step))
    steps = s.max_steps if s.max_steps >= 0 else math.ceil(s.num_train_epochs * per_epoch)
    widths, counts = np.unique([width(int(n)) for n in lengths], return_counts=True)
    flops = recomputed = 0.0
    for n, rows in zip(widths.tolist(), counts.tolist(), strict=True):
        again = plans.plan_run(n).recomputed / plans.calls
        done = training_flops(config, s.total_ut_steps, s.r, n, n * (n + 1) / 2, heads * share * n)
        flops += rows * done * (1 + 0.5 * again)  # the forward pass is half of both, and runs again
        recomputed += again * rows * n / float((widths * counts).sum())
    hours = flops * steps / per_epoch / (peak * 1e12 * REACHED["nf4" if s.use_qlora else "bf16"] * count) / 3600
    largest = int(widths[-1])
    return Prediction(recomputed, plans.of(largest, plans.plan(largest)), tokens, steps, hours, said)


def memory_for(s: Settings, lengths: np.ndarray, free: float, host: float, compiled: bool = True) -> Memory:
    """Of passes that hold the longest of these rows; free, host: bytes of the GPU and of the CPU."""
    config = sizes(s)
    config.total_ut_steps = s.total_ut_steps
    return Memory(s, config, free, host, Passes(1).width(int(lengths.max(initial=1))), compiled=compiled)


def epoch_of(s: Settings, rows: str) -> tuple[np.ndarray, float, str]:
    """Of an epoch: the tokens of each row, the share of them that is trained, and what that rests on: "", the rows;
    "about ", the table of datasets.yaml; "at most ", max_length, where there is no table, or a copy of other rows."""
    with cache_only():
        if rows == "cached":
            with suppress(UserError):
                tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
                cached, report = prepare(s, tokenizer, builder=False, quiet=True)
                return cached.lengths.astype(float), report["trained_share"], ""
        known = read_yaml(DATASETS).get(s.dataset, {})
        published = not s.dataset_path and s.dataset not in s.paths
        typical = published and "tokens" in known and rows != "longest"
        budget, said = float(s.max_tokens) if (s.max_tokens or "").isdecimal() else math.inf, "about "
        if s.max_tokens and budget == math.inf:  # as many tokens as that set has
            other = epoch_of(replace(s, dataset=s.max_tokens, dataset_path=None, max_tokens=None), rows)
            if not typical:
                return other
            budget, said = other[0].sum(), other[2] or said
        count = known.get("rows", {}).get("train")
        if rows == "cached" or not published or count is None:
            try:
                count = count_rows(find_source(s).files["train"])
            except UserError:
                if count is None:
                    raise
    if typical:
        lengths = typical_lengths(np.array(known["tokens"], float), count, s)
    else:
        lengths, said = np.full(count, float(s.max_length)), "at most "
    kept = int(min(1, budget / max(lengths.sum(), 1)) * len(lengths))  # of all, evenly spaced
    return lengths[np.arange(kept) * len(lengths) // max(kept, 1)], 1.0, said


def typical_lengths(tokens: np.ndarray, count: int, s: Settings) -> np.ndarray:
    """The lengths of `count` rows, of which each of `tokens` stands for as many, as the length policy leaves them."""
    lengths, limit = tokens[np.arange(count) * len(tokens) // count], s.max_length
    if s.length_policy == "drop":
        return lengths[lengths <= limit]
    if s.length_policy == "split":  # each piece after the first has half a piece of new tokens
        further = np.ceil((lengths - limit).clip(0) / (limit - limit // 2)).sum()
        return np.append(lengths.clip(max=limit), np.full(int(further), float(limit)))
    return lengths.clip(max=limit)


def limits() -> tuple[float, int]:
    """Seconds of TIME, the time limit of a training job, and of GRACE, those of them that are for saving.
    Raises UserError: not a time as Slurm writes it, or not a number of seconds."""
    wanted, grace = (os.environ.get(name, "") for name in ("TIME", "GRACE"))
    try:
        return seconds(wanted), int(grace)
    except ValueError:
        raise UserError(f"TIME = {wanted} must be as Slurm writes times, GRACE = {grace} a number of seconds") from None
