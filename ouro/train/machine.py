"""What the settings ask of this machine: a device that can do it, TRL's arguments, memory, shares of several GPUs."""

import math
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from ouro.files import UserError
from ouro.model.cost import training_memory
from ouro.settings import Resolved, Settings
from ouro.train.processes import LOCAL_RANK, LOCAL_WORLD_SIZE, WORLD_SIZE, print0
from ouro.train.trainer import recomputed

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trl import SFTConfig


def check_device(s: Settings) -> str | int:
    """The device of this process; a machine that cannot run these settings is refused here, not an hour later.

    Raises:
        UserError: bf16 without a GPU that computes in it, more processes than GPUs, or nothing to compile with.
    """
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
    """What is set or there, and does nothing."""
    lines = []
    if s.fsdp and WORLD_SIZE == 1:
        lines.append("fsdp: true does nothing with one process")
    if s.fsdp and WORLD_SIZE > 1 and s.torch_compile and device != "cpu":
        lines.append("torch_compile: true does nothing with fsdp")
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if (idle := count - (LOCAL_WORLD_SIZE or WORLD_SIZE)) > 0:
        command = shlex.join(["torchrun", "--nproc_per_node", str(count), *sys.argv])
        lines.append(f"{idle} of the {count} GPUs here {'is' if idle == 1 else 'are'} idle; all of them: {command}")
    return lines


def trainer_arguments(run: Resolved, folder: Path, use_cpu: bool) -> SFTConfig:
    """The settings as TRL's own."""
    s = run.settings  # `same`: the settings whose names and meanings are TRL's
    same = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type")
    same += ("warmup_ratio", "weight_decay", "optim", "bf16", "seed", "logging_steps", "save_steps", "report_to")
    arguments = SFTConfig(
        **{name: getattr(s, name) for name in same},
        output_dir=str(folder),
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised and masked already
        max_length=None,
        gradient_accumulation_steps=s.gradient_accumulation_steps // WORLD_SIZE,
        max_grad_norm=s.max_grad_norm or math.inf,  # with 0 no norm is computed, and the guards watch it
        gradient_checkpointing=False,  # `build` has seen to it, layer by layer
        use_cpu=use_cpu,
        accelerator_config={"non_blocking": not use_cpu},  # batches need not wait for the GPU on their way to it
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
    # A root without weights of its own: FSDP2 would keep a root's weights whole after the forward pass.
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
    shares = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shares)


def planned_memory(s: Settings, model: PeftModel, free: int | None) -> dict:
    """Layers recomputed and, for a GPU that had so many bytes free, GiB estimated at the peak; printed, too."""
    layers, gib = model.get_base_model().model.layers, None
    count, text = recomputed(layers), ""
    if free and s.torch_compile and not (s.fsdp and WORLD_SIZE > 1):  # the estimate is of compiled layers
        gib = round(training_memory(s, model.config, count) / 2**30, 1)
        text = f"; estimate {gib} GiB of {free / 2**30:.1f} free"
    print0(f"memory: {count} of {len(layers)} layers recomputed{text}")
    return {"recomputed_layers": count, "estimated_gib": gib}
