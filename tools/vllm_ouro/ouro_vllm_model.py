"""The model that ouro_vllm.py registers: vLLM's Llama with four norms a layer, and loops.

The same layers run `total_ut_steps` times, the final norm after each loop. Each (loop, layer) has keys and values of
its own, hence an `Attention` of its own, numbered as if the loops were more layers. The last loop answers: the exit
gate is not loaded.

With {"depth_by_request": true} in --hf-overrides and --logits-processors ouro_vllm_model:Depth, each request may name a
depth up to the server's: "vllm_xargs": {"total_ut_steps": 2}. All loops run; vLLM's older runner alone can do this.
"""

import torch
from ouro_vllm import OuroConfig
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


def asked_depth(params) -> int | None:
    return (params.extra_args or {}).get("total_ut_steps")


class Depth(LogitsProcessor):
    """Leaves logits alone: it is how vLLM tells which request stands where in the batch, before each pass."""

    by_row = {}  # depth of the requests that name one, by their place
    sampling = False  # whether the next logits are the batch's, a row a request, and not those of a prompt's tokens

    def __init__(self, vllm_config, device, is_pin_memory):
        if not getattr(vllm_config.model_config.hf_config, "depth_by_request", False):
            raise ValueError('ouro_vllm_model:Depth needs --hf-overrides with "depth_by_request": true')

    @classmethod
    def validate_params(cls, params):
        depth, deepest = asked_depth(params), OuroConfig.served.total_ut_steps
        if depth is not None and not (isinstance(depth, int) and 1 <= depth <= deepest):
            raise ValueError(f"total_ut_steps must be a whole number from 1 to {deepest}, got {depth!r}")
        if depth not in (None, deepest) and params.prompt_logprobs is not None:
            raise ValueError(f"prompt_logprobs are at depth {deepest} alone")

    def is_argmax_invariant(self):
        return True

    def apply(self, logits):
        return logits

    def update_state(self, batch_update):
        Depth.sampling = True
        process_dict_updates(self.by_row, batch_update, lambda params, *_: asked_depth(params))


class OuroAttention(LlamaAttention):
    def __init__(self, config, *args, cache_config=None, quant_config=None, prefix="", **kwargs):
        super().__init__(config, *args, cache_config=cache_config, quant_config=quant_config, prefix=prefix, **kwargs)
        layer, layers = extract_layer_index(prefix), config.num_hidden_layers
        self.later = nn.ModuleList(  # `attn` is the first loop's
            Attention(
                self.num_heads,
                self.head_dim,
                self.scaling,
                num_kv_heads=self.num_kv_heads,
                cache_config=cache_config,
                quant_config=quant_config,
                prefix=prefix.replace(f"layers.{layer}.", f"layers.{loop * layers + layer}.") + ".attn",
            )
            for loop in range(1, config.total_ut_steps)
        )

    def forward(self, positions, hidden_states, loop):
        q, k, v = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        attention = self.later[loop - 1] if loop else self.attn
        return self.o_proj(attention(q, k, v))[0]


class OuroDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config, prefix="", config=None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=OuroAttention)
        config = vllm_config.model_config.hf_config
        self.input_layernorm_2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions, x, loop):
        x = x + self.input_layernorm_2(self.self_attn(positions, self.input_layernorm(x), loop))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


@support_torch_compile
class OuroModel(LlamaModel):
    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        states = []
        for loop in range(self.config.total_ut_steps):
            for layer in self.layers:
                x = layer(positions, x, loop)
            x = self.norm(x)
            states.append(x)
        return torch.cat(states, -1) if getattr(self.config, "depth_by_request", False) else x


class OuroForCausalLM(LlamaForCausalLM):
    embedding_modules = {}  # adapters leave embeddings and head alone

    def __init__(self, *, vllm_config, prefix=""):
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("no pipeline stages for Ouro, each loop would pass them all: use --tensor-parallel-size")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=OuroDecoderLayer)

    def _init_model(self, vllm_config, prefix="", layer_type=OuroDecoderLayer):
        return OuroModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def compute_logits(self, hidden_states):
        if getattr(self.config, "depth_by_request", False):
            states = hidden_states.unflatten(-1, (self.config.total_ut_steps, -1))  # (rows, loops, hidden)
            loops = [self.config.total_ut_steps - 1] * len(states)
            for row, depth in Depth.by_row.items() if Depth.sampling else ():
                loops[row] = depth - 1
            Depth.sampling = False
            hidden_states = states[range(len(states)), torch.tensor(loops, device=states.device)]
        return super().compute_logits(hidden_states)

    def load_weights(self, weights):
        return super().load_weights((name, weight) for name, weight in weights if "early_exit_gate" not in name)
