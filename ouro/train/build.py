"""The model to train, on this machine's device."""

import os
from pathlib import Path

from ouro.files import UserError
from ouro.model.cost import Memory
from ouro.model.graphs import run_by_plan
from ouro.model.loading import has_fp8, load_run_model
from ouro.model.modeling_ouro import PROJECTIONS
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


def is_compiled(s: Settings, device: str | int) -> bool:
    """Whether the layers are: with fsdp its hooks would break their graph."""
    return s.torch_compile and device != "cpu" and not (s.fsdp and WORLD_SIZE > 1)


def build(s: Settings, device: str | int, memory: Memory) -> PeftModel:
    """The model to train: frozen weights, new adapters, layers that compute together, are compiled, and run by the
    plans of `memory`.
    Raises UserError: no such model, or one that this machine cannot train as the settings say."""
    if s.deterministic:  # without warn_only=True, under which attention's backward pass would sum in any order
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # takes time, and helps only to find reads of it
    sharded = s.fsdp and WORLD_SIZE > 1
    compiled = is_compiled(s, device)
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(s.cache_dir).resolve() / "compiled"))
        AsyncCompile.warm_pool()  # the compiler's processes take ten seconds to start: while the model is loaded
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
    adapted.enable_input_require_grads()  # else the first layer would be another graph, and be compiled apart
    model = adapted.get_base_model()
    if compiled:
        model.compile_layers(one_size=True)
    if sharded or s.use_dora:  # PEFT's own layers
        plan = memory.plan(memory.largest)
        model.recompute_layers(plan.recomputed // s.total_ut_steps)
    else:
        run_by_plan(adapted, memory.plan, memory.largest, last=s.loss == "last", graphs=compiled)
    return adapted
