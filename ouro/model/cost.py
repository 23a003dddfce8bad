"""What a model costs: floating-point operations and bytes of GPU memory, both counted; and how passes fit in a memory.

All operations are counted here: of a token in scoring (forward_flops) and of training (training_flops).
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass

from ouro.data.batches import Pass, Passes
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
# Of those TFLOP/s, what training reached on an H200 with everything it computes counted, recomputed layers too, on rows
# of real lengths (docs/speed.md): bf16 at 4 loops 0.47, at 1 loop 0.46; NF4 0.33. With fp8 it is faster than bf16.
REACHED = {"bf16": 0.45, "nf4": 0.33}


@dataclass(frozen=True)
class Plan:
    """How a pass saves memory: its first `recomputed` layer calls are computed again in the backward pass, and of those
    the first `waiting` calls' inputs wait for it in the CPU's memory (graphs.py)."""

    recomputed: int = 0
    waiting: int = 0


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
    """Floating-point operations to read a token at a depth: two for each weight; attention's scores are not counted."""
    config = model.config
    head = config.hidden_size * config.vocab_size
    if isinstance(model, OuroForCausalLM):
        return 2 * (depth * config.num_hidden_layers * layer_weights(config) + head)
    output = model.get_output_embeddings().weight
    own = output is not model.get_input_embeddings().weight  # a head that is not the embedding is among the parameters
    return 2 * (model.num_parameters(exclude_embeddings=True) + head - own * output.numel())


def training_flops(config: OuroConfig, loops: int, rank: int, tokens: float, pairs: float, trained: float) -> float:
    """Floating-point operations of forward and backward pass, recomputation not counted.

    tokens: run through the layers; pairs: of a token and one it attends to, n (n + 1) / 2 for a document of n tokens;
    trained: tokens whose logits are formed. Frozen weights have no gradient, so each of their products costs 2
    operations a weight forward and 2 backward; LoRA's 2 and 4; attention 4 a pair and inner size forward and, its
    scores computed again, 10 backward (Dao 2023, FlashAttention-2, section 4.1, which counts 2.5 times the forward)."""
    layer = 4 * layer_weights(config) + 6 * rank * sum(i + o for i, o in product_sizes(config))
    attention = 3.5 * 4 * config.num_attention_heads * config.head_dim
    head = 4 * config.hidden_size * config.vocab_size
    return loops * config.num_hidden_layers * (tokens * layer + pairs * attention) + trained * head


def pass_flops(config: OuroConfig, s: Settings, each: Pass, plan: Plan) -> float:
    """What a pass costs, by which the passes of a step are shared out among processes: its operations, with padding and
    what is computed twice. Attention's count double, since it runs at about half the rate of the large products."""
    pairs = each.tokens * (each.width / (len(each.rows) if each.packed else 1)) / 2
    flops = training_flops(config, s.total_ut_steps, s.r, each.tokens, 2 * pairs, each.tokens / 2)
    return flops * (1 + 0.5 * plan.recomputed / (s.total_ut_steps * config.num_hidden_layers))


def matrix_rate(device: str | int) -> float:
    """FLOP/s of products of two 8192 x 8192 matrices in bf16, measured on this GPU: FLOP use is a share of it."""
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


@dataclass
class Memory:
    """An estimate of the bytes of GPU memory that training takes, by the tokens of a pass, and the plan by which a pass
    fits. `make bench WHAT=train` compares it with measured peaks.

    free: free bytes of the GPU's memory, None without a GPU; host: bytes of the CPU's memory for states that wait
    there; largest: tokens of the largest pass; shapes: how many shapes of pass there are, each with graphs of its own;
    compiled: whether the layers are compiled, as this estimate takes for granted."""

    s: Settings
    config: OuroConfig
    free: float | None
    host: float = 16 * 2**30
    largest: int = 0
    shapes: int = 0
    compiled: bool = True

    def __post_init__(self):
        self.shapes = self.shapes or (12 if self.s.use_qlora else 60)  # until the rows' own are known

    @property
    def calls(self) -> int:
        """Layer calls of a pass: each layer once in each loop."""
        return self.s.total_ut_steps * self.config.num_hidden_layers

    @property
    def by_layer(self) -> bool:
        """Whether PEFT's own layers compute: a layer is then computed twice in every loop or in none, in all passes
        alike, and no states wait."""
        return self.s.use_dora

    @property
    def number(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.s.bf16 else 4

    @property
    def inside(self) -> float:
        """Bytes a token that a layer call keeps for the backward pass: input and output of the norms around either
        sub-layer; q, k, v, attention's output and its copy; gate, up and their product."""
        c, inner = self.config, self.config.num_attention_heads * self.config.head_dim
        return 1.03 * self.number * (5 * c.hidden_size + 5 * inner + 3 * c.intermediate_size)

    @property
    def state(self) -> float:
        """Bytes a token of a layer call's input."""
        return self.number * self.config.hidden_size

    @property
    def slot(self) -> int:
        """Bytes of the CPU's memory that a waiting state takes; torch pins memory in powers of two."""
        return 2 ** math.ceil(math.log2(max(self.state * self.largest, 1)))

    def fixed(self) -> float:
        """Bytes that do not depend on the pass: weights, adapters, the graphs and their tensors, the loss."""
        s, c, sizes, number = self.s, self.config, product_sizes(self.config), self.number
        weight = 0.5 + ((1 + 4 / 256) if s.bnb_4bit_use_double_quant else 4) / 64 if s.use_qlora else number
        weights = (
            c.num_hidden_layers * weight * sum(i * o for i, o in sizes) + 2 * number * c.vocab_size * c.hidden_size
        )
        # For each adapter parameter: itself, its gradient and three of the graphs' in fp32, the group's copy, and the
        # optimizer's two numbers.
        adapter = 20 + number + (2 if "8bit" in s.optim else 8)
        adapters = c.num_hidden_layers * s.r * sum(i + o for i, o in sizes) * adapter
        read = 1 if s.loss == "last" else s.total_ut_steps
        loss = 2 * CHUNK * c.vocab_size * number + (3 + 2 * read) * self.state * self.largest
        graphs = self.shapes * GRAPH[s.use_qlora] * self.calls / 192 if self.compiled else 0
        held_out = self.inside * self.largest if s.eval_steps else 0  # held-out rows are read without graphs
        return weights + adapters + graphs + max(loss, held_out)

    def of(self, tokens: int, plan: Plan) -> float:
        """Bytes in use at the peak of a pass of so many tokens that runs by this plan."""
        kept = (self.calls - plan.recomputed) * self.inside * tokens
        states = (plan.recomputed - plan.waiting + (2 if plan.waiting else 0)) * self.state * tokens
        decoded = 4 * 2 * self.config.hidden_size * self.config.intermediate_size * self.number * self.s.use_qlora
        # While a call is computed again nothing of the later calls is left: the backward pass has freed it.
        again = (2.2 if self.s.use_qlora else 1.8) * self.inside * tokens if plan.recomputed else 0
        return self.fixed() + states + decoded + max(kept + 0.6 * self.inside * tokens, again)

    def plan(self, tokens: int) -> Plan | None:
        """The plan by which a pass of so many tokens fits, with as few calls computed twice as can be, and states in
        the CPU's memory only where even all calls twice do not fit. None where no plan fits."""
        asked = self.s.activation_checkpointing
        if asked == "auto" and (self.free is None or not self.compiled):
            asked = "none" if self.free is None else "full"  # the estimate is of compiled layers
        if asked != "auto":
            layers = {"none": 0, "full": self.config.num_hidden_layers}.get(asked)
            return Plan((int(asked) if layers is None else layers) * self.s.total_ut_steps)
        usable = self.free * 0.97 - 0.7 * 2**30  # the rest goes to gaps of the allocator and to libraries
        for recomputed in range(0, self.calls + 1, self.s.total_ut_steps if self.by_layer else 1):
            if self.of(tokens, Plan(recomputed)) <= usable:
                return Plan(recomputed)
        if self.by_layer:
            return None
        for waiting in range(3, int(min(self.calls, self.host / self.slot)) + 1):
            if self.of(tokens, Plan(self.calls, waiting)) <= usable:
                return Plan(self.calls, waiting)
        return None

    def plan_run(self, tokens: int) -> Plan | None:
        """The plan by which such a pass runs beside the largest."""
        return self.plan(self.largest if self.by_layer else tokens)


# Bytes of a pair of graphs of 192 layer calls, as measured on an H200; by whether weights are decoded in them.
GRAPH = {False: 60 * 2**20, True: 82 * 2**20}


def fitting(memory: Memory) -> int:
    """The longest row that fits, found in steps of 256 tokens from `memory.largest` downwards; 0 where none does."""
    for tokens in range(memory.largest, 0, -256):
        if dataclasses.replace(memory, largest=tokens).plan(tokens):
            return tokens
    return 0


def passes_for(memory: Memory) -> Passes:
    """How rows are put together into passes on this machine. A pass takes as many tokens as fit with nothing computed
    twice. But with 4-bit weights it takes as many as fit at all, because the weights are decoded anew for each pass.
    Raises UserError: by the estimate the longest row does not fit even with all layers computed twice."""
    s, longest = memory.s, memory.largest
    layers = memory.config.num_hidden_layers
    if s.activation_checkpointing.isdecimal() and int(s.activation_checkpointing) > layers:
        raise UserError(f"activation_checkpointing = {s.activation_checkpointing}, and the model has {layers} layers")
    if memory.free is None or not memory.compiled:
        return Passes(s.pass_tokens or 2048, grain=1)
    if not memory.plan(longest):
        least = memory.of(longest, Plan(memory.calls, 0 if memory.by_layer else memory.calls))
        gib, fits = f"{memory.free / 2**30:.1f} GiB of GPU memory are free", fitting(memory)
        if not memory.by_layer:
            gib += f", and {memory.host / 2**30:.1f} GiB of the CPU's for layers' inputs that can wait there"
        raise UserError(
            f"rows of {longest} tokens need about {least / 2**30:.1f} GiB with all layers computed twice; {gib}: "
            + (f"set max_length to {fits}" if fits else "set use_qlora")
        )
    grid = Passes(1)
    if s.pass_tokens:
        return dataclasses.replace(grid, tokens=s.pass_tokens)
    sizes = sorted({grid.width(n) for n in range(1024, 16384 + 1, 64)})
    if s.use_qlora:
        fit = [n for n in sizes if n <= grid.width(longest) or n <= 4096]
        return dataclasses.replace(grid, tokens=max([n for n in fit if memory.plan(n)], default=longest), alone=None)
    whole = [n for n in sizes if dataclasses.replace(memory, largest=max(n, longest)).plan(n) == Plan()]
    return dataclasses.replace(grid, tokens=max(whole, default=2048))
