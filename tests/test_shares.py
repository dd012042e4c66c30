"""soco.ops.shares: which outputs of a group each block computes."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from soco.linalg import Factors
from soco.ops.layers import Weights
from soco.ops.shares import shares, shares_for
from soco.pivots import pivot_factors
from test_floors import PACKAGE
from test_ops_group import GROUPS, made

BLOCKS = 132  # of an H200


def group(layers, **extra):
    args = made(1, 8, layers, **extra)
    return Weights(args["down"], args["ups"], args["sources"], gated=extra.get("gated", False))


def rows_of(weights, firsts):
    """The rows that each block reads, of a group of one pivoted layer."""
    is_row = weights.sources[0] >= weights.ups[0].shape[1]
    before = [0, *is_row.cumsum(0).tolist()]
    return torch.tensor([before[b] - before[a] for a, b in itertools.pairwise(firsts)]).double()


def test_by_hand():
    """Rank 8: a row costs 9, a number of z 2; outputs end at 9, 11, 20 and 22."""
    weights = Weights(torch.ones(8, 3), [torch.ones(2, 8)], [torch.tensor([8, 0, 9, 1])])
    assert shares(weights, 1) == [0, 4]
    assert shares(weights, 2) == [0, 2, 4]
    assert shares(weights, 3) == [0, 0, 2, 4]  # 7.33 is in the first output, 14.67 in the third


@pytest.mark.parametrize("blocks", [1, 2, 7, 500])
@pytest.mark.parametrize("name", GROUPS)
def test_every_output_has_one_block(name, blocks):
    weights = group(GROUPS[name][2])
    firsts = shares(weights, blocks)
    assert len(firsts) == blocks + 1
    assert firsts[0] == 0
    assert firsts == sorted(firsts)
    assert firsts[-1] == weights.width


def test_outputs_of_plain_layers_are_shared_out_by_their_ranks():
    """Of 300 rows of rank 31 and 600 of rank 15, half of the bytes end behind the first layer."""
    weights = group([(31, 300, False), (15, 600, False)])
    assert shares(weights, 2) == [0, 300, 900]
    assert shares(weights, 6) == [0, 100, 200, 300, 500, 700, 900]


def test_both_layers_of_a_gated_group_count():
    """An output costs 9 + 9 where both have a row, and 2 + 9 where one has."""
    weights = Weights(
        torch.ones(16, 3), [torch.ones(2, 8), torch.ones(4, 8)],
        [torch.tensor([8, 9, 0, 1]), torch.empty(0, dtype=torch.int64)], gated=True,
    )  # fmt: skip
    assert shares(weights, 2) == [0, 1, 4]  # ends at 18, 36, 47 and 58
    assert shares(weights, 4) == [0, 0, 1, 2, 4]


@pytest.mark.parametrize(("rank", "out"), [(1024, 4096), (1493, 4096), (1493, 11008)])
def test_blocks_read_as_much_as_each_other(rank, out):
    """Pivots at random: a tenth more in the fullest block than in the mean one, at most."""
    is_pivot = torch.zeros(out, dtype=torch.bool)
    is_pivot[torch.randperm(out, generator=torch.Generator().manual_seed(0))[:rank]] = True
    places = torch.where(is_pivot, is_pivot.cumsum(0) - 1, rank + (~is_pivot).cumsum(0) - 1)
    weights = Weights(torch.empty(rank, 1), [torch.empty(out - rank, rank)], [places])
    rows = rows_of(weights, shares(weights, BLOCKS))
    evenly = rows_of(weights, [out * block // BLOCKS for block in range(BLOCKS + 1)])
    assert rows.sum() == evenly.sum() == out - rank
    assert rows.max() < 1.1 * rows.mean()
    assert evenly.max() > 1.1 * evenly.mean()


def test_pivots_that_lie_together_do_not_all_go_to_one_block():
    """1,024 numbers of z cost as much as 129 rows; nobody gets more than 8 times the mean."""
    places = torch.cat((torch.arange(1024), torch.arange(1024, 4096)))
    weights = Weights(torch.empty(1024, 1), [torch.empty(3072, 1024)], [places])
    outputs = torch.tensor(shares(weights, BLOCKS)).diff()
    assert outputs.sum() == 4096
    assert outputs.max() < 8 * 4096 / BLOCKS


def test_blocks_read_as_much_as_each_other_in_a_trained_layer():
    """Pivots that the demo model's largest weight has."""
    name, weight = max(
        ((n, w) for n, w in load_file(PACKAGE / "demo_model/model.safetensors").items()
         if "proj" in n and w.shape[0] > w.shape[1]),
        key=lambda pair: pair[1].numel(),
    )  # fmt: skip
    rank = weight.shape[1] // 2
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    pivoted = pivot_factors(Factors(U[:, :rank] * S[:rank], Vh[:rank]), name=name)
    is_row = torch.ones(len(weight), dtype=torch.bool)
    is_row[pivoted.pivots] = False
    places = torch.where(is_row, rank + is_row.cumsum(0) - 1, (~is_row).cumsum(0) - 1)
    weights = Weights(pivoted.rows, [pivoted.rest], [places])
    for blocks in (4, 8, 16):
        rows = rows_of(weights, shares(weights, blocks))
        evenly = rows_of(weights, [len(weight) * block // blocks for block in range(blocks + 1)])
        assert rows.max() - rows.min() < evenly.max() - evenly.min()


def test_only_pivoted_weights_on_a_gpu_have_shares(device):
    weights = group([(9, 31, False), (3, 12, False)], device=device)
    assert shares_for(weights) == []
    weights = group([(30, 50, True)], device=device)
    if device == "cpu":
        assert shares_for(weights) == []
    else:
        count = torch.cuda.get_device_properties(device).multi_processor_count
        assert shares_for(weights) == shares(weights, count)
