"""One experiment: settings -> data -> model -> steps -> adapter.

    python train_qlora.py --config configs/smoke.yaml --max_steps 10 --report_to none     # CPU, embedded data, seconds
    python train_qlora.py --config configs/default.yaml --exp exp2-wangchan-ut1           # one 10 GB GPU, NF4
    torchrun --nproc_per_node 4 train_qlora.py --config configs/a100.yaml --exp exp1-wangchan-ut4

Any setting of settings.py can follow, as --name value. Writes OUTPUT_DIR/<experiment>/: config.yaml, manifest.json,
data_report.json, metrics.jsonl, final_adapter/ (PEFT format) and, last, `completed`. A run that is complete is not
repeated; --overwrite starts anew.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from settings import Resolved, Settings, UserError, call, resolve, write_atomic, write_json

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from batches import EpochOrder, Rows, collate
from data_config import load_tokenizer, prepare, print_report, save_report
from modeling_ouro import PROJECTIONS, load_ouro

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class LoopTrainer(SFTTrainer):
    """TRL's trainer around a looped model: our objective, no fp32 copies of frozen weights, exact token metrics."""

    def __init__(self, *args, objective: str, **kwargs):
        self.objective = objective
        self._counts = torch.zeros(3, dtype=torch.int64)  # correct, trained and all tokens since the last log
        self._tokens, self._logged_at = 0, None
        super().__init__(*args, **kwargs)

    def _prepare_peft_model(self, model: PreTrainedModel, peft_config: LoraConfig, args: SFTConfig) -> PeftModel:
        # TRL's own version casts embeddings, norms and head of a 4-bit model to fp32 (0.4 GB for 2.6B), and only on a
        # GPU: a CPU test would run another model. What is needed, frozen weights and fp32 adapters, PEFT does itself.
        return get_peft_model(model, peft_config)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The collator pads on the right, where causality hides padding: no mask, so no masked attention. In packed rows
        # position_ids tell the documents apart.
        real = inputs.pop("attention_mask").sum()
        inputs["objective"] = self.objective
        loss, outputs = super(SFTTrainer, self).compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if model.training:
            counts = torch.stack((outputs.correct_tokens, outputs.trained_tokens, real))
            self._counts = self._counts.to(counts.device) + counts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            correct, trained, seen = self.accelerator.reduce(self._counts).tolist()
            self._tokens += seen
            logs["mean_token_accuracy"] = round(correct / max(trained, 1), 4)
            logs["num_tokens"] = self._tokens
            logs["tokens_per_second"] = round(seen / (now - self._logged_at), 1)
            logs["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else 0
            self._counts, self._logged_at = torch.zeros_like(self._counts), now
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Rows | None = None) -> EpochOrder:
        rows = self.train_dataset if train_dataset is None else train_dataset
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * WORLD_SIZE
        return EpochOrder(rows.sizes, per_step, self.args.seed, grouped=rows.packs is None)

    def train(self, *args, **kwargs):
        self._logged_at = time.perf_counter()
        return super().train(*args, **kwargs)


class Metrics(TrainerCallback):
    """One line a logging step: to metrics.jsonl for programs, to the terminal for people."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            control.should_log = True  # the last step, also where logging_steps does not divide their number

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | logs) + "\n")
            file.flush()
            os.fsync(file.fileno())
        left = (time.perf_counter() - self.started) / state.global_step * (state.max_steps - state.global_step)
        print(
            f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"token accuracy {logs['mean_token_accuracy']:.3f}  lr {logs['learning_rate']:.2e}  "
            f"grad norm {logs.get('grad_norm', float('nan')):.3f}  {logs['tokens_per_second']:,.0f} tok/s  "
            f"left {timedelta(seconds=round(left))}",
            flush=True,
        )


def check_device(settings: Settings) -> str | int:
    """The device of this process; a machine that cannot run these settings is refused here, not an hour later.

    Raises:
        UserError: bf16 without a GPU that computes in it, or more processes than GPUs.
    """
    if not torch.cuda.is_available():
        if settings.bf16:
            raise UserError(
                "no CUDA GPU found, and the settings ask for bf16; on a CPU use --config configs/smoke.yaml "
                "(on a GPU machine: does `nvidia-smi` work, and does the driver fit CUDA 12.6?)"
            )
        return "cpu"
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(f"process {LOCAL_RANK} of this node has no GPU: only {torch.cuda.device_count()} found")
    torch.cuda.set_device(LOCAL_RANK)
    if settings.bf16 and torch.cuda.get_device_capability()[0] < 8:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16 (Ampere and later have): set --bf16 false")
    return LOCAL_RANK


def claim(folder: Path, run: Resolved, overwrite: bool) -> bool:
    """Makes `folder` this run's; False if the same run is complete there already.

    Raises:
        UserError: the folder holds something else: a run with other settings, which is neither continued nor counted
            as this one, or files that are no run.
    """
    config = folder / "config.yaml"
    if folder.exists() and any(folder.iterdir()):
        if not config.exists():
            raise UserError(f"{folder} holds files but no run (no config.yaml); use another --output_dir")
        recorded, asked = (yaml.safe_load(text) for text in (config.read_text(encoding="utf-8"), run.as_yaml()))
        names = sorted(name for name in recorded.keys() | asked.keys() if recorded.get(name) != asked.get(name))
        if names and not overwrite:
            differences = "".join(f"\n  {n}: {recorded.get(n)!r} there, {asked.get(n)!r} asked" for n in names)
            raise UserError(
                f"{folder} holds a run with other settings:{differences}\n"
                "use another --output_dir or experiment, or --overwrite to delete that run"
            )
        if (folder / "completed").exists() and not overwrite:
            return False
        if RANK == 0:
            print(f"deleting the {'' if (folder / 'completed').exists() else 'unfinished '}run in {folder}")
            shutil.rmtree(folder)
    if RANK == 0:
        write_atomic(config, run.as_yaml())
    return True


def manifest(run: Resolved, model: PreTrainedModel, report: dict) -> dict:
    """What is needed to repeat the run: code, versions, machine, revisions, seed."""

    def git(*args: str) -> str | None:
        """None outside a repository and without git, as in a container."""
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).resolve().parent)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain")
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "tokenizers")
    return {
        "run": run.run,
        "command": sys.argv,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processes": WORLD_SIZE,
        "model": run.settings.model_name_or_path,
        "model_commit": getattr(model.config, "_commit_hash", None),
        "tokenizer_sha256": report["tokenizer_sha256"],
        "data": report["source"],
        "data_revision": report["data_revision"],
        "seed": run.settings.seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def model_card(run: Resolved, report: dict, base: str, log: list[dict]) -> str:
    s = run.settings
    return f"""---
base_model: {base}
library_name: peft
language: th
tags: [lora, looped-transformer, ouro]
---
# {run.run}

A LoRA adapter (r {s.r}, alpha {s.lora_alpha}, the seven projections of every layer) for {base}, trained on Thai
instructions at `total_ut_steps = {s.total_ut_steps}` with `loss: {s.loss}`. Read it at that depth:
the base model must be loaded with `total_ut_steps={s.total_ut_steps}`.

| | |
|---|---|
| data | {report["dataset"]}: {report["rows_kept"]} rows, {report["trained_tokens"]} trained tokens per epoch |
| licence of the data | {", ".join(f"{name}: {count} rows" for name, count in report["licences"].items())} |
| frozen weights | {"NF4" if s.use_qlora else "bf16" if s.bf16 else "fp32"} |
| steps | {log[-1]["step"]} |
| loss, first and last logged | {log[0]["loss"]:.4f}, {log[-1]["loss"]:.4f} |

Settings: config.yaml of the run; a turn ends with `<|im_end|>` (id 2).
"""


def trainer_arguments(run: Resolved, folder: Path, use_cpu: bool) -> SFTConfig:
    """The settings as TRL's own.

    Raises:
        UserError: a value that transformers does not know, or a logger that is not installed.
    """
    s = run.settings
    if s.report_to != "none" and importlib.util.find_spec(s.report_to) is None:
        raise UserError(f"report_to = {s.report_to} needs the package {s.report_to}: it is not installed")
    try:
        return SFTConfig(
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
            max_grad_norm=s.max_grad_norm,
            optim=s.optim,
            gradient_checkpointing=s.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=s.bf16,
            use_cpu=use_cpu,
            seed=s.seed,
            logging_steps=s.logging_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a loss that is not a number must be seen
            label_names=["labels"],
            remove_unused_columns=False,  # the rows are documents, not columns
            report_to=s.report_to,
            run_name=run.run,
            save_strategy="no",
            ddp_find_unused_parameters=False,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def train(run: Resolved) -> Path:
    """Runs the experiment and gives its folder.

    Raises:
        UserError: anything in the settings, the data, the machine or the folder that would waste the run.
    """
    s, folder = run.settings, Path(run.settings.output_dir) / run.run
    if s.gradient_accumulation_steps % WORLD_SIZE:
        raise UserError(
            f"gradient_accumulation_steps = {s.gradient_accumulation_steps} forward passes a step cannot be shared by "
            f"{WORLD_SIZE} processes; use a multiple"
        )
    device = check_device(s)
    arguments = trainer_arguments(run, folder, use_cpu=device == "cpu")
    if RANK == 0:
        print(f"run {run.run} -> {folder}, {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}")
        for name, value in vars(s).items():
            print(f"  {name:<28} {str(value):<32} {run.origins[name]}")
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    rows, report = prepare(s, tokenizer, builder=LOCAL_RANK == 0, quiet=RANK > 0)
    with PartialState().main_process_first():  # the other ranks see what the first one left
        fresh = claim(folder, run, run.options.overwrite and RANK == 0)
    if not fresh:
        if RANK == 0:
            print(f"{folder} is complete already; --overwrite trains it again")
        return folder
    if RANK == 0:
        print_report(report, rows=1)
        save_report(folder / "data_report.json", report)

    try:
        model = load_ouro(
            s.model_name_or_path,
            s.model_revision,
            total_ut_steps=s.total_ut_steps,
            dtype=torch.bfloat16 if s.bf16 else torch.float32,
            nf4=s.use_qlora,
            double_quant=s.bnb_4bit_use_double_quant,
            device=device,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {s.model_name_or_path}: {error}") from None
    if RANK == 0:
        write_json(folder / "manifest.json", manifest(run, model, report))
    set_seed(s.seed)  # the trainer does so only after it has drawn the adapter's first weights
    trainer = LoopTrainer(
        model=model,
        objective=s.loss,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=s.r,
            lora_alpha=s.lora_alpha,
            lora_dropout=s.lora_dropout,
            target_modules=PROJECTIONS,  # by name: "all-linear" would adapt the exit gate
            task_type="CAUSAL_LM",
        ),
        callbacks=[Metrics(folder / "metrics.jsonl")],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if RANK == 0:
        trained, total = trainer.model.get_nb_trainable_parameters()
        print(f"model: {s.model_name_or_path}, {s.total_ut_steps} loops, {trained:,} trained of {total:,} parameters")
    trainer.train()

    if trainer.is_world_process_zero():
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        unfinished = folder / ".final_adapter"
        trainer.model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        write_atomic(unfinished / "README.md", model_card(run, report, s.model_name_or_path, log))
        os.replace(unfinished, folder / "final_adapter")
        write_json(folder / "completed", {"steps": log[-1]["step"], "loss": log[-1]["loss"]})
        print(f"adapter: {folder / 'final_adapter'}")
    return folder


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="delete a run of this name and train it again")


def main() -> None:
    try:
        train(resolve(__doc__, add_options=options))
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    call(main)
