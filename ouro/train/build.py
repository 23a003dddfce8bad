"""The model to train, on this machine's device."""

import os
from pathlib import Path

from ouro.files import UserError
from ouro.model.cost import layers_to_recompute
from ouro.model.graphs import replay_layers, replay_loops
from ouro.model.loading import frozen_kind, has_fp8, load_run_model
from ouro.model.modeling_ouro import PROJECTIONS, compiling
from ouro.settings import Settings
from ouro.train.processes import WORLD_SIZE

import torch
from peft import LoraConfig, PeftModel
from torch._inductor.async_compile import AsyncCompile
from transformers import set_seed


def check_frozen(s: Settings) -> None:
    """Raises UserError where fp8 is asked for with settings, or on a machine, that it is not for."""
    if s.frozen_weights == "auto":
        return
    if s.use_qlora or s.use_dora or s.fsdp or not s.bf16:
        raise UserError("frozen_weights: fp8 is for bf16 LoRA: it needs use_qlora, use_dora, fsdp false and bf16 true")
    if not has_fp8():
        raise UserError("frozen_weights: fp8 needs a Hopper GPU (H100, H200) or a later one; set it to auto")


def build(s: Settings, device: str | int) -> PeftModel:
    """The model to train: frozen weights, new adapters, layers that compute together, are recomputed, are compiled.

    Raises:
        UserError: no such model, or one that this machine cannot train as the settings say.
    """
    if s.deterministic:  # without warn_only=True, under which attention's backward pass would sum in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only finds reads of it
    check_frozen(s)
    sharded = s.fsdp and WORLD_SIZE > 1
    compiled = s.torch_compile and device != "cpu" and not sharded  # FSDP2's hooks would break the layers' graph
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(s.cache_dir).resolve() / "compiled"))
        AsyncCompile.warm_pool()  # the compiler's processes take ten seconds to start: while the model is loaded
    free = None if device == "cpu" else torch.cuda.mem_get_info()[0]
    set_seed(s.seed)  # the trainer does so only after the adapter's first weights were drawn
    lora = LoraConfig(
        r=s.r,
        lora_alpha=s.lora_alpha,
        lora_dropout=s.lora_dropout,
        use_rslora=s.use_rslora,
        use_dora=s.use_dora,
        target_modules=PROJECTIONS,  # by name: "all-linear" would adapt the exit gate
        task_type="CAUSAL_LM",
    )
    # FSDP2 shares out PEFT's own layers: a group would keep its projections whole.
    adapted = load_run_model(s, lora, device=device, total_ut_steps=s.total_ut_steps, fused=not sharded)
    adapted.enable_input_require_grads()  # else the first layer were a graph of its own, and compiled twice
    model = adapted.get_base_model()
    count = layers_to_recompute(s, model.config, free, compiled)
    model.recompute_layers(count)
    if compiled:
        model.compile_layers(one_size=s.packing)
        if s.packing and s.bf16 and not s.use_dora:  # all batches have one size
            if not count:
                replay_loops(adapted)
            elif frozen_kind(s) == "nf4":
                replay_layers(adapted, s.per_device_train_batch_size * s.max_length, **compiling(one_size=True))
    return adapted
