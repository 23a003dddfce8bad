"""Ouro, the looped language model (arXiv 2510.25741), in one file for torch and transformers (4.54 to 5.24) alone.

    import modeling_ouro                            # this file; transformers then knows the model type "ouro"
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16)        # or a repository on the Hub
    model.generate(input_ids, exit_at_step=1)                                    # answer from the second loop
    out = model(input_ids, output_loops=True)                                    # state and logits after every loop
    loss = model(input_ids, labels=labels, objective="last").loss                # or "mixture", "all"

The same decoder layers run `total_ut_steps` times; the final norm follows every loop, and its output feeds the next
loop, the exit gate and the head. Parameter names, shapes and numerics are those of the published checkpoints, so that
checkpoints and adapters move both ways. Where this code differs from the published code it is on purpose:

* The logits are those of the last loop unless the caller (or the config) asks otherwise. The published default runs
  every token through an exit threshold of 1.0, which in bf16 sometimes answers from an earlier loop.
* `labels=` trains the loop that inference reads (`objective="last"`); the published loss is `objective="mixture"`.
* A cache exists only when asked for (`use_cache=True`, as `generate` does). It has one slot for each (loop, layer).
* Attention runs without a mask wherever causality is enough: unpadded, right-padded and packed rows.
* No code that comes with a checkpoint is ever run.

Faster layers can be put in from outside, without a change of this file: see `project`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # what LoRA may adapt
IGNORE = -100  # label of a position that is not trained
# What transformers calls the cache in `generate` and in outputs: "past_key_values", and "cache" in later versions 5.
CACHE = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in ("past_key_values", "cache"))
CHUNK = 1024  # positions whose logits exist at once: 1024 x 49152 in fp32 is 0.2 GB
# Keys of a published config.json of which one value is supported: another would be computed wrongly without a word.
ONE_VALUE = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "tie_word_embeddings": False,  # the head has its own matrix
}


class OuroConfig(PretrainedConfig):
    """Settings of an Ouro model, with the names of the published config.json; the defaults are Ouro-2.6B's.
    Raises ValueError: for a variant that is not supported (ONE_VALUE, fewer heads of keys, other than full attention).
    """

    model_type = "ouro"
    keys_to_ignore_at_inference = [CACHE]

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 16,
        head_dim: int | None = None,
        total_ut_steps: int = 4,
        early_exit_step: int | None = None,
        early_exit_threshold: float | None = 1.0,
        rope_theta: float = 1e6,
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int = 65536,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.total_ut_steps = total_ut_steps
        self.early_exit_step = early_exit_step
        self.early_exit_threshold = early_exit_threshold
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        full = {"num_key_value_heads": num_attention_heads, "layer_types": ["full_attention"] * num_hidden_layers}
        for key, legal in (ONE_VALUE | full).items():
            value = kwargs.pop(key, None)
            if value is not None and value != legal:
                raise ValueError(f"OuroConfig: {key}={value!r} is not supported, only {legal!r}")
            setattr(self, key, legal)
        kwargs["sliding_window"] = None  # its number has no meaning while use_sliding_window is false
        super().__init__(tie_word_embeddings=False, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        # `save_pretrained` puts this file into the folder, whose config.json points to it: transformers has no Ouro,
        # and the code of the published repositories fails with a cache on every version tried.
        names = {"AutoConfig": "OuroConfig", "AutoModel": "OuroModel", "AutoModelForCausalLM": "OuroForCausalLM"}
        self.auto_map = {auto: f"modeling_ouro.{name}" for auto, name in names.items()}


@dataclass
class OuroModelOutput(BaseModelOutputWithPast):
    """`loop_hidden_states`: the normed state after every loop that ran, each (batch, seq, hidden)."""

    loop_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class OuroOutput(CausalLMOutputWithPast):
    """What a forward pass gives; a field that was not asked for is None.

    loss: scalar, summed cross-entropy over the trained positions / `num_items_in_batch` (or their number).
    logits: (batch, kept positions, vocab), None with `labels`: the loss never forms them all.
    loop_hidden_states, loop_logits: one tensor a loop, (batch, seq, hidden) and (batch, kept positions, vocab).
    gate_logits: (loops, batch, seq); `exit_distribution` turns them into exit probabilities.
    loop_losses: (loops,), with `objective="all"`.
    correct_tokens, trained_tokens: scalars; greedy predictions that were right, out of the trained positions."""

    loop_hidden_states: tuple[Tensor, ...] | None = None
    loop_logits: tuple[Tensor, ...] | None = None
    gate_logits: Tensor | None = None
    loop_losses: Tensor | None = None
    correct_tokens: Tensor | None = None
    trained_tokens: Tensor | None = None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)  # rounded before the weight, as published


class OuroRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (batch, seq, heads, head_dim), half-rotation layout; cos, sin: of `OuroModel.rotations`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, documents: Tensor | None) -> Tensor:
    """Attention of q on k and v, all (batch, heads, seq, head_dim), in one of three forms.

    mask: bool, broadcastable to (batch, heads, queries, keys); causal: no mask, query i sees keys 0..i; documents:
    int32 (documents + 1,), where each document of the packed rows starts and ends in the flattened batch."""
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    batch, heads, seq, dim = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * seq, heads, dim) for x in (q, k, v))
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        # The variable-length kernel behind SDPA's nested tensors: one launch for all documents. It wants a bound of
        # their length: a row's, `seq`, for the length of the longest would have to be fetched from the GPU.
        out = torch.ops.aten._flash_attention_forward(q, k, v, documents, documents, seq, seq, 0.0, True, False)[0]
    else:
        out = _attend_each(q, k, v, documents)
    return out.view(batch, seq, heads, dim).transpose(1, 2)


@torch.compiler.disable
def _attend_each(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention inside each document, one after the other; q, k, v and the result are (tokens, heads, dim)."""
    sizes = documents.diff().tolist()
    pieces = zip(*(x.transpose(0, 1).split(sizes, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True) for p in pieces], dim=1).transpose(0, 1)


def project(x: Tensor, *projections: nn.Module, noise: Tensor | None = None) -> tuple[Tensor, ...]:
    """The outputs of several projections of one input x (..., in).

    Where the first projection has an attribute `group`, that is called instead of all of them: a function of x and
    noise that returns the tuple of their outputs. So a program that trains or serves the model can compute the three
    projections of attention, or the two of the MLP, as one product, and leave the modules and their names as they are.
    """
    group = getattr(projections[0], "group", None)
    return tuple(projection(x) for projection in projections) if group is None else group(x, noise)


class OuroAttention(nn.Module):
    def __init__(self, config: OuroConfig):
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, causal, documents, past_key_values, slot, noise):
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (y.view(heads) for y in project(x, self.q_proj, self.k_proj, self.v_proj, noise=noise))
        # Rotated before they are transposed: the backward pass then needs no copy of the gradients of q and k to bring
        # them into the projections' layout.
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, slot)
        y = attend(q, k, v, mask, causal, documents)
        return project(y.transpose(1, 2).flatten(2), self.o_proj, noise=noise)[0]


class OuroMLP(nn.Module):
    def __init__(self, config: OuroConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj, noise=noise)
        return project(F.silu(gate) * up, self.down_proj, noise=noise)[0]


class OuroDecoderLayer(GradientCheckpointingLayer):
    """One block with sandwich norms: before each sub-layer, and after it inside the residual branch.

    It holds no number that differs between layers or loops (the cache slot is an argument), so that `torch.compile`
    translates it once for all of them."""

    def __init__(self, config: OuroConfig):
        super().__init__()
        self.self_attn = OuroAttention(config)
        self.mlp = OuroMLP(config)
        self.input_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, causal=True, documents=None, past_key_values=None, slot=None, noise=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, mask, causal, documents, past_key_values, slot, noise)
        x = x + self.input_layernorm_2(y)
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x), noise))


class OuroPreTrainedModel(PreTrainedModel):
    config_class = OuroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OuroDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute each layer in the backward pass. Non-reentrant: the reentrant kind gives no gradient below frozen
        embeddings, and under DDP marks a looped layer's weights ready more than once."""
        kwargs = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        if kwargs["use_reentrant"]:
            raise ValueError("gradient checkpointing of a looped model must be non-reentrant: use_reentrant=False")
        super().gradient_checkpointing_enable(kwargs)


class OuroModel(OuroPreTrainedModel):
    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = OuroRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        total_ut_steps: int | None = None,
        documents: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs,
    ) -> OuroModelOutput:
        """Runs the loops.

        input_ids: (batch, seq). attention_mask: (batch, cached + seq), 1 for a token and 0 for padding, on either side.
        position_ids: (batch, seq); where they do not rise by one a new document starts, and documents are isolated.
        total_ut_steps: loops to run instead of the config's number.
        documents: `document_bounds` of position_ids, so that the GPU need not be asked; without a mask or a cache.
        past_key_values, or `cache`: one with a slot for each (loop, layer), or empty.
        noise: int32 (batch, seq), a random number a token, from which groups of projections (`project`) draw dropout.
        Raises ValueError: arguments that contradict each other, or a cache filled at another depth."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            raise ValueError("output_attentions and output_hidden_states are not available; see output_loops")
        loops = self.config.total_ut_steps if total_ut_steps is None else total_ut_steps
        if loops < 1:
            raise ValueError(f"total_ut_steps={loops}: a looped model runs at least one loop")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (batch, seq, hidden)
        batch, seq, _ = x.shape
        layers = len(self.layers)
        past_key_values = kwargs.get("cache") if past_key_values is None else past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None:
            if self.training and self.layers[0].gradient_checkpointing:
                raise ValueError("gradient checkpointing would fill a cache twice: use_cache=False, or model.eval()")
            depth = [past_key_values.get_seq_length(loop * layers) for loop in range(loops)]
            if any(length != past for length in depth) or len(past_key_values.layers) > loops * layers:
                raise ValueError(
                    f"the cache was filled at another depth: positions per loop {depth}, {len(past_key_values.layers)} "
                    f"slots, but {loops} loops of {layers} layers read it"
                )
        if documents is None or attention_mask is not None or past_key_values is not None:
            form = self._attention_form(attention_mask, position_ids, past_key_values, batch, seq, past)
            mask, causal, documents = form
        else:
            mask, causal = None, False
        if documents is not None:
            torch._dynamo.maybe_mark_dynamic(documents, 0)  # their number differs in each batch
        positions = torch.arange(past, past + seq, device=x.device)[None] if position_ids is None else position_ids
        cos, sin = self.rotations(positions, x.dtype)
        states = self.run_loops(x, cos, sin, mask, causal, documents, loops, past_key_values, noise)
        return OuroModelOutput(last_hidden_state=states[-1], loop_hidden_states=states, **{CACHE: past_key_values})

    def run_loops(
        self, x, cos, sin, mask, causal, documents, loops: int, past_key_values=None, noise=None
    ) -> tuple[Tensor, ...]:
        """The normed state after every loop, each (batch, seq, hidden), of x (batch, seq, hidden)."""
        states = []
        for loop in range(loops):
            here = None if noise is None else noise + loop  # another dropout in each loop
            for index, layer in enumerate(self.layers):
                if past_key_values is None:
                    x = layer(x, cos, sin, mask, causal, documents, None, None, here)
                else:
                    # Not through __call__: a compiled layer would be translated again for every slot and length, and
                    # use up the compiler's limit for training.
                    slot = loop * len(self.layers) + index
                    x = layer.forward(x, cos, sin, mask, causal, documents, past_key_values, slot)
            x = self.norm(x)
            states.append(x)
        return tuple(states)

    def rotations(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (batch or 1, seq, 1, head_dim), sin with the sign of the rotation; angles, whatever the dtype,
        are in fp32 (float64 in a float64 model).

        Computed here, once for all loops and layers, instead of from a buffer: `model.to(bf16)` would round a buffer.
        """
        wide = torch.promote_types(dtype, torch.float32)
        dim = self.config.head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=positions.device).to(wide) / dim
        angles = positions[:, :, None, None].to(wide) * (1.0 / self.config.rope_theta**exponent)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _attention_form(self, attention_mask, position_ids, past_key_values, batch, seq, past):
        """The cheapest exact form of attention, as (mask, causal, documents) of `attend`."""
        padded = False
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + seq):
                raise ValueError(
                    f"attention_mask must be (batch, cached + new) = ({batch}, {past + seq}), got "
                    f"{tuple(attention_mask.shape)}"
                )
            token = attention_mask.bool()
            # Padding on the right needs no mask: no token looks to the right. With a cache new tokens may follow it.
            ordered = token if past_key_values is not None else token[:, :-1] | ~token[:, 1:]
            padded = not bool(ordered.all())
        starts = None
        if position_ids is not None and seq > 1:
            new = None if attention_mask is None else token[:, past:]
            starts = document_starts(position_ids.expand(batch, -1), new)
            if not bool(starts.any()):
                starts = None
            elif past_key_values is not None:
                raise ValueError("packed documents (position_ids that start anew) cannot be cached")
        if not padded:
            if starts is not None:
                return None, False, document_bounds(starts)
            if past == 0 or seq == 1:
                return None, past == 0, None
        device = self.embed_tokens.weight.device
        query = torch.arange(past, past + seq, device=device)[:, None]
        key = torch.arange(past + seq, device=device)[None]
        mask = (key <= query)[None]  # (1, seq, past + seq)
        if padded:
            # A padding position sees itself, for a softmax over nothing is not a number.
            mask = mask & (token[:, None] | (key == query))
        if starts is not None:
            document = starts.cumsum(1)
            mask = mask & (document[:, :, None] == document[:, None])
        return mask[:, None], False, None


def document_starts(position_ids: Tensor, token: Tensor | None = None) -> Tensor:
    """Where a document follows another in its row: a token whose position is not one above that of the token before.

    position_ids: (batch, seq). token: bool (batch, seq), False for padding, which is passed over. The first token of a
    row follows nothing and is False."""
    batch, seq = position_ids.shape
    if token is None:
        return F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    index = torch.arange(seq, device=position_ids.device).expand(batch, -1)
    before = F.pad(torch.where(token, index, -1).cummax(1).values[:, :-1], (1, 0), value=-1)  # the last token before
    return token & (before >= 0) & (position_ids != position_ids.gather(1, before.clamp(min=0)) + 1)


def document_bounds(starts: Tensor) -> Tensor:
    """Where each document of the flattened batch starts, and where the last one ends, int32 (documents + 1,); starts:
    as of `document_starts`. A row begins a document."""
    starts = torch.cat((torch.ones_like(starts[:, :1]), starts[:, 1:]), 1)
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel()).to(torch.int32)


def positions_trained(labels: Tensor, starts: Tensor | None = None, token: Tensor | None = None) -> Tensor:
    """Positions of the flattened batch from which a label is predicted, the one after each, int64 (trained,).

    labels, starts (as of `document_starts`; None: a document a row), token (False for padding): (batch, seq)."""
    trained = labels[:, 1:] != IGNORE
    if starts is not None:  # the first token of a document has nothing before it to be predicted from
        trained = trained & ~starts[:, 1:]
    if token is not None:  # nor has the first one after padding
        trained = trained & token[:, :-1]
    return F.pad(trained, (0, 1)).flatten().nonzero()[:, 0]


def _cross_entropy(logits: Tensor, target: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed loss and right predictions of logits (positions, vocab), and with `train` the gradient, softmax - one-hot,
    in the logits' dtype. A position whose target is IGNORE counts nothing."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = target != IGNORE
    log_z = wide.logsumexp(-1)
    loss = torch.where(counted, log_z - wide.gather(1, target.clamp(min=0)[:, None])[:, 0], 0).sum()
    correct = (counted & (wide.argmax(-1) == target)).sum()
    if not train:
        return loss, correct, None
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    grad = wide.sub_(log_z[:, None]).exp_().add_(hit, alpha=-1).mul_(counted[:, None])
    return loss, correct, grad.to(logits.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden[kept] @ weight.T`, a chunk of positions at a time.

    hidden: (positions, hidden). kept, targets: (trained,), which positions are trained and on what; then, up to a
    whole chunk, (positions, IGNORE), whose gradient goes to a spare row. The gradient is formed together with the loss,
    while a chunk's logits exist: nothing is computed twice, and only a chunk of (positions, vocab) is ever in memory.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, kept: Tensor, targets: Tensor, chunk: int, train: bool, cross_entropy
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        train = train and any(ctx.needs_input_grad[:2])
        positions = len(hidden)
        grad_hidden = hidden.new_zeros(positions + 1, hidden.shape[1]) if train and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if train and ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), chunk):
            here, target = kept[start : start + chunk], targets[start : start + chunk]
            h = hidden[here.clamp(max=positions - 1)]
            logits = F.linear(h, weight)  # (chunk, vocab), rounded to the model's dtype, as published
            part, right, grad = cross_entropy(logits, target, train)
            loss += part
            correct += right
            if grad_hidden is not None:
                grad_hidden[here] = (grad @ weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ h
        grad_hidden = None if grad_hidden is None else grad_hidden[:positions]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        grads = [None if g is None else (g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None, None, None


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """Probability of leaving after each loop, (loops, ...) from gate logits of that shape (arXiv 2510.25741, 3.2).

    p_t = sigmoid(g_t) * prod_{j<t} (1 - sigmoid(g_j)), and the last loop takes what remains: its own gate is not read.
    In fp32 (float64 for float64), also in a bf16 model."""
    wide = gate_logits.to(torch.promote_types(gate_logits.dtype, torch.float32))
    stay = F.logsigmoid(-wide[:-1]).cumsum(0)  # log of the mass that has not left after loop t
    before = torch.cat((torch.zeros_like(wide[:1]), stay))
    return torch.cat((before[:-1] + F.logsigmoid(wide[:-1]), before[-1:])).exp()


class OuroForCausalLM(OuroPreTrainedModel, GenerationMixin):
    def __init__(self, config: OuroConfig):
        super().__init__(config)
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy = _cross_entropy
        self.post_init()

    def recompute_layers(self, count: int) -> None:
        """Recompute the first `count` layers, in every loop, in the backward pass instead of keeping their insides."""
        self.gradient_checkpointing_enable()
        for layer in self.model.layers[count:]:
            layer.gradient_checkpointing = False

    def compile_layers(self, one_size: bool = False) -> None:
        """Translates the layers and the loss into fused kernels, at their first call: once for all layers and loops.
        Where nearly all batches have `one_size`, the kernels are made for it and faster; else they serve all sizes."""
        # By default torch goes back, silently, to code that is not compiled after eight translations.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = 64
        for layer in self.model.layers:
            # By default torch.cat of computed parts becomes one kernel that computes every part for each part's
            # columns. With 0 a part is computed once and written into its own columns.
            layer.compile(dynamic=None if one_size else True, options={"max_pointwise_cat_inputs": 0})
        self.cross_entropy = torch.compile(_cross_entropy, dynamic=False)

    def load_custom_generate(self, *args, **kwargs):
        """Without this method `from_pretrained` would ask the Hub for code that replaces `generate`, or run a folder's.
        It takes an OSError to mean that there is none."""
        raise OSError("code of a checkpoint is never run")

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """A cache that grows: transformers would make one by the config, with a slot a layer, and loops need more."""
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full"):
            asked = generation_config.cache_implementation
            raise ValueError(f"cache_implementation={asked!r}: only a dynamic cache has a slot for each (loop, layer)")
        model_kwargs[CACHE] = DynamicCache()

    def gate_logits(self, states: tuple[Tensor, ...]) -> Tensor:
        """The exit gate's logit after every loop: (loops, batch, seq) from loops times (batch, seq, hidden)."""
        return torch.stack([self.model.early_exit_gate(h).squeeze(-1) for h in states])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        total_ut_steps: int | None = None,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        use_weighted_exit: bool = False,
        output_loops: bool = False,
        objective: str = "last",
        num_items_in_batch: int | Tensor | None = None,
        trained: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> OuroOutput | tuple:
        """One pass through all loops; shapes and masks as in `OuroModel.forward`.

        Which logits come out (without labels), at most one of:
            default: the last loop's. exit_at_step=k: loop k's, counted from 0; later loops are then not run at all.
            exit_threshold=q: for each token the first loop whose cumulative exit probability reaches q, else the last;
            q >= 1 is the last loop. use_weighted_exit: the gate-weighted mean of all loops' logits.
            The config's early_exit_step and early_exit_threshold < 1 act where the call names none.
        logits_to_keep: 0 for all positions, n for the last n, or a vector of positions (kept,).
        output_loops: also loop_hidden_states, loop_logits and gate_logits of every loop.
        labels: (batch, seq), -100 where nothing is trained; label i is predicted from position i - 1 of its document.
        objective: "last": cross-entropy of the last loop; "mixture": of the gate-weighted mixture of the loops' logits
            (the published `labels=` path); "all": the mean over loops of each loop's cross-entropy.
        num_items_in_batch: trained tokens of the whole step, over accumulation and ranks; the loss is divided by it.
        trained: `positions_trained` of labels and position_ids, so that the GPU need not be asked; without a mask.
        Raises ValueError: arguments that contradict each other or lie out of range."""
        asked = [exit_at_step is not None, exit_threshold is not None, use_weighted_exit]
        if sum(asked) > 1:
            raise ValueError("give at most one of exit_at_step, exit_threshold and use_weighted_exit")
        if labels is not None and any(asked):
            raise ValueError("labels train an objective over the loops; exit_* and use_weighted_exit choose logits")
        if not any(asked) and labels is None:
            exit_at_step, exit_threshold = self.config.early_exit_step, self.config.early_exit_threshold
        loops = self.config.total_ut_steps if total_ut_steps is None else total_ut_steps
        if exit_at_step is not None and not 0 <= exit_at_step < loops:
            raise ValueError(f"exit_at_step={exit_at_step} is not one of the {loops} loops 0..{loops - 1}")
        if exit_at_step is not None and not output_loops:
            loops = exit_at_step + 1
        out = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, loops, **kwargs
        )
        states = out.loop_hidden_states
        result = {CACHE: getattr(out, CACHE)}
        if output_loops:
            result |= {"loop_hidden_states": states, "gate_logits": self.gate_logits(states)}
        if labels is not None:
            if trained is None or attention_mask is not None:
                token = None if attention_mask is None else attention_mask[:, -labels.shape[1] :].bool()
                starts = None if position_ids is None else document_starts(position_ids.expand_as(labels), token)
                trained = positions_trained(labels, starts, token)
            result |= self._losses(states, labels, trained, objective, num_items_in_batch)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            kept = tuple(h[:, keep] for h in states)
            if output_loops:
                result["loop_logits"] = tuple(self.lm_head(h) for h in kept)
            if use_weighted_exit:
                chosen = self._mixture(kept)
            elif exit_at_step is None and exit_threshold is not None and exit_threshold < 1:
                chosen = self._first_to_reach(exit_threshold, kept)
            else:
                chosen = kept[-1 if exit_at_step is None else exit_at_step]
            result["logits"] = self.lm_head(chosen)
        output = OuroOutput(**result)
        return output.to_tuple() if return_dict is False else output

    def _first_to_reach(self, threshold: float, states: tuple[Tensor, ...]) -> Tensor:
        """For each token its state after the first loop whose cumulative exit probability reaches the threshold, else
        after the last: (batch, seq, hidden) from loops times that."""
        cumulative = exit_distribution(self.gate_logits(states)).cumsum(0)[:-1]  # (loops - 1, batch, seq)
        loop = (cumulative < threshold).sum(0)
        index = loop[None, :, :, None].expand(-1, -1, -1, states[0].shape[-1])
        return torch.stack(states).gather(0, index)[0]

    def _mixture(self, states: tuple[Tensor, ...]) -> Tensor:
        """The gate-weighted mean of the loops' states, (batch, seq, hidden). The head is linear, so its logits are the
        published mixture of logits, at a T-th of the cost."""
        weights = exit_distribution(self.gate_logits(states))[..., None]
        return sum(w * h for w, h in zip(weights, states, strict=True)).to(states[0].dtype)

    def _losses(self, states, labels, trained, objective, num_items_in_batch) -> dict[str, Tensor | None]:
        if objective not in ("last", "mixture", "all"):
            raise ValueError(f"objective={objective!r} is none of 'last', 'mixture', 'all'")
        if type(self.lm_head) is not nn.Linear:
            raise ValueError(f"lm_head is a {type(self.lm_head).__name__}: keep the head out of LoRA and quantisation")
        kept, targets = trained, labels.flatten()[trained + 1]
        if objective == "mixture":
            states = (self._mixture(states),)
        elif objective == "last":
            states = states[-1:]
        train = torch.is_grad_enabled()
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        if self.cross_entropy is not _cross_entropy:  # compiled for whole chunks
            padding = -len(targets) % CHUNK
            targets = F.pad(targets, (0, padding), value=IGNORE)
            kept = F.pad(kept, (0, padding), value=labels.numel())
        parts = [
            _ChunkedCrossEntropy.apply(
                h.flatten(0, 1), self.lm_head.weight, kept, targets, CHUNK, train, self.cross_entropy
            )
            for h in states
        ]
        # Without any trained token the loss is zero, not 0/0; the data checks refuse such rows before training.
        count = count.clamp(min=1).to(labels.device) if isinstance(count, Tensor) else max(count, 1)
        losses = torch.stack([loss for loss, _ in parts]) / count
        return {
            "loss": losses.mean(),
            "loop_losses": losses.detach() if objective == "all" else None,
            "correct_tokens": parts[-1][1],
            "trained_tokens": torch.full_like(parts[-1][1], len(trained)),
        }


AutoConfig.register("ouro", OuroConfig, exist_ok=True)  # a second folder with this file may have done it
AutoModel.register(OuroConfig, OuroModel)
AutoModelForCausalLM.register(OuroConfig, OuroForCausalLM)
OuroForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # `save_pretrained` then copies this file
