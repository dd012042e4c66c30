"""The ops of soco: schema, checks, kernels per device, fake, backward - one place per op.

Tensors in, new tensors out: nothing is written into an input, and randomness comes in as a seed.
Sums and products are float32 (float64 for float64) whatever the dtype of the tensors. Derivatives
of every order exist: each backward pass is an op with a backward pass of its own. Under autocast
:func:`low_rank_linear` casts its inputs as ``torch.nn.functional.linear`` does; the other ops
compute on what they are given.
"""

from soco.core import MOST_MEMBERS as MOST_MEMBERS
from soco.ops.checks import all_finite as all_finite
from soco.ops.checks import check_finite as check_finite
from soco.ops.direct import DirectCall as DirectCall
from soco.ops.direct import is_followed as is_followed
from soco.ops.group import PreparedGroup as PreparedGroup
from soco.ops.group import direct_call as direct_call
from soco.ops.group import low_rank_group
from soco.ops.layers import Weights as Weights
from soco.ops.layers import expanded as expanded
from soco.ops.layers import most_tokens as most_tokens
from soco.ops.layers import products as products
from soco.ops.layers import widened as widened
from soco.ops.lowrank import low_rank_linear, low_rank_linear_backward
from soco.ops.sketch import gaussian_sketch, gaussian_sketch_backward
from soco.ops.spectral import (
    spectral_linear,
    spectral_linear_backward,
    spectral_quadratic,
    spectral_scale,
    spectral_scale_backward,
)
from soco.ops.svd import batched_svd
from soco.ops.svd import fix_signs as fix_signs

__all__ = [
    "batched_svd",
    "gaussian_sketch",
    "gaussian_sketch_backward",
    "low_rank_group",
    "low_rank_linear",
    "low_rank_linear_backward",
    "spectral_linear",
    "spectral_linear_backward",
    "spectral_quadratic",
    "spectral_scale",
    "spectral_scale_backward",
]
