"""The model to train, on this machine's device."""

import os
from pathlib import Path

from ouro.files import UserError
from ouro.model.cost import layers_to_recompute
from ouro.model.graphs import replay_layers, replay_loops
from ouro.model.loading import load_ouro
from ouro.model.lora import fuse
from ouro.model.modeling_ouro import PROJECTIONS, compiling
from ouro.settings import Settings
from ouro.train.processes import WORLD_SIZE

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch._inductor.async_compile import AsyncCompile
from transformers import set_seed


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
