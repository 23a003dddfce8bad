"""What the settings ask of this machine: a device that can do it, TRL's arguments, memory, shares of several GPUs."""

import dataclasses
import math
import os
import platform
import shutil
import sys
import sysconfig
from functools import cache, partial
from pathlib import Path

from ouro.data.batches import Pass, Rows, Steps
from ouro.files import Progress, UserError, quoted
from ouro.model.cost import Memory, Plan, pass_flops, passes_for
from ouro.model.loading import sizes
from ouro.settings import FROM_ENVIRONMENT, Resolved, Settings
from ouro.train.build import is_compiled
from ouro.train.collate import collate
from ouro.train.processes import LOCAL_RANK, LOCAL_WORLD_SIZE, RANK, WORLD_SIZE, print0
from ouro.train.run_folder import ANEW, out_of_memory

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl import SFTConfig

PINNED = 0.5  # share of the CPU's free memory that layers' inputs may wait in (graphs.py)


def check_device(s: Settings) -> str | int:
    """The device of this process; a machine that cannot run these settings is refused here, not an hour later.
    Raises UserError: bf16 without a GPU that computes in it, more processes than GPUs, or nothing to compile with."""
    if not torch.cuda.is_available():
        if s.bf16:
            raise UserError(
                "no CUDA GPU found, and the settings ask for bf16; on a CPU use --config configs/smoke.yaml "
                "(on a GPU machine: does `nvidia-smi` work, and does the driver fit CUDA 12.6?)"
            )
        # Process 1 would get the device cpu:1 from accelerate, which torch.load refuses when a run is continued.
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        return "cpu"
    count, processes = torch.cuda.device_count(), max(LOCAL_WORLD_SIZE, LOCAL_RANK + 1)
    if count < processes:
        raise UserError(f"{processes} processes on {platform.node()} and {count} GPUs: start one for each GPU")
    torch.cuda.set_device(LOCAL_RANK)
    if s.bf16 and torch.cuda.get_device_capability()[0] < 8:
        raise UserError(f"{torch.cuda.get_device_name()} has no bfloat16 (Ampere and later have): set --bf16 false")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if s.torch_compile and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UserError("torch_compile needs a C compiler: apt-get install gcc, `module load gcc`, or set it to false")
    if s.torch_compile and not header.exists():
        raise UserError(f"torch_compile needs {header}: apt-get install python3-dev, or set it to false")
    return LOCAL_RANK


def unused(s: Settings, device: str | int) -> list[str]:
    """A line for each setting that has no effect here, and for GPUs that are idle."""
    lines = []
    if s.fsdp and WORLD_SIZE == 1:
        lines.append("fsdp: true does nothing with one process")
    if s.fsdp and WORLD_SIZE > 1 and s.torch_compile and device != "cpu":
        lines.append("torch_compile: true does nothing with fsdp")
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if (idle := count - (LOCAL_WORLD_SIZE or WORLD_SIZE)) > 0:
        names = ("CONFIG", *map(str.upper, FROM_ENVIRONMENT))  # make gives these so
        given = [f"{name}={quoted(os.environ[name])}" for name in names if os.environ.get(name)]
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        command = " ".join([*given, *map(quoted, [*start, *sys.argv])])
        lines.append(f"{idle} of the {count} GPUs here {'is' if idle == 1 else 'are'} idle; all of them: {command}")
    return lines


def trainer_arguments(run: Resolved, folder: Path, use_cpu: bool) -> SFTConfig:
    """The settings as TRL's own."""
    s = run.settings  # `same`: the settings whose names and meanings are TRL's
    same = ("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type")
    same += ("warmup_ratio", "weight_decay", "optim", "bf16", "seed", "logging_steps", "save_steps", "report_to")
    arguments = SFTConfig(
        **{name: getattr(s, name) for name in same},
        output_dir=str(folder),
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised and masked already
        max_length=None,
        per_device_train_batch_size=1,  # an item of the data loader is this process's share of a step
        gradient_accumulation_steps=1,
        max_grad_norm=s.max_grad_norm or math.inf,  # with 0 no norm is computed, and the guards watch it
        gradient_checkpointing=False,  # `build` has seen to it, layer by layer
        use_cpu=use_cpu,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        label_names=["labels"],
        remove_unused_columns=False,  # the rows are documents, not columns
        run_name=run.run,
        save_strategy="steps",
        logging_dir=str(folder / "tensorboard"),
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # the frozen weights are buffers, the same in each process
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several GPUs, transformers would make nn.DataParallel
    return arguments


def shard_frozen_weights(model: PeftModel) -> None:
    """Leaves each process its share of the layers' frozen projections; a layer is whole only while it runs (FSDP2).

    The adapter is left to DDP, and so are optimizer, checkpoints and exact resume. The numbers stay the same bits,
    except that with a loss of several loops FSDP2's hooks change the order in which a loop's gradients are summed."""
    decoder = model.get_base_model().model
    mesh = init_device_mesh(model.device.type, (WORLD_SIZE,))
    for module in decoder.modules():
        if isinstance(module, Linear4bit):  # FSDP2 takes floating-point parameters only: the same bytes, called fp32
            module.weight.data = module.weight.data.flatten().view(torch.float32)[:, None]
            module.weight.quant_storage = module.quant_storage = torch.float32
    for layer in decoder.layers:
        whole = {p for p in layer.parameters() if p.requires_grad or p.dim() < 2}  # adapter and norms
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    # A root without weights of its own: FSDP2 would keep a root's weights whole after the forward pass.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
    shares = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shares)


def free_memory() -> float:
    """Bytes of the CPU's memory that are free here; in a Slurm job not more than the job may have."""
    free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    return min(free, int(os.environ.get("SLURM_MEM_PER_NODE") or 0) * 2**20 or free)


def host_memory() -> float:
    """Bytes of the CPU's memory that this process may pin for waiting states: PINNED of an equal share of what is
    free."""
    return PINNED * free_memory() / (LOCAL_WORLD_SIZE or 1)


def last_step(s: Settings, steps: Steps) -> int:
    """How many steps the run has, over all epochs."""
    return s.max_steps if s.max_steps > 0 else math.ceil(s.num_train_epochs * len(steps))


def plan_steps(s: Settings, rows: Rows, device: str | int, before: dict | None = None) -> tuple[Steps, Memory, dict]:
    """The run's steps with this process's share of them, the estimate of their memory, and for manifest.json what was
    planned, which is printed, too.

    before: manifest.json of a run that is continued, which goes on with the same kind of passes, for the same bytes.
    Raises UserError: the longest row does not fit."""
    config, free, host = sizes(s), None if device == "cpu" else torch.cuda.mem_get_info()[0], host_memory()
    config.total_ut_steps = s.total_ut_steps
    if WORLD_SIZE > 1:  # all processes must make the same passes
        least = torch.tensor([free or 0, host], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free, host = (free and least[0].item()), least[1].item()
    longest = int(rows.lengths.max(initial=1))
    memory = Memory(s, config, free, host, longest, compiled=is_compiled(s, device))
    anew = f", {ANEW}" if before else ""
    try:
        passes = passes_for(memory)
    except UserError as error:
        raise UserError(f"{error}{anew}") from None
    if before:
        passes = dataclasses.replace(passes, tokens=before["pass_tokens"], grain=before["pass_grain"])

    plan_of = cache(memory.plan_run)  # it is slow, and is asked for each pass

    def cost(each: Pass) -> float:
        return pass_flops(config, s, each, plan_of(each.tokens) or Plan())

    drawn = s.seed if s.lora_dropout else None
    # With fsdp all processes take part in each pass: a layer's weights are gathered from all of them.
    shared = cost, WORLD_SIZE, RANK, s.fsdp
    while True:
        steps = Steps(rows, s.rows_per_step, s.seed, passes, partial(collate, seed=drawn), *shared)
        shapes, padding = steps.shapes(0, last_step(s, steps))
        memory.largest, memory.shapes = max(passes.width(longest), passes.width(passes.tokens)), len(shapes)
        if memory.plan(memory.largest):
            break
        if passes.grain > longest:
            told = f"the graphs of {len(shapes)} shapes of passes leave too little memory: lower max_length"
            raise UserError(told + anew)
        passes = dataclasses.replace(passes, grain=2 * passes.grain)  # fewer widths have fewer graphs
    told = {"pass_tokens": passes.tokens, "pass_grain": passes.grain, "pass_shapes": len(shapes)}
    told["padding"] = round(padding, 4)
    print0(f"passes: of {passes.tokens:,} tokens where rows are shorter, {len(shapes)} shapes, {padding:.1%} padding")
    if free is None or not memory.compiled:
        return steps, memory, told
    told["plans"] = []
    for tokens in sorted({memory.largest, passes.tokens, *(n for n in (4096, 8192) if n < memory.largest)}):
        plan, gib = plan_of(tokens), round(memory.of(tokens, plan_of(tokens)) / 2**30, 1)
        told["plans"].append({"tokens": tokens, "estimated_gib": gib} | dataclasses.asdict(plan))
        waiting = f", the states of {plan.waiting} in the CPU's memory" if plan.waiting else ""
        print0(
            f"memory: a pass of {tokens:>6,} tokens computes {plan.recomputed} of {memory.calls} layer calls twice"
            f"{waiting}; estimate {gib} GiB of {free / 2**30:.1f} free"
        )
    return steps, memory, told


def capture_graphs(model: PeftModel, steps: Steps, s: Settings, folder: Path, first: int) -> None:
    """Captures the graphs for all shapes of pass in the steps from `first` on, before it is taken. The largest comes
    first, so that memory runs out at once or not at all. folder: the run's.
    Raises UserError: the GPU's memory ran out."""
    prepare = getattr(model.get_base_model().model, "prepare", None)
    if not prepare:
        return
    shapes, _ = steps.shapes(first, last_step(s, steps))
    made = []
    try:
        with Progress("the layers are compiled", len(shapes), "shapes") as progress:
            for shape in shapes:
                made.append(prepare(*shape, s.lora_dropout > 0))
                progress.update()
        with Progress("the layers are captured as CUDA graphs", len(made), "shapes") as progress:
            for captured in made:
                captured.capture()
                progress.update()
    except torch.OutOfMemoryError as error:
        what = f"passes of up to {shapes[0][0]} x {shapes[0][1]} tokens"
        raise out_of_memory(what, error, folder, s) from None
