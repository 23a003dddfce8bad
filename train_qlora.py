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
import os
import sys
import traceback
from pathlib import Path

from ouro.data.sources import check_places
from ouro.evaluate.benchmarks import named, table
from ouro.files import UserError, call, check_writable, explain, read_json, write_json
from ouro.settings import Resolved, Settings, resolve
from ouro.train.time_limit import time_limit


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="delete a run of this name and train it again")
    parser.add_argument(
        "--resume", choices=("auto", "never"), default="auto", help="never: refuse a run that has checkpoints already"
    )
    parser.add_argument(
        "--time_limit", type=time_limit, help="stop, saved, after this: seconds, HH:MM:SS, D-HH:MM:SS (exit code 75)"
    )


def check_files(s: Settings) -> None:
    """Raises UserError: a file that the settings name is not there, a table of rows cannot be read, or output_dir not
    be written."""
    check_writable("output_dir", s.output_dir)
    tasks = named(s.tasks, table()["tasks"], "task")
    check_places(s, tasks)  # of what is scored too: else evaluation would find out, after the training


def command() -> Resolved:
    """What is asked for. Raises UserError: a mistake in it, or as `check_files`."""
    run = resolve(__doc__, add_options=options)
    check_files(run.settings)
    return run


ASKED: list[Resolved] = []  # read once: --config may be a pipe
if __name__ == "__main__" and "RANK" not in os.environ:  # where a launcher has set it, one process tells, after imports
    call(lambda: ASKED.append(command()), last=False)  # tells a mistake before ten seconds of imports

from ouro.data.batches import Rows
from ouro.data.cache import NoSplit, prepare
from ouro.data.report import print_report, save_report
from ouro.model.cost import Memory, matrix_rate
from ouro.model.loading import load_tokenizer, sizes, warn_of_depth
from ouro.train import processes
from ouro.train.build import build, check_frozen
from ouro.train.loggers import check_logger, continue_tensorboard, start_logger
from ouro.train.machine import (
    capture_graphs,
    check_device,
    plan_steps,
    shard_frozen_weights,
    trainer_arguments,
    unused,
)
from ouro.train.processes import LOCAL_RANK, RANK, WORLD_SIZE, among_others, leave, print0, speaks, wait_for_data
from ouro.train.run_folder import (
    changed_inputs,
    claim,
    continue_from,
    hold,
    in_short,
    inputs,
    manifest,
    save_adapter,
    step_of,
    with_rate,
)
from ouro.train.stopping import STOPPED, Stopped, Stopper
from ouro.train.trainer import Guards, LoopTrainer, Metrics

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig


def check(run: Resolved, folder: Path) -> tuple[str | int, SFTConfig]:
    """Refuses what would waste the run, before anything is read or written; the device and TRL's arguments."""
    s = run.settings
    check_files(s)
    device = check_device(s)
    check_frozen(s)
    arguments = trainer_arguments(run, folder, use_cpu=device == "cpu")
    check_logger(s)
    return device, arguments


def print_settings(run: Resolved, folder: Path, device: str | int) -> None:
    s = run.settings
    print0(f"run {run.run} -> {folder}, {WORLD_SIZE} process{'es' * (WORLD_SIZE > 1)}")
    given = {name: value for name, value in vars(s).items() if run.origins[name] != "default"}
    for name, value in given.items():
        told = f"of {', '.join(value)}" if isinstance(value, dict) else str(value)
        print0(f"  {name:<28} {told:<32} {run.origins[name]}")
    print0(f"  the other {len(vars(s)) - len(given)} settings are defaults; all stand in config.yaml there")
    warn_of_depth(s.total_ut_steps, sizes(s).total_ut_steps)
    for line in unused(s, device):
        print0(line)


def load_data(s: Settings) -> tuple[PreTrainedTokenizerBase, Rows, tuple[Rows, list[int]] | None, dict]:
    """The tokenizer, the rows to train, those that the held-out loss is measured on, and the data report."""
    tokenizer = load_tokenizer(s.model_name_or_path, s.model_revision, s.max_length)
    rows, report = prepare(s, tokenizer, builder=LOCAL_RANK == 0, quiet=RANK > 0, wait=wait_for_data)
    return tokenizer, rows, held_out_rows(s, tokenizer) if s.eval_steps else None, report


def held_out_rows(s: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, list[int]] | None:
    """The held-out rows, and the numbers of `eval_rows` of them, evenly spaced; None if there are none."""
    split = "development" if s.development else "held_out"
    try:
        rows, _ = prepare(s, tokenizer, split, builder=LOCAL_RANK == 0, quiet=RANK > 0, wait=wait_for_data)
        why = "its held-out part has no rows"
    except NoSplit as error:
        rows, why = (), str(error)
    if not len(rows):
        print0(f"no held-out loss: {why}")
        return None
    count = min(s.eval_rows, len(rows))
    return rows, [i * len(rows) // count for i in range(count)]


def build_model(s: Settings, device: str | int, memory: Memory) -> tuple[PeftModel, float | None]:
    """The model, and the GPU's rate of bf16 products in FLOP/s (None if that is not used)."""
    try:
        model = build(s, device, memory)
        flops = matrix_rate(device) if s.bf16 and device != "cpu" else None
    except torch.OutOfMemoryError as error:
        raise UserError(f"{in_short(error)}: does another process use this GPU (nvidia-smi)?") from None
    return model, flops


def train(run: Resolved) -> Path:
    """Runs the experiment, or the rest of it, and gives its folder.
    Raises UserError: anything in the settings, the data, the machine or the folder that would waste the run; Stopped: a
    signal or the time limit ended it after a checkpoint."""
    s, folder = run.settings, Path(run.settings.output_dir) / run.run
    device, arguments = check(run, folder)
    print_settings(run, folder, device)
    tokenizer, rows, held_out, report = load_data(s)
    with hold(folder):
        state = claim(folder, run)
        if state == "complete":
            print0(f"{folder} is complete already; --overwrite trains it again")
            if RANK == 0 and (changed := changed_inputs(read_json(folder / "manifest.json"), inputs(s, report))):
                print0(f"  it was trained on {changed}")
            return folder
        begun = state != "new"
        if RANK == 0:
            print_report(report, rows=1)
            if begun:
                continue_from(state, s, report)
            save_report(folder / "data_report.json", report)
        start_logger(run, folder)
        before = read_json(folder / "manifest.json") if begun else None
        steps, memory, planned = plan_steps(s, rows, device, before)
        model, flops = build_model(s, device, memory)
        if RANK == 0:
            record = with_rate(before, flops) if begun else manifest(run, model, report, flops, planned)
            write_json(folder / "manifest.json", record)

        stopper = Stopper(run.options.time_limit)
        trainer = LoopTrainer(
            model=model,
            settings=s,
            held_out=held_out,
            flops=flops,
            stopper=stopper,
            args=arguments,
            train_dataset=steps,
            processing_class=tokenizer,
            callbacks=[Metrics(folder / "metrics.jsonl", s.eval_steps if held_out else 0)],
        )
        trainer.add_callback(Guards(trainer))
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        if begun and s.report_to == "tensorboard":
            continue_tensorboard(trainer, folder, step_of(state))
        trained, total = trainer.model.get_nb_trainable_parameters()
        print0(f"model: {s.model_name_or_path}, {s.total_ut_steps} loops, {trained:,} trained of {total:,} parameters")
        if s.fsdp and WORLD_SIZE > 1:
            shard_frozen_weights(trainer.model)

        capture_graphs(trainer.model, steps, s, folder, step_of(state) if begun else 0)
        trainer.train(resume_from_checkpoint=str(state) if begun else None)
        if trainer.state.global_step < trainer.state.max_steps:
            raise Stopped(f"{stopper.why}: stopped after step {trainer.state.global_step}, which is saved")
        if RANK == 0:
            save_adapter(trainer.model, tokenizer, folder, run, report)
        PartialState().wait_for_everyone()  # no process leaves while another may still need it
    return folder


def main() -> None:
    processes.check_launcher()
    overwrite = False
    try:
        run = ASKED.pop() if ASKED else resolve(__doc__, add_options=options)
        overwrite = run.options.overwrite
        train(run)
    except Stopped as stopped:
        if RANK == 0:
            overwriting = " without --overwrite" * overwrite
            print(f"{stopped}; the same command{overwriting} continues (exit code {STOPPED})")
        leave(STOPPED)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and RANK == 0:
            goes_on = "begins anew" if overwrite else "continues from its last checkpoint, if it has one"
            print(f"\ninterrupted; the same command {goes_on}", file=sys.stderr)
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
