"""Who of all layers' components stays, how much that is, and how decided the scores are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soco.ranks import allocate, layer_params
from soco.spectral import SpectralLinear


def kept_params(layers: Mapping[str, SpectralLinear], pivoted: bool = False) -> int:
    """Parameters of the layers as they would be stored now: factors, or dense where it is less."""
    return sum(
        layer_params((layer.out_features, layer.in_features), int(layer.mask.sum()), pivoted)
        for layer in layers.values()
    )


def component_values(
    layers: Mapping[str, SpectralLinear], fisher: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What every component is worth: name to (rank,), not negative.

    Args:
        layers: name to layer.
        fisher: name to Fisher information of the scores, (rank,): a component is worth
            ``score^2 fisher / 2``. Empty: it is worth its score.
    """
    return {
        name: (layer.scores().square() * fisher[name] / 2 if fisher else layer.scores()).detach()
        for name, layer in layers.items()
    }


@torch.no_grad()
def choose_components(
    layers: Mapping[str, SpectralLinear],
    fisher: Mapping[str, Tensor],
    budget: int,
    pivoted: bool = False,
) -> dict[str, Tensor]:
    """Mask all but the components worth most within ``budget`` parameters.

    Args:
        layers: name to layer; their masks are written.
        fisher: as in ``component_values``.
        budget: parameters that may live, counted as they are stored.
        pivoted: whether that is as pivoted factors.

    Returns:
        name to the components, (rank,), the most valuable first: those alive are in front.
    """
    values = component_values(layers, fisher)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    orders = {}
    for name, rank in allocate(values, shapes, budget, pivoted=pivoted).items():
        orders[name] = values[name].argsort(descending=True, stable=True)
        layers[name].mask.fill_(False).index_fill_(0, orders[name][:rank], True)
    return orders


@dataclass
class FisherAverages:
    """Running averages of the scores' squared gradients, of the components that were computed.

    Attributes:
        decay: what is left of a batch with the next one.
        squares: name to decayed sums, (rank,).
        weights: name to the weights of what they sum, (rank,).
    """

    decay: float
    squares: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, layers: Mapping[str, SpectralLinear], squares: Mapping[str, Tensor], tokens: int
    ) -> None:
        """Take in the sums of one batch of so many tokens, for what each layer computed of it."""
        for name, layer in layers.items():
            old = self.squares.setdefault(name, torch.zeros_like(layer.gain))
            weight = self.weights.setdefault(name, torch.zeros_like(layer.gain))
            seen = layer.order[: layer.computed]
            fresh = squares.get(name, torch.zeros_like(old)) / tokens
            old[seen] = self.decay * old[seen] + (1 - self.decay) * fresh[seen]
            weight[seen] = self.decay * weight[seen] + (1 - self.decay)

    def found(self, prior: float, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, free of their start at zero; empty where nothing was added.

        Args:
            prior: batches that ``expected`` counts like.
            expected: name to averages that were expected, (rank,); it may lack layers.
        """
        prior *= 1 - self.decay
        found = {}
        for name, square in self.squares.items():
            weight = self.weights[name]
            if prior and name in expected:
                square, weight = square + prior * expected[name], weight + prior
            found[name] = square / weight.clamp_min(1e-30)
        return found

    def state(self) -> list[dict[str, Tensor]]:
        """All of it."""
        return [self.squares, self.weights]

    def go_back(self, state: list[dict[str, Tensor]], device: torch.device) -> None:
        """To what ``state`` gave, which is on any device."""
        self.squares, self.weights = (
            {name: each.to(device) for name, each in part.items()} for part in state
        )


def soft_ratio(
    layers: Mapping[str, SpectralLinear], threshold: float, temperature: float
) -> Tensor:
    """Kept parameters over the dense ones, differentiable in the scores.

    A component counts as ``sigmoid((score - threshold) / temperature)`` of ``out + in`` parameters.
    It is not clipped at break-even, where its gradient would be zero; so it can pass 1.
    """
    alive = sum(
        torch.sigmoid((layer.scores() - threshold) / temperature).sum().cpu()
        * (layer.in_features + layer.out_features)
        for layer in layers.values()
    )
    return torch.as_tensor(alive) / sum(layer.weight.numel() for layer in layers.values())


def polarization(
    layers: Mapping[str, SpectralLinear], threshold: float, temperature: float
) -> Tensor:
    """How undecided the scores are: the mean of ``4 a (1 - a)``, ``a`` the soft count of each.

    It is 1 when all scores are at the threshold and falls to 0 as they move away to either side.
    """
    undecided = torch.cat(
        [
            torch.sigmoid((layer.scores() - threshold) / temperature).cpu()
            for layer in layers.values()
        ]
    )
    return (4 * undecided * (1 - undecided)).mean()


def press(
    layers: Mapping[str, SpectralLinear],
    threshold: float,
    temperature: float,
    *,
    kept: float,
    ratio_weight: float,
    sparsity_weight: float,
) -> Tensor | None:
    """Add the gradients of the losses that press on the scores alone.

    Args:
        layers: name to layer.
        threshold: of the soft counts.
        temperature: of them.
        kept: parameters that may be kept, as a fraction of the dense ones.
        ratio_weight: of the squared excess over that.
        sparsity_weight: of ``polarization``.

    Returns:
        What the losses come to; None where both weights are 0.
    """
    if not ratio_weight and not sparsity_weight:
        return None
    over = (soft_ratio(layers, threshold, temperature) - kept).clamp_min(0)
    loss = ratio_weight * over.square()
    loss = loss + sparsity_weight * polarization(layers, threshold, temperature)
    loss.backward()
    return loss.detach()
