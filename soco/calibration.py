"""What methods want to know of a model's layers on real inputs, collected in one pass."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

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
    Products are taken in float32, at most 2048 tokens at a time, and summed in float64; inputs are
    not kept: memory depends on the layers' sizes, not on the number of tokens.

    Layers that shared their inputs at first, and then did not, make it start again from the first
    window, without that mistake.

    Args:
        model: left as it was. Only its ``base_model`` runs where that holds all the layers: logits
            of a large vocabulary cost more memory than anything else.
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
    base = getattr(model, "base_model", model)
    inside = set(base.modules())
    body = base if all(module in inside for module in layers.values()) else model
    device = next(model.parameters()).device
    alone: set[str] = set()
    while True:
        collector = _Collector(alone)
        hooks = [
            module.register_forward_pre_hook(collector.hook(name))
            for name, module in layers.items()
        ]
        try:
            # Not inference_mode: tensors that the model caches have to serve in training later.
            with torch.no_grad():
                for done, batch in enumerate(windows.split(batch_size), start=1):
                    run_model(body, batch.to(device))
                    collector.end_forward()
                    if collector.parted:
                        break
                    on_batch(min(done * batch_size, len(windows)))
        finally:
            for hook in hooks:
                hook.remove()
        if not collector.parted:
            return {name: collector.result(name, module) for name, module in layers.items()}
        alone |= collector.parted


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
    """Sums of the Gram matrices; layers with the same input tensors point to the same sum.

    A layer follows another from its first call on, if both were given the same tensor for the first
    time, and has to be given the same ones ever after.

    Args:
        alone: layers that follow no other.
    """

    def __init__(self, alone: set[str]) -> None:
        self.alone = alone
        self.parted: set[str] = set()  # layers that went another way than the one they followed
        self.grams: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.leader: dict[str, str] = {}  # layer to the layer that sums for it
        self.fresh: list[str] = []  # leaders whose first forward this is
        self.seen: dict[str, list[weakref.ref[Tensor]]] = {}  # inputs of this forward, by leader
        self.calls: dict[str, int] = {}  # of a layer, in this forward

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            self.calls[name] = self.calls.get(name, 0) + 1
            if name not in self.leader:
                self.leader[name] = self._find_leader(name, x)
            leader = self.leader[name]
            if leader == name:
                self.seen.setdefault(name, []).append(weakref.ref(x))
                self._add(name, x)
                return
            before = self.seen.get(leader, [])
            call = self.calls[name]
            if call > len(before) or before[call - 1]() is not x:
                self.parted.add(name)

        return observe

    def _find_leader(self, name: str, x: Tensor) -> str:
        if name not in self.alone:
            for other in self.fresh:
                if self.seen[other][0]() is x:
                    return other
        self.fresh.append(name)
        return name

    def end_forward(self) -> None:
        """Call after each forward."""
        for name, leader in self.leader.items():
            if self.calls.get(name, 0) != self.calls.get(leader, 0):
                self.parted.add(name)
        self.seen.clear()
        self.calls.clear()
        self.fresh.clear()

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        gram = self.grams.get(name)
        if gram is None:
            gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
            self.grams[name] = gram
        for chunk in rows.split(2048):
            wide = chunk.float()
            gram.add_((wide.T @ wide).double())
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

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
                f"the inputs of {name} hold NaN or Inf on the calibration text: the model "
                f"overflows in its dtype, or its weights are broken"
            )
        return Statistics(gram, self.tokens[leader])


def sample_from_model(
    model: nn.Module,
    samples: int,
    length: int,
    *,
    start: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> Tensor:
    """Calibration text written by the model itself, for when there is none.

    Args:
        model: a causal language model with ``generate``.
        samples: sequences.
        length: tokens of each.
        start: the id every sequence begins with (it is not part of it); None: a random one that the
            model's config does not name as special.
        seed: the same seed gives the same text; the global random state is left alone.
        batch_size: sequences at a time.
        on_batch: called with the number of sequences done, after each batch.

    Returns:
        Token ids (samples, length), on the CPU, drawn at temperature 1 from the whole vocabulary,
        whatever the model's ``generation_config`` says.

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
    ordinary = torch.tensor(sorted(set(range(vocabulary)) - _special_ids(model)))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    own = model.generation_config
    plain = type(own)(  # type: ignore[operator]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        pad_token_id=0,
        decoder_start_token_id=own.decoder_start_token_id,  # type: ignore[union-attr]
    )
    sources = [torch.default_generator]  # torch.manual_seed would seed every CUDA device
    if device.type == "cuda":
        sources.append(torch.cuda.default_generators[cast(int, device.index)])
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        for source in sources:
            source.manual_seed(seed)
        try:
            model.generation_config = plain  # type: ignore[assignment] # generate fills gaps from it
            for done in range(0, samples, batch_size):
                count = min(batch_size, samples - done)
                chosen = torch.randint(len(ordinary), (count, 1), generator=generator)
                first = ordinary[chosen] if start is None else torch.full((count, 1), start)
                first = first.to(device)
                ids = model.generate(  # type: ignore[operator]
                    first, attention_mask=torch.ones_like(first), generation_config=plain
                )
                parts.append(ids[:, 1:].cpu())
                on_batch(done + count)
        finally:
            model.generation_config = own
    return torch.cat(parts)


def _special_ids(model: nn.Module) -> set[int]:
    """Token ids that the model's config gives a meaning of their own."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    values = [getattr(model.config, name, None) for name in names]
    return {
        each
        for value in values
        for each in (value if isinstance(value, list) else [value])
        if isinstance(each, int)
    }
