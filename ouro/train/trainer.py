"""The trainer: TRL's, with a step of our own, exact token counts, an exact resume, and checks that stop a lost run."""

import dataclasses
import json
import math
import os
import shutil
import statistics
import time
from collections import deque
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from pickle import UnpicklingError

from ouro.data.batches import Rows
from ouro.files import MINUTE, Progress, UserError, file_sha256, seal, sync_file, sync_folder, write_json
from ouro.model.cost import training_flops
from ouro.model.graphs import peak_memory
from ouro.model.lora import refresh
from ouro.model.modeling_ouro import OuroForCausalLM
from ouro.settings import Settings
from ouro.train.collate import collate
from ouro.train.processes import RANK, WORLD_SIZE, print0
from ouro.train.run_folder import (
    ANEW,
    checkpoints,
    holds_all_steps,
    out_of_memory,
    remove,
    set_aside,
    step_of,
    what_next,
    writing,
)
from ouro.train.stopping import Stopper

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

SUMMED = ("loss", "correct tokens", "trained tokens", "tokens", "pairs", "tokens and padding")  # over steps, in `_sums`
LOOP = "held_out_loss/loop"  # + the loop's number: TensorBoard and W&B take no list of losses under one name


class LoopTrainer(SFTTrainer):
    """TRL's trainer for a looped model. Ours are the step and its loss (`training_step`), what is logged (`log`), what
    a checkpoint holds, and the checks of each step's numbers (`after_step`), which stop a run that is lost.

    train_dataset: a `Steps`. held_out: the held-out rows, and the numbers of those that are measured. flops: FLOP/s of
    the GPU, as `matrix_rate` measured them; None: no FLOP use is logged."""

    def __init__(self, *args, settings: Settings, held_out: tuple[Rows, list[int]] | None, flops: float | None,
                 stopper: Stopper, **kwargs):  # fmt: skip
        self.settings, self.held_out, self.stopper = settings, held_out, stopper
        self.flops = flops
        # Sums of this process since the last logged step; float64 counts tokens exactly up to 2**53.
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64)
        self._step_sums = torch.zeros_like(self._sums)  # of the step that is being taken
        self._tokens, self._logged_step = 0, 0
        self._since_log = 0.0  # seconds from the last logged step to the checkpoint that the run continues from
        self._logged_at = time.perf_counter()  # and as much later as saving has taken since
        self._unchecked: tuple | None = None  # (step, its numbers, event of their copy from the GPU), not looked at yet
        self._recent: deque[float] = deque(maxlen=50)  # losses of the last steps
        self._rates: list[float] = []  # tokens/s at the logged steps of the 50 after step `_measured_from`
        self._measured_from = 0
        super().__init__(*args, data_collator=itemgetter(0), **kwargs)  # a "batch" here is one item of `Steps`

    def _prepare_peft_model(self, model: PeftModel, peft_config: None, args: SFTConfig) -> PeftModel:
        # TRL's own version casts embeddings, norms and head of a 4-bit model to fp32 (0.4 GB for 2.6B), and only on a
        # GPU: a CPU test would run another model. What is needed, frozen weights and fp32 adapters, is there already.
        return model

    def get_train_dataloader(self) -> DataLoader:
        return Loader(self.train_dataset, collate_fn=self.data_collator, pin_memory=self.args.device.type == "cuda")

    def floating_point_ops(self, inputs) -> int:
        return 0  # transformers' count goes through all parameters for each batch; ours is in `log`

    def network(self) -> OuroForCausalLM:
        """OuroForCausalLM itself, without the wrappers of PEFT, accelerate and DDP, which would only take time:
        gradients are added up by `add_over_processes`."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def training_step(self, model, inputs: dict, num_items_in_batch=None) -> torch.Tensor:
        """One step: this process's passes, forward and backward, then the gradients' sum over the processes.

        inputs: an item of `Steps`. The loss is the sum over the trained tokens of all passes in all processes, divided
        by their number; so no gradient depends on how the rows were put into passes and shared out, but for rounding.
        """
        network, objective = self.network(), self.settings.loss
        device, sums = self.args.device, torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in inputs["passes"]:
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            out = network(**batch, objective=objective, num_items_in_batch=inputs["trained"])
            out.loss.backward()
            sums += torch.stack([x.detach().double() for x in (out.loss, out.correct_tokens, out.trained_tokens)])
        parameters = [p for p in model.parameters() if p.requires_grad]
        add_over_processes(parameters)
        self._norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        counted = torch.tensor([inputs["seen"], inputs["pairs"], inputs["padded"]], dtype=torch.float64)
        self._step_sums = torch.cat((sums, counted.to(device, non_blocking=True)))
        return sums[0].float()

    def measure_base(self) -> None:
        """Writes the held-out loss before the first step, which is the base model's, to manifest.json.
        Raises UserError: it is not a number, so no step would be one."""
        losses = self.held_out_loss()
        if wrong := [loss for loss in losses if not math.isfinite(loss)]:
            raise UserError(
                f"before the first step the held-out loss is {wrong[0]:g}: the model itself gives it (are its weights "
                "whole?), or a held-out row does; the same command begins anew"
            )
        if RANK == 0:
            path = Path(self.args.output_dir) / "manifest.json"
            write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"base_held_out_loss": losses})

    def start_clock(self) -> None:
        """To be called when the first step is about to begin, so that no loading counts as its time."""
        self._logged_at = time.perf_counter() - self._since_log

    def after_step(self, control: TrainerControl) -> None:
        """Adds the step's sums to those of the next log line, and starts to fetch its numbers from the GPU. The numbers
        are checked after the next step, so that the GPU need not wait; at once where the step is logged or saved.
        Raises UserError: as `_check_pending`."""
        step, sums = self.state.global_step, self._step_sums
        self._sums = self._sums.to(sums.device) + sums
        sums = self.accelerator.reduce(sums[:3]) if WORLD_SIZE > 1 else sums[:3]
        numbers = torch.cat((sums, self._norm.double()[None])).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event() if sums.is_cuda else None
        if arrived:
            arrived.record()
        self._check_pending()
        self._unchecked = (step, numbers, arrived)
        if self.stopper.asked(self.args.device):
            control.should_save = control.should_training_stop = True
        if control.should_save or control.should_log or step == self.state.max_steps:
            self._check_pending()

    def _check_pending(self) -> None:
        """Checks the numbers that were fetched last, if they are not checked yet.
        Raises UserError: they say that the run is lost."""
        if self._unchecked is None:
            return
        step, numbers, arrived = self._unchecked
        if arrived:
            arrived.synchronize()
        (loss, correct, trained, norm), self._unchecked = numbers.tolist(), None
        if reason := self._lost(step, loss, correct / max(trained, 1), norm):
            folder = Path(self.args.output_dir)
            changed = "settings, --seed or data" if checkpoints(folder) else "settings or --seed"
            raise UserError(
                f"step {step}: {reason}",
                f"its rows: {', '.join(self._rows_of(step))}",
                f"{what_next(folder)}, most likely to this again; other {changed}: {ANEW}",
            )
        self._recent.append(loss)

    def _lost(self, step: int, loss: float, accuracy: float, norm: float) -> str | None:
        """Why a step's numbers say that going on is a waste of time, and what to do; None where they do not."""
        s, advice = self.settings, "lower learning_rate, or look at its rows"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            # The first step's numbers come before any weight has changed.
            cause = "the model itself gives it (are its weights whole?), or a row does" if step == 1 else advice
            return f"the loss is {loss:g}, the gradient's norm {norm:g}; {cause}"
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
        """Where the rows of a step stand in the training set. Steps are counted from 1 here, as in global_step: after
        the first one it is 1. `Steps` counts from 0."""
        steps = self.train_dataset
        return [steps.rows.place(row) for row in steps.rows_of(step - 1)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return super().log(logs, start_time)
        step, now, model = self.state.global_step, time.perf_counter(), self.accelerator.unwrap_model(self.model)
        total = self.accelerator.reduce(self._sums.to(self.args.device)).tolist()
        loss = total[0] / (step - self._logged_step)
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
            "padded_tokens_per_second": round(padded / spent, 1),  # the padding is computed too
            "seconds": round(spent, 3),
            "memory_gib": round(peak_memory(model) / 2**30, 2) if torch.cuda.is_available() else 0,
        }
        if self.flops:
            s, config = self.settings, model.config
            heads = s.total_ut_steps if s.loss == "all" else 1  # loops whose logits are formed
            done = training_flops(config, s.total_ut_steps, s.r, seen, pairs, heads * trained)
            logs["model_flop_use"] = round(done / spent / (self.flops * WORLD_SIZE), 4)
        if self._logged_step >= self._measured_from:
            self._watch(step, rate)
        self._sums, self._logged_step = torch.zeros_like(self._sums), step
        if self.held_out is not None and (step % self.settings.eval_steps == 0 or step == self.state.max_steps):
            logs |= {f"{LOOP}{i}": loss for i, loss in enumerate(self.held_out_loss(), 1)}
        self._logged_at = time.perf_counter()
        super().log(logs, start_time)

    def _watch(self, step: int, rate: float) -> None:
        """Warns where training has become slow: less than half the rate of its first 50 steps."""
        if step <= self._measured_from + 50 or not self._rates:
            if step > 1:  # the first step compiles, and is slow
                self._rates.append(rate)
        elif rate < (usual := statistics.median(self._rates)) / 2:
            print0(
                f"warning: step {step}: {rate:,.0f} tokens/s, less than half of the {usual:,.0f} of the first 50 "
                "steps; does another process use this GPU (nvidia-smi), is it throttled, are the last step's rows "
                f"unusual: {', '.join(self._rows_of(step))}?"
            )

    @torch.no_grad()
    def held_out_loss(self) -> list[float]:
        """Cross-entropy per trained token of the held-out rows, in nats, after each loop."""
        network, steps, (rows, chosen) = self.network(), self.train_dataset, self.held_out
        network.eval()
        sums = torch.zeros(self.settings.total_ut_steps + 1, dtype=torch.float64, device=self.args.device)
        passes = dataclasses.replace(steps.passes, grain=1).of(
            {row: int(rows.lengths[row]) for row in chosen}, WORLD_SIZE
        )
        with Progress("held-out loss", len(passes), "passes") as progress:
            for at in range(0, len(passes), WORLD_SIZE):
                mine = passes[at : at + WORLD_SIZE][RANK::WORLD_SIZE]
                # With fsdp all processes must take part in each pass. A process that has none left computes the first
                # pass once more, and does not count it.
                each = (mine or passes)[0]
                batch = collate([(row, *rows.row(row)) for row in each.rows], each)
                batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                # Not compiled: these passes have many shapes, and the compiler would have to work for each of them.
                with torch.compiler.set_stance("force_eager"):
                    out = network(**batch, objective="all", num_items_in_batch=1)
                progress.update(min(WORLD_SIZE, len(passes) - at))
                if mine:
                    sums += torch.cat((out.loop_losses.double(), out.trained_tokens[None].double()))
        network.train()
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
        """Writes a checkpoint under another name, with checksums, syncs and renames it, and then deletes the oldest.
        Raises UserError: it could not be written, as on a full disk; the older ones stay."""
        folder, step, began = Path(self.args.output_dir), self.state.global_step, time.perf_counter()
        staging = folder / ".saving"
        if RANK == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        sums = self.accelerator.reduce(self._sums.to(self.args.device)).tolist()
        with writing(f"step {step}: the checkpoint", folder, staging):
            super(SFTTrainer, self)._save_checkpoint(model, trial)  # TRL's also writes a model card of its own
        self.accelerator.wait_for_everyone()
        if RANK == 0:
            with writing(f"step {step}: the checkpoint", folder, staging):
                log = folder / "metrics.jsonl"
                sync_file(log)  # a continued run keeps the log up to here
                progress = {"sums": sums, "tokens": self._tokens, "logged_step": self._logged_step}
                progress |= {"log_bytes": log.stat().st_size, "log_sha256": file_sha256(log)}
                progress |= {"processes": WORLD_SIZE, "recent": list(self._recent), "rates": self._rates}
                progress["since_log"] = round(began - self._logged_at, 3)
                write_json(staging / f"checkpoint-{step}" / "progress.json", progress)
                seal(staging / f"checkpoint-{step}")
                # A checkpoint of this step or a later one is damaged, or the run would have continued from it.
                if damaged := [other for other in checkpoints(folder) if step_of(other) >= step]:
                    set_aside(damaged)
                os.rename(staging / f"checkpoint-{step}", folder / f"checkpoint-{step}")
                shutil.rmtree(staging, ignore_errors=True)
                sync_folder(folder)
                for other in checkpoints(folder)[self.settings.save_total_limit :]:
                    remove(other)
        self.accelerator.wait_for_everyone()
        self._logged_at += time.perf_counter() - began

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Takes the steps that are left.
        Raises UserError: the run is lost, its checkpoint is no checkpoint, or a GPU's memory ran out."""
        if resume_from_checkpoint and holds_all_steps(Path(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)  # all that is left is to write the adapter
            return
        if resume_from_checkpoint:
            progress = json.loads((Path(resume_from_checkpoint) / "progress.json").read_text())
            if RANK == 0:
                self._sums = torch.tensor(progress["sums"], dtype=torch.float64)
            self._tokens, self._logged_step = progress["tokens"], progress["logged_step"]
            self._recent.extend(progress["recent"])
            self._since_log = progress["since_log"]
            self._rates = progress["rates"]
            if progress["processes"] != WORLD_SIZE:  # the rates of more, or fewer, are no measure of these
                self._rates, self._measured_from = [], step_of(Path(resume_from_checkpoint))
        try:
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        except UnpicklingError:  # torch.load refuses pickled code; its own message tells how to allow it
            raise UserError(
                f"{resume_from_checkpoint} holds what no training writes: delete it, or --overwrite"
            ) from None
        except torch.OutOfMemoryError as error:
            what = f"step {self.state.global_step + 1}"
            raise out_of_memory(what, error, Path(self.args.output_dir), self.settings) from None


class Loader(DataLoader):
    """Gives the items of `Steps` in their order."""

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


@torch.no_grad()
def add_over_processes(parameters: list[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its sum over all processes, in one exchange; a missing gradient counts as zero."""
    if WORLD_SIZE == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    for parameter, grad, summed in zip(parameters, grads, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = grad.copy_(summed.view_as(grad))


class Metrics(TrainerCallback):
    """Writes a line at each logging step: to metrics.jsonl for programs, to the terminal for people."""

    def __init__(self, path: Path, eval_steps: int):
        self.path, self.eval_steps = path, eval_steps
        self.started = 0.0  # when this process began its first step

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.started:
            self.started = self.told = time.perf_counter()
            self.first = state.global_step

    def left(self, state: TrainerState) -> timedelta:
        """The time that the steps left will take, at the pace of those taken by this process."""
        done = state.global_step - self.first
        seconds = (time.perf_counter() - self.started) / done * (state.max_steps - state.global_step)
        return timedelta(seconds=round(seconds))

    def on_step_end(self, args, state, control, **kwargs):
        # Also logged: the last step, and each that the held-out loss is due in, whatever logging_steps is.
        if state.global_step == state.max_steps or (self.eval_steps and state.global_step % self.eval_steps == 0):
            control.should_log = True
        if state.is_world_process_zero and time.perf_counter() - self.told > MINUTE and not control.should_log:
            self.told = time.perf_counter()
            print(f"step {state.global_step:>5}/{state.max_steps}  left {self.left(state)}", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        line = {"step": state.global_step} | {name: x for name, x in logs.items() if not name.startswith(LOOP)}
        if losses := [x for name, x in logs.items() if name.startswith(LOOP)]:
            line["held_out_loss"] = losses
        with open(self.path, "a", encoding="utf-8") as file:  # not synced: the GPU would wait; a checkpoint does it
            file.write(json.dumps(line) + "\n")
        self.told = time.perf_counter()
        held_out = f"held out {losses[-1]:.4f}  " if losses else ""
        print(
            f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  {held_out}"
            f"token accuracy {logs['mean_token_accuracy']:.3f}  lr {logs['learning_rate']:.2e}  "
            f"grad norm {logs.get('grad_norm', float('nan')):.3f}  {logs['tokens_per_second']:,.0f} tok/s  "
            f"left {self.left(state)}",
            flush=True,
        )


class Guards(TrainerCallback):
    """Calls what the trainer does around steps: the held-out loss of the base before the first step, the checks after
    each, and, whenever the adapters have changed (a checkpoint was read, the optimizer took a step), their copy into
    lora.py's groups."""

    def __init__(self, trainer: LoopTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.after_step(control)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        refresh(model)
        if self.trainer.held_out is not None and state.global_step == 0:
            self.trainer.measure_base()
        self.trainer.start_clock()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        refresh(model)
