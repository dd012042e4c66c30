"""Truncated and whitened singular value decompositions: the numbers behind every factor pair."""

from soco.linalg.exact import SQUARING_LIMIT as SQUARING_LIMIT
from soco.linalg.factors import SVD, Factors, Spectrum
from soco.linalg.gram import add_gram as add_gram
from soco.linalg.parallel import side_by_side as side_by_side
from soco.linalg.parallel import work_of as work_of
from soco.linalg.parallel import workers_for as workers_for
from soco.linalg.truncated import Approximation, Subspace, randomized_svd, subspace, truncated_svd
from soco.linalg.whitened import order_components as order_components
from soco.linalg.whitened import whitened_svd

__all__ = [
    "SVD",
    "Approximation",
    "Factors",
    "Spectrum",
    "Subspace",
    "randomized_svd",
    "subspace",
    "truncated_svd",
    "whitened_svd",
]
