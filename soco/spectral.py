"""The layer that learns which spectral components of a weight matter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soco import ops
from soco.linalg import Factors, Spectrum

# What a layer may train besides its scores.
BESIDES = ("left", "right", "deviation")


@dataclass(frozen=True)
class Snapshot:
    """What a layer's scores were, and what its components were worth, when a budget was met."""

    scores: Tensor  # (rank,), float32
    logit: Tensor  # (rank,), float32, of which the scores are made
    values: Tensor  # (rank,), float32: what a component is worth in the loss
    mask: Tensor  # (rank,), bool: the components that are alive
    left: Tensor | None = None  # (out,), of the outputs' scales; none were trained
    right: Tensor | None = None  # (in,), of the inputs' scales
    deviation: Tensor | None = None  # (out,), a trained one


class Components(NamedTuple):
    """A weight's components as they are trained: of unit norm, what they weigh beside them."""

    up: Tensor  # (out, rank), the dtype that is computed in, columns of unit norm
    down: Tensor  # (rank, in), of the same, rows of unit norm
    gain: Tensor  # (rank,), float32: what a component is multiplied with, its score apart
    sigma: Tensor  # (rank,), of the spectrum: what it says that dropping a component costs

    @classmethod
    def of(cls, spectrum: Spectrum, dtype: torch.dtype) -> "Components":
        """The components of a spectrum, in a dtype."""
        # Rows of down that the inputs hardly see are huge; columns of up that the loss hardly sees.
        up, left = _normed(spectrum.up, 0, dtype)
        down, right = _normed(spectrum.down, 1, dtype)
        return cls(up, down, (spectrum.sigma * left * right).float(), spectrum.sigma)


def _normed(matrix: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix with vectors of unit norm along ``dim``, in a dtype; and the norms they had."""
    wide = matrix.to(torch.float64, copy=True)
    norms = wide.norm(dim=dim).clamp_min(torch.finfo(wide.dtype).tiny)
    return wide.div_(norms.unsqueeze(dim)).to(dtype), norms


class SpectralLinear(nn.Module):
    """A linear layer with one trainable score per spectral component.

    ``y = up ((sigma * score * mask) * (down x)) + bias``; ``up``, ``sigma`` and ``down`` are frozen
    and together are the weight, so that with every score at 1 and nothing masked the layer computes
    what it computed before.

    The scores are ``largest_score * sigmoid(logit + shift)`` with the shift that makes them 1 at
    ``logit = 0``: bounded, positive, and able to pass 1, so that components that stay can make up
    for those that go. With ``largest_score=inf`` they are ``exp(logit)``.

    With ``channels``, two more diagonals are trained, one scale for every output and every input:
    ``up`` becomes ``diag(1 + left) up``, ``down`` becomes ``down diag(1 + right)``. They vanish in
    the factors, as the scores do.

    Two kinds of deviation may be added where components are masked. Given the ``mean`` of the
    layer's inputs, ``weight mean - up ((sigma * score * mask) * (down mean))``: then the scores
    work on the inputs less their mean, and the outputs keep theirs, whatever the scores are. With
    ``deviation``, a trainable vector. Both become the bias in the end.

    Args:
        weight: (out, in), the dense weight; kept by reference, for the dense outputs.
        bias: (out,) or None; kept by reference.
        spectrum: a full decomposition of ``weight`` (``linalg.whitened_svd`` without a rank), or
            its components, whose device is where the layer is trained.
        largest_score: bound of the scores, above 1.
        channels: whether every output and every input has a trainable scale.
        deviation: whether a trainable vector (out,), zero at the start, is added to the outputs.
        mean: (in,), of the inputs on the calibration text, and (out,), the weight times that; or
            None.

    Raises:
        ValueError: ``largest_score`` is not above 1, or the spectrum does not fit the weight.

    Source: SoCo, arXiv:2502.15092 (the spectrum, scores that may pass 1, the deviation). The form
    of the score function and of the deviation is our choice; the paper's is not published.
    """

    up: Tensor  # (out, rank), the weight's dtype, columns of unit norm
    down: Tensor  # (rank, in), the weight's dtype, rows of unit norm
    order: Tensor  # (rank,), int64: which component each column of up and row of down is
    gain: Tensor  # (rank,), float32: sigma, times the norms that up's columns and down's rows had
    mask: Tensor  # (rank,), bool: the components that are alive
    mean: Tensor | None  # (in,), float32
    mean_output: Tensor | None  # (out,), float32: the weight times the mean

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        spectrum: Spectrum | Components,
        *,
        largest_score: float = 2.0,
        channels: bool = False,
        deviation: bool = False,
        mean: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take a weight apart; nothing is trained yet."""
        super().__init__()
        if not largest_score > 1:
            raise ValueError(f"largest_score must be above 1, got {largest_score}")
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
        self.recording = False  # True: backward records the gradient of the scores per sequence,
        self.listening = True  # unless this is False: for a second gradient of the same outputs
        self.computed = rank  # the first so many places of ``order`` are computed, no others
        self._recorded: Tensor | None = None  # (sequences, rank), float32
        self._shift = -math.log(largest_score - 1) if math.isfinite(largest_score) else 0.0
        self.weight, self.bias = weight, bias
        if isinstance(spectrum, Spectrum):
            spectrum = Components.of(spectrum, weight.dtype)
        device = spectrum.gain.device
        # One layout, whatever made them: of others a product may have other last bits.
        self.register_buffer("up", spectrum.up.contiguous(), persistent=False)
        self.register_buffer("down", spectrum.down.contiguous(), persistent=False)
        order = torch.arange(rank, device=device)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("gain", spectrum.gain, persistent=False)
        mask = torch.ones(rank, dtype=torch.bool, device=device)
        self.register_buffer("mask", mask, persistent=False)
        self.logit = nn.Parameter(torch.zeros(rank, device=device))
        self.left, self.right, self.deviation = (
            nn.Parameter(torch.zeros(size, device=device)) if wanted else None
            for size, wanted in (
                (out_features, channels), (in_features, channels), (out_features, deviation),
            )
        )  # fmt: skip
        self.register_buffer("mean", None, persistent=False)
        self.register_buffer("mean_output", None, persistent=False)
        if mean is not None:
            self.mean, self.mean_output = (each.to(device, torch.float32) for each in mean)

    def scores(self) -> Tensor:
        """The importance scores (rank,), float32, between 0 and ``largest_score``."""
        if math.isinf(self.largest_score):
            return self.logit.exp()
        return self.largest_score * torch.sigmoid(self.logit + self._shift)

    @torch.no_grad()
    def arrange(self, order: Tensor, computed: int) -> None:
        """Bring the components into an order in which the last ones need not be computed.

        Gains, scores and mask stay where they are; ``up`` and ``down`` are sorted in place.

        Args:
            order: (rank,), a permutation of the components.
            computed: of these, so many at the beginning are computed from now on. What lies behind
                counts as masked, and nothing is recorded of it.
        """
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        move = place[order]
        self.up.copy_(self.up[:, move])
        self.down.copy_(self.down[move])
        self.order.copy_(order)
        self.computed = computed

    @torch.no_grad()
    def snapshot(self, values: Tensor) -> Snapshot:
        """The scores as they are now; ``values`` (rank,): what the components are worth."""
        besides = {part: getattr(self, part) for part in BESIDES}
        return Snapshot(
            self.scores().clone(),
            self.logit.detach().clone(),
            values,
            self.mask.clone(),
            **{part: each.detach().clone() for part, each in besides.items() if each is not None},
        )

    def state(self) -> dict[str, Any]:
        """What training changes, as it is now."""
        parts = {name: getattr(self, name) for name in ("logit", *BESIDES)}
        return {
            **{name: each.detach().clone() for name, each in parts.items() if each is not None},
            "mask": self.mask.clone(),
            "order": self.order.clone(),
            "computed": self.computed,
        }

    @torch.no_grad()
    def go_back(self, state: Mapping[str, Any]) -> None:
        """To what ``state`` gave, which is on any device."""
        self.arrange(state["order"].to(self.order.device), state["computed"])
        for name in state.keys() - {"order", "computed"}:
            getattr(self, name).copy_(state[name])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        if self.dense:
            return F.linear(x, self.weight, self.bias)
        chosen = self.order[: self.computed]
        scale, mask = (self.gain * self.scores())[chosen], self.mask[chosen]
        up, down = self.up[:, : self.computed], self.down[: self.computed]
        if self.right is None:
            z = F.linear(x, down)  # (..., computed)
        else:
            z = _ScaledLinear.apply(x, down, self.right, -1, self)
        if self.mean is not None:
            mean = self.mean if self.right is None else self.mean * (1 + self.right)
            z = z - (F.linear(mean.to(down.dtype), down).float() * self._is_cut()).to(z.dtype)
        if self.left is None and self.recording:
            y = _RecordedLinear.apply(z, scale, mask, up, self.bias, self)
        elif self.left is None:
            y = ops.spectral_linear(z, scale, mask, up, self.bias)
        else:
            scaled = ops.spectral_scale(z, scale, mask)
            if self.recording:
                scaled = _RecordScores.apply(scaled, z, self)
            y = _ScaledLinear.apply(scaled, up, self.left, 0, self)
            y = y if self.bias is None else y + self.bias
        for added in (self.mean_output, self.deviation):
            if added is not None:
                y = y + (added * self._is_cut()).to(y.dtype)
        return y

    def _is_cut(self) -> Tensor:
        """Whether a component is masked: a tensor, so that nothing waits for it."""
        return ~self.mask.all()

    def record(self, sums: Tensor) -> None:
        """Note ``sums`` (sequences, computed), float32: of ``dL/dh_t z_t``, a sequence each."""
        row = sums * self.gain[self.order[: sums.shape[1]]]
        seen = self._recorded
        if seen is not None and seen.shape != row.shape:  # called with and without a batch
            seen, row = seen.sum(0, keepdim=True), row.sum(0, keepdim=True)
        self._recorded = row if seen is None else seen + row

    def take_recorded(self) -> Tensor | None:
        """What backward recorded since the last call, and forget it.

        Returns:
            (sequences, rank), float32: the gradient of the loss by each score, masked ones
            included, summed over the tokens of a sequence; 0 for those that were not computed; one
            row for all sequences where the layer sees its tokens without a batch dimension; None if
            nothing was recorded.
        """
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            return None
        full = recorded.new_zeros(len(recorded), len(self.order))
        full[:, self.order[: recorded.shape[1]]] = recorded
        return full

    def fold(self) -> tuple[Tensor | Factors, Tensor | None]:
        """The trained layer as a plain one: its weight or factors, and its bias; see ``fold``."""
        left, right, deviation = (
            None if part is None else part.detach()
            for part in (self.left, self.right, self.deviation)
        )
        return fold(
            self.up,
            self.down,
            (self.gain * self.scores().detach())[self.order],
            self.mask[self.order],
            self.bias,
            left=left,
            right=right,
            deviation=deviation,
            mean=self.mean,
            mean_output=self.mean_output,
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"alive={int(self.mask.sum())} of {len(self.mask)}"
        )


@torch.no_grad()
def fold(
    up: Tensor,
    down: Tensor,
    scale: Tensor,
    alive: Tensor,
    bias: Tensor | None,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    deviation: Tensor | None = None,
    mean: Tensor | None = None,
    mean_output: Tensor | None = None,
) -> tuple[Tensor | Factors, Tensor | None]:
    """Components with their scales as a plain layer.

    Args:
        up: (out, rank), columns of unit norm.
        down: (rank, in), rows of unit norm.
        scale: (rank,), float32, gain times score.
        alive: (rank,), bool.
        bias: (out,) or None, the dense layer's.
        left: (out,) or None; outputs are scaled by one plus this.
        right: (in,) or None; inputs are scaled by one plus this.
        deviation: (out,) or None, added to the outputs where not everything is alive.
        mean: (in,) or None, of the inputs; then the outputs of this input are kept ...
        mean_output: ... which are (out,), without the bias.

    Returns:
        The dense weight (out, in) with the scales in it where everything is alive, else the factors
        of the components alive, ``sqrt(scale)`` on either side; in up's dtype. Then the bias (out,)
        with what is added to the outputs in it, or None.
    """
    dtype = up.dtype
    up, down = up.float(), down.float()
    up = up if left is None else up * (1 + left)[:, None]
    down = down if right is None else down * (1 + right)
    if bool(alive.all()):
        return ((up * scale) @ down).to(dtype), bias
    root = scale[alive].sqrt()
    factors = Factors(up[:, alive] * root, root[:, None] * down[alive]).to(dtype)
    if deviation is None and mean is None:
        return factors, bias
    total = up.new_zeros(len(up)) if bias is None else bias.float()
    if deviation is not None:
        total = total + deviation
    if mean is not None and mean_output is not None:
        # No matrix-vector products: their last bits depend on where the factors lie in memory.
        inner = (factors.down.float() * mean).sum(1)
        total = total + mean_output - (factors.up.float() * inner).sum(1)
    return factors, total.detach().to(dtype)


class _ScaledLinear(torch.autograd.Function):
    """``F.linear`` with a frozen weight, each row or column of it times one plus a trained number.

    The scales go into the weight, which is smaller than what passes through it. With
    ``y = x (W diag(1 + r))^T`` and ``g`` the gradient by x, the gradient by r is
    ``sum_t x_t g_t / (1 + r)``; of rows, ``sum_t y_t dL/dy_t / (1 + l)``.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, by: Tensor, dim: int, layer: SpectralLinear
    ) -> Tensor:
        scale = 1 + by.detach()
        folded = weight * (scale if dim else scale[:, None]).to(weight.dtype)
        y = F.linear(x, folded)
        ctx.save_for_backward(x if dim else y, folded, scale)
        ctx.dim, ctx.layer = dim, layer
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        (grad,) = grads
        seen, folded, scale = ctx.saved_tensors
        grad_x = grad @ folded
        layer: SpectralLinear = ctx.layer
        if layer.recording and layer.listening:  # only the scores' gradient is asked for
            return grad_x, None, None, None, None
        product = seen.float() * (grad_x if ctx.dim else grad).float()
        total = product.flatten(0, -2).sum(0)
        zero = scale == 0  # where nothing passes, the gradient is not known: it waits a step
        return grad_x, None, (total / scale.masked_fill(zero, 1)).masked_fill(zero, 0), None, None


class _RecordedLinear(torch.autograd.Function):
    """``ops.spectral_linear``; its backward notes the gradient by the scores for each sequence.

    With ``h = gain * score * z`` (z less its mean, where that is taken off) the gradient by a score
    is ``sum_t dL/dh_t gain z_t``, whether the component is masked or not. What is needed later is
    saved for backward and held nowhere else, so that activation checkpointing keeps its gain.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scale: Tensor,
        mask: Tensor,
        up: Tensor,
        bias: Tensor | None,
        layer: SpectralLinear,
    ) -> Tensor:
        ctx.save_for_backward(z, scale, mask, up)
        ctx.layer = layer
        return ops.spectral_linear(z, scale, mask, up, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        z, scale, mask, up = ctx.saved_tensors
        layer: SpectralLinear = ctx.layer
        sequences = len(z) if z.dim() > 2 and len(z) > 0 else 1
        grad_z, sums = ops.spectral_linear_backward(grad, z, scale, mask, up.to(z.dtype), sequences)
        if layer.recording and layer.listening:
            layer.record(sums.float())
        return grad_z, torch.where(mask, sums.sum(0), 0).to(scale.dtype), None, None, None, None


class _RecordScores(torch.autograd.Function):
    """The identity; its backward notes what that of ``_RecordedLinear`` does."""

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
        if layer.recording and layer.listening:
            product = grad.detach().float() * z.detach().float()  # (..., rank)
            sequences = len(product) if product.dim() > 2 else 1
            layer.record(product.reshape(sequences, -1, product.shape[-1]).sum(1))
        return grad, None, None
