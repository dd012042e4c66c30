"""What methods want to know of a model's layers on real inputs, collected in one pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from soco.objectives import run_model


@dataclass(frozen=True)
class Statistics:
    """What one linear layer saw."""

    gram: Tensor  # (in, in), float64: sum of x^T x over all tokens
    tokens: int


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    windows: Tensor,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> dict[str, Statistics]:
    """Run ``model`` over the windows and collect statistics of the inputs of ``layers``.

    Layers that are given the same tensor (query, key and value; gate and up) share one Gram matrix.
    Products are taken in float32, at most 2048 tokens at a time, and summed in float64: memory
    depends on the layers' sizes, not on the number of tokens.

    Args:
        model: left as it was.
        layers: name to module in ``model``; called with x (..., in).
        windows: token ids (sequences, length), on the CPU.
        batch_size: sequences at a time.
        on_batch: called with the number of sequences done, after each batch.

    Returns:
        name to statistics. A layer that saw nothing (an expert no token was sent to) has a zero
        Gram matrix and 0 tokens.

    Raises:
        ValueError: the inputs of a layer hold NaN or Inf; the layer is named.
    """
    collector = _Collector()
    hooks = [
        module.register_forward_pre_hook(collector.hook(name)) for name, module in layers.items()
    ]
    try:
        with torch.inference_mode():
            for done, batch in enumerate(windows.split(batch_size), start=1):
                run_model(model, batch.to(next(model.parameters()).device))
                collector.forget_inputs()
                on_batch(min(done * batch_size, len(windows)))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: collector.result(name, module) for name, module in layers.items()}


@torch.no_grad()
def uncalled(model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor) -> list[str]:
    """Layers that their model does not call, though it runs the module they belong to.

    Such a module reads the layer's weight itself (Mamba's ``dt_proj``), and could not work with
    another layer in its place. A layer whose module did not run either (an expert that no token was
    sent to) is not meant.

    Args:
        model: run once.
        layers: name to module in ``model``.
        ids: token ids (sequences, length), a few are enough.

    Returns:
        Names, in the order of ``layers``.
    """
    called: set[nn.Module] = set()
    parents = {name: _caller(model, name) for name in layers}
    watched = {*layers.values(), *parents.values()}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: called.add(module))
        for module in watched
    ]
    try:
        run_model(model, ids.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return [n for n, module in layers.items() if module not in called and parents[n] in called]


def _caller(model: nn.Module, name: str) -> nn.Module:
    """The nearest module around ``name`` that has a forward of its own."""
    path = name.rpartition(".")[0]
    while isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)


class _Collector:
    """Sums of the Gram matrices; layers with the same input tensor point to the same sum."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.leader: dict[str, str] = {}  # layer to the layer that sums for it
        self.seen: dict[str, list[Tensor]] = {}  # inputs of this forward, by leader
        self.calls: dict[str, int] = {}  # of a layer, in this forward

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            call = self.calls[name] = self.calls.get(name, 0) + 1
            if name not in self.leader:
                self.leader[name] = next(
                    (other for other, xs in self.seen.items() if len(xs) == 1 and xs[0] is x), name
                )
            leader = self.leader[name]
            if leader == name:
                self.seen.setdefault(name, []).append(x)
                self._add(name, x)
                return
            xs = self.seen.get(leader, [])
            if call <= len(xs) and xs[call - 1] is x:
                return
            # From here on it sees something else than its leader: it goes its own way, with what
            # they had in common, which is all the leader has but its inputs of this forward.
            self.leader[name] = name
            self.grams[name] = self.grams[leader].clone()
            self.tokens[name] = self.tokens[leader]
            for other in xs:
                self._add(name, other, sign=-1)
            for other in xs[: call - 1]:
                self._add(name, other)
            self.seen.setdefault(name, []).append(x)
            self._add(name, x)

        return observe

    def forget_inputs(self) -> None:
        """Call after each forward."""
        self.seen.clear()
        self.calls.clear()

    def _add(self, name: str, x: Tensor, sign: int = 1) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        gram = self.grams.get(name)
        if gram is None:
            gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
            self.grams[name] = gram
        for chunk in rows.split(2048):
            wide = chunk.float()
            gram.add_((wide.T @ wide).double(), alpha=sign)
        self.tokens[name] = self.tokens.get(name, 0) + sign * len(rows)

    def result(self, name: str, module: nn.Module) -> Statistics:
        """The sums of the layer ``name``."""
        leader = self.leader.get(name)
        if leader is None or leader not in self.grams:
            weight = next(module.parameters())
            size = getattr(module, "in_features", None) or getattr(module, "nx")  # noqa: B009
            empty = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
            return Statistics(empty, 0)
        gram = self.grams[leader]
        if not bool(torch.isfinite(gram).all()):
            raise ValueError(
                f"the inputs of {name} hold NaN or Inf on the calibration text: the model overflows "
                f"in its dtype, or its weights are broken"
            )
        return Statistics(gram, self.tokens[leader])


def sample_from_model(
    model: nn.Module,
    samples: int,
    length: int,
    *,
    start: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> Tensor:
    """Calibration text written by the model itself, for when there is none.

    Args:
        model: a causal language model with ``generate``.
        samples: sequences.
        length: tokens of each.
        start: the id every sequence begins with (it is not part of it); None: a random one.
        seed: the same seed gives the same text; the global random state is left alone.
        batch_size: sequences at a time.
        on_batch: called with the number of sequences done, after each batch.

    Returns:
        Token ids (samples, length), on the CPU, drawn at temperature 1 from the whole vocabulary.

    Raises:
        ValueError: the model cannot generate.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise ValueError(
            f'calibration="self" takes a model that can generate text, and {type(model).__name__} '
            f"cannot: give a text instead"
        )
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(seed)
    parts = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        for done in range(0, samples, batch_size):
            count = min(batch_size, samples - done)
            if start is None:
                first = torch.randint(vocabulary, (count, 1), generator=generator)
            else:
                first = torch.full((count, 1), start)
            first = first.to(device)
            ids = model.generate(  # type: ignore[operator]
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length,
                max_new_tokens=length,
                eos_token_id=None,
                pad_token_id=0,
            )
            parts.append(ids[:, 1:].cpu())
            on_batch(done + count)
    return torch.cat(parts)
