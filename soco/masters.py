"""Parameters under training: their best values, their float32 masters, and how far they move."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.processes import add_up, count

# Adam's epsilon: gradients of a mean over tokens by badly scaled factors go down to 1e-8, and none
# of them may be taken for zero.
_EPSILON = 1e-12

# Losses of float16 models are multiplied by this before backward, or most gradients are zero.
_FIRST_SCALE = 2.0**12


class Best:
    """The values of the parameters at the lowest loss so far."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        """Those that they have now are the best until others are offered."""
        self.parameters = parameters
        self.loss = math.inf
        self.since = 0  # evaluations since then
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def offer(self, loss: float) -> None:
        """Keep the values if ``loss`` is lower than any before (NaN is not)."""
        self.since += 1
        if loss < self.loss:
            self.loss, self.since = loss, 0
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.copy_(parameter)

    def state(self) -> dict[str, Any]:
        """The values, and how they came to be the best."""
        return {"values": self.values, "loss": self.loss, "since": self.since}

    @torch.no_grad()
    def go_back(self, state: Mapping[str, Any]) -> None:
        """To what ``state`` gave, which is on any device."""
        self.loss, self.since = state["loss"], state["since"]
        for value, held in zip(self.values, state["values"], strict=True):
            value.copy_(held)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back, bit for bit."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
            parameter.grad = None


class Masters:
    """The parameters as Adam sees them: in float32 at least, each with a rate for its size."""

    def __init__(
        self,
        parameters: list[nn.Parameter],
        sizes: list[float],
        *,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        clip: float | None,
    ) -> None:
        """Nothing has moved yet; a size is what one unit of the learning rate is."""
        self.parameters = parameters
        self.learning_rate, self.weight_decay, self.clip = learning_rate, weight_decay, clip
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for p in parameters
        ]
        self.backed_off = 1.0  # what the learning rate has been multiplied by so far
        self.scale = _FIRST_SCALE if any(p.dtype == torch.float16 for p in parameters) else 1.0
        groups = [
            {"params": [master], "size": size}
            for master, size in zip(self.masters, sizes, strict=True)
        ]
        self.optimizer = torch.optim.Adam(groups, lr=learning_rate, betas=betas, eps=_EPSILON)

    def state(self) -> dict[str, Any]:
        """The values in float32, the moments, and what the rate was multiplied by."""
        return {
            "masters": [master.detach() for master in self.masters],
            "optimizer": self.optimizer.state_dict(),
            "scales": (self.backed_off, self.scale),
        }

    @torch.no_grad()
    def go_back(self, state: Mapping[str, Any]) -> None:
        """To what ``state`` gave, which is on any device."""
        for parameter, master, held in zip(
            self.parameters, self.masters, state["masters"], strict=True
        ):
            master.copy_(held)
            if master is not parameter:
                parameter.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])
        self.backed_off, self.scale = state["scales"]

    @torch.no_grad()
    def restart(self, backoff: float) -> None:
        """Take the parameters over anew, forget all moments, and go on with smaller steps."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.copy_(parameter)
        self.optimizer.state.clear()
        self.backed_off *= backoff

    @torch.no_grad()
    def collect(self) -> None:
        """Take the gradients over after a backward pass; they add up in the masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def add_up(self) -> None:
        """The sums of the gradients of all processes."""
        if count() == 1:
            return
        has = torch.tensor([master.grad is not None for master in self.masters], dtype=torch.int32)
        has = has.to(self.masters[0].device)
        add_up(has)
        reached = [m for m, some in zip(self.masters, has.tolist(), strict=True) if some]
        for master in reached:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        add_up(*(cast(Tensor, master.grad) for master in reached))

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Bring the gradients to their true scale and their norm below ``clip``; the norm, ().

        Each gradient counts times the size of its parameter, so that the norm does not depend on
        how a product is split into factors.
        """
        groups = [g for g in self.optimizer.param_groups if g["params"][0].grad is not None]
        grads = [group["params"][0].grad for group in groups]
        if not grads:
            return torch.zeros(())
        norms = [
            (grad.norm().float() * (group["size"] / self.scale)).to(grads[0].device)
            for grad, group in zip(grads, groups, strict=True)
        ]
        norm = torch.stack(norms).norm()
        factor = torch.ones_like(norm)
        if self.clip is not None:
            factor = self.clip / norm.clamp_min(self.clip)
        for grad in grads:
            grad.mul_((factor / self.scale).to(grad.device))
        return norm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step of Adam, and the parameters rounded from their masters."""
        rate *= self.backed_off
        decay = self.weight_decay * self.learning_rate * rate
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate * group["size"]
            if decay:
                group["params"][0].mul_(1 - decay)
        self.optimizer.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def sizes_of(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]], trained: list[nn.Parameter]
) -> list[float]:
    """What one unit of the learning rate is for each trained parameter.

    A factor that is a times its partner in the layer moves a times as far, so that it makes no
    difference how a product is split into its factors. Balanced factors move equally far in all
    layers: by a fraction of the geometric mean of their root mean squares over the model. So do
    biases.
    """
    rms = {p: max(float(p.detach().float().square().mean().sqrt()), 1e-30) for p in trained}
    balance: dict[nn.Parameter, list[float]] = {p: [] for p in trained}
    usual = []
    for _, layer in pairs.values():
        factors = [p for p in layer.parameters() if p in rms and p.dim() > 1]
        if not factors:
            continue
        middle = sum(math.log(rms[p]) for p in factors) / len(factors)
        usual.append(middle)
        for p in factors:
            balance[p].append(math.log(rms[p]) - middle)
    typical = sum(usual) / len(usual) if usual else 0.0
    # A factor that several layers share takes the mean of what each of them asks for.
    return [math.exp(typical + (sum(b) / len(b) if b else 0.0)) for b in balance.values()]


@torch.no_grad()
def probed_rate(
    parameters: Sequence[nn.Parameter],
    sizes: Sequence[float],
    loss: Callable[[], float],
    start: float,
    seed: int,
    cost: float,
) -> float:
    """The learning rate of Adam whose first steps cost little of what there is to gain.

    Every entry moves by one step up or down, at random, and the other way: the mean of the two
    losses less the one in between is the curvature along the way. The rate is the one at which such
    a step would cost the fraction ``cost`` of the loss. A model that is near to the dense one gets
    a small rate by this, and one that is far from it, or feels little, a large one.

    Args:
        parameters: what is trained; as before afterwards, bit for bit, on errors too.
        sizes: what one unit of the rate is for each of them.
        loss: measures the loss with the parameters as they are.
        start: what it is now.
        seed: of the directions.
        cost: of the loss.

    Returns:
        The rate, at most ``LARGEST_RATE``.

    Source: ours (docs/methods.md says what it is worth).
    """
    values = [p.detach().clone() for p in parameters]
    reach = _PROBE
    for _ in range(_PROBES):
        risen = 0.0
        try:
            for sign in (1, -1):
                generator = torch.Generator().manual_seed(seed)
                for value, parameter, size in zip(values, parameters, sizes, strict=True):
                    way = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
                    step = sign * reach * size * way.to(value.device, torch.float32)
                    parameter.copy_(value.float() + step)
                risen += (loss() - start) / 2
        finally:
            for value, parameter in zip(values, parameters, strict=True):
                parameter.copy_(value)
        if risen <= 0:  # it may as well go farther
            return min(LARGEST_RATE, 2 * reach)
        rate = reach * math.sqrt(max(start, 0.0) * cost / risen)
        if rate > reach / 20:  # a NaN is not
            return min(LARGEST_RATE, rate)
        reach /= 10  # so far away the loss tells nothing about here
    return reach


_PROBE = 0.01  # first step of the probe, as a learning rate
_PROBES = 4
LARGEST_RATE = 0.02  # that is ever measured
