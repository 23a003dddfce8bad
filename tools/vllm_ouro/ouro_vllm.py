"""Ouro for vLLM, which runs it up to 0.26 itself and not from 0.27 on.

    PYTHONPATH=tools/vllm_ouro vllm serve MODEL --hf-overrides '{"total_ut_steps": 2}'     # or: pip install this folder

vLLM finds this file through the entry point that stands beside it, and calls `register` in each of its processes.
"""

from transformers import AutoConfig, PretrainedConfig


class OuroConfig(PretrainedConfig):
    model_type = "ouro"

    def update(self, settings):  # by --hf-overrides
        super().update(settings)
        OuroConfig.served = self


def register() -> None:
    from vllm import ModelRegistry  # not above: vLLM imports this file while it is imported itself

    AutoConfig.register("ouro", OuroConfig, exist_ok=True)  # vLLM then takes no code from the model's folder
    ModelRegistry.register_model("OuroForCausalLM", "ouro_vllm_model:OuroForCausalLM")
