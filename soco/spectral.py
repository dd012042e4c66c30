"""The layer that learns which spectral components of a weight matter."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soco import ops
from soco.linalg import Factors, Spectrum


class SpectralLinear(nn.Module):
    """A linear layer with one trainable score per spectral component.

    ``y = up ((sigma * score * mask) * (down x)) + bias (+ deviation)``; ``up``, ``sigma`` and
    ``down`` are frozen and together are the weight, so that with every score at 1 and nothing
    masked the layer computes what it computed before.

    The scores are ``largest_score * sigmoid(logit + shift)`` with the shift that makes them 1 at
    ``logit = 0``: bounded, positive, and able to pass 1, so that components that stay can make up
    for those that go.

    Args:
        weight: (out, in), the dense weight; kept by reference, for the dense outputs.
        bias: (out,) or None; kept by reference.
        spectrum: a full decomposition of ``weight`` (``linalg.whitened_svd`` without a rank).
        largest_score: bound of the scores, above 1.
        deviation: whether a trainable vector (out,), zero at the start, is added to the outputs.

    Raises:
        ValueError: ``largest_score`` is not above 1 and finite, or the spectrum does not fit the
            weight.

    Source: SoCo, arXiv:2502.15092 (the spectrum, scores that may pass 1, the deviation). The form
    of the score function and of the deviation is our choice; the paper's is not published.
    """

    up: Tensor  # (out, rank), the weight's dtype, columns of unit norm
    down: Tensor  # (rank, in), the weight's dtype, rows of unit norm
    gain: Tensor  # (rank,), float32: sigma, times the norms that up's columns and down's rows had
    mask: Tensor  # (rank,), bool: the components that are alive

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spectrum: Spectrum,
        *,
        largest_score: float = 2.0,
        deviation: bool = False,
    ) -> None:
        """Take a weight apart; nothing is trained yet."""
        super().__init__()
        if not 1 < largest_score < math.inf:
            raise ValueError(f"largest_score must be above 1 and finite, got {largest_score}")
        out_features, in_features = weight.shape
        rank = min(weight.shape)
        if spectrum.up.shape != (out_features, rank) or spectrum.down.shape != (rank, in_features):
            raise ValueError(
                f"the spectrum of a weight {tuple(weight.shape)} must have up ({out_features}, "
                f"{rank}) and down ({rank}, {in_features}), got {tuple(spectrum.up.shape)} and "
                f"{tuple(spectrum.down.shape)}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.largest_score = largest_score
        self.dense = False  # True: forward is the dense layer's
        self.recording = False  # True: backward records the gradient of the scores per sequence
        self._recorded: Tensor | None = None  # (sequences, rank), float32
        self._shift = -math.log(largest_score - 1)
        self.weight, self.bias = weight, bias
        # Rows of down that the inputs hardly see are huge; columns of up that the loss hardly sees.
        up, down = spectrum.up.double(), spectrum.down.double()
        tiny = torch.finfo(down.dtype).tiny
        left, right = up.norm(dim=0).clamp_min(tiny), down.norm(dim=1).clamp_min(tiny)
        self.register_buffer("up", (up / left).to(weight.dtype), persistent=False)
        self.register_buffer("down", (down / right[:, None]).to(weight.dtype), persistent=False)
        self.register_buffer("gain", (spectrum.sigma * left * right).float(), persistent=False)
        mask = torch.ones(rank, dtype=torch.bool, device=weight.device)
        self.register_buffer("mask", mask, persistent=False)
        self.logit = nn.Parameter(torch.zeros(rank, device=weight.device))
        self.deviation = (
            nn.Parameter(torch.zeros(out_features, device=weight.device)) if deviation else None
        )

    def scores(self) -> Tensor:
        """The importance scores (rank,), float32, between 0 and ``largest_score``."""
        return self.largest_score * torch.sigmoid(self.logit + self._shift)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        if self.dense:
            return F.linear(x, self.weight, self.bias)
        z = F.linear(x, self.down)  # (..., rank)
        scaled = ops.spectral_scale(z, self.gain * self.scores(), self.mask)
        if self.recording:
            scaled = _RecordScores.apply(scaled, z, self)
        y = F.linear(scaled, self.up, self.bias)
        if self.deviation is not None and not bool(self.mask.all()):
            y = y + self.deviation.to(y.dtype)
        return y

    def take_recorded(self) -> Tensor | None:
        """What backward recorded since the last call, and forget it.

        Returns:
            (sequences, rank), float32: the gradient of the loss by each score, masked ones
            included, summed over the tokens of a sequence; one row for all sequences where the
            layer sees its tokens without a batch dimension; None if nothing was recorded.
        """
        recorded, self._recorded = self._recorded, None
        return recorded

    @torch.no_grad()
    def fold(self) -> tuple[Tensor | Factors, Tensor | None]:
        """The trained layer as a plain one: its weight or factors, and its bias.

        Returns:
            The dense weight (out, in) with the scores in it where nothing is masked, else the
            factors of the components alive, ``sqrt(gain * score)`` on either side; in the weight's
            dtype. Then the bias (out,), the deviation in it, or None.
        """
        scale = self.gain * self.scores()  # (rank,)
        up, down = self.up.float(), self.down.float()
        dtype = self.weight.dtype
        if bool(self.mask.all()):
            return ((up * scale) @ down).to(dtype), self.bias
        root = scale[self.mask].sqrt()
        factors = Factors(up[:, self.mask] * root, root[:, None] * down[self.mask]).to(dtype)
        if self.deviation is None:
            return factors, self.bias
        bias = self.deviation if self.bias is None else self.bias.float() + self.deviation
        return factors, bias.detach().to(dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"alive={int(self.mask.sum())} of {len(self.mask)}"
        )


class _RecordScores(torch.autograd.Function):
    """The identity; its backward notes the gradient by the scores for each sequence.

    With ``h = gain * score * z`` the gradient by a score is ``sum_t dL/dh_t gain z_t``, whether the
    component is masked or not. What is needed later is saved for backward and held nowhere else, so
    that activation checkpointing keeps its gain.
    """

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, z: Tensor, layer: SpectralLinear) -> Tensor:
        ctx.save_for_backward(z)
        ctx.layer = layer
        return scaled.view_as(scaled)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        (z,) = ctx.saved_tensors
        layer: SpectralLinear = ctx.layer
        if layer.recording:
            product = grad.detach().float() * z.detach().float()  # (..., rank)
            sequences = len(product) if product.dim() > 2 else 1
            row = product.reshape(sequences, -1, product.shape[-1]).sum(1) * layer.gain
            seen = layer._recorded
            if seen is not None and seen.shape != row.shape:  # called with and without a batch
                seen, row = seen.sum(0, keepdim=True), row.sum(0, keepdim=True)
            layer._recorded = row if seen is None else seen + row
        return grad, None, None
