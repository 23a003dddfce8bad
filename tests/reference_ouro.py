"""A plain, slow, float64 reference of the looped language model Ouro, the independent oracle of the tests.

Functions over a plain state dict `w` (name -> tensor, the published names); one unpadded document at a time, no batch
dimension, no cache, no fused kernels. Written from the description of the architecture, not from any implementation.
Shapes in the docstrings: S = length of the document, H = hidden size, D = head_dim, V = vocabulary, T = loops.
"""

import math
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Config = dict[str, Any]
IGNORE = -100


def load(weights: Weights) -> Weights:
    """Float64 leaf copies of all the weights, with requires_grad=True."""
    w = {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in weights.items()}
    return {name: tensor.requires_grad_(True) for name, tensor in w.items()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (S, H), weight (H,) -> (S, H): x divided by its root mean square, times the weight."""
    return x / torch.sqrt((x * x).mean(dim=1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """x (S, D) -> (S, D): rotary embedding of positions 0..S-1, dimension j paired with dimension j + D/2."""
    half = x.shape[1] // 2
    speeds = torch.tensor([theta ** (-j / half) for j in range(half)], dtype=torch.float64)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * speeds[None, :]  # (S, D/2)
    first, second = x[:, :half], x[:, half:]
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head: q, k, v (S, D) -> (S, D); position i attends to positions 0..i and to nothing else."""
    outputs = []
    for i in range(q.shape[0]):
        scores = k[: i + 1] @ q[i] / math.sqrt(q.shape[1])  # (i + 1,)
        powers = torch.exp(scores - scores.max().detach())
        outputs.append((powers / powers.sum()) @ v[: i + 1])
    return torch.stack(outputs)


def attention(w: Weights, config: Config, prefix: str, x: Tensor) -> Tensor:
    """x (S, H) -> (S, H): multi-head causal self-attention with rotary positions."""
    q = x @ w[prefix + "q_proj.weight"].T  # (S, heads * D)
    k = x @ w[prefix + "k_proj.weight"].T
    v = x @ w[prefix + "v_proj.weight"].T
    theta, head_dim = config["rope_theta"], config["head_dim"]
    heads = []
    for head in range(config["num_attention_heads"]):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        heads.append(causal_attention(rotate(q[:, columns], theta), rotate(k[:, columns], theta), v[:, columns]))
    return torch.cat(heads, dim=1) @ w[prefix + "o_proj.weight"].T


def mlp(w: Weights, prefix: str, x: Tensor) -> Tensor:
    """x (S, H) -> (S, H): down(silu(gate(x)) * up(x))."""
    gate = x @ w[prefix + "gate_proj.weight"].T
    up = x @ w[prefix + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ w[prefix + "down_proj.weight"].T


def layer(w: Weights, config: Config, index: int, x: Tensor) -> Tensor:
    """x (S, H) -> (S, H): one block, with a norm before and a norm after each of the two sub-layers."""
    prefix, eps = f"model.layers.{index}.", config["rms_norm_eps"]
    branch = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
    branch = attention(w, config, prefix + "self_attn.", branch)
    x = x + rms_norm(branch, w[prefix + "input_layernorm_2.weight"], eps)
    branch = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
    branch = mlp(w, prefix + "mlp.", branch)
    return x + rms_norm(branch, w[prefix + "post_attention_layernorm_2.weight"], eps)


def loop_states(w: Weights, config: Config, input_ids: Tensor) -> list[Tensor]:
    """input_ids (S,) -> the T normed states (S, H), one after every loop; each is also the input of the next loop."""
    x = w["model.embed_tokens.weight"][input_ids]
    states = []
    for _ in range(config["total_ut_steps"]):
        for index in range(config["num_hidden_layers"]):
            x = layer(w, config, index, x)
        x = rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])
        states.append(x)
    return states


def gate_logits(w: Weights, states: list[Tensor]) -> list[Tensor]:
    """T states (S, H) -> T exit-gate logits (S,)."""
    return [h @ w["model.early_exit_gate.weight"][0] + w["model.early_exit_gate.bias"][0] for h in states]


def exit_pdf(gates: list[Tensor]) -> Tensor:
    """T gate logits (S,) -> (T, S): the probability to exit after each loop; the last loop takes what remains."""
    remaining = torch.ones_like(gates[0])
    pdf = []
    for gate in gates[:-1]:  # the last gate is not used
        chance = torch.sigmoid(gate)
        pdf.append(chance * remaining)
        remaining = remaining * (1 - chance)
    return torch.stack([*pdf, remaining])


def logits_at(w: Weights, states: list[Tensor], exit_at_step: int) -> Tensor:
    """T states (S, H) -> (S, V): the logits of loop exit_at_step, counted from 0."""
    return states[exit_at_step] @ w["lm_head.weight"].T


def logits_threshold(w: Weights, states: list[Tensor], threshold: float) -> Tensor:
    """T states (S, H) -> (S, V): each token at its first loop with cumulative p >= threshold, else at the last."""
    cumulative = exit_pdf(gate_logits(w, states)).detach().cumsum(dim=0)  # (T, S)
    rows = []
    for i in range(cumulative.shape[1]):
        reached = [step for step in range(len(states)) if cumulative[step, i] >= threshold]
        rows.append(logits_at(w, states, reached[0] if reached else len(states) - 1)[i])
    return torch.stack(rows)


def logits_mixture(w: Weights, states: list[Tensor]) -> Tensor:
    """T states (S, H) -> (S, V): the sum over loops of p_t times the logits of loop t (of logits, not of chances)."""
    pdf = exit_pdf(gate_logits(w, states))
    return sum(pdf[step][:, None] * logits_at(w, states, step) for step in range(len(states)))


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """logits (S, V), labels (S,) -> (sum, number of terms); labels[i] is predicted from position i - 1."""
    total, number = logits.new_zeros(()), 0
    for i in range(1, labels.shape[0]):
        label = int(labels[i])
        if label != IGNORE:
            total = total + torch.logsumexp(logits[i - 1], dim=0) - logits[i - 1, label]
            number += 1
    return total, number


def loss(w: Weights, config: Config, rows: list[tuple[Tensor, Tensor]], objective: str) -> Tensor:
    """Rows of (input_ids (S,), labels (S,)), each its own document -> scalar; objective "last", "mixture" or "all".

    The cross-entropy summed over all counted positions of all rows, over their number.
    """
    total, number = torch.zeros((), dtype=torch.float64), 0
    for input_ids, labels in rows:
        states = loop_states(w, config, input_ids)
        loops = {"last": [len(states) - 1], "all": range(len(states)), "mixture": []}[objective]
        candidates = [logits_at(w, states, step) for step in loops] or [logits_mixture(w, states)]
        results = [summed_cross_entropy(logits, labels) for logits in candidates]
        total = total + sum(result[0] for result in results) / len(results)
        number += results[0][1]
    return total / number


@torch.no_grad()
def generate_greedy(w: Weights, config: Config, input_ids: Tensor, max_new_tokens: int) -> list[int]:
    """input_ids (S,) -> the new ids only, by the last loop: all is recomputed for each token; no stop token."""
    ids = [int(token) for token in input_ids]
    for _ in range(max_new_tokens):
        states = loop_states(w, config, torch.tensor(ids))
        ids.append(int(logits_at(w, states, len(states) - 1)[-1].argmax()))
    return ids[len(input_ids) :]
