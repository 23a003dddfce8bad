"""The model that ouro_vllm.py registers: vLLM's Llama with four norms a layer, and loops.

The same layers run `total_ut_steps` times, the final norm after each loop. Each (loop, layer) has keys and values of
its own, hence an `Attention` of its own, numbered as if the loops were more layers. The last loop answers: the exit
gate is not loaded.
"""

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors


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
        for loop in range(self.config.total_ut_steps):
            for layer in self.layers:
                x = layer(positions, x, loop)
            x = self.norm(x)
        return x


class OuroForCausalLM(LlamaForCausalLM):
    embedding_modules = {}  # adapters leave embeddings and head alone

    def __init__(self, *, vllm_config, prefix=""):
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("no pipeline stages for Ouro, each loop would pass them all: use --tensor-parallel-size")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=OuroDecoderLayer)

    def _init_model(self, vllm_config, prefix="", layer_type=OuroDecoderLayer):
        return OuroModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def load_weights(self, weights):
        return super().load_weights((name, weight) for name, weight in weights if "early_exit_gate" not in name)
