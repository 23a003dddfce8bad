"""Log-probabilities of many sequences at all loop depths, from one forward pass of each.

    scores = score(network, to_sequences(tokenizer, [(prompt, [" a", " b"]), …])[0], depths=[1, 2, 3, 4], budget=32768)
    python tools/bench.py score                                                            # its speed

Sequences that begin alike are one tree of tokens, so that what they share is computed once: a question's options, the
rotations of its options, the examples before all questions of an exam.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ouro.data.chats import text_tokens
from ouro.files import Progress, UserError
from ouro.model.modeling_ouro import OuroForCausalLM, exit_distribution

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_TREE = 4096  # tokens up to which sequences that begin alike share a tree
READOUT = 1024  # positions whose logits exist at once


@dataclass
class Tree:
    """Sequences that share a beginning: each node is a token, in depth-first order, and every shared token stands once.

    tokens, positions: of each node. last: for each node, the last node that continues it; node i sees node j exactly
    when j <= i <= last[j]. targets: what is scored, (sequence, node, the token that follows the node in that
    sequence)."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # the nodes of the newest sequence

    def shared(self, ids: list[int]) -> int:
        """How many of its first tokens a sequence has in common with the newest one."""
        return len(os.path.commonprefix(([self.tokens[node] for node in self.path], ids)))

    def add(self, number: int, ids: list[int], start: int, same: int) -> None:
        """Adds sequence `number`, of which the tokens from `start` on are scored, and the first `same` are nodes of the
        tree already. Sequences must be added in the order of their tokens."""
        read = ids[:-1]  # nothing follows the last token
        # In that order only the newest path grows: no later sequence has more in common with another one.
        new = range(len(self.tokens), len(self.tokens) + len(read) - same)
        for node in self.path[:same]:
            self.last[node] = max(new.stop - 1, self.last[node])
        self.path = [*self.path[:same], *new]
        self.tokens += read[same:]
        self.positions += range(same, len(read))
        self.last += [new.stop - 1] * len(new)
        self.targets += [(number, node, t) for node, t in zip(self.path[start - 1 :], ids[start:], strict=True)]

    @property
    def is_line(self) -> bool:
        """Whether it has no branches, so that plain causal attention serves."""
        return self.last == [len(self.tokens) - 1] * len(self.tokens)


def plant(sequences: Sequence[tuple[list[int], int]], share: bool) -> list[Tree]:
    """Trees that hold all sequences (tokens, start). A sequence joins the tree before it if that has half of its tokens
    already; without `share`, only if it has all of them."""
    trees: list[Tree] = []
    for number in sorted(range(len(sequences)), key=lambda n: sequences[n][0]):
        ids, start = sequences[number]
        same = trees[-1].shared(ids[:-1]) if trees else 0
        new = len(ids) - 1 - same
        if not trees or (new and not (share and same > new and len(trees[-1].tokens) + new <= LONGEST_TREE)):
            trees.append(Tree())
            same = 0
        trees[-1].add(number, ids, start, same)
    return trees


def batches_of(trees: list[Tree], budget: int) -> Iterator[list[Tree]]:
    """The trees in batches of at most `budget` tokens, padding included, the longest trees first. Trees without
    branches have batches of their own, which need no mask."""
    for line in (False, True):
        batch: list[Tree] = []
        for tree in sorted((tree for tree in trees if tree.is_line is line), key=lambda tree: -len(tree.tokens)):
            if batch and (len(batch) + 1) * width_of(batch) > budget:
                yield batch
                batch = []
            batch.append(tree)
        if batch:
            yield batch


def width_of(batch: list[Tree]) -> int:
    return -(-len(batch[0].tokens) // 64) * 64  # rounded up, since each new width is compiled or tuned for


def states_by_loop(network: PreTrainedModel, batch: list[Tree], count: int) -> Iterator[Tensor]:
    """The normed state after each of `count` loops, (batch, width, hidden); the only one of a model without loops."""
    device, width = network.device, width_of(batch)

    def padded(values: list[list[int]], fill: Sequence[int]) -> Tensor:
        return torch.tensor([[*row, *fill[len(row) :]] for row in values], device=device)

    ids = padded([tree.tokens for tree in batch], [0] * width)
    if not isinstance(network, OuroForCausalLM):
        mask = padded([[1] * len(tree.tokens) for tree in batch], [0] * width)
        yield network.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return
    decoder, at, mask = network.model, torch.arange(width, device=device), None
    x, positions = decoder.embed_tokens(ids), at[None]
    if not batch[0].is_line:
        positions = padded([tree.positions for tree in batch], range(width))
        # A token of the padding sees itself and what is padding before it: a softmax over nothing is not a number.
        last = padded([tree.last for tree in batch], [width - 1] * width)
        seen = (at[:, None] >= at) & (at[:, None] <= last[:, None])  # (batch, query, key)
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=device).masked_fill_(~seen, -math.inf)[:, None]
    cos, sin = decoder.rotations(positions, x.dtype)
    for _ in range(count):
        for layer in decoder.layers:
            x = layer(x, cos, sin, mask, mask is None, None)
        x = decoder.norm(x)
        yield x


def readout(network: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Log-probabilities (positions, vocabulary) from states (positions, hidden), in fp32 (float64 in such a model)."""
    logits = network.get_output_embeddings()(hidden)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap := getattr(network.config, "final_logit_softcapping", None):
        wide = cap * torch.tanh(wide / cap)
    return wide.log_softmax(-1)


class Wanted:
    """The pairs (position, token) of a batch whose log-probabilities are read. A pair that several sequences need is
    read once.

    sequences, pair: for each target of the trees its sequence and the number of its pair. positions: the positions that
    are read, sorted. place, tokens: for each pair the index of its position in `positions`, and its token. cuts: where
    the pairs are cut, so that each piece has READOUT positions."""

    def __init__(self, batch: list[Tree], device: torch.device):
        width = width_of(batch)
        targets = [(n, r * width + node, token) for r, tree in enumerate(batch) for n, node, token in tree.targets]
        self.sequences, *pairs = np.array(targets).T
        pairs, self.pair = np.unique(np.stack(pairs, 1), axis=0, return_inverse=True)  # sorted by position
        self.pair = self.pair.ravel()
        positions, place = np.unique(pairs[:, 0], return_inverse=True)
        self.cuts = np.searchsorted(place, np.arange(0, len(positions) + READOUT, READOUT))
        each = positions, place, pairs[:, 1].copy()
        self.positions, self.place, self.tokens = (torch.from_numpy(x).to(device) for x in each)

    def read(self, network: PreTrainedModel, state: Tensor) -> Tensor:
        """The log-probability of each pair, from states (batch, width, hidden), READOUT positions at a time."""
        hidden, parts = state.flatten(0, 1)[self.positions], []
        for chunk, (low, high) in enumerate(pairwise(self.cuts)):
            table = readout(network, hidden[chunk * READOUT : (chunk + 1) * READOUT])
            parts.append(table[self.place[low:high] - chunk * READOUT, self.tokens[low:high]])
        return torch.cat(parts).double()


@dataclass
class Scores:
    """log_p: log-probabilities (depths, sequences), summed over the scored tokens. exits: for each depth the mean exit
    distribution over loops. distances: by loop, from the second on, how far it moves the state, the mean of
    |h_t - h_(t-1)| / |h_(t-1)|. Both are means over all tokens that were read, of which there are `tokens`."""

    log_p: np.ndarray
    exits: list[list[float]] | None
    distances: list[float]
    tokens: int


@torch.no_grad()
def score(
    network: PreTrainedModel, sequences: Sequence[tuple[list[int], int]], depths: list[int], budget: int,
    title: str = "score",
) -> Scores:  # fmt: skip
    """Log-probability of each sequence's tokens from its start on, at each depth, from one pass through the deepest.

    sequences: (tokens, start >= 1). budget: tokens of a forward pass. What sequences have in common at their beginning
    is computed once, and logits are formed only for positions that are scored. How sequences are batched and padded
    changes no more than the rounding of sums."""
    looped = isinstance(network, OuroForCausalLM)
    trees = plant(sequences, share=looped)
    total = sum(len(tree.tokens) for tree in trees)
    log_p = np.zeros((len(depths), len(sequences)))
    # Sums over tokens, by loop: a row of exits for each depth, and a last row of distances.
    sums = torch.zeros(len(depths) + 1, max(depths), dtype=torch.float64, device=network.device)

    def collect(wanted: Wanted, found: Tensor) -> None:
        for place, values in enumerate(found.cpu().numpy()):
            np.add.at(log_p[place], wanted.sequences, values[wanted.pair])

    launched: tuple[Wanted, Tensor] | None = None
    with Progress(title, total, "tokens") as progress:
        for batch in batches_of(trees, budget):
            wanted = Wanted(batch, network.device)
            lengths = torch.tensor([len(tree.tokens) for tree in batch], device=network.device)
            real = (torch.arange(width_of(batch), device=network.device) < lengths[:, None]).double()  # 0: padding
            found, gates, before = [], [], None
            for loop, state in enumerate(states_by_loop(network, batch, max(depths)), 1):
                if looped:
                    gates.append(network.model.early_exit_gate(state).squeeze(-1))
                    if before is not None:
                        wide = torch.promote_types(state.dtype, torch.float32)
                        change, size = (
                            torch.linalg.vector_norm(x, dim=-1, dtype=wide) for x in (state - before, before)
                        )
                        sums[-1, loop - 1] += (change / size * real).sum()
                    before = state
                if loop in depths:
                    if looped:
                        exits = exit_distribution(torch.stack(gates))
                        sums[depths.index(loop), :loop] += (exits * real).sum((1, 2))
                    found.append(wanted.read(network, state))
            if launched:  # the batch before is fetched only now, when the GPU has this one to work on
                collect(*launched)
            launched = wanted, torch.stack(found)
            progress.update(sum(len(tree.tokens) for tree in batch))
    collect(*launched)
    if not looped:
        return Scores(log_p, None, [], total)
    means = (sums / total).tolist()
    exits = [means[place][:depth] for place, depth in enumerate(depths)]
    return Scores(log_p, exits, means[-1][1:], total)


def to_sequences(
    tokenizer: PreTrainedTokenizerBase, questions: list[tuple[str, list[str]]], longest: int | None = None
) -> tuple[list[tuple[list[int], int]], int]:
    """The sequences (tokens, start) of each prompt with each of its continuations, in order; and how many of them lost
    their beginning, to have at most `longest` tokens.

    Prompt and continuation are tokenised as one text, of which what follows the prompt's number of tokens is scored.
    After an empty prompt the first token is not scored, since nothing stands before it.
    Raises UserError: a continuation has no token of its own."""
    prompts = text_tokens([prompt for prompt, _ in questions], tokenizer, begin=True)
    joined = text_tokens([prompt + c for prompt, continuations in questions for c in continuations], tokenizer, True)
    starts = [len(ids) for ids, (_, continuations) in zip(prompts, questions, strict=True) for _ in continuations]
    sequences, cut = [], 0
    for ids, start in zip(joined, starts, strict=True):
        if len(ids) <= start:
            raise UserError("the tokenizer joins a prompt's last token with the answer: this protocol cannot score it")
        extra = max(0, len(ids) - 1 - longest) if longest else 0
        cut += extra > 0
        sequences.append((ids[extra:], max(start - extra, 1)))
    return sequences, cut
