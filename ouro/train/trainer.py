"""The trainer: TRL's, with our objective, exact token metrics, an exact resume, and guards on the numbers."""

import json
import math
import os
import shutil
import statistics
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError

from ouro.data.batches import EpochOrder, Rows
from ouro.files import UserError, sync_folder, write_json
from ouro.model.cost import training_flops
from ouro.model.graphs import peak_memory
from ouro.model.lora import refresh
from ouro.settings import Settings
from ouro.train.collate import collate
from ouro.train.processes import RANK, WORLD_SIZE, print0
from ouro.train.run_folder import (
    checkpoints,
    holds_all_steps,
    in_short,
    remove,
    seal,
    set_aside,
    step_of,
    sync_file,
    writing,
)
from ouro.train.stopping import Stopper

import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

SUMMED = ("loss", "correct tokens", "trained tokens", "tokens", "pairs", "tokens and padding")
LOOP = "held_out_loss/loop"  # and the loop's number: a chart of TensorBoard or W&B holds one number a step


class LoopTrainer(SFTTrainer):
    """TRL's trainer around a looped model: our objective, no fp32 copies of frozen weights, exact token metrics, an
    exact resume, and a stop with a reason when the numbers say that going on is a waste."""

    def __init__(
        self, *args, settings: Settings, held_out: Rows | None, flops: float | None, stopper: "Stopper", **kwargs
    ):
        self.settings, self.held_out, self.stopper = settings, held_out, stopper
        self.flops = flops  # of a GPU, per second
        # Sums of this process since the last logged step; float64 counts tokens exactly up to 2**53.
        self._sums = torch.zeros(len(SUMMED), dtype=torch.float64)
        self._step_sums = torch.zeros_like(self._sums)  # of the step that is being taken
        self._tokens, self._logged_step, self._logged_at = 0, 0, time.perf_counter()
        self._unchecked: tuple | None = None
        self._noted_step = 0
        self._unmeasured = False  # whether the base's held-out loss is still to be measured
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
        inputs["objective"] = self.settings.loss  # all of `inputs` are arguments of OuroForCausalLM.forward
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
        """Checks the numbers fetched last, mostly of the step before: the GPU has the next one to do meanwhile.

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
        step, now, model = self.state.global_step, time.perf_counter(), self.accelerator.unwrap_model(self.model)
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
            "padded_tokens_per_second": round(padded / spent, 1),  # the padding is computed too
            "memory_gib": round(peak_memory(model) / 2**30, 2) if torch.cuda.is_available() else 0,
        }
        if self.flops:
            s, config = self.settings, model.config
            heads = s.total_ut_steps if s.loss == "all" else 1  # loops whose logits are formed
            done = training_flops(config, s.total_ut_steps, s.r, seen, pairs, heads * trained)
            logs["model_flop_use"] = round(done / spent / (self.flops * WORLD_SIZE), 4)
        self._sums, self._logged_step = torch.zeros_like(self._sums), step
        self._watch(step, rate)
        if self.held_out is not None and (step % self.settings.eval_steps == 0 or step == self.state.max_steps):
            logs |= {f"{LOOP}{i}": loss for i, loss in enumerate(self.held_out_loss(), 1)}
        self._logged_at = time.perf_counter()
        super().log(logs, start_time)

    def _watch(self, step: int, rate: float) -> None:
        """Warns of a machine that has become slow."""
        if step <= 50 or not self._rates:
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
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        batch, count = self.args.per_device_train_batch_size, len(self.held_out)
        sums = torch.zeros(self.settings.total_ut_steps + 1, dtype=torch.float64, device=self.args.device)
        for at in range(0, count, batch * WORLD_SIZE):
            rows = range(count)[at : at + batch * WORLD_SIZE][RANK::WORLD_SIZE]
            # With fsdp all processes take part in each pass: one without a row left makes it with the first, uncounted.
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
        sums = self.accelerator.reduce(self._sums.to(self.args.device)).tolist()
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
                # Those of this name and newer ones are damaged: the run would have continued from them.
                for damaged in [other for other in checkpoints(folder) if step_of(other) >= step]:
                    set_aside(damaged)
                os.rename(staging / f"checkpoint-{step}", folder / f"checkpoint-{step}")
                shutil.rmtree(staging, ignore_errors=True)
                sync_folder(folder)
                for other in checkpoints(folder)[self.settings.save_total_limit :]:
                    remove(other)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        since_log = 0.0  # seconds from the last logged step to the checkpoint
        if resume_from_checkpoint and holds_all_steps(Path(resume_from_checkpoint)):
            self._load_from_checkpoint(resume_from_checkpoint)  # all that is left is to write the adapter
            return
        if resume_from_checkpoint:
            progress = json.loads((Path(resume_from_checkpoint) / "progress.json").read_text())
            if RANK == 0:
                self._sums = torch.tensor(progress["sums"], dtype=torch.float64)
                self._sums[0] *= WORLD_SIZE / progress["processes"]  # the loss is logged as a mean over processes
            self._tokens, self._logged_step = progress["tokens"], progress["logged_step"]
            self._recent.extend(progress["recent"])
            self._rates, since_log = progress["rates"], progress["since_log"]
        self._unmeasured = self.held_out is not None and not resume_from_checkpoint
        self._logged_at = time.perf_counter() - since_log
        try:
            super().train(resume_from_checkpoint=resume_from_checkpoint)
        except UnpicklingError:  # torch.load reads no code; its own message tells how to run it
            raise UserError(
                f"{resume_from_checkpoint} holds what no training writes: delete it, or --overwrite"
            ) from None
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


class Metrics(TrainerCallback):
    """One line a logging step: to metrics.jsonl for programs, to the terminal for people."""

    def __init__(self, path: Path, eval_steps: int):
        self.path, self.eval_steps = path, eval_steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        # Also logged: the last step, and each that the held-out loss is due in, whatever logging_steps is.
        if state.global_step == state.max_steps or (self.eval_steps and state.global_step % self.eval_steps == 0):
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        line = {"step": state.global_step} | {name: x for name, x in logs.items() if not name.startswith(LOOP)}
        if losses := [x for name, x in logs.items() if name.startswith(LOOP)]:
            line["held_out_loss"] = losses
        with open(self.path, "a", encoding="utf-8") as file:  # not synced: the GPU would wait; a checkpoint does it
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
    """Copies the adapters to where lora.py's groups read them: after a checkpoint was read, and after each step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        refresh(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        refresh(model)
