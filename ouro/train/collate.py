"""Rows of a pass -> a batch of tensors."""

from ouro.data.batches import Pass, noise
from ouro.model.modeling_ouro import IGNORE, document_bounds, document_starts, positions_trained

import numpy as np
import torch


def collate(
    rows: list[tuple[int, np.ndarray, np.ndarray]], how: Pass, step: int = 0, seed: int | None = None
) -> dict[str, torch.Tensor]:
    """The arguments of OuroForCausalLM.forward for rows (number, input_ids, labels) in a pass, padded on the right.

    input_ids, labels: int64 (batch, width). trained: the positions that predict (`positions_trained`). Where several
    rows stand in one there are position_ids too, which begin at 0 in each (and in the padding), and `documents`, their
    bounds. noise: int32 (batch, width), what dropout is drawn from, unless `seed` is None. All of this is computed
    here, where no GPU has to be waited for."""
    batch = 1 if how.packed else len(rows)
    input_ids = torch.zeros(batch, how.width, dtype=torch.long)
    labels, positions = torch.full_like(input_ids, IGNORE), torch.zeros_like(input_ids)
    drawn, at = torch.zeros(batch, how.width, dtype=torch.int32), 0
    for i, (number, ids, targets) in enumerate(rows):
        place = (0, slice(at, at + len(ids))) if how.packed else (i, slice(0, len(ids)))
        input_ids[place], labels[place] = torch.from_numpy(ids), torch.from_numpy(targets)
        if seed is not None:
            drawn[place] = torch.from_numpy(noise(seed, step, number, len(ids)))
        positions[place] = torch.arange(len(ids))
        at += len(ids)
    result = {"input_ids": input_ids, "labels": labels} | ({} if seed is None else {"noise": drawn})
    if not how.packed:
        return result | {"trained": positions_trained(labels)}
    positions[0, at:] = torch.arange(how.width - at)
    starts = document_starts(positions)
    result |= {"position_ids": positions, "documents": document_bounds(starts)}
    return result | {"trained": positions_trained(labels, starts)}
