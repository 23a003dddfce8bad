"""One experiment: settings -> data -> model -> steps -> adapter.

    python train_qlora.py --config configs/smoke.yaml --max_steps 10 --report_to none     # CPU, embedded data, seconds
    python train_qlora.py --config configs/default.yaml --exp exp2-wangchan-ut1           # one 10 GB GPU, NF4
    torchrun --nproc_per_node 4 train_qlora.py --config configs/a100.yaml --exp exp1-wangchan-ut4

Any setting of settings.py can follow, as --name value. Writes OUTPUT_DIR/<experiment>/: config.yaml, manifest.json,
data_report.json, metrics.jsonl, checkpoint-*/, final_adapter/ (PEFT format) and, last, `completed`.

The same command again continues an interrupted run from its newest good checkpoint, to the same bytes as if it had not
been interrupted; a complete one is not repeated; --overwrite starts anew. SIGTERM, SIGUSR1 and --time_limit finish the
step, save and exit with code 75: run it again. Any other failure is 1 or, with one message for the user, 2.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import sys
import sysconfig
import time
import traceback
from collections import deque
from datetime import timedelta
from functools import partial
from pathlib import Path

from settings import (
    Resolved,
    Settings,
    UserError,
    call,
    explain,
    resolve,
    seconds,
    sync_folder,
    write_atomic,
    write_json,
)

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from torch._inductor.async_compile import AsyncCompile
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, get_scheduler, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from batches import EpochOrder, Rows, collate
from benchmarks import table, task_names
from data_config import NoSplit, load_tokenizer, prepare, print_report, save_report
from graphs import peak_memory, replay_layers, replay_loops
from loggers import check_logger, continue_tensorboard, start_logger
from lora import fuse, refresh
from modeling_ouro import PROJECTIONS, compiling, load_ouro
from plan import check_share, layers_to_recompute, matrix_rate, training_flops, training_memory
from runs import (
    LOCAL_RANK,
    LOCAL_WORLD_SIZE,
    RANK,
    REQUEUED,
    WORLD_SIZE,
    checkpoints,
    claim,
    continue_from,
    in_short,
    letting_go,
    manifest,
    model_card,
    seal,
    step_of,
    sync_file,
    writing,
)
from sources import entry_of

STARTED = time.time()

STOPPED = 75  # exit code, BSD's EX_TEMPFAIL: stopped after saving; the same command continues
SUMMED = ("loss", "correct tokens", "trained tokens", "tokens", "pairs", "tokens and padding")
LOOP = "held_out_loss/loop"  # and its number: what TensorBoard and W&B call it


class LoopTrainer(SFTTrainer):
    """TRL's trainer around a looped model: our objective, no fp32 copies of frozen weights, exact token metrics, an
    exact resume, and a stop with a reason when the numbers say that going on is a waste."""

    def __init__(
        self, *args, settings: Settings, held_out: Rows | None, flops: float | None, stopper: "Stopper", **kwargs
    ):
        self.settings, self.held_out, self.stopper = settings, held_out, stopper
        self.flops = flops  # of a GPU, per second
        # of this process since the last log; float64 counts exactly to 2**53
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64)
        self._step_sums = torch.zeros_like(self._sums)  # of the step that is being taken
        self._tokens, self._logged_step, self._logged_at = 0, 0, time.perf_counter()
        self._unchecked: tuple | None = None
        self._noted_step = 0
        self._unmeasured = False  # the base's held-out loss
        self._recent: deque[float] = deque(maxlen=50)  # losses of the last steps
        self._rates: list[float] = []
        super().__init__(*args, **kwargs)

    def _prepare_peft_model(self, model: PeftModel, peft_config: None, args: SFTConfig) -> PeftModel:
        # TRL's own version casts embeddings, norms and head of a 4-bit model to fp32 (0.4 GB for 2.6B), and only on a
        # GPU: a CPU test would run another model. What is needed, frozen weights and fp32 adapters, is there already.
        return model

    def _get_train_sampler(self, train_dataset: Rows | None = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * WORLD_SIZE
        return EpochOrder(rows.sizes, per_step, self.args.seed, grouped=rows.packs is None)

    def floating_point_ops(self, inputs) -> int:
        return 0  # transformers' count goes through all parameters for each batch; ours is in `log`

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._unmeasured:  # the adapters change nothing yet, so this is the base
            with torch.compiler.set_stance("force_eager"):  # else the layers were compiled for these rows' sizes
                losses = self.held_out_loss()
            if RANK == 0:
                path = Path(self.args.output_dir) / "manifest.json"
                write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"base_held_out_loss": losses})
            self._unmeasured, self._logged_at = False, time.perf_counter()
        # What transformers does here, without setting thousands of modules to the training mode that they are in.
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)  # a mean over the step's tokens already
        return loss.detach()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The collator pads on the right, where causality hides padding: no mask, so no masked attention. In packed rows
        # position_ids tell the documents apart.
        mask = inputs.pop("attention_mask")
        # pairs of a token and one it attends to: as many as its position in its document, counted from 1
        positions = inputs["position_ids"] + 1 if "position_ids" in inputs else mask.cumsum(1)
        batch = (mask.sum(), (positions * mask).sum(), mask.new_full((), mask.numel()))  # none waits for the GPU
        inputs["objective"] = self.settings.loss
        loss, outputs = super(SFTTrainer, self).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        batch = (loss, outputs.correct_tokens, outputs.trained_tokens, *batch)
        sums = torch.stack([x.detach().double() for x in batch])
        self._step_sums = self._step_sums.to(sums.device) + sums
        return (loss, outputs) if return_outputs else loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs):
        """Called by transformers after each step: the numbers are looked at before anything is saved."""
        step, last = self.state.global_step, self.state.global_step == self.state.max_steps
        if step == self._noted_step:  # transformers calls this once more at the end of each epoch
            return super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        self._noted_step = step
        self._sums = self._sums.to(self._step_sums.device) + self._step_sums
        sums = self._step_sums[:3]
        sums = self.accelerator.reduce(sums, "mean") if WORLD_SIZE > 1 else sums
        numbers = torch.cat((sums, grad_norm.double()[None])).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if sums.is_cuda else None
        if arrived:
            arrived.record()
        self._check_pending()
        self._unchecked = (step, numbers, arrived)
        self._step_sums = torch.zeros_like(self._step_sums)
        if self.stopper.asked(self.args.device):
            self.control.should_save = self.control.should_training_stop = True
        if self.control.should_save or self.control.should_log or last:
            self._check_pending()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_pending(self) -> None:
        """Looks at the numbers of the step before: the GPU is waited for up to there, and has the next step to do.

        Raises:
            UserError: they say that the run is lost.
        """
        if self._unchecked is None:
            return
        step, numbers, arrived = self._unchecked
        if arrived:
            arrived.synchronize()
        (loss, correct, trained, norm), self._unchecked = numbers.tolist(), None
        if reason := self._lost(step, loss, correct / max(trained, 1), norm):
            raise UserError(
                f"step {step}: {reason}\nits rows: {', '.join(self._rows_of(step))}\nthe newest good checkpoint stays; "
                "the same command continues from it"
            )
        self._recent.append(loss)

    def _lost(self, step: int, loss: float, accuracy: float, norm: float) -> str | None:
        s, advice = self.settings, "lower learning_rate, or look at its rows"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss:g}, the gradient's norm {norm:g}; {advice}"
        if step <= s.collapse_steps and (loss < s.min_loss or accuracy > s.max_token_accuracy):
            return (
                f"collapsed, there is nothing to learn: loss {loss:.4f} (min_loss = {s.min_loss:g}), token accuracy "
                f"{accuracy:.3f} (max_token_accuracy = {s.max_token_accuracy:g}) before step {s.collapse_steps}; see "
                "data_report.json and the marked row above"
            )
        if len(self._recent) == self._recent.maxlen:
            usual = statistics.median(self._recent)
            if loss > s.max_loss_spike * usual:
                return (
                    f"the loss is {loss:.4f}, more than max_loss_spike = {s.max_loss_spike:g} times the median "
                    f"{usual:.4f} of the {len(self._recent)} steps before; {advice}"
                )
        return None

    def _rows_of(self, step: int) -> list[str]:
        """Where the rows of a step stand in the training set."""
        order = self._get_train_sampler()
        per_epoch = len(order) // order.step
        order.set_epoch((step - 1) // per_epoch)
        at = (step - 1) % per_epoch * order.step
        return [place for i in list(order)[at : at + order.step] for place in self.train_dataset.places(i)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return super().log(logs, start_time)
        step, now = self.state.global_step, time.perf_counter()
        total = self.accelerator.reduce(self._sums.to(self.args.device)).tolist()
        loss = total[0] / WORLD_SIZE / (step - self._logged_step)  # transformers scales each process's by their number
        correct, trained, seen, pairs, padded = (int(x) for x in total[1:])
        self._tokens += seen
        accuracy, spent = correct / max(trained, 1), now - self._logged_at
        rate = seen / spent
        logs |= {
            "loss": round(loss, 6),
            "mean_token_accuracy": round(accuracy, 4),
            "num_tokens": self._tokens,
            "padding": round(1 - seen / padded, 4),
            "tokens_per_second": round(rate, 1),
            "padded_tokens_per_second": round(padded / spent, 1),  # what the GPU computed
            "memory_gib": round(peak_memory() / 2**30, 2) if torch.cuda.is_available() else 0,
        }
        if self.flops:
            s, config = self.settings, self.accelerator.unwrap_model(self.model).config
            heads = s.total_ut_steps if s.loss == "all" else 1
            done = training_flops(config, s.total_ut_steps, s.r, seen, pairs, heads * trained)
            logs["model_flop_use"] = round(done / spent / (self.flops * WORLD_SIZE), 4)
        self._sums, self._logged_step = torch.zeros_like(self._sums), step
        self._watch(step, rate)
        if self.held_out is not None and (step % self.settings.eval_steps == 0 or step == self.state.max_steps):
            logs |= {
                f"{LOOP}{i}": loss for i, loss in enumerate(self.held_out_loss(), 1)
            }  # charts want a name for each number
        self._logged_at = time.perf_counter()
        super().log(logs, start_time)

    def _watch(self, step: int, rate: float) -> None:
        """Warns of a machine that has become slow."""
        if step <= 50 or not self._rates:
            if step > 1:  # which compiles
                self._rates.append(rate)
        elif rate < statistics.median(self._rates) / 2 and RANK == 0:
            usual = statistics.median(self._rates)
            print(
                f"warning: step {step}: {rate:,.0f} tokens/s, less than half of the {usual:,.0f} of the first 50 "
                "steps; does another process use this GPU (nvidia-smi), is it throttled, are the last step's rows "
                f"unusual: {', '.join(self._rows_of(step))}?"
            )

    @torch.no_grad()
    def held_out_loss(self) -> list[float]:
        """Cross-entropy per trained token of the held-out rows, in nats, after each loop."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        batch, count = self.args.per_device_train_batch_size, len(self.held_out)
        sums = torch.zeros(self.settings.total_ut_steps + 1, dtype=torch.float64, device=self.args.device)
        for at in range(0, count, batch * WORLD_SIZE):
            rows = range(count)[at : at + batch * WORLD_SIZE][RANK::WORLD_SIZE]
            # with fsdp all processes make each pass together, so one that has no rows left makes it for nothing
            inputs = self._prepare_inputs(collate([self.held_out[i] for i in rows or (0,)]))
            inputs.pop("attention_mask")
            with self.compute_loss_context_manager():
                out = model(**inputs, objective="all", num_items_in_batch=1)
            if rows:
                sums += torch.cat((out.loop_losses.double(), out.trained_tokens[None].double()))
        model.train()
        *losses, tokens = self.accelerator.reduce(sums).tolist()
        return [round(loss / max(tokens, 1), 6) for loss in losses]

    def create_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None and self.settings.loraplus_lr_ratio != 1:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            s = self.settings
            arguments |= {"loraplus_lr_ratio": s.loraplus_lr_ratio, "loraplus_weight_decay": s.weight_decay}
            self.optimizer = create_loraplus_optimizer(self.model, kind, **arguments)
        return super().create_optimizer()

    def _get_output_dir(self, trial) -> str:
        return str(Path(self.args.output_dir) / ".saving")

    def _save_checkpoint(self, model, trial) -> None:
        """Under another name, with checksums and synced, then renamed; only then do older ones go.

        Raises:
            UserError: it could not be written, as on a full disk; the older ones stay.
        """
        folder, step = Path(self.args.output_dir), self.state.global_step
        staging = folder / ".saving"
        if RANK == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        sums = self.accelerator.gather(self._sums.to(self.args.device)[None]).tolist()
        with writing(f"step {step}: the checkpoint", folder, staging):
            super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's also writes a model card of its own
        self.accelerator.wait_for_everyone()
        if RANK == 0:
            with writing(f"step {step}: the checkpoint", folder, staging):
                progress = {"sums": sums, "tokens": self._tokens, "logged_step": self._logged_step}
                progress |= {"processes": WORLD_SIZE, "recent": list(self._recent), "rates": self._rates}
                progress["since_log"] = round(time.perf_counter() - self._logged_at, 3)
                write_json(staging / f"checkpoint-{step}" / "progress.json", progress)
                sync_file(folder / "metrics.jsonl")  # what was logged up to here counts from now on
                seal(staging / f"checkpoint-{step}")
                shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)  # a damaged one, else it had been read
                os.rename(staging / f"checkpoint-{step}", folder / f"checkpoint-{step}")
                staging.rmdir()
                sync_folder(folder)
                found = checkpoints(folder)
                this = found.index(folder / f"checkpoint-{step}")
                # newer ones are damaged, or the run had gone on from them
                for other in found[:this] + found[this + self.settings.save_total_limit :]:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | None = None):
        since_log = 0.0  # seconds
        if resume_from_checkpoint:
            progress = json.loads((Path(resume_from_checkpoint) / "progress.json").read_text())
            if progress["processes"] == WORLD_SIZE:
                self._sums = torch.tensor(progress["sums"][RANK], dtype=torch.float64)
            elif RANK == 0:
                self._sums = torch.tensor(progress["sums"], dtype=torch.float64).sum(0) * WORLD_SIZE
                self._sums[0] /= progress["processes"]  # a mean over processes
                self._sums[1:] /= WORLD_SIZE
            self._tokens, self._logged_step = progress["tokens"], progress["logged_step"]
            self._recent.extend(progress["recent"])
            self._rates, since_log = progress["rates"], progress.get("since_log", 0)
        self._unmeasured = self.held_out is not None and not resume_from_checkpoint
        self._logged_at = time.perf_counter() - since_log
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint)
        except torch.OutOfMemoryError as error:
            s, layers = self.settings, self.accelerator.unwrap_model(self.model).get_base_model().model.layers
            raise UserError(
                f"step {self.state.global_step + 1}: {in_short(error)}\nper_device_train_batch_size = "
                f"{s.per_device_train_batch_size}, max_length = {s.max_length}, {recomputed(layers)} of {len(layers)} "
                "layers recomputed: set activation_checkpointing to full, or a smaller batch (and "
                "gradient_accumulation_steps larger by as much); the same command continues from the last good "
                "checkpoint"
            ) from None


def recomputed(layers) -> int:
    return sum(layer.gradient_checkpointing for layer in layers)


class Stopped(Exception):
    """Training ended before its last step, after a checkpoint."""


class Stopper:
    """Says when to end training, after a step in which a signal came or the time was up, in all processes together."""

    def __init__(self, time_limit: float | None):
        self.deadline = None if time_limit is None else STARTED + time_limit
        self.why: str | None = None
        # Processes of one node ask each other without their GPUs, which would have to finish first. Across nodes that
        # is left to NCCL, which finds its network where gloo may not.
        self.group = None
        if 1 < WORLD_SIZE == LOCAL_WORLD_SIZE:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # needs no network, nor a host name that resolves
            self.group = torch.distributed.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1):  # before that, they end it: it would be requeued for nothing
            signal.signal(number, self.note)

    def note(self, number: int, frame) -> None:
        self.why = signal.Signals(number).name

    def asked(self, device: torch.device) -> bool:
        if self.deadline is not None and time.time() > self.deadline:
            self.why = self.why or "the time limit"
        stop = self.why is not None
        if WORLD_SIZE > 1:  # what all agree on, also where a signal comes in just now
            flag = torch.tensor(float(stop), device="cpu" if self.group else device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
            stop = bool(flag)
        if stop:
            self.why = self.why or "a signal to another process"
        return stop


class Metrics(TrainerCallback):
    """One line a logging step: to metrics.jsonl for programs, to the terminal for people."""

    def __init__(self, path: Path, eval_steps: int):
        self.path, self.eval_steps = path, eval_steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        # the last step, also where logging_steps does not divide their number; and where the held-out loss is due
        if state.global_step == state.max_steps or (self.eval_steps and state.global_step % self.eval_steps == 0):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        line = {"step": state.global_step} | {name: x for name, x in logs.items() if not name.startswith(LOOP)}
        if losses := [x for name, x in logs.items() if name.startswith(LOOP)]:
            line["held_out_loss"] = losses
        with open(self.path, "a", encoding="utf-8") as file:  # synced with each checkpoint: the GPU waits for this
            file.write(json.dumps(line) + "\n")
        done = state.global_step - self.first
        left = (time.perf_counter() - self.started) / done * (state.max_steps - state.global_step)
        held_out = f"held out {losses[-1]:.4f}  " if losses else ""
        print(
            f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  {held_out}"
            f"token accuracy {logs['mean_token_accuracy']:.3f}  lr {logs['learning_rate']:.2e}  "
            f"grad norm {logs.get('grad_norm', float('nan')):.3f}  {logs['tokens_per_second']:,.0f} tok/s  "
            f"left {timedelta(seconds=round(left))}",
            flush=True,
        )


class Refresh(TrainerCallback):
    """Brings the groups' copies of the adapters up to date: after a checkpoint was read, and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        refresh(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        refresh(model)


def check_device(settings: Settings) -> str | int:
    """The device of this process; a machine that cannot run these settings is refused here, not an hour later.

    Raises:
        UserError: bf16 without a GPU that computes in it, more processes than GPUs, or nothing to compile with.
    """
    if not torch.cuda.is_available():
        if settings.bf16:
            raise UserError(
                "no CUDA GPU found, and the settings ask for bf16; on a CPU use --config configs/smoke.yaml "
                "(on a GPU machine: does `nvidia-smi` work, and does the driver fit CUDA 12.6?)"
            )
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # accelerate's own cpu:1 is one that torch.load does not know
        return "cpu"
    count, processes = torch.cuda.device_count(), max(LOCAL_WORLD_SIZE, LOCAL_RANK + 1)
    if count < processes:
        raise UserError(f"{processes} processes on {platform.node()} and {count} GPUs: start one for each GPU")
    torch.cuda.set_device(LOCAL_RANK)
    if settings.bf16 and torch.cuda.get_device_capability()[0] < 8:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16 (Ampere and later have): set --bf16 false")
    if settings.torch_compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UserError(
            "torch_compile needs a C compiler: apt-get install gcc (or `module load gcc`), or set it to false"
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if settings.torch_compile and not header.exists():
        raise UserError(f"torch_compile needs {header}: apt-get install python3-dev, or set it to false")
    return LOCAL_RANK


def unused(s: Settings, device: str | int) -> list[str]:
    """What is set or there, and does nothing."""
    lines = []
    if s.fsdp and WORLD_SIZE == 1:
        lines.append("fsdp: true does nothing with one process")
    if s.fsdp and WORLD_SIZE > 1 and s.torch_compile and device != "cpu":
        lines.append("torch_compile: true does nothing with fsdp")  # FSDP2's hooks would break the layers' graph
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if (idle := count - (LOCAL_WORLD_SIZE or WORLD_SIZE)) > 0:
        command = shlex.join(["torchrun", "--nproc_per_node", str(count), *sys.argv])
        lines.append(f"{idle} of the {count} GPUs here {'is' if idle == 1 else 'are'} idle; all of them: {command}")
    return lines


def shard_frozen_weights(model: PeftModel) -> None:
    """Leaves each process its share of the layers' frozen projections; a layer is whole only while it runs (FSDP2).

    The adapter is left to DDP, and so are optimizer, checkpoints and exact resume. The numbers stay the same bits,
    except that with a loss of several loops FSDP2's hooks change the order in which a loop's gradients are summed.
    """
    decoder = model.get_base_model().model
    mesh = init_device_mesh(model.device.type, (WORLD_SIZE,))
    for module in decoder.modules():
        if isinstance(module, Linear4bit):  # FSDP2 takes floating-point parameters only: the same bytes, called fp32
            module.weight.data = module.weight.data.flatten().view(torch.float32)[:, None]
            module.weight.quant_storage = module.quant_storage = torch.float32
    for layer in decoder.layers:
        whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}  # adapter and norms
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # a root without weights of its own: FSDP2 never frees a root's after the forward pass
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
    shares = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shares)


def trainer_arguments(run: Resolved, folder: Path, use_cpu: bool) -> SFTConfig:
    """The settings as TRL's own.

    Raises:
        UserError: a value that transformers does not know, or that does not work here.
    """
    s = run.settings
    try:
        arguments = SFTConfig(
            output_dir=str(folder),
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised and masked already
            max_length=None,
            num_train_epochs=s.num_train_epochs,
            max_steps=s.max_steps,
            per_device_train_batch_size=s.per_device_train_batch_size,
            gradient_accumulation_steps=s.gradient_accumulation_steps // WORLD_SIZE,
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.lr_scheduler_type,
            warmup_ratio=s.warmup_ratio,
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm or math.inf,  # with 0 the norm would not be computed, which the guards watch
            optim=s.optim,
            gradient_checkpointing=False,  # `build` has seen to it, layer by layer
            bf16=s.bf16,
            use_cpu=use_cpu,
            accelerator_config={"non_blocking": not use_cpu},  # batches need not wait for the GPU on their way to it
            seed=s.seed,
            logging_steps=s.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a loss that is not a number must be seen
            label_names=["labels"],
            remove_unused_columns=False,  # the rows are documents, not columns
            report_to=s.report_to,
            run_name=run.run,
            save_strategy="steps",
            save_steps=s.save_steps,
            logging_dir=str(folder / "tensorboard"),
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,  # they are the frozen weights
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs, transformers would make nn.DataParallel
    check_optimizer(s, arguments)
    return arguments


def check_optimizer(s: Settings, arguments: SFTConfig) -> None:
    """Makes a step with optimizer and schedule on a parameter of their own: transformers lists more than work here.

    Raises:
        UserError: a package that is not there, or arguments for which there is no setting.
    """
    weight = torch.nn.Parameter(torch.zeros(64, 64, device=arguments.device))  # the smallest that 8 bits are used for
    weight.grad = torch.zeros_like(weight)
    setting, others = "optim", "adamw_torch, adamw_torch_fused and paged_adamw_8bit"
    try:
        kind, options = SFTTrainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([weight], **options)
        optimizer.step()
        setting, others = "lr_scheduler_type", "cosine, linear and constant_with_warmup"
        get_scheduler(arguments.lr_scheduler_type, optimizer, num_warmup_steps=1, num_training_steps=2)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting} = {getattr(s, setting)} does not work here: {reason}; {others} do") from None


def frozen_kind(s: Settings, device: str | int) -> str:
    """How the frozen weights are kept: bf16 (or fp32), fp8 or nf4.

    Raises:
        UserError: fp8 with settings, or on a machine, that it is not for.
    """
    if s.frozen_weights == "auto":
        return "nf4" if s.use_qlora else "bf16"
    if s.use_qlora or s.use_dora or s.fsdp or not s.bf16:
        raise UserError("frozen_weights: fp8 is for bf16 LoRA: it needs use_qlora, use_dora, fsdp false and bf16 true")
    if device == "cpu" or torch.cuda.get_device_capability() < (9, 0):
        raise UserError("frozen_weights: fp8 needs a Hopper GPU (H100, H200) or a later one; set it to auto")
    return "fp8"


def build(s: Settings, device: str | int) -> PeftModel:
    """The model to train: frozen weights, new adapters, layers that compute together, are recomputed, are compiled.

    Raises:
        UserError: no such model, or one that this machine cannot train as the settings say.
    """
    if s.deterministic:  # not with warnings only: attention's backward pass would then stay as it is
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only finds reads of it
    kind = frozen_kind(s, device)
    sharded = s.fsdp and WORLD_SIZE > 1
    compiled = s.torch_compile and device != "cpu" and not sharded  # FSDP2's hooks would break the layers' graph
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(s.cache_dir).resolve() / "compiled"))
        AsyncCompile.warm_pool()  # the compiler's processes take ten seconds to start: while the model is loaded
    free = None if device == "cpu" else torch.cuda.mem_get_info()[0]
    try:
        model = load_ouro(
            s.model_name_or_path,
            s.model_revision,
            total_ut_steps=s.total_ut_steps,
            dtype=torch.bfloat16 if s.bf16 else torch.float32,
            nf4=kind == "nf4",
            double_quant=s.bnb_4bit_use_double_quant,
            device=device,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model {s.model_name_or_path}: {error}") from None
    count = layers_to_recompute(s, model.config, free, compiled)
    set_seed(s.seed)  # the trainer does so only after the adapter's first weights were drawn
    config = LoraConfig(
        r=s.r,
        lora_alpha=s.lora_alpha,
        lora_dropout=s.lora_dropout,
        use_rslora=s.use_rslora,
        use_dora=s.use_dora,
        target_modules=PROJECTIONS,  # by name: "all-linear" would adapt the exit gate
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.enable_input_require_grads()  # else the first layer were a graph of its own, and compiled twice
    if not (s.use_dora or sharded):  # those two need PEFT's own layers
        fuse(adapted, kind)
    model.recompute_layers(count)
    if compiled:
        model.compile_layers(one_size=s.packing)
        if s.packing and s.bf16 and not s.use_dora:  # all batches have one size
            if not count:
                replay_loops(adapted)
            elif kind == "nf4":
                replay_layers(adapted, s.per_device_train_batch_size * s.max_length, **compiling(one_size=True))
    return adapted


def wait_for_data() -> None:
    """A moment, while another process of this node tokenises.

    Raises:
        UserError: a process has failed, which says why.
    """
    time.sleep(0.2)
    try:
        failed = _get_default_store().add("failed", 0) if torch.distributed.is_initialized() else 0
    except RuntimeError:  # process 0, which keeps the store, has ended
        failed = 1
    if failed:
        raise UserError("another process failed")


def held_out_rows(s: Settings, tokenizer: PreTrainedTokenizerBase) -> Subset | None:
    """The rows that the held-out loss is measured on: `eval_rows` of them, evenly spaced; None if there are none."""
    if not s.eval_steps:
        return None
    try:
        rows, _ = prepare(s, tokenizer, "held_out", LOCAL_RANK == 0, RANK > 0, wait_for_data)
    except NoSplit as error:
        rows, why = (), str(error)
    else:
        why = "its held-out part has no rows"
    if not len(rows):
        if RANK == 0:
            print(f"no held-out loss: {why}")
        return None
    count = min(s.eval_rows, len(rows))
    return Subset(rows, [i * len(rows) // count for i in range(count)])


@letting_go()
def train(run: Resolved) -> Path:
    """Runs the experiment, or the rest of it, and gives its folder.

    Raises:
        UserError: anything in the settings, the data, the machine or the folder that would waste the run.
        Stopped: a signal or the time limit ended it after a checkpoint.
    """
    s, folder = run.settings, Path(run.settings.output_dir) / run.run
    check_share(s, WORLD_SIZE)
    entry_of(s.dataset)
    task_names(s.tasks, table()["tasks"])  # else evaluation would find out, after the training
    device = check_device(s)
    frozen_kind(s, device)
    arguments = trainer_arguments(run, folder, use_cpu=device == "cpu")
    check_logger(s)
    if RANK == 0:
        print(f"run {run.run} -> {folder}, {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}")
        if run.options.overwrite and REQUEUED:
            print("a job that was requeued continues: --overwrite was done when it began")
        for name, value in vars(s).items():
            print(f"  {name:<28} {str(value):<32} {run.origins[name]}")
        for line in unused(s, device):
            print(line)
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    rows, report = prepare(s, tokenizer, "train", LOCAL_RANK == 0, RANK > 0, wait_for_data)
    held_out = held_out_rows(s, tokenizer)
    with PartialState().main_process_first():  # the other ranks see what the first one left
        state = claim(folder, run, run.options.overwrite and RANK == 0 and not REQUEUED)
    found = gather_object([str(state) if (folder / "config.yaml").exists() else "nothing"])
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise UserError(
                f"output_dir = {s.output_dir} is not one shared folder: process 0 finds {found[0]} there, process "
                f"{rank} {theirs}; use one that all nodes share"
            )
    if state == "complete":
        if RANK == 0:
            print(f"{folder} is complete already; --overwrite trains it again")
        return folder
    if RANK == 0:
        print_report(report, rows=1)
        if state != "new":
            continue_from(state, report)
        save_report(folder / "data_report.json", report)

    start_logger(run, folder)
    free = None if device == "cpu" else torch.cuda.mem_get_info()[0]
    try:
        model = build(s, device)
        flops = matrix_rate(device) if s.bf16 and device != "cpu" else None
    except torch.OutOfMemoryError as error:
        raise UserError(f"{in_short(error)}: does another process use this GPU (nvidia-smi)?") from None
    memory = planned_memory(s, model, free)
    if RANK == 0 and state == "new":
        write_json(folder / "manifest.json", manifest(run, model, report, flops, memory))
    stopper = Stopper(run.options.time_limit)
    trainer = LoopTrainer(
        model=model,
        settings=s,
        held_out=held_out,
        flops=flops,
        stopper=stopper,
        args=arguments,
        train_dataset=rows,
        data_collator=partial(collate, width=s.max_length) if s.packing else collate,  # packs: one size, fast kernels
        processing_class=tokenizer,
        callbacks=[Refresh(), Metrics(folder / "metrics.jsonl", s.eval_steps if held_out else 0)],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if state != "new" and s.report_to == "tensorboard":
        continue_tensorboard(trainer, folder, step_of(state))
    if RANK == 0:
        trained, total = trainer.model.get_nb_trainable_parameters()
        print(f"model: {s.model_name_or_path}, {s.total_ut_steps} loops, {trained:,} trained of {total:,} parameters")
    if s.fsdp and WORLD_SIZE > 1:
        shard_frozen_weights(trainer.model)
    trainer.train(resume_from_checkpoint=None if state == "new" else str(state))
    if trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(f"{stopper.why}: stopped after step {trainer.state.global_step}, which is saved")

    if trainer.is_world_process_zero():
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        unfinished = folder / ".final_adapter"
        shutil.rmtree(unfinished, ignore_errors=True)
        with writing("the adapter", folder, unfinished):
            trainer.model.save_pretrained(unfinished)
            config = json.loads((unfinished / "adapter_config.json").read_text(encoding="utf-8"))
            config["target_modules"].sort()  # PEFT writes a set, in another order in each process
            write_json(unfinished / "adapter_config.json", config)
            tokenizer.save_pretrained(unfinished)
            write_atomic(unfinished / "README.md", model_card(run, report, s.model_name_or_path, log))
            seal(unfinished)
            shutil.rmtree(folder / "final_adapter", ignore_errors=True)  # of a run killed between here and `completed`
            os.replace(unfinished, folder / "final_adapter")
            sync_file(folder / "metrics.jsonl")
            write_json(folder / "completed", {"steps": log[-1]["step"], "loss": log[-1]["loss"]})
        for checkpoint in checkpoints(folder):  # the adapter is what remains
            shutil.rmtree(checkpoint)
        print(f"adapter: {folder / 'final_adapter'}")
    PartialState().wait_for_everyone()  # no process leaves while another may still need it
    return folder


def planned_memory(s: Settings, model: PeftModel, free: int | None) -> dict:
    """Layers recomputed and, for a GPU that had so many bytes free, GiB estimated at the peak; printed, too."""
    layers, gib = model.get_base_model().model.layers, None
    count, text = recomputed(layers), ""
    if free and s.torch_compile and not (s.fsdp and WORLD_SIZE > 1):  # the estimate is of compiled layers
        gib = round(training_memory(s, model.config, count) / 2**30, 1)
        text = f"; estimate {gib} GiB of {free / 2**30:.1f} free"
    if RANK == 0:
        print(f"memory: {count} of {len(layers)} layers recomputed{text}")
    return {"recomputed_layers": count, "estimated_gib": gib}


def time_limit(text: str) -> float:
    try:
        return seconds(text, each=1)
    except ValueError:
        message = f"{text!r} is neither seconds nor HH:MM:SS nor D-HH:MM:SS"
        raise argparse.ArgumentTypeError(message) from None


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="delete a run of this name and train it again")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: refuse a run that has checkpoints already"
    )
    parser.add_argument(
        "--time_limit", type=time_limit, help="stop, saved, after this: seconds, HH:MM:SS, D-HH:MM:SS (exit code 75)"
    )


def speaks(error: BaseException) -> bool:
    """Whether this process is the one to say why the run ends: the first that fails, as others then fail with it."""
    if not torch.distributed.is_initialized():  # a mistake that all of them see
        return LOCAL_RANK == 0 or not isinstance(error, UserError)
    try:
        return _get_default_store().add("failed", 1) == 1
    except RuntimeError:  # process 0, which may be the one that keeps the store, has ended
        return False


def among_others() -> bool:
    """Whether this process belongs to a group, if only of one."""
    return WORLD_SIZE > 1 or (torch.distributed.is_available() and torch.distributed.is_initialized())


def leave(code: int) -> None:
    """Ends this process with its exit code."""
    if not among_others():
        sys.exit(code)
    # The interpreter's end, and that of the process group, may wait for processes that are gone or wait themselves; and
    # for a thread of gloo's that waits for this one to let go of Python.
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    try:
        train(resolve(__doc__, add_options=options))
    except Stopped as stopped:
        if RANK == 0:
            overwriting = " without --overwrite" * ("--overwrite" in sys.argv)
            print(f"{stopped}; the same command{overwriting} continues (exit code {STOPPED})")
        leave(STOPPED)
    except (Exception, KeyboardInterrupt) as error:
        if not among_others():
            raise
        if not speaks(error):
            leave(2 if isinstance(error, UserError) else 1)
        code = explain(error)
        if code is None:
            traceback.print_exc()
        leave(code or 1)
    if among_others():
        leave(0)


if __name__ == "__main__":
    call(main)
