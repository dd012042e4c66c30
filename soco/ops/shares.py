"""Which outputs of a group each block of a CUDA grid computes."""

import torch

from soco.ops.layers import Weights

IDENTITY = 8  # outputs that are numbers of z, for the cost of a row of their rank


def shares_for(weights: Weights) -> list[int]:
    """What :func:`shares` gives for the GPU that pivoted weights are on; for others nothing.

    The core shares out the outputs of other weights by itself, since they cost the same throughout
    a layer. Which outputs of a pivoted layer are rows that must be read, only ``sources`` tells.
    """
    device = weights.down.device
    if device.type != "cuda" or not any(len(source) for source in weights.sources):
        return []
    return shares(weights, torch.cuda.get_device_properties(device).multi_processor_count)


def shares(weights: Weights, blocks: int) -> list[int]:
    """The first output of each of ``blocks`` blocks, and behind them the number of outputs.

    Outputs are shared out in their order, by the bytes of weights that have to be read for them. An
    output that is a number of z costs an eighth of a row, so that no block gets many times as many
    of these as others get outputs.
    """
    costs = []
    for number, up in enumerate(weights.ups):
        rows, rank = up.shape
        source = weights.sources[number].cpu() if weights.sources else torch.empty(0)
        is_row = source >= rank if len(source) else torch.ones(rows, dtype=torch.bool)
        costs.append(torch.where(is_row, rank + 1, rank // IDENTITY + 1))
    every = costs[0] + costs[1] if weights.gated else torch.cat(costs)
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), every.cumsum(0)))
    wanted = torch.arange(blocks + 1) * ends[-1] // blocks
    return (torch.searchsorted(ends, wanted, right=True) - 1).tolist()
