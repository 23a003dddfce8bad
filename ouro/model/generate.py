"""Text from a model, fast: a static key/value cache, one CUDA graph a token, new prompts in the place of finished ones.

    from ouro.model.generate import generate
    replies = generate(model, prompts, depth=4, max_new_tokens=512, stop=[0, 2])      # lists of token ids, both
    python tools/bench.py generate                                                     # its speed

Prompts are read by the model's own forward pass, adapters and NF4 or fp8 weights as they are. Tokens after them come
from a copy of the layers made for thin products: q, k and v are one matrix, gate and up another, weights in 4 or 8 bits
are decoded and LoRA is merged, W + s B A computed in fp32 and rounded once, as in any merged bf16 model. LoRA beside W
would be two more thin products a group, each a kernel that takes longer to start than to run.

On a GPU a step is one CUDA graph: what lies between two attentions is compiled, attention is one kernel
(flash-decoding, arXiv 2311.01282) that rotates, writes the cache and reads of it only what a sequence has filled. Hence
no mask, no padding and no length buckets, and a graph serves any lengths. A single row is multiplied by kernels of
kernels.py, which read each matrix at nearly the rate of a copy. On a CPU the same steps run without compiler and graph.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence

from ouro.files import UserError
from ouro.model.fp8 import Fp8
from ouro.model.kernels import (
    attend_by_kernel,
    attend_to_cache,
    begin,
    combine,
    compiled,
    middle,
    multiply,
    multiply_gated,
    to_logits,
    to_next,
)
from ouro.model.modeling_ouro import OuroForCausalLM

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

BURST = 8  # steps after which the tokens are fetched: each time the CPU waits for the GPU
PREFILL = 8192  # tokens of prompts read in one pass
KEPT = 8 * 2**30  # a larger cache is given back after each call


def pick(logits: Tensor, noise_at: Tensor, temperature: Tensor) -> Tensor:
    """The next token of each row: argmax of logits + temperature * Gumbel noise, which is a sample of
    softmax(logits / temperature), and at 0 the likeliest. The noise is a hash (SplitMix64) of `noise_at` (batch,) and
    the token: a graph can compute it, and a sample does not depend on the batch that its sequence is in."""
    x = noise_at[:, None] + torch.arange(1, logits.shape[1] + 1, device=logits.device) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    uniform = (((x >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) / 2**24
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide - temperature * torch.log(-torch.log(uniform))).argmax(-1)


def power_of_two(n: int, up: bool) -> int:
    """The next power of two from n up, or down."""
    return 1 << ((n - 1).bit_length() if up else n.bit_length() - 1)


class _Writer:
    """To the model's forward pass an empty cache: it puts a prompt's keys and values to where decoding reads them."""

    layers = ()

    def __init__(self, slots: Tensor, rows: Tensor):
        self.slots, self.rows = slots, rows

    def get_seq_length(self, slot: int = 0) -> int:
        return 0

    def update(self, k: Tensor, v: Tensor, slot: int) -> tuple[Tensor, Tensor]:
        self.slots[slot, 0, self.rows, :, : k.shape[2]] = k
        self.slots[slot, 1, self.rows, :, : k.shape[2]] = v
        return k, v


def merged(projection: nn.Module, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """The matrix (out, in) that a projection multiplies by: decoded, and with its active adapters, of DoRA with its
    rows scaled to their magnitudes. weight: its frozen one, if that is not in the projection itself."""
    if not isinstance(projection, LoraLayer):
        return dequantize_module_weight(projection).to(dtype)
    weight = dequantize_module_weight(projection.get_base_layer()) if weight is None else weight
    if projection.disable_adapters or projection.merged:
        return weight.to(dtype)
    for name in projection.active_adapters:
        if name in projection.lora_A:
            wide = torch.promote_types(weight.dtype, torch.float32)
            weight = weight.to(wide) + projection.get_delta_weight(name).to(wide)
            if name in projection.lora_magnitude_vector:
                weight *= (projection.lora_magnitude_vector[name].weight.to(wide) / weight.norm(dim=1))[:, None]
    return weight.to(dtype)


class Decoder:
    """The layers' copy, the cache and the captured step of a model; `generate` keeps one with each model."""

    def __init__(self, model: OuroForCausalLM):
        config, head = model.config, model.lm_head.weight
        self.model, self.config, self.device, self.dtype = model, config, head.device, head.dtype
        self.cuda = self.device.type == "cuda"
        self.inner = config.num_attention_heads * config.head_dim
        hidden, wide = config.hidden_size, config.intermediate_size
        shapes = {"qkv": (3 * self.inner, hidden), "o": (hidden, self.inner)}
        shapes |= {"gate_up": (2 * wide, hidden), "down": (hidden, wide)}
        new = {"device": self.device, "dtype": self.dtype}
        self.layers = [{name: torch.empty(s, **new) for name, s in shapes.items()} for _ in model.model.layers]
        self.key = self.slots = self.graph = None

    def copy_weights(self) -> None:
        """Copies the model's weights as they are now, adapters merged, to where a captured step reads them."""
        for copy, layer in zip(self.layers, self.model.model.layers, strict=True):
            a, m = layer.self_attn, layer.mlp
            for name, parts in (
                ("qkv", (a.q_proj, a.k_proj, a.v_proj)),
                ("o", (a.o_proj,)),
                ("gate_up", (m.gate_proj, m.up_proj)),
                ("down", (m.down_proj,)),
            ):
                group = getattr(parts[0], "group", None)
                fp8 = group is not None and group.kind == "fp8"
                weights = Fp8.decoded(group.frozen(), group.outs) if fp8 else [None] * len(parts)
                for place, part, weight in zip(copy[name].chunk(len(parts)), parts, weights, strict=True):
                    place.copy_(merged(part, self.dtype, weight))
            copy["in"] = layer.input_layernorm.weight
            copy["rest"] = (  # kernels.py calls them o, after, before, gate_up, down, end
                copy["o"], layer.input_layernorm_2.weight, layer.post_attention_layernorm.weight, copy["gate_up"],
                copy["down"], layer.post_attention_layernorm_2.weight,
            )  # fmt: skip

    def row_bytes(self, depth: int, capacity: int) -> int:
        """Cache of one sequence."""
        return depth * len(self.layers) * 2 * self.inner * capacity * self.dtype.itemsize

    def rows(self, depth: int, capacity: int, prompts: int) -> int:
        """How many sequences to run at once: as many as there are, or as memory allows."""
        wanted = power_of_two(prompts, up=True)  # few different sizes: each is compiled for
        if not self.cuda:
            return min(16, wanted)
        free = torch.cuda.mem_get_info(self.device)[0]
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free += 0 if self.slots is None else self.slots.numel() * self.slots.itemsize
        # What reading prompts takes beside the cache: about ten states and four of the MLP's a token, some in fp32.
        work = PREFILL * 4 * (10 * self.config.hidden_size + 4 * self.config.intermediate_size) + 2**29
        fitting = int((0.95 * free - work) / (self.row_bytes(depth, capacity) + 12 * self.config.vocab_size))
        if fitting < 1:
            raise UserError(
                f"a cache of {capacity} tokens at {depth} loops takes {self.row_bytes(depth, capacity) / 2**30:.1f} "
                f"GiB, and {free / 2**30:.1f} GiB of GPU memory are free: shorten the prompt or max_new_tokens"
            )
        return min(power_of_two(min(fitting, 256), up=False), wanted)

    def release(self) -> None:
        """Gives the cache's memory back."""
        self.key = self.slots = self.graph = None

    def prepare(self, depth: int, batch: int, capacity: int) -> None:
        """The cache for so many sequences of so many tokens, and on a GPU the captured step."""
        if self.key is not None and self.key[:2] == (depth, batch) and self.key[2] >= capacity:
            return
        self.release()
        c, new = self.config, {"device": self.device}
        shape = (depth * len(self.layers), 2, batch, c.num_attention_heads, capacity, c.head_dim)
        self.slots = torch.zeros(shape, dtype=self.dtype, **new)
        self.key = (depth, batch, capacity)
        # What a step reads and changes: the newest token of each row, its position, whether the row runs, its seed.
        self.token, self.position, self.active, self.seed = (
            torch.zeros(batch, dtype=torch.int64, **new) for _ in range(4)
        )
        self.temperature = torch.zeros((), **new)
        # About 1,024 parts together, which an H200 runs at once; more than 16 of one sequence made it slower.
        self.splits = max(1, min(16, 1024 // (batch * c.num_attention_heads)))
        if self.cuda:
            self.capture_step()

    def capture_step(self) -> None:
        with torch.cuda.device(self.device):  # streams and Triton's kernels are made on the current GPU
            for _ in range(2):  # compiles, and tries kernels
                self.step()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):  # the default is a stream of the first GPU that was used
                self.step()

    def step(self) -> None:
        """One more token in every row."""
        depth, batch, capacity = self.key
        model = self.model.model
        x = F.embedding(self.token, model.embed_tokens.weight)
        cos, sin = (t[0] for t in model.rotations(self.position[None], self.dtype))  # (batch, 1, head_dim)
        logits = (self.one_row if self.cuda and batch == 1 else self.rows_together)(x, cos, sin)
        self.token.copy_(pick(logits, self.noise(self.seed, self.position), self.temperature))
        # Rows that have ended run on until the host looks: not beyond the cache.
        self.position.copy_((self.position + self.active).clamp(max=capacity - 1))

    def rows_together(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Logits (batch, vocab) after the tokens whose embeddings are x (batch, hidden)."""
        eps, count, model = self.config.rms_norm_eps, len(self.layers), self.model.model
        call = compiled if self.cuda else (lambda function: function)
        qkv = call(begin)(x, self.layers[0]["in"], self.layers[0]["qkv"], eps)
        for slot, (keys, values) in enumerate(self.slots):
            layer, following = self.layers[slot % count], self.layers[(slot + 1) % count]
            arguments = qkv, cos, sin, keys, values, self.position
            y, weight = attend_by_kernel(*arguments, self.splits) if self.cuda else attend_to_cache(*arguments)
            last = model.norm.weight if slot % count == count - 1 else None
            x, inner = call(middle)(x, y, weight, layer["rest"], eps)
            if slot < len(self.slots) - 1:
                x, qkv = call(to_next)(x, inner, layer["rest"], last, (following["in"], following["qkv"]), eps)
        return call(to_logits)(x, inner, layer["rest"], last, self.model.lm_head.weight, eps)

    def one_row(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rows_together` for one row, in six kernels a layer."""
        eps, count, model = self.config.rms_norm_eps, len(self.layers), self.model.model
        y = end = last = None
        for slot, (keys, values) in enumerate(self.slots):
            layer = self.layers[slot % count]
            o, after, before, gate_up, down, following = layer["rest"]
            x, qkv = multiply(x, layer["qkv"], eps, layer["in"], y, end, last)
            parts = attend_by_kernel(qkv, cos, sin, keys, values, self.position, self.splits)
            _, y = multiply(compiled(combine)(*parts, self.dtype), o, eps)
            x, inner = multiply(x, gate_up, eps, before, y, after)
            y, end = multiply_gated(inner, down), following
            last = model.norm.weight if slot % count == count - 1 else None
        return multiply(x, self.model.lm_head.weight, eps, None, y, end, last)[1]

    @staticmethod
    def noise(seed: Tensor, position: Tensor) -> Tensor:
        """Where `pick` finds the noise of each row's next token, int64 (batch,)."""
        return seed * -3335678366873096957 + position * 1442695040888963407

    def run(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()

    def read(self, prompts: list[list[int]], rows: list[int], seeds: list[int]) -> list[int]:
        """Fills the cache's rows from prompts; the first new token of each."""
        width = min(-(-max(map(len, prompts)) // 64) * 64, self.key[2])
        ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=self.device)
        lengths, seeds, where = (torch.tensor(v, device=self.device) for v in ([len(p) for p in prompts], seeds, rows))
        states = self.model.model(ids, past_key_values=_Writer(self.slots, where), total_ut_steps=self.key[0])
        final = states.last_hidden_state[torch.arange(len(prompts), device=self.device), lengths - 1]
        logits = self.model.lm_head(final)
        if not logits.isfinite().all():  # the first of equal NaNs would be taken for a reply
            raise UserError("the model's logits are NaN or infinite: are its weights, or its adapter's, damaged?")
        token = pick(logits, self.noise(seeds, lengths - 1), self.temperature)
        self.token[where], self.position[where], self.seed[where], self.active[where] = token, lengths, seeds, 1
        return token.tolist()

    def clear(self, rows: list[int] | slice) -> None:
        """Takes the sequences out of these rows, which then attend to one position each."""
        self.active[rows] = 0
        self.position[rows] = 0


def prepared(model: OuroForCausalLM | PeftModel, prompts: list[list[int]], depth: int, new: int) -> Decoder:
    """The model's decoder with its weights as they are now and an empty cache; raises as `generate` does."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.training:
        raise ValueError("the model is in training mode: model.eval()")
    if not all(prompts):
        raise ValueError(f"prompt {[bool(p) for p in prompts].index(False)} is empty")
    longest = max(map(len, prompts)) + new
    if longest > base.config.max_position_embeddings:
        raise UserError(
            f"a prompt of {longest - new} tokens and max_new_tokens = {new} are more than the "
            f"model's {base.config.max_position_embeddings} positions"
        )
    decoder = getattr(base, "decoder", None)
    if decoder is None or decoder.device != base.lm_head.weight.device:  # the model may have been moved since
        base.decoder = decoder = Decoder(base)
    decoder.copy_weights()
    capacity = -(-longest // 256) * 256
    decoder.prepare(depth, decoder.rows(depth, capacity, len(prompts)), capacity)
    decoder.clear(slice(None))
    return decoder


@torch.no_grad()
def generate(
    model: OuroForCausalLM | PeftModel,
    prompts: list[list[int]],
    *,
    depth: int,
    max_new_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    on_tokens: Callable[[int, list[int]], None] | None = None,
    on_end: Callable[[int, list[int]], None] | None = None,
) -> list[list[int]]:
    """The new tokens after each prompt, up to `max_new_tokens` or the first of `stop`, which is left out.

    depth: loops; the last of them is read. temperature: 0 is greedy. seed: with a prompt's place in the list it decides
    what is sampled, whatever else is in the batch; several: one for each prompt, and its place does not matter.
    on_tokens(prompt, tokens): called as tokens come, a few at a time; on_end(prompt, reply): as each reply is whole.
    As many sequences run at once as memory allows. Longest prompts start first; one that ends makes room for the next.
    Raises UserError: a prompt and its answer are longer than the model's positions, or than free memory; ValueError:
    arguments out of range, a model in training mode, or weights that cannot be merged."""
    if depth < 1 or max_new_tokens < 1 or temperature < 0:
        raise ValueError("depth and max_new_tokens must be at least 1, temperature at least 0")
    if not prompts:
        return []
    decoder = prepared(model, prompts, depth, max_new_tokens)
    decoder.temperature.fill_(temperature)
    batch = len(decoder.token)
    seeds = [seed * 1_000_003 + i for i in range(len(prompts))] if isinstance(seed, int) else seed
    replies: list[list[int]] = [[] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    free, running = list(range(batch)), {}

    def accept(row: int, tokens: list[int]) -> None:
        index = running[row]
        tokens = tokens[: max_new_tokens - len(replies[index])]
        ends = next((n for n, token in enumerate(tokens) if token in stop), None)
        replies[index] += tokens[:ends]
        if on_tokens and tokens[:ends]:
            on_tokens(index, tokens[:ends])
        if ends is not None or len(replies[index]) == max_new_tokens:
            free.append(row)
            del running[row]
            if on_end:
                on_end(index, replies[index])

    while waiting or running:
        # Several prompts at once, for all rows wait while they are read.
        if waiting and (not running or len(free) >= max(1, batch // 8)):
            decoder.clear(free)
            while waiting and free:
                room = max(1, PREFILL // -(-len(prompts[waiting[0]]) // 64) // 64)
                chosen = [waiting.popleft() for _ in range(min(room, len(free), len(waiting)))]
                rows = [free.pop() for _ in chosen]
                firsts = decoder.read([prompts[i] for i in chosen], rows, [seeds[i] for i in chosen])
                running.update(zip(rows, chosen, strict=True))
                for row, token in zip(rows, firsts, strict=True):
                    accept(row, [token])
        if running:
            steps = min(BURST, max_new_tokens - min(len(replies[index]) for index in running.values()))
            new = []
            for _ in range(steps):
                decoder.run()
                new.append(decoder.token.clone())
            for row, tokens in enumerate(torch.stack(new, 1).tolist()):
                if row in running:
                    accept(row, tokens)
    if decoder.slots.numel() * decoder.slots.itemsize > KEPT:
        decoder.release()
    return replies
