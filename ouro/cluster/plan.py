"""What a run will take on a kind of GPU: layers recomputed, memory, steps, hours, and how often it is requeued.

p = predict(settings, "H100", 4)       # from counted operations, as sweep.py and `make bench WHAT=plan` print them
p.told(done=120)                       # "at most 11.2, 1 requeue": of the steps after the 120th
"""

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace

from ouro.data.cache import prepare
from ouro.data.sources import cache_only, count_rows, find_source
from ouro.files import UserError, nearest, read_yaml
from ouro.model.cost import GPUS, HOPPER, REACHED, layers_to_recompute, sizes, training_flops, training_memory
from ouro.model.loading import load_tokenizer
from ouro.settings import DATASETS, Settings
from ouro.train.time_limit import seconds


@dataclass
class Prediction:
    """Of a whole run."""

    recomputed: int  # layers
    memory: float  # bytes on each GPU, at the peak
    tokens: float  # of an epoch
    steps: int
    hours: float
    at_most: bool  # the rows are not tokenised here: each counted as max_length tokens, all trained

    def left(self, done: int = 0) -> float:
        """The hours of the steps after `done`."""
        return self.hours * (1 - done / max(self.steps, 1))

    def told(self, done: int = 0) -> str:
        """`left`, and in how many further pieces the time limit cuts it."""
        hours = self.left(done)
        limit, grace = limits()
        requeues = max(0, math.ceil(hours * 3600 / max(limit - grace, 1)) - 1)
        said = f", {requeues} requeue{'s' * (requeues > 1)}" if requeues else ""
        return f"{'at most ' * self.at_most}{hours:.1f}{said}"


def predict(s: Settings, gpu: str, count: int, tokenise: bool = False) -> Prediction:
    """What a run takes on `count` GPUs of a kind in GPUS, from counted operations and the share of its peak REACHED.

    Without `tokenise` nothing is downloaded or tokenised for it: the rows are the cache's, where it has them.

    Raises:
        UserError: an unknown GPU, one that is too small or has no fp8, or data of which not even the rows are known.
    """
    if gpu not in GPUS:
        raise UserError(f"no figures of a GPU {gpu!r}{nearest(gpu, GPUS)} (GPU_TYPE in slurm/site.env)")
    if s.frozen_weights == "fp8" and gpu not in HOPPER:
        raise UserError(f"frozen_weights: fp8 needs a Hopper GPU ({' or '.join(HOPPER)}), not {gpu}; set it to auto")
    peak, memory = GPUS[gpu]
    config = sizes(s)
    try:
        recomputed = layers_to_recompute(s, config, memory * 2**30)
    except UserError as error:
        raise UserError(f"{gpu}, {memory} GiB: {error}") from None
    rows, tokens, pairs, trained, at_most = epoch_of(s, tokenise)
    per_epoch = max(1, -(-rows // (s.per_device_train_batch_size * s.gradient_accumulation_steps)))
    steps = s.max_steps if s.max_steps >= 0 else math.ceil(s.num_train_epochs * per_epoch)
    heads = s.total_ut_steps if s.loss == "all" else 1
    flops = training_flops(config, s.total_ut_steps, s.r, tokens, pairs, heads * trained) * steps / per_epoch
    flops *= 1 + 0.5 * recomputed / config.num_hidden_layers  # the forward pass is half of both, and runs again
    hours = flops / (peak * 1e12 * REACHED["nf4" if s.use_qlora else "bf16"] * count) / 3600
    return Prediction(recomputed, training_memory(s, config, recomputed), tokens, steps, hours, at_most)


def epoch_of(s: Settings, tokenise: bool) -> tuple[int, float, float, float, bool]:
    """Batch rows, tokens, pairs of tokens and trained tokens of an epoch; and whether they are at most so many."""
    with nullcontext() if tokenise else cache_only():
        try:
            tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
            rows, report = prepare(s, tokenizer, builder=tokenise, quiet=True)
        except UserError:
            if s.max_tokens and not s.max_tokens.isdecimal():  # as many tokens as that set has, here in as many rows
                return epoch_of(replace(s, dataset=s.max_tokens, dataset_path=None, max_tokens=None), tokenise)
            try:
                count = sum(map(count_rows, find_source(s).files["train"]))
            except UserError:
                known = read_yaml(DATASETS).get(s.dataset, {}).get("rows")
                if not known:
                    raise
                count = known["train"]
            tokens = min(count * s.max_length, int(s.max_tokens or count * s.max_length))
            return count, tokens, tokens * s.max_length / 2, tokens, True
    pairs = float((rows.lengths * (rows.lengths + 1) / 2).sum())
    return len(rows), report["tokens"], pairs, report["trained_tokens"], False


def limits() -> tuple[float, int]:
    """Seconds of TIME, the time limit of a training job, and of GRACE, those of them that are for saving.

    Raises:
        UserError: not a time as Slurm writes it, or not a number of seconds.
    """
    wanted, grace = (os.environ.get(name, "") for name in ("TIME", "GRACE"))
    try:
        return seconds(wanted), int(grace)
    except ValueError:
        raise UserError(f"TIME = {wanted} must be as Slurm writes times, GRACE = {grace} a number of seconds") from None
