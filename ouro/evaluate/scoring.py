"""Log-probabilities of many sequences at all loop depths, from one forward pass of each.

    scores = score(model, encode(tokenizer, [(prompt, [" a", " b"]), …])[0], depths=[1, 2, 3, 4], budget=32768)
    python tools/bench.py score                                                            # its speed

Sequences that begin alike are one tree of tokens, so that what they share is computed once: a question's options, the
rotations of its options, the examples before all questions of an exam.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ouro.files import UserError
from ouro.model.modeling_ouro import OuroForCausalLM, exit_distribution

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROW = 4096  # tokens up to which sequences that begin alike share a row
READOUT = 1024  # positions whose logits exist at once


@dataclass
class Row:
    """Sequences that share a beginning, as one tree of tokens in depth-first order: every shared token stands once.

    tokens, positions: of each node. last: of each node, the last one below it, so that node i sees node j exactly when
    j <= i <= last[j]. targets: (sequence, node, token that is to follow it).
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # the nodes of the newest sequence
    input: list[int] = field(default_factory=list)  # its tokens

    def shared(self, ids: list[int]) -> int:
        """How many of its first tokens a sequence has in common with the newest one."""
        return len(os.path.commonprefix((self.input, ids)))

    def add(self, number: int, ids: list[int], start: int) -> None:
        """A sequence whose tokens from `start` on are scored; sequences come in the order of their tokens."""
        self.input, targets = ids[:-1], ids[start:]
        same = len(os.path.commonprefix(([self.tokens[node] for node in self.path], self.input)))
        new = range(len(self.tokens), len(self.tokens) + len(self.input) - same)
        for node in self.path[:same]:
            self.last[node] = max(new.stop - 1, self.last[node])
        self.path = [*self.path[:same], *new]
        self.tokens += self.input[same:]
        self.positions += range(same, len(self.input))
        self.last += [new.stop - 1] * len(new)
        self.targets += [(number, node, t) for node, t in zip(self.path[start - 1 :], targets, strict=True)]

    @property
    def is_line(self) -> bool:
        return self.last == [len(self.tokens) - 1] * len(self.tokens)


def plan_rows(sequences: Sequence[tuple[list[int], int]], share: bool) -> list[Row]:
    """Rows that hold all sequences (tokens, start). One joins the row before if half of it is there already; without
    `share`, only if all of it is."""
    rows: list[Row] = []
    for number in sorted(range(len(sequences)), key=lambda n: sequences[n][0]):
        ids, start = sequences[number]
        same = rows[-1].shared(ids[:-1]) if rows else 0
        new = len(ids) - 1 - same
        if not rows or (new and not (share and same > new and len(rows[-1].tokens) + new <= ROW)):
            rows.append(Row())
        rows[-1].add(number, ids, start)
    return rows


def batches(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Rows of like length, the longest first, up to `budget` tokens with their padding; trees apart from lines."""
    for line in (False, True):
        batch: list[Row] = []
        for row in sorted((row for row in rows if row.is_line is line), key=lambda row: -len(row.tokens)):
            if batch and (len(batch) + 1) * width_of(batch) > budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def width_of(batch: list[Row]) -> int:
    return -(-len(batch[0].tokens) // 64) * 64  # few different widths: each is compiled, or tuned, for


def loops(model: OuroForCausalLM, ids: Tensor, positions: Tensor, last: Tensor | None, count: int) -> Iterator[Tensor]:
    """The normed state after each of `count` loops, (batch, seq, hidden).

    ids, positions: (batch, seq). last: (batch, seq), see Row; None: each token sees all before it.
    """
    decoder = model.model
    x = decoder.embed_tokens(ids)
    cos, sin = decoder.rotations(positions, x.dtype)
    mask = None
    if last is not None:
        at = torch.arange(ids.shape[1], device=ids.device)
        seen = (at[:, None] >= at) & (at[:, None] <= last[:, None])  # (batch, query, key)
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, -math.inf)[:, None]
    for _ in range(count):
        for layer in decoder.layers:
            x = layer(x, cos, sin, mask, mask is None, None)
        x = decoder.norm(x)
        yield x


def states(model: PreTrainedModel, batch: list[Row], depth: int) -> Iterator[Tensor]:
    device, width = model.device, width_of(batch)

    def padded(values: list[list[int]], fill: Sequence[int]) -> Tensor:
        return torch.tensor([[*row, *fill[len(row) :]] for row in values], device=device)

    ids = padded([row.tokens for row in batch], [0] * width)
    if not isinstance(model, OuroForCausalLM):
        mask = padded([[1] * len(row.tokens) for row in batch], [0] * width)
        yield model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return
    lines = batch[0].is_line
    positions = (
        torch.arange(width, device=device)[None] if lines else padded([r.positions for r in batch], range(width))
    )
    # A token of the padding sees itself and what is padding before it: a softmax over nothing is not a number.
    last = None if lines else padded([row.last for row in batch], [width - 1] * width)
    yield from loops(model, ids, positions, last, depth)


def readout(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log-probabilities (positions, vocabulary) from states (positions, hidden), in fp32 (float64 in such a model)."""
    logits = model.get_output_embeddings()(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap := getattr(model.config, "final_logit_softcapping", None):
        wide = cap * torch.tanh(wide / cap)
    return wide.log_softmax(-1)


@dataclass
class Scores:
    """log_p: [depth][sequence], summed over the scored tokens. exits: mean exit distribution by depth; distances: mean
    of |h_t - h_(t-1)| / |h_(t-1)| from the second loop to the deepest; both over all tokens that were read."""

    log_p: np.ndarray
    exits: list[list[float]] | None
    distances: list[float]
    tokens: int


@torch.no_grad()
def score(
    model: PreTrainedModel,
    sequences: Sequence[tuple[list[int], int]],
    depths: list[int],
    budget: int,
    description: str = "score",
) -> Scores:
    """Log-probability of each sequence's tokens from its start on, at each depth, from one pass through the deepest.

    sequences: (tokens, start >= 1). budget: tokens a forward pass. What sequences have in common at their beginning is
    computed once; only states that are read go through the head; neither batches nor padding change anything beyond the
    rounding of sums.
    """
    looped = isinstance(model, OuroForCausalLM)
    rows = plan_rows(sequences, share=looped)
    total = sum(len(row.tokens) for row in rows)
    log_p = np.zeros((len(depths), len(sequences)))
    statistics = torch.zeros(len(depths) + 1, max(depths), dtype=torch.float64, device=model.device)
    progress = tqdm(total=total, desc=description, unit=" tokens", unit_scale=True, leave=False, disable=None)
    launched: tuple[np.ndarray, np.ndarray, Tensor] | None = None

    def collect() -> None:
        """Waits for the batch that was launched last but one: the GPU is at work on the last one meanwhile."""
        where, inverse, values = launched
        values = values.cpu().numpy()[:, inverse]
        for depth in range(len(depths)):
            np.add.at(log_p[depth], where[:, 0], values[depth])

    for batch in batches(rows, budget):
        width = width_of(batch)
        where = np.array(
            [(n, r * width + node, token) for r, row in enumerate(batch) for n, node, token in row.targets]
        )
        pairs, inverse = np.unique(where[:, 1:], axis=0, return_inverse=True)  # sorted by position
        kept, index = np.unique(pairs[:, 0], return_inverse=True)
        cuts = np.searchsorted(index, np.arange(0, len(kept) + READOUT, READOUT))
        kept, index, wanted = (torch.from_numpy(x).to(model.device) for x in (kept, index, pairs[:, 1]))
        lengths = torch.tensor([len(row.tokens) for row in batch], device=model.device)
        real = (torch.arange(width, device=model.device) < lengths[:, None]).double()
        found, gates, before = [], [], None
        for loop, state in enumerate(states(model, batch, max(depths)), 1):
            if looped:
                gates.append(model.model.early_exit_gate(state).squeeze(-1))
                if before is not None:
                    wide = torch.promote_types(state.dtype, torch.float32)
                    change, size = (torch.linalg.vector_norm(x, dim=-1, dtype=wide) for x in (state - before, before))
                    statistics[-1, loop - 1] += (change / size * real).sum()
                before = state
            if loop not in depths:
                continue
            if looped:
                exits = exit_distribution(torch.stack(gates))
                statistics[depths.index(loop), :loop] += (exits * real).sum((1, 2))
            hidden = state.flatten(0, 1)[kept]
            parts = []
            for start, low, high in zip(range(0, len(kept), READOUT), cuts, cuts[1:], strict=False):
                table = readout(model, hidden[start : start + READOUT])
                parts.append(table[index[low:high] - start, wanted[low:high]])
            found.append(torch.cat(parts).double())
        if launched is not None:
            collect()
        launched = where, inverse.ravel(), torch.stack(found)
        progress.update(sum(len(row.tokens) for row in batch))
    collect()
    progress.close()
    if not looped:
        return Scores(log_p, None, [], total)
    means = (statistics / total).tolist()
    exits = [means[d][:depth] for d, depth in enumerate(depths)]
    return Scores(log_p, exits, means[-1][1:], total)


def encode(
    tokenizer: PreTrainedTokenizerBase, questions: list[tuple[str, list[str]]], longest: int | None = None
) -> tuple[list[tuple[list[int], int]], int]:
    """The sequences of (prompt, continuations), in order, and how many had to lose their beginning to fit.

    The tokens are those of the joined text; the continuation's are what follows the prompt's. Without a prompt token
    before them the first would have no probability, so then the text starts after the token that texts start with.
    """
    prompts = tokenizer([prompt for prompt, _ in questions]).input_ids
    joined = tokenizer([prompt + c for prompt, continuations in questions for c in continuations]).input_ids
    starts = [len(ids) for ids, (_, continuations) in zip(prompts, questions, strict=True) for _ in continuations]
    sequences, cut = [], 0
    for ids, start in zip(joined, starts, strict=True):
        if len(ids) <= start:
            raise UserError("the tokenizer joins a prompt's last token with the answer: this protocol cannot score it")
        extra = max(0, len(ids) - 1 - longest) if longest else 0
        cut += extra > 0
        sequences.append((ids[extra:], max(start - extra, 1)))
    return sequences, cut
