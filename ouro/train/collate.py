"""Rows -> a batch of tensors."""

from ouro.model.modeling_ouro import IGNORE, document_bounds, document_starts, positions_trained

import numpy as np
import torch


def collate(items: list[list[tuple[np.ndarray, np.ndarray]]], width: int = 1) -> dict[str, torch.Tensor]:
    """A batch, padded on the right, to `width` at least: input_ids, labels, attention_mask, all int64 (batch, seq), and
    `trained`, the positions that predict (`positions_trained`). Where an item has several documents there are
    position_ids too, which begin at 0 in each (and in the padding), and `documents`, their bounds. What the model would
    compute of these by itself is computed here, where no GPU has to be waited for."""
    width = max(width, *(sum(len(ids) for ids, _ in item) for item in items))
    input_ids = torch.zeros(len(items), width, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE)
    mask, positions = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for i, item in enumerate(items):
        at = 0
        for ids, targets in item:
            stretch = slice(at, at := at + len(ids))
            input_ids[i, stretch], labels[i, stretch] = torch.from_numpy(ids), torch.from_numpy(targets)
            positions[i, stretch] = torch.arange(len(ids))
        mask[i, :at] = 1
        positions[i, at:] = torch.arange(width - at)
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    if all(len(item) < 2 for item in items):
        return batch | {"trained": positions_trained(labels)}
    starts = document_starts(positions)
    batch |= {"position_ids": positions, "documents": document_bounds(starts)}
    return batch | {"trained": positions_trained(labels, starts)}
