"""What a compressed model should keep of the dense one: a distance, and how sharply it is felt."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Seeds = Tensor | Sequence[int]  # of what is drawn, one for each sequence


def run_model(model: nn.Module, ids: Tensor) -> Any:
    """Run ``model`` on token ids (sequences, length) without a cache and return its outputs."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids
    return model(**inputs)


def by_sequence(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What a layer saw, (..., features), as (sequences, tokens, features).

    Some models flatten their tokens, and an expert sees some tokens of all sequences: where it
    cannot be told to which sequence a row belongs, all are one sequence.

    Args:
        rows: inputs, outputs or gradients of a layer.
        shape: (sequences, length) of the ids that run.
    """
    count, length = shape
    known = (rows.dim() > 2 and len(rows) == count) or rows.shape[:-1].numel() == count * length
    return rows.reshape(count if known else 1, -1, rows.shape[-1])


@dataclass(frozen=True)
class TokenDistribution:
    """For models that predict tokens: the KL divergence of the predicted distributions."""

    name = "KL divergence to the dense model (nats per token)"

    temperature: float = 1.0  # of both distributions in the divergence

    def __post_init__(self) -> None:
        """Refuse a temperature that is none."""
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def outputs(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Log probabilities (sequences, length, vocabulary), float32."""
        return run_model(model, ids).logits.float().log_softmax(-1)

    def outputs_and_states(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs, and the inputs of the output head.

        Returns:
            Log probabilities as from ``outputs``, and states (sequences, length, hidden); None
            where there is no head, or it is not called once with all tokens.
        """
        head = _head(model)
        if head is None:
            return self.outputs(model, ids), None
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            outputs = self.outputs(model, ids)
        finally:
            hook.remove()
        whole = len(seen) == 1 and seen[0].shape[:-1] == ids.shape
        return outputs, seen[0] if whole else None

    def from_states(self, model: nn.Module, states: Tensor) -> Tensor:
        """The outputs from states, where nothing else follows the head."""
        head = _head(model)
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output head")
        return head(states).float().log_softmax(-1)

    def divergence(self, dense: Tensor, student: Tensor) -> Tensor:
        """KL(dense || student) at the temperature, the mean over tokens."""
        if self.temperature != 1:
            dense, student = ((x / self.temperature).log_softmax(-1) for x in (dense, student))
        return _Divergence.apply(dense, student)

    def surprise(self, dense: Tensor, student: Tensor, seeds: Seeds) -> Tensor:
        """Negative log likelihood, summed over tokens, of labels drawn from the dense model.

        Its gradient has mean zero where student and dense agree, and its square is then the Fisher
        information: the curvature of ``divergence``. ``seeds`` (sequences,) are those of the draws.
        """
        chances = dense.exp().flatten(0, -2).cumsum(-1)  # (tokens, vocabulary)
        point = _drawn(torch.rand, seeds, dense.shape[1:-1]).reshape(-1, 1).to(chances.device)
        labels = torch.searchsorted(chances, point * chances[:, -1:], right=True)
        labels = labels.clamp_max(chances.shape[-1] - 1)
        return -student.flatten(0, -2).gather(-1, labels).sum()

    def cross_entropy(self, student: Tensor, ids: Tensor) -> Tensor:
        """Negative log likelihood of the text itself, the mean over predicted tokens."""
        return -student[:, :-1].gather(-1, ids[:, 1:, None]).mean()


@dataclass(frozen=True)
class HiddenStates:
    """For models without token predictions: the squared distance of the last hidden states."""

    name = "squared distance of the hidden states, relative to their variance"

    def outputs(self, model: nn.Module, ids: Tensor) -> Tensor:
        """The last hidden states (sequences, length, hidden), float32."""
        return last_hidden_state(model, ids).float()

    def outputs_and_states(self, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The outputs, and what ``from_states`` makes the same of: the states as they are."""
        states = last_hidden_state(model, ids)
        return states.float(), states

    def from_states(self, model: nn.Module, states: Tensor) -> Tensor:
        """The outputs from the last hidden states."""
        return states.float()

    def divergence(self, dense: Tensor, student: Tensor) -> Tensor:
        """The mean squared distance as a fraction of the dense states' variance."""
        return (dense - student).square().mean() / dense.var().clamp_min(1e-12)

    def surprise(self, dense: Tensor, student: Tensor, seeds: Seeds) -> Tensor:
        """Negative log likelihood, up to a constant, of states drawn around the dense ones.

        They are normal, with the variance whose divergence from the student's is ``divergence``;
        so the squared gradient is the curvature of that, here too. ``seeds`` (sequences,) are those
        of the draws.
        """
        noise = _drawn(torch.randn, seeds, dense.shape[1:]).to(dense.device)
        variance = dense.var().clamp_min(1e-12) * dense.shape[-1] / 2
        drawn = dense + noise * variance.sqrt()
        return (drawn - student).square().sum() / (2 * variance)

    def cross_entropy(self, student: Tensor, ids: Tensor) -> Tensor:
        """There are no predictions to score.

        Raises:
            ValueError: always.
        """
        raise ValueError("a model without token predictions has no cross-entropy: set its weight 0")


def draw_seeds(sequences: int, generator: torch.Generator) -> Tensor:
    """A seed for the draws of each sequence, (sequences,), int64."""
    return torch.randint(2**62, (sequences,), generator=generator)


def _drawn(draw: Callable[..., Tensor], seeds: Seeds, shape: Sequence[int]) -> Tensor:
    """Random numbers (sequences, *shape): those of a sequence are the same in any batch."""
    generator = torch.Generator()
    whole = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    parts = [draw(tuple(shape), generator=generator.manual_seed(seed)) for seed in whole]
    return torch.stack(parts)


class _Divergence(torch.autograd.Function):
    """KL(dense || student) of log probabilities (..., vocabulary), the mean over rows.

    Both are read once, some rows at a time, so that what lies in between stays in the cache; the
    gradient is written on the way.
    """

    @staticmethod
    def forward(ctx: Any, dense: Tensor, student: Tensor) -> Tensor:
        wide = dense.shape[-1]
        rows = max(1, _CHUNK[dense.is_cuda] // wide)
        grad = student.new_empty(student.shape) if ctx.needs_input_grad[1] else None
        chunks = [x.reshape(-1, wide).split(rows) for x in (dense, student)]
        count = dense.numel() // wide
        found = []
        for place, (log_p, log_q) in enumerate(zip(*chunks, strict=True)):
            p = log_p.exp()
            found.append((log_p - log_q).mul_(p).sum(-1))
            if grad is not None:
                target = grad.view(-1, wide)[place * rows : place * rows + len(p)]
                torch.mul(p, -1 / count, out=target)
        ctx.save_for_backward(grad)
        return torch.cat(found).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (grad,) = ctx.saved_tensors
        return None, grad * grads[0]


_CHUNK = {False: 2**17, True: 2**26}  # numbers at a time, by whether the tensors are on a GPU

Objective = TokenDistribution | HiddenStates


def _head(model: nn.Module) -> nn.Module | None:
    """The output head of a transformers model."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def last_hidden_state(model: nn.Module, ids: Tensor) -> Tensor:
    """The last hidden states (sequences, length, hidden) of any transformers model."""
    outputs = run_model(getattr(model, "base_model", model), ids)
    return outputs.last_hidden_state


@torch.no_grad()
def objective_for(model: nn.Module, ids: Tensor) -> Objective:
    """Choose the objective by what the model returns for token ids (sequences, length).

    Logits with one row per token are token predictions; everything else (no head, a classifier's
    one row per sequence) is compared by its hidden states.
    """
    logits = getattr(run_model(model, ids), "logits", None)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 0
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        return HiddenStates()
    return TokenDistribution() if logits.shape[-1] >= vocabulary else HiddenStates()
