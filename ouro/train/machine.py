"""What this machine does with the settings: its device, TRL's arguments, its memory, its share of a model."""

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
from ouro.train.processes import LOCAL_RANK, LOCAL_WORLD_SIZE, RANK, WORLD_SIZE
from ouro.train.trainer import recomputed

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_scheduler
from trl import SFTConfig, SFTTrainer


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
