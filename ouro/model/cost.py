"""What a model costs, counted: floating-point operations and bytes of memory; and which layers to recompute.

Operations are counted here alone: of a token that is read (forward_flops), of training (training_flops).
"""

import statistics
from pathlib import Path

from ouro.files import UserError
from ouro.model.modeling_ouro import CHUNK, OuroConfig, OuroForCausalLM
from ouro.settings import Settings

import torch
from transformers import PreTrainedModel

# Dense bf16 TFLOP/s with fp32 accumulation and GiB, by the makers' data sheets.
GPUS = {
    "RTX3080": (59.5, 10),
    "RTX3090": (71, 24),
    "RTX4090": (165, 24),
    "A100": (312, 80),
    "H100": (989, 80),
    "H200": (989, 141),
}
HOPPER = ("H100", "H200")
# Of those TFLOP/s, what training reached on an H200 with everything it computes counted, recomputed layers too:
# `bench.py train`, rows "bf16, dropout" (388 of 989) and "nf4" (batch 3: 361 of 989). With fp8 it is faster than bf16.
REACHED = {"bf16": 0.39, "nf4": 0.36}


def sizes(s: Settings) -> OuroConfig:
    """Of the settings' model if that is a folder, else of Ouro-2.6B."""
    folder = Path(s.model_name_or_path)
    try:
        return OuroConfig.from_pretrained(folder) if folder.is_dir() else OuroConfig()
    except OSError as error:
        raise UserError(f"no model in {folder}: {' '.join(str(error).split())}") from None


def product_sizes(config: OuroConfig) -> list[tuple[int, int]]:
    """(in, out) of the seven projections of a layer."""
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    return (
        [(hidden, inner)] * 3
        + [(inner, hidden)]
        + [(hidden, config.intermediate_size)] * 2
        + [(config.intermediate_size, hidden)]
    )


def layer_weights(config: OuroConfig) -> int:
    """Numbers in the seven projections of a layer."""
    return sum(i * o for i, o in product_sizes(config))


def forward_flops(model: PreTrainedModel, depth: int) -> int:
    """Floating-point operations of a token's products, attention's own not counted: two a weight."""
    config = model.config
    head = config.hidden_size * config.vocab_size
    if isinstance(model, OuroForCausalLM):
        return 2 * (depth * config.num_hidden_layers * layer_weights(config) + head)
    return 2 * (model.num_parameters(exclude_embeddings=True) + head)


def training_flops(config: OuroConfig, loops: int, rank: int, tokens: float, pairs: float, trained: float) -> float:
    """Floating-point operations of forward and backward pass, recomputation not counted.

    tokens: run through the layers; pairs: of a token and one it attends to, n (n + 1) / 2 for a document of n tokens;
    trained: tokens whose logits are formed. Frozen weights have no gradient, so each of their products costs 2
    operations a weight forward and 2 backward; LoRA's 2 and 4; attention 4 a pair and inner size forward and, its
    scores computed again, 10 backward (Dao 2023, FlashAttention-2, section 4.1, which counts 2.5 times the forward).
    """
    layer = 4 * layer_weights(config) + 6 * rank * sum(i + o for i, o in product_sizes(config))
    attention = 3.5 * 4 * config.num_attention_heads * config.head_dim
    head = 4 * config.hidden_size * config.vocab_size
    return loops * config.num_hidden_layers * (tokens * layer + pairs * attention) + trained * head


def matrix_rate(device: str | int) -> float:
    """FLOP/s of bf16 products of 8192 x 8192 on this GPU: the rate that model-FLOP use is a share of."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    spent = []
    with torch.cuda.device_of(a):  # events are recorded on the current GPU
        for _ in range(8):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            torch.mm(a, b, out=out)
            end.record()
            end.synchronize()
            spent.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(spent[2:])


def training_memory(s: Settings, config: OuroConfig, recomputed: int) -> float:
    """Bytes allocated on the GPU at the peak of training: the longest batch, layers compiled, `recomputed` of them.

    Counted: weights, adapters with gradients and optimizer, what the layers keep for the backward pass, and the larger
    of two: what one recomputed layer takes, and what the loss takes. Where layers replay graphs (graphs.py) it is their
    sum and a little more, because graphs keep their memory. Compared with measured peaks in `bench.py train`.
    """
    sizes, hidden, layers = product_sizes(config), config.hidden_size, config.num_hidden_layers
    number = 2 if s.bf16 else 4
    tokens = s.per_device_train_batch_size * s.max_length
    weight = 0.5 + ((1 + 4 / 256) if s.bnb_4bit_use_double_quant else 4) / 64 if s.use_qlora else number
    weights = layers * weight * sum(i * o for i, o in sizes) + 2 * number * config.vocab_size * hidden
    # of each adapter parameter: itself, its gradient, its copy, and the optimizer's two numbers
    adapters = layers * s.r * sum(i + o for i, o in sizes) * (4 + 4 + number + (2 if "8bit" in s.optim else 8))
    inner = config.num_attention_heads * config.head_dim
    # input and output of the norms around either sub-layer; q, k, v, attention's output and its copy; gate, up, product
    inside = (5 * hidden + 5 * inner + 3 * config.intermediate_size) * number * tokens
    if s.lora_dropout:  # of each input of LoRA a byte of mask and, as measured, itself after dropout
        inside += (2 * hidden + inner + config.intermediate_size) * (1 + number) * tokens
    state = hidden * number * tokens
    kept = s.total_ut_steps * ((layers - recomputed) * inside + recomputed * state)
    loss = 2 * CHUNK * config.vocab_size * number + 2 * state
    if s.use_qlora and s.packing and s.torch_compile and recomputed:
        decoded = 2 * hidden * config.intermediate_size * number  # gate and up
        return weights + adapters + kept + loss + 2.4 * inside + 4 * decoded  # as measured
    if s.packing and s.torch_compile and s.bf16 and not recomputed:
        kept *= 1.03  # what the pool of the graphs cannot use, as measured
    return weights + adapters + kept + max(inside if recomputed else 0, loss)


def layers_to_recompute(s: Settings, config: OuroConfig, free: float | None, compiled: bool = True) -> int:
    """How many layers the setting activation_checkpointing means, with so many bytes of GPU memory free (None: no GPU).

    Raises:
        UserError: more layers than there are, or, for `auto`, too little memory even with all layers recomputed.
    """
    layers, asked = config.num_hidden_layers, s.activation_checkpointing
    if asked == "auto" and (free is None or not compiled):
        asked = "none" if free is None else "full"  # the estimate is of compiled layers
    if asked in ("none", "full"):
        return {"none": 0, "full": layers}[asked]
    if asked != "auto":
        if int(asked) > layers:
            raise UserError(f"activation_checkpointing = {asked}, and the model has {layers} layers")
        return int(asked)
    usable = 0.92 * free  # the rest is what the allocator loses, and the libraries' own
    for count in range(layers + 1):
        if training_memory(s, config, count) <= usable:
            return count
    need = training_memory(s, config, layers) / 2**30
    raise UserError(
        f"about {need:.1f} GiB of GPU memory are needed, {usable / 2**30:.1f} GiB can be used; lower max_length "
        f"({s.max_length}) or per_device_train_batch_size ({s.per_device_train_batch_size}), or set use_qlora"
    )


def check_share(s: Settings, count: int) -> None:
    """Raises UserError where so many processes cannot share the forward passes of a step."""
    if s.gradient_accumulation_steps % count:
        raise UserError(
            f"gradient_accumulation_steps = {s.gradient_accumulation_steps} forward passes a step cannot be shared by "
            f"{count} processes; use a multiple"
        )
