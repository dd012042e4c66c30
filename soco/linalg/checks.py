"""What comes in: matrices, ranks and Gram matrices; and their signs and scales."""

import operator

import torch
from torch import Tensor

from soco.ops import check_finite

# How far from symmetric or positive a Gram matrix may be, as a fraction of its largest entry or
# eigenvalue, and still count as one that was only accumulated in low precision.
GRAM_TOLERANCE = 1e-4
_ROWS = 256  # that are compared with their mirror images at a time


def check_rank(rank: int, most: int, name: str) -> int:
    """A rank as a whole number from 0 to ``most``."""
    try:
        rank = operator.index(rank)
    except TypeError:
        raise ValueError(f"rank must be a whole number, got {rank!r}") from None
    if not 0 <= rank <= most:
        raise ValueError(f"rank must be from 0 to {most} for {name}, got {rank}")
    return rank


def check_matrix(matrix: Tensor, name: str) -> None:
    """Refuse what is no finite floating-point matrix."""
    if matrix.dim() < 2:
        raise ValueError(f"{name} must be (..., out, in), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {matrix.dtype}")
    check_finite(name, matrix)


def check_gram(gram: Tensor, weight: Tensor, name: str) -> None:
    """Refuse what is no Gram matrix of a weight's inputs."""
    title, inputs = f"the Gram matrix of {name}", weight.shape[1]
    if gram.shape != (inputs, inputs):
        raise ValueError(
            f"{title} must be (in, in) = ({inputs}, {inputs}), got {tuple(gram.shape)}"
        )
    if gram.device != weight.device:
        raise ValueError(f"{title} is on {gram.device}, the weight on {weight.device}")
    check_matrix(gram, title)
    if inputs == 0:
        return
    largest = largest_of(gram)
    skew = _skew(gram.detach())
    if skew > GRAM_TOLERANCE * largest:
        raise ValueError(
            f"{title} is not symmetric: entries mirrored on the diagonal differ by up to "
            f"{skew:.3g}, where the largest is {largest:.3g}"
        )
    if gram.diagonal().amin() < -GRAM_TOLERANCE * largest:
        raise ValueError(
            f"{title} is not positive semidefinite: its diagonal holds {gram.diagonal().amin():.3g}"
        )


def to_unit_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Divide matrices (..., out, in) by a power of two each, exactly, so that squares stay finite.

    Returns:
        The matrices with entries below 1, and the exponent that each was divided by (...,), int32.
    """
    exponent = torch.frexp(largest_of(matrix)).exponent
    return times_power_of_two(matrix, -exponent[..., None, None]), exponent


def largest_of(matrix: Tensor) -> Tensor:
    """The largest absolute value of matrices (..., out, in), without another one beside each."""
    return torch.maximum(matrix.amax((-2, -1)), -matrix.amin((-2, -1)))


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent``, also where the power itself is no number of x's dtype."""
    half = exponent // 2
    return (x * torch.exp2(half.to(x.dtype))).mul_(torch.exp2((exponent - half).to(x.dtype)))


def _skew(matrix: Tensor) -> Tensor:
    """How far a square matrix is from its mirror image, at the most; a few rows at a time."""
    piece = matrix.new_empty(min(_ROWS, len(matrix)), len(matrix))
    gaps = [
        largest_of(torch.sub(one, other, out=piece[: len(one)]))
        for one, other in zip(matrix.split(_ROWS), matrix.mT.split(_ROWS), strict=True)
    ]
    return torch.stack(gaps).amax()
