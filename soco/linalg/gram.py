"""Sums of Gram matrices over many tokens."""

import torch
from torch import Tensor

# Rows of a product in float32, of which sums in float64 are taken.
_ROWS = 2048
# Columns of a product: what lies below the diagonal block is mirrored, not computed. A GPU is fast
# only at larger products.
_COLUMNS = {"cpu": 256}
_MANY_COLUMNS = 2048


@torch.no_grad()
def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to ``total``: products in float32, sums in float64.

    Half of the products are computed, the others are their mirror images, so that the sum is
    symmetric to the last bit; beside it there is no room for another matrix of its size.

    Args:
        total: (n, n), float64, added to in place.
        rows: (tokens, n), floating point.
    """
    n = rows.shape[1]
    step = _COLUMNS.get(rows.device.type, _MANY_COLUMNS)
    for chunk in rows.split(_ROWS):
        wide = chunk.float()
        for begin in range(0, n, step):
            end = min(n, begin + step)
            product = (wide[:, begin:end].mT @ wide[:, begin:]).double()
            total[begin:end, begin:].add_(product)
            total[end:, begin:end].add_(product[:, end - begin :].mT)
