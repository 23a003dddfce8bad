"""One experiment: settings -> data -> model -> steps -> adapter.

    python train_qlora.py --config configs/smoke.yaml --max_steps 10 --report_to none     # CPU, embedded data, seconds
    python train_qlora.py --config configs/default.yaml --exp exp2-wangchan-ut1           # one 10 GB GPU, NF4
    torchrun --nproc_per_node 4 train_qlora.py --config configs/a100.yaml --exp exp1-wangchan-ut4

Any setting of ouro/settings.py can follow, as --name value. Writes OUTPUT_DIR/<experiment>/: config.yaml,
manifest.json, data_report.json, metrics.jsonl, checkpoint-*/, final_adapter/ (PEFT format) and, last, `completed`.

The same command again continues an interrupted run from its newest good checkpoint, to the same bytes as if it had not
been interrupted; a complete one is not repeated; --overwrite starts anew. SIGTERM, SIGUSR1 and --time_limit finish the
step, save and exit with code 75: run it again. Any other failure is 1 or, with one message for the user, 2.
"""

import argparse
import json
import os
import shutil
import sys
import traceback
from functools import partial
from pathlib import Path

from ouro.data.cache import NoSplit, prepare
from ouro.data.report import print_report, save_report
from ouro.data.sources import entry_of
from ouro.evaluate.benchmarks import table, task_names
from ouro.files import UserError, call, explain, write_atomic, write_json
from ouro.model.cost import check_share, matrix_rate
from ouro.model.loading import load_tokenizer
from ouro.settings import Resolved, Settings, resolve
from ouro.train.build import build, check_frozen
from ouro.train.collate import collate
from ouro.train.loggers import check_logger, continue_tensorboard, start_logger
from ouro.train.machine import check_device, planned_memory, shard_frozen_weights, trainer_arguments, unused
from ouro.train.processes import LOCAL_RANK, RANK, REQUEUED, WORLD_SIZE, among_others, leave, speaks, wait_for_data
from ouro.train.run_folder import (
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
from ouro.train.stopping import STOPPED, Stopped, Stopper
from ouro.train.time_limit import time_limit
from ouro.train.trainer import LoopTrainer, Metrics, Refresh

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback


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
    check_frozen(s)
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


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="delete a run of this name and train it again")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: refuse a run that has checkpoints already"
    )
    parser.add_argument(
        "--time_limit", type=time_limit, help="stop, saved, after this: seconds, HH:MM:SS, D-HH:MM:SS (exit code 75)"
    )


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
