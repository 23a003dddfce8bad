"""Small random Ouro models for the tests, in float64, every parameter of which matters, and batches of all layouts."""

from pathlib import Path
from typing import Any

from ouro.model.modeling_ouro import IGNORE, PROJECTIONS, OuroConfig, OuroForCausalLM

import pytest
import reference_ouro as ref
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

VOCAB = 61  # no other size of the models, so that a tensor of this width is one over the vocabulary
SIZES = [
    {"total_ut_steps": 1, "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 16, "head_dim": 8},
    {"total_ut_steps": 2, "num_hidden_layers": 3, "num_attention_heads": 3, "hidden_size": 24},
    {"total_ut_steps": 3, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 20, "head_dim": 6}
    | {"rope_theta": 1e4, "rms_norm_eps": 0.01},
    {"total_ut_steps": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "head_dim": 12},
]
MEDIUM = SIZES[2]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s['total_ut_steps']}x{s['num_hidden_layers']}")
objectives = pytest.mark.parametrize("objective", ["last", "mixture", "all"])
SAMPLE = str(Path(__file__).parents[1] / "sample/ouro-tiny")


def tiny_config(size: dict[str, Any] = MEDIUM, **changes) -> OuroConfig:
    common = {"vocab_size": VOCAB, "intermediate_size": 28, "initializer_range": 0.3}
    return OuroConfig(**common | {"eos_token_id": None, "pad_token_id": 0} | size | changes)


def randomise(model: OuroForCausalLM, seed: int = 0) -> OuroForCausalLM:
    """Norm weights around 1 and an exit gate that splits the tokens over the loops; a fresh model has 1 and bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.5 + torch.rand(p.shape, generator=generator))
            elif "early_exit_gate" in name:
                p.copy_(0.4 * torch.randn(p.shape, generator=generator) - (0.3 if p.ndim == 1 else 0.0))
    return model


def tiny(size: dict[str, Any] = MEDIUM, seed: int = 0, **changes) -> OuroForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = OuroForCausalLM(tiny_config(size, **changes))
    return randomise(model, seed).double().eval()


def reference(model: OuroForCausalLM) -> tuple[ref.Weights, ref.Config]:
    return ref.load(model.state_dict()), model.config.to_dict()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-9, name: str = "") -> None:
    """Element by element, with an absolute allowance of `relative` times the largest expected element."""
    allowance = relative * float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=relative, atol=allowance, check_dtype=False, msg=lambda text: f"{name}: {text}"
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, which are then cleared."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-9) -> None:
    """A missing gradient counts as zero; the loss must not reach a parameter in one and not in the other."""
    for name in sorted(actual.keys() | expected.keys()):
        some = actual[name] if name in actual else expected[name]
        zero = torch.zeros_like(some)
        assert_close(actual.get(name, zero), expected.get(name, zero), relative, name)


def pad_rows(rows: list[Tensor], value: int, left: bool = False) -> Tensor:
    """1-D tensors -> (rows, longest), filled up with `value` on the right or the left."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def documents() -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels) of 6, 5, 4, 7, 6 and 1 tokens; most labels are set, even the first, which none predicts."""
    docs = []
    for seed, length in enumerate([6, 5, 4, 7, 6, 1]):
        ids = tokens(length, seed=seed)
        labels = ids.clone()
        if length > 1:
            labels[[2, length - 1][seed % 2]] = IGNORE
        docs.append((ids, labels))
    return docs


def rows(*groups: list[int], left: bool = False, positions: bool = True) -> dict[str, Tensor]:
    """A batch whose row r holds the documents groups[r] one after the other, padded to the longest row."""
    docs = documents()
    counted = [torch.cat([torch.arange(len(docs[d][0])) for d in group]) for group in groups]
    batch = {
        "input_ids": pad_rows([torch.cat([docs[d][0] for d in group]) for group in groups], 0, left),
        "labels": pad_rows([torch.cat([docs[d][1] for d in group]) for group in groups], IGNORE, left),
        "attention_mask": pad_rows([torch.ones_like(c) for c in counted], 0, left),
    }
    return batch | ({"position_ids": pad_rows(counted, 0, left)} if positions else {})


def without(batch: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != key}


# name -> (the documents of each row, the batch)
LAYOUTS = {
    "unpadded": ([[0], [4]], without(rows([0], [4], positions=False), "attention_mask")),
    "unpadded, mask": ([[0], [4]], rows([0], [4], positions=False)),
    "right-padded": ([[0], [1], [3]], without(rows([0], [1], [3], positions=False), "attention_mask")),
    "right-padded, mask": ([[0], [1], [3]], rows([0], [1], [3], positions=False)),
    "left-padded, mask": ([[0], [1], [3]], rows([0], [1], [3], left=True, positions=False)),
    "left-padded, mask, positions": ([[0], [1], [3]], rows([0], [1], [3], left=True)),
    "packed": ([[0, 1], [2, 3]], without(rows([0, 1], [2, 3]), "attention_mask")),
    "packed, mask": ([[0, 1], [2, 3]], rows([0, 1], [2, 3])),
    "packed, one row": ([[3, 5, 1, 2, 0]], without(rows([3, 5, 1, 2, 0]), "attention_mask")),
    "packed, padded": ([[0, 1, 2], [3, 4]], without(rows([0, 1, 2], [3, 4]), "attention_mask")),
    "packed, padded, mask": ([[0, 1, 2], [3, 4]], rows([0, 1, 2], [3, 4])),
    "packed, left-padded, mask": ([[3, 4], [0, 1, 2]], rows([3, 4], [0, 1, 2], left=True)),
}
LAYOUTS["packed, shared positions"] = (
    [[0, 1], [4, 1]],
    without(rows([0, 1], [4, 1]), "attention_mask") | {"position_ids": rows([0, 1])["position_ids"]},
)


# LoRA

KINDS = {  # name -> (how it is loaded, what fuse is told)
    "fp32": (None, "bf16"),
    "nf4": ({"double_quant": False}, "nf4"),
    "nf4, double": ({"double_quant": True}, "nf4"),
}


def adapted(kind: str = "fp32", loops: int = 2, seed: int = 0, size: dict = MEDIUM, **config) -> PeftModel:
    """A tiny model in training mode with random adapters, B too, as PEFT makes it; the same at every call."""
    from ouro.model.loading import load_ouro  # not above: the model's own tests run on other versions of transformers

    quantised, _ = KINDS[kind]
    if quantised is None:
        model = tiny(size, total_ut_steps=loops).float()
    else:
        model = load_ouro(SAMPLE, dtype=torch.float32, nf4=True, total_ut_steps=loops, **quantised)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        common = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, "target_modules": PROJECTIONS}
        model = get_peft_model(model, LoraConfig(**common | {"init_lora_weights": False} | config))
    model.enable_input_require_grads()
    return model.train()


def fused(kind: str = "fp32", **options) -> PeftModel:
    from ouro.model.lora import fuse

    model = adapted(kind, **options)
    fuse(model, KINDS[kind][1])
    return model


def loss_and_gradients(model: PeftModel, objective: str = "last") -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**rows([0, 1], [3]), objective=objective).loss
    loss.backward()
    return loss.detach(), gradients(model)


def moved(model: PeftModel) -> PeftModel:
    """As after an optimizer step: every adapter changed, in place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model
