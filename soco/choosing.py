"""Who of all layers' components stays, how much that is, and how decided the scores are."""

from collections.abc import Mapping

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
